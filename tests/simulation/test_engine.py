"""One plan, several ways to execute it."""

from __future__ import annotations

import os
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from client.app import make_client_app
from client.station import Station
from server.journal import Journal
from shared_models.weights import weights_sha256
from simulation import grid as grid_module
from simulation.engine import Execution, run_rounds


def sha_of(plan, stations, folder, execution):
    return weights_sha256(run_rounds(plan, stations, Journal(folder), seed=0, execution=execution).last)


class TestEngines:
    @pytest.mark.slow
    @pytest.mark.usefixtures("ray_alone")
    def test_final_weights_agree_bit_for_bit(self, smoke_plan, stations, tmp_path):
        """
        One worker, two workers and Flower's Ray engine end on the same weights.
        """
        shas = set()
        for i, execution in enumerate([Execution("in-process", 1), Execution("in-process", 2), Execution("ray", 2)]):
            shas.add(sha_of(smoke_plan, stations, tmp_path / f"journal-{i}", execution))
        assert len(shas) == 1

    @pytest.mark.slow
    def test_two_actors_asked_the_same_train_once(self, smoke_plan, stations, tmp_path):
        """
        Under Ray, where any actor may get any site, a station asked by two actors gives the same bytes and trains once.
        """
        import ray

        from shared_models.messages import Ask, Question, encode_ask
        from shared_models.task import task_for
        from shared_models.weights import initial_weights

        weights = initial_weights(task_for(smoke_plan).build_network, 0)
        data = encode_ask(Ask(Question("r", 1, "train", smoke_plan.sha256, weights_sha256(weights)), 0, weights))

        @ray.remote(num_cpus=1)
        class Actor:
            def ask(self, folder: Path, data: bytes) -> tuple[bytes, int, float]:
                import os

                from client.training import resident_trainer
                from shared_models.plan import Plan
                from simulation.stations import open_station

                answer = open_station(folder).answer(data)
                plan = Plan.model_validate_json(next((folder / "plans").glob("*.json")).read_text())
                return answer, os.getpid(), resident_trainer(plan, "auto").clock.seconds["train"]

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            actors = [Actor.remote(), Actor.remote()]
            answers = ray.get([actor.ask.remote(stations[0], data) for actor in actors])
        finally:
            ray.shutdown()
        assert answers[0][0] == answers[1][0]
        assert answers[0][1] != answers[1][1]
        assert sum(seconds > 0 for _, _, seconds in answers) == 1


def _die_once(flag: Path, plan, folders, message):
    """A worker that is killed the first time it meets the second site, as by the kernel when memory runs out."""
    if message.metadata.dst_node_id == 2 and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), 9)
    return REAL_ANSWER(plan, folders, message)


def _always_die(plan, folders, message):
    if message.metadata.dst_node_id == 2:
        os.kill(os.getpid(), 9)
    return REAL_ANSWER(plan, folders, message)


REAL_ANSWER = grid_module.answer


class TestWorkers:
    @pytest.mark.slow
    def test_killed_worker_costs_nothing_when_it_works_the_second_time(
        self, smoke_plan, stations, tmp_path, monkeypatch
    ):
        """
        A worker killed once is replaced, and its site still makes the round.
        """
        import functools

        monkeypatch.setattr(grid_module, "answer", functools.partial(_die_once, tmp_path / "died"))
        outcome = run_rounds(smoke_plan, stations, Journal(tmp_path / "j"), seed=0, execution=Execution(workers=2))
        assert (tmp_path / "died").exists()
        assert all(record.replied == ["site-1", "site-2", "site-3"] for record in outcome.records)

    @pytest.mark.slow
    def test_site_that_kills_every_worker_costs_itself_the_round_alone(
        self, smoke_plan, stations, tmp_path, monkeypatch
    ):
        """
        The other sites' replies are unharmed by workers that die around them.
        """
        monkeypatch.setattr(grid_module, "answer", _always_die)
        outcome = run_rounds(smoke_plan, stations, Journal(tmp_path / "j"), seed=0, execution=Execution(workers=2))
        assert all(record.replied == ["site-1", "site-3"] for record in outcome.records)
        assert all(record.missing == ["node 2"] for record in outcome.records)

    @pytest.mark.slow
    def test_pool_that_broke_with_nothing_in_hand_is_replaced(self, smoke_plan, stations, tmp_path, monkeypatch):
        """
        Nobody's answer tells of it then, and the next question would wait for its deadline in vain.
        """
        enter = grid_module.InProcessGrid.__enter__

        def broken(grid):
            enter(grid)
            assert isinstance(grid._pool.submit(os._exit, 1).exception(), BrokenProcessPool)
            return grid

        monkeypatch.setattr(grid_module.InProcessGrid, "__enter__", broken)
        outcome = run_rounds(smoke_plan, stations, Journal(tmp_path / "j"), seed=0, execution=Execution(workers=2))
        assert all(record.replied == ["site-1", "site-2", "site-3"] for record in outcome.records)


class TestEmulatedReliability:
    def changed(self, plan, stations, **keys):
        plan = plan.model_copy(update={"simulation": plan.simulation.model_copy(update=keys)})
        for folder in stations:
            Station(folder).approve(plan)
        return plan

    def test_late_joiner_misses_the_first_rounds(self, smoke_plan, stations, tmp_path):
        """
        The last site of three joins in round 2, as the plan says.
        """
        plan = self.changed(smoke_plan, stations, late_joiners=1, late_round=2)
        outcome = run_rounds(plan, stations, Journal(tmp_path / "j"), seed=0, execution=Execution())
        assert [record.replied for record in outcome.records] == [
            ["site-1", "site-2"],
            ["site-1", "site-2", "site-3"],
        ]

    def test_drop_out_is_the_same_in_every_repetition(self, smoke_plan, stations, tmp_path):
        """
        Which site drops out of which round depends on the seed, not on chance.
        """
        strategy = smoke_plan.strategy.model_copy(update={"minimum_sites": 1})
        plan = self.changed(smoke_plan.model_copy(update={"strategy": strategy, "rounds": 4}), stations, drop_out=0.4)
        runs = [
            [
                r.replied
                for r in run_rounds(plan, stations, Journal(tmp_path / j), seed=5, execution=Execution()).records
            ]
            for j in ("a", "b")
        ]
        assert runs[0] == runs[1]
        assert any(len(replied) < 3 for replied in runs[0])


class TestCourier:
    def test_carries_bytes_both_ways_unread(self):
        """
        What the server packs reaches the station unchanged, and back.
        """
        from flwr.app import Context, Message, MessageType, RecordDict, UserConfig
        from flwr.supercore.task_identity import TaskIdentity

        from shared_models.parcel import pack, unpack

        class Echo:
            def answer(self, data: bytes) -> bytes:
                return data[::-1]

        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        message = Message(pack(b"abc"), 1, MessageType.QUERY)
        context = Context(run_id=1, node_id=1, node_config=UserConfig(), state=RecordDict(), run_config=UserConfig())
        assert unpack(make_client_app(lambda _: Echo())(message, context)) == b"cba"
