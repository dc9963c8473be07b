"""Emulated patients: the average head, warped smoothly for each of them, with lesions whose outline is known.

What a patient looks like depends on (seed, site, index) alone, never on who else was made before. How a scanner shows it
is in ``scanners``, the files are in ``consortium``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from shared_models.seeds import generator
from simulation.atlas import TISSUES, Grid, load_atlas

TISSUES_WITH_LESION = (*TISSUES, "lesion")
"""Order of a patient's tissue axis."""

CONTROL_SPACING_MM = 40.0
"""Distance between the control points of a warp [mm]."""

LARGEST_CONTROL_MM = 0.4 * CONTROL_SPACING_MM
"""Bound on every control displacement along each axis [mm]; below 1 / 2.48 of the spacing a cubic B-spline cannot fold
(Choi and Lee 2000, doi:10.1006/gmod.2000.0531)."""

_KNOTS_MM = np.arange(-5, 6) * CONTROL_SPACING_MM
_WHITE = TISSUES.index("white_matter")


@dataclass(frozen=True)
class Anatomy:
    """What lies where in one patient on one day."""

    tissues: NDArray[np.float32]
    """Share of each of :data:`TISSUES_WITH_LESION` in a voxel [0 to 1], ``(tissue, z, y, x)``; the rest is air."""

    lesion_mask: NDArray[np.uint8]
    """1 where lesions, faint or not, take up at least half of the voxel, else 0, ``(z, y, x)``."""

    grid: Grid
    """Where these voxels lie."""


@dataclass(frozen=True)
class Warp:
    """Where a point of the patient lies in the atlas: a free-form deformation, then size and pose.

    The deformation is a cubic B-spline on a regular lattice of control points (Rueckert et al. 1999,
    doi:10.1109/42.796284).

    Promise
        Smooth and invertible: the Jacobian determinant is above zero everywhere, since no control displacement exceeds
        :data:`LARGEST_CONTROL_MM` and ``pose`` is a rotation times a positive scale.
    """

    control_mm: NDArray[np.float64]
    """Displacements of the control points, ``(3, z, y, x)`` with (z, y, x) components on the first axis [mm]."""

    pose: NDArray[np.float64]
    """Rotation and scale, ``(3, 3)`` acting on (z, y, x) [ratio]."""

    shift_mm: NDArray[np.float64]
    """Translation into the atlas, ``(3,)`` as (z, y, x) [mm]."""

    @classmethod
    def random(cls, random: np.random.Generator) -> Warp:
        """A head of another shape (about 4 mm), size (within 8 %) and tilt (within about 5 degrees)."""
        control = random.normal(0, 11.0, size=(3,) + (len(_KNOTS_MM),) * 3)
        angles = random.uniform(-1, 1, size=3) * np.radians([5.0, 4.0, 4.0])
        scale = random.uniform(0.94, 1.08, size=3)
        return cls(
            control_mm=np.clip(control, -LARGEST_CONTROL_MM, LARGEST_CONTROL_MM),
            pose=_rotation(angles) * scale,
            shift_mm=random.uniform(-3.0, 3.0, size=3),
        )

    def points_mm(self, grid: Grid) -> NDArray[np.float64]:
        """Atlas coordinates of every voxel centre, ``(3, z, y, x)`` with (z, y, x) on the first axis [mm]."""
        along_z, along_y, along_x = (_spline_weights(axis) for axis in grid.axes_mm())
        displaced = np.einsum("zk,cklm->czlm", along_z, self.control_mm)
        displaced = np.einsum("yl,czlm->czym", along_y, displaced)
        displaced = np.einsum("xm,czym->czyx", along_x, displaced) + grid.points_mm()
        posed: NDArray[np.float64] = np.einsum("cd,dzyx->czyx", self.pose, displaced)
        return posed + self.shift_mm[:, None, None, None]


@dataclass(frozen=True)
class Lesion:
    """A lumpy ellipsoid."""

    centre_mm: NDArray[np.float64]
    """Centre as (z, y, x) [mm]."""

    radii_mm: NDArray[np.float64]
    """Half axes along (z, y, x) before the lumps [mm]."""

    lumps: NDArray[np.float64]
    """Three waves that roughen the surface, ``(3, 4)``: wave vector (z, y, x) [radians per radius] and phase [radians]."""

    def occupancy(self, points_mm: NDArray[np.float64]) -> NDArray[np.float32]:
        """Share of the tissue at each point that is lesion [0 to 1], soft over about 1.5 mm at the surface.

        ``points_mm`` is ``(3, ...)`` in the patient, (z, y, x) on the first axis; the result has the shape of the rest.
        """
        per_axis = (3,) + (1,) * (points_mm.ndim - 1)
        scaled = (points_mm - self.centre_mm.reshape(per_axis)) / self.radii_mm.reshape(per_axis)
        roughness = sum(np.cos(np.einsum("c,c...->...", wave[:3], scaled) + wave[3]) for wave in self.lumps)
        depth = (1 + 0.08 * roughness - np.sqrt((scaled**2).sum(axis=0))) * self.radii_mm.mean()
        occupied: NDArray[np.float32] = np.clip(0.5 + depth / 1.5, 0, 1).astype(np.float32)
        return occupied

    def later(self, random: np.random.Generator) -> Lesion:
        """The same lesion at the next study: each half axis between 10 % smaller and 25 % larger."""
        return Lesion(self.centre_mm, self.radii_mm * random.uniform(0.9, 1.25, size=3), self.lumps)


