"""The round loop with real stations, some of which misbehave."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from faults.sites import ListGrid, RaisingStation, TamperedStation, largest_array, opened, with_update

from server import rounds as rounds_module
from server.journal import Journal
from server.rounds import Rounds
from shared_models.errors import FederadError
from shared_models.task import task_for
from shared_models.weights import initial_weights, weights_sha256


@pytest.fixture
def start(smoke_plan):
    return initial_weights(task_for(smoke_plan).build_network, 0)


def run(plan, grid, tmp_path, start, name="run", events=None):
    journal = Journal(tmp_path / name)
    rounds = Rounds(
        plan,
        grid,
        journal,
        run=name,
        seed=0,
        weights=start,
        on_progress=events.append if events is not None else lambda _: None,
    )
    return rounds.run(), journal


class TestRun:
    def test_every_round_is_committed_with_its_validation(self, smoke_plan, stations, tmp_path, start):
        """
        After a run the journal holds each round, who replied, and what the sites measured of its weights.
        """
        outcome, journal = run(smoke_plan, ListGrid(opened(stations)), tmp_path, start)

        records = journal.records()
        assert [r["round"] for r in records] == [1, 2]
        assert all(r["replied"] == ["site-1", "site-2", "site-3"] for r in records)
        assert all(0 <= r["validation"]["dice"] <= 1 for r in records)
        assert records[-1]["weights_sha256"] == weights_sha256(outcome.last)

    def test_order_of_arrival_changes_no_bit(self, smoke_plan, stations, tmp_path, start):
        """
        Sites that answer in another order give the same weights, bit for bit.
        """
        forward, _ = run(smoke_plan, ListGrid(opened(stations), [0, 1, 2]), tmp_path, start, "forward")
        backward, _ = run(smoke_plan, ListGrid(opened(stations), [2, 0, 1]), tmp_path, start, "backward")

        assert weights_sha256(forward.last) == weights_sha256(backward.last)

    def test_released_weights_are_those_with_the_best_validation(self, smoke_plan, stations, tmp_path, start):
        """
        The best round is the one whose validation the records show as largest, and its weights are the ones tested.
        """
        outcome, journal = run(smoke_plan, ListGrid(opened(stations)), tmp_path, start)

        dice = {r["round"]: r["validation"]["dice"] for r in journal.records()}
        assert dice[outcome.best_round] == max(dice.values())
        assert weights_sha256(outcome.best) == weights_sha256(journal.weights(outcome.best_round))

    @pytest.mark.parametrize(("release", "round_"), [("best", 1), ("last", 2)])
    def test_plan_says_whether_the_best_or_the_last_model_is_released(
        self, smoke_plan, stations, tmp_path, start, release, round_
    ):
        """
        Where the last round validates worst, "best" releases the one before, and "last" the last all the same.
        """
        strategy = smoke_plan.strategy.model_copy(update={"release": release})
        plan = smoke_plan.model_copy(update={"strategy": strategy})
        sites = opened(stations)
        for site in sites:
            site.approve(plan)

        def worse_at_the_end(answer):
            dice = 0.1 if answer.question.kind == "validate" else 0.9
            return replace(answer, metrics=dict(answer.metrics, dice=dice))

        outcome, _ = run(plan, ListGrid([TamperedStation(s, worse_at_the_end) for s in sites]), tmp_path, start)

        assert outcome.best_round == round_

    @pytest.mark.parametrize("weighting", [None, "equal"])
    def test_sites_count_by_patients_or_alike(self, smoke_plan, stations, tmp_path, start, weighting):
        """
        The next weights are the old ones plus the mean written out, of updates that differ as much as their patients.
        """
        strategy = smoke_plan.strategy.model_copy(update={"weighting": weighting})
        plan = smoke_plan.model_copy(update={"strategy": strategy, "rounds": 1})
        sites = opened(stations)
        for site in sites:
            site.approve(plan)

        def says(n):
            moved = largest_array(lambda array: np.full_like(array, n / 100))
            return lambda answer: replace(moved(answer), counts=answer.counts | {"trained": n})

        grid = ListGrid([TamperedStation(site, says(n)) for site, n in zip(sites, (1, 2, 6), strict=True)])
        _, journal = run(plan, grid, tmp_path, start)

        name = max(start, key=lambda key: start[key].size)
        expected = 0.03 if weighting == "equal" else (1 + 4 + 36) / 900
        np.testing.assert_allclose(journal.weights(1)[name] - start[name], expected, rtol=1e-3)

    def test_average_over_rounds_is_tested_and_released(self, smoke_plan, stations, tmp_path, start):
        """
        The moving average is the one written out: older rounds count less by the decay, and all counts sum to one.
        """
        strategy = smoke_plan.strategy.model_copy(update={"release": "averaged", "average_decay": 0.75})
        plan = smoke_plan.model_copy(update={"strategy": strategy})
        sites = opened(stations)
        for site in sites:
            site.approve(plan)

        outcome, journal = run(plan, ListGrid(sites), tmp_path, start)

        first, second = journal.weights(1), journal.weights(2)
        for name, array in outcome.best.items():
            expected = (0.25 * 0.75 * first[name] + 0.25 * second[name]) / (0.25 * 0.75 + 0.25)
            np.testing.assert_allclose(array, expected, rtol=0, atol=1e-6)
        assert journal.records()[-1]["average_sha256"] == weights_sha256(outcome.best)
        assert weights_sha256(outcome.last) == weights_sha256(second)


BAD = {
    "not a number": (largest_array(lambda a: a * np.nan), "not finite"),
    "infinite": (largest_array(lambda a: a + np.inf), "not finite"),
    "another shape": (largest_array(lambda a: a.reshape(-1)), "shape"),
    "one value for many": (largest_array(lambda a: a.reshape(-1)[:1]), "shape"),
    "a name too many": (with_update(lambda u: u | {"extra": np.zeros(3, np.float32)}), "extra"),
    "a name too few": (with_update(lambda u: dict(list(u.items())[1:])), "missing"),
    "a huge norm": (largest_array(lambda a: a + 1e4), "norm"),
    "no patients": (lambda answer: replace(answer, counts=answer.counts | {"trained": 0}), "no patients"),
    "another round": (
        lambda answer: replace(answer, question=replace(answer.question, round=7)),
        "answers another question",
    ),
    "another plan": (
        lambda answer: replace(answer, question=replace(answer.question, plan_sha256="0" * 64)),
        "answers another question",
    ),
    "another's name": (lambda answer: replace(answer, site="site-1"), "same name"),
    "damaged bytes": (lambda _: b"\x00" * 40, "cannot be read"),
}


class TestBadSite:
    @pytest.mark.parametrize("fault", BAD)
    def test_costs_itself_the_round_and_not_the_run(self, smoke_plan, stations, tmp_path, start, fault):
        """
        A bad reply is named with its reason and left out; the result is that of a run without that site.
        """
        tamper, reason = BAD[fault]
        good = opened(stations)
        outcome, journal = run(
            smoke_plan, ListGrid([*good[:2], TamperedStation(good[2], tamper)]), tmp_path, start, "bad"
        )
        without, _ = run(smoke_plan, ListGrid(good[:2]), tmp_path, start, "without")

        for record in journal.records():
            assert record["replied"] == ["site-1", "site-2"]
            assert len(record["refused"]) == 1
            assert reason in record["refused"][0]["reason"]
        assert weights_sha256(outcome.last) == weights_sha256(without.last)

    def test_courier_that_raises_is_missing_and_its_words_stay_away(
        self, smoke_plan, stations, tmp_path, start, caplog
    ):
        """
        An exception at a site is a missing reply; its text appears in no record and no log.
        """
        _, journal = run(smoke_plan, ListGrid([*opened(stations[:2]), RaisingStation()]), tmp_path, start)

        assert all(record["missing"] == ["node 3"] for record in journal.records())
        assert "Jane" not in str(journal.records()) + caplog.text

    def test_too_few_good_replies_pause_the_run_and_keep_what_was_committed(
        self, smoke_plan, stations, tmp_path, start
    ):
        """
        With two of three sites failing in round 2 the run pauses with S180, names them, and round 1 stays.
        """

        def fail_later(answer):
            return answer if answer.question.round == 1 else b"broken"

        good = opened(stations)
        grid = ListGrid([good[0], TamperedStation(good[1], fail_later), TamperedStation(good[2], fail_later)])
        with pytest.raises(FederadError) as caught:
            run(smoke_plan, grid, tmp_path, start, "paused")

        assert caught.value.code == "S180"
        assert "site-2" in caught.value.happened
        assert "site-3" in caught.value.happened
        records = Journal(tmp_path / "paused").records()
        assert [r["round"] for r in records] == [1]
        assert weights_sha256(Journal(tmp_path / "paused").weights(1)) == records[0]["weights_sha256"]


class Clock:
    """Time that passes only when somebody sleeps or says so."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class TestDeadline:
    def test_late_reply_is_named_and_left_out(self, smoke_plan, stations, tmp_path, start, monkeypatch):
        """
        A site that answers after the deadline costs itself the round; the others make it.
        """
        clock = Clock()
        monkeypatch.setattr(rounds_module, "time", clock)

        class Slow:
            def __init__(self, station):
                self.station = station

            def answer(self, data):
                clock.now += 1000 * smoke_plan.strategy.deadline_s
                return self.station.answer(data)

        good = opened(stations)
        _, journal = run(smoke_plan, ListGrid([*good[:2], Slow(good[2])]), tmp_path, start)

        for record in journal.records():
            assert record["replied"] == ["site-1", "site-2"]
            assert record["refused"] == [{"site": "node 3", "reason": "late"}]

    def test_silent_site_is_missing_after_the_deadline(self, smoke_plan, stations, tmp_path, start, monkeypatch):
        """
        A site that never answers is waited for until the deadline and then named as missing.
        """
        monkeypatch.setattr(rounds_module, "time", Clock())
        grid = ListGrid([*opened(stations[:2]), None])
        pull = grid.pull_messages
        grid.pull_messages = lambda ids: pull([i for i in ids if not i.startswith("3-")])
        _, journal = run(smoke_plan, grid, tmp_path, start)

        assert all(record["missing"] == ["node 3"] for record in journal.records())

    def test_without_sites_the_run_says_so(self, smoke_plan, tmp_path, start):
        """
        When fewer sites than the minimum join before the deadline, the message is S181.
        """
        strategy = smoke_plan.strategy.model_copy(update={"deadline_s": 0.3})
        with pytest.raises(FederadError) as caught:
            run(smoke_plan.model_copy(update={"strategy": strategy}), ListGrid([]), tmp_path, start)
        assert caught.value.code == "S181"


class TestMemory:
    def test_replies_are_added_up_one_at_a_time(self, smoke_plan, stations, tmp_path, start, monkeypatch):
        """
        When an answer is added up, the updates of the answers before it are gone: nothing piles up with more sites.
        """
        import gc
        import weakref

        alive: list[weakref.ref] = []
        most = 0
        decode = rounds_module.decode_answer

        def watched(data):
            nonlocal most
            answer = decode(data)
            gc.collect()
            most = max(most, sum(ref() is not None for ref in alive))
            if answer.update:
                alive.append(weakref.ref(next(iter(answer.update.values()))))
            return answer

        monkeypatch.setattr(rounds_module, "decode_answer", watched)
        run(smoke_plan, ListGrid(opened(stations)), tmp_path, start)
        assert len(alive) == 6
        assert most <= 1
