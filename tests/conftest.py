"""Shared fixtures: a small plan and small hospitals that are real in everything but size."""

from __future__ import annotations

import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from simulation.offline import stay_offline  # noqa: E402

stay_offline()

import pytest  # noqa: E402

from shared_models.plan import Plan  # noqa: E402
from simulation.processes import one_thread  # noqa: E402
from simulation.stations import SiteFolder, prepare_stations  # noqa: E402

PLANS = Path(__file__).parents[1] / "simulation" / "plans"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    one_thread()


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh folder with a path short enough for sockets in it, whatever the test is called."""
    return tmp_path_factory.mktemp("t")


@pytest.fixture
def ray_alone() -> Iterator[None]:
    """Ray for one test at a time over all processes of the suite: two clusters that start together may wait in vain."""
    with (Path(tempfile.gettempdir()) / f"federad-ray-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def smoke_plan() -> Plan:
    """Two rounds on tiny hospitals."""
    return Plan.load(PLANS / "smoke.toml")


@pytest.fixture(scope="session")
def hospitals(smoke_plan, tmp_path_factory):
    """Folders of three emulated hospitals, written once."""
    from simulation.consortium import emulate

    folder = tmp_path_factory.mktemp("hospitals")
    return emulate(smoke_plan, n_sites=3, folder=folder, seed=0, workers=1, progress=None)


@pytest.fixture
def stations(smoke_plan, hospitals, tmp_path):
    """Fresh stations of the three hospitals, which have approved the plan."""
    sites = [SiteFolder(h.name, h.folder, tmp_path / "stations" / h.name) for h in hospitals]
    prepare_stations(smoke_plan, sites, seed=0, workers=1, on_site=lambda _: None)
    return [site.station for site in sites]
