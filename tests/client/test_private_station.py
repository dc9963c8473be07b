"""A station under ``[privacy]``: what it pays, what leaves, and when it says no."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from privately import answered, ask_of, private

from client.audit import FILE, AuditLog
from client.egress import egress
from client.policy import Policy, Releases
from client.site import SiteConfig
from client.statement import statement
from client.station import Station
from client.training import Trainer
from shared_models.errors import FederadError
from shared_models.messages import Answer, encode_ask
from shared_models.plan import Plan
from shared_models.task import task_for

DECLARED = 20

SECRET = b"3" * 32
"""With it some of the hospital's few patients fall into the validation split."""

PRIVACY = {
    "noise_multiplier": 1.5,
    "delta": 1e-5,
    "patients_per_step": 4,
    "steps_per_round": 2,
    "metrics_every": 2,
    "metrics_noise": 8.0,
}


@pytest.fixture
def plan(smoke_plan) -> Plan:
    return private(smoke_plan, PRIVACY)


@pytest.fixture
def station(plan, hospitals, tmp_path) -> Station:
    """A hospital that approved the plan, with a policy of its own."""
    config = SiteConfig(
        name="site-1",
        data=str(hospitals[0].folder),
        device="cpu",
        policy=Policy(lifetime_epsilon=40.0, run_epsilon=20.0, minimum_patients=1),
    )
    made = Station.create(tmp_path / "station", config, secret=SECRET)
    made.approve(plan, declared_size=DECLARED)
    return made


class TestWhatLeaves:
    def test_update_leaves_with_its_cost_and_no_number_of_patients(self, station, plan):
        """
        Neither counts nor a loss; the cost follows from public numbers.
        """
        answer = answered(station, ask_of(plan))

        assert answer.refusal is None
        assert set(answer.update) == set(ask_of(plan).weights)
        assert answer.counts == {}
        assert answer.metrics == {}
        assert set(answer.cost) == {"epsilon", "delta", "declared_size"}
        assert answer.cost["declared_size"] == DECLARED

    def test_metrics_leave_in_the_rounds_that_the_plan_names_and_are_noised(self, station, plan, monkeypatch):
        """
        Every second round here: twice the same weights give different figures, since the noise is fresh.
        """
        first = answered(station, ask_of(plan, 2))
        second = answered(station, ask_of(plan, 2, run="run-2"))

        assert set(first.metrics) == set(task_for(plan).metrics)
        assert first.metrics != second.metrics
        assert answered(station, ask_of(plan, 3)).metrics == {}

    def test_audit_tells_what_left_and_at_what_cost(self, station, plan):
        """
        Names, norm and price of a round's answer as it left, for this hospital's own people.
        """
        answer = answered(station, ask_of(plan, 2))
        (line,) = egress(station.folder)
        norm = sum(float((array.astype("f8") ** 2).sum()) for array in answer.update.values()) ** 0.5

        assert line["released"].keys() == {"update", "metric", "cost"}
        assert line["released"]["metric"] == {"names": sorted(answer.metrics)}
        assert line["released"]["update"]["norm"] == pytest.approx(norm, rel=1e-4)
        assert line["released"]["cost"] == {"values": dict(answer.cost)}

    def test_metrics_that_the_hospital_forbids_stay(self, station, plan):
        """
        However noised, and although the plan pays for them; the update leaves.
        """
        forbidding = station.config.permits.model_copy(update={"releases": Releases(metric="forbidden")})
        station.config.model_copy(update={"policy": forbidding}).save(station.folder)

        answer = answered(Station(station.folder), ask_of(plan, 2))

        assert answer.metrics == {}
        assert answer.update

    def test_validation_alone_tells_nothing(self, station, plan):
        """
        It would cost, and the plan did not agree on it.
        """
        answer = answered(station, ask_of(plan, 3, "validate"))

        assert answer == Answer("site-1", ask_of(plan, 3, "validate").question)
        assert not station.ledger().spent().charges

    def test_two_trainings_from_the_same_weights_differ(self, station, plan):
        """
        A seed in the question drives neither who takes part nor the noise.
        """
        one, two = (answered(station, ask_of(plan, 1, run=run)).update for run in ("run-1", "run-2"))

        assert all(not np.array_equal(one[name], two[name]) for name in one)

    def test_device_lost_while_patients_are_measured_releases_nothing(self, station, plan, monkeypatch):
        """
        Noise around a mean of nobody would look like a measurement; the station says that it failed, and is broken.
        """

        def lost(*_):
            raise torch.AcceleratorError("CUDA error: unspecified launch failure", 719)

        assert station.cohort(plan).patients("validation")
        monkeypatch.setattr(Trainer, "measure", lost)
        answer = answered(station, ask_of(plan, 2))

        assert (answer.refusal, answer.metrics) == ("failed", {})
        assert station.is_broken


