"""A real archive for tests: Orthanc, as Debian packages it, with its DICOMweb plugin."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from network import NGINX, wait_for
from operators import free_port

ORTHANC = shutil.which("Orthanc", path="/usr/sbin:/usr/bin")

needs_orthanc = pytest.mark.skipif(
    ORTHANC is None, reason="Orthanc is not installed: apt-get install orthanc orthanc-dicomweb"
)


@dataclass(frozen=True)
class Papers:
    """A certificate and its key, as files."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority of a test, with its own certificate in ``file``."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._key = folder, ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = self._builder(self._name, self._key).add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(made.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def papers(self, name: str, address: str = "127.0.0.1") -> Papers:
        """A certificate for an address."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        try:
            named: x509.GeneralName = x509.IPAddress(ip_address(address))
        except ValueError:
            named = x509.DNSName(address)
        builder = self._builder(subject, key).add_extension(x509.SubjectAlternativeName([named]), False)
        papers = Papers(*(self._folder / f"{name}{ending}" for ending in (".crt", ".key")))
        papers.certificate.write_bytes(
            builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        )
        written = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        papers.key.touch(0o600)
        papers.key.write_bytes(written)
        return papers

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
        )


_FRONT = """
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
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {certificate};
        ssl_certificate_key {key};
        client_max_body_size 0;
        location / {{
            proxy_pass {behind};
            proxy_set_header Host $http_host;
        }}
    }}
}}
"""


@contextmanager
def https(folder: Path, papers: Papers, behind: str) -> Iterator[str]:
    """nginx with TLS in front of an HTTP service, as hospitals run Orthanc (Debian 12's own HTTPS ends with a crash at the
    first request); its address."""
    folder.mkdir()
    port, configuration = free_port(), folder / "nginx.conf"
    user = "" if os.geteuid() else "user root;"
    configuration.write_text(
        _FRONT.format(
            folder=folder, user=user, port=port, certificate=papers.certificate, key=papers.key, behind=behind
        )
    )
    with (folder / "log").open("wb") as log:
        nginx = subprocess.Popen([str(NGINX), "-e", "stderr", "-p", folder, "-c", configuration], stderr=log)
    try:
        wait_for(port)
        yield f"https://127.0.0.1:{port}"
    finally:
        nginx.terminate()
        nginx.wait(10)


@contextmanager
def orthanc(folder: Path, **more: Any) -> Iterator[tuple[str, int]]:
    """Orthanc with its files in ``folder``: the address of its REST service and its DICOM port."""
    http, dicom = free_port(), free_port()
    configuration = {
        "StorageDirectory": str(folder / "storage"),
        "HttpPort": http,
        "DicomPort": dicom,
        "DicomAet": "ORTHANC",
        "DicomCheckCalledAet": True,
        "AuthenticationEnabled": False,
        "Plugins": [str(p) for p in Path("/usr/share/orthanc/plugins").glob("libOrthancDicomWeb.so")],
        "DicomWeb": {"Enable": True},
        **more,
    }
    (folder / "orthanc.json").write_text(json.dumps(configuration))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([str(ORTHANC), folder / "orthanc.json"], stdout=log, stderr=log, cwd=folder)
    try:
        for _ in range(150):
            time.sleep(0.2)
            try:
                urlopen(f"http://127.0.0.1:{http}/system").close()
                break
            except HTTPError:
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()[-2000:]
        yield f"http://127.0.0.1:{http}", dicom
    finally:
        process.terminate()
        process.wait(30)
