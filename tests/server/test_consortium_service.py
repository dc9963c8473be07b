"""The consortium's service, as hospitals and everybody else meet it: behind nginx, over TLS."""

from __future__ import annotations

import os
import socket
import stat
import time
from datetime import timedelta

import grpc
import network
import pytest
from cryptography import x509

from client.enrolment import make_request
from client.link import Link, Membership
from server import pki
from server.service import Serving
from shared_models.consortium import PACKAGE, PROTOCOL, PROTOCOL_METADATA, TIME_METADATA, Invitation, Notice
from shared_models.errors import FederadError
from shared_models.wire import CHUNK_BYTES, error_in

pytestmark = network.needs_nginx

OPEN_TO_SITES = ["Renew", "Plans", "Tell", "Releases", "PutParcel", "GetParcel", "GetRelease"]


@pytest.fixture(scope="module")
def operator(tmp_path_factory):
    with network.Operator(tmp_path_factory.mktemp("o")) as operator:
        yield operator


@pytest.fixture(scope="module")
def courier(operator):
    return operator.enrolled("site-a")


@pytest.fixture
def link(courier):
    with Link.open(courier, {}) as link:
        yield link


def call(
    operator, method, *, request=b"{}", key=None, certificate=None, metadata=((PROTOCOL_METADATA, str(PROTOCOL)),)
):
    """A call by somebody who does not use our client."""
    ca = (operator.keys / "ca.crt").read_bytes()
    credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    options = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))
    with grpc.secure_channel(f"localhost:{operator.port}", credentials, options) as channel:
        return list(channel.stream_stream(f"/{PACKAGE}/{method}")(iter([request]), metadata=metadata, timeout=20))


def refused(operator, method, **of) -> FederadError | None:
    with pytest.raises(grpc.RpcError) as failure:
        call(operator, method, **of)
    return error_in(failure.value)


