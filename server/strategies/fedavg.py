"""Federated averaging (McMahan et al. 2017, arXiv:1602.05629, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from shared_models.weights import Weights


class FedAvg:
    """Add the mean update, weighted by the number of patients each site trained on."""

    def step(self, weights: Weights, mean_update: Mapping[str, NDArray[np.float64]]) -> Weights:
        """Old weights plus mean update, added in float64 and rounded once to float32."""
        return {name: (old.astype(np.float64) + mean_update[name]).astype(np.float32) for name, old in weights.items()}
