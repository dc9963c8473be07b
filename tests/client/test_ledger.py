"""The ledger: what is spent stays spent, whatever dies, whoever lies and whichever copy is put back."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import shutil
import signal
import sqlite3
from dataclasses import asdict, replace

import laws
import pytest
from crashes import killed_at
from hypothesis import given
from hypothesis import strategies as st
from kills import can_kill_at_writes, killed_at_write

from client import answers as answers_module
from client import chain as chain_module
from client import ledger as ledger_module
from client.accounting import WITHOUT_PRIVACY, Event, epsilon, filter_order, rdp, rdp_to_epsilon
from client.answers import AnsweredBeforeError, OtherWeightsError
from client.audit import Head
from client.ledger import ANCHOR, FILE, Agreement, Caps, Ledger, Reservation
from shared_models.errors import FederadError
from shared_models.messages import Question

SECRET = b"\x07" * 32

ROUND = (Event(noise_multiplier=2.0, sampling_rate=0.1, steps=10),)
"""What a round releases."""

RUN = (Event(noise_multiplier=2.0, sampling_rate=0.1, steps=40),)
"""What a run of four rounds releases: epsilon 1.46 at delta 1e-5."""

CAPS = Caps(run=3.0, delta=1e-5, lifetime=6.0, lifetime_delta=1e-5)

OPEN = Caps(run=math.inf, delta=1e-5, lifetime=math.inf, lifetime_delta=1e-5)

QUESTION = Question("run-1", 1, "train", "c" * 64, "a" * 64)


def question_of(round_: int, run: str = "run-1") -> Question:
    return replace(QUESTION, run=run, round=round_, weights_sha256=f"{round_:064d}")


def answer_to(round_: int) -> bytes:
    return f"answer {round_} ".encode() * 2_000


def reserve(ledger: Ledger, question: Question, **kwargs) -> Reservation:
    kwargs = {"cohort": "k", "events": ROUND, "whole_run": RUN, "caps": CAPS} | kwargs
    return ledger.reserve(question, **kwargs)


def train(ledger: Ledger, round_: int, run: str = "run-1", answer: bytes | None = None) -> None:
    """A whole round."""
    question = question_of(round_, run)
    ledger.settle(reserve(ledger, question), question, answer or answer_to(round_))


def opened(folder, anchor=None) -> Ledger:
    return Ledger.open(folder, SECRET, anchor)


def lines_of(folder) -> list[str]:
    with contextlib.closing(sqlite3.connect(folder / FILE)) as db:
        return [line for (line,) in db.execute("SELECT line FROM chain ORDER BY n")]


def anchored(folder) -> list[str]:
    return (folder / ANCHOR).read_text().splitlines()


def changed(folder, statement: str, *values) -> None:
    with contextlib.closing(sqlite3.connect(folder / FILE)) as db, db:
        db.execute(statement, values)


def code_of(work) -> str:
    with pytest.raises(FederadError) as caught:
        work()
    assert caught.value.remedies
    return caught.value.code


def spent_or_code(folder) -> object:
    """What was spent, or the number of the error that says why nobody knows."""
    try:
        return opened(folder).spent()
    except FederadError as error:
        return error.code


@pytest.fixture
def folder(tmp_path):
    """A station's folder."""
    folder = tmp_path / "station"
    folder.mkdir()
    return folder


@pytest.fixture
def ledger(folder):
    """A new ledger."""
    return opened(folder)


