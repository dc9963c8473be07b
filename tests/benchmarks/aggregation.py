"""Adding up replies of a 30 M-parameter model, against one pass over memory; prints one JSON line.

``python -m tests.benchmarks.aggregation ours|flower N``. Each reply is decoded, its norm checked and added up, as in a run.
One memory pass is the time to copy a reply's numbers once. Peak memory is counted without the replies themselves.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch

from server.accumulator import ExactMean
from shared_models.messages import Answer, Question, decode_answer, encode_answer
from shared_models.weights import norm_of
from simulation.processes import one_thread

N_PARAMETERS = 30_000_000
SHAPES = {f"layer.{i}": (1000, 1000) for i in range(N_PARAMETERS // 1_000_000)}
DISTINCT = 2
"""Different replies made; they are used in turn, so that twenty need the memory of two."""


def updates() -> list[dict[str, np.ndarray]]:
    """Random updates."""
    rng = np.random.default_rng(0)
    return [
        {name: rng.standard_normal(shape, np.float32) * np.float32(1e-3) for name, shape in SHAPES.items()}
        for _ in range(DISTINCT)
    ]


def timed(work: Callable[[], object], repeats: int = 3) -> float:
    """Median CPU seconds of ``work``."""
    seconds = []
    for _ in range(repeats):
        since = time.process_time()
        work()
        seconds.append(time.process_time() - since)
    return median(seconds)


def memory_pass(n_replies: int) -> float:
    """CPU seconds to copy ``n_replies`` replies once."""
    source = next(iter(updates()))
    target = {name: np.empty_like(array) for name, array in source.items()}

    def copy() -> None:
        for _ in range(n_replies):
            for name, array in source.items():
                np.copyto(target[name], array)

    copy()
    return timed(copy)


def status_mb(field: str) -> float:
    """A line of this process's memory accounts."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def extra_peak_mb(work: Callable[[], object]) -> float:
    """How far memory rises above what is held before ``work``; what was freed by then is given back first."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
    work()
    return status_mb("VmHWM") - before


def ours(n_replies: int) -> dict[str, float]:
    """Decode, check and add up, one reply at a time."""
    question = Question("run", 1, "train", "0" * 64, "0" * 64)
    replies = [
        encode_answer(Answer(f"site-{i}", question, update=u, counts={"trained": 40})) for i, u in enumerate(updates())
    ]

    def each() -> Iterator[bytes]:
        for i in range(n_replies):
            yield replies[i % DISTINCT]

    def add_up() -> None:
        mean = ExactMean(SHAPES)
        for data in each():
            answer = decode_answer(data)
            mean.add(answer.update, answer.counts["trained"], norm_of(answer.update))
        mean.mean()

    return {"extra_peak_mb": extra_peak_mb(add_up), "cpu_s": timed(add_up)}


def flower(n_replies: int) -> dict[str, float]:
    """Flower's ``aggregate_arrayrecords``, which wants all replies at once."""
    from flwr.app import ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    records = [ArrayRecord({n: torch.from_numpy(a) for n, a in u.items()}) for u in updates()]
    contents = [
        RecordDict({"arrays": records[i % DISTINCT], "metrics": MetricRecord({"num-examples": 40})})
        for i in range(n_replies)
    ]

    def add_up() -> None:
        aggregate_arrayrecords(contents, "num-examples")

    return {"extra_peak_mb": extra_peak_mb(add_up), "cpu_s": timed(add_up)}


def main() -> None:
    which, n_replies = sys.argv[1], int(sys.argv[2])
    one_thread()
    measured = {"ours": ours, "flower": flower}[which](n_replies)
    floor = memory_pass(n_replies)
    print(
        json.dumps(
            {
                "aggregation": which,
                "replies": n_replies,
                **measured,
                "memory_pass_cpu_s": floor,
                "ratio": measured["cpu_s"] / floor,
            }
        )
    )


if __name__ == "__main__":
    main()
