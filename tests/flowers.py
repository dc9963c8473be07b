"""A real SuperLink on the loopback interface and a courier's folder that leads to it, for tests of the courier's side."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.cli.build import build_fab_from_files

from client.enrolment import _private
from client.link import FILE, Membership
from server.bundle import Bundle
from server.superlink import SuperLink
from shared_models.signing import public_pem

SERVER_APP = """
import json, sys
from pathlib import Path
from flwr.app import Message
from flwr.serverapp import ServerApp
from shared_models.parcel import pack, unpack

app = ServerApp()

@app.main()
def main(grid, context):
    nodes = []
    while not nodes:
        nodes = list(grid.get_node_ids())
    replies = grid.send_and_receive([Message(pack(b"question"), node, "query") for node in nodes], timeout=100)
    said = [reply.error.reason if reply.has_error() else unpack(reply).decode() for reply in replies]
    Path(context.run_config["out"]).write_text(json.dumps(said))
"""
"""Asks every node once and writes down what comes back: the server's half, installed at the operator."""

PROJECT = """\
[project]
name = "federad"
version = "0.1.0"
description = "x"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "federad"
[tool.flwr.app.components]
serverapp = "asking:app"
clientapp = "client.app:app"
[tool.flwr.app.config]
out = ""
"""


class Lab:
    """A SuperLink with one registered node whose courier's folder is made too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.superlink = SuperLink(folder / "operator")
        self.courier = folder / "courier"

    def prepare_courier(self) -> None:
        """Keys of a site, registered at the SuperLink."""
        for name in ("flower", "logs"):
            (self.courier / name).mkdir(parents=True)
        key = _private(serialization.PrivateFormat.OpenSSH)
        (self.courier / "node.key").write_bytes(key)
        public = serialization.load_ssh_private_key(key, None).public_key()
        pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        self.superlink.register_node(pem.decode(), "site-1")
        (self.courier / "ca.crt").write_bytes((self.superlink.home / "loopback-ca.crt").read_bytes())
        member = Membership(
            name="Lab",
            host="127.0.0.1",
            port=self.superlink.port,
            site="site-1",
            plan_key_pem=public_pem(Ed25519PrivateKey.generate().public_key()),
            invitation="0" * 32,
        )
        (self.courier / FILE).write_bytes(member.encode())

    def ask(self, files: Mapping[str, bytes], within_s: float = 120.0) -> list[str]:
        """Run a bundle of these files and give what the server heard."""
        out = self.folder / f"heard-{time.monotonic_ns()}.json"
        bundle = Bundle(build_fab_from_files({"pyproject.toml": PROJECT.encode(), **files})[0])
        run = self.superlink.start_run(bundle, {"out": str(out)})
        deadline = time.monotonic() + within_s
        while not out.exists():
            status, details = self.superlink.run_status(run)
            assert status in {"pending", "starting", "running"} or out.exists(), (status, details, self.log())
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.3)
        time.sleep(0.2)
        return json.loads(out.read_text())

    def log(self) -> str:
        """What the courier's children said."""
        file = self.courier / "logs" / "supernode.log"
        return file.read_text()[-4000:] if file.exists() else ""


@contextmanager
def lab(folder: Path) -> Iterator[Lab]:
    """A running SuperLink."""
    made = Lab(folder)
    programs = folder / "operator" / "programs"
    programs.mkdir(parents=True)
    (folder / "operator" / "logs").mkdir()
    (programs / "asking.py").write_text(SERVER_APP)
    made.superlink.prepare()
    children = made.superlink.processes()
    for child in children:
        child._env = {**child._env, "PYTHONPATH": str(programs)}
        child.start()
    try:
        deadline = time.monotonic() + 90
        while not made.superlink.is_healthy():
            assert time.monotonic() < deadline, children[0].last_words(20)
            time.sleep(0.2)
        made.prepare_courier()
        yield made
    finally:
        for child in reversed(children):
            child.stop()
