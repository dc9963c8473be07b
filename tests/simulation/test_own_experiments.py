"""Experiments on strategies and on uncertainty: what they run, and how they read what came out."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from shared_models.plan import Plan
from simulation.experiments import strategies, uncertainty
from simulation.experiments.harness import run_experiment
from simulation.run import Watcher


class TestStrategies:
    @pytest.mark.parametrize("quick", [True, False])
    def test_arms_differ_in_the_strategy_alone(self, quick):
        """
        Each arm is a plan that any site would accept, on the same hospitals with the same steps.
        """
        plans = strategies.arms(quick=quick)
        tables = [plan.model_dump() for plan in plans.values()]

        assert [plan.strategy.name for plan in plans.values()] == list(plans)
        for table in tables:
            assert {k: v for k, v in table.items() if k != "strategy"} == {
                k: v for k, v in tables[0].items() if k != "strategy"
            }
        assert all(Plan.from_tables(json.loads(p.canonical_json())) for p in plans.values())

    def test_claim_is_the_gain_at_home_seed_by_seed(self):
        """
        The better of the two personal strategies against FedAvg, formed for each seed and then averaged.
        """
        shared = {name: [{"after": {"federated": 0.8}}] * 2 for name in strategies.STRATEGIES}
        for name, values in (("fedbn", (0.9, 0.7)), ("ditto", (0.85, 0.9))):
            shared[name] = [{"after": {"federated": 0.8, "personal_own": v, "personal_elsewhere": 0.5}} for v in values]
        compared = {"local_own": 0.8, "local_elsewhere": 0.6, "rows": [{"method": "central", "mean": 0.9}]}
        shared["fedavg"] = [{"after": {"federated": 0.8}, "comparison": compared}] * 2
        table = strategies.evaluate(shared)

        assert table["claims"][0]["values"] == pytest.approx([0.1, 0.1])
        assert {r["method"] for r in table["rows"]} >= {*strategies.STRATEGIES, "central", "local"}


class TestUncertainty:
    def test_members_are_of_the_last_half_and_the_last_round_is_among_them(self):
        """
        Five shared models, evenly spaced.
        """
        (plan,) = uncertainty.arms(quick=False).values()

        assert uncertainty.snapshots(plan) == (144, 168, 192, 216, 240)
        assert uncertainty.UNSEEN not in plan.simulation.scanners

    def test_claims_are_ratios_of_each_seed(self):
        """
        Calibration of the ensemble over that of the last model, entropy unseen over seen, and how disagreement ranks.
        """
        rng = np.random.default_rng(0)
        patients = []
        for i in range(40):
            poor = i % 2 == 0
            numbers = dict.fromkeys(("entropy_single", "mutual_information", "dice_single"), float(rng.random()))
            patients.append(
                {
                    "group": "unseen" if i < 20 else "seen",
                    "dice": 0.5 if poor else 0.9,
                    "disagreement": 0.6 if poor else 0.1,
                    "entropy": 0.3 if i < 20 else 0.2,
                    **numbers,
                }
            )
        ece = {"single": 0.1, "scaled": 0.08, "sites": 0.09, "snapshots": 0.06, "ensemble": 0.05}
        table = uncertainty.evaluate({"": [{"after": {"ece": ece, "patients": patients}}]})
        claims = {c["id"]: c["value"] for c in table["claims"]}

        assert claims == pytest.approx({"ece_ratio": 0.5, "entropy_ratio": 1.5, "flag_auroc": 1.0})


@pytest.mark.slow
@pytest.mark.system
class TestWhole:
    def test_uncertainty_looks_at_what_a_run_left(self, smoke_plan, tmp_path):
        """
        On the smallest hospitals: snapshots and site models are found, an unseen hospital is made.
        """
        table = smoke_plan.simulation.model_copy(update={"scanners": uncertainty.SEEN})
        plan = smoke_plan.model_copy(update={"rounds": 10, "simulation": table})
        nothing = {"rows": [], "claims": []}
        small = replace(uncertainty.UNCERTAINTY, arms=lambda *, quick: {"": plan}, evaluate=lambda _: nothing)
        run_experiment(small, tmp_path, quick=True, workers=1, watcher=Watcher(), command="here")
        after = json.loads((tmp_path / "seed-0" / "result.json").read_text())["after"]

        assert after["ece"].keys() == set(uncertainty.WAYS)
        assert all(0 <= value <= 1 for value in after["ece"].values())
        assert {patient["group"] for patient in after["patients"]} == {"seen", "unseen"}

    def test_strategies_end_in_a_table(self, tmp_path):
        """
        Every arm on small hospitals for two rounds: shared, personal, local and central figures for each.
        """

        def tiny(*, quick):
            small = {"patients": 12, "slices": 1}
            arms = strategies.arms(quick=True)
            return {
                name: plan.model_copy(
                    update={
                        "rounds": 2,
                        "simulation": plan.simulation.model_copy(update={**small, "prevalence": (0.5,)}),
                    }
                )
                for name, plan in arms.items()
                if name in {"fedavg", "fedbn", "ditto"}
            }

        experiment = replace(
            strategies.STRATEGIES_EXPERIMENT,
            seeds=(0,),
            arms=tiny,
            evaluate=lambda results: {
                "rows": [],
                "claims": [],
                "found": {name: [r["after"] for r in of] for name, of in results.items()},
            },
        )
        found = run_experiment(experiment, tmp_path, quick=True, workers=1, watcher=Watcher(), command="here")["found"]

        assert "personal_own" in found["ditto"][0]
        assert "personal_own" in found["fedbn"][0]
        assert "personal_own" not in found["fedavg"][0]
