"""Segmentation: a label for every voxel.

Dice plus cross-entropy (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z) on patches, sliding-window prediction,
Dice and 95 % Hausdorff distance of whole volumes. In 2-D plans the network sees slices and the measures are still those
of the volume.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import compute_hausdorff_distance
from numpy.typing import NDArray
from torch import Tensor, nn

from shared_models.networks import NETWORKS
from shared_models.plan import Plan
from shared_models.registry import look_up
from shared_models.task import Picture, Sample, Task
from shared_models.volume import Volume, crop, in_greys

# MONAI 1.6 warns of its own use of an argument that it has deprecated; there is nothing a caller can do about it.
warnings.filterwarnings("ignore", message="(?s).*always_return_as_numpy", category=FutureWarning)

WINDOWS_AT_ONCE = 8
"""Windows of one volume in one forward pass: speed and memory only."""

OVERLAP = 0.25
"""Share of a window that overlaps the next one."""


class Segmentation(Task):
    """One label for every voxel; see the module for methods and sources."""

    metrics: Mapping[str, bool] = {"dice": True, "hd95_mm": False}
    ranges: Mapping[str, tuple[float, float]] = {"dice": (0.0, 1.0), "hd95_mm": (0.0, 100.0)}

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._loss = DiceCELoss(softmax=True, to_onehot_y=True, smooth_nr=1.0, smooth_dr=1.0)

    def build_network(self) -> nn.Module:
        """The network that the plan names."""
        network: nn.Module = look_up(NETWORKS, self.plan.task.network)(self.plan)
        return network

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
        """Soft Dice (background included, smoothed by one voxel) plus cross-entropy.

        Parameters
        ----------
        output
            Logits, float32 ``(batch, label, [z,] y, x)``.
        target
            Label indices, int64 ``(batch, 1, [z,] y, x)``.
        """
        loss: Tensor = self._loss(output, target)
        return loss

    def predict(self, network: Callable[[Tensor], Tensor], volume: Volume, device: torch.device) -> NDArray[np.uint8]:
        """Label indices ``(z, y, x)``, from overlapping windows of the training patch's size."""
        return np.asarray(self._logits(network, volume, device).argmax(dim=0).to(torch.uint8).cpu().numpy(), np.uint8)

    def probabilities(
        self, network: Callable[[Tensor], Tensor], volume: Volume, device: torch.device
    ) -> NDArray[np.float32]:
        """Of each label at each voxel, ``(label, z, y, x)``; the largest is the one that :meth:`predict` gives."""
        logits = self._logits(network, volume, device)
        return np.asarray(torch.softmax(logits.float(), dim=0).cpu().numpy(), np.float32)

    def n_windows(self, volume: Volume) -> int:
        """How many windows the network sees of a volume."""
        n_slices, *sides = volume.image.shape[1:] if self.plan.data.dimensions == 2 else (1, *volume.image.shape[1:])
        along = (
            1 + math.ceil(max(side - n, 0) / int(n * (1 - OVERLAP)))
            for side, n in zip(sides, self.plan.data.patch, strict=True)
        )
        return int(n_slices * math.prod(along))

    def _logits(self, network: Callable[[Tensor], Tensor], volume: Volume, device: torch.device) -> Tensor:
        """``(label, z, y, x)``, from overlapping windows of the training patch's size."""
        image = torch.from_numpy(np.array(volume.image, np.float32)).to(device)
        slices_first = self.plan.data.dimensions == 2
        batch = image.movedim(1, 0) if slices_first else image[None]
        logits = sliding_window_inference(batch, self.plan.data.patch, WINDOWS_AT_ONCE, network, overlap=OVERLAP)
        if not isinstance(logits, Tensor):
            raise TypeError("the network returned something other than one tensor")
        return logits.movedim(1, 0) if slices_first else logits[0]

    def measure(self, prediction: NDArray[np.generic], volume: Volume) -> dict[str, float]:
        """Means over the labels above background of Dice [0 to 1] and 95 % Hausdorff distance [mm].

        ====================  ======  ==================================
        foreground            Dice    distance
        ====================  ======  ==================================
        in neither            1       0
        in one of the two     0       diagonal of the volume
        in both               usual   usual
        ====================  ======  ==================================
        """
        if volume.label is None:
            raise ValueError("a volume without a reference cannot be measured")
        per_label = [
            (
                dice(prediction == k, volume.label == k),
                hausdorff_95_mm(prediction == k, volume.label == k, volume.spacing_mm),
            )
            for k in range(1, len(self.plan.task.labels))
        ]
        overlap, distance = np.mean(per_label, axis=0)
        return {"dice": float(overlap), "hd95_mm": float(distance)}

    def picture(self, prediction: NDArray[np.generic], volume: Volume) -> Picture:
        """The slice with the largest reference, or the middle one where there is none."""
        label = volume.label if volume.label is not None else np.zeros(volume.image.shape[1:], np.uint8)
        areas = (label > 0).sum(axis=(1, 2))
        z = int(areas.argmax()) if areas.any() else label.shape[0] // 2
        return Picture(in_greys(volume.image[:, z]), label[z], prediction[z].astype(np.uint8), volume.spacing_mm[1:])

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


def hausdorff_95_mm(
    prediction: NDArray[np.bool_], truth: NDArray[np.bool_], spacing_mm: tuple[float, float, float]
) -> float:
    """95th percentile of the distances between the two surfaces, the larger of both directions [mm].

    Parameters
    ----------
    prediction, truth
        Masks, ``(z, y, x)``.
    spacing_mm
        Distance between voxel centres along (z, y, x).
    """
    if not prediction.any() and not truth.any():
        return 0.0
    if not prediction.any() or not truth.any():
        return float(np.linalg.norm(np.multiply(truth.shape, spacing_mm)))
    masks = [torch.from_numpy(np.ascontiguousarray(mask))[None, None] for mask in (prediction, truth)]
    spacing: tuple[float, ...] = spacing_mm
    if truth.shape[0] == 1:
        masks, spacing = [mask[:, :, 0] for mask in masks], spacing_mm[1:]
    return float(
        compute_hausdorff_distance(masks[0], masks[1], include_background=True, percentile=95, spacing=list(spacing))
    )
