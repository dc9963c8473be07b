"""Privacy of single images, through Opacus: for comparison with what others report. **It does not protect patients.**

The unit is one image: a slice in 2-D, a volume in 3-D. A person with k images moves a sum by up to k times the clip, so
the epsilon of an image says little about a patient; ``accounting`` computes what it amounts to.

Opacus (Yousefpour et al. 2021, arXiv:2109.12298) gives the gradient of every sample in one backward pass. Sampling rate,
divisor, clip, noise and integer grid are those of ``privacy``: Opacus' own ``make_private`` derives the rate and the
divisor from the private number of images, and its noise is not from a cryptographic generator. An image's own share is
bounded exactly; in the last bits of a float32 its company in the batch can matter, which the patient unit excludes.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from client.network_contract import Batch, example_batch
from client.privacy import PatientSum, patient_seed
from client.training import Patient, PatientSource, is_out_of_memory
from shared_models.adaptation import sample_of
from shared_models.errors import FederadError
from shared_models.task import Sample, Task
from shared_models.volume import Volume

log = logging.getLogger(__name__)

IMAGES_AT_ONCE = 8
"""Images in one backward pass: speed and memory only."""

TOLERANCE = 1e-3
"""Largest difference between Opacus' gradient of a sample and the ordinary one, as a share of its norm."""

Precision = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Image:
    """One unit of image-level privacy."""

    study: str
    z: int | None
    """Slice of the study's volume; None for the whole volume."""

    @property
    def key(self) -> str:
        """Tells this image from all others."""
        return f"{self.study}/{'' if self.z is None else self.z}"


