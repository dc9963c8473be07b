"""Adaptation under privacy of patients: what it still does at epsilon 8, and what privacy costs it.

The scanners of ``unseen-scanner`` at larger hospitals, since a patient is hidden among others: two hospitals with two
scanners each, and scanners that neither has, near and far. Every way is trained at epsilon 8 with the settings of
``privacy-utility``, and the ways that matter without privacy beside them. The discriminator lies in the same clipped and
noised vector, and what is varied on a sample is varied before the clip, so adaptation changes no epsilon.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import simulation
from shared_models.plan import AdaptationTable, Plan
from simulation.experiments import privacy_utility, unseen_scanner
from simulation.experiments.harness import Experiment, Results, claim
from simulation.experiments.unseen_scanner import APPEARANCE, BOTH, PLAIN, TABLES

PATIENTS, EPSILON = 200, 8.0

OPEN = (PLAIN, APPEARANCE, BOTH)
"""Ways that are trained without privacy too."""


def arms(*, quick: bool) -> dict[str, Plan]:
    """Every way of ``unseen-scanner`` at epsilon 8, and some without privacy; ``quick`` takes a quarter of the rounds."""
    private, open_ = (
        privacy_utility.arms(quick=quick)[privacy_utility.arm_name(PATIENTS, epsilon)]
        for epsilon in (EPSILON, math.inf)
    )
    return {
        **{way: _plan(private, way) for way in TABLES},
        **{_open(way): _plan(open_, way) for way in OPEN},
    }


def _open(way: str) -> str:
    return f"open {way}"


def _plan(base: Plan, way: str) -> Plan:
    lab = Plan.load(Path(simulation.__path__[0]) / "plans" / "unseen-scanner.toml").simulation
    hospitals = base.simulation.model_copy(update={"scanners": lab.scanners, "unseen": lab.unseen})
    split = base.data.split.model_copy(update={"train": 0.8, "test": 0.2})
    table = TABLES[way]
    return base.model_copy(
        update={
            "name": "private-adaptation",
            "data": base.data.model_copy(update={"split": split}),
            "simulation": hospitals,
            "adaptation": AdaptationTable(**table) if table else None,
        }
    )


def evaluate(results: Results) -> dict[str, Any]:
    """The table and claims of ``unseen-scanner`` at epsilon 8, the ways without privacy, and the gains of both."""
    private = unseen_scanner.evaluate({way: results[way] for way in TABLES})
    open_ = unseen_scanner.rows({_open(way): results[_open(way)] for way in OPEN})

    def gain(plain: str, adapted: str) -> list[float]:
        far = [unseen_scanner.dice(results[arm], "far") for arm in (plain, adapted)]
        return [after - before for before, after in zip(*far, strict=True)]

    with_privacy, without = gain(PLAIN, APPEARANCE), gain(_open(PLAIN), _open(APPEARANCE))
    return {
        "rows": [*private["rows"], *open_],
        "claims": [
            *private["claims"],
            claim(
                "gain_lost",
                "Dice on far scanners gained by appearance randomisation without privacy - gained at epsilon 8",
                [more - less for more, less in zip(without, with_privacy, strict=True)],
                at_most=0.05,
            ),
        ],
    }


PRIVATE_ADAPTATION = Experiment(
    name="private-adaptation",
    title="Scanners that no hospital has, under privacy of patients",
    seeds=(0, 1, 2, 3, 4),
    n_sites=2,
    arms=arms,
    evaluate=evaluate,
    compares=False,
)
"""Dice on seen, near and far scanners at epsilon 8."""
