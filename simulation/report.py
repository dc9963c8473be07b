"""One HTML page that tells what a run or an experiment found: open it offline, print it, send it.

The page is written from ``result.json`` and ``pictures.npz`` alone, so it can be written again at any time and says
nothing that is not in them. It loads nothing from anywhere: charts are inline SVG whose colours follow the reader's light
or dark scheme, pictures are embedded, and there is no script. What a result lacks is named on the page rather than left
out in silence. Running, measuring and choosing the pictured patients happen elsewhere.

The three layers below are ``result.json`` as typed objects, drawings, and what the templates show.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

import matplotlib as mpl
import numpy as np
from contourpy import contour_generator
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from shared_models.errors import FederadError

N_COLOURS = 8
"""Sites beyond this many share one grey: more colours than this cannot be told apart."""

LONGEST_SIDE = 512
"""Pictures are reduced to at most this many pixels a side, so that a page of photographs can still be sent."""

SMALLEST_WINDOW = 0.5
"""Share of a picture's sides that is always shown, so that one still sees where one is."""

MARGIN = 2.2
"""Sides of the shown part over those of what is outlined, where that is more."""

METRIC_NAMES = {
    "dice": "Dice",
    "hd95_mm": "HD95 (mm)",
    "training_loss": "Training loss",
}
"""How a metric is called in a heading; any other name is shown with its underscores as spaces."""

METRIC_MEANINGS = {
    "dice": "Dice is the overlap of outline and reference: 0 none, 1 perfect",
    "hd95_mm": "HD95 is the distance from the reference that 95 % of the outline keep within",
}
"""What a metric says, for a reader who meets it here for the first time."""

LOWER_IS_BETTER = re.compile(r"(_mm|_s|loss|error|nmse|ece|nll)$")

NOTHING = "–"
"""Stands where there is no number."""


# --- result.json as typed objects -------------------------------------------------------------------------------------


def _only_numbers(value: object) -> object:
    """Of a mapping, the entries that are a number or null: a metric table may carry notes beside its metrics."""
    if not isinstance(value, Mapping):
        return value
    return {k: v for k, v in value.items() if v is None or (isinstance(v, int | float) and not isinstance(v, bool))}


