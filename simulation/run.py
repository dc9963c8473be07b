"""One simulated run from a plan to a report: sites, stations, rounds, comparison, pictures, result.

Everything lies in one folder::

    hospitals/       emulated hospitals' DICOM folders (unless real data is given)
    sites/           sites to which a MedMNIST file was dealt
    stations/        one station for each site (both elsewhere where runs share them)
    journal/         committed rounds and their weights
    pictures.npz     a few test patients for the report (never part of what sites send)
    model.safetensors  the released weights
    result.json, report.html
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from client.site import is_emulated
from server.journal import Journal
from server.results import result_of
from server.rounds import Outcome, Progress
from shared_models.adaptation import UNKNOWN
from shared_models.errors import FederadError
from shared_models.plan import Plan
from shared_models.scanners import ScannerTable
from shared_models.task import Task, mean_metrics, task_for
from shared_models.weights import encode
from simulation.baselines import (
    Row,
    baselines,
    classical_rows,
    encoded,
    shared_rows,
    show_patients,
    stability_cards,
)
from simulation.by_scanner import measure_scanners
from simulation.calibration import KINDS, calibration_of, snapshots
from simulation.consortium import EmulatedHospital, emulate, emulate_unseen, named_scanners
from simulation.engine import Execution, run_rounds
from simulation.medmnist import deal
from simulation.processes import one_thread, process_pool
from simulation.scanners import scanners_sha256
from simulation.stations import SiteFolder, cohort_of, forget_history, open_station, prepare_stations


class Watcher:
    """Told what a run is doing; this one keeps silent."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A new stage begins, of ``total`` steps if that is known."""

    def step(self, done: int | None = None, total: int | None = None, detail: str = "") -> None:
        """One more step of the stage is done, or ``done`` of ``total`` in all."""

    def progress(self, event: Progress) -> None:
        """Something happened in the round loop."""


@dataclass(frozen=True)
class Request:
    """What a researcher asked for."""

    plan: Plan
    folder: Path
    n_sites: int | None = None
    """Number of sites; None takes four emulated ones, or all that lie in ``data``."""

    data: Path | None = None
    """A folder with one folder of images for each site, or a MedMNIST file that is dealt to sites; None emulates
    hospitals."""

    sites: tuple[str, ...] = ()
    """Folders in ``data`` that take part; empty for all, or for the first ``n_sites``."""

    left_out: tuple[str, ...] = ()
    """Folders in ``data`` that train nothing: the released model is tested on their test patients."""

    seed: int = 0
    execution: Execution = field(default_factory=Execution)
    sites_folder: Path | None = None
    """Where ``hospitals`` and ``stations`` lie, for runs one after the other on the same sites; None takes ``folder``."""

    start: Path | None = None
    """The model.safetensors at which a plan with ``strategy.start`` begins."""

    snapshots: tuple[int, ...] = ()
    """Rounds whose weights are kept in the folder, as ``round-00100.safetensors``."""

    uncertainty: bool = False
    """Whether to look at how sure the models are, and with what right (``calibration``), which keeps weights as well."""

    compare: bool = True
    """Whether to train the central and the local models too; under ``[privacy]`` at emulated hospitals alone."""

    pictures: bool = True
    """Whether the report shows test patients, each of whom has to be predicted again."""

    command: str = ""

    @property
    def shared(self) -> Path:
        """The folder of ``hospitals`` and ``stations``."""
        return (self.sites_folder or self.folder).resolve()

    def __post_init__(self) -> None:
        if self.n_sites is not None and self.n_sites < 1:
            raise impossible(f"--sites {self.n_sites} asks for no site.", "A federation has at least one.", "--sites 4")
        if (self.plan.strategy.start is None) != (self.start is None):
            raise impossible(
                "The plan begins at a model, and no file is given."
                if self.start is None
                else f"--start {self.start} names a model, and the plan begins at fresh weights.",
                "A plan with start under [strategy] needs the file whose SHA-256 it names, and no other plan takes one.",
                "--start DIR/model.safetensors with the one, no --start with the other",
            )
        if self.left_out and (self.data is None or self.data.is_file()):
            raise impossible(
                f"--leave-out {self.left_out[0]} names a folder, and the run has none.",
                "It is one of the folders of images that --data holds.",
                "--data FOLDER with a folder for each site; for emulated hospitals, simulation.unseen in the plan",
            )
        if self.left_out and self.plan.privacy is not None:
            raise impossible(
                f"--leave-out {self.left_out[0]} measures its patients exactly, and the plan is private.",
                "Under [privacy] what is measured on real patients gets noise, and every look costs them.",
                "remove [privacy] from the plan, or leave out --leave-out",
            )
        if self.start is not None and not self.start.is_file():
            raise impossible(
                f"There is no file {self.start}.",
                "The plan begins at the model in it.",
                "--start DIR/model.safetensors of an earlier run, or of a release",
            )
        if self.start is not None and self.execution.engine == "deployment":
            raise impossible(
                "--engine deployment begins at fresh weights.",
                "A consortium begins at models that it has released, and one that is staged for a run has none.",
                "--engine in-process, or a consortium of your own: federad-server run",
            )
        if self.uncertainty and self.plan.task.kind not in KINDS:
            raise impossible(
                f"--uncertainty looks at probabilities of labels, and a plan for {self.plan.task.kind} gives none.",
                "Calibration is whether such probabilities are true.",
                "leave out --uncertainty",
            )
        if self.uncertainty and self.execution.engine == "deployment":
            raise impossible(
                "--uncertainty needs the shared models of several rounds, and a consortium keeps the last ones alone.",
                "They are the members of its ensemble.",
                "--engine in-process, which gives the same weights",
            )
        if self.uncertainty and self.plan.privacy is not None and self.data is not None:
            raise impossible(
                "--uncertainty measures test patients exactly, and the plan is private.",
                "Under [privacy] what is measured on real patients gets noise, and every look costs them.",
                "leave out --data: emulated patients need no protection",
            )


