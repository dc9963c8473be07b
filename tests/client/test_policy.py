"""What a hospital permits: decided from public facts, at the cost that the ledger will charge."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime, time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.accounting import WITHOUT_PRIVACY, Event, epsilon
from client.ledger import Caps, Ledger, Spent
from client.policy import (
    Cost,
    Permitted,
    Policy,
    Refused,
    Releases,
    cost_of,
    is_open,
    require_round,
    round_size,
)
from shared_models.errors import FederadError
from shared_models.messages import Question
from shared_models.plan import AdaptationTable, Plan, PrivacyTable

NOON = datetime(2026, 3, 1, 12, 0)


@pytest.fixture
def private(smoke_plan):
    """A plan with privacy: 20 rounds of 10 steps, 16 patients a step."""
    privacy = PrivacyTable(epsilon=4.0, patients_per_step=16, steps_per_round=10)
    strategy = smoke_plan.strategy.model_copy(update={"release": "last"})
    return smoke_plan.model_copy(update={"rounds": 20, "privacy": privacy, "strategy": strategy})


@pytest.fixture
def cost(private):
    """What it costs at a site that declares 200 patients."""
    return cost_of(private, 200, Spent())


def with_privacy(plan: Plan, **fields) -> Plan:
    return plan.model_copy(update={"privacy": plan.privacy.model_copy(update=fields)})


def at_approval(policy: Policy, plan: Plan, cost: Cost, n_patients: int = 187, spent: Spent | None = None):
    return policy.at_approval(plan, cost, n_patients=n_patients, spent=spent or Spent())


def charged(folder, cost: Cost, run: str, plan: Plan) -> Spent:
    """What is spent after the whole run."""
    ledger = Ledger.open(folder, b"\x01" * 32)
    open_caps = Caps(math.inf, cost.delta, 10.0 if cost.is_private else math.inf, cost.lifetime_delta)
    for round_ in range(1, plan.rounds + 1):
        question = Question(run, round_, "train", plan.sha256, "a" * 64)
        ledger.reserve(question, cohort="k", events=cost.of_round(round_), whole_run=cost.events, caps=open_caps)
    return ledger.spent()


def without_moments(cost: Cost) -> Cost:
    return replace(cost, moments_rounds=range(0))


class TestCost:
    def test_epsilon_of_the_plan_gives_the_noise(self, private, cost):
        """
        The whole run stays within the plan's epsilon, and the site's declared size decides how much noise that takes.
        """
        assert 3.9 < cost.epsilon <= 4.0
        assert cost.sampling_rate == 16 / 200
        assert cost_of(private, 1000, Spent()).noise_multiplier < cost.noise_multiplier
        assert cost.epsilon_by_rdp > cost.epsilon

    def test_noise_of_the_plan_gives_epsilon(self, private):
        """
        The other way round.
        """
        plan = with_privacy(private, epsilon=None, noise_multiplier=1.5)
        cost = cost_of(plan, 200, Spent())

        assert cost.noise_multiplier == 1.5
        assert cost.epsilon == epsilon(cost.events, 1e-5)

    def test_site_smaller_than_a_step_takes_everybody(self, private):
        """
        q is at most 1, and the divisor stays the plan's.
        """
        assert cost_of(with_privacy(private, epsilon=100.0), 10, Spent()).sampling_rate == 1.0

    @pytest.mark.parametrize("unit", [{}, {"unit": "image", "images_per_patient": 4}], ids=["patient", "image"])
    def test_rounds_add_up_to_the_run(self, private, unit):
        """
        What is charged round by round is what was promised for the whole, to a patient, whatever the plan protects.
        """
        cost = cost_of(with_privacy(private, **unit), 200, Spent())
        rounds = [event for round_ in range(1, 21) for event in cost.of_round(round_)]

        assert epsilon(rounds, 1e-5) == cost.epsilon

    def test_metrics_are_priced_with_the_run(self, private):
        """
        Every fifth round one noised measurement of validation patients, one of test patients at the end, and no other.
        """
        plan = with_privacy(private, metrics_every=5, metrics_noise=20.0)
        cost = cost_of(plan, 200, Spent())
        rounds = [event for round_ in range(1, 21) for event in cost.of_round(round_)]

        assert [round_ for round_ in range(1, 21) if cost.has_metrics(round_)] == [5, 10, 15, 20]
        assert len([event for event in rounds if event.split == "validation"]) == 4
        assert epsilon([*rounds, *cost.of_test()], 1e-5) == epsilon(cost.events, 1e-5) == cost.epsilon
        assert cost_of(private, 200, Spent()).of_test() == ()

    def test_moments_are_priced_with_the_run(self, private):
        """
        Training patients pay for each release of moments in the same sum as for their steps, so these get more noise.
        """
        table = AdaptationTable(adversarial="moments", moments_every=4, moments_noise=10.0, warm_up=0.5)
        plan = private.model_copy(update={"adaptation": table})
        cost, without = cost_of(plan, 200, Spent()), cost_of(private, 200, Spent())
        rounds = [event for round_ in range(1, 21) for event in cost.of_round(round_)]
        moments = [event for event in rounds if event.noise_multiplier == 10.0]

        assert list(cost.moments_rounds) == [10, 14, 18]
        assert moments == [Event(10.0, 1.0, 1, split="train")] * 3
        assert epsilon(rounds, 1e-5) == epsilon(cost.events, 1e-5) == cost.epsilon
        assert 3.9 < cost.epsilon <= 4.0
        assert cost.noise_multiplier > without.noise_multiplier
        assert cost.of_round(10) == (*without_moments(cost).of_round(10), moments[0])

    def test_metrics_that_cost_more_than_the_run_may_are_refused(self, private):
        """
        Little noise on the metrics is a cost of its own, which no noise on the weights makes good.
        """
        with pytest.raises(FederadError, match="C172"):
            cost_of(with_privacy(private, metrics_every=1, metrics_noise=0.5), 200, Spent())

    def test_plan_without_privacy_costs_everything(self, smoke_plan):
        """
        Nothing bounds what it tells.
        """
        cost = cost_of(smoke_plan, 200, Spent())

        assert cost.epsilon == cost.lifetime_after == math.inf
        assert cost.of_round(1) == cost.of_test() == cost.events == (WITHOUT_PRIVACY,)
        assert cost.agreement(smoke_plan.sha256).epsilon is None

    def test_image_level_plan_shows_what_it_means_for_a_patient(self, private):
        """
        Its own epsilon is the image's; the patient's is several times that, and is the one that counts.
        """
        plan = with_privacy(private, unit="image", images_per_patient=4)
        cost = cost_of(plan, 200, Spent())

        assert cost.images_per_patient == 4
        assert 3.9 < cost.image_epsilon <= 4.0
        assert cost.epsilon > 2 * cost.image_epsilon
        assert cost.lifetime_after > cost.epsilon

    def test_what_was_agreed_stands(self, private, cost):
        """
        The noise found at the approval is the noise of every round, whatever accountant is installed by then.
        """
        agreed = replace(cost.agreement(private.sha256), noise_multiplier=2.5)

        assert cost_of(private, agreed.declared_size, Spent(), agreed=agreed).noise_multiplier == 2.5

    def test_lifetime_grows_by_the_run(self, private, cost, tmp_path):
        """
        Before anyone approves, the cost shows what would be spent in all, with what is spent already.
        """
        spent = charged(tmp_path, cost, "run-1", private)
        second = cost_of(private, 200, spent)

        assert cost.lifetime_before == 0
        assert second.lifetime_before == pytest.approx(cost.lifetime_after)
        assert second.lifetime_after > second.lifetime_before

    def test_delta_must_fit_the_site(self, private):
        """
        1e-5 is too much for more than ten thousand patients.
        """
        assert cost_of(private, 10_000, Spent()).delta == 1e-5
        with pytest.raises(FederadError, match="C174"):
            cost_of(private, 15_000, Spent())


class TestDeclaredSize:
    @pytest.mark.parametrize(
        ("n", "rounded"),
        [
            (1, 5),
            (4, 5),
            (8, 10),
            (12, 10),
            (13, 15),
            (97, 95),
            (99, 100),
            (124, 100),
            (187, 200),
            (1007, 1000),
            (1300, 1500),
        ],
    )
    def test_proposed_number_is_round(self, n, rounded):
        """
        Near enough for the arithmetic, and too coarse to tell of one patient.
        """
        assert round_size(n) == rounded

    @given(st.integers(1, 10**7))
    def test_rounding_is_final_and_close(self, n):
        """
        A law: a rounded number is its own, and off by at most a quarter (but for the smallest).
        """
        rounded = round_size(n)

        assert require_round(round_size(rounded)) == rounded
        assert abs(rounded - n) <= max(4, n / 4)

    @pytest.mark.parametrize("declared", [0, -5, 7, 101, 187, 1007])
    def test_exact_number_is_c173(self, declared):
        """
        Whoever types the true number is given a rounded one.
        """
        with pytest.raises(FederadError, match="C173"):
            require_round(declared)


class TestApproval:
    def test_plan_within_the_policy_is_permitted_at_its_cost(self, private, cost):
        """
        Epsilon 4 under caps of 8 and 10.
        """
        assert at_approval(Policy(), private, cost) == Permitted(cost)

    def test_too_few_patients_are_told_here_and_not_there(self, private, cost):
        """
        The number of patients is not public: the operator hears the word for everything that depends on data.
        """
        refused = at_approval(Policy(minimum_patients=200), private, cost, n_patients=187)

        assert refused.word == "declined"
        assert "187" in refused.error.happened

    @pytest.mark.parametrize(
        ("policy", "named"),
        [
            (Policy(tasks=("classification",)), "tasks"),
            (Policy(max_rounds=19), "max_rounds"),
            (Policy(releases=Releases(update="forbidden")), "releases.update"),
        ],
        ids=["task", "rounds", "update"],
    )
    def test_plan_outside_the_policy_is_refused_by_its_key(self, private, cost, policy, named):
        """
        The message names the key that the administrator would change.
        """
        refused = at_approval(policy, private, cost)

        assert refused.word == "policy"
        assert refused.error.code == "C170"
        assert named in refused.error.happened

    def test_plan_without_privacy_needs_a_word(self, smoke_plan):
        """
        Refused by default, permitted where the hospital says so, and at emulated hospitals.
        """
        cost = cost_of(smoke_plan, 200, Spent())

        assert at_approval(Policy(), smoke_plan, cost).word == "policy"
        assert at_approval(Policy(without_privacy=True), smoke_plan, cost) == Permitted(cost)
        assert at_approval(Policy.for_emulated(), smoke_plan, cost, n_patients=1) == Permitted(cost)

    def test_update_that_may_only_leave_with_noise_needs_a_plan_that_makes_it(self, smoke_plan):
        """
        Plans without privacy are let in, exact updates are not let out: then such a plan is of no use here.
        """
        policy = Policy(without_privacy=True, releases=Releases(update="noised"))
        refused = at_approval(policy, smoke_plan, cost_of(smoke_plan, 200, Spent()))

        assert refused.word == "policy"
        assert "releases.update" in refused.error.happened

    def test_plan_that_protects_images_needs_a_word(self, private):
        """
        Refused by default with the figure it means for a patient.
        """
        plan = with_privacy(private, unit="image", images_per_patient=4, epsilon=1.0)
        cost = cost_of(plan, 200, Spent())
        refused = at_approval(Policy(), plan, cost)

        assert refused.word == "policy"
        assert f"{cost.epsilon:.4g}" in refused.error.happened
        assert at_approval(Policy(image_level=True, run_epsilon=50, lifetime_epsilon=50), plan, cost) == Permitted(cost)

    @pytest.mark.parametrize("policy", [Policy(run_epsilon=3.9), Policy(lifetime_epsilon=3.9)], ids=["run", "lifetime"])
    def test_plan_over_a_cap_is_refused_with_the_figures(self, private, cost, policy):
        """
        Before anything is charged, and in figures.
        """
        refused = at_approval(policy, private, cost)

        assert refused.word == "budget"
        assert refused.error.code == "C169"
        assert "3.9" in refused.error.happened

    def test_what_was_spent_counts(self, private, cost, tmp_path):
        """
        The same plan again, after it was run twice: over the lifetime cap.
        """
        spent = charged(tmp_path, cost, "run-1", private)
        cap = Policy(lifetime_epsilon=1.02 * cost_of(private, 200, spent).lifetime_after)

        assert isinstance(at_approval(cap, private, cost_of(private, 200, spent), spent=spent), Permitted)
        spent = charged(tmp_path, cost, "run-2", private)
        assert at_approval(cap, private, cost_of(private, 200, spent), spent=spent).word == "budget"

    def test_after_a_run_without_privacy_no_finite_cap_holds(self, private, smoke_plan, tmp_path):
        """
        Nothing bounds what such a run told, so nothing bounds the sum.
        """
        spent = charged(tmp_path, cost_of(smoke_plan, 200, Spent()), "run-1", smoke_plan)
        cost = cost_of(private, 200, spent)

        assert cost.lifetime_before == math.inf
        assert at_approval(Policy(), private, cost, spent=spent).word == "budget"
        assert isinstance(at_approval(Policy(lifetime_epsilon=math.inf), private, cost, spent=spent), Permitted)


class TestRound:
    def test_round_outside_the_hours_is_refused_by_the_clock(self, private, cost):
        """
        The word says no more than the clock does.
        """
        policy = Policy(hours="20:00-06:00")

        assert policy.at_round(private, cost, 1, NOON).word == "hours"
        assert policy.at_round(private, cost, 1, NOON.replace(hour=23)) == Permitted(cost)

    @pytest.mark.parametrize(
        ("hours", "now", "open_"),
        [
            ("always", "03:00", True),
            ("08:00-17:00", "08:00", True),
            ("08:00-17:00", "16:59", True),
            ("08:00-17:00", "17:00", False),
            ("20:00-06:00", "20:00", True),
            ("20:00-06:00", "23:59", True),
            ("20:00-06:00", "00:00", True),
            ("20:00-06:00", "05:59", True),
            ("20:00-06:00", "06:00", False),
            ("20:00-06:00", "12:00", False),
        ],
    )
    def test_hours_include_their_first_minute_and_pass_midnight(self, hours, now, open_):
        """
        From the first time on, and before the second.
        """
        assert is_open(hours, time.fromisoformat(now)) is open_

    def test_round_beyond_the_last_is_refused(self, private, cost):
        """
        The cost was reckoned for the plan's rounds.
        """
        assert Policy().at_round(private, cost, 20, NOON) == Permitted(cost)
        assert Policy().at_round(private, cost, 21, NOON).word == "policy"

    def test_policy_that_changed_since_the_approval_holds(self, private, cost):
        """
        What is no longer permitted stops with the next round.
        """
        assert isinstance(Policy(tasks=("classification",)).at_round(private, cost, 3, NOON), Refused)

    def test_caps_of_a_run_are_the_hospitals(self, cost, smoke_plan):
        """
        The ledger is told the caps; nothing bounds a run without privacy that was permitted.
        """
        assert Policy().caps(cost) == Caps(run=8.0, delta=1e-5, lifetime=10.0, lifetime_delta=1e-5)
        assert Policy().caps(cost_of(smoke_plan, 200, Spent())).lifetime == math.inf


class TestReleases:
    def test_silence_means_noise_with_privacy(self):
        """
        What the hospital did not say leaves with noise under privacy; a plan without it had to be permitted as such.
        """
        for kind in ("update", "metric", "count"):
            assert Policy().rule(kind, private=True) == "noised"
            assert Policy().rule(kind, private=False) == "allowed"
        for kind in ("status", "progress"):
            assert Policy().rule(kind, private=True) == "allowed"

    def test_what_was_said_holds_for_every_plan(self):
        """
        A hospital that never lets metrics out does not let them out without privacy either.
        """
        policy = Policy(releases=Releases(metric="forbidden", count="allowed"))

        assert policy.rule("metric", private=True) == policy.rule("metric", private=False) == "forbidden"
        assert policy.rule("count", private=True) == "allowed"
