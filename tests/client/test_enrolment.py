"""Joining a consortium, over the network and by files."""

from __future__ import annotations

import argparse
import os
import stat
from datetime import UTC, datetime, timedelta

import network
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

import client.enrolment as module
from client.enrolment import certificate_ends, enrol, make_request, read_invitation, renew, take_reply
from client.link import Link, Membership
from server import pki
from server.consortium import Consortium, ConsortiumConfig
from shared_models.consortium import EnrolReply, EnrolRequest, RenewRequest
from shared_models.errors import FederadError

FILES = {"site.key", "site.crt", "node.key", "ca.crt", "consortium.json"}


@pytest.fixture
def consortium(tmp_path) -> Consortium:
    return Consortium.create(tmp_path / "operator", ConsortiumConfig(name="Demo", host="fl.example.org", port=443))


@pytest.fixture
def courier(tmp_path):
    return tmp_path / "site" / "courier"


@pytest.fixture(scope="module")
def operator(tmp_path_factory):
    with network.Operator(tmp_path_factory.mktemp("o")) as operator:
        yield operator


def by_files(consortium, invitation, courier) -> Membership:
    """Two people who exchange mail."""
    mailed = make_request(invitation, courier).encode()
    back = consortium.enrol(EnrolRequest.decode(mailed)).encode()
    return take_reply(courier, EnrolReply.decode(back))


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class Stopped(BaseException):
    """As if the process had been killed."""


class TestByFiles:
    def test_site_has_all_it_needs(self, consortium, courier):
        """
        Keys, certificate, the pinned authority, and the key that signs plans.
        """
        member = by_files(consortium, consortium.invite("site-a"), courier)
        key = load_pem_private_key((courier / "site.key").read_bytes(), None)
        certificate = x509.load_pem_x509_certificate((courier / "site.crt").read_bytes())

        assert set(contents(courier)) == FILES
        assert not (courier / "pending").exists()
        assert certificate.public_key() == key.public_key()
        assert (courier / "ca.crt").read_text() == consortium.authority.pem
        assert member == Membership.load(courier)
        assert member.plan_key == consortium.plan_key.public_key()

    def test_nobody_else_may_read_it(self, consortium, courier):
        """
        Folder and files are for the courier's user alone, whatever the umask says.
        """
        before = os.umask(0)
        try:
            by_files(consortium, consortium.invite("site-a"), courier)
        finally:
            os.umask(before)

        assert not any(stat.S_IMODE(path.stat().st_mode) & 0o077 for path in [courier, *courier.iterdir()])

    def test_keys_do_not_leave(self, consortium, courier):
        """
        The request holds public halves only, and not the invitation's secret.
        """
        invitation = consortium.invite("site-a")
        mailed = make_request(invitation, courier).encode()
        kept = b"".join(path.read_bytes() for path in (courier / "pending").iterdir())

        assert b"PRIVATE" not in mailed
        assert b"PRIVATE" in kept
        assert invitation.secret.encode() not in mailed + kept

    def test_supernode_reads_its_key(self, consortium, courier):
        """
        Flower's own loader takes the file, and finds the public key that the operator registered.
        """
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes
        from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

        by_files(consortium, consortium.invite("site-a"), courier)
        arguments = argparse.Namespace(
            auth_supernode_private_key=str(courier / "node.key"), auth_supernode_public_key=None
        )
        _, public = _try_setup_client_authentication(arguments)

        assert public_key_to_bytes(public).decode() == consortium.site("site-a").node_public_key_pem

    def test_reply_may_be_taken_twice(self, consortium, courier):
        """
        The second time changes nothing.
        """
        reply = consortium.enrol(make_request(consortium.invite("site-a"), courier))
        first = take_reply(courier, reply)
        before = contents(courier)

        assert take_reply(courier, reply) == first
        assert contents(courier) == before

    def test_request_made_again_is_about_the_same_keys(self, consortium, courier):
        """
        A request file that got lost is written again, and the reply to either fits.
        """
        invitation = consortium.invite("site-a")
        first, second = make_request(invitation, courier), make_request(invitation, courier)

        assert first.node_public_key_pem == second.node_public_key_pem
        consortium.enrol(second)
        assert take_reply(courier, consortium.enrol(first)).site == "site-a"

    @pytest.mark.parametrize("n", range(7))
    def test_killed_while_the_reply_is_taken(self, consortium, courier, monkeypatch, n):
        """
        Whichever file was not written yet, the same reply finishes it.
        """
        reply = consortium.enrol(make_request(consortium.invite("site-a"), courier))
        left = [n]
        write = module._write

        def killed(path, data):
            left[0] -= 1
            if left[0] < 0:
                raise Stopped
            write(path, data)

        monkeypatch.setattr(module, "_write", killed)
        try:
            take_reply(courier, reply)
        except Stopped:
            assert n < len(FILES)
        monkeypatch.setattr(module, "_write", write)

        assert take_reply(courier, reply) == Membership.load(courier)
        assert set(contents(courier)) == FILES

    @pytest.mark.parametrize("n", range(5))
    def test_killed_while_new_keys_replace_old_ones(self, consortium, courier, monkeypatch, n):
        """
        Half old and half new is nobody's folder, and says so until the reply is taken again.
        """
        by_files(consortium, consortium.invite("site-a"), courier)
        consortium.revoke("site-a")
        reply = consortium.enrol(make_request(consortium.invite("site-a"), courier))
        left, write = iter(range(n)), module._write

        def killed(path, data):
            if next(left, None) is None:
                raise Stopped
            write(path, data)

        monkeypatch.setattr(module, "_write", killed)
        with pytest.raises(Stopped):
            take_reply(courier, reply)
        monkeypatch.setattr(module, "_write", write)
        with pytest.raises(FederadError, match="C150"):
            Link.open(courier, {})

        assert take_reply(courier, reply) == Membership.load(courier)
        Link.open(courier, {}).close()

    @pytest.mark.parametrize(
        "field", ["plan_key_pem", "certificate_pem", "host", "port", "site", "consortium", "signature", "ca_pem"]
    )
    def test_reply_changed_on_its_way_is_refused(self, consortium, courier, tmp_path, field):
        """
        Who reads the mail cannot put in a server or a plan key of their own.
        """
        reply = consortium.enrol(make_request(consortium.invite("site-a"), courier))
        config = ConsortiumConfig(name="Evil", host="evil.example.org", port=444)
        other = Consortium.create(tmp_path / "evil", config)
        theirs = other.enrol(make_request(other.invite("site-b"), tmp_path / "b"))

        with pytest.raises(FederadError, match=r"C153.*not signed by the consortium"):
            take_reply(courier, reply.model_copy(update={field: getattr(theirs, field)}))
        assert contents(courier) == {}
        assert take_reply(courier, reply).host == "fl.example.org"

    def test_reply_to_somebody_else_is_refused(self, consortium, courier, tmp_path):
        """
        Genuine, and for another site, or for other keys of this one.
        """
        other = consortium.enrol(make_request(consortium.invite("site-b"), tmp_path / "b"))
        make_request(consortium.invite("site-a"), tmp_path / "first")
        invitation = consortium.invite("site-a")
        theirs = consortium.enrol(make_request(invitation, tmp_path / "second"))
        make_request(invitation, courier)

        with pytest.raises(FederadError, match="it is for site-b in Demo"):
            take_reply(courier, other)
        with pytest.raises(FederadError, match="keys that are not here"):
            take_reply(courier, theirs)

    def test_reply_without_a_request_is_refused(self, consortium, courier, tmp_path):
        """
        There are no keys here that it could be about.
        """
        reply = consortium.enrol(make_request(consortium.invite("site-a"), tmp_path / "elsewhere"))
        with pytest.raises(FederadError, match=r"C150.*No request waits"):
            take_reply(courier, reply)


