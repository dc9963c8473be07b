"""Does a finished run know what it does not know? Ensembles that cost no training, and whether probabilities are true.

Members are the shared model of several late rounds and the site models of the last round, which together are the shared
model of the next (snapshots: Huang et al. 2017, arXiv:1704.00109; ensembles calibrate segmentation: Mehrtash et al. 2020,
arXiv:1911.13273). The single model is the released one; its temperature is fitted on validation patients (Guo et al. 2017,
arXiv:1706.04599).

Of a segmentation voxels are looked at within 8 mm (or pixels, of photographs) of the reference or of what was predicted,
since the rest of an image is easy and would hide everything; of a classification the labels. A patient is flagged by a
number that no reference is needed for, of a segmentation the mean over what was outlined (Roy et al. 2019,
doi:10.1016/j.neuroimage.2019.03.042); how well each number flags is the area under its curve for poor patients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, stats

from client.training import Trainer, resident_trainer
from server.journal import Journal
from shared_models.messages import decode_answer
from shared_models.plan import Plan
from shared_models.tasks.classification import Classification, area_under_curve
from shared_models.tasks.multi_label import MultiLabel
from shared_models.tasks.segmentation import Segmentation, dice
from shared_models.uncertainty import Members, Reliability, disagreement, entropy, temperature
from shared_models.volume import Volume
from shared_models.weights import Weights, decode, load_weights
from simulation.stations import SiteFolder, cohort_of

KINDS = ("segmentation", "classification")
"""Tasks whose models give probabilities of labels."""

N_SNAPSHOTS = 5
NEAR_MM = 8.0
"""How far from outlines voxels are looked at [mm]."""

POOR_DICE = 0.7
"""Below it a patient is poor; of a classification, one whose label is not found."""

WAYS = ("single", "scaled", "sites", "snapshots", "ensemble")
FLAGS = ("disagreement", "mutual_information", "entropy", "entropy_single")
"""Numbers of a patient that need no reference, between 0 and 1: entropies over the largest possible one."""

Probabilities = NDArray[np.float32]
"""``(label, place, ...)``."""


def snapshots(rounds: int) -> tuple[int, ...]:
    """Rounds whose shared models are members: evenly spaced over the last half, the last one included."""
    return tuple(sorted({max(1, round(rounds * (0.5 + 0.5 * k / N_SNAPSHOTS))) for k in range(1, N_SNAPSHOTS + 1)}))


def calibration_of(
    plan: Plan,
    folder: Path,
    released: Weights,
    seen: Sequence[SiteFolder],
    unseen: Sequence[SiteFolder] = (),
    *,
    on_patient: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """What the models of a finished run say of test patients, and how sure they are.

    =================  ==========================================================================================
    ``temperature``    of the released model
    ``members``        how many models of either kind there are
    ``ece``            expected calibration error of each way, on seen hospitals' patients
    ``points``         of each way's reliability diagram: confidence and share that is right
    ``patients``       site, whether it trained, score (Dice, or probability of the truth) of the ensemble and of the
                       released model, whether it is poor, and :data:`FLAGS`
    ``flags``          for each of :data:`FLAGS` the area under its curve for poor patients (None where all or none is
                       poor) and Spearman's rank correlation with what is missing of the score
    =================  ==========================================================================================

    Parameters
    ----------
    folder
        Of the run: journal, and the weights of the rounds in :func:`snapshots`.
    released
        The weights that the run released.
    seen, unseen
        Hospitals that trained, and such that did not.
    on_patient
        Called when a patient has been looked at.
    """
    trainer = resident_trainer(plan, "auto")
    members = {
        "snapshots": [decode((folder / f"round-{n:05d}.safetensors").read_bytes())[0] for n in snapshots(plan.rounds)],
        "sites": site_models(plan, seen, Journal(folder / "journal")),
    }
    warm = _fitted(trainer, released, plan, seen)
    reliability = {way: Reliability.empty() for way in WAYS}
    patients = []
    for site in (*seen, *unseen):
        cohort, is_seen = cohort_of(site, plan), site in seen
        for patient in cohort.patients("test"):
            studies = [_looked_at(trainer, cohort.volume(s), members, released, warm) for s in patient.studies]
            for study in studies if is_seen else ():
                for way, counted in study.counted.items():
                    reliability[way].add(*counted)
            numbers = {k: float(np.mean([study.numbers[k] for study in studies])) for k in studies[0].numbers}
            is_poor = any(study.is_poor for study in studies)
            patients.append({"site": site.name, "seen": is_seen, "poor": is_poor, **numbers})
            on_patient()
    return {
        "temperature": warm,
        "members": {kind: len(models) for kind, models in members.items()},
        "ece": {way: one.expected_error for way, one in reliability.items()},
        "points": {way: one.points() for way, one in reliability.items()},
        "patients": patients,
        "flags": {name: _flags(patients, name) for name in FLAGS},
    }


def site_models(plan: Plan, sites: Sequence[SiteFolder], journal: Journal) -> list[Weights]:
    """Each site's model after its training in the last round: what it got plus what it sent, for those that did.

    None after a run of a single round: the weights that it began with are not kept.
    """
    if plan.rounds == 1:
        return []
    got, models = journal.weights(plan.rounds - 1), []
    for site in sites:
        for sent in (site.station / "answers").glob(f"{plan.rounds:06d}-train-*.safetensors"):
            update = decode_answer(sent.read_bytes()).update
            models.append({name: array + update[name] if name in update else array for name, array in got.items()})
    return models


@dataclass(frozen=True)
class _Looked:
    """What came out for one study."""

    numbers: dict[str, float]
    is_poor: bool
    counted: dict[str, tuple[NDArray[np.float64], NDArray[np.bool_]]]
    """For each way the confidence of every place looked at, and whether it is right."""


def _looked_at(
    trainer: Trainer, volume: Volume, members: dict[str, list[Weights]], released: Weights, warm: float
) -> _Looked:
    truth, single = truth_of(trainer, volume), said(trainer, released, volume)
    together = {kind: Members() for kind in (*members, "ensemble")}
    named = []
    for kind, models in members.items():
        for weights in models or [released]:
            probabilities = said(trainer, weights, volume)
            together[kind].add(probabilities)
            together["ensemble"].add(probabilities)
            named.append(probabilities.argmax(0).astype(np.uint8))
    everybody = together["ensemble"]
    ways = {"single": single, "scaled": _scaled(single, warm), **{kind: one.mean for kind, one in together.items()}}
    near = of_single = of_ensemble = np.ones(truth.shape, np.bool_)
    if isinstance(trainer.task, Segmentation):
        outlines = [single.argmax(0) > 0, ways["ensemble"].argmax(0) > 0]
        near = _near([truth > 0, *outlines], volume.spacing_mm)
        of_single = _outlined(outlines[0])
        of_ensemble = _outlined(outlines[1], np.logical_or.reduce([one > 0 for one in named]))
    score = _score(trainer, ways["ensemble"], truth)
    is_missed = bool((ways["ensemble"].argmax(0) != truth).any())
    numbers = {
        "score": score,
        "score_single": _score(trainer, single, truth),
        "entropy": float(everybody.uncertainty[of_ensemble].mean()),
        "entropy_single": float(entropy(single.astype(np.float64))[of_single].mean() / np.log(len(single))),
        "mutual_information": float(everybody.disagreement[of_ensemble].mean()),
        "disagreement": _disagreement(trainer, np.stack(named), len(single)),
    }
    is_poor = score < POOR_DICE if isinstance(trainer.task, Segmentation) else is_missed
    counted = {way: (p.max(0)[near].astype(np.float64), (p.argmax(0) == truth)[near]) for way, p in ways.items()}
    return _Looked(numbers, is_poor, counted)


def said(trainer: Trainer, weights: Weights, volume: Volume) -> Probabilities:
    """Probabilities of a model: ``(label, z, y, x)`` of a segmentation, ``(label, 1)`` of a classification, and where a
    study can have several labels ``(2, label)``: not there, there."""
    task = trainer.task
    load_weights(trainer.network, weights)
    trainer.network.eval()
    with torch.inference_mode():
        if isinstance(task, Segmentation):
            return task.probabilities(trainer.network, volume, trainer.device)
        if not isinstance(task, Classification):
            raise TypeError(f"{type(task).__name__} gives no probabilities of labels")
        found = task.probabilities(task.predict(trainer.network, volume, trainer.device)).astype(np.float32)
    return np.stack([1 - found, found]) if isinstance(task, MultiLabel) else found[:, np.newaxis]


def truth_of(trainer: Trainer, volume: Volume) -> NDArray[np.int64]:
    """The true label of every place that :func:`said` speaks of."""
    if isinstance(trainer.task, Segmentation):
        return np.asarray(volume.label, np.int64)
    if isinstance(trainer.task, MultiLabel):
        return trainer.task.has(volume).astype(np.int64)
    return np.array([volume.category], np.int64)


def _scaled(probabilities: Probabilities, warm: float) -> Probabilities:
    """Probabilities at another temperature."""
    return torch.softmax(torch.from_numpy(_logarithm(probabilities) / warm), 0).numpy()


def _logarithm(probabilities: Probabilities) -> Probabilities:
    return np.asarray(np.log(np.maximum(probabilities, 1e-30)))


def _near(masks: Sequence[NDArray[np.bool_]], spacing_mm: tuple[float, float, float]) -> NDArray[np.bool_]:
    """Voxels near any of the masks ``(z, y, x)``; all of them where those are empty."""
    outside: NDArray[np.bool_] = ~np.logical_or.reduce(masks)
    if outside.all():
        return outside
    return np.asarray(ndimage.distance_transform_edt(outside, sampling=spacing_mm) <= NEAR_MM)


def _outlined(*masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The first of the masks that holds anything; all voxels where none does."""
    return next((mask for mask in masks if mask.any()), np.ones_like(masks[0]))


