"""The site's end of the consortium service, through networks of every kind."""

from __future__ import annotations

import shutil
import ssl
import threading
import time
from contextlib import suppress
from email.utils import formatdate
from types import SimpleNamespace

import network
import pytest

import client.link as module
import server.service
from client.enrolment import _request, _site_key
from client.link import Link, Membership, Proxy, check_clock, proxy_for
from server import pki
from shared_models.errors import FederadError
from shared_models.wire import CHUNK_BYTES

CA = pki.new_authority("Demo")


def failure(host: str, port: int, environment: dict[str, str] | None = None, ca: pki.Authority = CA) -> FederadError:
    """The error of a site that calls somebody."""
    with Link(host, port, ca.pem, environment=environment or {}) as link, pytest.raises(FederadError) as error:
        link.plans()
    return error.value


class TestProxyChoice:
    @pytest.mark.parametrize(
        ("environment", "proxy"),
        [
            ({}, None),
            ({"http_proxy": "http://p:1"}, None),
            ({"https_proxy": ""}, None),
            ({"https_proxy": "http://p:3128"}, Proxy(host="p", port=3128)),
            ({"HTTPS_PROXY": "p:3128"}, Proxy(host="p", port=3128)),
            ({"https_proxy": "http://p"}, Proxy(host="p", port=80)),
            ({"https_proxy": "http://a:1", "HTTPS_PROXY": "http://b:1"}, Proxy(host="a", port=1)),
            ({"https_proxy": "http://n:p%40s%3A@p:1/"}, Proxy(host="p", port=1, user="n", password="p@s:")),
            ({"https_proxy": "http://[::1]:3128"}, Proxy(host="::1", port=3128)),
        ],
    )
    def test_environment_names_the_proxy(self, environment, proxy):
        """
        In small or capital letters, with or without a login.
        """
        assert proxy_for("fl.example.org", 443, environment) == proxy

    @pytest.mark.parametrize(
        ("excepted", "host", "is_direct"),
        [
            ("*", "fl.example.org", True),
            ("fl.example.org", "fl.example.org", True),
            ("a, .example.org ,b", "fl.example.org", True),
            ("example.org", "fl.example.org", True),
            ("*.example.org", "fl.example.org", True),
            ("Fl.Example.Org:443", "fl.example.org", True),
            ("fl.example.org:444", "fl.example.org", False),
            ("ample.org", "fl.example.org", False),
            ("", "fl.example.org", False),
            (",", "fl.example.org", False),
            ("192.0.2.0/24", "192.0.2.7", True),
            ("192.0.2.7", "192.0.2.7", True),
            ("192.0.3.0/24", "192.0.2.7", False),
            ("2001:db8::/32", "2001:db8::1", True),
            ("[2001:db8::1]:443", "2001:db8::1", True),
        ],
    )
    def test_exceptions_are_kept(self, excepted, host, is_direct):
        """
        Names, domains, networks, with or without the port.
        """
        environment = {"https_proxy": "http://p:1", "no_proxy": excepted}

        assert (proxy_for(host, 443, environment) is None) == is_direct

    @pytest.mark.parametrize("proxy", ["https://p:1", "socks5://p:1", "http://", "http://p:port", "http://[::1"])
    def test_what_is_no_http_proxy_is_named(self, proxy):
        """
        Rather than silently gone around.
        """
        with pytest.raises(FederadError, match="C152"):
            proxy_for("fl.example.org", 443, {"https_proxy": proxy})

    def test_password_is_not_shown(self):
        """
        Neither in messages nor in logs.
        """
        proxy = proxy_for("x.org", 443, {"https_proxy": "http://name:secret@p:1"})

        assert "secret" not in f"{proxy} {proxy!r}"


