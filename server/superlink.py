"""The real SuperLink, on the loopback interface alone: started with safe switches, and spoken to by its Control API.

Flower has no login for that API and none for its Runtime API, so neither may ever leave this machine; sites reach the
Fleet API through the front (``front``). The ServerApp runs in a process of its own (``--isolation process``), started by a
SuperExec that has to show a secret: otherwise any local caller could fetch the app's token and take its place. A SuperLink
that was killed goes on with its runs when it is started again within Flower's 60 seconds.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from server import pki
from server.bundle import Bundle
from server.processes import Child, environment
from shared_models.errors import FederadError

if TYPE_CHECKING:
    from flwr.supercore.control import ControlHttpClient

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
LOOPBACK_DAYS = 3650
TASK_POLL_S = 0.25
"""How often the SuperExec looks for a ServerApp to start [s]."""

FOLDER_VARIABLE = "FEDERAD_OPERATOR"
"""Tells a ServerApp where the operator's folder lies; the configuration of a run would carry that to the sites."""

READY_S = 120.0
"""How long a SuperLink may take to answer on a busy machine [s]."""

KEY_IN_USE = 23
NODE_UNKNOWN = frozenset({24, 28})
RUN_FINISHED = 18
"""Flower's own numbers (``flwr.supercore.error.ApiErrorCode``)."""

RunStatus = Literal["pending", "starting", "running", "completed", "failed", "stopped", "unknown"]


@dataclass(frozen=True)
class Node:
    """A SuperNode as the SuperLink knows it."""

    node_id: int
    public_key_pem: str
    is_online: bool
    is_registered: bool
    since: str
    """When it became online or offline last, ISO 8601; empty if never."""


