"""A result as an HTML page beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from shared_models.errors import FederadError
from simulation.report import words
from simulation.report.charts import ACCENT, CENTRAL, INK, MUTED, OWN, Line, Mark, Row, curves, rows, site_colour
from simulation.report.charts import INKS as COLOURS
from simulation.report.pictures import pictures
from simulation.report.results import Comparison, Experiment, Measured, Run, Ways, read

ALL = ""
"""Stands for all sites together where figures are kept by site."""


@dataclass(frozen=True)
class Cell:
    """One figure of a table over a bar from ``start`` to ``start + width`` per cent of the cell."""

    text: str
    start: float
    width: float
    tone: str = ""


def write_report(folder: Path) -> Path:
    """Write ``report.html`` beside the ``result.json`` of a run.

    Parameters
    ----------
    folder
        Where the run wrote ``result.json`` and, if it finished, ``pictures.npz``.

    Returns
    -------
    Path
        The page. It refers to nothing outside itself.

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
        loss=curves(
            "training loss over the rounds",
            [Line("", [(r.round, r.training_loss) for r in run.rounds if r.training_loss is not None], INK, True)],
        ),
        colours=[COLOURS[site_colour(i)] for i in range(len(run.sites))],
        columns=dict(_columns(run)),
        side_by_side=_side_by_side(run, run.comparison) if run.comparison else None,
        heat=_heat(run, run.comparison) if run.comparison else None,
        by_round=_by_round(run),
        galleries=pictures(folder, run.headline) if run.status == "finished" else {},
    )


def write_experiment_report(folder: Path) -> Path:
    """Write ``report.html`` beside the ``result.json`` of an experiment.

    Every claim stands with its expectation and whether it held; every seed's value is drawn, not only the mean.

    Raises
    ------
    FederadError
        R231 as for :func:`write_report`.
    """
    result = read(Experiment, folder)
    metrics = dict.fromkeys(row.metric for row in result.rows)
    groups = {metric: [row for row in result.rows if row.metric == metric] for metric in metrics}
    return _write(
        folder,
        "experiment.html",
        result=result,
        groups=groups,
        charts={metric: _seeds(metric, measured) for metric, measured in groups.items()},
    )


def _write(folder: Path, template: str, **shown: object) -> Path:
    environment = Environment(
        loader=PackageLoader("simulation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        figure=words.figure,
        figures=words.figures,
        metric=words.metric_name,
        meanings=words.meanings,
        duration=words.duration,
        counted=words.counted,
    )
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
            remedies=(
                "free space or change the permissions of the folder",
                "or copy the folder elsewhere and try again",
            ),
        ) from None
    return path


def _validation(run: Run) -> Markup | None:
    """The headline metric over the rounds: each site thin, all of them bold."""
    overall = [(r.round, r.validation[run.headline]) for r in run.rounds if r.validation]
    lines = [
        Line(
            site, [(r.round, r.per_site[site][run.headline]) for r in run.rounds if site in r.per_site], site_colour(i)
        )
        for i, site in enumerate(run.names)
    ]
    ring = next((point for point in overall if point[0] == run.best_round), None)
    description = f"validation {words.metric_name(run.headline)} over the rounds"
    return curves(description, [*lines, Line("all sites", overall, INK, is_bold=True)], ring=ring)


def _columns(run: Run) -> Iterator[tuple[str, dict[str, Cell]]]:
    """The figures of the table of sites by column and site: test metrics, then how far the alternatives are."""
    if run.test:
        for metric in run.metrics:
            values = {site: run.test.per_site.get(site, {}).get(metric) for site in run.names}
            yield f"Test {words.metric_name(metric)}", _bars({**values, ALL: run.test.mean[metric]})
    if run.comparison:
        ways = {**{site: run.comparison.at(site) for site in run.names}, ALL: run.comparison.mean}
        yield "Own model", _bars({site: w.own for site, w in ways.items()})
        yield "Central model", _bars({site: w.central for site, w in ways.items()})
        yield "Gain over own", _gains({site: w.gain(w.own) for site, w in ways.items()})
        yield "Gap to central", _gains({site: w.gain(w.central) for site, w in ways.items()})