@dataclass(frozen=True)
class EmulatedPatient:
    """A person who does not exist.

    Two patients with different (seed, site, index) differ in everything; the same three numbers always give the same
    patient.
    """

    seed: int
    site: int
    """Number of the hospital, from 1."""

    index: int
    """Number of the patient within the hospital, from 1."""

    @property
    def patient_id(self) -> str:
        """Fictional DICOM Patient ID, e.g. ``EMU-0-1-007`` for seed 0, site 1, patient 7."""
        return f"EMU-{self.seed}-{self.site}-{self.index:03d}"

    @property
    def n_studies(self) -> int:
        """Visits to the scanner: 2 for about a quarter of the patients, else 1."""
        return 2 if self._random("studies").random() < 0.25 else 1

    @property
    def sex(self) -> str:
        """DICOM's code: "F" or "M"."""
        return "F" if self._random("sex").random() < 0.5 else "M"

    @property
    def age_years(self) -> int:
        """Age at the first study, 20 to 79 [years]."""
        return int(self._random("age").integers(20, 80))

    @property
    def conspicuity(self) -> float:
        """Share of the tissue that this patient's lesions replace [0.4 to 1]: some are obvious, some are faint."""
        return float(self._random("conspicuity").uniform(0.4, 1.0))

    @property
    def warp(self) -> Warp:
        """How this head differs from the atlas."""
        return Warp.random(self._random("warp"))

    def has_lesion(self, prevalence: float) -> bool:
        """Whether this is one of the share ``prevalence`` of patients who have lesions; those of a smaller share are among
        those of a larger."""
        return self._random("prevalence").random() < prevalence

    def anatomy(self, grid: Grid, study: int, *, with_lesions: bool = True) -> Anatomy:
        """Tissues and lesions on ``grid`` at visit ``study`` (from 1), or the same head without lesions.

        Later studies show the same head with slightly changed lesions. A voxel holds the average over its slice
        thickness (partial volume).
        """
        atlas = load_atlas(max(1.0, min(grid.spacing_mm[1:])))
        n_subslices = max(1, round(grid.spacing_mm[0] / atlas.resolution_mm))
        fine = grid.with_subslices(n_subslices)
        healthy = atlas.at(self.warp.points_mm(fine))
        lesions = self._lesions(healthy[_WHITE], fine, study) if with_lesions else ()
        occupied = _inside_white_matter(healthy[_WHITE], lesions, fine)
        lesion = np.float32(self.conspicuity) * occupied
        tissues = np.concatenate([healthy * (1 - lesion), lesion[None]])
        mask = _average_slices(occupied[None], n_subslices)[0] >= 0.5
        return Anatomy(_average_slices(tissues, n_subslices), mask.astype(np.uint8), grid)

    def _lesions(self, white_matter: NDArray[np.float32], grid: Grid, study: int) -> Sequence[Lesion]:
        """One to four lesions as they are at visit ``study``; none where the slab holds no deep white matter."""
        random = self._random("lesions")
        places = deep_white_matter(white_matter, grid)
        if len(places) == 0:
            return ()
        lesions = [_random_lesion(places, random) for _ in range(random.integers(1, 5))]
        for visit in range(2, study + 1):
            change = self._random("change", visit)
            lesions = [lesion.later(change) for lesion in lesions]
        return lesions

    def _random(self, *what: object) -> np.random.Generator:
        return generator("patient", self.seed, self.site, self.index, *what)


def deep_white_matter(white_matter: NDArray[np.float32], grid: Grid) -> NDArray[np.float64]:
    """Points at least 4 mm inside white matter, where lesions may have their centre: ``(n, 3)`` as (z, y, x) [mm]."""
    depth = ndimage.distance_transform_edt(white_matter > 0.5, sampling=grid.spacing_mm)
    places: NDArray[np.float64] = np.argwhere(depth >= 4.0) * np.array(grid.spacing_mm) + np.array(grid.origin_mm)
    return places


def _random_lesion(places_mm: NDArray[np.float64], random: np.random.Generator) -> Lesion:
    radius = random.uniform(8.0, 14.0)
    return Lesion(
        centre_mm=places_mm[random.integers(len(places_mm))],
        radii_mm=radius * random.uniform(0.85, 1.2, size=3),
        lumps=np.column_stack([random.normal(0, 2.0, size=(3, 3)), random.uniform(0, 2 * math.pi, size=3)]),
    )


def _inside_white_matter(
    white_matter: NDArray[np.float32], lesions: Sequence[Lesion], grid: Grid
) -> NDArray[np.float32]:
    """Occupancy of all lesions together, ending where white matter ends; ``(z, y, x)``."""
    points = grid.points_mm()
    lesion = np.zeros(grid.shape, np.float32)
    for one in lesions:
        np.maximum(lesion, one.occupancy(points), out=lesion)
    return lesion * np.minimum(2 * white_matter, 1)


def _average_slices(tissues: NDArray[np.float32], n_subslices: int) -> NDArray[np.float32]:
    n, z, y, x = tissues.shape
    averaged: NDArray[np.float32] = tissues.reshape(n, z // n_subslices, n_subslices, y, x).mean(axis=2)
    return averaged


def _rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotation by three angles [radians], about the z, y and x axes in turn, acting on (z, y, x)."""
    rotation = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = [k for k in range(3) if k != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
        rotation = rotation @ turn
    return rotation


def _spline_weights(axis_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cubic B-spline weight of every knot at every coordinate, ``(coordinate, knot)``."""
    t = np.abs(axis_mm[:, None] - _KNOTS_MM) / CONTROL_SPACING_MM
    near, far = 2 / 3 - t**2 + t**3 / 2, np.clip(2 - t, 0, None) ** 3 / 6
    return np.where(t < 1, near, far)
