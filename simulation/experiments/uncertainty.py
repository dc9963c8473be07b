"""Does a federation know what it does not know? Ensembles that cost no training, on seen scanners and on ones never seen.

What is looked at is what ``--uncertainty`` looks at in any run (``simulation.calibration``). Learning rates stay constant,
so that members differ. Of the scanners that nobody trained on, one shows another sequence and two are the far ones of the
experiment ``unseen-scanner``, whose images are noisy and coarse.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import simulation
from shared_models.plan import Plan
from simulation.calibration import FLAGS, WAYS
from simulation.experiments.harness import Experiment, Results, claim, row

SEEN = ("siemens-t1gd-3t", "philips-flair-3t", "canon-pd-1.5t")
SEQUENCE, *FAR = UNSEEN = ("ge-t2-1.5t", "fujifilm-flair-0.4t", "agfa-t2-0.2t")

NAMES = {
    "single": "last model",
    "scaled": "last model, temperature scaled",
    "sites": "ensemble of the last round's site models",
    "snapshots": "ensemble of five rounds' models",
    "ensemble": "ensemble of both",
}


def arms(*, quick: bool) -> dict[str, Plan]:
    """The demo's hospitals without one of its scanners, at a constant rate; ``quick`` takes a third of its rounds."""
    demo = Plan.load(Path(simulation.__path__[0]) / "plans" / "demo.toml")
    return {
        "": demo.model_copy(
            update={
                "name": "uncertainty",
                "rounds": 80 if quick else 240,
                "training": demo.training.model_copy(update={"schedule": "constant", "learning_rate": 2e-3}),
                "simulation": demo.simulation.model_copy(update={"scanners": SEEN, "unseen": UNSEEN}),
            }
        )
    }


def evaluate(results: Results) -> dict[str, Any]:
    """Calibration of each way, uncertainty on seen and unseen scanners, and how well it flags."""
    of_seed = [result["uncertainty"] for result in results[""]]

    def means(number: str, sites: Sequence[str]) -> list[float]:
        """Of the patients of these unseen hospitals; of all seen ones where none is named."""
        return [
            float(np.mean([p[number] for p in seed["patients"] if (p["site"] in sites if sites else p["seen"])]))
            for seed in of_seed
        ]

    def flagged(number: str, by: str) -> list[float]:
        values = [seed["flags"][number][by] for seed in of_seed]
        if None in values:
            raise ValueError("in one of the seeds all patients are poor, or none is: there is nothing to flag")
        return values

    places = {scanner: f"unseen-{k}" for k, scanner in enumerate(UNSEEN, start=1)}
    groups = {"seen": (), "another sequence": (places[SEQUENCE],), "far": [places[scanner] for scanner in FAR]}
    ece = {way: [seed["ece"][way] for seed in of_seed] for way in WAYS}
    rows = [row(NAMES[way], "ece", "test patients, seen", ece[way]) for way in WAYS]
    for group, sites in groups.items():
        for way, number in (("single", "score_single"), ("ensemble", "score")):
            rows.append(row(NAMES[way], "dice", f"test patients, {group}", means(number, sites)))
    for number in ("entropy", "mutual_information", "disagreement"):
        for group, sites in groups.items():
            rows.append(row(NAMES["ensemble"], number, f"test patients, {group}", means(number, sites)))
    for metric, by in (("flag_auroc", "auroc"), ("rank correlation with error", "correlation")):
        for number in FLAGS:
            rows.append(row(f"flagged by {number.replace('_', ' ')}", metric, "all test patients", flagged(number, by)))

    def entropy_ratio(group: str) -> list[float]:
        return [a / b for a, b in zip(means("entropy", groups[group]), means("entropy", groups["seen"]), strict=True)]

    return {
        "rows": rows,
        "claims": [
            claim(
                "ece_ratio",
                "expected calibration error of the ensemble / of the last model",
                [ours / single for ours, single in zip(ece["ensemble"], ece["single"], strict=True)],
                at_most=0.7,
            ),
            claim("entropy_ratio", "mean entropy on far scanners / on seen ones", entropy_ratio("far"), at_least=1.3),
            claim(
                "entropy_ratio_sequence",
                "mean entropy on the scanner with another sequence / on seen ones",
                entropy_ratio("another sequence"),
                at_least=1.3,
            ),
            claim(
                "flag_auroc",
                "area under the curve of disagreement for patients with Dice below 0.7",
                flagged("disagreement", "auroc"),
                at_least=0.8,
            ),
        ],
    }


UNCERTAINTY = Experiment(
    name="uncertainty",
    title="What ensembles that cost nothing know of their own errors",
    seeds=(0, 1, 2),
    n_sites=3,
    arms=arms,
    evaluate=evaluate,
    compares=False,
    uncertainty=True,
)
