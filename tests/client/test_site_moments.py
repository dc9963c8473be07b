"""Moments of features at a site: whose they are, what one patient can do about them, and what they cost."""

from __future__ import annotations

import json
from dataclasses import replace

import laws
import numpy as np
import pytest
import torch
from privately import answered, ask_of
from scipy import stats
from test_adapted_training import SCANNERS, ScannedCohort, scanned, without_reference
from test_private_training import Scripted, private_plan
from test_training import plan_with, start_of

from client import moments as site_moments
from client.audit import FILE, AuditLog
from client.egress import egress, told
from client.moments import exact_moments, mechanism_of, noised_moments
from client.own import OwnState
from client.policy import Policy, Releases
from client.privacy import PatientSum
from client.site import SiteConfig
from client.station import Station
from client.training import Adversary, Trainer
from client.work import exact_releases
from shared_models.messages import Ask, Question
from shared_models.moments import DIMENSIONS, TABLE, Discriminator, Layout
from shared_models.plan import WITHOUT_PRIVACY_ONLY, AdaptationTable, Plan
from shared_models.task import task_for

TOLD_APART = ("SIEMENS 1.5 T", "GE 3 T")
OPEN = AdaptationTable(adversarial="moments", warm_up=0.0, moments_every=2, scanners=TOLD_APART)
NOISED = OPEN.model_copy(update={"moments_noise": 2.0})


def open_plan(kind: str = "segmentation") -> Plan:
    plan = plan_with() if kind == "segmentation" else plan_with_kind(kind)
    return plan.model_copy(update={"rounds": 4, "adaptation": OPEN})


def plan_with_kind(kind: str) -> Plan:
    import contracts

    return contracts.example_plan(kind, training={"learning_rate": 0.01, "samples_per_patient": 2, "batch_size": 3})


def noised_plan(noise: float = 2.0, clip: float = 1.0) -> Plan:
    table = NOISED.model_copy(update={"moments_noise": noise, "moments_clip": clip})
    return private_plan().model_copy(update={"rounds": 4, "adaptation": table})


def exact(plan: Plan, cohort: ScannedCohort) -> np.ndarray:
    return exact_moments(Trainer(plan, "cpu"), start_of(plan), cohort, seed=0, site="site-1", round_=1)[TABLE]


def sums_of(plan: Plan, cohort: ScannedCohort, monkeypatch) -> torch.Tensor:
    """The integer sum that goes into the mechanism."""
    seen: list[torch.Tensor] = []
    real = PatientSum.noised

    def noised(total, randomness):
        seen.append(total.integers.clone())
        return real(total, randomness)

    with monkeypatch.context() as patched:
        patched.setattr(PatientSum, "noised", noised)
        noised_moments(Trainer(plan, "cpu", randomness=Scripted()), start_of(plan), cohort)
    (integers,) = seen
    return integers


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


class TestExactly:
    @pytest.mark.parametrize("kind", ["segmentation", "classification", "quantification"])
    def test_sums_are_those_of_patients_one_by_one(self, kind, monkeypatch):
        """
        A row for each scanner with enough patients; leaving one patient out takes that patient's own vector away.
        """
        monkeypatch.setattr(site_moments, "FEWEST", 1)
        plan = open_plan(kind)
        everybody = scanned(plan, 4)
        table = exact(plan, everybody)
        alone = [
            exact(plan, ScannedCohort(everybody.volumes, {"train": [person]})) for person in everybody.people["train"]
        ]

        assert table.shape == Layout.of(plan).shape
        assert table[:, 0].tolist() == [2.0, 2.0, 0.0]
        np.testing.assert_allclose(np.sum(alone, axis=0), table, rtol=1e-4, atol=1e-5)

    def test_scanner_with_too_few_patients_is_left_out(self):
        """
        Ten patients of one scanner leave, four of another do not, and nothing of these does.
        """
        plan = open_plan()
        table = exact(plan, scanned(plan, 14, scanners=(SCANNERS[0], SCANNERS[0], SCANNERS[1], SCANNERS[0])))

        assert table[0, 0] > 9
        assert not table[1:].any()

    def test_same_question_gives_the_same_bits(self):
        """
        Whatever the trainer did before.
        """
        plan = open_plan()
        cohort = scanned(plan, 12)
        used = Trainer(plan, "cpu")
        used.train(start_of(plan), cohort, seed=3, site="other", round_=2)
        again = exact_moments(used, start_of(plan), cohort, seed=0, site="site-1", round_=1)

        laws.assert_same_bits(again, {TABLE: exact(plan, cohort)})

    def test_patient_of_two_scanners_counts_half_for_each(self, monkeypatch):
        """
        One vector for each patient, however many scanners it is spread over.
        """
        monkeypatch.setattr(site_moments, "FEWEST", 1)
        plan = open_plan()
        cohort = scanned(plan, 2)
        person = replace(cohort.people["train"][0], studies=tuple(sorted(cohort.volumes)))
        table = exact(plan, ScannedCohort(cohort.volumes, {"train": [person]}))

        assert table[:, 0].tolist() == [0.5, 0.5, 0.0]


