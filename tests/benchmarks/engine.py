"""One engine on one number of sites, in a process of its own; prints one JSON line.

``python -m tests.benchmarks.engine in-process|flower-ray N FOLDER`` with the folder that ``hospitals`` prepared. The first
round warms up and is not counted. CPU seconds are user plus system of this process and all its children; training and
measuring are counted where they happen.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

from simulation.offline import stay_offline

stay_offline()

import psutil  # noqa: E402

from client.training import resident_trainer  # noqa: E402
from server.journal import Journal  # noqa: E402
from simulation.engine import Execution, run_rounds  # noqa: E402
from tests.benchmarks.hospitals import bench_plan, make_sites  # noqa: E402


def tree_cpu_s() -> float:
    """CPU seconds of this process and its living descendants."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def tree_pss_mb() -> float:
    """Proportional memory of this process and its descendants."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            total += process.memory_full_info().pss / 2**20
        except psutil.NoSuchProcess:
            continue
    return total


class Peak(threading.Thread):
    """Watches the memory of the whole tree while the engine runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.mb = 0.0
        self.over = False

    def run(self) -> None:
        while not self.over:
            self.mb = max(self.mb, tree_pss_mb())
            time.sleep(1.0)


def in_process(stations: list[Path], folder: Path) -> dict[str, float]:
    """Our engine with one worker: everything in this process."""
    plan = bench_plan()
    clock = resident_trainer(plan, "auto").clock
    marks: list[tuple[float, float]] = []

    def note(event: object) -> None:
        if getattr(event, "what", "") == "committed":
            marks.append((time.process_time(), sum(clock.seconds.values())))

    journal = Journal(Path(tempfile.mkdtemp(prefix="journal-", dir=folder)))
    run_rounds(plan, stations, journal, seed=0, execution=Execution(workers=1), on_progress=note)
    cpu, training = (after - before for before, after in zip(marks[0], marks[-1], strict=True))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"cpu_s": cpu, "training_cpu_s": training, "peak_mb": peak_mb, "rounds": len(marks) - 1}


def flower_ray(stations: list[Path], folder: Path) -> dict[str, float]:
    """Flower's Ray engine with its own ``FedAvg`` and array records, training with the same loop on the same sites."""
    from tests.benchmarks.flower_apps import run_flower

    watcher = Peak()
    watcher.start()
    marks = run_flower(bench_plan(), stations, tree_cpu_s)
    watcher.over = True
    (cpu_0, training_0), (cpu_1, training_1) = marks[0], marks[-1]
    return {
        "cpu_s": cpu_1 - cpu_0,
        "training_cpu_s": training_1 - training_0,
        "peak_mb": watcher.mb,
        "rounds": len(marks) - 1,
    }


def main() -> None:
    engine, n_sites, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    stations = make_sites(folder, n_sites)
    measured = {"in-process": in_process, "flower-ray": flower_ray}[engine](stations, folder)
    row = {"engine": engine, "sites": n_sites, **measured}
    row["overhead"] = (row["cpu_s"] - row["training_cpu_s"]) / row["training_cpu_s"]
    print(json.dumps(row))


if __name__ == "__main__":
    main()
