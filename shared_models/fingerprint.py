"""The fingerprint of a consortium's images: how finely they are sampled and how large they are, before there is a plan.

A site counts its training patients in public bins: spacing in millimetres and size in voxels, along each axis. A patient
is one vector whose part for each quantity adds up to 1 over all of that patient's studies, so its L2 norm is at most the
root of the number of quantities, and under ``[privacy]`` the sum gets Gaussian noise for that norm (``PRIVACY_RULES``, rule
12). The server adds the sites' counts up; medians of what is pooled are those of all patients, whatever the sizes of the
sites. What is read off a released count is free (``self_configuration``).

Nothing is asked of intensities: each image is normalised by itself, so no plan has a key that they could set.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from shared_models.errors import FederadError
from shared_models.plan import EVERYBODY, Plan
from shared_models.weights import Weights

AXES = ("z", "y", "x")

SPACINGS_MM: NDArray[np.float64] = np.round(
    np.concatenate([np.arange(2, 20) * 0.05, np.arange(10, 30) * 0.1, np.arange(6, 20) * 0.5, np.arange(10, 21)]), 2
)
"""Bins of a spacing by their middle [mm]: steps of 0.05 from 0.1, of 0.1 from 1, of 0.5 from 3 and of 1 from 10 to 20."""

SIZES: NDArray[np.float64] = np.concatenate(
    [np.arange(4, 32), *(2.0 ** (octave - 4) * np.arange(16, 32) for octave in range(5, 11)), [2048]]
)
"""Bins of a size by their middle [voxels]: single voxels from 4 to 32, then sixteen to each doubling up to 2,048."""

BINS: Mapping[str, NDArray[np.float64]] = {f"spacing_mm.{axis}": SPACINGS_MM for axis in AXES} | {
    f"size.{axis}": SIZES for axis in AXES
}
"""Every quantity and the middles of its bins, in the order of the vector; what lies outside counts in the nearest."""

N_VALUES = sum(len(middles) for middles in BINS.values())

LARGEST_NORM = math.sqrt(len(BINS))
"""Of one patient's vector."""

NOISE = 4.0
"""Noise over :data:`LARGEST_NORM` where a plan with ``[privacy]`` is configured: epsilon 0.93 at delta 1e-5, once."""

OVER_NOISE = 4.0
"""A bin counts if it holds more than so many standard deviations of the noise on it: of all bins together, one in fifty
fingerprints then shows one that holds nothing but noise."""

LEAST_PATIENTS = 10
"""Over all sites; fewer than this make no fingerprint."""

OF_VOLUMES = frozenset({"MR", "CT", "PT"})
"""Modalities whose images have slices and spacing."""

Study = tuple[tuple[float, float, float], tuple[int, int, int]]
"""Spacing [mm] and size [voxels] of one study along (z, y, x), as it was stored."""


def fingerprint_plan(plan: Plan, noise: float | None = None) -> Plan:
    """The plan that asks the sites for the fingerprint of the images that ``plan`` is about, and trains nothing.

    Parameters
    ----------
    noise
        Standard deviation of the noise over a patient's largest norm; :data:`NOISE` unless given where ``plan`` has
        ``[privacy]``, else none.

    Raises
    ------
    FederadError
        P240 if images of this kind have no fingerprint.
    """
    if plan.task.kind != "segmentation" or plan.data.modality not in OF_VOLUMES:
        raise FederadError(
            "P240",
            happened=f"The plan {plan.name} has kind = {plan.task.kind!r} and modality = {plan.data.modality!r}.",
            because="Spacing, patch and depth are derived for segmentation of volumes: MR, CT and PT.",
            remedies=("give patch and spacing_mm under [data] by hand", "or configure a plan of that kind"),
        )
    tables: dict[str, Any] = json.loads(plan.canonical_json())
    side = max(8, 2 ** len(plan.task.channels))
    data = {key: tables["data"][key] for key in ("modality", "channels", "split")}
    asked: dict[str, Any] = {
        "name": f"{plan.name[:51]}-fingerprint",
        "rounds": 1,
        "asks": "fingerprint",
        "task": tables["task"],
        "data": {**data, "dimensions": 3, "patch": [side] * 3},
        "strategy": {
            "minimum_sites": plan.strategy.minimum_sites,
            "deadline_s": plan.strategy.deadline_s,
            "release": "last",
            "max_update_norm": 1e5,
        },
        "simulation": tables["simulation"],
    }
    if noise is None and plan.privacy is not None:
        noise = NOISE
    if noise is not None:
        asked["privacy"] = {
            "noise_multiplier": noise,
            "delta": plan.privacy.delta if plan.privacy is not None else 1e-5,
            "patients_per_step": EVERYBODY,
            "steps_per_round": 1,
        }
    return Plan.from_tables(asked, name=asked["name"])


