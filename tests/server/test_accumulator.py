"""The exact mean: any order, any number of sites, the same bits."""

from __future__ import annotations

import gc
from fractions import Fraction

import laws
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.accumulator import GRID_BITS, LARGEST_VALUE, ExactMean, largest_norm
from shared_models.errors import FederadError
from shared_models.weights import norm_of

ROUNDING = 2.0**-33
"""How far one update's value may be moved to reach the grid."""

values = st.floats(-1, 1, width=32) | st.floats(-100, 100, width=32) | st.floats(-(2.0**-26), 2.0**-26, width=32)
updates = st.lists(st.lists(values, min_size=4, max_size=4), min_size=1, max_size=6)
weights = st.integers(1, 1000)


def aggregate(updates, weights):
    """The mean that a round would compute."""
    mean = ExactMean({name: array.shape for name, array in updates[0].items()})
    for update, weight in zip(updates, weights, strict=True):
        mean.add(update, weight, norm_of(update))
    return mean.mean()


def as_updates(rows):
    """Each row as one site's update of a matrix and a scalar."""
    return [{"w": np.array(row[:3], np.float32).reshape(3, 1), "b": np.array(row[3], np.float32)} for row in rows]


class TestLaws:
    @laws.SAME_EXAMPLES
    @given(st.lists(values, min_size=4, max_size=4), st.lists(weights, min_size=1, max_size=6))
    def test_equal_updates_average_to_themselves(self, row, weights):
        """
        Sites that agree are not contradicted, to the documented rounding.
        """
        laws.assert_equal_updates_average_to_themselves(aggregate, as_updates([row])[0], weights, within=ROUNDING)

    @laws.SAME_EXAMPLES
    @given(st.data(), updates)
    def test_order_of_the_sites_changes_no_bit(self, data, rows):
        """
        Whoever answers first, the result is the same to the last bit.
        """
        order = data.draw(st.permutations(range(len(rows))))
        given_weights = data.draw(st.lists(weights, min_size=len(rows), max_size=len(rows)))

        laws.assert_order_changes_no_bit(aggregate, as_updates(rows), given_weights, order)

    @laws.SAME_EXAMPLES
    @given(updates, st.integers(2, 9))
    def test_weights_scale_out(self, rows, factor):
        """
        Counting every patient twice changes nothing.
        """
        laws.assert_weights_scale_out(aggregate, as_updates(rows), range(1, len(rows) + 1), factor)

    @laws.SAME_EXAMPLES
    @given(st.data(), updates)
    def test_mean_is_that_of_fractions_to_the_documented_rounding(self, data, rows):
        """
        Exact fractions give the same mean, to 2^-33 for the way to the grid.
        """
        given_weights = data.draw(st.lists(weights, min_size=len(rows), max_size=len(rows)))

        laws.assert_mean_is_that_of_fractions(aggregate, as_updates(rows), given_weights, within=ROUNDING)

    def test_mean_agrees_with_numpy(self):
        """
        An independent weighted average of large arrays agrees to float64's own rounding and that of the grid.
        """
        rng = np.random.default_rng(0)
        arrays = [rng.normal(size=(700, 1000)).astype(np.float32) for _ in range(3)]
        mean = aggregate([{"w": array} for array in arrays], [3, 1, 8])["w"]

        expected = np.average(np.stack(arrays).astype(np.float64), axis=0, weights=[3, 1, 8])
        np.testing.assert_allclose(mean, expected, rtol=1e-15, atol=ROUNDING)

    def test_large_and_tiny_values_meet_without_loss(self):
        """
        A value of 2^-32 survives between two of half a million that cancel, in every order.
        """
        large, tiny = np.float32(2**18), np.float32(2.0**-32)
        rows = [{"w": np.array([v], np.float32)} for v in (large, tiny, -large)]

        for order in ([0, 1, 2], [2, 1, 0], [0, 2, 1], [1, 0, 2]):
            mean = aggregate([rows[i] for i in order], [1, 1, 1])["w"]
            assert mean[0] * 3 == pytest.approx(2.0**-32, rel=1e-15)

    def test_odd_shapes_are_added_up(self):
        """
        Scalars, empty arrays and arrays longer than a block at a time.
        """
        update = {
            "scalar": np.array(0.25, np.float32),
            "empty": np.zeros((0, 3), np.float32),
            "long": np.linspace(-1, 1, 512 * 1024 + 1, dtype=np.float32),
        }

        laws.assert_equal_updates_average_to_themselves(aggregate, update, [1, 2, 5], within=ROUNDING)
        assert aggregate([update], [1])["empty"].shape == (0, 3)