class TestDoor:
    @pytest.mark.parametrize("method", OPEN_TO_SITES)
    def test_nobody_enters_without_a_certificate(self, operator, method):
        """
        Every method but Enrol asks who calls.
        """
        assert refused(operator, method).code == "C154"

    @pytest.mark.parametrize("name", ["x-client-verify", "X-Client-Verify", "x_client_verify"])
    def test_what_the_front_says_cannot_be_said_by_a_caller(self, operator, courier, name):
        """
        Metadata that claim a certificate are overwritten at the front.
        """
        serial = operator.consortium.site("site-a").serial
        claims = (
            (PROTOCOL_METADATA, str(PROTOCOL)),
            (name.lower(), "SUCCESS"),
            (name.lower().replace("verify", "serial"), serial),
        )

        assert refused(operator, "Plans", metadata=claims).code == "C154"

    @pytest.mark.parametrize("verified", ["NONE", "FAILED:certificate has expired", "success", ""])
    def test_serial_alone_admits_nobody(self, operator, courier, verified):
        """
        The front must have found the certificate good.
        """
        metadata = (
            (PROTOCOL_METADATA, str(PROTOCOL)),
            ("x-client-verify", verified),
            ("x-client-serial", operator.consortium.site("site-a").serial),
        )
        path = operator.consortium.folder / "run" / "consortium.sock"
        with grpc.insecure_channel(f"unix:{path}") as channel, pytest.raises(grpc.RpcError) as failure:
            channel.unary_unary(f"/{PACKAGE}/Plans")(b"{}", metadata=metadata, timeout=20)

        assert error_in(failure.value).code == "C154"

    def test_certificate_of_another_consortium_does_not_count(self, operator, tmp_path):
        """
        Even under the name of a site that is known here.
        """
        other, key = pki.new_authority("Demo"), pki.new_key()
        request = x509.CertificateSigningRequestBuilder().subject_name(
            x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "site-a")])
        )
        csr = request.sign(key, pki.hashes.SHA384()).public_bytes(pki.serialization.Encoding.PEM)
        certificate = pki.site_certificate(other, csr, "site-a")

        assert (
            refused(operator, "Plans", key=pki.key_pem(key), certificate=pki.certificate_pem(certificate).encode())
            is None
        )

    def test_server_certificate_is_no_site(self, operator):
        """
        The operator's own certificate comes from the same authority and admits nobody.
        """
        key, certificate = ((operator.keys / f"server.{kind}").read_bytes() for kind in ("key", "crt"))
        with pytest.raises(grpc.RpcError):
            call(operator, "Plans", key=key, certificate=certificate)

    def test_revoked_site_is_out_before_its_next_message(self, operator):
        """
        On a connection that stays open, the call after the revocation is refused; so is a parcel.
        """
        with Link.open(operator.enrolled("site-r"), {}) as link:
            stored = link.put_parcel([b"x"])
            operator.consortium.revoke("site-r")

            for attempt in (
                link.plans,
                lambda: link.put_parcel([b"y"]),
                lambda: list(link.get_parcel(stored.sha256, 1)),
            ):
                with pytest.raises(FederadError, match=r"C154.*revoked"):
                    attempt()

    def test_other_version_of_the_messages_is_named(self, operator):
        """
        A site of a later version hears that the two do not fit, with or without a certificate.
        """
        error = refused(operator, "Plans", metadata=((PROTOCOL_METADATA, "99"),))

        assert error.code == "M211"
        assert "'99'" in error.happened
        assert refused(operator, "Enrol", metadata=()).code == "M211"

    def test_time_is_told_to_everybody(self, operator):
        """
        Also to whom it refuses, so that a wrong clock can be named.
        """
        credentials = grpc.ssl_channel_credentials((operator.keys / "ca.crt").read_bytes())
        with grpc.secure_channel(f"localhost:{operator.port}", credentials) as channel:
            call = channel.unary_unary(f"/{PACKAGE}/Plans").future(b"{}", timeout=20)
            told = dict(call.initial_metadata())[TIME_METADATA]

        assert abs(float(told) - time.time()) < 20

    @pytest.mark.parametrize(
        "request_", [b"", b"\xff\xfe", b"[]", b'{"csr_pem": 1}', b'{"sha256": "../../keys/ca.key"}']
    )
    @pytest.mark.parametrize("method", ["Renew", "Tell", "GetParcel", "GetRelease", "Enrol"])
    def test_bytes_that_say_nothing_are_refused_by_number(self, operator, courier, method, request_):
        """
        Whatever is sent, the answer is M211, and the service goes on.
        """
        key, certificate = ((courier / f"site.{kind}").read_bytes() for kind in ("key", "crt"))

        assert refused(operator, method, request=request_, key=key, certificate=certificate).code == "M211"

    def test_message_of_any_length_does_not_fill_the_memory(self, operator):
        """
        gRPC itself ends a message beyond 4 MiB before it is read.
        """
        assert refused(operator, "Enrol", request=bytes(8 << 20)) is None


class TestParcels:
    @pytest.mark.parametrize("n_bytes", [0, 1, CHUNK_BYTES, 40 * CHUNK_BYTES + 7])
    def test_parcel_goes_and_comes_back(self, operator, link, n_bytes):
        """
        Longer than any message of gRPC's or Flower's.
        """
        data = os.urandom(n_bytes)
        stored = link.put_parcel(data[at : at + CHUNK_BYTES] for at in range(0, n_bytes, CHUNK_BYTES))

        assert stored.n_bytes == n_bytes
        assert b"".join(link.get_parcel(stored.sha256, n_bytes)) == data
        assert b"".join(operator.consortium.depot.get(stored.sha256)) == data

    def test_parcel_that_grew_is_stopped(self, operator, link):
        """
        No more is taken than was announced.
        """
        sha256 = operator.consortium.depot.put([b"123456"])
        with pytest.raises(FederadError, match="M213"):
            list(link.get_parcel(sha256, 5))

    def test_parcel_that_changed_is_found(self, operator, link):
        """
        Damaged on the operator's disk, it is not used at the site.
        """
        sha256 = operator.consortium.depot.put([b"123456"])
        operator.consortium.depot.path(sha256).write_bytes(b"123457")
        with pytest.raises(FederadError, match="M211"):
            list(link.get_parcel(sha256, 6))

    def test_parcel_that_is_gone_is_named(self, link):
        """
        Its round is over, and the site hears it from the operator.
        """
        with pytest.raises(FederadError, match=r"C149.*no parcel"):
            list(link.get_parcel("0" * 64, 6))

    def test_sender_that_breaks_off_is_heard_itself(self, operator, link):
        """
        Trouble at the site while it sends is that trouble and not the network's; nothing stays at the operator.
        """

        def breaking():
            yield b"x" * CHUNK_BYTES
            raise FederadError("C142", happened="Full.", because="", remedies=())

        with pytest.raises(FederadError, match="C142"):
            link.put_parcel(breaking())
        deadline = time.monotonic() + 10
        while list((operator.consortium.folder / "depot").glob("*.part")):
            assert time.monotonic() < deadline
            time.sleep(0.05)


