"""Adaptive optimisers at the server: FedAdam and FedYogi (Reddi et al. 2021, arXiv:2003.00295, algorithm 2).

The mean update takes the place of a gradient. As there, neither moment is corrected for its start, and the second one
starts at ``tau ** 2``. Under ``[privacy]`` all of it acts on what has left with noise, and costs nothing.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray

from server.strategies.rule import Mean, Strategy
from shared_models.plan import Plan
from shared_models.weights import Weights

BETA_1, BETA_2, TAU = 0.9, 0.99, 1e-3
"""The paper's values, where the plan gives none."""

FIRST, SECOND = "first:", "second:"
"""Before a parameter's name in the state: its moments."""

Array = NDArray[np.float64]


class Adaptive(Strategy):
    """A step along the first moment, over the root of the second."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        given = plan.strategy
        self.rate = given.server_learning_rate or 0.0
        self.beta_1 = BETA_1 if given.beta_1 is None else given.beta_1
        self.beta_2 = BETA_2 if given.beta_2 is None else given.beta_2
        self.tau = given.tau or TAU

    def step(self, weights: Weights, mean_update: Mean) -> Weights:
        """``weights + rate * first / (sqrt(second) + tau)``; moments are rounded to float32 before they are used."""
        after: Weights = {}
        state: Weights = {}
        for name, old in weights.items():
            update = mean_update[name]
            mean = self._moment(FIRST, name, np.zeros_like(update))
            square = self._moment(SECOND, name, np.full_like(update, self.tau**2))
            first = (self.beta_1 * mean + (1 - self.beta_1) * update).astype(np.float32)
            second = self.second(square, update**2).astype(np.float32)
            step = self.rate * first.astype(np.float64) / (np.sqrt(second.astype(np.float64)) + self.tau)
            after[name] = (old.astype(np.float64) + step).astype(np.float32)
            state |= {FIRST + name: first, SECOND + name: second}
        self.state = state
        return after

    @abstractmethod
    def second(self, before: Array, square: Array) -> Array:
        """The next second moment."""

    def _moment(self, which: str, name: str, at_start: Array) -> Array:
        kept = self.state.get(which + name)
        return at_start if kept is None else kept.astype(np.float64)


class FedAdam(Adaptive):
    """The second moment forgets at a constant rate."""

    def second(self, before: Array, square: Array) -> Array:
        """``beta_2 * before + (1 - beta_2) * square``."""
        return self.beta_2 * before + (1 - self.beta_2) * square


class FedYogi(Adaptive):
    """The second moment moves by an amount that does not depend on its own size."""

    def second(self, before: Array, square: Array) -> Array:
        """``before - (1 - beta_2) * square * sign(before - square)``."""
        return before - (1 - self.beta_2) * square * np.sign(before - square)
