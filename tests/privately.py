"""A plan with privacy over the emulated hospitals' data, and questions of its rounds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from client.station import Station
from shared_models.messages import Answer, Ask, Question, asked_sha256, decode_answer, encode_ask
from shared_models.moments import Discriminator
from shared_models.plan import WITHOUT_PRIVACY_ONLY, Plan
from shared_models.task import task_for
from shared_models.weights import initial_weights, weights_sha256

TWO_STEPS = {
    "noise_multiplier": 1.0,
    "patients_per_step": 2,
    "steps_per_round": 2,
    "metrics_every": 1,
    "metrics_noise": 5.0,
}
"""A table ``[privacy]`` for a short run that tells what it measures in each round."""


def private(plan: Plan, privacy: Mapping[str, Any], *, rounds: int = 3, **tables: Mapping[str, Any]) -> Plan:
    """The same plan with ``[privacy]``; ``tables`` change keys of its other tables, or add such."""
    changed = json.loads(plan.canonical_json()) | {"rounds": rounds, "privacy": dict(privacy)}
    for key in WITHOUT_PRIVACY_ONLY:
        changed["training"].pop(key, None)
    changed["strategy"]["release"] = "last"
    for name, table in tables.items():
        changed[name] = changed.get(name, {}) | table
    return Plan.from_tables(changed)


def ask_of(plan: Plan, round_: int = 1, kind: str = "train", run: str = "run-1", seed: int = 0) -> Ask:
    """A question about fresh weights drawn with ``seed``."""
    weights = initial_weights(task_for(plan).build_network, seed)
    return Ask(Question(run, round_, kind, plan.sha256, weights_sha256(weights)), 0, weights)


def with_discriminator(ask: Ask, n_scanners: int = 2) -> Ask:
    """The same question, with a discriminator that nobody has trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        arrays = Discriminator(n_scanners).as_arrays()
    question = replace(ask.question, weights_sha256=asked_sha256(ask.weights, {}, arrays))
    return replace(ask, question=question, discriminator=arrays)


def answered(station: Station, ask: Ask) -> Answer:
    """What a station answers."""
    return decode_answer(station.answer(encode_ask(ask)))
