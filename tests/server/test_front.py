"""The front: a real nginx in front of what stands for SuperLink and consortium service, and what it lets through."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import pytest
from operators import free_port, needs_nginx, new_consortium, short_folder, until

from server import front as front_module
from server import pki
from server.front import SOCKET, Front
from server.superlink import SuperLink
from shared_models.errors import FederadError
from shared_models.wire import service, stream, stream_handler, unary, unary_handler

pytestmark = needs_nginx


class Recorder(BaseHTTPRequestHandler):
    """Stands where the SuperLink does and tells what it was asked."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        told = json.dumps({"path": self.path, "length": len(body)}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    do_GET = do_PUT = do_DELETE = do_POST  # noqa: N815

    def log_message(self, *_): ...


class Place:
    """An operator's folder with nginx running in it."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        self.consortium = new_consortium(folder, self.port)
        self.link = SuperLink(folder)
        self.link.prepare()
        self.front = Front(folder, self.port, self.link.port)
        self.front.write()
        self.nginx = self.front.process()

    def context(self, certificate=None):
        context = ssl.create_default_context(cafile=str(self.folder / "keys" / "ca.crt"))
        if certificate is not None:
            context.load_cert_chain(*certificate)
        return context

    def request(self, path, method="POST", body=b"", headers=()):
        connection = http.client.HTTPSConnection("localhost", self.port, context=self.context(), timeout=20)
        try:
            connection.request(method, path, body, dict(headers))
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()

    def channel(self, key=None, certificate=None):
        ca = (self.folder / "keys" / "ca.crt").read_bytes()
        return grpc.secure_channel(f"localhost:{self.port}", grpc.ssl_channel_credentials(ca, key, certificate))


@pytest.fixture(scope="module")
def place():
    """nginx with a recorder on the SuperLink's port and a telling service on the consortium's socket."""
    with short_folder() as folder:
        place = Place(folder)
        recorder = ThreadingHTTPServer(("127.0.0.1", place.link.port), Recorder)
        inner = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        inner.load_cert_chain(folder / "flower" / "loopback.crt", folder / "flower" / "loopback.key")
        recorder.socket = inner.wrap_socket(recorder.socket, server_side=True)
        threading.Thread(target=recorder.serve_forever, daemon=True).start()

        def told(request, context):
            return json.dumps([[key, str(value)] for key, value in context.invocation_metadata()]).encode()

        def echo(parts, context):
            yield from parts

        server = grpc.server(ThreadPoolExecutor(4))
        handlers = {"Told": unary_handler(told), "Echo": stream_handler(echo)}
        server.add_generic_rpc_handlers((service("federad.Consortium", handlers), service("other.Service", handlers)))
        server.add_insecure_port(f"unix:{folder / SOCKET}")
        server.start()
        place.nginx.start()
        until(place.front.is_healthy)
        yield place
        place.nginx.stop()
        server.stop(0)
        recorder.shutdown()
        recorder.server_close()


def metadata_of(place, key=None, certificate=None, sent=()):
    """What the consortium service is told about a caller, by key."""
    with place.channel(key, certificate) as channel:
        told = json.loads(unary(channel, "/federad.Consortium/Told")(b"", timeout=20, metadata=sent))
    found = {}
    for name, value in told:
        found.setdefault(name, []).append(value)
    return found


def certificate_for(place, name, days=30.0):
    """A site's key and certificate, PEM, and the serial number."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import NameOID

    key = pki.new_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA384())
    from cryptography.hazmat.primitives.serialization import Encoding

    made = pki.site_certificate(place.consortium.authority, request.public_bytes(Encoding.PEM), name, days)
    return pki.key_pem(key), pki.certificate_pem(made).encode(), pki.serial_of(made)


