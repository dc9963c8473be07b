"""Numbers that clinicians read: volumes, their agreement with a reference, and the function of the heart.

Agreement is that of two methods on the same patients: bias and limits (Bland and Altman 1986,
doi:10.1016/S0140-6736(86)90837-8) and the intraclass correlation ICC(A,1), two-way with absolute agreement of single
measurements (McGraw and Wong 1996, doi:10.1037/1082-989X.1.1.30).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MYOCARDIAL_DENSITY_G_PER_ML = 1.05
"""Mass of a millilitre of myocardium [g]; the value that cardiac MR uses throughout."""

LIMITS = 1.96
"""Standard deviations between which 95 % of normally distributed differences lie."""


@dataclass(frozen=True)
class Agreement:
    """How a method agrees with a reference, over patients."""

    bias: float
    """Mean of method minus reference."""

    limits: float
    """Half the width within which 95 % of the differences lie."""

    icc: float | None
    """1 for perfect agreement; None where all values are the same, and for fewer than two patients."""

    n_patients: int


def agreement(method: Sequence[float], reference: Sequence[float]) -> Agreement:
    """Agreement of two series of measurements of the same patients; ``ValueError`` for none."""
    pairs = np.array([method, reference], np.float64).T
    if not len(pairs):
        raise ValueError("no patient was measured")
    differences = pairs[:, 0] - pairs[:, 1]
    spread = float(np.std(differences, ddof=1)) if len(pairs) > 1 else 0.0
    return Agreement(float(differences.mean()), LIMITS * spread, intraclass_correlation(pairs), len(pairs))


def intraclass_correlation(ratings: NDArray[np.float64]) -> float | None:
    """ICC(A,1) of ``(patient, method)``; None where it is not defined.

    From mean squares of rows (patients), columns (methods) and the rest::

        (rows - rest) / (rows + (k - 1) rest + k / n (columns - rest))
    """
    n, k = ratings.shape
    if n < 2 or k < 2:
        return None
    mean = ratings.mean()
    rows = k * ((ratings.mean(axis=1) - mean) ** 2).sum() / (n - 1)
    columns = n * ((ratings.mean(axis=0) - mean) ** 2).sum() / (k - 1)
    centred = ratings - ratings.mean(axis=1, keepdims=True) - ratings.mean(axis=0, keepdims=True) + mean
    rest = (centred**2).sum() / ((n - 1) * (k - 1))
    below = rows + (k - 1) * rest + k / n * (columns - rest)
    return float((rows - rest) / below) if below > 0 and math.isfinite(below) else None


def volume_ml(mask: NDArray[np.bool_], spacing_mm: tuple[float, float, float]) -> float:
    """Volume of a mask ``(z, y, x)`` [ml]; ``spacing_mm`` is the distance between voxel centres along (z, y, x)."""
    return float(mask.sum()) * math.prod(spacing_mm) / 1000.0


@dataclass(frozen=True)
class HeartFunction:
    """Of one ventricle."""

    edv_ml: float
    """End-diastolic volume: the largest over the cycle [ml]."""

    esv_ml: float
    """End-systolic volume: the smallest [ml]."""

    ejection_fraction: float | None
    """Share of the end-diastolic volume that is ejected [0 to 1]; None for an empty ventricle."""

    mass_g: float
    """Of the myocardium at end-diastole [g]."""

    @property
    def stroke_volume_ml(self) -> float:
        """What is ejected in one beat [ml]."""
        return self.edv_ml - self.esv_ml


def heart_function(
    labels: Sequence[NDArray[np.integer]],
    spacing_mm: tuple[float, float, float],
    *,
    cavity: int,
    myocardium: int,
) -> HeartFunction:
    """Function of a ventricle from label maps over the heart's cycle.

    Parameters
    ----------
    labels
        One map ``(z, y, x)`` for each phase, at least end-diastole and end-systole, in any order.
    spacing_mm
        Distance between voxel centres along (z, y, x).
    cavity, myocardium
        Their label values.

    Raises
    ------
    ValueError
        For fewer than two phases.
    """
    if len(labels) < 2:
        raise ValueError(f"{len(labels)} phase of the heart's cycle tells nothing of its function")
    volumes = [volume_ml(label == cavity, spacing_mm) for label in labels]
    diastole, systole = int(np.argmax(volumes)), int(np.argmin(volumes))
    edv, esv = volumes[diastole], volumes[systole]
    mass = MYOCARDIAL_DENSITY_G_PER_ML * volume_ml(labels[diastole] == myocardium, spacing_mm)
    return HeartFunction(edv, esv, (edv - esv) / edv if edv else None, mass)