class TestCost:
    def test_epsilon_is_what_a_second_accountant_finds(self, station, plan):
        """
        dp-accounting, from the steps that were taken, within one per cent.
        """
        for round_ in (1, 2, 3):
            answer = answered(station, ask_of(plan, round_, seed=round_))
        accountant = PLDAccountant()
        rate = PRIVACY["patients_per_step"] / DECLARED
        step = PoissonSampledDpEvent(rate, GaussianDpEvent(PRIVACY["noise_multiplier"]))
        accountant.compose(SelfComposedDpEvent(step, 3 * PRIVACY["steps_per_round"]))

        assert answer.cost["epsilon"] == pytest.approx(accountant.get_epsilon(1e-5), rel=0.01)

    def test_asked_twice_it_pays_once(self, station, plan):
        """
        The same bytes, one charge; with other weights a word, and nothing is trained.
        """
        data = encode_ask(ask_of(plan))
        first, again = station.answer(data), Station(station.folder).answer(data)

        assert first == again
        assert len(station.ledger().spent().charges) == 1
        assert answered(station, ask_of(plan, seed=1)).refusal == "other-weights"
        assert len(station.ledger().spent().charges) == 1

    def test_training_that_fails_stays_paid_and_is_paid_again(self, station, plan, monkeypatch):
        """
        What was reserved before a crash is spent.
        """

        def fail(*args, **kwargs):
            raise RuntimeError("the device is gone")

        with monkeypatch.context() as broken:
            broken.setattr(Trainer, "train_private", fail)
            assert answered(station, ask_of(plan)).refusal == "failed"
        answer = answered(station, ask_of(plan))

        assert answer.refusal is None
        assert len(station.ledger().spent().charges) == 2
        assert answer.cost["epsilon"] == pytest.approx(station.ledger().spent().run_epsilon("run-1", 1e-5), rel=1e-9)

    def test_run_beyond_the_lifetime_cap_is_refused_before_its_first_step(self, plan, hospitals, tmp_path, monkeypatch):
        """
        Two runs fit and the third does not: one word for the operator, and nothing of it is trained or charged.
        """
        cap = 3.4
        policy = Policy(lifetime_epsilon=cap, run_epsilon=20.0, minimum_patients=1)
        config = SiteConfig(name="site-1", data=str(hospitals[0].folder), policy=policy)
        station = Station.create(tmp_path / "station", config)
        station.approve(plan, declared_size=DECLARED)
        for run in ("a", "b"):
            for round_ in (1, 2, 3):
                assert answered(station, ask_of(plan, round_, run=run)).refusal is None
            assert answered(station, ask_of(plan, 3, "test", run=run)).refusal is None
        spent, cost = station.ledger().spent(), station.cost(plan)
        trained = []
        monkeypatch.setattr(Trainer, "train_private", lambda *args, **kwargs: trained.append(1))

        assert answered(station, ask_of(plan, 1, run="c")).refusal == "budget"
        assert not trained
        assert station.ledger().spent() == spent
        assert cost.lifetime_before < cap < cost.lifetime_after

    def test_statement_adds_up(self, station, plan):
        """
        What a person reads is what the ledger reckons: runs, rounds, mechanism and the head that can be noted down.
        """
        for round_ in (1, 2):
            answered(station, ask_of(plan, round_))
        told = statement(station)
        (run,) = told["runs"]

        assert (run["run"], run["rounds_charged"], run["rounds_answered"]) == ("run-1", 2, 2)
        assert run["events"][0] == {
            "noise_multiplier": 1.5, "sampling_rate": 0.2, "unit": "patient", "split": "train", "steps": 4,
        }  # fmt: skip
        assert run["epsilon"] == pytest.approx(station.ledger().spent().run_epsilon("run-1", 1e-5))
        assert told["spent"] == run["lifetime"]
        assert told["head"]["hash"] == station.ledger().head.hash


