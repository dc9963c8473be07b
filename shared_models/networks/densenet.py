"""A small densely connected network (Huang et al. 2017, arXiv:1608.06993) of MONAI's convolutions, for classification.

Group normalisation in place of batch normalisation. It normalises over space, so a lesion moves what the network sees
elsewhere too, and class maps point less sharply than those of ``resnet`` (``docs/decisions/0014-class-maps.md``).
"""

from __future__ import annotations

import torch
from monai.networks.blocks import Convolution
from monai.networks.layers.factories import Pool
from torch import Tensor, nn

from shared_models.networks.groups import groups_of
from shared_models.plan import Plan


class DenseLayer(nn.Module):
    """A convolution whose output is added to the features as further channels."""

    def __init__(self, n_axes: int, n_in: int, growth: int, dropout: float) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            nn.GroupNorm(groups_of(n_in), n_in),
            nn.ReLU(),
            Convolution(n_axes, n_in, growth, kernel_size=3, conv_only=True),
            nn.Dropout(dropout),
        )

    def forward(self, features: Tensor) -> Tensor:
        """``(batch, channel + growth, ...)`` of ``(batch, channel, ...)``."""
        return torch.cat([features, self.layer(features)], dim=1)


def build(plan: Plan) -> nn.Module:
    """A freshly initialised dense network for ``plan``.

    At each depth ``residual_units`` layers, at least one, add half of its channels each; a 1 x 1 convolution brings them
    back to its channels. It maps float32 ``(batch, input channel, [z,] y, x)`` to class maps ``(batch, label, [z,] y, x)``,
    coarser by ``2 ** (depths - 1)`` along each axis; the task pools them over space.
    """
    n_axes, channels = plan.data.dimensions, plan.task.channels
    layers: list[nn.Module] = [Convolution(n_axes, len(plan.data.channels), channels[0], kernel_size=3, conv_only=True)]
    n_in = channels[0]
    for depth, n_out in enumerate(channels):
        if depth:
            layers.append(Pool[Pool.AVG, n_axes](2))
        growth = max(1, n_out // 2)
        for _ in range(max(1, plan.task.residual_units)):
            layers.append(DenseLayer(n_axes, n_in, growth, plan.task.dropout or 0.0))
            n_in += growth
        layers += [nn.GroupNorm(groups_of(n_in), n_in), nn.ReLU()]
        layers.append(Convolution(n_axes, n_in, n_out, kernel_size=1, conv_only=True))
        n_in = n_out
    head = Convolution(n_axes, n_in, len(plan.task.labels), kernel_size=1, conv_only=True)
    return nn.Sequential(*layers, nn.GroupNorm(groups_of(n_in), n_in), nn.ReLU(), head)
