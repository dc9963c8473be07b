"""What a federation is compared with: one model of all data in one place, and each hospital's own model.

All start from the same weights, take as many passes over as many patients with the same loop, and keep the best round by
validation or the last, as the plan says for the federation. Only where the data lies differs.

Under ``[privacy]``, where all of this is for emulated hospitals only, a hospital's own model takes the steps that the
hospital took in the federation, with the same noise: alone, at the same epsilon. The central model takes the same clipped
steps over everybody's patients, as many of them in each as all hospitals draw together, without noise: the reference that
shows what noise and distance cost, and protects nobody. The clip stays, since the plan's learning rate belongs to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from client.data.cohort import Cohort, Patient
from client.own import own_model
from client.privacy import SystemRandomness
from client.site import is_emulated
from client.training import Split, Trainer, resident_trainer
from shared_models.local_layers import staying
from shared_models.plan import Plan
from shared_models.seeds import derive
from shared_models.start import first_weights
from shared_models.task import Picture, Task, mean_metrics
from shared_models.volume import Volume
from shared_models.weights import Weights, averaged, decode, encode, load_weights
from simulation.processes import process_pool
from simulation.stations import SiteFolder, cohort_of, open_station

DEVICE = "auto"

N_CARDS = 1
"""Test patients of a site on whom a model's stability is looked at: a search for the worst takes as long as training."""
N_RESAMPLES = 1000
"""Sets of patients that are drawn for an interval."""

N_SUMMARIES = 300
"""The same where a metric is computed anew from each set, which takes longer."""


class PooledCohort:
    """The patients of several sites as if they lay in one place."""

    def __init__(self, cohorts: Sequence[Cohort]) -> None:
        self._cohorts = cohorts
        self._home = {
            study: cohort
            for cohort in cohorts
            for split in ("train", "validation", "test")
            for patient in cohort.patients(split)
            for study in patient.studies
        }

    def patients(self, split: Split) -> tuple[Patient, ...]:
        """All sites' patients of a split, site by site."""
        return tuple(patient for cohort in self._cohorts for patient in cohort.patients(split))

    def volume(self, study: str) -> Volume:
        """A volume from the site that has it."""
        return self._home[study].volume(study)

    def scanner(self, study: str) -> str | None:
        """What a study was made with."""
        return self._home[study].scanner(study)

    def is_unlabelled(self, study: str) -> bool:
        """Whether a study has no reference."""
        return self._home[study].is_unlabelled(study)

    def category(self, study: str) -> int | None:
        """The label of a study as a whole."""
        return self._home[study].category(study)

    @property
    def declared_scanners(self) -> tuple[str, ...] | None:
        """All that the sites declared."""
        return tuple(name for cohort in self._cohorts for name in cohort.declared_scanners or ()) or None


class NoNoise(SystemRandomness):
    """The operating system's coins, and zero for noise: what is trained with it has no privacy at all."""

    def gaussian(self, n: int, sigma: float) -> NDArray[np.int64]:
        """``n`` zeros."""
        return np.zeros(n, np.int64)


