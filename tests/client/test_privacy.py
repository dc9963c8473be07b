"""The private mechanism: its noise, its coins, what one patient may add, and the grid it is added on."""

from __future__ import annotations

import inspect
import math
import os
import re
import time
from fractions import Fraction
from pathlib import Path

import laws
import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from client import privacy
from client.privacy import Mechanism, PatientSum, SystemRandomness, clipped, patient_seed, rounded_gaussian
from shared_models.plan import PrivacyTable

HOUSE = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


def mechanism(**numbers: float) -> Mechanism:
    return Mechanism(**{"sampling_rate": 0.1, "noise_multiplier": 1.0, "clip": 1.0, "divisor": 4, **numbers})


class NoNoise(SystemRandomness):
    """Coins and secrets of the system, and no noise at all."""

    def gaussian(self, n: int, sigma: float) -> np.ndarray:
        return np.zeros(n, np.int64)


def never() -> int:
    raise AssertionError("64 bits were enough")


def words(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, n, dtype=np.uint64)


class TestRoundedGaussian:
    @pytest.mark.parametrize("sigma", [0.3, 1.0, 2.7])
    def test_every_integer_comes_as_often_as_the_rounded_gaussian_says(self, sigma):
        """
        The frequencies of a million draws agree with the areas under the bell curve.
        """
        drawn = rounded_gaussian(words(10**6), sigma, lambda: 0)
        reach = math.ceil(4 * sigma)
        k = np.arange(-reach, reach + 1)
        edges = np.array([-math.inf, *(k[:-1] + 0.5), math.inf])
        expected = np.diff([0.5 * math.erfc(-edge / sigma / math.sqrt(2)) for edge in edges])
        seen = np.bincount(np.clip(drawn, -reach, reach) + reach, minlength=len(k))

        assert stats.chisquare(seen, expected * len(drawn)).pvalue > 1e-4

    def test_rounding_is_exact_wherever_64_bits_decide_it(self):
        """
        Both ends of the interval that a word leaves open lie on the integer's own side of both its borders.
        """
        sigma = 1.3 * 2**20
        tails = [int(w) >> (1 + shift) for shift in range(24) for w in words(40, shift)]
        drawn = rounded_gaussian(np.array(tails, np.uint64), sigma, lambda: 2**127)
        is_open = 0
        with mpmath.workdps(60):
            for tail, k in zip(tails, drawn.tolist(), strict=True):
                most, least = (mpmath.ncdf(-(mpmath.mpf(k) + side) / sigma) * 2**64 for side in (-0.5, 0.5))
                assert least <= tail + 1
                assert k == 0 or tail <= most
                is_open += not (least <= tail and (k == 0 or tail + 1 <= most))

        assert is_open < len(tails) / 50

    def test_further_bits_settle_what_64_leave_open(self):
        """
        A word on the border between two integers becomes one or the other as the next bits say.
        """
        sigma, k = 2.0**20, 700_000
        with mpmath.workdps(60):
            border = int(mpmath.ncdf(-(mpmath.mpf(k) - 0.5) / sigma) * 2**64)
        word = np.array([border], np.uint64)

        assert rounded_gaussian(word, sigma, lambda: 0)[0] == k
        assert rounded_gaussian(word, sigma, lambda: 2**128 - 1)[0] == k - 1

    def test_tail_has_no_end_that_a_word_sets(self):
        """
        The rarest word reaches beyond eight standard deviations, and as far beyond as its further bits say.
        """
        word = np.array([0], np.uint64)
        near, far = (int(rounded_gaussian(word, 2.0**20, lambda m=m: m)[0]) for m in (2**128 - 1, 0))

        assert 9.0 < near / 2**20 < 9.2
        assert 15.0 < far / 2**20 < 16.5

    def test_signs_are_even(self):
        """
        The top bit of a word is the sign and nothing else.
        """
        w = words(1000) >> np.uint64(1)

        np.testing.assert_array_equal(
            rounded_gaussian(w | np.uint64(2**63), 2.0**20, lambda: 0), -rounded_gaussian(w, 2.0**20, lambda: 0)
        )

    def test_further_bits_are_rarely_asked_for(self):
        """
        Less than one draw in ten thousand needs more than 64 bits.
        """
        asked = []
        rounded_gaussian(words(10**6), 2.0**21, lambda: asked.append(1) or 2**127)

        assert len(asked) < 100


