"""A whole consortium on this machine: SuperLink, nginx front, enrolled sites with keys, stations and couriers.

The operator and each hospital are what they are in earnest, started with their own commands; only that all of them listen
on the loopback interface and belong to one person. Everything is staged in one folder and taken down again::

    operator/             as ``federad-server init`` makes it
    sites/<name>/         as ``federad-site enrol`` makes it, around the station that the run prepared
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from client.folder import SiteFolder as DeployedSite
from client.processes import end, spawn
from client.station import Station
from server.journal import Journal
from server.operator import open_consortium, server_status
from server.results import measured_of
from server.rounds import Outcome, Progress, RoundRecord
from server.runs import RunFolder, order_run
from server.superlink import SuperLink
from shared_models.errors import FederadError
from shared_models.plan import Plan

UP_S = 180.0
"""How long the operator's processes may take to answer on a busy machine [s]."""

LOOK_S = 0.2
"""Pause between two looks at a run [s]."""

OVER = frozenset({"finished", "paused", "failed", "stopped"})


def run_deployed(
    plan: Plan,
    stations: list[Path],
    journal: Journal,
    *,
    seed: int,
    folder: Path,
    on_progress: Callable[[Progress], None],
) -> Outcome:
    """Stage a consortium of these stations in ``folder``, run ``plan``, take everything down.

    Raises
    ------
    FederadError
        R235 for a plan whose ``[simulation]`` emulates trouble, R236 if the consortium cannot be staged, S180 and others
        from the round loop; what was committed stands in ``journal`` then.
    """
    require_no_emulated_trouble(plan)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with short_name(folder) as root, operator(root / "operator", root / "logs") as consortium_folder:
        consortium = open_consortium(consortium_folder)
        sites = [stage_site(root / "sites" / Station(station).name, station) for station in stations]
        with ThreadPoolExecutor(len(sites)) as pool:
            invitations = [consortium.invite(site.root.name).line() for site in sites]
            list(pool.map(enrol, sites, invitations))
        run = order_run(consortium, SuperLink(consortium_folder), plan, seed, len(sites))
        run_folder = RunFolder(consortium_folder, run)
        for station in stations:
            Station(station).approve(plan)  # prepared long since; this tells the operator
        with started(sites, root / "logs"):
            try:
                follow(run_folder, lambda: consortium.run(run).state, on_progress)
                return outcome_of(run_folder)
            finally:
                keep(run_folder, journal)


