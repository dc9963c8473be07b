"""Metrics with noise: what a site may tell of its patients' measurements under ``[privacy]``.

A patient is one vector of all the task's metrics, each brought to a public range and centred, so its L2 norm is at most
half the root of their number. The sum over patients gets Gaussian noise, and a public number divides it. The site adds the
noise (``client.privacy``); what it means for a figure, both sides know.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from shared_models.task import Task

WITHIN = 1.96
"""Standard deviations of noise between which 95 % of it lie."""


@dataclass(frozen=True)
class NoisedMeans:
    """The public numbers of one release of metrics.

    All values are scaled to [-1/2, 1/2]. A patient without a value, or whose value is not finite, counts as 0: the middle
    of the range. So does the difference between the public and the true number of patients, which pulls means there.
    """

    ranges: Mapping[str, tuple[float, float]]
    """Lowest and highest value of each metric; values beyond are taken for these."""

    noise_multiplier: float
    n_patients: int
    """Public number that divides the sum."""

    @classmethod
    def of(cls, task: Task, split: Literal["validation", "test"], declared_size: int) -> Self:
        """What a plan with ``metrics_noise`` asks for at a site that declared this many training patients (or images).

        A split has as many patients as its share of the plan says, next to those that train; where images were declared,
        as many as had the most images that the plan allows.
        """
        privacy, shares = task.plan.privacy, task.plan.data.split
        if privacy is None or privacy.metrics_noise is None:
            raise ValueError("the plan asks for no noised metrics")
        share = shares.validation if split == "validation" else shares.test
        n_patients = max(1, round(declared_size / (privacy.images_per_patient or 1) * share / shares.train))
        return cls(task.ranges, privacy.metrics_noise, n_patients)

    @property
    def clip(self) -> float:
        """Largest L2 norm of one patient's vector: half the root of the number of metrics."""
        return math.sqrt(len(self.ranges)) / 2

    @property
    def deviations(self) -> dict[str, float]:
        """Standard deviation of the noise of each mean, in the metric's own unit."""
        scaled = self.noise_multiplier * self.clip / self.n_patients
        return {name: scaled * (high - low) for name, (low, high) in self.ranges.items()}

    def interval(self, name: str, value: float) -> tuple[float, float]:
        """Where 95 % of the noise around a mean of this release lies, within the metric's range."""
        return within(self.ranges[name], value, self.deviations[name])

    def vector(self, metrics: Mapping[str, float]) -> NDArray[np.float64]:
        """One patient's metrics, ``(metric,)``, centred, of norm at most :attr:`clip`."""
        values = []
        for name, (low, high) in self.ranges.items():
            value = metrics.get(name, math.nan)
            values.append((min(max(value, low), high) - low) / (high - low) - 0.5 if math.isfinite(value) else 0.0)
        return np.array(values, np.float64)

    def means(self, noised: NDArray[np.float64]) -> dict[str, float]:
        """The noised sum over :attr:`n_patients`, ``(metric,)``, as means in the metrics' own units and ranges."""
        return {
            name: min(max(low + (float(value) + 0.5) * (high - low), low), high)
            for (name, (low, high)), value in zip(self.ranges.items(), noised, strict=True)
        }


def within(bounds: tuple[float, float], value: float, deviation: float) -> tuple[float, float]:
    """Where 95 % of the noise around ``value`` lies, cut at ``bounds``: of the noise alone, not of patients' spread."""
    low, high = bounds
    return max(low, value - WITHIN * deviation), min(high, value + WITHIN * deviation)


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """Epsilon at ``delta`` of one noised sum over all patients, such as one release of metrics.

    Exact for the Gaussian mechanism by itself (Balle and Wang 2018, arXiv:1805.06530, theorem 8), by bisection; what a
    whole run costs is for an accountant to say.
    """

    def delta_at(epsilon: float) -> float:
        aside, along = 1 / (2 * noise_multiplier), epsilon * noise_multiplier
        beyond = _upper_tail(aside + along)
        return _upper_tail(along - aside) - (math.exp(epsilon + math.log(beyond)) if beyond > 0 else 0.0)

    low, high = 0.0, 1.0
    while delta_at(high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if delta_at(middle) > delta else (low, middle)
    return high


def _upper_tail(x: float) -> float:
    """Probability that a standard Gaussian lies above ``x``."""
    return math.erfc(x / math.sqrt(2)) / 2
