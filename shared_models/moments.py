"""Feature moments: what a site may tell of its scanners, for a discriminator that is trained where no patient is.

A discriminator at a site with one scanner learns to say its name and nothing else. So sites release, in rounds that the
plan fixes, sums over patients of what a discriminator would see: for each scanner a count, the features and, without
``[privacy]``, their squares. The server draws samples from Gaussians with these moments and trains the discriminator on
them (``server.moments``); sites use it frozen (:class:`Confusion`). (Moments of each site: FedHarmony, Dinsdale et al.,
MICCAI 2022.)

What is described is the mean and spread of features at each depth (``adaptation.pooled``), normalised to length 1, on
:data:`DIMENSIONS` public random directions: noise on few coordinates leaves something to see.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from shared_models.adaptation import Listening, Tap, find_taps, joined, pooled
from shared_models.errors import FederadError
from shared_models.plan import Plan
from shared_models.scanners import ScannerTable
from shared_models.schedule import moments_rounds
from shared_models.seeds import generator
from shared_models.weights import Weights, difference

Vector = NDArray[np.float64]

DIMENSIONS = 16
"""Public random directions on which features are described."""

FEWEST = 5
"""Patients of a scanner below which a site without ``[privacy]`` tells nothing of it, and the server does not use it."""

TABLE = "table"
"""Name of the one array of a release."""

WIDTH = 32
"""Units between the features and the scanners."""


@dataclass(frozen=True)
class Layout:
    """What a release of moments looks like: a row for each scanner of the plan's table, by public numbers alone.

    A row is (C, f, f * f / C), summed over patients, where f is a patient's mean feature of norm at most C. Under
    ``[privacy]`` squares are left out: noise would drown them, and a public spread takes their place.
    """

    n_scanners: int
    clip: float
    """C, the plan's ``moments_clip``."""

    has_squares: bool

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """That of a plan with ``adversarial = "moments"``."""
        if plan.adaptation is None or not plan.asks_for_moments:
            raise ValueError("the plan asks for no moments")
        table = plan.adaptation
        return cls(len(ScannerTable(table.scanners)), table.moments_clip, plan.privacy is None)

    @property
    def shape(self) -> tuple[int, int]:
        """(scanners, values of each)."""
        return self.n_scanners, 1 + DIMENSIONS * (2 if self.has_squares else 1)

    @property
    def largest(self) -> float:
        """Largest L2 norm of what one patient adds, over all scanners together."""
        return self.clip * math.sqrt(3 if self.has_squares else 2)

    def patient(self, features: Mapping[int, Vector]) -> Vector:
        """What one patient adds, ``shape``: each of m scanners counts 1 / m, so that the joint norm is at most ``largest``.

        Parameters
        ----------
        features
            Mean feature of the patient's samples, ``(DIMENSIONS,)``, by the scanner's place in the table.
        """
        vector = np.zeros(self.shape)
        for place, feature in features.items():
            clipped = feature * min(1.0, self.clip / max(float(np.linalg.norm(feature)), 1e-30))
            squares = clipped**2 / self.clip if self.has_squares else np.zeros(0)
            vector[place] = np.concatenate([np.array([self.clip]), clipped, squares]) / len(features)
        return vector


def fault_of(moments: Weights, plan: Plan, round_: int) -> str | None:
    """Why moments in an answer are none that a site can have released; None if they are, or if there are none."""
    if not moments:
        return None
    if round_ not in moments_rounds(plan):
        return "moments nobody asked for"
    layout = Layout.of(plan)
    if mismatch := difference(moments, {TABLE: layout.shape}):
        return f"moments: {mismatch}"
    table = moments[TABLE].astype(np.float64)
    if not np.isfinite(table).all():
        return "moments that are not finite"
    if not layout.has_squares:
        return None
    room = table[:, 0] * (1 + 1e-3)
    features, squares = table[:, 1 : 1 + DIMENSIONS], table[:, 1 + DIMENSIONS :]
    is_possible = (
        (np.linalg.norm(features, axis=1) <= room) & (squares >= 0).all(axis=1) & (squares.sum(axis=1) <= room)
    )
    return None if is_possible.all() else "moments that no patients can have"


def described(features: Sequence[Tensor]) -> Tensor:
    """Features of several depths on the public directions, ``(batch, DIMENSIONS)``, of norm about 1; not clipped."""
    values = pooled(features)
    d = values.shape[1]
    on_directions: Tensor = F.layer_norm(values, (d,)) @ torch.from_numpy(directions(d)).to(values)
    return on_directions / math.sqrt(d)


@lru_cache(maxsize=16)
def directions(d: int) -> Vector:
    """The public directions of ``d`` features, ``(d, DIMENSIONS)``: the same for everyone and ever."""
    drawn = generator("directions of feature moments", d).standard_normal((d, DIMENSIONS))
    return np.asarray(drawn / math.sqrt(DIMENSIONS))


