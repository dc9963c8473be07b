"""A model of 577 MB through a real consortium on this machine: the peak memory of each of its processes.

``python -m tests.benchmarks.deployment [--sites N]``. Needs nginx, some minutes and 6 GB for each site. The model is
large and its work small: two slices of six patients, one round. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

PLAN = """\
name = "large"
rounds = 1

[task]
kind = "segmentation"
labels = ["background", "lesion"]
network = "unet"
channels = [64, 1024, 1024]
residual_units = 8

[data]
modality = "MR"
dimensions = 2
spacing_mm = [4.0, 4.0]
patch = [16, 16]

[training]
batch_size = 4
samples_per_patient = 1
optimizer = "sgd"

[strategy]
minimum_sites = 1

[simulation]
patients = 6
slices = 2
"""

PROCESSES = {
    "flwr-serverapp": "ServerApp",
    "flower-superlink": "SuperLink",
    "flower-superexec": "SuperExec of the server",
    "serve-consortium": "consortium service",
    "nginx": "nginx",
    "client.cli station": "station",
    "client.cli courier": "courier",
    "import supernode": "SuperNode",
    "flower_superexec": "SuperExec of the site",
    "client.guard import main": "ClientApp",
}
"""What the command line of a process has in it, and what the process is called."""

LOOK_S = 0.1
"""Pause between two looks at the processes [s]."""


def n_megabytes() -> float:
    """The size of the model's weights."""
    import torch

    from shared_models.plan import Plan
    from shared_models.task import task_for

    with torch.device("meta"):
        network = task_for(Plan.from_toml(PLAN)).build_network()
    return sum(array.numel() * array.element_size() for array in network.state_dict().values()) / 1e6


def look(process: psutil.Process, peaks: dict[str, float]) -> None:
    """Note the resident memory of everything below a process, where it is more than before [MB]."""
    try:
        children = process.children(recursive=True)
    except psutil.Error:
        return
    for child in children:
        try:
            line, resident = " ".join(child.cmdline()), child.memory_info().rss / 1e6
        except psutil.Error:
            continue
        if (name := next((name for word, name in PROCESSES.items() if word in line), None)) is not None:
            peaks[name] = max(peaks.get(name, 0.0), resident)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sites", type=int, default=1)
    n_sites = parser.parse_args().sites
    with tempfile.TemporaryDirectory() as folder:
        plan, out = Path(folder) / "large.toml", Path(folder) / "out"
        plan.write_text(PLAN)
        command = [sys.executable, "-m", "simulation.cli", "run", str(plan), "--sites", str(n_sites)]
        command += ["--engine", "deployment", "--no-compare", "--workers", "1", "--out", str(out)]
        peaks: dict[str, float] = {}
        began = time.monotonic()
        with subprocess.Popen(command, stdout=sys.stderr) as process:
            watched = psutil.Process(process.pid)
            while process.poll() is None:
                look(watched, peaks)
                time.sleep(LOOK_S)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
        result = json.loads((out / "result.json").read_text())
    for name, peak in sorted(peaks.items(), key=lambda pair: -pair[1]):
        print(f"{peak:8.0f} MB  {name}")
    row = {
        "model_mb": round(n_megabytes()),
        "sites": n_sites,
        "seconds": round(time.monotonic() - began),
        "peak_mb": {name: round(peak) for name, peak in peaks.items()},
        "weights_sha256": result["weights_sha256"],
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
