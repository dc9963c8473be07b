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


class TestFirstWeights:
    def test_plan_without_start_begins_at_fresh_weights(self):
        """
        They derive from the seed, and no file is read.
        """

        def never(_):
            raise AssertionError

        one, same, other = (weights_sha256(first_weights(PLAN, seed, never)) for seed in (1, 1, 2))
        assert one == same != other

    def test_named_model_is_where_training_begins(self):
        """
        Bit for bit, whatever the seed.
        """
        asked = []
        plan = begins_at(MODEL)
        weights = first_weights(plan, 3, lambda sha256: asked.append(sha256) or MODEL)

        assert asked == [plan.strategy.start]
        assert weights_sha256(weights) == weights_sha256(weights_for(PLAN, 7))

    def test_another_file_is_refused(self):
        """
        The sites agreed on one model: its hash decides, not its name.
        """
        with pytest.raises(FederadError, match="M210"):
            first_weights(begins_at(MODEL), 0, lambda _: encode(weights_for(PLAN, 8), "{}"))

    def test_model_of_another_network_is_refused(self):
        """
        The first array that does not fit is named.
        """
        other = encode({**weights_for(PLAN), "extra": np.zeros(3, np.float32)}, "{}")

        with pytest.raises(FederadError, match=r"(?s)M210.*extra"):
            first_weights(begins_at(other), 0, lambda _: other)
