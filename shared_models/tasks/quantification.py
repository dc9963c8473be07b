"""Quantification: one number for a study, learned from the number alone: how many of something, or how large a share.

The networks are those of classification, and so is what they see. Evidence is the map of what is counted less that of the
background; how it becomes a number is the matter of the loss:

``proportion``
    The share of the image that is affected is the mean over places of each one's probability, so the network learns to
    outline what makes up the share (Bortsova et al. 2018, arXiv:1807.08601; the same for bags of instances: Ardehaly and
    Culotta 2017, arXiv:1709.04108). The loss is the Kullback-Leibler divergence of the predicted share from the nearest
    one in the label's interval: cross-entropy without the part that no network can lower, and nothing within the interval.
``poisson``
    A count is the sum over places of a density that is never negative (Dubost et al. 2017, arXiv:1705.07999, count lesions
    through a map as well), and the loss the Poisson deviance from the nearest count in the interval.
``squared``
    Plain regression: the number is linear in the mean of the map, the loss the squared distance to the middle of the
    interval.

In 2-D plans each slice is asked for the study's number, and the mean over slices is the answer. Patients are what is
measured: agreement (ICC) is computed from all of a site's patients, and several sites' are averaged. Under ``[privacy]``
only what one patient can move within bounds is measured: the ratio of the two numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from shared_models.clinical import agreement
from shared_models.plan import LOSSES, Plan
from shared_models.task import Picture, Sample, mean_metrics
from shared_models.tasks.classification import Classification
from shared_models.volume import Volume

AFFECTED = 1
"""Index of the label whose number it is."""

USUAL = {"count": 1.0, "proportion": 0.05}
"""What a network without evidence answers: training starts near numbers that occur. It is the unit of plain regression."""

SOFTENING = {"count": 1.0, "proportion": 0.01}
"""Added to both numbers before their ratio is taken: 0 and 1 lesion are not infinitely far apart."""

SMALLEST = 1e-6
"""Predictions closer to an end of their range count as this far from it in a loss, so that it has a bound."""


class Quantification(Classification):
    """One number for a study; see the module for methods and sources."""

    ranges: Mapping[str, tuple[float, float]] = {"ratio": (0.0, 1.0)}

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        of_patients = {"icc": True, "ratio": True, "absolute_error": False}
        self.metrics = of_patients if plan.privacy is None else {"ratio": True}
        self.target = plan.task.target or "proportion"
        self.loss_name = plan.training.loss or LOSSES[self.target][0]

    @property
    def shown(self) -> str:
        """The ratio of the two numbers."""
        return "ratio"

    def draw(self, volume: Volume, rng: np.random.Generator) -> Sample:
        """A whole image, or in 2-D one slice of it, and the interval of the study's number as float32 ``(2,)``."""
        if volume.interval is None:
            raise ValueError("a volume without a number cannot be trained on")
        return Sample(self.window(volume, rng), np.asarray(volume.interval, np.float32))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss that the plan names; the mean over samples.

        Parameters
        ----------
        output
            Maps of background and of what is counted, float32 ``(batch, 2, [z,] y, x)``.
        target
            Ends of each interval, float32 ``(batch, 2)``.
        """
        predicted, target = self.numbers(output), target.to(output)
        if self.loss_name == "squared":
            return (((predicted - target.mean(1)) / USUAL[self.target]) ** 2).mean()
        nearest = torch.minimum(torch.maximum(predicted.detach(), target[:, 0]), target[:, 1])
        distance = poisson_deviance if self.loss_name == "poisson" else proportion_divergence
        return distance(predicted, nearest).mean()

    def numbers(self, maps: Tensor) -> Tensor:
        """The number of each image, ``(batch,)``, of maps ``(batch, 2, [z,] y, x)``."""
        evidence, usual = (maps[:, AFFECTED] - maps[:, 0]).flatten(1), USUAL[self.target]
        if self.loss_name == "squared":
            return usual * (1 + evidence.mean(1))
        if self.loss_name == "poisson":
            share = torch.tensor(usual / evidence.shape[1], dtype=maps.dtype, device=maps.device)
            return F.softplus(evidence + torch.log(torch.expm1(share))).sum(1)
        return torch.sigmoid(evidence + float(np.log(usual / (1 - usual)))).mean(1)

    @property
    def formula(self) -> str:
        """What :meth:`numbers` does, for a reader of an exported model; ``e`` is the second map less the first."""
        usual = USUAL[self.target]
        if self.loss_name == "squared":
            return f"{usual:g} * (1 + mean(e)) over space, e = second - first"
        if self.loss_name == "poisson":
            return f"sum(log(1 + exp(e) * (exp({usual:g} / n) - 1))) over the n places in space, e = second - first"
        return f"mean(1 / (1 + exp(-e) * {(1 - usual) / usual:g})) over space, e = second - first"

    def number(self, prediction: NDArray[np.generic]) -> float:
        """The number of a volume whose maps :meth:`predict` gave: a count, or a share from 0 to 1."""
        maps = torch.from_numpy(np.asarray(prediction, np.float64))
        batch = maps.movedim(1, 0) if self.plan.data.dimensions == 2 else maps[None]
        found = max(float(self.numbers(batch).mean()), 0.0)
        return min(found, 1.0) if self.target == "proportion" else found

    def in_words(self, number: float) -> str:
        """A number as people write it."""
        return f"{number:.1%}" if self.target == "proportion" else f"{number:.1f}"

    def measure(self, prediction: NDArray[np.generic], volume: Volume) -> dict[str, float]:
        """What one study adds to its patient.

        ==================  ===========================================================================
        ``predicted``       the network's number
        ``reference``       the middle of the label's interval
        ``absolute_error``  distance of the two
        ``ratio``           the smaller over the larger, both with :data:`SOFTENING` added: 1 is perfect
        ==================  ===========================================================================
        """
        if volume.interval is None:
            raise ValueError("a volume without a number cannot be measured")
        predicted, reference = self.number(prediction), float(np.mean(volume.interval))
        softened = sorted(value + SOFTENING[self.target] for value in (predicted, reference))
        return {
            "predicted": predicted,
            "reference": reference,
            "absolute_error": abs(predicted - reference),
            "ratio": softened[0] / softened[1],
        }

    def summary(self, patients: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Metrics of a set of patients; empty for none.

        ==================  =================================================================================
        icc                 intraclass correlation ICC(A,1) with the reference; left out where it is undefined
        ratio               mean of the patients' ratios
        absolute_error      mean distance to the reference
        bias                mean of prediction minus reference
        limits              95 % of the differences lie within so much of the bias
        ==================  =================================================================================

        See ``clinical`` for the definitions. Under ``[privacy]`` the ratio alone is given, since one patient could move the
        others without bound.
        """
        if not patients:
            return {}
        means = mean_metrics(patients)
        if self.plan.privacy is not None:
            return {"ratio": means["ratio"]}
        agreed = agreement([row["predicted"] for row in patients], [row["reference"] for row in patients])
        found = {"icc": agreed.icc} if agreed.icc is not None else {}
        both = {name: means[name] for name in ("ratio", "absolute_error")}
        return {**found, **both, "bias": agreed.bias, "limits": agreed.limits}

    def picture(
        self,
        prediction: NDArray[np.generic],
        volume: Volume,
        doubts: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> Picture:
        """The slice with the largest outline, or with the largest evidence where there is none."""
        shown = super().picture(prediction, replace(volume, category=None))
        known = "unknown" if volume.interval is None else self.in_words(float(np.mean(volume.interval)))
        return replace(shown, caption=f"{known}, taken for {self.in_words(self.number(prediction))}")


def proportion_divergence(predicted: Tensor, true: Tensor) -> Tensor:
    """Kullback-Leibler divergence of Bernoulli distributions, ``(batch,)``: how far a predicted share is from the true one,
    both from 0 to 1."""
    p = predicted.clamp(SMALLEST, 1 - SMALLEST)
    return torch.xlogy(true, true) - true * p.log() + torch.xlogy(1 - true, 1 - true) - (1 - true) * torch.log1p(-p)


def poisson_deviance(predicted: Tensor, true: Tensor) -> Tensor:
    """Half the deviance of a Poisson distribution, ``(batch,)``: how far a predicted mean is from the true count."""
    p = predicted.clamp_min(SMALLEST)
    return p - true + torch.xlogy(true, true) - true * p.log()
