"""Claims of classification: formed seed by seed, with the data that they are about."""

from __future__ import annotations

import json

import pytest

from shared_models.errors import FederadError
from shared_models.plan import Plan
from simulation.experiments import classification, classification_real, weak_labels
from simulation.experiments.harness import run_experiment
from simulation.run import Watcher


def result_of(federated, central, own, elsewhere, hit=0.7):
    rows = [{"method": "federated", "mean": federated}, {"method": "central", "mean": central}]
    return {
        "comparison": {"rows": rows, "local_own": own, "local_elsewhere": elsewhere},
        "test": {"localisation": hit},
    }


RESULTS = {"": [result_of(0.90, 0.91, 0.8, 0.75), result_of(0.96, 0.99, 0.85, 0.83, 0.4)]}


def test_claims_are_means_of_differences_over_seeds():
    """
    Central less federated, federated less local models elsewhere, and how often the heatmap hits.
    """
    claims = {claim["id"]: claim for claim in classification.evaluate(RESULTS)["claims"]}

    assert claims["below_central_auc"]["value"] == pytest.approx(0.02)
    assert claims["over_other_sites_auc"]["value"] == pytest.approx(0.14)
    assert claims["localisation_hit_rate"]["value"] == pytest.approx(0.55)
    assert [claim["holds"] for claim in claims.values()][1:] == [True, False]


def test_claims_on_real_images():
    """
    The figure itself, and how far it is below central.
    """
    claims = {claim["id"]: claim for claim in classification_real.evaluate(RESULTS)["claims"]}

    assert claims["auc"]["value"] == pytest.approx(0.93)
    assert claims["below_central_auc"]["value"] == pytest.approx(0.02)
    assert claims["below_central_auc"]["holds"] is False


@pytest.mark.parametrize("module", [classification, classification_real])
def test_quick_takes_fewer_rounds_of_the_same_plan(module):
    """
    The plans are those that anybody can run alone.
    """
    quick, full = (module.arms(quick=quick)[""] for quick in (True, False))

    assert quick.rounds < full.rounds
    assert quick.task == full.task


def test_data_is_asked_for_where_it_is_needed_and_only_there(tmp_path):
    """
    An experiment on real images says which; one that emulates its hospitals takes none.
    """
    options = {"quick": True, "workers": 1, "watcher": Watcher(), "command": "x"}
    with pytest.raises(FederadError, match="R230") as error:
        run_experiment(classification_real.CLASSIFICATION_REAL, tmp_path, **options)
    assert "MedMNIST" in error.value.remedies[0]
    with pytest.raises(FederadError, match="R230"):
        run_experiment(classification.CLASSIFICATION, tmp_path, data=tmp_path, **options)


class TestWeakLabels:
    def test_claims_are_gains_of_agreement_at_either_number_of_patients(self):
        """
        ICC with the loss for proportions less that of plain regression, seed by seed.
        """
        icc = {"proportion-50": [0.7, 0.6], "squared-50": [0.6, 0.6], "proportion-100": [0.8], "squared-100": [0.9]}
        results = {arm: [{"scanners": {"unseen_mean": {"icc": v}}} for v in values] for arm, values in icc.items()}
        claims = {one["id"]: one for one in weak_labels.evaluate(results)["claims"]}

        assert claims["icc_gain_50"]["value"] == pytest.approx(0.05)
        assert claims["icc_gain_100"]["value"] == pytest.approx(-0.1)
        assert [one["holds"] for one in claims.values()] == [True, False]

    def test_arms_differ_in_loss_and_patients_alone(self):
        """
        As many steps with half the patients, and plans that can be read again.
        """
        plans = weak_labels.arms(quick=False)

        assert {plan.task for plan in plans.values()} == {next(iter(plans.values())).task}
        assert {plan.training.epochs * plan.simulation.patients for plan in plans.values()} == {100}
        for arm, plan in plans.items():
            assert arm.startswith(plan.training.loss)
            assert plan.strategy.minimum_sites <= weak_labels.N_SITES
            assert Plan.from_tables(json.loads(plan.canonical_json())) == plan
