"""Small releases that are real in everything but what they have learned."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from server.registry import Registry
from server.rounds import Measured, RoundRecord
from shared_models.plan import Plan
from shared_models.release import Release
from shared_models.task import task_for
from shared_models.weights import Weights, initial_weights, weights_sha256

CONSORTIUM = "Brain MRI Network"


def plan_of(name: str = "lesions", *, dimensions: int = 2, channels: tuple[int, ...] = (4, 8, 16), **tables) -> Plan:
    """A plan with a network of a few thousand parameters; ``tables`` add keys to its tables."""
    basis = {
        "name": name,
        "rounds": 3,
        "task": {"kind": "segmentation", "labels": ["background", "lesion"], "network": "unet", "channels": channels},
        "data": {"modality": "MR", "dimensions": dimensions, "patch": [32] * dimensions},
    }
    return Plan.from_tables({**basis, **{key: {**basis.get(key, {}), **table} for key, table in tables.items()}})


def weights_for(plan: Plan, seed: int = 0) -> Weights:
    """Weights of the plan's network, none of them zero or one as they are before training."""
    rng = np.random.default_rng(seed)
    fresh = initial_weights(task_for(plan).build_network, seed)
    return {
        name: array + np.float32(0.1) * rng.standard_normal(array.shape, np.float32) for name, array in fresh.items()
    }


def records_of(weights: Weights) -> list[dict]:
    """A journal's records of three rounds, the second of which has these weights."""
    rounds = [
        RoundRecord(
            number,
            replied=["north", "south"] if number > 1 else ["north"],
            missing=[] if number > 1 else ["south"],
            training_loss=1 / number,
            validation={"dice": 0.5, "hd95_mm": 9.0},
            per_site={"north": {"dice": 0.6, "hd95_mm": 8.0}, "south": {"dice": 0.4, "hd95_mm": 10.0}},
            weights_sha256=weights_sha256(weights) if number == 2 else f"{number}" * 64,
        )
        for number in (1, 2, 3)
    ]
    return [asdict(record) for record in rounds]


MEASURED = Measured(
    mean={"dice": 0.55, "hd95_mm": 8.5},
    per_site={"north": {"dice": 0.6, "hd95_mm": 8.0}, "south": {"dice": 0.5, "hd95_mm": 9.0}},
    patients={"north": 4, "south": 3},
)


def publish(
    folder: Path,
    key: Ed25519PrivateKey,
    plan: Plan | None = None,
    *,
    run: str = "lesions-1",
    seed: int = 0,
    cost: dict[str, dict[str, float]] | None = None,
) -> Release:
    """Release weights drawn with ``seed``."""
    plan = plan or plan_of()
    weights = weights_for(plan, seed)
    return Registry(folder).publish(
        plan, run, weights, records_of(weights), MEASURED, key, consortium=CONSORTIUM, cost=cost
    )
