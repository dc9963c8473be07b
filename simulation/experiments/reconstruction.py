"""Emulated complex images of four scanners from a quarter and from an eighth of their k-space.

Arms differ in the acceleration, and in whether the same cascade keeps to what was measured; wavelets and the zero-filled
image are measured on the same test patients with the same masks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import simulation
from shared_models.plan import Plan
from simulation.experiments.classification import less
from simulation.experiments.harness import Experiment, Results, claim, row
from simulation.experiments.reconstruction_real import means_of

EVERYBODY = "all sites' test patients"

WAVELETS = "wavelet compressed sensing"


def arms(*, quick: bool) -> dict[str, Plan]:
    """The example plan at accelerations 4 and 8, and at 4 without consistency; ``quick`` takes a quarter of the rounds."""
    plan = Plan.load(Path(simulation.__path__[0]) / "plans" / "reconstruction.toml")
    plan = plan.model_copy(update={"rounds": plan.rounds // 4}) if quick else plan
    changes: dict[str, dict[str, Any]] = {
        "4x": {},
        "4x-inconsistent": {"consistency": "none"},
        "8x": {"acceleration": 8.0},
    }
    return {
        arm: plan.model_copy(update={"task": plan.task.model_copy(update=change)}) for arm, change in changes.items()
    }


def evaluate(results: Results) -> dict[str, Any]:
    """PSNR of the arms and of methods that learn nothing, and the claims."""
    ours = {arm: [result["test"]["psnr"] for result in of_seed] for arm, of_seed in results.items()}
    gains = {arm: [result["test"]["gain_db"] for result in of_seed] for arm, of_seed in results.items()}
    rows = []
    for arm, name in (("4x", "a quarter"), ("8x", "an eighth")):
        split = f"{EVERYBODY}, {name} of k-space"
        classical = [means_of(result["classical"]) for result in results[arm]]
        rows += [row(method, "psnr", split, [each[method] for each in classical]) for method in classical[0]]
        if arm == "4x":
            rows.append(row("federated, without consistency", "psnr", split, ours["4x-inconsistent"]))
        rows.append(row("federated cascade", "psnr", split, ours[arm]))
        rows.append(row("federated cascade", "ssim", split, [result["test"]["ssim"] for result in results[arm]]))
    sparse = [means_of(result["classical"])[WAVELETS] for result in results["4x"]]
    federated = [result["test"]["psnr"] for result in results["4x"]]
    return {
        "rows": rows,
        "claims": [
            claim("gain_4x_db", "PSNR over zero-filled from a quarter of k-space [dB]", gains["4x"], at_least=5.0),
            claim("gain_8x_db", "PSNR over zero-filled from an eighth of k-space [dB]", gains["8x"], at_least=3.0),
            claim(
                "interleaved_gain_db",
                "PSNR with interleaved consistency over the same cascade without [dB]",
                less(ours["4x"], ours["4x-inconsistent"]),
                at_least=1.0,
            ),
            claim("over_cs_db", "PSNR over wavelet compressed sensing [dB]", less(federated, sparse), at_least=1.0),
        ],
    }


RECONSTRUCTION = Experiment(
    name="reconstruction",
    title="Emulated complex images from a quarter and from an eighth of their k-space",
    seeds=(0, 1, 2),
    n_sites=4,
    arms=arms,
    evaluate=evaluate,
    compares=False,
)
