"""A lying server, a machine that dies and an administrator who restores: what left never exceeds what was paid for.

Real stations with real folders. What they draw of the operating system's randomness is noted in a file outside of them, so
that it can be held against the ledger also after a SIGKILL: no noise before its charge, and no noise twice.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from crashes import killed_at
from kills import can_kill_at_writes, killed_at_write
from privately import ask_of, private

from client import audit, privacy, training, work
from client import station as station_module
from client.audit import AuditLog
from client.ledger import FILE, Spent
from client.policy import Policy
from client.site import SiteConfig
from client.station import Station
from shared_models.errors import FederadError
from shared_models.messages import Ask, Question, decode_answer, encode_ask
from shared_models.moments import Layout
from shared_models.plan import Plan

DECLARED = 20

RUN = "run-a"

SCANNERS = ("SIEMENS 3 T", "GE 1.5 T", "PHILIPS 3 T", "CANON 1.5 T")
MOMENTS_NOISE = 6.0

PIECES = {
    "ledger": (FILE,),
    "answers": ("answers",),
    "audit": (audit.FILE, f"{audit.FILE}.head"),
}
"""What can be put back from an older copy. The anchor is the hospital's, elsewhere."""


@pytest.fixture(scope="module")
def plan(smoke_plan) -> Plan:
    """Four rounds of one step, metrics in every second, moments in the second."""
    privacy_ = {
        "noise_multiplier": 4.0,
        "patients_per_step": 4,
        "steps_per_round": 1,
        "metrics_every": 2,
        "metrics_noise": 20.0,
    }
    return private(
        smoke_plan,
        privacy_,
        rounds=4,
        data={"patch": [32, 32]},
        task={"channels": [2, 4]},
        training={"optimizer": "sgd", "samples_per_patient": 1},
        adaptation={"adversarial": "moments", "moments_noise": MOMENTS_NOISE, "warm_up": 0.5},
    )


@pytest.fixture(scope="module")
def approved(plan, hospitals, tmp_path_factory) -> Path:
    """A station that has approved the plan, before any question; the trainer it will use is warm in this process."""
    folder = tmp_path_factory.mktemp("approved") / "station"
    policy = Policy(lifetime_epsilon=1e3, run_epsilon=1e3, minimum_patients=1)
    data = str(hospitals[0].folder)
    config = SiteConfig(name="site-1", data=data, device="cpu", policy=policy, scanners=SCANNERS)
    Station.create(folder, config).approve(plan, declared_size=DECLARED)
    warm = shutil.copytree(folder, folder.with_name("warm"))
    for round_ in (1, 2):
        Station(warm).answer(encode_ask(ask_of(plan, round_)))
    return folder


@dataclass
class World:
    """A station, and what is known about it outside."""

    folder: Path
    plan: Plan
    drawn: Path
    """Lines of what its noise and coins were drawn from."""

    @property
    def station(self) -> Station:
        return Station(self.folder)

    @property
    def spent(self) -> Spent:
        return self.station.ledger().spent()

    def n_steps_drawn(self) -> int:
        """Training steps for which noise was drawn, in any process, dead or alive."""
        return self._n_drawn(sum(array.size for array in ask_of(self.plan).weights.values()))

    def n_moments_drawn(self) -> int:
        """The same of releases of moments."""
        return self._n_drawn(len(SCANNERS) * Layout.of(self.plan).shape[1])

    def _n_drawn(self, n_values: int) -> int:
        return sum(int(line.split()[0]) == n_values for line in self._lines())

    def _lines(self) -> list[str]:
        return self.drawn.read_text().splitlines() if self.drawn.exists() else []

    def assert_holds(self) -> None:
        """What must be true at any time: steps and moments were charged before they were made, and no stream came twice."""
        of_training = [c for c in self.spent.charges if c.question.kind == "train"]
        assert self.n_steps_drawn() <= len(of_training) * self.plan.privacy.steps_per_round
        moments = [e for c in of_training for e in c.events if e.noise_multiplier == MOMENTS_NOISE]
        assert self.n_moments_drawn() <= len(moments)
        assert len({line.split()[1] for line in self._lines()}) == len(self._lines())