@dataclass(frozen=True)
class Steps:
    """One way to take a round's steps: (weights, cohort, round, name of who trains) to the update."""

    trainer: Trainer
    declared_size: int = 0
    """Under ``[privacy]``: the public number of patients that steps draw from."""

    noise_multiplier: float = 0.0
    """Under ``[privacy]``: the noise, or only the unit of the sum's grid where there is none (:class:`NoNoise`)."""

    @classmethod
    def of(cls, plan: Plan, home: Sequence[SiteFolder]) -> Self:
        """How the models of one hospital, or of all in one place, are trained.

        Raises
        ------
        ValueError
            Under ``[privacy]``, if a simulation did not write one of these sites' images.
        """
        if plan.privacy is None:
            return cls(resident_trainer(plan, DEVICE))
        _require_emulated(home)
        costs = [cost for site in home if (cost := open_station(site.station).cost(plan)) is not None]
        if len(home) == 1:
            return cls(resident_trainer(plan, DEVICE), costs[0].declared_size, costs[0].noise_multiplier)
        together = plan.privacy.model_copy(
            update={
                "patients_per_step": len(home) * plan.privacy.patients_per_step,
                "epsilon": None,
                "noise_multiplier": max(cost.noise_multiplier for cost in costs),
            }
        )
        trainer = Trainer(plan.model_copy(update={"privacy": together}), DEVICE, randomness=NoNoise())
        return cls(trainer, sum(cost.declared_size for cost in costs), max(cost.noise_multiplier for cost in costs))

    def update(self, weights: Weights, cohort: Cohort | PooledCohort, *, round_: int, seed: int, name: str) -> Weights:
        """New minus old weights of one round."""
        if self.trainer.plan.privacy is None:
            return self.trainer.train(weights, cohort, seed=seed, site=name, round_=round_).update
        return self.trainer.train_private(
            weights,
            cohort,
            round_=round_,
            declared_size=self.declared_size,
            noise_multiplier=self.noise_multiplier,
        )


@dataclass(frozen=True)
class Row:
    """One method of a comparison."""

    method: str
    per_site: dict[str, dict[str, float]]
    """Test metrics on each site's test patients; sites without any are left out."""

    interval: dict[str, list[float]] = field(default_factory=dict)
    """Of the headline metric at each site: 95 % of what patients like these might have given (:func:`interval_of`)."""

    def mean(self, metric: str) -> float | None:
        """Mean over the sites that have it, each counting the same; None if none has."""
        values = [metrics[metric] for metrics in self.per_site.values() if metric in metrics]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class TestPatient:
    """How the shared model did on one test patient, and a picture of it; stays on this machine."""

    site: str
    metrics: dict[str, float]
    study: str


def train_alone(
    steps: Steps, cohort: Cohort | PooledCohort, plan: Plan, *, seed: int, name: str, start: Path | None = None
) -> Weights:
    """The weights that the plan's ``release`` chooses among its rounds on one cohort; the last without validation."""
    trainer = steps.trainer
    weights = first_weights(plan, seed, start)
    best, best_value = weights, float("-inf")
    chooses = plan.strategy.release == "best" and bool(cohort.patients("validation"))
    average: Weights | None = None
    for round_ in range(1, plan.rounds + 1):
        update = steps.update(weights, cohort, round_=round_, seed=seed, name=name)
        weights = {key: weights[key] + update[key] for key in weights}
        if (decay := plan.strategy.average_decay) is not None:
            average = averaged(average, weights, round_, decay)
        if chooses:
            measured = trainer.task.summary(list(trainer.measure(weights, cohort, "validation").values()))
            value = measured.get(trainer.task.headline, float("-inf"))
        else:
            value = float(round_)
        if value > best_value or best_value == float("-inf"):
            best, best_value = weights, value
    return best if average is None else average


def measure_everywhere(trainer: Trainer, weights: Weights, plan: Plan, sites: Sequence[SiteFolder]) -> dict[str, Any]:
    """Mean test metrics at each site that has test patients."""
    return {site: trainer.task.summary(patients) for site, patients in _patients(trainer, weights, plan, sites)}


def row_of(name: str, trainer: Trainer, weights: Weights, plan: Plan, sites: Sequence[SiteFolder]) -> Row:
    """One model measured at all sites, with intervals."""
    row = Row(name, {})
    for site, patients in _patients(trainer, weights, plan, sites):
        row.per_site[site] = trainer.task.summary(patients)
        if (interval := interval_of(trainer.task, patients, derive(name, site))) is not None:
            row.interval[site] = interval
    return row


