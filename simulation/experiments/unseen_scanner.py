"""Scanners that nobody trained on: what appearance randomisation and an adversary are worth there.

Four hospitals with two scanners each train together; two scanners that none of them has lie near theirs, two far outside.
Appearance randomisation should give back half of what is lost on the far ones (augmentation left a drop of 11 % of 39 % in
Zhang et al. 2020, arXiv:1906.03347) and cost little at home. An adversary on top is only asked to do no harm: it is made
for new scanners whose scans take part, and no published gain is known without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import simulation
from shared_models.plan import AdaptationTable, Plan
from simulation.experiments.harness import Experiment, Results, claim, row

PLAIN, APPEARANCE, BOTH, ADVERSARY = "plain", "appearance", "appearance-adversary", "adversary"

COLUMNS = {"seen": (), "near": ("unseen-1", "unseen-2"), "far": ("unseen-3", "unseen-4")}
"""What is measured, and the unseen hospitals that belong to it."""

TABLES: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    APPEARANCE: {"appearance": True},
    BOTH: {"appearance": True, "adversarial": "scanner"},
    ADVERSARY: {"adversarial": "scanner"},
}
"""``[adaptation]`` of each arm."""


def arms(*, quick: bool) -> dict[str, Plan]:
    """A plan for each way; ``quick`` takes half of the rounds."""
    base = Plan.load(Path(simulation.__path__[0]) / "plans" / "unseen-scanner.toml")
    if quick:
        base = base.model_copy(update={"rounds": base.rounds // 2})
    return {
        arm: base.model_copy(update={"adaptation": AdaptationTable(**table) if table else None})
        for arm, table in TABLES.items()
    }


def evaluate(results: Results) -> dict[str, Any]:
    """Dice on seen, near and far scanners, leakage, and the claims."""

    plain, appearance, both = (
        {column: dice(results[arm], column) for column in COLUMNS} for arm in (PLAIN, APPEARANCE, BOTH)
    )
    drop, gain = _less(plain["seen"], plain["far"]), _less(appearance["far"], plain["far"])
    return {
        "rows": rows(results),
        "claims": [
            claim(
                "drop_removed",
                "share of the drop from seen to far scanners that appearance randomisation removes",
                [g / d for g, d in zip(gain, drop, strict=True)],
                at_least=0.5,
            ),
            claim(
                "seen_cost",
                "Dice on seen scanners that it costs",
                _less(plain["seen"], appearance["seen"]),
                at_most=0.02,
            ),
            *(harmless(f"adversarial_{column}", column, _less(both[column], appearance[column])) for column in COLUMNS),
        ],
    }


def rows(results: Results) -> list[dict[str, Any]]:
    """Dice of every arm in every column, and how well a fresh probe tells scanners apart."""

    def leaked(arm: str) -> list[float]:
        return [(result["scanners"]["leakage"] or {"accuracy": 1.0})["accuracy"] for result in results[arm]]

    return [
        *(row(arm, "dice", column, dice(of_seeds, column)) for arm, of_seeds in results.items() for column in COLUMNS),
        *(row(arm, "scanner told by a fresh probe", "seen", leaked(arm)) for arm in results),
    ]


def dice(of_seeds: Sequence[dict[str, Any]], column: str) -> list[float]:
    """Of each seed, the mean over the scanners of a column."""
    return [_dice(result, column) for result in of_seeds]


def harmless(id_: str, column: str, differences: list[float]) -> dict[str, Any]:
    """The claim that the adversary on top costs at most a point, or nothing that its interval would show."""
    found = claim(
        id_,
        f"Dice gained by the adversary on top, {column} scanners (or the interval includes 0)",
        differences,
        at_least=-0.01,
    )
    interval = found["interval"]
    includes_zero = interval is not None and interval[0] <= 0 <= interval[1]
    return {**found, "holds": found["holds"] or includes_zero}


def _dice(result: dict[str, Any], column: str) -> float:
    """Mean over the scanners of a column, each counting the same."""
    scanners = result["scanners"]
    found = [scanners["unseen"][name] for name in COLUMNS[column]] or list(scanners["seen"].values())
    return float(np.mean([metrics["dice"] for metrics in found]))


def _less(some: list[float], others: list[float]) -> list[float]:
    return [a - b for a, b in zip(some, others, strict=True)]


UNSEEN_SCANNER = Experiment(
    name="unseen-scanner",
    title="Scanners that no hospital has, near and far",
    seeds=(0, 1, 2, 3, 4),
    n_sites=4,
    arms=arms,
    evaluate=evaluate,
    compares=False,
)
"""Dice on seen, near and far scanners."""