@pytest.fixture
def world(approved, plan, tmp_path, monkeypatch) -> Callable[[str], World]:
    """Makes worlds, each with a copy of the approved station."""
    real = privacy._random_words
    where = {"file": tmp_path / "nowhere"}

    def noted(n: int) -> np.ndarray:
        words = real(n)
        line = f"{n} {hashlib.sha256(words[:64].tobytes()).hexdigest()}\n" if n >= 64 else ""
        with where["file"].open("a") as file:
            file.write(line)
        return words

    monkeypatch.setattr(privacy, "_random_words", noted)
    monkeypatch.setattr(privacy, "CHUNK", 2**40)

    def make(name: str) -> World:
        where["file"] = tmp_path / f"{name}.drawn"
        anchor = tmp_path / f"{name}.anchor"
        made = World(shutil.copytree(approved, tmp_path / name), plan, where["file"])
        shutil.move(made.folder / "ledger.anchor", anchor)
        made.station.config.model_copy(update={"anchor": str(anchor)}).save(made.folder)
        return made

    return make


def answered_after_a_kill(world: World, ask: Ask, before: Spent, left: Path) -> str:
    """Hold a station that was killed while it answered to what was promised, and let it answer; how far it had come."""
    question, world_spent = ask.question, world.spent
    charges = [charge for charge in world_spent.charges if charge.question == question]
    stored = world.station.ledger().look_up(question).answer
    had_come = "stored" if stored is not None else "charged" if charges else "nothing"
    lines = [e for e in AuditLog(world.folder / audit.FILE).entries() if e["event"] == "answer"]

    world.assert_holds()
    assert len(charges) <= 1
    assert world_spent.charges[: len(before.charges)] == before.charges
    if left.exists() and (came_out := left.read_bytes()):
        assert stored is not None, "left without being stored"
        assert stored.startswith(came_out)
        assert hashlib.sha256(stored).hexdigest() in {line["sha256"] for line in lines}, "left without a line"
    answer = decode_answer(again := world.station.answer(encode_ask(ask)))
    assert answer.refusal is None
    assert stored is None or again == stored
    after = world.spent
    assert len(after.charges) == len(before.charges) + len(charges) + (stored is None)
    assert after.run_epsilon(question.run, 1e-5) >= world_spent.run_epsilon(question.run, 1e-5)
    assert answer.cost["epsilon"] == pytest.approx(after.run_epsilon(question.run, 1e-5))
    world.assert_holds()
    return had_come


def killed_answer(world: World, ask: Ask, killed: Callable[[Callable[[], None]], bool]) -> tuple[bool, str]:
    """Answer a question in a process that is killed; whether it was, and how far it had come."""
    before, left = world.spent, world.folder.with_name(f"{world.folder.name}.left")

    def work_() -> None:
        left.write_bytes(world.station.answer(encode_ask(ask)))

    was_killed = killed(work_)
    return was_killed, answered_after_a_kill(world, ask, before, left)


class TestKilled:
    @pytest.mark.slow
    @pytest.mark.skipif(
        not can_kill_at_writes, reason="stops a process at its system calls, which needs Linux on x86-64"
    )
    def test_killed_before_any_durable_write_of_an_answer(self, world, plan):
        """
        Every third write from the question to the answer: charge, noise, bytes, settlement, audit. Nothing is under-
        counted, at most the round's own charge is lost, and the round can be had.
        """
        outcomes = []
        for n_writes in range(1, 1000, 3):
            place = world(f"write-{n_writes}")
            killed, had_come = killed_answer(place, ask_of(plan, 2), lambda w, n=n_writes: killed_at_write(n, w))
            outcomes.append(had_come)
            shutil.rmtree(place.folder)
            if not killed:
                break

        assert len(outcomes) > 15
        assert set(outcomes) == {"nothing", "charged", "stored"}

    @pytest.mark.parametrize(
        ("module", "stride", "expected"),
        [
            (station_module, 9, {"nothing", "charged", "stored"}),
            (work, 5, {"charged", "stored"}),
            (training, 60, {"charged", "stored"}),
        ],
        ids=["station", "work", "training"],
    )
    def test_killed_between_the_lines_of_an_answer(self, world, plan, module, stride, expected):
        """
        The same between the lines of the code that decides, that computes and that trains.
        """
        outcomes = set()
        for n_lines in range(1, 5000, stride):
            place = world(f"line-{n_lines}")
            killed, had_come = killed_answer(place, ask_of(plan, 2), lambda w, n=n_lines: killed_at(n, module, w))
            outcomes.add(had_come)
            shutil.rmtree(place.folder)
            if not killed:
                break

        assert outcomes == expected


