"""One image as every part of the house sees it: axes, units, dtype.

There is one axis order, ``(channel, z, y, x)``, for volumes, slices and photographs alike; a photograph has one slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Volume:
    """A prepared image with its reference, in the grid that the plan asked for.

    Patient axes are DICOM's: x grows to the patient's left, y to the back, z to the head. A photograph keeps its own
    rows (y) and columns (x).
    """

    image: NDArray[np.float32]
    """Normalised intensities [standard deviations of this image], ``(channel, z, y, x)``; may be a read-only memory map.
    Where a plan begins at k-space: fully sampled coil images, real and imaginary part of one coil after the other, in units
    of the study's largest magnitude."""

    label: NDArray[np.uint8] | None
    """Index into the plan's ``labels`` for each voxel, ``(z, y, x)``; None where nobody has drawn a reference."""

    foreground: NDArray[np.int32]
    """Up to 4096 voxels with a label above zero, evenly picked, ``(n, 3)`` as (z, y, x) indices."""

    spacing_mm: tuple[float, float, float]
    """Distance between voxel centres along (z, y, x) [mm]; 1.0 where the source has none (photographs)."""

    category: int | None = None
    """Index into the plan's ``labels`` for the whole study; None where a plan labels voxels."""

    interval: tuple[float, float] | None = None
    """Where the number of the whole study lies, both ends included and alike where it is known exactly: a count, or a share
    from 0 to 1; None where a plan asks for none."""

    key: str = ""
    """Key of the study, from which a task draws what evaluation leaves to chance."""

    site: str = ""
    """Name of the site, for what a plan says of single sites."""

    measured: NDArray[np.bool_] | None = None
    """Where a plan begins at k-space: which samples a scanner measured, ``(z, y, x)``, and the image is then zero-filled;
    None where it measured all, and the plan leaves some out."""


def crop(array: NDArray[np.generic], corner: tuple[int, ...], size: tuple[int, ...]) -> NDArray[np.generic]:
    """The window of ``(channel, z, y, x)`` at ``corner``, zero where it reaches outside."""
    shape = array.shape[1:]
    inside = tuple(slice(max(c, 0), min(c + n, side)) for c, n, side in zip(corner, size, shape, strict=True))
    window = np.asarray(array[(slice(None), *inside)])
    padding = [(max(-c, 0), max(c + n - side, 0)) for c, n, side in zip(corner, size, shape, strict=True)]
    return np.pad(window, [(0, 0), *padding]) if any(a or b for a, b in padding) else window


def in_greys(plane: NDArray[np.float32]) -> NDArray[np.float32]:
    """A plane ``(channel, y, x)`` for the eye, between 0 and 1: colour ``(y, x, 3)`` of three channels, else the first's
    grey ``(y, x)``."""
    plane = np.asarray(plane, np.float32)
    low, high = np.percentile(plane, [1, 99.5])
    shown: NDArray[np.float32] = np.clip((plane - low) / max(high - low, 1e-6), 0, 1)
    n_colours = 3
    return shown.transpose(1, 2, 0) if shown.shape[0] == n_colours else shown[0]
