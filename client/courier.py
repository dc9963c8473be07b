"""The courier: the process that goes out, and that has no data.

It keeps Flower's SuperNode running as a child, and every few seconds carries offered plans from the consortium to the
station and notices from the station's outbox to the consortium; it renews the site's certificate in time. It works under
an account that may open the station's socket and neither the station's folder nor the data. Everything it writes is in its
own folder::

    consortium.json ca.crt site.key site.crt node.key   from enrolment (``enrolment``)
    bin/                 the guard, under every name that Flower may start (``guard``)
    flower/              Flower's own files
    logs/                courier.log, supernode.log
    audit.jsonl          bundles and programs that were refused
    status.json          what federad-site status shows
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket as sockets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO

from client import enrolment, guard
from client.app import COURIER_FOLDER, STATION_SOCKET
from client.link import Link, Membership, proxy_for
from client.processes import Backoff, end, only_one, spawn, until_told, write_durably
from client.stub import StationAwayError, StationStub
from shared_models.consortium import Notice
from shared_models.errors import FederadError

log = logging.getLogger(__name__)

LOCK = "process.lock"
STATUS = "status.json"

ERRAND_S = 3.0
"""Pause between two errands [s]."""

RENEW_EVERY_S = 3600.0
"""How often the certificate's end is looked at [s]."""

LONGEST_PAUSE_S = 15.0
"""Longest pause before a SuperNode that ended is started again: a round should not wait for it [s]."""

LOG_BYTES, LOGS_KEPT = 10 * 2**20, 3
"""Size and number of a log's files."""

PASSED_ON = ("LANG", "LC_ALL", "TZ")
"""Environment variables that the SuperNode gets as they are."""

SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}
"""Nothing calls home, nothing is installed, and a message is taken up without delay."""


