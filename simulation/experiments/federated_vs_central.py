"""Is training together worth it? Four hospitals with four scanners: federated, central, and each on its own.

The ratios and their thresholds follow published orderings (prostate segmentation with NVFlare 0.969 of central; local
models clearly behind, most of all on other hospitals' scanners).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import simulation
from shared_models.plan import Plan
from simulation.experiments.harness import Experiment, Results, claim, row


def arms(*, quick: bool) -> dict[str, Plan]:
    """The demo's plan alone; ``quick`` takes a third of its rounds."""
    demo = Plan.load(Path(simulation.__path__[0]) / "plans" / "demo.toml")
    return {"": demo.model_copy(update={"rounds": demo.rounds // 3}) if quick else demo}


def evaluate(results: Results) -> dict[str, Any]:
    """Dice of the three ways to train, and the three claims."""
    means = [{r["method"]: r["mean"] for r in result["comparison"]["rows"]} for result in results[""]]
    federated = [m["federated"] for m in means]
    central = [m["central"] for m in means]
    own = [result["comparison"]["local_own"] for result in results[""]]
    elsewhere = [result["comparison"]["local_elsewhere"] for result in results[""]]

    def ratios(below: list[float]) -> list[float]:
        return [f / b for f, b in zip(federated, below, strict=True)]

    return {
        "rows": [
            row("federated", "dice", "all sites' test patients", federated),
            row("central", "dice", "all sites' test patients", central),
            row("local", "dice", "own test patients", own),
            row("local", "dice", "other sites' test patients", elsewhere),
        ],
        "claims": [
            claim("over_central", "federated Dice / central Dice", ratios(central), at_least=0.96),
            claim("over_own_local", "federated Dice / local models on their own patients", ratios(own), at_least=1.05),
            claim(
                "over_other_sites",
                "federated Dice / local models on other sites' patients",
                ratios(elsewhere),
                at_least=1.25,
            ),
        ],
    }


FEDERATED_VS_CENTRAL = Experiment(
    name="federated-vs-central",
    title="Four hospitals with four scanners: together, pooled, and each on its own",
    seeds=(0, 1, 2),
    n_sites=4,
    arms=arms,
    evaluate=evaluate,
)
