"""Classification: one label for a study.

Cross-entropy on whole images, brought to the training patch's size by a window around their centre. Networks give a map for
each label (Baumgartner et al. 2017, arXiv:1612.05601), which is pooled over space to that label's logit by the logarithm
of the mean of exponentials, between mean and maximum (Pinheiro and Collobert 2015, arXiv:1411.6228): a small finding
counts, and the map is the heatmap. In 2-D plans the network sees slices.

A patient's probabilities are the mean over slices and studies, and patients are what is measured. Areas under curves are
no means over patients: they are computed from all of a site's patients, and several sites' are averaged. Under
``[privacy]`` only what one patient can move within bounds is measured: accuracy and clipped log-likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from shared_models import networks
from shared_models.plan import Plan
from shared_models.task import Picture, Sample, Task
from shared_models.tasks import confused
from shared_models.volume import Volume, crop, in_greys

SLICES_AT_ONCE = 16
"""Slices of one volume in one forward pass: speed and memory only."""

LARGEST_SHIFT = 1 / 16
"""How far a training window may lie off the centre of the image, as a share of its side."""

SHARPNESS = 1.0
"""Of the pooling over space, where the plan says nothing: 0 would be the mean, infinity the maximum."""

LEAST_PROBABILITY = 0.01
"""Smaller probabilities of the true label count as this in the log-likelihood, so that it has a bound."""

Array = NDArray[np.float64]


class Classification(Task):
    """One label for a study; see the module for methods and sources."""

    ranges: Mapping[str, tuple[float, float]] = {
        "accuracy": (0.0, 1.0),
        "log_likelihood": (math.log(LEAST_PROBABILITY), 0.0),
    }

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        names = ("auc", "average_precision", "balanced_accuracy", "f1", "localisation")
        self.metrics = dict.fromkeys(names if plan.privacy is None else self.ranges, True)
        self._weights = torch.tensor(plan.training.class_weights or [1.0] * len(plan.task.labels))

    @property
    def sharpness(self) -> float:
        """Of the pooling over space."""
        return self.plan.task.sharpness or SHARPNESS

    @property
    def shown(self) -> str:
        """The probability of a patient's true label."""
        return "probability"

    def build_network(self) -> nn.Module:
        """The network that the plan names."""
        return networks.build(self.plan)

    def draw(self, volume: Volume, rng: np.random.Generator) -> Sample:
        """A whole image, or in 2-D one slice of it, and its label as int64 ``()``.

        The window of the patch's size lies around the image's centre, up to a sixteenth of its side off, and is 0 (the
        mean intensity) where it reaches outside.
        """
        if volume.category is None:
            raise ValueError("a volume without a label cannot be trained on")
        size = self._size(volume)
        corner = [
            c + round(float(rng.uniform(-LARGEST_SHIFT, LARGEST_SHIFT)) * n)
            for c, n in zip(_centred(volume, size), size, strict=True)
        ]
        if self.plan.data.dimensions == 2:
            corner[0], size = int(rng.integers(size[0])), (1, *size[1:])
        image = crop(volume.image, tuple(corner), size)
        if self.plan.data.dimensions == 2:
            image = image[:, 0]
        if self.plan.training.flips and rng.random() < 0.5:
            image = image[..., ::-1]
        return Sample(np.ascontiguousarray(image, np.float32), np.asarray(volume.category, np.int64))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy of the pooled maps, times the plan's weight of the true label; the mean over samples.

        Parameters
        ----------
        output
            Class maps, float32 ``(batch, label, [z,] y, x)``.
        target
            Label indices, int64 ``(batch,)``.
        """
        weights = self._weights.to(output)
        each = F.cross_entropy(pooled(output, self.sharpness), target, weight=weights, reduction="none")
        return each.mean()

    def predict(self, network: Callable[[Tensor], Tensor], volume: Volume, device: torch.device) -> NDArray[np.float32]:
        """Class maps of the window around the centre, ``(label, z, y, x)``; in 2-D one plane for each slice."""
        size = self._size(volume)
        image = torch.from_numpy(np.array(crop(volume.image, _centred(volume, size), size), np.float32)).to(device)
        if self.plan.data.dimensions == 3:
            maps = network(image[None])[0]
        else:
            parts = torch.split(image.movedim(1, 0), SLICES_AT_ONCE)
            maps = torch.cat([network(part) for part in parts]).movedim(0, 1)
        return np.asarray(maps.float().cpu().numpy(), np.float32)

    def probabilities(self, prediction: NDArray[np.generic]) -> Array:
        """Of each label, ``(label,)``: the softmax of the pooled maps, in 2-D averaged over slices."""
        maps = torch.from_numpy(np.asarray(prediction, np.float64))
        batch = maps.movedim(1, 0) if self.plan.data.dimensions == 2 else maps[None]
        mean: Array = torch.softmax(pooled(batch, self.sharpness), dim=1).mean(0).numpy()
        return mean

    def heat(self, prediction: NDArray[np.generic], volume: Volume, label: int) -> NDArray[np.float32]:
        """What each voxel says for ``label`` against the mean of the others [logits], ``(z, y, x)``.

        Maps are interpolated linearly to the image's grid; what lies outside the window says what its edge does.
        """
        maps = torch.from_numpy(np.asarray(prediction, np.float32))
        others = (maps.sum(0) - maps[label]) / (len(maps) - 1)
        size = self._size(volume)
        fine = F.interpolate((maps[label] - others)[None, None], size=size, mode="trilinear")[0, 0].numpy()
        index = [
            np.clip(np.arange(side) - c, 0, n - 1)
            for side, c, n in zip(volume.image.shape[1:], _centred(volume, size), size, strict=True)
        ]
        return np.asarray(fine[np.ix_(*index)], np.float32)

    def measure(self, prediction: NDArray[np.generic], volume: Volume) -> dict[str, float]:
        """What one study adds to its patient.

        =================  ================================================================================
        ``"k>j"``          probability of label j if the study has label k, else 0
        ``probability``    probability of the label that it has
        ``outlined``       1 where somebody has drawn what the label is about, else 0
        ``hit``            1 where the largest heat for the study's label lies inside of it, else 0
        =================  ================================================================================
        """
        if volume.category is None:
            raise ValueError("a volume without a label cannot be measured")
        probabilities = self.probabilities(prediction)
        labels = range(len(self.plan.task.labels))
        cells = {f"{k}>{j}": float(probabilities[j]) if k == volume.category else 0.0 for k in labels for j in labels}
        is_outlined = volume.label is not None and bool(volume.label.any())
        hit = 0.0
        if is_outlined and volume.label is not None:
            heat = self.heat(prediction, volume, volume.category)
            hit = float(volume.label[np.unravel_index(int(heat.argmax()), heat.shape)] > 0)
        return {
            **cells,
            "probability": float(probabilities[volume.category]),
            "outlined": float(is_outlined),
            "hit": hit,
        }

    def summary(self, patients: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Metrics of a set of patients; empty for none.

        Each patient counts once. One whose studies have several labels counts for each label by its share of them, with
        the mean probabilities of those studies.

        =====================  ==============================================================================
        auc                    area under the receiver operating curve (:func:`area_under_curve`)
        average_precision      of the precision over recall (:func:`average_precision`)
        balanced_accuracy      mean over labels that occur, of the share that is recognised
        f1                     harmonic mean of precision and recall
        localisation           share of patients with an outline whose largest heat lies inside of it
        accuracy               share of patients who get their label
        log_likelihood         mean logarithm of the true label's probability, which counts as 0.01 or more
        ``"A as B"``           share of patients who have label A and got label B: the confusion matrix
        =====================  ==============================================================================

        The first two and F1 are of the second label where there are two, else the mean over labels, each against the rest.
        Where no label has patients on both sides the first two are left out, as is ``localisation`` without an outline.
        """
        if not patients:
            return {}
        names = self.plan.task.labels
        n = len(names)
        joint = np.array([[row[f"{k}>{j}"] for k in range(n) for j in range(n)] for row in patients]).reshape(-1, n, n)
        shares = joint.sum(axis=2)
        who, truth = np.nonzero(shares > 0)
        weight = shares[who, truth]
        probabilities = joint[who, truth] / weight[:, None]
        confusion = np.zeros((n, n))
        np.add.at(confusion, (truth, probabilities.argmax(axis=1)), weight / len(patients))
        true_probability = np.maximum(probabilities[np.arange(len(truth)), truth], LEAST_PROBABILITY)
        found = {
            **_curves(probabilities, truth, weight),
            **_decisions(confusion),
            "accuracy": float(np.trace(confusion)),
            "log_likelihood": float(weight @ np.log(true_probability)) / len(patients),
            **{confused(a, b): float(confusion[k, j]) for k, a in enumerate(names) for j, b in enumerate(names)},
        }
        n_outlined = sum(row["outlined"] for row in patients)
        if n_outlined:
            found["localisation"] = sum(row["hit"] for row in patients) / n_outlined
        return found

    def picture(self, prediction: NDArray[np.generic], volume: Volume) -> Picture:
        """The slice with the largest outline, or with the largest heat where there is none.

        The heat is that of the predicted label, or of the second where there are two: where nothing speaks for a
        lesion, no place says so.
        """
        names, label = self.plan.task.labels, volume.label
        predicted = int(self.probabilities(prediction).argmax())
        heat = self.heat(prediction, volume, 1 if len(names) == 2 else predicted)
        areas = np.zeros(len(heat)) if label is None else (label > 0).sum(axis=(1, 2))
        z = int(areas.argmax()) if areas.any() else int(heat.max(axis=(1, 2)).argmax())
        truth = np.zeros(heat.shape[1:], np.uint8) if label is None else label[z]
        known = names[volume.category] if volume.category is not None else "unknown"
        return Picture(
            image=in_greys(volume.image[:, z]),
            truth=np.asarray(truth, np.uint8),
            prediction=np.zeros(heat.shape[1:], np.uint8),
            pixel_mm=volume.spacing_mm[1:],
            heat=np.asarray(np.clip(heat[z] / max(float(heat.max()), 1e-6), 0, 1), np.float32),
            caption=f"{known}, taken for {names[predicted]}",
        )

    def _size(self, volume: Volume) -> tuple[int, int, int]:
        """The window's sides (z, y, x): all slices in 2-D."""
        patch = self.plan.data.patch
        return (volume.image.shape[1], *patch) if len(patch) == 2 else (patch[0], patch[1], patch[2])


