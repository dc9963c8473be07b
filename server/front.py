"""The one door to the outside: nginx with TLS, run by the operator's own user from the operator's folder.

Two things pass: paths under ``/v1/fleet/``, to the SuperLink on the loopback interface, and the gRPC service
``federad.Consortium``, to a Unix socket. Flower's Control and Runtime APIs, its documentation pages and everything else are
closed, and nothing answers without TLS. The configuration is written anew at each start and tested by nginx before use.

A caller's certificate is checked here against the consortium's authority; the result and the serial go on in
``x-client-verify`` and ``x-client-serial``, in place of whatever the caller wrote there. What they are worth is decided
behind the socket.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
from pathlib import Path
from pwd import getpwuid

from server.processes import Child, environment
from server.superlink import LOOPBACK
from shared_models.consortium import PACKAGE
from shared_models.errors import FederadError

FLEET = "/v1/fleet/"
SOCKET = "run/consortium.sock"
"""Where the consortium service listens, within the operator's folder."""

FLEET_BODY = "8m"
"""Longest body of a Fleet call; Flower cuts what it sends into pieces of 5 MB."""

PARCEL_BODY = "9g"
"""Longest stream of the consortium service; the service itself stops a parcel earlier."""

LONGEST_SOCKET_PATH = 100
"""Bytes that the system takes for the path of a Unix socket, with a little to spare."""

_CONFIGURATION = """\
# Written by federad-server start; changes are lost at the next one.
{user}daemon off;
worker_processes 2;
pid {folder}/run/nginx.pid;
error_log stderr warn;

events {{
    worker_connections 1024;
}}

http {{
    access_log off;
    server_tokens off;
    default_type text/plain;
    client_body_temp_path {temporary}/body;
    proxy_temp_path {temporary}/proxy;
    fastcgi_temp_path {temporary}/fastcgi;
    uwsgi_temp_path {temporary}/uwsgi;
    scgi_temp_path {temporary}/scgi;

    ssl_certificate {keys}/server.crt;
    ssl_certificate_key {keys}/server.key;
    ssl_client_certificate {keys}/ca.crt;
    ssl_verify_client optional;
    ssl_verify_depth 1;
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_ciphers ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-ECDSA-CHACHA20-POLY1305;
    ssl_session_cache shared:tls:4m;
    ssl_session_tickets off;

    # A site polls every few seconds: it keeps its connection. A caller that sends nothing is cut off.
    keepalive_timeout 75s;
    keepalive_requests 100000;
    client_header_timeout 20s;
    client_body_timeout 60s;
    send_timeout 60s;
    reset_timedout_connection on;
    large_client_header_buffers 4 16k;
    limit_conn_zone $binary_remote_addr zone=callers:4m;
    limit_conn callers 128;

    upstream superlink {{
        server {loopback}:{superlink_port} max_fails=0;
        keepalive 32;
    }}

    upstream consortium {{
        server unix:{folder}/{socket} max_fails=0;
        keepalive 8;
    }}

    server {{
        listen {port} ssl http2 default_server;
        {listen_v6}server_name _;

        # Plain HTTP on this port: hang up without a word.
        error_page 497 = @hang_up;
        # A certificate that does not count (expired, of another authority): say so in gRPC's way.
        error_page 495 = @certificate;

        location {fleet} {{
            if ($request_method != POST) {{ return 404 ""; }}
            client_max_body_size {fleet_body};
            proxy_pass https://superlink;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host {loopback};
            proxy_ssl_verify on;
            proxy_ssl_name {loopback};
            proxy_ssl_trusted_certificate {folder}/flower/loopback-ca.crt;
            proxy_ssl_session_reuse on;
            proxy_connect_timeout 5s;
            proxy_read_timeout 120s;
            proxy_send_timeout 120s;
            # Updates of sites pass through memory and are never written to disk here.
            proxy_request_buffering off;
            proxy_max_temp_file_size 0;
        }}

        location /{package}/ {{
            if ($request_method != POST) {{ return 404 ""; }}
            client_max_body_size {parcel_body};
            grpc_pass grpc://consortium;
            grpc_set_header x-client-verify $ssl_client_verify;
            grpc_set_header x-client-serial $ssl_client_serial;
            grpc_connect_timeout 5s;
            grpc_read_timeout 120s;
            grpc_send_timeout 120s;
            error_page 502 504 = @away;
        }}

        location = {fleet_itself} {{
            return 404 "";
        }}

        location = /{package} {{
            return 404 "";
        }}

        location / {{
            return 404 "";
        }}

        location @hang_up {{
            return 444;
        }}

        location @certificate {{
            default_type application/grpc;
            add_header grpc-status 16 always;
            add_header grpc-message $ssl_client_verify always;
            return 200 "";
        }}

        location @away {{
            default_type application/grpc;
            add_header grpc-status 14 always;
            add_header grpc-message "the consortium service does not answer" always;
            return 200 "";
        }}
    }}
}}
"""


