"""SCAFFOLD (Karimireddy et al. 2020, arXiv:1910.06378, algorithm 1 with option II and a global step size of 1).

A site's control variate changes by ``-c - update / (steps * learning rate)``, where ``c`` is the server's, which it has
sent. So the server knows the mean of these changes from the updates alone: sites send nothing beyond what they send for
FedAvg, and under ``[privacy]`` it is post-processing of what has left with noise
(``docs/decisions/0015-control-variates.md``).

Means are weighted as the updates are: by patients, or all alike under ``[privacy]``.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from server.strategies.fedavg import FedAvg
from server.strategies.rule import Mean
from shared_models.schedule import learning_rate
from shared_models.weights import Weights


class Scaffold(FedAvg):
    """Federated averaging, with gradients corrected at the sites."""

    wants_mean_per_step: ClassVar[bool] = True

    def control(self, weights: Weights) -> Weights:
        """The server's control variate; zero before the first round."""
        return self.state or {name: np.zeros_like(array) for name, array in weights.items()}

    def learn(self, mean_per_step: Mean, *, share: float, round_: int) -> None:
        """``c`` plus ``share`` times the mean change of the sites' control variates, rounded to float32."""
        rate = learning_rate(self.plan, round_)
        now = self.control({name: mean.astype(np.float32) for name, mean in mean_per_step.items()})
        self.state = {
            name: ((1 - share) * now[name].astype(np.float64) - share * mean / rate).astype(np.float32)
            for name, mean in mean_per_step.items()
        }
