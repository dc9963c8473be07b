"""What noise buys: from mechanism events to epsilon, and from epsilon back to noise.

An event is a number of steps of one Poisson-subsampled Gaussian mechanism. Events are what the ledger keeps, since they
compose and epsilons do not; epsilon is computed from them whenever it is asked for. Everything here is a promise to one
*patient*: events of image-level mechanisms are counted at what they mean for a patient with several images.

* Within a run, whose parameters are fixed in advance: privacy-loss random variables (PRV; Gopi et al. 2021,
  arXiv:2106.02848), an upper bound within about 0.3 %.
* Across runs, each chosen after seeing the ones before: a Renyi filter (Feldman and Zrnic 2021, arXiv:2008.11193) at one
  order, fixed before the first charge.

Neighbouring cohorts differ by one patient added or removed. The figures come from Opacus; without it there are none.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from typing import Any, Literal

import numpy as np

from shared_models.errors import FederadError

Unit = Literal["patient", "image"]

Split = Literal["train", "validation", "test"]

LARGEST_DELTA = 1e-5

NOISE_RANGE = (0.1, 1000.0)
"""Noise multipliers among which :func:`calibrate` looks."""

ORDERS = (*(1 + k / 8 for k in range(1, 24)), *range(4, 65), 80, 96, 128, 192, 256, 384, 512)
"""Renyi orders that are looked at."""

_PRV_UP_TO = 300.0
"""Above this epsilon PRV needs too much memory, and the Renyi bound, which is never smaller, stands."""


@dataclass(frozen=True)
class Event:
    """A number of steps of one noised sum over a Poisson sample."""

    noise_multiplier: float
    """Standard deviation of the noise over the clip norm [ratio]; 0 for no noise, which costs everything."""

    sampling_rate: float
    """Probability with which each patient, or image, takes part in a step."""

    steps: int

    unit: Unit = "patient"
    """What is clipped: all that a patient gives to a step, or each image."""

    images_per_patient: int = 1
    """Most images of one patient, a public bound; for ``unit = "image"`` only."""

    split: Split = "train"
    """Whose patients it is about. Within a run a patient is in one split, and pays for that one."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ValueError(f"noise_multiplier={self.noise_multiplier} is not a finite number from 0 up")
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate={self.sampling_rate} is not above 0 and at most 1")
        if self.steps < 1 or self.images_per_patient < 1:
            raise ValueError(f"steps={self.steps}, images_per_patient={self.images_per_patient}: at least 1 of each")
        if self.unit == "patient" and self.images_per_patient != 1:
            raise ValueError("images_per_patient is for image-level events only")

    @property
    def is_private(self) -> bool:
        """Whether there is any noise."""
        return self.noise_multiplier > 0


WITHOUT_PRIVACY = Event(noise_multiplier=0.0, sampling_rate=1.0, steps=1)
"""A run without noise: nothing bounds what it tells about a patient."""


def delta_limit(n_patients: int) -> float:
    """The largest delta that means anything for so many patients: min(1e-5, 1 / (10 n))."""
    return min(LARGEST_DELTA, 1 / (10 * n_patients))


def epsilon(events: Iterable[Event], delta: float, *, accountant: Literal["prv", "rdp"] = "prv") -> float:
    """Privacy loss of one run for one patient, the largest over the splits.

    Parameters
    ----------
    events
        Everything the run released, in any order.
    delta
        Probability with which the bound may fail.
    accountant
        ``prv`` where the parameters were fixed in advance; ``rdp`` for the bound by the best Renyi order.

    Returns
    -------
    float
        0 for no events, infinity if one of them has no noise.
    """
    groups = _by_split(events)
    return max((_epsilon_of_split(group, delta, accountant) for group in groups), default=0.0)


def rdp(events: Iterable[Event], order: float) -> float:
    """Renyi divergence at ``order`` between neighbouring cohorts, the largest over the splits.

    That of several runs, whatever each was chosen after seeing, is at most the sum of theirs.
    """
    return max((sum(_rdp_of_step(e, order) * e.steps for e in group) for group in _by_split(events)), default=0.0)


def rdp_to_epsilon(divergence: float, order: float, delta: float) -> float:
    """Epsilon at ``delta`` of a Renyi divergence at ``order`` (Balle et al. 2020, arXiv:1905.09982, theorem 21)."""
    return 0.0 if divergence == 0 else max(0.0, divergence + _conversion(order, delta))


