"""A scanner that gives the disease away in training, and the opposite in use.

Four hospitals with one scanner each: at two of them nine patients in ten have a lesion, at the others one. Four more,
with the same scanners and reversed shares, train nothing; the area under the curve of all their patients together is what
counts, since there a network that reads the scanner is wrong. With several scanners at a site (two, of which patients with
a lesion come to the first nine times in ten) a discriminator can work at each site.

What is recommended follows from the table of all ways, and was chosen on these seeds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import simulation
from shared_models.plan import AdaptationTable, Plan
from simulation.experiments.harness import Experiment, Results, claim, row

PLAIN, RECOMMENDED, FAIR = "plain", "balanced-appearance", "unconfounded"

ALONE: dict[str, tuple[bool, dict[str, Any] | None]] = {
    PLAIN: (False, None),
    "balanced": (True, None),
    "appearance": (False, {"appearance": True}),
    RECOMMENDED: (True, {"appearance": True}),
}
"""One scanner a site: whether labels count alike, and ``[adaptation]``."""

MARGINAL = {"adversarial": "scanner", "gradient_ratio": 0.5}

SEVERAL: dict[str, tuple[bool, dict[str, Any] | None]] = {
    "two-plain": (False, None),
    "two-balanced": (True, None),
    "two-appearance": (False, {"appearance": True}),
    "two-adversary": (False, MARGINAL),
    "two-adversary-conditional": (False, {**MARGINAL, "conditional": True}),
    "two-balanced-appearance": (True, {"appearance": True}),
    "two-balanced-conditional": (True, {**MARGINAL, "conditional": True}),
}
"""Two scanners a site."""

PAIRS = ("siemens-t1gd-3t+philips-flair-3t", "ge-t2-1.5t+canon-pd-1.5t")
"""Scanners of sites that have two; patients with a lesion come to the first."""

CONFOUNDING = 0.9

ONE, TWO = "reversed in use, one scanner a site", "reversed in use, two scanners a site"


def arms(*, quick: bool) -> dict[str, Plan]:
    """A plan for each way, with one scanner a site and with two; ``quick`` takes half of the rounds."""
    base = Plan.load(Path(simulation.__path__[0]) / "plans" / "confounded.toml")
    if quick:
        base = base.model_copy(update={"rounds": base.rounds // 2})
    two = _simulated(
        base,
        scanners=PAIRS,
        prevalence=(0.5,),
        confounding=(CONFOUNDING,),
        unseen=PAIRS,
        unseen_prevalence=(0.5,),
        unseen_confounding=(1 - CONFOUNDING,),
    )
    plans = {arm: _with(base, *what) for arm, what in ALONE.items()}
    plans[FAIR] = _with(_simulated(base, prevalence=(0.5,)), False, None)
    plans |= {arm: _with(two, *what) for arm, what in SEVERAL.items()}
    plans[f"two-{FAIR}"] = _with(_simulated(two, confounding=None), False, None)
    return plans


def evaluate(results: Results) -> dict[str, Any]:
    """AUC of every way on the reversed patients, and the claims."""

    def auc(arm: str) -> list[float]:
        return [result["scanners"]["unseen_mean"]["auc"] for result in results[arm]]

    def kept(arm: str, fair: str) -> list[float]:
        return [(a - 0.5) / (f - 0.5) for a, f in zip(auc(arm), auc(fair), strict=True)]

    return {
        "rows": [
            row(arm.removeprefix("two-").replace("-", " "), "auc", TWO if arm.startswith("two-") else ONE, auc(arm))
            for arm in results
        ],
        "claims": [
            claim(
                "restored",
                "AUC above chance of balanced loss and appearance, over that without confounding, one scanner a site",
                kept(RECOMMENDED, FAIR),
                at_least=0.9,
            ),
            claim(
                "restored_two",
                "the same with two scanners a site",
                kept(f"two-{RECOMMENDED}", f"two-{FAIR}"),
                at_least=0.9,
            ),
            claim(
                "plain_loss",
                "AUC that confounding costs plain training, one scanner a site",
                [f - p for f, p in zip(auc(FAIR), auc(PLAIN), strict=True)],
                at_least=0.0,
            ),
        ],
    }


def _with(plan: Plan, is_balanced: bool, table: dict[str, Any] | None) -> Plan:
    training = plan.training.model_copy(update={"balanced": True if is_balanced else None})
    adaptation = AdaptationTable(**table) if table else None
    return plan.model_copy(update={"training": training, "adaptation": adaptation})


def _simulated(plan: Plan, **keys: Any) -> Plan:
    return plan.model_copy(update={"simulation": plan.simulation.model_copy(update=keys)})


CONFOUNDED = Experiment(
    name="confounded",
    title="A scanner that gives the disease away in training, and the opposite in use",
    seeds=(0, 1, 2, 3, 4),
    n_sites=4,
    arms=arms,
    evaluate=evaluate,
    compares=False,
)
"""AUC where the scanner misleads."""