class TestWhoTakesPart:
    def ask(self, plan: Plan, round_: int) -> Ask:
        return Ask(Question("run", round_, "train", plan.sha256, "a" * 64), 0, start_of(plan))

    def released(self, plan, cohort, round_, tmp_path):
        question = self.ask(plan, round_)
        own = OwnState(tmp_path, "run", plan.sha256)
        return {r.kind: r.value for r in exact_releases(Trainer(plan, "cpu"), cohort, question, site="s", own=own)}

    def test_site_without_references_adds_its_row_and_trains_nothing(self, tmp_path):
        """
        No update, nobody trained; in a round that asks for moments they are there, in another they are not.
        """
        plan = open_plan()
        cohort = scanned(plan, 12)
        without_reference(cohort, *cohort.volumes).people["validation"] = []
        first, second = (self.released(plan, cohort, round_, tmp_path) for round_ in (1, 2))

        assert first.keys() == {"metric", "count", "moments"}
        assert first["count"] == second["count"] == {"measured": 0, "trained": 0}
        assert first["moments"][TABLE][:2, 0].tolist() == [6.0, 6.0]
        assert "moments" not in second

    def test_site_with_references_sends_both(self, tmp_path):
        """
        Update and moments in one answer, and studies without a reference count among the moments.
        """
        plan = open_plan()
        cohort = scanned(plan, 12)
        without_reference(cohort, *[person.studies[0] for person in cohort.people["train"][-3:]])
        found = self.released(plan, cohort, 3, tmp_path)

        assert found.keys() == {"update", "metric", "count", "moments"}
        assert found["moments"][TABLE][:2, 0].sum() == 12.0

    def test_features_move_only_with_a_discriminator_and_after_the_warm_up(self):
        """
        Without one the update is that of a plan without adaptation, bit for bit; with one it is not.
        """
        plan = open_plan()
        cohort = scanned(plan)
        torch.manual_seed(0)
        arrays = Discriminator(2).as_arrays()

        def update(plan, round_, **options):
            trainer = Trainer(plan, "cpu")
            return trainer.train(start_of(plan), cohort, seed=0, site="s", round_=round_, **options).update

        plain = plan.model_copy(update={"adaptation": None})
        laws.assert_same_bits(update(plan, 3), update(plain, 3))
        laws.assert_same_bits(update(plan, 1, discriminator=arrays), update(plain, 1))
        laws.assert_same_bits(update(plan, 3, discriminator=arrays, adversary=0.0), update(plain, 3))
        moved, again = (update(plan, 3, discriminator=arrays) for _ in range(2))
        assert any(not np.array_equal(moved[name], update(plain, 3)[name]) for name in moved)
        laws.assert_same_bits(moved, again)
        assert set(moved) == set(start_of(plain))


