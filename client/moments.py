"""Moments of features: what a site computes for a discriminator that the server trains (``shared_models.moments``).

A forward pass, no training. A patient's samples are drawn as in training, described by the weights that came, averaged for
each scanner of the patient, and clipped; the patient's one vector is added up. Under ``[privacy]`` that is a noised sum
like any other (``privacy``), on the rows of scanners that somebody here declared; those of others are 0 for everybody to
see. Without, a scanner with fewer than ``FEWEST`` patients here is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from client.privacy import Mechanism, PatientSum, add_vectors, patient_seed
from shared_models.adaptation import UNKNOWN, sample_of
from shared_models.moments import FEWEST, TABLE, Layout, Vector
from shared_models.plan import Plan
from shared_models.scanners import ScannerTable
from shared_models.seeds import generator
from shared_models.weights import Weights, load_weights

if TYPE_CHECKING:
    from client.training import Patient, PatientSource, Trainer


def exact_moments(
    trainer: Trainer, weights: Weights, cohort: PatientSource, *, seed: int, site: str, round_: int
) -> Weights:
    """The sums as they are, of scanners with enough patients: for plans without ``[privacy]``."""
    layout, places = Layout.of(trainer.plan), places_of(trainer.plan)
    total, n_patients = np.zeros(layout.shape), np.zeros(layout.n_scanners, np.int64)
    load_weights(trainer.network, weights)
    for patient in cohort.patients("train"):
        rng = generator(seed, site, round_, "moments", patient.key)
        features = features_of(trainer, cohort, patient, rng, places)
        total += layout.patient(features)
        n_patients[list(features)] += 1
    total[n_patients < FEWEST] = 0
    return {TABLE: total.astype(np.float32)}


def noised_moments(trainer: Trainer, weights: Weights, cohort: PatientSource) -> Weights:
    """The sums with the plan's noise; a patient who cannot be described adds nothing, and the log here says so."""
    layout, mechanism = Layout.of(trainer.plan), mechanism_of(trainer.plan)
    table = ScannerTable(trainer.plan.adaptation.scanners if trainer.plan.adaptation else None)
    declared = sorted({table.place(name) for name in cohort.declared_scanners or ()} - {UNKNOWN})
    load_weights(trainer.network, weights)
    total = PatientSum(mechanism, len(declared) * layout.shape[1])
    secret = trainer.randomness.secret()

    def vector_of(patient: Patient) -> torch.Tensor:
        rng = np.random.default_rng(patient_seed(secret, patient.key, "moments"))
        features = features_of(trainer, cohort, patient, rng, declared)
        return torch.from_numpy(layout.patient(features)[declared].ravel())

    add_vectors(total, cohort.patients("train"), vector_of, secret, "moments")
    noised = np.zeros(layout.shape, np.float32)
    noised[declared] = total.noised(trainer.randomness).numpy().reshape(len(declared), layout.shape[1])
    return {TABLE: noised}


def mechanism_of(plan: Plan) -> Mechanism:
    """The public numbers of one release: a Gaussian on the sum over everybody."""
    if plan.adaptation is None or plan.adaptation.moments_noise is None:
        raise ValueError("the plan asks for no noised moments")
    return Mechanism(
        sampling_rate=1.0, noise_multiplier=plan.adaptation.moments_noise, clip=Layout.of(plan).largest, divisor=1
    )


def places_of(plan: Plan) -> range:
    """All places of the plan's table of scanners."""
    return range(Layout.of(plan).n_scanners)


def features_of(
    trainer: Trainer, cohort: PatientSource, patient: Patient, rng: np.random.Generator, places: Iterable[int]
) -> Mapping[int, Vector]:
    """A patient's mean features by scanner, of ``samples_per_patient`` samples of each study; of these places alone."""
    table = ScannerTable(trainer.plan.adaptation.scanners if trainer.plan.adaptation else None)
    found: dict[int, list[Vector]] = {}
    trainer.network.eval()
    for study in patient.studies:
        place = table.place(cohort.scanner(study))
        if place not in places:
            continue
        volume = cohort.volume(study)
        drawn = [sample_of(trainer.task, volume, rng) for _ in range(trainer.plan.training.samples_per_patient)]
        found.setdefault(place, []).extend(trainer.describe_loaded([sample.image for sample in drawn]))
    return {place: np.mean(rows, axis=0) for place, rows in sorted(found.items())}
