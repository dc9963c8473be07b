"""A consortium of three hospitals in a town of its own, every process real, for the faults of issue to issue.

The third hospital, and the operator, use an installation in which a test can make things go wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from deployed import descendants, until
from faults.installation import Installation
from faults.town import Town, built

from client.folder import SiteFolder
from client.processes import end, spawn
from client.station import Station
from client.stub import StationAwayError, StationStub
from server.consortium import Consortium, ConsortiumConfig
from server.journal import Journal
from server.operator import server_status
from server.runs import RunFolder
from shared_models.plan import Plan
from shared_models.weights import weights_sha256
from simulation.engine import Execution, run_rounds

ROOT = Path(__file__).parents[2]
SITES = ("site-1", "site-2", "site-3")
GOOD, ODD = SITES[:2], SITES[2]
PORT = 8443


def plan_of(name: str, **tables: dict[str, Any] | int) -> tuple[Plan, str]:
    """The smoke plan under another name, with other values; the plan and its file's text."""
    plan = tomllib.loads((ROOT / "simulation" / "plans" / "smoke.toml").read_text())
    for key, value in {"name": name, **tables}.items():
        plan[key] = {**plan.get(key, {}), **value} if isinstance(value, dict) else value
    plain = [f"{key} = {json.dumps(value)}" for key, value in plan.items() if not isinstance(value, dict)]
    for table, values in plan.items():
        if isinstance(values, dict):
            plain += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    text = "\n".join(plain) + "\n"
    return Plan.from_toml(text), text


