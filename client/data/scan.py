"""One study as it was read, before anything is resampled: the common ground of all readers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.data.skips import Reason, UnusableError

MAX_SIDE = 16_384
"""Largest believable number of rows or columns: a header that claims more is an attack on memory or broken."""


@dataclass(frozen=True)
class Scan:
    """Intensities, label and geometry in the source's own grid."""

    image: NDArray[np.float32]
    """Intensities in the source's units, ``(channel, slice, row, column)``."""

    affine: NDArray[np.float64] | None
    """Index (column, row, slice) to patient coordinates in mm, DICOM's LPS axes, ``(4, 4)``; None for photographs."""

    label: NDArray[np.uint8] | None = None
    """Index into the plan's labels, ``(slice, row, column)``."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Slices, rows and columns."""
        n_slices, n_rows, n_columns = self.image.shape[1:]
        return n_slices, n_rows, n_columns

    def labelled(self, label: NDArray[np.uint8]) -> Scan:
        """The same scan with a label of the same size; UnusableError otherwise."""
        if label.shape != self.shape:
            raise UnusableError(Reason.LABEL_SIZE)
        return replace(self, label=label)


def stacked(channels: list[Scan]) -> Scan:
    """One scan with the channels of several on one grid, in the given order; UnusableError if their grids differ."""
    first = channels[0]
    if not all(same_grid(first, other) for other in channels[1:]):
        raise UnusableError(Reason.CHANNELS_DIFFER)
    return first if len(channels) == 1 else replace(first, image=np.concatenate([c.image for c in channels]))


def same_grid(a: Scan, b: Scan) -> bool:
    """Whether two scans have their voxels at the same places: every corner within a tenth of the smallest spacing."""
    if a.shape != b.shape or (a.affine is None) != (b.affine is None):
        return False
    return a.affine is None or b.affine is None or corners_agree(a.affine, b.affine, a.shape)


def corners_agree(a: NDArray[np.float64], b: NDArray[np.float64], shape: tuple[int, int, int]) -> bool:
    """Whether two affines put the corners of a grid of ``shape`` (slice, row, column) at the same places."""
    far = np.array(np.meshgrid(*[(0, n - 1) for n in reversed(shape)])).reshape(3, -1)
    tolerance_mm = 0.1 * np.linalg.norm(a[:3, :3], axis=0).min()
    return bool(np.abs((a - b) @ np.vstack([far, np.ones(8)])).max() <= tolerance_mm)


def indices_from_mask(values: NDArray[Any], n_labels: int) -> NDArray[np.uint8]:
    """Label indices from the values of a mask.

    With two labels everything above zero is label 1 (masks are often 0/255); with more, the value is the index.

    Raises
    ------
    UnusableError
        If a value is not a whole number or has no name in the plan.
    """
    if n_labels == 2:
        return np.asarray(values > 0, dtype=np.uint8)
    indices = values.astype(np.int64)
    if indices.min() < 0 or indices.max() >= n_labels or not np.array_equal(indices, values):
        raise UnusableError(Reason.LABEL_VALUES)
    return indices.astype(np.uint8)
