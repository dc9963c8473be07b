"""Vessels in photographs of a camera that took no part: real images of three cameras, each left out in turn.

The cameras are of one collection each (DRIVE, CHASE_DB1, HRF), which differ in people, field of view and the reader who
outlined the vessels as well, so what is lost on another one is not the camera's alone. Photographs carry no header that
names a camera, and each site has one: there is nothing for an adversary to decide, and randomised appearance is what
remains. What the camera's own photographs would have given is measured by a run in which all three take part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import simulation
from shared_models.plan import AdaptationTable, Plan
from simulation.experiments.harness import Experiment, Results, claim, row

CAMERAS = ("chase_db1", "drive", "hrf")

PLAIN, APPEARANCE, EVERYBODY = "plain", "appearance", "all take part"


def arms(*, quick: bool) -> dict[str, Plan]:
    """Each camera left out, with and without randomised appearance, and all together; ``quick`` takes a quarter."""
    base = Plan.load(Path(simulation.__path__[0]) / "plans" / "unseen-camera.toml")
    base = base.model_copy(update={"rounds": base.rounds // 4}) if quick else base
    plain = base.model_copy(update={"adaptation": None})
    ways = {PLAIN: plain, APPEARANCE: base.model_copy(update={"adaptation": AdaptationTable(appearance=True)})}
    return {f"{camera}, {way}": plan for camera in CAMERAS for way, plan in ways.items()} | {EVERYBODY: plain}


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
    gained = np.mean(
        [np.subtract(elsewhere(camera, APPEARANCE), elsewhere(camera, PLAIN)) for camera in CAMERAS], axis=0
    )
    cost = np.subtract(at_home(PLAIN), at_home(APPEARANCE))
    return {
        "rows": [
            *(
                row(f"{way}, left out", "dice", camera, elsewhere(camera, way))
                for way in (PLAIN, APPEARANCE)
                for camera in CAMERAS
            ),
            *(row(f"{PLAIN}, {EVERYBODY}", "dice", camera, taking_part[camera]) for camera in CAMERAS),
            *(row(way, "dice", "cameras that took part", at_home(way)) for way in (PLAIN, APPEARANCE)),
        ],
        "claims": [
            claim(
                "appearance_gain",
                "Dice that a randomised appearance gives on the camera left out, mean over cameras",
                [float(value) for value in gained],
                at_least=0.0,
            ),
            claim(
                "home_cost",
                "Dice that it costs on cameras that took part",
                [float(value) for value in cost],
                at_most=0.02,
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
    left_out=left_out,
    compares=False,
)
"""Dice on a camera left out."""
