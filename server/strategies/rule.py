"""What every aggregation rule is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from shared_models.plan import Plan
from shared_models.weights import Weights

Mean = Mapping[str, NDArray[np.float64]]
"""Parameter name to a weighted mean over sites."""


class Strategy(ABC):
    """One aggregation rule.

    Parameters
    ----------
    plan
        Its table ``[strategy]``.

    Promise
        The next weights follow from the last ones, :attr:`state` and the means alone, and the state is float32: a run that
        goes on from its journal ends on the same bits as one that was never interrupted.
    """

    wants_mean_per_step: ClassVar[bool] = False
    """Whether :meth:`learn` is to be told the mean of the sites' updates, each over its number of local steps."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.state: Weights = {}
        """What is remembered from round to round; empty for nothing."""

    @abstractmethod
    def step(self, weights: Weights, mean_update: Mean) -> Weights:
        """The next weights, float32, from the last ones and the weighted mean of the updates.

        A parameter that is not in the mean stays at the sites and keeps its value here.
        """

    def control(self, weights: Weights) -> Weights:
        """What is sent to the sites with the weights, named like them; empty for nothing."""
        return {}

    def learn(self, mean_per_step: Mean, *, share: float, round_: int) -> None:
        """Take note of a round, where :attr:`wants_mean_per_step`.

        Parameters
        ----------
        mean_per_step
            The weighted mean over sites of update over number of local steps.
        share
            Sites whose update counts, over all that take part.
        round_
            Of the run, from 1.
        """
        raise NotImplementedError