class SuperNode:
    """Flower's SuperNode and the SuperExec that starts its processes: two children that live and die together.

    Parameters
    ----------
    folder
        The courier's folder.
    socket
        Where the station listens.
    """

    def __init__(self, folder: Path, socket: Path) -> None:
        self._folder, self._socket = folder, socket
        self._log = rotating(folder / "logs" / "supernode.log")
        self._children: list[subprocess.Popen[bytes]] = []
        self._began = self._next = 0.0
        self._backoff = Backoff(most_s=LONGEST_PAUSE_S)
        self.n_starts = 0

    @property
    def is_running(self) -> bool:
        """Whether both are there."""
        return bool(self._children) and all(child.poll() is None for child in self._children)

    @property
    def pids(self) -> list[int]:
        """Of the children that are there."""
        return [child.pid for child in self._children if child.poll() is None]

    def look_after(self) -> None:
        """Start what is not running, with a pause that grows while it does not stay; call it in the main thread."""
        now = time.monotonic()
        if self.is_running or now < self._next:
            return
        if self._children:
            statuses = [child.poll() for child in self._children]
            self.stop()
            pause_s = self._backoff.pause_s(now - self._began)
            log.warning("The SuperNode ended (%s); it is started again in %.0f s.", statuses, pause_s)
            self._next = now + pause_s
            return
        self._start()

    def stop(self) -> None:
        """End both and whatever they started."""
        for child in reversed(self._children):
            end(child)
        self._children = []

    def _start(self) -> None:
        port = _free_port()
        secret = self._folder / "flower" / "superexec.secret"
        write_durably(secret, secrets.token_bytes(32))
        guard.write_executables(self._folder / "bin", self._folder)
        member = Membership.load(self._folder)
        env = environment(self._folder, member)
        runtime = f"127.0.0.1:{port}"
        host = f"[{member.host}]" if ":" in member.host else member.host
        supernode = f"from client.guard import supernode; supernode({str(self._folder)!r})"
        self._children = [
            self._child(
                [
                    *(sys.executable, "-I", "-c", supernode),
                    *("--superlink", f"{host}:{member.port}", "--root-certificates", str(self._folder / "ca.crt")),
                    *("--auth-supernode-private-key", str(self._folder / "node.key")),
                    *("--node-config", node_config(self._folder, self._socket)),
                    *("--host", "127.0.0.1", "--port", str(port)),
                    *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
                ],
                env,
            ),
            self._child(
                [
                    *(str(self._folder / "bin" / "flower-superexec"), "--insecure", "--runtime-api-address", runtime),
                    *("--superexec-auth-secret-file", str(secret), "--parent-pid", str(os.getpid())),
                ],
                env,
            ),
        ]
        self._began = time.monotonic()
        self.n_starts += 1

    def _child(self, command: list[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        child = spawn(command, env=env, cwd=self._folder / "flower", output=subprocess.PIPE)
        if child.stdout is not None:
            threading.Thread(target=_copy, args=(child.stdout, self._log), daemon=True).start()
        return child


class Errands:
    """What is carried between the station's socket and the consortium.

    Parameters
    ----------
    folder
        The courier's folder.
    socket
        Where the station listens.
    """

    def __init__(self, folder: Path, socket: Path) -> None:
        self._folder, self._socket = folder, socket
        self._open = ExitStack()
        self._link: Link | None = None
        self._station: StationStub | None = None
        self._told = 0
        self._brought: set[str] = set()
        self._renew_at = 0.0

    def run(self) -> None:
        """One way there and back.

        Raises
        ------
        FederadError
            C149 to C155 if the consortium cannot be reached or refuses.
        StationAwayError
            If the station does not answer.
        """
        try:
            self._run()
        except BaseException:
            self.close()  # a fresh start next time: keys and proxies may have changed meanwhile
            raise

    def close(self) -> None:
        """Let go of both ends."""
        self._open.close()
        self._link = self._station = None

    def _run(self) -> None:
        if self._link is None or self._station is None:
            self._link = self._open.enter_context(Link.open(self._folder))
            self._station = self._open.enter_context(StationStub(self._socket))
        self._renew(self._link)
        self._tell(self._link, self._station)
        self._bring_plans(self._link, self._station)

    def _tell(self, link: Link, station: StationStub) -> None:
        last, notices = station.outbox(self._told)
        if notices:
            link.tell([Notice.decode(json.dumps(notice)) for notice in notices])
        self._told = last

    def _bring_plans(self, link: Link, station: StationStub) -> None:
        for plan in link.plans():
            if plan.signature in self._brought:
                continue
            try:
                station.offer(plan.encode())
            except FederadError as error:
                log.warning("The station did not take a plan:\n%s", error)
            self._brought.add(plan.signature)

    def _renew(self, link: Link) -> None:
        if time.monotonic() < self._renew_at:
            return
        if enrolment.renew(self._folder, link):
            log.info("The site's certificate was renewed.")
            self.close()
            self._run()
        self._renew_at = time.monotonic() + RENEW_EVERY_S


class Courier:
    """The courier of one site.

    Parameters
    ----------
    folder
        The courier's folder, enrolled.
    socket
        Where the station listens.
    """

    def __init__(self, folder: Path, socket: Path) -> None:
        self._folder, self._socket = folder.absolute(), socket.absolute()
        for name in ("flower", "logs"):
            (self._folder / name).mkdir(mode=0o700, exist_ok=True)
        self.supernode = SuperNode(self._folder, self._socket)
        self._trouble: dict[str, object] | None = None
        self._connected: str | None = None

    def run(self, stopped: threading.Event) -> None:
        """Work until told to stop; call it in the main thread."""
        errands = threading.Thread(target=self._run_errands, args=(stopped,), daemon=True)
        errands.start()
        try:
            while not stopped.wait(0.5):
                self.supernode.look_after()
                self._write_status()
        finally:
            self.supernode.stop()
            errands.join(5.0)
            with suppress(OSError):
                (self._folder / STATUS).unlink(missing_ok=True)

    def _run_errands(self, stopped: threading.Event) -> None:
        errands, backoff = Errands(self._folder, self._socket), Backoff(first_s=ERRAND_S)
        pause_s = 0.0
        while not stopped.wait(pause_s):
            try:
                errands.run()
                self._note(None)
                backoff.reset()
                pause_s = ERRAND_S
            except StationAwayError:
                self._note({"error": "C158", "happened": "The station does not answer."})
                pause_s = ERRAND_S
            except FederadError as error:
                self._note(error.as_json(), error)
                pause_s = backoff.pause_s()
            except Exception:
                log.exception("An errand failed.")
                pause_s = backoff.pause_s()
        errands.close()

    def _note(self, trouble: dict[str, object] | None, error: FederadError | None = None) -> None:
        """Remember how the last errand went, and say so when it went otherwise than the one before."""
        if trouble is None:
            self._connected = datetime.now(UTC).isoformat(timespec="seconds")
        if (trouble or {}).get("happened") != (self._trouble or {}).get("happened"):
            if trouble is None:
                log.info("The consortium and the station can be reached.")
            else:
                log.warning("%s", error or trouble["happened"])
        self._trouble = trouble

    def _write_status(self) -> None:
        status = {
            "pid": os.getpid(),
            "supernode": {"running": self.supernode.is_running, "starts": self.supernode.n_starts},
            "connected": self._connected,
            "trouble": self._trouble,
        }
        partial = self._folder / f".{STATUS}.part"
        with suppress(OSError):
            partial.write_text(json.dumps(status), encoding="utf-8")
            partial.replace(self._folder / STATUS)


def carry(folder: Path, socket: Path) -> None:
    """Be the courier of ``folder`` until told to stop.

    Raises
    ------
    FederadError
        C150 if the site has not enrolled, C156 if a courier runs there already.
    """
    Membership.load(folder)
    stopped = until_told()
    with only_one(folder / LOCK, "courier"):
        Courier(folder, socket).run(stopped)
    log.info("The courier was told to stop.")


def environment(folder: Path, member: Membership) -> dict[str, str]:
    """All that the SuperNode and what it starts get of an environment.

    Of proxies that is the one on the way to the consortium, if there is one: the SuperNode's own parts talk plain HTTP
    with each other on this machine.
    """
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    if proxy_for(member.host, member.port) is not None:
        passed["https_proxy"] = os.environ.get("https_proxy") or os.environ["HTTPS_PROXY"]
    return {
        **SWITCHES,
        **passed,
        "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
        "HOME": str(folder / "flower"),
        "FLWR_HOME": str(folder / "flower"),
    }


def node_config(folder: Path, socket: Path) -> str:
    """What the ClientApp is told of this node, in Flower's spelling.

    Raises
    ------
    FederadError
        C163 for a path that this spelling has no way to write.
    """
    paths = {STATION_SOCKET: str(socket), COURIER_FOLDER: str(folder)}
    if any("'" in path or not path.isprintable() for path in paths.values()):
        raise FederadError(
            "C163",
            happened=f"The path {folder} has an apostrophe or an unprintable sign in it.",
            because="Flower has no way to write such a path in the configuration of a node.",
            remedies=("move the site's folder to a path of ordinary letters",),
        )
    return " ".join(f"{key}='{path}'" for key, path in paths.items())


def rotating(path: Path) -> logging.Logger:
    """A log of lines in a few files of limited size, for what a child says."""
    logger = logging.getLogger(f"{__name__}.{path}")
    logger.propagate = False
    if not logger.handlers:
        handler = RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=LOGS_KEPT, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    return logger


def _copy(output: IO[bytes], logger: logging.Logger) -> None:
    for line in _lines(output):
        logger.info("%s", line)


def _lines(output: IO[bytes]) -> Iterator[str]:
    """Lines as text; one without an end comes in pieces."""
    while piece := output.readline(8192):
        yield piece.decode("utf-8", "replace").rstrip("\n")


def _free_port() -> int:
    with sockets.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