class TestWork:
    def test_plans_and_notices_travel(self, operator, link, courier, smoke_plan):
        """
        A site hears of a plan, finds it signed by the operator it enrolled with, and its word arrives.
        """
        operator.consortium.offer(smoke_plan, "r1", seed=0)
        (plan,) = link.plans()
        plan.verify(Membership.load(courier).plan_key)
        link.tell([Notice(kind="approved", plan_sha256=plan.plan_sha256)] * 2500)

        assert operator.consortium.approvals(smoke_plan.sha256) == {"site-a"}

    def test_notice_counts_for_who_sent_it(self, operator, link, smoke_plan):
        """
        There is no way to speak for another site: the name is that of the certificate.
        """
        link.tell([Notice(kind="status", word="busy")])

        assert [site.name for site in operator.consortium.sites() if site.word == "busy"] == ["site-a"]

    def test_nothing_is_released_yet(self, link):
        """
        A consortium without releases says so, and a file of one is not there.
        """
        assert link.releases() == []
        with pytest.raises(FederadError, match="C149"):
            list(link.get_release("0" * 64))


class TestSocket:
    def test_only_the_operator_may_open_it(self, operator):
        """
        Who could open it could claim to be any site.
        """
        path = operator.consortium.folder / "run" / "consortium.sock"

        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700

    def test_two_services_in_one_folder_are_one_too_many(self, operator):
        """
        The second one says so and the first goes on.
        """
        with pytest.raises(FederadError, match=r"S189.*runs already"):
            Serving(operator.consortium)

        with pytest.raises(FederadError, match="C149"), _enrolling(operator) as link:
            link.enrol(make_request(_expired(operator), operator.folder / "late"))

    def test_path_too_long_for_a_socket_is_named(self, operator, tmp_path):
        """
        Linux takes 107 bytes, and cuts nothing off in silence.
        """
        with pytest.raises(FederadError, match=r"S189.*107"):
            Serving(operator.consortium, tmp_path / ("x" * 108))

    def test_service_starts_where_one_was_killed(self, operator, tmp_path):
        """
        A socket that was left behind is in nobody's way.
        """
        with socket.socket(socket.AF_UNIX) as left_behind:
            left_behind.bind(str(tmp_path / "s"))
        with (
            Serving(operator.consortium, tmp_path / "s"),
            grpc.insecure_channel(f"unix:{tmp_path / 's'}") as channel,
            pytest.raises(grpc.RpcError) as failure,
        ):
            channel.unary_unary(f"/{PACKAGE}/Plans")(b"{}", timeout=20)

        assert error_in(failure.value).code == "M211"


def _enrolling(operator) -> Link:
    return Link("localhost", operator.port, (operator.keys / "ca.crt").read_text(), environment={})


def _expired(operator) -> Invitation:
    invitation = operator.consortium.invite("site-late", timedelta(hours=1).total_seconds())
    with operator.consortium._change() as db:
        db.execute("UPDATE invitations SET expires = 1 WHERE id = ?", (invitation.id,))
    return invitation
