"""Weights on the wire and back, and whatever else may arrive instead."""

from __future__ import annotations

import json
import struct
from hashlib import sha256
from math import prod

import laws
import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from shared_models.errors import FederadError
from shared_models.weights import (
    MAX_HEADER_BYTES,
    TEXT_KEY,
    decode,
    difference,
    encode,
    initial_weights,
    load_weights,
    weights_of,
    weights_sha256,
)

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
ARRAYS = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4), elements=st.floats(width=32)
)
WEIGHTS = st.dictionaries(NAMES, ARRAYS, max_size=4)

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def message(header: object, body: bytes = b"", *, text: object = "{}") -> bytes:
    """A message with any header at all, which no library would write."""
    if isinstance(header, dict):
        header = {"__metadata__": {TEXT_KEY: text}, **header}
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    return struct.pack("<Q", len(data)) + data + body


def assert_unreadable(data: bytes) -> None:
    with pytest.raises(FederadError) as error:
        decode(data)
    assert error.value.code == "M211"


class TestExchange:
    @laws.SAME_EXAMPLES
    @given(WEIGHTS, st.text(st.characters(exclude_categories=["Cs"])))
    def test_weights_survive_the_wire_bit_for_bit(self, weights, text):
        """
        Any names and shapes, scalars and empty arrays, infinities, NaN and minus zero arrive as they were sent.
        """
        laws.assert_survives_the_wire(weights, text)

    @pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1, 1, 1, 1), (1000, 1000), (7, 1, 13)], ids=str)
    def test_odd_shapes_survive_the_wire(self, shape):
        """
        From no axes at all to a million values.
        """
        values = np.random.default_rng(0).normal(size=shape).astype(np.float32)

        laws.assert_survives_the_wire(
            {"before": np.ones(3, np.float32), "odd": values, "after": np.ones(2, np.float32)}
        )

    def test_special_values_keep_their_bits(self):
        """
        Minus zero, the smallest number there is, infinities and NaN are not tidied up.
        """
        laws.assert_survives_the_wire({"w": np.array([-0.0, 1e-45, np.inf, -np.inf, np.nan], np.float32)})

    def test_strided_arrays_arrive_in_their_own_order(self):
        """
        A transposed view is sent as what it shows, not as what lies in memory.
        """
        array = np.arange(6, dtype=np.float32).reshape(2, 3)

        np.testing.assert_array_equal(decode(encode({"w": array.T, "v": array[:, ::-1]}, ""))[0]["w"], array.T)

    @laws.SAME_EXAMPLES
    @given(WEIGHTS)
    def test_second_reader_agrees(self, weights):
        """
        The library that defines the format reads the same names and values.
        """
        data = encode(weights, "text")

        laws.assert_same_bits(safetensors.numpy.load(data), decode(data)[0])

    def test_reading_copies_nothing_and_protects_what_it_reads(self):
        """
        Arrays are read-only views into the bytes that arrived, so memory holds a message once.
        """
        data = encode({"a": np.ones((3, 5), np.float32), "b": np.ones(4, np.float32)}, "")
        weights, _ = decode(data)

        for array in weights.values():
            assert np.shares_memory(array, np.frombuffer(data, np.uint8))
            assert not array.flags.writeable


