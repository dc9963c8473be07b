"""How sure a mean over seeds is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


def t_interval(values: Sequence[float]) -> list[float] | None:
    """The 95 % t-interval of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return [float(np.mean(values)) - half, float(np.mean(values)) + half]