DEFAULT_SITES = 4


def simulate(request: Request, watcher: Watcher) -> dict[str, Any]:
    """Run a request and write its folder; the result as it stands in ``result.json``.

    A run that pauses or is stopped writes what it has before the error goes on.

    Raises
    ------
    FederadError
        Any of C140 to C146, S180 to S182, R230 to R234.
    KeyboardInterrupt
        If the user stops it.
    """
    if request.plan.asks is not None:
        raise impossible(
            f"The plan {request.plan.name} asks for a {request.plan.asks} and trains nothing.",
            "A run ends with a model.",
            "federad-sim configure PLAN.toml --out PLAN2.toml, with the plan that is to be configured",
        )
    began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    one_thread()
    folder = use_folder(request.folder)
    for stale in ("pictures.npz", "result.json", "report.html", "model.safetensors"):
        (folder / stale).unlink(missing_ok=True)
    sites = find_sites(request, watcher)
    prepare(request, sites, watcher)
    require_scanners(request, sites)
    result = describe(request, sites) | {"started": started}
    journal_folder = folder / "journal"
    shutil.rmtree(journal_folder, ignore_errors=True)
    journal = Journal(journal_folder)

    kept = {*request.snapshots, *(snapshots(request.plan.rounds) if request.uncertainty else ())}

    def progress(event: Progress) -> None:
        if event.what == "committed" and event.round in kept:
            shutil.copy(journal.weights_path(event.round), folder)
        watcher.progress(event)

    try:
        watcher.stage("rounds", request.plan.rounds * len(sites))
        outcome = run_rounds(
            request.plan,
            [site.station for site in sites],
            journal,
            seed=request.seed,
            execution=request.execution,
            start=request.start,
            on_progress=progress,
        )
        result |= report_outcome(request, folder, outcome)
        unseen: list[SiteFolder] = []
        if is_measured_by_scanner(request):
            unseen = find_unseen(request, sites, watcher)
            watcher.stage("scanners")
            result["scanners"] = measure_scanners(request.plan, outcome.best, sites, unseen)
        if request.uncertainty:
            watcher.stage("uncertainty", sum(count_test(request.plan, site) for site in (*sites, *unseen)))
            result["uncertainty"] = calibration_of(
                request.plan, folder, outcome.best, sites, unseen, on_patient=watcher.step
            )
        if request.compare and can_compare(request.plan, sites, outcome):
            result["comparison"] = compare(request, sites, outcome, watcher)
        if request.plan.privacy is None and (classical := learn_nothing(request, sites, watcher)):
            result["classical"] = classical
        if request.plan.privacy is None and (card := find_stability(request, sites, outcome)):
            result["stability"] = card
        take_pictures(request, [*sites, *unseen] if request.pictures else [], outcome, watcher)
        result["status"] = "finished"
    except BaseException as error:
        result |= what_is_done(journal, error)
        raise
    finally:
        result["seconds"] = round(time.monotonic() - began, 1)
        write_result(folder, result)
    return result


