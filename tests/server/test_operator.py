"""The operator's server for real: SuperLink, SuperExec, consortium service and nginx, started, attacked, killed."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import ssl
import time
from pathlib import Path

import httpx
import pytest
from operators import (
    enrol_site,
    federad_server,
    free_port,
    is_alive,
    needs_nginx,
    new_consortium,
    running_server,
    short_folder,
    start_server,
    status_of,
    until,
)

from server import pki
from server.bundle import RUN_KEY, make_bundle
from server.operator import open_consortium, server_status, stop_server
from server.superlink import SuperLink
from shared_models.errors import FederadError

pytestmark = [pytest.mark.slow, pytest.mark.system, needs_nginx]


@pytest.fixture(scope="module")
def folder():
    """An operator's folder whose server runs."""
    with short_folder() as folder:
        new_consortium(folder, free_port())
        with running_server(folder):
            yield folder


@pytest.fixture(scope="module")
def link(folder):
    return SuperLink(folder)


@pytest.fixture(scope="module")
def port(folder):
    return open_consortium(folder).config.port


@pytest.fixture(scope="module")
def routes(link):
    """Every path and method that the SuperLink itself serves, its own documentation included."""
    with httpx.Client(verify=ssl.create_default_context(cafile=str(link.home / "loopback-ca.crt"))) as client:
        paths = client.get(f"https://{link.address}/openapi.json").json()["paths"]
    found = [(path, method.upper()) for path, methods in paths.items() for method in methods]
    assert any(path.startswith("/v1/control/") for path, _ in found)
    assert any(path.startswith("/v1/runtime/") for path, _ in found)
    return [*found, ("/docs", "GET"), ("/openapi.json", "GET"), ("/docs/oauth2-redirect", "GET")]


def ask(folder, port, path, method="POST", body=b"") -> tuple[int, bytes]:
    """What a caller from outside gets, holding nothing but the authority's certificate."""
    context = ssl.create_default_context(cafile=str(folder / "keys" / "ca.crt"))
    connection = http.client.HTTPSConnection("localhost", port, context=context, timeout=20)
    try:
        headers = {"content-type": "application/protobuf", "accept": "application/protobuf"}
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


class TestOutsideView:
    def test_of_all_routes_only_the_fleet_s_are_there(self, folder, port, routes):
        """
        Each route of the SuperLink's own list, tried from outside: the Fleet's answer, all others do not exist.
        """
        for path, method in routes:
            concrete = re.sub(r"\{[^}]*\}", "1", path)
            status, _ = ask(folder, port, concrete, method)
            if path.startswith("/v1/fleet/"):
                assert status != 404, path
            else:
                assert status == 404, (method, path)

    def test_stranger_s_fleet_calls_are_refused(self, folder, port, routes):
        """
        What is reachable of the Fleet answers nobody whose key is not registered: every call is an error.
        """
        for path, method in routes:
            if path.startswith("/v1/fleet/"):
                assert ask(folder, port, path, method)[0] in (400, 401, 403), path

    def test_only_one_port_is_open_to_others(self, folder, port):
        """
        Of the server's processes nginx alone listens beyond the loopback interface, on one port.
        """
        psutil = pytest.importorskip("psutil")
        pids = {pid for pid in status_of(folder)["processes"].values() if pid}
        pids |= {child.pid for pid in pids for child in psutil.Process(pid).children(recursive=True)}
        open_to_others = {
            connection.laddr.port
            for pid in pids
            for connection in psutil.Process(pid).net_connections("inet")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.ip not in ("127.0.0.1", "::1")
        }

        assert open_to_others == {port}

    def test_nothing_answers_without_tls(self, folder, port, link):
        """
        Neither the front nor the SuperLink says a word to who speaks in the clear.
        """
        for place in (port, link.port):
            with socket.create_connection(("localhost" if place == port else "127.0.0.1", place), timeout=20) as plain:
                plain.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                try:
                    said = plain.recv(1000)
                except ConnectionResetError:
                    said = b""
            assert b"HTTP" not in said

    def test_no_task_is_given_to_who_does_not_know_the_secret(self, link):
        """
        Even on the machine itself nobody can fetch the ServerApp's token and take its place.
        """
        from flwr.proto.runtime_pb2 import AcquireTaskRequest

        context = ssl.create_default_context(cafile=str(link.home / "loopback-ca.crt"))
        body = AcquireTaskRequest(supported_task_types=["flwr-serverapp"]).SerializeToString()
        headers = {"content-type": "application/protobuf", "accept": "application/protobuf"}
        with httpx.Client(verify=context) as client:
            reply = client.post(f"https://{link.address}/v1/runtime/acquire-task", content=body, headers=headers)

        assert reply.status_code in (401, 403)

    def test_folder_is_closed_to_other_users(self, folder, link):
        """
        Keys, secrets, Flower's database and the socket are for the operator's user alone.
        """
        for name in (
            "keys/ca.key",
            "keys/plan.key",
            "keys/server.key",
            "flower/superexec.secret",
            "flower/loopback.key",
        ):
            assert (folder / name).stat().st_mode & 0o077 == 0, name
        assert link.home.stat().st_mode & 0o077 == 0
        assert (folder / "run" / "consortium.sock").stat().st_mode & 0o077 == 0