class TestNoWay:
    def test_unknown_name_is_named(self):
        """
        DNS is told from everything else.
        """
        error = failure("consortium.invalid", 443)

        assert error.code == "C151"
        assert "the name of the consortium at consortium.invalid:443 is not known here" in error.happened

    def test_unknown_proxy_is_named(self):
        """
        It is the proxy's name that is not known, not the consortium's.
        """
        error = failure("consortium.invalid", 443, {"https_proxy": "http://proxy.invalid:3128"})

        assert (error.code, "the name of the proxy proxy.invalid:3128" in error.happened) == ("C151", True)

    def test_nobody_at_the_address_is_named(self):
        """
        A machine that is there, where nothing listens.
        """
        error = failure("localhost", network.free_port())

        assert error.code == "C151"
        assert "does not answer (Connection refused)" in error.happened

    def test_nobody_at_the_proxys_address_is_named(self):
        """
        A proxy that is down.
        """
        error = failure("localhost", 1, {"https_proxy": f"http://127.0.0.1:{network.free_port()}"})

        assert (error.code, "the proxy 127.0.0.1" in error.happened) == ("C151", True)

    def test_silence_is_named_in_time(self, monkeypatch):
        """
        Something accepts and says nothing: the site waits a bounded time and says so.
        """
        monkeypatch.setattr(module, "CALL_S", 1.0)
        monkeypatch.setattr(module, "STEP_S", 1.0)

        class Silent(network.Listener):
            def meet(self, connection):
                time.sleep(20)

        with Silent() as silent:
            began = time.monotonic()
            error = failure("localhost", silent.port)

        assert error.code == "C151"
        assert time.monotonic() - began < 10

    def test_hanging_up_is_named(self):
        """
        A firewall that lets the connection begin and cuts it when TLS does.
        """
        with network.HangingUp() as other:
            error = failure("localhost", other.port)

        assert (error.code, "hung up" in error.happened) == ("C151", True)


class TestProxy:
    def test_proxys_login_is_named(self):
        """
        407 says that a name and password are missing, or wrong, and how to give them.
        """
        with network.Proxy(login="name:p@ss") as proxy:
            missing = failure("localhost", 443, proxy.environment)
            wrong = failure("localhost", 443, {"https_proxy": f"http://name:x@127.0.0.1:{proxy.port}"})

        assert missing.code == wrong.code == "C152"
        assert "wants a name and password (407)" in missing.happened
        assert "wants another name or password (407)" in wrong.happened
        assert "https_proxy=http://NAME:PASSWORD@PROXY:PORT" in str(missing)

    def test_proxys_own_page_is_named(self):
        """
        Its status and its title, so that the network's administrators recognise it.
        """
        with network.PageProxy() as proxy:
            error = failure("localhost", 443, proxy.environment)

        assert error.code == "C152"
        assert "answered 403" in error.happened
        assert "'Blocked by the hospital'" in error.happened

    def test_something_else_at_the_proxys_address_is_named(self):
        """
        A port at which no proxy listens, but something.
        """

        class Mail(network.Listener):
            def meet(self, connection):
                connection.sendall(b"220 mail ready\r\n\r\n")

        with Mail() as mail:
            error = failure("localhost", 443, {"https_proxy": f"http://127.0.0.1:{mail.port}"})

        assert (error.code, "is no HTTP proxy" in error.happened) == ("C152", True)

    def test_proxy_that_opens_tls_is_named(self, tmp_path):
        """
        Whoever gave out the certificate that it shows is named, and the way out.
        """
        with network.InterceptingProxy(tmp_path, "localhost") as proxy:
            error = failure("localhost", 443, proxy.environment)

        assert error.code == "C153"
        assert "given out by 'Hospital Network Inspection" in error.happened
        assert "excepted from inspection" in str(error)

    def test_page_without_tls_is_named(self):
        """
        A captive portal answers in plain text.
        """
        with network.WebPage() as page:
            error = failure("localhost", page.port)

        assert (error.code, "does not speak TLS" in error.happened) == ("C153", True)


class Front(network.Listener):
    """A front with a certificate and a clock of its own choice, and no service behind it."""

    def __init__(self, folder, host="localhost", days=30.0, authority=CA, ahead_s=0.0, protocols=("h2", "http/1.1")):
        super().__init__()
        certificate, key = network.write_certificate(folder, authority, host, days)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self._context.set_alpn_protocols(list(protocols))
        self._ahead_s = ahead_s

    def meet(self, connection):
        with suppress(ssl.SSLError), self._context.wrap_socket(connection, server_side=True) as secure:
            if secure.recv(4096).startswith(b"HEAD"):
                date = formatdate(time.time() + self._ahead_s, usegmt=True)
                secure.sendall(f"HTTP/1.1 404 Not Found\r\nDate: {date}\r\n\r\n".encode())


