"""Plans that configure themselves at emulated hospitals, and the experiment about them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from shared_models.errors import FederadError
from shared_models.fingerprint import fingerprint_plan
from shared_models.plan import Plan
from shared_models.self_configuration import step_bytes
from simulation.consortium import _grid, _own_factors, emulation_sha256
from simulation.experiments import self_configuration
from simulation.experiments.harness import run_experiment
from simulation.run import Request, Watcher, simulate


def changed(plan: Plan, **tables) -> Plan:
    """The plan with other values of some keys of some tables."""
    all_tables = json.loads(plan.canonical_json())
    for name, table in tables.items():
        merged = all_tables[name] | table
        all_tables[name] = {key: value for key, value in merged.items() if value is not None}
    return Plan.from_tables(all_tables)


class TestEmulatedSpacing:
    def test_images_have_their_own_spacing_whatever_the_plan_brings_them_to(self, smoke_plan):
        """
        The grid is that of [simulation], and plans for other grids share the hospitals.
        """
        thick = changed(smoke_plan, simulation={"spacing_mm": [5.0, 1.0, 1.0]})
        finer = changed(thick, data={"spacing_mm": [0.5, 0.5]})

        assert _grid(thick).spacing_mm == (5.0, 1.0, 1.0)
        assert _grid(thick).shape == (6, 224, 192)
        assert emulation_sha256(thick, n_sites=2, seed=0) == emulation_sha256(finer, n_sites=2, seed=0)
        assert emulation_sha256(thick, n_sites=2, seed=0) != emulation_sha256(smoke_plan, n_sites=2, seed=0)

    def test_sites_differ_by_no_more_than_the_plan_says(self, smoke_plan):
        """
        Each site has a spacing of its own within a tenth, pixels stay square, and the seed decides.
        """
        plan = changed(smoke_plan, simulation={"spacing_mm": [5.0, 1.0, 1.0], "spacing_spread": 0.1})
        grids = [_grid(plan, _own_factors(plan, 3, number)) for number in range(1, 6)]
        ratios = np.array([grid.spacing_mm for grid in grids]) / (5.0, 1.0, 1.0)

        assert len({grid.spacing_mm for grid in grids}) == 5
        assert ratios.min() >= 0.9
        assert ratios.max() <= 1.1
        assert all(grid.spacing_mm[1] == grid.spacing_mm[2] for grid in grids)
        assert grids[0] == _grid(plan, _own_factors(plan, 3, 1))


class TestRefusals:
    def test_plan_that_asks_is_not_run_for_a_model(self, smoke_plan, tmp_path):
        """
        A simulation of it would end without a model: R230 names the command that is meant.
        """
        with pytest.raises(FederadError, match=r"(?s)R230.*federad-sim configure"):
            simulate(Request(fingerprint_plan(smoke_plan), tmp_path), Watcher())


class TestExperiment:
    def test_arms_of_a_set_are_one_plan_until_one_is_configured(self):
        """
        Both arms begin at the same plan and the same hospitals; sets differ in the images alone.
        """
        plans = self_configuration.arms(quick=False)
        pairs = [(plans[f"{name}, fixed"], plans[f"{name}, configured"]) for name in self_configuration.SETS]

        assert all(fixed.sha256 == other.sha256 for fixed, other in pairs)
        assert len({json.dumps(plan.model_dump(exclude={"simulation"})) for plan in plans.values()}) == 1
        assert len({fixed.simulation.spacing_mm for fixed, _ in pairs}) == 3

    def test_claim_counts_sets_seed_by_seed(self):
        """
        Two of three sets won in one seed and three in the other make 2.5.
        """
        results = {}
        for number, name in enumerate(self_configuration.SETS):
            for way, values in (("fixed", (0.5, 0.5)), ("configured", (0.6, 0.4 if number == 0 else 0.7))):
                results[f"{name}, {way}"] = [{"after": {"dice": value, "patients": []}} for value in values]
        table = self_configuration.evaluate(results)

        assert table["claims"][0]["values"] == [3.0, 2.0]
        assert table["claims"][0]["holds"]
        assert {row["method"] for row in table["rows"]} == {"fixed", "configured", "gain of configured"}

    @pytest.mark.slow
    def test_both_plans_are_measured_on_the_images_own_grid(self, smoke_plan, tmp_path, monkeypatch):
        """
        A tiny set from beginning to end: what is configured takes no more memory, and references are never resampled.
        """
        monkeypatch.setattr(self_configuration, "SETS", {"4 mm": ((4.0, 4.0, 4.0), 8)})
        small = {
            name: changed(
                plan,
                data={"spacing_mm": [3.0, 3.0, 3.0], "patch": [16, 16, 16]},
                task={"channels": [2, 4]},
                training={"samples_per_patient": 2},
                simulation={"patients": 4, "spacing_spread": None},
            ).model_copy(update={"rounds": 1})
            for name, plan in self_configuration.arms(quick=True).items()
        }
        experiment = self_configuration.SELF_CONFIGURATION
        tiny = type(experiment)(**{**vars(experiment), "arms": lambda *, quick: small})
        result = run_experiment(tiny, tmp_path, quick=True, workers=1, watcher=Watcher(), command="a command")
        looks = {
            way: json.loads((tmp_path / "seed-0" / f"4 mm, {way}" / "result.json").read_text())["after"]
            for way in ("fixed", "configured")
        }

        assert looks["fixed"]["spacing_mm"] == [3.0, 3.0, 3.0]
        assert looks["configured"]["spacing_mm"] == [4.0, 4.0, 4.0]
        assert looks["configured"]["step_bytes"] <= looks["fixed"]["step_bytes"] == step_bytes(small["4 mm, fixed"])
        assert len(looks["fixed"]["patients"]) == len(looks["configured"]["patients"]) > 0
        assert result["configured"]["4 mm"]["patch"] == looks["configured"]["patch"]