class TestHostileBytes:
    @laws.SAME_EXAMPLES
    @given(st.binary(max_size=200))
    def test_noise_is_refused(self, data):
        """
        Bytes from nowhere raise M211 and nothing else.
        """
        assert_unreadable(data)

    def test_every_truncation_is_refused(self):
        """
        A message that ends early, anywhere, is not read; nor is one with a byte too many.
        """
        data = encode({"a": np.ones(3, np.float32), "b": np.zeros((), np.float32)}, "{}")

        for n in range(len(data)):
            assert_unreadable(data[:n])
        assert_unreadable(data + b"\0")

    @pytest.mark.parametrize(
        ("header", "body"),
        [
            pytest.param({"a": F32, "b": F32}, b"\0" * 4, id="overlapping arrays"),
            pytest.param({"a": F32, "b": {**F32, "data_offsets": [2, 6]}}, b"\0" * 6, id="half overlapping arrays"),
            pytest.param({"a": {**F32, "data_offsets": [4, 8]}}, b"\0" * 8, id="a hole at the start"),
            pytest.param({"a": {**F32, "data_offsets": [-4, 0]}}, b"\0" * 4, id="a negative offset"),
            pytest.param({"a": {**F32, "data_offsets": [4, 0]}}, b"\0" * 4, id="an end before the start"),
            pytest.param({"a": {**F32, "data_offsets": [0, 2**40]}}, b"\0" * 4, id="an end far outside"),
            pytest.param({"a": {**F32, "data_offsets": [0]}}, b"\0" * 4, id="one offset"),
            pytest.param({"a": {**F32, "data_offsets": [0.0, 4.0]}}, b"\0" * 4, id="offsets with a point"),
            pytest.param({"a": {**F32, "data_offsets": "04"}}, b"\0" * 4, id="offsets in words"),
            pytest.param({"a": {**F32, "data_offsets": None}, "b": F32}, b"\0" * 4, id="no offsets"),
            pytest.param({"a": {**F32, "shape": [2]}}, b"\0" * 4, id="more values than bytes"),
            pytest.param({"a": {**F32, "shape": [-1]}}, b"\0" * 4, id="a negative side"),
            pytest.param({"a": {**F32, "shape": [-1, -1]}}, b"\0" * 4, id="two negative sides"),
            pytest.param({"a": {**F32, "shape": [2**62, 4]}}, b"\0" * 4, id="a size that overflows"),
            pytest.param(
                {"a": {"dtype": "F32", "shape": [0, 2**70], "data_offsets": [0, 0]}}, b"", id="no values, a huge side"
            ),
            pytest.param({"a": {**F32, "shape": [1] * 70}}, b"\0" * 4, id="seventy axes"),
            pytest.param({"a": {**F32, "shape": 1}}, b"\0" * 4, id="a shape that is a number"),
            pytest.param({"a": {**F32, "shape": [True]}}, b"\0" * 4, id="a truth value as a side"),
            pytest.param(
                {"a": {"dtype": "F32", "shape": [0], "data_offsets": [False, False]}}, b"", id="truth values as offsets"
            ),
            pytest.param({"a": {**F32, "dtype": "F64", "shape": []}}, b"\0" * 4, id="another dtype"),
            pytest.param({"a": {**F32, "dtype": "I32"}}, b"\0" * 4, id="whole numbers"),
            pytest.param({"a": {**F32, "dtype": ["F32"]}}, b"\0" * 4, id="a list of dtypes"),
            pytest.param({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4, id="no dtype"),
            pytest.param({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"\0" * 4, id="no shape"),
            pytest.param({"a": "F32"}, b"\0" * 4, id="an entry in words"),
            pytest.param({"a": None}, b"\0" * 4, id="no entry"),
            pytest.param({"a": [1, 2]}, b"\0" * 4, id="an entry that is a list"),
            pytest.param({}, b"\0" * 4, id="bytes of nobody"),
            pytest.param({"__metadata__": None}, b"", id="no text"),
            pytest.param({"__metadata__": {}}, b"", id="a text without its key"),
            pytest.param({"__metadata__": {TEXT_KEY: 7}}, b"", id="a text that is a number"),
            pytest.param({"__metadata__": "text"}, b"", id="a text without a table"),
            pytest.param([1, 2], b"", id="a list"),
            pytest.param(7, b"", id="a number"),
            pytest.param(b"{", b"", id="half a table"),
            pytest.param(b"\xff\xfe", b"", id="no text encoding"),
            pytest.param(b'{"a":' * 100_000, b"", id="tables in tables"),
            pytest.param(b"[" * 100_000, b"", id="lists in lists"),
            pytest.param(b"1" * 5000, b"", id="a number of 5000 digits"),
        ],
    )
    def test_made_up_header_is_refused(self, header, body):
        """
        Whatever the other side writes into the header, it raises M211 and nothing else.
        """
        assert_unreadable(message(header, body))

    def test_header_that_claims_to_be_long_is_refused_before_it_is_read(self):
        """
        A length beyond the message, or beyond what any network needs, ends the reading.
        """
        header = b'{"__metadata__":{"federad":"text"}}'

        assert_unreadable(struct.pack("<Q", 2**63) + header)
        for n, too_long in ((MAX_HEADER_BYTES, False), (MAX_HEADER_BYTES + 8, True)):
            read = laws.read_or_refused(decode, struct.pack("<Q", n) + header.ljust(n))
            assert (read is None) == too_long

    numbers = st.sampled_from([-1, 0, 1, 2, 3, 4, 8, 12, 2**31, 2**63, 2**70, 1.0, "4", None])
    entries = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F32", "F32", "F64", "BF16", 7]),
            "shape": st.lists(numbers, max_size=3),
            "data_offsets": st.lists(numbers, min_size=2, max_size=2),
        }
    )

    @laws.SAME_EXAMPLES
    @given(st.dictionaries(st.sampled_from("abc"), entries, max_size=3), st.integers(0, 12))
    def test_what_is_read_the_second_reader_reads_alike(self, header, n_bytes):
        """
        A header of plausible and absurd entries is refused, or read as the format's own library reads it.
        """
        data = message(header, bytes(range(n_bytes)))
        if (read := laws.read_or_refused(decode, data)) is not None:
            laws.assert_same_bits(safetensors.numpy.load(data), read[0])


