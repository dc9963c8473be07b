"""What was found in a study: measures in mm and ml, and pictures; the common ground of all kinds of task."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.data.scan import Scan
from shared_models import uncertainty
from shared_models.volume import in_greys

COLOURS = ((255, 196, 0), (0, 190, 255), (255, 88, 160), (120, 220, 90), (190, 140, 255), (255, 130, 60))
"""Outlines of the labels 1, 2, ..., beginning again after the last."""

HEAT_SHARE = 0.6
"""How much of a picture is covered by what lies over it, where that is strongest."""

WIDTH = 360
"""Pictures are at least this wide [pixels], and a page shows at most :data:`MOST_PICTURES` slices."""

MOST_PICTURES = 4

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Shown:
    """A picture for the page."""

    source: str
    """PNG as a data URI."""

    caption: str
    is_map: bool = False
    """Whether it is covered by a map from 0 to 1, whose colours the page then explains."""


@dataclass
class Findings:
    """What a prediction comes to; a writer fills it."""

    title: str
    files: dict[str, str] = field(default_factory=dict)
    """Name of each file, and what it is."""

    measures: list[dict[str, Any]] = field(default_factory=list)
    """Rows of the table, all with the same keys; the first is a name."""

    pictures: list[Shown] = field(default_factory=list)
    pictures_in_a_row: int | None = None
    """How many belong beside each other; None for as many as fit."""

    notes: list[str] = field(default_factory=list)
    """What a reader has to know of this prediction, in sentences."""

    warnings: list[str] = field(default_factory=list)
    """Why what is shown may be wrong, in sentences that stand above it."""


def entropy(probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
    """How undecided a distribution is: its entropy over the largest possible one, 0 to 1.

    Parameters
    ----------
    probabilities
        ``(label, ...)``, summing to 1 over labels.
    """
    nats = uncertainty.entropy(probabilities.astype(np.float64))
    return np.asarray(nats / np.log(len(probabilities)), np.float32).clip(0, 1)


def measured(mask: NDArray[np.bool_], scan: Scan) -> dict[str, float | int | None]:
    """Volume, number and size of what is in a mask.

    Parameters
    ----------
    mask
        ``(slice, row, column)`` on the scan's grid.

    Returns
    -------
    dict
        ``volume_ml``; ``lesions``, the parts of the mask that do not touch each other at a face, an edge or a corner;
        ``diameter_mm``, the largest distance of two voxel centres of one part. The first and the last are None for a
        photograph, which knows no millimetres; ``pixels`` counts in any case.
    """
    from scipy.ndimage import find_objects, label

    parts, n = label(mask, structure=np.ones((3, 3, 3)))
    found: dict[str, float | int | None] = {"volume_ml": None, "lesions": int(n), "diameter_mm": None}
    found["pixels"] = int(mask.sum())
    if scan.affine is None:
        return found
    directions = scan.affine[:3, :3]
    found["volume_ml"] = float(mask.sum() * abs(np.linalg.det(directions)) / 1000)
    largest = 0.0
    for number, box in enumerate(find_objects(parts), start=1):
        corners = _corners(parts[box] == number)
        largest = max(largest, _largest_distance(corners[:, ::-1] @ directions.T))
    found["diameter_mm"] = largest
    return found


def _corners(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Voxels that are the first or last of the mask along all three axes, ``(n, 3)``: its hull's corners are among them."""
    kept = mask.copy()
    for axis in range(3):
        ends = np.zeros_like(mask)
        lines = np.moveaxis(mask, axis, 0)
        first, last = lines.argmax(axis=0), len(lines) - 1 - lines[::-1].argmax(axis=0)
        at = np.moveaxis(ends, axis, 0)
        for index in (first, last):
            np.put_along_axis(at, index[np.newaxis], values=True, axis=0)
        kept &= ends
    return np.argwhere(kept)


def _largest_distance(points: NDArray[np.float64]) -> float:
    from scipy.spatial.distance import cdist

    at_once = 1000
    parts = (points[start : start + at_once] for start in range(0, len(points), at_once))
    return max((float(cdist(part, points).max()) for part in parts), default=0.0)