class Front:
    """nginx for one operator's folder.

    Parameters
    ----------
    folder
        The operator's folder.
    port
        Where sites come in.
    superlink_port
        Where the SuperLink listens on the loopback interface.

    Raises
    ------
    FederadError
        S193 if nginx is not installed, S192 if the folder's path is too long for a socket.
    """

    def __init__(self, folder: Path, port: int, superlink_port: int) -> None:
        self._folder, self._port, self._superlink_port = folder.absolute(), port, superlink_port
        self._program = find_nginx()
        if len(os.fsencode(self._folder / SOCKET)) > LONGEST_SOCKET_PATH:
            raise FederadError(
                "S192",
                happened=f"The path {self._folder / SOCKET} is too long for a Unix socket.",
                because=f"The system takes {LONGEST_SOCKET_PATH} bytes.",
                remedies=("move the operator's folder to a place with a shorter path",),
            )

    @property
    def configuration(self) -> Path:
        """The file that is generated."""
        return self._folder / "nginx" / "nginx.conf"

    def write(self) -> None:
        """Write the configuration and let nginx test it.

        Raises
        ------
        FederadError
            S192 with nginx's own words if it refuses.
        """
        for name in ("nginx", "logs", "run"):
            (self._folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        self.configuration.write_text(self._text(), encoding="utf-8")
        tested = subprocess.run(  # noqa: S603  the command is ours
            [*self._command(), "-t", "-q"], capture_output=True, text=True, timeout=60, env=environment(), check=False
        )
        if tested.returncode:
            raise FederadError(
                "S192",
                happened=f"nginx refuses its configuration: {tested.stderr.strip()[-300:]}.",
                because="Without it no site can reach the consortium, and nothing is started half.",
                remedies=(
                    "look at the line it names in nginx/nginx.conf",
                    "install Debian's package nginx, 1.22 or newer",
                ),
            )

    def process(self) -> Child:
        """nginx, not yet started."""
        return Child(
            "nginx",
            self._command(),
            log_file=self._folder / "logs" / "nginx.log",
            stop_signal=signal.SIGTERM,
            orphan_signal=signal.SIGTERM,  # so that it ends its workers too
            leftover_signal=signal.SIGQUIT,  # workers answer what they were asked, and take nothing new
        )

    def is_healthy(self) -> bool:
        """Whether it answers over TLS as it should: with nothing."""
        context = ssl.create_default_context(cafile=str(self._folder / "keys" / "ca.crt"))
        context.check_hostname = False  # the certificate names the host that sites use
        try:
            with (
                socket.create_connection((LOOPBACK, self._port), timeout=5) as plain,
                context.wrap_socket(plain) as secure,
            ):
                secure.sendall(b"HEAD / HTTP/1.1\r\nHost: health\r\nConnection: close\r\n\r\n")
                return secure.recv(64).startswith(b"HTTP/1.1 404")
        except OSError:
            return False

    def require_free_port(self) -> None:
        """Raise S194 unless nginx will be able to listen."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("0.0.0.0", self._port))  # noqa: S104  sites come from everywhere
            except PermissionError:
                raise FederadError(
                    "S194",
                    happened=f"This user may not listen on port {self._port}.",
                    because="Ports below 1024 are kept for the administrator.",
                    remedies=(
                        "let the service manager grant it: AmbientCapabilities=CAP_NET_BIND_SERVICE in the systemd unit",
                        "or set another port in consortium.toml before sites enrol, for instance 8443",
                    ),
                ) from None
            except OSError as error:
                raise FederadError(
                    "S194",
                    happened=f"Port {self._port} cannot be used ({error.strerror}).",
                    because="Another program listens there, and sites would reach that one.",
                    remedies=(
                        f"find it with: ss -ltnp 'sport = :{self._port}'",
                        "end it, or set another port in consortium.toml before sites enrol",
                    ),
                ) from None

    def _text(self) -> str:
        nginx = self._folder / "nginx"
        return _CONFIGURATION.format(
            user=f"user {getpwuid(self._folder.stat().st_uid).pw_name};\n" if os.geteuid() == 0 else "",
            folder=_quoted(self._folder),
            temporary=_quoted(nginx),
            keys=_quoted(self._folder / "keys"),
            loopback=LOOPBACK,
            superlink_port=self._superlink_port,
            socket=SOCKET,
            port=self._port,
            listen_v6=f"listen [::]:{self._port} ssl http2 default_server;\n        " if _has_v6() else "",
            fleet=FLEET,
            fleet_itself=FLEET.rstrip("/"),
            fleet_body=FLEET_BODY,
            package=PACKAGE,
            parcel_body=PARCEL_BODY,
        )

    def _command(self) -> list[str]:
        return [self._program, "-p", str(self._folder / "nginx"), "-c", str(self.configuration), "-e", "stderr"]


def find_nginx() -> str:
    """The path of nginx; S193 if there is none."""
    places = os.pathsep.join((environment()["PATH"], "/usr/sbin", "/usr/local/sbin"))
    found = shutil.which("nginx", path=places)
    if found is None:
        raise FederadError(
            "S193",
            happened="nginx was not found.",
            because="It is the only program that sites reach; it keeps everything but two paths closed.",
            remedies=("apt install nginx", "then: systemctl disable --now nginx, since federad-server starts its own"),
        )
    return found


def _quoted(path: Path) -> str:
    """A path as nginx reads it; S192 for one that nginx could take for something else."""
    text = str(path)
    if any(character in text for character in " \t\n;{}\"'\\$#"):
        raise FederadError(
            "S192",
            happened=f"The path {text} has a character that nginx would not read as part of it.",
            because="The operator's folder stands in nginx's configuration.",
            remedies=("move the folder to a path of letters, digits, dots, hyphens and underscores",),
        )
    return text


def _has_v6() -> bool:
    if not socket.has_ipv6:
        return False
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return False
    return True
