"""Site folders and processes as they are at a hospital, for tests: nothing here stands in for what is tested."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.folder import SiteFolder
from client.site import SiteConfig
from client.station import Station
from client.stub import StationAwayError, StationStub
from shared_models.consortium import SignedPlan, utc_now
from shared_models.messages import Ask, Question, encode_ask
from shared_models.plan import Plan
from shared_models.signing import public_pem
from shared_models.task import task_for
from shared_models.weights import initial_weights, weights_sha256
from shared_models.wire import chunks

CONSORTIUM = "Test Consortium"
FEDERAD_SITE = [sys.executable, "-m", "client.cli"]
ROOT = Path(__file__).parents[1]


class Operator:
    """Whoever signs plans."""

    def __init__(self, name: str = CONSORTIUM) -> None:
        self.name, self.key = name, Ed25519PrivateKey.generate()

    @property
    def public_pem(self) -> str:
        return public_pem(self.key.public_key())

    def sign(self, plan: Plan, run: str = "run-1") -> bytes:
        unsigned = SignedPlan(plan=plan.canonical_json(), consortium=self.name, run=run, issued=utc_now())
        return unsigned.signed(self.key).encode()


def make_site(root: Path, data: Path, operator: Operator, name: str = "site-1") -> SiteFolder:
    """A site's folder that knows its operator, without a courier's keys.

    Its secret is no secret: of a handful of patients, one site in some hundred would have none to train on.
    """
    folder = SiteFolder(root)
    folder.make()
    config = SiteConfig(name=name, data=str(data), device="cpu", emulated=True)
    station = Station.create(folder.station, config, secret=hashlib.sha256(name.encode()).digest())
    station.trust(operator.name, operator.public_pem)
    return folder


def ask_of(plan: Plan, *, round_: int = 1, kind: str = "train", seed: int = 0) -> bytes:
    """A question with fresh weights."""
    weights = initial_weights(task_for(plan).build_network, 0)
    return encode_ask(Ask(Question("run-1", round_, kind, plan.sha256, weights_sha256(weights)), seed, weights))


def longer(plan: Plan, epochs: int) -> Plan:
    """The same plan with more to do in a round."""
    tables = json.loads(plan.canonical_json())
    tables["training"]["epochs"] = epochs
    return Plan.from_tables(tables)


def asked(socket: Path, question: bytes) -> bytes:
    """The answer that comes through a socket."""
    with StationStub(socket) as stub:
        return b"".join(stub.answer(chunks(question)))


@contextmanager
def running_station(folder: SiteFolder) -> Iterator[subprocess.Popen[str]]:
    """A station process that listens."""
    process = start_station(folder)
    try:
        until(lambda: is_listening(folder.socket), process)
        yield process
    finally:
        process.kill()
        process.wait()


def start_station(folder: SiteFolder) -> subprocess.Popen[str]:
    command = [*FEDERAD_SITE, "station", "--threads", "1", "--site", str(folder.root)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def is_listening(socket: Path) -> bool:
    try:
        with StationStub(socket) as stub:
            stub.wait(0.2)
            return bool(stub.status()["site"])
    except (StationAwayError, OSError):
        return False


def until(true: Callable[[], bool], process: subprocess.Popen[str] | None = None, within_s: float = 60.0) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + within_s
    while not true():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode}: {process.stderr.read() if process.stderr else ''}")
        assert time.monotonic() < deadline, "it did not become true"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether a process works, rather than having ended or waiting to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def descendants(pid: int) -> set[int]:
    """Processes that a process started, and those that they started."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
