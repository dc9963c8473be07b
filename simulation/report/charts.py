"""Drawings as SVG for inside a page, in the page's font and colours."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

N_COLOURS = 8
"""Sites beyond this many share one grey: more colours than this cannot be told apart."""

NAMES = ("ink", "muted", "line", "accent", "surface", "own", "central", *(f"site-{i}" for i in range(N_COLOURS)))
INKS = {f"#0000{i:02x}": f"var(--{name})" for i, name in enumerate(NAMES, start=1)}
"""Colours that matplotlib draws with, and the reader's colours that replace them in the SVG."""

INK, MUTED, LINE, ACCENT, SURFACE, OWN, CENTRAL, *SITES = INKS

WIDTH = 4.2
"""Width of every drawing in inches: small, so that its letters stay legible on a phone."""

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.5,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), LINE),
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), MUTED),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "lines.solid_capstyle": "round",
    "lines.markeredgewidth": 0.9,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Line:
    """One curve over the rounds, or over places on an axis."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    is_bold: bool = False
    intervals: Sequence[tuple[float, float]] = ()
    """Around each point, where there are any; drawn by :func:`levels`."""


Mark = tuple[float, str, str, float]
"""Value, matplotlib's letter for the shape, colour, size."""


@dataclass(frozen=True)
class Row:
    """Marks on a bar, with a name at the left."""

    name: str
    marks: Sequence[Mark]
    bar: tuple[float, float]


def site_colour(index: int) -> str:
    """The colour of a site, the same in every drawing and table."""
    return SITES[index] if index < N_COLOURS else MUTED


def curves(description: str, lines: Sequence[Line], *, ring: tuple[int, float] | None = None) -> Markup | None:
    """Curves over the rounds, each with its name at its end, and a ring at one point; None without any point."""
    lines = [line for line in lines if line.points]

    def draw(axes: Any) -> None:
        for line in lines:
            width, order = (2.4, 4) if line.is_bold else (1.1, 3)
            x, y = zip(*line.points, strict=True)
            dot = "o" if len(x) == 1 else None
            axes.plot(x, y, marker=dot, color=line.colour, linewidth=width, zorder=order)
        if ring:
            axes.plot(*ring, "o", markersize=7, color=SURFACE, markeredgecolor=INK, markeredgewidth=1.8, zorder=6)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        axes.margins(x=0.03, y=0.06)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("round", labelpad=1)
        _name_ends(axes, lines if len(lines) <= N_COLOURS + 1 else [line for line in lines if line.is_bold])

    return _svg(description, 2.9, draw) if lines else None


def levels(
    description: str,
    lines: Sequence[Line],
    places: Sequence[str],
    axis: str,
    limits: tuple[float, float] | None = None,
) -> Markup:
    """Lines over named places, with the interval of each point as a stroke; their names stand at the end. ``limits`` are
    those of the vertical axis, where it has any.

    A line's points say which place they are at, counted from 0; lines are drawn a little beside each other.
    """

    def draw(axes: Any) -> None:
        for k, line in enumerate(lines):
            aside = 0.05 * (k - (len(lines) - 1) / 2)
            x, y = [i + aside for i, _ in line.points], [value for _, value in line.points]
            axes.plot(x, y, "o-", color=line.colour, linewidth=1.8, markersize=5.5, markeredgecolor=SURFACE, zorder=4)
            for at, ends in zip(x, line.intervals, strict=False):
                axes.plot([at, at], ends, color=line.colour, linewidth=1.2, zorder=3)
        axes.set_xticks(range(len(places)), places)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        axes.margins(x=0.06, y=0.06)
        if limits is not None:
            margin = 0.04 * (limits[1] - limits[0])
            axes.set_ylim(limits[0] - margin, limits[1] + margin)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel(axis, labelpad=1)
        _name_ends(axes, lines)

    return _svg(description, 3.1, draw)