def filter_order(lifetime_epsilon: float, delta: float, typical: Sequence[Event] = ()) -> float:
    """The order at which a run may be repeated most often before ``lifetime_epsilon`` is reached.

    It follows from the cap and from public parameters of the first run, so it can be fixed before the first charge.

    Parameters
    ----------
    typical
        The events of such a run; left out, Gaussians on everybody.
    """
    if not typical or not all(event.is_private for event in typical):
        typical = (Event(noise_multiplier=1.0, sampling_rate=1.0, steps=1),)

    def runs(order: float) -> float:
        room, cost = lifetime_epsilon - _conversion(order, delta), rdp(typical, order)
        return room / cost if room > 0 else room

    return float(max(ORDERS, key=runs))


def calibrate(
    epsilon_: float, delta: float, sampling_rate: float, steps: int, extra_events: Sequence[Event] = (), **kind: Any
) -> float:
    """The smallest noise multiplier with which a whole run stays within epsilon, rounded up to 4 decimals.

    Parameters
    ----------
    epsilon_
        For the whole run, at ``delta``.
    sampling_rate
        Of each training step.
    steps
        Training steps of the whole run.
    extra_events
        What else the run releases, metrics for example.
    kind
        Further fields of the training :class:`Event`.

    Raises
    ------
    FederadError
        C172 if no noise that is looked at is enough.
    """

    def spent(noise: float, accountant: Literal["prv", "rdp"] = "prv") -> float:
        event = Event(noise, sampling_rate, steps, **kind)
        return epsilon([event, *extra_events], delta, accountant=accountant)

    smallest, largest = NOISE_RANGE
    if spent(largest) > epsilon_:
        raise FederadError(
            "C172",
            happened=f"No noise brings this run within epsilon {epsilon_:g} at delta {delta:g}: with a noise multiplier "
            f"of {largest:g} it still costs {spent(largest):.3g}.",
            because="The noise follows from epsilon, and this epsilon cannot be kept.",
            remedies=(
                "a larger epsilon, fewer rounds, or metrics (metrics_every) and moments (moments_every) less often or "
                "with more noise",
                "let the operator know: the plan has to change",
            ),
        )
    low, high = smallest, largest
    for accountant in ("rdp", "prv"):  # the Renyi bound is cheap and brings the search near
        if accountant == "prv":
            low, high = max(smallest, high * 0.75), high if spent(high) <= epsilon_ else largest
            low = low if spent(low) > epsilon_ else smallest
        while high - low > max(5e-5, 2e-5 * high):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if spent(middle, accountant) <= epsilon_ else (middle, high)
    rounded = math.ceil(high * 1e4 - 1e-6) / 1e4
    while spent(rounded) > epsilon_:
        rounded = round(rounded + 1e-4, 4)
    return rounded


def patient_epsilon_of_image_level(events: Iterable[Event], images_per_patient: int, delta: float) -> float:
    """What an image-level guarantee means for a patient with several images.

    Each of a patient's images enters a step by itself, so a patient's share of the sum has a binomial number of clipped
    images: the mechanism is dominated by a mixture of Gaussians (Charles et al. 2024, arXiv:2407.07737). Counted exactly
    where ``dp-accounting`` is installed, else by the Renyi divergence of the same mixture, which is never smaller.
    """
    grouped = [replace(e, unit="image", images_per_patient=images_per_patient) for e in events]
    return epsilon(grouped, delta)


def image_epsilon(events: Iterable[Event], delta: float) -> float:
    """What the same events promise to one image, which is less than it sounds."""
    return epsilon([replace(e, unit="patient", images_per_patient=1) for e in events], delta)


def _by_split(events: Iterable[Event]) -> Iterator[tuple[Event, ...]]:
    """The events of each split, equal ones added up, in an order that does not depend on how they came."""
    steps: Counter[Event] = Counter()
    for event in events:
        steps[replace(event, steps=1)] += event.steps
    for split in ("train", "validation", "test"):
        group = [replace(event, steps=n) for event, n in steps.items() if event.split == split]
        if group:
            yield tuple(sorted(group, key=lambda e: (e.noise_multiplier, e.sampling_rate, e.images_per_patient)))


@lru_cache(maxsize=4096)
def _epsilon_of_split(events: tuple[Event, ...], delta: float, accountant: str) -> float:
    if not all(event.is_private for event in events):
        return math.inf
    return _by_prv(events, delta) if accountant == "prv" else _by_rdp(events, delta)


def _by_rdp(events: tuple[Event, ...], delta: float) -> float:
    return min(rdp_to_epsilon(rdp(events, order), order, delta) for order in ORDERS)


def _by_prv(events: tuple[Event, ...], delta: float) -> float:
    bound = _by_rdp(events, delta)
    if any(e.unit == "image" and e.images_per_patient > 1 for e in events):
        return min(bound, _by_mixture(events, delta))
    if bound > _PRV_UP_TO or bound == 0:
        return bound
    try:
        with _quietly():
            return min(bound, _prv(events, delta, eps_error=min(max(1e-3, 3e-3 * bound), 0.3)))
    except (RuntimeError, ValueError, FloatingPointError):  # its grid does not do; the other bound holds as well
        return bound


