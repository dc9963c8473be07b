"""A small residual network (He et al. 2016, arXiv:1512.03385) of MONAI's residual units, for classification.

Group normalisation (Wu and He 2018, arXiv:1803.08494) in place of batch normalisation: no patient's output depends on who
else is in the batch. The classifier comes before the mean over space and not after it, which is the same number and
leaves a map of where each label's evidence lies (Zhou et al. 2016, arXiv:1512.04150).
"""

from __future__ import annotations

from math import gcd

from monai.networks.blocks import Convolution, ResidualUnit
from torch import nn

from shared_models.plan import Plan

MOST_GROUPS = 8
"""Most groups of a normalisation; fewer where the features cannot be divided so."""


def build(plan: Plan) -> nn.Module:
    """A freshly initialised residual network for ``plan``.

    It maps float32 ``(batch, input channel, [z,] y, x)`` to class maps ``(batch, label, [z,] y, x)``, coarser by
    ``2 ** (depths - 1)`` along each axis; the logits are their means over space.
    """
    dimensions, channels = plan.data.dimensions, plan.task.channels
    layers: list[nn.Module] = []
    n_in = len(plan.data.channels)
    for depth, n_out in enumerate(channels):
        for unit in range(max(1, plan.task.residual_units)):
            stride = 2 if depth and not unit else 1
            layers.append(ResidualUnit(dimensions, n_in, n_out, strides=stride, act="RELU", norm=group_norm(n_out)))
            n_in = n_out
    head = Convolution(dimensions, n_in, len(plan.task.labels), kernel_size=1, conv_only=True)
    return nn.Sequential(*layers, head)


def group_norm(n_features: int) -> tuple[str, dict[str, int]]:
    """MONAI's word for group normalisation of this many features."""
    return "GROUP", {"num_groups": gcd(n_features, MOST_GROUPS)}
