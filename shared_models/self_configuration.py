"""From a fingerprint to a plan: spacing, patch, depth and batch, without anybody's hand.

The rules follow those that nnU-Net published (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z, supplementary note 2):

* images are brought to their median spacing; where one axis is more than :data:`VERY_ANISOTROPIC` times as coarse as the
  others and has that many times fewer voxels, to the tenth percentile of its spacing, so that fine series lose less;
* the patch is as wide in millimetres along each axis as the median image is, or a cube, whichever is smaller, and shrinks
  until a step of :data:`LEAST_BATCH` patches fits the memory;
* an axis is halved as ``configuration`` says; features double from depth to depth, up to :data:`MOST_FEATURES` times those
  of the first;
* what memory is left makes the batch larger, up to :data:`SHARE_OF_VOXELS` of all voxels.

Ours: nnU-Net trains a 2-D and a 3-D network and keeps the better; here volumes of fewer than :data:`LEAST_SLICES` slices
are learned in 2-D and all others in 3-D. The number of steps in a round stays what the plan says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from shared_models.configuration import depths_of, halvings
from shared_models.errors import FederadError
from shared_models.fingerprint import AXES, Fingerprint
from shared_models.plan import Plan

VERY_ANISOTROPIC = 3.0
COARSE_SHARE = 0.1
"""Of patients, whose spacing along a very coarse axis is as fine as the plan's or finer."""

LEAST_SLICES = 8
LEAST_PATCH = 8
"""Smallest side that a plan may name [pixels or voxels]."""

LARGEST_CUBE = 256
"""Side of a patch before it shrinks, where images are larger than it along all axes [voxels]."""

LEAST_BATCH = 2
SHARE_OF_VOXELS = 0.05
MOST_FEATURES = 10
MOST_DEPTHS = 6

MAPS = 11
"""Values that are kept for the backward pass for each feature of each voxel at each depth of the dynamic U-Net.

Counted with PyTorch's hooks on saved tensors: 10.0, and 11.0 with residual units, for patches and depths of all kinds.
"""

MEMORY_GB = 8.0
"""For one step, unless somebody says otherwise: a graphics card of 11 GB with room for the rest."""


@dataclass(frozen=True)
class Topology:
    """A patch and the network that goes with it."""

    patch: tuple[int, ...]
    channels: tuple[int, ...]
    bytes_per_patch: int
    """Kept for the backward pass of one patch, in float32."""


def configured(plan: Plan, fingerprint: Fingerprint, memory_gb: float = MEMORY_GB) -> Plan:
    """``plan`` with network, spacing, patch, channels and batch as the fingerprint of its images asks for.

    Parameters
    ----------
    plan
        Segments; the first number of its ``task.channels`` stays, and so does everything that is not named above.
    memory_gb
        What one training step may take at a site [10^9 bytes].

    Raises
    ------
    FederadError
        P241 if the fingerprint is of too few patients; P103 if the plan's other keys contradict what was derived.
    """
    spacing, size = target_spacing(fingerprint), fingerprint.medians("size")
    native = fingerprint.medians("spacing_mm")
    voxels = [max(1, round(n * old / new)) for n, old, new in zip(size, native, spacing, strict=True)]
    planar = voxels[0] < LEAST_SLICES
    grid, sides = list(spacing[planar:]), voxels[planar:]  # in 2-D without the slices' axis
    chosen = fitting(grid, sides, plan, memory_gb * 1e9)
    tables: dict[str, Any] = json.loads(plan.canonical_json())
    tables["task"] |= {"network": "dynunet", "channels": list(chosen.channels)}
    tables["data"] |= {
        "dimensions": 2 if planar else 3,
        "spacing_mm": grid,
        "patch": list(chosen.patch),
    }
    if plan.privacy is None:
        everything = fingerprint.n_patients * math.prod(voxels)
        batch = batch_size(chosen, memory_gb * 1e9, everything)
        samples = max(1, round(plan.training.samples_per_patient * batch / plan.training.batch_size))
        tables["training"] |= {"batch_size": batch, "samples_per_patient": samples}
    return Plan.from_tables(tables, name=f"{plan.name}, configured")


def target_spacing(fingerprint: Fingerprint) -> tuple[float, float, float]:
    """The spacing to which images are brought, along (z, y, x) [mm]."""
    spacing, size = list(fingerprint.medians("spacing_mm")), fingerprint.medians("size")
    coarse = max(range(3), key=lambda axis: spacing[axis])
    others = [axis for axis in range(3) if axis != coarse]
    is_coarse = all(spacing[coarse] > VERY_ANISOTROPIC * spacing[axis] for axis in others)
    if is_coarse and all(VERY_ANISOTROPIC * size[coarse] < size[axis] for axis in others):
        finer = fingerprint.quantile(f"spacing_mm.{AXES[coarse]}", COARSE_SHARE)
        spacing[coarse] = max(finer, *(spacing[axis] for axis in others))
    z, y, x = spacing
    return z, y, x