class TestNetwork:
    def test_network_gives_and_takes_its_weights(self):
        """
        Weights of one network make another the same, and are copies that later training does not reach.
        """
        one, other = nn.Linear(3, 2), nn.Linear(3, 2)
        weights = weights_of(one)
        load_weights(other, decode(encode(weights, ""))[0])
        laws.assert_same_bits(weights_of(other), weights)

        with torch.no_grad():
            one.weight.zero_()
        assert weights["weight"].any()

    def test_loading_does_not_tie_the_network_to_the_message(self):
        """
        Training after loading changes the network and not the bytes that arrived.
        """
        network = nn.Linear(3, 2)
        data = encode(weights_of(network), "")
        weights, _ = decode(data)
        load_weights(network, weights)
        with torch.no_grad():
            network.weight.add_(1)

        assert not np.array_equal(weights["weight"], weights_of(network)["weight"])

    def test_weights_of_another_shape_are_refused_by_layer(self):
        """
        A model refuses weights of another shape, says which layer, and stays as it was.
        """
        laws.assert_refuses_weights_of_another_shape(
            nn.Sequential(nn.Linear(2, 3), nn.GroupNorm(1, 3), nn.Linear(3, 1))
        )

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda w: w.pop("bias"), "bias is missing"),
            (lambda w: w.update(extra=np.ones(1, np.float32)), "extra is unknown"),
            (lambda w: w.update(bias=w["bias"].astype(np.float64)), "bias has dtype float64 instead of float32"),
        ],
        ids=["missing", "unknown", "dtype"],
    )
    def test_other_names_and_dtypes_are_refused_by_name(self, change, words):
        """
        A missing or unknown name or another dtype is named, and the network is left untouched.
        """
        network = nn.Linear(3, 2)
        before = weights_of(network)
        weights = {name: array + 1 for name, array in before.items()}
        change(weights)

        with pytest.raises(FederadError, match=f"M210.*{words}"):
            load_weights(network, weights)
        laws.assert_same_bits(weights_of(network), before)

    def test_agreeing_weights_differ_in_nothing(self):
        """
        Where names, shapes and dtypes agree there is no difference to name.
        """
        assert difference({"a": np.ones((2, 3), np.float32)}, {"a": (2, 3)}) is None

    def test_first_weights_leave_the_global_generator_alone(self):
        """
        Asking for a run's first weights disturbs nobody else's randomness.
        """
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        initial_weights(lambda: nn.Linear(2, 2), 0)

        assert torch.equal(torch.rand(1), expected)


class TestHash:
    def test_hash_of_known_weights(self):
        """
        The hash is SHA-256 over names, shapes and little-endian values, as a few lines compute it.
        """
        values = [0.5, -2.0, 3.25]
        text = b'["a", [3]]' + struct.pack("<3f", *values) + b'["b", [1, 1]]' + struct.pack("<f", 9.0)
        weights = {"b": np.full((1, 1), 9, np.float32), "a": np.array(values, np.float32)}

        assert weights_sha256(weights) == sha256(text).hexdigest()

    def test_order_of_names_does_not_change_it(self):
        """
        Two dictionaries with the same content have the same hash.
        """
        a, b = np.ones(2, np.float32), np.zeros(3, np.float32)

        assert weights_sha256({"a": a, "b": b}) == weights_sha256({"b": b, "a": a})

    @laws.SAME_EXAMPLES
    @given(
        hnp.arrays(np.float32, hnp.array_shapes(max_side=3), elements=st.floats(-1, 1, width=32)),
        st.integers(0, 10**6),
        st.integers(0, 31),
    )
    def test_any_bit_name_or_shape_changes_it(self, array, position, bit):
        """
        One bit of one value, one letter of a name, or the same values in another shape: another hash.
        """
        flipped = array.copy().reshape(-1)
        flipped.view(np.uint32)[position % flipped.size] ^= np.uint32(1 << bit)
        hashes = {
            weights_sha256({"w": array}),
            weights_sha256({"v": array}),
            weights_sha256({"w": array[None]}),
            weights_sha256({"w": flipped.reshape(array.shape)}),
        }

        assert len(hashes) == 4

    @pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 0)], ids=str)
    def test_scalars_and_empty_arrays_have_a_hash(self, shape):
        """
        What can be sent can be hashed.
        """
        weights = {"w": np.zeros(shape, np.float32), "v": np.ones(prod(shape), np.float32)}

        assert len(weights_sha256(weights)) == 64