def _prv(events: tuple[Event, ...], delta: float, *, eps_error: float) -> float:
    """Upper end of epsilon by Opacus' privacy-loss random variables, of which the true figure is within ``eps_error``."""
    prv = _opacus("accountants.analysis.prv")
    delta_error = delta / 1000
    n_steps = [e.steps for e in events]
    n = sum(n_steps)
    # Beyond this, less than delta_error of the privacy loss lies outside (Gopi et al., remark 5.6, as Opacus reads it);
    # computed from our own divergences, which are the same and faster.
    single = max(_by_rdp((replace(e, steps=1),), delta_error / (8 * n)) for e in events)
    half = max(_by_rdp(events, delta_error / 4), single, eps_error) + 3
    mesh = eps_error / math.sqrt(n * math.log(12 / delta_error) / 2)
    domain = prv.Domain.create_aligned(-half, half, mesh)
    losses = [prv.PoissonSubsampledGaussianPRV(e.sampling_rate, e.noise_multiplier) for e in events]
    cut = [prv.TruncatedPrivacyRandomVariable(loss, domain.t_min, domain.t_max) for loss in losses]
    composed = prv.compose_heterogeneous([prv.discretize(loss, domain) for loss in cut], n_steps)
    found = float(composed.compute_epsilon(delta, delta_error, eps_error)[2])
    return found if math.isfinite(found) and found > 0 else math.inf


def _by_mixture(events: tuple[Event, ...], delta: float) -> float:
    """Epsilon by dp-accounting's privacy-loss distributions; infinity where it is not installed."""
    try:
        from dp_accounting import dp_event, pld
    except ImportError:
        return math.inf
    with _quietly():
        accountant = pld.PLDAccountant(value_discretization_interval=1e-2)
        for e in events:
            weights = _binomial(e.images_per_patient, e.sampling_rate)
            sizes = np.arange(len(weights)).tolist()
            mixture = dp_event.MixtureOfGaussiansDpEvent(e.noise_multiplier, sizes, weights.tolist())
            accountant.compose(mixture, e.steps)
        return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=65536)
def _rdp_of_kind(noise: float, rate: float, images: int, order: float) -> float:
    if images > 1 or not float(order).is_integer():
        return _rdp_of_mixture(noise, _binomial(images, rate), order)
    found = float(
        _opacus("accountants.analysis.rdp").compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=float(order))
    )
    return max(found, 0.0) if math.isfinite(found) else math.inf


def _rdp_of_step(event: Event, order: float) -> float:
    if not event.is_private:
        return math.inf
    return _rdp_of_kind(event.noise_multiplier, event.sampling_rate, event.images_per_patient, order)


def _rdp_of_mixture(noise: float, weights: Any, order: float) -> float:
    """Divergence between a mixture of N(j, noise^2), j = 0, 1, ... with ``weights``, and N(0, noise^2).

    The larger of the two directions, by the trapezoid rule, which converges geometrically for such functions.
    """
    sizes = np.arange(len(weights))
    x = np.arange(-order * len(weights) - 12 * noise, order * len(weights) + 12 * noise, noise / 16)
    with np.errstate(divide="ignore"):
        log_weights = np.log(weights)
    ratio = np.full_like(x, -np.inf)
    for size, log_weight in zip(sizes, log_weights, strict=True):
        ratio = np.logaddexp(ratio, log_weight + (2 * size * x - size**2) / (2 * noise**2))
    log_normal = -(x**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi)) + math.log(noise / 16)
    forward = np.logaddexp.reduce(log_normal + order * ratio)
    backward = np.logaddexp.reduce(log_normal + (1 - order) * ratio)
    return max(float(max(forward, backward)), 0.0) / (order - 1) + 1e-12


def _binomial(n: int, rate: float) -> Any:
    from scipy.stats import binom

    return binom.pmf(np.arange(n + 1), n, rate)


def _conversion(order: float, delta: float) -> float:
    return math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)


@lru_cache
def _opacus(module: str) -> Any:
    """A module of Opacus; C175 where it is not installed."""
    try:
        with _quietly():
            return import_module(f"opacus.{module}")
    except ImportError:
        raise FederadError(
            "C175",
            happened="The privacy accountant (the package opacus) is not installed.",
            because="Without it nobody can say what a run would cost a patient, so nothing is trained.",
            remedies=(
                "install federad again with its site part: pip install 'federad[site]'",
                "or use the image of the site, which holds it",
            ),
        ) from None


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield
