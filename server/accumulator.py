"""An exact running mean: the order in which updates arrive does not change a bit of the result.

Every value is rounded to a multiple of 2^-32 and the multiples are added up as integers, which float64 holds exactly
below 2^53; addition of integers is associative, addition of rounded floats is not. One update moves a parameter by at
most 2^-33 (1.2e-10) through rounding, far below float32's own resolution at the size of a weight. The secure sum will use
the same grid.

Memory is one float64 copy of the model, whatever the number of sites.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from shared_models.errors import FederadError
from shared_models.weights import Weights

GRID_BITS = 32
LARGEST_VALUE = 2.0 ** (52 - GRID_BITS - 1)
"""Values must stay below this for the rounding to be to the grid (524288)."""

LARGEST_SUM = 2.0 ** (53 - GRID_BITS)
"""Weighted sums must stay below this to be exact (2097152)."""

_ROUND = 1.5 * 2.0 ** (52 - GRID_BITS)
"""Adding and subtracting this rounds a float64 to the grid: 2^(52-bits) is where its spacing equals the grid's."""

_BLOCK = 512 * 1024
"""Values at a time: 4 MiB of float64 stay in the processor's cache between the four passes over them."""


def largest_norm(n_sites: int, weight: int) -> float:
    """The largest norm an update of ``weight`` may have when ``n_sites`` are asked, so that every sum stays exact.

    It depends on public numbers alone, never on what has arrived, so that the same updates pass in any order.
    """
    return min(LARGEST_VALUE, LARGEST_SUM / (max(n_sites, 1) * max(weight, 1)))


class ExactMean:
    """The weighted mean of updates, added up as they arrive.

    Parameters
    ----------
    shapes
        Name and shape of each parameter.

    Promise
        The mean depends on the set of (update, weight) pairs and not on their order. Holds while every update's norm is
        at most :func:`largest_norm`, which the caller checks; a sum that could have left the exact range raises S182.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = dict(shapes)
        self._sum = torch.zeros(sum(map(math.prod, self._shapes.values())), dtype=torch.float64)
        self._scratch = torch.empty(_BLOCK, dtype=torch.float64)
        self._bound = 0.0
        self._closed = False
        self.total_weight = 0

    def add(self, update: Weights, weight: int, norm: float) -> None:
        """Add an update, float32 and finite, ``weight`` times; ``norm`` is its L2 norm."""
        if self._closed:
            raise ValueError("the mean has been taken")
        self._bound += weight * norm
        if not norm <= LARGEST_VALUE or not self._bound <= LARGEST_SUM:  # NaN fails both
            raise FederadError(
                "S182",
                happened=f"An update of norm {norm:.3g} and weight {weight} does not fit the exact sum.",
                because="Beyond it the result would depend on the order in which sites answer.",
                remedies=(
                    "lower max_update_norm under [strategy]",
                    "look at the learning rate: updates should be small",
                ),
            )
        start = filled = 0
        for name in self._shapes:
            rest = from_dlpack(update[name]).reshape(-1)
            while rest.numel():  # small parameters share a block, large ones take several
                n = min(rest.numel(), _BLOCK - filled)
                self._scratch[filled : filled + n].copy_(rest[:n])
                rest, filled = rest[n:], filled + n
                if filled == _BLOCK:
                    start, filled = self._add_block(start, filled, weight), 0
        self._add_block(start, filled, weight)
        self.total_weight += weight

    def mean(self) -> dict[str, NDArray[np.float64]]:
        """The weighted mean, float64, in the memory of the sum: nothing can be added afterwards.

        ``ValueError`` if nothing was added, or if the mean was taken before.
        """
        if not self.total_weight or self._closed:
            raise ValueError("the mean of no updates is undefined, and can be taken once")
        self._closed = True
        parts = torch.split(self._sum.div_(self.total_weight), [math.prod(shape) for shape in self._shapes.values()])
        return {name: part.view(self._shapes[name]).numpy() for name, part in zip(self._shapes, parts, strict=True)}

    def _add_block(self, start: int, n: int, weight: int) -> int:
        """Add what lies in the scratch to ``n`` values of the sum, from ``start``; where the next block begins."""
        block = self._scratch[:n].add_(_ROUND).sub_(_ROUND)
        self._sum[start : start + n].add_(block, alpha=weight)
        return start + n
