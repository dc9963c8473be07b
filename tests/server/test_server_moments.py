"""The discriminator that the server trains: on released sums alone, and only where they show scanners apart."""

from __future__ import annotations

import logging
from dataclasses import replace

import laws
import numpy as np
import pytest
import torch
from faults.flower import ArithmeticStation, FlowerGrid, Node

from server.journal import Journal
from server.moments import MomentsRule, trained_on
from server.rounds import Rounds
from shared_models.messages import decode_answer, decode_ask, encode_answer
from shared_models.moments import DIMENSIONS, TABLE, Discriminator, Layout
from shared_models.plan import AdaptationTable, Plan, PrivacyTable
from shared_models.schedule import moments_rounds
from shared_models.seeds import generator

TOLD_APART = ("SIEMENS 1.5 T", "GE 3 T", "PHILIPS 3 T")
OPEN = AdaptationTable(adversarial="moments", warm_up=0.0, moments_every=2, scanners=TOLD_APART)
PRIVACY = PrivacyTable(noise_multiplier=1.0, patients_per_step=2, steps_per_round=1)
SITES = ("site-1", "site-22", "site-333")


@pytest.fixture
def plan(smoke_plan) -> Plan:
    """Six rounds; moments in the first, third and fifth."""
    strategy = smoke_plan.strategy.model_copy(update={"release": "last"})
    return smoke_plan.model_copy(update={"rounds": 6, "adaptation": OPEN, "strategy": strategy})


def noised(plan: Plan, noise: float) -> Plan:
    table = plan.adaptation.model_copy(update={"moments_noise": noise})
    return plan.model_copy(update={"adaptation": table, "privacy": PRIVACY})


def released(plan: Plan, place: int, n: int, gap: float = 0.3, spread: float = 0.03, seed: int = 0) -> dict:
    """What a site with ``n`` patients of one scanner releases; scanners lie ``gap`` apart along axes of their own."""
    layout, rng = Layout.of(plan), np.random.default_rng([seed, place])
    centre = np.full(DIMENSIONS, 0.2)
    centre[place] += gap
    table = np.zeros(layout.shape)
    for _ in range(n):
        table += layout.patient({place: rng.normal(centre, spread)})
    if plan.adaptation.moments_noise:
        table[place] += rng.normal(0, plan.adaptation.moments_noise * layout.largest, layout.shape[1])
    return {TABLE: table.astype(np.float32)}