class Liar:
    """A server that asks anything, of a machine that is killed and restored by chance; all from one seed."""

    RUNS = ("run-a", "run-b")

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.rng = world, np.random.default_rng(seed)
        self.copies: list[Path] = []
        self.answers: dict[Question, set[bytes]] = {}
        self.refusals: set[str] = set()
        self.did: list[str] = []

    def step(self) -> None:
        what = self.rng.choice(["ask", "again", "killed", "copy", "restore"], p=[0.4, 0.2, 0.15, 0.1, 0.15])
        self.did.append(str(what))
        getattr(self, what)()
        self.mend()
        self.world.assert_holds()

    def ask(self) -> None:
        """Any run, round, kind and weights, in any order."""
        ask = self._some_ask()
        self._note(ask, self.world.station.answer(encode_ask(ask)))

    def again(self) -> None:
        """Something that was answered before, or the same round with other weights."""
        if not self.answers:
            return self.ask()
        known = list(self.answers)[int(self.rng.integers(len(self.answers)))]
        ask = ask_of(self.world.plan, known.round, known.kind, known.run, int(self.rng.integers(2)))
        self._note(ask, self.world.station.answer(encode_ask(ask)))

    def killed(self) -> None:
        """A question whose answer is cut off at some durable write; what did come out is noted."""
        ask, out = self._some_ask(), self.world.folder.with_name("out")
        out.unlink(missing_ok=True)
        if can_kill_at_writes:
            n_writes = int(self.rng.integers(1, 80))
            killed_at_write(n_writes, lambda: out.write_bytes(self.world.station.answer(encode_ask(ask))) and None)
        if out.exists() and out.stat().st_size:
            self._note(ask, out.read_bytes())

    def copy(self) -> None:
        """A backup of everything that can be put back."""
        copy = self.world.folder.with_name(f"{self.world.folder.name}.copy-{len(self.copies)}")
        copy.mkdir()
        for name in (name for names in PIECES.values() for name in names):
            piece = self.world.folder / name
            if piece.is_dir():
                shutil.copytree(piece, copy / name)
            elif piece.exists():
                shutil.copy(piece, copy / name)
        self.copies.append(copy)

    def restore(self) -> None:
        """Some pieces from some backup."""
        if not self.copies:
            return self.copy()
        copy = self.copies[int(self.rng.integers(len(self.copies)))]
        chosen = [piece for piece in PIECES if self.rng.random() < 0.6] or ["ledger"]
        self.did[-1] += f" {'+'.join(chosen)}"
        for name in (name for piece in chosen for name in PIECES[piece]):
            place = self.world.folder / name
            if place.is_dir():
                shutil.rmtree(place)
            place.unlink(missing_ok=True)
            if (copy / name).is_dir():
                shutil.copytree(copy / name, place)
            elif (copy / name).exists():
                shutil.copy(copy / name, place)

    def mend(self) -> None:
        """What the message tells the administrator to do; the server asks in the meantime and gets a word."""
        code = ""
        try:
            self.world.station.ledger()
        except FederadError as error:
            code = error.code
        if code:
            answer = self.world.station.answer(encode_ask(self._some_ask()))
            assert (code, decode_answer(answer).refusal) == ("C167", "declined")
            self.world.station.recover_ledger()

    def _some_ask(self) -> Ask:
        kind = self.rng.choice(["train", "validate", "test"], p=[0.8, 0.1, 0.1])
        round_ = 4 if kind == "test" else int(self.rng.integers(1, 6))
        return ask_of(self.world.plan, round_, str(kind), str(self.rng.choice(self.RUNS)), int(self.rng.integers(2)))

    def _note(self, ask: Ask, answer: bytes) -> None:
        decoded = decode_answer(answer)
        if decoded.refusal is not None:
            self.refusals.add(decoded.refusal)
        elif decoded.cost:  # an answer that tells nothing of patients costs nothing
            self.answers.setdefault(ask.question, set()).add(answer)


class TestSequences:
    N_STEPS = 25

    @pytest.mark.parametrize("seed", range(3))
    def test_no_sequence_of_questions_kills_and_restores_gets_more_than_was_paid_for(self, world, seed):
        """
        Distinct released values never exceed settled charges, no question has two answers, no round is answered for two
        sets of weights, and epsilon never falls.
        """
        liar = Liar(world(f"liar-{seed}"), seed)
        spent = 0.0
        for _ in range(self.N_STEPS):
            liar.step()
            now = liar.world.spent
            assert now.lifetime_epsilon(1e-5) >= spent, liar.did
            spent = now.lifetime_epsilon(1e-5)
            assert all(len(answers) == 1 for answers in liar.answers.values()), liar.did
            assert len(liar.answers) <= len(now.settled), liar.did
            rounds = [(q.run, q.round, q.kind) for q in liar.answers]
            assert len(set(rounds)) == len(rounds), liar.did

        assert len(liar.answers) > 3
        assert {"other-weights", "policy"} <= liar.refusals
