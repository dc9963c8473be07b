"""The harness of experiments: rows, claims, and going on where one was."""

from __future__ import annotations

import json

import pytest

from simulation.experiments import harness
from simulation.experiments.federated_vs_central import FEDERATED_VS_CENTRAL, evaluate
from simulation.run import Watcher


def result_of(federated, central, own, elsewhere):
    rows = [{"method": "federated", "mean": federated}, {"method": "central", "mean": central}]
    return {"comparison": {"rows": rows, "local_own": own, "local_elsewhere": elsewhere}}


class TestFederatedVsCentral:
    def test_claims_are_means_of_ratios_over_seeds(self):
        """
        Ratios are formed seed by seed and then averaged; a claim holds when its mean reaches the threshold.
        """
        table = evaluate([result_of(0.8, 0.8, 0.8, 0.4), result_of(0.9, 1.0, 0.75, 0.6)])
        claims = {c["id"]: c for c in table["claims"]}
        assert claims["over_central"]["value"] == pytest.approx(0.95)
        assert claims["over_central"]["holds"] is False
        assert claims["over_own_local"]["value"] == pytest.approx(1.1)
        assert claims["over_own_local"]["holds"] is True
        assert claims["over_other_sites"]["value"] == pytest.approx(1.75)

    def test_spread_is_that_of_the_seeds(self):
        """
        The standard deviation in a row is the sample's, over seeds.
        """
        table = evaluate([result_of(0.8, 1, 1, 1), result_of(0.9, 1, 1, 1)])
        assert table["rows"][0]["sd"] == pytest.approx(0.1 / 2**0.5)


class TestResume:
    @pytest.mark.slow
    def test_finished_seeds_are_not_run_again(self, smoke_plan, tmp_path, monkeypatch):
        """
        An experiment interrupted after its first seed runs only what is missing; another plan starts afresh.
        """
        ran = []
        simulate = harness.simulate
        monkeypatch.setattr(harness, "simulate", lambda r, w: (ran.append(r.seed), simulate(r, w))[1])
        small = harness.Experiment("small", "a small one", (0, 1), 2, lambda *, quick: smoke_plan, evaluate)

        def run():
            return harness.run_experiment(small, tmp_path, quick=False, workers=1, watcher=Watcher(), command="x")

        harness.run_experiment(small, tmp_path, quick=True, workers=1, watcher=Watcher(), command="x")
        assert ran == [0]
        first = run()
        assert ran == [0, 1]
        assert run()["claims"] == first["claims"]
        assert ran == [0, 1]
        assert json.loads((tmp_path / "result.json").read_text())["seeds"] == [0, 1]
        assert (tmp_path / "report.html").exists()

        other = smoke_plan.model_copy(update={"rounds": 1})
        harness.run_experiment(
            harness.Experiment("small", "a small one", (0,), 2, lambda *, quick: other, evaluate),
            tmp_path, quick=False, workers=1, watcher=Watcher(), command="x",
        )  # fmt: skip
        assert ran == [0, 1, 0]


def test_experiment_runs_the_demo_plan_on_three_seeds():
    """
    The comparison that README shows is the demo's plan, with seeds 0 to 2.
    """
    assert FEDERATED_VS_CENTRAL.seeds == (0, 1, 2)
    assert FEDERATED_VS_CENTRAL.plan(quick=False).name == "demo"
    quick = FEDERATED_VS_CENTRAL.plan(quick=True)
    assert quick.rounds < FEDERATED_VS_CENTRAL.plan(quick=False).rounds
