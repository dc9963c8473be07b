"""Randomness that depends on where and when, never on process state.

A training step at a site draws from a generator keyed by (seed, site, round, ...): the same in any engine, worker or
order of execution. Under ``[privacy]`` sampling and noise never come from here (``PRIVACY_RULES``, rule 5).
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive(*parts: object) -> int:
    """A 63-bit seed from any sequence of words and numbers, the same on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: object) -> np.random.Generator:
    """A NumPy generator keyed by ``parts``."""
    return np.random.Generator(np.random.PCG64(derive(*parts)))
