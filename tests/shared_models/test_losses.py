"""The losses a plan can name, each against its formula."""

from __future__ import annotations

import contracts
import numpy as np
import pytest
import torch

from shared_models.losses import loss_of
from shared_models.task import task_for

LOSSES = ("dice-ce", "dice", "binary-dice", "cross-entropy", "focal")


def case(n_labels=2, seed=0):
    """Logits and labels of three images, with the probabilities and one-hot truth that NumPy makes of them."""
    rng = np.random.default_rng(seed)
    output = rng.normal(0, 2, (3, n_labels, 5, 6)).astype(np.float32)
    target = rng.integers(0, n_labels, (3, 1, 5, 6))
    p = np.exp(output.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    return torch.from_numpy(output), torch.from_numpy(target), p, np.eye(n_labels)[target[:, 0]].transpose(0, 3, 1, 2)


def loss(name, output, target, **training):
    labels = ["background", "one", "two"][: output.shape[1]]
    plan = contracts.example_plan(task={"labels": labels}, training={"loss": name, **training})
    return float(loss_of(plan)(output, target))


class TestFormulas:
    @pytest.mark.parametrize("n_labels", [2, 3])
    def test_soft_dice(self, n_labels):
        """
        One minus twice the overlap over the sizes, each with one voxel more, averaged over labels and images.
        """
        output, target, p, t = case(n_labels)
        overlap = (2 * (p * t).sum((2, 3)) + 1) / (p.sum((2, 3)) + t.sum((2, 3)) + 1)

        assert loss("dice", output, target) == pytest.approx(1 - overlap.mean(), rel=1e-5)

    def test_binary_two_class_dice(self):
        """
        DL2: one minus Dice of the foreground minus Dice of the background.
        """
        output, target, p, t = case()
        p, t = p[:, 1], t[:, 1]

        def dice(p, t):
            return (2 * (p * t).sum((1, 2)) + 1) / (p.sum((1, 2)) + t.sum((1, 2)) + 1)

        expected = (1 - dice(p, t) - dice(1 - p, 1 - t)).mean()
        assert loss("binary-dice", output, target) == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.5]])
    def test_weighted_cross_entropy(self, weights):
        """
        Minus the logarithm of the true label's probability, times its weight; the mean over voxels.
        """
        output, target, p, t = case(3)
        w = np.array(weights or [1, 1, 1])[None, :, None, None]
        expected = -(w * t * np.log(p)).sum(1).mean()

        assert loss("cross-entropy", output, target, class_weights=weights) == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.5]])
    def test_focal(self, weights):
        """
        Voxels that are right already hardly count.
        """
        output, target, p, t = case(3)
        w = np.array(weights or [1, 1, 1])[None, :, None, None]
        expected = -(w * t * (1 - p) ** 2 * np.log(p)).sum(1).mean()

        assert loss("focal", output, target, class_weights=weights) == pytest.approx(expected, rel=1e-4)

    def test_both_is_the_sum(self):
        """
        Dice plus cross-entropy is what it says, with equal weights given or none.
        """
        output, target, *_ = case(3)
        expected = loss("dice", output, target) + loss("cross-entropy", output, target)

        assert loss("dice-ce", output, target) == pytest.approx(expected, rel=1e-5)
        assert loss("dice-ce", output, target, class_weights=[1.0, 1.0, 1.0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
class TestEveryLoss:
    def test_loss_of_a_batch_is_the_mean_of_its_samples(self, name):
        """
        No sample's loss depends on the others.
        """
        output, target, *_ = case()
        plan = contracts.example_plan(task={"labels": ["background", "one"]}, training={"loss": name})

        contracts.assert_loss_is_mean_of_samples(task_for(plan), output, target)

    def test_right_is_better_than_wrong(self, name):
        """
        Sure and right costs less than unsure, and unsure less than sure and wrong.
        """
        _, target, _, t = case()
        right = torch.from_numpy((8 * t - 4).astype(np.float32))

        assert loss(name, right, target) < loss(name, 0 * right, target) < loss(name, -right, target)


def noisy(output, log_variance):
    """The same logits with noise of one variance everywhere."""
    return torch.cat([output, torch.full_like(output[:, :1], log_variance)], dim=1)


def noisy_loss(output, target, **training):
    labels = ["background", "one", "two"][: output.shape[1] - 1]
    plan = contracts.example_plan(task={"labels": labels}, training={"loss": "heteroscedastic", **training})
    return float(loss_of(plan)(output, target))


class TestLearnedNoise:
    @pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.5]])
    def test_without_noise_it_is_dice_plus_cross_entropy(self, weights):
        """
        Draws that do not differ give the plain loss, weights and all.
        """
        output, target, *_ = case(3)
        plain = loss("dice", output, target) + loss("cross-entropy", output, target, class_weights=weights)

        assert noisy_loss(noisy(output, -40.0), target, class_weights=weights) == pytest.approx(plain, rel=1e-5)

    def test_noise_costs_where_the_model_is_right_and_saves_where_it_is_wrong(self):
        """
        So a voxel whose label cannot be known is better called noisy than sure.
        """
        _, target, _, t = case()
        right = torch.from_numpy((8 * t - 4).astype(np.float32))

        assert noisy_loss(noisy(right, -40.0), target) < noisy_loss(noisy(right, 3.0), target)
        assert noisy_loss(noisy(-right, 3.0), target) < noisy_loss(noisy(-right, -40.0), target)

    def test_loss_of_a_batch_is_the_mean_of_its_samples(self):
        """
        Every sample meets the same draws, so none depends on the others or on what was drawn before.
        """
        output, target, *_ = case()
        plan = contracts.example_plan(task={"labels": ["background", "one"]}, training={"loss": "heteroscedastic"})

        contracts.assert_loss_is_mean_of_samples(task_for(plan), noisy(output, 1.0), target)
