"""A discriminator of scanners, trained on what sites have released of their features, and on nothing else.

After a round in which sites release moments (``shared_models.moments``), these are added up to a table with a row for each
scanner, over all sites. Rows become Gaussians, of which balanced samples are drawn, every scanner's as synthetic as the
others'; a small network learns to name the scanner (Adam, cross entropy with smoothed labels, weight decay) and goes frozen
with the next questions. It begins afresh each time: features have moved since, and one that is sure of itself teaches
nothing. All of it is post-processing of released numbers, and follows from the run's seed.

Where scanners lie no further apart than the noise of their means lets them seem, there is nothing to hide, or nothing that
could be seen: no discriminator is sent then, and the round's record says so.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch.nn import functional as F

from shared_models.messages import parted, prefixed
from shared_models.moments import DIMENSIONS, FEWEST, TABLE, Discriminator, Layout, Vector, clip_rows
from shared_models.plan import Plan
from shared_models.scanners import ScannerTable
from shared_models.seeds import derive
from shared_models.threads import one_thread
from shared_models.weights import Weights

log = logging.getLogger(__name__)

SPREAD = 0.03
"""Standard deviation of features among patients where no squares are released [clips]."""

LEAST_SPREAD = 0.01
"""Least standard deviation of a Gaussian [clips]."""

BORROWED = 20
"""Patients' worth of the spread of all scanners in the spread of each."""

SURE = 3.0
"""Standard deviations of noise that a noised number of patients has to exceed before its scanner is used."""

STEPS, SAMPLES = 200, 32
"""Steps of training, and samples of each scanner in one."""

LEARNING_RATE, WEIGHT_DECAY, SMOOTHING = 0.01, 1e-3, 0.1

PREFIX = "moments:"
"""Before the names of what the journal keeps."""


@dataclass(frozen=True)
class Noted:
    """What became of a release of moments, for the round's record."""

    scanners: list[str]
    """Those with enough patients to be told apart."""

    gap: float | None = None
    """Root mean square distance between the means of two scanners [clips]; None with fewer than two."""

    noise: float | None = None
    """The same of noise and chance alone."""

    accuracy: float | None = None
    """Of the discriminator on fresh samples; None where none was trained."""

    left_out: str = ""
    """Why there is no discriminator; empty if there is one."""


@dataclass(frozen=True)
class Gaussians:
    """What is known of the scanners in use."""

    means: Vector
    """``(scanner, DIMENSIONS)``."""

    variances: Vector
    of_means: Vector
    """Variance of the means themselves by noise and chance, ``(scanner, DIMENSIONS)``."""


