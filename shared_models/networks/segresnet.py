"""The residual U-Net of MONAI (SegResNet; Myronenko 2018, arXiv:1810.11654, without its autoencoder), for segmentation.

Group normalisation as in the paper, linear interpolation on the way up.
"""

from __future__ import annotations

from monai.networks.nets import SegResNet
from torch import nn

from shared_models.networks.groups import groups_of
from shared_models.plan import Plan


def build(plan: Plan) -> nn.Module:
    """A freshly initialised SegResNet for ``plan``, whose channels double from depth to depth.

    It maps float32 ``(batch, input channel, [z,] y, x)`` to logits ``(batch, label, [z,] y, x)``; every side must be a
    multiple of ``2 ** (depths - 1)``.
    """
    n_depths, n_blocks = len(plan.task.channels), max(1, plan.task.residual_units)
    network: nn.Module = SegResNet(
        spatial_dims=plan.data.dimensions,
        init_filters=plan.task.channels[0],
        in_channels=len(plan.data.channels),
        out_channels=plan.n_outputs,
        dropout_prob=plan.task.dropout,
        norm=("GROUP", {"num_groups": groups_of(plan.task.channels[0])}),
        blocks_down=(n_blocks,) * n_depths,
        blocks_up=(1,) * (n_depths - 1),
    )
    return network