class TestSuperLink:
    def test_node_registered_twice_has_one_id(self, link):
        """
        Registering is safe to repeat, and the node is listed as registered and not online.
        """
        pem = pki.public_pem(pki.new_key().public_key())
        node_id = link.register_node(pem, "a-site")

        assert link.register_node(pem) == node_id
        (node,) = [node for node in link.list_nodes() if node.node_id == node_id]
        assert (node.public_key_pem, node.is_registered, node.is_online) == (pem, True, False)

    def test_unregistered_key_never_comes_back(self, link):
        """
        Taking a node away twice is no error; its key cannot be registered again, which is S195.
        """
        pem = pki.public_pem(pki.new_key().public_key())
        node_id = link.register_node(pem)
        link.unregister_node(node_id)
        link.unregister_node(node_id)
        with pytest.raises(FederadError) as caught:
            link.register_node(pem)

        assert caught.value.code == "S195"
        assert not next(node for node in link.list_nodes() if node.node_id == node_id).is_registered

    def test_enrolled_site_is_registered_and_revoked_one_is_not(self, folder, link, tmp_path):
        """
        The store keeps Flower's list of keys in step.
        """
        consortium = open_consortium(folder)
        pem = enrol_site(consortium, "in-and-out", tmp_path / "keys")
        node_id = consortium.site("in-and-out").node_id
        assert consortium.site_of_node(node_id) == "in-and-out"
        assert {node.public_key_pem for node in link.list_nodes() if node.is_registered} >= {pem}

        consortium.revoke("in-and-out")
        assert consortium.site_of_node(node_id) is None
        assert pem not in {node.public_key_pem for node in link.list_nodes() if node.is_registered}

    def test_site_that_enrolled_while_no_server_ran_is_registered_later(self, folder, link, tmp_path):
        """
        What could not be told to the SuperLink is told by the running server by itself.
        """
        from server.consortium import Consortium

        consortium = Consortium(folder)  # without hooks: as if nothing ran
        enrol_site(consortium, "early", tmp_path / "keys")
        until(lambda: consortium.site("early").node_id is not None, within_s=30)

        assert consortium.site("early").node_id in {node.node_id for node in link.list_nodes()}

    def test_run_of_an_unknown_order_fails_and_is_listed(self, folder, link):
        """
        The ServerApp is started by the SuperExec; an order that is not in the store fails it, and the SuperLink says so.
        """
        config = {RUN_KEY: "no-such-run"}
        flower_run_id = link.start_run(make_bundle(), config)
        until(lambda: link.run_status(flower_run_id)[0] == "failed", within_s=120)

        assert "S184" in link.run_status(flower_run_id)[1]
        link.stop_run(flower_run_id)

    def test_runtime_dependencies_are_never_installed(self, folder):
        """
        Nothing that a bundle asks for is fetched from anywhere.
        """
        command = _command_line(status_of(folder)["processes"]["SuperLink"])

        assert "--disable-runtime-dependency-installation" in command
        assert "--enable-supernode-auth" in command
        assert command[command.index("--isolation") + 1] == "process"
        assert command[command.index("--host") + 1] == "127.0.0.1"


