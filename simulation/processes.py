"""Worker processes: started clean, one thread each, able to be counted on in tests."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing.connection import wait

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of glibc's ``mallopt`` (malloc.h)."""

LARGEST_BLOCK = 2**30
"""Blocks up to this size are kept for the next step [bytes]."""


def process_pool(n_workers: int) -> ProcessPoolExecutor:
    """A pool of ``n_workers`` persistent processes with one computing thread each.

    They come from a fork server that has imported what they need: a plain fork of a process with threads can lock up,
    and a fresh interpreter for each worker would import torch again.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["simulation.preload"])
    return ProcessPoolExecutor(n_workers, mp_context=context, initializer=start_worker)


def start_worker() -> None:
    """One computing thread, and Ctrl-C left to the parent, which lets the work in hand end.

    A parent that is killed cannot end its workers, and a worker's pipe stays open while another worker lives; so each
    looks for itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    one_thread()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        wait([parent.sentinel])
        os._exit(1)


def one_thread() -> None:
    """One computing thread in this process: sums come out the same in every engine, and workers share the processors.

    Freed memory stays with the process, since a training step takes the same blocks again and again and getting them from
    the system each time costs about a tenth of its CPU time.
    """
    import torch

    torch.set_num_threads(1)
    with suppress(OSError, AttributeError):  # where the C library is not glibc
        libc = ctypes.CDLL("libc.so.6")
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(option, LARGEST_BLOCK)
