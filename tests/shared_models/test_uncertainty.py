"""How sure a model may be, against formulas and against cases where the answer is known."""

from __future__ import annotations

import math

import contracts
import numpy as np
import pytest
import torch
from torch import nn

from shared_models.networks import NETWORKS_FOR
from shared_models.task import task_for
from shared_models.uncertainty import (
    Reliability,
    disagreement,
    dropping,
    entropy,
    expected_calibration_error,
    mutual_information,
    temperature,
)


class TestSpread:
    def test_entropy_is_zero_for_certainty_and_largest_for_none(self):
        """
        Nothing to learn from a certain answer; log(labels) where all labels are as likely.
        """
        certain, none = np.array([1.0, 0.0, 0.0]), np.full(3, 1 / 3)

        assert entropy(certain) == pytest.approx(0.0, abs=1e-12)
        assert entropy(none) == pytest.approx(math.log(3))

    def test_members_that_agree_have_nothing_to_learn(self):
        """
        Mutual information is zero where members say the same, however unsure, and log 2 where each is sure of another.
        """
        unsure = np.tile(np.array([0.5, 0.5])[None, :, None], (4, 1, 1))
        split = np.array([[[1.0], [0.0]], [[0.0], [1.0]]])

        assert mutual_information(unsure) == pytest.approx([0.0], abs=1e-12)
        assert mutual_information(split) == pytest.approx([math.log(2)])

    def test_disagreement_is_one_minus_mean_pairwise_dice(self):
        """
        Two that agree and a third that shares half of its voxels with each of them.
        """
        masks = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]])

        assert disagreement(masks, 2) == pytest.approx(1 - (1 + 0.5 + 0.5) / 3)
        assert disagreement(np.zeros((2, 4), int), 2) == 0.0


class TestCalibration:
    def test_error_is_that_of_the_bins(self):
        """
        Ten predictions at 0.8 of which five are right are off by 0.3; ten at 0.55 of which six are right by 0.05.
        """
        confidence = np.array([0.8] * 10 + [0.55] * 10)
        is_right = np.array([True] * 5 + [False] * 5 + [True] * 6 + [False] * 4)

        assert expected_calibration_error(confidence, is_right, 10) == pytest.approx((0.3 + 0.05) / 2)

    def test_portions_add_up(self):
        """
        Predictions that come a few at a time give the same diagram, and certainty falls into the last bin.
        """
        rng = np.random.default_rng(0)
        confidence, is_right = np.append(rng.random(99), 1.0), rng.random(100) < 0.7
        whole, parts = Reliability.empty(), Reliability.empty()
        whole.add(confidence, is_right)
        for i in range(0, 100, 7):
            parts.add(confidence[i : i + 7], is_right[i : i + 7])

        assert parts.expected_error == pytest.approx(whole.expected_error)
        assert whole.n.sum() == 100

    @pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
    def test_temperature_is_found_again(self, true):
        """
        Labels drawn from softened logits give back by how much they were softened.
        """
        rng = np.random.default_rng(1)
        logits = rng.normal(0, 3, (3, 20_000))
        p = np.exp(logits / true)
        p /= p.sum(0)
        truth = (rng.random(20_000) < p.cumsum(0)).argmax(0)

        assert temperature(logits, truth) == pytest.approx(true, rel=0.06)


class TestDropout:
    @pytest.mark.parametrize(
        "network", ["unet", "segresnet", "dynunet", "dual-path", "resnet", "scan-plane", "densenet"]
    )
    def test_networks_that_were_trained_with_dropout_differ_from_pass_to_pass(self, network):
        """
        What the plan's ``dropout`` built is found and switched on; a prediction as usual is always the same.
        """
        kind = "segmentation" if network in NETWORKS_FOR["segmentation"] else "classification"
        task = task_for(contracts.example_plan(kind, network, task={"dropout": 0.5}))
        image, _ = contracts.example_batch(task)
        made = task.build_network().eval()
        with dropping(made), torch.no_grad():
            passes = [made(image) for _ in range(2)]

        assert not torch.equal(*passes)
        with torch.no_grad():
            assert torch.equal(made(image), made(image))

    def test_dropout_is_on_inside_and_as_before_outside(self):
        """
        Passes differ while it is on; nothing else of the network is put into training.
        """
        network = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8)).eval()
        x = torch.randn(4, 8)
        with dropping(network):
            one, other = network(x), network(x)
            assert not network[2].training

        assert not torch.equal(one, other)
        assert torch.equal(network(x), network(x))
