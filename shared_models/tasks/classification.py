"""Classification: one label for a study.

Cross-entropy on whole images, brought to the training patch's size by a window around their centre. Networks give a map for
each label (Baumgartner et al. 2017, arXiv:1612.05601), which is pooled over space to that label's logit by the logarithm
of the mean of exponentials, between mean and maximum (Pinheiro and Collobert 2015, arXiv:1411.6228): a small finding
counts, and the map is the heatmap. In 2-D plans the network sees slices. With ``views`` (2.5-D; Roth et al. 2014,
arXiv:1406.2639, whose views are turned at random, too) it sees planes of a volume along each axis.

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

from shared_models import detection, networks
from shared_models.plan import Plan
from shared_models.task import Picture, Sample, Task
from shared_models.tasks import confused
from shared_models.volume import Volume, crop, in_greys

SLICES_AT_ONCE = 16
"""Slices of one volume in one forward pass: speed and memory only."""

MOST_VIEWS = 16
"""Planes along each axis in a prediction, evenly spaced."""

LARGEST_SHIFT = 1 / 16
"""How far a training window may lie off the centre of the image, as a share of its side."""

SHARPNESS = 1.0
"""Of the pooling over space, where the plan says nothing: 0 would be the mean, infinity the maximum."""

LEAST_PROBABILITY = 0.01
"""Smaller probabilities of the true label count as this in the log-likelihood, so that it has a bound."""

SPECIFICITY = 0.9
"""At which sensitivity is given."""

Array = NDArray[np.float64]


class Classification(Task):
    """One label for a study; see the module for methods and sources."""

    ranges: Mapping[str, tuple[float, float]] = {
        "accuracy": (0.0, 1.0),
        "log_likelihood": (math.log(LEAST_PROBABILITY), 0.0),
    }

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        names = ["auc", "average_precision", "balanced_accuracy", "f1", "sensitivity", "localisation"]
        names += ["froc"] if self.has_one_finding else []
        self.metrics = dict.fromkeys(names if plan.privacy is None else self.ranges, True)
        if self.is_ordinal and plan.privacy is None:
            self.metrics |= {"quadratic_kappa": True, "rank_error": False}
        self._weights = torch.tensor(plan.training.class_weights or [1.0] * len(plan.task.labels))

    @property
    def sharpness(self) -> float:
        """Of the pooling over space."""
        return self.plan.task.sharpness or SHARPNESS

    @property
    def has_views(self) -> bool:
        """Whether a 2-D network sees planes of volumes."""
        return self.plan.task.views is not None

    @property
    def has_one_finding(self) -> bool:
        """Whether the second of two labels is what may be found somewhere."""
        return len(self.plan.task.labels) == 2 and self.plan.task.target in {None, "nominal"}

    @property
    def is_ordinal(self) -> bool:
        """Whether the labels are in order, from the first to the last."""
        return self.plan.task.target == "ordinal"

    @property
    def shown(self) -> str:
        """The probability of a patient's true label."""
        return "probability"

    def build_network(self) -> nn.Module:
        """The network that the plan names."""
        return networks.build(as_seen(self.plan))

    def draw(self, volume: Volume, rng: np.random.Generator) -> Sample:
        """A whole image, or in 2-D one slice of it, or one of its views, and its label as int64 ``()``."""
        if volume.category is None:
            raise ValueError("a volume without a label cannot be trained on")
        return Sample(self.window(volume, rng), np.asarray(volume.category, np.int64))

    def window(self, volume: Volume, rng: np.random.Generator) -> NDArray[np.float32]:
        """What the network sees of a volume in training, ``(channel, [z,] y, x)``.

        The window of the patch's size lies around the image's centre, up to a sixteenth of its side off, and is 0 (the
        mean intensity) where it reaches outside.
        """
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
        elif self.has_views:
            image = np.take(image, int(rng.integers(size[0])), axis=1 + int(rng.integers(3)))
        if self.plan.training.flips and rng.random() < 0.5:
            image = image[..., ::-1]
        return np.ascontiguousarray(image, np.float32)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy of the pooled maps, times the plan's weight of the true label; the mean over samples.

        Where labels are in order (``target = "ordinal"``), how far the predicted distribution is from the true label along
        that order takes its place (:func:`earth_mover`).

        Parameters
        ----------
        output
            Class maps, float32 ``(batch, label, [z,] y, x)``.
        target
            Label indices, int64 ``(batch,)``.
        """
        weights = self._weights.to(output)
        logits = pooled(output, self.sharpness)
        if self.is_ordinal:
            return (weights[target] * earth_mover(logits, target)).mean()
        return F.cross_entropy(logits, target, weight=weights, reduction="none").mean()

    def predict(self, network: Callable[[Tensor], Tensor], volume: Volume, device: torch.device) -> NDArray[np.float32]:
        """Class maps of the window around the centre, ``(label, z, y, x)``; in 2-D one plane for each slice, and with views
        ``(label, plane, row, column)``, as many planes along z as along y and along x."""
        size = self._size(volume)
        image = torch.from_numpy(np.array(crop(volume.image, _centred(volume, size), size), np.float32)).to(device)
        if self.plan.data.dimensions == 3 and not self.has_views:
            maps = network(image[None])[0]
        else:
            planes = image.movedim(1, 0)
            if self.has_views:
                places = np.linspace(0, size[0] - 1, min(size[0], MOST_VIEWS)).round().astype(np.int64)
                planes = torch.cat([image.movedim(1 + axis, 0)[places] for axis in range(3)])
            parts = torch.split(planes, SLICES_AT_ONCE)
            maps = torch.cat([network(part) for part in parts]).movedim(0, 1)
        return np.asarray(maps.float().cpu().numpy(), np.float32)

    def probabilities(self, prediction: NDArray[np.generic]) -> Array:
        """Of each label, ``(label,)``: the softmax of the pooled maps, averaged over slices or views."""
        mean: Array = torch.softmax(self._pooled(prediction), dim=1).mean(0).numpy()
        return mean

    def _pooled(self, prediction: NDArray[np.generic]) -> Tensor:
        """Logits of each slice, view or volume, ``(batch, label)``."""
        maps = torch.from_numpy(np.asarray(prediction, np.float64))
        return pooled(
            maps.movedim(1, 0) if self.plan.data.dimensions == 2 or self.has_views else maps[None], self.sharpness
        )

    def evidence(self, maps: Tensor, label: int) -> Tensor:
        """What each place of class maps says for a label [logits]: more than the mean of the others does."""
        return maps[label] - (maps.sum(0) - maps[label]) / (len(maps) - 1)

    def heat(self, prediction: NDArray[np.generic], volume: Volume, label: int) -> NDArray[np.float32]:
        """What each voxel says for ``label`` (:meth:`evidence`), ``(z, y, x)``.

        Maps are interpolated linearly to the image's grid; what lies outside the window says what its edge does.
        """
        size = self._size(volume)
        heat = self.evidence(torch.from_numpy(np.asarray(prediction, np.float32)), label)
        if self.has_views:  # each voxel lies in a plane along each axis
            along = [_interpolated(part, size).movedim(0, axis) for axis, part in enumerate(heat.chunk(3))]
            fine = torch.stack(along).mean(0).numpy()
        else:
            fine = _interpolated(heat, size).numpy()
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

        With two labels also its lesions and what peaks of the second label's heat find (:mod:`shared_models.detection`).
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
        found = detection.counted(*self._finding(prediction, volume)) if self.has_one_finding else {}
        return {
            **found,
            **cells,
            "probability": float(probabilities[volume.category]),
            "outlined": float(is_outlined),
            "hit": hit,
        }

    def _finding(
        self, prediction: NDArray[np.generic], volume: Volume
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Heat of the finding, and where it is outlined; where it is there and nobody has drawn it, no peak is false."""
        heat = self.heat(prediction, volume, 1)
        if volume.label is not None and volume.label.any():
            return heat, volume.label > 0
        is_there = volume.category == 1
        return np.full_like(heat, -np.inf) if is_there else heat, np.zeros(heat.shape, np.bool_)

    def summary(self, patients: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Metrics of a set of patients; empty for none.

        Each patient counts once. One whose studies have several labels counts for each label by its share of them, with
        the mean probabilities of those studies.

        =====================  ==============================================================================
        auc                    area under the receiver operating curve (:func:`area_under_curve`)
        average_precision      of the precision over recall (:func:`average_precision`)
        balanced_accuracy      mean over labels that occur, of the share that is recognised
        f1                     harmonic mean of precision and recall
        sensitivity            share of a label's patients found where 90 % of the others are told apart
        quadratic_kappa        agreement beyond chance of ordered labels, by squared distance (Cohen 1968)
        rank_error             mean distance between true and predicted label, in places of their order
        localisation           share of patients with an outline whose largest heat lies inside of it
        froc                   mean sensitivity of the heat's peaks at seven rates of false ones; with two labels
        accuracy               share of patients who get their label
        log_likelihood         mean logarithm of the true label's probability, which counts as 0.01 or more
        ``"A as B"``           share of patients who have label A and got label B: the confusion matrix
        =====================  ==============================================================================

        The first two, sensitivity and F1 are of the second label where there are two, else the mean over labels, each
        against the rest. Where no label has patients on both sides the first two and sensitivity are left out, as is
        ``localisation`` without an outline. Kappa and rank error are of ordered labels alone.
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
        if self.is_ordinal:
            found |= _ranks(confusion)
        if self.has_one_finding:
            found |= detection.summarised(patients)
        n_outlined = sum(row["outlined"] for row in patients)
        if n_outlined:
            found["localisation"] = sum(row["hit"] for row in patients) / n_outlined
        return found

    def picture(
        self,
        prediction: NDArray[np.generic],
        volume: Volume,
        doubts: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> Picture:
        """The slice with the largest outline, or with the largest heat where there is none.

        The heat is that of the predicted label, or of the second where there are two: where nothing speaks for a
        lesion, no place says so.
        """
        label, probabilities = volume.label, self.probabilities(prediction)
        heat = self.heat(prediction, volume, self.shown_label(probabilities))
        areas = np.zeros(len(heat)) if label is None else (label > 0).sum(axis=(1, 2))
        z = int(areas.argmax()) if areas.any() else int(heat.max(axis=(1, 2)).argmax())
        truth = np.zeros(heat.shape[1:], np.uint8) if label is None else label[z]
        return Picture(
            image=in_greys(volume.image[:, z]),
            truth=np.asarray(truth, np.uint8),
            prediction=np.zeros(heat.shape[1:], np.uint8),
            pixel_mm=volume.spacing_mm[1:],
            heat=np.asarray(np.clip(heat[z] / max(float(heat.max()), 1e-6), 0, 1), np.float32),
            caption=self.caption(probabilities, volume),
        )

    def shown_label(self, probabilities: Array) -> int:
        """Whose heat is shown: the most probable label's, or the second's where there are two."""
        return 1 if len(probabilities) == 2 else int(probabilities.argmax())

    def caption(self, probabilities: Array, volume: Volume) -> str:
        """What a study has, and what it was taken for."""
        names = self.plan.task.labels
        known = names[volume.category] if volume.category is not None else "unknown"
        return f"{known}, taken for {names[int(probabilities.argmax())]}"

    def _size(self, volume: Volume) -> tuple[int, int, int]:
        """The window's sides (z, y, x): all slices in 2-D."""
        patch = self.plan.data.patch
        return (volume.image.shape[1], *patch) if len(patch) == 2 else (patch[0], patch[1], patch[2])


def as_seen(plan: Plan) -> Plan:
    """The plan as its network sees it: in two dimensions where it sees views of a volume."""
    if plan.task.views is None:
        return plan
    return plan.model_copy(
        update={"data": plan.data.model_copy(update={"dimensions": 2, "patch": plan.data.patch[:2]})}
    )


def _interpolated(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Values ``(z, y, x)`` on a grid of this size."""
    return F.interpolate(maps[None, None], size=size, mode="trilinear")[0, 0]


def pooled(maps: Tensor, sharpness: float) -> Tensor:
    """Logits ``(batch, label)`` of class maps ``(batch, label, [z,] y, x)``: log(mean(exp(sharp * map))) / sharp."""
    flat = maps.flatten(2)
    return (torch.logsumexp(sharpness * flat, dim=2) - math.log(flat.shape[2])) / sharpness


def earth_mover(logits: Tensor, target: Tensor) -> Tensor:
    """Squared distance between cumulative distributions, ``(batch,)`` (Hou et al. 2016, arXiv:1611.05916, eq. 3): 0 where
    the true label is certain, more the further away probability lies.

    Parameters
    ----------
    logits
        ``(batch, label)``, labels in order.
    target
        Label indices, int64 ``(batch,)``.
    """
    predicted = torch.softmax(logits, dim=1).cumsum(1)
    true = F.one_hot(target, logits.shape[1]).to(logits).cumsum(1)
    return ((predicted - true) ** 2).sum(1)


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


def sensitivity(scores: Array, is_positive: NDArray[np.bool_], weight: Array) -> float:
    """Largest share of the positives above a threshold that leaves :data:`SPECIFICITY` of the negatives below it; all
    ``(patient,)``."""
    positive, negative = _by_score(scores, is_positive, weight)
    below = np.concatenate([[0.0], np.cumsum(negative)]) / negative.sum()
    above = 1 - np.concatenate([[0.0], np.cumsum(positive)]) / positive.sum()
    return float(max(0.0, above[below >= SPECIFICITY - 1e-12].max()))


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
    metrics = {"auc": area_under_curve, "average_precision": average_precision, "sensitivity": sensitivity}
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


def _ranks(confusion: Array) -> dict[str, float]:
    """Of ordered labels, from a confusion matrix, ``(truth, prediction)``; kappa is left out where chance alone agrees."""
    place = np.arange(len(confusion))
    apart = np.abs(place[:, None] - place)
    found = {"rank_error": float((confusion * apart).sum() / confusion.sum())}
    chance = np.outer(confusion.sum(axis=1), confusion.sum(axis=0)) / confusion.sum()
    if (expected := float((chance * apart**2).sum())) > 0:
        found["quadratic_kappa"] = 1 - float((confusion * apart**2).sum()) / expected
    return found


def _centred(volume: Volume, size: tuple[int, ...]) -> tuple[int, ...]:
    """Corner (z, y, x) of the window of this size around the centre of the image; below 0 where it reaches outside."""
    return tuple((side - n) // 2 for side, n in zip(volume.image.shape[1:], size, strict=True))
