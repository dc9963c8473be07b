"""The deep cascade of convolutional networks with data consistency between them (Schlemper et al. 2018, arXiv:1704.02422).

Each network of the cascade corrects the image, and what was measured is put back into k-space before the next one looks.
With ``cascades = 5`` and four numbers under ``channels`` (and the layer that ends each network) it is the paper's D5-C5.
Where there are several coils the networks see one image, combined by sensitivities from the centre of k-space, and
consistency is kept coil by coil.
"""

from __future__ import annotations

import torch
from monai.networks.blocks import Convolution
from torch import Tensor, nn

from shared_models.mri import (
    combine,
    consistent,
    expand,
    fourier,
    inverse_fourier,
    low_resolution_sensitivities,
    to_channels,
    to_complex,
)
from shared_models.plan import Plan


def build(plan: Plan) -> nn.Module:
    """A freshly initialised cascade for ``plan``."""
    task = plan.task
    return Cascade(task.cascades, task.channels, task.centre_fraction, task.consistency)


class Cascade(nn.Module):
    """Networks and data consistency in turn.

    Parameters
    ----------
    n_cascades
        Networks.
    channels
        Features of each network's layers but the last.
    centre_fraction
        Share of the lines in the centre of k-space, for the coils' sensitivities.
    consistency
        "noiseless": measured samples are returned as they are; "noisy": each step draws them towards the measured ones, by
        a weight that it learns; "none": the same network without its step.
    """

    def __init__(self, n_cascades: int, channels: tuple[int, ...], centre_fraction: float, consistency: str) -> None:
        super().__init__()
        self._fraction, self._consistency = centre_fraction, consistency
        self.corrections = nn.ModuleList(_correction(channels) for _ in range(n_cascades))
        self.log_weights = (
            nn.ParameterList(nn.Parameter(torch.tensor(2.0)) for _ in range(n_cascades))
            if consistency == "noisy"
            else [None] * n_cascades
        )

    def forward(self, sample: Tensor) -> Tensor:
        """Coil images from measured k-space.

        Parameters
        ----------
        sample
            Real and imaginary part of each coil's k-space, zero where nothing was measured, then the mask; float32
            ``(batch, 2 coil + 1, y, x)``.

        Returns
        -------
        Tensor
            Real and imaginary part of each coil's image, float32 ``(batch, 2 coil, y, x)``.
        """
        measured, mask = to_complex(sample[:, :-1]), sample[:, -1:]
        sensitivities = low_resolution_sensitivities(measured, self._fraction)
        coil_images = inverse_fourier(measured)
        for correction, log_weight in zip(self.corrections, self.log_weights, strict=True):
            image = combine(coil_images, sensitivities)
            image = image + to_complex(correction(to_channels(image)))
            coil_images = expand(image, sensitivities)
            if self._consistency != "none":
                noise = None if log_weight is None else log_weight.exp()
                coil_images = inverse_fourier(consistent(fourier(coil_images), measured, mask, noise))
        return to_channels(coil_images)


def _correction(channels: tuple[int, ...]) -> nn.Module:
    """A plain network of 3 x 3 convolutions from an image, real and imaginary part, to its correction."""
    layers: list[nn.Module] = []
    n_in = 2
    for n_out in channels:
        layers.append(
            Convolution(2, n_in, n_out, kernel_size=3, act=("LEAKYRELU", {"negative_slope": 0.01}), norm=None)
        )
        n_in = n_out
    layers.append(Convolution(2, n_in, 2, kernel_size=3, conv_only=True))
    return nn.Sequential(*layers)
