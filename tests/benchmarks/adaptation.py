"""What adaptation adds to a training step.

``python -m tests.benchmarks.adaptation`` prints one JSON line. Patients in memory, from two scanners in turn, are trained
on with the demo's network and batches: plainly, with each switch, and with both. CPU seconds of a step are the least of
several rounds, taken in turn so that a busy machine disturbs all alike.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import simulation
from client.training import Trainer
from shared_models.plan import AdaptationTable, Plan
from shared_models.task import task_for
from shared_models.volume import Volume
from shared_models.weights import initial_weights

N_PATIENTS, N_ROUNDS = 8, 5

TABLES = {
    "plain": None,
    "appearance": AdaptationTable(appearance=True),
    "adversary": AdaptationTable(adversarial="scanner", warm_up=0.0),
    "predictions": AdaptationTable(adversarial="scanner", reads="predictions", warm_up=0.0),
    "both": AdaptationTable(appearance=True, adversarial="scanner", warm_up=0.0),
    "appearance and predictions": AdaptationTable(
        appearance=True, adversarial="scanner", reads="predictions", warm_up=0.0
    ),
}


@dataclass(frozen=True)
class _Person:
    key: str
    studies: tuple[str, ...]


class _Cohort:
    """Patients in memory, scanned on two scanners in turn."""

    declared_scanners = None

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        image = rng.normal(size=(1, 2, 110, 92)).astype(np.float32)
        label = np.zeros((2, 110, 92), np.uint8)
        label[:, 40:50, 40:50] = 1
        self._volume = Volume(image, label, np.argwhere(label > 0).astype(np.int32), (4.0, 2.0, 2.0))
        self._people = [_Person(f"p{i}", (str(i),)) for i in range(N_PATIENTS)]

    def patients(self, split: str) -> list[_Person]:
        return self._people if split == "train" else []

    def volume(self, study: str) -> Volume:
        return self._volume

    def scanner(self, study: str) -> str:
        return ("SIEMENS Aurora 1.5 T", "GE Vesper 3 T")[int(study) % 2]

    def is_unlabelled(self, study: str) -> bool:
        return False

    def category(self, study: str) -> None:
        return None


def main() -> None:
    torch.set_num_threads(1)
    base = Plan.load(Path(simulation.__path__[0]) / "plans" / "demo.toml")
    plans = {name: base.model_copy(update={"adaptation": table}) for name, table in TABLES.items()}
    trainers = {name: Trainer(plan, "cpu") for name, plan in plans.items()}
    weights = {name: initial_weights(task_for(plan).build_network, 0) for name, plan in plans.items()}
    n_steps = N_PATIENTS * base.training.samples_per_patient // base.training.batch_size
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    for round_ in range(1, N_ROUNDS + 2):
        for name, trainer in trainers.items():
            began = time.process_time()
            trainer.train(weights[name], _Cohort(), seed=0, site="bench", round_=round_ + 1)
            seconds[name].append((time.process_time() - began) / n_steps)
    least = {name: min(values[1:]) for name, values in seconds.items()}
    added = {name: value / least["plain"] - 1 for name, value in least.items()}
    print(json.dumps({"step_cpu_ms": {name: 1000 * value for name, value in least.items()}, "added": added}))


if __name__ == "__main__":
    main()