def fitting(spacing_mm: Sequence[float], voxels: Sequence[int], plan: Plan, memory: float) -> Topology:
    """The largest patch of which :data:`LEAST_BATCH` fit the memory [bytes], and its depths.

    Parameters
    ----------
    spacing_mm, voxels
        Spacing, and size of the median image on it, along ``([z,] y, x)``.
    """
    side_mm = LARGEST_CUBE * math.prod(spacing_mm) ** (1 / len(spacing_mm))
    wanted = [max(LEAST_PATCH, min(n, round(side_mm / mm))) for n, mm in zip(voxels, spacing_mm, strict=True)]
    while True:
        found = _topology(wanted, spacing_mm, plan)
        if LEAST_BATCH * found.bytes_per_patch <= memory:
            return found
        steps = halvings(found.patch, spacing_mm, MOST_DEPTHS - 1)
        able = [axis for axis, n in enumerate(found.patch) if n - steps[axis] >= LEAST_PATCH]
        if not able:
            return found
        widest = max(able, key=lambda axis: (found.patch[axis] / voxels[axis], found.patch[axis]))
        wanted = list(found.patch)
        wanted[widest] -= steps[widest]


def batch_size(chosen: Topology, memory: float, all_voxels: float) -> int:
    """Patches in a step: what the memory [bytes] holds, and at most a share of all voxels; at least :data:`LEAST_BATCH`."""
    by_memory = int(memory // chosen.bytes_per_patch)
    by_share = int(SHARE_OF_VOXELS * all_voxels / math.prod(chosen.patch))
    return min(4096, max(LEAST_BATCH, min(by_memory, by_share)))


def derived(plan: Plan) -> dict[str, Any]:
    """What :func:`configured` has written into a plan, by key."""
    found: dict[str, Any] = {
        "data.dimensions": plan.data.dimensions,
        "data.spacing_mm": list(plan.data.spacing_mm or ()),
        "data.patch": list(plan.data.patch),
        "task.channels": list(plan.task.channels),
    }
    if plan.privacy is None:
        found["training.batch_size"] = plan.training.batch_size
    return found


def write_plan(path: Path, plan: Plan, comment: str) -> None:
    """A plan as a TOML file that reads back as the same plan, its hash included.

    Raises
    ------
    FederadError
        P242 if there is something already, or if it cannot be written.
    """
    tables = json.loads(plan.canonical_json())
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(f"# {comment}\n{tomli_w.dumps(tables)}")
    except OSError as error:
        raise FederadError(
            "P242",
            happened=f"{path} cannot be written ({error.strerror}).",
            because="The configured plan goes there, and nothing is overwritten.",
            remedies=("name a file that is not there yet",),
        ) from None


def step_bytes(plan: Plan) -> int:
    """What a step of a plan with the dynamic U-Net keeps for its backward pass [bytes]."""
    each = _bytes(plan.data.patch, plan.data.spacing_mm, plan.task.channels)
    return plan.training.batch_size * each


def _topology(wanted: Sequence[int], spacing_mm: Sequence[float], plan: Plan) -> Topology:
    """The patch, made large enough to be halved as often as it may be, and the depths that follow."""
    steps = halvings(wanted, spacing_mm, MOST_DEPTHS - 1)
    patch = tuple(step * math.ceil(n / step) for n, step in zip(wanted, steps, strict=True))
    depths = depths_of(patch, spacing_mm, MOST_DEPTHS)
    n_depths = max(2, sum(1 for depth in depths[1:] if max(depth.stride) > 1) + 1)
    first = plan.task.channels[0]
    channels = tuple(min(first * 2**depth, first * MOST_FEATURES, 1024) for depth in range(n_depths))
    return Topology(patch, channels, _bytes(patch, spacing_mm, channels))


def _bytes(patch: Sequence[int], spacing_mm: Sequence[float] | None, channels: Sequence[int]) -> int:
    side, values = list(patch), 0
    for depth, features in zip(depths_of(patch, spacing_mm, len(channels)), channels, strict=True):
        side = [n // stride for n, stride in zip(side, depth.stride, strict=True)]
        values += features * math.prod(side)
    return 4 * MAPS * values