class TestLearning:
    def test_scanners_at_different_sites_are_told_apart(self, plan):
        """
        Three sites with one scanner each: fresh samples of each are named right, which no site's own data could teach.
        """
        rule = MomentsRule(plan, 0)
        noted = rule.learn({site: released(plan, k, 20) for k, site in enumerate(SITES)}, 1)

        assert noted.scanners == list(TOLD_APART)
        assert noted.left_out == ""
        assert noted.accuracy > 0.95
        assert noted.gap > 3 * noted.noise
        told = Discriminator.from_arrays(rule.discriminator, plan)
        for place in range(3):
            row = released(plan, place, 1, seed=7)[TABLE][place]
            assert int(told(torch.from_numpy(row[None, 1 : 1 + DIMENSIONS])).argmax()) == place

    def test_order_of_sites_and_history_change_no_bit(self, plan):
        """
        It follows from the release, the round and the run's seed; another seed gives another.
        """
        releases = {site: released(plan, k, 20) for k, site in enumerate(SITES)}
        used, fresh, other = MomentsRule(plan, 0), MomentsRule(plan, 0), MomentsRule(plan, 1)
        used.learn({site: released(plan, k, 9, seed=5) for k, site in enumerate(SITES)}, 1)
        torch.rand(3)
        for rule, order in ((used, 1), (fresh, -1), (other, 1)):
            rule.learn(dict(list(releases.items())[::order]), 3)

        laws.assert_same_bits(used.discriminator, fresh.discriminator)
        assert any(not np.array_equal(used.discriminator[k], other.discriminator[k]) for k in used.discriminator)

    def test_sites_of_one_scanner_are_added_up(self, plan):
        """
        Patients of a scanner at two sites are one row.
        """
        one, two = MomentsRule(plan, 0), MomentsRule(plan, 0)
        halves = {"a": released(plan, 0, 10, seed=1), "b": released(plan, 0, 10, seed=2), "c": released(plan, 1, 20)}
        together = {TABLE: halves["a"][TABLE] + halves["b"][TABLE]}

        noted = one.learn(halves, 1), two.learn({"ab": together, "c": halves["c"]}, 1)
        assert noted[0].gap == pytest.approx(noted[1].gap, rel=1e-4)

    @pytest.mark.parametrize("releases", [{}, {"a": 20}, {"a": 20, "b": 4}])
    def test_fewer_than_two_scanners_leave_it_off_and_the_log_says_so(self, plan, releases, caplog):
        """
        Nobody sent any, one scanner alone, or a second one with too few patients; what was trained before is gone.
        """
        rule = MomentsRule(plan, 0)
        rule.learn({site: released(plan, k, 20) for k, site in enumerate(SITES)}, 1)
        with caplog.at_level(logging.WARNING):
            noted = rule.learn({site: released(plan, k, n) for k, (site, n) in enumerate(releases.items())}, 3)

        assert rule.discriminator == {}
        assert "fewer than two" in noted.left_out
        assert "fewer than two" in caplog.text

    @pytest.mark.parametrize(("gap", "is_used"), [(0.3, True), (0.0, False)])
    def test_scanners_no_further_apart_than_chance_are_left_alone(self, plan, gap, is_used):
        """
        With twenty patients each, of one distribution, the means differ by chance alone.
        """
        rule = MomentsRule(plan, 0)
        noted = rule.learn({site: released(plan, k, 20, gap=gap) for k, site in enumerate(SITES)}, 1)

        assert bool(rule.discriminator) is is_used
        assert bool(noted.left_out) is not is_used

    @pytest.mark.parametrize(("n", "noise", "is_used"), [(400, 2.0, True), (60, 8.0, False)])
    def test_gap_under_the_noise_that_was_added_leaves_it_off(self, plan, n, noise, is_used):
        """
        The same scanners: many patients and little noise show them apart, few and much do not, and the record says so.
        """
        private = noised(plan, noise)
        rule = MomentsRule(private, 0)
        noted = rule.learn({site: released(private, k, n) for k, site in enumerate(SITES)}, 1)

        assert bool(rule.discriminator) is is_used
        if is_used:
            assert noted.accuracy > 0.9
        else:
            assert "noise" in noted.left_out or "fewer than two" in noted.left_out

    def test_row_of_noise_alone_is_no_scanner(self, plan):
        """
        A site that declared a scanner nobody was scanned with sends noise there, which is not taken for patients.
        """
        private = noised(plan, 2.0)
        used = sum(
            len(MomentsRule(private, 0).learn({"a": released(private, 0, 0, seed=seed)}, 1).scanners)
            for seed in range(200)
        )

        assert used <= 4

    def test_tiny_spread_and_far_means_give_finite_numbers(self, plan):
        """
        Patients that are all alike, and features longer than the clip.
        """
        rule = MomentsRule(plan, 0)
        rule.learn({site: released(plan, k, 20, gap=50.0, spread=0.0) for k, site in enumerate(SITES)}, 1)

        assert rule.discriminator
        assert all(np.isfinite(array).all() for array in rule.discriminator.values())


class Telling(ArithmeticStation):
    """An arithmetic site with one scanner, whose moments depend on the weights that came."""

    place = 0
    has_update = True
    plan: Plan

    def answer(self, data: bytes) -> bytes:
        ask, answer = decode_ask(data), decode_answer(super().answer(data))
        if ask.question.kind != "train":
            return encode_answer(answer)
        if ask.discriminator:
            shift = np.float32(ask.discriminator["hidden.bias"].sum())
            answer = replace(answer, update={k: v + shift for k, v in answer.update.items()})
        if ask.question.round in moments_rounds(self.plan):
            seed = int(generator(ask.question.weights_sha256).integers(2**31))
            answer = replace(answer, moments=released(self.plan, self.place, 20, seed=seed))
        if not self.has_update:
            answer = replace(answer, update={}, counts={"measured": 0, "trained": 0}, metrics={})
        return encode_answer(answer)


def rounds_in(plan, folder, *, change=lambda station: None, on_progress=lambda _: None):
    """A run of three sites, one scanner each; the last has a chance to be different."""
    stations = [Telling(name) for name in SITES]
    for k, station in enumerate(stations):
        station.place, station.plan = k, plan
    change(stations[-1])
    grid = FlowerGrid([Node(i + 1, station) for i, station in enumerate(stations)])
    start = {"w": np.linspace(-1, 1, 60, dtype=np.float32).reshape(20, 3), "b": np.zeros((), np.float32)}
    return Rounds(plan, grid, Journal(folder), run="a-run", seed=0, weights=start, on_progress=on_progress)


@pytest.fixture
def briefly(monkeypatch):
    """Discriminators that learn for a moment only."""
    monkeypatch.setattr("server.moments.STEPS", 5)