class TestFolder:
    def test_folder_of_another_site_is_left_alone(self, consortium, courier, tmp_path):
        """
        Neither another name nor another consortium takes over keys that are in use.
        """
        by_files(consortium, consortium.invite("site-a"), courier)
        before = contents(courier)
        other = Consortium.create(tmp_path / "other", ConsortiumConfig(name="Other", host="x.org", port=443))

        for invitation in (consortium.invite("site-b"), other.invite("site-a")):
            with pytest.raises(FederadError, match=r"C150.*belongs to site-a in Demo"):
                make_request(invitation, courier)
        assert contents(courier) == before

    def test_site_that_was_revoked_comes_back_in_its_folder(self, consortium, courier):
        """
        With a new invitation and new keys, in place of the old ones; until then the old ones stay.
        """
        by_files(consortium, consortium.invite("site-a"), courier)
        old = contents(courier)
        consortium.revoke("site-a")
        invitation = consortium.invite("site-a")
        request = make_request(invitation, courier)
        assert contents(courier) == old

        take_reply(courier, consortium.enrol(request))
        new = contents(courier)
        assert not any(new[name] == old[name] for name in FILES - {"ca.crt"})
        assert consortium.site("site-a").status == "enrolled"

    @pytest.mark.parametrize("damage", [b"", b"x", None])
    @pytest.mark.parametrize("name", ["site.key", "node.key"])
    def test_damaged_request_is_named(self, consortium, courier, name, damage):
        """
        Keys that were cut short are not replaced in silence: the operator may have signed them.
        """
        invitation = consortium.invite("site-a")
        make_request(invitation, courier)
        path = courier / "pending" / name
        path.unlink() if damage is None else path.write_bytes(damage)

        with pytest.raises(FederadError, match="C150"):
            make_request(invitation, courier)

    def test_folder_that_cannot_be_made_is_named(self, consortium, tmp_path):
        """
        A file stands where the folder should be.
        """
        (tmp_path / "file").touch()
        with pytest.raises(FederadError, match="C150"):
            make_request(consortium.invite("site-a"), tmp_path / "file" / "courier")


