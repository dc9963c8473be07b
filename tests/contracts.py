"""Contracts: what the server may assume of any network in ``NETWORKS_FOR`` and any task in ``TASKS``.

Each is found by behaviour, so that a forgotten BatchNorm is caught whatever the layer is called. A new task adds its
table to :data:`TASK_TABLES`; a new network needs nothing here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared_models.networks import NETWORKS_FOR
from shared_models.plan import Plan
from shared_models.task import Task, task_for
from shared_models.tasks import OF_KSPACE, OF_WHOLE_STUDIES, TASKS
from shared_models.volume import Volume
from shared_models.weights import initial_weights, load_weights, weights_of

TASK_TABLES: dict[str, dict[str, Any]] = {
    "segmentation": {"labels": ["background", "lesion", "edema"]},
    "classification": {"labels": ["healthy", "lesion", "edema"]},
    "quantification": {"labels": ["background", "lesion"], "target": "proportion"},
    "reconstruction": {"acceleration": 2.0, "centre_fraction": 0.25},
}
"""For each task, the keys of ``[task]`` that have no default, or none that fits eight pixels."""

DATA_TABLES: dict[str, dict[str, Any]] = {"reconstruction": {"coils": 2}}
"""For some tasks, more keys of ``[data]``."""

Batch = tuple[Tensor, Tensor]
"""Images and targets of a few patients, as the training loop stacks them."""


def every_case() -> list[tuple[str, str, int]]:
    """(task, network, dimensions) for everything that a plan can name."""
    return [
        (task, network, n)
        for task in TASKS
        for network in NETWORKS_FOR[task]
        for n in ((2,) if task in OF_KSPACE else (2, 3))
    ]


def example_plan(
    kind: str = "segmentation", network: str | None = None, dimensions: int = 2, **tables: dict[str, Any]
) -> Plan:
    """The smallest plan of a kind; ``tables`` change or add keys."""
    base: dict[str, dict[str, Any]] = {
        "task": {"kind": kind, "network": network or NETWORKS_FOR[kind][0], "channels": [4, 8], **TASK_TABLES[kind]},
        "data": {
            "modality": "MR",
            "dimensions": dimensions,
            "patch": [8] * dimensions,
            **DATA_TABLES.get(kind, {}),
        },
    }
    merged = {name: {**base.get(name, {}), **tables.get(name, {})} for name in base.keys() | tables.keys()}
    return Plan.from_tables({"name": "example", "rounds": 1, **json.loads(json.dumps(merged))})


def example_volume(plan: Plan, seed: int = 0, sides: tuple[int, int, int] | None = None) -> Volume:
    """A patient of noise with a bright box of each label, and one label as a whole; the patch's size unless ``sides`` are
    given."""
    rng = np.random.default_rng(seed)
    sides = sides or (1, 1, 1)[: 3 - plan.data.dimensions] + plan.data.patch
    image = rng.normal(size=(plan.image_channels, *sides)).astype(np.float32)
    label = np.zeros(sides, np.uint8)
    for k in range(1, len(plan.task.labels)):
        z, y, x = (int(rng.integers(0, max(side - 3, 1))) for side in sides)
        label[z : z + 3, y : y + 3, x : x + 3] = k
    image += 3 * label
    foreground = np.argwhere(label > 0).astype(np.int32)
    category = seed % len(plan.task.labels) if plan.task.labels else None
    interval = (0.3 + 0.1 * (seed % 6), 0.35 + 0.1 * (seed % 6))
    return Volume(image, label, foreground, (3.0, 1.0, 1.5), category, interval, key=str(seed))


def example_batch(task: Task, n_patients: int = 4) -> Batch:
    """One sample of each of a few patients."""
    samples = [task.draw(example_volume(task.plan, i), np.random.default_rng(i)) for i in range(n_patients)]
    return torch.from_numpy(np.stack([s.image for s in samples])), torch.from_numpy(
        np.stack([s.target for s in samples])
    )


def in_other_company(batch: Batch) -> Batch:
    """The first patient again, with everybody else another person."""
    image, target = batch
    return torch.cat([image[:1], 2 * image[1:].flip(-1) + 1]), torch.cat([target[:1], target[1:].flip(-1)])


def assert_company_changes_no_output(network: nn.Module, batch: Batch) -> None:
    """While training, other patients in the batch do not change what a patient gets."""
    network.train()
    among_some, among_others = (_seeded(network, image)[:1] for image, _ in (batch, in_other_company(batch)))

    torch.testing.assert_close(among_others, among_some, rtol=0, atol=0)


def assert_company_changes_no_gradient(network: nn.Module, task: Task, batch: Batch) -> None:
    """The gradient of a patient's own loss is that patient's own, whoever shares the batch."""
    network.train()
    among_some, among_others = (_gradient_of_first(network, task, each) for each in (batch, in_other_company(batch)))

    assert any(part.abs().max() > 0 for part in among_some)
    torch.testing.assert_close(among_others, among_some, rtol=0, atol=0)


def assert_batch_gradient_is_mean_of_patients(network: nn.Module, task: Task, batch: Batch) -> None:
    """The step of a batch is the mean of the steps of its patients alone."""
    network.train()
    image, target = batch
    together = _gradient(network, task, batch)
    alone = [_gradient(network, task, (image[i : i + 1], target[i : i + 1])) for i in range(len(image))]
    mean = [torch.stack(parts).mean(0) for parts in zip(*alone, strict=True)]

    torch.testing.assert_close(together, mean, rtol=1e-4, atol=1e-6)


def assert_training_changes_no_buffer(network: nn.Module, task: Task, batch: Batch) -> None:
    """A training step moves parameters and nothing else."""
    network.train()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    _train_one_step(network, task, batch)

    after = dict(network.named_buffers())
    assert after.keys() == before.keys()
    for name, buffer in before.items():
        torch.testing.assert_close(after[name], buffer, rtol=0, atol=0, msg=f"the buffer {name} changed")


def assert_parameters_are_all_there_is(build: Callable[[], nn.Module], task: Task, batch: Batch) -> None:
    """A network trained elsewhere and rebuilt from what travels answers as the trained one, bit for bit."""
    trained, received = build(), build()
    _train_one_step(trained, task, batch)
    travelling = weights_of(trained)
    load_weights(received, travelling)

    assert travelling.keys() == dict(trained.named_parameters()).keys()
    with torch.inference_mode():
        for mode in (False, True):
            there, here = (_seeded(network.train(mode), batch[0]) for network in (trained, received))
            torch.testing.assert_close(here, there, rtol=0, atol=0)


def assert_output_keeps_the_grid(network: nn.Module, image: Tensor) -> None:
    """A value for every voxel that came in."""
    with torch.inference_mode():
        output = network.eval()(image)

    assert output.shape[0] == image.shape[0]
    assert output.shape[2:] == image.shape[2:]


def assert_output_fits_the_task(task: Task, network: nn.Module, image: Tensor) -> None:
    """A value of each label for every voxel, or for every place of a coarser map where studies are labelled as a whole;
    each coil's image where nothing is labelled."""
    if task.plan.task.kind not in OF_WHOLE_STUDIES:
        assert_output_keeps_the_grid(network, image)
    with torch.inference_mode():
        output = network.eval()(image)

    n_values = len(task.plan.task.labels) or task.plan.image_channels
    assert output.shape[:2] == (image.shape[0], n_values)
    assert output.ndim == image.ndim


