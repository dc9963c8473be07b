"""An archive is believed when its authority vouches for it, and no secret of this site goes to anybody else."""

from __future__ import annotations

import base64
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pydicom
import pytest
from archives import Authority, Papers, https, needs_orthanc, orthanc
from network import needs_nginx
from operators import free_port
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage
from pynetdicom import AE, evt
from typer.testing import CliRunner

from client import archive_dimse, delivery
from client.archive import Query, greet, opened
from client.archive_identity import web_session
from client.cli import app
from client.delivery import deliver
from client.folder import SiteFolder
from client.retrieval import retrieve
from client.site import Pacs, SiteConfig
from client.station import Station
from shared_models.errors import FederadError

PASSWORD = "s3cret-of-the-archive"


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"), "hospital")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Authority:
    """An authority that this hospital knows nothing of."""
    return Authority(tmp_path_factory.mktemp("theirs"), "stranger")


@pytest.fixture(scope="module")
def server(ours) -> Papers:
    return ours.papers("archive")


@pytest.fixture(scope="module")
def client(ours) -> Papers:
    return ours.papers("site")


def shown(papers: Papers) -> dict[str, str]:
    return {"certificate": str(papers.certificate), "key": str(papers.key)}


@contextmanager
def archive(papers: Papers | None, authority: Authority | None) -> Iterator[tuple[int, list[pydicom.Dataset]]]:
    """A storage service over TLS, which asks for certificates of an authority if one is given; its port and what came."""
    taken: list[pydicom.Dataset] = []

    def store(event: evt.Event) -> int:
        taken.append(event.dataset)
        return 0

    context = None
    if papers is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(papers.certificate, papers.key)
        if authority is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(authority.file)
    entity = AE(ae_title="PACS")
    entity.add_supported_context(MRImageStorage, ExplicitVRLittleEndian)
    entity.add_supported_context("1.2.840.10008.1.1")
    running = entity.start_server(
        ("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, store)], ssl_context=context
    )
    try:
        yield running.socket.getsockname()[1], taken
    finally:
        running.shutdown()


def refused(work) -> FederadError:
    with pytest.raises(FederadError) as caught:
        work()
    assert caught.value.remedies
    return caught.value


@pytest.fixture
def image(tmp_path, write_series) -> Path:
    return write_series(tmp_path / "study", np.ones((1, 8, 8), int)).files[0]


class TestTls:
    def test_object_goes_to_an_archive_that_both_sides_vouch_for(self, ours, server, client, image):
        """
        C-STORE and C-ECHO over TLS, with the pinned authority and a certificate of the site's own.
        """
        with archive(server, ours) as (port, taken):
            pacs = Pacs(host="127.0.0.1", port=port, ae_title="PACS", tls=True, ca_file=str(ours.file), **shown(client))
            greet(pacs)
            assert deliver([image], pacs) == 1

        assert taken == [pydicom.dcmread(image)]

    def test_archive_of_another_authority_or_name_gets_nothing(self, ours, theirs, client, image, monkeypatch):
        """
        C130, with what is wrong; without TLS on that port too; and the system's authorities do not know a hospital's own.
        """
        monkeypatch.setattr(delivery, "TIMEOUT_S", 1.0)
        monkeypatch.setattr(archive_dimse, "TIMEOUT_S", 1.0)
        cases = {
            "another authority": (theirs.papers("archive"), str(ours.file), "not accepted"),
            "another name": (ours.papers("elsewhere", "pacs.hospital.example"), str(ours.file), "not accepted"),
            "system": (ours.papers("archive2"), None, "not accepted"),
            "no TLS": (None, str(ours.file), "does not speak TLS"),
        }
        for name, (papers, ca_file, said) in cases.items():
            with archive(papers, None) as (port, taken):
                pacs = Pacs(host="127.0.0.1", port=port, ae_title="PACS", tls=True, ca_file=ca_file, **shown(client))
                for work in (lambda pacs=pacs: deliver([image], pacs), lambda pacs=pacs: greet(pacs)):
                    error = refused(work)
                    assert error.code == "C130", name
                    assert said in error.happened, name
                assert not taken, name

    def test_archive_that_wants_a_certificate_says_so(self, ours, theirs, server, image):
        """
        None, or one that it does not know: C131.
        """
        with archive(server, ours) as (port, taken):
            for papers in ({}, shown(theirs.papers("site"))):
                pacs = Pacs(host="127.0.0.1", port=port, ae_title="PACS", tls=True, ca_file=str(ours.file), **papers)
                assert refused(lambda pacs=pacs: deliver([image], pacs)).code == "C131"
                assert refused(lambda pacs=pacs: greet(pacs)).code == "C131"
            assert refused(lambda: deliver([image], Pacs(host="127.0.0.1", port=port, ae_title="PACS"))).code == "C126"
        assert not taken

    def test_listener_takes_nothing_from_whom_nobody_vouches_for(self, ours, theirs, server, client):
        """
        While a retrieval runs: an archive with a certificate of the named authority gets in, and neither one with
        another nor one without TLS.
        """
        listen = free_port()
        pacs = Pacs(
            host="127.0.0.1", ae_title="PACS", tls=True, ca_file=str(ours.file), listen_port=listen, **shown(client)
        )

        def gets_in(papers: Papers | None) -> bool:
            entity = AE(ae_title="PACS")
            entity.add_requested_context(MRImageStorage, ExplicitVRLittleEndian)
            context = ssl.create_default_context(cafile=str(ours.file))
            if papers is not None:
                context.load_cert_chain(papers.certificate, papers.key)
            tls = (context, "127.0.0.1") if papers is not None else None
            association = entity.associate("127.0.0.1", listen, ae_title="FEDERAD", tls_args=tls)
            established = bool(association.is_established)
            if established:
                association.release()
            return established

        with opened(pacs, lambda: 10**6):
            assert gets_in(server)
            assert not gets_in(theirs.papers("archive"))
            assert not gets_in(None)


class Web:
    """A DICOMweb service that knows who may ask, as far as this needs one."""

    def __init__(self, papers: Papers | None, wanted: str | None, *, status: int = 401, to: str | None = None) -> None:
        self.asked: list[str | None] = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked.append(self.headers["Authorization"])
                is_known = wanted is None or self.headers["Authorization"] == wanted
                self.send_response(302 if to else 200 if is_known else status)
                if to:
                    self.send_header("Location", to + self.path)
                body = b"" if to or not is_known else b"[]"
                self.send_header("Content-Type", "application/dicom+json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if papers is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(papers.certificate, papers.key)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.address = f"http{'s' if papers else ''}://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Web:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def secret_file(tmp_path) -> Path:
    path = tmp_path / "secret"
    path.touch(0o600)
    path.write_text(PASSWORD + "\n")
    return path


class TestWeb:
    def test_name_and_password_or_token_go_with_every_question(self, ours, server, secret_file):
        """
        From a file, over TLS, to the archive that the pinned authority vouches for.
        """
        basic = "Basic " + base64.b64encode(f"föderad:{PASSWORD}".encode()).decode()
        ways = {
            basic: {"user": "föderad", "password_file": str(secret_file)},
            f"Bearer {PASSWORD}": {"token_file": str(secret_file)},
        }
        for wanted, way in ways.items():
            with Web(server, wanted) as web:
                greet(Pacs(dicomweb=f"{web.address}/dicom-web", ca_file=str(ours.file), **way))

                assert web.asked == [wanted]

    @pytest.mark.parametrize("status", [401, 403])
    def test_archive_that_does_not_know_this_site_says_so(self, ours, server, secret_file, status, caplog):
        """
        C131 with the status, for questions and for what is sent; the secret is in no message and no log.
        """
        with Web(server, "something else", status=status) as web:
            pacs = Pacs(dicomweb=web.address, ca_file=str(ours.file), token_file=str(secret_file))
            error = refused(lambda: greet(pacs))

        assert error.code == "C131"
        assert str(status) in error.happened
        assert PASSWORD not in f"{error} {caplog.text} {web_session(pacs).auth!r} {pacs!r}"

    def test_stranger_gets_no_secret(self, theirs, ours, secret_file):
        """
        Another authority than the pinned one: C130, and not one request arrived.
        """
        with Web(theirs.papers("archive"), None) as web:
            pacs = Pacs(dicomweb=web.address, ca_file=str(ours.file), token_file=str(secret_file))

            assert refused(lambda: greet(pacs)).code == "C130"
            assert web.asked == []

    def test_redirection_takes_no_secret_along(self, ours, server, secret_file):
        """
        Neither to a place without TLS nor to another one with it.
        """
        with Web(None, None) as plain, Web(server, None) as other:
            for place in (plain, other):
                with Web(server, None, to=place.address) as web:
                    pacs = Pacs(dicomweb=web.address, ca_file=str(ours.file), token_file=str(secret_file))
                    with suppress(FederadError):
                        greet(pacs)
                assert all(asked is None for asked in place.asked)

    def test_nothing_is_taken_from_the_surroundings(self, monkeypatch, tmp_path, server, ours):
        """
        No proxy and no .netrc: what goes to the archive is what site.toml names.
        """
        (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password b\n")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{free_port()}")
        with Web(server, None) as web:
            greet(Pacs(dicomweb=web.address, ca_file=str(ours.file)))

            assert web.asked == [None]


class TestConfiguration:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ('dicomweb = "http://a/b"\nuser = "u"\npassword_file = "/p"', "no secret goes unencrypted"),
            ('dicomweb = "http://a/b"\ntoken_file = "/p"', "no secret goes unencrypted"),
            ('host = "a"\ntls = true\ntoken_file = "/p"', "no secret goes unencrypted"),
            ('dicomweb = "https://a/b"\nuser = "u"', "belong together"),
            ('dicomweb = "https://a/b"\nuser = "u"\npassword_file = "/p"\ntoken_file = "/t"', "give either"),
            ('dicomweb = "https://a/b"\ntls = true', "https://"),
            ('host = "a"\nca_file = "/c"', "need tls = true"),
            ('host = "a"\ntls = true\ncertificate = "/c"', "belong together"),
            ('host = "a"\ntls = true\nlisten_port = 4', "listen_port with tls"),
            ('host = "a"\ntls = true\nca_file = "c.pem"', "pattern"),
            ('dicomweb = "https://a/b"\nuser = "u"\npassword = "p"', "password"),
        ],
    )
    def test_what_does_not_fit_together_is_refused(self, tmp_path, text, said):
        """
        C146, above all a secret over a connection that is not encrypted, and a password in the file itself.
        """
        (tmp_path / "site.toml").write_text(f'name = "a"\ndata = "/data"\n[pacs]\n{text}\n')

        error = refused(lambda: SiteConfig.load(tmp_path))

        assert error.code == "C146"
        assert said in error.happened

    @pytest.mark.parametrize("fault", ["open to others", "missing", "empty", "several lines", "a folder"])
    def test_secret_that_is_none_is_refused(self, ours, tmp_path, secret_file, fault):
        """
        C129, before anything is asked; the message does not repeat it.
        """
        if fault == "open to others":
            secret_file.chmod(0o640)
        elif fault == "missing":
            secret_file.unlink()
        elif fault == "a folder":
            secret_file.unlink()
            secret_file.mkdir(0o700)
        else:
            secret_file.write_text("" if fault == "empty" else f"{PASSWORD}\nmore\n")
        pacs = Pacs(dicomweb="https://127.0.0.1:9/d", ca_file=str(ours.file), token_file=str(secret_file))

        error = refused(lambda: greet(pacs))

        assert error.code == "C129"
        assert PASSWORD not in str(error)

    def test_certificates_that_are_none_are_refused(self, ours, theirs, client, tmp_path):
        """
        No PEM, a key that others may read, a key of another certificate: C129, by the name of the setting.
        """
        nonsense = tmp_path / "no.pem"
        nonsense.write_text("no")
        loose = tmp_path / "loose.key"
        loose.write_bytes(client.key.read_bytes())
        loose.chmod(0o644)
        right = {"ca_file": str(ours.file), **shown(client)}
        for wrong, said in (
            ({"ca_file": str(nonsense)}, "ca_file"),
            ({"ca_file": str(tmp_path / "gone")}, "No such file"),
            ({"key": str(loose)}, "others may read it"),
            ({"key": str(theirs.papers("other").key)}, "certificate or key"),
        ):
            error = refused(lambda wrong=wrong: greet(Pacs(host="127.0.0.1", port=9, tls=True, **{**right, **wrong})))
            assert error.code == "C129", wrong
            assert said in error.happened, wrong


