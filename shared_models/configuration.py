"""What follows from spacing and size of images: how deep a network goes along each axis.

The rules are those that nnU-Net published (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z, supplementary note 2):
an axis is halved while at least :data:`LEAST_SIDE` voxels would be left of the patch, unless another axis is more than
twice as fine; an axis is looked along by kernels of 3 from the first depth at which it is no longer so coarse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LEAST_SIDE = 4
"""Voxels of the patch that are left along an axis at the last depth, at least."""

ANISOTROPY = 2.0
"""An axis whose spacing is this many times the finest one's, or more, is coarse."""


@dataclass(frozen=True)
class Depth:
    """How one depth of a network looks along each axis."""

    stride: tuple[int, ...]
    """By how much it is coarser than the depth above, 1 or 2."""

    kernel: tuple[int, ...]
    """Sides of its kernels, 1 or 3."""


def depths_of(patch: Sequence[int], spacing_mm: Sequence[float] | None, n_depths: int) -> list[Depth]:
    """Strides and kernels of ``n_depths`` depths; where spacing is not known, all axes are alike.

    Parameters
    ----------
    patch
        Sides of the training patch [pixels or voxels].
    spacing_mm
        Of the same axes [mm].
    """
    spacing = [float(s) for s in spacing_mm] if spacing_mm is not None else [1.0] * len(patch)
    side, kernel = list(patch), [1] * len(patch)
    depths = []
    for depth in range(n_depths):
        stride = [1] * len(patch)
        if depth:
            able = [n % 2 == 0 and n // 2 >= LEAST_SIDE for n in side]
            finest = min((s for s, can in zip(spacing, able, strict=True) if can), default=0.0)
            stride = [2 if can and s < ANISOTROPY * finest else 1 for s, can in zip(spacing, able, strict=True)]
            side = [n // k for n, k in zip(side, stride, strict=True)]
            spacing = [s * k for s, k in zip(spacing, stride, strict=True)]
        kernel = [3 if k == 3 or s < ANISOTROPY * min(spacing) else 1 for s, k in zip(spacing, kernel, strict=True)]
        depths.append(Depth(tuple(stride), tuple(kernel)))
    return depths


def divisors(patch: Sequence[int], spacing_mm: Sequence[float] | None, n_depths: int) -> tuple[int, ...]:
    """What each side of the patch is divided by on the way to the last depth."""
    factors = [1] * len(patch)
    for depth in depths_of(patch, spacing_mm, n_depths):
        factors = [f * s for f, s in zip(factors, depth.stride, strict=True)]
    return tuple(factors)


def halvings(side: Sequence[int], spacing_mm: Sequence[float] | None, most: int) -> tuple[int, ...]:
    """By what each side can be divided in up to ``most`` halvings by the same rules, whether it is even or not.

    A side made a multiple of its number is halved so often.
    """
    left, spacing = [float(n) for n in side], list(spacing_mm) if spacing_mm is not None else [1.0] * len(side)
    factors = [1] * len(side)
    for _ in range(most):
        able = [n / 2 >= LEAST_SIDE for n in left]
        finest = min((s for s, can in zip(spacing, able, strict=True) if can), default=0.0)
        stride = [2 if can and s < ANISOTROPY * finest else 1 for s, can in zip(spacing, able, strict=True)]
        left = [n / k for n, k in zip(left, stride, strict=True)]
        spacing = [s * k for s, k in zip(spacing, stride, strict=True)]
        factors = [f * k for f, k in zip(factors, stride, strict=True)]
    return tuple(factors)
