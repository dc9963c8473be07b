"""Does a federation know what it does not know? Ensembles that cost no training, on seen scanners and on one never seen.

Members are the shared model of several late rounds and the site models of the last round, which together are the shared
model of the next (snapshots: Huang et al. 2017, arXiv:1704.00109; ensembles calibrate segmentation: Mehrtash et al. 2020,
arXiv:1911.13273). The single model is that of the last round. Learning rates stay constant, so that members differ.

Calibration is that of voxels within 8 mm of the reference or of what was predicted, since the rest of a head is easy and
would hide everything. A patient's uncertainty is the mean entropy over the same voxels; patients are flagged by how much
members disagree, and one is worth flagging whose Dice is below 0.7.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, stats

import simulation
from client.training import Trainer, resident_trainer
from server.journal import Journal
from shared_models.messages import decode_answer
from shared_models.plan import Plan
from shared_models.tasks.classification import area_under_curve
from shared_models.tasks.segmentation import Segmentation, dice
from shared_models.uncertainty import Reliability, disagreement, entropy, mutual_information, temperature
from shared_models.volume import Volume
from shared_models.weights import Weights, decode, load_weights
from simulation.consortium import emulate
from simulation.experiments.harness import Experiment, Results, claim, row
from simulation.run import Request, Watcher, find_sites
from simulation.stations import SiteFolder, cohort_of, prepare_stations

SEEN, UNSEEN = ("siemens-t1gd-3t", "philips-flair-3t", "canon-pd-1.5t"), "ge-t2-1.5t"
N_SNAPSHOTS = 5
NEAR_MM = 8.0
"""How far from outlines voxels are looked at [mm]."""

POOR_DICE = 0.7
WAYS = ("single", "scaled", "sites", "snapshots", "ensemble")

Probabilities = NDArray[np.float64]


def arms(*, quick: bool) -> dict[str, Plan]:
    """The demo's hospitals without one of its scanners, at a constant rate; ``quick`` takes a third of its rounds."""
    demo = Plan.load(Path(simulation.__path__[0]) / "plans" / "demo.toml")
    return {
        "": demo.model_copy(
            update={
                "name": "uncertainty",
                "rounds": 80 if quick else 240,
                "training": demo.training.model_copy(update={"schedule": "constant", "learning_rate": 2e-3}),
                "simulation": demo.simulation.model_copy(update={"scanners": SEEN}),
            }
        )
    }


def snapshots(plan: Plan) -> tuple[int, ...]:
    """Rounds whose shared models are members: evenly spaced over the last half, the last one included."""
    return tuple(round(plan.rounds * (0.5 + 0.5 * k / N_SNAPSHOTS)) for k in range(1, N_SNAPSHOTS + 1))


def look(request: Request) -> dict[str, Any]:
    """What the models of a finished run say of test patients, and how sure they are."""
    plan = request.plan
    sites = find_sites(request, Watcher())
    journal = Journal(request.folder / "journal")
    of_rounds = [decode((request.folder / f"round-{n:05d}.safetensors").read_bytes())[0] for n in snapshots(plan)]
    members = {"snapshots": of_rounds, "sites": site_models(plan, sites, journal)}
    trainer = resident_trainer(plan, "auto")
    warm = _temperature(trainer, of_rounds[-1], plan, sites)
    strangers = unseen_hospital(request)
    reliability = {way: Reliability.empty() for way in WAYS}
    patients = []
    for group, site in [*(("seen", site) for site in sites), ("unseen", strangers)]:
        cohort = cohort_of(site, plan)
        for patient in cohort.patients("test"):
            studies = [_study(trainer, cohort.volume(study), members, warm) for study in patient.studies]
            for _, counted in studies:
                if group == "seen":
                    for way, (confidence, is_right) in counted.items():
                        reliability[way].add(confidence, is_right)
            patients.append({"group": group, **{k: float(np.mean([f[k] for f, _ in studies])) for k in studies[0][0]}})
    return {
        "temperature": warm,
        "ece": {way: one.expected_error for way, one in reliability.items()},
        "points": {way: one.points() for way, one in reliability.items()},
        "patients": patients,
    }


