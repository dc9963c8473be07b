"""A station asked questions, as a courier would."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from faults.sites import opened

from client import station as station_module
from client.station import Station
from client.training import Trainer
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


class TestWhatLeaves:
    def test_training_answer_holds_update_means_and_counts_alone(self, stations, ask, smoke_plan):
        """
        An answer to a training question holds the update, mean metrics and numbers of patients.
        """
        station = Station(stations[0])
        answer = decode_answer(station.answer(encode_ask(ask)))
        cohort = station.cohort(smoke_plan)

        assert answer.update.keys() == ask.weights.keys()
        assert set(answer.metrics) <= {"dice", "hd95_mm", "training_loss"}
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
