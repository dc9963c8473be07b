"""Adaptation to scanners: samples that look like other scanners', and features that do not betray theirs.

**Appearance randomisation** (:func:`randomised`) varies what scanners differ in, on each training sample: contrast curve,
shading, blur, resolution, Rician noise (Billot et al. 2023, arXiv:2107.09559; Zhang et al. 2020, arXiv:1906.03347). What a
sample becomes depends on its own random numbers alone.

**Gradient reversal** (Ganin et al. 2016, arXiv:1505.07818): a discriminator reads the scanner off pooled features of
several depths (Kamnitsas et al. 2017, arXiv:1612.08894), or off what is predicted (Tsai et al. 2018, arXiv:1802.10349), and
the network learns to mislead it. Its parameters travel and
are averaged like all others, so under ``[privacy]`` they lie in the same clipped and noised vector. The reversed gradient
joins the task's where features arise, sample by sample, and measures at most ``gradient_ratio`` of it there: an adversary
without a bound destroys what it should protect. No term depends on other samples.

Where sites have one scanner each, the server trains the discriminator instead: ``moments``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from shared_models.errors import FederadError
from shared_models.plan import AdaptationTable, Plan
from shared_models.scanners import ScannerTable
from shared_models.task import Sample, Task
from shared_models.volume import Volume

Image = NDArray[np.float32]

# ------------------------------------------------------------------------------------------------------ appearance

SHARE = 0.8
"""Of samples that are changed; the others stay as they were, as most patients at home look."""

KNOTS = 6
"""Points of a contrast curve, over the range of the sample."""

CURVE = 0.1
"""Standard deviation of each point's height [share of the range]."""

GAMMA = 0.5
"""Standard deviation of the exponent's natural logarithm."""

SHADING = 1.2
"""Largest shading, as a natural logarithm [ratio]."""

LARGEST_BLUR = 0.9
"""Largest standard deviation of the blur [pixels]."""

LEAST_RESOLUTION = 0.6
"""Least share of the spatial frequencies along one axis that is kept."""

LARGEST_NOISE = 0.08
"""Largest standard deviation of the noise in each channel of the signal [share of the range]."""

JITTER = 0.1
"""Standard deviation of the natural logarithm of the sample's spread, and of its mean [spreads]."""


def randomised(image: Image, rng: np.random.Generator) -> Image:
    """The same sample as another scanner might have shown it; :data:`SHARE` of all are changed.

    Mean and spread stay about what they were, since every image is normalised; what is exactly 0 (outside of the body where
    it was cut out) stays 0.

    Parameters
    ----------
    image
        Normalised intensities, float32 ``(channel, [z,] y, x)``.
    rng
        All randomness.
    """
    if rng.random() >= SHARE:
        return image
    return np.stack([_one_channel(channel, rng) for channel in image])


def _one_channel(image: Image, rng: np.random.Generator) -> Image:
    inside = image != 0
    if not inside.any():
        return image
    low, high = float(image.min()), float(image.max())
    mean, spread = float(image[inside].mean()), float(image[inside].std())
    signal = (image - low) / max(high - low, 1e-6)
    signal = _curved(signal, rng) * _shading(image.shape, rng)
    signal = _blurred(signal, rng)
    noise = LARGEST_NOISE * rng.random() ** 2
    real, imaginary = rng.standard_normal((2, *image.shape), dtype=np.float32) * np.float32(noise)
    signal = np.hypot(signal + real, imaginary)
    values = signal[inside]
    centred = (signal - values.mean()) / max(float(values.std()), 1e-6)
    wanted = spread * math.exp(JITTER * rng.standard_normal())
    result = np.where(inside, centred * wanted + mean + JITTER * spread * rng.standard_normal(), 0)
    return np.asarray(result, np.float32)


