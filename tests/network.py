"""What lies between a site and the operator, for real: nginx as the front, and proxies of several kinds.

Everything listens on the loopback interface and is gone when the test ends. No process of the machine's own is touched.
"""

from __future__ import annotations

import base64
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from client.enrolment import enrol
from server import pki
from server.consortium import Consortium, ConsortiumConfig
from server.service import Serving

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin")

needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

_CONFIGURATION = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
{user}
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port} ssl http2;
        ssl_certificate {keys}/server.crt;
        ssl_certificate_key {keys}/server.key;
        ssl_client_certificate {keys}/ca.crt;
        ssl_verify_client optional;
        client_max_body_size 0;
        location /federad.Consortium/ {{
            grpc_pass grpc://unix:{socket};
            grpc_set_header x-client-verify $ssl_client_verify;
            grpc_set_header x-client-serial $ssl_client_serial;
        }}
        location / {{ return 404; }}
    }}
}}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def front(folder: Path, port: int, consortium: Path, upstream: Path) -> Iterator[None]:
    """nginx on a loopback port, in front of the consortium service's socket."""
    folder.mkdir(parents=True, exist_ok=True)
    configuration = folder / "nginx.conf"
    configuration.write_text(
        _CONFIGURATION.format(
            folder=folder,
            port=port,
            socket=upstream,
            keys=consortium / "keys",
            user="" if os.geteuid() else "user root;",
        )
    )
    nginx = subprocess.Popen([NGINX, "-e", "stderr", "-p", folder, "-c", configuration], stderr=subprocess.PIPE)
    try:
        wait_for(port)
        yield
    finally:
        nginx.terminate()
        nginx.wait(10)
        nginx.stderr.close()


def wait_for(port: int, timeout_s: float = 10.0) -> None:
    """Until something listens on a loopback port."""
    deadline = time.monotonic() + timeout_s
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert time.monotonic() < deadline, f"nothing listens on port {port}"
        time.sleep(0.05)


class Listener:
    """Something on a loopback port that meets each connection in a thread of its own."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def meet(self, connection: socket.socket) -> None:
        """What to do with a connection."""

    def close(self) -> None:
        self._socket.close()
        for connection in self._open:
            connection.close()

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self._open.append(connection)
                threading.Thread(target=self._meet, args=(connection,), daemon=True).start()

    def _meet(self, connection: socket.socket) -> None:
        with suppress(OSError, ValueError), connection:
            self.meet(connection)


class Proxy(Listener):
    """A proxy that gives tunnels (CONNECT), and remembers where to.

    Parameters
    ----------
    login
        ``name:password`` that it wants; none by default.
    """

    def __init__(self, login: str = "") -> None:
        super().__init__()
        self.asked: list[str] = []
        self._login = login

    @property
    def environment(self) -> dict[str, str]:
        return {"https_proxy": f"http://127.0.0.1:{self.port}"}

    def meet(self, connection: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            part = connection.recv(4096)
            if not part:
                return
            head += part
        lines = head.decode("latin-1").split("\r\n")
        self.asked.append(lines[0].split()[1])
        wanted = base64.b64encode(self._login.encode()).decode()
        given = [line.split()[-1] for line in lines if line.lower().startswith("proxy-authorization:")]
        if self._login and given != [wanted]:
            connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            return
        self.connect(connection, lines[0].split()[1])

    def connect(self, connection: socket.socket, target: str) -> None:
        """Make the tunnel."""
        host, port = target.rsplit(":", 1)
        with socket.create_connection((host.strip("[]"), int(port)), 5) as onward:
            connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=_pump, args=(onward, connection), daemon=True)
            back.start()
            _pump(connection, onward)
            back.join(5)


class PageProxy(Proxy):
    """A proxy that shows a page of its own."""

    def connect(self, connection: socket.socket, target: str) -> None:
        page = b"<html><title>Blocked by the\n hospital</title><body>Category: unknown</body></html>"
        connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Type: text/html\r\n\r\n")
        time.sleep(0.1)  # a page often comes after its head
        connection.sendall(page)


class InterceptingProxy(Proxy):
    """A proxy that opens TLS with a certificate of its own authority, as some networks do."""

    def __init__(self, folder: Path, host: str) -> None:
        super().__init__()
        authority = pki.new_authority("Hospital Network Inspection")
        certificate, key = write_certificate(folder, authority, host)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self._context.set_alpn_protocols(["h2", "http/1.1"])

    def connect(self, connection: socket.socket, target: str) -> None:
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with self._context.wrap_socket(connection, server_side=True) as secure:
            secure.recv(1)


class WebPage(Listener):
    """A web server without TLS, as a captive portal is."""

    def meet(self, connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")


class HangingUp(Listener):
    """Accepts and hangs up."""

    def meet(self, connection: socket.socket) -> None:
        connection.recv(1)


def write_certificate(folder: Path, authority: pki.Authority, host: str, days: float = 30) -> tuple[Path, Path]:
    """A server's certificate and key as files."""
    folder.mkdir(parents=True, exist_ok=True)
    key = pki.new_key()
    certificate = pki.server_certificate(authority, key.public_key(), host, days)
    (folder / "server.crt").write_text(pki.certificate_pem(certificate))
    (folder / "server.key").write_bytes(pki.key_pem(key))
    return folder / "server.crt", folder / "server.key"


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


class Operator:
    """A consortium whose service runs behind its front, as hospitals meet it.

    Parameters
    ----------
    folder
        Where all of it lies.
    host
        Under which name sites know it.
    """

    def __init__(self, folder: Path, host: str = "localhost") -> None:
        self.port = free_port()
        self.folder = folder
        self.consortium = Consortium.create(
            folder / "operator", ConsortiumConfig(name="Demo", host=host, port=self.port)
        )
        self._stack = ExitStack()

    @property
    def keys(self) -> Path:
        return self.consortium.folder / "keys"

    def __enter__(self):
        serving = self._stack.enter_context(Serving(self.consortium))
        self.stop_service = serving.stop
        self._stack.enter_context(front(self.folder / "nginx", self.port, self.consortium.folder, serving.socket))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def enrolled(self, site: str = "site-a") -> Path:
        """The courier's folder of a site that has joined."""
        courier = self.folder / site / "courier"
        enrol(self.consortium.invite(site), courier, {})
        return courier
