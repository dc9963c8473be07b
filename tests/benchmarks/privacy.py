"""What privacy costs: one private step against one plain step on the same patients.

``python -m tests.benchmarks.privacy MODE NETWORK`` prints one JSON line. Both modes, ``plain`` and ``private``, see 4
patients with 4 slices each of 96 x 96 in a step, through a 2-D U-Net, that of a plan's defaults or a larger one, or through
a cascade that reconstructs them (D5-C5); the private mode draws its noise from the system. Patients are in memory, since
reading them is neither's work. After a round to warm up, CPU seconds are the median of a step, and memory is what the
process needs at the peak of a round beyond what it held before. For a true peak run it a second time with
``MALLOC_MMAP_THRESHOLD_=65536``, so that freed blocks go back at once; that costs time, so the seconds of such a run are
not used.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from client.training import Trainer
from shared_models.plan import Plan, PrivacyTable
from shared_models.volume import Volume
from shared_models.weights import weights_of

N_PATIENTS, N_SLICES, SIDE, N_STEPS = 4, 4, 96, 12

U_NET = """
kind = "segmentation"
labels = ["background", "lesion"]
network = "unet"
"""

NETWORKS = {
    "default": U_NET + "channels = [16, 32, 64, 128]\nresidual_units = 1",
    "larger": U_NET + "channels = [16, 32, 64, 128, 128]\nresidual_units = 2",
    "cascade": """
kind = "reconstruction"
network = "cascade"
channels = [32, 32, 32, 32]
cascades = 5
""",
}

PLAN = f"""
name = "bench-privacy"
rounds = 1
[task]
%s
[data]
modality = "MR"
dimensions = 2
patch = [{SIDE}, {SIDE}]
[training]
epochs = 1
batch_size = {N_PATIENTS * N_SLICES}
samples_per_patient = {N_SLICES}
optimizer = "sgd"
learning_rate = 1e-2
[strategy]
release = "last"
"""


@dataclass(frozen=True)
class _Person:
    key: str
    studies: tuple[str, ...]


class _Cohort:
    """Patients in memory, as many steps of them as are measured."""

    def __init__(self, n_patients: int, n_channels: int) -> None:
        rng = np.random.default_rng(0)
        image = rng.normal(size=(n_channels, N_SLICES, SIDE, SIDE)).astype(np.float32)
        label = np.zeros((N_SLICES, SIDE, SIDE), np.uint8)
        label[:, 30:50, 40:70] = 1
        self._volume = Volume(image, label, np.argwhere(label > 0)[::10].astype(np.int32), (1.0, 1.0, 1.0))
        self._people = [_Person(f"p{i}", (f"s{i}",)) for i in range(n_patients)]

    def patients(self, split: str) -> list[_Person]:
        return self._people if split == "train" else []

    def volume(self, study: str) -> Volume:
        return self._volume


def main(mode: str, network: str) -> None:
    torch.set_num_threads(1)
    plan = Plan.from_toml(PLAN % NETWORKS[network])
    if mode == "private":
        table = PrivacyTable(noise_multiplier=1.0, patients_per_step=N_PATIENTS, steps_per_round=N_STEPS)
        plan = plan.model_copy(update={"privacy": table})
    n_patients = N_PATIENTS if mode == "private" else N_PATIENTS * N_STEPS
    trainer, cohort = Trainer(plan, "cpu"), _Cohort(n_patients, plan.image_channels)
    weights = weights_of(trainer.network)
    stamps: list[float] = []

    def stamp(done: int, total: int) -> None:
        stamps.append(time.process_time())

    def a_round() -> None:
        stamps.clear()
        if mode == "private":
            trainer.train_private(
                weights, cohort, round_=1, declared_size=N_PATIENTS, noise_multiplier=1.0, on_progress=stamp
            )
        else:
            trainer.train(weights, cohort, seed=0, site="bench", round_=1, on_progress=stamp)

    a_round()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _memory_mb("VmRSS")
    a_round()
    row = {
        "mode": mode,
        "network": network,
        "cpu_s": statistics.median(b - a for a, b in itertools.pairwise(stamps)),
        "memory_mb": _memory_mb("VmHWM") - before,
        "parameters": sum(math.prod(array.shape) for array in weights.values()),
    }
    print(json.dumps(row))


def _memory_mb(line: str) -> float:
    """What the kernel says of this process's memory [MB]."""
    status = Path("/proc/self/status").read_text()
    return next(int(row.split()[1]) / 1024 for row in status.splitlines() if row.startswith(line))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