Metrics = Annotated[dict[str, float | None], BeforeValidator(_only_numbers)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Refusal(_Part):
    site: str
    reason: str = ""


class _Round(_Part):
    round: int
    seconds: float | None = None
    replied: tuple[str, ...] = ()
    refused: tuple[_Refusal, ...] = ()
    missing: tuple[str, ...] = ()
    training_loss: float | None = None
    validation: Metrics | None = None
    per_site: dict[str, Metrics] = Field(default_factory=dict)


class _Test(_Part):
    metrics: Metrics
    per_site: dict[str, Metrics] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _metrics_beside_sites(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {"metrics": value, "per_site": value.get("per_site") or {}}


class _Method(_Part):
    method: str
    per_site: Metrics = Field(default_factory=dict)
    mean: float | None = None


class _Comparison(_Part):
    metric: str = "dice"
    rows: tuple[_Method, ...] = ()
    local_own: float | None = None
    local_elsewhere: float | None = None
    seconds: float | None = None

    def of(self, method: str) -> _Method:
        """The row of one method, empty if it was not run."""
        return next((row for row in self.rows if row.method == method), _Method(method=method))

    @property
    def local(self) -> dict[str, _Method]:
        """Each hospital's own model, by the hospital that trained it."""
        return {row.method.removeprefix("local:"): row for row in self.rows if row.method.startswith("local:")}

    def elsewhere(self, site: str) -> float | None:
        """What the other hospitals' own models reach on the patients of ``site``, on average."""
        return _mean(row.per_site.get(site) for owner, row in self.local.items() if owner != site)


class _Patients(_Part):
    train: int | None = None
    validation: int | None = None
    test: int | None = None

    @property
    def total(self) -> int:
        return sum(n or 0 for n in (self.train, self.validation, self.test))


class _Site(_Part):
    name: str
    scanner: str = "unknown"
    patients: _Patients = Field(default_factory=_Patients)
    skipped: dict[str, int] = Field(default_factory=dict)


class _Budget(_Part):
    unit: str = "patient"
    epsilon: float
    delta: float


class _RunResult(_Part):
    plan: Any = None
    plan_name: str | None = None
    plan_sha256: str | None = None
    task: str | None = None
    status: str = "unfinished"
    message: str | None = None
    started: str | None = None
    seconds: float | None = None
    headline: str | None = None
    metrics: dict[str, bool] = Field(default_factory=dict)
    """Name of each metric, and whether larger is better."""

    sites: tuple[_Site, ...] = ()
    rounds: tuple[_Round, ...] = ()
    best_round: int | None = None
    released: str | None = None
    test: _Test | None = None
    comparison: _Comparison | None = None
    privacy: dict[str, _Budget] | None = None
    engine: str | None = None
    workers: int | None = None
    seed: int | None = None
    weights_sha256: str | None = None
    released_sha256: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    command: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _finished_unless_it_says_otherwise(cls, value: Any) -> Any:
        """A result with test figures but no status is one of a finished run."""
        is_plain = isinstance(value, Mapping) and "status" not in value
        return {**value, "status": "finished"} if is_plain and value.get("test") else value

    @property
    def name(self) -> str:
        named = self.plan if isinstance(self.plan, str) else (self.plan or {}).get("name")
        return self.plan_name or named or "a plan without a name"

    @property
    def planned_rounds(self) -> int | None:
        rounds = self.plan.get("rounds") if isinstance(self.plan, dict) else None
        return rounds if isinstance(rounds, int) else None

    @property
    def metric(self) -> str:
        """The metric that chooses the best model: as declared, else the first that was measured."""
        measured = [r.validation for r in self.rounds if r.validation] + ([self.test.metrics] if self.test else [])
        return self.headline or next((name for metrics in measured for name in metrics), "dice")

    @property
    def site_names(self) -> list[str]:
        """Every site that is spoken of anywhere, in the order of ``sites``."""
        spoken_of = [site.name for site in self.sites]
        for one in self.rounds:
            spoken_of += [*one.replied, *one.missing, *(refusal.site for refusal in one.refused), *one.per_site]
        return list(dict.fromkeys(spoken_of + (list(self.test.per_site) if self.test else [])))

    @model_validator(mode="after")
    def _plan_is_name_or_tables(self) -> _RunResult:
        if self.plan is not None and not isinstance(self.plan, str | dict):
            raise ValueError("plan is neither a name nor tables")
        return self


class _Measured(_Part):
    method: str
    metric: str
    split: str = "all"
    mean: float | None = None
    sd: float | None = None
    values: tuple[float | None, ...] = ()


class _Claim(_Part):
    claim: str
    value: Any = None
    expected: Any = None
    holds: bool | None = None
    id: str | None = None
    values: tuple[float | None, ...] = ()


class _ExperimentResult(_Part):
    experiment: str
    title: str | None = None
    plan_sha256: str | None = None
    quick: bool = False
    seeds: tuple[int, ...] = ()
    rows: tuple[_Measured, ...] = ()
    claims: tuple[_Claim, ...] = ()
    command: str | None = None
    seconds: float | None = None


Result = TypeVar("Result", bound=BaseModel)


def _read(kind: type[Result], folder: Path) -> Result:
    path = folder / "result.json"
    try:
        return kind.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise _unusable(f"There is no result.json in {folder}.") from None
    except OSError as error:
        raise _unusable(f"{path} cannot be read ({type(error).__name__}).") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise _unusable(f"{path} is not a result: {where}: {first['msg'][0].lower()}{first['msg'][1:]}.") from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise _unusable(f"{path} is not JSON ({type(error).__name__}).") from None


def _unusable(happened: str) -> FederadError:
    return FederadError(
        "R231",
        happened=happened,
        because="The report is written from result.json alone, so that it can say nothing else.",
        remedies=(
            "give the folder that was named with --out",
            "or run the plan again: federad-sim run PLAN.toml --out DIR",
        ),
    )


# --- words and numbers ------------------------------------------------------------------------------------------------


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _mean(values: Iterable[float | None]) -> float | None:
    numbers = [v for v in values if v is not None and math.isfinite(v)]
    return sum(numbers) / len(numbers) if numbers else None


def _difference(value: float | None, other: float | None) -> float | None:
    return value - other if value is not None and other is not None else None


def _decimals(values: Iterable[float | None]) -> int:
    """Enough decimals for three digits of the largest value."""
    largest = max((abs(v) for v in values if v is not None and math.isfinite(v)), default=0.0)
    return 3 if largest <= 1 else 2 if largest < 10 else 1 if largest < 100 else 0


def _number(value: float | None, decimals: int = 3, *, sign: bool = False) -> str:
    """A number as it is printed, with a true minus; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:+.{decimals}f}".replace("-", "−") if sign else f"{value:.{decimals}f}".replace("-", "−")


def _metric_name(metric: str) -> str:
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def _meanings(metrics: Iterable[str]) -> str:
    known = [METRIC_MEANINGS[metric] for metric in metrics if metric in METRIC_MEANINGS]
    return "; ".join(known) + "." if known else ""


def _is_larger_better(metric: str, known: Mapping[str, bool]) -> bool:
    """As the task says; by its name for a metric that the task does not know."""
    return known.get(metric, not LOWER_IS_BETTER.search(metric))


def _direction(metric: str, known: Mapping[str, bool] = MappingProxyType({})) -> str:
    return "higher is better" if _is_larger_better(metric, known) else "lower is better"


def _duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _moment(started: str | None) -> str:
    if started is None:
        return NOTHING
    try:
        return f"{datetime.fromisoformat(started):%d %B %Y, %H:%M %Z}".strip()
    except ValueError:
        return started


def _count(n: int, word: str, plural: str | None = None) -> str:
    return f"{n:,} {word if n == 1 else plural or word + 's'}".replace(",", "\u2009")


def _joined(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _short(name: str, length: int = 20) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


# --- drawings ---------------------------------------------------------------------------------------------------------

INKS = {
    **{f"#0000{i + 1:02x}": f"var(--site-{i})" for i in range(N_COLOURS)},
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--accent)",
    "#050505": "var(--surface)",
    "#060606": "var(--own)",
    "#070707": "var(--central)",
}
"""Colours that matplotlib draws with, and the reader's colours that replace them in the SVG."""

INK, MUTED, LINE, ACCENT, SURFACE, OWN, CENTRAL = tuple(INKS)[N_COLOURS:]

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
}


def _colour(index: int) -> str:
    return tuple(INKS)[index] if index < N_COLOURS else MUTED


WIDTH = 4.2
"""Width of every drawing in inches: small, so that its letters stay legible on a phone."""


@contextmanager
def _drawing(name: str) -> Iterator[None]:
    """Matplotlib as the page wants it; ``name`` keeps the identifiers of one drawing apart from another's."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # Letters outside matplotlib's own font: the reader's browser has them, as text stays text in the SVG.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
        yield


def _svg(figure: Figure, description: str) -> Markup:
    """The figure as SVG for inside a page, in the page's font and colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # one page holds several drawings
    text = re.sub(r"(font: [^\"';]*?px) [^;\"]*", r"\1 var(--font)", text)
    for drawn, shown in INKS.items():
        text = text.replace(drawn, shown)
    size = re.compile(r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>').match(text)
    assert size is not None  # noqa: S101  # matplotlib writes it
    opening = Markup('<svg viewBox="{}" role="img" aria-label="{}">').format(size[1], description)
    return opening + Markup(text[size.end() :])  # noqa: S704  # matplotlib escapes the text that it draws


@dataclass(frozen=True)
class _Line:
    """One curve over the rounds; None where a round has no value."""

    name: str
    points: Sequence[tuple[int, float | None]]
    colour: str
    is_bold: bool = False

    @property
    def known(self) -> list[tuple[int, float]]:
        return [(x, y) for x, y in self.points if y is not None and math.isfinite(y)]


def _curves(lines: Sequence[_Line], *, name: str, best_round: int | None = None) -> Markup | None:
    """Curves over the rounds, each with its name at its end; None if there is nothing to draw."""
    lines = [line for line in lines if line.known]
    if not lines:
        return None
    labelled = lines if len(lines) <= N_COLOURS + 1 else [line for line in lines if line.is_bold]
    right = WIDTH - (0.2 + 0.07 * max(len(_short(line.name)) for line in labelled))
    with _drawing(name):
        figure = Figure(figsize=(WIDTH, 2.9))
        axes = figure.add_axes((0.095, 0.135, right / WIDTH - 0.095, 0.81))
        for line in lines:
            x, y = zip(*line.known, strict=True)
            axes.plot(
                x,
                y,
                color=line.colour,
                linewidth=2.4 if line.is_bold else 1.1,
                alpha=1.0 if line.is_bold else 0.85,
                solid_capstyle="round",
                marker="o" if len(line.known) == 1 else None,
                zorder=4 if line.is_bold else 3,
            )
        last = max(x for line in lines for x, _ in line.known)
        first = min(x for line in lines for x, _ in line.known)
        axes.set_xlim(first - 0.02 * (last - first + 1), last + 0.02 * (last - first + 1))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        axes.margins(y=0.06)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("round", labelpad=1)
        _mark_round(axes, lines, best_round)
        _name_ends(axes, labelled)
        return _svg(figure, f"{name} over the rounds")


def _mark_round(axes: Any, lines: Sequence[_Line], best_round: int | None) -> None:
    bold = next((dict(line.known) for line in lines if line.is_bold), {})
    if best_round in bold:
        axes.plot(
            best_round,
            bold[best_round],
            "o",
            markersize=7,
            color=SURFACE,
            markeredgecolor=INK,
            markeredgewidth=1.8,
            zorder=6,
        )


def _name_ends(axes: Any, lines: Sequence[_Line]) -> None:
    """Write each line's name beside its end, pushed apart where ends lie close."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.068
    ends = sorted(lines, key=lambda line: line.known[-1][1])
    places: list[float] = []
    for line in ends:
        wanted = line.known[-1][1]
        places.append(max(wanted, places[-1] + gap) if places else wanted)
    excess = max(0.0, places[-1] - (high - gap / 2))
    for i in range(len(places) - 1, -1, -1):  # back down from the top, as far as each needs
        limit = high - gap / 2 if i == len(places) - 1 else places[i + 1] - gap
        places[i] = min(places[i], limit) if excess else places[i]
    for line, y in zip(ends, places, strict=True):
        axes.annotate(
            _short(line.name),
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=line.colour,
            fontweight="bold" if line.is_bold else "normal",
            annotation_clip=False,
        )


MARKS = (
    ("shared model", "o", ACCENT),
    ("own model", "s", OWN),
    ("other hospitals' models, mean", "X", MUTED),
    ("all data in one place", "D", CENTRAL),
)
"""What the side-by-side drawing shows for each site, its mark and its colour; the template's legend repeats it."""


def _side_by_side(rows: Sequence[tuple[str, Sequence[float | None]]]) -> Markup | None:
    """One row for each site, with a mark for each of :data:`MARKS`."""
    if not any(_is_number(v) for _, values in rows for v in values):
        return None
    left = 0.25 + 0.075 * max(len(_short(name)) for name, _ in rows)
    height = 0.34 * len(rows) + 0.5
    with _drawing("side-by-side"):
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.add_axes((left / WIDTH, 0.32 / height, 1 - (left + 0.12) / WIDTH, 1 - 0.4 / height))
        for i, (_, values) in enumerate(rows):
            known = [v for v in values if v is not None and math.isfinite(v)]
            if known:
                axes.plot([min(known), max(known)], [i, i], color=LINE, linewidth=3, solid_capstyle="round", zorder=2)
            for value, (_, mark, colour) in zip(values, MARKS, strict=True):
                if value is not None and math.isfinite(value):
                    size, order = (7.5, 5) if colour == ACCENT else (6.5, 4)
                    axes.plot(
                        value,
                        i,
                        mark,
                        color=colour,
                        markersize=size,
                        markeredgecolor=SURFACE,
                        markeredgewidth=0.8,
                        zorder=order,
                    )
        axes.set_yticks(range(len(rows)), [_short(name) for name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        axes.margins(x=0.06)
        axes.grid(visible=False, axis="y")
        if rows[-1][0] == "mean":
            axes.get_yticklabels()[-1].set_fontweight("bold")
            axes.axhline(len(rows) - 1.5, color=LINE, linewidth=1)
        return _svg(figure, "shared, own and central models for each site")


def _strips(rows: Sequence[_Measured], *, is_one_split: bool) -> Markup | None:
    """One row for each method: every seed a faint dot, the mean a bold mark, the standard deviation a bar."""
    if not any(_is_number(row.mean) for row in rows):
        return None
    names = [_short(row.method, 28) + ("" if is_one_split else "\n" + _short(row.split, 28)) for row in rows]
    left = 0.25 + 0.07 * max(len(line) for name in names for line in name.split("\n"))
    height = (0.32 if is_one_split else 0.45) * len(rows) + 0.5
    with _drawing("strips-" + "-".join((rows[0].metric, rows[0].split))):
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.add_axes((left / WIDTH, 0.32 / height, 1 - (left + 0.12) / WIDTH, 1 - 0.4 / height))
        for i, row in enumerate(rows):
            values = [v for v in row.values if v is not None and math.isfinite(v)]
            if row.mean is not None and math.isfinite(row.mean):
                sd = row.sd if row.sd is not None and math.isfinite(row.sd) else 0.0
                axes.plot(
                    [row.mean - sd, row.mean + sd], [i, i], color=LINE, linewidth=4, solid_capstyle="round", zorder=2
                )
                axes.plot(
                    row.mean, i, "o", markersize=7, color=ACCENT, markeredgecolor=SURFACE, markeredgewidth=1, zorder=4
                )
            axes.plot(values, [i] * len(values), "|", markersize=9, color=ACCENT, markeredgewidth=1.1, zorder=3)
        axes.set_yticks(range(len(rows)), names)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        axes.margins(x=0.08)
        axes.grid(visible=False, axis="y")
        return _svg(figure, f"{_metric_name(rows[0].metric)} of each method")


@dataclass(frozen=True)
class _Picture:
    """One slice or photograph with two outlines, ready for an SVG element; coordinates are image columns."""

    site: str
    scanner: str
    which: str
    value: str
    png: str
    width: int
    height: float
    window: tuple[float, float, float, float]
    """The part that is shown, as left, top, width and height."""
    truth: str
    prediction: str


def _picture(arrays: Mapping[str, NDArray[Any]], key: str, about: Mapping[str, Any], metric: str) -> _Picture:
    image, truth, prediction = (arrays[f"{key}/{part}"] for part in ("image", "truth", "prediction"))
    step = -(-max(image.shape[:2]) // LONGEST_SIDE)
    image = _reduced(image, step)
    truth, prediction = (mask[step // 2 :: step, step // 2 :: step] for mask in (truth, prediction))
    y_mm, x_mm = about.get("pixel_mm") or (1.0, 1.0)
    stretch = float(y_mm) / float(x_mm)
    value = about.get(metric)
    width, height = image.shape[1], round(image.shape[0] * stretch, 2)
    return _Picture(
        site=str(about.get("site", "")),
        scanner=str(about.get("scanner", "")),
        which=str(about.get("which", "")),
        value=_number(value if isinstance(value, int | float) else None),
        png=_png(image),
        width=width,
        height=height,
        window=_window((truth > 0) | (prediction > 0), width, height),
        truth=_outline(truth, stretch),
        prediction=_outline(prediction, stretch),
    )


def _reduced(image: NDArray[Any], step: int) -> NDArray[np.float64]:
    """Means over blocks of ``step`` by ``step`` pixels."""
    ny, nx = (n // step for n in image.shape[:2])
    blocks = image[: ny * step, : nx * step].astype(np.float64).reshape(ny, step, nx, step, *image.shape[2:])
    return np.asarray(np.nan_to_num(blocks).mean(axis=(1, 3)), dtype=np.float64)


def _png(image: NDArray[np.float64]) -> str:
    """The image between its 0.5th and 99.5th percentile as PNG, base64."""
    low, high = np.percentile(image, (0.5, 99.5))
    grey = np.clip((image - low) / max(high - low, 1e-12), 0, 1)
    buffer = io.BytesIO()
    Image.fromarray((grey * 255).round().astype(np.uint8)).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _window(outlined: NDArray[np.bool_], width: int, height: float) -> tuple[float, float, float, float]:
    """The part of a picture around what is outlined, of the picture's own shape; all of it where nothing is."""
    if not outlined.any():
        return 0.0, 0.0, float(width), height
    (top, bottom), (left, right) = (_extent(np.asarray(outlined.any(axis=axis))) for axis in (1, 0))
    share = min(1.0, max(SMALLEST_WINDOW, MARGIN * (right - left), MARGIN * (bottom - top)))
    x, y = (min(max(middle - share / 2, 0.0), 1.0 - share) for middle in ((left + right) / 2, (top + bottom) / 2))
    return round(x * width, 2), round(y * height, 2), round(share * width, 2), round(share * height, 2)


def _extent(occupied: NDArray[np.bool_]) -> tuple[float, float]:
    """Where the occupied part of an axis begins and ends, as shares of its length."""
    where = np.flatnonzero(occupied)
    return where[0] / len(occupied), (where[-1] + 1) / len(occupied)


def _outline(label: NDArray[Any], stretch: float) -> str:
    """The borders of all labels above zero as one SVG path."""
    padded = np.pad(label, 1)  # so that an outline closes at the edge of the image
    paths = []
    for value in np.unique(label[label > 0]):
        for line in contour_generator(z=(padded == value).astype(np.float32)).lines(0.5):
            points = np.asarray(line) - 0.5  # pixel centres lie at one half; the padding moved them by one
            paths.append("M" + "L".join(f"{x:.1f} {y * stretch:.1f}" for x, y in points) + "Z")
    return "".join(paths)


def _about(meta: NDArray[Any]) -> list[Mapping[str, Any]]:
    """What is known of each picture: one JSON object in each string, or one JSON list of them."""
    parts = [json.loads(str(text)) for text in meta.flat]
    return [one for part in parts for one in (part if isinstance(part, list) else [part])]


def _pictures(folder: Path, metric: str) -> tuple[list[_Picture], str | None]:
    """The pictures of a run and, where there are none, why."""
    path = folder / "pictures.npz"
    if not path.exists():
        return [], "This result has no pictures.npz, so there is nothing to look at here."
    try:
        with np.load(path, allow_pickle=False) as arrays:
            pictures = [_picture(arrays, str(k), one, metric) for k, one in enumerate(_about(arrays["meta"]))]
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, zipfile.BadZipFile):
        return [], "pictures.npz cannot be read, so the pictures are left out."
    return pictures, None if pictures else "pictures.npz holds no pictures."


# --- what the templates show ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tile:
    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class _Cell:
    """One figure of a table, with a bar from ``start`` to ``start + width`` per cent of the cell if it has one."""

    label: str
    text: str
    start: float = 0.0
    width: float | None = None
    tone: str = "plain"


@dataclass(frozen=True)
class _SiteRow:
    name: str
    colour: int | None
    scanner: str
    patients: str
    cells: Sequence[_Cell]


@dataclass(frozen=True)
class _HeatCell:
    text: str
    strength: int
    is_home: bool


@dataclass(frozen=True)
class _Fact:
    name: str
    value: str
    is_code: bool = False


def _sentence(result: _RunResult) -> str:
    """The whole run in one sentence of plain words."""
    hospitals = _count(len(result.site_names), "hospital")
    rounds = _count(len(result.rounds), "round")
    if not result.rounds:
        parts = [f"{hospitals} took part, and no round was completed"]
    elif result.status == "finished":
        parts = [f"{hospitals} trained {'together ' if len(result.site_names) > 1 else ''}for {rounds}"]
    else:
        of = f" of {result.planned_rounds}" if result.planned_rounds else ""
        verb = "paused" if result.status == "paused" else "ended early"
        parts = [f"{hospitals} trained together; the run {verb} after {len(result.rounds)}{of} rounds"]
    comparison = result.comparison
    is_compared = comparison is not None and comparison.metric == result.metric
    tested = result.test.metrics.get(result.metric) if result.test else None
    reached = _shared(result, comparison) if comparison and is_compared else tested
    if _is_number(reached):
        parts.append(f"the shared model reaches a test {_in_sentence(result.metric)} of {_number(reached, 2)}")
    elif result.rounds:
        parts.append("the shared model was not measured on test patients")
    if comparison and _is_number(comparison.local_own) and _is_number(comparison.local_elsewhere):
        parts.append(
            f"the hospitals' own models reach {_number(comparison.local_own, 2)} at home "
            f"and {_number(comparison.local_elsewhere, 2)} elsewhere"
        )
    return "; ".join(parts) + "."


def _in_sentence(metric: str) -> str:
    name = _metric_name(metric)
    return name if metric in METRIC_NAMES else name.lower()


def _tiles(result: _RunResult) -> list[_Tile]:
    metric, comparison = result.metric, result.comparison
    tiles = []
    if result.test:
        for name, value in result.test.metrics.items():
            if _is_number(value):
                tiles.append(
                    _Tile(
                        _number(value, _decimals([value])),
                        f"test {_metric_name(name)}",
                        _direction(name, result.metrics),
                    )
                )
    else:
        best = _best_validation(result)
        if _is_number(best):
            tiles.append(
                _Tile(_number(best), f"best validation {_metric_name(metric)}", "not measured on test patients")
            )
    if comparison:
        shared = _shared(result, comparison)
        home, away = (_difference(shared, v) for v in (comparison.local_own, comparison.local_elsewhere))
        central = comparison.of("central").mean
        if _is_number(home):
            tiles.append(_Tile(_number(home, sign=True), "against own models at home", _metric_name(comparison.metric)))
        if _is_number(away):
            tiles.append(
                _Tile(_number(away, sign=True), "against own models elsewhere", _metric_name(comparison.metric))
            )
        if _is_number(_difference(shared, central)):
            gap = _difference(shared, central)
            tiles.append(
                _Tile(_number(gap, sign=True), "against all data in one place", _metric_name(comparison.metric))
            )
    patients = sum(site.patients.total for site in result.sites)
    tiles.append(_Tile(str(len(result.site_names)), "hospitals", _count(patients, "patient") if patients else ""))
    tiles.append(_Tile(str(len(result.rounds)), "rounds", _duration(result.seconds) if result.seconds else ""))
    return tiles


def _best_validation(result: _RunResult) -> float | None:
    values = [r.validation.get(result.metric) for r in result.rounds if r.validation]
    known = [v for v in values if v is not None and math.isfinite(v)]
    choose = max if _is_larger_better(result.metric, result.metrics) else min
    return choose(known) if known else None


def _shared(result: _RunResult, comparison: _Comparison) -> float | None:
    """The shared model's figure on the comparison's own scale."""
    if comparison.of("federated").mean is not None:
        return comparison.of("federated").mean
    return result.test.metrics.get(comparison.metric) if result.test else None


def _shared_at(result: _RunResult, comparison: _Comparison, site: str) -> float | None:
    """The shared model's figure on one site's patients."""
    tested = result.test.per_site.get(site, {}).get(comparison.metric) if result.test else None
    return tested if tested is not None else comparison.of("federated").per_site.get(site)


def _site_rows(result: _RunResult) -> list[_SiteRow]:
    """The table of sites: test metrics with bars, then how far the shared model is from the alternatives."""
    names, about = result.site_names, {site.name: site for site in result.sites}
    columns = [*_test_columns(result), *_comparison_columns(result)]
    rows = []
    for i, name in enumerate(names):
        site = about.get(name, _Site(name=name))
        rows.append(
            _SiteRow(
                name=name,
                colour=min(i, N_COLOURS),
                scanner=site.scanner,
                patients=_split_sizes(site.patients),
                cells=[column[name] for column in columns],
            )
        )
    if len(names) > 1 and columns:
        total = _Patients(
            **{s: sum(getattr(x.patients, s) or 0 for x in result.sites) for s in ("train", "validation", "test")}
        )
        cells = [column[""] for column in columns]
        rows.append(_SiteRow(name="All sites", colour=None, scanner="", patients=_split_sizes(total), cells=cells))
    return rows


def _split_sizes(patients: _Patients) -> str:
    sizes = (patients.train, patients.validation, patients.test)
    return " / ".join(NOTHING if n is None else str(n) for n in sizes)


def _test_columns(result: _RunResult) -> Iterator[dict[str, _Cell]]:
    """For each test metric, the cell of each site; the empty name stands for all sites."""
    if not result.test:
        return
    names = dict.fromkeys([*result.test.metrics, *(m for site in result.test.per_site.values() for m in site)])
    for metric in names:
        if metric == "patients":
            continue
        values = {site: result.test.per_site.get(site, {}).get(metric) for site in result.site_names}
        yield _column(f"Test {_metric_name(metric)}", values, result.test.metrics.get(metric))


def _comparison_columns(result: _RunResult) -> Iterator[dict[str, _Cell]]:
    comparison = result.comparison
    if not comparison or not comparison.rows:
        return
    sites = result.site_names
    shared = {site: _shared_at(result, comparison, site) for site in sites}
    own = {site: comparison.local[site].per_site.get(site) if site in comparison.local else None for site in sites}
    central = comparison.of("central")
    pooled = {site: central.per_site.get(site) for site in sites}
    over_all = _shared(result, comparison)
    is_larger_better = _is_larger_better(comparison.metric, result.metrics)
    for heading, values, mean in (("Own model", own, comparison.local_own), ("Central model", pooled, central.mean)):
        if any(_is_number(v) for v in values.values()):
            yield _column(heading, values, mean)
    for heading, values, mean in (
        ("Gain over own", own, comparison.local_own),
        ("Gap to central", pooled, central.mean),
    ):
        if any(_is_number(v) for v in values.values()):
            gains = {site: _difference(shared[site], values[site]) for site in sites}
            yield _gain_column(heading, gains, _difference(over_all, mean), is_larger_better)


def _column(label: str, values: Mapping[str, float | None], mean: float | None) -> dict[str, _Cell]:
    """Figures with bars from zero; the longest bar is 1, or the largest value where that is more."""
    everything = {**values, "": mean}
    decimals = _decimals(everything.values())
    full = max([1.0, *(v for v in everything.values() if v is not None and math.isfinite(v))])
    return {
        site: _Cell(label, _number(v, decimals), width=_percent(v, full) if v is not None else None)
        for site, v in everything.items()
    }


def _gain_column(
    label: str, gains: Mapping[str, float | None], mean: float | None, is_larger_better: bool
) -> dict[str, _Cell]:
    """Differences with bars to either side of the middle, coloured by whether they are an improvement."""
    everything = {**gains, "": mean}
    full = max([1e-9, *(abs(v) for v in everything.values() if v is not None and math.isfinite(v))])
    better = 1 if is_larger_better else -1
    cells = {}
    for site, v in everything.items():
        width = _percent(abs(v), full) / 2 if v is not None else None
        tone = "plain" if v is None or v == 0 else "good" if v * better > 0 else "poor"
        start = 50.0 if v is None or v >= 0 else 50.0 - (width or 0.0)
        cells[site] = _Cell(label, _number(v, _decimals(everything.values()), sign=True), start, width, tone)
    return cells


def _percent(value: float, full: float) -> float:
    return round(100 * min(max(value / full, 0.0), 1.0), 1) if math.isfinite(value) else 0.0


def _comparison_rows(result: _RunResult) -> list[tuple[str, list[float | None]]]:
    """For each site and for their mean: shared, own, other hospitals' and central model."""
    comparison = result.comparison
    if not comparison:
        return []
    rows = []
    for site in result.site_names:
        own = comparison.local[site].per_site.get(site) if site in comparison.local else None
        central = comparison.of("central").per_site.get(site)
        rows.append((site, [_shared_at(result, comparison, site), own, comparison.elsewhere(site), central]))
    if len(rows) > 1:
        means = [_shared(result, comparison), comparison.local_own, comparison.local_elsewhere]
        rows.append(("mean", [*means, comparison.of("central").mean]))
    return rows


def _heat(result: _RunResult) -> list[tuple[str, list[_HeatCell]]]:
    """Rows of models, columns of sites: how far each hospital's own model carries."""
    comparison = result.comparison
    if not comparison or len(comparison.local) < 2:
        return []
    rows = [(f"model of {owner}", owner, row) for owner, row in comparison.local.items()]
    rows += [(shown, "", row) for shown, row in (("shared model", comparison.of("federated")),) if row.per_site]
    known = [v for _, _, row in rows for v in row.per_site.values() if v is not None and math.isfinite(v)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    decimals = min(2, _decimals(known))

    def cell(row: _Method, owner: str, site: str) -> _HeatCell:
        value = row.per_site.get(site)
        share = (value - low) / max(high - low, 1e-9) if value is not None and math.isfinite(value) else 0.0
        share = share if _is_larger_better(comparison.metric, result.metrics) else 1 - share
        return _HeatCell(_number(value, decimals), round(4 + 51 * share), is_home=owner == site)

    return [(shown, [cell(row, owner, site) for site in result.site_names]) for shown, owner, row in rows]


def _lines(result: _RunResult) -> list[_Line]:
    """The headline metric over the rounds: each site thin, all of them bold."""
    per_site = [
        _Line(name, [(r.round, r.per_site.get(name, {}).get(result.metric)) for r in result.rounds], _colour(i))
        for i, name in enumerate(result.site_names)
    ]
    overall = [(r.round, (r.validation or {}).get(result.metric)) for r in result.rounds]
    return [*per_site, _Line("all sites", overall, INK, is_bold=True)]


def _absences(result: _RunResult) -> str:
    """Who did not reply, in one sentence."""
    n_missing = sum(len(r.missing) for r in result.rounds)
    n_refused = sum(len(r.refused) for r in result.rounds)
    if not n_missing and not n_refused:
        return "Every hospital replied in every round, and every reply was accepted." if result.rounds else ""
    words = []
    if n_missing:
        sites = sorted({site for r in result.rounds for site in r.missing})
        words.append(f"{_count(n_missing, 'reply', 'replies')} did not arrive in time ({_joined(sites)})")
    if n_refused:
        sites = sorted({refusal.site for r in result.rounds for refusal in r.refused})
        words.append(f"{_count(n_refused, 'reply was', 'replies were')} refused ({_joined(sites)})")
    return "; ".join(words) + ". The other hospitals' rounds went on without them."


def _facts(result: _RunResult) -> list[_Fact]:
    """Where the figures come from."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    known: list[tuple[str, object, bool]] = [
        ("Command", result.command, True),
        ("Plan", result.name, False),
        ("SHA-256 of the plan", result.plan_sha256, True),
        ("SHA-256 of the last weights", result.weights_sha256, True),
        ("SHA-256 of the released weights", result.released_sha256, True),
        ("Released", _released(result), False),
        ("Engine", result.engine, False),
        ("Workers", result.workers, False),
        ("Seed", result.seed, False),
        ("Started", _moment(result.started) if result.started else None, False),
        ("Duration", _duration(result.seconds) if result.seconds is not None else None, False),
        ("Versions", versions or None, False),
    ]
    return [_Fact(name, NOTHING if value is None else str(value), is_code) for name, value, is_code in known]


def _released(result: _RunResult) -> str | None:
    if result.released == "best" and result.best_round is not None:
        return f"the best model by validation {_in_sentence(result.metric)}, from round {result.best_round}"
    return {"best": "the best model by validation", "last": "the model of the last round"}.get(result.released or "")


def _round_metrics(result: _RunResult) -> dict[str, int]:
    """The validation metrics of the table of rounds and how many decimals each needs."""
    measured = [r.validation for r in result.rounds if r.validation]
    names = dict.fromkeys(name for metrics in measured for name in metrics)
    return {name: _decimals(metrics.get(name) for metrics in measured) for name in names}


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("simulation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=_number, metric=_metric_name, direction=_direction, duration=_duration, joined=_joined, counted=_count
    )
    return environment


def _write(folder: Path, template: str, **shown: object) -> Path:
    path, partial = folder / "report.html", folder / "report.html.partial"
    page = _environment().get_template(template).render(**shown)
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise FederadError(
            "R231",
            happened=f"The report cannot be written to {folder} ({type(error).__name__}).",
            because="The page lies beside the result that it shows.",
            remedies=(
                "free space or change the permissions of the folder",
                "or copy the folder elsewhere and try again",
            ),
        ) from None
    return path


def write_report(folder: Path) -> Path:
    """Write ``report.html`` beside the ``result.json`` of a run.

    Parameters
    ----------
    folder
        Where the run wrote ``result.json`` and, if any pictures were kept, ``pictures.npz``.

    Returns
    -------
    Path
        The page. It refers to nothing outside itself.

    Raises
    ------
    FederadError
        R231 if ``result.json`` is missing or cannot be understood, or the page cannot be written.
    """
    result = _read(_RunResult, folder)
    pictures, no_pictures = _pictures(folder, result.metric)
    overall = _Line("", [(r.round, r.training_loss) for r in result.rounds], INK, is_bold=True)
    galleries: dict[str, list[_Picture]] = {}
    for picture in pictures:
        galleries.setdefault(picture.site, []).append(picture)
    return _write(
        folder,
        "report.html",
        result=result,
        sentence=_sentence(result),
        tiles=_tiles(result),
        validation=_curves(
            _lines(result), name=f"validation {_metric_name(result.metric)}", best_round=result.best_round
        ),
        loss=_curves([overall], name="training loss"),
        site_rows=_site_rows(result),
        side_by_side=_side_by_side(_comparison_rows(result)),
        heat=_heat(result),
        absences=_absences(result),
        round_metrics=_round_metrics(result),
        meanings=_meanings(result.test.metrics if result.test else [result.metric]),
        skipped=[site for site in result.sites if site.skipped],
        n_updates=sum(len(r.replied) for r in result.rounds),
        galleries=galleries,
        no_pictures=no_pictures,
        facts=_facts(result),
    )


def write_experiment_report(folder: Path) -> Path:
    """Write ``report.html`` beside the ``result.json`` of an experiment.

    Every claim stands with its expectation and whether it held; every seed's value is drawn, not only the mean.

    Raises
    ------
    FederadError
        R231 as for :func:`write_report`.
    """
    result = _read(_ExperimentResult, folder)
    return _write(
        folder,
        "experiment.html",
        result=result,
        groups=_groups(result.rows),
        n_held=sum(claim.holds is True for claim in result.claims),
        shown=_claim_value,
    )


@dataclass(frozen=True)
class _Group:
    heading: str
    metric: str
    rows: Sequence[_Measured]
    chart: Markup | None
    decimals: int
    is_one_split: bool


def _groups(rows: Sequence[_Measured]) -> list[_Group]:
    """Measurements to be compared with one another: of one metric on one split, or of one metric where splits differ."""
    by_split: dict[tuple[str, str], list[_Measured]] = {}
    by_metric: dict[str, list[_Measured]] = {}
    for row in rows:
        by_split.setdefault((row.metric, row.split), []).append(row)
        by_metric.setdefault(row.metric, []).append(row)
    groups = []
    for metric, all_rows in by_metric.items():
        splits = {split: same for (name, split), same in by_split.items() if name == metric}
        if all(len(same) > 1 for same in splits.values()):
            groups += [
                _group(f"{_metric_name(metric)}, {split}", same, is_one_split=True) for split, same in splits.items()
            ]
        else:
            groups.append(_group(_metric_name(metric), all_rows, is_one_split=len(splits) == 1))
    return groups


def _group(heading: str, rows: Sequence[_Measured], *, is_one_split: bool) -> _Group:
    chart = _strips(rows, is_one_split=is_one_split)
    return _Group(heading, rows[0].metric, rows, chart, _decimals(row.mean for row in rows), is_one_split)


def _claim_value(value: object) -> str:
    """What a claim measured or expected: a number to three digits, anything else as JSON writes it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: NOTHING}[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _number(value, _decimals([value]))
    return value if isinstance(value, str) else json.dumps(value)
