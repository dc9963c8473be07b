"""Any keys of a plan over any values."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared_models.errors import FederadError
from simulation.sweep import arm_name, evaluate, parse_setting, sweep_of

PLAN = Path(__file__).parents[2] / "simulation" / "plans" / "smoke.toml"


class TestSettings:
    @pytest.mark.parametrize(
        ("setting", "key", "values"),
        [
            ("adaptation.strength=0.1,0.3,1", ("adaptation", "strength"), [0.1, 0.3, 1]),
            ("rounds=2", ("rounds",), [2]),
            ("task.channels=[8,16],[8,16,32]", ("task", "channels"), [[8, 16], [8, 16, 32]]),
            ("strategy.name=fedavg,fedprox", ("strategy", "name"), ["fedavg", "fedprox"]),
            ('adaptation.adversarial=none,"scanner"', ("adaptation", "adversarial"), [None, "scanner"]),
            ("training.flips=true,false", ("training", "flips"), [True, False]),
        ],
    )
    def test_values_are_read_as_in_toml(self, setting, key, values):
        """
        Numbers, lists, words with and without quotes; none leaves the key out.
        """
        assert parse_setting(setting) == (key, values)

    @pytest.mark.parametrize("setting", ["rounds", "=1", "rounds=", "../x=1"])
    def test_setting_that_says_nothing_is_refused(self, setting):
        """
        R230, with an example.
        """
        with pytest.raises(FederadError, match="R230"):
            parse_setting(setting)


class TestArms:
    def test_every_combination_is_a_plan(self):
        """
        Tables that a plan leaves out are begun where a value asks for them.
        """
        sweep = sweep_of(
            PLAN, ["adaptation.appearance=none,true", "training.learning_rate=0.1,0.2"], seeds=[100], n_sites=2
        )
        plans = sweep.arms(quick=False)

        assert list(plans) == [
            arm_name([("a", "appearance"), ("b", "learning_rate")], values)
            for values in ((None, 0.1), (None, 0.2), (True, 0.1), (True, 0.2))
        ]
        assert [plan.training.learning_rate for plan in plans.values()] == [0.1, 0.2, 0.1, 0.2]
        assert [plan.adaptation is not None for plan in plans.values()] == [False, False, True, True]

    def test_value_that_makes_no_plan_is_refused_before_anything_runs(self):
        """
        The plan's own message, with the key.
        """
        with pytest.raises(FederadError, match="P102"):
            sweep_of(PLAN, ["training.learning_rate=0.1,fast"], seeds=[100], n_sites=2)

    def test_too_many_combinations_are_refused(self):
        """
        Nobody starts thousands of runs by a comma.
        """
        many = ",".join(str(n) for n in range(1, 20))
        with pytest.raises(FederadError, match="361"):
            sweep_of(PLAN, [f"rounds={many}", f"training.batch_size={many}"], seeds=[100], n_sites=2)

    def test_table_has_the_sites_and_every_unseen_hospital(self):
        """
        A row for each, with a value for each seed.
        """
        result = {
            "headline": "dice",
            "test": {"dice": 0.5},
            "scanners": {"unseen": {"unseen-1": {"scanner": "GE X 3 T", "dice": 0.25}}},
        }
        table = evaluate({"rate-1": [result, result]})

        assert [(r["method"], r["split"], r["values"]) for r in table["rows"]] == [
            ("rate-1", "test", [0.5, 0.5]),
            ("rate-1", "GE X 3 T", [0.25, 0.25]),
        ]
