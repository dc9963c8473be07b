"""A one-run audit: how well can an attacker who sees everything tell who took part, and is that within epsilon?

After Steinke, Nasr and Jagielski 2023, arXiv:2305.08846, with patients in place of examples. Each of many canary patients
takes part or stays away by a fair coin; one private run is made of those who take part; from the updates that left, the
attacker guesses each coin. Under (epsilon, delta) differential privacy no attacker guesses right more often than a bound
allows, so the share of right guesses gives a lower bound on epsilon with 95 % confidence.

It is a detector of mistakes and no measurement of epsilon: on a correct build the bound lies far below the ledger's figure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from test_private_training import private_plan
from test_training import Cohort, cohort_of, start_of

from client.ledger import Ledger, Spent
from client.policy import Policy, cost_of
from client.privacy import SystemRandomness
from client.training import PatientGradients, Trainer
from shared_models.messages import Question
from shared_models.plan import Plan
from shared_models.weights import Weights, load_weights, weights_sha256

N_CANARIES = 300

N_ROUNDS = 2

CLAIMED = 2.0
"""Epsilon of the whole run, in the plan."""

CONFIDENCE = 0.95

RATE = 1.0
"""Learning rate."""

RIDGE = 1e-3
"""Of the attacker's least squares: what noise there is in directions that canaries hardly differ in stays out."""


def largest_chance(n_canaries: int, n_guesses: int, n_right: int, epsilon: float, delta: float) -> float:
    """Largest probability with which an (epsilon, delta) private run lets ``n_right`` of ``n_guesses`` be right.

    Theorem 5.2 of the paper: with delta = 0 right guesses are at most as frequent as those of randomised response; delta
    adds 2 m delta times the largest mean of the binomial's probabilities just below ``n_right``.
    """
    right = np.exp(epsilon) / (1 + np.exp(epsilon))
    likelihood = stats.binom.pmf(n_right - np.arange(1, n_right + 1), n_guesses, right)
    slope = (np.cumsum(likelihood) / np.arange(1, n_right + 1)).max(initial=0.0)
    return min(1.0, stats.binom.sf(n_right - 1, n_guesses, right) + 2 * n_canaries * delta * slope)


def epsilon_at_least(n_canaries: int, n_guesses: int, n_right: int, delta: float) -> float:
    """Lower bound on epsilon from a number of right guesses, with :data:`CONFIDENCE`; 0 where they show nothing."""
    low, high = 0.0, 20.0
    if largest_chance(n_canaries, n_guesses, n_right, 0.0, delta) > 1 - CONFIDENCE:
        return 0.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        is_refuted = largest_chance(n_canaries, n_guesses, n_right, middle, delta) <= 1 - CONFIDENCE
        low, high = (middle, high) if is_refuted else (low, middle)
    return low


@dataclass(frozen=True)
class Audit:
    """One run with canaries."""

    plan: Plan
    everybody: Cohort
    takes_part: NDArray[np.bool_]
    ledger: Ledger

    @classmethod
    def begun(cls, ledger: Ledger) -> Audit:
        plan = private_plan(
            privacy={
                "noise_multiplier": None,
                "epsilon": CLAIMED,
                "clip": 0.01,  # far below the gradients: whoever forgets to clip gives the attacker a hundred times as much
                "patients_per_step": N_CANARIES // 2,
                "steps_per_round": 1,
            },
            training={"learning_rate": RATE, "samples_per_patient": 1, "flips": False, "foreground": 0.0},
            task={"channels": [6, 12]},
        ).model_copy(update={"rounds": N_ROUNDS})
        coins = np.random.default_rng().integers(0, 2, N_CANARIES).astype(bool)
        return cls(plan, cohort_of(plan, N_CANARIES), coins, ledger)

    def run(self) -> tuple[list[tuple[Weights, Weights]], float]:
        """What the server sees of each round, (weights that it sent, update that left), and the ledger's epsilon then."""
        plan, declared = self.plan, N_CANARIES // 2
        cost = cost_of(plan, declared, Spent())
        caps = Policy().caps(cost)
        people = self.everybody.people["train"]
        here = [person for person, is_here in zip(people, self.takes_part, strict=True) if is_here]
        cohort = replace(self.everybody, people={"train": here})
        trainer, weights, seen = Trainer(plan, "cpu"), start_of(plan), []
        for round_ in range(1, N_ROUNDS + 1):
            question = Question("audit", round_, "train", plan.sha256, weights_sha256(weights))
            reservation = self.ledger.reserve(
                question, cohort="k", events=cost.of_round(round_), whole_run=cost.events, caps=caps
            )
            update = trainer.train_private(
                weights, cohort, round_=round_, declared_size=declared, noise_multiplier=cost.noise_multiplier
            )
            seen.append((weights, update))
            weights = {name: weights[name] + update[name] for name in weights}
        return seen, reservation.epsilon

    def scores(self, seen: list[tuple[Weights, Weights]]) -> NDArray[np.float64]:
        """How much of each canary's gradient is in what left, ``(canary,)``: by least squares, which knows them all."""
        trainer = Trainer(self.plan, "cpu")
        unit = -RATE * self.plan.privacy.clip / self.plan.privacy.patients_per_step
        scores = np.zeros(N_CANARIES)
        for weights, update in seen:
            load_weights(trainer.network, weights)
            with PatientGradients(trainer.network, trainer.task, self.everybody, trainer._precision) as gradients:
                each = torch.stack([gradients._gradient(p, b"").clone() for p in gradients._patients]).double()
                names = [name for name, _ in trainer.network.named_parameters()]
            each /= each.norm(dim=1, keepdim=True)
            left = torch.cat([torch.from_numpy(update[name].copy()).ravel() for name in names]).double() / unit
            ridge = RIDGE * torch.eye(N_CANARIES, dtype=torch.float64)
            scores += torch.linalg.solve(each @ each.T + ridge, each @ left).numpy()
        return scores

    def epsilon_at_least(self, seen: list[tuple[Weights, Weights]]) -> float:
        """The audit's lower bound: guesses on the third of canaries with the highest and the lowest scores each."""
        scores = self.scores(seen)
        order, n_each = np.argsort(scores), N_CANARIES // 3
        n_right = int((~self.takes_part[order[:n_each]]).sum() + self.takes_part[order[-n_each:]].sum())
        return epsilon_at_least(N_CANARIES, 2 * n_each, n_right, self.plan.privacy.delta)


