"""A station asked questions, as a courier would."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from deployed import Operator
from faults.sites import opened

import client
from client import station as station_module
from client.audit import FILE, AuditLog
from client.code import code_sha256
from client.policy import Policy, Releases
from client.station import Station
from client.training import Trainer
from shared_models.consortium import Notice
from shared_models.errors import FederadError
from shared_models.messages import Ask, Question, decode_answer, encode_ask
from shared_models.task import task_for
from shared_models.weights import initial_weights, weights_sha256


@pytest.fixture
def ask(smoke_plan):
    weights = initial_weights(task_for(smoke_plan).build_network, 0)
    return Ask(Question("run", 1, "train", smoke_plan.sha256, weights_sha256(weights)), 0, weights)


@pytest.fixture
def trainings(monkeypatch):
    """How often a station has trained."""
    count = []
    train = Trainer.train

    def counted(self, *args, **kwargs):
        count.append(1)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", counted)
    return count


class TestAskedTwice:
    def test_same_question_gets_the_same_bytes_and_trains_once(self, stations, ask, trainings):
        """
        The same question gives the same bytes, also from a station reopened from its folder.
        """
        first = Station(stations[0]).answer(encode_ask(ask))
        again = Station(stations[0]).answer(encode_ask(ask))

        assert first == again
        assert len(trainings) == 1

    def test_same_question_with_other_weights_is_refused(self, smoke_plan, stations, ask, trainings):
        """
        A server that asks the same round with other weights gets a word, and no second training.
        """
        station = Station(stations[0])
        station.answer(encode_ask(ask))
        other = initial_weights(task_for(smoke_plan).build_network, 1)
        asked = replace(ask, question=replace(ask.question, weights_sha256=weights_sha256(other)), weights=other)

        assert decode_answer(station.answer(encode_ask(asked))).refusal == "other-weights"
        assert len(trainings) == 1

    def test_two_at_once_train_once(self, stations, ask, trainings):
        """
        Two askers at the same moment get the same bytes from one training.
        """
        answers: list[bytes] = []
        one, two = Station(stations[0]), Station(stations[0])
        threads = [threading.Thread(target=lambda s=s: answers.append(s.answer(encode_ask(ask)))) for s in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert answers[0] == answers[1]
        assert len(trainings) == 1


class TestRefusals:
    def test_unknown_plan_is_refused(self, stations, ask):
        """
        A plan that nobody approved here gets a word.
        """
        asked = replace(ask, question=replace(ask.question, plan_sha256="f" * 64))
        assert decode_answer(opened(stations)[0].answer(encode_ask(asked))).refusal == "unknown-plan"

    @pytest.mark.parametrize("data", [b"", b"\x80\x04pickle", b"\xff" * 100])
    def test_bytes_that_are_no_question_are_refused(self, stations, data):
        """
        Anything that is not a question gets a word; nothing in it is executed or kept.
        """
        answer = decode_answer(opened(stations)[0].answer(data))
        assert answer.refusal == "unreadable"
        assert answer.question is None

    def test_weights_of_another_network_are_declined(self, stations, ask):
        """
        Weights that do not fit are declined, and the reason stays in the station's log.
        """
        weights = dict(list(ask.weights.items())[1:])
        asked = replace(ask, question=replace(ask.question, weights_sha256=weights_sha256(weights)), weights=weights)
        assert decode_answer(opened(stations)[0].answer(encode_ask(asked))).refusal == "declined"

    def test_trouble_inside_leaves_as_one_word(self, stations, ask, monkeypatch):
        """
        An exception with patient data in its text leaves as the word "failed"; the bytes hold nothing of it.
        """

        def boom(self, *args, **kwargs):
            raise ValueError("Jane Doe, 1970-01-01")

        monkeypatch.setattr(Trainer, "train", boom)
        data = Station(stations[0]).answer(encode_ask(ask))

        assert decode_answer(data).refusal == "failed"
        assert b"Jane" not in data

    def test_refusal_is_not_remembered(self, stations, ask, monkeypatch):
        """
        A round that failed may be asked again and then succeeds.
        """
        with monkeypatch.context() as broken:
            broken.setattr(station_module, "resident_trainer", lambda *_: 1 / 0)
            assert decode_answer(Station(stations[0]).answer(encode_ask(ask))).refusal == "failed"
        assert decode_answer(Station(stations[0]).answer(encode_ask(ask))).refusal is None


class TestCode:
    def test_code_that_changed_since_the_approval_computes_nothing(
        self, stations, ask, smoke_plan, trainings, monkeypatch
    ):
        """
        After an update every plan is approved anew; until then a question gets a word and costs nothing.
        """
        monkeypatch.setattr(station_module, "code_sha256", lambda: "0" * 64)
        station = Station(stations[0])
        declined = decode_answer(station.answer(encode_ask(ask))).refusal

        assert (declined, trainings, station.ledger().spent().charges) == ("declined", [], ())
        station.approve(smoke_plan)
        assert decode_answer(station.answer(encode_ask(ask))).refusal is None

    def test_plan_whose_code_was_not_noted_is_approved_anew(self, stations, ask, smoke_plan, trainings):
        """
        An approval without the hash of its code says nothing about the code that is here.
        """
        (stations[0] / "plans" / f"{smoke_plan.sha256}.code").unlink()

        assert decode_answer(Station(stations[0]).answer(encode_ask(ask))).refusal == "declined"
        assert not trainings

    @pytest.mark.parametrize("change", ["edited", "added", "renamed"])
    def test_any_file_that_changes_changes_the_hash(self, tmp_path, monkeypatch, change):
        """
        Python or not, in any folder of the packages that a station runs; what Python itself compiles does not count.
        """
        package = tmp_path / "client"
        (package / "data" / "__pycache__").mkdir(parents=True)
        (package / "data" / "table.tsv").write_text("a")
        monkeypatch.setattr(client, "__path__", [str(package)])
        before = code_sha256.__wrapped__()
        (package / "data" / "__pycache__" / "x.pyc").write_text("compiled")
        assert code_sha256.__wrapped__() == before
        match change:
            case "edited":
                (package / "data" / "table.tsv").write_text("b")
            case "added":
                (package / "more.py").write_text("")
            case "renamed":
                (package / "data" / "table.tsv").rename(package / "data" / "other.tsv")

        assert code_sha256.__wrapped__() != before


class TestWhatLeaves:
    def test_training_answer_holds_update_means_and_counts_alone(self, stations, ask, smoke_plan):
        """
        An answer to a training question holds the update, mean metrics and numbers of patients.
        """
        station = Station(stations[0])
        answer = decode_answer(station.answer(encode_ask(ask)))
        cohort = station.cohort(smoke_plan)

        assert answer.update.keys() == ask.weights.keys()
        of_volumes = {"volume bias", "volume limits", "volume error", "volume ICC"}
        names = {name.partition(":")[0] for name in answer.metrics}
        assert names <= {"dice", "hd95_mm", "surface_mm", "training_loss", *of_volumes}
        assert answer.counts == {
            "trained": len(cohort.patients("train")),
            "measured": len(cohort.patients("validation")),
        }

    def test_no_key_of_a_patient_leaves(self, stations, ask, smoke_plan):
        """
        Neither a patient's key nor a study's is anywhere in the bytes.
        """
        station = Station(stations[0])
        data = station.answer(encode_ask(ask))
        cohort = station.cohort(smoke_plan)
        patients = [p for split in ("train", "validation", "test") for p in cohort.patients(split)]
        assert patients
        for patient in patients:
            assert patient.key.encode() not in data
            assert all(study.encode() not in data for study in patient.studies)


@pytest.fixture
def operator():
    """Whoever signs plans."""
    return Operator()


@pytest.fixture
def enrolled(stations, operator):
    """A station that knows its operator."""
    station = Station(stations[0])
    station.trust(operator.name, operator.public_pem)
    return station


def waiting(station) -> list[Notice]:
    """What waits to be told."""
    return [Notice.decode(body) for body in station.outbox()[1]]


class TestDecisions:
    def test_offered_plan_waits_for_somebody(self, enrolled, operator, ask, smoke_plan):
        """
        The default is to ask: an offer changes nothing about what may train.
        """
        enrolled.refuse(smoke_plan)
        other = smoke_plan.model_copy(update={"name": "another"})
        enrolled.offer(operator.sign(other))
        asked = replace(ask, question=replace(ask.question, plan_sha256=other.sha256))

        assert enrolled.plan_named("another").state == "offered"
        assert decode_answer(enrolled.answer(encode_ask(asked))).refusal == "unknown-plan"

    def test_decision_is_told_with_plan_and_run(self, enrolled, operator, smoke_plan):
        """
        Yes and no reach the outbox through the gate; told, they are gone.
        """
        enrolled.offer(operator.sign(smoke_plan, "run-3"))
        enrolled.outbox(enrolled.outbox()[0])
        enrolled.approve(smoke_plan)
        enrolled.refuse(smoke_plan)

        said = waiting(enrolled)
        assert [(n.kind, n.run, n.plan_sha256) for n in said] == [
            ("approved", "run-3", smoke_plan.sha256),
            ("refused", "run-3", smoke_plan.sha256),
        ]
        last, _ = enrolled.outbox()
        assert enrolled.outbox(last)[1] == []

    def test_refused_plan_trains_no_more(self, enrolled, operator, ask, smoke_plan):
        """
        A hospital can take its word back; what was answered stays answered.
        """
        enrolled.offer(operator.sign(smoke_plan))
        first = enrolled.answer(encode_ask(ask))
        enrolled.refuse(smoke_plan)
        later = replace(ask, question=replace(ask.question, round=2))

        assert decode_answer(enrolled.answer(encode_ask(later))).refusal == "unknown-plan"
        assert decode_answer(first).refusal is None

    def test_plan_decided_on_is_not_asked_about_for_another_run(self, enrolled, operator, smoke_plan):
        """
        Approval is by hash: the same plan in another run gets the same word again.
        """
        enrolled.offer(operator.sign(smoke_plan, "run-1"))
        enrolled.offer(operator.sign(smoke_plan, "run-2"))

        assert [(n.kind, n.run) for n in waiting(enrolled)] == [("approved", "run-1"), ("approved", "run-2")]

    def test_plan_changed_after_approval_is_another_plan(self, enrolled, ask, smoke_plan, stations):
        """
        Whoever edits an approved plan's file has approved nothing: its hash is not that of its name.
        """
        file = stations[0] / "plans" / f"{smoke_plan.sha256}.json"
        file.write_text(file.read_text().replace('"epochs":1', '"epochs":2'))

        assert decode_answer(enrolled.answer(encode_ask(ask))).refusal == "unknown-plan"

    def test_site_without_an_operator_tells_nobody(self, stations, ask, smoke_plan):
        """
        In a simulation there is no outbox, and offers are refused.
        """
        station = Station(stations[0])
        station.answer(encode_ask(ask))
        station.refuse(smoke_plan)

        assert station.outbox() == (0, [])
        assert not (stations[0] / "outbox.sqlite").exists()
        with pytest.raises(FederadError, match="C159"):
            station.offer(Operator().sign(smoke_plan))


class TestNotices:
    @pytest.mark.parametrize(("kind", "left"), [("status", {"progress"}), ("progress", {"approved"})])
    def test_what_the_hospital_forbids_is_neither_told_nor_laid_out_for_it(
        self, enrolled, operator, ask, smoke_plan, kind, left
    ):
        """
        No notice of that kind reaches the outbox, nor a line of the audit that says one was told.
        """
        policy = Policy(releases=Releases(**{kind: "forbidden"}))
        enrolled.config.model_copy(update={"policy": policy}).save(enrolled.folder)
        quiet = Station(enrolled.folder)
        quiet.offer(operator.sign(smoke_plan))
        quiet.approve(smoke_plan)
        quiet.answer(encode_ask(ask))

        assert {notice.kind for notice in waiting(quiet)} == left
        told = [entry for entry in AuditLog(quiet.folder / FILE).entries() if entry["event"] == "notice"]
        assert {entry["kind"] for entry in told} == left


class TestProgress:
    def test_at_most_ten_ticks_that_never_tell_a_number_of_steps(self, enrolled, ask, monkeypatch):
        """
        However many steps a round has, the operator hears of tenths.
        """
        told = []
        monkeypatch.setattr(Station, "_put", lambda self, release, **_: told.append(dict(release.value)))
        tell = enrolled._progress(ask.question)
        for step in range(1, 1001):
            tell(step, 1000)

        assert told == [{"round": 1, "tick": tick} for tick in range(1, 11)]

    def test_newest_progress_takes_the_place_of_the_one_before(self, enrolled, ask):
        """
        A courier that comes back after a while hears how far the round is now.
        """
        enrolled.answer(encode_ask(ask))
        progress = [notice for notice in waiting(enrolled) if notice.kind == "progress"]

        assert [(n.done, n.total, n.round, n.run) for n in progress] == [(10, 10, 1, "run")]

    def test_outbox_that_cannot_be_written_does_not_stop_a_round(self, enrolled, ask, stations):
        """
        A round is worth more than the news of it.
        """
        (stations[0] / "outbox.sqlite").unlink(missing_ok=True)
        (stations[0] / "outbox.sqlite").mkdir()

        assert decode_answer(enrolled.answer(encode_ask(ask))).refusal is None


class TestAudit:
    def lines(self, folder):
        return list(AuditLog(folder / FILE).entries())

    def test_every_answer_and_refusal_has_its_line(self, stations, ask, smoke_plan):
        """
        What left, of which kinds and sizes, under which plan, and what was refused.
        """
        station = Station(stations[0])
        answer = station.answer(encode_ask(ask))
        station.answer(encode_ask(ask))
        station.answer(encode_ask(replace(ask, question=replace(ask.question, plan_sha256="f" * 64))))
        station.answer(b"nonsense")
        first, again, unknown, unreadable = [
            line for line in self.lines(stations[0]) if line["event"] in {"answer", "refusal"}
        ]

        assert (first["n_bytes"], first["plan"], first["round"]) == (len(answer), smoke_plan.sha256, 1)
        assert first["released"]["update"]["values"] == sum(array.size for array in ask.weights.values())
        assert set(first["released"]) == {"update", "metric", "count"}
        assert (first["again"], again["again"]) == (False, True)
        assert first["sha256"] == again["sha256"]
        assert (unknown["word"], unreadable["word"]) == ("unknown-plan", "unreadable")

    def test_audit_that_cannot_be_written_lets_nothing_out(self, stations, ask):
        """
        Neither an answer nor a word; once it can be written the same question is answered.
        """
        station = Station(stations[0])
        (stations[0] / FILE).unlink(missing_ok=True)
        (stations[0] / f"{FILE}.head").unlink(missing_ok=True)
        (stations[0] / FILE).mkdir()
        with pytest.raises(FederadError, match="C162"):
            station.answer(encode_ask(ask))

        (stations[0] / FILE).rmdir()
        assert decode_answer(station.answer(encode_ask(ask))).refusal is None

    def test_audit_that_was_cut_lets_nothing_out(self, stations, ask):
        """
        Whoever takes lines away stops the site.
        """
        station = Station(stations[0])
        station.answer(encode_ask(ask))
        (stations[0] / FILE).write_bytes(b"")
        with pytest.raises(FederadError, match="C162"):
            station.answer(encode_ask(ask))

    def test_line_is_there_before_the_answer(self, stations, ask, monkeypatch):
        """
        A station that dies while it writes the line has not answered.
        """

        class DiedError(BaseException):
            pass

        def die(*_, **__):
            raise DiedError

        monkeypatch.setattr(AuditLog, "write", die)
        with pytest.raises(DiedError):
            Station(stations[0]).answer(encode_ask(ask))


class TestDevice:
    @pytest.mark.parametrize(
        ("error", "is_broken"),
        [
            (torch.OutOfMemoryError("no memory"), False),
            (torch.AcceleratorError("lost", 1), True),
            (ValueError(), False),
        ],
    )
    def test_lost_device_asks_for_a_new_process(self, stations, ask, monkeypatch, error, is_broken):
        """
        Out of memory: the word "failed", memory given back, and the next try may succeed. Device lost: the same word,
        and the station says that only a new process can help.
        """

        def fail(*_, **__):
            raise error

        station = Station(stations[0])
        with monkeypatch.context() as failing:
            failing.setattr(Trainer, "train", fail)
            assert decode_answer(station.answer(encode_ask(ask))).refusal == "failed"
        assert station.is_broken is is_broken
        assert decode_answer(station.answer(encode_ask(ask))).refusal is None