class TestStranger:
    def test_ended_certificate_is_named_with_its_day(self, tmp_path):
        """
        The operator has to renew it, and the message says since when.
        """
        with Front(tmp_path, days=-2) as front:
            error = failure("localhost", front.port)

        assert error.code == "C153"
        assert f"ended on {time.strftime('%Y-%m-%d', time.gmtime(time.time() - 2 * 86_400))}" in error.happened

    def test_certificate_for_another_name_is_named(self, tmp_path):
        """
        With the name that it is for.
        """
        with Front(tmp_path, host="old.example.org") as front:
            error = failure("localhost", front.port)

        assert error.code == "C153"
        assert "is for old.example.org" in error.happened

    def test_certificate_for_another_address_is_named(self, tmp_path):
        """
        Where the consortium is known by its address.
        """
        with Front(tmp_path, host="192.0.2.1") as front:
            error = failure("127.0.0.1", front.port)

        assert (error.code, "is for 192.0.2.1" in error.happened) == ("C153", True)

    def test_certificate_that_the_whole_machine_trusts_does_not_count(self, tmp_path, monkeypatch):
        """
        Only the pinned authority is trusted, whatever the machine's list says.
        """
        other = pki.new_authority("Public Trust")
        (tmp_path / "machine.pem").write_text(other.pem)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "machine.pem"))
        monkeypatch.setenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", str(tmp_path / "machine.pem"))
        with Front(tmp_path / "f", authority=other) as front:
            error = failure("localhost", front.port)

        assert (error.code, "'Public Trust, federad authority'" in error.happened) == ("C153", True)

    def test_front_without_http_2_is_named(self, tmp_path):
        """
        An older proxy of the operator's own in between.
        """
        with Front(tmp_path, protocols=["http/1.1"]) as front:
            error = failure("localhost", front.port)

        assert (error.code, "no HTTP/2" in error.happened) == ("C152", True)


class TestClock:
    def test_clock_far_behind_is_told_from_an_ended_certificate(self, tmp_path):
        """
        A certificate that has ended here holds by the consortium's own clock: it is ours that is wrong.
        """
        with Front(tmp_path, days=-0.02, ahead_s=-3600) as front:
            error = failure("localhost", front.port)

        assert error.code == "C155"
        assert "60 minutes ahead of the consortium's" in error.happened

    @pytest.mark.parametrize(
        ("off_s", "words"), [(600, "10 minutes behind"), (-600, "10 minutes ahead of"), (-20, "20 s ahead of")]
    )
    @network.needs_nginx
    def test_clock_is_compared_at_every_call(self, operator, courier, monkeypatch, off_s, words):
        """
        Flower would say no more than 401; here it is said by how much and which way.
        """
        monkeypatch.setattr(server.service, "time", SimpleNamespace(time=lambda: time.time() + off_s))
        with Link.open(courier, {}) as link, pytest.raises(FederadError) as error:
            link.plans()

        assert error.value.code == "C155"
        assert words in error.value.happened

    @pytest.mark.parametrize(("ahead_s", "took_s"), [(0, 0), (4, 0), (-230, 0), (20, 30), (-230, 30)])
    def test_slow_call_is_no_wrong_clock(self, ahead_s, took_s):
        """
        What may be due to the way is not laid to the clock.
        """
        check_clock(time.time() - ahead_s, time.time() - took_s)
        check_clock(None, 0)


@pytest.fixture(scope="module")
def operator(tmp_path_factory):
    with network.Operator(tmp_path_factory.mktemp("o")) as operator:
        yield operator


@pytest.fixture(scope="module")
def courier(operator):
    return operator.enrolled("site-a")


@network.needs_nginx
class TestThroughAProxy:
    @pytest.mark.parametrize("login", ["", "name:p@ss: word"])
    def test_calls_and_parcels_go_through(self, operator, courier, login):
        """
        A tunnel to the one name and port, with the login where one is wanted.
        """
        with network.Proxy(login) as proxy:
            shown = login.replace("p@ss: word", "p%40ss%3A%20word")
            environment = {"https_proxy": f"http://{shown + '@' if shown else ''}127.0.0.1:{proxy.port}"}
            with Link.open(courier, environment) as link:
                stored = link.put_parcel(bytes(CHUNK_BYTES) for _ in range(12))

                assert link.plans() == []
                assert sum(map(len, link.get_parcel(stored.sha256, stored.n_bytes))) == 12 * CHUNK_BYTES
            assert proxy.asked == [f"localhost:{operator.port}"]

    def test_excepted_host_goes_past_it(self, courier):
        """
        no_proxy holds for calls as it does elsewhere.
        """
        with network.Proxy() as proxy, Link.open(courier, proxy.environment | {"NO_PROXY": "localhost"}) as link:
            link.plans()

            assert proxy.asked == []

    def test_environment_of_the_process_does_not_interfere(self, courier, monkeypatch):
        """
        gRPC's own variables send nothing to a proxy that the link did not choose.
        """
        with network.Proxy() as proxy:
            for name in ("grpc_proxy", "https_proxy", "http_proxy"):
                monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
            with Link.open(courier, {}) as link:
                link.plans()

            assert proxy.asked == []