def interval_of(task: Task, patients: Sequence[Mapping[str, float]], seed: int) -> list[float] | None:
    """95 % of the headline metrics of sets of patients drawn from these with replacement, each with all of its studies.

    It is the bootstrap of Efron 1979 (doi:10.1214/aos/1176344552) over patients, by percentiles. None for fewer than two
    patients, or where their metric is not defined.
    """
    if len(patients) < 2 or task.headline not in task.summary(patients):
        return None
    rng, n = np.random.default_rng(seed), len(patients)
    if task.headline in task.ranges:  # a mean over patients
        each = np.array([task.summary([patient])[task.headline] for patient in patients])
        values = each[rng.integers(n, size=(N_RESAMPLES, n))].mean(axis=1)
    else:
        drawn = (task.summary([patients[i] for i in rng.integers(n, size=n)]) for _ in range(N_SUMMARIES))
        values = np.array([found[task.headline] for found in drawn if task.headline in found])
    return [float(end) for end in np.percentile(values, [2.5, 97.5])] if len(values) else None


def shared_rows(
    plan: Plan, sites: Sequence[SiteFolder], shared: Weights, per_site: dict[str, dict[str, float]], run: str
) -> list[Row]:
    """The shared model as its sites measured it, and each site's own where the strategy keeps one, at all sites.

    Under ``[privacy]`` what sites send has noise; there the shared model is measured again, exactly.

    Parameters
    ----------
    per_site
        Test metrics that the sites sent.
    run
        The run whose stations these are.
    """
    trainer = resident_trainer(plan, DEVICE)
    personal = []
    for site in sites:
        if (own := own_model(site.station, run, plan, shared)) is not None:
            personal.append(row_of(f"personal:{site.name}", trainer, own, plan, sites))
    if staying(plan, trainer.network):  # at every site another model is the shared one
        intervals = {row.method.partition(":")[2]: row.interval for row in personal}
        mine = {site: of_site[site] for site, of_site in intervals.items() if site in of_site}
        exact = {name: row.per_site[name] for row in personal if (name := row.method.partition(":")[2]) in row.per_site}
    else:
        measured = row_of("federated", trainer, shared, plan, sites)
        mine, exact = measured.interval, measured.per_site
    if plan.privacy is not None:
        per_site = exact
    return [Row("federated", per_site, mine), *personal]


def _patients(
    trainer: Trainer, weights: Weights, plan: Plan, sites: Sequence[SiteFolder]
) -> Iterator[tuple[str, list[dict[str, float]]]]:
    """What is measured of each test patient, site by site, where there are any."""
    for site in sites:
        measured = trainer.measure(weights, cohort_of(site, plan), "test")
        if measured:
            yield site.name, list(measured.values())


def baseline(
    plan: Plan, sites: Sequence[SiteFolder], home: Sequence[SiteFolder], name: str, seed: int, start: Path | None = None
) -> Row:
    """Train on the data of ``home`` alone and test at all ``sites``."""
    steps = Steps.of(plan, home)
    cohorts = [cohort_of(site, plan) for site in home]
    cohort = cohorts[0] if len(cohorts) == 1 else PooledCohort(cohorts)
    weights = train_alone(steps, cohort, plan, seed=seed, name=name, start=start)
    return row_of(name, steps.trainer, weights, plan, sites)


def baselines(
    plan: Plan,
    sites: Sequence[SiteFolder],
    *,
    seed: int,
    workers: int,
    on_done: Callable[[str], None],
    start: Path | None = None,
) -> list[Row]:
    """The central model and every site's own, the longest first; a site that cannot train has none."""
    able = [site for site in sites if cohort_of(site, plan).patients("train")]
    jobs = [("central", able), *((f"local:{site.name}", [site]) for site in able)]
    rows: list[Row] = []
    if workers == 1:
        for name, home in jobs:
            rows.append(baseline(plan, sites, home, name, seed, start))
            on_done(name)
        return rows
    with process_pool(min(workers, len(jobs))) as pool:
        futures: dict[Future[Row], str] = {
            pool.submit(baseline, plan, sites, home, name, seed, start): name for name, home in jobs
        }
        for future in as_completed(futures):
            rows.append(future.result())
            on_done(futures[future])
    order = [name for name, _ in jobs]
    return sorted(rows, key=lambda row: order.index(row.method))