class TestCommand:
    def test_echo_says_whether_the_archive_lets_this_site_in(self, ours, server, client, tmp_path):
        """
        As it is typed; without an archive, C163.
        """
        folder = SiteFolder(tmp_path / "site")
        folder.make()
        Station.create(folder.station, SiteConfig(name="site-a", data=str(tmp_path)))
        words = ["echo", "--site", str(folder.root)]
        assert "C163" in str(CliRunner().invoke(app, words).exception)

        with archive(server, ours) as (port, _):
            pacs = Pacs(host="127.0.0.1", port=port, ae_title="PACS", tls=True, ca_file=str(ours.file), **shown(client))
            SiteConfig.load(folder.station).model_copy(update={"pacs": pacs}).save(folder.station)
            outcome = CliRunner().invoke(app, words, catch_exceptions=False)

        assert outcome.exit_code == 0
        assert "lets this site in, over TLS" in outcome.stdout.replace("\n", " ")


@pytest.fixture(scope="module")
def listen() -> int:
    return free_port()


@pytest.fixture(scope="module")
def running(tmp_path_factory, ours, server, listen):
    """Orthanc with TLS and client certificates for DICOM, TLS (by nginx) and a password for DICOMweb."""
    options = {
        "DicomTlsEnabled": True,
        "DicomTlsCertificate": str(server.certificate),
        "DicomTlsPrivateKey": str(server.key),
        "DicomTlsTrustedCertificates": str(ours.file),
        "DicomModalities": {"site": {"AET": "FEDERAD", "Host": "127.0.0.1", "Port": listen, "UseDicomTls": True}},
        "DicomAlwaysAllowEcho": True,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {"federad": PASSWORD},
    }
    folder = tmp_path_factory.mktemp("orthanc")
    with orthanc(folder, **options) as (address, port), https(folder / "nginx", server, address) as front:
        yield front, port


