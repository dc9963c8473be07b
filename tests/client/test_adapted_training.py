"""Training that adapts to scanners: who takes part, what is bounded, and what one patient can do about it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

import contracts
import laws
import numpy as np
import pytest
import torch
from test_private_training import private_plan, sums_of
from test_training import Cohort, cohort_of, plan_with, start_of, trained

from client.network_contract import check_network
from client.training import Adversary, Trainer, balance_of
from shared_models.scanners import ScannerTable
from shared_models.task import task_for

CASES = contracts.every_case()

BOTH = {"appearance": True, "adversarial": "scanner", "warm_up": 0.0}
SCANNERS = ("SIEMENS Aurora 1.5 T", "GE Vesper 3 T")


@dataclass
class ScannedCohort(Cohort):
    """Patients who were scanned in turn with some scanners."""

    scanners: tuple[str, ...] = SCANNERS
    unlabelled: set[str] = field(default_factory=set)
    declared_scanners: tuple[str, ...] | None = SCANNERS

    def scanner(self, study: str) -> str | None:
        return self.scanners[sorted(self.volumes).index(study) % len(self.scanners)]

    def is_unlabelled(self, study: str) -> bool:
        return study in self.unlabelled

    def category(self, study: str) -> int | None:
        return self.volumes[study].category


def scanned(plan, n_patients: int = 4, **facts) -> ScannedCohort:
    plain = cohort_of(plan, n_patients)
    return ScannedCohort(plain.volumes, plain.people, **facts)


def without_reference(cohort: ScannedCohort, *studies: str) -> ScannedCohort:
    for study in studies:
        cohort.volumes[study] = replace(
            cohort.volumes[study], label=None, category=None, foreground=np.empty((0, 3), np.int32)
        )
        cohort.unlabelled.add(study)
    return cohort


def moved(update, prefix: str) -> float:
    return float(sum(np.abs(array).sum() for name, array in update.items() if name.startswith(prefix)))


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


class TestWhoAdapts:
    def test_same_question_gives_the_same_update_bit_for_bit(self):
        """
        Appearance and adversary depend on seed, site and round alone.
        """
        plan = plan_with(adaptation=BOTH)

        laws.assert_same_bits(trained(plan, scanned(plan)).update, trained(plan, scanned(plan)).update)
        assert moved(trained(plan, scanned(plan)).update, "discriminator") > 0

    def test_site_with_one_scanner_trains_without_a_discriminator_and_says_so(self, caplog):
        """
        Its discriminator would learn to say one name; it does not move, and the log has the notice.
        """
        plan = plan_with(adaptation=BOTH)
        with caplog.at_level(logging.WARNING):
            update = trained(plan, scanned(plan, scanners=SCANNERS[:1])).update

        assert moved(update, "discriminator") == 0
        assert moved(update, "network") > 0
        assert "one scanner" in caplog.text

    def test_scanners_that_the_plan_does_not_tell_apart_are_one(self):
        """
        The consortium's table decides, not the number of names at a site.
        """
        plan = plan_with(adaptation={**BOTH, "scanners": ["PHILIPS", "CANON"]})

        assert Adversary.of(plan, scanned(plan), 1) is None

    def test_discriminator_decides_between_the_scanners_of_its_site(self):
        """
        Others of the table, which no study here has, neither rise nor fall in what is sent.
        """
        plan = plan_with(adaptation=BOTH)
        update = trained(plan, scanned(plan)).update
        bias = update["discriminator.3.bias"]
        table = ScannerTable(None)

        assert set(np.flatnonzero(bias)) == {table.place(name) for name in SCANNERS}

    def test_what_the_stop_has_left_weighs_the_reversal(self):
        """
        Without anything left, features move as in the warm-up.
        """
        plan = plan_with(adaptation={"adversarial": "scanner", "warm_up": 0.0, "strength": 50.0}).model_copy(
            update={"rounds": 2}
        )
        full, none = (trained(plan, scanned(plan), round_=2, adversary=left).update for left in (1.0, 0.0))
        first = trained(plan, scanned(plan), round_=1).update

        assert any(not np.array_equal(full[name], none[name]) for name in full if name.startswith("network"))
        assert moved(first, "network") > 0

    @pytest.mark.parametrize("kind", ["segmentation", "classification"])
    def test_study_without_reference_trains_the_adversary_alone(self, kind):
        """
        At a site without any reference the network moves against the discriminator, by a bounded step, and the loss is 0.
        """
        plan = contracts.example_plan(
            kind, adaptation={"adversarial": "scanner", "warm_up": 0.0}, training={"learning_rate": 0.01}
        ).model_copy(update={"rounds": 2})
        cohort = without_reference(scanned(plan), "p0-s0", "p1-s0", "p2-s0", "p3-s0")
        labelled = trained(plan, scanned(plan), round_=2)
        alone = trained(plan, cohort, round_=2)

        assert alone.loss == 0.0
        assert 0 < moved(alone.update, "network") < moved(labelled.update, "network")

    def test_some_without_reference_leave_the_rest_its_loss(self):
        """
        A batch with both has the loss of those that have a reference.
        """
        plan = plan_with(adaptation=BOTH)

        result = trained(plan, without_reference(scanned(plan), "p1-s0"))

        assert result.loss > 0
        assert all(np.isfinite(array).all() for array in result.update.values())

    def test_label_rare_with_its_scanner_counts_as_much_as_a_common_one(self):
        """
        Weights are inverse to how often a label occurs with a scanner, and their mean over the scanner's studies is 1.
        """
        plan = contracts.example_plan("classification")
        cohort = scanned(plan, 8)
        categories = dict(zip(sorted(cohort.volumes), [0, 1, 0, 1, 0, 1, 1, 1], strict=True))
        for study, category in categories.items():
            cohort.volumes[study] = replace(cohort.volumes[study], category=category)
        weights = balance_of(cohort, cohort.patients("train"))

        assert weights == {
            **{f"p{n}-s0": pytest.approx(2 / 3) for n in (0, 2, 4)},
            "p6-s0": pytest.approx(2.0),
            **{f"p{n}-s0": pytest.approx(1.0) for n in (1, 3, 5, 7)},
        }
        balanced = contracts.example_plan("classification", training={"balanced": True})
        assert trained(balanced, cohort).loss > 0


class TestPrivately:
    @pytest.mark.parametrize(
        ("kind", "asked"),
        [
            *((kind, {"conditional": on}) for kind in ("segmentation", "classification") for on in (False, True)),
            ("segmentation", {"reads": "predictions"}),
        ],
    )
    def test_one_patient_moves_the_sum_by_at_most_the_clip(self, kind, asked, monkeypatch):
        """
        With everything on, one more patient of any scanner adds a vector of at most C, and changes nobody else's.
        """
        plan = private_plan(
            (kind, contracts.NETWORKS_FOR[kind][0], 2),
            privacy={"views": 2},
            adaptation={**BOTH, **asked, "strength": 5.0},
        )
        three = scanned(plan, 3)
        two = ScannedCohort(three.volumes, {"train": three.people["train"][:2]})
        with_them, without = sums_of(plan, three, monkeypatch), sums_of(plan, two, monkeypatch)
        mechanism = training_mechanism(plan)

        difference = (with_them[0] - without[0]).double().norm() * mechanism.grid
        assert 0 < difference <= mechanism.clip

    def test_declared_scanners_decide_whether_a_discriminator_trains(self):
        """
        What patients were scanned with does not show: a site that declared two has one, another none.
        """
        plan = private_plan(adaptation=BOTH)
        one = SCANNERS[:1]

        found = Adversary.of(plan, scanned(plan, scanners=one), 1)
        assert found is not None
        assert len(found.among) == len(SCANNERS)
        assert Adversary.of(plan, scanned(plan, declared_scanners=one), 1) is None
        assert Adversary.of(plan, scanned(plan, declared_scanners=None), 1) is None

    @pytest.mark.parametrize(
        ("case", "asked"),
        [(case, {}) for case in CASES]
        + [(case, {"reads": "predictions"}) for case in CASES if case[0] == "segmentation"],
        ids=str,
    )
    def test_contract_covers_the_discriminator(self, case, asked):
        """
        A network with its adversary passes the check that every private run begins with.
        """
        task = task_for(contracts.example_plan(*case, adaptation={**BOTH, **asked}))

        check_network(task.build_network(), task)

    def test_shared_random_stream_is_not_used(self):
        """
        The views of a patient are the same whoever else takes part.
        """
        plan = private_plan(adaptation={"appearance": True}, privacy={"views": 3})
        from client.training import PatientGradients

        def drawn(cohort):
            trainer = Trainer(plan, "cpu")
            gradients = PatientGradients(trainer.network, trainer.task, cohort, trainer._precision)
            person = cohort.patients("train")[0]
            return gradients._draw(person, np.random.default_rng(5))

        some, others = drawn(scanned(plan, 2)), drawn(scanned(plan, 4))
        assert len(some) == 6
        assert all(np.array_equal(a.image, b.image) for a, b in zip(some, others, strict=True))
        assert not np.array_equal(some[0].image, some[1].image)


def training_mechanism(plan):
    from client.privacy import Mechanism

    return Mechanism.of(plan.privacy, declared_size=4, noise_multiplier=1.0)


def test_released_weights_name_both_parts():
    """
    What travels holds the discriminator under its own prefix.
    """
    plan = plan_with(adaptation=BOTH)

    assert {name.split(".")[0] for name in start_of(plan)} == {"network", "discriminator"}