def pooled(maps: Tensor, sharpness: float) -> Tensor:
    """Logits ``(batch, label)`` of class maps ``(batch, label, [z,] y, x)``: log(mean(exp(sharp * map))) / sharp."""
    flat = maps.flatten(2)
    return (torch.logsumexp(sharpness * flat, dim=2) - math.log(flat.shape[2])) / sharpness


def area_under_curve(scores: Array, is_positive: NDArray[np.bool_], weight: Array) -> float:
    """Probability that a positive scores higher than a negative, ties counting half (Hanley and McNeil 1982,
    doi:10.1148/radiology.143.1.7063747); all ``(patient,)``, both kinds present."""
    positive, negative = _by_score(scores, is_positive, weight)
    below = np.cumsum(negative) - negative / 2
    return float(positive @ below / (positive.sum() * negative.sum()))


def average_precision(scores: Array, is_positive: NDArray[np.bool_], weight: Array) -> float:
    """Mean precision over the positives, each with all that score at least as high; all ``(patient,)``."""
    positive, negative = (part[::-1] for part in _by_score(scores, is_positive, weight))
    found = np.cumsum(positive)
    return float(positive @ (found / (found + np.cumsum(negative))) / positive.sum())


def _by_score(scores: Array, is_positive: NDArray[np.bool_], weight: Array) -> tuple[Array, Array]:
    """Weight of positives and of negatives at each score that occurs, lowest first."""
    values, place = np.unique(scores, return_inverse=True)
    positive, negative = np.zeros(len(values)), np.zeros(len(values))
    np.add.at(positive, place, weight * is_positive)
    np.add.at(negative, place, weight * ~is_positive)
    return positive, negative


