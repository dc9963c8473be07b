"""Aggregation rules: how the mean of the updates becomes the next weights.

A rule sees the exact weighted mean alone, so memory does not depend on the number of sites. FedProx is FedAvg here: its
proximal term acts at the sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shared_models.plan import Plan
from shared_models.weights import Weights


class Strategy(Protocol):
    """One aggregation rule."""

    def step(self, weights: Weights, mean_update: Mapping[str, NDArray[np.float64]]) -> Weights:
        """The next weights, float32, from the last ones and the weighted mean of the updates."""


def strategy_for(plan: Plan) -> Strategy:
    """The rule that ``plan`` names."""
    from server.strategies.fedavg import FedAvg

    return {"fedavg": FedAvg, "fedprox": FedAvg}[plan.strategy.name]()
