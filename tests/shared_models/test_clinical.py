"""Numbers that clinicians read, against numbers from elsewhere."""

from __future__ import annotations

import contracts
import numpy as np
import pytest

from shared_models.clinical import agreement, heart_function, intraclass_correlation, volume_ml
from shared_models.task import task_for


class TestAgreement:
    def test_icc_is_that_of_shrout_and_fleiss(self):
        """
        The ratings of six subjects by four judges in Shrout and Fleiss 1979 (table 2) have ICC(2,1) = 0.29 (table 4).
        """
        ratings = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]

        assert intraclass_correlation(np.array(ratings, float)) == pytest.approx(0.29, abs=0.005)

    def test_a_method_that_agrees_is_one_and_a_bias_lowers_it(self):
        """
        Absolute agreement: the same volumes give 1, volumes that are all too large give less.
        """
        volumes = [10.0, 20.0, 35.0, 50.0]

        assert agreement(volumes, volumes).icc == pytest.approx(1.0)
        assert agreement([v + 20 for v in volumes], volumes).icc < 0.8

    def test_bias_and_limits_are_those_of_the_differences(self):
        """
        Mean, and 1.96 standard deviations with n - 1 below.
        """
        found = agreement([11.0, 19.0, 33.0], [10.0, 20.0, 30.0])

        assert found.bias == pytest.approx(1.0)
        assert found.limits == pytest.approx(1.96 * np.std([1, -1, 3], ddof=1))

    def test_one_patient_has_no_correlation(self):
        """
        Nor has a series in which all values are the same; nobody at all is an error.
        """
        assert agreement([3.0], [2.0]).icc is None
        assert agreement([3.0, 3.0], [3.0, 3.0]).icc is None
        with pytest.raises(ValueError, match="no patient"):
            agreement([], [])


class TestHeart:
    def test_function_of_a_ventricle_that_halves(self):
        """
        A cavity of 100 ml that shrinks to 40 ml ejects 60 %; 80 ml of muscle weigh 84 g.
        """
        phases = [np.zeros((10, 10, 20), np.uint8) for _ in range(3)]
        for phase, n in zip(phases, (700, 1000, 400), strict=True):
            phase.reshape(-1)[:n] = 1
            phase.reshape(-1)[n : n + 800] = 2
        found = heart_function(phases, (4.0, 5.0, 5.0), cavity=1, myocardium=2)

        assert (found.edv_ml, found.esv_ml, found.stroke_volume_ml) == pytest.approx((100.0, 40.0, 60.0))
        assert found.ejection_fraction == pytest.approx(0.6)
        assert found.mass_g == pytest.approx(84.0)

    def test_one_phase_tells_nothing(self):
        """
        A single image has no function, and an empty ventricle no ejection fraction.
        """
        empty = np.zeros((2, 2, 2), np.uint8)
        with pytest.raises(ValueError, match="1 phase"):
            heart_function([empty], (1.0, 1.0, 1.0), cavity=1, myocardium=2)
        assert heart_function([empty, empty], (1.0, 1.0, 1.0), cavity=1, myocardium=2).ejection_fraction is None

    def test_volume_counts_millimetres(self):
        """
        A thousand voxels of 2 cubic millimetres are 2 ml.
        """
        assert volume_ml(np.ones((10, 10, 10), bool), (2.0, 1.0, 1.0)) == pytest.approx(2.0)


class TestSegmentedVolumes:
    def measured(self, plan, n_found, n_true):
        task = task_for(plan)
        sides = (1, 40, 40)
        masks = [np.zeros(sides, np.uint8) for _ in range(2)]
        for mask, n in zip(masks, (n_found, n_true), strict=True):
            mask.reshape(-1)[:n] = 1
        from dataclasses import replace

        volume = replace(contracts.example_volume(plan, sides=sides), label=masks[1])
        return task.measure(masks[0], volume)

    def test_volumes_of_a_site_are_compared_with_the_reference(self):
        """
        Three patients with known volumes get the bias, the limits and the correlation that ``agreement`` gives.
        """
        plan = contracts.example_plan(task={"labels": ["background", "lesion"]})
        pairs = [(120, 100), (210, 200), (290, 300)]
        found = task_for(plan).summary([self.measured(plan, *pair) for pair in pairs])
        voxel = 3.0 * 1.0 * 1.5 / 1000
        expected = agreement([voxel * n for n, _ in pairs], [voxel * n for _, n in pairs])

        assert found["volume bias: lesion"] == pytest.approx(expected.bias)
        assert found["volume limits: lesion"] == pytest.approx(expected.limits)
        assert found["volume ICC: lesion"] == pytest.approx(expected.icc)
        assert found["volume error: lesion"] == pytest.approx(voxel * (20 + 10 + 10) / 3)

    def test_pictures_are_measured_in_pixels(self):
        """
        A photograph does not say how large a pixel is, so nothing about it is called a millimetre.
        """
        tables = {"task": {"labels": ["background", "vessel"]}, "data": {"modality": "OP"}}
        task = task_for(contracts.example_plan(**tables))

        assert set(task.metrics) == {"dice", "hd95_px", "surface_px"}
        assert self.measured(task.plan, 5, 7)["reference volume: vessel"] == 7

    def test_nothing_but_means_leaves_under_privacy(self):
        """
        Bias and correlation depend on all patients together, so they stay.
        """
        plan = contracts.example_plan(
            task={"labels": ["background", "lesion"]},
            privacy={"noise_multiplier": 1.0, "patients_per_step": 2, "steps_per_round": 1},
        )
        task = task_for(plan)

        assert task.metrics.keys() == task.ranges.keys() == {"dice", "hd95_mm"}
        assert not [name for name in task.summary([self.measured(plan, 5, 7)]) if name.startswith("volume")]
