"""What operator and sites say to each other outside the rounds."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shared_models import consortium, messages
from shared_models.consortium import EnrolRequest, Invitation, Notice, Notices, encode_url
from shared_models.errors import FederadError

INVITATION = Invitation(
    consortium="Demo",
    host="fl.example.org",
    port=443,
    site="site-a",
    expires=2**31,
    secret="A" * 43,
    ca=encode_url(b"der"),
)


class TestInvitation:
    def test_line_says_all_of_it(self):
        """
        What is pasted is what was given out.
        """
        assert Invitation.parse(INVITATION.line()) == INVITATION
        assert "\n" not in INVITATION.line()

    @pytest.mark.parametrize("width", [1, 60, 76])
    def test_line_survives_mail(self, width):
        """
        Broken into lines, indented, with blanks around: still the same invitation.
        """
        mailed = textwrap.indent("\r\n".join(textwrap.wrap(INVITATION.line(), width, break_on_hyphens=False)), "  ")

        assert Invitation.parse(f"\n {mailed} \n") == INVITATION

    @given(st.integers(0, len(INVITATION.line()) - 1))
    def test_part_of_a_line_is_no_invitation(self, n):
        """
        Cut off anywhere, it is refused with words a person understands.
        """
        with pytest.raises(FederadError) as error:
            Invitation.parse(INVITATION.line()[:n])

        assert error.value.code == "C148"

    @given(st.text(max_size=60))
    def test_anything_else_is_no_invitation(self, text):
        """
        Any text that is none is refused by number.
        """
        for given_ in (text, f"federad1:{text}"):
            with pytest.raises(FederadError, match="C148"):
                Invitation.parse(given_)

    def test_operators_half_says_nothing_of_the_secret(self):
        """
        Name and public key of an invitation are not made of its secret's characters.
        """
        assert INVITATION.secret not in INVITATION.id + INVITATION.public_key.hex()

    @pytest.mark.parametrize("host", ["fl.example.org", "localhost", "a-b.example", "192.0.2.7", "2001:db8::1", "x1"])
    def test_hosts_that_can_be_reached_are_taken(self, host):
        """
        Names and addresses.
        """
        assert Invitation.model_validate(INVITATION.model_dump() | {"host": host}).host == host

    @pytest.mark.parametrize(
        "host",
        ["", "-x", "x-.org", "a b", "a..b", "Example.org", "1.2.3", "https://x", "x:443", "x/y", "a" * 64, "é.org"],
    )
    def test_hosts_that_cannot_exist_are_refused(self, host):
        """
        A mistyped host is found when it is typed.
        """
        with pytest.raises(ValidationError):
            Invitation.model_validate(INVITATION.model_dump() | {"host": host})


class TestRequest:
    REQUEST = EnrolRequest(
        invitation=INVITATION.id, site="site-a", ca_sha256="0" * 64, csr_pem="csr", node_public_key_pem="node"
    ).proven(INVITATION.secret)

    def key(self):
        return consortium.Ed25519PublicKey.from_public_bytes(INVITATION.public_key)

    def test_request_proves_the_invitation(self):
        """
        Whoever holds the invitation can prove it, without showing it.
        """
        assert self.REQUEST.is_proven_by(self.key())
        assert INVITATION.secret not in self.REQUEST.encode().decode()

    @pytest.mark.parametrize(
        "change",
        [
            {"invitation": "0" * 32},
            {"site": "site-b"},
            {"ca_sha256": "1" * 64},
            {"csr_pem": "other"},
            {"node_public_key_pem": "other"},
            {"proof": ""},
            {"proof": "?"},
        ],
    )
    def test_proof_is_of_this_request_alone(self, change):
        """
        With any field changed the proof does not hold.
        """
        assert not self.REQUEST.model_copy(update=change).is_proven_by(self.key())


class TestDocuments:
    @pytest.mark.parametrize(
        "data", [b"", b"\xff", b"[]", b"{}x", b'{"kind": "gossip"}', b'{"kind": "status", "more": 1}', b'{"kind": 7}']
    )
    def test_other_bytes_are_refused_by_number(self, data):
        """
        Whatever is no document of this kind is M211.
        """
        with pytest.raises(FederadError, match="M211"):
            Notice.decode(data)

    @pytest.mark.parametrize(
        "field",
        [
            {"round": -1},
            {"done": 2**31},
            {"total": 1.0},
            {"word": "Two words"},
            {"word": "x" * 41},
            {"run": "../x"},
            {"plan_sha256": "0"},
        ],
    )
    def test_notice_holds_words_and_small_numbers_only(self, field):
        """
        There is no field in which a sentence could leave a hospital.
        """
        with pytest.raises(ValidationError):
            Notice(kind="status", **field)

    def test_call_with_too_many_notices_is_refused(self):
        """
        The operator reads a bounded number at a time.
        """
        with pytest.raises(ValidationError):
            Notices(notices=(Notice(kind="status"),) * (consortium.MAX_NOTICES + 1))

    def test_site_is_called_the_same_in_rounds_and_outside(self):
        """
        The two patterns for a site's name are one.
        """
        assert consortium.SITE_NAME == messages.SITE_NAME

    def test_courier_needs_no_arrays_for_them(self):
        """
        Documents, signatures and the wire load neither torch nor numpy nor Flower.
        """
        code = (
            "import sys, client.link, client.enrolment; print({'torch', 'numpy', 'flwr', 'monai'} & set(sys.modules))"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

        assert found.stdout.strip() == "set()"
