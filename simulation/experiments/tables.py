"""The tables of README and ``docs/results.md``, made from ``docs/results``: no figure there is typed by hand.

``python -m simulation.experiments.tables`` writes them again. A results file is a ``result.json`` of a run or an
experiment, or the ``bench.json`` of ``make bench``, kept with the command that made it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
RESULTS = ROOT / "docs" / "results"

Result = dict[str, Any]


def run_table(result: Result) -> str:
    """A run: one row for each way to train, one column for each site."""
    sites = [site["name"] for site in result["sites"]]
    rows = [
        [row["method"], *(three(row["per_site"].get(site)) for site in sites), three(row["mean"])]
        for row in result["comparison"]["rows"]
    ]
    minutes = result["seconds"] / 60
    how = f"{minutes:.1f} minutes with {result['workers']} workers, {result['headline']} on test patients"
    return f"`{result['command']}`: {how}.\n\n" + table([result["headline"].capitalize() + " of", *sites, "mean"], rows)


def experiment_table(result: Result) -> str:
    """An experiment: its claims, and the figures they rest on."""
    seeds = len(result["seeds"])
    metric = result["rows"][0]["metric"]
    figures = [
        [
            row["method"] if row["metric"] == metric else f"{row['method']}, {row['metric']}",
            row["split"],
            f"{three(row['mean'])} ± {three(row['sd'])}",
        ]
        for row in result["rows"]
    ]
    claims = [
        [f"`{c['id']}`", c["claim"], _claimed(c), _expected(c), "yes" if c["holds"] else "**no**"]
        for c in result["claims"]
    ]
    return (
        f"`{result['command']}`: {seeds} seeds, mean ± standard deviation over seeds.\n\n"
        + table(["model", "measured on", metric], figures)
        + "\n\n"
        + table(["claim", "", "value", "expected", "holds"], claims)
    )


def _claimed(claim: Result) -> str:
    interval = claim.get("interval")
    return three(claim["value"]) + (f" ({three(interval[0])} to {three(interval[1])})" if interval else "")


def _expected(claim: Result) -> str:
    sign = {"at least": ">=", "at most": "<="}[claim.get("bound", "at least")]
    return f"{sign} {claim['expected']:g}"


def bench_table(result: Result) -> str:
    """The benchmark: engines and aggregation."""
    engines = [[r["engine"], str(r["sites"]), f"{r['overhead']:.1%}", f"{r['peak_mb']:.0f}"] for r in result["engines"]]
    adding = [
        [r["aggregation"], str(r["replies"]), f"{r['ratio']:.1f}", f"{r['extra_peak_mb']:.0f}"]
        for r in result["aggregation"]
    ]
    return (
        "`make bench`, one worker; overhead is CPU outside training over CPU of training, the first round left out.\n\n"
        + table(["engine", "sites", "overhead", "peak MB"], engines)
        + f"\n\nPeak memory at 64 sites over that at 4: {result['memory_64_over_4']:.3f}."
        + " Adding up replies of 30 M parameters:\n\n"
        + table(["", "replies", "passes over memory", "extra peak MB"], adding)
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def three(value: float | None) -> str:
    """Three decimals; a dash for nothing."""
    return "–" if value is None else f"{value:.3f}"


TABLES: dict[str, Callable[[Result], str]] = {"demo": run_table, "retina-vessels": run_table, "bench": bench_table}
"""Which table a results file becomes that is no experiment's."""


def filled(text: str) -> str:
    """``text`` with every ``<!-- results: NAME -->`` ... ``<!-- /results -->`` filled from ``docs/results/NAME.json``."""

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        return f"<!-- results: {name} -->\n{TABLES.get(name, experiment_table)(result)}\n<!-- /results -->"

    return re.sub(r"<!-- results: (?P<name>[\w-]+) -->.*?<!-- /results -->", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
