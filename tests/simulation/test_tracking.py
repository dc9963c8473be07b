"""Results in MLflow, in a database of its own."""

from __future__ import annotations

import json

import pytest

from shared_models.errors import FederadError
from simulation import cli
from simulation.run import Request, Watcher, simulate


@pytest.fixture(scope="module")
def finished(smoke_plan, tmp_path_factory):
    """The folder of a run that has ended, with two hospitals of three patients."""
    plan = smoke_plan.model_copy(
        update={"simulation": smoke_plan.simulation.model_copy(update={"patients": 4, "slices": 2})}
    )
    folder = tmp_path_factory.mktemp("run")
    simulate(Request(plan, folder, 2, compare=False), Watcher())
    return folder


@pytest.fixture
def client(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    return mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")


@pytest.mark.slow
def test_run_is_there_once_with_its_plan_rounds_and_files(finished, client, tmp_path, monkeypatch, capsys):
    """
    The same command again sends nothing; every round has its loss and validation, and the report can be opened there.
    """
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        cli.log(finished, to=f"sqlite:///{tmp_path}/mlflow.db")
    said = capsys.readouterr().out

    result = json.loads((finished / "result.json").read_text())
    experiment = client.get_experiment_by_name(result["plan"])
    (run,) = client.search_runs([experiment.experiment_id])
    assert said == f"{result['plan']}: 1 of 1 runs sent\n{result['plan']}: 0 of 1 runs sent\n"
    assert run.info.status == "FINISHED"
    assert run.data.params["rounds"] == str(len(result["rounds"]))
    assert run.data.params["task.kind"] == '"segmentation"'
    assert run.data.metrics["test dice"] == pytest.approx(result["test"]["dice"])
    losses = client.get_metric_history(run.info.run_id, "training_loss")
    assert [(one.step, one.value) for one in losses] == [
        (one["round"], one["training_loss"]) for one in result["rounds"]
    ]
    assert {kept.path for kept in client.list_artifacts(run.info.run_id)} == {"result.json", "report.html"}


@pytest.mark.slow
def test_run_that_broke_off_half_way_is_sent_again(finished, client, tmp_path, monkeypatch):
    """
    What is unfinished there is thrown away.
    """
    monkeypatch.chdir(tmp_path)
    cli.log(finished, to=f"sqlite:///{tmp_path}/mlflow.db", name="again")
    experiment = client.get_experiment_by_name("again")
    (before,) = client.search_runs([experiment.experiment_id])
    client.update_run(before.info.run_id, status="RUNNING")
    cli.log(finished, to=f"sqlite:///{tmp_path}/mlflow.db", name="again")

    (after,) = client.search_runs([experiment.experiment_id])
    assert (after.info.status, after.info.run_id != before.info.run_id) == ("FINISHED", True)


@pytest.mark.slow
@pytest.mark.parametrize("address", ["nowhere://at-all", "http://127.0.0.1:9"])
def test_address_that_takes_nothing_is_named(finished, address):
    """
    R237, and the folder is as it was.
    """
    pytest.importorskip("mlflow")
    before = (finished / "result.json").read_bytes()
    with pytest.raises(FederadError, match="R237") as error:
        cli.log(finished, to=address)

    assert address in str(error.value)
    assert (finished / "result.json").read_bytes() == before