class Staged:
    """The consortium: what people type, and what they see.

    Parameters
    ----------
    folder
        Where all of it lies.
    town
        Where everybody lives; ``op`` is the operator's home.
    data
        The images of each site.
    """

    def __init__(self, folder: Path, town: Town, data: dict[str, Path]) -> None:
        self.folder, self.town, self.data = folder, town, data
        self.operator = folder / "operator"
        self.operator.mkdir()
        self.consortium = Consortium.create(
            self.operator, ConsortiumConfig(name="Test", host=town.address("op"), port=PORT)
        )
        self.odd = Installation(folder / "odd")
        self.server_odd = Installation(folder / "server-odd")
        self._sites: dict[str, subprocess.Popen[bytes]] = {}
        self._server: subprocess.Popen[bytes] | None = None

    # The operator --------------------------------------------------------------------------------------------------

    def start_server(self, **environment: str) -> None:
        """``federad-server start``, until it answers."""
        env = {**os.environ, "PYTHONPATH": str(self.server_odd.packages), **environment}
        with (self.folder / "server.log").open("ab") as log:
            words = ["server.cli", "start", "--dir", str(self.operator)]
            self._server = spawn([*self.town.at("op"), sys.executable, "-m", *words], env=env, cwd=ROOT, output=log)
        until(lambda: (server_status(self.operator) or {}).get("ready"), within_s=120)

    def server(self, *words: str, ends_with: int = 0) -> dict[str, Any]:
        """What the operator types, and what is answered."""
        command = [
            *self.town.at("op"),
            sys.executable,
            "-m",
            "server.cli",
            *words,
            "--dir",
            str(self.operator),
            "--json",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
        assert done.returncode == ends_with, (words, done.returncode, done.stdout, done.stderr)
        return json.loads(done.stdout.strip().splitlines()[-1])

    def pid_of(self, name: str) -> int:
        """A process of the operator's."""
        return int(server_status(self.operator)["processes"][name])

    def begin(
        self, plan: tuple[Plan, str], *, sites: tuple[str, ...] = SITES, wait_for: int | None = None
    ) -> RunFolder:
        """Order a run and let sites approve it."""
        path = self.folder / "plan.toml"
        path.write_text(plan[1])
        run = self.server("run", str(path), "--sites", str(wait_for or len(sites)))["run"]
        return self.approved(plan, run, sites)

    def approved(self, plan: tuple[Plan, str], run: str, sites: tuple[str, ...] = SITES) -> RunFolder:
        """Let sites say yes to a run that was ordered."""
        for name in sites:
            Station(self.site(name).station).approve(plan[0])
        return RunFolder(self.operator, run)

    def signal(self, name: str, number: signal.Signals) -> None:
        """Tell a process of the operator's something."""
        os.kill(self.pid_of(name), number)

    def state(self, run: RunFolder) -> str:
        """Where a run stands."""
        return self.consortium.run(run.run).state

    def until_committed(self, run: RunFolder, n_rounds: int, within_s: float = 120.0) -> None:
        """Wait until so many rounds are committed."""
        self.until_true(run, lambda: len(run.records()) >= n_rounds, within_s)

    def until_state(self, run: RunFolder, state: str, within_s: float = 120.0) -> None:
        """Wait until a run has come to a state."""
        self.until_true(run, lambda: self.state(run) == state, within_s)

    def until_true(self, run: RunFolder, is_true: Callable[[], bool], within_s: float = 120.0) -> None:
        """Wait for something to become true during a run, whose history tells otherwise why it did not."""
        deadline = time.monotonic() + within_s
        while not is_true():
            if time.monotonic() > deadline:
                told = [f"{e.at[11:19]} {e.what} {e.round} {e.kind} {e.site} {e.detail}" for e in run.events()]
                raise AssertionError("\n".join([f"{self.state(run)}, {len(run.records())} rounds", *told[-30:]]))
            time.sleep(0.1)

    # The hospitals -------------------------------------------------------------------------------------------------

    def site(self, name: str) -> SiteFolder:
        """A site's folder."""
        return SiteFolder(self.folder / name)

    def python(self, name: str) -> str:
        """The Python of a site's installation."""
        return str(self.odd.python) if name == ODD else sys.executable

    def site_command(self, name: str, *words: str, ends_with: int = 0) -> dict[str, Any]:
        """What somebody at a hospital types, and what is answered."""
        line = [*self.town.at(name), self.python(name), "-m", "client.cli", *words]
        command = [*line, "--site", str(self.site(name).root), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
        assert done.returncode == ends_with, (name, words, done.returncode, done.stdout, done.stderr)
        return json.loads(done.stdout.strip().splitlines()[-1])

    def join(self, name: str) -> None:
        """Enrol a site and start it."""
        line = self.consortium.invite(name).line()
        again = [] if self.site(name).is_made else ["--data", str(self.data[name])]
        self.site_command(name, "enrol", line, *again)
        self.start(name)

    def start(self, name: str, **environment: str) -> None:
        """``federad-site start``, without waiting."""
        words = ["client.cli", "start", "--foreground", "--threads", "1", "--site", str(self.site(name).root)]
        env = {**os.environ, **environment}
        with (self.folder / f"{name}.log").open("ab") as log:
            self._sites[name] = spawn(
                [*self.town.at(name), self.python(name), "-m", *words], env=env, cwd=ROOT, output=log
            )

    def stop(self, name: str) -> None:
        """End what runs at a site."""
        if (process := self._sites.pop(name, None)) is not None:
            end(process, grace_s=45.0)

    def supervisor(self, name: str) -> int:
        """The process that looks after a site's station and courier."""
        return self._sites[name].pid

    def process(self, name: str, word: str) -> int:
        """The youngest process of a site whose command line has ``word`` in it."""
        found = [pid for pid in descendants(self._sites[name].pid) if word in _command_line(pid)]
        assert found, f"nothing at {name} has {word} in its command line"
        return max(found)

    def status(self, name: str) -> dict[str, Any]:
        """What the courier says about itself; empty while it does not run."""
        try:
            return json.loads((self.site(name).courier / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def trouble(self, name: str) -> dict[str, Any]:
        """The trouble that a site's courier has; empty if it has none."""
        return self.status(name).get("trouble") or {}

    def is_connected(self, name: str) -> bool:
        """Whether the courier reaches the consortium, and the SuperNode is there."""
        status = self.status(name)
        return bool(status.get("connected")) and not status["trouble"] and status["supernode"]["running"]

    def until(self, is_true: Callable[[], bool], within_s: float = 90.0) -> None:
        """Wait for something to become true."""
        until(is_true, within_s=within_s)

    def until_connected(self, name: str) -> None:
        """Wait until a site is there again, for the operator too."""
        until(lambda: self.is_connected(name), within_s=90)

    def busy_with(self, name: str) -> dict[str, Any]:
        """The question that a station is working on; empty if on none."""
        try:
            with StationStub(self.site(name).socket) as stub:
                return stub.status()["busy"] or {}
        except (StationAwayError, OSError):
            return {}

    def until_training(self, name: str, run: RunFolder, round_: int) -> None:
        """Wait until a site trains in a round."""
        self.until_true(run, lambda: self.busy_with(name).get("round") == round_, 90)

    def audit(self, name: str, part: str = "station") -> list[dict[str, Any]]:
        """Every line of a site's audit."""
        path = self.site(name).root / part / "audit.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def n_trained(self, name: str, run: RunFolder) -> dict[int, int]:
        """How often a site trained in each round of a run, by its audit."""
        counts: dict[int, int] = {}
        for line in self.audit(name):
            if line.get("run") == run.run and line.get("kind") == "train" and line.get("again") is False:
                counts[line["round"]] = counts.get(line["round"], 0) + 1
        return counts

    # What should come of it ----------------------------------------------------------------------------------------

    def in_process(self, plan: Plan, folder: Path, *, sites: tuple[str, ...] = SITES) -> str:
        """The weights of the same plan and stations, without a network between them and without any trouble."""
        stations = [shutil.copytree(self.site(name).station, folder / name) for name in sites]
        outcome = run_rounds(plan, stations, Journal(folder / "journal"), seed=0, execution=Execution(workers=1))
        return weights_sha256(outcome.last)


@contextmanager
def staged_consortium(folder: Path, data: dict[str, Path]) -> Iterator[Staged]:
    """Server and three sites, all of them connected."""
    with built(("op", *SITES)) as town, ExitStack() as stack:
        staged = Staged(folder, town, data)
        stack.callback(lambda: staged._server is not None and end(staged._server, grace_s=60.0))
        staged.start_server()
        for name in SITES:
            stack.callback(staged.stop, name)
        with ThreadPoolExecutor(2) as pool:
            lines = {name: staged.consortium.invite(name).line() for name in SITES}
            list(pool.map(lambda n: staged.site_command(n, "enrol", lines[n], "--data", str(data[n])), SITES))
        for name in SITES:  # in this thread: children end with the thread that started them
            staged.start(name)
        until(lambda: all(staged.is_connected(name) for name in SITES), within_s=120)
        yield staged


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
