"""Metrics with noise: bounded by construction, and told with the noise that is in them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from contracts import example_plan
from hypothesis import given
from hypothesis import strategies as st

from client import accounting
from shared_models.noised import NoisedMeans, gaussian_epsilon
from shared_models.plan import PrivacyTable
from shared_models.task import task_for
from shared_models.tasks import TASKS

MEANS = NoisedMeans({"dice": (0.0, 1.0), "hd95_mm": (0.0, 100.0)}, 5.0, 40)

values = st.one_of(st.floats(), st.floats(-1, 200))


class TestVector:
    @given(st.dictionaries(st.sampled_from(["dice", "hd95_mm", "other"]), values))
    def test_no_patient_is_longer_than_the_clip(self, metrics):
        """
        Whatever was measured, or was not: missing, infinite, beyond the range.
        """
        vector = MEANS.vector(metrics)

        assert vector.shape == (2,)
        assert np.linalg.norm(vector) <= MEANS.clip * (1 + 1e-15)

    def test_missing_value_is_the_middle_of_the_range(self):
        """
        The same as a patient who is not there, so that nothing tells the two apart.
        """
        assert MEANS.vector({}).tolist() == [0, 0]
        assert MEANS.vector({"dice": math.nan, "hd95_mm": math.inf}).tolist() == [0, 0]


class TestMeans:
    def test_without_noise_and_with_the_true_number_they_are_the_means(self):
        """
        Computed independently, from values inside the ranges.
        """
        rng = np.random.default_rng(0)
        patients = [
            {"dice": d, "hd95_mm": h} for d, h in zip(rng.uniform(0, 1, 40), rng.uniform(0, 100, 40), strict=True)
        ]
        means = MEANS.means(sum(MEANS.vector(patient) for patient in patients) / 40)

        assert means["dice"] == pytest.approx(np.mean([p["dice"] for p in patients]))
        assert means["hd95_mm"] == pytest.approx(np.mean([p["hd95_mm"] for p in patients]))

    def test_deviation_is_that_of_the_noise(self):
        """
        Found again in many draws, in each metric's own unit.
        """
        rng = np.random.default_rng(1)
        scale = MEANS.noise_multiplier * MEANS.clip / MEANS.n_patients
        wide = NoisedMeans({"dice": (-1e6, 1e6), "hd95_mm": (-1e6, 1e6)}, 5.0, 40)
        drawn = np.array([list(wide.means(rng.normal(0, scale, 2)).values()) for _ in range(4000)])

        assert drawn.std(axis=0) == pytest.approx(list(wide.deviations.values()), rel=0.05)

    def test_means_stay_in_their_ranges(self):
        """
        Noise may be larger than what it hides.
        """
        assert MEANS.means(np.array([9.0, -9.0])) == {"dice": 1.0, "hd95_mm": 0.0}


@pytest.mark.parametrize("kind", TASKS)
def test_every_task_has_a_range_for_each_metric_under_privacy(kind):
    """
    In the same order, with a lowest below the highest.
    """
    privacy = PrivacyTable(noise_multiplier=1.0, patients_per_step=1, steps_per_round=1)
    task = task_for(example_plan(kind).model_copy(update={"privacy": privacy}))

    assert list(task.ranges) == list(task.metrics)
    assert all(low < high for low, high in task.ranges.values())


class TestGaussianEpsilon:
    @pytest.mark.parametrize("noise", [0.5, 1.0, 5.0, 40.0])
    @pytest.mark.parametrize("delta", [1e-5, 1e-8])
    def test_it_is_what_the_accountant_of_a_site_finds(self, noise, delta):
        """
        By a formula, and by privacy-loss random variables, which are an upper bound a little above.
        """
        event = accounting.Event(noise, 1.0, 1, split="test")
        found = accounting.epsilon([event], delta)

        assert gaussian_epsilon(noise, delta) <= found
        assert gaussian_epsilon(noise, delta) == pytest.approx(found, rel=0.02)

    def test_much_noise_costs_nothing_and_hardly_any_costs_more_than_any_table(self):
        """
        Neither end overflows.
        """
        assert gaussian_epsilon(1e9, 1e-5) < 1e-6
        assert gaussian_epsilon(0.01, 1e-5) > 4000
