"""An operator's folder with its real server, for tests: nothing here stands in for what is tested."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from client.enrolment import make_request
from server.consortium import Consortium, ConsortiumConfig
from shared_models.consortium import Notice
from shared_models.plan import Plan

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

FEDERAD_SERVER = [sys.executable, "-m", "server.cli"]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def new_consortium(folder: Path, port: int = 443) -> Consortium:
    """A consortium that sites reach at localhost."""
    return Consortium.create(folder, ConsortiumConfig(name="Test", host="localhost", port=port))


def enrol_site(consortium: Consortium, name: str, keys: Path) -> str:
    """Enrol a site whose keys lie in ``keys``; its SuperNode's public key, PEM."""
    request = make_request(consortium.invite(name), keys)
    consortium.enrol(request)
    return consortium.site(name).node_public_key_pem


def approve(consortium: Consortium, plan: Plan, *sites: str) -> None:
    """Let sites say yes to a plan."""
    for site in sites:
        consortium.tell(site, [Notice(kind="approved", plan_sha256=plan.sha256)])


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="fs-") as folder:
        yield Path(folder)


@contextmanager
def running_server(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``federad-server start`` in the foreground, ended afterwards."""
    process = start_server(folder)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def start_server(folder: Path) -> subprocess.Popen[bytes]:
    """``federad-server start``, once it answers."""
    with (folder / "server.out").open("ab") as out:
        command = [*FEDERAD_SERVER, "start", "--dir", str(folder)]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    until(lambda: (status_of(folder) or {}).get("pid") == process.pid and status_of(folder)["ready"], process, folder)
    return process


def status_of(folder: Path) -> dict | None:
    """What the server wrote about itself."""
    try:
        return json.loads((folder / "run" / "server.json").read_text())
    except (OSError, ValueError):
        return None


def until(
    is_true: Callable[[], object],
    process: subprocess.Popen[bytes] | None = None,
    folder: Path | None = None,
    within_s: float = 90.0,
) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + within_s
    while not is_true():
        said = (folder / "server.out").read_text() if folder is not None else ""
        assert process is None or process.poll() is None, said
        assert time.monotonic() < deadline, f"it did not become true. {said}"
        time.sleep(0.1)


def federad_server(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command as an operator types it."""
    env = {k: v for k, v in os.environ.items() if k != "FEDERAD_SERVER"} | environment
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    return subprocess.run(
        [*FEDERAD_SERVER, *arguments], capture_output=True, text=True, timeout=300, cwd=cwd, env=env, check=False
    )


def is_alive(pid: int) -> bool:
    """Whether a process works, rather than having ended or waiting to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
