"""Named comparisons, each with claims that a reader can check by running it.

An experiment runs a plan for several seeds into ``DIR/seed-0``, ``DIR/seed-1``, ...; a seed whose result is there for the
same plan is not run again, so an interrupted experiment goes on where it was. Its ``result.json`` is kept as
``docs/results/NAME.json``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared_models.plan import Plan
from simulation.engine import Execution
from simulation.run import Request, Watcher, simulate, use_folder


@dataclass(frozen=True)
class Experiment:
    """One named comparison."""

    name: str
    title: str
    seeds: tuple[int, ...]
    n_sites: int
    plan: Callable[..., Plan]
    """``plan(quick=...)`` gives the plan to run."""

    evaluate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]
    """Rows and claims from the results of all seeds."""


def row(method: str, metric: str, split: str, values: Sequence[float]) -> dict[str, Any]:
    """A line of an experiment's table: mean and standard deviation over seeds."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {
        "method": method,
        "metric": metric,
        "split": split,
        "mean": float(np.mean(values)),
        "sd": spread,
        "values": list(values),
    }


def claim(id_: str, text: str, values: Sequence[float], at_least: float) -> dict[str, Any]:
    """A claim that the mean of ``values`` over seeds is at least ``at_least``."""
    value = float(np.mean(values))
    return {
        "claim": text,
        "value": value,
        "values": list(values),
        "expected": at_least,
        "holds": value >= at_least,
        "id": id_,
    }


def run_experiment(
    experiment: Experiment, folder: Path, *, quick: bool, workers: int, watcher: Watcher, command: str
) -> dict[str, Any]:
    """Run what is missing of an experiment and write its result and report."""
    from simulation.report import write_experiment_report

    began = time.monotonic()
    folder = use_folder(folder)
    plan = experiment.plan(quick=quick)
    seeds = experiment.seeds[:1] if quick else experiment.seeds
    results = [_seed_result(experiment, plan, folder / f"seed-{seed}", seed, workers, watcher) for seed in seeds]
    result = {
        "experiment": experiment.name,
        "title": experiment.title,
        "quick": quick,
        "seeds": list(seeds),
        "plan_sha256": plan.sha256,
        "scanners_sha256": results[0]["scanners_sha256"],
        "command": command,
        "seconds": round(sum(r["seconds"] for r in results), 1),
        "seconds_this_time": round(time.monotonic() - began, 1),
        **experiment.evaluate(results),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_experiment_report(folder)
    return result


def _seed_result(
    experiment: Experiment, plan: Plan, folder: Path, seed: int, workers: int, watcher: Watcher
) -> dict[str, Any]:
    done = _finished(folder, plan)
    request = Request(plan, folder, experiment.n_sites, seed=seed, execution=Execution(workers=workers))
    return done or simulate(request, watcher)


def _finished(folder: Path, plan: Plan) -> dict[str, Any] | None:
    try:
        result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if result.get("status") == "finished" and result["plan_sha256"] == plan.sha256 else None