class TestPaths:
    def test_fleet_calls_reach_the_superlink(self, place):
        """
        What SuperNodes say passes, body and all.
        """
        status, body = place.request("/v1/fleet/pull-messages", body=b"x" * 1000)

        assert (status, json.loads(body)) == (200, {"path": "/v1/fleet/pull-messages", "length": 1000})

    @pytest.mark.parametrize(
        "path",
        [
            "/",
            "/v1/fleet",
            "/v1/control/list-runs",
            "/v1/runtime/acquire-task",
            "/docs",
            "/openapi.json",
            "/health",
            "/v1/fleet/../control/stop-run",
            "/v1/fleet/%2e%2e/control/stop-run",
            "/v1/fleet/..%2fcontrol/stop-run",
            "/v1/fleet//../../v1/control/stop-run",
            "//v1/control/stop-run",
            "/v1/./control/stop-run",
            "/V1/CONTROL/stop-run",
            "/v1/fleet/x/../../control/stop-run",
            "/federad.Consortium",
            "/flwr.proto.Control/StopRun",
            "/other.Service/Told",
            "*",
        ],
    )
    @pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS", "HEAD"])
    def test_nothing_else_passes(self, place, path, method):
        """
        However a path is spelt, only the two that belong outside lead anywhere.
        """
        status, body = place.request(path, method)

        assert status in (400, 404, 405)
        assert b"path" not in body

    def test_fleet_paths_take_nothing_but_calls(self, place):
        """
        SuperNodes only ever post.
        """
        assert place.request("/v1/fleet/pull-messages", "GET")[0] == 404

    def test_body_that_is_too_long_is_refused_before_it_arrives(self, place):
        """
        Flower's pieces are of five megabytes; ten are not passed on.
        """
        assert place.request("/v1/fleet/push-object", body=b"x" * 6_000_000)[0] == 200
        headers = {"content-length": str(10_000_000)}
        assert place.request("/v1/fleet/push-object", body=b"", headers=headers.items())[0] == 413

    def test_other_services_on_the_socket_stay_closed(self, place):
        """
        Only ``federad.Consortium`` leads to the socket.
        """
        with place.channel() as channel, pytest.raises(grpc.RpcError) as caught:
            unary(channel, "/other.Service/Told")(b"", timeout=20)

        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED

    def test_long_streams_pass_in_both_directions(self, place):
        """
        Parcels go through piece by piece, more than any body limit of the Fleet.
        """
        piece = b"x" * (1 << 20)
        with place.channel() as channel:
            back = sum(
                len(part) for part in stream(channel, "/federad.Consortium/Echo")(iter([piece] * 40), timeout=60)
            )

        assert back == 40 << 20


