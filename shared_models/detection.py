"""How well the peaks of a heatmap find what is outlined, against how often they point elsewhere: FROC.

The free-response curve has sensitivity over false places a study, each at a threshold on the peaks' heat (Bunch et al.
1977, doi:10.1117/12.955926). It is read off at seven rates and summed up as their mean, as the LUNA16 challenge did (Setio
et al. 2017, arXiv:1612.08012).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False places a study at which sensitivity is read off."""

THRESHOLDS = np.linspace(-4.0, 8.0, 25)
"""On the heat of a peak [logits]; what lies between two of them is not told apart."""

MOST_PEAKS = 64
"""Of one study, the hottest."""

LESIONS, HITS, FALSE = "lesions", "hits ", "false "
"""Names among the numbers of a patient; the last two with the number of a threshold."""


def peaks(heat: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Places ``(peak, 3)`` where no neighbour is hotter, hottest first, and how hot they are; a plateau is one place."""
    highest = ndimage.maximum_filter(heat, size=3, mode="nearest") == heat
    found, n = ndimage.label(highest, structure=np.ones((3,) * heat.ndim))
    places = np.array(ndimage.maximum_position(heat, found, range(1, n + 1)), np.intp).reshape(-1, heat.ndim)
    scores = heat[tuple(places.T)]
    order = np.argsort(-scores, kind="stable")[:MOST_PEAKS]
    return places[order], scores[order]


def counted(heat: NDArray[np.float32], outline: NDArray[np.bool_]) -> dict[str, float]:
    """What one study adds: its lesions, and at each threshold how many of them a peak lies in, and how many peaks in none.

    Parameters
    ----------
    heat
        What each voxel says for a finding [logits], ``(z, y, x)``.
    outline
        What is outlined, ``(z, y, x)``; parts that do not touch at a face, an edge or a corner are lesions of their own.
    """
    lesions, n_lesions = ndimage.label(outline, structure=np.ones((3,) * outline.ndim))
    places, scores = peaks(heat)
    inside = lesions[tuple(places.T)]
    best = np.full(n_lesions + 1, -np.inf)
    np.maximum.at(best, inside, scores)
    hits = (best[1:, None] >= THRESHOLDS).sum(axis=0)
    false = (scores[inside == 0][:, None] >= THRESHOLDS).sum(axis=0)
    return {
        LESIONS: float(n_lesions),
        **{f"{HITS}{k}": float(value) for k, value in enumerate(hits)},
        **{f"{FALSE}{k}": float(value) for k, value in enumerate(false)},
    }


def summarised(patients: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """``froc``, the mean sensitivity at :data:`RATES`, and ``"found at R false"`` for each; empty without any lesion.

    Sensitivity is that of all lesions of these patients together. At a rate it is the highest that any threshold reaches
    with at most so many false places a study.
    """
    n_lesions = sum(row[LESIONS] for row in patients)
    if not n_lesions:
        return {}
    hits, false = (
        np.array([sum(row[f"{kind}{k}"] for row in patients) for k in range(len(THRESHOLDS))]) for kind in (HITS, FALSE)
    )
    rate, sensitivity = false / len(patients), hits / n_lesions
    at = {r: float(max((s for s, f in zip(sensitivity, rate, strict=True) if f <= r), default=0.0)) for r in RATES}
    return {"froc": float(np.mean(list(at.values()))), **{found_at(r): value for r, value in at.items()}}


def found_at(rate: float) -> str:
    """Name of the sensitivity at a rate of false places."""
    return f"found at {rate:g} false"
