"""One scanner at each hospital: what a discriminator there learns, and what one learns that the server trains on moments.

A discriminator at a site with one scanner says its name whatever it is shown, and no gradient comes back through it (its
own labels are named right in 100 cases of 100, and features stay as they were: the first way in which federated
adversaries fail). federad leaves such a site without one, so the collapse is shown beside the run, with the library's
parts: at weights on the way through the run each site trains a discriminator on its own features, for as long as the server
trains its own. On the same weights the server's is trained as in a round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import simulation
from client.moments import exact_moments
from client.training import Trainer, resident_trainer
from server.moments import LEARNING_RATE, STEPS, MomentsRule
from shared_models.adaptation import Adapted, Listening, find_taps, pooled
from shared_models.moments import Confusion
from shared_models.plan import Plan
from shared_models.scanners import ScannerTable
from shared_models.seeds import derive, generator
from shared_models.task import Sample
from shared_models.weights import Weights, decode, load_weights
from simulation.baselines import DEVICE
from simulation.by_scanner import probed
from simulation.experiments.harness import Experiment, Results, claim, row
from simulation.run import Request, Watcher, find_sites
from simulation.stations import cohort_of

PLAIN, MOMENTS = "plain", "moments"

N_LOOKS = 4
"""Times at which a run is looked at, the last round included."""

BATCH = 16

Against = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Gradients of an adversary's loss at features."""