class TestWithoutTls:
    @pytest.mark.parametrize("path", ["/", "/v1/fleet/pull-messages", "/federad.Consortium/Told"])
    def test_plain_http_gets_no_word(self, place, path):
        """
        Who speaks without TLS is hung up on.
        """
        with socket.create_connection(("localhost", place.port), timeout=20) as plain:
            plain.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n".encode())
            with suppress(ConnectionResetError):
                assert plain.recv(1000) == b""

    def test_plain_http2_gets_no_word(self, place):
        """
        The same for gRPC without TLS.
        """
        with grpc.insecure_channel(f"localhost:{place.port}") as channel, pytest.raises(grpc.RpcError) as caught:
            unary(channel, "/federad.Consortium/Told")(b"", timeout=10)

        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
    def test_old_tls_is_refused(self, place, version):
        """
        TLS before 1.2 is no TLS.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="TLSv1"):
            context.minimum_version = context.maximum_version = version
        with (
            socket.create_connection(("localhost", place.port), timeout=20) as plain,
            pytest.raises((ssl.SSLError, OSError)),
        ):
            context.wrap_socket(plain).do_handshake()


class TestCertificates:
    def test_service_hears_of_a_certificate_of_the_consortium(self, place):
        """
        A site's certificate arrives as SUCCESS with its serial number.
        """
        key, certificate, serial = certificate_for(place, "site-1")
        told = metadata_of(place, key, certificate)

        assert told["x-client-verify"] == ["SUCCESS"]
        assert [value.lstrip("0") for value in told["x-client-serial"]] == [serial]

    def test_caller_s_own_words_about_itself_are_replaced(self, place):
        """
        A caller without a certificate cannot say that it has one, once or several times.
        """
        claims = (("x-client-verify", "SUCCESS"), ("x-client-serial", "01"), ("x-client-verify", "SUCCESS"))
        told = metadata_of(place, sent=claims)

        assert told["x-client-verify"] == ["NONE"]
        assert "x-client-serial" not in told or told["x-client-serial"] == [""]

    def test_certificate_of_another_authority_is_refused_in_grpc_s_words(self, place, tmp_path):
        """
        A certificate that another authority gave out does not reach the service.
        """
        other = new_consortium(tmp_path / "other")
        key, certificate, _ = certificate_for(type("Other", (), {"consortium": other}), "site-1")
        with pytest.raises(grpc.RpcError) as caught:
            metadata_of(place, key, certificate)

        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED

    def test_expired_certificate_is_refused_and_said_to_be(self, place):
        """
        The caller learns that its certificate has expired.
        """
        key, certificate, _ = certificate_for(place, "site-1", days=-1)
        with pytest.raises(grpc.RpcError) as caught:
            metadata_of(place, key, certificate)

        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert "expired" in caught.value.details()

    def test_renewed_server_certificate_is_shown_after_a_reload(self, place):
        """
        The operator's certificate is renewed without anybody being cut off.
        """

        def shown():
            with socket.create_connection(("localhost", place.port)) as plain:
                return place.context().wrap_socket(plain, server_hostname="localhost").getpeercert()["serialNumber"]

        before = shown()
        (place.folder / "keys" / "server.crt").unlink()
        assert place.consortium.refresh_server_certificate()
        place.nginx.signal(signal.SIGHUP)
        until(lambda: shown() != before)
        assert place.request("/v1/fleet/pull-messages")[0] == 200


class TestStart:
    def test_missing_nginx_is_named(self, tmp_path, monkeypatch):
        """
        Without nginx the message is S193 and says how to get it.
        """
        monkeypatch.setattr(front_module.shutil, "which", lambda *_, **__: None)
        with pytest.raises(FederadError) as caught:
            Front(tmp_path, 8443, 1234)

        assert caught.value.code == "S193"
        assert "apt install nginx" in str(caught.value)

    def test_port_that_is_taken_is_named(self, tmp_path):
        """
        Another program on the port is S194, with the command that finds it.
        """
        with socket.socket() as other:
            other.bind(("0.0.0.0", 0))
            other.listen()
            port = other.getsockname()[1]
            with pytest.raises(FederadError) as caught:
                Front(tmp_path, port, 1234).require_free_port()

        assert caught.value.code == "S194"
        assert f"sport = :{port}" in str(caught.value)

    @pytest.mark.parametrize("name", ["with blank", "with;semicolon", "with$dollar", "x" * 120])
    def test_folder_that_nginx_would_misread_is_refused(self, tmp_path, name):
        """
        A path that would mean something else in the configuration, or is too long for a socket, is S192.
        """
        folder = tmp_path / name
        folder.mkdir()
        with pytest.raises(FederadError) as caught:
            Front(folder, 8443, 1234).write()

        assert caught.value.code == "S192"

    def test_configuration_that_nginx_refuses_stops_the_start(self):
        """
        nginx tests the configuration first; without the server's certificate it says so in S192.
        """
        with short_folder() as folder:
            (folder / "keys").mkdir()
            with pytest.raises(FederadError) as caught:
                Front(folder, free_port(), 1234).write()

        assert caught.value.code == "S192"
        assert "server.crt" in caught.value.happened

    def test_updates_are_never_written_to_disk_by_nginx(self, place):
        """
        What sites upload passes through memory.
        """
        place.request("/v1/fleet/push-object", body=b"x" * 6_000_000)
        log = (place.folder / "logs" / "nginx.log").read_text()

        assert "temporary file" not in log