class TestPrivately:
    def test_nobody_there_releases_noise_of_the_size_that_was_paid_for(self):
        """
        An empty cohort gives a release of the same shape: each declared row is noise of noise * clip * root of two.
        """
        plan = noised_plan(noise=3.0, clip=0.7)
        cohort = scanned(plan, 0)
        trainer = Trainer(plan, "cpu")
        drawn = [noised_moments(trainer, start_of(plan), cohort)[TABLE][:2] for _ in range(150)]
        values = np.concatenate([d.ravel() for d in drawn]) / (3.0 * 0.7 * np.sqrt(2))
        squares = float((values**2).sum())

        assert drawn[0].shape == (2, 1 + DIMENSIONS)
        assert stats.chi2.ppf(1e-7, values.size) < squares < stats.chi2.ppf(1 - 1e-7, values.size)
        assert abs(values.mean()) < 6 / np.sqrt(values.size)

    def test_rows_of_scanners_that_nobody_declared_are_zero(self):
        """
        What patients were scanned with does not show: neither a scanner that is there undeclared, nor one that is not.
        """
        plan = noised_plan()
        declared = scanned(plan, declared_scanners=("GE Vesper 3 T",))
        table = noised_moments(Trainer(plan, "cpu"), start_of(plan), declared)[TABLE]

        assert not table[[0, 2]].any()
        assert table[1].all()
        for nothing in ((), None):
            silent = noised_moments(Trainer(plan, "cpu"), start_of(plan), scanned(plan, declared_scanners=nothing))[
                TABLE
            ]
            assert not silent.any()
            assert silent.shape == table.shape

    @pytest.mark.parametrize("n_scanners", [1, 2])
    @pytest.mark.parametrize("size", [1.0, 1e6])
    def test_one_patient_more_moves_the_sum_by_at_most_the_clip(self, n_scanners, size, monkeypatch):
        """
        Somebody whose features are as long as can be, with one scanner or two, adds no more than one clip altogether.
        """
        plan = noised_plan(clip=0.5)
        cohort = scanned(plan, 4)
        people = cohort.people["train"]
        longest = replace(people[2], studies=people[2].studies + people[3].studies * (n_scanners - 1))
        real = Trainer.describe_loaded
        monkeypatch.setattr(Trainer, "describe_loaded", lambda *args: size * real(*args))
        with_them, without = (
            sums_of(plan, ScannedCohort(cohort.volumes, {"train": who}), monkeypatch)
            for who in ([*people[:2], longest], people[:2])
        )
        square = int((with_them - without).square().sum())
        mechanism = mechanism_of(plan)

        assert 0.4 * mechanism.largest_square < square <= mechanism.largest_square

    def test_mechanism_is_the_one_that_is_charged(self):
        """
        Everybody takes part, with the noise that the event says over the norm that a patient is clipped to.
        """
        mechanism = mechanism_of(noised_plan(noise=2.5, clip=0.5))

        assert (mechanism.sampling_rate, mechanism.noise_multiplier, mechanism.divisor) == (1.0, 2.5, 1)
        assert mechanism.clip == pytest.approx(0.5 * np.sqrt(2))
        assert mechanism.clip == Layout.of(noised_plan(clip=0.5)).largest

    @pytest.mark.parametrize("how", ["raises", "not finite"])
    def test_patient_who_cannot_be_described_adds_nothing_and_stays_silent(self, how, monkeypatch):
        """
        The sum is that of the others, to the last bit, and the release is made.
        """
        plan = noised_plan()
        cohort = scanned(plan, 4)
        people = cohort.people["train"]
        without = sums_of(plan, ScannedCohort(cohort.volumes, {"train": people[:3]}), monkeypatch)
        last = people[3].studies[0]
        if how == "raises":
            del cohort.volumes[last]
            monkeypatch.setattr(ScannedCohort, "scanner", lambda _, study: SCANNERS[int(study[1]) % 2])
        else:
            cohort.volumes[last] = replace(cohort.volumes[last], image=cohort.volumes[last].image * np.float32(np.nan))

        assert torch.equal(sums_of(plan, cohort, monkeypatch), without)

    def test_scanner_of_a_sample_has_no_part_in_private_training(self):
        """
        The adversary needs none: a frozen discriminator, and a strength that follows from the plan.
        """
        plan = noised_plan()
        torch.manual_seed(0)
        adversary = Adversary.of(plan, scanned(plan), 3, discriminator=Discriminator(2).as_arrays())

        assert adversary is not None
        assert (adversary.places, adversary.has_references) == ({}, True)
        assert Adversary.of(plan, scanned(plan), 3) is None


