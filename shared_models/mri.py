"""The physics of MR reconstruction: Fourier transforms, sampling masks, coils, data consistency.

Shapes are ``(..., coil, y, x)`` with y the phase-encoding direction, in which lines are skipped, and x the readout, which
is sampled in full. The centre of k-space is at index n // 2 of each axis and transforms are orthonormal, so that noise is
as large in an image as in its k-space. Networks exchange real numbers: :func:`to_channels` and :func:`to_complex`
translate, real and imaginary part of one coil after the other.

Masks follow Lustig et al. 2007 (doi:10.1002/mrm.21391: variable density), Zbontar et al. 2018 (arXiv:1811.08839: a share
of lines in the centre, and lines at equal distances) and Winkelmann et al. 2007 (doi:10.1109/TMI.2006.885337: spokes that
follow each other at the golden angle).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared_models.errors import FederadError

MaskKind = Literal["variable-density", "equispaced", "radial"]

DECAY = 3.0
"""Of the density of sampled lines from the centre outwards: (1 - distance) to this power."""

FLOOR = 0.02
"""Least density of a line at the edge of k-space, against 1 at the centre."""

GOLDEN_ANGLE = math.pi * (math.sqrt(5) - 1) / 2
"""Between one spoke and the next [radians]."""


def fourier(image: Tensor) -> Tensor:
    """Centred orthonormal 2-D Fourier transform over the last two axes; complex in and out, the same shape."""
    kspace: Tensor = torch.fft.fft2(torch.fft.ifftshift(image, dim=(-2, -1)), norm="ortho")
    centred: Tensor = torch.fft.fftshift(kspace, dim=(-2, -1))
    return centred


def inverse_fourier(kspace: Tensor) -> Tensor:
    """The inverse of :func:`fourier`, and its adjoint."""
    image: Tensor = torch.fft.ifft2(torch.fft.ifftshift(kspace, dim=(-2, -1)), norm="ortho")
    centred: Tensor = torch.fft.fftshift(image, dim=(-2, -1))
    return centred


def to_complex(channels: Tensor) -> Tensor:
    """Real ``(batch, 2 coil, y, x)`` as complex ``(batch, coil, y, x)`` of the same precision, at least of 32 bits."""
    batch, n, y, x = channels.shape
    values = channels if channels.dtype == torch.float64 else channels.float()
    pairs = values.reshape(batch, n // 2, 2, y, x)
    return torch.complex(pairs[:, :, 0], pairs[:, :, 1])


def to_channels(values: Tensor) -> Tensor:
    """Complex ``(batch, coil, y, x)`` as real ``(batch, 2 coil, y, x)``."""
    batch, n_coils, y, x = values.shape
    return torch.stack([values.real, values.imag], dim=2).reshape(batch, 2 * n_coils, y, x)


def root_sum_of_squares(coil_images: Tensor) -> Tensor:
    """Magnitude over coils (Roemer et al. 1990, doi:10.1002/mrm.1910160203): ``(..., coil, y, x)`` to ``(..., y, x)``."""
    return coil_images.abs().square().sum(dim=-3).sqrt()


def expand(image: Tensor, sensitivities: Tensor) -> Tensor:
    """What each coil sees of an image: ``(batch, 1, y, x)`` to ``(batch, coil, y, x)``."""
    return image * sensitivities


def combine(coil_images: Tensor, sensitivities: Tensor) -> Tensor:
    """The adjoint of :func:`expand`; where the squares of the sensitivities add up to 1, also its inverse."""
    return (coil_images * sensitivities.conj()).sum(dim=-3, keepdim=True)


def consistent(kspace: Tensor, measured: Tensor, mask: Tensor, noise: Tensor | None = None) -> Tensor:
    """k-space with its samples replaced by the measured ones, or drawn towards them (Schlemper et al. 2018,
    arXiv:1704.02422, eq. 8).

    Parameters
    ----------
    kspace
        What is believed so far, ``(batch, coil, y, x)``.
    measured
        What was measured, zero elsewhere; the same shape.
    mask
        1 where something was measured, ``(batch, 1, y, x)``.
    noise
        Weight v of the measurement, 0 or above: samples become (k + v m) / (1 + v). None for a measurement without noise,
        whose samples are returned as they are, to the last bit.
    """
    if noise is None:
        return torch.where(mask > 0, measured, kspace)
    return torch.where(mask > 0, (kspace + noise * measured) / (1 + noise), kspace)


def centre(kspace: Tensor, fraction: float) -> Tensor:
    """k-space with nothing left but the fully sampled square around its centre: a blurred image of each coil."""
    kept = torch.zeros_like(kspace)
    y, x = (_middle(n, fraction) for n in kspace.shape[-2:])
    kept[..., y, x] = kspace[..., y, x]
    return kept


def centre_is_measured(mask: NDArray[np.bool_], fraction: float) -> bool:
    """Whether a mask ``(y, x)`` has all samples of the lines that lie side by side in the centre."""
    return bool(mask[_middle(mask.shape[0], fraction)].all())


def low_resolution_sensitivities(measured: Tensor, fraction: float) -> Tensor:
    """Coil sensitivities from the centre of k-space (McKenzie et al. 2002, doi:10.1002/mrm.10087), ``(batch, coil, y, x)``.

    Their squares add up to 1 in every pixel. A single coil has sensitivity 1: nothing tells its phase from the image's.
    """
    if measured.shape[1] == 1:
        return torch.ones_like(measured)
    return unit_sensitivities(inverse_fourier(centre(measured, fraction)))


def unit_sensitivities(maps: Tensor) -> Tensor:
    """Maps ``(batch, coil, y, x)`` scaled in every pixel so that their squares add up to 1."""
    total = maps.abs().square().sum(dim=1, keepdim=True)
    return maps * torch.rsqrt(total + 1e-12 * total.amax(dim=(-2, -1), keepdim=True) + 1e-20)


def sampling_mask(
    kind: MaskKind, shape: tuple[int, int], acceleration: float, centre_fraction: float, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Which samples of k-space are measured, ``(y, x)``.

    ================  =========================================================================================
    variable-density  whole lines: those of the centre, the others at random, ever fewer towards the edge
    equispaced        whole lines: those of the centre, the others at equal distances from a random first one
    radial            the samples nearest to spokes through the centre, and a disc around it
    ================  =========================================================================================

    Promise
        Masks of lines have round(y / acceleration) of them, exactly; a radial one has the share 1 / acceleration of all
        samples, and up to one spoke more. The centre's round(centre_fraction * y) lines, or the disc of that diameter, are
        always among them.

    Parameters
    ----------
    kind
        How the samples are laid out.
    shape
        Phase-encoding lines and samples along each (y, x).
    acceleration
        Samples of the full k-space over measured ones [ratio].
    centre_fraction
        Share of the lines that lie side by side in the centre.
    rng
        Where chance comes from.

    Raises
    ------
    FederadError
        P105 if the centre would be empty, or be all that is measured.
    """
    n_lines, n_centre = round(shape[0] / acceleration), round(centre_fraction * shape[0])
    if n_centre < 1 or n_lines <= n_centre:
        raise _no_centre(shape, acceleration, n_lines, n_centre)
    if kind == "radial":
        return _spokes(shape, acceleration, n_centre, rng)
    sampled = np.zeros(shape[0], np.bool_)
    sampled[_middle(shape[0], centre_fraction)] = True
    others, n_others = np.flatnonzero(~sampled), n_lines - n_centre
    if kind == "equispaced":
        step = len(others) / n_others
        sampled[others[(rng.random() * step + step * np.arange(n_others)).astype(int)]] = True
    else:
        distance = np.abs(others - shape[0] // 2) / (shape[0] / 2)
        density = np.maximum((1 - distance).clip(0) ** DECAY, FLOOR)
        sampled[rng.choice(others, n_others, replace=False, p=density / density.sum())] = True
    return np.repeat(sampled[:, None], shape[1], axis=1)


def smooth_phase(shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float32]:
    """A phase as slow as those of an uneven main field [radians], ``(y, x)``: a quadratic of random weights."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    terms = (1.0 + 0 * y * x, y + 0 * x, x + 0 * y, x * y, y**2 + 0 * x, x**2 + 0 * y)
    phase: NDArray[np.float32] = sum(
        weight * term for weight, term in zip(rng.normal(0, 1, len(terms)), terms, strict=True)
    ).astype(np.float32)
    return phase


def ring_of_coils(n_coils: int, shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.complex64]:
    """Sensitivities of coils on a ring around the image, turned at random; complex64 ``(coil, y, x)``.

    Each falls off with the distance from its coil and carries a phase that turns around it (in the manner of a birdcage
    array, Hayes et al. 1985). Their squares add up to 1 in every pixel; a single coil sees everything alike.
    """
    if n_coils == 1:
        return np.ones((1, *shape), np.complex64)
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    angles = rng.uniform(0, 2 * math.pi) + 2 * math.pi * np.arange(n_coils) / n_coils
    offsets = [(y - 1.5 * math.sin(angle), x - 1.5 * math.cos(angle)) for angle in angles]
    maps = np.stack([np.exp(1j * np.arctan2(dx, -dy)) / np.hypot(dy, dx) for dy, dx in offsets])
    return np.asarray(maps / np.sqrt((np.abs(maps) ** 2).sum(axis=0)), np.complex64)


def _middle(n: int, fraction: float) -> slice:
    """The samples of an axis that lie in the centre's square."""
    n_kept = max(1, round(fraction * n))
    first = n // 2 - n_kept // 2
    return slice(first, first + n_kept)


def _spokes(shape: tuple[int, int], acceleration: float, n_centre: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Spokes at the golden angle on the grid of k-space, until enough samples are met."""
    y, x = np.meshgrid(*((np.arange(n) - n // 2) / n for n in shape), indexing="ij")
    sampled: NDArray[np.bool_] = np.hypot(y, x) <= n_centre / shape[0] / 2
    wanted = sampled.size / acceleration
    if sampled.sum() >= wanted:
        raise _no_centre(shape, acceleration, round(wanted), int(sampled.sum()))
    radius = np.linspace(-0.5, 0.5, 2 * max(shape), endpoint=False)
    angle = rng.uniform(0, math.pi)
    while sampled.sum() < wanted:
        rows, columns = (
            np.clip(np.rint(radius * turned * n).astype(int) + n // 2, 0, n - 1)
            for turned, n in ((math.sin(angle), shape[0]), (math.cos(angle), shape[1]))
        )
        sampled[rows, columns] = True
        angle += GOLDEN_ANGLE
    return sampled


def _no_centre(shape: tuple[int, int], acceleration: float, n_sampled: int, n_centre: int) -> FederadError:
    return FederadError(
        "P105",
        happened=f"Acceleration {acceleration:g} of a k-space of {shape[0]} x {shape[1]} leaves {n_sampled} lines or "
        f"samples, and its centre takes {n_centre}.",
        because="The centre holds the contrast and the coils' sensitivities; around it something must be measured too.",
        remedies=(
            "lower task.acceleration, or the site's own under task.site_acceleration",
            "or change task.centre_fraction, such that its share of the lines is at least one and below 1 / acceleration",
        ),
    )