def plane(
    description: str,
    lines: Sequence[Line],
    dots: Sequence[Line],
    axes_names: tuple[str, str],
    *,
    dashed: Sequence[tuple[float, float]] = (),
) -> Markup:
    """Lines, groups of dots (crosses where a group is bold) and a dashed line over two numbers."""

    def draw(axes: Any) -> None:
        if dashed:
            axes.plot(*zip(*dashed, strict=True), color=MUTED, linewidth=1.1, linestyle=(0, (3, 3)), zorder=2)
        for line in lines:
            width = 2.4 if line.is_bold else 1.3
            axes.plot(*zip(*line.points, strict=True), "o-", color=line.colour, linewidth=width, markersize=4, zorder=4)
        for group in dots:
            shape = "X" if group.is_bold else "o"
            edge = {"markersize": 6.5, "markeredgecolor": SURFACE}
            axes.plot(*zip(*group.points, strict=True), shape, color=group.colour, zorder=5, **edge)
        for locator in (axes.xaxis, axes.yaxis):
            locator.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        axes.margins(x=0.05, y=0.05)
        axes.set_xlabel(axes_names[0], labelpad=1)
        axes.set_ylabel(axes_names[1], labelpad=2)
        if len(lines) > 1:
            _name_ends(axes, lines)

    return _svg(description, 3.1, draw)


def rows(description: str, shown: Sequence[Row]) -> Markup:
    """Marks on one row for each name; a last row called mean stands apart."""
    n_lines = sum(1 + row.name.count("\n") for row in shown)

    def draw(axes: Any) -> None:
        for i, row in enumerate(shown):
            axes.plot(row.bar, [i, i], color=LINE, linewidth=3.5, zorder=2)
            for value, shape, colour, size in row.marks:
                edge = colour if shape == "|" else SURFACE
                axes.plot(value, i, shape, color=colour, markersize=size, markeredgecolor=edge, zorder=3)
        axes.set_yticks(range(len(shown)), ["\n".join(map(_short, row.name.split("\n"))) for row in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        axes.margins(x=0.06)
        axes.grid(visible=False, axis="y")
        if shown[-1].name == "mean":
            axes.get_yticklabels()[-1].set_fontweight("bold")
            axes.axhline(len(shown) - 1.5, color=LINE, linewidth=1)

    return _svg(description, 0.5 + 0.16 * len(shown) + 0.18 * n_lines, draw)


def _svg(description: str, height: float, draw: Callable[[Any], None]) -> Markup:
    """What ``draw`` draws; ``description`` is its text for screen readers and keeps its identifiers apart from others'."""
    buffer = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": description}), warnings.catch_warnings():
        # Letters outside matplotlib's own font: the reader's browser has them, as text stays text in the SVG.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.subplots())
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])  # one page holds several drawings
    for drawn, shown in INKS.items():
        text = text.replace(drawn, shown)
    opening = Markup('<svg role="img" aria-label="{}" ').format(description)
    return opening + Markup(text.removeprefix("<svg "))  # noqa: S704  # matplotlib escapes the text that it draws


def _short(name: str) -> str:
    return name if len(name) <= 26 else name[:25] + "…"


def _name_ends(axes: Any, lines: Sequence[Line]) -> None:
    """Write each line's name beside its end, pushed apart where ends lie close."""
    low, high = axes.get_ylim()
    gap = 0.068 * (high - low)
    lines = sorted(lines, key=lambda line: line.points[-1][1])
    places: list[float] = []
    for line in lines:
        places.append(max(line.points[-1][1], places[-1] + gap if places else low))
    for i, line in enumerate(lines):
        y = min(places[i], high - gap / 2 - (len(lines) - 1 - i) * gap)
        weight = "bold" if line.is_bold else "normal"
        where = {"xycoords": ("axes fraction", "data"), "xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(_short(line.name), (1, y), color=line.colour, fontweight=weight, **where)
