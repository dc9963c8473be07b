"""Laws: assertions that any part can be held to, whatever it is made of.

*aggregation*: equal updates average to themselves; the order of the sites does not matter; weights scale out; the mean is
the one that fractions give. *exchange*: weights survive the wire bit for bit; a model refuses weights of another shape
and says which layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray
from torch import nn

from shared_models.errors import FederadError
from shared_models.weights import Weights, decode, encode, load_weights, weights_of

Aggregate = Callable[[Sequence[Weights], Sequence[int]], Mapping[str, NDArray[np.float64]]]
"""The mean of updates with their weights."""

SAME_EXAMPLES = settings(derandomize=True, deadline=None, max_examples=50)
"""For laws that are tried on many examples: what fails for a colleague fails here too."""


def assert_equal_updates_average_to_themselves(
    aggregate: Aggregate, update: Weights, weights: Sequence[int], *, within: float = 0.0
) -> None:
    """Sites that agree are not contradicted, whatever their weights; ``within`` is the documented rounding."""
    mean = aggregate([update] * len(weights), weights)
    for name, values in update.items():
        np.testing.assert_allclose(mean[name], values.astype(np.float64), rtol=0, atol=within)


def assert_order_changes_no_bit(
    aggregate: Aggregate, updates: Sequence[Weights], weights: Sequence[int], order: Sequence[int]
) -> None:
    """Who answers first makes no difference."""
    there = aggregate(updates, weights)
    back = aggregate([updates[i] for i in order], [weights[i] for i in order])
    assert_same_bits(there, back)


def assert_weights_scale_out(
    aggregate: Aggregate, updates: Sequence[Weights], weights: Sequence[int], factor: int
) -> None:
    """Only the ratios of the weights matter."""
    assert_same_bits(aggregate(updates, weights), aggregate(updates, [factor * weight for weight in weights]))


def assert_mean_is_that_of_fractions(
    aggregate: Aggregate, updates: Sequence[Weights], weights: Sequence[int], *, within: float
) -> None:
    """The mean agrees with exact arithmetic on every value, to ``within`` and one rounding of a float64."""
    mean = aggregate(updates, weights)
    for name in updates[0]:
        columns = zip(*(update[name].reshape(-1).tolist() for update in updates), strict=True)
        for got, values in zip(mean[name].reshape(-1).tolist(), columns, strict=True):
            exact = sum(w * Fraction(v) for w, v in zip(weights, values, strict=True)) / sum(weights)
            slack = Fraction(within) + abs(exact) / 2**52
            assert abs(Fraction(got) - exact) <= slack, f"{name}: {got} instead of {float(exact)}"


def assert_same_bits(one: Mapping[str, NDArray[np.generic]], other: Mapping[str, NDArray[np.generic]]) -> None:
    """The same names, shapes, dtypes and bytes."""
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].shape == other[name].shape, name
        assert one[name].dtype == other[name].dtype, name
        assert one[name].tobytes() == other[name].tobytes(), name


def assert_survives_the_wire(weights: Weights, text: str = "{}") -> None:
    """What arrives is what was sent, to the last bit, and sending it twice sends the same bytes."""
    data = encode(weights, text)
    arrived, arrived_text = decode(data)

    assert arrived_text == text
    assert_same_bits(weights, arrived)
    assert encode(arrived, text) == data


def read_or_refused(read: Callable[[bytes], Any], data: bytes) -> Any:
    """What ``read`` makes of ``data``; None if it refuses with M211, which is the only way it may refuse."""
    try:
        return read(data)
    except FederadError as error:
        if error.code != "M211":
            raise
        return None


def assert_refuses_weights_of_another_shape(network: nn.Module) -> None:
    """Each layer in turn: another shape is refused with that layer's name, and nothing has changed."""
    before = weights_of(network)
    for name, array in before.items():
        for other in (np.zeros((*array.shape, 2), np.float32), np.zeros((1, *array.shape), np.float32)):
            with pytest.raises(FederadError, match=f"(?s)M210.*{re.escape(name)} has shape") as refused:
                load_weights(network, {**before, name: other})
            assert str(array.shape) in refused.value.happened
            assert_same_bits(before, weights_of(network))
