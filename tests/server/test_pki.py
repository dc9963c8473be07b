"""Who is who on the wire: checked with the verifiers that nginx, gRPC and Python use, not with our own."""

from __future__ import annotations

import shutil
import subprocess
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from server import pki
from shared_models.errors import FederadError

AUTHORITY = pki.new_authority("Demo")
SHA384 = hashes.SHA384()
OPENSSL = shutil.which("openssl")


def name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def csr(key, common="site-a", digest=SHA384, extensions=()) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(name(common))
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(key, digest).public_bytes(serialization.Encoding.PEM).decode()


def site_certificate(**of) -> x509.Certificate:
    return pki.site_certificate(AUTHORITY, csr(pki.new_key(), **of), "site-a")


@pytest.fixture
def verify(tmp_path):
    """OpenSSL's judgement of a certificate."""
    if OPENSSL is None:
        pytest.skip("openssl is not installed")

    def judge(certificate: x509.Certificate, *options: str, authority=AUTHORITY) -> bool:
        (tmp_path / "ca").write_text(authority.pem)
        (tmp_path / "leaf").write_text(pki.certificate_pem(certificate))
        command = [OPENSSL, "verify", "-x509_strict", "-CAfile", tmp_path / "ca", *options, tmp_path / "leaf"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    return judge


class TestServer:
    @pytest.mark.parametrize(
        ("host", "option"),
        [("fl.example.org", "-verify_hostname"), ("192.0.2.7", "-verify_ip"), ("2001:db8::1", "-verify_ip")],
    )
    def test_certificate_is_for_its_host_alone(self, verify, host, option):
        """
        Names and addresses are checked as what they are, and no other one passes.
        """
        certificate = pki.server_certificate(AUTHORITY, pki.new_key().public_key(), host)

        assert verify(certificate, "-purpose", "sslserver", option, host)
        assert not verify(certificate, "-verify_hostname", "other.example.org")
        assert not verify(certificate, "-verify_ip", "192.0.2.8")

    def test_longest_host_name_has_a_certificate(self, verify):
        """
        A name of more than 64 characters does not fit the subject and stands among the alternative names.
        """
        host = ".".join(["a" * 60] * 4)

        assert verify(pki.server_certificate(AUTHORITY, pki.new_key().public_key(), host), "-verify_hostname", host)

    def test_days_are_those_asked_for(self):
        """
        It begins a little earlier, for clocks that are behind.
        """
        certificate = pki.server_certificate(AUTHORITY, pki.new_key().public_key(), "x", days=3)
        now = datetime.now(UTC)

        assert abs(certificate.not_valid_after_utc - now - timedelta(days=3)) < timedelta(minutes=1)
        assert certificate.not_valid_before_utc < now - timedelta(minutes=30)


class TestSite:
    def test_certificate_proves_a_site_and_nothing_more(self, verify):
        """
        It is a client's, and neither a server's nor an authority's.
        """
        certificate = site_certificate()

        assert verify(certificate, "-purpose", "sslclient")
        assert not verify(certificate, "-purpose", "sslserver")
        assert not verify(certificate, "-purpose", "crlsign")

    def test_certificate_of_another_consortium_is_none_here(self, verify):
        """
        Even under the same name.
        """
        other = pki.new_authority("Demo")
        certificate = pki.site_certificate(other, csr(pki.new_key()), "site-a")

        assert verify(certificate, authority=other)
        assert not verify(certificate)

    def test_site_cannot_sign_for_others(self, verify, tmp_path):
        """
        A certificate signed by a site's key counts for nobody.
        """
        key = pki.new_key()
        between = pki.Authority(key, pki.site_certificate(AUTHORITY, csr(key), "site-a"))
        forged = pki.site_certificate(between, csr(pki.new_key(), "site-b"), "site-b")
        (tmp_path / "between").write_text(between.pem)

        assert not verify(forged, "-untrusted", str(tmp_path / "between"))

    def test_name_is_the_operators(self):
        """
        The subject is the invited name in the consortium's organisation, whatever else the request says.
        """
        wish = x509.BasicConstraints(ca=True, path_length=3)
        certificate = site_certificate(extensions=[wish])
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value

        assert certificate.subject.rfc4514_string() == "CN=site-a,O=Demo"
        assert not constraints.ca
        assert abs(certificate.not_valid_after_utc - datetime.now(UTC) - timedelta(days=90)) < timedelta(minutes=1)

    def test_serials_do_not_repeat(self):
        """
        A serial stands for one certificate, and is written as nginx writes it.
        """
        serials = {pki.serial_of(site_certificate()) for _ in range(20)}

        assert len(serials) == 20
        assert all(serial == serial.upper() and int(serial, 16) for serial in serials)


class TestRequest:
    @pytest.mark.parametrize(
        ("key", "digest"),
        [
            (rsa.generate_private_key(65537, 2048), hashes.SHA256()),
            (ed25519.Ed25519PrivateKey.generate(), None),
            (ec.generate_private_key(ec.SECP192R1()), hashes.SHA256()),
            (ec.generate_private_key(ec.SECP256K1()), hashes.SHA256()),
        ],
        ids=["rsa", "ed25519", "p192", "secp256k1"],
    )
    def test_key_of_another_kind_is_refused(self, key, digest):
        """
        One family of keys, of known strength.
        """
        with pytest.raises(FederadError, match="elliptic-curve") as error:
            pki.requested_key(csr(key, digest=digest), "site-a")

        assert error.value.code == "S186"

    @pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
    def test_common_curves_are_taken(self, curve):
        """
        A hospital whose keys are made elsewhere may use any of the three.
        """
        key = ec.generate_private_key(curve)

        assert pki.requested_key(csr(key), "site-a") == key.public_key()

    def test_request_for_somebody_elses_key_is_refused(self):
        """
        Who cannot sign with a key gets no certificate for it.
        """
        mine = x509.load_pem_x509_csr(csr(pki.new_key()).encode()).public_bytes(serialization.Encoding.DER)
        theirs = (
            pki.new_key()
            .public_key()
            .public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
        )
        at = mine.index(b"\x04", mine.index(b"\x03\x62\x00"))
        stolen = mine[:at] + theirs + mine[at + len(theirs) :]
        pem = x509.load_der_x509_csr(stolen).public_bytes(serialization.Encoding.PEM)

        with pytest.raises(FederadError, match="not signed with the key"):
            pki.requested_key(pem, "site-a")

    @pytest.mark.parametrize(
        "request_",
        ["", "x", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", AUTHORITY.pem],
    )
    def test_something_else_is_refused(self, request_):
        """
        By number, whatever it is.
        """
        with pytest.raises(FederadError, match="S186"):
            pki.requested_key(request_, "site-a")

    def test_request_under_another_name_is_refused(self):
        """
        A request names the site it is for.
        """
        with pytest.raises(FederadError, match="not for site-a"):
            pki.requested_key(csr(pki.new_key(), "site-b"), "site-a")

    @pytest.mark.parametrize(
        "pem",
        [
            "",
            "x",
            pki.key_pem(pki.new_key()).decode(),
            pki.public_pem(ec.generate_private_key(ec.SECP256K1()).public_key()),
        ],
    )
    def test_node_key_that_flower_would_refuse_is_refused(self, pem):
        """
        The SuperNode's key is a public key on a curve that Flower takes.
        """
        with pytest.raises(FederadError, match="S186"):
            pki.node_key(pem)


class TestAuthority:
    def test_authority_signs_certificates_and_no_authorities(self):
        """
        Its key is for certificates and lists of revoked ones, and the chain ends below it.
        """
        extensions = AUTHORITY.certificate.extensions
        usage = extensions.get_extension_for_class(x509.KeyUsage)
        constraints = extensions.get_extension_for_class(x509.BasicConstraints)

        assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
        assert (usage.critical, usage.value.key_cert_sign, usage.value.crl_sign) == (True, True, True)
        assert not usage.value.digital_signature

    def test_authority_survives_its_files(self):
        """
        Written and read, it is the same.
        """
        assert pki.load_authority(AUTHORITY.key_pem, AUTHORITY.pem.encode()).pem == AUTHORITY.pem

    def test_key_of_another_authority_is_found(self):
        """
        Files of two consortia mixed up are not taken for one.
        """
        with pytest.raises(ValueError, match="not that of the certificate"):
            pki.load_authority(pki.new_authority("Demo").key_pem, AUTHORITY.pem.encode())