class TestSystemRandomness:
    def test_noise_has_the_asked_deviation(self):
        """
        A million draws have mean zero and the standard deviation that was asked for, within one half percent.
        """
        drawn = SystemRandomness().gaussian(10**6, 2.0**20) / 2**20

        assert abs(drawn.std() - 1) < 0.005
        assert abs(drawn.mean()) < 0.005

    def test_million_draws_take_less_than_a_third_of_a_second(self):
        """
        Secure noise for a million weights costs at most 0.3 s of CPU.
        """
        times = []
        for _ in range(3):
            since = time.process_time()
            SystemRandomness().gaussian(10**6, 2.0**20)
            times.append(time.process_time() - since)

        assert min(times) < 0.3

    def test_no_draw_comes_twice(self):
        """
        Two sources, and two draws of one, have nothing in common.
        """
        one, other = SystemRandomness(), SystemRandomness()
        draws = [one.gaussian(10**5, 2.0**20), one.gaussian(10**5, 2.0**20), other.gaussian(10**5, 2.0**20)]

        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert abs(np.corrcoef(draws[a], draws[b])[0, 1]) < 5 / math.sqrt(10**5)
        assert len({one.secret(), one.secret(), other.secret()}) == 3

    def test_child_process_draws_its_own(self):
        """
        After a fork the two halves draw different noise: the source keeps no state that both would inherit.
        """
        source = SystemRandomness()
        source.gaussian(10, 2.0**20)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write, source.gaussian(1000, 2.0**20).tobytes())
            os._exit(0)
        os.waitpid(child, 0)
        theirs = np.frombuffer(os.read(read, 8000), np.int64)
        os.close(read)
        os.close(write)
        ours = source.gaussian(1000, 2.0**20)

        assert abs(np.corrcoef(ours, theirs)[0, 1]) < 5 / math.sqrt(1000)

    @pytest.mark.parametrize("q", [0.001, 0.25, 0.9])
    def test_coins_show_the_rate(self, q):
        """
        Of a million coins the asked share shows True, within five standard errors, and neighbours are independent.
        """
        coins = SystemRandomness().coins(10**6, q)

        assert abs(coins.mean() - q) < 5 * math.sqrt(q * (1 - q) / 10**6)
        assert abs((coins[1:] & coins[:-1]).mean() - q * q) < 6 * math.sqrt(q * q * (1 - q * q) / 10**6)

    def test_certain_coins_are_certain(self):
        """
        At rate one everybody takes part; of nobody, nobody does.
        """
        assert SystemRandomness().coins(1000, 1.0).all()
        assert len(SystemRandomness().coins(0, 0.5)) == 0

    def test_nothing_in_the_house_hands_a_trainer_other_randomness(self):
        """
        A source of noise is given by tests and the simulation, in code: no plan, setting or variable leads to one.
        """
        for folder in ("client", "server", "shared_models"):
            for file in (HOUSE / folder).rglob("*.py"):
                given = re.findall(r"\brandomness=", file.read_text())
                assert not given, file
        assert "environ" not in inspect.getsource(privacy)


