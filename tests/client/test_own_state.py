"""What a real station keeps for itself: through crashes, restarts and under privacy."""

from __future__ import annotations

import json

import laws
import numpy as np
import pytest
from privately import answered, ask_of, private

from client.own import FOLDER, OwnState
from client.site import SiteConfig
from client.station import Station
from shared_models.local_layers import norm_parameters
from shared_models.messages import Ask, Question, asked_sha256, encode_ask
from shared_models.plan import Plan
from shared_models.schedule import learning_rate
from shared_models.task import task_for
from simulation.stations import forget_history

PRIVACY = {"noise_multiplier": 1.5, "patients_per_step": 4, "steps_per_round": 1}
STRATEGIES = {"scaffold": {}, "fedbn": {}, "ditto": {"personal_pull": 0.5}}


@pytest.fixture(params=STRATEGIES)
def tables(smoke_plan, request):
    """The smallest plan, with a strategy that keeps something at the sites."""
    tables = json.loads(smoke_plan.canonical_json())
    tables["strategy"] |= {"name": request.param, "release": "last", **STRATEGIES[request.param]}
    tables["training"] |= {"optimizer": "sgd", "samples_per_patient": 1}
    return tables


def station_in(folder, hospitals, plan) -> Station:
    config = SiteConfig(name="site-1", data=str(hospitals[0].folder), device="cpu", emulated=True)
    station = Station.create(folder, config, secret=bytes(32))
    station.approve(plan)
    return station


def ask_in(plan, round_, kind="train") -> Ask:
    """A question of a round, with a control variate where the strategy has one."""
    ask = ask_of(plan, round_, kind)
    if plan.strategy.name != "scaffold" or kind != "train":
        return ask
    control = {name: np.full_like(array, 1e-3) for name, array in ask.weights.items()}
    sha256 = asked_sha256(ask.weights, control)
    return Ask(Question(ask.question.run, round_, kind, plan.sha256, sha256), ask.seed, ask.weights, control)


def kept_after(station, plan, round_):
    own = OwnState(station.folder, "run-1", plan.sha256)
    return own.before(Question("run-1", round_, "validate", plan.sha256, ""))


class TestCrash:
    @pytest.mark.parametrize("tables", ["scaffold", "ditto"], indirect=True)
    def test_crash_before_an_answer_is_stored_changes_no_bit(self, tables, hospitals, tmp_path, monkeypatch):
        """
        What was kept is on the disk, the answer is not: asked again after a restart, the site trains from what it kept of
        the round before, and gives the bytes that it would have given.
        """
        plan = Plan.from_tables(tables)
        steady, crashing = (station_in(tmp_path / name, hospitals, plan) for name in ("a", "b"))
        questions = [encode_ask(ask_in(plan, n)) for n in (1, 2)]
        expected = [steady.answer(data) for data in questions]
        assert crashing.answer(questions[0]) == expected[0]

        with monkeypatch.context() as patched:
            patched.setattr(crashing.ledger(), "settle", lambda *a, **k: 1 / 0)
            assert crashing.answer(questions[1]) != expected[1]
        assert kept_after(crashing, plan, 2)
        reopened = Station(tmp_path / "b")

        assert reopened.answer(questions[1]) == expected[1]
        laws.assert_same_bits(kept_after(reopened, plan, 2), kept_after(steady, plan, 2))

    @pytest.mark.parametrize("tables", ["fedbn"], indirect=True)
    def test_emulated_site_that_begins_anew_keeps_nothing(self, tables, hospitals, tmp_path):
        """
        A simulation that runs again starts from what any run starts from.
        """
        plan = Plan.from_tables(tables)
        station = station_in(tmp_path, hospitals, plan)
        station.answer(encode_ask(ask_in(plan, 1)))
        assert (tmp_path / FOLDER).is_dir()
        forget_history(tmp_path)

        assert not (tmp_path / FOLDER).exists()


class TestPrivacy:
    @pytest.fixture
    def plan(self, tables):
        return private(Plan.from_tables(tables), PRIVACY, strategy={"release": "last"})

    def test_nothing_more_leaves_or_is_paid_and_what_is_kept_is_harmless(self, plan, hospitals, tmp_path):
        """
        An answer holds the noised update at the price of FedAvg; the norms of FedBN are not in it, nor is any figure of an
        own model. SCAFFOLD's control variate follows from the answer and public numbers; all of FedBN's norms moved, as
        noised steps make them.
        """
        plain = private(plan, PRIVACY, strategy={"name": "fedavg", "personal_pull": None})
        station = station_in(tmp_path, hospitals, plan)
        ask = ask_in(plan, 1)
        answer = answered(station, ask)
        update, kept = answer.update, kept_after(station, plan, 1)

        stays = norm_parameters(task_for(plan).build_network()) if plan.strategy.name == "fedbn" else set()
        assert answer.refusal is None
        assert station.cost(plan, 10).events == station.cost(plain, 10).events
        assert update.keys() == ask.weights.keys() - stays
        assert (answer.metrics, answer.counts) == ({}, {})
        if plan.strategy.name == "scaffold":
            for name, array in update.items():
                expected = -ask.control[name] - array / learning_rate(plan, 1)
                np.testing.assert_allclose(kept[name], expected, rtol=1e-5, atol=1e-6)
        elif plan.strategy.name == "fedbn":
            assert all((kept[name] != ask.weights[name]).all() for name in kept)
        else:
            assert kept.keys() == ask.weights.keys()