def use_folder(folder: Path) -> Path:
    """Make the result folder; R231 if that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise FederadError(
            "R231",
            happened=f"The result folder {folder} cannot be written ({error.strerror}).",
            because="Everything a run makes goes there.",
            remedies=("give another folder with --out", "or free the path and try again"),
        ) from None
    return folder.resolve()


def find_sites(request: Request, watcher: Watcher) -> list[SiteFolder]:
    """The sites of a request: emulated hospitals (made if need be), or the folders in ``data``."""
    require_minimum(request)
    stations = request.shared / "stations"
    if request.data is not None and request.data.is_file():
        folder, n_sites = request.shared / "sites", request.n_sites or DEFAULT_SITES
        watcher.stage("dealing images")
        dealt = deal(request.data, request.plan, n_sites=n_sites, folder=folder, seed=request.seed)
        return [SiteFolder(path.name, path, stations / path.name) for path in dealt]
    if request.data is not None:
        data = request.data.resolve()
        folders = sorted(path for path in data.iterdir() if path.is_dir()) if data.is_dir() else []
        for name in request.left_out:
            if name not in {path.name for path in folders}:
                raise impossible(
                    f"--leave-out names {name}, and {request.data} holds no such folder.",
                    "A site is left out by the name of its folder.",
                    f"one of: {', '.join(path.name for path in folders) or 'none'}",
                )
        folders = [path for path in folders if path.name not in request.left_out]
        if request.sites:
            folders = [path for path in folders if path.name in request.sites]
        needed = len(request.sites) or request.n_sites or request.plan.strategy.minimum_sites
        if len(folders) < needed:
            raise impossible(
                f"{request.data} holds {len(folders)} folders, and the run needs {needed}.",
                "Each folder in it is one site.",
                "--data FOLDER with one folder of images for each site",
            )
        return [SiteFolder(path.name, path, stations / path.name) for path in folders[: request.n_sites]]
    hospitals = emulate_for(request, watcher)
    return [SiteFolder(h.name, h.folder, stations / h.name) for h in hospitals]


def require_minimum(request: Request) -> None:
    """R230 for a number of sites with which the first round could never end."""
    needed = request.plan.strategy.minimum_sites
    if request.n_sites is not None and request.n_sites < needed:
        raise impossible(
            f"The plan needs {needed} sites in each round, --sites asks for {request.n_sites}.",
            "The first round could never end.",
            f"--sites {needed}, or a lower minimum_sites under [strategy]",
        )


def emulate_for(request: Request, watcher: Watcher) -> list[EmulatedHospital]:
    """The emulated hospitals of a request, written to ``hospitals``."""
    n_sites = request.n_sites or DEFAULT_SITES
    watcher.stage("emulating hospitals", n_sites * request.plan.simulation.patients)
    return emulate(
        request.plan,
        n_sites=n_sites,
        folder=request.shared / "hospitals",
        seed=request.seed,
        workers=request.execution.workers,
        progress=watcher.step,
    )


def prepare(request: Request, sites: list[SiteFolder], watcher: Watcher, *, train: bool = True) -> None:
    """Stations ready to train or to be measured alone, with nothing answered before."""
    watcher.stage("reading images" if train else "reading unseen images", len(sites))
    for site in sites:
        forget_history(site.station)
    prepare_stations(
        request.plan,
        sites,
        seed=request.seed,
        workers=request.execution.workers,
        on_site=lambda name: watcher.step(detail=name),
        train=train,
    )


def is_measured_by_scanner(request: Request) -> bool:
    """Whether the plan is about scanners, and its patients may be measured exactly."""
    plan = request.plan
    is_about_scanners = plan.adaptation is not None or plan.simulation.unseen is not None or bool(request.left_out)
    return is_about_scanners and (request.data is None or plan.privacy is None)


def find_unseen(request: Request, sites: list[SiteFolder], watcher: Watcher) -> list[SiteFolder]:
    """The hospitals that train nothing, ready to be measured: those of ``simulation.unseen``, or what is left out of real
    images."""
    stations = request.shared / "stations"
    if request.data is not None:
        unseen = [SiteFolder(name, request.data.resolve() / name, stations / name) for name in request.left_out]
    else:
        unseen = [SiteFolder(h.name, h.folder, stations / h.name) for h in _emulate_unseen(request, sites, watcher)]
    if unseen:
        prepare(request, unseen, watcher, train=False)
    return unseen


def _emulate_unseen(request: Request, sites: list[SiteFolder], watcher: Watcher) -> list[EmulatedHospital]:
    plan = request.plan
    if not plan.simulation.unseen:
        return []
    watcher.stage("emulating unseen hospitals", len(plan.simulation.unseen) * plan.simulation.patients)
    return emulate_unseen(
        plan,
        n_sites=len(sites),
        folder=request.shared / "unseen",
        seed=request.seed,
        workers=request.execution.workers,
        progress=watcher.step,
    )


def require_scanners(request: Request, sites: list[SiteFolder]) -> None:
    """R112 for a plan with an adversary where no site has two scanners; R113 for one that asks for moments, where all sites
    together have fewer."""
    plan = request.plan
    if plan.adaptation is None or not plan.is_adversarial:
        return
    table = ScannerTable(plan.adaptation.scanners)
    told_apart: list[set[int]] = []
    for site in sites:
        cohort = cohort_of(site, plan)
        studies = [study for patient in cohort.patients("train") for study in patient.studies]
        told_apart.append({table.place(cohort.scanner(study)) for study in studies} - {UNKNOWN})
    if plan.asks_for_moments:
        if len(set().union(*told_apart)) < 2:
            raise FederadError(
                "R113",
                happened=f"The {len(sites)} sites together have fewer than two scanners that the plan tells apart.",
                because="A discriminator needs two to tell apart, wherever it is trained.",
                remedies=(
                    'deal more scanners to the sites: scanners = ["siemens-t1gd-3t", "ge-t2-1.5t"] under [simulation]',
                    "or remove adversarial from [adaptation]",
                ),
            )
        return
    if all(len(places) < 2 for places in told_apart):
        raise FederadError(
            "R112",
            happened=f"None of the {len(sites)} sites has studies of two scanners that the plan tells apart.",
            because="A discriminator that sees one scanner says its name whatever it is shown.",
            remedies=(
                'join scanners of a site: scanners = ["siemens-t1gd-3t+ge-t2-1.5t"] under [simulation]',
                'or set adversarial = "moments", for sites with one scanner each',
                "or remove adversarial from [adaptation]",
            ),
        )


def impossible(happened: str, because: str, remedy: str) -> FederadError:
    """R230: a request that makes no sense."""
    return FederadError("R230", happened=happened, because=because, remedies=(remedy,))


def describe(request: Request, sites: list[SiteFolder]) -> dict[str, Any]:
    """The part of a result that is known before the first round."""
    plan, task = request.plan, task_for(request.plan)
    return {
        "plan": plan.name,
        "plan_sha256": plan.sha256,
        "settings": json.loads(plan.canonical_json()),
        "task": plan.task.kind,
        "headline": task.headline,
        "metrics": dict(task.metrics),
        "labels": list(plan.task.labels),
        "engine": request.execution.engine,
        "workers": request.execution.workers,
        "seed": request.seed,
        "command": request.command,
        "sites": [describe_site(plan, site) for site in sites],
        "rounds": [],
        "test": None,
        "comparison": None,
        "privacy": None,
        "scanners_sha256": scanners_sha256(named_scanners(plan)) if request.data is None else None,
        "versions": {name: version(name) for name in ("federad", "flwr", "torch", "monai")}
        | {"python": platform.python_version()},
    }


def describe_site(plan: Plan, site: SiteFolder) -> dict[str, Any]:
    """Name, scanners, patients and skipped files of a site."""
    station = open_station(site.station)
    cohort = station.cohort(plan)
    reasons = [skipped.reason for skipped in (*station.catalogue().skipped(), *cohort.skipped)]
    return {
        "name": site.name,
        "scanner": ", ".join(cohort.scanners) or "unknown",
        "patients": {split: len(cohort.patients(split)) for split in ("train", "validation", "test")},
        "skipped": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        **({"simulated": cohort.n_simulated} if cohort.n_simulated else {}),
    }


def report_outcome(request: Request, folder: Path, outcome: Outcome) -> dict[str, Any]:
    """The part of a result that the rounds gave; the released weights go to ``model.safetensors``."""
    header = {"plan": json.loads(request.plan.canonical_json()), "round": outcome.best_round}
    (folder / "model.safetensors").write_bytes(encode(outcome.best, json.dumps(header, sort_keys=True)))
    return result_of(request.plan, outcome)


def count_test(plan: Plan, site: SiteFolder) -> int:
    """Test patients of a site."""
    return len(cohort_of(site, plan).patients("test"))


def what_is_done(journal: Journal, error: BaseException) -> dict[str, Any]:
    """The part of a result that a run which did not finish can give."""
    status, message = "failed", f"An unexpected {type(error).__name__}."
    if isinstance(error, KeyboardInterrupt):
        status, message = "stopped", "Stopped by the user."
    elif isinstance(error, FederadError):
        status, message = "paused", str(error)
    records = journal.records()
    last = records[-1]["weights_sha256"] if records else None
    return {"status": status, "message": message, "rounds": records, "weights_sha256": last}


def can_compare(plan: Plan, sites: list[SiteFolder], outcome: Outcome) -> bool:
    """Whether a comparison may be made. It measures exactly, which under ``[privacy]`` is for emulated patients only."""
    if plan.privacy is None:
        return bool(outcome.test.per_site)
    return all(is_emulated(site.data) for site in sites)


def compare(request: Request, sites: list[SiteFolder], outcome: Outcome, watcher: Watcher) -> dict[str, Any]:
    """Federated beside central and local models, on every site's test patients: exactly, whatever was released of them."""
    began = time.monotonic()
    plan, metric = request.plan, task_for(request.plan).headline
    watcher.stage("central and local models", len(sites) + 1)
    identity = Journal(request.folder / "journal").identity()
    rows = [
        *shared_rows(plan, sites, outcome.best, outcome.test.per_site, identity.run if identity else ""),
        *baselines(
            plan,
            sites,
            seed=request.seed,
            workers=request.execution.workers,
            on_done=lambda name: watcher.step(detail=name),
            start=request.start,
        ),
    ]
    own, elsewhere = local_means(rows, metric)
    personal_own, personal_elsewhere = local_means(rows, metric, "personal")
    return {
        "metric": metric,
        "rows": [describe_row(row, metric) for row in rows],
        "local_own": own,
        "local_elsewhere": elsewhere,
        "personal_own": personal_own,
        "personal_elsewhere": personal_elsewhere,
        "seconds": round(time.monotonic() - began, 1),
    }


