"""A site's fingerprint: what is counted, what it costs, and when the site says no."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from faults.sites import ListGrid, opened
from privately import answered, ask_of, private

from client.audit import FILE, AuditLog
from client.egress import egress, told
from client.fingerprint import noised_counts
from client.policy import Policy, Releases, cost_of
from client.privacy import SystemRandomness
from client.site import SiteConfig
from client.station import Station
from server.journal import Journal
from server.rounds import Rounds
from shared_models.errors import FederadError
from shared_models.fingerprint import BINS, LARGEST_NORM, Fingerprint, blank, fingerprint_plan, vector_of
from shared_models.messages import Ask, Question
from shared_models.weights import weights_sha256

OPEN = Policy(minimum_patients=1, without_privacy=True)


def asking(plan, run="run-1"):
    """The question of a plan that asks for a fingerprint."""
    return Ask(Question(run, 1, "fingerprint", plan.sha256, weights_sha256(blank())), 0, blank())


@pytest.fixture(scope="module")
def exact(smoke_plan):
    """Asked without noise."""
    return fingerprint_plan(smoke_plan)


@pytest.fixture(scope="module")
def noised(smoke_plan):
    """Asked with noise."""
    return fingerprint_plan(smoke_plan, noise=4.0)


def station_of(hospitals, folder, policy):
    """A hospital with a policy of its own."""
    config = SiteConfig(name="site-1", data=str(hospitals[0].folder), device="cpu", policy=policy)
    return Station.create(folder, config, secret=b"3" * 32)


class TestWhatLeaves:
    def test_exact_counts_are_those_of_the_images(self, hospitals, tmp_path, exact):
        """
        Slices of 4 mm, pixels of 2 mm, six slices: every patient counts there, in a rounded number of them.
        """
        station = station_of(hospitals, tmp_path, OPEN)
        station.approve(exact)
        answer = answered(station, asking(exact))
        found = {name: BINS[name][np.flatnonzero(counts)].tolist() for name, counts in answer.update.items()}

        assert found == {
            "spacing_mm.z": [4.0],
            "spacing_mm.y": [2.0],
            "spacing_mm.x": [2.0],
            "size.z": [6.0],
            "size.y": [112.0],
            "size.x": [96.0],
        }
        assert {float(counts.sum()) for counts in answer.update.values()} == {5.0}
        assert (answer.counts, answer.metrics, answer.cost) == ({}, {}, {})

    def test_noised_counts_leave_with_their_cost(self, hospitals, tmp_path, noised):
        """
        Every count has noise, and the ledger has one Gaussian mechanism over all training patients.
        """
        station = station_of(hospitals, tmp_path, Policy(minimum_patients=1))
        station.approve(noised, declared_size=20)
        answer = answered(station, asking(noised))
        (charge,) = station.ledger().spent().charges
        (event,) = charge.events

        assert set(answer.cost) == {"epsilon", "delta", "declared_size"}
        assert (event.noise_multiplier, event.sampling_rate, event.steps, event.unit) == (4.0, 1.0, 1, "patient")
        assert all((counts != 0).all() for counts in answer.update.values())
        assert answer.counts == {}

    def test_deviation_of_the_noise_is_what_the_server_reckons(self, noised):
        """
        Without patients what leaves is noise alone, of the deviation by which counts are told from it.
        """
        nobody = SimpleNamespace(patients=lambda split: ())
        cost = cost_of(noised, 20, SimpleNamespace(order=4.0, lifetime_epsilon=lambda *a, **k: 0.0))
        drawn = np.concatenate([noised_counts(nobody, cost, SystemRandomness()) for _ in range(20)])

        assert drawn.std() == pytest.approx(Fingerprint.of(noised, blank(), n_sites=1).deviation, rel=0.05)

    def test_one_more_patient_moves_the_sum_by_no_more_than_is_paid_for(self, noised):
        """
        Twin hospitals that differ by one patient, however odd: without noise their counts differ by at most the clip, and
        by nothing where that patient cannot be looked at.
        """
        usual = SimpleNamespace(image=np.zeros((1, 6, 112, 96)), spacing_mm=(4.0, 2.0, 2.0))
        odd = SimpleNamespace(image=np.zeros((1, 1, 9000, 3)), spacing_mm=(1e9, float("nan"), -1.0))
        broken = SimpleNamespace(image=np.zeros(3), spacing_mm=(1.0, 1.0, 1.0))
        volumes = {"a": usual, "b": usual, "odd": odd, "broken": broken}
        cost = cost_of(noised, 20, SimpleNamespace(order=4.0, lifetime_epsilon=lambda *a, **k: 0.0))

        class Quiet(SystemRandomness):
            def gaussian(self, n, sigma):
                return np.zeros(n, np.int64)

        def counts(*patients):
            listed = tuple(SimpleNamespace(key=key, studies=(key,)) for key in patients)
            return noised_counts(
                SimpleNamespace(patients=lambda split: listed, volume=volumes.__getitem__), cost, Quiet()
            )

        without = counts("a", "b")
        np.testing.assert_allclose(without, 2 * vector_of([((4.0, 2.0, 2.0), (6, 112, 96))]), atol=1e-4)
        assert np.linalg.norm(counts("a", "b", "odd") - without) <= LARGEST_NORM + 1e-3
        np.testing.assert_allclose(counts("a", "b", "broken"), without, atol=1e-4)

    def test_asked_again_the_same_counts_come(self, hospitals, tmp_path, noised):
        """
        The same question is neither counted nor paid twice: fresh noise would wear the old one off.
        """
        station = station_of(hospitals, tmp_path, Policy(minimum_patients=1))
        station.approve(noised, declared_size=20)
        first, second = answered(station, asking(noised)), answered(station, asking(noised))

        assert weights_sha256(first.update) == weights_sha256(second.update)
        assert len(station.ledger().spent().charges) == 1

    def test_audit_names_what_left_and_no_value(self, hospitals, tmp_path, exact):
        """
        A person sees that a fingerprint has left, and the numbers stay out of the audit.
        """
        station = station_of(hospitals, tmp_path, OPEN)
        station.approve(exact)
        answered(station, asking(exact))
        (entry,) = egress(tmp_path)

        assert told(entry).startswith("fingerprint size.x, size.y, size.z, spacing_mm.x")
        assert "112" not in str(entry["released"])
        assert AuditLog(tmp_path / FILE).entries()


class TestWhoSaysNo:
    @pytest.mark.parametrize(
        "policy",
        [
            Policy(minimum_patients=1),
            Policy(minimum_patients=1, without_privacy=True, releases=Releases(fingerprint="forbidden")),
            Policy(minimum_patients=1, without_privacy=True, releases=Releases(fingerprint="noised")),
            Policy(minimum_patients=100, without_privacy=True),
        ],
        ids=["default", "forbidden", "noised", "too few patients"],
    )
    def test_exact_counts_need_the_hospitals_word(self, hospitals, tmp_path, exact, policy):
        """
        By default a plan without noise is not approved; nor where a hospital forbids this kind, or has too few patients.
        """
        with pytest.raises(FederadError, match="C170"):
            station_of(hospitals, tmp_path, policy).approve(exact)

    def test_forbidden_kind_does_not_leave_with_noise_either(self, hospitals, tmp_path, noised):
        """
        What a hospital forbids is not even prepared.
        """
        policy = Policy(minimum_patients=1, releases=Releases(fingerprint="forbidden"))

        with pytest.raises(FederadError, match="C170"):
            station_of(hospitals, tmp_path, policy).approve(noised, declared_size=20)

    def test_plan_that_trains_is_no_leave_to_count(self, hospitals, tmp_path, smoke_plan, exact):
        """
        Neither does an approved plan let a server ask for the fingerprint, nor the other way round.
        """
        station = station_of(hospitals, tmp_path, OPEN)
        station.approve(exact)
        station.approve(smoke_plan)
        of_model = ask_of(smoke_plan)
        crossed = replace(of_model, question=replace(of_model.question, kind="fingerprint"))
        training = replace(asking(exact), question=replace(asking(exact).question, kind="train"))

        assert answered(station, crossed).refusal == "policy"
        assert answered(station, training).refusal == "policy"


class TestTogether:
    def test_round_loop_adds_the_sites_up(self, hospitals, stations, tmp_path, smoke_plan):
        """
        One round, no validation and no test; the counts of three sites are in the journal, and a resumed run has them.
        """
        plan = fingerprint_plan(private(smoke_plan, {"epsilon": 8.0, "patients_per_step": 2, "steps_per_round": 2}))
        sites = opened(stations)
        for site in sites:
            site.approve(plan)
        journal = Journal(tmp_path / "run")

        def run():
            return Rounds(plan, ListGrid(sites), journal, run="run", seed=0, weights=blank()).run()

        outcome = run()
        found = Fingerprint.of(plan, outcome.last, len(outcome.records[0].replied))
        events = {answered(site, asking(plan, run="run")).refusal for site in sites}

        assert [record.replied for record in outcome.records] == [["site-1", "site-2", "site-3"]]
        assert outcome.test.mean is None
        assert set(outcome.cost) == {"site-1", "site-2", "site-3"}
        assert found.deviation == pytest.approx(4.0 * LARGEST_NORM * 3**0.5)
        assert weights_sha256(run().last) == weights_sha256(outcome.last)
        assert events == {None}