def _bars(values: Mapping[str, float | None]) -> dict[str, Cell]:
    """Figures with bars from zero; the longest bar is 1, or the largest value where that is more."""
    full = max(1.0, *(v or 0 for v in values.values()))
    texts = zip(values.items(), words.figures(values.values()), strict=True)
    return {site: Cell(text, 0, round(100 * (v or 0) / full, 1)) for (site, v), text in texts}


def _gains(values: Mapping[str, float | None]) -> dict[str, Cell]:
    """Differences with bars to either side of the middle, coloured by whether they are an improvement."""
    full = max(1e-9, *(abs(v or 0) for v in values.values()))
    cells = {}
    for (site, v), text in zip(values.items(), words.figures(values.values(), signed=True), strict=True):
        half = round(50 * (v or 0) / full, 1)
        cells[site] = Cell(text, 50 + min(half, 0), abs(half), "good" if half > 0 else "poor")
    return cells


def _side_by_side(run: Run, comparison: Comparison) -> Markup:
    """For each site and for their mean: own, other hospitals', central and shared model."""
    ways = {site: comparison.at(site) for site in run.names}
    ways |= {"mean": comparison.mean} if len(ways) > 1 else {}
    shown = [_row(name, at) for name, at in ways.items() if at.shared is not None]
    return rows("shared, own and central models for each site", shown)


def _row(name: str, at: Ways) -> Row:
    """The marks of four ways to train; the template's legend repeats them."""
    others = ((at.own, "s", OWN, 6.5), (at.elsewhere, "X", MUTED, 6.5), (at.central, "D", CENTRAL, 6.0))
    ways = (*others, (at.shared, "o", ACCENT, 7.5))
    marks: list[Mark] = [(value, *look) for value, *look in ways if value is not None]
    values = [value for value, *_ in marks]
    return Row(name, marks, (min(values), max(values)))


def _seeds(metric: str, measured: list[Measured]) -> Markup:
    """For each method: every seed a stroke, the mean a dot, the standard deviation a bar."""
    shown = [
        Row(
            f"{row.method}\n{row.split}",
            [*((v, "|", ACCENT, 9) for v in row.values), (row.mean, "o", ACCENT, 6.5)],
            (row.mean - row.sd, row.mean + row.sd),
        )
        for row in measured
    ]
    return rows(f"{words.metric_name(metric)} of each method", shown)


def _heat(run: Run, comparison: Comparison) -> dict[str, list[tuple[str, int, bool]]]:
    """How far each hospital's own model carries: rows of models, columns of sites.

    Each cell is its text, how strong its colour is [per cent], and whether the model is at home there.
    """
    models = [(f"model of {owner}", owner, row) for owner, row in comparison.local.items()]
    models.append(("shared model", ALL, comparison.by_method["federated"]))
    known = [v for _, _, row in models for v in row.per_site.values()]
    low, high = min(known), max(known)

    def cell(value: float | None, is_home: bool) -> tuple[str, int, bool]:
        if value is None:
            return words.NOTHING, 0, is_home
        return f"{value:.2f}", round(4 + 51 * (value - low) / max(high - low, 1e-9)), is_home

    return {shown: [cell(row.per_site.get(site), site == owner) for site in run.names] for shown, owner, row in models}


def _by_round(run: Run) -> dict[str, list[str]]:
    """The figures of the table of rounds by column."""
    columns = {"Training loss": words.figures(r.training_loss for r in run.rounds)}
    for metric in run.metrics:
        columns[words.metric_name(metric)] = words.figures((r.validation or {}).get(metric) for r in run.rounds)
    return columns
