"""Sites that get lost in a round and come back, and who may answer at all: the deployed roster with the real store."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from faults.flower import ArithmeticStation, FlowerGrid, Node, answered, troubled
from flwr.app import Error, Message
from operators import approve, enrol_site, new_consortium

from server import rounds as rounds_module
from server.journal import Journal
from server.roster import ApprovedRoster
from server.rounds import RETURN_S, Rounds
from shared_models.errors import FederadError
from shared_models.messages import decode_answer, encode_answer
from shared_models.parcel import Reference, pack, pack_reference, unpack
from shared_models.wire import chunks

SITES = ("site-1", "site-2", "site-3")


class Clock:
    """Time that passes when somebody sleeps, and a little with each look at it."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 0.001
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(rounds_module, "time", clock)
    return clock


@pytest.fixture(scope="module")
def plan(smoke_plan):
    strategy = smoke_plan.strategy.model_copy(update={"minimum_sites": 2, "deadline_s": 3600.0})
    return smoke_plan.model_copy(update={"rounds": 2, "strategy": strategy})


@pytest.fixture
def consortium(plan, tmp_path):
    """Three enrolled sites that have approved the plan; their nodes are 1, 2 and 3."""
    consortium = new_consortium(tmp_path / "consortium")
    consortium.offer(plan, "a-run", 0)
    for number, site in enumerate(SITES, start=1):
        enrol_site(consortium, site, tmp_path / "keys" / site)
        consortium.set_node_id(site, number)
    approve(consortium, plan, *SITES)
    return consortium


@pytest.fixture
def nodes():
    return [Node(number, ArithmeticStation(site)) for number, site in enumerate(SITES, start=1)]


def start():
    return {"w": np.linspace(-1, 1, 60, dtype=np.float32).reshape(20, 3)}


def run(plan, grid, consortium, folder, *, starts=lambda: 0, depot=None, weights=None):
    """The outcome, the records and the history of a run."""
    events = []
    roster = ApprovedRoster(grid, consortium, plan.sha256, starts)
    rounds = Rounds(
        plan,
        grid,
        Journal(folder),
        run="a-run",
        seed=0,
        weights=weights or start(),
        roster=roster,
        depot=depot,
        on_progress=events.append,
    )
    return rounds.run(), Journal(folder).records(), events


def named(events, what):
    return [(e.round, e.site) for e in events if e.what == what and e.kind == "train"]