def assert_seed_decides_the_weights(build: Callable[[], nn.Module]) -> None:
    """The same seed gives the same weights whatever was drawn before, and another seed gives others."""
    torch.manual_seed(1)
    first = initial_weights(build, 7)
    torch.rand(3)
    np.random.default_rng().normal()
    again, other = initial_weights(build, 7), initial_weights(build, 8)

    assert all(first[name].tobytes() == again[name].tobytes() for name in first)
    assert any(first[name].tobytes() != other[name].tobytes() for name in first)


def assert_loss_is_mean_of_samples(task: Task, output: Tensor, target: Tensor) -> None:
    """No sample's loss depends on the others, so the loss of a batch is the mean of its samples' losses."""
    together = task.loss(output, target)
    alone = torch.stack([task.loss(output[i : i + 1], target[i : i + 1]) for i in range(len(output))])

    assert together.shape == ()
    torch.testing.assert_close(together, alone.mean(), rtol=1e-5, atol=1e-6)


def assert_measures_what_it_names(task: Task) -> None:
    """Whole volumes, larger than the patch on every axis, are predicted and get each of the task's metrics, finite, and one
    patient alone each of those that may leave with noise."""
    network = task.build_network().eval()
    patients = []
    for seed in range(len(task.plan.task.labels) or 2):
        volume = example_volume(task.plan, seed, sides=(5, 11, 13))
        with torch.inference_mode():
            patients.append(task.measure(task.predict(network, volume, torch.device("cpu")), volume))
    alone, together = task.summary(patients[:1]), task.summary(patients)

    assert all(patient.keys() == patients[0].keys() for patient in patients)
    assert task.shown in patients[0]
    assert task.metrics.keys() <= together.keys()
    assert task.ranges.keys() <= alone.keys()
    for values in (*patients, alone, together):
        assert all(isinstance(value, float) and np.isfinite(value) for value in values.values())
    assert task.metrics[task.headline]
    assert task.summary([]) == {}


def assert_ranges_are_of_means(task: Task) -> None:
    """What may leave with noise is a mean over patients: everybody alone and then averaged gives the same."""
    network = task.build_network().eval()
    patients = []
    for seed in range(5):
        volume = example_volume(task.plan, seed)
        with torch.inference_mode():
            patients.append(task.measure(task.predict(network, volume, torch.device("cpu")), volume))
    together = task.summary(patients)
    for name in task.ranges:
        alone = [task.summary([patient])[name] for patient in patients]
        np.testing.assert_allclose(together[name], np.mean(alone), rtol=1e-12, atol=1e-12)


def task_of(case: tuple[str, str, int]) -> Task:
    """The task of a case, on the smallest plan that names it."""
    return task_for(example_plan(*case))


def _seeded(network: nn.Module, image: Tensor) -> Tensor:
    torch.manual_seed(0)
    output: Tensor = network(image)
    return output


def _gradient_of_first(network: nn.Module, task: Task, batch: Batch) -> list[Tensor]:
    network.zero_grad(set_to_none=True)
    loss = task.loss(_seeded(network, batch[0])[:1], batch[1][:1])
    return list(torch.autograd.grad(loss, list(network.parameters())))


def _gradient(network: nn.Module, task: Task, batch: Batch) -> list[Tensor]:
    network.zero_grad(set_to_none=True)
    return list(torch.autograd.grad(task.loss(_seeded(network, batch[0]), batch[1]), list(network.parameters())))


def _train_one_step(network: nn.Module, task: Task, batch: Batch) -> None:
    optimizer = torch.optim.SGD(network.train().parameters(), lr=0.1)
    task.loss(_seeded(network, batch[0]), batch[1]).backward()
    optimizer.step()