@contextmanager
def operator(folder: Path, logs: Path) -> Iterator[Path]:
    """The operator's processes, up and answering."""
    logs.mkdir()
    port = free_port()
    command("server.cli", "init", str(folder), "--host", f"localhost:{port}", "--name", "staged")
    process = begin(["server.cli", "start", "--dir", str(folder)], logs / "operator.log")
    try:
        deadline = time.monotonic() + UP_S
        while not (server_status(folder) or {}).get("ready"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise not_staged("The operator's processes did not start", logs / "operator.log")
            time.sleep(LOOK_S)
        yield folder
    finally:
        end(process, grace_s=60.0)


def stage_site(root: Path, station: Path) -> DeployedSite:
    """A site's folder around a station that lies elsewhere."""
    root.mkdir(parents=True)
    site = DeployedSite(root)
    site.station.symlink_to(station)
    site.make()
    return site


def enrol(site: DeployedSite, invitation: str) -> None:
    """Join, with keys made in the site's folder."""
    command("client.cli", "enrol", invitation, "--site", str(site.root))


@contextmanager
def started(sites: list[DeployedSite], logs: Path) -> Iterator[None]:
    """Station and courier of each site; one computing thread each, as in every engine."""
    processes = []
    try:
        for site in sites:
            log = logs / f"{site.root.name}.log"
            processes.append(
                begin(["client.cli", "start", "--foreground", "--threads", "1", "--site", str(site.root)], log)
            )
        yield
    finally:
        stops = [threading.Thread(target=end, args=(process,), kwargs={"grace_s": 45.0}) for process in processes]
        for stop in stops:
            stop.start()
        for stop in stops:
            stop.join()


def follow(run: RunFolder, state: Callable[[], str], on_progress: Callable[[Progress], None]) -> None:
    """Pass on what happens until the run is over.

    Raises
    ------
    FederadError
        What ended it, if it did not finish.
    """
    known = {field.name for field in fields(Progress)} - {"metrics"}
    n_seen = 0
    while True:
        over = state() in OVER
        lines = read_lines(run.path / "events.jsonl")
        for line in lines[n_seen:]:
            event = json.loads(line)
            on_progress(Progress(**{key: event[key] for key in known if key in event}))
        n_seen = len(lines)
        if over:
            break
        time.sleep(LOOK_S)
    if state() != "finished":
        raise error_of(run)


def read_lines(path: Path) -> list[str]:
    """The whole lines of a file that is still being written; none before it is there."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    return text[: text.rfind("\n") + 1].splitlines()


def error_of(run: RunFolder) -> FederadError:
    """What ended a run, as its ServerApp wrote it down."""
    told = run.error or {}
    if told.get("error"):
        return FederadError(
            str(told["error"]),
            happened=str(told["happened"]),
            because=str(told.get("because", "")),
            remedies=tuple(told.get("remedies", ())),
        )
    return not_staged(f"The run ended: {told.get('happened', 'nobody wrote why')}", run.path / "run.log")


def outcome_of(run: RunFolder) -> Outcome:
    """What the round loop of a finished run gave, from its files."""
    result = run.result or {}
    records = [RoundRecord(**record) for record in run.records()]
    best_round = int(result["best_round"])
    return Outcome(
        records,
        best_round,
        run.journal.average(best_round) or run.journal.weights(best_round),
        run.journal.weights(records[-1].round),
        measured_of(result["test"]),
        {site: {k: v for k, v in spent.items() if k != "unit"} for site, spent in (result["privacy"] or {}).items()},
    )


def keep(run: RunFolder, journal: Journal) -> None:
    """Copy what was committed to the journal of the simulation, beside which a result is written."""
    for record in run.records():
        with contextlib.suppress(OSError):  # weights of older rounds are dropped
            kept = record["round"], record, run.journal.weights(record["round"]), run.journal.average(record["round"])
            journal.commit(*kept)
        journal.amend(record["round"], record)


@contextmanager
def short_name(folder: Path) -> Iterator[Path]:
    """The folder under a short name, since the path of a Unix socket has at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="federad-") as temporary:
        link = Path(temporary) / "f"
        link.symlink_to(folder)
        Path(temporary).chmod(0o755)
        yield link


def command(module: str, *arguments: str) -> None:
    """Run one of federad's own commands; R236 with its words if it fails."""
    line = [sys.executable, "-m", module, *arguments, "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=working_directory())  # noqa: S603
    if done.returncode:
        try:
            told = json.loads(done.stdout.strip().splitlines()[-1])["happened"]
        except (ValueError, KeyError, IndexError):
            told = done.stderr.strip()[-500:] or "it said nothing"
        raise not_staged(f"{module.removesuffix('.cli')}, asked to {arguments[0]}, failed: {told}")


def begin(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start one of federad's own commands, ended with this process however that ends."""
    with log.open("wb") as output:
        return spawn([sys.executable, "-m", *arguments], output=output, cwd=working_directory(), env=dict(os.environ))


def working_directory() -> Path:
    """Where this installation's packages are found first, also by ``-m``."""
    return Path(__file__).resolve().parent.parent


def require_no_emulated_trouble(plan: Plan) -> None:
    """R235 unless every site of the plan is there from the first round, in every round, without delay."""
    table = plan.simulation
    asked = [name for name in ("drop_out", "delay_s", "late_joiners") if getattr(table, name)]
    if asked:
        raise FederadError(
            "R235",
            happened=f"The plan emulates trouble ({', '.join(asked)} under [simulation]); a staged deployment does not.",
            because="Its sites are real processes, and would answer as they are.",
            remedies=(f"take {' and '.join(asked)} out of the plan", "or use --engine in-process"),
        )


def free_port() -> int:
    """A port that is free on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def not_staged(happened: str, log: Path | None = None) -> FederadError:
    """R236."""
    where = (f"look into {log.resolve()}",) if log is not None else ()
    return FederadError(
        "R236",
        happened=f"{happened.rstrip('.')}.",
        because="A staged deployment is a real consortium; each of its parts has to run.",
        remedies=(*where, "or use --engine in-process"),
    )