class WithoutNoise(SystemRandomness):
    """Coins of the system, and no noise."""

    def gaussian(self, n: int, sigma: float) -> NDArray[np.int64]:
        return np.zeros(n, np.int64)


@pytest.fixture
def audit(tmp_path):
    """A run that is about to be audited, on a ledger of its own."""
    return Audit.begun(Ledger.open(tmp_path, b"\x07" * 32))


def test_patients_of_a_private_run_cannot_be_told_from_those_who_stayed_away(audit):
    """
    The lower bound stays below the epsilon of the ledger. A correct build would fail this in one run of twenty if the
    attacker were as good as the accountant fears; this one, who guesses hardly better than a coin, never comes near.
    """
    seen, epsilon = audit.run()

    assert 0.95 * CLAIMED < epsilon <= CLAIMED
    assert audit.epsilon_at_least(seen) < epsilon


@pytest.mark.parametrize("mistake", ["no noise", "no clip"])
def test_broken_run_is_found_out(audit, mistake, monkeypatch):
    """
    The audit can fail: without noise, or with patients who are not clipped, the bound is above the ledger's epsilon.
    """
    if mistake == "no noise":
        monkeypatch.setattr("client.training.SystemRandomness", WithoutNoise)
    else:
        monkeypatch.setattr("client.privacy.clipped", lambda gradient, mechanism, out: out.copy_(gradient))
        monkeypatch.setattr(
            "client.privacy.on_grid", lambda scaled, m, seed, out: out.copy_(scaled.div_(m.grid).round_())
        )
    seen, epsilon = audit.run()

    assert audit.epsilon_at_least(seen) > 1.2 * epsilon


class TestBound:
    def test_perfect_guesses_give_the_formula(self):
        """
        Without delta, m right guesses of m refute every epsilon with (e^eps / (1 + e^eps))^m below 5 %.
        """
        right = 0.05 ** (1 / 200)

        assert epsilon_at_least(200, 200, 200, 0.0) == pytest.approx(np.log(right / (1 - right)), abs=2e-3)

    def test_coin_tosses_show_nothing(self):
        """
        Half of the guesses right is what anybody gets.
        """
        assert epsilon_at_least(200, 100, 50, 1e-5) == 0

    def test_delta_makes_the_bound_weaker(self):
        """
        A larger delta explains more.
        """
        bounds = [epsilon_at_least(200, 200, 190, delta) for delta in (0.0, 1e-5, 1e-3)]

        assert bounds == sorted(bounds, reverse=True)
        assert bounds[0] > bounds[-1]

    def test_randomised_response_is_not_accused(self):
        """
        The tightest mechanism there is, at epsilon 1: the bound is above 1 in no more than one audit in twenty or so.
        """
        rng = np.random.default_rng(0)
        right = rng.binomial(300, np.e / (1 + np.e), 100)
        accused = sum(epsilon_at_least(300, 300, int(n), 0.0) > 1.0 for n in right)

        assert accused <= stats.binom.ppf(1 - 1e-6, 100, 0.05)
        assert np.median([epsilon_at_least(300, 300, int(n), 0.0) for n in right]) > 0.7
