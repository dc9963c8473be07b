"""How sure a model may be: ensembles, dropout at test time, noise in the data, and whether its probabilities are true.

Probabilities are float64 ``(label, ...)`` for one image, or ``(member, label, ...)`` for what several models or passes say
of it. Entropies are in nats. Spread between members is what more data would settle (epistemic); what they agree not to know
is in the image (aleatoric): Kendall and Gal 2017, arXiv:1703.04977.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import nn
from torch.nn import functional as F

N_BINS = 15
"""Bins of confidence between 0 and 1 in which calibration is looked at; the number that most papers use."""

Array = NDArray[np.float64]


def entropy(probabilities: Array, axis: int = 0) -> Array:
    """Predictive entropy along the label axis; 0 for certainty, log(labels) for none [nats]."""
    logarithm = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
    summed: Array = -(probabilities * logarithm).sum(axis=axis)
    return summed


def mutual_information(members: Array) -> Array:
    """Entropy of the members' mean minus the mean of their entropies: what they disagree about [nats]."""
    between: Array = entropy(members.mean(axis=0)) - entropy(members, axis=1).mean(axis=0)
    return between


class Members:
    """What several models, or passes of one, say of one image, added up: their mean, and what they disagree about.

    Each is a distribution over labels, ``(label, ...)``, float32.
    """

    def __init__(self) -> None:
        self._n = 0
        self._sum: Array = np.zeros(())
        self._entropies: Array = np.zeros(())

    def add(self, probabilities: NDArray[np.float32]) -> None:
        """One of them."""
        one = probabilities.astype(np.float64)
        self._n += 1
        self._sum = self._sum + one
        self._entropies = self._entropies + entropy(one)

    @property
    def mean(self) -> NDArray[np.float32]:
        """The mean distribution, ``(label, ...)``."""
        return np.asarray(self._sum / self._n, np.float32)

    @property
    def uncertainty(self) -> NDArray[np.float32]:
        """Entropy of the mean over the largest possible, ``(...)``: 0 (certain) to 1."""
        return np.asarray(entropy(self._sum / self._n) / np.log(len(self._sum)), np.float32).clip(0, 1)

    @property
    def disagreement(self) -> NDArray[np.float32]:
        """Mutual information over the largest possible entropy, ``(...)``, 0 to 1 (Kendall and Gal 2017,
        arXiv:1703.04977): what they disagree about, and more data would settle."""
        nats = entropy(self._sum / self._n) - self._entropies / self._n
        return np.asarray(nats / np.log(len(self._sum)), np.float32).clip(0, 1)


def disagreement(members: NDArray[np.integer], labels: int) -> float:
    """One minus the mean Dice, over pairs of members and labels above background, of predicted masks ``(member, ...)``.

    It predicts a segmentation's own Dice without a reference (Roy et al. 2019, arXiv:1811.09800).
    """
    found = []
    for i, one in enumerate(members):
        for other in members[i + 1 :]:
            for k in range(1, labels):
                sizes = int((one == k).sum()) + int((other == k).sum())
                found.append(2.0 * int(((one == k) & (other == k)).sum()) / sizes if sizes else 1.0)
    return 1.0 - float(np.mean(found)) if found else 0.0


@dataclass
class Reliability:
    """A reliability diagram: how often predictions of each confidence are right (Guo et al. 2017, arXiv:1706.04599).

    Predictions can be added in any portions; nothing of them is kept but sums.
    """

    n: Array
    """Predictions in each bin, ``(bin,)``."""

    confidence: Array
    """Sum of their confidences."""

    right: Array
    """How many of them are right."""

    @classmethod
    def empty(cls, n_bins: int = N_BINS) -> Reliability:
        """Nothing predicted yet."""
        return cls(*(np.zeros(n_bins) for _ in range(3)))

    def add(self, confidence: Array, is_right: NDArray[np.bool_]) -> None:
        """Count predictions: the probability of the predicted label, and whether it is the true one; the same shape."""
        n_bins = len(self.n)
        place = np.minimum((np.ravel(confidence) * n_bins).astype(int), n_bins - 1)
        self.n += np.bincount(place, minlength=n_bins)
        self.confidence += np.bincount(place, np.ravel(confidence), n_bins)
        self.right += np.bincount(place, np.ravel(is_right).astype(float), n_bins)

    @property
    def expected_error(self) -> float:
        """Expected calibration error: mean over predictions of how far their bin's accuracy is from its confidence."""
        return float(np.abs(self.right - self.confidence).sum() / max(self.n.sum(), 1.0))

    def points(self) -> list[tuple[float, float]]:
        """Mean confidence and accuracy of each bin that has any."""
        used = self.n > 0
        pairs = zip(self.confidence[used] / self.n[used], self.right[used] / self.n[used], strict=True)
        return [(float(c), float(a)) for c, a in pairs]


def expected_calibration_error(confidence: Array, is_right: NDArray[np.bool_], n_bins: int = N_BINS) -> float:
    """Of predictions that are all there at once; see :class:`Reliability`."""
    reliability = Reliability.empty(n_bins)
    reliability.add(confidence, is_right)
    return reliability.expected_error


def temperature(logits: Array, truth: NDArray[np.integer]) -> float:
    """What logits are best divided by (Guo et al. 2017, section 4.2): above 1 where a model is too sure.

    Parameters
    ----------
    logits
        ``(label, sample)``.
    truth
        Label indices, ``(sample,)``.
    """
    scores, true = torch.from_numpy(np.array(logits.T)), torch.from_numpy(np.array(truth, np.int64))

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(scores / np.exp(log_temperature), true))

    return float(np.exp(minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded").x))


def passes(network: nn.Module, n: int, device: torch.device) -> Iterator[int]:
    """The number of each of ``n`` passes, with dropout switched on while they last; all calls draw the same."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), dropping(network):
        torch.manual_seed(0)
        yield from range(n)


@contextmanager
def dropping(network: nn.Module) -> Iterator[nn.Module]:
    """The network with dropout switched on and everything else as for prediction (MC dropout; Gal and Ghahramani 2016,
    arXiv:1506.02142); afterwards it is as before."""
    dropouts = [m for m in network.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    modes = [(m, m.training) for m in network.modules()]
    network.eval()
    for dropout in dropouts:
        dropout.train()
    try:
        yield network
    finally:
        for module, mode in modes:
            module.training = mode
