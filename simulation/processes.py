"""Worker processes: started clean, one thread each, able to be counted on in tests."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor


def process_pool(n_workers: int) -> ProcessPoolExecutor:
    """A pool of ``n_workers`` persistent processes with one computing thread each.

    They come from a fork server that has imported what they need: a plain fork of a process with threads can lock up,
    and a fresh interpreter for each worker would import torch again.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["simulation.preload"])
    return ProcessPoolExecutor(n_workers, mp_context=context, initializer=_one_thread)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