def blank() -> Weights:
    """A fingerprint of nobody: the arrays of the question, each float32 ``(bin,)``."""
    return {name: np.zeros(len(middles), np.float32) for name, middles in BINS.items()}


def vector_of(studies: Iterable[Study]) -> NDArray[np.float64]:
    """One patient, ``(value,)`` in the order of :data:`BINS`: each quantity's bins add up to 1, or to 0 without a study."""
    rows = [np.concatenate([_hot(middles, value) for middles, value in _paired(study)]) for study in studies]
    return np.mean(rows, axis=0) if rows else np.zeros(N_VALUES)


def as_arrays(vector: NDArray[np.float64]) -> Weights:
    """A vector ``(value,)`` by quantity, float32."""
    ends = np.cumsum([len(middles) for middles in BINS.values()])[:-1]
    return {name: part.astype(np.float32) for name, part in zip(BINS, np.split(vector, ends), strict=True)}


def rounded(vector: NDArray[np.float64], n_patients: int, declared_size: int) -> NDArray[np.float64]:
    """The counts that leave without noise: shares of the patients to the nearest hundredth, of the declared size.

    Neither the number of patients nor a single one among more than two hundred can be read off them.
    """
    return np.round(vector / max(n_patients, 1), 2) * declared_size


@dataclass(frozen=True)
class Fingerprint:
    """What all sites together released."""

    counts: Mapping[str, NDArray[np.float64]]
    """Patients in each bin, by quantity."""

    n_sites: int

    deviation: float
    """Standard deviation of the noise on each count [patients]; 0 without noise."""

    @classmethod
    def of(cls, plan: Plan, mean: Weights, n_sites: int) -> Self:
        """From the mean over ``n_sites`` sites, as the round loop adds up what they answered to ``plan``."""
        noise = plan.privacy.noise_multiplier if plan.privacy is not None else None
        return cls(
            {name: n_sites * np.asarray(mean[name], np.float64) for name in BINS},
            n_sites,
            (noise or 0.0) * LARGEST_NORM * math.sqrt(n_sites),
        )

    @property
    def n_patients(self) -> float:
        """How many patients stand out of the noise, by the quantity in which the fewest do."""
        return min(float(self._certain(name).sum()) for name in BINS)

    def quantile(self, name: str, share: float = 0.5) -> float:
        """The middle of the bin below which, itself included, lies so large a share of the patients.

        Raises
        ------
        FederadError
            P241 if fewer than :data:`LEAST_PATIENTS` patients stand out of the noise.
        """
        certain = self._certain(name)
        total = float(certain.sum())
        if round(total) < LEAST_PATIENTS:
            raise FederadError(
                "P241",
                happened=f"{total:.0f} patients of {self.n_sites} sites stand out of the noise in {name}, of at least "
                f"{LEAST_PATIENTS}.",
                because="What is derived from so few would follow single patients, or the noise.",
                remedies=("ask more sites, or sites with more patients", "or agree on less noise: --noise"),
            )
        return float(BINS[name][int(np.searchsorted(np.cumsum(certain), share * total - 1e-9))])

    def medians(self, what: str) -> tuple[float, float, float]:
        """Of ``"spacing_mm"`` or ``"size"``, along (z, y, x)."""
        z, y, x = (self.quantile(f"{what}.{axis}") for axis in AXES)
        return z, y, x

    def _certain(self, name: str) -> NDArray[np.float64]:
        counts = self.counts[name]
        return np.where(counts > OVER_NOISE * self.deviation, counts, 0.0)


def _paired(study: Study) -> Iterable[tuple[NDArray[np.float64], float]]:
    spacing_mm, size = study
    return zip(BINS.values(), (*spacing_mm, *map(float, size)), strict=True)


def _hot(middles: NDArray[np.float64], value: float) -> NDArray[np.float64]:
    hot = np.zeros(len(middles))
    hot[int(np.abs(middles - value).argmin())] = 1.0
    return hot
