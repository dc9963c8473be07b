"""Worker processes end when their work does, however that ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

WORK = """
import os, time
from simulation.processes import process_pool

if __name__ == "__main__":
    with process_pool(2) as pool:
        busy = [pool.submit(time.sleep, 300) for _ in range(2)]
        workers = list(pool._processes)
        pool.submit(time.sleep, 0)
        print(*workers, flush=True)
        time.sleep(300)
"""


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_workers_end_with_a_parent_that_was_killed(tmp_path):
    """
    Busy or not: nothing goes on computing for a run that is gone.
    """
    script = tmp_path / "work.py"
    script.write_text(WORK)
    parent = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert len(workers) == 2
    assert all(is_alive(pid) for pid in workers)
    time.sleep(8)  # long enough for both to have started
    parent.kill()
    parent.wait()
    parent.stdout.close()

    end = time.monotonic() + 10
    while time.monotonic() < end and any(is_alive(pid) for pid in workers):
        time.sleep(0.1)
    assert not any(is_alive(pid) for pid in workers)
