"""Epsilon from events and noise from epsilon, checked against another library, a closed formula and a published table."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from client import accounting
from client.accounting import (
    WITHOUT_PRIVACY,
    Event,
    calibrate,
    delta_limit,
    epsilon,
    filter_order,
    image_epsilon,
    patient_epsilon_of_image_level,
    rdp,
    rdp_to_epsilon,
)
from shared_models.errors import FederadError

DELTA = 1e-5

RUNS = [
    [Event(1.22, 0.16, 125)],
    [Event(2.39, 0.16, 125)],
    [Event(5.94, 0.16, 125)],
    [Event(1.0, 0.01, 1000)],
    [Event(0.7, 1.0, 5)],
    [Event(0.55, 0.016, 200)],
    [Event(50.0, 0.1, 200)],
    [Event(0.4, 0.5, 50)],
    [Event(1.2, 0.1, 60), Event(0.9, 0.05, 40), Event(20.0, 1.0, 10)],
]
"""From strong noise to nearly none, every patient to one in a hundred, one mechanism to three."""


def pld_epsilon(events, delta: float) -> float:
    """The same by dp-accounting's privacy-loss distributions, for adding and removing a patient."""
    dpa = pytest.importorskip("dp_accounting")
    accountant = dpa.pld.PLDAccountant(value_discretization_interval=1e-3)
    for event in events:
        gaussian = dpa.GaussianDpEvent(event.noise_multiplier)
        accountant.compose(dpa.PoissonSampledDpEvent(event.sampling_rate, gaussian), event.steps)
    return accountant.get_epsilon(delta)


def gaussian_epsilon(noise: float, n: int, delta: float) -> float:
    """n Gaussians on everybody, exactly (Balle and Wang 2018, arXiv:1805.06530, theorem 8)."""
    mu = math.sqrt(n) / noise

    def excess(eps: float) -> float:
        return norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu) - delta

    return brentq(excess, 0, 200)


events = st.builds(
    Event,
    noise_multiplier=st.floats(0.6, 20),
    sampling_rate=st.floats(0.01, 1),
    steps=st.integers(1, 100),
    split=st.sampled_from(["train", "validation", "test"]),
)


class TestEpsilon:
    @pytest.mark.parametrize("run", RUNS, ids=str)
    def test_second_accountant_agrees(self, run):
        """
        Never below dp-accounting's figure, and above it by less than 1 % or 0.002.
        """
        ours, theirs = epsilon(run, DELTA), pld_epsilon(run, DELTA)

        assert theirs - 1e-3 <= ours <= max(1.01 * theirs, theirs + 2e-3)

    @pytest.mark.parametrize(("noise", "n"), [(1.0, 1), (4.0, 10), (20.0, 20), (2.0, 3)])
    def test_closed_formula_agrees_where_everybody_takes_part(self, noise, n):
        """
        Without sampling there is a formula, and the accountant meets it.
        """
        assert epsilon([Event(noise, 1.0, n)], DELTA) == pytest.approx(gaussian_epsilon(noise, n, DELTA), rel=0.01)

    @pytest.mark.parametrize("run", RUNS, ids=str)
    def test_renyi_bound_is_never_smaller(self, run):
        """
        It is the cheaper figure, and the larger one.
        """
        assert epsilon(run, DELTA, accountant="rdp") >= epsilon(run, DELTA)

    @settings(max_examples=25, deadline=None)
    @given(events, st.integers(1, 50))
    def test_more_steps_never_cost_less(self, event, more):
        """
        A law: training on is never cheaper.
        """
        assert epsilon([replace(event, steps=event.steps + more)], DELTA) >= epsilon([event], DELTA) * (1 - 3e-3)

    @settings(max_examples=25, deadline=None)
    @given(events, st.floats(1.01, 2))
    def test_more_noise_never_costs_more(self, event, factor):
        """
        A law: noise helps.
        """
        noisier = replace(event, noise_multiplier=event.noise_multiplier * factor)
        assert epsilon([noisier], DELTA) <= epsilon([event], DELTA) * (1 + 3e-3)

    @settings(max_examples=15, deadline=None)
    @given(st.lists(events, min_size=1, max_size=5), st.randoms())
    def test_order_and_packaging_make_no_difference(self, run, rng):
        """
        Ten steps are ten times one step, and events come in any order.
        """
        shuffled = [replace(e, steps=1) for e in run for _ in range(e.steps)]
        rng.shuffle(shuffled)

        assert epsilon(shuffled, DELTA) == epsilon(run, DELTA)

    def test_patient_pays_for_the_split_it_is_in(self):
        """
        Training and validation concern different patients: the larger counts, not the sum.
        """
        training, metrics = Event(1.5, 0.1, 100), Event(10.0, 1.0, 20, split="validation")
        both = epsilon([training, metrics], DELTA)

        assert both == max(epsilon([training], DELTA), epsilon([metrics], DELTA))
        assert both < epsilon([training, replace(metrics, split="train")], DELTA)

    def test_nothing_costs_nothing_and_no_noise_costs_everything(self):
        """
        The two ends.
        """
        assert epsilon([], DELTA) == rdp([], 2.0) == 0.0
        assert epsilon([WITHOUT_PRIVACY], DELTA) == rdp([WITHOUT_PRIVACY], 2.0) == math.inf
        assert epsilon([Event(5.0, 0.1, 1), WITHOUT_PRIVACY], DELTA) == math.inf

    def test_hardly_any_noise_still_gets_a_number(self):
        """
        Where the finer accountant would need too much memory, the Renyi bound stands.
        """
        assert 300 < epsilon([Event(0.1, 0.5, 1000)], DELTA) < math.inf

    @pytest.mark.parametrize(
        "fields",
        [
            {"noise_multiplier": -1.0},
            {"noise_multiplier": math.nan},
            {"noise_multiplier": math.inf},
            {"sampling_rate": 0.0},
            {"sampling_rate": 1.1},
            {"steps": 0},
            {"images_per_patient": 2},
            {"unit": "image", "images_per_patient": 0},
        ],
        ids=str,
    )
    def test_impossible_events_are_refused(self, fields):
        """
        An event that cannot be reckoned is never written down.
        """
        with pytest.raises(ValueError, match=list(fields)[-1]):
            Event(**({"noise_multiplier": 1.0, "sampling_rate": 0.1, "steps": 1} | fields))

    def test_without_an_accountant_there_is_no_figure(self, monkeypatch):
        """
        C175 in place of a guess.
        """
        accounting._opacus.cache_clear()
        for name in [name for name in sys.modules if name.startswith("opacus")]:
            monkeypatch.setitem(sys.modules, name, None)

        with pytest.raises(FederadError, match="C175"):
            epsilon([Event(1.2345, 0.123, 45)], DELTA)


