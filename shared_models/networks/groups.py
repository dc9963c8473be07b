"""Group normalisation (Wu and He 2018, arXiv:1803.08494) in place of batch normalisation: no patient meets another."""

from __future__ import annotations

import math

MOST_GROUPS = 8


def groups_of(*n_channels: int) -> int:
    """The largest number of groups, up to :data:`MOST_GROUPS`, into which all these numbers of channels can be dealt.

    A group has two channels at least where it can: a channel alone that is nearly constant, as in an image that is black,
    would be divided by almost nothing.
    """
    common = math.gcd(*n_channels)
    return max(n for n in range(1, MOST_GROUPS + 1) if common % n == 0 and (n == 1 or common // n > 1))
