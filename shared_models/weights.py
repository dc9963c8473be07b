"""Weights of a network as named arrays, and their form on the wire and on disk.

The form is safetensors (huggingface/safetensors, format 1): a JSON header with names, shapes, dtypes and a little text,
then the numbers, little-endian. It holds nothing that could be executed. Reading here makes no copy: arrays are views
into the bytes that arrived.

Only parameters travel. Buffers do not: the networks of this project keep no running statistics.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.dlpack import from_dlpack

from shared_models.errors import FederadError
from shared_models.seeds import derive

Weights = dict[str, NDArray[np.float32]]
"""Parameter name to array, in the order in which the network declares them."""

TEXT_KEY = "federad"
"""The one key of the header's text: a single key, because the library does not keep the order of several."""

MAX_HEADER_BYTES = 16 * 2**20
"""Longest header that :func:`decode` reads [bytes]; a network of 100,000 tensors needs about 10 MB."""


def weights_of(network: nn.Module) -> Weights:
    """Copies of all parameters of ``network``, float32, on the CPU."""
    return {name: p.detach().to("cpu", torch.float32, copy=True).numpy() for name, p in network.named_parameters()}


def load_weights(network: nn.Module, weights: Mapping[str, NDArray[np.float32]]) -> None:
    """Copy ``weights`` into the parameters of ``network``.

    Raises
    ------
    FederadError
        M210 if a name is missing, unknown, or has another shape; the network is left untouched.
    """
    parameters = dict(network.named_parameters())
    if mismatch := difference(weights, {name: tuple(p.shape) for name, p in parameters.items()}):
        raise FederadError(
            "M210",
            happened=f"The weights do not fit the network: {mismatch}.",
            because="They belong to another plan or another version of federad.",
            remedies=("check that the plan names the network these weights were trained with",),
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(from_dlpack(weights[name]))


def difference(weights: Mapping[str, NDArray[np.float32]], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The first way in which names, shapes or dtypes differ, in words; None if they agree."""
    for name in shapes:
        if name not in weights:
            return f"{name} is missing"
    for name, array in weights.items():
        if name not in shapes:
            return f"{name} is unknown"
        if array.shape != tuple(shapes[name]):
            return f"{name} has shape {array.shape} instead of {tuple(shapes[name])}"
        if array.dtype != np.float32:
            return f"{name} has dtype {array.dtype} instead of float32"
    return None


def initial_weights(build: object, seed: int) -> Weights:
    """Weights of a freshly built network, depending on ``seed`` alone; ``build`` is called without arguments."""
    if not callable(build):
        raise TypeError("build must be callable")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "initial weights"))
        return weights_of(build())


def averaged(average: Weights | None, weights: Weights, number: int, decay: float) -> Weights:
    """The exponential moving average after one more round, corrected for its start (Kingma and Ba 2015, section 3).

    Parameters
    ----------
    average
        After ``number - 1`` rounds; None before the first.
    weights
        After round ``number``, which counts from 1.
    decay
        Share of the average that stays, above 0 and below 1.
    """
    if average is None:
        return weights
    share = (1 - decay) / (1 - decay**number)
    return {
        name: (old + share * (weights[name].astype(np.float64) - old)).astype(np.float32)
        for name, old in average.items()
    }


def norm_of(values: Mapping[str, NDArray[np.float32] | float]) -> float:
    """L2 norm over all values together; not finite if any of them is not, or beyond the range of float32."""
    return math.hypot(*(float(np.linalg.norm(value)) for value in values.values()))


def weights_sha256(weights: Mapping[str, NDArray[np.float32]]) -> str:
    """SHA-256 over names, shapes and values, 64 hex digits; independent of the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(_named(name, weights[name].shape))
        digest.update(np.ascontiguousarray(weights[name]).data)
    return digest.hexdigest()


@lru_cache(maxsize=2**16)
def _named(name: str, shape: tuple[int, ...]) -> bytes:
    """What stands before an array's values where they are hashed; a run asks for the same ones all the time."""
    return json.dumps([name, list(shape)]).encode()


def encode(weights: Mapping[str, NDArray[np.float32]], text: str) -> bytes:
    """Safetensors bytes with ``text`` in the header; the same input gives the same bytes."""
    arrays = {name: np.asarray(array, "<f4", order="C") for name, array in weights.items()}
    return bytes(safetensors.numpy.save(arrays, {TEXT_KEY: text}))


def decode(data: bytes) -> tuple[Weights, str]:
    """Named read-only views into ``data``, and the text of its header.

    Everything about the header is checked before use, since it comes from the other side.

    Raises
    ------
    FederadError
        M211 if ``data`` is not a whole safetensors file of float32 arrays.
    """
    try:
        return _decode(data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FederadError(
            "M211",
            happened=f"A message of {len(data)} bytes cannot be read ({error or type(error).__name__}).",
            because="It is damaged, or was written by something other than federad.",
            remedies=("check that both sides run the same version of federad", "ask the other side to send it again"),
        ) from None


def _decode(data: bytes) -> tuple[Weights, str]:
    n_header = int.from_bytes(data[:8], "little")
    if len(data) < 8 or n_header > min(MAX_HEADER_BYTES, len(data) - 8):
        raise ValueError("the header is cut short")
    header = json.loads(data[8 : 8 + n_header])
    text = header.pop("__metadata__")[TEXT_KEY]
    if not isinstance(text, str):
        raise ValueError("the header's text is not text")
    body = memoryview(data)[8 + n_header :]
    weights: Weights = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, (start, stop) = entry["shape"], entry["data_offsets"]
        if entry["dtype"] != "F32":
            raise ValueError(f"an array has dtype {str(entry['dtype'])[:16]}")
        if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
            raise ValueError("an array has no proper shape")
        if start != end or stop - start != 4 * math.prod(shape) or stop > len(body):
            raise ValueError("an array lies outside the message")
        weights[name] = np.frombuffer(body[start:stop], dtype="<f4").reshape(shape)
        end = stop
    if end != len(body):
        raise ValueError("bytes are left over")
    return weights, text
