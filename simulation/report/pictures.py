"""Pictured patients: each one image with the outlines of reference and prediction as SVG paths."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from contourpy import contour_generator
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from simulation.report.words import figure

LONGEST_SIDE = 512
"""Pictures are reduced to at most this many pixels a side, so that a page of photographs can still be sent."""

SMALLEST_WINDOW = 0.5
"""Share of a picture's sides that is always shown, so that one still sees where one is."""

HEAT_SHARE = 0.6
"""How much of a picture its heatmap covers where it is hottest."""

LEAST_DOUBT = 0.02
"""A map of doubt is shown up to its largest value in the picture, but for smaller ones than this, which stay dark."""

MARGIN = 2.2
"""Sides of the shown part over those of what is outlined, where that is more."""


@dataclass(frozen=True)
class Picture:
    """One slice or photograph with two outlines, ready for an SVG element; lengths are in image columns."""

    scanner: str
    which: str
    shown: str
    """Which of the patient's numbers ``value`` is."""
    value: str
    caption: str
    has_heat: bool
    has_outline: bool
    panels: tuple[str, ...]
    """What lies side by side in the image, from the left; empty for a single one."""
    source: str
    """The image as a data URI."""

    width: int
    height: float
    window: tuple[float, ...]
    """The part that is shown, as left, top, width and height."""
    truth: str
    """Outline of the reference, as an SVG path in half pixels."""
    prediction: str
    """Outline of the model's prediction, likewise."""
    stretch: float
    """Height of a pixel over its width."""
    doubts: dict[str, str]
    """The image under a map of how unsure the model is, as a data URI, by the map's name."""


def pictures(folder: Path, metric: str) -> dict[str, list[Picture]]:
    """The pictures of a finished run by site; none if ``pictures.npz`` is not there or spoilt."""
    shown: dict[str, list[Picture]] = {}
    try:
        with np.load(folder / "pictures.npz", allow_pickle=False) as arrays:
            for k, about in enumerate(json.loads(text) for text in arrays["meta"]):
                shown.setdefault(about["site"], []).append(_picture(arrays, k, about, metric))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return {}
    return shown


def _picture(arrays: Mapping[str, NDArray[Any]], k: int, about: Mapping[str, Any], metric: str) -> Picture:
    image, truth, prediction = (arrays[f"{k}/{part}"] for part in ("image", "truth", "prediction"))
    doubts = {name: arrays[f"{k}/doubt {name}"] for name in about.get("doubts", ())}
    heat = arrays.get(f"{k}/heat")
    if heat is not None:
        image = _heated(image, heat)
    n_panels = max(1, len(about.get("panels", ())))
    step = -(-max(image.shape[0], image.shape[1] // n_panels) // LONGEST_SIDE)
    reduced = _reduced(image, step)
    truth, prediction = (mask[step // 2 :: step, step // 2 :: step] for mask in (truth, prediction))
    y_mm, x_mm = about["pixel_mm"]
    width, height = reduced.width, round(reduced.height * y_mm / x_mm, 2)
    outlined = (truth > 0) | (prediction > 0)
    shown = about.get("shown", metric)
    return Picture(
        scanner=about["scanner"],
        which=about["which"],
        shown=shown,
        value=figure(about[shown]),
        caption=about.get("caption", ""),
        has_heat=heat is not None,
        has_outline=bool(outlined.any()),
        panels=tuple(about.get("panels", ())),
        source=_data_uri(reduced, image.ndim == 3 and heat is None),
        width=width,
        height=height,
        window=(0, 0, width, height) if heat is not None or n_panels > 1 else _window(outlined, width, height),
        truth=_outline(truth),
        prediction=_outline(prediction),
        stretch=y_mm / x_mm,
        doubts={
            name: _data_uri(_reduced(_heated(image, doubt / max(doubt.max(), LEAST_DOUBT)), step), image.ndim == 3)
            for name, doubt in doubts.items()
        },
    )


def _reduced(image: NDArray[Any], step: int) -> Image.Image:
    return Image.fromarray((255 * image.clip(0, 1)).round().astype(np.uint8)).reduce(step)


def _heated(image: NDArray[Any], heat: NDArray[Any]) -> NDArray[Any]:
    """An image in greys, ``(y, x, 3)``, with what is hot laid over it in colour."""
    greys = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
    share = HEAT_SHARE * heat[..., None]
    blended: NDArray[Any] = (1 - share) * greys + share * colormaps["inferno"](heat)[..., :3]
    return blended


def _data_uri(image: Image.Image, is_photograph: bool) -> str:
    """PNG for slices; JPEG for colour photographs, which are several times smaller that way."""
    buffer = io.BytesIO()
    kind = "jpeg" if is_photograph else "png"
    image.save(buffer, kind, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _window(outlined: NDArray[np.bool_], width: int, height: float) -> tuple[float, ...]:
    """The part of a picture around what is outlined, of the picture's own shape; all of it where nothing is."""
    where = np.argwhere(outlined)
    if not len(where):
        return 0, 0, width, height
    first, last = where.min(axis=0) / outlined.shape, (where.max(axis=0) + 1) / outlined.shape
    share = min(1.0, max(SMALLEST_WINDOW, MARGIN * (last - first).max()))
    y, x = np.clip((first + last - share) / 2, 0, 1 - share)
    return tuple(round(float(v), 2) for v in (x * width, y * height, share * width, share * height))


def _outline(label: NDArray[Any]) -> str:
    """The borders of all labels above zero as one SVG path, in half pixels, which a border always falls on."""
    padded = np.pad(label, 1)  # so that an outline closes at the edge of the image
    paths = []
    for value in np.unique(label[label > 0]):
        for line in contour_generator(z=(padded == value).astype(np.float32)).lines(0.5):
            points = np.rint(2 * np.asarray(line)).astype(int) - 1  # pixel centres lie at one; the padding added two
            start, steps = points[0], np.diff(points, axis=0)[:-1]
            paths.append(f"M{start[0]} {start[1]}l" + " ".join(f"{x} {y}" for x, y in steps) + "z")
    return "".join(paths).replace(" -", "-")