class TestCharges:
    def test_charge_is_there_before_the_first_step(self, ledger, folder):
        """
        What is reserved is spent, for whoever opens the ledger next, settled or not.
        """
        reservation = reserve(ledger, QUESTION)
        spent = opened(folder).spent()

        assert [charge.question for charge in spent.charges] == [QUESTION]
        assert spent.charges[0].events == ROUND
        assert spent.charges[0].cohort == "k"
        assert spent.settled == frozenset()
        assert spent.run_epsilon("run-1", 1e-5) == epsilon(ROUND, 1e-5) == reservation.epsilon

    def test_settled_answer_is_given_again(self, ledger, folder):
        """
        The answer is found with the charge it came from, as often as it is asked for.
        """
        train(ledger, 1)

        assert [opened(folder).look_up(question_of(1)).answer for _ in range(2)] == [answer_to(1)] * 2
        assert opened(folder).spent().settled == {c.n for c in ledger.spent().charges}

    def test_bytes_of_older_rounds_go_while_the_station_runs(self, ledger, folder):
        """
        The newest two rounds keep their bytes on the disk; nobody has to open the ledger anew for that.
        """
        for round_ in (1, 2, 3, 4):
            train(ledger, round_)

        assert sorted(path.name[:6] for path in (folder / "answers").iterdir()) == ["000003", "000004"]

    def test_rounds_of_a_run_are_reckoned_together(self, ledger):
        """
        Four rounds of ten steps cost what forty steps cost: less than four times one, and more than one.
        """
        for round_ in (1, 2, 3, 4):
            train(ledger, round_)

        assert ledger.spent().run_epsilon("run-1", 1e-5) == pytest.approx(epsilon(RUN, 1e-5))

    def test_runs_add_up_at_one_order(self, ledger):
        """
        The divergences of all runs are added at the order that was fixed with the first charge.
        """
        train(ledger, 1, "run-1")
        order = ledger.spent().order
        train(ledger, 1, "run-2")
        spent = ledger.spent()

        assert spent.order == order
        assert spent.lifetime_epsilon(1e-5) == pytest.approx(
            2 * rdp(ROUND, order) + math.log1p(-1 / order) - (math.log(1e-5) + math.log(order)) / (order - 1)
        )
        assert spent.lifetime_epsilon(1e-5) > spent.lifetime_epsilon_by_prv(1e-5) > epsilon(ROUND, 1e-5)

    def test_another_accountant_agrees(self, ledger):
        """
        The events in the ledger, replayed by dp-accounting, give the same epsilon within 1 %.
        """
        dp_accounting = pytest.importorskip("dp_accounting")
        for run in ("run-1", "run-2"):
            for round_ in (1, 2, 3):
                train(ledger, round_, run)
        replay = dp_accounting.pld.PLDAccountant()
        for line in lines_of(ledger.folder):
            for event in json.loads(line).get("events", ()):
                gaussian = dp_accounting.GaussianDpEvent(event["noise_multiplier"])
                replay.compose(dp_accounting.PoissonSampledDpEvent(event["sampling_rate"], gaussian), event["steps"])

        assert ledger.spent().lifetime_epsilon_by_prv(1e-5) == pytest.approx(replay.get_epsilon(1e-5), rel=0.01)

    def test_cut_round_is_charged_again(self, ledger):
        """
        A round that was reserved and never settled stays spent; training it again is a second charge.
        """
        reserve(ledger, QUESTION)
        again = reserve(ledger, QUESTION)
        ledger.settle(again, QUESTION, b"answer")
        spent = ledger.spent()

        assert len(spent.charges) == 2
        assert spent.settled == {again.n}
        assert spent.run_epsilon("run-1", 1e-5) == epsilon([*ROUND, *ROUND], 1e-5)

    def test_question_is_bound_to_its_weights_from_the_charge_on(self, ledger):
        """
        The same round with other weights is refused, also when the first training died before it was settled.
        """
        reserve(ledger, QUESTION)
        other = replace(QUESTION, weights_sha256="b" * 64)

        for work in (lambda: reserve(ledger, other), lambda: ledger.look_up(other).answer):
            with pytest.raises(OtherWeightsError):
                work()
        assert len(ledger.spent().charges) == 1

    def test_answered_question_is_never_charged_again(self, ledger, folder):
        """
        Not with the same weights, not with others, and not after its bytes are gone.
        """
        train(ledger, 1)
        for file in (folder / "answers").glob("*.safetensors"):
            file.unlink()

        for asked in (question_of(1), replace(question_of(1), weights_sha256="b" * 64)):
            for work in (lambda asked=asked: reserve(ledger, asked), lambda asked=asked: ledger.look_up(asked).answer):
                with pytest.raises(AnsweredBeforeError):
                    work()
        assert len(ledger.spent().charges) == 1

    def test_reservation_is_settled_once_and_for_its_question(self, ledger):
        """
        One charge, one answer.
        """
        reservation = reserve(ledger, question_of(1))
        with pytest.raises(ValueError, match="another question"):
            ledger.settle(reservation, question_of(2), b"answer")
        ledger.settle(reservation, question_of(1), b"answer")
        with pytest.raises(AnsweredBeforeError):
            ledger.settle(reservation, question_of(1), b"second")
        with pytest.raises(ValueError, match="not in the ledger"):
            ledger.settle(replace(reservation, n=1), question_of(3), b"answer")

        assert ledger.look_up(question_of(1)).answer == b"answer"
        assert ledger.look_up(question_of(2)).answer is None

    def test_answers_that_cost_nothing_are_kept_too(self, ledger):
        """
        An answer without a charge is stored and found, and changes nothing in what was spent.
        """
        question = replace(QUESTION, kind="validate")
        ledger.settle(None, question, b"measured")

        assert ledger.look_up(question).answer == b"measured"
        assert ledger.spent().charges == ()

    def test_run_without_privacy_is_charged_once_and_without_bound(self, ledger):
        """
        Infinity does not grow: one charge for the run, and nothing bounds what was spent from then on.
        """
        for round_ in (1, 2, 3):
            question = question_of(round_)
            plain = (WITHOUT_PRIVACY,)
            reservation = reserve(ledger, question, events=plain, whole_run=plain, caps=OPEN)
            ledger.settle(reservation, question, answer_to(round_))

        assert len(ledger.spent().charges) == 1
        assert ledger.spent().lifetime_epsilon(1e-5) == math.inf
        assert ledger.look_up(question_of(3)).answer == answer_to(3)
        assert code_of(lambda: train(ledger, 1, "run-2")) == "C169"

    def test_round_that_costs_nothing_is_no_round(self, ledger):
        """
        Training without an event would be training for free.
        """
        with pytest.raises(ValueError, match="costs nothing"):
            reserve(ledger, QUESTION, events=())