def site_models(plan: Plan, sites: list[SiteFolder], journal: Journal) -> list[Weights]:
    """Each site's model after its training in the last round: what it got plus what it sent."""
    got, models = journal.weights(plan.rounds - 1), []
    for site in sites:
        (sent,) = (site.station / "answers").glob(f"{plan.rounds:06d}-train-*.safetensors")
        update = decode_answer(sent.read_bytes()).update
        models.append({name: array + update[name] for name, array in got.items()})
    return models


def unseen_hospital(request: Request) -> SiteFolder:
    """A hospital whose scanner no site of the run has."""
    table = request.plan.simulation.model_copy(update={"scanners": (UNSEEN,)})
    plan, folder = request.plan.model_copy(update={"simulation": table}), request.shared / "unseen"
    (hospital,) = emulate(plan, n_sites=1, folder=folder, seed=1000 + request.seed, workers=1, progress=None)
    site = SiteFolder(hospital.name, hospital.folder, folder / "station")
    prepare_stations(plan, [site], seed=request.seed, workers=1, on_site=lambda _: None)
    return site


def _logits(trainer: Trainer, weights: Weights, volume: Volume) -> Probabilities:
    load_weights(trainer.network, weights)
    trainer.network.eval()
    if not isinstance(trainer.task, Segmentation):
        raise TypeError("this experiment segments")
    with torch.inference_mode():
        return trainer.task.logits(trainer.network, volume, trainer.device).double().cpu().numpy()


def _softmax(logits: Probabilities) -> Probabilities:
    return torch.softmax(torch.from_numpy(logits), 0).numpy()


def _near(masks: NDArray[np.bool_], spacing_mm: tuple[float, float, float]) -> NDArray[np.bool_]:
    """Voxels near any of the masks; all of them where there is none."""
    together = masks.any(axis=0)
    if not together.any():
        return np.ones(together.shape, np.bool_)
    return np.asarray(ndimage.distance_transform_edt(~together, sampling=spacing_mm) <= NEAR_MM)


def _study(
    trainer: Trainer, volume: Volume, members: dict[str, list[Weights]], warm: float
) -> tuple[dict[str, float], dict[str, tuple[Probabilities, NDArray[np.bool_]]]]:
    """Numbers about one study, and for each way the confidence of the voxels looked at and whether they are right."""
    truth = np.asarray(volume.label)
    logits = {kind: np.stack([_logits(trainer, w, volume) for w in models]) for kind, models in members.items()}
    single = logits["snapshots"][-1]
    each = {kind: np.stack([_softmax(one) for one in of_kind]) for kind, of_kind in logits.items()}
    everybody = np.concatenate([each["snapshots"], each["sites"]])
    ways = {
        "single": _softmax(single),
        "scaled": _softmax(single / warm),
        "sites": each["sites"].mean(axis=0),
        "snapshots": each["snapshots"].mean(axis=0),
        "ensemble": everybody.mean(axis=0),
    }
    near = _near(np.stack([truth > 0, ways["single"].argmax(0) > 0, ways["ensemble"].argmax(0) > 0]), volume.spacing_mm)
    shown = _near((everybody.argmax(axis=1) > 0).any(axis=0)[None], volume.spacing_mm)
    counted = {way: (p.max(0)[near], (p.argmax(0) == truth)[near]) for way, p in ways.items()}
    found = {
        "dice": dice(ways["ensemble"].argmax(0) == 1, truth == 1),
        "dice_single": dice(ways["single"].argmax(0) == 1, truth == 1),
        "entropy": float(entropy(ways["ensemble"])[shown].mean()),
        "entropy_single": float(entropy(ways["single"])[shown].mean()),
        "mutual_information": float(mutual_information(everybody)[shown].mean()),
        "disagreement": disagreement(everybody.argmax(axis=1), 2),
    }
    return found, counted