class ImageGradients:
    """The gradient of each training image: the mean over its samples and views.

    Inside the context the network carries Opacus' hooks; outside it is as before.

    Raises
    ------
    FederadError
        M216 if Opacus cannot take this network apart, or gets a gradient wrong.
    """

    def __init__(self, network: nn.Module, task: Task, cohort: PatientSource, precision: Precision) -> None:
        torch.manual_seed(0)
        check_sample_gradients(task.build_network().to(next(network.parameters()).device), task)
        self._task, self._cohort, self._precision = task, cohort, precision
        self._hooked = Hooked(network)
        privacy = task.plan.privacy
        if privacy is None or privacy.images_per_patient is None:
            raise ValueError("the plan does not protect images")
        self._images = images_of(cohort, task.plan.data.dimensions, most=privacy.images_per_patient)
        n_views = privacy.views
        self._n_samples = task.plan.training.samples_per_patient * n_views

    def __enter__(self) -> Self:
        self._hooked.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooked.__exit__(*error)

    def __len__(self) -> int:
        """Images there are; this number never leaves."""
        return len(self._images)

    def add_to(self, total: PatientSum, indices: Sequence[int], secret: bytes) -> None:
        """Add the gradients of these images to the sum of a step; one that cannot be used gives nothing."""
        torch.manual_seed(patient_seed(secret, "", "torch"))
        group: list[tuple[Image, list[Sample]]] = []
        for place, i in enumerate(indices, start=1):
            if samples := self._draw(self._images[i], secret):
                group.append((self._images[i], samples))
            if len(group) == IMAGES_AT_ONCE or (group and place == len(indices)):
                self._add(total, group, secret)
                group = []

    def _add(self, total: PatientSum, group: Sequence[tuple[Image, list[Sample]]], secret: bytes) -> None:
        """Images in one backward pass, or in two halves where memory does not suffice."""
        try:
            gradients = self._per_image([samples for _, samples in group])
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            gradients = None
        if gradients is not None:
            for (image, _), gradient in zip(group, gradients, strict=True):
                if not total.add(gradient, patient_seed(secret, image.key, "rounding")):
                    log.warning("an image gives nothing to this step: a gradient that is not finite")
        elif len(group) == 1:
            log.warning("an image gives nothing to this step: it does not fit into memory")
        else:
            self._add(total, group[: len(group) // 2], secret)
            self._add(total, group[len(group) // 2 :], secret)

    def _per_image(self, drawn: Sequence[Sequence[Sample]]) -> Tensor:
        """The mean gradient of each image, ``(image, d)``."""
        samples = [sample for of_one in drawn for sample in of_one]
        batch = (
            torch.from_numpy(np.stack([s.image for s in samples])).to(self._hooked.device),
            torch.from_numpy(np.stack([s.target for s in samples])).to(self._hooked.device),
        )
        per_sample = self._hooked.sample_gradients(self._task, batch, self._precision)
        return per_sample.reshape(len(drawn), self._n_samples, -1).mean(1)

    def _draw(self, image: Image, secret: bytes) -> list[Sample]:
        rng = np.random.default_rng(patient_seed(secret, image.key, "augmentation"))
        try:
            volume = one_image(self._cohort.volume(image.study), image.z)
            return [sample_of(self._task, volume, rng) for _ in range(self._n_samples)]
        except Exception as error:  # whatever is wrong with one image ends with it
            log.warning("an image gives nothing to this step: %s", type(error).__name__)
            return []


class Hooked:
    """A network with Opacus' hooks, for as long as the context lasts."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.device = next(network.parameters()).device
        self._opacus: GradSampleModule | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        # Opacus reads the memory of a convolution's input in row order: on any other order it is wrong in silence.
        self._handles = [module.register_forward_pre_hook(_contiguous) for module in self.network.modules()]
        self._opacus = GradSampleModule(self.network, batch_first=True, loss_reduction="mean")
        return self

    def __exit__(self, *_: object) -> None:
        if self._opacus is not None:
            self._opacus.to_standard_module()
        for handle in self._handles:
            handle.remove()
        self.network.zero_grad(set_to_none=True)

    def sample_gradients(self, task: Task, batch: Batch, precision: Precision = nullcontext) -> Tensor:
        """The gradient of each sample's own loss, ``(sample, d)``."""
        if self._opacus is None:
            raise ValueError("the hooks are not in place")
        self._opacus.zero_grad(set_to_none=True)
        with warnings.catch_warnings():
            # Torch remarks on hooks at a first layer, whose input needs no gradient; that is as it should be.
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            with precision():
                output = self._opacus(batch[0])
            task.loss(output.float(), batch[1]).backward()  # type: ignore[no-untyped-call]
        parts = [_of_samples(p).detach().flatten(1).float() for p in self.network.parameters()]
        self._opacus.zero_grad(set_to_none=True)
        return torch.cat(parts, dim=1)


def check_sample_gradients(network: nn.Module, task: Task) -> None:
    """Refuse a network whose samples Opacus does not tell apart correctly; the network is left as it was.

    Each sample of an example batch is compared with an ordinary backward pass of its own. What fails: a parameter used
    through two modules (counted twice), a layer that overwrites its input, a layer without batch axis.

    Raises
    ------
    FederadError
        M216 with what was found.
    """
    tried = copy.deepcopy(network).train()
    image, target = example_batch(task, next(network.parameters()).device)
    ordinary = torch.stack([_gradient(tried, task, (image[i : i + 1], target[i : i + 1])) for i in range(len(image))])
    try:
        with Hooked(tried) as hooked:
            torch.manual_seed(0)
            found = hooked.sample_gradients(task, (image, target))
    except Exception as error:
        raise _refused(f"Opacus cannot take it apart into images ({type(error).__name__})") from error
    difference = (found - ordinary).norm(dim=1) / ordinary.norm(dim=1)
    if not bool((difference <= TOLERANCE).all()):
        raise _refused(f"Opacus' gradient of an image differs from the ordinary one by {float(difference.max()):.0%}")


def images_of(cohort: PatientSource, dimensions: int, *, most: int) -> list[Image]:
    """The training images of a cohort, always in the same order; a study that cannot be read has none.

    No patient has more than ``most``: the first ones, whoever else is there.
    """
    images: list[Image] = []
    for patient in cohort.patients("train"):
        images += _of_patient(cohort, patient, dimensions)[:most]
    return images


def _of_patient(cohort: PatientSource, patient: Patient, dimensions: int) -> list[Image]:
    images: list[Image] = []
    for study in patient.studies:
        try:
            n_slices = cohort.volume(study).image.shape[1]
        except Exception as error:
            log.warning("a study gives no images: %s", type(error).__name__)
            continue
        images += [Image(study, z) for z in range(n_slices)] if dimensions == 2 else [Image(study, None)]
    return images


def one_image(volume: Volume, z: int | None) -> Volume:
    """The volume that holds slice ``z`` alone; the whole one for None."""
    if z is None:
        return volume
    inside = volume.foreground[volume.foreground[:, 0] == z] * np.array([0, 1, 1], np.int32)
    label = None if volume.label is None else volume.label[z : z + 1]
    return replace(volume, image=volume.image[:, z : z + 1], label=label, foreground=inside)


def _gradient(network: nn.Module, task: Task, batch: Batch) -> Tensor:
    network.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    task.loss(network(batch[0]).float(), batch[1]).backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.detach().reshape(-1).float() for p in network.parameters() if p.grad is not None])


def _of_samples(parameter: nn.Parameter) -> Tensor:
    """What Opacus left at a parameter: ``(sample, *shape)``."""
    found = getattr(parameter, "grad_sample", None)
    if not isinstance(found, Tensor):
        raise ValueError("a parameter got no gradient for each sample")
    return found


def _contiguous(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.contiguous() if isinstance(value, Tensor) else value for value in inputs)


def _refused(what: str) -> FederadError:
    return FederadError(
        "M216",
        happened=f"The network cannot be trained with privacy of images: {what}.",
        because="A gradient that is not the image's own is clipped and noised as if it were.",
        remedies=(
            'set unit = "patient" under [privacy], which works with every network and protects whole patients',
            "or use a network of layers that Opacus supports, none of them used twice",
        ),
    )
