"""Segmentation: a label for every voxel.

Dice plus cross-entropy (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z) on patches, sliding-window prediction,
Dice, surface distances and volumes of whole studies. In 2-D plans the network sees slices and the measures are still those
of the volume.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.metrics.utils import get_edge_surface_distance
from numpy.typing import NDArray
from torch import Tensor, nn

from shared_models import networks
from shared_models.clinical import agreement
from shared_models.losses import loss_of
from shared_models.plan import Plan
from shared_models.task import Picture, Sample, Task, mean_metrics
from shared_models.uncertainty import Members, passes
from shared_models.volume import Volume, crop, in_greys

# MONAI 1.6 warns of its own use of an argument that it has deprecated; there is nothing a caller can do about it.
warnings.filterwarnings("ignore", message="(?s).*always_return_as_numpy", category=FutureWarning)

WINDOWS_AT_ONCE = 8
"""Windows of one volume in one forward pass: speed and memory only."""

OVERLAP = 0.25
"""Share of a window that overlaps the next one."""

PASSES = 20
"""Passes with dropout that a map of doubts is made of."""

PICTURES = frozenset({"OP", "DX"})
"""Modalities that come as picture files, which do not say how large a pixel is."""

VOLUME, REFERENCE = KINDS = ("volume: ", "reference volume: ")
"""Before a label's name among the numbers of a patient."""


