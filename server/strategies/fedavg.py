"""Federated averaging (McMahan et al. 2017, arXiv:1602.05629, algorithm 1)."""

from __future__ import annotations

import numpy as np

from server.strategies.rule import Mean, Strategy
from shared_models.weights import Weights


class FedAvg(Strategy):
    """Add the mean update, weighted by the number of patients each site trained on."""

    def step(self, weights: Weights, mean_update: Mean) -> Weights:
        """Old weights plus mean update, added in float64 and rounded once to float32."""
        return {
            name: (old.astype(np.float64) + mean_update[name]).astype(np.float32) if name in mean_update else old.copy()
            for name, old in weights.items()
        }
