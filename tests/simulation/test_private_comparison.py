"""Private models beside local and central ones: on emulated patients only, each what the report says it is."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from privately import private

from shared_models.weights import initial_weights
from simulation import run
from simulation.baselines import Steps
from simulation.cli import show_result
from simulation.engine import Execution
from simulation.run import Request, Watcher, simulate
from simulation.stations import SiteFolder, cohort_of, open_station, prepare_stations

PRIVACY = {"epsilon": 8.0, "patients_per_step": 2, "steps_per_round": 2, "metrics_every": 1, "metrics_noise": 3.0}
METHODS = ["federated", "central", "local:site-1", "local:site-2", "local:site-3"]


@pytest.fixture(scope="module")
def plan(smoke_plan):
    return private(smoke_plan, PRIVACY, rounds=1, training={"samples_per_patient": 1, "learning_rate": 0.1})


@pytest.fixture(scope="module")
def sites(plan, hospitals, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stations")
    sites = [SiteFolder(h.name, h.folder, folder / h.name) for h in hospitals]
    prepare_stations(plan, sites, seed=0, workers=1, on_site=lambda _: None)
    return sites


@pytest.fixture(scope="module")
def result(plan, hospitals, tmp_path_factory):
    """A private run with its comparison: what stands in its result, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    simulate(Request(plan, folder, data=hospitals[0].folder.parent, execution=Execution(workers=1)), Watcher())
    return json.loads((folder / "result.json").read_text()), folder


class TestSteps:
    def test_own_model_is_trained_at_the_epsilon_of_the_federation(self, plan, sites):
        """
        With the declared size and the noise that the hospital's own ledger agreed to, by the plan itself.
        """
        for site in sites:
            steps, cost = Steps.of(plan, [site]), open_station(site.station).cost(plan)

            assert (steps.declared_size, steps.noise_multiplier) == (cost.declared_size, cost.noise_multiplier)
            assert steps.trainer.plan == plan

    def test_central_model_draws_as_many_patients_as_all_hospitals(self, plan, sites):
        """
        From all of them, in as many steps: the same rate, so that only noise and distance differ.
        """
        steps = Steps.of(plan, sites)
        privacy = steps.trainer.plan.privacy

        assert steps.declared_size == sum(open_station(site.station).cost(plan).declared_size for site in sites)
        assert privacy.patients_per_step == 3 * PRIVACY["patients_per_step"]
        assert (privacy.clip, privacy.steps_per_round) == (plan.privacy.clip, plan.privacy.steps_per_round)

    def test_own_model_has_noise_and_the_central_one_has_none(self, plan, sites, monkeypatch):
        """
        Where no patient has a gradient, what moves the weights is noise alone.
        """
        own, central = Steps.of(plan, sites[:1]), Steps.of(plan, sites)
        task = type(own.trainer.task)
        monkeypatch.setattr(task, "loss", lambda self, output, target: 0.0 * output.sum())
        weights = initial_weights(own.trainer.task.build_network, 0)

        def moved(steps: Steps) -> float:
            update = steps.update(weights, cohort_of(sites[0], plan), round_=1, seed=0, name="x")
            return math.hypot(*(float(np.linalg.norm(array)) for array in update.values()))

        assert moved(own) > 0.01
        assert moved(central) == 0

    def test_real_patients_are_not_trained_on_beside_the_run(self, plan, sites, monkeypatch):
        """
        Whatever a ledger would have to say of it.
        """
        monkeypatch.setattr("simulation.baselines.is_emulated", lambda data: False)

        with pytest.raises(ValueError, match="emulated patients only"):
            Steps.of(plan, sites)


class TestRun:
    def test_private_run_is_compared_with_central_and_local_models(self, result):
        """
        One row for each, measured exactly, beside test figures that have noise.
        """
        found, _ = result

        assert [row["method"] for row in found["comparison"]["rows"]] == METHODS
        assert found["test"]["dice"].keys() == {"value", "interval", "cost"}
        assert all(0 <= row["mean"] <= 1 for row in found["comparison"]["rows"])

    def test_page_says_what_each_model_is(self, result):
        """
        Own models at the same epsilon, and a central one without any.
        """
        page = (result[1] / "report.html").read_text()

        assert "so at the same" in page
        assert "without noise and so without any privacy" in page

    def test_real_hospitals_get_no_comparison(self, plan, sites, monkeypatch):
        """
        With [privacy] nobody has paid for exact figures of their patients; a plan without it is compared as ever.
        """
        outcome = type("Outcome", (), {"test": type("Measured", (), {"per_site": {"site-1": {}}})})

        assert run.can_compare(plan, sites, outcome)
        monkeypatch.setattr(run, "is_emulated", lambda data: False)
        assert not run.can_compare(plan, sites, outcome)
        assert run.can_compare(plan.model_copy(update={"privacy": None}), sites, outcome)


def test_terminal_says_so_where_nobody_was_measured(result, capsys):
    """
    A private run without a comparison and without noised figures ends with a sentence, not with an empty table.
    """
    found, folder = result
    show_result({**found, "comparison": None, "test": None}, folder)
    alone = capsys.readouterr().out
    show_result(found, folder)

    assert "metrics_every under [privacy]" in alone
    assert "federated" not in alone
    assert "federated" in capsys.readouterr().out
