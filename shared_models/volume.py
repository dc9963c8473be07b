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
    """Normalised intensities [standard deviations of this image], ``(channel, z, y, x)``; may be a read-only memory map."""

    label: NDArray[np.uint8] | None
    """Index into the plan's ``labels`` for each voxel, ``(z, y, x)``; None where nobody has drawn a reference."""

    foreground: NDArray[np.int32]
    """Up to 4096 voxels with a label above zero, evenly picked, ``(n, 3)`` as (z, y, x) indices."""

    spacing_mm: tuple[float, float, float]
    """Distance between voxel centres along (z, y, x) [mm]; 1.0 where the source has none (photographs)."""
