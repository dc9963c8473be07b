"""The task contract: everything the house needs to know about what is learned.

A task ties together the network, what one training sample looks like, the loss, how a whole volume is predicted, how a
prediction is measured and how it is shown. Adding one is one module in ``tasks`` and its line in the registry there;
nothing else asks which task it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shared_models.plan import Plan
from shared_models.registry import look_up
from shared_models.volume import Volume


@dataclass(frozen=True)
class Sample:
    """One training sample, as NumPy arrays without a batch axis."""

    image: NDArray[np.float32]
    """What the network sees, ``(channel, [z,] y, x)``."""

    target: NDArray[np.generic]
    """What the loss compares it with; its shape is the task's own matter."""

    has_reference: bool = True
    """Whether ``target`` is one; else it holds its place, and the sample has no loss."""

    scanner: int = -1
    """Place of its scanner in the plan's table, where the plan tells them apart; else -1."""

    weight: float = 1.0
    """How much it counts in the loss."""


@dataclass(frozen=True)
class Picture:
    """One plane for the report, never for the gate."""

    image: NDArray[np.float32]
    """Grey ``(y, x)`` or colour ``(y, x, 3)``, between 0 and 1."""

    truth: NDArray[np.uint8]
    """Reference labels, ``(y, x)``."""

    prediction: NDArray[np.uint8]
    """Predicted labels, ``(y, x)``."""

    pixel_mm: tuple[float, float]
    """Pixel size along (y, x) [mm]."""

    heat: NDArray[np.float32] | None = None
    """How much each pixel speaks for the prediction, between 0 and 1, ``(y, x)``; None where a task has no such map."""

    caption: str = ""
    """Reference and prediction in words, where outlines do not show them."""

    panels: tuple[str, ...] = ()
    """What the parts of ``image`` are that lie side by side, from the left; empty for a single image."""

    doubts: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Maps of how unsure the model is at each pixel, by name, each ``(y, x)`` between 0 and 1."""


class Task(ABC):
    """What is learned, and how it is judged.

    Parameters
    ----------
    plan
        A validated plan of this kind of task.
    """

    metrics: Mapping[str, bool]
    """Name of each metric, and whether larger is better. The first is the headline: it chooses the best model."""

    ranges: Mapping[str, tuple[float, float]]
    """Metrics that are means over patients, and the public range of each: what lies beyond counts as the end of it where
    noise is added. Under ``[privacy]`` no other metric leaves, since there one patient could move it without bound."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @property
    def headline(self) -> str:
        """The metric by which the best model is chosen; larger is better."""
        return next(iter(self.metrics))

    @property
    def shown(self) -> str:
        """The number of a patient, among those of :meth:`measure`, by which pictures are chosen; larger is better."""
        return self.headline

    @abstractmethod
    def build_network(self) -> nn.Module:
        """A freshly initialised network; its parameters depend on torch's global generator alone."""

    @abstractmethod
    def draw(self, volume: Volume, rng: np.random.Generator) -> Sample:
        """One training sample of ``volume``, all randomness from ``rng``."""

    def in_another_light(self, sample: Sample, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Sample:
        """The sample after ``change`` has made its picture look otherwise; where the network sees something else than a
        picture, the task says what becomes of it."""
        return replace(sample, image=change(sample.image))

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean loss of a batch, a scalar; no sample's loss depends on the others."""

    @abstractmethod
    def predict(self, network: Callable[[Tensor], Tensor], volume: Volume, device: torch.device) -> NDArray[np.generic]:
        """The network's answer for a whole volume."""

    @abstractmethod
    def measure(self, prediction: NDArray[np.generic], volume: Volume) -> dict[str, float]:
        """Numbers about one predicted volume, finite, always the same names; their means over a patient's studies
        describe the patient."""

    def classical(self, volume: Volume) -> dict[str, NDArray[np.generic]]:
        """Predictions for ``volume`` by methods that learn nothing, by name: what a network is set beside. Empty here."""
        return {}

    def card(self, network: Callable[[Tensor], Tensor], volume: Volume, device: torch.device) -> dict[str, float]:
        """How steady ``network`` is on ``volume``, in numbers that no training asked for; empty here."""
        return {}

    def summary(self, patients: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Each of :attr:`metrics` for a set of patients, from what :meth:`measure` says of each; empty for no patients.

        Here they are means over patients. A metric that these patients leave undefined is left out.
        """
        return mean_metrics(patients)

    def doubts(self, network: nn.Module, volume: Volume, device: torch.device) -> dict[str, NDArray[np.float32]]:
        """Maps of how unsure ``network`` is, each between 0 and 1, by name; empty for tasks that have none."""
        return {}

    @abstractmethod
    def picture(
        self,
        prediction: NDArray[np.generic],
        volume: Volume,
        doubts: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> Picture:
        """The plane of ``volume`` that shows best how good ``prediction`` is, with that plane of :meth:`doubts`."""


def mean_metrics(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over ``rows``, which all have the same; empty for no rows."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} if rows else {}


def task_for(plan: Plan) -> Task:
    """The task that ``plan`` names."""
    from shared_models.tasks import TASKS

    task: Task = look_up(TASKS, plan.task.kind)(plan)
    return task