def cap_for_two_runs() -> float:
    """A lifetime cap that two runs fit under, and three do not."""

    def cost(n_runs: int, cap: float) -> float:
        order = filter_order(cap, 1e-5, RUN)
        return rdp_to_epsilon(n_runs * rdp(RUN, order), order, 1e-5)

    return next(cap for cap in (1 + k / 10 for k in range(100)) if cost(2, cap) <= cap < cost(3, cap))


class TestCaps:
    def test_third_run_is_refused_before_its_first_step(self, ledger):
        """
        Two runs fit under the lifetime cap; the third is refused with the figures, and nothing is charged.
        """
        caps = replace(CAPS, lifetime=cap_for_two_runs())
        for run in ("run-1", "run-2"):
            for round_ in (1, 2, 3, 4):
                reserve(ledger, question_of(round_, run), caps=caps)
        with pytest.raises(FederadError) as refused:
            reserve(ledger, question_of(1, "run-3"), caps=caps)

        assert refused.value.code == "C169"
        assert f"{caps.lifetime:.4g}" in refused.value.happened
        assert f"{ledger.spent().lifetime_epsilon(1e-5):.4g}" in refused.value.happened
        assert len(ledger.spent().charges) == 8

    def test_run_that_does_not_fit_as_a_whole_is_not_begun(self, ledger):
        """
        Its first round would fit; the last would not, and a run that stops half way serves nobody.
        """
        caps = replace(CAPS, run=0.99 * epsilon(RUN, 1e-5))

        assert epsilon(ROUND, 1e-5) < caps.run
        assert code_of(lambda: reserve(ledger, QUESTION, caps=caps)) == "C169"
        assert ledger.spent().charges == ()

    def test_rounds_that_were_cut_count_towards_the_run(self, ledger):
        """
        With a cap of exactly the run, four rounds fit; after one that was cut, the fourth is refused.
        """
        caps = replace(CAPS, run=epsilon(RUN, 1e-5))
        for round_ in (1, 2, 2, 3):
            reserve(ledger, question_of(round_), caps=caps)

        assert code_of(lambda: reserve(ledger, question_of(4), caps=caps)) == "C169"
        assert ledger.spent().run_epsilon("run-1", 1e-5) <= caps.run

    def test_cap_that_was_raised_keeps_its_order(self, ledger):
        """
        The order is fixed with the first charge: choosing it anew after seeing results would void the sum.
        """
        reserve(ledger, question_of(1))
        order = ledger.spent().order
        reserve(ledger, question_of(1, "run-2"), caps=replace(CAPS, lifetime=100.0))

        assert ledger.spent().order == order

    def test_many_at_once_never_pass_the_cap(self, ledger, folder):
        """
        Eight processes reserve as fast as they can: every success is a charge, and together they stay below the cap.
        """
        caps = replace(CAPS, run=epsilon(RUN, 1e-5), lifetime=math.inf)
        reserve(ledger, question_of(1), caps=caps)
        children = []
        for number in range(8):
            child = os.fork()
            if child == 0:
                with contextlib.suppress(FederadError):
                    reserve(opened(folder), question_of(10 + number), caps=caps)
                    os._exit(42)
                os._exit(0)
            children.append(child)
        successes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children].count(42)

        assert successes == 3
        assert len(ledger.spent().charges) == 4
        assert lines_of(folder) == anchored(folder)

    def test_many_writers_leave_one_chain(self, folder):
        """
        Six processes write as fast as they can: ledger and anchor hold the same entries, each once.
        """
        opened(folder)

        def work(writer: int) -> None:
            for round_ in range(1, 21):
                opened(folder).settle(None, replace(question_of(round_, f"run-{writer}"), kind="validate"), b"x")

        children = []
        for writer in range(6):
            child = os.fork()
            if child == 0:
                try:
                    work(writer)
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(child)

        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 6
        assert len(lines_of(folder)) == 1 + 6 * 20
        assert lines_of(folder) == anchored(folder)


