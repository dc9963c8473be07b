"""Finished runs and experiments in MLflow, for researchers who keep their figures there.

It reads what a run has left and sends it to the tracking server or database that its caller names; nothing is sent while
anything trains, and MLflow's own telemetry is off. Each run of a plan is a run there: the plan's keys are parameters, the
rounds and the test metrics (means and by site) are metrics, ``result.json`` and ``report.html`` are artifacts.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared_models.errors import FederadError

if TYPE_CHECKING:
    from mlflow import MlflowClient

Finished = Sequence[tuple[Path, str, dict[str, Any]]]

LONGEST_PARAMETER = 500
"""Characters of a value that MLflow keeps."""

UNNAMED = re.compile(r"[^\w .:/-]")
"""What MLflow takes in no name."""


def log_results(runs: Finished, experiment: str, uri: str) -> int:
    """Send finished runs to MLflow and return how many were not there yet.

    Parameters
    ----------
    runs
        Folder, name and ``result.json`` of each.
    experiment
        Name of the experiment in MLflow; it is made where it is missing.
    uri
        Of the tracking server, or of a database such as ``sqlite:///mlflow.db``.

    Raises
    ------
    FederadError
        R234 without the package, R237 where MLflow refuses.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError:
        raise FederadError(
            "R234",
            happened="The package mlflow-skinny is not installed.",
            because="federad logs to MLflow through it, and needs it for nothing else.",
            remedies=('pip install "federad[tracking]"', "or read result.json: it holds the same figures"),
        ) from None
    try:
        client = MlflowClient(uri)
        known = client.get_experiment_by_name(experiment)
        into = known.experiment_id if known else client.create_experiment(experiment)
        return sum(_logged(client, into, folder, name, result) for folder, name, result in runs)
    except (MlflowException, OSError) as error:
        said = str(error).splitlines()[0][:300]
        raise FederadError(
            "R237",
            happened=f"MLflow at {uri} did not take the results: {said}",
            because="Figures that were not sent are not there; those in the folder are as they were.",
            remedies=("give --to the address of a running server, or sqlite:///FILE", "and the same command again"),
        ) from error


def _logged(client: MlflowClient, experiment: str, folder: Path, name: str, result: dict[str, Any]) -> bool:
    """Whether the run was new there; one that broke off half-way is deleted and sent again."""
    tags = {
        "federad.plan_sha256": result["plan_sha256"],
        "federad.weights_sha256": str(result["weights_sha256"]),
        "federad.seed": str(result["seed"]),
        "federad.name": name,
        "federad.engine": result["engine"],
        "federad.command": result["command"],
    }
    same = " and ".join(f"tags.`{key}` = '{tags[key]}'" for key in list(tags)[:4])
    for run in client.search_runs([experiment], same):
        if run.info.status == "FINISHED":
            return False
        client.delete_run(run.info.run_id)
    began = int(1000 * datetime.fromisoformat(result["started"]).timestamp())
    run_id = client.create_run(experiment, start_time=began, tags=tags, run_name=name).info.run_id
    for key, value in _parameters(result):
        client.log_param(run_id, key, value)
    for key, number, step in _metrics(result):
        client.log_metric(run_id, key, number, step=step, timestamp=began)
    for kept in ("result.json", "report.html"):
        if (folder / kept).exists():
            client.log_artifact(run_id, str(folder / kept))
    client.set_terminated(run_id, end_time=began + int(1000 * result["seconds"]))
    return True


def finished_runs(folder: Path, result: dict[str, Any]) -> Finished:
    """The finished runs of a result folder: itself, or every arm and seed of an experiment."""
    if "experiment" not in result:
        return [(folder, result["plan"], result)]
    found = []
    for seed in result["seeds"]:
        for arm in result["plans"]:
            of_arm = folder / f"seed-{seed}" / arm
            one = json.loads((of_arm / "result.json").read_text(encoding="utf-8"))
            found.append((of_arm, f"{arm or one['plan']}, seed {seed}", one))
    return found


def _parameters(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The plan's keys as ``table.key``."""
    for key, value in result["settings"].items():
        inner = value.items() if isinstance(value, dict) else [(None, value)]
        for name, one in inner:
            yield (key if name is None else f"{key}.{name}"), json.dumps(one)[:LONGEST_PARAMETER]


def _metrics(result: dict[str, Any]) -> Iterator[tuple[str, float, int]]:
    """Name, number and round: training loss and validation of each round; at the end the test, in the mean and by site."""
    for one in result["rounds"]:
        yield from _numbers({"training_loss": one["training_loss"], **(one["validation"] or {})}, "", one["round"])
    last, tested = len(result["rounds"]), dict(result["test"] or {})
    per_site = tested.pop("per_site", {})
    yield from _numbers(tested, "test ", last)
    for site, figures in per_site.items():
        yield from _numbers(figures, f"test {site} ", last)
    for place in ("seen_mean", "unseen_mean"):
        yield from _numbers(
            (result.get("scanners") or {}).get(place) or {}, f"{place.removesuffix('_mean')} scanners ", last
        )


def _numbers(figures: dict[str, Any], prefix: str, step: int) -> Iterator[tuple[str, float, int]]:
    for name, figure in figures.items():
        value = figure["value"] if isinstance(figure, dict) and "value" in figure else figure
        if isinstance(value, int | float):
            yield UNNAMED.sub("-", prefix + name), float(value), step
