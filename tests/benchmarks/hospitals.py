"""Sites for the benchmarks: one emulated hospital, prepared once, behind any number of names.

``python -m tests.benchmarks.hospitals FOLDER`` prepares it in a process of its own, so that no engine's peak memory
holds it.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from client.site import SiteConfig
from shared_models.plan import Plan
from simulation.consortium import emulate
from simulation.processes import one_thread
from simulation.stations import SiteFolder, prepare_stations

PLAN = """
name = "bench"
rounds = 4
[task]
kind = "segmentation"
labels = ["background", "lesion"]
network = "unet"
channels = [16, 32, 64, 128, 128]
residual_units = 2
[data]
modality = "MR"
dimensions = 2
spacing_mm = [2.0, 2.0]
patch = [64, 64]
split = { train = 0.8, validation = 0.0, test = 0.2 }
[training]
batch_size = 8
samples_per_patient = 8
optimizer = "sgd"
learning_rate = 1e-2
[strategy]
minimum_sites = 1
[simulation]
patients = 10
slices = 4
"""
"""About 64 patches of 64 x 64 at each site and a round; a U-Net of 0.9 M parameters."""


def bench_plan() -> Plan:
    """The plan of all engine rows."""
    return Plan.from_toml(PLAN)


def make_original(folder: Path) -> Path:
    """The one prepared station, with its hospital."""
    one_thread()
    plan, station = bench_plan(), folder / "original"
    (hospital,) = emulate(plan, n_sites=1, folder=folder / "hospitals", seed=0, workers=1, progress=None)
    prepare_stations(
        plan, [SiteFolder("original", hospital.folder, station)], seed=0, workers=1, on_site=lambda _: None
    )
    return station


def make_sites(folder: Path, n_sites: int) -> list[Path]:
    """``n_sites`` stations, copies of the one in ``folder`` under names of their own."""
    stations = []
    for i in range(n_sites):
        station = folder / f"site-{i}"
        shutil.rmtree(station, ignore_errors=True)
        shutil.copytree(folder / "original", station)
        SiteConfig(name=f"site-{i}", data=str(folder), emulated=True).save(station)
        stations.append(station)
    return stations


if __name__ == "__main__":
    print(json.dumps({"station": str(make_original(Path(sys.argv[1])))}))