class TestAgreements:
    AGREED = Agreement("c" * 64, 200, 1.25, 0.08, 7.9, 1e-5)

    def test_what_was_approved_is_remembered(self, ledger, folder):
        """
        The size that was declared and the noise that follows, as they stood at the approval.
        """
        assert ledger.agreement("c" * 64) is None
        ledger.agree(self.AGREED)
        ledger.agree(self.AGREED)

        assert opened(folder).agreement("c" * 64) == self.AGREED
        assert len(lines_of(folder)) == 2

    def test_plan_may_be_approved_anew_until_it_has_trained(self, ledger):
        """
        Noise and sampling of a run are fixed before it begins, or its cost could not be reckoned.
        """
        other = replace(self.AGREED, declared_size=300)
        ledger.agree(self.AGREED)
        ledger.agree(other)
        reserve(ledger, QUESTION)

        assert code_of(lambda: ledger.agree(self.AGREED)) == "C173"
        assert ledger.agreement("c" * 64) == other

    def test_plan_without_privacy_is_agreed_on_too(self, ledger):
        """
        Its cost has no bound, which is not a number.
        """
        plain = Agreement("d" * 64, 200, 0.0, 1.0, None, 1e-5)
        ledger.agree(plain)

        assert ledger.agreement("d" * 64) == plain


def a_round_with_witnesses(folder) -> None:
    """Reserve, train, settle, send; each of the two in the middle leaves a witness that survives."""
    ledger = opened(folder)
    reservation = reserve(ledger, question_of(4))
    (folder.parent / "trained").touch()
    ledger.settle(reservation, question_of(4), answer_to(4))
    (folder.parent / "left").touch()


def prepared(tmp_path, name: str):
    """A ledger with three rounds, in a folder of its own."""
    folder = tmp_path / name / "station"
    if not (tmp_path / "three").exists():
        (tmp_path / "three").mkdir()
        for round_ in (1, 2, 3):
            train(opened(tmp_path / "three"), round_)
    shutil.copytree(tmp_path / "three", folder)
    return folder


def check_after_a_kill(folder) -> tuple[int, bool]:
    """Whatever was killed: the ledger opens, counts what was trained, and the round can be finished once."""
    ledger = opened(folder)
    charges = [charge for charge in ledger.spent().charges if charge.question == question_of(4)]
    found = ledger.look_up(question_of(4)).answer
    outcome = len(charges), found is not None

    assert len(charges) <= 1
    assert charges or not (folder.parent / "trained").exists(), "trained without a charge"
    assert found in (None, answer_to(4))
    assert found or not (folder.parent / "left").exists(), "left without being stored"
    assert lines_of(folder) == anchored(folder)
    assert ledger.look_up(question_of(3)).answer == answer_to(3)
    assert len(ledger.spent().charges) == 3 + len(charges)
    if found is None:
        train(ledger, 4, answer=b"trained again")
        assert opened(folder).look_up(question_of(4)).answer == b"trained again"
        assert len(ledger.spent().charges) == 4 + len(charges)
    files = {path.name for path in (folder / "answers").iterdir()}
    opened(folder)
    assert {path.name for path in (folder / "answers").iterdir()} <= files
    assert len(list((folder / "answers").glob("*"))) == 2
    return outcome


class TestKilled:
    @pytest.mark.skipif(
        not can_kill_at_writes, reason="stops a process at its system calls, which needs Linux on x86-64"
    )
    def test_killed_before_any_durable_write(self, tmp_path):
        """
        Every write, sync, rename and removal on the way, also those inside SQLite's commit: nothing is trained that was not
        charged, nothing leaves that was not stored, and at most the one round is lost.
        """
        outcomes = set()
        for n_writes in range(1, 1000):
            folder = prepared(tmp_path, str(n_writes))
            killed = killed_at_write(n_writes, lambda folder=folder: a_round_with_witnesses(folder))
            outcomes.add(check_after_a_kill(folder))
            shutil.rmtree(folder.parent)
            if not killed:
                break

        assert n_writes > 25
        assert outcomes == {(0, False), (1, False), (1, True)}

    @pytest.mark.slow
    @pytest.mark.parametrize("module", [ledger_module, chain_module, answers_module], ids=lambda m: m.__name__)
    def test_killed_between_lines(self, tmp_path, module):
        """
        The same between the lines of the code that keeps the ledger, every twenty-third of them.
        """
        outcomes = set()
        prepared(tmp_path, "warm")  # imports what the first use imports
        for n_lines in range(1, 5000, 23):
            folder = prepared(tmp_path, str(n_lines))
            killed = killed_at(n_lines, module, lambda folder=folder: a_round_with_witnesses(folder))
            outcomes.add(check_after_a_kill(folder))
            shutil.rmtree(folder.parent)
            if not killed:
                break

        assert outcomes <= {(0, False), (1, False), (1, True)}
        assert len(outcomes) > 1

    @pytest.mark.skipif(
        not can_kill_at_writes, reason="stops a process at its system calls, which needs Linux on x86-64"
    )
    def test_killed_while_the_ledger_begins(self, tmp_path):
        """
        A station that dies at its very first moment opens afterwards, and begins at zero, where it is.
        """
        for n_writes in range(1, 1000):
            folder = tmp_path / str(n_writes)
            folder.mkdir()
            killed = killed_at_write(n_writes, lambda folder=folder: opened(folder) and None)
            assert opened(folder).spent().charges == ()
            assert lines_of(folder) == anchored(folder)
            assert len(lines_of(folder)) == 1
            if not killed:
                break

        assert n_writes > 5

    @pytest.mark.skipif(
        not can_kill_at_writes, reason="stops a process at its system calls, which needs Linux on x86-64"
    )
    def test_killed_while_recovering(self, tmp_path):
        """
        Recovery that dies is begun again, and ends with everything that was anchored.
        """
        old = prepared(tmp_path, "old") / FILE
        for n_writes in range(1, 1000):
            folder = prepared(tmp_path, str(n_writes))
            train(opened(folder), 4)
            shutil.copy(old, folder / FILE)
            killed = killed_at_write(n_writes, lambda folder=folder: Ledger.recover(folder, SECRET) and None)
            with contextlib.suppress(FederadError):
                opened(folder)
            Ledger.recover(folder, SECRET)
            assert len(opened(folder).spent().charges) == 4
            with pytest.raises(AnsweredBeforeError):
                opened(folder).look_up(question_of(4))
            if not killed:
                break

        assert n_writes > 5


