"""What privacy costs: Dice against epsilon, at hospitals of 200 and of 1000 patients.

Every arm starts from one plan, ``plans/privacy-utility.toml``. Arms differ in epsilon and in the size of the hospitals;
``patients_per_step`` is a twentieth of it throughout, so all have the same sampling rate and the same number of steps.
Without privacy the network is trained in the ordinary way, with the settings that suit it (:data:`WITHOUT_PRIVACY`). One
arm more protects images in place of patients, and stands in the table with the epsilon that a patient has there.

The smaller hospitals hold the first patients of the larger ones, and every model is measured on the test patients of the
larger, exactly: that is allowed because these patients are emulated (:func:`~simulation.baselines.measured_mean`).
Learning rates, steps and network were chosen on seeds from 100 up (``docs/decisions/0013-privacy-utility.md``).
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import simulation
from shared_models.plan import Plan
from simulation.experiments.harness import Experiment, Results, claim, row

SIZES = (1000, 200)
"""Patients of each hospital."""

EPSILONS = (math.inf, 8.0, 3.0, 1.0)

SHARE_PER_STEP = 0.05
"""``patients_per_step`` over the patients of a hospital."""

WITHOUT_PRIVACY = {"optimizer": "adamw", "learning_rate": 3e-3, "samples_per_patient": 2, "batch_size": 16}
"""What the plan without ``[privacy]`` has under ``[training]``; it takes as many steps at small hospitals as at large."""

WITHIN_NOISE = 0.01
"""Dice by which a mean over seeds may rise where epsilon falls, and the curve still counts as falling."""

IMAGES_PER_PATIENT = 8
"""Two studies of four slices, at most."""

LARGEST = max(SIZES)


def arms(*, quick: bool) -> dict[str, Plan]:
    """A plan for every size and epsilon, and the image-level one; ``quick`` takes a quarter of the rounds."""
    base = Plan.load(Path(simulation.__path__[0]) / "plans" / "privacy-utility.toml")
    if quick:
        base = base.model_copy(update={"rounds": base.rounds // 4})
    plans = {arm_name(size, epsilon): _plan(base, size, epsilon) for size in SIZES for epsilon in EPSILONS}
    return plans | {IMAGE_LEVEL: _image_level(_plan(base, LARGEST, 8.0))}


def arm_name(size: int, epsilon: float) -> str:
    """Name of an arm and its folder, e.g. ``n1000-epsilon8``."""
    return f"n{size}-epsilon{epsilon:g}"


IMAGE_LEVEL = f"n{LARGEST}-image-epsilon8"


def evaluate(results: Results) -> dict[str, Any]:
    """Dice of every arm, the curves, and the claims."""

    def dice(arm: str) -> list[float]:
        return [result["measured"]["dice"] for result in results[arm]]

    def cost(size: int, epsilon: float, less: float = math.inf) -> list[float]:
        """Dice lost at ``epsilon`` against a larger one, seed by seed."""
        pairs = zip(dice(arm_name(size, less)), dice(arm_name(size, epsilon)), strict=True)
        return [before - after for before, after in pairs]

    def line(size: int, epsilon: float) -> dict[str, Any]:
        method = f"n = {size}, " + ("no privacy" if math.isinf(epsilon) else f"epsilon {epsilon:g}")
        place = "∞" if math.isinf(epsilon) else f"{epsilon:g}"
        return row(method, "dice", SPLIT, dice(arm_name(size, epsilon)), line=f"{size} patients", at=place)

    for_patient = max(site["epsilon"] for result in results[IMAGE_LEVEL] for site in result["privacy"].values())
    image_level = row(
        f"n = {LARGEST}, image epsilon 8: {for_patient:.1f} for a patient",
        "dice",
        SPLIT,
        dice(IMAGE_LEVEL),
        line="image level",
        at=f"{for_patient:.0f}\n(8 per image)",
        patient_epsilon=for_patient,
    )
    return {
        "axis": "epsilon for a patient",
        "rows": [
            line(LARGEST, math.inf),
            image_level,
            *(line(LARGEST, epsilon) for epsilon in EPSILONS[1:]),
            *(line(size, epsilon) for size in SIZES[1:] for epsilon in EPSILONS),
        ],
        "claims": [
            claim(
                f"dice_cost_eps8_n{size}",
                f"Dice without privacy - Dice at epsilon 8, {size} patients a site",
                cost(size, 8.0),
                at_most=0.05,
            )
            for size in SIZES
        ]
        + [
            claim(
                f"monotone_n{size}",
                f"largest rise of Dice from one epsilon to the next smaller, {size} patients a site",
                max(([-lost for lost in cost(size, more, less)] for less, more in pairwise(EPSILONS)), key=sum),
                at_most=WITHIN_NOISE,
            )
            for size in SIZES
        ],
    }


SPLIT = f"test, sites of {LARGEST}"


def _plan(base: Plan, size: int, epsilon: float) -> Plan:
    """The plan at hospitals of another size, with another epsilon or none."""
    if base.privacy is None:
        raise ValueError("the plan has no [privacy]")
    simulated = base.simulation.model_copy(update={"patients": size})
    if math.isinf(epsilon):
        training = base.training.model_copy(update={**WITHOUT_PRIVACY, "epochs": LARGEST // size})
        return base.model_copy(update={"simulation": simulated, "privacy": None, "training": training})
    privacy = base.privacy.model_copy(
        update={"epsilon": epsilon, "patients_per_step": round(SHARE_PER_STEP * size)},
    )
    return base.model_copy(update={"simulation": simulated, "privacy": privacy})


def _image_level(plan: Plan) -> Plan:
    """The same plan with images in place of patients: as many of them in each step."""
    if plan.privacy is None:
        raise ValueError("the plan has no [privacy]")
    privacy = plan.privacy.model_copy(update={"unit": "image", "images_per_patient": IMAGES_PER_PATIENT})
    return plan.model_copy(update={"privacy": privacy})


PRIVACY_UTILITY = Experiment(
    name="privacy-utility",
    title="What privacy of patients costs, at hospitals of two sizes",
    seeds=(0, 1, 2),
    n_sites=2,
    arms=arms,
    evaluate=evaluate,
    measured_at=arm_name(LARGEST, math.inf),
)
"""Dice against epsilon."""
