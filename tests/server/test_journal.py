"""The journal: a round that was committed is there, whatever happened afterwards."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import time

import laws
import numpy as np
import pytest
from crashes import killed_at

from server import journal as journal_module
from server.journal import Journal


def weights_after(round_: int, n: int = 50) -> dict[str, np.ndarray]:
    """Weights that tell which round they belong to."""
    return {"w": np.full((n, 3), round_, np.float32), "b": np.array(round_, np.float32)}


def best_before(round_: int) -> int:
    """The round that a run would call its best once ``round_`` is done: every third is better than all before."""
    return max((round_ - 1) // 3 * 3, 1)


def commit_rounds(folder, first: int, last: int, n: int = 50) -> None:
    """What the round loop does to a journal, round after round."""
    journal = Journal(folder)
    for round_ in range(first, last + 1):
        if round_ > 1:
            journal.amend(round_ - 1, {"round": round_ - 1, "validated": True})
        journal.commit(round_, {"round": round_, "validated": False}, weights_after(round_, n))
        journal.keep_only(round_, round_ - 1, best_before(round_))


def assert_whole(folder, at_least: int = 0) -> int:
    """A reopened journal is a prefix of the run, with whole weights of the last and of the best round."""
    journal = Journal(folder)
    rounds = [record["round"] for record in journal.records()]
    last = len(rounds)

    assert rounds == list(range(1, last + 1))
    assert last >= at_least
    for round_ in {last, best_before(last)} if last else ():
        weights = journal.weights(round_)
        assert set(weights) == {"w", "b"}
        for array in weights.values():
            assert (array == round_).all()
    return last


class TestJournal:
    def test_round_comes_back_as_it_was_committed(self, tmp_path):
        """
        Record and weights survive reopening, the weights bit for bit.
        """
        weights = {"w": np.array([[-0.0, 1e-45], [np.pi, -1]], np.float32), "empty": np.zeros((0, 2), np.float32)}
        Journal(tmp_path).commit(1, {"round": 1, "replied": ["ä"], "loss": 0.1}, weights)
        journal = Journal(tmp_path)

        laws.assert_same_bits(journal.weights(1), weights)
        assert journal.records() == [{"round": 1, "replied": ["ä"], "loss": 0.1}]

    def test_records_come_in_the_order_of_rounds(self, tmp_path):
        """
        Oldest first, past round nine and whatever was written last.
        """
        journal = Journal(tmp_path)
        for round_ in (10, 2, 9, 1):
            journal.amend(round_, {"round": round_})

        assert [record["round"] for record in journal.records()] == [1, 2, 9, 10]

    def test_what_becomes_known_later_replaces_the_record(self, tmp_path):
        """
        A round's validation arrives with the next round, and there is still one record of it.
        """
        journal = Journal(tmp_path)
        journal.commit(1, {"validation": None}, weights_after(1))
        journal.amend(1, {"validation": {"dice": 0.5}})

        assert journal.records() == [{"validation": {"dice": 0.5}}]

    def test_round_committed_again_has_its_new_weights(self, tmp_path):
        """
        A run that resumes and repeats a round leaves the later weights.
        """
        journal = Journal(tmp_path)
        journal.commit(1, {}, weights_after(7))
        journal.commit(1, {}, weights_after(8))

        assert journal.weights(1)["b"] == 8

    def test_only_named_weights_are_kept_and_all_records(self, tmp_path):
        """
        Weights of other rounds go; what happened in them stays.
        """
        journal = Journal(tmp_path)
        for round_ in range(1, 6):
            journal.commit(round_, {"round": round_}, weights_after(round_))
        journal.keep_only(5, 4, 2)

        assert [r for r in range(1, 6) if journal.weights_path(r).exists()] == [2, 4, 5]
        assert len(journal.records()) == 5

    def test_record_that_cannot_be_written_changes_nothing_before_it(self, tmp_path):
        """
        Something that JSON has no word for is refused, and the rounds before are as they were.
        """
        journal = Journal(tmp_path)
        journal.commit(1, {"round": 1}, weights_after(1))
        with pytest.raises(TypeError):
            journal.commit(2, {"round": {1, 2}}, weights_after(2))

        assert_whole(tmp_path, at_least=1)
        assert len(journal.records()) == 1


class TestKilled:
    def test_killed_before_any_line_it_reopens_whole(self, tmp_path):
        """
        Wherever in a round's commit the process dies, every record has its weights and the run goes on from there.
        """
        commit_rounds(tmp_path / "before", 1, 4)
        last_seen = []
        for n_lines in range(1, 1000):
            folder = shutil.copytree(tmp_path / "before", tmp_path / str(n_lines))
            killed = killed_at(n_lines, journal_module, lambda folder=folder: commit_rounds(folder, 5, 5))
            last_seen.append(assert_whole(folder, at_least=4))
            commit_rounds(folder, last_seen[-1] + 1, 6)
            assert assert_whole(folder) == 6
            if not killed:
                break

        assert last_seen == sorted(last_seen)
        assert set(last_seen) == {4, 5}

    def test_killed_while_a_round_is_committed_again_it_has_the_old_weights_or_the_new(self, tmp_path):
        """
        Weights on disk are replaced at once or not at all.
        """
        seen = set()
        for n_lines in range(1, 1000):
            Journal(tmp_path).commit(1, {"round": 1}, weights_after(7))
            again = Journal(tmp_path)
            killed = killed_at(n_lines, journal_module, lambda again=again: again.commit(1, {}, weights_after(8)))
            weights = Journal(tmp_path).weights(1)
            seen.add(float(weights["b"]))

            assert (weights["w"] == weights["b"]).all()
            if not killed:
                break

        assert seen == {7.0, 8.0}

    def test_killed_at_any_moment_it_reopens_whole(self, tmp_path):
        """
        Killed by the clock, also in the middle of a write of megabytes, the journal is a whole beginning of the run.
        """
        fork = multiprocessing.get_context("fork")
        done = 0
        for i in range(8):
            running = fork.Process(target=commit_rounds, args=(tmp_path, done + 1, 10_000, 100_000))
            running.start()
            while len(Journal(tmp_path).records()) < done + 1:
                time.sleep(0.001)
            time.sleep(random.Random(i).uniform(0, 0.03))
            running.kill()
            running.join()
            done = assert_whole(tmp_path, at_least=done + 1)