def _curved(signal: Image, rng: np.random.Generator) -> Image:
    """A power and a broken line: tissues move against each other, now and then past each other."""
    knots = np.linspace(0, 1, KNOTS)
    heights = knots ** math.exp(GAMMA * rng.standard_normal()) + CURVE * rng.standard_normal(KNOTS)
    return np.interp(signal, knots, np.maximum(heights, 0)).astype(np.float32)


def _shading(shape: tuple[int, ...], rng: np.random.Generator) -> Image:
    axes = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)
    terms = [*axes, *(2 * axis**2 - 1 for axis in axes), axes[-1] * axes[-2]]
    weights = rng.standard_normal(len(terms))
    weights *= SHADING * rng.random() / np.abs(weights).sum()
    exponent = sum(np.float32(weight) * term for weight, term in zip(weights, terms, strict=True))
    return np.asarray(np.exp(exponent), np.float32)


def _blurred(signal: Image, rng: np.random.Generator) -> Image:
    """Fewer spatial frequencies along one axis in the plane, and in half of all cases a point spread."""
    axis = -1 - int(rng.integers(2))
    share, width, is_blurred = rng.uniform(LEAST_RESOLUTION, 1), rng.uniform(0, LARGEST_BLUR), rng.random() < 0.5
    spectrum = np.fft.rfft(signal, axis=axis)
    kept = math.ceil(share * spectrum.shape[axis])
    spectrum.swapaxes(axis, -1)[..., kept:] = 0
    signal = np.fft.irfft(spectrum, n=signal.shape[axis], axis=axis).astype(np.float32)
    if is_blurred:
        signal = ndimage.gaussian_filter(signal, [0.0] * (signal.ndim - 2) + [width, width])
    return np.maximum(signal, 0)


def sample_of(task: Task, volume: Volume, rng: np.random.Generator) -> Sample:
    """A training sample of a volume, with the plan's appearance randomisation; all randomness from ``rng``.

    One without a reference has a placeholder as target where the plan takes such volumes.
    """
    plan = task.plan
    has_reference = not plan.takes_unlabelled or _has_reference(volume, task)
    if not has_reference:
        volume = replace(volume, label=np.zeros(volume.image.shape[1:], np.uint8), category=0, interval=(0.0, 0.0))
    sample = task.draw(volume, rng)
    if plan.adaptation is not None and plan.adaptation.appearance:
        sample = task.in_another_light(sample, partial(randomised, rng=rng))
    return sample if has_reference else replace(sample, has_reference=False)


def _has_reference(volume: Volume, task: Task) -> bool:
    from shared_models.tasks import OF_WHOLE_STUDIES, WITH_NUMBERS

    if task.plan.task.kind in WITH_NUMBERS:
        return volume.interval is not None
    return (volume.category if task.plan.task.kind in OF_WHOLE_STUDIES else volume.label) is not None


# ----------------------------------------------------------------------------------------------------- the adversary

HIDDEN = 32
"""Units between the pooled features and the scanners."""

READERS = 16
"""Channels of each layer between predictions and the scanners."""

ACTIVATIONS = ("torch.nn.modules.activation", "monai.networks.blocks.activation")
"""Where the classes live whose outputs are features."""

UNKNOWN = -1
"""Place of a scanner that is not told apart."""


@dataclass(frozen=True)
class Tap:
    """Where features are read: what one call of one module gives."""

    module: str
    call: int