def classical_rows(plan: Plan, sites: Sequence[SiteFolder], *, on_done: Callable[[str], None]) -> list[Row]:
    """The task's methods that learn nothing, on every site's test patients; none where the task has none."""
    task = resident_trainer(plan, DEVICE).task
    per_method: dict[str, dict[str, dict[str, float]]] = {}
    for site in sites:
        cohort = cohort_of(site, plan)
        measured: dict[str, list[dict[str, float]]] = {}
        for patient in cohort.patients("test"):
            of_patient: dict[str, list[dict[str, float]]] = {}
            for volume in map(cohort.volume, patient.studies):
                for name, prediction in task.classical(volume).items():
                    of_patient.setdefault(name, []).append(task.measure(prediction, volume))
            for name, studies in of_patient.items():
                measured.setdefault(name, []).append(mean_metrics(studies))
        for name, patients in measured.items():
            per_method.setdefault(name, {})[site.name] = task.summary(patients)
        on_done(site.name)
    return [Row(name, per_site) for name, per_site in per_method.items()]


def stability_cards(plan: Plan, site: SiteFolder, encoded: bytes) -> list[dict[str, float]]:
    """The task's cards of a site's first test patients under ``encoded`` weights; empty where the task has none."""
    trainer, cohort = resident_trainer(plan, DEVICE), cohort_of(site, plan)
    load_weights(trainer.network, decode(encoded)[0])
    trainer.network.eval()
    chosen = cohort.patients("test")[:N_CARDS]
    cards = [trainer.task.card(trainer.network, cohort.volume(one.studies[0]), trainer.device) for one in chosen]
    return [card for card in cards if card]


def show_patients(plan: Plan, site: SiteFolder, encoded: bytes) -> list[tuple[TestPatient, Picture]]:
    """Best, median and worst test patient of one site under ``encoded`` weights, with pictures."""
    weights, _ = decode(encoded)
    trainer = resident_trainer(plan, DEVICE)
    cohort = cohort_of(site, plan)
    measured = trainer.measure(weights, cohort, "test")
    studies = {patient.key: patient.studies[0] for patient in cohort.patients("test")}
    ranked = sorted(measured, key=lambda key: (-measured[key][trainer.task.shown], key))
    chosen = [ranked[i] for i in sorted({0, len(ranked) // 2, len(ranked) - 1})] if ranked else []
    shown = []
    for key in chosen:
        volume = cohort.volume(studies[key])
        prediction = trainer.predict_loaded(volume)
        with torch.inference_mode():
            doubts = trainer.task.doubts(trainer.network, volume, trainer.device)
        picture = trainer.task.picture(prediction, volume, doubts)
        shown.append((TestPatient(site.name, measured[key], studies[key]), picture))
    return shown


def encoded(weights: Weights) -> bytes:
    """Weights as bytes, to hand them to a worker."""
    return encode(weights, "")


def measured_mean(plan: Plan, model: Path, sites: Sequence[SiteFolder]) -> dict[str, float]:
    """Mean test metrics of a released model over the sites, each counting the same, exactly.

    **For emulated patients only.** Where patients are real, the exact figure of a plan with ``[privacy]`` is a release that
    nobody paid for; these protect nobody who exists, and without the truth a simulation could not tell what privacy costs.

    Raises
    ------
    ValueError
        If a simulation did not write one of these sites' images.
    """
    _require_emulated(sites)
    weights, _ = decode(model.read_bytes())
    per_site = measure_everywhere(resident_trainer(plan, DEVICE), weights, plan, sites)
    names = dict.fromkeys(name for metrics in per_site.values() for name in metrics)
    return {name: float(np.mean([m[name] for m in per_site.values() if name in m])) for name in names}


def _require_emulated(sites: Sequence[SiteFolder]) -> None:
    if not all(is_emulated(site.data) for site in sites):
        raise ValueError("a private model is measured exactly, and trained beside others, on emulated patients only")
