"""A run that was interrupted goes on from its last committed round, with the result of one that was not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from contextlib import suppress

import laws
import numpy as np
import pytest
from crashes import killed_at
from faults.flower import ArithmeticStation, FlowerGrid, Node

from server import journal as journal_module
from server import rounds as rounds_module
from server.journal import Journal, RunIdentity
from server.rounds import Rounds
from shared_models.errors import FederadError

SITES = ("site-1", "site-22", "site-333")


@pytest.fixture(scope="module", params=["best", "averaged"])
def plan(smoke_plan, request):
    """Four rounds, of which one model is released or the average."""
    decay = 0.6 if request.param == "averaged" else None
    strategy = smoke_plan.strategy.model_copy(update={"release": request.param, "average_decay": decay})
    return smoke_plan.model_copy(update={"rounds": 4, "strategy": strategy})


def start():
    return {"w": np.linspace(-1, 1, 60, dtype=np.float32).reshape(20, 3), "b": np.zeros((), np.float32)}


def rounds_in(plan, folder, *, diary=None, run="a-run", seed=0, on_progress=lambda _: None):
    nodes = [Node(i + 1, ArithmeticStation(name, diary)) for i, name in enumerate(SITES)]
    grid = FlowerGrid(nodes)
    return Rounds(plan, grid, Journal(folder), run=run, seed=seed, weights=start(), on_progress=on_progress)


@pytest.fixture(scope="module")
def undisturbed(plan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    outcome = rounds_in(plan, folder).run()
    if plan.strategy.release == "best":
        assert outcome.best_round == 1  # so that a run which goes on has to remember it
    return outcome, Journal(folder).records()


def assert_same(outcome, folder, undisturbed) -> None:
    """The outcome and the journal are those of a run that nobody disturbed, seconds apart."""
    expected, records = undisturbed
    laws.assert_same_bits(outcome.last, expected.last)
    laws.assert_same_bits(outcome.best, expected.best)
    assert outcome.best_round == expected.best_round
    assert outcome.test == expected.test
    timeless = [{**record, "seconds": 0} for record in Journal(folder).records()]
    assert timeless == [{**record, "seconds": 0} for record in records]


def assert_one_question_for_each_round(diary) -> None:
    """Whoever asks again asks the same: a station refuses the same round with other weights."""
    weights: dict[tuple[int, str], str] = {}
    for line in diary.read_text().splitlines():
        round_, kind, sha256 = json.loads(line)
        assert weights.setdefault((round_, kind), sha256) == sha256


class TestResume:
    @pytest.mark.parametrize("n_committed", [1, 2, 3, 4])
    def test_goes_on_after_the_last_committed_round(self, plan, tmp_path, undisturbed, n_committed):
        """
        Interrupted after any round, the run asks for the next one and ends with the same weights, best and records.
        """

        def stop(event):
            if event.what == "committed" and event.round == n_committed:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            rounds_in(plan, tmp_path, on_progress=stop).run()
        events = []
        outcome = rounds_in(plan, tmp_path, on_progress=events.append).run()

        assert [e.round for e in events if e.what == "resumed"] == [n_committed]
        assert [e.round for e in events if e.what == "committed"] == list(range(n_committed + 1, 5))
        assert_same(outcome, tmp_path, undisturbed)

    def test_finished_run_gives_its_outcome_again(self, plan, tmp_path, undisturbed):
        """
        A run whose process died after the last round validates and tests, and trains nothing.
        """
        rounds_in(plan, tmp_path).run()
        diary = tmp_path / "diary"
        outcome = rounds_in(plan, tmp_path, diary=diary).run()

        assert {json.loads(line)[1] for line in diary.read_text().splitlines()} == {"validate", "test"}
        assert_same(outcome, tmp_path, undisturbed)


class TestKilled:
    @pytest.mark.parametrize("plan", ["averaged"], indirect=True)
    @pytest.mark.parametrize("module", [journal_module, rounds_module], ids=["journal", "rounds"])
    def test_killed_at_steps_all_over_a_run_it_ends_the_same(self, plan, tmp_path, undisturbed, module):
        """
        SIGKILL at steps throughout, then a new process: the same weights bit for bit, and no question asked differently.
        """
        self.kill_at_every(61 if module is rounds_module else 11, module, plan, tmp_path, undisturbed)

    @pytest.mark.slow
    @pytest.mark.system
    @pytest.mark.parametrize("plan", ["best"], indirect=True)
    @pytest.mark.parametrize(("module", "step"), [(journal_module, 1), (rounds_module, 9)], ids=["journal", "rounds"])
    def test_killed_at_close_steps_of_a_run_it_ends_the_same(self, plan, tmp_path, undisturbed, module, step):
        """
        SIGKILL before each single line that the journal carries out, and each ninth of the round loop; then a new process.
        """
        self.kill_at_every(step, module, plan, tmp_path, undisturbed)

    def kill_at_every(self, step, module, plan, tmp_path, undisturbed):
        n_lines, n_kills = 1, 0
        while True:
            folder = tmp_path / str(n_lines)
            folder.mkdir()
            diary = folder / "diary"
            killed = killed_at(n_lines, module, lambda f=folder, d=diary: rounds_in(plan, f / "run", diary=d).run())
            outcome = rounds_in(plan, folder / "run", diary=diary).run()

            assert_same(outcome, folder / "run", undisturbed)
            assert_one_question_for_each_round(diary)
            shutil.rmtree(folder)
            if not killed:
                break
            n_lines, n_kills = n_lines + step, n_kills + 1
        assert n_kills > 20

    def test_killed_again_and_again_it_gets_to_the_end(self, plan, tmp_path, undisturbed):
        """
        A process that dies every few steps still brings the run forward, as long as it lives through a round.
        """
        n_kills = 0
        while killed_at(900, rounds_module, lambda: rounds_in(plan, tmp_path / "run").run()):
            n_kills += 1
            assert n_kills < 20

        assert n_kills > 1
        assert_same(rounds_in(plan, tmp_path / "run").run(), tmp_path / "run", undisturbed)


class TestRefused:
    def test_another_run_does_not_continue_a_journal(self, plan, tmp_path):
        """
        The same folder with another run, seed or plan is S197, and nothing in it is changed.
        """
        rounds_in(plan, tmp_path).run()
        for other in ({"run": "b-run"}, {"seed": 1}, {"plan": plan.model_copy(update={"rounds": 5})}):
            with pytest.raises(FederadError) as caught:
                rounds_in(**{"plan": plan, "folder": tmp_path} | other).run()
            assert caught.value.code == "S197"

        assert Journal(tmp_path).identity() == RunIdentity("a-run", 0, plan.sha256)
        assert len(Journal(tmp_path).records()) == 4

    @pytest.mark.parametrize("damage", ["missing", "cut short", "one bit", "another round's"])
    def test_damaged_weights_are_not_trained_on(self, plan, tmp_path, damage):
        """
        Weights that are not the committed ones, in whatever way, end in S197 before any site is asked.
        """
        rounds_in(plan, tmp_path).run()
        path = Journal(tmp_path).weights_path(4)
        data = bytearray(path.read_bytes())
        if damage == "missing":
            path.unlink()
        elif damage == "cut short":
            path.write_bytes(data[:-5])
        elif damage == "one bit":
            data[-1] ^= 1
            path.write_bytes(data)
        else:
            shutil.copy(Journal(tmp_path).weights_path(3), path)
        diary = tmp_path / "diary"
        with pytest.raises(FederadError) as caught:
            rounds_in(plan, tmp_path, diary=diary).run()

        assert caught.value.code == "S197"
        assert path.name in caught.value.happened or "round 4" in caught.value.happened
        assert not diary.exists()


@pytest.mark.system
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
class TestFullDisk:
    @pytest.fixture
    def small_disk(self, tmp_path):
        folder = tmp_path / "disk"
        folder.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, check=False
        )
        if mounted.returncode:
            pytest.skip("cannot mount a small file system here")
        yield folder
        subprocess.run(["umount", str(folder)], check=True)

    def test_run_pauses_and_goes_on_with_more_room(self, small_disk, plan, undisturbed):
        """
        A disk that is full at the journal is S198; committed rounds stay, and with room the run ends as undisturbed.
        """

        def fill(event):
            if event.what == "committed" and event.round == 2:
                with suppress(OSError), (small_disk / "ballast").open("wb", buffering=0) as stream:
                    while True:
                        stream.write(b"\0" * 4096)

        with pytest.raises(FederadError) as caught:
            rounds_in(plan, small_disk / "run", on_progress=fill).run()
        assert caught.value.code == "S198"
        assert [record["round"] for record in Journal(small_disk / "run").records()] == [1, 2]

        (small_disk / "ballast").unlink()
        assert_same(rounds_in(plan, small_disk / "run").run(), small_disk / "run", undisturbed)
