"""How the mean of the updates becomes the next weights."""

from __future__ import annotations

from fractions import Fraction

import contracts
import laws
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.strategies import strategy_for

STRATEGIES = ({"name": "fedavg"}, {"name": "fedprox", "proximal_mu": 0.1})


@pytest.fixture(params=STRATEGIES, ids=lambda table: table["name"])
def strategy(request):
    """Each rule that a plan can name."""
    return strategy_for(contracts.example_plan(strategy=request.param))


class TestEveryStrategy:
    def test_no_update_changes_no_bit(self, strategy):
        """
        A round in which nobody moved leaves the weights as they were.
        """
        weights = {"w": np.array([[0.1, 1e-45], [np.pi, 3e38]], np.float32), "b": np.array(0.3, np.float32)}
        mean = {name: np.zeros(array.shape) for name, array in weights.items()}

        laws.assert_same_bits(strategy.step(weights, mean), weights)

    def test_weights_before_are_left_as_they_were(self, strategy):
        """
        The next weights are new arrays; the old ones may still be needed as the best.
        """
        weights = {"w": np.ones(3, np.float32)}
        weights["w"].flags.writeable = False
        after = strategy.step(weights, {"w": np.full(3, 0.5)})

        assert weights["w"].tolist() == [1, 1, 1]
        assert after["w"].tolist() == [1.5, 1.5, 1.5]

    @laws.SAME_EXAMPLES
    @given(st.floats(-1e3, 1e3, width=32), st.floats(-1e3, 1e3))
    def test_sum_is_rounded_once(self, old, mean):
        """
        The next weight is the float32 nearest to old plus mean, as fractions give it to float64's own rounding.
        """
        for table in STRATEGIES:
            rule = strategy_for(contracts.example_plan(strategy=table))
            after = rule.step({"w": np.array([old], np.float32)}, {"w": np.array([mean])})["w"]

            assert after.dtype == np.float32
            assert after[0] == np.float32(float(Fraction(old) + Fraction(mean)))


def test_one_site_alone_gets_its_own_weights_back():
    """
    Federated averaging with one site is that site's training: start plus update is what it ended with.
    """
    start = {"w": np.array([0.5, -1.25, 3.0], np.float32)}
    end = {"w": np.array([0.75, -1.0, 2.5], np.float32)}
    update = {"w": (end["w"] - start["w"]).astype(np.float64)}
    rule = strategy_for(contracts.example_plan())

    laws.assert_same_bits(rule.step(start, update), end)
