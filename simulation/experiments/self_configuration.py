"""Does a plan that configured itself beat one that fits all? Three kinds of images, and nobody's hand on either.

The sets differ in how they are sampled: 0.7 mm along all axes, slices of 5 mm with pixels of 1 mm, and 2 mm along all axes.
Within a set each site is a little finer or coarser. "fixed" is the same plan everywhere: a cube of 24 voxels of 1 mm and
three depths. "configured" is what the sites' fingerprints make of that plan, with as much memory for a step as the fixed
plan takes, and the same number of rounds and of steps in each; so a step costs about the same time.

Both are measured on the grid on which images were acquired: predictions are brought back to it, references never leave it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from client.data.preprocessing import on_scan_grid
from client.data.scan import Scan
from client.training import resident_trainer
from shared_models.fingerprint import fingerprint_plan
from shared_models.plan import Plan
from shared_models.self_configuration import step_bytes
from shared_models.tasks.segmentation import Segmentation, dice
from shared_models.volume import Volume
from shared_models.weights import decode, load_weights
from simulation.configure import configure
from simulation.experiments.harness import Experiment, Results, claim, row
from simulation.run import Request, Watcher, find_sites
from simulation.stations import cohort_of, prepare_stations

SETS: dict[str, tuple[tuple[float, float, float], int]] = {
    "0.7 mm": ((0.7, 0.7, 0.7), 20),
    "1 x 1 x 5 mm": ((5.0, 1.0, 1.0), 8),
    "2 mm": ((2.0, 2.0, 2.0), 12),
}
"""Spacing (z, y, x) [mm] and slices of each set of emulated images."""

WAYS = ("fixed", "configured")
SPREAD = 0.1
"""How much finer or coarser than its set a site may be."""


def arms(*, quick: bool) -> dict[str, Plan]:
    """The fixed plan at each set's hospitals, twice: the second of them is configured; ``quick`` takes under a third of the
    rounds."""
    return {f"{name}, {way}": _fixed(name, 8 if quick else 24) for name in SETS for way in WAYS}


def _fixed(name: str, rounds: int) -> Plan:
    spacing, slices = SETS[name]
    return Plan.from_tables(
        {
            "name": "self-configuration",
            "rounds": rounds,
            "task": {
                "kind": "segmentation",
                "labels": ["background", "lesion"],
                "network": "dynunet",
                "channels": [8, 16, 32],
            },
            "data": {
                "modality": "MR",
                "dimensions": 3,
                "spacing_mm": [1.0, 1.0, 1.0],
                "patch": [24, 24, 24],
                "split": {"train": 0.55, "validation": 0.0, "test": 0.45},
            },
            "training": {
                "batch_size": 2,
                "samples_per_patient": 6,
                "optimizer": "adamw",
                "learning_rate": 3e-3,
                "schedule": "cosine",
            },
            "strategy": {"release": "last", "minimum_sites": 3, "deadline_s": 600},
            "simulation": {
                "patients": 8,
                "slices": slices,
                "spacing_mm": list(spacing),
                "spacing_spread": SPREAD,
            },
        }
    )


def own_plan(arm: str, request: Request, watcher: Watcher) -> Plan:
    """The plan of an arm at a seed's hospitals: as it is, or as they say."""
    if not arm.endswith(WAYS[1]):
        return request.plan
    return configure(request, watcher, memory_gb=step_bytes(request.plan) / 1e9).plan


def look(request: Request) -> dict[str, Any]:
    """Dice of a finished run's model on test patients, on the grid of their images, and what was configured."""
    plan, asked = request.plan, fingerprint_plan(request.plan)
    sites = find_sites(request, Watcher())
    prepare_stations(asked, sites, seed=request.seed, workers=1, on_site=lambda _: None)
    trainer = resident_trainer(plan, "auto")
    task = trainer.task
    if not isinstance(task, Segmentation):
        raise TypeError("this experiment segments")
    load_weights(trainer.network, decode((request.folder / "model.safetensors").read_bytes())[0])
    trainer.network.eval()
    patients = []
    for site in sites:
        brought, native = cohort_of(site, plan), cohort_of(site, asked)
        for patient in native.patients("test"):
            found = []
            for study in patient.studies:
                volume, acquired = brought.volume(study), native.volume(study)
                with torch.inference_mode():
                    probabilities = task.probabilities(trainer.network, volume, trainer.device)
                back = on_scan_grid(probabilities, _scan(acquired), volume.spacing_mm)
                found.append(dice(back.argmax(axis=0) == 1, np.asarray(acquired.label) == 1))
            patients.append(float(np.mean(found)))
    return {
        "dice": float(np.mean(patients)),
        "patients": patients,
        "dimensions": plan.data.dimensions,
        "spacing_mm": list(plan.data.spacing_mm or ()),
        "patch": list(plan.data.patch),
        "channels": list(plan.task.channels),
        "batch_size": plan.training.batch_size,
        "step_bytes": step_bytes(plan),
    }


def _scan(volume: Volume) -> Scan:
    """A volume on its own grid as if it had been read so."""
    affine = np.diag([*volume.spacing_mm[::-1], 1.0])
    return Scan(np.asarray(volume.image), affine)


def evaluate(results: Results) -> dict[str, Any]:
    """Dice of both plans on each set, and on how many sets the configured one is better."""
    found = {arm: [result["after"]["dice"] for result in of_arm] for arm, of_arm in results.items()}
    gains = {name: np.subtract(found[f"{name}, configured"], found[f"{name}, fixed"]) for name in SETS}
    n_won = np.sum([gain > 0 for gain in gains.values()], axis=0)
    return {
        "rows": [
            *(row(way, "dice", f"test, {name}", found[f"{name}, {way}"]) for name in SETS for way in WAYS),
            *(row("gain of configured", "dice", f"test, {name}", gains[name].tolist()) for name in SETS),
        ],
        "configured": {
            name: {key: value for key, value in results[f"{name}, configured"][0]["after"].items() if key != "patients"}
            for name in SETS
        },
        "claims": [
            claim(
                "sets_won",
                "sets of images, of three, on which the configured plan has the higher Dice",
                [float(n) for n in n_won],
                at_least=2,
            ),
        ],
    }


SELF_CONFIGURATION = Experiment(
    name="self-configuration",
    title="Plans that configure themselves, on three kinds of images",
    seeds=(0, 1, 2),
    n_sites=3,
    arms=arms,
    evaluate=evaluate,
    compares=False,
    pictures=False,
    after=look,
    configure=own_plan,
)
