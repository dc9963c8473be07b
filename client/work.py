"""What a station computes for a question: releases for the gate, with or without ``[privacy]``.

By the time anything here runs the question is permitted and paid for. Under privacy nothing comes back that is exact: the
weights are those of noised steps, metrics are noised means, and numbers of patients stay here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from client.gate import Release
from client.ledger import Reservation
from client.moments import exact_moments, noised_moments
from client.own import OwnState
from client.policy import Cost
from client.privacy import Mechanism, PatientSum, add_vectors
from client.side import side_of
from client.training import OnSteps, Patient, PatientSource, Split, Trainer
from shared_models.messages import Ask
from shared_models.noised import NoisedMeans
from shared_models.schedule import moments_rounds
from shared_models.volume import Volume
from shared_models.weights import Weights


def exact_releases(
    trainer: Trainer,
    cohort: PatientSource,
    ask: Ask,
    *,
    site: str,
    own: OwnState,
    on_progress: OnSteps | None = None,
) -> list[Release]:
    """Everything a question asks for, as it is: for plans without ``[privacy]``."""
    side = side_of(trainer, ask, own.before(ask.question), site)
    measured = trainer.measure(side.weights, cohort, "test" if ask.question.kind == "test" else "validation")
    metrics = trainer.task.summary(list(measured.values()))
    counts = {"measured": len(measured)}
    if ask.question.kind != "train":
        metrics |= side.own_metrics(cohort) if ask.question.kind == "test" else {}
        return [Release("metric", metrics), Release("count", counts)]
    moments = []
    if (round_ := ask.question.round) in moments_rounds(trainer.plan):
        table = exact_moments(trainer, side.weights, cohort, seed=ask.seed, site=site, round_=round_)
        moments = [Release("moments", table)]
    if trainer.plan.asks_for_moments and not has_references(cohort):
        return [Release("metric", metrics), Release("count", counts | {"trained": 0}), *moments]
    trained = trainer.train(
        side.weights,
        cohort,
        seed=ask.seed,
        site=site,
        round_=round_,
        adversary=ask.adversary,
        discriminator=ask.discriminator,
        correction=side.correction,
        on_progress=on_progress,
    )
    if kept := side.kept(trained.update, cohort, trained.n_patients):
        own.keep(ask.question, kept)
    return [
        Release("update", side.leaving(trained.update)),
        Release("metric", metrics | {"training_loss": trained.loss}),
        Release("count", counts | {"trained": trained.n_patients}),
        *moments,
    ]


def has_references(cohort: PatientSource) -> bool:
    """Whether there is anything to train on: a study with a reference."""
    return any(not cohort.is_unlabelled(study) for patient in cohort.patients("train") for study in patient.studies)


def noised_releases(
    trainer: Trainer,
    cohort: PatientSource,
    ask: Ask,
    *,
    site: str,
    own: OwnState,
    cost: Cost,
    reservation: Reservation | None,
    on_progress: OnSteps | None = None,
) -> list[Release]:
    """What a plan with ``[privacy]`` pays for: noised metrics and moments where they are due, noised steps where it trains.

    Parameters
    ----------
    site
        Its name.
    own
        What it keeps of the run for itself.
    cost
        Of the plan here.
    reservation
        What this question was charged to; None for one that costs nothing, and then nothing is released.
    """
    if reservation is None:
        return []
    question = ask.question
    side = side_of(trainer, ask, own.before(question), site)
    price = {"epsilon": reservation.epsilon, "delta": cost.delta, "declared_size": cost.declared_size}
    if cost.image_epsilon is not None:
        price["image_epsilon"] = cost.image_epsilon
    releases = [Release("cost", price)]
    if question.kind == "test":
        metrics = noised_metrics(trainer, side.weights, cohort, "test", cost.declared_size)
        return [*releases, Release("metric", metrics, is_noised=True)]
    if cost.has_metrics(question.round):
        metrics = noised_metrics(trainer, side.weights, cohort, "validation", cost.declared_size)
        releases.append(Release("metric", metrics, is_noised=True))
    if question.round in cost.moments_rounds:
        releases.append(Release("moments", noised_moments(trainer, side.weights, cohort), is_noised=True))
    update = trainer.train_private(
        side.weights,
        cohort,
        round_=question.round,
        declared_size=cost.declared_size,
        noise_multiplier=cost.noise_multiplier,
        correction=side.correction,
        discriminator=ask.discriminator,
        on_progress=on_progress,
    )
    if kept := side.kept(update, cohort, 0):
        own.keep(question, kept)
    return [*releases, Release("update", side.leaving(update), is_noised=True)]


def noised_metrics(
    trainer: Trainer, weights: Weights, cohort: PatientSource, split: Literal["validation", "test"], declared_size: int
) -> dict[str, float]:
    """Means over a split's patients with the plan's noise; one who cannot be measured counts as none at all."""
    means = NoisedMeans.of(trainer.task, split, declared_size)
    mechanism = Mechanism(
        sampling_rate=1.0, noise_multiplier=means.noise_multiplier, clip=means.clip, divisor=means.n_patients
    )
    total = PatientSum(mechanism, len(means.ranges))
    secret = trainer.randomness.secret()

    def vector_of(patient: Patient) -> torch.Tensor:
        measured = trainer.measure(weights, _Only(cohort, patient), split)[patient.key]
        return torch.from_numpy(means.vector(trainer.task.summary([measured])))

    add_vectors(total, cohort.patients(split), vector_of, secret, f"the {split} metrics")
    return means.means(total.noised(trainer.randomness).numpy())


@dataclass(frozen=True)
class _Only:
    """A cohort as if it had one patient."""

    cohort: PatientSource
    patient: Patient

    def patients(self, split: Split) -> Sequence[Patient]:
        return [self.patient]

    def volume(self, study: str) -> Volume:
        return self.cohort.volume(study)

    def scanner(self, study: str) -> str | None:
        return self.cohort.scanner(study)

    def is_unlabelled(self, study: str) -> bool:
        return self.cohort.is_unlabelled(study)

    def category(self, study: str) -> int | None:
        return self.cohort.category(study)

    @property
    def declared_scanners(self) -> Sequence[str] | None:
        return self.cohort.declared_scanners
