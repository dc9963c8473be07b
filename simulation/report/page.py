"""A result as an HTML page beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from shared_models.detection import RATES, found_at
from shared_models.errors import FederadError
from shared_models.tasks import confused
from simulation.intervals import t_interval
from simulation.report import words
from simulation.report.charts import (
    ACCENT,
    CENTRAL,
    INK,
    MUTED,
    OWN,
    Line,
    Row,
    curves,
    levels,
    plane,
    rows,
    site_colour,
)
from simulation.report.charts import INKS as COLOURS
from simulation.report.pictures import Picture, pictures
from simulation.report.results import Calibration, Comparison, Experiment, Measured, Method, Run, read

ALL = ""
"""Stands for all sites together where figures are kept by site."""


@dataclass(frozen=True)
class Cell:
    """One figure of a table over a bar from ``start`` to ``start + width`` per cent of the cell."""

    text: str
    start: float
    width: float
    tone: str
    note: str = ""
    """A second, smaller line."""


def write_report(folder: Path) -> Path:
    """Write ``report.html`` beside the ``result.json`` of a run.

    It refers to nothing outside itself; pictures come from ``pictures.npz`` beside it.

    Raises
    ------
    FederadError
        R231 if ``result.json`` is missing or cannot be understood, or the page cannot be written.
    """
    run = read(Run, folder)
    return _write(
        folder,
        "run.html",
        result=run,
        summary=words.summary(run),
        absences=words.absences(run),
        means=run.comparison.mean if run.comparison else None,
        validation=_validation(run),
        loss=_loss(run),
        colours=[COLOURS[site_colour(i)] for i in range(len(run.sites))],
        columns=dict(_columns(run)),
        side_by_side=_side_by_side(run, run.comparison) if run.comparison else None,
        confusion=_confusion(run),
        detection=_detection(run),
        volumes=_volumes(run),
        ways=WAYS,
        reliability=_reliability(run.uncertainty) if run.uncertainty else None,
        doubted=_doubted(run, run.uncertainty) if run.uncertainty else None,
        heat=_heat(run, run.comparison) if run.comparison else None,
        comparison_has_intervals=any(row.interval for row in run.comparison.rows) if run.comparison else False,
        by_round=_by_round(run),
        galleries=pictures(folder, run.headline) if run.status == "finished" else {},
    )


def write_experiment_report(folder: Path) -> Path:
    """Write ``report.html`` beside the ``result.json`` of an experiment.

    Every claim stands with its expectation and whether it held; every seed's value is drawn, not only the mean. Methods
    stand beside the first one measured on the same split, seed by seed. Pictures and links are those of the runs that lie
    in the same folder.

    Raises
    ------
    FederadError
        R231 as for :func:`write_report`.
    """
    result = read(Experiment, folder)
    groups: dict[str, list[Measured]] = {}
    for row in result.rows:
        groups.setdefault(row.metric, []).append(row)
    charts = {metric: _seeds(metric, measured) for metric, measured in groups.items()}
    drawings = {metric: _lines(metric, measured, result.axis) for metric, measured in groups.items()}
    examples = {arm: _medians(folder / f"seed-{result.seeds[0]}" / arm, result) for arm in result.plans}
    examples = {arm: views for arm, views in examples.items() if views}
    return _write(
        folder,
        "experiment.html",
        result=result,
        groups=groups,
        charts=charts,
        drawings=drawings,
        differences={metric: _differences(measured) for metric, measured in groups.items()},
        examples=examples,
        places=list(dict.fromkeys((site, view.scanner) for views in examples.values() for site, view in views.items())),
        runs=[name for name in _runs(result) if (folder / name / "report.html").is_file()],
    )


def _runs(result: Experiment) -> list[str]:
    """Where the runs of an experiment lie in its folder."""
    return [f"seed-{seed}/{arm}".rstrip("/") for seed in result.seeds for arm in result.plans]


def _medians(folder: Path, result: Experiment) -> dict[str, Picture]:
    """The middle one of each site's pictured patients."""
    metric = result.rows[0].metric if result.rows else ""
    return {site: views[len(views) // 2] for site, views in pictures(folder, metric).items()}


@dataclass(frozen=True)
class Difference:
    """What a method has more than the first on the same split: mean over seeds, and its 95 % t-interval."""

    mean: float
    interval: list[float] | None


def _differences(measured: list[Measured]) -> list[Difference | None]:
    first: dict[str, Measured] = {}
    found: list[Difference | None] = []
    for row in measured:
        base = first.setdefault(row.split, row)
        if base is row or len(base.values) != len(row.values):
            found.append(None)
            continue
        values = [a - b for a, b in zip(row.values, base.values, strict=True)]
        found.append(Difference(sum(values) / len(values), t_interval(values)))
    return found


def _write(folder: Path, template: str, **shown: object) -> Path:
    environment = Environment(loader=PackageLoader("simulation.report"), autoescape=True, undefined=StrictUndefined)
    filters = (words.figure, words.figures, words.metric_name, words.meanings, words.duration, words.counted)
    environment.filters |= {function.__name__: function for function in filters}
    page = environment.get_template(template).render(**shown)
    path, partial = folder / "report.html", folder / "report.html.partial"
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise FederadError(
            "R231",
            happened=f"The report cannot be written to {folder} ({type(error).__name__}).",
            because="The page lies beside the result that it shows.",
            remedies=("free space or change the folder's permissions", "or copy the folder elsewhere and try again"),
        ) from None
    return path


def _validation(run: Run) -> Markup | None:
    """The headline metric over the rounds: each site thin, all of them bold."""
    overall = run.validation
    lines = []
    for i, site in enumerate(run.names):
        points = [
            (r.round, r.per_site[site][run.headline]) for r in run.rounds if run.headline in r.per_site.get(site, {})
        ]
        lines.append(Line(site, points, site_colour(i)))
    ring = next((point for point in overall if point[0] == run.best_round), None)
    description = f"validation {words.metric_name(run.headline)} over the rounds"
    return curves(description, [*lines, Line("all sites", overall, INK, is_bold=True)], ring=ring)


def _loss(run: Run) -> Markup | None:
    points = [(r.round, r.training_loss) for r in run.rounds if r.training_loss is not None]
    return curves("training loss over the rounds", [Line("", points, INK, is_bold=True)])


def _columns(run: Run) -> Iterator[tuple[str, dict[str, Cell]]]:
    """The figures of the table of sites by column and site: test metrics, then how far the alternatives are."""
    if run.test:
        for metric in (metric for metric in run.metrics if metric in run.test.mean):
            values = {site: run.test.at(site, metric) for site in run.names}
            around = {site: run.test.interval(metric, site) for site in run.names} | {ALL: run.test.interval(metric)}
            cells = _cells({**values, ALL: run.test.mean.get(metric)})
            yield f"Test {words.metric_name(metric)}", {s: replace(c, note=_noise(around[s])) for s, c in cells.items()}
    if run.comparison:
        ways = {**{site: run.comparison.at(site) for site in run.names}, ALL: run.comparison.mean}
        if run.is_private:  # elsewhere the test figures say it
            yield "Shared model, exactly", _cells({site: w.shared for site, w in ways.items()})
        yield "Own model", _cells({site: w.own for site, w in ways.items()})
        yield "Central model", _cells({site: w.central for site, w in ways.items()})
        yield "Gain over own", _cells({site: w.gain(w.own) for site, w in ways.items()}, signed=True)
        yield "Gap to central", _cells({site: w.gain(w.central) for site, w in ways.items()}, signed=True)
    for method in run.classical:
        yield method.method.capitalize(), _cells({**{s: method.per_site.get(s) for s in run.names}, ALL: method.mean})


def _noise(interval: tuple[float, float] | None) -> str:
    return "noise: " + " to ".join(words.figures(interval)) if interval else ""


def _cells(values: Mapping[str, float | None], *, signed: bool = False) -> dict[str, Cell]:
    """Figures with bars from zero, a full one being 1 or the largest value where that is more.

    ``signed`` ones are differences: bars to either side of the middle, coloured by whether they are an improvement.
    """
    zero, least = (50, 1e-9) if signed else (0, 1.0)
    full = max(least, *(abs(v or 0) for v in values.values()))
    cells = {}
    for (site, v), text in zip(values.items(), words.figures(values.values(), signed=signed), strict=True):
        length = round((100 - zero) * (v or 0) / full, 1)
        tone = "" if not signed else "good" if length > 0 else "poor"
        cells[site] = Cell(text, zero + min(length, 0), abs(length), tone)
    return cells


LOOKS = (("s", OWN, 6.5), ("X", MUTED, 6.5), ("D", CENTRAL, 6.0), ("o", ACCENT, 7.5))
"""Shape, colour and size for each of the ways to train; the template's legend repeats them."""


def _side_by_side(run: Run, comparison: Comparison) -> Markup:
    """The four ways to train for each site and, in the last row, for their mean."""
    ways = {site: comparison.at(site) for site in run.names}
    ways |= {"mean": comparison.mean} if len(ways) > 1 else {}
    shown = []
    for name, at in ways.items():
        marks = [(value, *look) for value, look in zip(at, LOOKS, strict=True) if value is not None]
        values = [value for value, *_ in marks]
        shown += [Row(name, marks, (min(values), max(values)))] if values else []
    return rows("shared, own and central models for each site", shown)


def _seeds(metric: str, measured: list[Measured]) -> Markup:
    """For each method: every seed a stroke, the mean a dot, the standard deviation a bar."""
    shown = []
    for row in measured:
        marks = [*((v, "|", ACCENT, 9.0) for v in row.values), (row.mean, "o", ACCENT, 6.5)]
        shown.append(Row(f"{row.method}\n{row.split}", marks, (row.mean - row.sd, row.mean + row.sd)))
    return rows(f"{words.metric_name(metric)} of each method", shown)


def _confusion(run: Run) -> dict[str, list[tuple[str, int, bool]]]:
    """Test patients by the label they have (rows) and the one they got (columns); empty for tasks without such counts.

    Each cell is its text, how strong its colour is [per cent], and whether it is right.
    """
    mean = run.test.mean if run.test else {}
    shares = {a: [mean.get(confused(a, b), 0.0) for b in run.labels] for a in run.labels}
    if run.test is None or not any(confused(a, b) in mean for a in run.labels for b in run.labels):
        return {}
    n = sum(run.test.at(site, "patients") or 0 for site in run.test.per_site)
    return {
        a: [
            (f"{share * n:.0f}", round(70 * share / (sum(row) or 1.0)), a == b)
            for b, share in zip(run.labels, row, strict=True)
        ]
        for a, row in shares.items()
    }


def _detection(run: Run) -> Markup | None:
    """The free-response curve: each site thin, all of them bold; None for tasks that find nothing in places."""
    mean = run.test.mean if run.test else {}
    if run.test is None or found_at(RATES[0]) not in mean:
        return None
    lines = []
    for i, site in enumerate(run.names):
        points = [(k, run.test.at(site, found_at(rate))) for k, rate in enumerate(RATES)]
        found = [(k, value) for k, value in points if value is not None]
        lines += [Line(site, found, site_colour(i))] if found else []
    overall = Line("all sites", [(k, mean[found_at(rate)]) for k, rate in enumerate(RATES)], INK, is_bold=True)
    places = [f"{rate:g}" if rate >= 1 else f"1/{1 / rate:g}" for rate in RATES]
    description, axis = "share of lesions found over false places a study", "false places a study"
    return levels(description, [*lines, overall], places, axis, (0.0, 1.0))


WAYS = {
    "single": "released model",
    "scaled": "the same, scaled",
    "sites": "site models together",
    "snapshots": "late rounds together",
    "ensemble": "all of them together",
}
"""What ways to get probabilities are called."""


def _reliability(found: Calibration) -> Markup:
    """How often predictions of each confidence are right, beside the line on which they would be true."""
    colours = {"single": OWN, "scaled": CENTRAL, "ensemble": ACCENT}
    lines = [Line(WAYS[w], found.points[w], colours[w], w == "ensemble") for w in colours if found.points[w]]
    least = min((confidence for line in lines for confidence, _ in line.points), default=0.0)
    return plane("share right over confidence", lines, [], ("confidence", "right"), dashed=[(least, least), (1, 1)])


def _doubted(run: Run, found: Calibration) -> Markup:
    """What a patient scored over how far members part; hospitals that trained nothing in crosses."""
    groups = []
    for site in dict.fromkeys(one.site for one in found.patients):
        of_site = [one for one in found.patients if one.site == site]
        colour = site_colour(run.names.index(site)) if site in run.names else INK
        groups.append(Line(site, [(one.disagreement, one.score) for one in of_site], colour, not of_site[0].seen))
    score = "Dice" if run.task == "segmentation" else "probability of the truth"
    return plane(f"{score} over disagreement", [], groups, ("disagreement of the members", score))


def _volumes(run: Run) -> dict[tuple[str, str], list[str]]:
    """How volumes, or the numbers that a task learns, agree with the reference, by label and site: bias, half width of the
    limits, error and ICC; empty for tasks without either."""
    if run.test is None:
        return {}
    found = {}
    for name in run.labels[1:]:
        for site in run.test.per_site:
            cells = [run.test.at(site, f"volume {kind}: {name}") for kind in ("bias", "limits", "error", "ICC")]
            if "icc" in run.metrics:
                cells = [run.test.at(site, metric) for metric in ("bias", "limits", "absolute_error", "icc")]
            if any(cell is not None for cell in cells):
                found[name, site] = [words.figure(cell, signed=not i) for i, cell in enumerate(cells)]
    return found


def _lines(metric: str, measured: list[Measured], axis: str) -> Markup | None:
    """The rows that are points of a line, places in the order of the rows; None where no row is."""
    points = [row for row in measured if row.line is not None and row.at is not None]
    places = list(dict.fromkeys(row.at or "" for row in points))
    lines = []
    for k, name in enumerate(dict.fromkeys(row.line or "" for row in points)):
        on_line = [row for row in points if row.line == name]
        lines.append(
            Line(
                name,
                [(places.index(row.at or ""), row.mean) for row in on_line],
                (ACCENT, OWN, MUTED, CENTRAL)[k % 4],
                intervals=[row.interval for row in on_line if row.interval],
            )
        )
    return levels(f"{words.metric_name(metric)} over {axis}", lines, places, axis) if lines else None


def _heat(run: Run, comparison: Comparison) -> dict[str, list[tuple[str, int, bool, str]]]:
    """How far each hospital's own model carries: rows of models, columns of sites.

    Each cell is its text, how strong its colour is [per cent], whether the model is at home there, and its interval.
    """
    models = {row.method.replace("local:", "model of "): row for row in comparison.rows if "local:" in row.method}
    models |= {
        row.method.replace("personal:", "personal, "): row for row in comparison.rows if "personal:" in row.method
    }
    models["shared model"] = comparison.by_method["federated"]
    known = [v for row in models.values() for v in row.per_site.values()]
    low, high = min(known), max(known)

    def cell(row: Method, site: str) -> tuple[str, int, bool, str]:
        is_home = row.method.partition(":")[2] == site
        if (value := row.per_site.get(site)) is None:
            return words.NOTHING, 0, is_home, ""
        interval = row.interval.get(site)
        shown = f"{interval[0]:.2f} to {interval[1]:.2f}" if interval else ""
        return f"{value:.2f}", round(4 + 51 * (value - low) / max(high - low, 1e-9)), is_home, shown

    return {name: [cell(row, site) for site in run.names] for name, row in models.items()}


def _by_round(run: Run) -> dict[str, list[str]]:
    """The figures of the table of rounds by column."""
    columns = {"Training loss": words.figures(r.training_loss for r in run.rounds)}
    for metric in run.metrics:
        columns[words.metric_name(metric)] = words.figures((r.validation or {}).get(metric) for r in run.rounds)
    return columns
