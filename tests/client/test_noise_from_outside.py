"""Noise and coins as somebody outside would measure them: their size, their independence, and that they were paid for.

Every statistic here is compared with a bound that a correct build passes but for a chance of :data:`CHANCE`, so that the
operating system's own randomness can be used as it is and a failure means something.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from privately import answered, ask_of, private
from scipy import stats
from test_private_training import private_plan
from test_training import cohort_of, start_of

from client import training
from client.policy import Policy
from client.privacy import Mechanism, SystemRandomness
from client.site import SiteConfig
from client.station import Station
from client.training import PatientGradients, Trainer, resident_trainer
from shared_models.noised import NoisedMeans
from shared_models.plan import Plan
from shared_models.task import task_for
from shared_models.weights import Weights

ROOT = Path(__file__).parents[2]

CHANCE = 1e-6
"""Largest probability with which one assertion here fails on a correct build."""

DECLARED = 20

PRIVACY = {"noise_multiplier": 1.5, "clip": 0.7, "patients_per_step": 4, "steps_per_round": 3}

RATE = 0.1
"""Learning rate of plain gradient descent."""

STANDARD_DEVIATION = math.sqrt(3) * RATE * 1.5 * 0.7 / 4
"""sqrt(T) * lr * sigma * C / B: how far a value moves by noise alone."""


def assert_variance(values: np.ndarray, variance: float, name: str = "") -> None:
    """The sum of squares lies where a chi-square of as many degrees lies, but for :data:`CHANCE`."""
    below, above = stats.chi2.ppf([CHANCE / 2, 1 - CHANCE / 2], values.size)
    assert below < (values.astype(float) ** 2).sum() / variance < above, name


def assert_independent(draws: list[np.ndarray]) -> None:
    """No two of them correlate beyond what chance allows for all pairs together."""
    n_pairs = len(draws) * (len(draws) - 1) / 2
    bound = stats.norm.isf(CHANCE / n_pairs / 2) / math.sqrt(draws[0].size)
    found = np.abs(np.corrcoef(draws) - np.eye(len(draws))).max()
    assert found < bound


def flat(update: Weights) -> np.ndarray:
    return np.concatenate([part.ravel() for part in update.values()]).astype(np.float64)


N_PATIENTS, N_STEPS = 30, 4000


@pytest.fixture(scope="module")
def takes_part():
    """Who took part in which step of the trainer's own loop, ``(step, patient)``."""
    plan = private_plan(privacy={"patients_per_step": 5, "steps_per_round": N_STEPS}, task={"channels": [2, 2]})
    seen = np.zeros((N_STEPS, N_PATIENTS), bool)
    step = iter(range(N_STEPS))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(PatientGradients, "add_to", lambda self, total, who, secret: seen[next(step)].put(who, True))
        Trainer(plan, "cpu").train_private(
            start_of(plan), cohort_of(plan, N_PATIENTS), round_=1, declared_size=25, noise_multiplier=1.0
        )
    return seen


class TestSampling:
    def test_number_of_patients_in_a_step_is_binomial(self, takes_part):
        """
        With n patients and rate q = B / declared size: no truncation at B, no padding, and nobody is there now and then.
        """
        sizes = takes_part.sum(1)
        expected = stats.binom.pmf(np.arange(N_PATIENTS + 1), N_PATIENTS, 0.2)
        few, many = 1, 12
        seen = np.bincount(np.clip(sizes, few, many), minlength=many + 1)[few:]
        grouped = [expected[: few + 1].sum(), *expected[few + 1 : many], expected[many:].sum()]

        assert stats.chisquare(seen, N_STEPS * np.array(grouped)).pvalue > CHANCE

    def test_every_patient_comes_as_often(self, takes_part):
        """
        At the rate that was paid for, first and last in the list alike.
        """
        counts = takes_part.sum(0)
        statistic = ((counts - N_STEPS * 0.2) ** 2).sum() / (N_STEPS * 0.2 * 0.8)

        assert stats.chi2.sf(statistic, N_PATIENTS) > CHANCE

    def test_patients_come_independently(self, takes_part):
        """
        No two patients come together, or avoid each other, beyond chance.
        """
        assert_independent(list(takes_part.T.astype(float)))

    def test_steps_are_independent(self, takes_part):
        """
        Who takes part tells nothing about the next step.
        """
        now, then = (part.ravel().astype(float) - 0.2 for part in (takes_part[:-1], takes_part[1:]))
        agreement = (now * then).sum() / (0.16 * math.sqrt(now.size))

        assert abs(agreement) < stats.norm.isf(CHANCE / 2)