class TestComesBack:
    def test_site_that_was_offline_is_asked_again_and_counts(self, plan, nodes, consortium, tmp_path, clock):
        """
        Flower gives a site up after a minute of silence; back after a minute and a half, it is in the round all the same.
        """
        lost = nodes[2]

        def cut():
            away = 0.5 < clock.now < 90
            if lost.is_online and away:
                lost.is_online = False
            elif not lost.is_online and not away:
                lost.reconnect()

        lost.replies = lambda message: answered(lost, message) if clock.now > 90 else None
        outcome, records, events = run(plan, FlowerGrid(nodes, cut), consortium, tmp_path / "journal")

        assert [record["replied"] for record in records] == [list(SITES)] * 2
        assert named(events, "lost") == [(1, "site-3")]
        assert named(events, "asked again") == [(1, "site-3")]
        assert outcome.test.patients == dict.fromkeys(SITES, 2)

    def test_site_that_reconnects_unnoticed_is_asked_again(self, plan, nodes, consortium, tmp_path, clock):
        """
        A SuperNode that was restarted forgot its message, and Flower may never say so: its new connection tells.
        """
        restarted = nodes[1]

        def forgetful(message):
            if len(restarted.asked) == 1:
                return None
            return answered(restarted, message)

        def restart_once():
            if clock.now > 30 and restarted.last_activated_at == "first":
                restarted.reconnect()

        restarted.replies = forgetful
        grid = FlowerGrid(nodes, restart_once)
        _, records, events = run(plan, grid, consortium, tmp_path / "journal")

        assert records[0]["replied"] == list(SITES)
        assert named(events, "asked again") == [(1, "site-2")]
        assert clock.now < RETURN_S

    def test_all_are_asked_again_after_the_superlink_was_started_anew(self, plan, nodes, consortium, tmp_path, clock):
        """
        A SuperLink that was killed may have lost a reply on the way; who answers twice counts once.
        """
        silent = nodes[0]
        silent.replies = lambda message: None if len(silent.asked) == 1 else answered(silent, message)
        outcome, records, events = run(
            plan,
            FlowerGrid(nodes),
            consortium,
            tmp_path / "journal",
            starts=lambda: 1 + (clock.now > 20),
        )
        calm, _, _ = run(plan, FlowerGrid(fresh(nodes)), consortium, tmp_path / "calm")

        assert named(events, "asked again") == [(1, "site-1")]
        assert records[0]["replied"] == list(SITES)
        assert records[0]["refused"] == []
        assert np.array_equal(outcome.last["w"], calm.last["w"])

    def test_site_that_approves_during_a_round_is_in_it(self, plan, nodes, consortium, tmp_path, clock):
        """
        Who was offline or undecided when the round began is asked as soon as it is there.
        """
        nodes[2].is_online = False
        waiting = nodes[0]
        waiting.replies = lambda message: answered(waiting, message) if clock.now > 60 else None

        def appear():
            if clock.now > 30 and not nodes[2].is_online:
                nodes[2].reconnect()

        _, records, _ = run(plan, FlowerGrid(nodes, appear), consortium, tmp_path / "journal")

        assert records[0]["replied"] == list(SITES)

    @pytest.mark.parametrize("word", ["station-away", "station-busy", "link-broken", "failed"])
    def test_courier_in_trouble_is_asked_again_after_a_pause(self, plan, nodes, consortium, tmp_path, clock, word):
        """
        A station that is being restarted, or a link that broke, costs a pause and not the round.
        """
        unlucky = nodes[1]
        unlucky.replies = lambda message: (
            troubled(word)(message) if len(unlucky.asked) < 3 else answered(unlucky, message)
        )
        _, records, events = run(plan, FlowerGrid(nodes), consortium, tmp_path / "journal")

        assert records[0]["replied"] == list(SITES)
        assert named(events, "asked again") == [(1, "site-2")] * 2

    def test_message_that_flower_did_not_take_is_sent_again(self, plan, nodes, consortium, tmp_path, clock):
        """
        Flower answers some messages with nothing in place of a number.
        """
        grid = FlowerGrid(nodes)
        push, refused = grid.push_messages, []

        def push_but_one(messages):
            ids = push(messages)
            if not refused:
                refused.append(ids[0])
                return [None, *ids[1:]]
            return ids

        grid.push_messages = push_but_one
        _, records, _ = run(plan, grid, consortium, tmp_path / "journal")

        assert records[0]["replied"] == list(SITES)


