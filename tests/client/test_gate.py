"""The one door: what is not listed, named and whole stays inside."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import get_args

import numpy as np
import pytest

from client.gate import TICKS, Gate, Kind, NoticeKind, Release, StatusWord
from client.policy import Policy, Releases
from shared_models.errors import FederadError
from shared_models.messages import Answer, Question, Refusal, decode_answer
from shared_models.weights import decode

QUESTION = Question("run-1", 2, "train", "c" * 64, "a" * 64)
VALUES = {
    "update": {"w": np.array([0.5, -1.0], np.float32)},
    "fingerprint": {"size.z": np.array([2.0, 0.5], np.float32)},
    "metric": {"dice": 0.75, "training_loss": 0.5},
    "count": {"trained": 3, "measured": 1},
    "cost": {"epsilon": 2.5, "delta": 1e-5, "declared_size": 200.0},
    "moments": {"table": np.array([[1.0, 0.5], [0.0, 0.0]], np.float32)},
}


@pytest.fixture
def gate():
    """The door of a site called site-1."""
    return Gate("site-1")


class TestRelease:
    def test_listed_kinds_leave_as_they_are(self, gate):
        """
        An update, metrics and counts arrive at the other side with the question they answer, and nothing more does.
        """
        answer = decode_answer(gate.release(QUESTION, [Release(kind, VALUES[kind]) for kind in get_args(Kind)]).answer)

        assert (answer.site, answer.question, answer.refusal) == ("site-1", QUESTION, None)
        assert {name: array.tolist() for name, array in answer.update.items()} == {
            "w": [0.5, -1.0],
            "size.z": [2.0, 0.5],
        }
        assert (answer.metrics, answer.counts) == (VALUES["metric"], VALUES["count"])

    def test_scanners_of_the_vocabulary_leave(self, gate):
        """
        What somebody typed leaves as it is, where it begins with a known maker.
        """
        notice = gate.notice(Release("scanners", {"names": ("SIEMENS Aurora 1.5 T", "GE 3 T")}))

        assert (notice.kind, notice.scanners) == ("scanners", ("SIEMENS Aurora 1.5 T", "GE 3 T"))

    @pytest.mark.parametrize("name", ["Jane Doe", "GE; Jane Doe", "GE\n3 T", "GE " + "x" * 70, ""])
    def test_other_words_do_not_leave_as_a_scanner(self, gate, name):
        """
        The list cannot carry text out of the building.
        """
        with pytest.raises(FederadError, match="C147"):
            gate.notice(Release("scanners", {"names": ("GE 3 T", name)}))

    def test_list_of_kinds_is_the_one_that_was_agreed(self):
        """
        A new kind of release is a decision: it changes this list, and the answer has a field for each and no other; counts
        of a fingerprint are arrays, as an update is, and come where it does.
        """
        assert get_args(Kind) == ("update", "fingerprint", "metric", "count", "cost", "moments")
        assert [field.name for field in fields(Answer)] == [
            "site",
            "question",
            "refusal",
            "update",
            "metrics",
            "counts",
            "cost",
            "moments",
        ]

    def test_manifest_says_what_left_and_no_value_of_it(self, gate):
        """
        Names, the shapes and the norm of an update, the shape of moments, and the cost, which is public arithmetic; not a
        metric, not a count.
        """
        manifest = gate.release(QUESTION, [Release(kind, VALUES[kind]) for kind in get_args(Kind)]).manifest

        assert manifest == {
            "update": {"shapes": {"w": [2]}, "norm": pytest.approx(1.25**0.5)},
            "fingerprint": {"names": ["size.z"]},
            "metric": {"names": ["dice", "training_loss"]},
            "count": {"names": ["measured", "trained"]},
            "cost": {"values": VALUES["cost"]},
            "moments": {"shapes": {"table": [2, 2]}},
        }

    @pytest.mark.parametrize("kind", get_args(Kind))
    def test_kind_alone_brings_nothing_else_along(self, gate, kind):
        """
        What was not released is empty on the other side.
        """
        answer = decode_answer(gate.release(QUESTION, [Release(kind, VALUES[kind])]).answer)
        left = {"update": answer.update, "metric": answer.metrics, "count": answer.counts, "cost": answer.cost}
        left["moments"] = answer.moments

        assert {name for name, value in left.items() if value} == {"update" if kind == "fingerprint" else kind}

    @pytest.mark.parametrize("kind", ["scanner", "patient", "hash", "", "Update", None])
    def test_unlisted_kind_is_stopped(self, gate, kind):
        """
        A release of a kind nobody agreed on is stopped with C147, whatever it holds.
        """
        with pytest.raises(FederadError, match="C147"):
            gate.release(QUESTION, [Release(kind, {"x": 1.0})])

    def test_kind_that_comes_twice_is_stopped(self, gate):
        """
        Two updates in one answer would be two releases for the price of one.
        """
        with pytest.raises(FederadError, match="C147"):
            gate.release(QUESTION, [Release("metric", {"dice": 0.5}), Release("metric", {"dice": 0.6})])

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("kind", get_args(Kind))
    def test_value_that_is_not_finite_is_stopped(self, gate, kind, bad):
        """
        NaN and infinity never leave, in an update, a metric or a count.
        """
        value = np.array([1.0, bad], np.float32) if kind in ("update", "fingerprint") else bad

        with pytest.raises(FederadError, match="C147"):
            gate.release(QUESTION, [Release(kind, {"good": 1.0, "bad": value})])

    def test_value_that_float32_cannot_hold_is_stopped(self, gate):
        """
        A number that becomes infinite on the wire is not finite.
        """
        with pytest.raises(FederadError, match="C147"):
            gate.release(QUESTION, [Release("update", {"w": np.array([1e300])})])

    def test_reason_for_stopping_names_no_value(self, gate):
        """
        The message says which kind was stopped, and not the names and numbers in it.
        """
        with pytest.raises(FederadError) as error:
            gate.release(QUESTION, [Release("metric", {"Jane Doe": float("nan"), "age": 41.5})])

        assert "metric" in str(error.value)
        assert "Jane" not in str(error.value)
        assert "41.5" not in str(error.value)


class TestPrivacy:
    @pytest.mark.parametrize("kind", ["update", "fingerprint", "metric", "count", "moments"])
    @pytest.mark.parametrize("rule", [None, "allowed", "noised", "forbidden"])
    def test_what_has_no_noise_is_stopped(self, kind, rule):
        """
        Under [privacy] an exact value stops the whole answer, whatever the hospital's policy says of its kind.
        """
        gate = Gate("site-1", Policy(releases=Releases(**{kind: rule})))
        paid = [Release(k, VALUES[k], is_noised=True) for k in ("update", "metric") if k != kind]

        with pytest.raises(FederadError, match=rf"(?s)C147.*{kind}.*no noise"):
            gate.release(QUESTION, [*paid, Release(kind, VALUES[kind])], is_private=True)

    @pytest.mark.parametrize(
        ("rule", "leaves"), [(None, True), ("allowed", True), ("noised", True), ("forbidden", False)]
    )
    @pytest.mark.parametrize("kind", ["update", "metric", "moments"])
    def test_what_was_paid_for_leaves_unless_it_is_forbidden(self, kind, rule, leaves):
        """
        With noise a kind leaves, and what the hospital forbids stays all the same.
        """
        gate = Gate("site-1", Policy(releases=Releases(**{kind: rule})))
        passed = gate.release(QUESTION, [Release(kind, VALUES[kind], is_noised=True)], is_private=True)
        answer = decode_answer(passed.answer)

        left = {"update": answer.update, "metric": answer.metrics, "moments": answer.moments}
        assert bool(left[kind]) is leaves

    @pytest.mark.parametrize("kind", ["update", "metric", "count", "moments"])
    def test_policy_that_asks_for_noise_keeps_exact_values_of_any_plan(self, kind):
        """
        "noised" lets nothing exact out, from a plan without [privacy] either.
        """
        gate = Gate("site-1", Policy(releases=Releases(**{kind: "noised"})))
        passed = gate.release(QUESTION, [Release(k, VALUES[k]) for k in ("update", "metric", "count")])
        answer = decode_answer(passed.answer)
        left = {"update": answer.update, "metric": answer.metrics, "count": answer.counts}

        assert {name for name, value in left.items() if value} == left.keys() - {kind}


class TestRefuse:
    @pytest.mark.parametrize("word", get_args(Refusal))
    @pytest.mark.parametrize("question", [QUESTION, None], ids=["question", "unreadable question"])
    def test_refusal_carries_the_word_and_nothing_else(self, gate, question, word):
        """
        A site that says no gives one word from the closed list: no arrays, no numbers, no text.
        """
        weights, header = decode(gate.refuse(question, word))

        assert weights == {}
        assert json.loads(header) == {
            "site": "site-1",
            "question": None if question is None else vars(question),
            "refusal": word,
            "metrics": {},
            "counts": {},
            "cost": {},
        }

    def test_word_that_is_not_on_the_list_is_stopped(self, gate):
        """
        The reason of a refusal cannot carry text out of the building.
        """
        with pytest.raises(FederadError, match="C147"):
            gate.refuse(QUESTION, "no scan of Jane Doe")


class TestPolicyOfNotices:
    @pytest.mark.parametrize(
        ("kind", "value"),
        [
            ("status", {"word": "approved"}),
            ("progress", {"round": 1, "tick": 3}),
            ("scanners", {"names": ("GE 3 T",)}),
        ],
    )
    def test_notice_that_the_hospital_forbids_stays(self, kind, value):
        """
        [policy.releases] holds for what is told outside answers, too.
        """
        release = Release(kind, value)

        assert Gate("site-1", Policy(releases=Releases(**{kind: "forbidden"}))).notice(release) is None
        assert Gate("site-1", Policy()).notice(release) is not None


class TestNotice:
    @pytest.mark.parametrize("word", get_args(StatusWord))
    def test_word_of_the_list_leaves(self, gate, word):
        """
        A status is one word about a plan and a run, and nothing else.
        """
        notice = gate.notice(Release("status", {"word": word}), plan_sha256="c" * 64, run="run-1")

        assert (notice.word, notice.plan_sha256, notice.run) == (word, "c" * 64, "run-1")
        assert (notice.round, notice.done, notice.total) == (0, 0, 0)
        assert notice.kind == {"started": "status"}.get(word, word)

    @pytest.mark.parametrize("tick", range(TICKS + 1))
    def test_tenth_of_a_round_leaves(self, gate, tick):
        """
        Progress is a tenth, whatever the number of steps.
        """
        notice = gate.notice(Release("progress", {"round": 3, "tick": tick}), plan_sha256="c" * 64, run="run-1")

        assert (notice.kind, notice.round, notice.done, notice.total) == ("progress", 3, tick, TICKS)
        assert notice.word == ""

    def test_list_of_kinds_is_the_one_that_was_agreed(self):
        """
        A new kind of notice, or a new word, is a decision: it changes this list.
        """
        assert get_args(NoticeKind) == ("status", "progress", "scanners")
        assert get_args(StatusWord) == ("approved", "refused", "started")

    @pytest.mark.parametrize(
        "release",
        [
            Release("status", {"word": "Jane Doe"}),
            Release("status", {"word": "approved", "more": 1}),
            Release("status", {}),
            Release("progress", {"round": 1, "tick": TICKS + 1}),
            Release("progress", {"round": 1, "tick": 0.5}),
            Release("progress", {"round": 1, "tick": -1}),
            Release("progress", {"round": 1, "tick": True}),
            Release("progress", {"round": 1, "tick": 1, "patients": 7}),
            Release("progress", {"round": 1}),
            Release("metric", {"dice": 1.0}),
            Release("update", {}),
            Release(None, {"word": "approved"}),
        ],
    )
    def test_anything_else_is_stopped(self, gate, release):
        """
        Another word, a finer tick, a number of patients, a kind for answers: C147, and no value in the message.
        """
        with pytest.raises(FederadError, match="C147") as error:
            gate.notice(release)
        assert "Jane" not in str(error.value)

    @pytest.mark.parametrize("kind", get_args(NoticeKind))
    def test_notice_is_no_answer(self, gate, kind):
        """
        What leaves in a notice does not leave in an answer.
        """
        with pytest.raises(FederadError, match="C147"):
            gate.release(QUESTION, [Release(kind, {"word": "approved"})])