@pytest.mark.usefixtures("briefly")
class TestRun:
    @pytest.mark.parametrize(
        ("strategy", "n_committed"), [("fedavg", 1), ("fedavg", 2), ("fedavg", 5), ("scaffold", 3)]
    )
    def test_resumed_run_ends_on_the_same_bits(self, plan, tmp_path, n_committed, strategy):
        """
        Between two releases, too, the discriminator that goes with the questions is the one in the journal.
        """
        table = plan.strategy.model_copy(update={"name": strategy})
        plan = plan.model_copy(update={"strategy": table})
        whole = rounds_in(plan, tmp_path / "whole").run()

        def stop(event):
            if event.what == "committed" and event.round == n_committed:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            rounds_in(plan, tmp_path / "cut", on_progress=stop).run()
        resumed = rounds_in(plan, tmp_path / "cut").run()

        laws.assert_same_bits(resumed.last, whole.last)
        records = [[{**r, "seconds": 0} for r in Journal(tmp_path / name).records()] for name in ("whole", "cut")]
        assert records[0] == records[1]
        assert [bool(r["discriminator"]) for r in records[0]] == [True, False, True, False, True, False]

    def test_discriminator_goes_with_the_questions_after_it_was_trained(self, plan, tmp_path):
        """
        And makes a difference there; in a run where the sites keep their moments nobody gets one.
        """
        told = rounds_in(plan, tmp_path / "told").run()

        alone = rounds_in(plan, tmp_path / "alone")
        for node in alone.grid.nodes.values():
            node.station.plan = plan.model_copy(update={"adaptation": None})
        outcome = alone.run()

        assert not np.array_equal(told.last["w"], outcome.last["w"])
        assert [bool(r.discriminator) for r in outcome.records] == [True, False] * 3
        assert all("fewer" in r.discriminator["left_out"] for r in outcome.records if r.discriminator)

    def test_site_with_moments_alone_takes_part(self, plan, tmp_path):
        """
        It has nothing to train on: its row is used, the weights are those of the others, and a minimum counts updates.
        """

        def unlabelled(station):
            station.has_update = False

        outcome = rounds_in(plan, tmp_path / "run", change=unlabelled).run()

        assert outcome.records[0].replied == list(SITES)
        assert outcome.records[0].discriminator["scanners"] == list(TOLD_APART)
        assert outcome.records[0].refused == []

    @pytest.mark.parametrize(
        ("kind", "reason"),
        [
            ("size", "moments: table has shape"),
            ("round", "moments nobody asked for"),
            ("impossible", "no patients"),
            ("no update under privacy", "missing"),
        ],
    )
    def test_other_moments_are_refused_and_the_round_goes_on(self, plan, tmp_path, kind, reason):
        """
        The site is named with the reason, and its row is not used.
        """
        if kind == "no update under privacy":
            plan = noised(plan, 2.0)

        class Wrong(Telling):
            def answer(self, data: bytes) -> bytes:
                answer = decode_answer(super().answer(data))
                if answer.question.kind != "train":
                    return encode_answer(answer)
                table = released(self.plan, self.place, 20)[TABLE]
                wrong = {
                    "size": table[:, :-1],
                    "round": table,
                    "impossible": -table,
                }.get(kind)
                if wrong is None:
                    return encode_answer(replace(answer, update={}, counts={"trained": 0}))
                return encode_answer(replace(answer, moments={TABLE: wrong}))

        def change(station):
            station.__class__ = Wrong

        run = rounds_in(plan, tmp_path / "run", change=change)
        outcome = run.run()
        wrong = outcome.records[1 if kind == "round" else 0]

        assert [(r["site"], reason in r["reason"]) for r in wrong.refused] == [(SITES[-1], True)]
        assert wrong.replied == list(SITES[:-1])


def test_training_needs_no_thread_and_no_global_stream(plan):
    """
    The same Gaussians and seed give the same network whatever torch was doing.
    """
    rule = MomentsRule(plan, 0)
    rule.learn({site: released(plan, k, 20) for k, site in enumerate(SITES)}, 1)
    known = rule._gaussians(rule.table[:3], np.zeros((3, 1)))
    torch.manual_seed(1)
    first, _ = trained_on(known, 1.0, 5)
    expected = torch.rand(2)
    torch.manual_seed(2)
    again, accuracy = trained_on(known, 1.0, 5)

    laws.assert_same_bits(first.as_arrays(), again.as_arrays())
    torch.manual_seed(1)
    torch.testing.assert_close(torch.rand(2), expected, rtol=0, atol=0)
    assert 0.9 < accuracy <= 1