class TestStaysAway:
    def test_site_that_does_not_come_back_holds_up_the_others_for_minutes_not_until_the_deadline(
        self, plan, nodes, consortium, tmp_path, clock
    ):
        """
        With enough replies the round waits three minutes for a site that was lost, and names it as missing.
        """
        nodes[2].replies = lambda message: None

        def leave():
            nodes[2].is_online = nodes[2].is_online and clock.now < 1

        _, records, _ = run(plan, FlowerGrid(nodes, leave), consortium, tmp_path / "journal")

        assert records[0]["replied"] == ["site-1", "site-2"]
        assert records[0]["missing"] == ["site-3"]
        assert RETURN_S < clock.now < RETURN_S + 60

    def test_below_the_minimum_the_round_waits_until_the_deadline_and_pauses(
        self, plan, nodes, consortium, tmp_path, clock
    ):
        """
        One site of two is no round: S180 after the deadline, with the names of those that are missing.
        """
        for node in nodes[1:]:
            node.replies = lambda message: None

        def leave():
            for node in nodes[1:]:
                node.is_online = node.is_online and clock.now < 1

        with pytest.raises(FederadError) as caught:
            run(plan, FlowerGrid(nodes, leave), consortium, tmp_path / "journal")

        assert caught.value.code == "S180"
        assert "site-2 (no reply), site-3 (no reply)" in caught.value.happened
        assert clock.now >= plan.strategy.deadline_s
        assert Journal(tmp_path / "journal").records() == []

    @pytest.mark.parametrize("word", ["bundle-refused", "unreadable"])
    def test_refusal_that_no_waiting_changes_is_final(self, plan, nodes, consortium, tmp_path, clock, word):
        """
        A site that refuses the bundle is left out at once, with the reason.
        """
        nodes[2].replies = troubled(word)
        _, records, events = run(plan, FlowerGrid(nodes), consortium, tmp_path / "journal")

        assert records[0]["refused"] == [{"site": "site-3", "reason": word}]
        assert named(events, "asked again") == []
        assert clock.now < 60

    def test_courier_that_fails_every_time_is_left_out(self, plan, nodes, consortium, tmp_path, clock):
        """
        It is asked a few times with growing pauses, and then no more in this round.
        """
        nodes[2].replies = troubled("failed")
        _, records, _ = run(plan, FlowerGrid(nodes), consortium, tmp_path / "journal")

        assert records[0]["refused"] == [{"site": "site-3", "reason": "failed, 6 times"}]
        assert records[0]["replied"] == ["site-1", "site-2"]

    def test_text_of_a_site_s_exception_goes_nowhere(self, plan, nodes, consortium, tmp_path, clock, caplog):
        """
        Flower hands on what an exception at a site said; no record, log or history repeats it.
        """
        nodes[2].replies = lambda message: Message(Error(2, "patient Jane Doe, born 1970"), reply_to=message)
        _, records, events = run(plan, FlowerGrid(nodes), consortium, tmp_path / "journal")

        assert records[0]["missing"] == ["site-3"]
        assert "Jane" not in str(records) + str(events) + caplog.text


class TestWhoCounts:
    def test_only_sites_that_approved_are_asked(self, plan, nodes, consortium, tmp_path, clock):
        """
        An enrolled site that has not said yes gets no message at all.
        """
        approve(consortium, plan.model_copy(update={"rounds": 7}), "site-3")
        with consortium._change() as db:
            db.execute("DELETE FROM approvals WHERE site = 'site-3'")
        _, records, _ = run(plan, FlowerGrid(nodes), consortium, tmp_path / "journal")

        assert nodes[2].asked == []
        assert all(record["replied"] == ["site-1", "site-2"] for record in records)

    def test_node_of_nobody_is_not_asked(self, plan, nodes, consortium, tmp_path, clock):
        """
        A node that the store does not know is not part of the run, whatever Flower thinks of it.
        """
        stranger = Node(99, ArithmeticStation("site-1"))
        run(plan, FlowerGrid([*nodes, stranger]), consortium, tmp_path / "journal")

        assert stranger.asked == []

    def test_reply_under_another_site_s_name_is_left_out(self, plan, nodes, consortium, tmp_path, clock):
        """
        A site cannot speak for another: its reply is left out under its own name, and the other's counts.
        """
        nodes[2].station = ArithmeticStation("site-1")
        nodes[0].replies = lambda message: answered(nodes[0], message) if clock.now > 10 else None
        _, records, _ = run(plan, FlowerGrid(nodes), consortium, tmp_path / "journal")

        assert records[0]["refused"] == [{"site": "site-3", "reason": "another site's name"}]
        assert records[0]["replied"] == ["site-1", "site-2"]

    def test_site_revoked_during_a_round_is_left_out(self, plan, nodes, consortium, tmp_path, clock):
        """
        An answer that arrives after the operator revoked its site does not count, and the site is not asked again.
        """

        def revoked_first(message):
            if len(nodes[2].asked) == 1:
                consortium.revoke("site-3")
            return answered(nodes[2], message)

        nodes[2].replies = revoked_first
        _, records, _ = run(plan, FlowerGrid(nodes), consortium, tmp_path / "journal")

        assert records[0]["refused"] == [{"site": "site-3", "reason": "no longer takes part"}]
        assert records[1]["replied"] == ["site-1", "site-2"]
        assert len(nodes[2].asked) == 1