class TestInvitation:
    def test_line_and_file_are_the_same(self, consortium, tmp_path):
        """
        Pasted, or saved by the mail program.
        """
        invitation = consortium.invite("site-a")
        (tmp_path / "invitation.txt").write_text(f"\n{invitation.line()}\n")

        assert read_invitation(invitation.line()) == invitation
        assert read_invitation(str(tmp_path / "invitation.txt")) == invitation

    @pytest.mark.parametrize("given", ["", "x", "no/such/file", "/", "~nobody-of-this-name/x", "a" * 5000, "a\0b"])
    def test_anything_else_is_named(self, given):
        """
        A typing mistake is C148, whatever it is.
        """
        with pytest.raises(FederadError, match="C148"):
            read_invitation(given)


@network.needs_nginx
class TestNetwork:
    def test_site_joins_and_is_let_in(self, operator, courier):
        """
        One command with one line, and the next call is answered.
        """
        member = enrol(operator.consortium.invite("site-a"), courier, {})
        with Link.open(courier, {}) as link:
            assert link.plans() == []
        assert (member.site, member.port) == ("site-a", operator.port)

    def test_joining_again_changes_nothing(self, operator, courier):
        """
        The command may be repeated.
        """
        invitation = operator.consortium.invite("site-b")
        enrol(invitation, courier, {})
        before = contents(courier)
        enrol(invitation, courier, {})

        assert contents(courier) == before

    def test_lost_reply_costs_nothing(self, operator, courier, monkeypatch):
        """
        The operator has signed, the reply was lost: the same command finishes it with the same keys.
        """
        invitation = operator.consortium.invite("site-c")

        def lost(*_):
            raise Stopped

        with monkeypatch.context() as patch:
            patch.setattr(module, "take_reply", lost)
            with pytest.raises(Stopped):
                enrol(invitation, courier, {})
        serial = operator.consortium.site("site-c").serial
        enrol(invitation, courier, {})

        assert pki.serial_of(x509.load_pem_x509_certificate((courier / "site.crt").read_bytes())) == serial

    def test_operators_reason_reaches_the_hospital(self, operator, courier, tmp_path):
        """
        Withdrawn, used: the site's message says which, and what to ask for.
        """
        old = operator.consortium.invite("site-d")
        new = operator.consortium.invite("site-d")
        with pytest.raises(FederadError, match=r"C149.*was withdrawn") as error:
            enrol(old, courier, {})
        enrol(new, courier, {})

        assert "ask the operator for a new invitation (federad-server invite site-d)" in str(error.value)
        with pytest.raises(FederadError, match=r"C149.*was used on"):
            enrol(new, tmp_path / "thief", {})

    def test_consortium_set_up_anew_is_a_stranger(self, operator, courier, tmp_path):
        """
        The invitation pins the old authority: the new one at the same address is not trusted with anything.
        """
        config = ConsortiumConfig(name="Demo", host="localhost", port=operator.port)
        before = Consortium.create(tmp_path / "before", config)

        with pytest.raises(FederadError, match=r"C153[\s\S]*set up anew"):
            enrol(before.invite("site-e"), courier, {})

    def test_through_a_proxy(self, operator, courier):
        """
        Where only a proxy may go out, the same command works.
        """
        with network.Proxy() as proxy:
            enrol(operator.consortium.invite("site-f"), courier, proxy.environment)

            assert proxy.asked == [f"localhost:{operator.port}"]

    def test_certificate_is_renewed_in_its_last_month(self, operator, courier):
        """
        Not before; then over the same key, and the new one is taken at once.
        """
        enrol(operator.consortium.invite("site-g"), courier, {})
        key = (courier / "site.key").read_bytes()
        first = (courier / "site.crt").read_bytes()
        with Link.open(courier, {}) as link:
            assert not renew(courier, link)
            assert renew(courier, link, before=timedelta(days=91))
        with Link.open(courier, {}) as link:
            assert link.plans() == []

        assert (courier / "site.crt").read_bytes() != first
        assert certificate_ends(courier) > datetime.now(UTC) + timedelta(days=89)
        assert (courier / "site.key").read_bytes() == key
        assert operator.consortium.site("site-g").not_after == certificate_ends(courier)

    def test_certificate_for_another_key_is_not_stored(self, operator, courier, tmp_path):
        """
        What the operator sends back is checked before it replaces anything.
        """
        enrol(operator.consortium.invite("site-h"), courier, {})
        enrol(operator.consortium.invite("site-i"), tmp_path / "i", {})
        before = contents(courier)

        class Confused(Link):
            def renew(self, csr_pem):
                theirs = module._request(module._site_key(tmp_path / "i" / "site.key"), "site-i")
                return operator.consortium.renew("site-i", RenewRequest(csr_pem=theirs)).certificate_pem

        with Confused.open(courier, {}) as link, pytest.raises(FederadError, match="C153"):
            renew(courier, link, before=timedelta(days=91))
        assert contents(courier) == before
