"""The end-to-end variational network (Sriram et al. 2020, arXiv:2004.06688), which estimates sensitivities itself.

A small U-Net turns the centre of k-space into the coils' sensitivities. Each cascade then takes one step in k-space: back
towards what was measured, with a length that is learned, and along what a U-Net says of the combined image. The paper's
batch-free normalisation is kept as instance normalisation inside the U-Nets.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shared_models.mri import (
    centre,
    combine,
    expand,
    fourier,
    inverse_fourier,
    to_channels,
    to_complex,
    unit_sensitivities,
)
from shared_models.networks.image_unet import PaddedUNet
from shared_models.plan import Plan


def build(plan: Plan) -> nn.Module:
    """A freshly initialised variational network for ``plan``; its sensitivity network has half the features."""
    task = plan.task
    return VariationalNetwork(task.cascades, task.channels, task.residual_units, task.centre_fraction)


class VariationalNetwork(nn.Module):
    """Unrolled steps in the k-space of several coils.

    Parameters
    ----------
    n_cascades
        Steps.
    channels
        Features at each depth of every step's U-Net.
    residual_units
        Residual units at each depth of the U-Nets.
    centre_fraction
        Share of the lines in the centre of k-space, from which sensitivities are estimated.
    """

    def __init__(self, n_cascades: int, channels: tuple[int, ...], residual_units: int, centre_fraction: float) -> None:
        super().__init__()
        self._fraction = centre_fraction
        half = tuple(max(1, n // 2) for n in channels)
        self.sensitivity = PaddedUNet(2, half, residual_units)
        self.refinements = nn.ModuleList(PaddedUNet(2, channels, residual_units) for _ in range(n_cascades))
        self.step_lengths = nn.Parameter(torch.ones(n_cascades))

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
        sensitivities = self._sensitivities(measured)
        kspace = measured
        for refinement, length in zip(self.refinements, self.step_lengths, strict=True):
            image = combine(inverse_fourier(kspace), sensitivities)
            correction = to_complex(refinement(to_channels(image)))
            kspace = kspace - length * mask * (kspace - measured) + fourier(expand(correction, sensitivities))
        return to_channels(inverse_fourier(kspace))

    def _sensitivities(self, measured: Tensor) -> Tensor:
        """Maps ``(batch, coil, y, x)`` whose squares add up to 1, each coil by the same network."""
        blurred = inverse_fourier(centre(measured, self._fraction))
        each = to_channels(blurred.flatten(0, 1)[:, None])
        refined = to_complex(each + self.sensitivity(each))[:, 0]
        return unit_sensitivities(refined.reshape(measured.shape))
