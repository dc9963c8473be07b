"""Questions and answers as bytes: what is sent arrives, and nothing else is taken for a message."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import get_args

import laws
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shared_models.errors import FederadError
from shared_models.messages import (
    Answer,
    Ask,
    AskKind,
    Question,
    Refusal,
    asked_sha256,
    decode_answer,
    decode_ask,
    encode_answer,
    encode_ask,
)
from shared_models.weights import Weights, encode, weights_sha256

WEIGHTS: Weights = {"layer.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "layer.bias": np.ones(2, np.float32)}
QUESTION = Question("run-1", 3, "train", "c" * 64, weights_sha256(WEIGHTS))
ASK = Ask(QUESTION, 7, WEIGHTS)
COST = {"epsilon": 2.5, "delta": 1e-5, "declared_size": 200.0}
ANSWER = Answer("site-1", QUESTION, None, WEIGHTS, {"dice": 0.5}, {"trained": 3}, COST)
HEADER = {
    "site": "site-1",
    "question": asdict(QUESTION),
    "refusal": None,
    "metrics": {"dice": 0.5},
    "counts": {"trained": 3},
    "cost": COST,
}

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
arrays = hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, min_side=1, max_side=3), elements=st.floats(width=32))
all_weights = st.dictionaries(words.filter(lambda n: n != "__metadata__"), arrays, max_size=3)
questions = st.builds(
    Question, words, st.integers(0, 10**6), st.sampled_from(get_args(AskKind)), words, st.just(QUESTION.weights_sha256)
)


def asked_with(header: object, weights: Weights = WEIGHTS) -> bytes:
    return encode(weights, header if isinstance(header, str) else json.dumps(header))


def answered_with(header: object) -> bytes:
    return encode({}, header if isinstance(header, str) else json.dumps(header))


def assert_unreadable(read: object, data: bytes) -> None:
    with pytest.raises(FederadError) as error:
        read(data)
    assert error.value.code == "M211"


class TestRoundTrip:
    @laws.SAME_EXAMPLES
    @given(questions, st.integers(0, 2**63 - 1), all_weights)
    def test_ask_arrives_as_it_was_sent(self, question, seed, weights):
        """
        A question with any words, seed and weights is read as the same question.
        """
        ask = Ask(replace(question, weights_sha256=weights_sha256(weights)), seed, weights)
        arrived = decode_ask(encode_ask(ask))

        assert (arrived.question, arrived.seed) == (ask.question, seed)
        laws.assert_same_bits(arrived.weights, weights)

    @laws.SAME_EXAMPLES
    @given(
        st.none() | questions,
        st.sampled_from([None, *get_args(Refusal)]),
        all_weights,
        st.dictionaries(words, st.floats(allow_nan=False, allow_infinity=False)),
        st.dictionaries(words, st.integers(0, 2**31 - 1)),
    )
    def test_answer_arrives_as_it_was_sent(self, question, refusal, update, metrics, counts):
        """
        An answer of any content is read as the same answer, its numbers to the last bit.
        """
        answer = Answer("site-1", question, refusal, update, metrics, counts)
        arrived = decode_answer(encode_answer(answer))

        laws.assert_same_bits(arrived.update, update)
        assert replace(arrived, update={}) == replace(answer, update={})

    def test_moments_and_discriminator_arrive_beside_the_weights(self):
        """
        Each under its own name; the hash of a question is over all that came with it.
        """
        question = replace(QUESTION, weights_sha256=asked_sha256(WEIGHTS, {}, WEIGHTS))
        asked = decode_ask(encode_ask(Ask(question, 7, WEIGHTS, discriminator=WEIGHTS)))
        answered = decode_answer(encode_answer(replace(ANSWER, moments=WEIGHTS)))

        for arrays in (asked.weights, asked.discriminator, answered.update, answered.moments):
            laws.assert_same_bits(arrays, WEIGHTS)
        assert not asked.control
        assert question.weights_sha256 != QUESTION.weights_sha256
        assert_unreadable(decode_ask, encode_ask(Ask(QUESTION, 7, WEIGHTS, discriminator=WEIGHTS)))

    def test_same_message_has_the_same_bytes(self):
        """
        Encoding depends on the content alone, so bytes can be stored, compared and sent again.
        """
        turned = Answer("site-1", QUESTION, None, dict(reversed(WEIGHTS.items())), {"b": 1.0, "a": 2.0}, {})
        straight = Answer("site-1", QUESTION, None, WEIGHTS, {"a": 2.0, "b": 1.0}, {})

        assert encode_answer(turned) == encode_answer(straight)
        assert encode_ask(ASK) == encode_ask(decode_ask(encode_ask(ASK)))

    @pytest.mark.parametrize("shape", [(), (0,), (2, 0)], ids=str)
    def test_weights_of_odd_shapes_can_be_asked_about(self, shape):
        """
        A network may have a scalar parameter or an empty one.
        """
        weights = {"odd": np.ones(shape, np.float32)}
        ask = Ask(replace(QUESTION, weights_sha256=weights_sha256(weights)), 0, weights)

        laws.assert_same_bits(decode_ask(encode_ask(ask)).weights, weights)


class TestDamage:
    def test_cut_message_is_refused_wherever_it_is_cut(self):
        """
        No beginning of a message is a message.
        """
        for read, data in ((decode_ask, encode_ask(ASK)), (decode_answer, encode_answer(ANSWER))):
            for n in range(len(data)):
                assert_unreadable(read, data[:n])

    def test_no_flipped_bit_brings_other_weights(self):
        """
        A bit turned over anywhere on the way is refused, or leaves names, shapes and values as they were.
        """
        data = encode_ask(ASK)
        for position in range(8 * len(data)):
            damaged = bytearray(data)
            damaged[position // 8] ^= 1 << position % 8
            arrived = laws.read_or_refused(decode_ask, bytes(damaged))
            if arrived is not None:
                laws.assert_same_bits(arrived.weights, WEIGHTS)
                assert arrived.question.weights_sha256 == QUESTION.weights_sha256

    @laws.SAME_EXAMPLES
    @given(st.binary(max_size=300))
    def test_noise_is_no_message(self, data):
        """
        Bytes from nowhere raise M211 and nothing else.
        """
        assert_unreadable(decode_ask, data)
        assert_unreadable(decode_answer, data)

    json_values = st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**400), 10**400)
        | st.floats()
        | st.text(max_size=5)
        | st.sampled_from(["train", "failed"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    )

    @laws.SAME_EXAMPLES
    @given(st.sampled_from(sorted(HEADER)), json_values)
    def test_any_value_in_any_field_is_read_or_refused(self, key, value):
        """
        Whatever stands in a field of an answer, it is an answer of proper types or M211.
        """
        answer = laws.read_or_refused(decode_answer, answered_with({**HEADER, key: value}))
        if answer is not None:
            assert all(type(v) is float and np.isfinite(v) for v in answer.metrics.values())
            assert all(type(v) is int and v >= 0 for v in answer.counts.values())
            assert answer.refusal is None or answer.refusal in get_args(Refusal)
            assert isinstance(answer.site, str)


def changed(**fields: object) -> dict[str, object]:
    return {**HEADER, **fields}


def with_question(**fields: object) -> dict[str, object]:
    return changed(question={**asdict(QUESTION), **fields})


HOSTILE_HEADERS = {
    "no JSON": "not JSON",
    "half a table": "{",
    "lists in lists": "[" * 100_000,
    "a list": "[]",
    "nothing in it": "{}",
    "a field too few": {key: value for key, value in HEADER.items() if key != "counts"},
    "a field too many": changed(extra=1),
    "a site without a name": changed(site=""),
    "a site with an endless name": changed(site="x" * 201),
    "a site that is a number": changed(site=7),
    "a refusal nobody agreed on": changed(refusal="the patient is Jane Doe"),
    "an empty refusal": changed(refusal=""),
    "a refusal that is a list": changed(refusal=["failed"]),
    "a refusal that is a truth value": changed(refusal=False),
    "a metric that is NaN": changed(metrics={"dice": float("nan")}),
    "a metric that is infinite": changed(metrics={"dice": float("inf")}),
    "a metric that is a truth value": changed(metrics={"dice": True}),
    "a metric in words": changed(metrics={"dice": "0.5"}),
    "a metric that is a list": changed(metrics={"dice": [0.5]}),
    "a metric that is no number": changed(metrics={"dice": None}),
    "a metric of 400 digits": changed(metrics={"dice": 10**400}),
    "metrics that are a list": changed(metrics=[0.5]),
    "a negative count": changed(counts={"trained": -1}),
    "a count that is a truth value": changed(counts={"trained": True}),
    "a count with a point": changed(counts={"trained": 1.0}),
    "a count beyond all patients": changed(counts={"trained": 2**31}),
    "a cost that is NaN": changed(cost={**COST, "epsilon": float("nan")}),
    "a cost in words": changed(cost={**COST, "epsilon": "8"}),
    "costs that are a list": changed(cost=[8.0]),
    "a cost without its delta": changed(cost={"epsilon": 8.0, "declared_size": 200.0}),
    "a cost with one more figure": changed(cost={**COST, "patients": 187.0}),
    "a cost below nothing": changed(cost={**COST, "epsilon": -8.0}),
    "a size that nobody can declare": changed(cost={**COST, "declared_size": 0.0}),
    "a size beyond all patients": changed(cost={**COST, "declared_size": 1e300}),
    "counts that are no table": changed(counts=None),
    "a question in words": changed(question="train"),
    "a question without a field": changed(question={"run": "r"}),
    "a question with another field": with_question(extra=1),
    "a question of no kind": with_question(kind="steal"),
    "a question whose kind is a list": with_question(kind=["train"]),
    "a negative round": with_question(round=-1),
    "a round that is a truth value": with_question(round=True),
    "a round with a point": with_question(round=1.0),
    "a run that is a number": with_question(run=7),
    "an endless run": with_question(run="x" * 201),
    "no plan": with_question(plan_sha256=None),
}


class TestHostileAnswers:
    @pytest.mark.parametrize("header", HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS)
    def test_header_that_is_not_an_answer_is_refused(self, header):
        """
        A field of another type or out of its range raises M211 and nothing else.
        """
        assert_unreadable(decode_answer, answered_with(header))

    def test_header_that_all_of_these_are_made_from_is_read(self):
        """
        The header that the cases above spoil is a good one.
        """
        assert decode_answer(answered_with(HEADER)).metrics == {"dice": 0.5}


ASKED = {**asdict(QUESTION), "seed": 7, "adversary": 0.5}


class TestHostileAsks:
    @pytest.mark.parametrize(
        "header",
        [
            pytest.param("not JSON", id="no JSON"),
            pytest.param("[" * 100_000, id="lists in lists"),
            pytest.param(asdict(QUESTION), id="no seed"),
            pytest.param({**ASKED, "extra": 1}, id="a field too many"),
            pytest.param({**ASKED, "seed": True}, id="a seed that is a truth value"),
            pytest.param({**ASKED, "seed": 7.0}, id="a seed with a point"),
            pytest.param({**ASKED, "seed": None}, id="a seed that is nothing"),
            pytest.param({**ASKED, "seed": -1}, id="a negative seed"),
            pytest.param({**ASKED, "adversary": 1.5}, id="more than all of an adversary"),
            pytest.param({**ASKED, "adversary": "all"}, id="a share in words"),
            pytest.param({**ASKED, "round": 2**63}, id="a round that no database holds"),
            pytest.param({**ASKED, "round": True}, id="a round that is a truth value"),
            pytest.param({**ASKED, "round": -1}, id="a negative round"),
            pytest.param({**ASKED, "kind": "steal"}, id="no kind"),
            pytest.param({**ASKED, "run": 7}, id="a run that is a number"),
            pytest.param({**ASKED, "weights_sha256": "0" * 64}, id="a hash of other weights"),
            pytest.param({**ASKED, "weights_sha256": None}, id="no hash"),
        ],
    )
    def test_header_that_is_not_a_question_is_refused(self, header):
        """
        A question of other types, or about other weights than it brings, raises M211 and nothing else.
        """
        assert_unreadable(decode_ask, asked_with(header))

    @pytest.mark.parametrize(
        "weights",
        [
            {},
            {**WEIGHTS, "layer.bias": np.zeros(2, np.float32)},
            {**WEIGHTS, "layer.bias": np.ones((1, 2), np.float32)},
            {**WEIGHTS, "more": np.ones(1, np.float32)},
            {**WEIGHTS, "more": np.ones(0, np.float32)},
        ],
        ids=["none", "another value", "another shape", "one more", "an empty one more"],
    )
    def test_weights_other_than_named_are_refused(self, weights):
        """
        A question is bound to its weights: any others under its hash are refused.
        """
        assert_unreadable(decode_ask, asked_with(ASKED, weights))

    def test_good_header_is_read(self):
        """
        The header that the cases above spoil is a good one.
        """
        ask = decode_ask(asked_with(ASKED))

        assert (ask.question, ask.adversary) == (QUESTION, 0.5)


class TestSending:
    def test_metric_that_is_not_finite_cannot_be_sent(self):
        """
        NaN has no place in JSON, so it is not written either.
        """
        with pytest.raises(ValueError, match="not JSON compliant"):
            encode_answer(replace(ANSWER, metrics={"dice": float("nan")}))
