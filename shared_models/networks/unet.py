"""The 2-D and 3-D U-Net (Ronneberger et al. 2015, arXiv:1505.04597; Çiçek et al. 2016, arXiv:1606.06650) from MONAI.

Instance normalisation with learned scale and shift (Ulyanov et al. 2016, arXiv:1607.08022) in place of batch
normalisation: it holds no running statistics, so nothing but parameters is exchanged, and no patient's output depends
on who else is in the batch.
"""

from __future__ import annotations

from monai.networks.nets import UNet
from torch import nn

from shared_models.plan import Plan


def build(plan: Plan) -> nn.Module:
    """A freshly initialised U-Net for ``plan``.

    It maps float32 ``(batch, input channel, [z,] y, x)`` to logits ``(batch, label, [z,] y, x)``; every side must be a
    multiple of ``2 ** (depths - 1)``.
    """
    n_depths = len(plan.task.channels)
    network: nn.Module = UNet(
        spatial_dims=plan.data.dimensions,
        in_channels=len(plan.data.channels),
        out_channels=plan.n_outputs,
        channels=plan.task.channels,
        strides=(2,) * (n_depths - 1),
        num_res_units=plan.task.residual_units,
        norm=("INSTANCE", {"affine": True}),
        dropout=plan.task.dropout or 0.0,
    )
    return network