def clip_rows(values: Tensor, clip: float) -> Tensor:
    """Each row, shortened to a norm of at most ``clip``."""
    norm: Tensor = values.norm(dim=1, keepdim=True)
    return values * (clip / norm.clamp(min=1e-30)).clamp(max=1)


def describe(network: nn.Module, image: Tensor) -> Tensor:
    """What the moments of images are those of, ``(batch, DIMENSIONS)``; ``network`` has no discriminator of its own."""
    taps, _ = find_taps(network, image[:1])
    with Listening(network, taps) as features:
        network(image)
    return described([feature.float() for feature in features])


class Discriminator(nn.Module):
    """Tells scanners apart by described features: standardised, one hidden layer.

    Its state travels as arrays; nothing of it is trained at a site.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, n_scanners: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(DIMENSIONS))
        self.register_buffer("spread", torch.ones(DIMENSIONS))
        self.hidden = nn.Linear(DIMENSIONS, WIDTH)
        self.scanners = nn.Linear(WIDTH, n_scanners)

    def forward(self, values: Tensor) -> Tensor:
        """Logits of scanners, ``(batch, n_scanners)``."""
        hidden: Tensor = self.hidden((values - self.centre) / self.spread)
        logits: Tensor = self.scanners(F.leaky_relu(hidden, 0.1))
        return logits

    def as_arrays(self) -> Weights:
        """What travels."""
        return {name: value.detach().cpu().float().numpy().copy() for name, value in self.state_dict().items()}

    @classmethod
    def from_arrays(cls, arrays: Weights, plan: Plan) -> Self:
        """The one that arrived, frozen.

        Raises
        ------
        FederadError
            M217 if it is none for this plan.
        """
        bias = arrays.get("scanners.bias", np.zeros(0, np.float32))
        with torch.random.fork_rng(devices=[]):  # what it begins with is overwritten, and nobody's stream moves
            made = cls(min(max(bias.size, 2), Layout.of(plan).n_scanners))
        if mismatch := difference(arrays, {name: tuple(value.shape) for name, value in made.state_dict().items()}):
            raise FederadError(
                "M217",
                happened=f"The discriminator that came with the question does not fit the plan: {mismatch}.",
                because="Features would learn to hide from something else than what was agreed on.",
                remedies=("check that both sides run the same version of federad",),
            )
        made.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
        return made.requires_grad_(False)


class Confusion:
    """Moves features to where a frozen discriminator cannot tell their scanner.

    For each sample the divergence of its answer from "every scanner alike" is to fall, which no sample's own scanner and
    no other sample has a part in. Its gradient joins the task's where features arise and measures at most
    ``gradient_ratio`` of it there (``adaptation.joined``).

    Parameters
    ----------
    arrays
        Of the discriminator.
    plan
        One with ``adversarial = "moments"``.
    """

    def __init__(self, arrays: Weights, plan: Plan) -> None:
        if plan.adaptation is None:
            raise ValueError("the plan asks for no moments")
        self._discriminator = Discriminator.from_arrays(arrays, plan)
        self._clip, self._ratio = plan.adaptation.moments_clip, plan.adaptation.gradient_ratio
        self._taps: list[Tap] | None = None
        self._features: list[Tensor] = []

    def answer(self, network: nn.Module, image: Tensor) -> Tensor:
        """What the network answers; its features wait for :meth:`oppose`."""
        if self._taps is None:
            self._taps, _ = find_taps(network, torch.zeros_like(image[:1]))
        with Listening(network, self._taps) as features:
            output: Tensor = network(image)
        self._features = features
        return output

    def oppose(self, has_reference: Tensor, *, strength: float, share: float = 1.0) -> None:
        """Arrange that the next backward pass also moves features towards confusion.

        Parameters
        ----------
        has_reference
            Whether each sample has one, bool ``(batch,)``; what that means for the bound, ``adaptation.joined`` says.
        strength
            Weight of the gradient.
        share
            What this batch counts, where it is a part of a whole.
        """
        features, self._features = self._features, []
        for feature, gradient in zip(features, self.gradients(features), strict=True):
            feature.register_hook(  # type: ignore[no-untyped-call]  # torch has no types for it
                partial(joined, against=strength * share * gradient, has_reference=has_reference, ratio=self._ratio)
            )

    def gradients(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Of the mean divergence over a batch, at the features of each depth."""
        leaves = [feature.detach().float().requires_grad_() for feature in features]
        values = clip_rows(described(leaves), self._clip)
        each = -F.log_softmax(self._discriminator.to(values.device)(values), dim=1).mean(dim=1)
        return torch.autograd.grad(each.mean(), leaves)
