"""What a strategy remembers survives any crash: killed and resumed, a run ends on the same bits."""

from __future__ import annotations

import shutil

import laws
import numpy as np
import pytest
from crashes import killed_at
from faults.flower import ArithmeticStation, FlowerGrid, Node

from server import journal as journal_module
from server.journal import Journal
from server.rounds import Rounds
from shared_models.errors import FederadError

STRATEGIES = {
    "fedadam": {"server_learning_rate": 0.1},
    "fedyogi": {"server_learning_rate": 0.1},
    "scaffold": {},
}


@pytest.fixture(params=STRATEGIES)
def plan(smoke_plan, request):
    """Four rounds of a strategy that remembers something."""
    keys = {"name": request.param, **STRATEGIES[request.param]}
    training = smoke_plan.training.model_copy(update={"optimizer": "sgd"})
    strategy = smoke_plan.strategy.model_copy(update=keys)
    return smoke_plan.model_copy(update={"rounds": 4, "strategy": strategy, "training": training})


def rounds_in(plan, folder, on_progress=lambda _: None):
    start = {"w": np.linspace(-1, 1, 60, dtype=np.float32).reshape(20, 3), "b": np.zeros((), np.float32)}
    nodes = [Node(i, ArithmeticStation(name)) for i, name in enumerate(("site-1", "site-22", "site-333"), start=1)]
    return Rounds(plan, FlowerGrid(nodes), Journal(folder), run="r", seed=0, weights=start, on_progress=on_progress)


def assert_same(outcome, expected) -> None:
    laws.assert_same_bits(outcome.last, expected.last)
    laws.assert_same_bits(outcome.best, expected.best)
    assert [r.state_sha256 for r in outcome.records] == [r.state_sha256 for r in expected.records]


class TestState:
    @pytest.mark.parametrize("n_committed", [1, 3])
    def test_interrupted_run_ends_the_same(self, plan, tmp_path, n_committed):
        """
        Stopped after a round and taken up again, moments and control variates are those that were committed.
        """

        def stop(event):
            if event.what == "committed" and event.round == n_committed:
                raise KeyboardInterrupt

        expected = rounds_in(plan, tmp_path / "undisturbed").run()
        with pytest.raises(KeyboardInterrupt):
            rounds_in(plan, tmp_path / "run", on_progress=stop).run()

        assert_same(rounds_in(plan, tmp_path / "run").run(), expected)
        assert len({record.state_sha256 for record in expected.records}) == 4

    @pytest.mark.parametrize("plan", ["scaffold"], indirect=True)
    def test_killed_anywhere_in_the_journal_it_ends_the_same(self, plan, tmp_path):
        """
        SIGKILL at steps throughout, then a new process: the same weights and the same state, bit for bit.
        """
        expected = rounds_in(plan, tmp_path / "undisturbed").run()
        n_lines, n_kills = 3, 0
        while killed_at(n_lines, journal_module, lambda: rounds_in(plan, tmp_path / "run").run() and None):
            assert_same(rounds_in(plan, tmp_path / "run").run(), expected)
            shutil.rmtree(tmp_path / "run")
            n_lines, n_kills = n_lines + 47, n_kills + 1

        assert n_kills > 5

    def test_lost_state_is_not_begun_anew(self, plan, tmp_path):
        """
        Without what the last round's record names, a run does not go on: S197.
        """
        rounds_in(plan, tmp_path).run()
        Journal(tmp_path).state_path(4).unlink()

        with pytest.raises(FederadError) as caught:
            rounds_in(plan, tmp_path).run()
        assert caught.value.code == "S197"

    def test_state_of_old_rounds_goes_with_their_weights(self, plan, tmp_path):
        """
        The disk holds the states of as many rounds as it holds weights.
        """
        rounds_in(plan, tmp_path).run()

        assert len(list(tmp_path.glob("state-*"))) == len(list(tmp_path.glob("round-*")))