@pytest.fixture(scope="module")
def private_smoke(smoke_plan) -> Plan:
    """Three rounds; moments in the first."""
    tables = json.loads(smoke_plan.canonical_json()) | {"rounds": 3}
    for key in WITHOUT_PRIVACY_ONLY:
        tables["training"].pop(key, None)
    tables["strategy"]["release"] = "last"
    tables["task"]["channels"], tables["data"]["patch"] = [4, 8], [32, 32]
    tables["privacy"] = {"noise_multiplier": 1.5, "patients_per_step": 4, "steps_per_round": 1}
    tables["adaptation"] = {"adversarial": "moments", "moments_every": 2, "moments_noise": 4.0, "warm_up": 0.0}
    return Plan.from_tables(tables)


class TestStation:
    @pytest.fixture
    def station(self, private_smoke, hospitals, tmp_path) -> Station:
        policy = Policy(lifetime_epsilon=40.0, run_epsilon=20.0, minimum_patients=1)
        scanners = ("SIEMENS 3 T", "GE 1.5 T")
        config = SiteConfig(
            name="site-1", data=str(hospitals[0].folder), device="cpu", policy=policy, scanners=scanners
        )
        station = Station.create(tmp_path / "station", config)
        station.approve(private_smoke, declared_size=20)
        return station

    def test_moments_leave_in_their_rounds_and_are_charged_with_them(self, station, private_smoke):
        """
        The answer, its line in the audit and the ledger's events of the round agree; the next round has none.
        """
        first, second = (answered(station, ask_of(private_smoke, round_, seed=round_)) for round_ in (1, 2))
        lines = list(egress(station.folder))
        charges = station.ledger().spent().charges

        assert first.moments[TABLE].shape == Layout.of(private_smoke).shape
        assert [bool(row.any()) for row in first.moments[TABLE]].count(True) == 2
        assert second.moments == {}
        assert lines[0]["released"]["moments"] == {"shapes": {TABLE: list(Layout.of(private_smoke).shape)}}
        assert "moments of features, 13 x 17 values" in told(lines[0])
        assert [[(e.noise_multiplier, e.sampling_rate, e.split) for e in charge.events] for charge in charges] == [
            [(1.5, 0.2, "train"), (4.0, 1.0, "train")],
            [(1.5, 0.2, "train")],
        ]

    def test_moments_whose_answer_was_lost_stay_paid(self, station, private_smoke, monkeypatch):
        """
        What was reserved before it was computed is spent, and asking again pays again.
        """

        def lost(*_args, **_kwargs):
            raise RuntimeError("gone")

        with monkeypatch.context() as broken:
            broken.setattr(Trainer, "train_private", lost)
            assert answered(station, ask_of(private_smoke)).refusal == "failed"
        answered(station, ask_of(private_smoke))

        assert [len(charge.events) for charge in station.ledger().spent().charges] == [2, 2]

    def test_moments_that_the_hospital_forbids_stay(self, station, private_smoke):
        """
        The update leaves without them.
        """
        forbidding = station.config.permits.model_copy(update={"releases": Releases(moments="forbidden")})
        station.config.model_copy(update={"policy": forbidding}).save(station.folder)
        answer = answered(Station(station.folder), ask_of(private_smoke))

        assert answer.update
        assert answer.moments == {}
        assert [e["event"] for e in AuditLog(station.folder / FILE).entries()][-1] == "answer"

    def test_price_that_a_hospital_sees_before_it_approves_holds_them(self, station, private_smoke):
        """
        The run's whole epsilon is that of its steps and its releases of moments.
        """
        without = private_smoke.model_copy(update={"adaptation": None})

        assert station.cost(private_smoke, 20).epsilon > station.cost(without, 20).epsilon
        assert task_for(private_smoke).plan.asks_for_moments
