"""Results in MLflow, in a database of its own.

The package is fetched for these tests alone, since MONAI imports it wherever it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from simulation.run import Request, Watcher, simulate

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]

RUNS = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1])
found = []
for run in client.search_runs([client.get_experiment_by_name(sys.argv[2]).experiment_id]):
    about, data = run.info, run.data
    losses = [(one.step, one.value) for one in client.get_metric_history(about.run_id, "training_loss")]
    files = sorted(kept.path for kept in client.list_artifacts(about.run_id))
    found.append([about.run_id, about.status, data.params, data.metrics, losses, files])
print(json.dumps(found))
"""

BREAK_OFF = """
import sys
from mlflow import MlflowClient
MlflowClient(sys.argv[1]).update_run(sys.argv[2], status="RUNNING")
"""


@pytest.fixture(scope="module")
def finished(smoke_plan, tmp_path_factory):
    """The folder of a run that has ended, with two hospitals of four patients."""
    plan = smoke_plan.model_copy(
        update={"simulation": smoke_plan.simulation.model_copy(update={"patients": 4, "slices": 2})}
    )
    folder = tmp_path_factory.mktemp("run")
    simulate(Request(plan, folder, 2, compare=False), Watcher())
    return folder


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Where MLflow's client lies, outside of what everything else here sees."""
    folder = tmp_path_factory.mktemp("packages")
    words = ["pip", "install", "--quiet", "--target", folder, "-c", ROOT / "constraints.txt", "mlflow-skinny"]
    subprocess.run([sys.executable, "-m", *words], check=True)
    return folder


@pytest.fixture
def python(packages, tmp_path):
    """Runs Python with MLflow in a folder of its own; what it says."""

    def run(*words) -> subprocess.CompletedProcess:
        env = {**os.environ, "PYTHONPATH": f"{packages}:{ROOT}", "HOME": str(tmp_path)}
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, check=False, cwd=tmp_path, env=env, capture_output=True, text=True)

    return run


@pytest.fixture
def log(python, finished):
    return lambda to, *more: python("-m", "simulation.cli", "log", finished, "--to", to, *more)


def runs(python, uri, experiment):
    return json.loads(python("-c", RUNS, uri, experiment).stdout)


def test_run_is_there_once_with_its_plan_rounds_and_files(finished, python, log, tmp_path):
    """
    The same command again sends nothing; every round has its loss and validation, and the report can be opened there.
    """
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    said = [log(uri).stdout for _ in range(2)]

    result = json.loads((finished / "result.json").read_text())
    ((_, status, params, metrics, losses, files),) = runs(python, uri, result["plan"])
    assert said == ["smoke: 1 of 1 runs sent\n", "smoke: 0 of 1 runs sent\n"]
    assert status == "FINISHED"
    assert params["rounds"] == str(len(result["rounds"]))
    assert params["task.kind"] == '"segmentation"'
    assert metrics["test dice"] == pytest.approx(result["test"]["dice"])
    assert losses == [[one["round"], one["training_loss"]] for one in result["rounds"]]
    assert files == ["report.html", "result.json"]
    assert not list(tmp_path.rglob("telemetry*"))


def test_run_that_broke_off_half_way_is_sent_again(python, log, tmp_path):
    """
    What is unfinished there is thrown away.
    """
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    log(uri, "--name", "again")
    ((before, *_),) = runs(python, uri, "again")
    python("-c", BREAK_OFF, uri, before)
    log(uri, "--name", "again")

    ((after, status, *_),) = runs(python, uri, "again")
    assert (status, after != before) == ("FINISHED", True)


@pytest.mark.parametrize("address", ["nowhere://at-all", "http://127.0.0.1:9"])
def test_address_that_takes_nothing_is_named(finished, log, address):
    """
    R237, and the folder is as it was.
    """
    before = (finished / "result.json").read_bytes()
    done = log(address)

    assert done.returncode == 237
    assert address in done.stderr
    assert (finished / "result.json").read_bytes() == before


def test_package_that_is_missing_is_named(finished):
    """
    R234 says how it is installed; nothing else of federad needs it.
    """
    words = [sys.executable, "-m", "simulation.cli", "log", str(finished), "--to", "sqlite:///mlflow.db"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 234
    assert "federad[tracking]" in done.stderr
