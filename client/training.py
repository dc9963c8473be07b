"""The local loop: train from incoming weights, measure weights on a split.

One :class:`Trainer` holds one network and is reused for every question of a plan, so that a process which serves many
sites (a simulation's worker) needs memory for one. Without ``[privacy]`` all randomness derives from (seed, site, round,
...); with it, none does: who takes part, their augmentation and the noise come from the operating system.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.network_contract import check_network
from client.privacy import Mechanism, PatientSum, Randomness, SystemRandomness, add_vectors, chosen, patient_seed
from client.steering import Steering
from shared_models.adaptation import UNKNOWN, Adapted, sample_of, strength_at
from shared_models.moments import Confusion, describe
from shared_models.plan import Plan, PrivacyTable
from shared_models.scanners import ScannerTable
from shared_models.schedule import learning_rate, local_steps
from shared_models.seeds import derive, generator
from shared_models.task import Sample, Task, mean_metrics, task_for
from shared_models.volume import Volume
from shared_models.weights import Weights, load_weights, weights_of

if TYPE_CHECKING:
    from client.image_privacy import ImageGradients

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

    def scanner(self, study: str) -> str | None:
        """What a study was made with, as its header says; None where it says nothing."""

    def is_unlabelled(self, study: str) -> bool:
        """Whether a study has no reference."""

    def category(self, study: str) -> int | None:
        """The label of a study as a whole; None where it has none."""

    @property
    def declared_scanners(self) -> Sequence[str] | None:
        """The scanners that the hospital has declared, which are public; None where it declared none."""


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
    randomness
        Where private sampling and noise come from: the operating system, unless a test or the simulation, which build
        their trainers themselves, give a source of their own. No plan, setting or variable does.
    """

    def __init__(self, plan: Plan, device: str = "auto", *, randomness: Randomness | None = None) -> None:
        self.plan = plan
        self.randomness: Randomness = randomness or SystemRandomness()
        self.device = torch.device(choose_device(device))
        self.task: Task = task_for(plan)
        self.network = self.task.build_network().to(self.device)
        self.clock = Clock()
        self._adversary: Adversary | None = None
        self._balance: Mapping[str, float] = {}
        self._is_checked = False

    def train(
        self,
        weights: Weights,
        cohort: PatientSource,
        *,
        seed: int,
        site: str,
        round_: int,
        correction: Weights | None = None,
        adversary: float = 1.0,
        discriminator: Weights | None = None,
        on_progress: OnSteps | None = None,
    ) -> Trained:
        """Train for the plan's epochs from ``weights`` and return new minus old.

        The optimiser starts afresh, as in federated averaging (McMahan et al. 2017, arXiv:1602.05629). With
        ``proximal_mu`` every step also pulls back towards ``weights``, and a ``correction`` is added to every gradient
        (``steering``). ``adversary`` is what the run's automatic stop has left of it (``adaptation``), ``discriminator``
        what the server has trained on moments. ``on_progress`` is told after each step and changes nothing. A plan with
        ``[privacy]`` is a ValueError here.
        """
        if self.plan.privacy is not None:
            raise ValueError("a plan with [privacy] trains through train_private, or not at all")
        steering = self._steering(weights, correction)
        opponent = Adversary.of(self.plan, cohort, round_, adversary, discriminator)
        return self._train(
            weights, cohort, steering, seed=seed, site=site, round_=round_, opponent=opponent, on_progress=on_progress
        )

    def train_own(
        self,
        weights: Weights,
        cohort: PatientSource,
        *,
        towards: Weights,
        strength: float,
        seed: int,
        site: str,
        round_: int,
    ) -> Weights:
        """A model for this site's own use, trained from ``weights`` and drawn to ``towards``; it never leaves.

        No noise is added, and no discriminator is opposed, with or without ``[privacy]``, under which passes and batches
        are those of a plan that says nothing about them.
        """
        steering = Steering(self.network, towards=towards, strength=strength, correction={})
        update = self._train(weights, cohort, steering, seed=seed, site=f"{site}/own", round_=round_).update
        return {name: weights[name] + update[name] for name in update}

    def _train(
        self,
        weights: Weights,
        cohort: PatientSource,
        steering: Steering,
        *,
        seed: int,
        site: str,
        round_: int,
        opponent: Adversary | None = None,
        on_progress: OnSteps | None = None,
    ) -> Trained:
        since = time.process_time()
        load_weights(self.network, weights)
        self.network.train()
        torch.manual_seed(derive(seed, site, round_, "torch"))
        optimizer = build_optimizer(self.plan, self.network, round_)
        patients = cohort.patients("train")
        self._adversary = opponent
        self._balance = balance_of(cohort, patients) if self.plan.training.balanced else {}
        n_steps = local_steps(self.plan, len(patients))
        losses: list[float] = []
        for epoch in range(self.plan.training.epochs):
            for samples in self._batches(cohort, patients, generator(seed, site, round_, epoch)):
                losses.append(self._step(optimizer, steering, samples))
                if on_progress is not None:
                    on_progress(len(losses), n_steps)
        after = weights_of(self.network)
        update = {name: after[name] - weights[name] for name in after}
        if self._adversary is not None:
            update = self._adversary.bounded(update)
        self.clock.add("train", since)
        return Trained(update, float(np.mean(losses)) if losses else 0.0, len(patients))

    def train_private(
        self,
        weights: Weights,
        cohort: PatientSource,
        *,
        round_: int,
        declared_size: int,
        noise_multiplier: float,
        correction: Weights | None = None,
        discriminator: Weights | None = None,
        on_progress: OnSteps | None = None,
    ) -> Weights:
        """Train for the plan's private steps from ``weights`` and return new minus old, and nothing else.

        The weights after each step are those of a Poisson-subsampled Gaussian mechanism (``privacy``): all
        ``steps_per_round`` steps are taken, also those in which nobody takes part. Weight decay, the proximal term,
        a ``correction`` and the optimiser's state act on the noised gradient. A patient who cannot be read, does not fit
        into memory one sample at a time, or has a gradient that is not finite gives zero, and the log here says so.

        Parameters
        ----------
        weights
            Where to start.
        cohort
            Its training patients are sampled.
        round_
            Round of the run, for the schedule of the learning rate.
        declared_size
            The public number of patients (or images) that the hospital declared.
        noise_multiplier
            Noise over clip: the plan's, or what its epsilon gave for this declared size.
        correction
            Added to every noised gradient; it must not depend on patients but through what has left with noise.
        discriminator
            Frozen, from the server, which knows of patients what has left with noise; empty or None for none.
        on_progress
            Told (steps done, steps of the round) after each step.

        Raises
        ------
        FederadError
            M216 if the network has a part through which patients meet.
        ValueError
            If the plan has no ``[privacy]``, or another noise multiplier than this one.
        """
        privacy = self.plan.privacy
        if privacy is None or privacy.noise_multiplier not in (None, noise_multiplier):
            raise ValueError(f"noise_multiplier={noise_multiplier} is not what the plan says")
        since = time.process_time()
        self._check_once()
        mechanism = Mechanism.of(privacy, declared_size=declared_size, noise_multiplier=noise_multiplier)
        load_weights(self.network, weights)
        self.network.train()
        steering = self._steering(weights, correction)
        optimizer = build_optimizer(self.plan, self.network, round_)
        self._adversary = Adversary.of(self.plan, cohort, round_, discriminator=discriminator)
        with self._gradients(privacy, cohort) as gradients:
            for step in range(privacy.steps_per_round):
                total = PatientSum(mechanism, sum(p.numel() for p in self.network.parameters()), self.device)
                gradients.add_to(total, chosen(len(gradients), mechanism, self.randomness), self.randomness.secret())
                self._private_step(optimizer, steering, total.noised(self.randomness))
                if on_progress is not None:
                    on_progress(step + 1, privacy.steps_per_round)
        after = weights_of(self.network)
        self.clock.add("train", since)
        return {name: after[name] - weights[name] for name in after}

    def measure(self, weights: Weights, cohort: PatientSource, split: Split) -> dict[str, dict[str, float]]:
        """What the task measures of each patient of a split: patient key to numbers, means over the patient's studies."""
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

    def describe_loaded(self, images: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
        """Features of images with the weights that are in the network now, as moments take them: ``(image, d)``."""
        with torch.inference_mode(), self._precision():
            found = describe(self.network, torch.from_numpy(np.stack(images)).to(self.device))
        return np.asarray(found.cpu().numpy(), np.float64)

    def _steering(self, weights: Weights, correction: Weights | None) -> Steering:
        strength = self.plan.strategy.proximal_mu or 0.0
        return Steering(self.network, towards=weights, strength=strength, correction=correction or {})

    def _step(self, optimizer: torch.optim.Optimizer, steering: Steering, samples: list[Sample]) -> float:
        image = torch.from_numpy(np.stack([s.image for s in samples])).to(self.device)
        target = torch.from_numpy(np.stack([s.target for s in samples])).to(self.device)
        optimizer.zero_grad(set_to_none=True)
        with self._precision():
            output = answer_of(self.network, image, self._adversary)
        loss = batch_loss(self.task, output.float(), target, samples)
        if self._adversary is not None:
            self._adversary.oppose(self.network, samples, target)
        loss.backward()  # type: ignore[no-untyped-call]
        steering.act()
        optimizer.step()
        return float(loss.detach())

    def _private_step(self, optimizer: torch.optim.Optimizer, steering: Steering, noised: Tensor) -> None:
        """One step of the optimiser on a noised gradient ``(d,)``; what else acts on the weights acts after the noise."""
        parameters = list(self.network.parameters())
        parts = torch.split(noised.to(parameters[0]), [p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        steering.act()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _gradients(self, privacy: PrivacyTable, cohort: PatientSource) -> PatientGradients | ImageGradients:
        """Whose gradients are summed: the unit that the plan protects."""
        parts = (self.network, self.task, cohort, self._precision)
        if privacy.unit == "patient":
            return PatientGradients(*parts, self._adversary)
        from client.image_privacy import ImageGradients  # Opacus takes seconds to import

        return ImageGradients(*parts)

    def _check_once(self) -> None:
        if not self._is_checked:
            torch.manual_seed(0)
            check_network(self.task.build_network().to(self.device), self.task)  # never on weights that somebody sent
            self._is_checked = True

    def _batches(
        self, cohort: PatientSource, patients: Sequence[Patient], rng: np.random.Generator
    ) -> Iterator[list[Sample]]:
        """Every patient ``samples_per_patient`` times in random order; the last batch may be smaller."""
        visits = np.repeat(np.arange(len(patients)), self.plan.training.samples_per_patient)
        rng.shuffle(visits)
        size = self.plan.training.batch_size
        for start in range(0, len(visits), size):
            yield [self._draw(cohort, patients[i], rng) for i in visits[start : start + size]]

    def _draw(self, cohort: PatientSource, patient: Patient, rng: np.random.Generator) -> Sample:
        study = patient.studies[int(rng.integers(len(patient.studies)))]
        sample = replace(sample_of(self.task, cohort.volume(study), rng), weight=self._balance.get(study, 1.0))
        return sample if self._adversary is None else self._adversary.placed(sample, study)

    def _precision(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.plan.training.precision == "bfloat16"
        )


@dataclass(frozen=True)
class Adversary:
    """What opposes the features at one site in one round."""

    places: Mapping[str, int]
    """Place of each training study's scanner in the plan's table; empty where none is asked for."""

    strength: float
    """Weight of its gradient."""

    has_references: bool
    """Whether any training study has a reference."""

    ratio: float
    """The plan's ``gradient_ratio``."""

    among: tuple[int, ...] = ()
    """Places of the scanners that the site has; those that it declared, under ``[privacy]``."""

    confusion: Confusion | None = None
    """With the discriminator that the server has trained, in plans that ask for moments."""

    @classmethod
    def of(
        cls,
        plan: Plan,
        cohort: PatientSource,
        round_: int,
        left: float = 1.0,
        discriminator: Weights | None = None,
    ) -> Self | None:
        """The adversary of a plan; None where it has none, where the site cannot tell scanners apart, or where the server
        has not trained a discriminator that it asks for.

        A discriminator that sees one scanner says its name whatever it is shown, and what opposes it learns nothing. Under
        ``[privacy]`` the scanners that the hospital declared decide, since what its patients were scanned with is not
        public; what their own headers say goes into their own gradients alone.
        """
        if not plan.is_adversarial or plan.adaptation is None:
            return None
        studies = [study for patient in cohort.patients("train") for study in patient.studies]
        has_references = plan.privacy is not None or any(not cohort.is_unlabelled(study) for study in studies)
        strength = left * strength_at(plan.adaptation, round_, plan.rounds)
        ratio = plan.adaptation.gradient_ratio
        if plan.asks_for_moments:
            if not discriminator or strength == 0:
                return None
            return cls({}, strength, has_references, ratio, confusion=Confusion(discriminator, plan))
        table = ScannerTable(plan.adaptation.scanners)
        places = {study: table.place(cohort.scanner(study)) for study in studies}
        if plan.privacy is None:
            told_apart = {place for place in places.values() if place != UNKNOWN}
        else:
            told_apart = {table.place(name) for name in cohort.declared_scanners or ()} - {UNKNOWN}
        if len(told_apart) < 2:
            log.warning("this site has one scanner of the plan's table and trains without a discriminator")
            return None
        known = {study: place for study, place in places.items() if place in told_apart}
        return cls(known, strength, has_references, ratio, tuple(sorted(told_apart)))

    def placed(self, sample: Sample, study: str) -> Sample:
        """The sample with the place of its scanner, where that is asked for."""
        return replace(sample, scanner=self.places.get(study, UNKNOWN))

    def oppose(self, network: torch.nn.Module, samples: Sequence[Sample], target: Tensor, share: float = 1.0) -> None:
        """Let the next backward pass also move features against the discriminator."""
        has_reference = torch.tensor([sample.has_reference for sample in samples], device=target.device)
        if self.confusion is not None:
            self.confusion.oppose(has_reference, strength=self.strength, share=share)
        elif isinstance(network, Adapted):
            network.oppose(
                torch.tensor([sample.scanner for sample in samples], device=target.device),
                target,
                has_reference,
                strength=self.strength,
                among=self.among,
                share=share,
            )

    def bounded(self, update: Weights) -> Weights:
        """The update of a site without any reference, where no gradient of the task bounds the reversed one: shortened to
        ``gradient_ratio``, since an optimiser such as Adam makes long steps of short gradients."""
        if self.has_references:
            return update
        return {name: array * np.float32(self.ratio) for name, array in update.items()}


def answer_of(network: torch.nn.Module, image: Tensor, adversary: Adversary | None) -> Tensor:
    """What a network in training answers, heard by whoever will oppose its features."""
    if adversary is not None and adversary.confusion is not None:
        return adversary.confusion.answer(network, image)
    output: Tensor = network(image)
    return output


def batch_loss(task: Task, output: Tensor, target: Tensor, samples: Sequence[Sample]) -> Tensor:
    """The task's loss of a batch, each sample with its weight; those without a reference add nothing to it and count in
    its mean."""
    if all(sample.has_reference and sample.weight == 1 for sample in samples):
        return task.loss(output, target)
    groups: dict[float, list[int]] = {}
    for i, sample in enumerate(samples):
        if sample.has_reference:
            groups.setdefault(sample.weight, []).append(i)
    total = 0.0 * output.sum()
    for weight, group in groups.items():
        total = total + task.loss(output[group], target[group]) * (weight * len(group) / len(samples))
    return total


def balance_of(cohort: PatientSource, patients: Sequence[Patient]) -> dict[str, float]:
    """The weight of each labelled study with which all labels that occur with a scanner count alike among its studies.

    A scanner keeps its share of the site, and the mean weight is 1: what goes with a scanner no longer goes with a label
    (the sites' own reweighting of groups, after Idrissi et al. 2022, arXiv:2110.14503).
    """
    groups = {
        study: (cohort.scanner(study), cohort.category(study))
        for patient in patients
        for study in patient.studies
        if cohort.category(study) is not None
    }
    counts = Counter(groups.values())
    of_scanner = Counter(scanner for scanner, _ in groups.values())
    n_labels = Counter(scanner for scanner, _ in counts)
    return {
        study: of_scanner[scanner] / (n_labels[scanner] * counts[scanner, label])
        for study, (scanner, label) in groups.items()
    }


class PatientGradients:
    """The mean gradient of each training patient, one backward pass at a time.

    It is taken over ``samples_per_patient`` samples and ``views`` random views of each, drawn with randomness of this
    patient and step alone; a view is another random window and mirroring of the same study. Nothing here depends on who
    else takes part. Numbers of 16 bits, where the plan asks for them, have the range of 32 bits (bfloat16), so no
    scale of the loss is needed, and none could depend on a patient.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        task: Task,
        cohort: PatientSource,
        precision: Callable[[], AbstractContextManager[object]],
        adversary: Adversary | None = None,
    ) -> None:
        self._network, self._task, self._cohort, self._precision = network, task, cohort, precision
        self._adversary = adversary
        self._patients = cohort.patients("train")
        self._parameters = list(network.parameters())
        self._flat: Tensor | None = None
        self._n_samples = task.plan.training.samples_per_patient
        self._n_views = task.plan.privacy.views if task.plan.privacy is not None else 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._network.zero_grad(set_to_none=True)

    def __len__(self) -> int:
        """Patients there are; this number never leaves."""
        return len(self._patients)

    def add_to(self, total: PatientSum, indices: Sequence[int], secret: bytes) -> None:
        """Add the gradients of these patients to the sum of a step."""
        taking_part = [self._patients[i] for i in indices]
        add_vectors(total, taking_part, lambda one: self._gradient(one, secret), secret, "this step")

    def _gradient(self, patient: Patient, secret: bytes) -> Tensor:
        """All parameters one after the other, ``(d,)``; in halves, quarters, ... where memory does not suffice."""
        samples = self._draw(patient, np.random.default_rng(patient_seed(secret, patient.key, "augmentation")))
        at_once = len(samples)
        while True:
            torch.manual_seed(patient_seed(secret, patient.key, "torch"))
            try:
                return self._mean_gradient(samples, at_once)
            except (MemoryError, RuntimeError) as error:
                if at_once == 1 or not is_out_of_memory(error):
                    raise
            at_once = (at_once + 1) // 2
            if self._parameters[0].is_cuda:
                torch.cuda.empty_cache()

    def _mean_gradient(self, samples: Sequence[Sample], at_once: int) -> Tensor:
        gradient = self._flat_gradient()
        like = self._parameters[0]
        for start in range(0, len(samples), at_once):
            part = samples[start : start + at_once]
            image = torch.from_numpy(np.stack([s.image for s in part])).to(like)
            target = torch.from_numpy(np.stack([s.target for s in part])).to(like.device)
            with self._precision():
                output = answer_of(self._network, image, self._adversary)
            loss = self._task.loss(output.to(like), target) * (len(part) / len(samples))
            if self._adversary is not None:
                self._adversary.oppose(self._network, part, target, len(part) / len(samples))
            loss.backward()  # type: ignore[no-untyped-call]
        if self._adversary is not None and isinstance(self._network, Adapted):
            self._network.bound_discriminator()
        return gradient

    def _flat_gradient(self) -> Tensor:
        """Zeros ``(d,)`` that backward passes fill: every parameter's gradient is a view of its part."""
        if self._flat is None:
            self._flat = torch.zeros_like(torch.nn.utils.parameters_to_vector(self._parameters))
        parts = torch.split(self._flat.zero_(), [p.numel() for p in self._parameters])
        for parameter, part in zip(self._parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return self._flat

    def _draw(self, patient: Patient, rng: np.random.Generator) -> list[Sample]:
        samples = []
        for _ in range(self._n_samples):
            study = patient.studies[int(rng.integers(len(patient.studies)))]
            volume = self._cohort.volume(study)
            drawn = [sample_of(self._task, volume, rng) for _ in range(self._n_views)]
            samples += drawn if self._adversary is None else [self._adversary.placed(one, study) for one in drawn]
        return samples


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or, where torch has no type for it, on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


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
            momentum = plan.training.momentum or 0.0
            return torch.optim.SGD(
                network.parameters(), lr=rate, momentum=momentum, nesterov=momentum > 0, weight_decay=decay
            )


def choose_device(wanted: str) -> str:
    """``wanted``, or the first GPU for ``"auto"`` where there is one, else the CPU."""
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"
