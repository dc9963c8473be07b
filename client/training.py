"""The local loop: train from incoming weights, measure weights on a split.

One :class:`Trainer` holds one network and is reused for every question of a plan, so that a process which serves many
sites (a simulation's worker) needs memory for one. All randomness derives from (seed, site, round, ...).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared_models.plan import Plan
from shared_models.seeds import derive, generator
from shared_models.task import Sample, Task, task_for
from shared_models.volume import Volume
from shared_models.weights import Weights, load_weights, weights_of

log = logging.getLogger(__name__)

Split = Literal["train", "validation", "test"]

OnSteps = Callable[[int, int], None]
"""Told (steps done, steps of the round) after each step."""


class Patient(Protocol):
    """One person of a cohort."""

    @property
    def key(self) -> str:
        """Keyed hash; the same person has the same key in every plan."""

    @property
    def studies(self) -> Sequence[str]:
        """Keys of this person's studies, sorted."""


class PatientSource(Protocol):
    """What the loop needs of a cohort."""

    def patients(self, split: Split) -> Sequence[Patient]:
        """The patients of a split, always in the same order."""

    def volume(self, study: str) -> Volume:
        """The prepared volume of a study."""


@dataclass(frozen=True)
class Trained:
    """The outcome of one round of local training."""

    update: Weights
    loss: float
    """Mean training loss over all steps of the round."""

    n_patients: int


@dataclass
class Clock:
    """CPU seconds spent in the network's own work, by kind; what the benchmark sets everything else against."""

    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "measure": 0.0})

    def add(self, kind: str, since: float) -> None:
        """Count the CPU time of this process since ``since``."""
        self.seconds[kind] += time.process_time() - since


class Trainer:
    """One network with its task, on one device.

    Parameters
    ----------
    plan
        The plan; its seed-independent part of everything.
    device
        A torch device name, or ``"auto"`` for a GPU where there is one.
    """

    def __init__(self, plan: Plan, device: str = "auto") -> None:
        self.plan = plan
        self.device = torch.device(choose_device(device))
        self.task: Task = task_for(plan)
        self.network = self.task.build_network().to(self.device)
        self.clock = Clock()

    def train(
        self,
        weights: Weights,
        cohort: PatientSource,
        *,
        seed: int,
        site: str,
        round_: int,
        on_progress: OnSteps | None = None,
    ) -> Trained:
        """Train for the plan's epochs from ``weights`` and return new minus old.

        The optimiser starts afresh, as in federated averaging (McMahan et al. 2017, arXiv:1602.05629). With
        ``proximal_mu`` every step also pulls back towards ``weights`` (FedProx, Li et al. 2020, arXiv:1812.06127, eq. 2).
        ``on_progress`` is told after each step and changes nothing.
        """
        since = time.process_time()
        load_weights(self.network, weights)
        self.network.train()
        torch.manual_seed(derive(seed, site, round_, "torch"))
        anchors = [p.detach().clone() for p in self.network.parameters()] if self.plan.strategy.proximal_mu else []
        optimizer = build_optimizer(self.plan, self.network, round_)
        patients = cohort.patients("train")
        n_steps = self._n_steps(len(patients))
        losses: list[float] = []
        for epoch in range(self.plan.training.epochs):
            for samples in self._batches(cohort, patients, generator(seed, site, round_, epoch)):
                losses.append(self._step(optimizer, anchors, samples))
                if on_progress is not None:
                    on_progress(len(losses), n_steps)
        after = weights_of(self.network)
        update = {name: after[name] - weights[name] for name in after}
        self.clock.add("train", since)
        return Trained(update, float(np.mean(losses)) if losses else 0.0, len(patients))

    def measure(self, weights: Weights, cohort: PatientSource, split: Split) -> dict[str, dict[str, float]]:
        """Each metric for each patient of a split: patient key to metrics, averaged over the patient's studies."""
        since = time.process_time()
        load_weights(self.network, weights)
        self.network.eval()
        measured = {}
        for patient in cohort.patients(split):
            per_study = []
            for study in patient.studies:
                volume = cohort.volume(study)
                per_study.append(self.task.measure(self.predict_loaded(volume), volume))
            measured[patient.key] = mean_metrics(per_study)
        self.clock.add("measure", since)
        return measured

    def predict_loaded(self, volume: Volume) -> NDArray[np.generic]:
        """Predict one volume with the weights that are in the network now."""
        with torch.inference_mode(), self._precision():
            return self.task.predict(self.network, volume, self.device)

    def _step(self, optimizer: torch.optim.Optimizer, anchors: list[Tensor], samples: list[Sample]) -> float:
        image = torch.from_numpy(np.stack([s.image for s in samples])).to(self.device)
        target = torch.from_numpy(np.stack([s.target for s in samples])).to(self.device)
        optimizer.zero_grad(set_to_none=True)
        with self._precision():
            output = self.network(image)
        loss = self.task.loss(output.float(), target)
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter, anchor in zip(self.network.parameters(), anchors, strict=False):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=self.plan.strategy.proximal_mu or 0.0)
        optimizer.step()
        return float(loss.detach())

    def _batches(
        self, cohort: PatientSource, patients: Sequence[Patient], rng: np.random.Generator
    ) -> Iterator[list[Sample]]:
        """Every patient ``samples_per_patient`` times in random order; the last batch may be smaller."""
        visits = np.repeat(np.arange(len(patients)), self.plan.training.samples_per_patient)
        rng.shuffle(visits)
        size = self.plan.training.batch_size
        for start in range(0, len(visits), size):
            yield [self._draw(cohort, patients[i], rng) for i in visits[start : start + size]]

    def _n_steps(self, n_patients: int) -> int:
        """Steps of one round."""
        training = self.plan.training
        return training.epochs * math.ceil(n_patients * training.samples_per_patient / training.batch_size)

    def _draw(self, cohort: PatientSource, patient: Patient, rng: np.random.Generator) -> Sample:
        study = patient.studies[int(rng.integers(len(patient.studies)))]
        return self.task.draw(cohort.volume(study), rng)

    def _precision(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.plan.training.precision == "bfloat16"
        )


@lru_cache(maxsize=1)
def resident_trainer(plan: Plan, device: str) -> Trainer:
    """The one trainer of this process; asking for another plan replaces it."""
    return Trainer(plan, device)


def build_optimizer(plan: Plan, network: torch.nn.Module, round_: int) -> torch.optim.Optimizer:
    """The optimiser that the plan names, fresh, with the learning rate of this round."""
    rate, decay = learning_rate(plan, round_), plan.training.weight_decay
    match plan.training.optimizer:
        case "adam":
            return torch.optim.Adam(network.parameters(), lr=rate, weight_decay=decay)
        case "adamw":
            return torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=decay)
        case "sgd":
            return torch.optim.SGD(network.parameters(), lr=rate, weight_decay=decay)


def learning_rate(plan: Plan, round_: int) -> float:
    """The learning rate of a round; constant within it.

    With ``schedule = "cosine"`` it falls along half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983, without
    restarts) from the plan's value in round 1 to almost nothing in the last.
    """
    if plan.training.schedule == "constant":
        return plan.training.learning_rate
    return plan.training.learning_rate * 0.5 * (1 + math.cos(math.pi * (round_ - 1) / plan.rounds))


def choose_device(wanted: str) -> str:
    """``wanted``, or the first GPU for ``"auto"`` where there is one, else the CPU."""
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def mean_metrics(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over ``rows``, which all have the same; empty for no rows."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} if rows else {}
