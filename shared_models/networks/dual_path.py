"""Two paths at two resolutions, as in DeepMedic (Kamnitsas et al. 2017, doi:10.1016/j.media.2016.10.004), for segmentation.

One path sees the patch as it is, the other one coarser, and so more of what lies around; features of both decide together.
Unlike there, both see the same patch, convolutions keep its size, and instance normalisation takes the place of batch
normalisation.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from monai.networks.blocks import Convolution
from torch import Tensor, nn
from torch.nn import functional as F

from shared_models.plan import Plan

NORM = ("INSTANCE", {"affine": True})


class DualPath(nn.Module):
    """See the module."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self._n_axes, self._dropout, channels = plan.data.dimensions, plan.task.dropout, plan.task.channels
        self._coarser = 2 ** (len(channels) - 1)
        self.fine, self.coarse = (self._path((len(plan.data.channels), *channels)) for _ in range(2))
        self.head = nn.Sequential(
            Convolution(self._n_axes, 2 * channels[-1], channels[-1], kernel_size=1, act="RELU", norm=NORM),
            Convolution(self._n_axes, channels[-1], plan.n_outputs, kernel_size=1, conv_only=True),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``(batch, label, [z,] y, x)`` of float32 ``(batch, input channel, [z,] y, x)``."""
        pool, mode = (F.avg_pool2d, "bilinear") if self._n_axes == 2 else (F.avg_pool3d, "trilinear")
        coarse = F.interpolate(self.coarse(pool(image, self._coarser)), image.shape[2:], mode=mode)
        logits: Tensor = self.head(torch.cat([self.fine(image), coarse], dim=1))
        return logits

    def _path(self, widths: tuple[int, ...]) -> nn.Module:
        layers = [
            Convolution(self._n_axes, n_in, n_out, kernel_size=3, act="RELU", norm=NORM, dropout=self._dropout)
            for n_in, n_out in pairwise(widths)
        ]
        return nn.Sequential(*layers)


def build(plan: Plan) -> nn.Module:
    """A freshly initialised dual-path network for ``plan``; the coarse path is coarser by ``2 ** (depths - 1)``."""
    return DualPath(plan)
