"""What a person should look at before a study is used: text in its pixels, a face that could be rebuilt.

Suspicions, not findings: both are told from the picture alone, by simple marks, and can be wrong either way.
"""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from client.data.scan import Scan

LETTERS = 5
"""Marks of one height beside each other that make a line of text."""

FACE_SPACING_MM = 2.5
"""Coarser than this between two voxels, no face is recognised [mm]."""

FACE_EXTENT_MM = (110.0, 350.0)
"""Shortest and longest side of a volume that may hold a whole head [mm]."""

STRIPPED = 0.6
"""Share of voxels of one and the same darkest value from which on a head counts as freed of skull and face."""

_HEAD = re.compile(r"head|brain|skull|t1|t2|flair|mprage|bravo|spgr|neuro|cranial|kopf|schaedel|face|sinus|orbit")
_NOT_HEAD = re.compile(r"abdomen|pelvis|prostate|liver|cardiac|heart|thorax|chest|lung|knee|spine|breast|hip")


def has_text(plane: NDArray[np.float32]) -> bool:
    """Whether a plane ``(row, column)`` looks as if text were written into it.

    Letters are drawn in one value, the brightest or nearly, with sharp edges: small marks of about one height that stand in
    a line. Skeletons and vessels give bright marks too, but not in lines of equal height.
    """
    from scipy.ndimage import find_objects, label

    low, high = float(plane.min()), float(plane.max())
    if not high > low:
        return False
    marks, n = label(plane >= high - 0.02 * (high - low), structure=np.ones((3, 3)))
    if not LETTERS <= n <= 5000:
        return False
    boxes = []
    for number, (rows, columns) in enumerate(find_objects(marks), start=1):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if not (5 <= height <= 60 and 1 <= width <= 2 * height):
            continue
        filled = float((marks[rows, columns] == number).mean())
        if 0.12 <= filled <= 0.85 or width <= max(2, height // 4):
            boxes.append((rows.stop, height, columns.start, columns.stop))
    return _in_a_line(boxes)


def _in_a_line(boxes: list[tuple[int, int, int, int]]) -> bool:
    """Whether enough marks of one height stand on one line, close to each other."""
    for bottom, height, _, _ in boxes:
        line = sorted(
            (left, right) for b, h, left, right in boxes if abs(b - bottom) <= 1 and abs(h - height) <= 0.2 * height + 1
        )
        run = 1
        for (_, right), (left, _) in pairwise(line):
            run = run + 1 if left - right <= 1.5 * height else 1
            if run >= LETTERS:
                return True
    return False


def may_show_face(scan: Scan, name: str, modality: str | None) -> bool:
    """Whether a volume is fine and large enough to rebuild a face from, and is of a head as far as its name tells."""
    if scan.affine is None or modality not in (None, "MR", "CT", "PT") or _NOT_HEAD.search(name):
        return False
    spacing_mm = np.linalg.norm(scan.affine[:3, :3], axis=0)
    extent_mm = spacing_mm * np.array(scan.shape[::-1])
    if spacing_mm.max() > FACE_SPACING_MM or extent_mm.min() < FACE_EXTENT_MM[0] or extent_mm.max() > FACE_EXTENT_MM[1]:
        return False
    image = scan.image[0]
    return bool(_HEAD.search(name)) and float((image == image.min()).mean()) < STRIPPED