class TestPutBack:
    def test_older_ledger_is_noticed_whenever_it_was_copied(self, folder):
        """
        A copy taken after any entry but the last is refused: no training, no answer, and the way out in the message.
        """
        copies = []
        for round_ in (1, 2, 3):
            ledger = opened(folder)
            copies.append((folder / FILE).read_bytes())
            reservation = reserve(ledger, question_of(round_))
            copies.append((folder / FILE).read_bytes())
            ledger.settle(reservation, question_of(round_), answer_to(round_))
        newest = (folder / FILE).read_bytes()

        for copy in copies:
            (folder / FILE).write_bytes(copy)
            assert code_of(lambda: opened(folder)) == "C167"
            for work in (
                lambda: reserve(ledger, question_of(4)),
                lambda: ledger.look_up(question_of(1)).answer,
                lambda: ledger.settle(reservation, question_of(4), b"x"),
                ledger.spent,
            ):
                assert code_of(work) == "C167"
        (folder / FILE).write_bytes(newest)
        assert len(opened(folder).spent().charges) == 3

    def test_charge_is_at_its_anchor_before_the_first_step(self, ledger, folder):
        """
        A copy from just before a round is refused as soon as the round may train, and not only once it is over.
        """
        for round_ in (1, 2):
            before = (folder / FILE).read_bytes()
            reservation = reserve(ledger, question_of(round_))
            after = (folder / FILE).read_bytes()

            assert lines_of(folder) == anchored(folder)
            (folder / FILE).write_bytes(before)
            assert code_of(lambda: opened(folder)) == "C167"
            (folder / FILE).write_bytes(after)
            ledger.settle(reservation, question_of(round_), answer_to(round_))

    def test_after_a_restore_everything_anchored_is_spent(self, folder):
        """
        From any older copy, or none at all: the same charges as before, answered stays answered, and training goes on.
        """
        copies = []
        for round_ in (1, 2, 3):
            copies.append((folder / FILE).read_bytes() if (folder / FILE).exists() else None)
            train(opened(folder), round_)
        reserve(opened(folder), question_of(4))
        before, lines = opened(folder).spent(), lines_of(folder)
        stored = shutil.copytree(folder, folder.parent / "stored")

        for copy in copies:
            shutil.rmtree(folder)
            shutil.copytree(stored, folder)
            (folder / FILE).write_bytes(copy) if copy else (folder / FILE).unlink()
            shutil.rmtree(folder / "answers")
            n_missing = Ledger.recover(folder, SECRET)
            ledger = opened(folder)

            assert n_missing > 0
            assert lines_of(folder) == lines == anchored(folder)
            assert ledger.spent() == before
            for round_ in (1, 2, 3):
                with pytest.raises(AnsweredBeforeError):
                    reserve(ledger, question_of(round_))
            train(ledger, 4)
            assert len(ledger.spent().charges) == len(before.charges) + 1

    def test_anchor_on_another_disk_notices_the_whole_folder_put_back(self, folder, tmp_path):
        """
        The station's folder goes back to yesterday, anchor beside it and all: the hospital's own anchor does not.
        """
        elsewhere = tmp_path / "other-disk" / "anchor"
        elsewhere.parent.mkdir()
        train(opened(folder, elsewhere), 1)
        yesterday = shutil.copytree(folder, tmp_path / "yesterday")
        train(opened(folder, elsewhere), 2)
        shutil.rmtree(folder)
        shutil.copytree(yesterday, folder)

        assert code_of(lambda: opened(folder, elsewhere)) == "C167"
        Ledger.recover(folder, SECRET, elsewhere)
        assert len(opened(folder, elsewhere).spent().charges) == 2

    def test_answers_put_back_or_taken_away_buy_nothing(self, ledger, folder):
        """
        The folder of answers from yesterday, or empty: what is missing is refused, and never trained for again.
        """
        train(ledger, 1)
        yesterday = shutil.copytree(folder / "answers", folder.parent / "answers-yesterday")
        train(ledger, 2)
        shutil.rmtree(folder / "answers")
        shutil.copytree(yesterday, folder / "answers")
        ledger = opened(folder)

        assert ledger.look_up(question_of(1)).answer == answer_to(1)
        for work in (lambda: ledger.look_up(question_of(2)).answer, lambda: reserve(ledger, question_of(2))):
            with pytest.raises(AnsweredBeforeError):
                work()

    def test_missing_ledger_does_not_start_at_zero(self, folder):
        """
        Without the ledger and its anchor, stored answers or the audit still tell that there was one.
        """
        train(opened(folder), 1)
        for name in (FILE, ANCHOR):
            (folder / name).unlink()
        assert code_of(lambda: opened(folder)) == "C165"
        shutil.rmtree(folder / "answers")
        (folder / "audit.jsonl").write_text('{"event":"answer","kind":"train","n":1}\n')
        assert code_of(lambda: opened(folder)) == "C165"

    def test_ledger_deleted_under_an_open_station_is_noticed(self, ledger, folder):
        """
        A running station does not go on with an empty ledger either.
        """
        train(ledger, 1)
        for name in (FILE, ANCHOR):
            (folder / name).unlink()

        assert code_of(lambda: reserve(ledger, question_of(2))) == "C165"

    def test_beginning_anew_counts_everything_as_spent(self, folder):
        """
        With the history lost nothing bounds what was spent: a finite cap is reached, and the old files are kept.
        """
        train(opened(folder), 1)
        changed(folder, "UPDATE chain SET line = replace(line, '10', '1') WHERE n = 2")
        assert code_of(lambda: opened(folder)) == "C166"
        ledger = Ledger.begin_anew(folder, SECRET)

        assert opened(folder).spent().lifetime_epsilon(1e-5) == math.inf
        assert code_of(lambda: train(ledger, 2)) == "C169"
        reserve(ledger, question_of(2), caps=OPEN)
        assert {path.name for path in folder.glob("*.before-1")} == {f"{FILE}.before-1", f"{ANCHOR}.before-1"}
        for name in (FILE, ANCHOR):
            (folder / name).unlink()
        assert code_of(lambda: opened(folder)) == "C165"


