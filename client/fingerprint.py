"""A site's part of the fingerprint: its training patients in public bins, with noise or as rounded shares.

By the time anything here runs the question is permitted and paid for. Under ``[privacy]`` it is one Gaussian mechanism
over all training patients, of which each moves the sum by a norm of at most that of one vector; a patient whose images
cannot be looked at counts as none, in silence. Without it shares of the patients leave, rounded, and no number of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from client.gate import Release
from client.policy import Cost
from client.privacy import Mechanism, PatientSum, Randomness, SystemRandomness, add_vectors, chosen
from shared_models.fingerprint import LARGEST_NORM, N_VALUES, Study, as_arrays, rounded, vector_of

if TYPE_CHECKING:
    from client.data.cohort import Cohort, Patient
    from client.ledger import Reservation


def fingerprint_releases(
    cohort: Cohort, cost: Cost, reservation: Reservation | None, randomness: Randomness | None = None
) -> list[Release]:
    """The counts of a cohort's training patients, and what they cost where they have noise.

    Parameters
    ----------
    cost
        Of the plan here.
    reservation
        What this question was charged to.
    randomness
        A test's own; the operating system's unless given.
    """
    patients = cohort.patients("train")
    if not cost.is_private:
        total = np.sum([vector_of(_studies(cohort, patient)) for patient in patients], axis=0)
        counts = rounded(total, len(patients), cost.declared_size)
        return [Release("fingerprint", as_arrays(counts))]
    if reservation is None:
        return []
    noised = noised_counts(cohort, cost, randomness or SystemRandomness())
    price = {"epsilon": reservation.epsilon, "delta": cost.delta, "declared_size": cost.declared_size}
    return [Release("cost", price), Release("fingerprint", as_arrays(noised), is_noised=True)]


def noised_counts(cohort: Cohort, cost: Cost, randomness: Randomness) -> NDArray[np.float64]:
    """The sum of the vectors of those training patients whose coin fell so, with noise, over the sampling rate."""
    mechanism = Mechanism(
        sampling_rate=cost.sampling_rate, noise_multiplier=cost.noise_multiplier, clip=LARGEST_NORM, divisor=1
    )
    total, patients, secret = PatientSum(mechanism, N_VALUES), cohort.patients("train"), randomness.secret()
    taking_part = [patients[place] for place in chosen(len(patients), mechanism, randomness)]
    add_vectors(
        total, taking_part, lambda one: torch.from_numpy(vector_of(_studies(cohort, one))), secret, "the fingerprint"
    )
    return np.asarray(total.noised(randomness).numpy()) / cost.sampling_rate


def _studies(cohort: Cohort, patient: Patient) -> list[Study]:
    studies: list[Study] = []
    for volume in map(cohort.volume, patient.studies):
        _, z, y, x = volume.image.shape
        studies.append((volume.spacing_mm, (z, y, x)))
    return studies
