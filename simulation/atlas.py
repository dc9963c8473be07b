"""One average head as tissue fractions, and the grid of points at which it is looked at.

The brain is the MNI152 template (ICBM 152 nonlinear symmetric 2009a; Fonov et al. 2009, doi:10.1016/S1053-8119(09)70884-5)
that ships inside ``nilearn``: grey- and white-matter maps at 1 mm, read from the installed package, nothing is downloaded.
The template has no skull; cerebrospinal fluid up to the skull, bone and scalp are layers of constant thickness around it.

Axes are DICOM's everywhere: arrays are ``(z, y, x)``, x grows to the patient's left, y to the back, z to the head. Points
in millimetres keep the same order, (z, y, x), and have their origin in the template's (the anterior commissure).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

TISSUES = ("scalp", "bone", "csf", "grey_matter", "white_matter")
"""Order of the tissue axis; what remains to one is air."""

SLAB_CENTRE_MM = 24.0
"""Height of the middle of every emulated slab: the bodies of the lateral ventricles [mm above the anterior commissure]."""

HEAD_HEIGHT_MM = 180.0
"""Tallest slab that still lies in the head [mm]."""

FIELD_OF_VIEW_MM = (224.0, 192.0)
"""In-plane extent (y, x) of every emulated slice [mm]: a warped head fits."""

_Number = TypeVar("_Number", int, float)

_CENTRE_YX_MM = (16.0, 0.0)
_CSF_MM, _BONE_MM, _SCALP_MM = 1.5, 7.0, 13.0  # outer surface of each layer, measured from the surface of the brain
_MARGIN_MM = 16  # room for these layers around the template's box


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Where the voxels of one axial series lie in the patient."""

    shape: tuple[int, int, int]
    """Number of voxels along (z, y, x)."""

    spacing_mm: tuple[float, float, float]
    """Distance between voxel centres along (z, y, x) [mm]; slices touch, so the first is their thickness too."""

    origin_mm: tuple[float, float, float]
    """Centre of voxel (0, 0, 0) as (z, y, x) [mm]."""

    @classmethod
    def slab(cls, n_slices: int, spacing_mm: tuple[float, float, float]) -> Grid:
        """``n_slices`` axial slices around the lateral ventricles, wide enough for the whole head.

        Raises
        ------
        ValueError
            If the slab would be taller than :data:`HEAD_HEIGHT_MM`.
        """
        if n_slices * spacing_mm[0] > HEAD_HEIGHT_MM:
            raise ValueError(f"{n_slices} slices of {spacing_mm[0]:g} mm are taller than {HEAD_HEIGHT_MM:g} mm")
        extent = (n_slices * spacing_mm[0], *FIELD_OF_VIEW_MM)
        shape = [max(1, round(length / step)) for length, step in zip(extent, spacing_mm, strict=True)]
        centre = (SLAB_CENTRE_MM, *_CENTRE_YX_MM)
        origin = [c - (n - 1) / 2 * step for c, n, step in zip(centre, shape, spacing_mm, strict=True)]
        return cls(shape=_triple(shape), spacing_mm=spacing_mm, origin_mm=_triple(origin))

    def with_subslices(self, n: int) -> Grid:
        """The same slab with every slice cut into ``n`` thinner ones of equal thickness."""
        dz = self.spacing_mm[0] / n
        return replace(
            self,
            shape=(self.shape[0] * n, *self.shape[1:]),
            spacing_mm=(dz, *self.spacing_mm[1:]),
            origin_mm=(self.origin_mm[0] - (n - 1) / 2 * dz, *self.origin_mm[1:]),
        )

    def axes_mm(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Coordinates of the voxel centres along z, y and x [mm], one vector each."""
        z, y, x = (
            np.arange(n, dtype=np.float64) * d + o
            for o, d, n in zip(self.origin_mm, self.spacing_mm, self.shape, strict=True)
        )
        return z, y, x

    def points_mm(self) -> NDArray[np.float64]:
        """Coordinates of all voxel centres, ``(3, z, y, x)`` with (z, y, x) on the first axis [mm]."""
        return np.stack(np.meshgrid(*self.axes_mm(), indexing="ij"))


@dataclass(frozen=True)
class Atlas:
    """Tissue fractions of the average head."""

    tissues: NDArray[np.float32]
    """Share of each of :data:`TISSUES` in a voxel [0 to 1], ``(tissue, z, y, x)``; with air they add up to one."""

    resolution_mm: float
    """Distance between voxel centres, and full width of the smoothing that goes with it, on all axes [mm]."""

    origin_mm: tuple[float, float, float]
    """Centre of voxel (0, 0, 0) as (z, y, x) [mm]."""

    def at(self, points_mm: NDArray[np.float64]) -> NDArray[np.float32]:
        """Tissue fractions at any points, linearly interpolated; air outside the atlas.

        Parameters
        ----------
        points_mm
            ``(3, ...)`` with (z, y, x) on the first axis [mm].

        Returns
        -------
        NDArray
            Float32, ``(tissue, ...)`` in the order of :data:`TISSUES`.
        """
        origin = np.reshape(self.origin_mm, (3,) + (1,) * (points_mm.ndim - 1))
        index = (points_mm - origin) / self.resolution_mm
        return np.stack([ndimage.map_coordinates(tissue, index, order=1, output=np.float32) for tissue in self.tissues])


@lru_cache(maxsize=2)
def load_atlas(resolution_mm: float) -> Atlas:
    """The average head at ``resolution_mm`` (1 or coarser); loaded once per process, arrays read-only."""
    if resolution_mm < 1:
        raise ValueError(f"resolution_mm={resolution_mm:g} is finer than the 1 mm at which the template was made")
    brain, grey, white, origin = _template()
    if resolution_mm > 1:
        brain, grey, white = (_coarser(part, resolution_mm) for part in (brain, grey, white))
    tissues = _with_layers(brain, grey, white, resolution_mm)
    tissues.setflags(write=False)
    return Atlas(tissues=tissues, resolution_mm=resolution_mm, origin_mm=origin)


def _template() -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], tuple[float, float, float]]:
    """Brain, grey and white matter [0 to 1] at 1 mm, with a margin of air, and the centre of the first voxel."""
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

    images = [load(resolution=1) for load in (load_mni152_template, load_mni152_gm_template, load_mni152_wm_template)]
    t1, grey, white = (np.pad(_as_zyx(image.dataobj), _MARGIN_MM) for image in images)
    last_index = [n - 1 for n in images[0].shape]
    right, front, low = images[0].affine[:3, 3]
    left_first = -(right + last_index[0])  # nilearn's x and y grow to the right and to the front: reversed here
    back_first = -(front + last_index[1])
    origin = _triple(float(edge - _MARGIN_MM) for edge in (low, back_first, left_first))
    return (t1 > 0).astype(np.float32), grey, white, origin


def _as_zyx(data: object) -> NDArray[np.float32]:
    """From nilearn's (right, front, up) to ours, (z, y, x) in LPS."""
    return np.asarray(data, dtype=np.float32).transpose(2, 1, 0)[:, ::-1, ::-1]


def _coarser(part: NDArray[np.float32], resolution_mm: float) -> NDArray[np.float32]:
    """Every ``resolution_mm``-th point of the smoothed map, beginning with the first."""
    smooth = ndimage.gaussian_filter(part, sigma=resolution_mm / 2.355)  # full width at half maximum = resolution
    shape = [int((n - 1) // resolution_mm) + 1 for n in part.shape]
    coarse: NDArray[np.float32] = ndimage.affine_transform(
        smooth, np.full(3, resolution_mm), output_shape=tuple(shape), order=1, output=np.float32
    )
    return coarse


def _with_layers(
    brain: NDArray[np.float32], grey: NDArray[np.float32], white: NDArray[np.float32], resolution_mm: float
) -> NDArray[np.float32]:
    """Add fluid, bone and scalp around the brain; ``(tissue, z, y, x)``."""
    hull = ndimage.gaussian_filter(brain, sigma=5.0 / resolution_mm) > 0.5  # bridges the sulci
    height = (ndimage.distance_transform_edt(~hull) - ndimage.distance_transform_edt(hull)) * resolution_mm

    def within(surface_mm: float) -> NDArray[np.float32]:
        share: NDArray[np.float32] = np.clip(0.5 + (surface_mm - height) / resolution_mm, 0, 1).astype(np.float32)
        return share

    skull_cavity = np.maximum(within(_CSF_MM), np.minimum(grey + white, 1))
    fluid = skull_cavity - np.minimum(grey + white, 1)
    bone = np.maximum(within(_BONE_MM) - skull_cavity, 0)
    scalp = np.maximum(within(_SCALP_MM) - skull_cavity - bone, 0)
    return np.stack([scalp, bone, fluid, grey, white])


def _triple(values: Iterable[_Number]) -> tuple[_Number, _Number, _Number]:
    a, b, c = values
    return a, b, c
