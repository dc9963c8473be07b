"""A U-Net that cleans the zero-filled image and never looks at k-space again (Zbontar et al. 2018, arXiv:1811.08839).

The baseline of reconstruction: it shows what keeping to the measured samples is worth.
"""

from __future__ import annotations

import torch
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.nn import functional as F

from shared_models.mri import inverse_fourier, to_channels, to_complex
from shared_models.plan import Plan

FIRST_SHARE = 0.01
"""Of a U-Net's first answer in that of an ordinary last layer [ratio]."""


def build(plan: Plan) -> nn.Module:
    """A freshly initialised U-Net for ``plan``: k-space in, coil images out."""
    return ImageUNet(plan.data.coils, plan.task.channels, plan.task.residual_units)


class PaddedUNet(nn.Module):
    """MONAI's U-Net for images of any size, with as many channels coming out as going in: ``(batch, channel, y, x)``.

    Instance normalisation, so that no patient meets another. What comes out is small at first, since it is a correction.
    """

    def __init__(self, n_channels: int, channels: tuple[int, ...], residual_units: int) -> None:
        super().__init__()
        self._factor = 2 ** (len(channels) - 1)
        self.unet = UNet(
            spatial_dims=2,
            in_channels=n_channels,
            out_channels=channels[0],
            channels=channels,
            strides=(2,) * (len(channels) - 1),
            num_res_units=residual_units,
            norm=("INSTANCE", {"affine": True}),
        )
        self.head = nn.Conv2d(channels[0], n_channels, kernel_size=1)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.mul_(FIRST_SHARE)

    def forward(self, image: Tensor) -> Tensor:
        """A correction of ``image``, shaped as it is."""
        y, x = image.shape[-2:]
        padded = F.pad(image, (0, -x % self._factor, 0, -y % self._factor))
        output: Tensor = self.head(self.unet(padded))[..., :y, :x]
        return output


class ImageUNet(nn.Module):
    """What must be added to the zero-filled image, with all coils as channels.

    Parameters
    ----------
    n_coils
        Coils.
    channels
        Features at each depth.
    residual_units
        Residual units at each depth.
    """

    def __init__(self, n_coils: int, channels: tuple[int, ...], residual_units: int) -> None:
        super().__init__()
        self.correction = PaddedUNet(2 * n_coils, channels, residual_units)

    def forward(self, sample: Tensor) -> Tensor:
        """Coil images, float32 ``(batch, 2 coil, y, x)``, from k-space and mask, ``(batch, 2 coil + 1, y, x)``."""
        zero_filled = to_channels(inverse_fourier(to_complex(sample[:, :-1])))
        output: Tensor = zero_filled + self.correction(zero_filled)
        return output
