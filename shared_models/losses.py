"""Losses of segmentation, by the name a plan uses.

Each is a mean over samples: what a sample adds does not depend on the others in the batch, as privacy of patients demands.
All take logits, float32 ``(batch, label, [z,] y, x)``, and label indices, int64 ``(batch, 1, [z,] y, x)``; where noise is
learned, its logarithm is a channel after the labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from monai.losses import DiceCELoss, DiceLoss
from torch import Tensor
from torch.nn import functional as F

from shared_models.plan import Plan

Loss = Callable[[Tensor, Tensor], Tensor]

N_DRAWS = 10
"""Draws of the noise in one evaluation of the heteroscedastic loss."""

GAMMA = 2.0
"""How fast the focal loss forgets voxels that are right; the paper's value."""


def loss_of(plan: Plan) -> Loss:
    """The loss that ``plan`` names, with its ``class_weights``."""
    name, given = plan.training.loss or "dice-ce", plan.training.class_weights
    if name == "dice-ce" and given is None:
        both: Loss = DiceCELoss(softmax=True, to_onehot_y=True, smooth_nr=1.0, smooth_dr=1.0)
        return both
    weights = torch.tensor(given or [1.0] * len(plan.task.labels))
    return {
        "dice-ce": lambda output, target: soft_dice(output, target) + cross_entropy(output, target, weights),
        "dice": soft_dice,
        "binary-dice": binary_dice,
        "cross-entropy": lambda output, target: cross_entropy(output, target, weights),
        "focal": lambda output, target: focal(output, target, weights),
        "heteroscedastic": lambda output, target: (
            soft_dice(output[:, :-1], target) + heteroscedastic(output, target, weights)
        ),
    }[name]


def soft_dice(output: Tensor, target: Tensor) -> Tensor:
    """One minus soft Dice, smoothed by one voxel; the mean over labels, background included (Milletari et al. 2016,
    arXiv:1606.04797, with sums in place of squares)."""
    loss: Tensor = DiceLoss(softmax=True, to_onehot_y=True, smooth_nr=1.0, smooth_dr=1.0)(output, target)
    return loss


def binary_dice(output: Tensor, target: Tensor) -> Tensor:
    """The two-class Dice loss DL2 (Sudre et al. 2017, arXiv:1707.03237, section 2.1.3 with equal weights), for two labels:
    one minus soft Dice of the foreground minus soft Dice of the background, each smoothed by one voxel; from -1 to 1."""
    probability, truth = torch.softmax(output, dim=1)[:, 1].flatten(1), (target[:, 0] == 1).flatten(1).to(output)

    def overlap(p: Tensor, t: Tensor) -> Tensor:
        return (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)

    return (1 - overlap(probability, truth) - overlap(1 - probability, 1 - truth)).mean()


def cross_entropy(output: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Mean over voxels of the true label's weight times minus its log-probability."""
    return F.cross_entropy(output, target[:, 0], weight=weights.to(output), reduction="none").mean()


def focal(output: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of each voxel times ``(1 - p) ** 2``, p being the true label's probability (Lin et al. 2017,
    arXiv:1708.02002, eq. 5)."""
    plain = F.cross_entropy(output, target[:, 0], reduction="none")
    return (weights.to(output)[target[:, 0]] * (1 - torch.exp(-plain)) ** GAMMA * plain).mean()


def heteroscedastic(output: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of logits with Gaussian noise whose variance is learned for each voxel: the label's weight times minus
    the logarithm of the mean softmax over draws (Kendall and Gal 2017, arXiv:1703.04977, eq. 12).

    The draws are the same for every sample and step, so a sample's loss depends on nothing but the sample.

    Parameters
    ----------
    output
        Means of the logits and, in the last channel, the logarithm of their variance: ``(batch, label + 1, [z,] y, x)``.
    """
    logits, log_variance = output[:, :-1], output[:, -1:]
    deviation = torch.exp(0.5 * log_variance)
    noise = torch.randn((N_DRAWS, 1, *logits.shape[1:]), generator=torch.Generator().manual_seed(0)).to(logits)
    right = torch.stack([-F.cross_entropy(logits + deviation * one, target[:, 0], reduction="none") for one in noise])
    mean = torch.logsumexp(right, dim=0) - math.log(N_DRAWS)
    return -(weights.to(output)[target[:, 0]] * mean).mean()