def describe_row(row: Row, metric: str) -> dict[str, Any]:
    """One method, with ``metric`` at each site and its mean."""
    return {
        "method": row.method,
        "per_site": {site: m[metric] for site, m in row.per_site.items() if metric in m},
        "interval": row.interval,
        "metrics": row.per_site,
        "mean": row.mean(metric),
    }


def learn_nothing(request: Request, sites: list[SiteFolder], watcher: Watcher) -> list[dict[str, Any]]:
    """The task's methods without a network, on every site's test patients; empty where it has none."""
    task = task_for(request.plan)
    if type(task).classical is Task.classical:
        return []
    watcher.stage("methods without learning", len(sites))
    rows = classical_rows(request.plan, sites, on_done=lambda name: watcher.step(detail=name))
    return [describe_row(row, task.headline) for row in rows]


def find_stability(request: Request, sites: list[SiteFolder], outcome: Outcome) -> dict[str, dict[str, float]]:
    """The mean stability card of each site; empty for tasks without one."""
    weights = encoded(outcome.best)
    cards = {site.name: stability_cards(request.plan, site, weights) for site in sites}
    return {name: mean_metrics(of_site) for name, of_site in cards.items() if of_site}


def local_means(rows: list[Row], metric: str, which: str = "local") -> tuple[float | None, float | None]:
    """Mean of each site's model, local or ``personal``, on its own patients, and on all others'; None where none is."""
    own, elsewhere = [], []
    for row in rows:
        kind, _, home = row.method.partition(":")
        if kind == which:
            own += [m[metric] for site, m in row.per_site.items() if site == home and metric in m]
            elsewhere += [m[metric] for site, m in row.per_site.items() if site != home and metric in m]
    return (float(np.mean(own)) if own else None), (float(np.mean(elsewhere)) if elsewhere else None)