class TestChanged:
    @pytest.fixture
    def folder(self, folder):
        """Three rounds, the last not settled."""
        for round_ in (1, 2):
            train(opened(folder), round_)
        reserve(opened(folder), question_of(3))
        return folder

    @pytest.mark.parametrize("n", range(1, 7))
    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE chain SET line = replace(line, '\"steps\":10', '\"steps\":1') || '' WHERE n = ?",
            "UPDATE chain SET line = replace(line, 'federad', 'Federad') || ' ' WHERE n = ?",
            "UPDATE chain SET line = '' WHERE n = ?",
            "UPDATE chain SET line = x'00ff' WHERE n = ?",
            "UPDATE chain SET line = (SELECT line FROM chain WHERE n = 1) || ' ' WHERE n = ?",
            "DELETE FROM chain WHERE n = ?",
            "UPDATE chain SET n = 100 WHERE n = ?",
        ],
    )
    def test_changed_entry_is_found(self, folder, statement, n):
        """
        One figure, one letter, a line that is gone or elsewhere: nothing is trained, and the entry is named.
        """
        before = lines_of(folder)
        changed(folder, statement, n)
        if lines_of(folder) == before:
            opened(folder)
            return
        assert code_of(lambda: opened(folder)) in {"C166", "C167"}

    def test_entry_changed_in_both_places_is_found(self, folder):
        """
        The same cheaper charge in the ledger and at its anchor, also as the last entry: nobody can sign it.
        """
        for n, line in enumerate(lines_of(folder), start=1):
            cheaper = line.replace('"steps":10', '"steps":1')
            if cheaper == line:
                continue
            kept, anchor = (folder / FILE).read_bytes(), (folder / ANCHOR).read_text()
            changed(folder, "UPDATE chain SET line = ? WHERE n = ?", cheaper, n)
            (folder / ANCHOR).write_text(anchor.replace(line, cheaper))
            assert code_of(lambda: opened(folder)) == "C166"
            (folder / FILE).write_bytes(kept)
            (folder / ANCHOR).write_text(anchor)
        assert '"steps":10' in lines_of(folder)[-1]

    def test_entry_made_up_without_the_secret_is_found(self, folder):
        """
        A whole chain with good hashes under another key is not this station's.
        """
        other = folder.parent / "other"
        other.mkdir()
        train(Ledger.open(other, b"\x08" * 32), 1)
        for name in (FILE, ANCHOR):
            shutil.copy(other / name, folder / name)

        assert code_of(lambda: opened(folder)) == "C166"

    def test_answer_that_was_exchanged_is_not_given(self, folder):
        """
        Neither other bytes in the file, nor another file in the table, nor another hash: what leaves is what was settled.
        """
        file = next((folder / "answers").glob("000001*"))
        file.write_bytes(b"other")
        other = next((folder / "answers").glob("000002*"))
        for statement, value in (
            ("UPDATE answers SET file = file WHERE round = 1 AND file != ?", ""),
            ("UPDATE answers SET file = ? WHERE round = 1", other.name),
            ("UPDATE answers SET sha256 = (SELECT sha256 FROM answers WHERE round = 2) WHERE round != ?", 99),
        ):
            changed(folder, statement, value)
            with pytest.raises(AnsweredBeforeError):
                opened(folder).look_up(question_of(1))
        changed(folder, "DELETE FROM answers WHERE round = ?", 1)
        ledger = opened(folder)
        for work in (lambda: ledger.look_up(question_of(1)), lambda: reserve(ledger, question_of(1))):
            with pytest.raises(AnsweredBeforeError):
                work()

    def test_truncated_file_never_makes_the_past_cheaper(self, folder):
        """
        Cut anywhere, there is a numbered error; or what was cut held no charge, and every charge is still there.
        """
        before, whole = opened(folder).spent(), (folder / FILE).read_bytes()
        outcomes = []
        for length in [*range(0, len(whole), 512), len(whole) - 1]:
            (folder / FILE).write_bytes(whole[:length])
            outcomes.append(spent_or_code(folder))

        assert all(outcome in ("C164", "C166", "C167", before) for outcome in outcomes)
        assert [outcome for outcome in outcomes if outcome == before] == outcomes[
            len(outcomes) - outcomes.count(before) :
        ]
        assert outcomes.count(before) < len(outcomes) / 3
        (folder / FILE).write_bytes(whole)
        opened(folder)

    @laws.SAME_EXAMPLES
    @given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
    def test_flipped_bits_never_make_the_past_cheaper(self, tmp_path_factory, where, flip):
        """
        Any byte of the file changed: a numbered error, or a ledger that says just the same.
        """
        folder = tmp_path_factory.mktemp("flipped")
        train(opened(folder), 1)
        before = opened(folder).spent()
        data = bytearray((folder / FILE).read_bytes())
        data[int(where * len(data))] ^= flip
        (folder / FILE).write_bytes(data)

        assert spent_or_code(folder) in ("C164", "C166", "C167", before)


