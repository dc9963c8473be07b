"""Experiments on strategies and on uncertainty: what they run, and how they read what came out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from shared_models.plan import Plan
from simulation.calibration import FLAGS
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
        sites = {"site-1": {"accuracy": 0.7, "own:accuracy": 0.9}, "site-2": {"accuracy": 0.6, "own:accuracy": 0.7}}
        tested = {"test": {"per_site": sites}}
        shared = {name: [{"after": {"federated": 0.8}, **tested}] * 2 for name in strategies.STRATEGIES}
        for name, values in (("fedbn", (0.9, 0.7)), ("ditto", (0.85, 0.9))):
            found = [{"federated": 0.8, "personal_own": v, "personal_elsewhere": 0.5} for v in values]
            shared[name] = [{"after": one, **tested} for one in found]
        compared = {"local_own": 0.8, "local_elsewhere": 0.6, "rows": [{"method": "central", "mean": 0.9}]}
        shared["fedavg"] = [{"after": {"federated": 0.8}, "comparison": compared, **tested}] * 2
        table = strategies.evaluate(shared)

        assert [claim["values"] for claim in table["claims"]] == [
            pytest.approx([0.1, 0.1]),
            pytest.approx([0.15, 0.15]),
        ]
        assert {r["method"] for r in table["rows"]} >= {*strategies.STRATEGIES, "central", "local"}


class TestUncertainty:
    def test_scanners_that_nobody_trained_on_are_looked_at_too(self):
        """
        They are those of no site, and learning rates stay as they are.
        """
        (plan,) = uncertainty.arms(quick=False).values()

        assert plan.simulation.unseen == uncertainty.UNSEEN
        assert set(uncertainty.UNSEEN).isdisjoint(plan.simulation.scanners)
        assert plan.training.schedule == "constant"

    def test_claims_are_ratios_of_each_seed(self):
        """
        Calibration of the ensemble over that of the last model, entropy of either kind of unseen scanner over that of
        seen ones, and how disagreement ranks.
        """
        numbers = dict.fromkeys(("score", "score_single", "disagreement", "mutual_information"), 0.5)
        of_site = {"site-1": 0.1, "site-2": 0.3, "unseen-1": 0.3, "unseen-2": 0.6, "unseen-3": 0.2}
        patients = [
            {"site": site, "seen": site.startswith("site"), "entropy": entropy, **numbers}
            for site, entropy in of_site.items()
        ]
        ece = {"single": 0.1, "scaled": 0.08, "sites": 0.09, "snapshots": 0.06, "ensemble": 0.05}
        flags = {name: {"auroc": 0.9 if name == "disagreement" else 0.5, "correlation": 0.1} for name in FLAGS}
        table = uncertainty.evaluate({"": [{"uncertainty": {"ece": ece, "patients": patients, "flags": flags}}]})
        claims = {c["id"]: c["value"] for c in table["claims"]}

        assert claims == pytest.approx(
            {"ece_ratio": 0.5, "entropy_ratio": 2.0, "entropy_ratio_sequence": 1.5, "flag_auroc": 0.9}
        )

    def test_seed_in_which_nobody_is_poor_cannot_be_summed_up(self):
        """
        A mean over the others would claim what was not seen.
        """
        patients = [
            {
                "site": site,
                "seen": site == "site-1",
                **dict.fromkeys(("entropy", "score", "score_single", "disagreement", "mutual_information"), 0.5),
            }
            for site in ("site-1", "unseen-1", "unseen-2", "unseen-3")
        ]
        flags = {name: {"auroc": None, "correlation": None} for name in FLAGS}
        ece = dict.fromkeys(("single", "scaled", "sites", "snapshots", "ensemble"), 0.1)

        with pytest.raises(ValueError, match="nothing to flag"):
            uncertainty.evaluate({"": [{"uncertainty": {"ece": ece, "patients": patients, "flags": flags}}]})


@pytest.mark.slow
@pytest.mark.system
class TestWhole:
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