def slices_to_show(weight: NDArray[np.float64]) -> list[int]:
    """Up to :data:`MOST_PICTURES` slices, the heaviest of each stretch of slices that have any weight; else the middle."""
    heavy = np.flatnonzero(weight > 0)
    if not len(heavy):
        return [len(weight) // 2]
    stretches = np.array_split(heavy, min(MOST_PICTURES, len(heavy)))
    return [int(stretch[weight[stretch].argmax()]) for stretch in stretches]


def outlined(scan: Scan, labels: NDArray[np.uint8], k: int) -> str:
    """Slice ``k`` with the borders of all labels as a data URI."""
    from scipy.ndimage import binary_erosion

    image, stretch = _greys(scan, k)
    tall, wide = _size(image.shape[:2], stretch)
    shown = np.asarray(_image(image).resize((wide, tall), Image.Resampling.BICUBIC)).copy()
    label = np.asarray(Image.fromarray(labels[k]).resize((wide, tall), Image.Resampling.NEAREST))
    for value in np.unique(label[label > 0]):
        inside = label == value
        core = binary_erosion(inside, iterations=max(1, wide // WIDTH + 1), border_value=0)
        shown[inside & ~core] = COLOURS[(int(value) - 1) % len(COLOURS)]
    return _uri(Image.fromarray(shown))


def heated(scan: Scan, heat: NDArray[np.float32], k: int) -> str:
    """Slice ``k`` under a map between 0 and 1, from yellow to red, as a data URI."""
    image, stretch = _greys(scan, k)
    tall, wide = _size(image.shape[:2], stretch)
    hot = heat[k][..., None].clip(0, 1)
    colour = np.concatenate([np.ones_like(hot), 0.85 * (1 - hot), np.zeros_like(hot)], axis=-1)
    blended = (1 - HEAT_SHARE * hot) * image + HEAT_SHARE * hot * colour
    return _uri(_image(blended).resize((wide, tall), Image.Resampling.BICUBIC))


def beside(plane: NDArray[np.float32], brightest: float, scan: Scan, spacing_mm: tuple[float, float, float]) -> str:
    """A plane ``(y, x)`` in greys from 0 to ``brightest``, as a data URI: for pictures that are to be compared."""
    stretch = spacing_mm[1] / spacing_mm[2]
    if scan.affine is not None:
        column_mm, row_mm = np.linalg.norm(scan.affine[:3, :2], axis=0)
        stretch = float(row_mm / column_mm)
    tall, wide = _size(plane.shape, stretch)
    grey = _image(np.asarray(plane, np.float64) / max(brightest, 1e-30))
    return _uri(grey.resize((wide, tall), Image.Resampling.BICUBIC))


def save_nifti(path: Path, values: NDArray[Any], scan: Scan) -> None:
    """Write ``(slice, row, column)`` on the scan's grid; a photograph's has pixels of 1 mm."""
    import nibabel

    affine = np.eye(4) if scan.affine is None else _LPS_TO_RAS @ scan.affine
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(values.transpose(2, 1, 0)), affine), path)


def save_picture(path: Path, labels: NDArray[np.uint8]) -> None:
    """Write label indices ``(1, row, column)`` as a grey picture."""
    Image.fromarray(labels[0]).save(path)


def file_name(label: str) -> str:
    """A label as part of a file's name."""
    return "".join(c if c.isalnum() else "-" for c in label.lower()).strip("-") or "label"


def _greys(scan: Scan, k: int) -> tuple[NDArray[np.float32], float]:
    """Slice ``k`` for the eye, ``(row, column, 3)``, and the height of a pixel over its width."""
    greys = in_greys(scan.image[:, k])
    stretch = 1.0
    if scan.affine is not None:
        column_mm, row_mm = np.linalg.norm(scan.affine[:3, :2], axis=0)
        stretch = float(row_mm / column_mm)
    return greys if greys.ndim == 3 else np.repeat(greys[..., None], 3, axis=2), stretch


def _size(shape: Sequence[int], stretch: float) -> tuple[int, int]:
    scale = max(1, -(-WIDTH // shape[1]))
    return max(1, round(shape[0] * scale * stretch)), shape[1] * scale


def _image(values: NDArray[Any]) -> Image.Image:
    return Image.fromarray((255 * values.clip(0, 1)).round().astype(np.uint8))


def _uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