class TestParcels:
    """Questions and answers above the limit travel through the depot."""

    @pytest.fixture(autouse=True)
    def _low_limit(self, monkeypatch):
        monkeypatch.setattr(rounds_module, "INLINE_LIMIT", 100)

    def through_depot(self, consortium, node):
        """A courier that fetches the question from the depot and leaves its answer there."""
        depot = consortium.depot

        def reply(message):
            question = unpack(message)
            assert isinstance(question, Reference)
            data = b"".join(depot.get(question.sha256))
            assert len(data) == question.n_bytes
            answer = node.station.answer(data)
            return Message(pack_reference(Reference(depot.put(chunks(answer)), len(answer))), reply_to=message)

        return reply

    def test_run_through_the_depot_has_the_same_result_and_leaves_nothing_behind(
        self, plan, nodes, consortium, tmp_path, clock
    ):
        """
        The same weights as with everything in Flower's messages; parcels are gone when their round is over.
        """
        for node in nodes:
            node.replies = self.through_depot(consortium, node)
        outcome, _, _ = run(plan, FlowerGrid(nodes), consortium, tmp_path / "journal", depot=consortium.depot)
        inline, _, _ = run(plan, FlowerGrid(fresh(nodes)), consortium, tmp_path / "inline")

        assert np.array_equal(outcome.last["w"], inline.last["w"])
        assert list((consortium.folder / "depot").iterdir()) == []

    def test_parcel_that_has_not_arrived_is_asked_for_again(self, plan, nodes, consortium, tmp_path, clock):
        """
        A reply that names a parcel which is not there costs a question, not the site's round.
        """
        for node in nodes:
            node.replies = self.through_depot(consortium, node)
        good = nodes[1].replies
        nothing = Reference(hashlib.sha256(b"nothing").hexdigest(), 7)
        nodes[1].replies = lambda message: (
            Message(pack_reference(nothing), reply_to=message) if len(nodes[1].asked) == 1 else good(message)
        )
        _, records, _ = run(plan, FlowerGrid(nodes), consortium, tmp_path / "journal", depot=consortium.depot)

        assert records[0]["replied"] == list(SITES)

    def test_parcel_of_another_length_is_left_out(self, plan, nodes, consortium, tmp_path, clock):
        """
        A reply whose parcel is not as long as it says is named and left out.
        """
        for node in nodes:
            node.replies = self.through_depot(consortium, node)
        sha256 = consortium.depot.put([b"x" * 50])
        nodes[2].replies = lambda message: Message(pack_reference(Reference(sha256, 49)), reply_to=message)
        _, records, _ = run(plan, FlowerGrid(nodes), consortium, tmp_path / "journal", depot=consortium.depot)

        assert "bytes instead of" in records[0]["refused"][0]["reason"]

    def test_another_site_s_parcel_gains_nothing(self, plan, nodes, consortium, tmp_path, clock):
        """
        A site that names the parcel of another is left out: the answer in it is not under its own name.
        """
        depot = consortium.depot
        for node in nodes[:2]:
            node.replies = self.through_depot(consortium, node)

        def stolen(message):
            data = b"".join(depot.get(unpack(message).sha256))
            answer = decode_answer(nodes[0].station.answer(data))
            copy = encode_answer(replace(answer, site="site-1"))
            return Message(pack_reference(Reference(depot.put(chunks(copy)), len(copy))), reply_to=message)

        nodes[2].replies = stolen
        _, records, _ = run(plan, FlowerGrid(nodes), consortium, tmp_path / "journal", depot=depot)

        assert records[0]["refused"] == [{"site": "site-3", "reason": "another site's name"}]

    def test_short_messages_stay_in_flower(self, plan, nodes, consortium, tmp_path, clock, monkeypatch):
        """
        Below the limit nothing touches the depot.
        """
        monkeypatch.setattr(rounds_module, "INLINE_LIMIT", 1 << 20)
        seen = []
        for node in nodes:
            node.replies = lambda message, node=node: (
                seen.append(unpack(message)) or Message(pack(node.station.answer(unpack(message))), reply_to=message)
            )
        run(plan, FlowerGrid(nodes), consortium, tmp_path / "journal", depot=consortium.depot)

        assert all(isinstance(question, bytes) for question in seen)


def fresh(nodes):
    """The same sites, undisturbed."""
    return [Node(node.node_id, ArithmeticStation(node.station.name)) for node in nodes]
