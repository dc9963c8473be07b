"""Stations of emulated or research sites: made from folders, reopened in any process, unreliable on request."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from client.data.cohort import Cohort
from client.own import FOLDER as OWN
from client.site import SiteConfig
from client.station import Station
from shared_models.errors import FederadError
from shared_models.messages import decode_ask
from shared_models.plan import Plan, SimulationTable
from shared_models.seeds import derive, generator
from simulation.processes import one_thread, process_pool


@dataclass(frozen=True)
class SiteFolder:
    """A site of a simulation: where its images lie and where its station lives."""

    name: str
    data: Path
    station: Path


def prepare_stations(
    plan: Plan, sites: list[SiteFolder], *, seed: int, workers: int, on_site: Callable[[str], None], train: bool = True
) -> None:
    """Make every site's station and let it approve the plan, sites in parallel; ``on_site`` is told each that is ready.

    Sites that are measured alone (``train`` is False) prepare their images and approve nothing.

    Raises
    ------
    FederadError
        Whatever a station raises (C140 to C143), with the site's name in front.
    """
    if workers == 1:
        for site in sites:
            on_site(_prepare(plan, site, seed, train))
        return
    with process_pool(min(workers, len(sites))) as pool:
        futures = [pool.submit(_prepare, plan, site, seed, train) for site in sites]
        for future in as_completed(futures):
            on_site(future.result())


def _prepare(plan: Plan, site: SiteFolder, seed: int, train: bool) -> str:
    secret = b"".join(derive(seed, site.name, "secret", part).to_bytes(8, "big") for part in range(4))
    config = SiteConfig(name=site.name, data=str(site.data), emulated=True)
    station = Station.create(site.station, config, secret=secret)
    try:
        if train:
            station.approve(plan)
        else:
            station.prepare(plan)
    except FederadError as error:
        raise FederadError(
            error.code, happened=f"{site.name}: {error.happened}", because=error.because, remedies=error.remedies
        ) from None
    return site.name


def forget_history(station: Path) -> None:
    """Let an emulated station begin anew, with its images still prepared: no real one can."""
    for path in (*station.glob("ledger.*"), *station.glob("audit.*")):
        path.unlink()
    for folder in ("answers", OWN):
        shutil.rmtree(station / folder, ignore_errors=True)
    open_station.cache_clear()


@lru_cache(maxsize=4096)
def open_station(folder: Path) -> Station:
    """The station in ``folder``, opened once in each process."""
    one_thread()
    return Station(folder)


class SiteUnavailableError(Exception):
    """An emulated site that is away; Flower turns it into an error without the station being asked."""


class UnreliableStation:
    """A station that joins late, drops out or answers slowly, as ``[simulation]`` says.

    Parameters
    ----------
    station
        The real one.
    joins_late
        Whether it is one of the plan's late joiners.
    """

    def __init__(self, station: Station, table: SimulationTable, *, joins_late: bool) -> None:
        self._station, self._table, self._joins_late = station, table, joins_late

    def answer(self, data: bytes) -> bytes:
        """The station's answer, perhaps late; drop-out concerns training rounds."""
        ask = decode_ask(data)
        rng = generator(ask.seed, self._station.name, ask.question.round, "reliability")
        away = rng.random() < self._table.drop_out
        if ask.question.kind == "train":
            if away or (self._joins_late and ask.question.round < self._table.late_round):
                raise SiteUnavailableError
            time.sleep(self._table.delay_s * rng.random())
        return self._station.answer(data)


def station_of(plan: Plan, folders: list[Path], partition: int) -> Station | UnreliableStation:
    """The station of a simulated node, as reliable as the plan says."""
    table = plan.simulation
    joins_late = partition >= len(folders) - table.late_joiners
    station = open_station(folders[partition])
    if not (table.drop_out or table.delay_s or joins_late):
        return station
    return UnreliableStation(station, table, joins_late=joins_late)


def cohort_of(site: SiteFolder, plan: Plan) -> Cohort:
    """The cohort that a site prepared for ``plan``."""
    return open_station(site.station).cohort(plan)