class TestMechanism:
    @given(st.floats(0.01, 1000), st.floats(1e-6, 1e6))
    @laws.SAME_EXAMPLES
    def test_grid_is_fine_enough_and_public(self, noise_multiplier, clip):
        """
        The unit is a power of two, far below the noise, and follows from the plan's numbers alone.
        """
        m = mechanism(noise_multiplier=noise_multiplier, clip=clip)

        assert m.grid <= noise_multiplier * clip * 2.0**-16
        assert math.frexp(m.grid)[0] == 0.5
        assert m.sigma * m.grid == noise_multiplier * clip
        assert m.largest_square <= (Fraction(clip) / Fraction(m.grid)) ** 2 < m.largest_square + 1

    @pytest.mark.parametrize(("declared", "rate"), [(160, 0.1), (16, 1.0), (4, 1.0), (1000, 0.016)])
    def test_rate_follows_from_the_plan_and_the_declared_size(self, declared, rate):
        """
        q = min(1, B / n), with B from the plan and n as the hospital declared it; the divisor is B.
        """
        table = PrivacyTable(epsilon=8.0, patients_per_step=16, steps_per_round=10, clip=0.5)
        m = Mechanism.of(table, declared_size=declared, noise_multiplier=1.1)

        assert m == Mechanism(sampling_rate=rate, noise_multiplier=1.1, clip=0.5, divisor=16)

    @pytest.mark.parametrize(
        "numbers",
        [
            {"noise_multiplier": 0.0},
            {"noise_multiplier": math.nan},
            {"noise_multiplier": math.inf},
            {"sampling_rate": 0.0},
            {"sampling_rate": 1.1},
            {"clip": 0.0},
            {"clip": math.inf},
            {"divisor": 0},
            {"gamma": 0.0},
        ],
        ids=str,
    )
    def test_numbers_without_protection_are_refused(self, numbers):
        """
        No mechanism exists without noise, without a clip or with a rate that is none.
        """
        with pytest.raises(ValueError, match=r"is not between|above zero"):
            mechanism(**numbers)

    def test_size_of_nobody_is_refused(self):
        """
        A hospital that declares nobody has no rate.
        """
        with pytest.raises(ValueError, match="declared_size=0"):
            privacy.sampling_rate(4, 0)


gradients = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40)


class TestClipping:
    def test_short_gradient_passes_unchanged(self):
        """
        What is shorter than the clip keeps every value.
        """
        gradient = torch.tensor([0.3, -0.4, 0.0], dtype=torch.float64)

        assert torch.equal(clipped(gradient, mechanism()), gradient)

    def test_long_gradient_keeps_its_direction_and_gets_the_norm(self):
        """
        What is longer is scaled to the clip.
        """
        gradient = torch.tensor([30.0, -40.0])
        result = clipped(gradient, mechanism(clip=0.5))

        torch.testing.assert_close(result, torch.tensor([0.3, -0.4], dtype=torch.float64), rtol=0, atol=1e-12)
        assert torch.equal(gradient, torch.tensor([30.0, -40.0]))

    def test_automatic_clipping_is_its_formula(self):
        """
        g C / (|g| + gamma), for short and long gradients alike.
        """
        for scale in (1e-3, 1.0, 1e3):
            gradient = torch.tensor([3.0, -4.0], dtype=torch.float64) * scale
            result = clipped(gradient, mechanism(clip=2.0, gamma=0.1))

            torch.testing.assert_close(result, gradient * 2.0 / (5 * scale + 0.1), rtol=1e-11, atol=0)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("gamma", [None, 0.01])
    def test_value_that_is_not_finite_silences_the_patient(self, value, gamma):
        """
        A NaN or an infinity anywhere makes the whole gradient count for nothing.
        """
        total = PatientSum(mechanism(gamma=gamma), 3)

        assert not total.add(torch.tensor([1.0, value, 0.0]), 0)
        assert not total.integers.any()

    @given(gradients, st.floats(0.01, 100), st.floats(1e-3, 1e3), st.sampled_from([None, 1e-3]), st.integers(0, 99))
    @laws.SAME_EXAMPLES
    def test_patient_adds_at_most_the_clip_exactly(self, gradient, noise_multiplier, clip, gamma, seed):
        """
        The squared norm of the integers that one patient adds never exceeds that of the clip, in exact arithmetic.
        """
        m = mechanism(noise_multiplier=noise_multiplier, clip=clip, gamma=gamma)
        total = PatientSum(m, len(gradient))
        total.add(torch.tensor(gradient), seed)
        square = sum(value**2 for value in total.integers.tolist())

        assert square * Fraction(m.grid) ** 2 <= Fraction(clip) ** 2

    @pytest.mark.parametrize("gamma", [None, 0.01])
    def test_million_values_at_the_clip_stay_below_it(self, gamma):
        """
        Where rounding a million values at random would make a gradient too long, it is truncated.
        """
        m = mechanism(gamma=gamma)
        total = PatientSum(m, 10**6)
        total.add(torch.full((10**6,), 5.3), 1)

        assert int(total.integers.square().sum()) <= m.largest_square
        assert float(total.integers.double().norm()) * m.grid > 0.99

    def test_integers_that_are_too_long_all_the_same_count_for_nothing(self):
        """
        The last check stands on its own: what reaches it unclipped is dropped whole.
        """
        m = mechanism()
        just, beyond = (torch.tensor([length, 0.0], dtype=torch.float64) for length in (1.0, 1.0 + 2 * m.grid))

        assert privacy.on_grid(just, m, 0).any()
        assert not privacy.on_grid(beyond, m, 0).any()

    def test_random_rounding_keeps_the_mean(self):
        """
        A value between two points of the grid becomes either, and on average itself.
        """
        m = mechanism()
        scaled = torch.full((200_000,), 0.3 * m.grid, dtype=torch.float64)
        integers = privacy.on_grid(scaled, m, 7)

        assert set(integers.tolist()) == {0, 1}
        assert abs(float(integers.double().mean()) - 0.3) < 5 * math.sqrt(0.21 / 200_000)

    def test_sum_is_that_of_the_clipped_gradients_to_the_grid(self):
        """
        Integers times the unit differ from the real sum by less than one unit for each patient.
        """
        m, each = mechanism(), torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)) * 0.05
        total = PatientSum(m, 1000)
        for i, gradient in enumerate(each):
            total.add(gradient, i)
        real = sum(clipped(gradient, m) for gradient in each)

        assert float((total.integers * m.grid - real).abs().max()) < len(each) * m.grid

    def test_order_of_patients_changes_no_bit(self):
        """
        Integers add up alike in any order.
        """
        each = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
        sums = []
        for order in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):
            total = PatientSum(mechanism(), 100)
            for i in order:
                total.add(each[i], i)
            sums.append(total.integers.clone())

        assert torch.equal(*sums)


