"""Compressed sensing with wavelets (Lustig et al. 2007, doi:10.1002/mrm.21391): reconstruction that learns nothing.

Finds the image x that minimises 1/2 |A x - y|^2 + weight * |W x|_1, with A the coils' sensitivities, the Fourier transform
and the mask, and W an orthonormal wavelet transform, by FISTA (Beck and Teboulle 2009, doi:10.1137/080716542). The image is
shifted by a few pixels from step to step, so that no place of the wavelets' grid shows (Coifman and Donoho 1995,
doi:10.1007/978-1-4612-2544-7_9). In the end the measured samples are put back as they are.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared_models.mri import combine, consistent, expand, fourier, inverse_fourier

WAVELET, LEVELS = "db4", 4

WEIGHT = 0.003
"""Of the wavelet term, where the zero-filled image has 1 as its largest value."""

STEPS = 60


def wavelet_reconstruction(measured: Tensor, mask: Tensor, sensitivities: Tensor, *, weight: float = WEIGHT) -> Tensor:
    """Coil images from measured k-space.

    Parameters
    ----------
    measured
        k-space, zero where nothing was measured, with 1 as the largest value of its image; complex ``(batch, coil, y, x)``.
    mask
        1 where something was measured, ``(batch, 1, y, x)``.
    sensitivities
        Of the coils, with squares that add up to 1; shaped as ``measured``.
    weight
        Of the wavelet term.

    Returns
    -------
    Tensor
        Complex ``(batch, coil, y, x)``.
    """
    rng = np.random.default_rng(0)
    image = combine(inverse_fourier(measured), sensitivities)
    ahead, t = image, 1.0
    for _ in range(STEPS):
        difference = mask * fourier(expand(ahead, sensitivities)) - measured
        descended = ahead - combine(inverse_fourier(difference), sensitivities)
        former, image = image, _shrunk(descended, weight, rng)
        t, t_before = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
        ahead = image + (t_before - 1) / t * (image - former)
    return inverse_fourier(consistent(fourier(expand(image, sensitivities)), measured, mask))


def _shrunk(images: Tensor, weight: float, rng: np.random.Generator) -> Tensor:
    """Soft thresholding of wavelet coefficients but the coarsest, ``(batch, 1, y, x)``."""
    shift = tuple(int(n) for n in rng.integers(0, 2**LEVELS, 2))
    planes = np.roll(images.numpy(), shift, axis=(-2, -1))
    shrunk = np.stack([[_shrunk_plane(one[0], weight)] for one in planes])
    return torch.from_numpy(np.roll(shrunk, (-shift[0], -shift[1]), axis=(-2, -1)))


def _shrunk_plane(plane: NDArray[np.complex64], weight: float) -> NDArray[np.complex64]:
    import pywt

    n_y, n_x = plane.shape
    levels = max(1, min(LEVELS, pywt.dwt_max_level(min(n_y, n_x), WAVELET)))
    multiple = 2**levels
    padded = np.pad(plane, ((0, -n_y % multiple), (0, -n_x % multiple)), mode="edge")
    coarse, *details = pywt.wavedec2(padded, WAVELET, mode="periodization", level=levels)
    smaller = [tuple(_soft(part, weight) for part in level) for level in details]
    back = pywt.waverec2([coarse, *smaller], WAVELET, mode="periodization")
    return np.asarray(back[:n_y, :n_x], np.complex64)


def _soft(values: NDArray[np.complex64], weight: float) -> NDArray[np.complex64]:
    size = np.abs(values)
    return np.asarray(values * (1 - weight / np.maximum(size, weight)), np.complex64)