def noise_only(plan: Plan, channels: tuple[int, int] = (160, 320), **privacy: object) -> Plan:
    """The plan with privacy and plain gradient descent, on a network wide enough for statistics on its weights."""
    return private(
        plan,
        PRIVACY | privacy,
        data={"patch": [64, 64] if "metrics_every" in privacy else [8, 8]},
        task={"channels": list(channels)},
        training={"optimizer": "sgd", "learning_rate": RATE, "samples_per_patient": 1, "weight_decay": 0.0},
    )


class Counting(SystemRandomness):
    """The operating system's randomness, and what was asked of it."""

    asked: list[tuple[str, int, float]]

    def coins(self, n: int, q: float) -> np.ndarray:
        self.asked.append(("coins", n, q))
        return super().coins(n, q)

    def gaussian(self, n: int, sigma: float) -> np.ndarray:
        self.asked.append(("gaussian", n, sigma))
        return super().gaussian(n, sigma)


@pytest.fixture(scope="module")
def made(smoke_plan, hospitals, tmp_path_factory):
    """Stations of two hospitals that have approved the plan, and its measuring sister; every loss is flat."""
    plans = noise_only(smoke_plan), noise_only(smoke_plan, (2, 2), metrics_every=1, metrics_noise=3.0)
    folder = tmp_path_factory.mktemp("stations")
    for hospital in hospitals[:2]:
        config = SiteConfig(
            name=hospital.name,
            data=str(hospital.folder),
            device="cpu",
            policy=Policy(lifetime_epsilon=math.inf, run_epsilon=math.inf, minimum_patients=1),
        )
        station = Station.create(folder / hospital.name, config)
        for plan in plans:
            station.approve(plan, declared_size=DECLARED)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(task_for(smoke_plan)), "loss", lambda self, output, target: 0.0 * output.sum())
        patched.setattr(training, "SystemRandomness", Counting)
        patched.setattr(Counting, "asked", [], raising=False)
        resident_trainer.cache_clear()
        yield folder, plans
        resident_trainer.cache_clear()


@pytest.fixture(scope="module")
def rounds(made):
    """(what the noise source was asked, the answer) of three rounds of one run, a second run, and another site."""
    folder, (plan, _) = made
    done = []
    for site, run, round_ in (
        ("site-1", "run-1", 1),
        ("site-1", "run-1", 2),
        ("site-1", "run-1", 3),
        ("site-1", "run-2", 1),
        ("site-2", "run-1", 1),
    ):
        Counting.asked.clear()
        answer = answered(Station(folder / site), ask_of(plan, round_, run=run))
        done.append((list(Counting.asked), answer))
    return done