class Segmentation(Task):
    """One label for every voxel; see the module for methods and sources."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        unit = "px" if plan.data.modality in PICTURES else "mm"
        self._hd95, self._surface = f"hd95_{unit}", f"surface_{unit}"
        self.ranges = {"dice": (0.0, 1.0), self._hd95: (0.0, 100.0)}
        self.metrics = {"dice": True, self._hd95: False}
        if plan.privacy is None:
            self.metrics = {**self.metrics, self._surface: False}
        self._loss = loss_of(plan)

    def build_network(self) -> nn.Module:
        """The network that the plan names."""
        return networks.build(self.plan)

    def draw(self, volume: Volume, rng: np.random.Generator) -> Sample:
        """A patch, and its labels as int64 ``(1, [z,] y, x)``.

        With the plan's probability ``foreground`` it lies around a labelled voxel, anywhere such that the voxel is in
        the middle half of each axis; otherwise it lies anywhere in the volume. What lies outside the image is 0 (the
        mean intensity) with label 0.
        """
        if volume.label is None:
            raise ValueError("a volume without a reference cannot be trained on")
        size = self._window_size()
        corner = self._corner(volume, size, rng)
        image = crop(volume.image, corner, size)
        target = crop(volume.label[None], corner, size)
        if self.plan.data.dimensions == 2:
            image, target = image[:, 0], target[:, 0]
        if self.plan.training.flips and rng.random() < 0.5:
            image, target = image[..., ::-1], target[..., ::-1]
        return Sample(np.ascontiguousarray(image, np.float32), np.ascontiguousarray(target, np.int64))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss that the plan names; soft Dice (background included, smoothed by one voxel) plus cross-entropy unless it
        names one.

        Parameters
        ----------
        output
            Logits, float32 ``(batch, label, [z,] y, x)``, and with ``loss = "heteroscedastic"`` the logarithm of their
            variance in a last channel.
        target
            Label indices, int64 ``(batch, 1, [z,] y, x)``.
        """
        loss: Tensor = self._loss(output, target)
        return loss

    def predict(self, network: Callable[[Tensor], Tensor], volume: Volume, device: torch.device) -> NDArray[np.uint8]:
        """Label indices ``(z, y, x)``, from overlapping windows of the training patch's size."""
        return np.asarray(self.logits(network, volume, device).argmax(dim=0).to(torch.uint8).cpu().numpy(), np.uint8)

    def probabilities(
        self, network: Callable[[Tensor], Tensor], volume: Volume, device: torch.device
    ) -> NDArray[np.float32]:
        """Of each label at each voxel, ``(label, z, y, x)``; the largest is the one that :meth:`predict` gives.

        Where the noise of logits is learned, their mean over it is taken in closed form, as if it were that of two labels,
        whose logits' difference has twice the variance (MacKay 1992, doi:10.1162/neco.1992.4.5.720, eq. 10).
        """
        answer = self._answer(network, volume, device).float()
        logits = answer[: len(self.plan.task.labels)]
        if len(answer) > len(logits):
            logits = logits / torch.sqrt(1 + math.pi / 8 * 2 * torch.exp(answer[-1:]))
        return np.asarray(torch.softmax(logits, dim=0).cpu().numpy(), np.float32)

    def doubts(self, network: nn.Module, volume: Volume, device: torch.device) -> dict[str, NDArray[np.float32]]:
        """How unsure ``network`` is of each voxel, each ``(z, y, x)`` from 0 to 1.

        ===============  ==============================================================================================
        ``uncertainty``  entropy of the probabilities over the largest possible one
        ``disagreement`` the part of it that passes with dropout disagree about; where the plan has ``dropout``, and
                         probabilities are then means over :data:`PASSES` of them
        ===============  ==============================================================================================
        """
        members = Members()
        if not self.plan.task.dropout:
            members.add(self.probabilities(network, volume, device))
            return {"uncertainty": members.uncertainty}
        for _ in passes(network, PASSES, device):
            members.add(self.probabilities(network, volume, device))
        return {"uncertainty": members.uncertainty, "disagreement": members.disagreement}

    def n_windows(self, volume: Volume) -> int:
        """How many windows the network sees of a volume."""
        n_slices, *sides = volume.image.shape[1:] if self.plan.data.dimensions == 2 else (1, *volume.image.shape[1:])
        along = (
            1 + math.ceil(max(side - n, 0) / int(n * (1 - OVERLAP)))
            for side, n in zip(sides, self.plan.data.patch, strict=True)
        )
        return int(n_slices * math.prod(along))

    def logits(self, network: Callable[[Tensor], Tensor], volume: Volume, device: torch.device) -> Tensor:
        """What the network says for each label of each voxel, ``(label, z, y, x)``, from the same windows."""
        return self._answer(network, volume, device)[: len(self.plan.task.labels)]

    def _answer(self, network: Callable[[Tensor], Tensor], volume: Volume, device: torch.device) -> Tensor:
        """The logits and, where it is learned, the logarithm of their variance, ``(label [+ 1], z, y, x)``."""
        image = torch.from_numpy(np.array(volume.image, np.float32)).to(device)
        slices_first = self.plan.data.dimensions == 2
        batch = image.movedim(1, 0) if slices_first else image[None]
        logits = sliding_window_inference(batch, self.plan.data.patch, WINDOWS_AT_ONCE, network, overlap=OVERLAP)
        if not isinstance(logits, Tensor):
            raise TypeError("the network returned something other than one tensor")
        return logits.movedim(1, 0) if slices_first else logits[0]

    def measure(self, prediction: NDArray[np.generic], volume: Volume) -> dict[str, float]:
        """Of the labels above background, the means of Dice [0 to 1], 95 % Hausdorff distance and mean surface distance
        [mm, or px in pictures], and of each its volume and that of the reference [ml, or px].

        ====================  ======  ==================================
        foreground            Dice    distances
        ====================  ======  ==================================
        in neither            1       0
        in one of the two     0       diagonal of the volume
        in both               usual   usual
        ====================  ======  ==================================
        """
        if volume.label is None:
            raise ValueError("a volume without a reference cannot be measured")
        per_label: list[tuple[float, float, float]] = []
        volumes: dict[str, float] = {}
        voxel = 1.0 if self._hd95 == "hd95_px" else math.prod(volume.spacing_mm) / 1000.0
        for k, name in list(enumerate(self.plan.task.labels))[1:]:
            found, truth = prediction == k, volume.label == k
            per_label.append((dice(found, truth), *surface_distances_mm(found, truth, volume.spacing_mm)))
            volumes |= {VOLUME + name: float(found.sum()) * voxel, REFERENCE + name: float(truth.sum()) * voxel}
        overlap, hd95, surface = np.mean(per_label, axis=0)
        return {"dice": float(overlap), self._hd95: float(hd95), self._surface: float(surface), **volumes}

    def summary(self, patients: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Means over patients, and how each label's volume agrees with the reference's over these patients.

        ========================  ============================================================
        ``volume bias: LABEL``    mean of volume minus reference
        ``volume limits: LABEL``  95 % of the differences lie within so much of the bias
        ``volume error: LABEL``   mean of their absolute values
        ``volume ICC: LABEL``     intraclass correlation; left out where it is not defined
        ========================  ============================================================

        See ``clinical`` for the definitions; all are left out for no patients, and under ``[privacy]``, where one patient
        could move them without bound.
        """
        found = mean_metrics(patients)
        for name in self.plan.task.labels[1:] if patients else ():
            for kind in KINDS:
                del found[kind + name]
            mine, theirs = ([row[kind + name] for row in patients] for kind in KINDS)
            if self.plan.privacy is not None:
                continue
            agreed = agreement(mine, theirs)
            found |= {
                f"volume bias: {name}": agreed.bias,
                f"volume limits: {name}": agreed.limits,
                f"volume error: {name}": float(np.mean(np.abs(np.subtract(mine, theirs)))),
            }
            if agreed.icc is not None:
                found[f"volume ICC: {name}"] = agreed.icc
        return found

    def picture(
        self,
        prediction: NDArray[np.generic],
        volume: Volume,
        doubts: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> Picture:
        """The slice with the largest reference, or the middle one where there is none."""
        label = volume.label if volume.label is not None else np.zeros(volume.image.shape[1:], np.uint8)
        areas = (label > 0).sum(axis=(1, 2))
        z = int(areas.argmax()) if areas.any() else label.shape[0] // 2
        return Picture(
            in_greys(volume.image[:, z]),
            label[z],
            prediction[z].astype(np.uint8),
            volume.spacing_mm[1:],
            doubts={name: doubt[z] for name, doubt in (doubts or {}).items()},
        )

    def _window_size(self) -> tuple[int, int, int]:
        patch = self.plan.data.patch
        return (1, patch[0], patch[1]) if len(patch) == 2 else (patch[0], patch[1], patch[2])

    def _corner(self, volume: Volume, size: tuple[int, ...], rng: np.random.Generator) -> tuple[int, ...]:
        shape = volume.image.shape[1:]
        around_foreground = rng.random() < self.plan.training.foreground
        if around_foreground and len(volume.foreground):
            voxel = volume.foreground[rng.integers(len(volume.foreground))]
            corner = [int(v) - int(rng.integers(n // 4, n - n // 4)) for v, n in zip(voxel, size, strict=True)]
        else:
            corner = [int(rng.integers(0, max(side - n, 0) + 1)) for side, n in zip(shape, size, strict=True)]
        return tuple(
            min(max(c, 0), side - n) if side >= n else (side - n) // 2
            for c, side, n in zip(corner, shape, size, strict=True)
        )


def dice(prediction: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Twice the overlap over the sum of the sizes (Dice 1945, doi:10.2307/1932409); 1 if both are empty."""
    total = int(prediction.sum()) + int(truth.sum())
    return 2.0 * int((prediction & truth).sum()) / total if total else 1.0


def surface_distances_mm(
    prediction: NDArray[np.bool_], truth: NDArray[np.bool_], spacing_mm: tuple[float, float, float]
) -> tuple[float, float]:
    """The 95th percentile, the larger of both directions, and the mean of the distances between two surfaces [mm].

    Parameters
    ----------
    prediction, truth
        Masks, ``(z, y, x)``.
    spacing_mm
        Distance between voxel centres along (z, y, x).
    """
    if not prediction.any() and not truth.any():
        return 0.0, 0.0
    if not prediction.any() or not truth.any():
        diagonal = float(np.linalg.norm(np.multiply(truth.shape, spacing_mm)))
        return diagonal, diagonal
    masks = [torch.from_numpy(np.ascontiguousarray(mask)) for mask in (prediction, truth)]
    spacing: tuple[float, ...] = spacing_mm
    if truth.shape[0] == 1:
        masks, spacing = [mask[0] for mask in masks], spacing_mm[1:]
    _, (there, back), _ = get_edge_surface_distance(masks[0], masks[1], spacing=list(spacing), symmetric=True)
    hd95 = max(float(torch.quantile(distances, 0.95)) for distances in (there, back))
    return hd95, float(torch.cat([there, back]).mean())
