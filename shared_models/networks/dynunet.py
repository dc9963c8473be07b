"""A U-Net that halves each axis only as often as spacing and patch allow (Isensee et al. 2021,
doi:10.1038/s41592-020-01008-z), of MONAI's blocks, for segmentation.

Where slices are thick, the first depths look along the plane alone; the rule is in ``configuration``. Instance
normalisation with learned scale and shift; no deep supervision.
"""

from __future__ import annotations

from monai.networks.blocks.dynunet_block import UnetBasicBlock, UnetOutBlock, UnetResBlock, UnetUpBlock
from torch import Tensor, nn

from shared_models.configuration import depths_of
from shared_models.plan import Plan

NORM = ("INSTANCE", {"affine": True})


class DynamicUNet(nn.Module):
    """Encoder and decoder with skip links; kernels and strides per axis and depth."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        n_axes, channels = plan.data.dimensions, plan.task.channels
        depths = depths_of(plan.data.patch, plan.data.spacing_mm, len(channels))
        block = UnetResBlock if plan.task.residual_units else UnetBasicBlock
        inputs = (len(plan.data.channels), *channels)
        self.down = nn.ModuleList(
            block(n_axes, n_in, n_out, depth.kernel, depth.stride, NORM, dropout=plan.task.dropout)
            for n_in, n_out, depth in zip(inputs, channels, depths, strict=False)
        )
        self.up = nn.ModuleList(
            UnetUpBlock(
                n_axes,
                channels[i + 1],
                channels[i],
                depths[i].kernel,
                1,
                depths[i + 1].stride,
                NORM,
                dropout=plan.task.dropout,
            )
            for i in reversed(range(len(channels) - 1))
        )
        self.head = UnetOutBlock(n_axes, channels[0], plan.n_outputs)

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``(batch, label, [z,] y, x)`` of float32 ``(batch, input channel, [z,] y, x)``."""
        skips = []
        for down in self.down:
            image = down(image)
            skips.append(image)
        image = skips.pop()
        for up in self.up:
            image = up(image, skips.pop())
        logits: Tensor = self.head(image)
        return logits


def build(plan: Plan) -> nn.Module:
    """A freshly initialised dynamic U-Net for ``plan``."""
    return DynamicUNet(plan)
