"""Vessels in photographs of a camera that took no part: real images of three cameras, each left out in turn.

The cameras are of one collection each (DRIVE, CHASE_DB1, HRF), which differ in people, field of view and the reader who
outlined the vessels as well, so what is lost on another one is not the camera's alone. Each site has one camera, so the
adversary is the one that the server trains on moments of features. What the camera's own photographs would have given is
measured by a run in which all three take part.
"""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np

import simulation
from shared_models.plan import AdaptationTable, Plan
from simulation.experiments.harness import Experiment, Results, claim, row
from simulation.run import impossible

CAMERAS = {"chase_db1": "NIDEK NM-200-D", "drive": "CANON CR5", "hrf": "CANON CR-1"}
"""What each collection was photographed with, as its authors say."""

PLAIN, APPEARANCE, ADVERSARY, BOTH = "plain", "appearance", "adversary", "appearance, adversary"
EVERYBODY = "all take part"

_MOMENTS: dict[str, Any] = {"adversarial": "moments", "scanners": tuple(CAMERAS.values())}

TABLES: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    APPEARANCE: {"appearance": True},
    ADVERSARY: _MOMENTS,
    BOTH: {"appearance": True, **_MOMENTS},
}
"""``[adaptation]`` of each way of training."""


def arms(*, quick: bool) -> dict[str, Plan]:
    """Each camera left out and every way of training, and all together; ``quick`` takes a quarter of the rounds."""
    base = Plan.load(Path(simulation.__path__[0]) / "plans" / "unseen-camera.toml")
    base = base.model_copy(update={"rounds": base.rounds // 4}) if quick else base
    ways = {
        way: base.model_copy(update={"adaptation": AdaptationTable(**table) if table else None})
        for way, table in TABLES.items()
    }
    return {f"{camera}, {way}": plan for camera in CAMERAS for way, plan in ways.items()} | {EVERYBODY: ways[PLAIN]}


def deal(source: Path, folder: Path, seed: int) -> Path:
    """The collections as they are, and beside their index what each was photographed with, the same for every ``seed``.

    Raises
    ------
    FederadError
        R230 if ``source`` lacks one of the collections or the index.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        for camera in CAMERAS:
            shutil.copytree(source / camera, folder / camera)
        with (source / "index.csv").open(newline="", encoding="utf-8") as lines:
            rows = [one | {"scanner": CAMERAS[one["site"]]} for one in csv.DictReader(lines) if one["site"] in CAMERAS]
        with (folder / "index.csv").open("w", newline="", encoding="utf-8") as lines:
            table = csv.DictWriter(lines, rows[0])
            table.writeheader()
            table.writerows(rows)
    except (OSError, KeyError, IndexError):
        raise impossible(
            f"{source} does not hold {', '.join(CAMERAS)} and an index.csv with a column site.",
            "Each folder is one camera's collection, and the table says who is on which photograph.",
            "--data ../shared/data/retina_vessels",
        ) from None
    return folder


def left_out(arm: str) -> tuple[str, ...]:
    """The camera that trains nothing in an arm."""
    camera, *_ = arm.split(",")
    return (camera,) if camera in CAMERAS else ()


def evaluate(results: Results) -> dict[str, Any]:
    """Dice on each camera by what trained, at home too, and what a randomised appearance gives back."""

    def elsewhere(camera: str, way: str) -> list[float]:
        return [float(result["scanners"]["unseen"][camera]["dice"]) for result in results[f"{camera}, {way}"]]

    def at_home(way: str) -> list[float]:
        """Of each seed, the mean over cameras where they took part and another was left out."""
        of_cameras = [[float(result["test"]["dice"]) for result in results[f"{camera}, {way}"]] for camera in CAMERAS]
        return [float(mean) for mean in np.mean(of_cameras, axis=0)]

    taking_part = {
        camera: [float(result["test"]["per_site"][camera]["dice"]) for result in results[EVERYBODY]]
        for camera in CAMERAS
    }

    def gained(way: str, over: str) -> list[float]:
        gains = [np.subtract(elsewhere(camera, way), elsewhere(camera, over)) for camera in CAMERAS]
        return [float(value) for value in np.mean(gains, axis=0)]

    cost = np.subtract(at_home(PLAIN), at_home(APPEARANCE))
    return {
        "rows": [
            *(row(f"{way}, left out", "dice", camera, elsewhere(camera, way)) for way in TABLES for camera in CAMERAS),
            *(row(f"{PLAIN}, {EVERYBODY}", "dice", camera, taking_part[camera]) for camera in CAMERAS),
            *(row(way, "dice", "cameras that took part", at_home(way)) for way in TABLES),
        ],
        "claims": [
            claim(
                "appearance_gain",
                "Dice that a randomised appearance gives on the camera left out, mean over cameras",
                gained(APPEARANCE, PLAIN),
                at_least=0.0,
            ),
            claim(
                "home_cost",
                "Dice that it costs on cameras that took part",
                [float(value) for value in cost],
                at_most=0.02,
            ),
            claim(
                "adversary_on_top",
                "Dice that an adversary on top of it gives on the camera left out, mean over cameras",
                gained(BOTH, APPEARANCE),
                at_least=-0.01,
            ),
        ],
    }


UNSEEN_CAMERA = Experiment(
    name="unseen-camera",
    title="Vessels in photographs of a camera that took no part",
    seeds=(0, 1, 2, 3, 4),
    n_sites=3,
    arms=arms,
    evaluate=evaluate,
    data="../shared/data/retina_vessels",
    deal=deal,
    left_out=left_out,
    compares=False,
)
"""Dice on a camera left out."""