class MomentsRule:
    """The server's side of ``adversarial = "moments"`` in one run.

    Parameters
    ----------
    plan
        One that asks for moments.
    seed
        Of the run.
    """

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan, self._seed = plan, seed
        self._layout = Layout.of(plan)
        self._names = ScannerTable(plan.adaptation.scanners if plan.adaptation else None).names
        self._noise = (plan.adaptation.moments_noise if plan.adaptation else None) or 0.0
        self.discriminator: Weights = {}
        """What goes with the questions; empty for none."""

        self.table: Vector | None = None
        """The newest release, summed over sites; None before the first."""

    @property
    def state(self) -> Weights:
        """What a run that goes on has to know, for the journal."""
        table = {TABLE: self.table.astype(np.float32)} if self.table is not None else {}
        return prefixed(PREFIX, table | prefixed("discriminator.", self.discriminator))

    def restore(self, state: Weights) -> Weights:
        """Go on from a journal; what of its state is somebody else's."""
        others, own = parted(state, PREFIX)
        rest, self.discriminator = parted(own, "discriminator.")
        self.table = rest[TABLE].astype(np.float64) if TABLE in rest else None
        return others

    def learn(self, releases: Mapping[str, Weights], round_: int) -> Noted:
        """Take note of what the sites released in a round, by their names, and train on it."""
        tables = [releases[site][TABLE].astype(np.float64) for site in sorted(releases)]
        self.table = np.sum(tables, axis=0) if tables else np.zeros(self._layout.shape)
        n_noised = np.sum([table.any(axis=1) for table in tables], axis=0) if tables else np.zeros(len(self.table))
        deviation = self._noise * self._layout.largest * np.sqrt(n_noised)  # of each value of a row
        places = self._in_use(self.table, deviation)
        self.discriminator = {}
        scanners = [self._names[place] for place in places]
        if len(scanners) < 2:
            return self._without(Noted(scanners, left_out="fewer than two scanners have enough patients"))
        known = self._gaussians(self.table[places], deviation[places, None])
        gap, noise = gaps(known)
        said = Noted(scanners, gap / self._layout.clip, noise / self._layout.clip)
        if gap**2 - noise**2 <= noise**2:
            return self._without(
                Noted(scanners, said.gap, said.noise, None, "scanners lie no further apart than noise")
            )
        with one_thread():
            trained, accuracy = trained_on(known, self._layout.clip, derive(self._seed, "moments", round_))
        self.discriminator = trained.as_arrays()
        return Noted(scanners, said.gap, said.noise, accuracy)

    def _without(self, noted: Noted) -> Noted:
        log.warning("no discriminator of scanners is used: %s (%s)", noted.left_out, asdict(noted))
        return noted

    def _in_use(self, table: Vector, deviation: Vector) -> list[int]:
        """Places of the scanners with enough patients, sure to be no noise."""
        n, of_n = np.round(table[:, 0] / self._layout.clip, 3), deviation / self._layout.clip
        return [int(place) for place in np.flatnonzero(n >= np.maximum(FEWEST, SURE * of_n))]

    def _gaussians(self, rows: Vector, deviation: Vector) -> Gaussians:
        """Means and variances of the scanners in use, from their rows and the noise of these, ``(scanner, 1)``."""
        clip, n = self._layout.clip, rows[:, :1] / self._layout.clip
        means = rows[:, 1 : 1 + DIMENSIONS] / n
        if self._layout.has_squares:
            each = np.maximum(rows[:, 1 + DIMENSIONS :] * clip / n - means**2, 0)
            pooled = (n * each).sum(axis=0) / n.sum()
            variances = (n * each + BORROWED * pooled) / (n + BORROWED)
        else:
            variances = np.full_like(means, (SPREAD * clip) ** 2)
        variances = np.maximum(variances, (LEAST_SPREAD * clip) ** 2)
        return Gaussians(means, variances, variances / n + (deviation / n) ** 2)


def gaps(known: Gaussians) -> tuple[float, float]:
    """Root mean square distance between the means of two scanners, and what noise and chance alone would make of it."""
    pairs = [(i, j) for i in range(len(known.means)) for j in range(i)]
    squares = [float(((known.means[i] - known.means[j]) ** 2).sum()) for i, j in pairs]
    by_noise = [float((known.of_means[i] + known.of_means[j]).sum()) for i, j in pairs]
    return float(np.sqrt(np.mean(squares))), float(np.sqrt(np.mean(by_noise)))


def trained_on(known: Gaussians, clip: float, seed: int) -> tuple[Discriminator, float]:
    """A discriminator trained on balanced samples, in double precision, and its accuracy on fresh ones."""
    generator = torch.Generator().manual_seed(seed)
    means, deviations = (torch.from_numpy(np.ascontiguousarray(a)) for a in (known.means, np.sqrt(known.variances)))
    means = clip_rows(means, clip)
    truth = torch.arange(len(means)).repeat_interleave(SAMPLES)

    def samples() -> torch.Tensor:
        drawn = torch.randn(len(truth), DIMENSIONS, generator=generator, dtype=torch.float64)
        return clip_rows(means[truth] + deviations[truth] * drawn, clip)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Discriminator(len(means)).double()
    network.centre.copy_(means.mean(0))
    network.spread.copy_((deviations.square().mean(0) + means.var(0, unbiased=False)).sqrt())
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(samples()), truth, label_smoothing=SMOOTHING)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        found = [float((network(samples()).argmax(1) == truth).double().mean()) for _ in range(8)]
    return network.float(), float(np.mean(found))
