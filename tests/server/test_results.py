"""What stands in ``test`` of a result: numbers, or under ``[privacy]`` numbers with their noise and their price."""

from __future__ import annotations

import json

import pytest
from privately import private

from server.results import measured_of, result_of
from server.rounds import Measured, Outcome, RoundRecord
from shared_models.noised import NoisedMeans
from shared_models.plan import Plan
from shared_models.task import task_for

PRIVACY = {"epsilon": 8.0, "delta": 1e-5, "patients_per_step": 20, "steps_per_round": 1}
METRICS = {"metrics_every": 1, "metrics_noise": 2.0}
COST = {
    "north": {"epsilon": 7.5, "delta": 1e-5, "declared_size": 1000.0},
    "south": {"epsilon": 7.9, "delta": 1e-5, "declared_size": 200.0},
}
MEASURED = Measured(
    {"dice": 0.7, "hd95_mm": 20.0},
    {"north": {"dice": 0.72, "hd95_mm": 18.0}, "south": {"dice": 0.6, "hd95_mm": 30.0}},
    {"north": 1000, "south": 200},
)
NOTHING = Measured(None, {}, {})


def result(plan: Plan, measured: Measured) -> dict:
    """A result of one round, as it is read from its file."""
    outcome = Outcome([RoundRecord(1)], 1, {}, {}, measured, COST if plan.privacy else {})
    return json.loads(json.dumps(result_of(plan, outcome)))


class TestWithPrivacy:
    @pytest.fixture
    def test(self, smoke_plan):
        return result(private(smoke_plan, PRIVACY | METRICS), MEASURED)["test"]

    def test_every_figure_has_a_value_an_interval_and_a_cost(self, test):
        """
        Means over sites and each site's own; nothing is a bare number but the size that a site declared.
        """
        for figures in (test, *test["per_site"].values()):
            for name in ("dice", "hd95_mm"):
                assert figures[name].keys() == {"value", "interval", "cost"}
        assert test["dice"]["value"] == 0.7
        assert test["per_site"]["south"]["dice"]["value"] == 0.6
        assert test["per_site"]["north"].keys() == {"dice", "hd95_mm", "declared_size"}
        assert test["per_site"]["north"]["declared_size"] == 1000

    def test_interval_is_that_of_the_noise_of_the_declared_size(self, test, smoke_plan):
        """
        A fifth of the patients, five times the noise; the mean has that of two sums over all patients of both.
        """
        means = NoisedMeans.of(task_for(private(smoke_plan, PRIVACY | METRICS)), "test", 1000)
        width = {site: (f["dice"]["interval"][1] - f["dice"]["interval"][0]) for site, f in test["per_site"].items()}

        assert width["north"] == pytest.approx(2 * 1.96 * means.deviations["dice"])
        assert width["south"] == pytest.approx(5 * width["north"], rel=0.05)
        low, high = test["dice"]["interval"]
        assert high - low == pytest.approx(2**0.5 * width["north"] * 1000 / 1200, rel=0.02)

    def test_cost_is_of_the_one_release_and_not_of_the_run(self, test):
        """
        One Gaussian of twice the clip costs a patient epsilon 1.99 at delta 1e-5 (dp-accounting says so, too).
        """
        from dp_accounting import dp_event, pld

        accountant = pld.PLDAccountant()
        accountant.compose(dp_event.GaussianDpEvent(METRICS["metrics_noise"]))

        assert test["dice"]["cost"]["delta"] == 1e-5
        assert test["dice"]["cost"]["epsilon"] == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)

    def test_what_no_mechanism_made_is_left_out(self, smoke_plan):
        """
        A metric that the plan's task does not release with noise, from a site that says it anyway.
        """
        more = Measured(
            {**MEASURED.mean, "age": 61.0},
            {site: {**values, "age": 61.0} for site, values in MEASURED.per_site.items()},
            MEASURED.patients,
        )

        test = result(private(smoke_plan, PRIVACY | METRICS), more)["test"]

        assert "age" not in json.dumps(test)

    @pytest.mark.parametrize(("metrics", "measured"), [(METRICS, NOTHING), ({}, NOTHING), ({}, MEASURED)])
    def test_it_is_null_where_none_was_paid_for(self, smoke_plan, metrics, measured):
        """
        No figure without a price, whatever was sent.
        """
        assert result(private(smoke_plan, PRIVACY | metrics), measured)["test"] is None

    def test_what_was_measured_comes_back_from_a_file(self, test):
        """
        A deployed run is read from its result, and is the same run then.
        """
        assert measured_of(test) == MEASURED


class TestWithoutPrivacy:
    def test_figures_are_numbers_beside_the_number_of_patients(self, smoke_plan):
        """
        And come back from a file.
        """
        test = result(smoke_plan, MEASURED)["test"]

        assert test["dice"] == 0.7
        assert test["per_site"]["south"] == {"dice": 0.6, "hd95_mm": 30.0, "patients": 200}
        assert measured_of(test) == MEASURED

    def test_it_is_null_where_nobody_has_test_patients(self, smoke_plan):
        """
        And nothing measured comes back from that.
        """
        assert result(smoke_plan, NOTHING)["test"] is None
        assert measured_of(None) == NOTHING