class TestLimits:
    @pytest.mark.parametrize("n_sites", [1, 2, 3, 7, 10, 1000])
    @pytest.mark.parametrize("weight", [1, 2, 7, 365, 10_001])
    def test_sum_is_exact_when_every_site_is_at_its_limit(self, n_sites, weight):
        """
        All sites at the largest norm, all in one value of one sign: the sum is still the one that integers give.
        """
        value = np.float32(largest_norm(n_sites, weight))
        if float(value) > largest_norm(n_sites, weight):
            value = np.nextafter(value, np.float32(0))
        update = {"w": np.array([value], np.float32)}
        mean = ExactMean({"w": (1,)})
        for _ in range(n_sites):
            mean.add(update, weight, norm_of(update))

        on_grid = Fraction(round(Fraction(float(value)) * 2**GRID_BITS), 2**GRID_BITS)
        assert Fraction(float(mean._sum[0])) == n_sites * weight * on_grid

    @pytest.mark.parametrize(
        ("n_before", "norm", "weight"),
        [(0, LARGEST_VALUE * 1.01, 1), (6, 3e5, 1), (0, 1000.0, 10_000), (0, np.inf, 1), (0, np.nan, 1)],
    )
    def test_sum_that_might_not_be_exact_is_refused(self, n_before, norm, weight):
        """
        Beyond the exact range the order would matter, so the update raises S182 with what to change.
        """
        mean, update = ExactMean({"w": (1,)}), {"w": np.array([norm], np.float32)}
        for _ in range(n_before):
            mean.add(update, weight, norm)

        with pytest.raises(FederadError, match="S182") as error:
            mean.add(update, weight, norm)
        assert any("max_update_norm" in remedy for remedy in error.value.remedies)

    def test_refused_update_leaves_no_trace(self):
        """
        After a refusal the mean is still that of the updates before.
        """
        mean = ExactMean({"w": (1,)})
        mean.add({"w": np.array([2.0], np.float32)}, 3, 2.0)
        with pytest.raises(FederadError, match="S182"):
            mean.add({"w": np.array([1e6], np.float32)}, 1, 1e6)

        assert mean.mean()["w"].tolist() == [2.0]
        assert mean.total_weight == 3

    def test_mean_of_nothing_is_undefined(self):
        """
        Without an update there is no mean.
        """
        with pytest.raises(ValueError, match="no updates"):
            ExactMean({"w": (1,)}).mean()

    def test_update_is_left_as_it_was(self):
        """
        Adding reads from a message that may be read-only.
        """
        update = {"w": np.array([0.1, 0.2], np.float32)}
        update["w"].flags.writeable = False
        before = update["w"].tobytes()
        aggregate([update], [3])

        assert update["w"].tobytes() == before


class TestNorm:
    @laws.SAME_EXAMPLES
    @given(updates)
    def test_norm_is_that_of_all_values_together(self, rows):
        """
        The norm is the root of the sum of all squares, over all arrays.
        """
        for update in as_updates(rows):
            flat = np.concatenate([array.reshape(-1) for array in update.values()]).astype(np.float64)
            assert norm_of(update) == pytest.approx(float(np.sqrt((flat**2).sum())), rel=1e-6, abs=1e-18)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_norm_of_what_is_not_finite_is_not_finite(self, bad):
        """
        One NaN or infinity anywhere shows in the norm.
        """
        update = {"a": np.ones(5, np.float32), "b": np.array([1, bad, 2], np.float32)}

        assert not np.isfinite(norm_of(update))

    def test_norm_of_nothing_is_zero(self):
        """
        No arrays, or arrays without values.
        """
        assert norm_of({}) == 0.0
        assert norm_of({"a": np.zeros((0, 2), np.float32)}) == 0.0


class TestMemory:
    def test_memory_does_not_grow_with_the_number_of_sites(self):
        """
        Thirty sites need no more memory than three: every update is added up and let go.
        """
        n_values, mb = 2_000_000, 2**20
        mean = ExactMean({"w": (n_values,)})
        process, rng = psutil.Process(), np.random.default_rng(0)

        def add(n_sites):
            for _ in range(n_sites):
                mean.add({"w": rng.random(n_values, dtype=np.float32)}, 1, 2000.0)
            gc.collect()
            return process.memory_info().rss

        after_three = add(3)
        after_thirty = add(27)

        assert after_thirty - after_three < 24 * mb, "27 updates kept would be 206 MiB"