@pytest.mark.system
@needs_nginx
@needs_orthanc
class TestOrthanc:
    @pytest.mark.parametrize("way", ["C-GET", "C-MOVE", "DICOMweb"])
    def test_study_goes_there_and_comes_back(
        self, running, listen, ours, theirs, client, secret_file, write_series, tmp_path, way
    ):
        """
        Asked, stored, searched and fetched over TLS; with another authority nothing of it, and by DICOMweb nothing without
        the password.
        """
        address, port = running
        pacs = Pacs(
            host="127.0.0.1",
            port=port,
            ae_title="ORTHANC",
            tls=True,
            ca_file=str(ours.file),
            listen_port=listen if way == "C-MOVE" else None,
            **shown(client),
        )
        if way == "DICOMweb":
            login = {"user": "federad", "password_file": str(secret_file)}
            pacs = Pacs(dicomweb=f"{address}/dicom-web", ca_file=str(ours.file), **login)
            assert refused(lambda: greet(Pacs(dicomweb=pacs.dicomweb, ca_file=pacs.ca_file))).code == "C131"
        assert refused(lambda: greet(pacs.model_copy(update={"ca_file": str(theirs.file)}))).code == "C130"
        series = write_series(tmp_path / "study", np.arange(128).reshape(2, 8, 8), patient=f"P-{way}")
        folder = SiteFolder(tmp_path / "site")
        folder.make()
        (tmp_path / "data").mkdir()
        Station.create(folder.station, SiteConfig(name="site-a", data=str(tmp_path / "data"), pacs=pacs))

        greet(pacs)
        assert deliver(series.files, pacs) == 2
        done = retrieve(folder, Query(patients=(f"P-{way}",)))

        assert (done.complete, done.fetched, done.failed) == (1, 2, {})
        came = {one.SOPInstanceUID: one for one in map(pydicom.dcmread, tmp_path.glob("data/retrieved/[0-9]*/*.dcm"))}
        assert came == {one.SOPInstanceUID: one for one in series.datasets}
