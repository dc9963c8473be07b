"""The harness of experiments: rows, claims, and going on where one was."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest

from client.training import Trainer
from shared_models.plan import Plan
from shared_models.weights import decode
from simulation.baselines import measured_mean
from simulation.experiments import harness, privacy_utility
from simulation.experiments.federated_vs_central import FEDERATED_VS_CENTRAL, evaluate
from simulation.experiments.privacy_utility import EPSILONS, IMAGE_LEVEL, PRIVACY_UTILITY, SIZES, arm_name
from simulation.run import Watcher
from simulation.stations import SiteFolder, open_station


def result_of(federated, central, own, elsewhere):
    rows = [{"method": "federated", "mean": federated}, {"method": "central", "mean": central}]
    return {"comparison": {"rows": rows, "local_own": own, "local_elsewhere": elsewhere}}


class TestFigures:
    def test_interval_is_students(self):
        """
        The interval of a mean over three seeds is 4.303 standard errors to either side, that of one seed is unknown.
        """
        low, high = harness.t_interval([0.1, 0.2, 0.6])
        standard_error = np.std([0.1, 0.2, 0.6], ddof=1) / 3**0.5
        assert (low + high) / 2 == pytest.approx(0.3)
        assert (high - low) / 2 == pytest.approx(4.3027 * standard_error, rel=1e-4)
        assert harness.t_interval([0.1]) is None

    def test_claim_has_a_bound_on_one_side(self):
        """
        A claim holds up to its bound and not beyond, whichever side that is on.
        """
        assert harness.claim("a", "", [0.05], at_most=0.05)["holds"] is True
        assert harness.claim("a", "", [0.04, 0.08], at_most=0.05)["holds"] is False
        assert harness.claim("a", "", [0.04, 0.08], at_least=0.05)["holds"] is True


class TestFederatedVsCentral:
    def test_claims_are_means_of_ratios_over_seeds(self):
        """
        Ratios are formed seed by seed and then averaged; a claim holds when its mean reaches the threshold.
        """
        table = evaluate({"": [result_of(0.8, 0.8, 0.8, 0.4), result_of(0.9, 1.0, 0.75, 0.6)]})
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
        table = evaluate({"": [result_of(0.8, 1, 1, 1), result_of(0.9, 1, 1, 1)]})
        assert table["rows"][0]["sd"] == pytest.approx(0.1 / 2**0.5)


def measured(dice, epsilon=None):
    return {"measured": {"dice": dice}, "privacy": None if epsilon is None else {"site-1": {"epsilon": epsilon}}}


class TestPrivacyUtility:
    @pytest.mark.parametrize("quick", [True, False])
    def test_arms_are_plans_that_differ_in_privacy_and_size_alone(self, quick):
        """
        Each arm is a plan that any site would accept; sampling rate, steps, network and data are the same in all.
        """
        plans = PRIVACY_UTILITY.arms(quick=quick)
        assert len(plans) == len(SIZES) * len(EPSILONS) + 1
        assert next(iter(plans)) == PRIVACY_UTILITY.measured_at
        for plan in plans.values():
            assert Plan.from_tables(json.loads(plan.canonical_json())).sha256 == plan.sha256
            assert (plan.task, plan.data, plan.rounds) == (
                plans[IMAGE_LEVEL].task,
                plans[IMAGE_LEVEL].data,
                plan.rounds,
            )
            if plan.privacy is not None:
                assert plan.privacy.patients_per_step == 0.05 * plan.simulation.patients
        assert plans[arm_name(200, 3.0)].privacy.epsilon == 3.0
        assert plans[arm_name(200, 3.0)].simulation.patients == 200
        assert plans[arm_name(1000, math.inf)].privacy is None

    def test_cost_is_a_difference_within_seeds(self):
        """
        The claims rest on differences seed by seed; where a smaller epsilon did better, that is the claim's value.
        """
        results = {
            arm_name(1000, e): [measured(d), measured(d + 0.1)]
            for e, d in zip(EPSILONS, (0.8, 0.77, 0.6, 0.4), strict=True)
        }
        results |= {
            arm_name(200, e): [measured(d), measured(d)] for e, d in zip(EPSILONS, (0.8, 0.3, 0.1, 0.2), strict=True)
        }
        table = privacy_utility.evaluate({**results, IMAGE_LEVEL: [measured(0.79, 30.2), measured(0.8, 31.4)]})
        claims = {c["id"]: c for c in table["claims"]}

        assert claims["dice_cost_eps8_n1000"]["values"] == pytest.approx([0.03, 0.03])
        assert claims["dice_cost_eps8_n1000"]["holds"] is True
        assert claims["dice_cost_eps8_n200"]["value"] == pytest.approx(0.5)
        assert claims["dice_cost_eps8_n200"]["holds"] is False
        assert claims["monotone_n1000"]["value"] == pytest.approx(-0.03)
        assert claims["monotone_n200"]["value"] == pytest.approx(0.1)
        assert claims["monotone_n200"]["holds"] is False

    def test_image_level_stands_with_what_it_means_for_a_patient(self):
        """
        The image-level row names both epsilons, and on the drawing it stands at the patient's.
        """
        results = {arm_name(size, e): [measured(0.5)] for size in SIZES for e in EPSILONS}
        table = privacy_utility.evaluate({**results, IMAGE_LEVEL: [measured(0.7, 31.4)]})
        [row] = [r for r in table["rows"] if r["line"] == "image level"]

        assert "image epsilon 8: 31.4 for a patient" in row["method"]
        assert row["at"].startswith("31")


@pytest.fixture(scope="module")
def tiny():
    """An experiment of seconds: two sizes with and without privacy, measured at the larger."""
    tables = {
        "name": "tiny",
        "rounds": 1,
        "task": {"kind": "segmentation", "labels": ["background", "lesion"], "network": "unet", "channels": [4, 8]},
        "data": {"modality": "MR", "dimensions": 2, "spacing_mm": [4.0, 4.0], "patch": [32, 32]},
        "training": {"samples_per_patient": 1},
        "simulation": {"patients": 5, "slices": 1},
    }
    privacy = {"noise_multiplier": 1.0, "patients_per_step": 2, "steps_per_round": 1}
    few = {"simulation": {"patients": 3, "slices": 1}}
    plans = {
        "five": Plan.from_tables(tables),
        "three": Plan.from_tables(tables | few),
        "private": Plan.from_tables(tables | few | {"privacy": privacy}),
    }

    def evaluate(results):
        rows = [harness.row(arm, "dice", "test", [r["measured"]["dice"] for r in of]) for arm, of in results.items()]
        return {"rows": rows, "claims": []}

    return harness.Experiment("tiny", "a tiny one", (0, 1), 2, lambda *, quick: plans, evaluate, measured_at="five")


@pytest.fixture(scope="module")
def tiny_run(tiny, tmp_path_factory):
    """Its quick run: the result and the folder."""
    folder = tmp_path_factory.mktemp("tiny")
    return harness.run_experiment(tiny, folder, quick=True, workers=1, watcher=Watcher(), command="x"), folder


class TestArms:
    def test_arms_of_one_size_share_their_hospitals(self, tiny_run):
        """
        Within a seed, hospitals are emulated once for each size, and every arm keeps a run of its own.
        """
        _, folder = tiny_run
        assert len(list(folder.glob("seed-0/sites-*/hospitals"))) == 2
        assert {path.parent.name for path in folder.glob("seed-0/*/result.json")} == {"five", "three", "private"}

    def test_every_model_is_measured_at_the_same_hospitals(self, tiny, tiny_run):
        """
        The figure of an arm is the mean over the named arm's sites of its own released model, without noise.
        """
        result, folder = tiny_run
        plans = tiny.arms(quick=True)
        [home] = [path for path in folder.glob("seed-0/sites-*") if len(list(path.glob("hospitals/site-1/*"))) == 5]
        for row in result["rows"]:
            plan = plans[row["method"]]
            weights, _ = decode((folder / "seed-0" / row["method"] / "model.safetensors").read_bytes())
            per_site = []
            for site in ("site-1", "site-2"):
                cohort = open_station(home / "stations" / site).cohort(plans["five"])
                of_patients = Trainer(plan, "cpu").measure(weights, cohort, "test").values()
                per_site += [np.mean([m["dice"] for m in of_patients])] if of_patients else []
            assert row["mean"] == pytest.approx(float(np.mean(per_site)))

    def test_missing_arm_alone_is_run_again(self, tiny, tiny_run, monkeypatch):
        """
        What is missing is run, what is there stays; so it is with a result that was never measured.
        """
        result, folder = tiny_run
        ran = []
        simulate = harness.simulate
        monkeypatch.setattr(harness, "simulate", lambda r, w: (ran.append(r.folder.name), simulate(r, w))[1])
        shutil.rmtree(folder / "seed-0" / "three")
        unmeasured = json.loads((folder / "seed-0" / "private" / "result.json").read_text())
        del unmeasured["measured"]
        (folder / "seed-0" / "private" / "result.json").write_text(json.dumps(unmeasured))

        again = harness.run_experiment(tiny, folder, quick=True, workers=1, watcher=Watcher(), command="x")

        assert ran == ["three"]
        assert again["rows"] == result["rows"]

    def test_real_patients_are_not_measured_exactly(self, tiny, tmp_path):
        """
        The exact figure of a private model is for images that a simulation wrote, and for no others.
        """
        site = SiteFolder("site-1", tmp_path / "images" / "site-1", tmp_path / "station")
        with pytest.raises(ValueError, match="emulated patients only"):
            measured_mean(tiny.arms(quick=True)["private"], tmp_path / "model.safetensors", [site])


class TestResume:
    @pytest.mark.slow
    def test_finished_seeds_are_not_run_again(self, smoke_plan, tmp_path, monkeypatch):
        """
        An experiment interrupted after its first seed runs only what is missing; another plan starts afresh.
        """
        ran = []
        simulate = harness.simulate
        monkeypatch.setattr(harness, "simulate", lambda r, w: (ran.append(r.seed), simulate(r, w))[1])
        small = harness.Experiment("small", "a small one", (0, 1), 2, lambda *, quick: {"": smoke_plan}, evaluate)

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
            harness.Experiment("small", "a small one", (0,), 2, lambda *, quick: {"": other}, evaluate),
            tmp_path, quick=False, workers=1, watcher=Watcher(), command="x",
        )  # fmt: skip
        assert ran == [0, 1, 0]


def test_experiment_runs_the_demo_plan_on_three_seeds():
    """
    The comparison that README shows is the demo's plan, with seeds 0 to 2.
    """
    assert FEDERATED_VS_CENTRAL.seeds == (0, 1, 2)
    assert FEDERATED_VS_CENTRAL.arms(quick=False)[""].name == "demo"
    quick = FEDERATED_VS_CENTRAL.arms(quick=True)[""]
    assert quick.rounds < FEDERATED_VS_CENTRAL.arms(quick=False)[""].rounds