@network.needs_nginx
class TestConsortium:
    def test_known_by_its_address(self, tmp_path):
        """
        A consortium without a name in DNS works by its address.
        """
        with network.Operator(tmp_path, host="127.0.0.1") as operator, Link.open(operator.enrolled(), {}) as link:
            assert link.plans() == []

    def test_link_recovers_by_itself(self, tmp_path):
        """
        The same link works again when the consortium is back, and says in between that it is away.
        """
        operator = network.Operator(tmp_path)
        with operator:
            link = Link.open(operator.enrolled(), {})
            assert link.plans() == []
        with pytest.raises(FederadError, match="C151"):
            link.plans()
        with operator, link:
            deadline = time.monotonic() + 20
            while True:
                with suppress(FederadError):
                    assert link.plans() == []
                    break
                assert time.monotonic() < deadline
                time.sleep(0.2)

    def test_service_that_is_down_behind_its_front_is_told_apart(self, tmp_path):
        """
        The way is good and the hospital need not look for anything.
        """
        with network.Operator(tmp_path) as operator:
            courier = operator.enrolled()
            operator.stop_service()
            with Link.open(courier, {}) as link, pytest.raises(FederadError) as error:
                link.plans()

        assert error.value.code == "C151"
        assert "the front at" in error.value.happened

    def test_own_certificate_that_ended_is_named(self, operator, courier, tmp_path):
        """
        With its day, and without a look at the network.
        """
        mine = shutil.copytree(courier, tmp_path / "courier")
        csr = _request(_site_key(mine / "site.key"), "site-a")
        certificate = pki.site_certificate(operator.consortium.authority, csr, "site-a", days=-1)
        (mine / "site.crt").write_text(pki.certificate_pem(certificate))
        with Link.open(mine, {}) as link, pytest.raises(FederadError, match=r"C154.*certificate ended on"):
            link.plans()

    def test_transfer_that_stands_still_is_given_up(self, operator, courier, monkeypatch):
        """
        A link that is open at one end only does not hold a round for ever.
        """
        monkeypatch.setattr(module, "STALL_S", 1.0)
        frozen = threading.Event()

        def freezing():
            yield bytes(CHUNK_BYTES)
            frozen.wait(30)

        began = time.monotonic()
        with Link.open(courier, {}) as link, pytest.raises(FederadError, match="stood still"):
            link.put_parcel(freezing())
        frozen.set()

        assert time.monotonic() - began < 10


class TestFolder:
    def test_site_that_has_not_enrolled_is_told_how(self, tmp_path):
        """
        No folder, or an empty one.
        """
        with pytest.raises(FederadError, match=r"C150[\s\S]*federad-site enrol"):
            Link.open(tmp_path, {})

    @pytest.mark.parametrize("name", ["ca.crt", "site.key", "site.crt", "consortium.json"])
    @network.needs_nginx
    def test_damaged_folder_is_named(self, courier, tmp_path, name):
        """
        A file that is gone or cut.
        """
        mine = shutil.copytree(courier, tmp_path / "courier")
        (mine / name).unlink()
        with pytest.raises(FederadError, match="C150"):
            Link.open(mine, {})
        (mine / name).write_bytes(b"-----BEGIN")
        with pytest.raises(FederadError, match="C150"):
            Link.open(mine, {})

    @network.needs_nginx
    def test_membership_says_where_and_who(self, operator, courier):
        """
        What the station and the SuperNode need to know of the consortium.
        """
        member = Membership.load(courier)

        assert (member.name, member.host, member.port, member.site) == ("Demo", "localhost", operator.port, "site-a")