class TestSupervision:
    @pytest.mark.parametrize("name", ["SuperLink", "SuperExec", "consortium service", "nginx"])
    def test_process_that_is_killed_is_started_again_within_seconds(self, folder, port, link, name):
        """
        SIGKILL of any one part: another takes its place, and everything answers again.
        """
        before = status_of(folder)["processes"][name]
        starts = link.n_starts()
        began = time.monotonic()
        os.kill(before, signal.SIGKILL)
        until(lambda: status_of(folder)["processes"][name] not in (None, before), within_s=20)
        until(link.is_healthy, within_s=60)
        until(lambda: _status(folder, port) == 404, within_s=20)

        assert time.monotonic() - began < 50
        assert link.n_starts() == starts + (name == "SuperLink")
        assert link.list_nodes() is not None

    def test_workers_of_an_nginx_that_was_killed_end_before_the_next(self, folder, port):
        """
        They would go on answering with an old certificate, keep the port from every other nginx, and outlive the server.
        """
        psutil = pytest.importorskip("psutil")
        before = status_of(folder)["processes"]["nginx"]
        workers = psutil.Process(before).children()
        assert workers
        os.kill(before, signal.SIGKILL)
        until(lambda: status_of(folder)["processes"]["nginx"] not in (None, before), within_s=20)

        assert not any(is_alive(worker.pid) for worker in workers)
        until(lambda: _status(folder, port) == 404, within_s=20)
        assert psutil.Process(status_of(folder)["processes"]["nginx"]).children()

    def test_second_server_is_refused(self, folder):
        """
        One server for one folder: the second says S191 and ends with its number.
        """
        ended = federad_server("start", "--dir", str(folder), "--json")

        assert ended.returncode == 191
        assert '"error": "S191"' in ended.stdout
        assert server_status(folder)["ready"]

    def test_killed_server_leaves_no_process_behind(self):
        """
        SIGKILL of the supervisor takes everything with it, and the next start finds the field clear.
        """
        with short_folder() as folder:
            new_consortium(folder, free_port())
            process = start_server(folder)
            pids = list(status_of(folder)["processes"].values())
            assert all(is_alive(pid) for pid in pids)
            process.kill()
            process.wait()
            until(lambda: not any(is_alive(pid) for pid in pids), within_s=15)
            assert server_status(folder) is None

            with running_server(folder):
                assert server_status(folder)["ready"]

    def test_stop_ends_everything_in_order(self):
        """
        ``stop`` returns when no process is left; a second one says that there was none.
        """
        with short_folder() as folder:
            new_consortium(folder, free_port())
            process = start_server(folder)
            pids = list(status_of(folder)["processes"].values())
            assert stop_server(folder)
            assert not any(is_alive(pid) for pid in pids)
            assert process.wait(20) == 0

        assert not stop_server(folder)

    def test_port_that_is_taken_stops_the_start_and_leaves_nothing(self):
        """
        With another program on the port the start ends in S194, detached or not, and no process stays.
        """
        with short_folder() as folder, socket.socket() as other:
            other.bind(("0.0.0.0", 0))
            other.listen()
            new_consortium(folder, other.getsockname()[1])
            for detach in ([], ["--detach"]):
                ended = federad_server("start", *detach, "--dir", str(folder))
                assert ended.returncode == 194, ended.stderr
                assert "sport = :" in ended.stderr
            assert server_status(folder) is None
            assert not (folder / "run" / "server.json").exists()


def _status(folder, port) -> int | None:
    try:
        return ask(folder, port, "/", "GET")[0]
    except (OSError, http.client.HTTPException):
        return None


def _command_line(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