class Adapted(nn.Module):
    """A network with the discriminator that its features should mislead.

    It answers as the network does. What the discriminator reads of the last forward pass in training waits for
    :meth:`oppose`: features of several depths, pooled, or the predicted probabilities, place by place.

    Parameters
    ----------
    network
        Any that maps ``(batch, channel, [z,] y, x)`` to one tensor. Features are the outputs of its activation modules:
        on the way down, the last one at each resolution.
    plan
        One whose sites train a discriminator.
    """

    def __init__(self, network: nn.Module, plan: Plan) -> None:
        super().__init__()
        table = plan.adaptation
        if table is None or table.adversarial != "scanner":
            raise ValueError("the plan has no discriminator that sites train")
        self.network = network
        self._ratio = table.gradient_ratio
        self._n_scanners = len(ScannerTable(table.scanners))
        self._n_labels = len(plan.task.labels) if table.conditional else 1
        self._features: list[Tensor] = []
        self._read: Callable[[Sequence[Tensor]], Tensor] = pooled
        self._taps: list[Tap] | None = None
        if table.reads == "predictions":
            self._read = partial(_probabilities, n_labels=len(plan.task.labels))
            self.discriminator = _of_predictions(plan, self._n_scanners)
            return
        self._taps, n_features = find_taps(network, torch.zeros(1, plan.network_channels, *plan.data.patch))
        self.discriminator = nn.Sequential(
            nn.LayerNorm(n_features, elementwise_affine=False),
            nn.Linear(n_features, HIDDEN),
            nn.LeakyReLU(0.1),
            nn.Linear(HIDDEN, self._n_scanners * self._n_labels),
        )

    def forward(self, image: Tensor) -> Tensor:
        """What the network answers."""
        self._features = []
        if not (self.training and torch.is_grad_enabled()):
            answer: Tensor = self.network(image)
            return answer
        if self._taps is None:
            answer = self.network(image)
            self._features = [answer]
            return answer
        with Listening(self.network, self._taps) as features:
            answer = self.network(image)
        self._features = features
        return answer

    def oppose(
        self,
        scanner: Tensor,
        target: Tensor,
        has_reference: Tensor,
        *,
        strength: float,
        among: Sequence[int] | None = None,
        share: float = 1.0,
    ) -> None:
        """Let the discriminator learn, and arrange that the next backward pass also moves features against it.

        Parameters
        ----------
        scanner
            Place of each sample's scanner in the plan's table, int64 ``(batch,)``; :data:`UNKNOWN` takes no part.
        target
            The task's target of each sample, whose largest label is the sample's.
        has_reference
            Whether there is one, bool ``(batch,)``. The reversed gradient of a sample without one is bounded by the mean
            over those that have one; where none has, it is not bounded here.
        strength
            Weight of the reversed gradient; 0 lets the discriminator alone learn.
        among
            Places of the scanners that this site has, between which the discriminator decides: what it would unlearn of the
            others here, other sites have to learn anew (Li and Zhan 2021, doi:10.1145/3447548.3467254). None for all.
        share
            What this batch counts, where it is a part of a whole.
        """
        features, self._features = self._features, []
        takes_part = scanner != UNKNOWN
        label = torch.zeros_like(scanner)
        if self._n_labels > 1:
            label, takes_part = target.flatten(1).amax(1) if target.ndim > 1 else target, takes_part & has_reference
        if not bool(takes_part.any()):
            return
        like = next(self.discriminator.parameters())
        leaves = [feature.detach().to(like.dtype).requires_grad_() for feature in features]
        logits = self.discriminator(self._read(leaves)).reshape(len(label), self._n_labels, self._n_scanners, -1)
        of_label = logits[torch.arange(len(label), device=label.device), label]
        here = list(range(self._n_scanners) if among is None else among)
        is_here = torch.zeros(self._n_scanners, dtype=torch.bool, device=label.device)
        is_here[here] = True
        of_label = of_label.masked_fill(~is_here[:, None], -torch.inf)
        named = torch.where(takes_part, scanner, here[0])[:, None].expand(-1, of_label.shape[2])
        each = F.cross_entropy(of_label, named, reduction="none").mean(1) * takes_part
        own = list(self.discriminator.parameters())
        found = torch.autograd.grad(share * each.sum() / len(each), [*leaves, *own])
        for parameter, gradient in zip(own, found[len(leaves) :], strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        if strength > 0:
            for feature, gradient in zip(features, found[: len(leaves)], strict=True):
                feature.register_hook(  # type: ignore[no-untyped-call]  # torch has no types for it
                    partial(joined, against=-strength * gradient, has_reference=has_reference, ratio=self._ratio)
                )

    def bound_discriminator(self) -> None:
        """Shorten the discriminator's gradient to ``gradient_ratio`` of the network's, to which a clip leaves the room."""
        own = [p.grad for p in self.discriminator.parameters() if p.grad is not None]
        rest = [p.grad for p in self.network.parameters() if p.grad is not None]
        if own and rest:
            norm, limit = (float(torch.stack([g.norm() for g in part]).norm()) for part in (own, rest))
            for gradient in own:
                gradient.mul_(min(1.0, self._ratio * limit / max(norm, 1e-30)))


def without_discriminator(network: nn.Module) -> nn.Module:
    """What predicts."""
    return network.network if isinstance(network, Adapted) else network


def pooled(features: Sequence[Tensor]) -> Tensor:
    """Mean and standard deviation of each feature over space, all depths one after the other: ``(batch, d)``."""
    parts = []
    for feature in features:
        flat = feature.flatten(2)
        mean = flat.mean(2)
        variance = (flat.square().mean(2) - mean.square()).clamp(min=0)  # several times faster than var on a CPU
        parts += [mean, (variance + 1e-6).sqrt()]
    return torch.cat(parts, dim=1)


def _of_predictions(plan: Plan, n_scanners: int) -> nn.Sequential:
    """A discriminator that names the scanner at each place of a map of probabilities, which it sees at a quarter of its
    resolution and with what lies around (Tsai et al. 2018, arXiv:1802.10349)."""
    convolution = nn.Conv2d if plan.data.dimensions == 2 else nn.Conv3d
    return nn.Sequential(
        convolution(len(plan.task.labels), READERS, 3, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        convolution(READERS, READERS, 3, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        convolution(READERS, READERS, 3, padding=1),
        nn.LeakyReLU(0.2),
        convolution(READERS, n_scanners, 1),
    )


def _probabilities(answers: Sequence[Tensor], n_labels: int) -> Tensor:
    """Of each label at each place; what a network says beside its logits is left out."""
    return answers[0][:, :n_labels].softmax(1)


def describe(network: nn.Module, image: Tensor) -> Tensor:
    """What a discriminator sees of each image, ``(batch, d)``; ``network`` has none of its own."""
    taps, _ = find_taps(network, image[:1])
    with Listening(network, taps) as features:
        network(image)
    return pooled(features)


def joined(gradient: Tensor, against: Tensor, has_reference: Tensor, ratio: float) -> Tensor:
    """The task's gradient at a feature plus the reversed one, shortened for each sample to ``ratio`` of the former's norm.

    Where a sample has no reference its norm is the mean over those that have one, or nothing bounds it if none has.
    """
    norm = gradient.flatten(1).float().norm(dim=1)
    if not bool(has_reference.all()):
        limit = norm[has_reference].mean() if bool(has_reference.any()) else torch.full((), torch.inf).to(norm)
        norm = torch.where(has_reference, norm, limit)
    scale = (ratio * norm / against.flatten(1).norm(dim=1).clamp(min=1e-30)).clamp(max=1)
    moved: Tensor = gradient + (against * scale.view(-1, *[1] * (against.ndim - 1))).to(gradient)
    return moved


def strength_at(table: AdaptationTable | None, round_: int, rounds: int) -> float:
    """Weight of the reversed gradient in a round: 0 in the warm-up, then rising to ``strength``.

    2 / (1 + exp(-10 p)) - 1 with p from 0 to 1 over what is left of the run (Ganin et al. 2016, section 5.2.2).
    """
    if table is None or table.adversarial is None:
        return 0.0
    passed = (round_ - 1) / max(rounds - 1, 1)
    p = (passed - table.warm_up) / (1 - table.warm_up)
    return table.strength * (2 / (1 + math.exp(-10 * p)) - 1) if p > 0 else 0.0


WINDOW = 7
"""Rounds whose median validation is compared: a few patients dip for a round or two in any run, adversary or not."""

TOLERANCE = 0.02
"""By how much held-out quality may lie below its best."""


def left_of_adversary(plan: Plan, validations: Sequence[float | None]) -> float:
    """What the automatic stop leaves of the reversed gradient: all, half of it, or nothing.

    Where held-out quality lies more than :data:`TOLERANCE` below its best since the warm-up, the gradient is halved and
    the comparison begins anew; the second time it ends for the rest of the run. It follows from what the journal holds, so
    a resumed run goes on alike. Under ``[privacy]`` nothing exact is known of held-out patients, and nothing stops.

    Parameters
    ----------
    validations
        The task's headline of the weights after rounds 1, 2, ...; None where nobody measured it.
    """
    if not plan.is_adversarial or plan.privacy is not None:
        return 1.0
    n_falls, best = 0, -math.inf
    window: list[float] = []
    for number, value in enumerate(validations, start=1):
        if value is None or strength_at(plan.adaptation, number, plan.rounds) == 0:
            continue
        window.append(value)
        if len(window) < WINDOW:
            continue
        now = statistics.median(window[-WINDOW:])
        if now < best - TOLERANCE:
            n_falls, best, window = n_falls + 1, -math.inf, []
        else:
            best = max(best, now)
    return (1.0, 0.5, 0.0)[min(n_falls, 2)]


class Listening:
    """Collects what tapped modules give, in the order of the taps, for as long as the context lasts."""

    def __init__(self, network: nn.Module, taps: Sequence[Tap]) -> None:
        self._network, self._taps = network, taps
        self._found: list[Tensor] = []

    def __enter__(self) -> list[Tensor]:
        wanted = {(tap.module, tap.call) for tap in self._taps}
        calls: dict[str, int] = {}

        def listen(_: nn.Module, __: object, output: Tensor, *, name: str) -> None:
            if (name, calls.setdefault(name, 0)) in wanted:
                self._found.append(output)
            calls[name] += 1

        self._handles = [
            self._network.get_submodule(name).register_forward_hook(partial(listen, name=name))
            for name in {tap.module for tap in self._taps}
        ]
        return self._found

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def find_taps(network: nn.Module, example: Tensor) -> tuple[list[Tap], int]:
    """Where to read features: on the way to the coarsest resolution, the last activation at each.

    Parameters
    ----------
    network
        Left as it was.
    example
        One image, ``(1, channel, [z,] y, x)``.

    Returns
    -------
    tuple
        The taps, in the order in which they are passed, and how many values describe a sample.

    Raises
    ------
    FederadError
        P110 if the network has no activation with features over space.
    """
    calls: list[tuple[Tap, tuple[int, ...]]] = []
    n_calls: dict[str, int] = {}

    def note(_: nn.Module, __: object, output: object, *, name: str) -> None:
        tap = Tap(name, n_calls.setdefault(name, 0))
        n_calls[name] += 1
        if isinstance(output, Tensor) and output.ndim == example.ndim and len(output) == 1:
            calls.append((tap, tuple(output.shape[1:])))

    handles = [
        module.register_forward_hook(partial(note, name=name))
        for name, module in network.named_modules()
        if type(module).__module__ in ACTIVATIONS
    ]
    was_training = network.training
    try:
        with torch.no_grad():
            network.eval()(example.to(next(network.parameters())))
    finally:
        network.train(was_training)
        for handle in handles:
            handle.remove()
    if not calls:
        raise FederadError(
            "P110",
            happened="The plan's network has no activation whose features a discriminator could read.",
            because="Features that nobody reads cannot learn to hide a scanner.",
            remedies=("remove adversarial from [adaptation]", "or choose another network under [task]"),
        )
    coarsest = min(range(len(calls)), key=lambda i: (math.prod(calls[i][1][1:]), -i))
    downwards = calls[: coarsest + 1]
    last = {shape[1:]: (tap, shape) for tap, shape in downwards}
    return [tap for tap, _ in last.values()], sum(2 * shape[0] for _, shape in last.values())