class TestAnchor:
    def test_line_that_a_crash_left_unfinished_heals(self, ledger, folder):
        """
        Torn at any length: the entry is written again behind it, and nothing is counted twice.
        """
        train(ledger, 1)
        whole = (folder / ANCHOR).read_bytes()
        start = whole.rindex(b"\n", 0, -1) + 1
        for length in [*range(start, len(whole), 7), len(whole) - 1]:
            (folder / ANCHOR).write_bytes(whole[:length])
            assert len(opened(folder).spent().charges) == 1
        (folder / ANCHOR).write_bytes(whole[: start + 40])
        train(opened(folder), 2)
        assert len(opened(folder).spent().charges) == 2

    @pytest.mark.parametrize("n_left", [0, 1, 3])
    def test_anchor_that_lost_more_than_a_crash_can_lose_is_found(self, ledger, folder, n_left):
        """
        Missing or cut: until a person writes it anew, nothing is trained; then it is whole.
        """
        for round_ in (1, 2):
            train(ledger, round_)
        lines = (folder / ANCHOR).read_bytes().splitlines(keepends=True)
        (folder / ANCHOR).write_bytes(b"".join(lines[:n_left]))

        assert code_of(lambda: opened(folder)) == "C168"
        Ledger.renew_anchor(folder, SECRET)
        assert len(opened(folder).spent().charges) == 2
        assert anchored(folder) == lines_of(folder)

    def test_new_anchor_never_replaces_one_that_says_more(self, ledger, folder):
        """
        Writing the anchor anew is no way to put an older ledger back.
        """
        copy = (folder / FILE).read_bytes()
        train(ledger, 1)
        (folder / FILE).write_bytes(copy)

        assert code_of(lambda: Ledger.renew_anchor(folder, SECRET)) == "C168"
        assert code_of(lambda: opened(folder)) == "C167"

    def test_changed_anchor_is_found(self, ledger, folder):
        """
        A line of the anchor that says something else.
        """
        train(ledger, 1)
        text = (folder / ANCHOR).read_text()
        (folder / ANCHOR).write_text(text.replace('"steps":10', '"steps":1'))

        assert code_of(lambda: opened(folder)) == "C166"
        assert code_of(lambda: Ledger.recover(folder, SECRET)) == "C166"

    def test_anchor_may_be_moved(self, ledger, folder, tmp_path):
        """
        Another path in site.toml: refused until it is written there, and then the ledger goes on.
        """
        train(ledger, 1)
        elsewhere = tmp_path / "elsewhere"

        assert code_of(lambda: opened(folder, elsewhere)) == "C168"
        Ledger.renew_anchor(folder, SECRET, elsewhere)
        train(opened(folder, elsewhere), 2)
        assert len(opened(folder, elsewhere).spent().charges) == 2

    def test_nothing_is_trained_when_the_anchor_cannot_be_written(self, folder, tmp_path):
        """
        Its folder is gone: the charge that was being written counts, and no further one is made until it is back.
        """
        disk = tmp_path / "disk"
        disk.mkdir()
        train(opened(folder, disk / "anchor"), 1)
        disk.rename(tmp_path / "unplugged")

        for _ in range(3):
            assert code_of(lambda: reserve(Ledger(folder, SECRET, disk / "anchor"), question_of(2))) in {"C164", "C168"}
        (tmp_path / "unplugged").rename(disk)
        assert len(opened(folder, disk / "anchor").spent().charges) == 1

    def test_lines_say_nothing_to_whoever_finds_them(self, ledger, folder):
        """
        The hashes are keyed: the same ledger under another secret has other heads.
        """
        train(ledger, 1)
        other = folder.parent / "other"
        other.mkdir()
        train(Ledger.open(other, b"\x08" * 32), 1)

        assert {json.loads(line)["hash"] for line in anchored(folder)}.isdisjoint(
            json.loads(line)["hash"] for line in anchored(other)
        )