def _curves(probabilities: Array, truth: NDArray[np.intp], weight: Array) -> dict[str, float]:
    """Areas under curves, of each label that some have and others have not; empty where there is none such."""
    n = probabilities.shape[1]
    labels = [k for k in ([1] if n == 2 else range(n)) if 0 < (truth == k).sum() < len(truth)]
    metrics = {"auc": area_under_curve, "average_precision": average_precision}
    return {
        name: float(np.mean([metric(probabilities[:, k], truth == k, weight) for k in labels]))
        for name, metric in metrics.items()
        if labels
    }


def _decisions(confusion: Array) -> dict[str, float]:
    """Balanced accuracy and F1 from a confusion matrix, ``(truth, prediction)``."""
    right, have, got = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    f1 = 2 * right / np.where(have + got > 0, have + got, 1.0)
    counted = [1] if len(right) == 2 else np.flatnonzero(have + got > 0)
    return {
        "balanced_accuracy": float(np.mean(right[have > 0] / have[have > 0])),
        "f1": float(np.mean(f1[counted])),
    }


def _centred(volume: Volume, size: tuple[int, ...]) -> tuple[int, ...]:
    """Corner (z, y, x) of the window of this size around the centre of the image; below 0 where it reaches outside."""
    return tuple((side - n) // 2 for side, n in zip(volume.image.shape[1:], size, strict=True))
