"""Answers in a ledger: the same question gets the same bytes, and never a second training."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial

import pytest
from crashes import killed_at

from client import answers as answers_module
from client.answers import ROUNDS_KEPT, AnsweredBeforeError, OtherWeightsError
from client.ledger import Ledger
from shared_models.messages import Question

SECRET = b"of the station"
QUESTION = Question("run-1", 1, "train", "c" * 64, "a" * 64)


def question_of(round_: int) -> Question:
    return replace(QUESTION, round=round_, weights_sha256=f"{round_:064d}")


def answer_to(round_: int) -> bytes:
    """Bytes long enough to need several writes."""
    return f"answer {round_} ".encode() * 20_000


@pytest.fixture
def store(tmp_path):
    """An empty ledger."""
    return Ledger.open(tmp_path, SECRET)


class TestStore:
    def test_new_question_has_no_answer(self, store):
        """
        What was never asked has to be worked for.
        """
        assert store.look_up(QUESTION).answer is None

    def test_same_question_gets_the_same_bytes(self, store):
        """
        As often as it is asked.
        """
        store.settle(None, QUESTION, b"\0bytes\xff")

        assert [store.look_up(QUESTION).answer for _ in range(3)] == [b"\0bytes\xff"] * 3

    @pytest.mark.parametrize(
        "change", [{"run": "run-2"}, {"round": 2}, {"kind": "test"}, {"plan_sha256": "d" * 64}], ids=str
    )
    def test_question_that_differs_in_its_key_is_another(self, store, change):
        """
        Another run, round, kind or plan is a new question, and both keep their own answers.
        """
        store.settle(None, QUESTION, b"one")
        other = replace(QUESTION, **change)

        assert store.look_up(other).answer is None
        store.settle(None, other, b"other")
        assert (store.look_up(QUESTION).answer, store.look_up(other).answer) == (b"one", b"other")

    def test_same_question_with_other_weights_is_refused(self, store):
        """
        A question is bound to its weights: asking again with others is refused and changes nothing.
        """
        store.settle(None, QUESTION, b"one")

        with pytest.raises(OtherWeightsError):
            store.look_up(replace(QUESTION, weights_sha256="b" * 64))
        assert store.look_up(QUESTION).answer == b"one"

    def test_second_answer_to_one_question_does_not_replace_the_first(self, store):
        """
        Whoever tries to store another answer fails, and what may have left already stays what it was.
        """
        store.settle(None, QUESTION, b"one")
        for again in (QUESTION, replace(QUESTION, weights_sha256="b" * 64)):
            with contextlib.suppress(Exception):
                store.settle(None, again, b"two")

        assert store.look_up(QUESTION).answer == b"one"

    def test_answers_survive_reopening(self, store, tmp_path):
        """
        Another process, or this one after a crash, finds bytes and bindings again.
        """
        store.settle(None, QUESTION, b"one")
        reopened = Ledger.open(tmp_path, SECRET)

        assert reopened.look_up(QUESTION).answer == b"one"
        with pytest.raises(OtherWeightsError):
            reopened.look_up(replace(QUESTION, weights_sha256="b" * 64))

    def test_bytes_of_older_rounds_go_and_their_keys_stay(self, store, tmp_path):
        """
        The newest rounds keep their bytes; an older question is known as answered and is never worked for again.
        """
        for round_ in range(1, 6):
            store.settle(None, question_of(round_), answer_to(round_))

        for round_ in range(6 - ROUNDS_KEPT, 6):
            assert store.look_up(question_of(round_)).answer == answer_to(round_)
        for round_ in range(1, 6 - ROUNDS_KEPT):
            with pytest.raises(AnsweredBeforeError) as error:
                store.look_up(question_of(round_))
            assert not isinstance(error.value, OtherWeightsError)
            with pytest.raises(OtherWeightsError):
                store.look_up(replace(question_of(round_), weights_sha256="b" * 64))
        assert len(list((tmp_path / "answers").glob("*.safetensors*"))) == ROUNDS_KEPT

    def test_bytes_that_changed_on_the_disk_are_not_given(self, store, tmp_path):
        """
        A file that is no longer what was stored counts as gone.
        """
        store.settle(None, QUESTION, b"one")
        next((tmp_path / "answers").glob("*.safetensors")).write_bytes(b"two")

        with pytest.raises(AnsweredBeforeError):
            store.look_up(QUESTION)

    def test_other_runs_keep_their_rounds(self, store):
        """
        A long run does not push out the answers of another that is still at its beginning.
        """
        store.settle(None, replace(QUESTION, run="run-2"), b"first round of another run")
        for round_ in range(1, 10):
            store.settle(None, question_of(round_), answer_to(round_))

        assert store.look_up(replace(QUESTION, run="run-2")).answer == b"first round of another run"

    def test_question_about_an_older_round_can_still_be_answered(self, store):
        """
        The best weights of an earlier round are tested at the end; that answer is kept too.
        """
        for round_ in range(1, 10):
            store.settle(None, question_of(round_), answer_to(round_))
        test = replace(question_of(3), kind="test")
        store.settle(None, test, b"measured")

        assert store.look_up(test).answer == b"measured"
        assert store.look_up(question_of(9)).answer == answer_to(9)


class TestKilled:
    def test_killed_before_any_line_nothing_half_is_found(self, tmp_path):
        """
        Wherever keeping an answer dies: the question has its whole answer or none, and answers that had been kept
        before are there or known as given.
        """
        outcomes = set()
        for n_lines in range(1, 1000):
            folder = tmp_path / str(n_lines)
            folder.mkdir()
            store = Ledger.open(folder, SECRET)
            for round_ in (1, 2, 3):
                store.settle(None, question_of(round_), answer_to(round_))
            settle = partial(store.settle, None, question_of(4), answer_to(4))
            killed = killed_at(n_lines, answers_module, settle)
            reopened = Ledger.open(folder, SECRET)
            found = reopened.look_up(question_of(4)).answer
            outcomes.add(found)

            assert found in (None, answer_to(4))
            assert killed or found
            assert reopened.look_up(question_of(3)).answer == answer_to(3)
            with contextlib.suppress(AnsweredBeforeError):
                assert reopened.look_up(question_of(2)).answer == answer_to(2)
            with pytest.raises(AnsweredBeforeError):
                reopened.look_up(question_of(1))
            if found is None:
                reopened.settle(None, question_of(4), b"worked for again")
                assert reopened.look_up(question_of(4)).answer == b"worked for again"
            if not killed:
                break

        assert outcomes == {None, answer_to(4)}