def arms(*, quick: bool) -> dict[str, Plan]:
    """With the server's discriminator and without; ``quick`` takes half of the rounds."""
    base = Plan.load(Path(simulation.__path__[0]) / "plans" / "collapse.toml")
    if quick:
        base = base.model_copy(update={"rounds": base.rounds // 2})
    return {PLAIN: base.model_copy(update={"adaptation": None}), MOMENTS: base}


def looks(plan: Plan) -> tuple[int, ...]:
    """Rounds whose weights are looked at: evenly spaced."""
    return tuple(round(plan.rounds * k / N_LOOKS) for k in range(1, N_LOOKS + 1))


def look(request: Request) -> dict[str, Any]:
    """Both kinds of discriminator at weights of a run: how often they are right, and the gradient that comes back; and how
    far apart scanners lie, as the server and as a fresh probe of the last weights sees it.

    Gradients are those of the adversary's loss over the task's, at the same features of training samples.
    """
    plan = arms(quick=False)[MOMENTS].model_copy(update={"rounds": request.plan.rounds})
    sites = find_sites(request, Watcher())
    cohorts = {site.name: cohort_of(site, request.plan) for site in sites}
    trainer = resident_trainer(plan, DEVICE)
    found = []
    for number in looks(plan):
        weights = decode((request.folder / f"round-{number:05d}.safetensors").read_bytes())[0]
        rule = MomentsRule(plan, request.seed)
        of_sites = {
            name: exact_moments(trainer, weights, cohort, seed=request.seed, site=name, round_=number)
            for name, cohort in cohorts.items()
        }
        noted = rule.learn(of_sites, number)
        confusion = Confusion(rule.discriminator, plan) if rule.discriminator else None
        local, ours, right = [], [], []
        for name, cohort in cohorts.items():
            rng = generator(request.seed, "collapse", name, number)
            drawn = [drawn_of(trainer, cohort, split, rng) for split in ("train", "test")]
            accuracy, against = alone(plan, trainer, weights, name, drawn, derive(request.seed, name, number))
            right.append(accuracy)
            local.append(beside_the_task(trainer, weights, drawn[0], against))
            ours.append(beside_the_task(trainer, weights, drawn[0], confusion.gradients) if confusion else 0.0)
        found.append(
            {
                "round": number,
                "local_accuracy": float(np.mean(right)),
                "local_gradient": float(np.mean(local)),
                "moments_accuracy": noted.accuracy or 0.0,
                "moments_gradient": float(np.mean(ours)),
                "gap": noted.gap or 0.0,
            }
        )
    last = decode((request.folder / "model.safetensors").read_bytes())[0]
    return {"looks": found, "leakage": probed(Trainer(request.plan, DEVICE), last, sites)["leakage"]}


def drawn_of(trainer: Trainer, cohort: Any, split: str, rng: np.random.Generator) -> list[Sample]:
    """One sample of each of a split's patients, up to a batch."""
    people = cohort.patients(split)[:BATCH]
    return [trainer.task.draw(cohort.volume(person.studies[0]), rng) for person in people]


def alone(
    plan: Plan, trainer: Trainer, weights: Weights, site: str, drawn: Sequence[Sequence[Sample]], seed: int
) -> tuple[float, Against]:
    """A discriminator of all the plan's scanners, trained at a site on features of its only one.

    Returns
    -------
    tuple
        How often it names the scanner of test samples right, and the gradient that a reversal would send back.
    """
    table = plan.adaptation
    if table is None:
        raise ValueError("the plan tells no scanners apart")
    scanner_plan = plan.model_copy(update={"adaptation": table.model_copy(update={"adversarial": "scanner"})})
    torch.manual_seed(seed)
    discriminator = Adapted(trainer.task.build_network(), scanner_plan).discriminator
    place = seed % len(ScannerTable(table.scanners))  # whichever it is: its name is all there is to learn
    train, test = (pooled(features_of(trainer, weights, samples)).detach() for samples in drawn)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=LEARNING_RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(discriminator(train), torch.full((len(train),), place))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    accuracy = float((discriminator(test).argmax(1) == place).double().mean())

    def against(features: Sequence[Tensor]) -> Sequence[Tensor]:
        leaves = [feature.detach().requires_grad_() for feature in features]
        loss = F.cross_entropy(discriminator(pooled(leaves)), torch.full((len(leaves[0]),), place))
        return torch.autograd.grad(loss, leaves)

    return accuracy, against


def features_of(trainer: Trainer, weights: Weights, samples: Sequence[Sample]) -> list[Tensor]:
    """What a discriminator reads of samples, with the graph that leads there."""
    load_weights(trainer.network, weights)
    return _answered(trainer.network.train(), _stacked(samples))[1]


def beside_the_task(trainer: Trainer, weights: Weights, samples: Sequence[Sample], against: Against) -> float:
    """L2 norm of an adversary's gradient at features, over that of the task's, both of the mean over samples."""
    load_weights(trainer.network, weights)
    output, features = _answered(trainer.network.train(), _stacked(samples))
    loss = trainer.task.loss(output, torch.from_numpy(np.stack([sample.target for sample in samples])))
    of_task = torch.autograd.grad(loss, features)
    return _norm(against(features)) / max(_norm(of_task), 1e-30)


def _stacked(samples: Sequence[Sample]) -> Tensor:
    return torch.from_numpy(np.stack([sample.image for sample in samples]))


def _answered(network: nn.Module, image: Tensor) -> tuple[Tensor, list[Tensor]]:
    taps, _ = find_taps(network, image[:1])
    with Listening(network, taps) as features:
        output = network(image)
    return output, features


def _norm(gradients: Sequence[Tensor]) -> float:
    return float(torch.stack([gradient.norm() for gradient in gradients]).norm())


def evaluate(results: Results) -> dict[str, Any]:
    """Dice with and without, both discriminators, and the claims; each seed counts with the worst of its looks."""

    def dice(arm: str) -> list[float]:
        return [result["test"]["dice"] for result in results[arm]]

    def over(key: str, of: Callable[[list[float]], float]) -> list[float]:
        return [float(of([one[key] for one in result["after"]["looks"]])) for result in results[MOMENTS]]

    def gap(arm: str) -> list[float]:
        return [result["after"]["looks"][-1]["gap"] for result in results[arm]]

    def leaked(arm: str) -> list[float]:
        return [(result["after"]["leakage"] or {"accuracy": 1.0})["accuracy"] for result in results[arm]]

    used = [
        float(np.mean([not noted["left_out"] for r in result["rounds"] if (noted := r["discriminator"])]))
        for result in results[MOMENTS]
    ]
    gained = [a - b for a, b in zip(dice(MOMENTS), dice(PLAIN), strict=True)]
    return {
        "rows": [
            *(row(arm, "dice", "seen", dice(arm)) for arm in (PLAIN, MOMENTS)),
            *(row(arm, "distance of scanners' means", "last round", gap(arm)) for arm in (PLAIN, MOMENTS)),
            *(row(arm, "scanner told by a fresh probe", "seen", leaked(arm)) for arm in (PLAIN, MOMENTS)),
            row("trained at a site", "scanner named right", "own test samples", over("local_accuracy", min)),
            row("trained on moments", "scanner named right", "fresh samples", over("moments_accuracy", min)),
            row("trained at a site", "gradient beside the task's", "largest look", over("local_gradient", max)),
            row("trained on moments", "gradient beside the task's", "smallest look", over("moments_gradient", min)),
        ],
        "claims": [
            claim(
                "local_accuracy",
                "share of own samples whose scanner a discriminator trained at a site of one names right",
                over("local_accuracy", min),
                at_least=0.99,
            ),
            claim(
                "local_gradient",
                "largest gradient that comes back through it, beside the task's",
                over("local_gradient", max),
                at_most=0.01,
            ),
            claim(
                "moments_accuracy",
                "share of fresh samples that the server's discriminator names right (by chance 0.25)",
                over("moments_accuracy", min),
                at_least=0.5,
            ),
            claim(
                "moments_gradient",
                "smallest gradient that comes back through the server's, beside the task's",
                over("moments_gradient", min),
                at_least=1.0,
            ),
            claim("moments_used", "share of releases of moments after which it was used", used, at_least=1.0),
            claim("moments_change", "Dice that it costs or gains", [abs(g) for g in gained], at_most=0.01),
        ],
    }


COLLAPSE = Experiment(
    name="collapse",
    title="One scanner at each hospital: discriminators there, and one trained on moments",
    seeds=(0, 1, 2, 3, 4),
    n_sites=4,
    arms=arms,
    evaluate=evaluate,
    compares=False,
    after=look,
    snapshots=looks,
)
"""What discriminators learn where every site has one scanner."""
