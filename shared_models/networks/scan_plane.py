"""The fully convolutional scan-plane network (SonoNet; Baumgartner et al. 2017, arXiv:1612.05601), for classification.

Blocks of two or three convolutions with pooling between them, two 1 x 1 convolutions that end in one map for each label,
and pooling over space: where a label was seen can be read off its map. The paper's batch normalisation is left out, since
patients must not meet; weights that keep the variance (He et al. 2015, arXiv:1502.01852) take its place.
"""

from __future__ import annotations

from monai.networks.blocks import Convolution
from monai.networks.layers.factories import Pool
from torch import nn

from shared_models.plan import Plan

N_SHALLOW = 2
"""Depths with two convolutions; those below have three, as in the paper."""


def build(plan: Plan) -> nn.Module:
    """A freshly initialised scan-plane network for ``plan``.

    It maps float32 ``(batch, input channel, [z,] y, x)`` to class maps ``(batch, label, [z,] y, x)``, coarser by
    ``2 ** (depths - 1)`` along each axis; the task pools them over space.
    """
    dimensions, layers = plan.data.dimensions, list[nn.Module]()
    n_in = len(plan.data.channels)

    def convolution(n_out: int, kernel_size: int = 3) -> nn.Module:
        layer: nn.Module = Convolution(
            dimensions, n_in, n_out, kernel_size=kernel_size, act="RELU", norm=None, dropout=plan.task.dropout
        )
        return layer

    for depth, n_out in enumerate(plan.task.channels):
        if depth:
            layers.append(Pool[Pool.MAX, dimensions](2))
        for _ in range(2 if depth < N_SHALLOW else 3):
            layers.append(convolution(n_out))
            n_in = n_out
    adapted = max(1, n_in // 2)
    layers.append(convolution(adapted, kernel_size=1))
    layers.append(Convolution(dimensions, adapted, len(plan.task.labels), kernel_size=1, conv_only=True))
    network = nn.Sequential(*layers)
    for name, parameter in network.named_parameters():
        if name.endswith("weight"):
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        else:
            nn.init.zeros_(parameter)
    return network
