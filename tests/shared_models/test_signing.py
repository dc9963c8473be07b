"""What the operator signs."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from server import pki
from shared_models.consortium import SignedPlan, SignedRelease
from shared_models.errors import FederadError
from shared_models.signing import load_public, public_pem, sign, verify

KEY = Ed25519PrivateKey.generate()
PUBLIC = KEY.public_key()
PLAN = SignedPlan(plan='{"name":"x"}', consortium="Demo", run="r1", issued="2026-01-01T00:00:00+00:00").signed(KEY)

values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
documents = st.dictionaries(st.text(), values | st.lists(values) | st.dictionaries(st.text(), values))


class TestSignature:
    @given(documents)
    def test_signature_holds_in_any_order(self, document):
        """
        What was signed is recognised however its fields are ordered.
        """
        document = {k: v for k, v in document.items() if k != "signature"}
        signed = document | {"signature": sign(document, KEY)}

        verify(dict(reversed(signed.items())), PUBLIC)

    @pytest.mark.parametrize(
        "change",
        [
            {"plan": '{"name":"y"}'},
            {"consortium": "Other"},
            {"run": "r2"},
            {"issued": "2026-01-02T00:00:00+00:00"},
            {"signature": ""},
            {"signature": "!"},
            {"signature": PLAN.signature[:-4] + "AAA="},
            {"signature": PLAN.signature + "\n"},
        ],
    )
    def test_any_change_breaks_it(self, change):
        """
        No field of a signed plan can be another one, its signature included.
        """
        with pytest.raises(FederadError) as error:
            PLAN.model_copy(update=change).verify(PUBLIC)

        assert error.value.code == "M212"
        assert "plan" in error.value.happened

    def test_another_key_does_not_count(self):
        """
        A plan signed by somebody else is not the operator's.
        """
        with pytest.raises(FederadError, match="M212"):
            PLAN.verify(Ed25519PrivateKey.generate().public_key())

    def test_plan_cannot_pass_for_a_release(self):
        """
        The signature of a plan does not hold for a release with the same contents.
        """
        release = SignedRelease(
            release=PLAN.plan,
            sha256="0" * 64,
            n_bytes=0,
            consortium="Demo",
            issued=PLAN.issued,
            signature=PLAN.signature,
        )
        with pytest.raises(FederadError, match="M212"):
            release.verify(PUBLIC)

    def test_document_without_a_signature_is_refused(self):
        """
        Leaving the signature out does not help.
        """
        with pytest.raises(FederadError, match="M212"):
            verify({"a": 1}, PUBLIC)

    def test_signed_plan_survives_the_way(self):
        """
        Read again from its JSON it still holds, and its plan has the same identity.
        """
        again = SignedPlan.decode(PLAN.encode())

        again.verify(PUBLIC)
        assert again.plan_sha256 == PLAN.plan_sha256


class TestKeys:
    def test_public_key_survives_being_written(self):
        """
        The key that a site stores is the key that signed.
        """
        PLAN.verify(load_public(public_pem(PUBLIC)))

    @pytest.mark.parametrize("pem", ["", "x", pki.public_pem(ec.generate_private_key(ec.SECP384R1()).public_key())])
    def test_key_of_another_kind_is_refused(self, pem):
        """
        Only an Ed25519 key verifies plans.
        """
        with pytest.raises(ValueError):  # noqa: PT011  the words are those of the library
            load_public(pem)
