"""What goes wrong in one installation of federad: Python imports this at the start of every process of it.

Beside this file lies ``sabotage.json``, which a test writes and takes away while the processes run; without it everything
is as it should be. The code that is tested stays as it is, around a single call that is disturbed.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
WISHES = HERE / "sabotage.json"
KILLS = {
    "server.accumulator": ["ExactMean.add"],
    "server.journal": ["encode", "_sync_folder", "Journal.amend", "Journal.keep_only"],
}
"""Calls at which a process can be killed: ``{"kill": "server.journal:encode", "call": 2}``."""

asked = []
"""What the station of this process is answering, last."""


def wanted() -> dict:
    """What is to go wrong now."""
    try:
        return json.loads(WISHES.read_text())
    except (OSError, ValueError):
        return {}


# Killed at a call ------------------------------------------------------------------------------------------------------


def kill_at(module, name: str) -> None:
    """Make ``module.name`` end the process without a chance to clean up, when that is wanted."""
    holder = module
    *outer, last = name.split(".")
    for part in outer:
        holder = getattr(holder, part)
    call, place, n_calls = getattr(holder, last), f"{module.__name__}:{name}", 0

    def watched(*args, **kwargs):
        nonlocal n_calls
        wish = wanted()
        if wish.get("kill") == place:
            n_calls += 1
            if n_calls == wish.get("call", 1):
                WISHES.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    setattr(holder, last, watched)


# A site that misbehaves ------------------------------------------------------------------------------------------------


def not_a_number(answer):
    return with_largest(answer, lambda a: a * float("nan"))


def another_shape(answer):
    return with_largest(answer, lambda a: a.reshape(-1))


def with_largest(answer, change):
    name = max(answer.update, key=lambda key: answer.update[key].size)
    return replace(answer, update=dict(answer.update) | {name: change(answer.update[name].copy())})


def extra_tensor(answer):
    import numpy as np

    return replace(answer, update=dict(answer.update) | {"extra": np.zeros(3, np.float32)})


def thousandfold(answer):
    return replace(answer, update={name: 1000 * array for name, array in answer.update.items()})


def oversize(answer):
    """Longer than Flower's own channel takes: it travels as a parcel."""
    import numpy as np

    return replace(answer, update=dict(answer.update) | {"ballast": np.zeros(20 * 2**20, np.float32)})


ANSWERS = {
    "not a number": not_a_number,
    "another shape": another_shape,
    "extra tensor": extra_tensor,
    "1000 x norm": thousandfold,
    "oversize": oversize,
}


def disturb_station(module) -> None:
    """Behind the gate: what the station made is changed before it leaves.

    ``{"rounds": {"1": "not a number", "2": {"slow_s": 20}, "3": {"step_s": 0.1}, "4": "out of memory"}}``
    """
    answer = module.Station.answer

    def disturbed(self, data):
        from shared_models.messages import decode_answer, decode_ask, encode_answer

        question = decode_ask(data).question
        asked[:] = [question]
        wish = wish_for(question)
        if isinstance(wish, dict):
            time.sleep(wish.get("slow_s", 0))
        reply = answer(self, data)
        kept = HERE / f"answer-{question.run}"
        if question.kind == "train" and not kept.exists():
            kept.write_bytes(reply)
        if wish == "a replay":
            return kept.read_bytes()
        if wish == "noise":
            return os.urandom(4096)
        return encode_answer(ANSWERS[wish](decode_answer(reply))) if wish in list(ANSWERS) else reply

    module.Station.answer = disturbed


def wish_for(question):
    return wanted().get("rounds", {}).get(str(question.round)) if question.kind == "train" else None


def disturb_device(module) -> None:
    """The device fails, or is slow, in the middle of a step."""
    import torch

    backward = torch.Tensor.backward

    def disturbed(self, *args, **kwargs):
        wish = wish_for(asked[0]) if asked else None
        if wish == "out of memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if wish == "device lost":
            raise torch.AcceleratorError("CUDA error: unspecified launch failure", 719)
        if isinstance(wish, dict):
            time.sleep(wish.get("step_s", 0))
        return backward(self, *args, **kwargs)

    torch.Tensor.backward = disturbed


def other_version(module) -> None:
    """Messages of a version to come."""
    module.PROTOCOL = wanted().get("protocol", module.PROTOCOL)


# Where it is put in ----------------------------------------------------------------------------------------------------

AFTER = {
    "client.station": disturb_station,
    "client.training": disturb_device,
    "shared_models.consortium": other_version,
    **{
        module: lambda loaded, names=names: [kill_at(loaded, name) for name in names] for module, names in KILLS.items()
    },
}


class Afterwards(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads a module as everybody does, and changes it afterwards."""

    def __init__(self) -> None:
        self._looking = False
        self._loaders = {}

    def find_spec(self, name, path=None, target=None):
        if name not in AFTER or self._looking:
            return None
        self._looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._looking = False
        if spec is not None:
            self._loaders[name], spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self._loaders[spec.name].create_module(spec)

    def exec_module(self, module):
        self._loaders[module.__name__].exec_module(module)
        AFTER[module.__name__](module)


sys.meta_path.insert(0, Afterwards())
