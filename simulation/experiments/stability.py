"""How steady a reconstruction is: a cascade that keeps to its measured samples, and a U-Net that never looks at them again.

Both are trained alike on emulated complex images, a quarter of k-space measured. The stability card of each site's first
test patients gives the worst small change of the samples that a search finds, and how much of a small bright disc comes
back that nobody has seen (Antun et al. 2020, doi:10.1073/pnas.1907377117); a linear zero-filled image changes exactly as
much as its samples.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import simulation
from shared_models.plan import Plan
from simulation.experiments.harness import Experiment, Results, claim, row

CASCADE, UNET = "cascade", "image-unet"
CASCADE_ONLY = ("cascades", "consistency")

EVERYBODY = "first test patients of each site"


def arms(*, quick: bool) -> dict[str, Plan]:
    """The reconstruction plan with either network; ``quick`` takes a tenth of the rounds."""
    plan = Plan.load(Path(simulation.__path__[0]) / "plans" / "reconstruction.toml")
    plan = plan.model_copy(update={"rounds": plan.rounds // 10}) if quick else plan
    tables = json.loads(plan.canonical_json())
    for key in CASCADE_ONLY:
        tables["task"].pop(key, None)
    tables["task"] |= {"network": UNET, "channels": [16, 32, 64]}
    return {CASCADE: plan, UNET: Plan.from_tables(tables)}


def carded(results: Results, arm: str, number: str) -> list[float]:
    """A number of the stability card, the mean over sites, one for each seed."""
    return [float(np.mean([card[number] for card in result["stability"].values()])) for result in results[arm]]


def evaluate(results: Results) -> dict[str, Any]:
    """Both networks' cards, and the claims."""
    worst = {arm: carded(results, arm, "amplification") for arm in results}
    kept = {arm: carded(results, arm, "structure") for arm in results}
    rows = []
    for arm, name in ((CASCADE, "cascade"), (UNET, "U-Net without data consistency")):
        rows += [
            row(name, "amplification", EVERYBODY, worst[arm]),
            row(name, "structure", EVERYBODY, kept[arm]),
            row(name, "psnr", "test patients", [result["test"]["psnr"] for result in results[arm]]),
        ]
    rows.append(row("zero-filled", "structure", EVERYBODY, carded(results, CASCADE, "structure_zero_filled")))
    return {
        "rows": rows,
        "claims": [
            claim(
                "amplification_ratio",
                "worst change of the cascade / of the U-Net without data consistency",
                [ours / theirs for ours, theirs in zip(worst[CASCADE], worst[UNET], strict=True)],
                at_most=1.0,
            ),
            claim(
                "structure_recovered", "share of an inserted disc that the cascade shows", kept[CASCADE], at_least=0.8
            ),
        ],
    }


STABILITY = Experiment(
    name="stability",
    title="How steady a reconstruction is, with and without keeping to what was measured",
    seeds=(0, 1, 2),
    n_sites=4,
    arms=arms,
    evaluate=evaluate,
    compares=False,
)
"""Amplification and an inserted structure."""
