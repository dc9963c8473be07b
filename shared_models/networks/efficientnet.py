"""A small EfficientNet (Tan and Le 2019, arXiv:1905.11946) of MONAI's inverted bottlenecks, for classification.

Its width is the plan's; group normalisation in place of batch normalisation, and no dropping of whole blocks. As in
``densenet``, what is normalised over space makes class maps less sharp.
"""

from __future__ import annotations

from monai.networks.blocks import Convolution
from monai.networks.nets.efficientnet import MBConvBlock
from torch import nn

from shared_models.networks.groups import groups_of
from shared_models.plan import Plan

EXPANSION = 4
"""Channels inside of a bottleneck over those outside; 6 in the paper, from the second stage on."""


def build(plan: Plan) -> nn.Module:
    """A freshly initialised EfficientNet for ``plan``, with ``residual_units`` bottlenecks at each depth, at least one.

    It maps float32 ``(batch, input channel, [z,] y, x)`` to class maps ``(batch, label, [z,] y, x)``, coarser by
    ``2 ** (depths - 1)`` along each axis; the task pools them over space. Images have the size of the plan's patch.
    """
    n_axes, channels = plan.data.dimensions, plan.task.channels
    n_in, sides = channels[0], list(plan.data.patch)
    layers: list[nn.Module] = [Convolution(n_axes, len(plan.data.channels), n_in, kernel_size=3, conv_only=True)]
    for depth, n_out in enumerate(channels):
        for unit in range(max(1, plan.task.residual_units)):
            stride = 2 if depth and not unit else 1
            block = MBConvBlock(
                n_axes,
                n_in,
                n_out,
                kernel_size=3,
                stride=stride,
                image_size=sides,
                expand_ratio=EXPANSION,
                se_ratio=0.25,
                norm=("group", {"num_groups": groups_of(EXPANSION * n_in, n_out)}),
                drop_connect_rate=None,
            )
            block.set_swish(memory_efficient=False)  # the other one has no ONNX form
            layers.append(block)
            n_in, sides = n_out, [side // stride for side in sides]
    layers.append(Convolution(n_axes, n_in, len(plan.task.labels), kernel_size=1, conv_only=True))
    return nn.Sequential(*layers)
