"""Where training begins."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from releases import plan_of, weights_for

from shared_models.errors import FederadError
from shared_models.start import first_weights
from shared_models.weights import encode, weights_sha256

PLAN = plan_of()
MODEL = encode(weights_for(PLAN, 7), "{}")


def begins_at(data: bytes):
    return plan_of(strategy={"start": hashlib.sha256(data).hexdigest()})


@pytest.fixture
def model(tmp_path):
    """A released model."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(MODEL)
    return file


class TestFirstWeights:
    def test_plan_without_start_begins_at_fresh_weights(self, model):
        """
        They derive from the seed, and no file is looked at.
        """
        one, same, other = (weights_sha256(first_weights(PLAN, seed, model)) for seed in (1, 1, 2))
        assert one == same != other

    def test_named_model_is_where_training_begins(self, model):
        """
        Bit for bit, whatever the seed.
        """
        assert weights_sha256(first_weights(begins_at(MODEL), 3, model)) == weights_sha256(weights_for(PLAN, 7))

    def test_without_the_model_nothing_begins(self):
        """
        Fresh weights do not take its place.
        """
        with pytest.raises(FederadError, match="M210"):
            first_weights(begins_at(MODEL), 0)

    def test_another_model_is_refused(self, model):
        """
        The sites agreed on one model: its hash decides, not its name.
        """
        model.write_bytes(encode(weights_for(PLAN, 8), "{}"))

        with pytest.raises(FederadError, match="M210"):
            first_weights(begins_at(MODEL), 0, model)

    def test_model_of_another_network_is_refused(self, model):
        """
        The first array that does not fit is named.
        """
        other = encode({**weights_for(PLAN), "extra": np.zeros(3, np.float32)}, "{}")
        model.write_bytes(other)

        with pytest.raises(FederadError, match=r"(?s)M210.*extra"):
            first_weights(begins_at(other), 0, model)

    def test_model_begins_against_a_fresh_discriminator_and_ends_without_it(self, model):
        """
        A plan with an adversary can begin at a model that had none, and the other way round; predictions stay.
        """
        sha256 = hashlib.sha256(MODEL).hexdigest()
        opposed = plan_of(strategy={"start": sha256}, adaptation={"adversarial": "scanner"})
        begun = first_weights(opposed, 0, model)
        model.write_bytes(encode(begun, "{}"))
        back = first_weights(begins_at(model.read_bytes()), 0, model)

        assert any(name.startswith("discriminator.") for name in begun)
        assert weights_sha256(back) == weights_sha256(weights_for(PLAN, 7))