class TestRenyi:
    @pytest.mark.parametrize("order", [2, 3, 8, 32, 256])
    @pytest.mark.parametrize(("noise", "rate"), [(1.22, 0.16), (0.55, 0.016), (5.0, 1.0), (20.0, 0.5)])
    def test_second_library_agrees(self, order, noise, rate):
        """
        The divergence of one step is dp-accounting's.
        """
        dpa = pytest.importorskip("dp_accounting")
        accountant = dpa.rdp.RdpAccountant([order])
        accountant.compose(dpa.PoissonSampledDpEvent(rate, dpa.GaussianDpEvent(noise)))

        assert rdp([Event(noise, rate, 1)], order) == pytest.approx(accountant._rdp[0], rel=1e-6)

    def test_one_image_per_patient_is_one_patient(self):
        """
        The mixture of a patient with a single image is the ordinary mechanism, by another road.
        """
        for order in (2, 3, 8, 32):
            mixture = accounting._rdp_of_mixture(1.22, accounting._binomial(1, 0.16), order)
            assert mixture == pytest.approx(rdp([Event(1.22, 0.16, 1)], order))

    @pytest.mark.parametrize(("noise", "rate"), [(1.22, 0.16), (0.55, 0.016), (5.0, 1.0), (20.0, 0.5)])
    def test_orders_between_whole_numbers_lie_between(self, noise, rate):
        """
        Fractional orders come by another road; the divergence grows with the order, and Opacus' series agrees.
        """
        from opacus.accountants.analysis.rdp import compute_rdp

        event = Event(noise, rate, 1)
        orders = [1.125, 1.5, 2, 2.5, 3, 3.375, 3.875, 4]
        found = [rdp([event], order) for order in orders]

        assert found == sorted(found)
        for order in (1.5, 2.5, 3.375):
            theirs = compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=order)
            assert rdp([event], order) == pytest.approx(theirs, rel=1e-5)

    @pytest.mark.parametrize("cap", [1.0, 3.0, 8.0, 20.0])
    def test_filter_order_wastes_little_at_its_cap(self, cap):
        """
        Where the order was chosen for such runs, the fixed one costs at most 2 % more at the cap than the best.
        """
        run = [Event(calibrate(cap, DELTA, 0.05, 400), 0.05, 400)]
        order = filter_order(cap, DELTA, run)
        best = epsilon(run, DELTA, accountant="rdp")

        assert best <= rdp_to_epsilon(rdp(run, order), order, DELTA) <= 1.02 * best

    def test_filter_order_depends_on_the_plan_alone(self):
        """
        Without a run to go by it is the best for Gaussians on everybody; without privacy there is nothing to choose.
        """
        gaussians = filter_order(10.0, DELTA, [Event(3.0, 1.0, 10)])

        assert filter_order(10.0, DELTA) == filter_order(10.0, DELTA, [WITHOUT_PRIVACY]) == gaussians

    def test_five_runs_of_eight(self):
        """
        Five runs of epsilon 8 are about 20 if they had been fixed in advance, and a little more by Renyi.
        """
        run = Event(calibrate(8.0, DELTA, 0.08, 200), 0.08, 200)
        five = [replace(run, steps=1000)]

        assert 18 < epsilon(five, DELTA) < 21
        assert 1.05 * epsilon(five, DELTA) < epsilon(five, DELTA, accountant="rdp") < 1.1 * epsilon(five, DELTA)