def _score(trainer: Trainer, probabilities: Probabilities, truth: NDArray[np.int64]) -> float:
    """Of a segmentation the mean Dice over labels that somebody saw, of a classification the probability of the truth."""
    if not isinstance(trainer.task, Segmentation):
        return float(np.take_along_axis(probabilities, truth[np.newaxis], 0).mean())
    found = probabilities.argmax(0)
    labels = [k for k in range(1, len(probabilities)) if (found == k).any() or (truth == k).any()]
    return float(np.mean([dice(found == k, truth == k) for k in labels])) if labels else 1.0


def _disagreement(trainer: Trainer, named: NDArray[np.uint8], n_labels: int) -> float:
    """How far members' outlines part, ``(member, ...)``; of a classification the share of pairs that name another label."""
    if isinstance(trainer.task, Segmentation):
        return disagreement(named, n_labels)
    pairs = [(one != other).mean() for i, one in enumerate(named) for other in named[i + 1 :]]
    return float(np.mean(pairs)) if pairs else 0.0


def _fitted(trainer: Trainer, weights: Weights, plan: Plan, sites: Sequence[SiteFolder]) -> float:
    """The temperature of the sites' validation patients; 1 where there are none."""
    scores, truths = [], []
    for site in sites:
        cohort = cohort_of(site, plan)
        for volume in (cohort.volume(s) for patient in cohort.patients("validation") for s in patient.studies):
            probabilities, truth = said(trainer, weights, volume), truth_of(trainer, volume)
            near = np.ones(truth.shape, np.bool_)
            if isinstance(trainer.task, Segmentation):
                near = _near([truth > 0, probabilities.argmax(0) > 0], volume.spacing_mm)
            scores.append(_logarithm(probabilities)[:, near])
            truths.append(truth[near])
    return temperature(np.concatenate(scores, axis=1), np.concatenate(truths)) if scores else 1.0


def _flags(patients: Sequence[dict[str, Any]], name: str) -> dict[str, float | None]:
    numbers = np.array([one[name] for one in patients])
    missing, is_poor = np.array([1 - one["score"] for one in patients]), np.array([one["poor"] for one in patients])
    curve = None if is_poor.all() or not is_poor.any() else area_under_curve(numbers, is_poor, np.ones(len(numbers)))
    varies = len(set(numbers)) > 1 and len(set(missing)) > 1
    return {"auroc": curve, "correlation": float(stats.spearmanr(numbers, missing).statistic) if varies else None}
