"""What ``federad-server start`` keeps running: SuperLink, SuperExec, consortium service and nginx.

Each is started when the one before it answers, and started again within a second when it ends. Besides, the operator's
own chores are done here: telling the SuperLink of sites that enrolled or were revoked while it was away, renewing the
server's certificate, taking up runs whose process was killed, and letting Flower delete the messages of runs that are over.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from server.consortium import Consortium, Site
from server.front import SOCKET, Front
from server.processes import Child, environment, wait_until
from server.runs import ACTIVE, RunFolder, is_locked, resume_run, state_of
from server.superlink import READY_S, SuperLink
from shared_models.errors import FederadError

log = logging.getLogger(__name__)

STATUS = "run/server.json"
LOCK = "run/server.lock"

LOCK_S = 1.0
"""A lock that is held for longer is another server's, not somebody's short look [s]."""

TICK_S = 0.25
CHORES_S = 3.0
HEALTH_S = 15.0
CERTIFICATE_S = 3600.0
"""Pauses between two looks at: processes, sites and runs, the SuperLink's health, the server's certificate [s]."""

UNHEALTHY_MOST = 6
"""A SuperLink that gives no answer this many times in a row is started anew."""

PART_READY_S = 60.0
"""How long the consortium service or nginx may take to answer on a busy machine [s]."""

FRUITLESS_MOST = 3
"""A run whose process ended this often without a further round is left to a person."""


def open_consortium(folder: Path) -> Consortium:
    """The consortium in a folder, which tells the SuperLink of its sites.

    Raises
    ------
    FederadError
        S183 if the folder holds no consortium.
    """
    superlink = SuperLink(folder)

    def register(site: Site) -> int:
        return superlink.register_node(site.node_public_key_pem or "", site.name)

    def unregister(site: Site) -> None:
        if site.node_id is not None:
            superlink.unregister_node(site.node_id)

    return Consortium(folder, register=register, unregister=unregister)


def server_status(folder: Path) -> dict[str, Any] | None:
    """What the running server wrote about itself; None if none runs."""
    if not is_locked(folder / LOCK):
        return None
    try:
        status: dict[str, Any] = json.loads((folder / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return status


def stop_server(folder: Path, timeout_s: float = 60.0) -> bool:
    """End the server of a folder and everything it runs; whether there was one.

    Runs that were going on are taken up again at the next start.
    """
    status = server_status(folder)
    if status is None:
        return False
    with suppress(ProcessLookupError):
        os.kill(int(status["pid"]), signal.SIGTERM)
    return wait_until(lambda: not is_locked(folder / LOCK), timeout_s)


def serve_consortium(folder: Path) -> None:
    """The consortium service, until SIGTERM; runs as a process of its own."""
    from server.service import Serving

    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the supervisor, which ends us in order
    logging.getLogger("server").setLevel(logging.INFO)
    consortium = open_consortium(folder)
    with Serving(consortium):
        consortium.settle()
        while not ended.wait(1.0):
            pass


class Operator:
    """The processes of one operator's folder, supervised.

    Parameters
    ----------
    folder
        The operator's folder.
    say
        Told in a few words what happens.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda _: None) -> None:
        self._folder, self._say = folder.absolute(), say
        self._consortium = open_consortium(self._folder)
        self._superlink = SuperLink(self._folder)
        self._children: list[Child] = []
        self._front: Front | None = None
        self._nginx: Child | None = None
        self._unhealthy = 0
        self._fruitless: dict[str, tuple[int, int]] = {}
        self._cleaned: set[str] = set()
        self._due: dict[str, float] = {}

    def run(self, ended: threading.Event, on_ready: Callable[[], None] = lambda: None) -> None:
        """Start everything, keep it running until ``ended`` is set, end everything.

        Raises
        ------
        FederadError
            S191 if a server runs here already, S192 if a part does not start, S193 without nginx, S194 if the port cannot
            be used.
        """
        with self._alone():
            try:
                self._start(ended)
                if not ended.is_set():
                    on_ready()
                while not ended.wait(TICK_S):
                    self._keep_running()
            finally:
                self._stop()

    def _start(self, ended: threading.Event) -> None:
        for name in ("logs", "run", "runs"):
            (self._folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._consortium.refresh_server_certificate()
        self._superlink.prepare()
        self._front = Front(self._folder, self._consortium.config.port, self._superlink.port)
        self._front.require_free_port()
        self._front.write()
        superlink, superexec = self._superlink.processes()
        service = Child(
            "consortium service",
            [sys.executable, "-m", "server.cli", "serve-consortium", "--dir", str(self._folder)],
            log_file=self._folder / "logs" / "consortium.log",
            env=environment(),
        )
        self._nginx = self._front.process()
        self._superlink.note_start()
        self._begin(superlink, self._superlink.is_healthy, READY_S, ended)
        self._begin(superexec, lambda: superexec.is_running, PART_READY_S, ended)
        self._begin(service, self._service_answers, PART_READY_S, ended)
        self._begin(self._nginx, self._front.is_healthy, PART_READY_S, ended)
        self._consortium.settle()
        self._write_status(is_ready=True)

    def _begin(self, child: Child, is_ready: Callable[[], bool], timeout_s: float, ended: threading.Event) -> None:
        if ended.is_set():
            return
        self._say(f"starting {child.name}")
        child.start()
        self._children.append(child)
        self._write_status(is_ready=False)
        if wait_until(is_ready, timeout_s, unless=lambda: ended.is_set() or not child.is_running) or ended.is_set():
            return
        how = f"ended with {child.exit_status}" if not child.is_running else f"gave no answer within {timeout_s:g} s"
        raise FederadError(
            "S192",
            happened=f"{child.name} {how}. Its last words: {child.last_words() or 'none'}.",
            because="Every part of the server is needed; what had been started was ended again.",
            remedies=(f"look into logs/{child.log_file.name} in the operator's folder", "then: federad-server start"),
        )

    def _service_answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self._folder / SOCKET))
            except OSError:
                return False
        return True

    def _keep_running(self) -> None:
        for child in self._children:
            if child.keep_running():
                self._say(f"{child.name} had ended and was started again")
                if child.name == "SuperLink":
                    self._superlink.note_start()
                self._write_status(is_ready=True)
        if self._is_due("health", HEALTH_S):
            self._look_at_health()
        if self._is_due("chores", CHORES_S):
            self._do_chores()
        if self._is_due("certificate", CERTIFICATE_S) and self._consortium.refresh_server_certificate():
            self._reload()

    def _is_due(self, what: str, every_s: float) -> bool:
        now = time.monotonic()
        if now < self._due.setdefault(what, now + every_s):
            return False
        self._due[what] = now + every_s
        return True

    def _look_at_health(self) -> None:
        superlink = self._children[0]
        self._unhealthy = 0 if not superlink.is_running or self._superlink.is_healthy() else self._unhealthy + 1
        if self._unhealthy >= UNHEALTHY_MOST:
            self._unhealthy = 0
            self._say("the SuperLink gives no answer and is started anew")
            superlink.signal(signal.SIGKILL)

    def _do_chores(self) -> None:
        if not self._children[0].is_running:
            return
        try:
            self._consortium.settle()
            for row in self._consortium.runs():
                if row.state in ACTIVE:
                    self._take_up(row.run)
                elif row.flower_run_id and row.run not in self._cleaned:
                    self._clean(row.run, int(row.flower_run_id))
        except (FederadError, OSError, sqlite3.Error) as error:
            log.warning("the chores are left for later: %s", error)

    def _take_up(self, run: str) -> None:
        """Resume a run whose process was killed, unless it ends again and again."""
        self._cleaned.discard(run)
        row = self._consortium.run(run)
        if state_of(self._consortium, self._superlink, row) != "interrupted":
            return
        n_committed = len(RunFolder(self._folder, run).records())
        n_before, n_times = self._fruitless.get(run, (n_committed, 0))
        n_times = n_times + 1 if n_committed == n_before else 1
        self._fruitless[run] = (n_committed, n_times)
        if n_times > FRUITLESS_MOST:
            self._consortium.set_run_state(run, "interrupted")
            self._say(f"run {run} ended {FRUITLESS_MOST} times without a further round; federad-server resume {run}")
            return
        with suppress(FederadError):  # somebody else was faster
            resume_run(self._consortium, self._superlink, run)
            self._say(f"run {run} was interrupted and goes on after round {n_committed}")

    def _clean(self, run: str, flower_run_id: int) -> None:
        """Ask Flower about a run that is over: it deletes a finished run's messages, updates included, when asked."""
        status, _ = self._superlink.run_status(flower_run_id)
        if status not in ("pending", "starting", "running"):
            self._cleaned.add(run)

    def _reload(self) -> None:
        if self._front is not None and self._nginx is not None:
            self._front.write()
            self._nginx.signal(signal.SIGHUP)
            self._say("the server's certificate was renewed")

    def _stop(self) -> None:
        for child in reversed(self._children):
            child.stop()
        self._children.clear()
        (self._folder / STATUS).unlink(missing_ok=True)

    def _write_status(self, *, is_ready: bool) -> None:
        status = {
            "pid": os.getpid(),
            "ready": is_ready,
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "superlink_port": self._superlink.port,
            "processes": {child.name: child.pid for child in self._children},
        }
        temporary = (self._folder / STATUS).with_suffix(".part")
        temporary.write_text(json.dumps(status) + "\n", encoding="utf-8")
        temporary.replace(self._folder / STATUS)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        (self._folder / "run").mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self._folder / LOCK).open("a") as stream:
            if not wait_until(lambda: _lock(stream), LOCK_S):
                raise FederadError(
                    "S191",
                    happened="A server runs in this operator's folder already.",
                    because="Two would answer the same sites with the same keys.",
                    remedies=("look at it: federad-server status", "or end it: federad-server stop"),
                )
            yield


def _lock(stream: IO[str]) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
