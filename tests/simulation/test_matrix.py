"""Every model on every site's patients: local, federated, central and personal, with intervals."""

from __future__ import annotations

import json

import contracts
import numpy as np
import pytest
from test_report import a_result

from server.journal import Journal
from shared_models.detection import counted
from shared_models.plan import Plan
from shared_models.task import task_for
from shared_models.weights import weights_sha256
from simulation.baselines import interval_of, shared_rows
from simulation.engine import Execution, run_rounds
from simulation.report import write_report
from simulation.report.results import Run, read
from simulation.stations import SiteFolder, prepare_stations

STRATEGIES = {"scaffold": {}, "fedbn": {}, "ditto": {"personal_pull": 0.1}}


def plan_of(smoke_plan, name):
    """The smallest plan with a strategy that keeps something at the sites."""
    tables = json.loads(smoke_plan.canonical_json())
    tables["strategy"] |= {"name": name, "release": "last", **STRATEGIES[name]}
    tables["training"] |= {"optimizer": "sgd", "learning_rate": 0.05, "samples_per_patient": 1}
    return Plan.from_tables(tables)


def sites_of(plan, hospitals, folder):
    sites = [SiteFolder(h.name, h.folder, folder / h.name) for h in hospitals]
    prepare_stations(plan, sites, seed=0, workers=1, on_site=lambda _: None)
    return sites


class TestInterval:
    @pytest.fixture
    def task(self):
        return task_for(contracts.example_plan(task={"labels": ["background", "lesion"]}))

    def patients(self, n):
        names = ("hd95_mm", "surface_mm", "volume: lesion", "reference volume: lesion")
        return [{"dice": float(d), **dict.fromkeys(names, 1.0)} for d in np.random.default_rng(0).beta(6, 2, n)]

    def test_it_is_that_of_the_mean_over_patients(self, task):
        """
        For many patients the bootstrap agrees with 1.96 standard errors to either side of the mean.
        """
        patients = self.patients(400)
        dice = np.array([p["dice"] for p in patients])
        low, high = interval_of(task, patients, 0)
        error = dice.std(ddof=1) / 20

        assert (low, high) == pytest.approx((dice.mean() - 1.96 * error, dice.mean() + 1.96 * error), abs=error / 4)

    def test_metric_that_is_no_mean_is_computed_anew_from_each_set(self):
        """
        An AUC lies within its interval, and has none where all patients have one label.
        """
        task = task_for(contracts.example_plan("classification", task={"labels": ["healthy", "lesion"]}))
        rng = np.random.default_rng(1)
        patients = []
        for i in range(40):
            p = float(np.clip(rng.normal(0.4 + 0.2 * (i % 2), 0.2), 0, 1))
            cells = {f"{k}>{j}": (p if j else 1 - p) if k == i % 2 else 0.0 for k in (0, 1) for j in (0, 1)}
            nothing = counted(np.zeros((1, 1, 1), np.float32), np.zeros((1, 1, 1), np.bool_))
            patients.append({**cells, **nothing, "probability": 0.5, "outlined": 0.0, "hit": 0.0})
        low, high = interval_of(task, patients, 0)

        assert 0 < low < task.summary(patients)["auc"] < high <= 1
        assert interval_of(task, patients[::2], 0) is None

    def test_one_patient_has_none(self, task):
        """
        Nobody can tell from one patient what another would have given.
        """
        assert interval_of(task, self.patients(1), 0) is None


class TestReport:
    def test_personal_models_stand_in_the_matrix_with_their_intervals(self, tmp_path):
        """
        A row for each, outlined at home; the ways to train beside it are those of four, personal models left out.
        """
        result = a_result()
        rows = result["comparison"]["rows"]
        for row in list(rows):
            row["interval"] = {site: [value - 0.05, value + 0.05] for site, value in row["per_site"].items()}
        rows.append({"method": "personal:site-1", "per_site": {"site-1": 0.99, "site-2": 0.11}, "mean": 0.55})
        (tmp_path / "result.json").write_text(json.dumps(result))
        page = write_report(tmp_path).read_text()

        assert "personal, site-1" in page
        assert "0.99" in page
        assert f"{0.861 - 0.05:.2f} to {0.861 + 0.05:.2f}" in page
        assert read(Run, tmp_path).comparison.at("site-2").elsewhere == pytest.approx((0.5107 + 0.4419 + 0.6833) / 3)


class TestPersonalModels:
    def test_each_is_measured_everywhere(self, smoke_plan, hospitals, tmp_path):
        """
        Ditto's own models stand beside the shared one, each on all sites' patients, and at home with the figures that the
        site itself gave.
        """
        plan = plan_of(smoke_plan, "ditto")
        sites, journal = sites_of(plan, hospitals, tmp_path), Journal(tmp_path / "journal")
        outcome = run_rounds(plan, [s.station for s in sites], journal, seed=0, execution=Execution())
        rows = shared_rows(plan, sites, outcome.best, outcome.test.per_site, journal.identity().run)

        assert [row.method for row in rows] == ["federated", *(f"personal:{site.name}" for site in sites)]
        tested = outcome.test.per_site
        assert tested
        for row in rows[1:]:
            home = row.method.partition(":")[2]
            assert row.per_site.keys() == tested.keys()
            if home in tested:
                assert row.per_site[home]["dice"] == tested[home]["own:dice"]


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.usefixtures("ray_alone")
@pytest.mark.parametrize("name", STRATEGIES)
def test_engines_agree_on_strategies_that_keep_something(smoke_plan, hospitals, tmp_path, name):
    """
    One worker, two workers and Ray, where any process may get any site, end on the same weights.
    """
    plan = plan_of(smoke_plan, name)
    shas = set()
    for i, execution in enumerate([Execution(), Execution("in-process", 2), Execution("ray", 2)]):
        sites = sites_of(plan, hospitals, tmp_path / str(i))
        journal = Journal(tmp_path / f"journal-{i}")
        outcome = run_rounds(plan, [s.station for s in sites], journal, seed=0, execution=execution)
        shas.add(weights_sha256(outcome.last))

    assert len(shas) == 1