def take_pictures(request: Request, sites: list[SiteFolder], outcome: Outcome, watcher: Watcher) -> None:
    """Best, median and worst test patient of each site, also of unseen ones, with truth and prediction, to
    ``pictures.npz``."""
    plan, weights = request.plan, encoded(outcome.best)
    watcher.stage("pictures", len(sites))
    arrays: dict[str, Any] = {}
    meta: list[str] = []
    if request.execution.workers == 1:
        shown = [show_patients(plan, site, weights) for site in sites]
    else:
        with process_pool(min(request.execution.workers, len(sites))) as pool:
            shown = list(pool.map(show_patients, [plan] * len(sites), sites, [weights] * len(sites)))
    shows = task_for(plan).shown
    for site, patients in zip(sites, shown, strict=True):
        scanner = ", ".join(cohort_of(site, plan).scanners)
        for (patient, picture), which in zip(patients, ("best", "median", "worst"), strict=False):
            k = len(meta)
            arrays |= {
                f"{k}/image": picture.image.astype(np.float32),
                f"{k}/truth": picture.truth.astype(np.uint8),
                f"{k}/prediction": picture.prediction.astype(np.uint8),
            }
            if picture.heat is not None:
                arrays[f"{k}/heat"] = picture.heat.astype(np.float32)
            arrays |= {f"{k}/doubt {name}": doubt.astype(np.float32) for name, doubt in picture.doubts.items()}
            meta.append(
                json.dumps(
                    {
                        "site": site.name,
                        "scanner": scanner,
                        "which": which,
                        "shown": shows,
                        shows: patient.metrics[shows],
                        "caption": picture.caption,
                        "pixel_mm": list(picture.pixel_mm),
                        "panels": list(picture.panels),
                        "doubts": list(picture.doubts),
                    }
                )
            )
        watcher.step(detail=site.name)
    np.savez_compressed(request.folder / "pictures.npz", meta=np.array(meta), **arrays)


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """``result.json`` and ``report.html``."""
    from simulation.report import write_report

    (folder / "result.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    write_report(folder)
