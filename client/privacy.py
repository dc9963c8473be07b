"""The private mechanism: what one step of training may learn from patients, and the noise that hides each of them.

A step is a Poisson-subsampled Gaussian mechanism. Every patient takes part with probability B / n, where the plan gives
B and the hospital declares a rounded public n; the gradient of each is clipped to L2 norm C; noise of standard deviation
sigma * C is added to the sum; B divides it. (Abadi et al. 2016, arXiv:1607.00133, with the patient as the unit as in
McMahan et al. 2018, arXiv:1710.06963.) Everything else a step needs is public, or came out of an earlier noised step.

Sums are taken in integers on a public grid and the noise is a Gaussian rounded to that grid, so a released sum has no
low-order bits that betray what went in (Mironov 2012, doi:10.1145/2382196.2382264): it equals the rounding of an ideal
Gaussian mechanism, and the accountant for that one holds. What a site may spend is decided in ``ledger`` and
``accounting``; which gradient a patient has, in ``training``.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import mpmath  # type: ignore[import-untyped]  # ships no types
import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

from shared_models.plan import PrivacyTable

if TYPE_CHECKING:
    from client.training import Patient

log = logging.getLogger(__name__)

P = TypeVar("P", bound="Patient")

GRID_BITS = 20
"""A unit of the grid is at most ``noise_multiplier * clip * 2 ** -GRID_BITS``."""

MARGIN = 2.0**-40
"""Share by which the clip stays below C in floating point, so that truncated integers lie below it exactly."""

CHUNK = 2**14
"""Coordinates whose noise is drawn at a time, few enough to stay in a processor's cache: speed and memory only."""

SURE_BELOW = 6.0
"""Up to this many standard deviations a double precision draw is known to within :data:`ERROR`."""

ERROR = 2e-11
"""Bound on how far a draw may lie from where its 64 bits put it [standard deviations], below :data:`SURE_BELOW`.

The interval that 64 bits leave open is at most 2**-64 / phi(6) = 9e-12 wide; SciPy's inverse is good to 1e-14 there.
"""

MORE_BITS = 128
"""Bits drawn in addition where 64 do not decide a rounding."""


class Randomness(Protocol):
    """Where sampling and noise come from: the operating system, or a test's own source."""

    def coins(self, n: int, q: float) -> NDArray[np.bool_]:
        """``n`` independent coins that show True with probability ``q``."""

    def gaussian(self, n: int, sigma: float) -> NDArray[np.int64]:
        """``n`` independent Gaussians of standard deviation ``sigma``, each rounded to the nearest integer."""

    def secret(self) -> bytes:
        """32 bytes nobody knows, from which one step's augmentation of each patient is derived."""


class MoreBits(Protocol):
    """A source of further bits."""

    def __call__(self) -> int:
        """:data:`MORE_BITS` random bits."""


class SystemRandomness:
    """Randomness from the operating system: a ChaCha20 stream under a fresh key for every draw.

    No state lives between two draws, so neither a fork, a restart nor a restored machine can serve one twice.
    """

    def coins(self, n: int, q: float) -> NDArray[np.bool_]:
        """True where 64 uniform bits lie below ``q``, rounded down to a multiple of 2**-64."""
        threshold = math.floor(Fraction(q) * 2**64)
        if threshold >= 2**64:
            return np.ones(n, np.bool_)
        drawn: NDArray[np.bool_] = _random_words(n) < np.uint64(threshold)
        return drawn

    def gaussian(self, n: int, sigma: float) -> NDArray[np.int64]:
        """Rounded Gaussians by inversion; see :func:`rounded_gaussian`."""
        return rounded_gaussian(_random_words(n), sigma, _more_bits)

    def secret(self) -> bytes:
        """32 bytes of the operating system."""
        return os.urandom(32)


def rounded_gaussian(words: NDArray[np.uint64], sigma: float, more: MoreBits) -> NDArray[np.int64]:
    """Gaussians of standard deviation ``sigma``, rounded to the nearest integer, one for each word of 64 random bits.

    The top bit is the sign and the others, v, say that the tail beyond |x| has between v and v + 1 times 2**-64 of the
    mass; SciPy inverts that in double precision.

    Promise
        The distribution is that of the rounded ideal Gaussian, to within 2**-160. Where the bits, or the precision of
        the inverse, leave open to which integer a draw belongs (about once in a million on a grid of 2**-20), further
        bits are drawn and the matter is settled in 80 digits. Nothing is left to add to delta.

    Parameters
    ----------
    words
        Independent uniform 64-bit words.
    sigma
        Standard deviation [units of the grid], up to 2**40.
    more
        Gives :data:`MORE_BITS` further random bits, as an integer.
    """
    tail = words & np.uint64(2**63 - 1)
    mass = tail.astype(np.float64)
    mass += 0.5
    mass *= 2.0**-64
    magnitude = -ndtri(mass)
    shifted = magnitude * sigma + 0.5
    rounded = np.floor(shifted)
    is_open = (np.abs(shifted - np.rint(shifted)) <= sigma * ERROR) | (magnitude >= SURE_BELOW)
    for i in np.flatnonzero(is_open):
        rounded[i] = _settled(int(tail[i]), more(), sigma)
    sign = words.view(np.int64) >> 63  # 0 or -1: xor and subtraction negate where it is -1
    values: NDArray[np.int64] = (rounded.astype(np.int64) ^ sign) - sign
    return values


