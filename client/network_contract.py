"""What a network must keep so that a patient's gradient is that patient's own; looked for by behaviour, not by name.

Three patients of noise go through the network as training would send them. If one of them leaves anything behind, or
changes what another gets, the network cannot be trained with privacy; neither can one that behaves differently when
asked the same twice, since nobody could tell. (A forgotten BatchNorm shows itself three times over: in the batch, in its
buffers, and in what the network predicts afterwards.)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from shared_models.adaptation import UNKNOWN, Adapted
from shared_models.errors import FederadError
from shared_models.plan import Plan
from shared_models.task import Task
from shared_models.volume import Volume

Batch = tuple[Tensor, Tensor]

TOLERANCE = 1e-4
"""Largest difference that counts as rounding, as a share of the largest value."""

N_PATIENTS = 3


def check_network(network: nn.Module, task: Task) -> None:
    """Refuse a network with which privacy of patients cannot be promised; it is left as it was.

    =====================================================  ======================================
    a patient must not                                     what would do it
    =====================================================  ======================================
    change another's gradient in the same batch            batch normalisation, attention over
                                                           the batch, a loss over the batch
    change another's gradient or prediction later          running statistics, a memory, a cache
    change a buffer                                        running statistics, counters
    =====================================================  ======================================

    Every parameter must be trained: one that gets no gradient would be nothing but noise.

    Raises
    ------
    FederadError
        M216 with what was found.
    """
    device = next(network.parameters()).device
    tried = copy.deepcopy(network).train()
    batch = example_batch(task, device)
    first, other = _only(batch, 0), _only(batch, 1)
    found = _untrained(tried)
    before, buffers = _gradient(tried, task, first), _buffers(tried)
    found = found or _without_gradient(tried, task, first)
    shown = _prediction(tried, first)
    _gradient(tried, task, other)
    if found is None and not _same(buffers, _buffers(tried)):
        found = "a buffer changes while it trains"
    if found is None and not _same([shown], [_prediction(tried, first)]):
        found = "a patient changes what another one is predicted"
    if found is None and not _same(before, _gradient(tried, task, first)):
        found = "a patient changes the gradient of one that comes later, or the same is never computed twice alike"
    if found is None and not _same(_gradient(tried, task, batch, of=0), _gradient(tried, task, _mixed(batch), of=0)):
        found = "a patient changes the gradient of another one in the same batch"
    if found is not None:
        raise FederadError(
            "M216",
            happened=f"The network cannot be trained with privacy: {found}.",
            because="The noise hides one patient's own gradient, and nothing that a patient does to others.",
            remedies=(
                "use a network without batch statistics, such as one with instance or group normalisation",
                "or remove [privacy] from the plan, if every site permits that",
            ),
        )


def example_batch(task: Task, device: torch.device) -> Batch:
    """One sample of each of a few emulated patients: noise with a brighter box of every label, and a label as a whole."""
    samples = [task.draw(_volume(task.plan, i), np.random.default_rng(i)) for i in range(N_PATIENTS)]
    image = torch.from_numpy(np.stack([s.image for s in samples])).to(device)
    return image, torch.from_numpy(np.stack([s.target for s in samples])).to(device)


def _volume(plan: Plan, seed: int) -> Volume:
    rng = np.random.default_rng(seed)
    patch = plan.data.patch
    sides = (1, *patch) if len(patch) == 2 else patch
    label = np.zeros(sides, np.uint8)
    for k in range(1, len(plan.task.labels)):
        corner = [int(rng.integers(0, max(side - 3, 1))) for side in sides]
        label[tuple(slice(c, c + 3) for c in corner)] = k
    image = rng.normal(size=(plan.image_channels, *sides)).astype(np.float32) + label
    foreground = np.argwhere(label > 0).astype(np.int32)
    category = seed % len(plan.task.labels) if plan.task.labels else None
    interval = (0.3 + 0.1 * (seed % 6), 0.35 + 0.1 * (seed % 6))
    return Volume(image.astype(np.float32), label, foreground, (1.0, 1.0, 1.0), category, interval)


def _only(batch: Batch, i: int) -> Batch:
    return batch[0][i : i + 1], batch[1][i : i + 1]


def _mixed(batch: Batch) -> Batch:
    """The first patient again, with everybody else another person."""
    image, target = batch
    return torch.cat([image[:1], 2 * image[1:].flip(-1) + 1]), torch.cat([target[:1], target[1:].flip(-1)])


def _gradient(network: nn.Module, task: Task, batch: Batch, of: int | None = None) -> list[Tensor]:
    """The gradient of the mean loss of a batch, or of the loss of one patient in it, with the adversary if there is one."""
    torch.manual_seed(0)
    network.zero_grad(set_to_none=True)
    output = network(batch[0]).float()
    chosen = slice(None) if of is None else slice(of, of + 1)
    if isinstance(network, Adapted):
        n = len(batch[0])
        scanner = torch.full((n,), UNKNOWN, device=output.device)
        scanner[chosen] = torch.arange(n, device=output.device)[chosen] % 2
        network.oppose(scanner, batch[1], torch.ones_like(scanner, dtype=torch.bool), strength=1.0)
    task.loss(output[chosen], batch[1][chosen]).backward()  # type: ignore[no-untyped-call]
    return [p.grad.detach().clone() for p in network.parameters() if p.grad is not None]


def _prediction(network: nn.Module, batch: Batch) -> Tensor:
    network.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        output: Tensor = network(batch[0])
    network.train()
    return output


def _buffers(network: nn.Module) -> list[Tensor]:
    return [buffer.detach().clone() for buffer in network.buffers()]


def _untrained(network: nn.Module) -> str | None:
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            return f"the parameter {name} is not trained"
    return None


def _without_gradient(network: nn.Module, task: Task, batch: Batch) -> str | None:
    _gradient(network, task, batch)
    for name, parameter in network.named_parameters():
        if parameter.grad is None:
            return f"the parameter {name} gets no gradient"
    return None


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether tensors agree to within rounding; where something is not finite, they do not."""
    if len(some) != len(others) or any(a.shape != b.shape for a, b in zip(some, others, strict=True)):
        return False
    pairs = [(a.double(), b.double()) for a, b in zip(some, others, strict=True)]
    largest = max((float(a.abs().max()) for a, _ in pairs if a.numel()), default=0.0)
    return all(bool(((a - b).abs() <= TOLERANCE * largest).all()) for a, b in pairs)
