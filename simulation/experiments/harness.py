"""Named comparisons, each with claims that a reader can check by running it.

An experiment compares arms: plans that are run for several seeds, into ``DIR/seed-0/ARM``, ``DIR/seed-1/ARM``, ... Arms
whose plans describe the same hospitals share them within a seed, so that they are emulated once. An arm whose result is
there for the same plan and seed is not run again, so an interrupted experiment goes on where it was. Its ``result.json``
is kept as ``docs/results/NAME.json``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shared_models.plan import Plan
from simulation.baselines import measured_mean
from simulation.consortium import emulation_sha256
from simulation.engine import Execution
from simulation.intervals import t_interval
from simulation.run import Request, Watcher, find_sites, impossible, simulate, use_folder

Results = Mapping[str, Sequence[dict[str, Any]]]
"""For each arm its results, one for each seed, in the order of the seeds."""


@dataclass(frozen=True)
class Experiment:
    """One named comparison."""

    name: str
    title: str
    seeds: tuple[int, ...]
    n_sites: int
    arms: Callable[..., dict[str, Plan]]
    """``arms(quick=...)`` gives the plans to run, in this order, each by its name; an only one is called ``""``."""

    evaluate: Callable[[Results], dict[str, Any]]
    """Rows and claims from the results."""

    data: str | None = None
    """What is given with ``--data``, in words, for an experiment on real images; None emulates hospitals."""

    deal: Callable[[Path, Path, int], Path] | None = None
    """``deal(data, folder, seed)`` writes the data below ``folder`` as one folder for each site, and says where; None takes
    it as it is."""

    sites: tuple[str, ...] = ()
    """Folders of the data that take part; empty for the first ``n_sites``."""

    left_out: Callable[[str], tuple[str, ...]] = lambda arm: ()
    """Folders of the data that train nothing in an arm, where its model is tested."""

    compares: bool = True
    """Whether each run is compared with a central and with local models."""

    pictures: bool = True
    """Whether the report of each run shows test patients."""

    measured_at: str | None = None
    """The arm on whose test patients the models of all arms are measured, the first to run; its means are ``measured`` in
    each result. None where each run is measured on its own."""

    after: Callable[[Request], dict[str, Any]] | None = None
    """Looked at once when an arm has run, and kept as ``after`` in its result; such runs are compared with nothing else,
    but for the arm ``compared``."""

    compared: str | None = None

    snapshots: Callable[[Plan], tuple[int, ...]] = lambda plan: ()
    """Rounds of an arm whose weights are kept for it."""

    uncertainty: bool = False
    """Whether each run is looked at for how sure its models are."""

    configure: Callable[[str, Request, Watcher], Plan] | None = None
    """The plan of an arm that follows from the hospitals of a seed; None where all are what ``arms`` gives."""


def row(method: str, metric: str, split: str, values: Sequence[float], **more: Any) -> dict[str, Any]:
    """A line of an experiment's table: mean, standard deviation and 95 % t-interval over seeds.

    ``more`` may hold ``line`` and ``at``: the row is then a point of a drawing, on this line above this place.
    """
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {
        "method": method,
        "metric": metric,
        "split": split,
        "mean": float(np.mean(values)),
        "sd": spread,
        "interval": t_interval(values),
        "values": list(values),
        **more,
    }


def claim(
    id_: str, text: str, values: Sequence[float], *, at_least: float | None = None, at_most: float | None = None
) -> dict[str, Any]:
    """A claim that the mean of ``values`` over seeds is at least, or at most, so much; give one of the two.

    The interval is that of the values: give differences or ratios that were formed seed by seed.
    """
    bound, expected = ("at least", at_least) if at_least is not None else ("at most", at_most)
    if expected is None:
        raise ValueError(f"the claim {id_} expects nothing")
    value = float(np.mean(values))
    return {
        "claim": text,
        "value": value,
        "interval": t_interval(values),
        "values": list(values),
        "expected": expected,
        "bound": bound,
        "holds": value >= expected if bound == "at least" else value <= expected,
        "id": id_,
    }


def run_experiment(
    experiment: Experiment,
    folder: Path,
    *,
    quick: bool,
    workers: int,
    watcher: Watcher,
    command: str,
    data: Path | None = None,
) -> dict[str, Any]:
    """Run what is missing of an experiment and write its result and report; ``data`` is what it asks for."""
    from simulation.report import write_experiment_report

    if (experiment.data is None) != (data is None):
        raise impossible(
            f"The experiment {experiment.name} {'runs on real images' if data is None else 'emulates its hospitals'}.",
            "It is about the data that it names, and about no other.",
            f"--data {experiment.data}" if data is None else "leave out --data",
        )

    began = time.monotonic()
    folder = use_folder(folder)
    arms = experiment.arms(quick=quick)
    seeds = experiment.seeds[:1] if quick else experiment.seeds
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for seed in seeds:
        of_seed = folder / f"seed-{seed}"
        dealt = experiment.deal(data, of_seed / "dealt", seed) if experiment.deal and data else data
        requests = {arm: _request(experiment, plan, of_seed, arm, seed, workers, dealt) for arm, plan in arms.items()}
        for arm in arms:
            if experiment.configure is not None:
                configured = experiment.configure(arm, requests[arm], watcher)
                requests[arm] = replace(requests[arm], plan=configured)
            results[arm].append(_result(experiment, requests[arm], requests, watcher))
    every = [result for of_arm in results.values() for result in of_arm]
    result = {
        "experiment": experiment.name,
        "title": experiment.title,
        "quick": quick,
        "seeds": list(seeds),
        "plans": {arm: plan.sha256 for arm, plan in arms.items()},
        "scanners_sha256": every[0]["scanners_sha256"],
        "command": command,
        "seconds": round(sum(r["seconds"] for r in every), 1),
        "seconds_this_time": round(time.monotonic() - began, 1),
        **experiment.evaluate(results),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    write_experiment_report(folder)
    return result


def _request(
    experiment: Experiment, plan: Plan, folder: Path, arm: str, seed: int, workers: int, data: Path | None
) -> Request:
    left_out = experiment.left_out(arm)
    hospitals = "data" if data else emulation_sha256(plan, n_sites=experiment.n_sites, seed=seed)[:12]
    return Request(
        plan,
        folder / arm,
        experiment.n_sites - len(left_out),
        data,
        sites=experiment.sites,
        left_out=left_out,
        seed=seed,
        execution=Execution(workers=workers),
        sites_folder=folder / f"sites-{hospitals}",
        compare=experiment.compares
        and experiment.measured_at is None
        and (experiment.after is None or experiment.compared == arm),
        snapshots=experiment.snapshots(plan),
        uncertainty=experiment.uncertainty,
        pictures=experiment.pictures,
    )


def _result(
    experiment: Experiment, request: Request, requests: Mapping[str, Request], watcher: Watcher
) -> dict[str, Any]:
    result = _finished(request) or simulate(request, watcher)
    if experiment.measured_at is not None and "measured" not in result:
        began = time.monotonic()
        watcher.stage("measuring")
        sites = find_sites(requests[experiment.measured_at], watcher)
        result["measured"] = measured_mean(request.plan, request.folder / "model.safetensors", sites)
        _keep(request, result, began)
    if experiment.after is not None and "after" not in result:
        began = time.monotonic()
        watcher.stage("looking at what came out")
        result["after"] = experiment.after(request)
        _keep(request, result, began)
    return result


def _keep(request: Request, result: dict[str, Any], began: float) -> None:
    """A result with what was added to it, and the time that took."""
    result["seconds"] = round(result["seconds"] + time.monotonic() - began, 1)
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    (request.folder / "result.json").write_text(text, encoding="utf-8")


def _finished(request: Request) -> dict[str, Any] | None:
    try:
        result: dict[str, Any] = json.loads((request.folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_same = result.get("status") == "finished" and result["plan_sha256"] == request.plan.sha256
    return result if is_same else None