def _temperature(trainer: Trainer, weights: Weights, plan: Plan, sites: list[SiteFolder]) -> float:
    """Fitted on the sites' validation patients."""
    scores, truth = [], []
    for volume in _validation(plan, sites):
        logits, label = _logits(trainer, weights, volume), np.asarray(volume.label)
        near = _near(np.stack([label > 0, logits.argmax(0) > 0]), volume.spacing_mm)
        scores.append(logits[:, near])
        truth.append(label[near])
    return temperature(np.concatenate(scores, axis=1), np.concatenate(truth)) if scores else 1.0


def _validation(plan: Plan, sites: list[SiteFolder]) -> Iterator[Volume]:
    for site in sites:
        cohort = cohort_of(site, plan)
        for patient in cohort.patients("validation"):
            yield from (cohort.volume(study) for study in patient.studies)


def evaluate(results: Results) -> dict[str, Any]:
    """Calibration of each way, uncertainty on seen and unseen scanners, and how well it flags."""
    of_seed = [result["after"] for result in results[""]]

    def mean(seed: dict[str, Any], group: str, number: str) -> float:
        return float(np.mean([p[number] for p in seed["patients"] if p["group"] == group]))

    def auroc(seed: dict[str, Any], number: str) -> float:
        scores = np.array([p[number] for p in seed["patients"]])
        is_poor = np.array([p["dice"] < POOR_DICE for p in seed["patients"]])
        if is_poor.all() or not is_poor.any():
            raise ValueError(
                f"{is_poor.sum()} of {len(is_poor)} patients have a Dice below {POOR_DICE}: nothing to flag"
            )
        return area_under_curve(scores, is_poor, np.ones(len(scores)))

    def rank(seed: dict[str, Any], number: str) -> float:
        scores, errors = ([p[number] for p in seed["patients"]], [1 - p["dice"] for p in seed["patients"]])
        return float(stats.spearmanr(scores, errors).statistic)

    names = {
        "single": "last model",
        "scaled": "last model, temperature scaled",
        "sites": "ensemble of the last round's site models",
        "snapshots": "ensemble of five rounds' models",
        "ensemble": "ensemble of both",
    }
    ratio = [mean(seed, "unseen", "entropy") / mean(seed, "seen", "entropy") for seed in of_seed]
    return {
        "rows": [
            *(row(names[way], "ece", "test patients, seen", [s["ece"][way] for s in of_seed]) for way in WAYS),
            *(
                row(name, "dice", f"test patients, {group}", [mean(seed, group, number) for seed in of_seed])
                for group in ("seen", "unseen")
                for name, number in ((names["single"], "dice_single"), (names["ensemble"], "dice"))
            ),
            *(
                row(
                    names["ensemble"],
                    number,
                    f"test patients, {group}",
                    [mean(seed, group, number) for seed in of_seed],
                )
                for number in ("entropy", "mutual_information", "disagreement")
                for group in ("seen", "unseen")
            ),
            *(
                row(
                    f"flagged by {number.replace('_', ' ')}",
                    metric,
                    "all test patients",
                    [of(s, number) for s in of_seed],
                )
                for metric, of in (("flag_auroc", auroc), ("rank correlation with error", rank))
                for number in ("disagreement", "entropy", "entropy_single", "mutual_information")
            ),
        ],
        "claims": [
            claim(
                "ece_ratio",
                "expected calibration error of the ensemble / of the last model",
                [seed["ece"]["ensemble"] / seed["ece"]["single"] for seed in of_seed],
                at_most=0.7,
            ),
            claim("entropy_ratio", "mean entropy on the unseen scanner / on seen ones", ratio, at_least=1.3),
            claim(
                "flag_auroc",
                "area under the curve of disagreement for patients with Dice below 0.7",
                [auroc(seed, "disagreement") for seed in of_seed],
                at_least=0.8,
            ),
        ],
    }


UNCERTAINTY = Experiment(
    name="uncertainty",
    title="What ensembles that cost nothing know of their own errors",
    seeds=(0, 1, 2),
    n_sites=3,
    arms=arms,
    evaluate=evaluate,
    after=look,
    snapshots=snapshots,
)