class SuperLink:
    """The SuperLink of one operator's folder.

    Parameters
    ----------
    folder
        The operator's folder; everything of Flower's lies in ``flower`` in it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self.home = self._folder / "flower"

    @property
    def port(self) -> int:
        """The port on the loopback interface.

        Raises
        ------
        FederadError
            S190 if no SuperLink was ever started here.
        """
        try:
            return int(json.loads((self.home / "loopback.json").read_text(encoding="utf-8"))["port"])
        except (OSError, ValueError, KeyError, TypeError):
            raise _not_running() from None

    @property
    def address(self) -> str:
        """Host and port."""
        return f"{LOOPBACK}:{self.port}"

    @property
    def certificate(self) -> Path:
        """What the SuperLink shows on the loopback interface, and whom it trusts there: itself."""
        return self.home / "loopback.crt"

    def n_starts(self) -> int:
        """How often it was started; whoever waits for a reply asks again when this grows."""
        try:
            return int((self.home / "starts").read_text(encoding="ascii"))
        except (OSError, ValueError):
            return 0

    def note_start(self) -> None:
        """Count a start."""
        _write_private(self.home / "starts", str(self.n_starts() + 1).encode())

    def prepare(self) -> None:
        """Make what a SuperLink needs: a free port, a loopback certificate, a secret for its SuperExec."""
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self.certificate.exists():
            authority = pki.new_authority("federad loopback")
            key = pki.new_key()
            certificate = pki.server_certificate(authority, key.public_key(), LOOPBACK, LOOPBACK_DAYS)
            _write_private(self.home / "loopback.key", pki.key_pem(key))
            _write_private(self.home / "loopback-ca.crt", authority.pem.encode())
            _write_private(self.certificate, pki.certificate_pem(certificate).encode())
        if not (self.home / "superexec.secret").exists():
            _write_private(self.home / "superexec.secret", secrets.token_bytes(32))
        _write_private(self.home / "loopback.json", json.dumps({"port": _free_port(self._kept_port())}).encode())
        _write_private(self.home / "config.toml", b"")  # Flower's own default names its makers' servers

    def processes(self) -> list[Child]:
        """The SuperLink and its SuperExec."""
        env = environment(
            FLWR_HOME=str(self.home),
            FLWR_SUPEREXEC_TASK_POLL_INTERVAL=str(TASK_POLL_S),
            **{FOLDER_VARIABLE: str(self._folder)},
        )
        ca, secret = str(self.home / "loopback-ca.crt"), str(self.home / "superexec.secret")
        superlink = [
            _program("flower-superlink"),
            *("--host", LOOPBACK, "--port", str(self.port)),
            *("--ssl-certfile", str(self.certificate), "--ssl-keyfile", str(self.home / "loopback.key")),
            *("--ssl-ca-certfile", ca),
            *("--database", str(self.home / "state.db")),
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
            *("--isolation", "process", "--superexec-auth-secret-file", secret),
        ]
        superexec = [
            _program("flower-superexec"),
            *("--runtime-api-address", self.address, "--root-certificates", ca),
            *("--superexec-auth-secret-file", secret),
        ]
        logs = self._folder / "logs"
        return [
            Child("SuperLink", superlink, log_file=logs / "superlink.log", env=env),
            Child("SuperExec", superexec, log_file=logs / "superexec.log", env=env, outlived=True),
        ]

    def is_healthy(self) -> bool:
        """Whether it answers."""
        try:
            context = ssl.create_default_context(cafile=str(self.home / "loopback-ca.crt"))
            with urllib.request.urlopen(f"https://{self.address}/health", timeout=5, context=context) as reply:
                return bool(reply.status == 200)
        except (OSError, urllib.error.URLError, FederadError):
            return False

    def register_node(self, public_key_pem: str, name: str = "") -> int:
        """Let the holder of this key take part; its node id. Doing so twice gives the same id.

        Raises
        ------
        FederadError
            S190 if the SuperLink is not running, S195 if it refuses, for instance a key that was unregistered.
        """
        from flwr.proto.control_pb2 import RegisterNodeRequest

        for node in self.list_nodes():
            if node.public_key_pem == public_key_pem and node.is_registered:
                return node.node_id
        with self._control("register a site's key") as control:
            reply = control.RegisterNode(RegisterNodeRequest(public_key=public_key_pem.encode(), name=name))
        return int(reply.node_id)

    def unregister_node(self, node_id: int) -> None:
        """Let a node take part no longer, from its next call on; a node that is gone already is no error."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        with self._control("unregister a site's key", ignore=NODE_UNKNOWN) as control:
            control.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def list_nodes(self) -> list[Node]:
        """Every node that was ever registered."""
        from flwr.proto.control_pb2 import ListNodesRequest

        with self._control("list the sites' nodes") as control:
            reply = control.ListNodes(ListNodesRequest())
        return [
            Node(
                node.node_id,
                node.public_key.decode("ascii", errors="replace"),
                is_online=node.status == "online",
                is_registered=node.status != "unregistered",
                since=node.last_activated_at if node.status == "online" else node.last_deactivated_at,
            )
            for node in reply.nodes_info
        ]

    def start_run(self, bundle: Bundle, run_config: Mapping[str, str]) -> int:
        """Start a run of the bundle; Flower's id of it."""
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        request = StartRunRequest(
            fab=fab_to_proto(Fab(bundle.sha256, bundle.content, {})),
            override_config=user_config_to_proto(dict(run_config)),
        )
        with self._control("start a run") as control:
            reply = control.StartRun(request)
        if not reply.HasField("run_id"):
            raise _refused("start a run", "it gave no number for it")
        return int(reply.run_id)

    def stop_run(self, flower_run_id: int) -> None:
        """Stop a run; one that has ended already is no error."""
        from flwr.proto.control_pb2 import StopRunRequest

        with self._control("stop a run", ignore=frozenset({RUN_FINISHED})) as control:
            control.StopRun(StopRunRequest(run_id=flower_run_id))

    def run_status(self, flower_run_id: int) -> tuple[RunStatus, str]:
        """What became of a run, and the SuperLink's own words; asking lets it delete the messages of a finished one."""
        from flwr.proto.control_pb2 import ListRunsRequest

        with self._control("look at a run") as control:
            reply = control.ListRuns(ListRunsRequest(run_id=flower_run_id))
        if flower_run_id not in reply.run_dict:
            return "unknown", ""
        status = reply.run_dict[flower_run_id].status
        word = status.sub_status if status.status == "finished" else status.status
        known: dict[str, RunStatus] = {
            "pending": "pending",
            "starting": "starting",
            "running": "running",
            "completed": "completed",
            "failed": "failed",
            "stopped": "stopped",
        }
        return known.get(word, "unknown"), str(status.details)

    @contextmanager
    def _control(self, to_do: str, ignore: frozenset[int] = frozenset()) -> Iterator[ControlHttpClient]:
        """A client of the Control API; what goes wrong becomes a numbered error."""
        import httpx
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.error import FlowerError
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        client = ControlHttpClient.from_server_address(
            server_address=self.address,
            insecure=False,
            root_certificates=self._root_certificates(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="federad-server")],
        )
        try:
            with client:
                yield client
        except httpx.HTTPStatusError as error:
            said = FlowerError.from_json(error.response.text)
            if said is None or said.code not in ignore:
                words = said.message if said is not None else f"HTTP {error.response.status_code}"
                raise _refused(to_do, words) from None
        except httpx.RequestError:
            raise _not_running() from None

    def _root_certificates(self) -> bytes:
        try:
            return (self.home / "loopback-ca.crt").read_bytes()
        except OSError:
            raise _not_running() from None

    def _kept_port(self) -> int:
        try:
            return self.port
        except FederadError:
            return 0


def _free_port(wished: int) -> int:
    """``wished`` if it is free on the loopback interface, else another that is."""
    for port in (wished, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise FederadError(
        "S192",
        happened="No port is free on the loopback interface.",
        because="The SuperLink listens there.",
        remedies=("end programs that hold many ports open",),
    )


def _program(name: str) -> str:
    """The program of this name that belongs to this installation."""
    import shutil

    found = shutil.which(name, path=environment()["PATH"])
    if found is None:
        raise FederadError(
            "S192",
            happened=f"The program {name} was not found.",
            because="It is part of Flower, which federad is installed with.",
            remedies=("install federad again, in an environment of its own",),
        )
    return found


def _write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
        stream.write(data)
    temporary.replace(path)


def _not_running() -> FederadError:
    return FederadError(
        "S190",
        happened="The SuperLink of this operator's folder does not answer.",
        because="Runs, and keys of sites, are its business.",
        remedies=("federad-server start", "if it is running: look into logs/superlink.log"),
    )


def _refused(to_do: str, words: Any) -> FederadError:
    return FederadError(
        "S195",
        happened=f"The SuperLink refused to {to_do}: {words}.",
        because="Without it the command cannot be carried out.",
        remedies=("look into logs/superlink.log in the operator's folder", "federad-server sites"),
    )