def _settled(tail: int, more: int, sigma: float) -> int:
    """The integer nearest to |x|, in 80 digits; ``tail`` and ``more`` are the bits of the mass beyond |x|."""
    with mpmath.workdps(80):
        mass = (mpmath.mpf(tail) + (mpmath.mpf(more) + 0.5) / 2**MORE_BITS) / 2**64

        def beyond(k: int) -> Any:
            return mpmath.ncdf((0.5 - mpmath.mpf(k)) / mpmath.mpf(sigma))

        k = int(-ndtri(float(mass)) * sigma + 0.5)
        while mass < beyond(k + 1):
            k += 1
        while k > 0 and mass >= beyond(k):
            k -= 1
        return k


def _random_words(n: int) -> NDArray[np.uint64]:
    """``n`` words of 64 bits from a ChaCha20 stream (RFC 8439) under a key and nonce of the operating system."""
    stream = Cipher(algorithms.ChaCha20(os.urandom(32), bytes(4) + os.urandom(12)), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(8 * n)), np.uint64)


def _more_bits() -> int:
    return int.from_bytes(os.urandom(MORE_BITS // 8), "little")


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """The public numbers of a step; all that an accountant needs, and nothing that depends on who is in a cohort."""

    sampling_rate: float
    """Probability with which each patient takes part in a step."""

    noise_multiplier: float
    """Standard deviation of the noise over ``clip``."""

    clip: float
    """Largest L2 norm of one patient's gradient, over all parameters together."""

    divisor: int
    """What the noised sum is divided by."""

    gamma: float | None = None
    """Stabiliser of automatic clipping; None for flat clipping."""

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate={self.sampling_rate} is not between 0 and 1")
        if not 0.01 <= self.noise_multiplier <= 2**20:
            raise ValueError(f"noise_multiplier={self.noise_multiplier} is not between 0.01 and {2**20}")
        if not (0 < self.clip < math.inf) or self.divisor < 1 or (self.gamma is not None and self.gamma <= 0):
            raise ValueError("clip, divisor and gamma are above zero")

    @classmethod
    def of(cls, privacy: PrivacyTable, *, declared_size: int, noise_multiplier: float) -> Mechanism:
        """The mechanism that a plan asks for at a site that declared this many patients (or images)."""
        return cls(
            sampling_rate=sampling_rate(privacy.patients_per_step, declared_size),
            noise_multiplier=noise_multiplier,
            clip=privacy.clip,
            divisor=privacy.patients_per_step,
            gamma=privacy.clip_gamma,
        )

    @property
    def grid(self) -> float:
        """The unit in which sums are taken: a power of two, so that going there and back rounds nothing."""
        exponent = math.frexp(self.noise_multiplier * self.clip)[1] - 1
        return math.ldexp(1.0, exponent - GRID_BITS)

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise [units of the grid]: between 2**20 and 2**21."""
        return self.noise_multiplier * self.clip / self.grid

    @property
    def largest_square(self) -> int:
        """The largest squared norm of what one patient adds [units of the grid, squared]."""
        return math.floor((Fraction(self.clip) / Fraction(self.grid)) ** 2)


def sampling_rate(per_step: int, declared_size: int) -> float:
    """q = min(1, B / n): from the plan's number and the declared public size alone."""
    if declared_size < 1:
        raise ValueError(f"declared_size={declared_size} is not 1 or more")
    return min(1.0, per_step / declared_size)


def clipped(gradient: Tensor, mechanism: Mechanism, out: Tensor | None = None) -> Tensor | None:
    """A patient's gradient, scaled to an L2 norm of at most ``clip``.

    ========================  =====================================
    gradient                  result
    ========================  =====================================
    flat, norm <= clip        the same values
    flat, norm > clip         norm equal to clip, to within 1e-12
    automatic                 gradient * clip / (norm + gamma)
    NaN or infinity in it     None: the patient gives nothing
    ========================  =====================================

    Automatic clipping is that of Bu et al. 2023, arXiv:2206.07136.

    Parameters
    ----------
    gradient
        All trained parameters one after the other, ``(d,)``; scaled in float64.
    mechanism
        The public numbers of the step.
    out
        Where the result goes, float64 ``(d,)``; a new tensor for None.
    """
    values = gradient.to(torch.float64, copy=True) if out is None else out.copy_(gradient)
    norm = float(torch.linalg.vector_norm(values))
    if not math.isfinite(norm):
        return None
    limit = mechanism.clip * (1 - MARGIN)
    if mechanism.gamma is not None:
        return values.mul_(limit / (norm + mechanism.gamma))
    return values.mul_(limit / norm) if norm > limit else values


def on_grid(scaled: Tensor, mechanism: Mechanism, seed: int, out: Tensor | None = None) -> Tensor:
    """A clipped gradient in units of the grid: int64, of squared norm at most ``mechanism.largest_square``.

    Each value is rounded up or down at random, so that its mean is kept, where no rounding could make the norm too
    large; else towards zero, which never does. The integers are counted again: should they be too long, they are zero.

    Parameters
    ----------
    scaled
        What :func:`clipped` gave; overwritten.
    mechanism
        The public numbers of the step.
    seed
        Decides the rounding: 64 bits of this patient and step alone.
    out
        Where the result goes, int64 ``(d,)``; a new tensor for None.
    """
    units = scaled.mul_(1 / mechanism.grid)
    longest = float(torch.linalg.vector_norm(units)) + math.sqrt(len(units))
    if longest < math.sqrt(mechanism.largest_square) * (1 - MARGIN):
        generator = torch.Generator(units.device).manual_seed(seed)
        uniform = torch.rand(len(units), generator=generator, device=units.device, dtype=torch.float32)
        units = units.add_(uniform).floor_()
    integers = units.to(torch.int64) if out is None else out.copy_(units)
    squares = torch.mul(integers, integers, out=units.view(torch.int64))
    if int(squares.sum()) > mechanism.largest_square:
        integers.zero_()
    return integers


class PatientSum:
    """The sum of a step: patients are added one at a time, and it comes out noised, once.

    Parameters
    ----------
    mechanism
        The public numbers of the step.
    n_values
        Trained parameters, d.
    device
        Where gradients live; the sum is kept there.
    """

    def __init__(self, mechanism: Mechanism, n_values: int, device: torch.device | str = "cpu") -> None:
        self.mechanism = mechanism
        self._sum: Tensor | None = torch.zeros(n_values, dtype=torch.int64, device=device)
        self._values = torch.empty(n_values, dtype=torch.float64, device=device)
        self._units = torch.empty(n_values, dtype=torch.int64, device=device)

    @property
    def integers(self) -> Tensor:
        """The sum so far, without noise [units of the grid]: never leaves this process."""
        if self._sum is None:
            raise ValueError("this sum has been noised and is gone")
        return self._sum

    def add(self, gradient: Tensor, seed: int) -> bool:
        """Add one patient's mean gradient ``(d,)``; False if it adds nothing, because a value of it is not finite.

        It is clipped (:func:`clipped`) and rounded to the grid (:func:`on_grid`), so one patient moves the sum by a
        norm of at most ``clip``, exactly.
        """
        scaled = clipped(gradient, self.mechanism, out=self._values)
        if scaled is None:
            return False
        self.integers.add_(on_grid(scaled, self.mechanism, seed, out=self._units))
        return True

    def noised(self, randomness: Randomness) -> Tensor:
        """The sum with noise over the public divisor: float64 ``(d,)``, on the CPU. The sum itself is gone then."""
        total = self.integers.cpu().numpy()
        self._sum = None
        for start in range(0, len(total), CHUNK):
            part = total[start : start + CHUNK]
            part += randomness.gaussian(len(part), self.mechanism.sigma)
        return torch.from_numpy(total).to(torch.float64).mul_(self.mechanism.grid / self.mechanism.divisor)


def add_vectors(
    total: PatientSum, patients: Iterable[P], vector_of: Callable[[P], Tensor], secret: bytes, what: str
) -> None:
    """Add the one vector of each patient.

    Whatever goes wrong with one patient ends with that patient: were it to end the round, the round's fate would tell
    about the patient. Who gives nothing is in the log here.

    Parameters
    ----------
    vector_of
        The vector of a patient, ``(d,)``.
    secret
        Of this sum and of no other: it decides the roundings.
    what
        What is added up, for the log.

    Raises
    ------
    torch.AcceleratorError
        If the device itself is gone, and everybody's vector with it.
    """
    for patient in patients:
        try:
            is_added = total.add(vector_of(patient), patient_seed(secret, patient.key, "rounding"))
            reason = "" if is_added else "values that are not finite"
        except torch.AcceleratorError:
            raise  # the device itself is gone, and everybody's vector with it
        except Exception as error:
            reason = type(error).__name__
        if reason:
            log.warning("patient %s gives nothing to %s: %s", patient.key, what, reason)


def chosen(n: int, mechanism: Mechanism, randomness: Randomness) -> Sequence[int]:
    """Who takes part in a step: each of ``n`` with a coin of its own, so that it may be nobody."""
    return [int(i) for i in np.flatnonzero(randomness.coins(n, mechanism.sampling_rate))]


def patient_seed(secret: bytes, patient: str, purpose: str) -> int:
    """64 bits for one patient in one step: an HMAC under the step's secret, the same whoever else takes part."""
    return int.from_bytes(hmac.new(secret, f"{purpose}\x1f{patient}".encode(), hashlib.sha256).digest()[:8], "little")