class TestNoisedSum:
    def test_divisor_is_public_whoever_came(self):
        """
        The sum of two patients, or of none, is divided by B.
        """
        for n_patients in (0, 1, 2):
            total = PatientSum(mechanism(divisor=16), 2)
            for i in range(n_patients):
                total.add(torch.tensor([0.5, 0.0]), i)

            assert total.noised(NoNoise()).tolist() == [n_patients * 0.5 / 16, 0.0]

    @pytest.mark.parametrize("n_values", [1, 1000, 2**18 + 1])
    def test_empty_sum_is_noised_all_the_same(self, n_values):
        """
        Where nobody took part the noise alone comes out, in every part.
        """
        noised = PatientSum(mechanism(noise_multiplier=2.0, clip=3.0, divisor=5), n_values).noised(SystemRandomness())

        assert float((noised != 0).double().mean()) > 0.99  # a rounded Gaussian is zero about once in two million draws
        if n_values > 10**5:
            assert abs(float(noised.std()) / (2.0 * 3.0 / 5) - 1) < 0.01
            assert abs(float(noised[-1000:].std()) / (2.0 * 3.0 / 5) - 1) < 0.2

    def test_noised_values_lie_on_the_grid(self):
        """
        What comes out is a whole number of units over B: no low-order bits tell what went in.
        """
        m, total = mechanism(divisor=8), PatientSum(mechanism(divisor=8), 1000)
        total.add(torch.randn(1000), 0)
        units = total.noised(SystemRandomness()) * 8 / m.grid

        assert torch.equal(units, units.round())

    def test_sum_is_noised_once(self):
        """
        The same sum never comes out a second time under other noise, nor without.
        """
        total = PatientSum(mechanism(), 3)
        total.noised(SystemRandomness())

        for again in (lambda: total.noised(SystemRandomness()), lambda: total.integers):
            with pytest.raises(ValueError, match="gone"):
                again()


class TestPatientSeed:
    def test_depends_on_patient_purpose_and_step_secret(self):
        """
        No two patients, purposes or steps share random numbers, and the same one always has the same.
        """
        secrets = [SystemRandomness().secret() for _ in range(2)]
        seeds = {patient_seed(s, p, w) for s in secrets for p in ("a", "b") for w in ("rounding", "torch")}

        assert len(seeds) == 8
        assert patient_seed(secrets[0], "a", "torch") in seeds