class TestStation:
    def test_every_tensor_that_leaves_has_the_variance_that_was_paid_for(self, rounds):
        """
        With flat losses what leaves is noise: T (lr sigma C / B)^2 in each tensor, and in all together to within 1 %.
        """
        for _, answer in rounds:
            assert answer.refusal is None
            for name, part in answer.update.items():
                assert_variance(part, STANDARD_DEVIATION**2, name)
            everything = flat(answer.update)
            assert everything.size > 500_000
            assert abs(everything.var() / STANDARD_DEVIATION**2 - 1) < 0.01

    def test_no_two_rounds_runs_or_sites_share_noise(self, rounds, made):
        """
        Nor do two processes that go on from one copy of a station: a restored machine draws anew.
        """
        folder, (plan, _) = made
        draws = [flat(answer.update) for _, answer in rounds]
        snapshot = folder / "snapshot"
        shutil.copytree(folder / "site-1", snapshot)
        for twin in (1, 2):
            copied = shutil.copytree(snapshot, folder / f"twin-{twin}")
            file = folder / f"twin-{twin}.npy"
            child = os.fork()
            if child == 0:
                np.save(file, flat(answered(Station(copied), ask_of(plan, 1, run="after")).update))
                os._exit(0)
            os.waitpid(child, 0)
            draws.append(np.load(file))

        assert_independent(draws)

    def test_ledger_is_what_a_second_accountant_finds_at_the_source_of_noise(self, rounds):
        """
        Steps, rate and noise are counted where randomness is drawn, and not in the trainer: dp-accounting gives the
        answer's epsilon within 1 %.
        """
        accountant = PLDAccountant()
        grid = Mechanism(sampling_rate=1.0, noise_multiplier=1.5, clip=0.7, divisor=4).grid
        for asked, answer in rounds[:3]:
            n_values = sum(part.size for part in answer.update.values())
            rates = [q for what, _, q in asked if what == "coins"]
            (sigma,) = {sigma for what, _, sigma in asked if what == "gaussian"}
            assert sum(n for what, n, _ in asked if what == "gaussian") == len(rates) * n_values
            for rate in rates:
                accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(sigma * grid / 0.7)))
            assert answer.cost["epsilon"] == pytest.approx(accountant.get_epsilon(1e-5), rel=0.01)

    def test_metrics_have_the_variance_that_was_paid_for(self, made):
        """
        The same weights measured in many runs: each figure moves by the noise that NoisedMeans says, and by that alone.
        """
        folder, (_, plan) = made
        station, task = Station(folder / "site-1"), task_for(plan)
        object.__setattr__(resident_trainer(plan, "cpu"), "train_private", lambda weights, *_, **__: weights)
        means = NoisedMeans.of(task, "validation", DECLARED)
        seen = []
        real = NoisedMeans.means
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(NoisedMeans, "means", lambda self, noised: seen.append(noised.copy()) or real(self, noised))
            for run in range(30):
                assert answered(station, ask_of(plan, 1, run=f"metrics-{run}")).metrics.keys() == means.ranges.keys()
        drawn = np.array(seen)
        spread = (drawn - drawn.mean(0)).ravel()
        below, above = stats.chi2.ppf([CHANCE / 2, 1 - CHANCE / 2], spread.size - drawn.shape[1])

        assert below < (spread**2).sum() / (3.0 * means.clip / means.n_patients) ** 2 < above


WORKER = """
import os, sys
import numpy as np
from client.privacy import SystemRandomness
source = SystemRandomness()
draws = [source.gaussian(50_000, 2.0**20)]
for _ in range(2):
    read, write = os.pipe()
    if os.fork() == 0:
        with os.fdopen(write, "wb") as out:
            out.write(source.gaussian(50_000, 2.0**20).tobytes())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as back:
        draws.append(np.frombuffer(back.read(), np.int64))
draws.append(source.gaussian(50_000, 2.0**20))
sys.stdout.buffer.write(np.concatenate(draws).tobytes())
"""
"""An interpreter that draws, lets two forked workers draw, and draws again."""


class TestProcesses:
    def test_forked_workers_and_fresh_interpreters_share_no_noise(self):
        """
        Two interpreters, each with two workers forked from it: of their eight draws no two have anything in common, and
        each has the deviation that was asked for.
        """
        drawn = []
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "-c", WORKER],
                capture_output=True,
                check=True,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )
            drawn += list(np.frombuffer(done.stdout, np.int64).reshape(4, 50_000) / 2.0**20)

        assert_independent(drawn)
        for draw in drawn:
            assert_variance(draw, 1.0)