class TestWarmStart:
    def begins_at_a_model_of(self, plan, run) -> Plan:
        tables = json.loads(plan.canonical_json())
        tables["strategy"] |= {"start": "5a" * 32} | ({"start_run": run} if run else {})
        return Plan.from_tables(tables)

    @pytest.mark.parametrize("run", ["run-2", None])
    def test_model_of_which_the_ledger_knows_nothing_needs_a_word_from_here(self, station, plan, run):
        """
        Whether patients were used for it nobody else can know; the word stands in the audit.
        """
        warm = self.begins_at_a_model_of(plan, run)
        with pytest.raises(FederadError, match="C178"):
            station.approve(warm, declared_size=DECLARED)
        assert answered(station, ask_of(warm)).refusal == "unknown-plan"

        station.approve(warm, declared_size=DECLARED, start_is_foreign=True)

        assert answered(station, ask_of(warm)).refusal is None
        (line,) = [e for e in AuditLog(station.folder / FILE).entries() if e.get("start_is_foreign")]
        assert (line["event"], line["plan"]) == ("approved", warm.sha256)

    def test_model_of_a_run_that_was_paid_for_here_is_as_good_as_fresh_weights(self, station, plan):
        """
        What it tells of patients here is on the ledger already.
        """
        answered(station, ask_of(plan, run="run-2"))

        station.approve(self.begins_at_a_model_of(plan, "run-2"), declared_size=DECLARED)


class TestNo:
    def test_plan_without_privacy_is_not_approved_by_default(self, smoke_plan, hospitals, tmp_path):
        """
        C170, and the station knows no such plan.
        """
        config = SiteConfig(name="site-1", data=str(hospitals[0].folder), policy=Policy(minimum_patients=1))
        station = Station.create(tmp_path / "station", config)

        with pytest.raises(FederadError, match="C170"):
            station.approve(smoke_plan)
        assert answered(station, ask_of(smoke_plan)).refusal == "unknown-plan"

    def test_size_is_declared_by_a_person(self, plan, hospitals, tmp_path):
        """
        Without one, or with one that is not rounded, the plan is not approved, and the message proposes one.
        """
        config = SiteConfig(name="site-1", data=str(hospitals[0].folder), policy=Policy(minimum_patients=1))
        station = Station.create(tmp_path / "station", config)

        for size in (None, 17):
            with pytest.raises(FederadError, match=r"C173(.|\n)*declare"):
                station.approve(plan, declared_size=size)

    def test_ledger_that_cannot_be_trusted_stops_everything(self, station, plan):
        """
        One byte is enough: no training, no answer but a word, and the person here gets the number.
        """
        answered(station, ask_of(plan))
        file = station.folder / "ledger.sqlite"
        data = bytearray(file.read_bytes())
        where = data.rindex(b"noise_multiplier")
        data[where] ^= 1
        file.write_bytes(data)

        assert answered(Station(station.folder), ask_of(plan, 2)).refusal == "declined"
        with pytest.raises(FederadError, match=r"C16[67]"):
            station.ledger().spent()

    def test_audit_that_lacks_what_the_ledger_knows_stops_the_station(self, station, plan):
        """
        Begun anew or put back from an older copy, it no longer tells all that has left.
        """
        for round_ in (1, 2):
            answered(station, ask_of(plan, round_))
        Station(station.folder).started()
        for path in station.folder.glob("audit.*"):
            path.unlink()

        with pytest.raises(FederadError, match="C162"):
            Station(station.folder).started()

    def test_policy_that_changes_its_mind_ends_a_run(self, station, plan):
        """
        The station is told at its next start; the operator hears a word.
        """
        answered(station, ask_of(plan))
        changed = station.config.model_copy(update={"policy": Policy(tasks=("reconstruction",))})
        changed.save(station.folder)

        assert answered(Station(station.folder), ask_of(plan, 2)).refusal == "policy"

    def test_refusal_is_in_the_audit(self, station, plan):
        """
        With its word, as every answer is.
        """
        asked = ask_of(plan)
        answered(station, asked)
        answered(station, replace(asked, question=replace(asked.question, plan_sha256="0" * 64)))
        events = [(e["event"], e.get("word"), e.get("released")) for e in AuditLog(station.folder / FILE).entries()]

        assert events[-1] == ("refusal", "unknown-plan", None)
        assert events[-2][2].keys() == {"cost", "update"}
