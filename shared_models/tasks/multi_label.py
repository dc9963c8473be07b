"""Several labels for a study, each by itself: what was found, of everything that might be.

Networks, windows, pooling and heatmaps are those of :mod:`shared_models.tasks.classification`; each label has a probability
of its own, and the loss is the mean binary cross-entropy over labels. A volume's ``category`` has bit k set where the study
has label k, and is 0 where nothing was found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from shared_models.plan import Plan
from shared_models.task import Sample
from shared_models.tasks.classification import (
    LEAST_PROBABILITY,
    Array,
    Classification,
    area_under_curve,
    average_precision,
    pooled,
    sensitivity,
)
from shared_models.volume import Volume

FOUND = 0.5
"""Probability from which a label counts as found."""

PREDICTED, TRUE = KINDS = ("p: ", "t: ")
"""Before a label's name among the numbers of a patient."""


def classification(plan: Plan) -> Classification:
    """The task of a plan that classifies: one label for a study, or several."""
    return MultiLabel(plan) if plan.task.target == "multi-label" else Classification(plan)


class MultiLabel(Classification):
    """Any number of labels for a study; see the module."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        names = ("auc", "average_precision", "balanced_accuracy", "f1", "sensitivity", "localisation")
        self.metrics = dict.fromkeys(names if plan.privacy is None else self.ranges, True)

    def draw(self, volume: Volume, rng: np.random.Generator) -> Sample:
        """A whole image, or in 2-D one slice of it, and which labels it has, float32 ``(label,)``."""
        return Sample(self.window(volume, rng), self.has(volume).astype(np.float32))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Binary cross-entropy of the pooled maps, times the plan's weight of each label; the mean over labels and samples.

        Parameters
        ----------
        output
            Class maps, float32 ``(batch, label, [z,] y, x)``.
        target
            1 for each label that a sample has, float32 ``(batch, label)``.
        """
        logits = pooled(output, self.sharpness)
        each = F.binary_cross_entropy_with_logits(logits, target.to(logits), reduction="none")
        return (self._weights.to(output) * each).mean()

    def probabilities(self, prediction: NDArray[np.generic]) -> Array:
        """Of each label by itself, ``(label,)``, averaged over slices or views."""
        mean: Array = torch.sigmoid(self._pooled(prediction)).mean(0).numpy()
        return mean

    def evidence(self, maps: Tensor, label: int) -> Tensor:
        """What each place says for a label [logits]: its map, whatever speaks for others."""
        return maps[label]

    def measure(self, prediction: NDArray[np.generic], volume: Volume) -> dict[str, float]:
        """What one study adds to its patient.

        =================  ================================================================================
        ``"p: LABEL"``     probability of the label
        ``"t: LABEL"``     1 where the study has it, else 0
        ``probability``    of what is true, the mean over labels
        ``outlined``       1 where somebody has drawn what the labels are about, else 0
        ``hit``            1 where the largest heat of the likeliest true label lies inside of it, else 0
        =================  ================================================================================
        """
        has, names = self.has(volume), self.plan.task.labels
        probabilities = self.probabilities(prediction)
        is_outlined = volume.label is not None and bool(volume.label.any()) and bool(has.any())
        hit = 0.0
        if is_outlined and volume.label is not None:
            heat = self.heat(prediction, volume, int(np.where(has, probabilities, -1).argmax()))
            hit = float(volume.label[np.unravel_index(int(heat.argmax()), heat.shape)] > 0)
        return {
            **{PREDICTED + name: float(p) for name, p in zip(names, probabilities, strict=True)},
            **{TRUE + name: float(t) for name, t in zip(names, has, strict=True)},
            "probability": float(np.where(has, probabilities, 1 - probabilities).mean()),
            "outlined": float(is_outlined),
            "hit": hit,
        }

    def summary(self, patients: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Metrics of a set of patients; empty for none. A patient has a label if one of the studies has it.

        =====================  ==============================================================================
        auc                    area under the receiver operating curve
        average_precision      of the precision over recall
        sensitivity            share of a label's patients found where 90 % of the others are told apart
        balanced_accuracy      mean of the shares recognised, of those with a label and of those without
        f1                     harmonic mean of precision and recall
        ``"auc: LABEL"``       of one label
        localisation           share of patients with an outline whose largest heat lies inside of it
        accuracy               share of labels that are rightly there or not there
        log_likelihood         mean logarithm of what is true having been said, which counts as 0.01 or more
        =====================  ==============================================================================

        The first five are means over the labels that some patients have and others have not, and are left out where there
        is none; what counts as found has a probability of at least one half.
        """
        if not patients:
            return {}
        names = self.plan.task.labels
        p, share = (np.array([[row[kind + name] for name in names] for row in patients]) for kind in KINDS)
        has, found_it = share > 0, p >= FOUND
        of_truth = np.maximum(np.where(has, p, 1 - p), LEAST_PROBABILITY)
        found = {
            "accuracy": float((has == found_it).mean()),
            "log_likelihood": float(np.log(of_truth).mean()),
        }
        weight = np.ones(len(patients))
        each: dict[str, list[float]] = {}
        for k, name in enumerate(names):
            if 0 < has[:, k].sum() < len(patients):
                of_label = {
                    "auc": area_under_curve(p[:, k], has[:, k], weight),
                    "average_precision": average_precision(p[:, k], has[:, k], weight),
                    "sensitivity": sensitivity(p[:, k], has[:, k], weight),
                    **_decided(has[:, k], found_it[:, k]),
                }
                found[f"auc: {name}"] = of_label["auc"]
                for metric, value in of_label.items():
                    each.setdefault(metric, []).append(value)
        found |= {metric: float(np.mean(values)) for metric, values in each.items()}
        n_outlined = sum(row["outlined"] for row in patients)
        if n_outlined:
            found["localisation"] = sum(row["hit"] for row in patients) / n_outlined
        return found

    def shown_label(self, probabilities: Array) -> int:
        """The most probable one."""
        return int(probabilities.argmax())

    def caption(self, probabilities: Array, volume: Volume) -> str:
        """Which labels a study has, and which were found."""
        names = self.plan.task.labels
        if volume.category is None:
            return "unknown"
        there = [name for name, is_there in zip(names, self.has(volume), strict=True) if is_there]
        found = [f"{name} {p:.2f}" for name, p in zip(names, probabilities, strict=True) if p >= FOUND]
        return f"{', '.join(there) or 'nothing'}; found {', '.join(found) or 'nothing'}"

    def has(self, volume: Volume) -> NDArray[np.bool_]:
        """Which of the labels a study has, ``(label,)``."""
        if volume.category is None:
            raise ValueError("a volume without labels cannot be trained on or measured")
        return np.array([bool(volume.category >> k & 1) for k in range(len(self.plan.task.labels))])


def _decided(has: NDArray[np.bool_], found: NDArray[np.bool_]) -> dict[str, float]:
    """Balanced accuracy and F1 of one label, ``(patient,)`` both, some with it and some without."""
    right = float((has & found).sum())
    return {
        "balanced_accuracy": (right / has.sum() + float((~has & ~found).sum()) / (~has).sum()) / 2,
        "f1": 2 * right / float(has.sum() + found.sum()),
    }