def in_a_process(work) -> int:
    """Do ``work`` in a child that may be limited; 42 if it was refused with C164, 0 if it came through."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except FederadError as error:
            os._exit(42 if error.code == "C164" else 1)
        except BaseException:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class TestCannotBeWritten:
    @pytest.mark.parametrize("room", [0, 600, 5_000, 9_000, 13_000])
    def test_full_disk_stops_training_before_the_first_step(self, ledger, folder, room):
        """
        Files may grow by nothing, by a little, by more: C164, no training, and with room everything goes on.
        """
        for round_ in (1, 2):
            train(ledger, round_)
        fullest = max(path.stat().st_size for path in folder.iterdir() if path.is_file())

        def work():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (fullest + room, fullest + room))
            for round_ in range(3, 100):
                reserve(opened(folder), question_of(round_), caps=OPEN)
                (folder.parent / f"trained-{round_}").touch()

        assert in_a_process(work) == 42
        trained = len(list(folder.parent.glob("trained-*")))
        charged = len(opened(folder).spent().charges) - 2
        assert trained <= charged <= trained + 1
        reserve(opened(folder), question_of(100), caps=OPEN)

    def test_answer_without_room_does_not_leave(self, ledger, folder):
        """
        Without room for the answer the round stays charged and unanswered; with room it is charged and trained again.
        """
        reservation = reserve(ledger, QUESTION)

        def work():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            ledger.settle(reservation, QUESTION, b"x" * 200_000)

        assert in_a_process(work) == 42
        assert opened(folder).look_up(QUESTION).answer is None
        assert list((folder / "answers").glob("*")) == []
        train(opened(folder), 2)

    @pytest.mark.parametrize("name", [FILE, ANCHOR, "."])
    def test_read_only_is_c164(self, ledger, folder, tmp_path, name):
        """
        Ledger, anchor or folder that the station's account may read and not write: no training.
        """
        train(ledger, 1)
        for path in [folder, *folder.rglob("*"), *folder.parents[:1]]:
            path.chmod(0o777 if path.is_dir() else 0o666)
        (folder / name).chmod(0o555 if name == "." else 0o444)
        for parent in tmp_path.parents[:3]:
            parent.chmod(parent.stat().st_mode | 0o055)

        def work():
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            reserve(Ledger(folder, SECRET), question_of(2))

        assert in_a_process(work) == 42
        (folder / name).chmod(0o777 if name == "." else 0o666)
        assert in_a_process(work) == 0


class TestAudit:
    def test_end_of_the_audit_is_remembered(self, ledger, folder):
        """
        Ledger, answers and audit share one head: an older audit can be told from what the ledger remembers.
        """
        assert ledger.audit_head is None
        ledger.settle(reserve(ledger, QUESTION), QUESTION, b"answer", audit=Head(7, "f" * 64))

        assert opened(folder).audit_head == Head(7, "f" * 64)
        assert opened(folder).head.n == len(lines_of(folder))


def test_entries_hold_nothing_about_patients(ledger, folder):
    """
    What is written down: questions, public figures, hashes. The list is here so that another one is noticed.
    """
    train(ledger, 1)
    keys = set()
    for line in lines_of(folder):
        keys |= json.loads(line).keys()

    assert keys == {
        "answer", "audit", "charge", "code", "cohort", "event", "events", "hash", "n", "order", "previous", "question",
        "sha256", "time",
    } - {"answer"}  # fmt: skip
    assert asdict(ROUND[0]).keys() == {
        "noise_multiplier", "sampling_rate", "steps", "unit", "images_per_patient", "split",
    }  # fmt: skip
