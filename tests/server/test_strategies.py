"""How the mean of the updates becomes the next weights."""

from __future__ import annotations

from fractions import Fraction
from typing import get_args

import contracts
import laws
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.strategies import STRATEGIES, strategy_for
from shared_models.plan import StrategyTable

MEANS = ({"name": "fedavg"}, {"name": "fedprox", "proximal_mu": 0.1}, {"name": "ditto", "personal_pull": 0.1})
"""Rules whose next weights are the last ones plus the mean."""

ADAPTIVE = tuple({"name": name, "server_learning_rate": 0.05} for name in ("fedadam", "fedyogi"))


def rule_of(table, **tables):
    return strategy_for(contracts.example_plan(strategy=table, **tables))


@pytest.fixture(params=(*MEANS, *ADAPTIVE), ids=lambda table: table["name"])
def strategy(request):
    """Each rule that a plan can name."""
    return rule_of(request.param)


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
        assert (after["w"] > 1).all()

    def test_every_name_of_a_plan_has_a_rule(self):
        """
        What a plan may be called is what the server can do.
        """
        assert set(get_args(StrategyTable.model_fields["name"].annotation)) == STRATEGIES.keys()

    @laws.SAME_EXAMPLES
    @given(st.floats(-1e3, 1e3, width=32), st.floats(-1e3, 1e3))
    def test_sum_is_rounded_once(self, old, mean):
        """
        The next weight is the float32 nearest to old plus mean, as fractions give it to float64's own rounding.
        """
        for table in MEANS:
            after = rule_of({**table, "release": "last"}).step(
                {"w": np.array([old], np.float32)}, {"w": np.array([mean])}
            )

            assert after["w"].dtype == np.float32
            assert after["w"][0] == np.float32(float(Fraction(old) + Fraction(mean)))

    def test_what_stays_at_the_sites_keeps_its_value(self):
        """
        A parameter that no site sends is the same after the round as before.
        """
        weights = {"w": np.ones(2, np.float32), "norm": np.full(2, 7, np.float32)}

        assert rule_of({"name": "fedbn"}).step(weights, {"w": np.ones(2)})["norm"].tolist() == [7, 7]


class TestAdaptive:
    @pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
    def test_rounds_are_those_of_the_paper(self, name):
        """
        Six rounds give the weights that algorithm 2 of Reddi et al. gives, written down in NumPy.
        """
        rng = np.random.default_rng(0)
        x = np.float64(rng.normal(size=7).astype(np.float32))
        rule = rule_of({"name": name, "server_learning_rate": 0.05, "beta_1": 0.8, "beta_2": 0.9, "tau": 0.01})
        weights, m, v = {"w": x.astype(np.float32)}, np.zeros(7), np.full(7, 0.01**2)
        for _ in range(6):
            d = rng.normal(0, 0.1, 7)
            m = 0.8 * m + 0.2 * d
            v = 0.9 * v + 0.1 * d**2 if name == "fedadam" else v - 0.1 * d**2 * np.sign(v - d**2)
            x = x + 0.05 * m / (np.sqrt(v) + 0.01)
            weights = rule.step(weights, {"w": d})

        np.testing.assert_allclose(weights["w"], x, rtol=0, atol=1e-6)

    def test_the_two_differ(self):
        """
        Where updates shrink, Adam forgets the large ones and Yogi does not.
        """
        after = []
        for table in ADAPTIVE:
            rule, weights = rule_of(table), {"w": np.zeros(1, np.float32)}
            for size in (1.0, 1e-3, 1e-3):
                weights = rule.step(weights, {"w": np.array([size])})
            after.append(weights["w"][0])

        assert after[0] != after[1]


def test_one_site_alone_gets_its_own_weights_back():
    """
    Federated averaging with one site is that site's training: start plus update is what it ended with.
    """
    start = {"w": np.array([0.5, -1.25, 3.0], np.float32)}
    end = {"w": np.array([0.75, -1.0, 2.5], np.float32)}
    update = {"w": (end["w"] - start["w"]).astype(np.float64)}
    rule = strategy_for(contracts.example_plan())

    laws.assert_same_bits(rule.step(start, update), end)