class TestCalibration:
    @pytest.mark.parametrize("target", [0.5, 1.0, 3.0, 8.0])
    @pytest.mark.parametrize(("rate", "steps"), [(0.08, 200), (0.016, 200), (0.5, 20), (1.0, 5)])
    def test_noise_is_enough_and_hardly_more(self, target, rate, steps):
        """
        The run stays within epsilon by both libraries, and with 0.5 % less noise it would not.
        """
        noise = calibrate(target, DELTA, rate, steps)

        assert epsilon([Event(noise, rate, steps)], DELTA) <= target
        assert pld_epsilon([Event(noise, rate, steps)], DELTA) <= target + 1e-3
        assert epsilon([Event(0.995 * noise, rate, steps)], DELTA) > target

    def test_published_table_is_met(self):
        """
        Twenty passes over 10 000 patients, 128 a step: noise for epsilon 1, 3 and 8, computed elsewhere.
        """
        rate = 128 / 10_000
        found = [calibrate(target, DELTA, rate, round(20 / rate)) for target in (1.0, 3.0, 8.0)]

        np.testing.assert_allclose(found, (2.07, 1.00, 0.67), rtol=0.01)

    def test_metrics_on_the_same_patients_take_their_share(self):
        """
        What else is released about the patients in training makes more noise necessary; about others it does not.
        """
        metrics = Event(10.0, 1.0, 20)
        alone = calibrate(3.0, DELTA, 0.1, 100)
        noise = calibrate(3.0, DELTA, 0.1, 100, [metrics])

        assert noise > alone
        assert epsilon([Event(noise, 0.1, 100), metrics], DELTA) <= 3.0
        assert calibrate(3.0, DELTA, 0.1, 100, [replace(metrics, split="validation")]) == alone

    def test_impossible_epsilon_is_c172(self):
        """
        Neither noise a thousand times the clip nor patience brings some runs within their epsilon.
        """
        for extra in ((), [Event(0.5, 1.0, 10, split="validation")]):
            with pytest.raises(FederadError, match="C172") as error:
                calibrate(0.5 if extra else 0.01, DELTA, 1.0, 100 if extra else 100_000, extra)
            assert "epsilon 0." in error.value.happened

    def test_delta_is_well_below_one_patient(self):
        """
        min(1e-5, 1 / (10 n)).
        """
        assert [delta_limit(n) for n in (1, 100, 10_000, 100_000)] == [1e-5, 1e-5, 1e-5, 1e-6]


class TestImageLevel:
    @pytest.mark.parametrize(("n_images", "expected"), [(4, 15.6), (20, 152.0)])
    def test_published_table_is_met(self, n_images, expected):
        """
        10 000 slices, batch 256, 20 passes: epsilon 3 for a slice is 15.6 for a patient with 4, and 152 for one with 20.
        """
        pytest.importorskip("dp_accounting")
        rate = 256 / 10_000
        run = [Event(calibrate(3.0, DELTA, rate, 781), rate, 781)]

        assert image_epsilon(run, DELTA) == pytest.approx(3.0, rel=2e-3)
        assert patient_epsilon_of_image_level(run, n_images, DELTA) == pytest.approx(expected, rel=5e-3)

    def test_without_the_second_library_the_figure_is_larger(self, monkeypatch):
        """
        The Renyi divergence of the same mixture: sound, and within 15 %.
        """
        run = [Event(1.2561, 256 / 10_000, 782)]  # not asked for before, so nothing is remembered
        exact = patient_epsilon_of_image_level(run, 4, DELTA)
        monkeypatch.setitem(sys.modules, "dp_accounting", None)
        bound = patient_epsilon_of_image_level([replace(run[0], steps=783)], 4, DELTA)

        assert exact < bound < 1.15 * exact

    def test_cost_for_a_patient_is_what_counts(self):
        """
        Asked for epsilon of image-level events, the patient's is given: nobody gets the smaller one by accident.
        """
        event = Event(1.5, 0.02, 100, unit="image", images_per_patient=8)

        assert epsilon([event], DELTA) == patient_epsilon_of_image_level([event], 8, DELTA)
        assert epsilon([event], DELTA) > 3 * image_epsilon([event], DELTA)
        assert rdp([event], 4.0) > rdp([Event(1.5, 0.02, 100)], 4.0)
