"""How a reconstruction behaves where it was not trained to (Antun et al. 2020, doi:10.1073/pnas.1907377117).

Three questions to a network, each beside the zero-filled image, which is linear and answers them exactly:

=================  ==================================================================================================
amplification      how much the image changes over how much the measured samples change, for the worst small change
                   that a search finds [ratio]; 1 for the zero-filled image
structure          how much of a small disc's contrast comes back that nobody has seen [share]; beside it, of the
                   zero-filled image
quality            PSNR at accelerations around the one it was trained for [dB]
=================  ==================================================================================================

A search finds a lower bound: a change that is worse may exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shared_models.mri import fourier, inverse_fourier, to_channels, to_complex

Network = Callable[[Tensor], Tensor]

SMALL_CHANGE = 0.01
"""Length of a change of the measured samples over their own length [ratio]."""

SEARCH_STEPS = 15

DISC_RADIUS, DISC_CONTRAST = 2.5, 0.3
"""Of the inserted structure [pixels], and [largest magnitude of the image]."""


@dataclass(frozen=True)
class Structure:
    """Share of an inserted disc's contrast that comes back; 1 is all of it."""

    network: float
    zero_filled: float


def amplification(network: Network, sample: Tensor) -> float:
    """The largest ratio of the image's change over the samples' change that is found by gradient ascent.

    Parameters
    ----------
    network
        Coil images from k-space and mask.
    sample
        Measured k-space and mask, ``(batch, 2 coil + 1, y, x)``; the search changes measured samples alone, each of the
        batch for itself, and the mean ratio is given.
    """
    mask = sample[:, -1:]
    with torch.no_grad():
        unchanged = network(sample)
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(sample[:, :-1].shape, generator=generator).to(sample) * mask
    length = SMALL_CHANGE * _length(sample[:, :-1])
    best = torch.zeros(len(sample))
    for _ in range(SEARCH_STEPS):
        change = (change * length / _length(change).clamp_min(1e-20)).detach().requires_grad_()
        moved = network(torch.cat([sample[:, :-1] + change, mask], dim=1)) - unchanged
        ratio = (_length(moved) / length).flatten()
        best = torch.maximum(best, ratio.detach().cpu())
        (slope,) = torch.autograd.grad(ratio.sum(), change)
        change = slope * mask  # power iteration: the steepest direction is the next change
    return float(best.mean())


def structure(network: Network, images: Tensor, mask: Tensor) -> Structure:
    """What comes back of a bright disc in the middle of the signal.

    Parameters
    ----------
    network
        Coil images from k-space and mask.
    images
        Fully sampled coil images, ``(1, 2 coil, y, x)``, with about 1 as the largest magnitude.
    mask
        ``(1, 1, y, x)``.
    """
    coils = to_complex(images)
    magnitude = coils.abs().square().sum(dim=1).sqrt()[0]
    y, x = (torch.arange(n, dtype=torch.float32) for n in magnitude.shape)
    weight = magnitude / magnitude.sum()
    centre = float((weight.sum(1) * y).sum()), float((weight.sum(0) * x).sum())
    disc = ((y[:, None] - centre[0]) ** 2 + (x - centre[1]) ** 2 <= DISC_RADIUS**2).float()
    direction = coils / magnitude.clamp_min(1e-6)
    inserted = to_channels(direction * disc * DISC_CONTRAST * magnitude.max())

    def answer(of: Tensor, by: Network) -> Tensor:
        kspace = to_channels(fourier(to_complex(of))) * mask
        with torch.no_grad():
            return by(torch.cat([kspace, mask], dim=1))

    def share(by: Network) -> float:
        seen = answer(images + inserted, by) - answer(images, by)
        return float((seen * inserted).sum() / inserted.square().sum())

    return Structure(network=share(network), zero_filled=share(zero_filled))


def zero_filled(sample: Tensor) -> Tensor:
    """The inverse transform of what is measured: coil images ``(batch, 2 coil, y, x)``."""
    return to_channels(inverse_fourier(to_complex(sample[:, :-1])))


def _length(values: Tensor) -> Tensor:
    """Of each of a batch, ``(batch, 1, 1, 1)``."""
    return values.square().flatten(1).sum(1).sqrt()[:, None, None, None]
