"""From a scan as it was stored to a volume as the plan wants it: patient axes, spacing, normalised intensities.

Orientation, resampling and normalisation are MONAI's; this module translates between its ``(channel, x, y, z)`` and the
one axis order of the house. Volumes are not padded: that is the task's matter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.data.scan import Scan
from client.data.skips import Reason, UnusableError
from shared_models.plan import DataTable
from shared_models.volume import Volume

MAX_FOREGROUND = 4096
"""Labelled voxels that a volume lists at most."""

MAX_THICKNESS_RATIO = 1.5
"""In 2D, how much coarser a slice's pixels may be along one side than the distance between slices: beyond it, the
series was not acquired axially and its axial planes are interpolation rather than image."""

_LPS_ENDS = (("R", "L"), ("A", "P"), ("I", "S"))
"""Where each axis of an LPS affine begins and ends; MONAI assumes RAS otherwise."""


def prepare(scan: Scan, data: DataTable) -> Volume:
    """Bring a scan to the plan's grid.

    The nearest patient axes are found by flips and permutations only, so oblique series keep their voxels. Images are
    resampled bilinearly, labels by nearest neighbour; ``dimensions = 2`` resamples in plane and keeps the slices. Then
    each channel is normalised over its voxels that are not zero (mean 0, standard deviation 1); zero stays zero.

    Parameters
    ----------
    scan
        ``(channel, slice, row, column)`` with its affine; a photograph has none.
    data
        The plan's table: dimensions and ``spacing_mm``.

    Returns
    -------
    Volume
        Image ``(channel, z, y, x)`` float32, label ``(z, y, x)`` uint8, foreground ``(n, 3)`` int32.

    Raises
    ------
    UnusableError
        If the plan needs a volume and this is none, needs a spacing and there is none, or a value is not finite.
    """
    if not np.isfinite(scan.image).all():
        raise UnusableError(Reason.NOT_FINITE)
    if data.dimensions == 3 and (scan.affine is None or scan.shape[0] < 2):
        raise UnusableError(Reason.NEEDS_VOLUME)
    if scan.affine is None and data.spacing_mm is not None:
        raise UnusableError(Reason.NO_SPACING)
    image, label, spacing_mm = (
        (scan.image, scan.label, (1.0, 1.0, 1.0)) if scan.affine is None else _on_grid(scan, scan.affine, data)
    )
    return Volume(_normalised(image), label, foreground_of(label), spacing_mm)


def foreground_of(label: NDArray[np.uint8] | None) -> NDArray[np.int32]:
    """Up to 4096 voxels with a label above zero, evenly picked in scan order: ``(n, 3)`` as (z, y, x), int32."""
    if label is None:
        return np.empty((0, 3), dtype=np.int32)
    voxels = np.flatnonzero(label)
    if len(voxels) > MAX_FOREGROUND:
        voxels = voxels[np.linspace(0, len(voxels) - 1, MAX_FOREGROUND).astype(np.int64)]
    return np.stack(np.unravel_index(voxels, label.shape), axis=1).astype(np.int32)


def _on_grid(
    scan: Scan, affine: NDArray[np.float64], data: DataTable
) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None, tuple[float, float, float]]:
    from monai.transforms import Orientation

    orient = Orientation(axcodes="LPS", labels=_LPS_ENDS)
    image = orient(_to_monai(scan.image, affine))
    label = None if scan.label is None else orient(_to_monai(scan.label[np.newaxis], affine))
    if data.dimensions == 2:
        _check_axial(image)
    if data.spacing_mm is not None:
        image = _resampled(image, data, mode="bilinear")
        label = None if label is None else _resampled(label, data, mode="nearest")
    x_mm, y_mm, z_mm = _spacing(image)
    indices = None if label is None else _from_monai(label)[0].astype(np.uint8)
    return _from_monai(image).astype(np.float32), indices, (z_mm, y_mm, x_mm)


def _to_monai(values: NDArray[Any], affine: NDArray[np.float64]) -> Any:
    """``(channel, slice, row, column)`` to a MetaTensor ``(channel, column, row, slice)``, still with an LPS affine."""
    import torch
    from monai.data import MetaTensor

    axes = np.ascontiguousarray(values.transpose(0, 3, 2, 1), dtype=np.float32)
    return MetaTensor(torch.from_numpy(axes), affine=torch.from_numpy(affine))


def _from_monai(tensor: Any) -> NDArray[Any]:
    return np.ascontiguousarray(tensor.numpy().transpose(0, 3, 2, 1))


def _spacing(tensor: Any) -> tuple[float, float, float]:
    """Distance between voxel centres along (x, y, z) [mm]."""
    x, y, z = np.linalg.norm(np.asarray(tensor.affine, dtype=np.float64)[:3, :3], axis=0)
    return round(float(x), 6), round(float(y), 6), round(float(z), 6)


def _check_axial(tensor: Any) -> None:
    """Axial planes must be what was acquired, or as fine as that."""
    x_mm, y_mm, z_mm = _spacing(tensor)
    if max(x_mm, y_mm) > MAX_THICKNESS_RATIO * z_mm or min(tensor.shape[1:3]) < 2:
        raise UnusableError(Reason.NOT_AXIAL)


def _resampled(tensor: Any, data: DataTable, *, mode: str) -> Any:
    from monai.transforms import Spacing

    spacing = data.spacing_mm or ()
    in_plane_xy = (spacing[-1], spacing[-2])
    z_mm = spacing[0] if data.dimensions == 3 else _spacing(tensor)[2]
    return Spacing(pixdim=(*in_plane_xy, z_mm), mode=mode, padding_mode="border")(tensor)


def _normalised(image: NDArray[np.float32]) -> NDArray[np.float32]:
    from monai.transforms import NormalizeIntensity

    normalised = NormalizeIntensity(nonzero=True, channel_wise=True)(np.array(image, dtype=np.float32))
    return np.ascontiguousarray(normalised, dtype=np.float32)
