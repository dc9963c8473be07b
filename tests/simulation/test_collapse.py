"""The experiment on sites with one scanner: its arms, its claims, and the collapse itself."""

from __future__ import annotations

import json

import contracts
import numpy as np
import pytest
import torch

from client.training import Trainer
from shared_models.plan import AdaptationTable, Plan
from shared_models.task import task_for
from shared_models.weights import initial_weights
from simulation.consortium import emulation_sha256
from simulation.experiments.collapse import COLLAPSE, MOMENTS, PLAIN, alone, beside_the_task, evaluate, looks


def result_of(dice: float, **worst: float) -> dict:
    """A run of two looks, of which the second is as given."""
    fine = {
        "local_accuracy": 1.0, "local_gradient": 0.0, "moments_accuracy": 0.9, "moments_gradient": 5.0, "gap": 0.1,
    }  # fmt: skip
    noted = {"left_out": "" if worst.get("used", True) else "noise"}
    return {
        "test": {"dice": dice},
        "rounds": [{"discriminator": None}, {"discriminator": noted}],
        "after": {"looks": [fine, fine | worst], "leakage": {"accuracy": 0.6, "chance": 0.25}},
    }


class TestArms:
    @pytest.mark.parametrize("quick", [True, False])
    def test_arms_share_their_hospitals_and_differ_in_the_adversary_alone(self, quick):
        """
        Both are plans that any site would accept; weights are looked at up to the last round.
        """
        plans = COLLAPSE.arms(quick=quick)

        assert list(plans) == [PLAIN, MOMENTS]
        assert plans[PLAIN] == plans[MOMENTS].model_copy(update={"adaptation": None})
        assert len({emulation_sha256(plan, n_sites=COLLAPSE.n_sites, seed=0) for plan in plans.values()}) == 1
        assert looks(plans[MOMENTS])[-1] == plans[MOMENTS].rounds
        for plan in plans.values():
            assert Plan.from_tables(json.loads(plan.canonical_json())).sha256 == plan.sha256


class TestClaims:
    def test_claims_hold_where_every_look_is_fine(self):
        """
        With a Dice that differs by less than a point.
        """
        table = evaluate({PLAIN: [result_of(0.70), result_of(0.68)], MOMENTS: [result_of(0.705), result_of(0.67)]})

        assert all(claim["holds"] for claim in table["claims"])

    @pytest.mark.parametrize(
        ("id_", "worst"),
        [
            ("local_accuracy", {"local_accuracy": 0.9}),
            ("local_gradient", {"local_gradient": 0.2}),
            ("moments_accuracy", {"moments_accuracy": 0.3}),
            ("moments_gradient", {"moments_gradient": 0.0}),
            ("moments_used", {"used": False}),
        ],
    )
    def test_one_look_at_which_it_is_otherwise_breaks_a_claim(self, id_, worst):
        """
        Through the whole run means at every look.
        """
        table = evaluate({PLAIN: [result_of(0.7)], MOMENTS: [result_of(0.7, **worst)]})

        assert [claim["id"] for claim in table["claims"] if not claim["holds"]] == [id_]

    @pytest.mark.parametrize("dice", [0.65, 0.75])
    def test_dice_may_differ_by_a_point_either_way(self, dice):
        """
        No gain is claimed, and no harm.
        """
        table = evaluate({PLAIN: [result_of(0.7)], MOMENTS: [result_of(dice)]})

        assert [claim["id"] for claim in table["claims"] if not claim["holds"]] == ["moments_change"]


def test_discriminator_of_one_class_names_it_always_and_sends_nothing_back():
    """
    Trained on patients of one scanner it is right about others whom it never saw, and its gradient is gone.
    """
    table = AdaptationTable(adversarial="moments", scanners=("SIEMENS 3 T", "GE 1.5 T"))
    plan = contracts.example_plan().model_copy(update={"rounds": 4, "adaptation": table})
    trainer, weights = Trainer(plan, "cpu"), initial_weights(task_for(plan).build_network, 0)
    drawn = [
        [trainer.task.draw(contracts.example_volume(plan, i), np.random.default_rng(i)) for i in range(k, k + 4)]
        for k in (0, 4)
    ]
    torch.set_num_threads(1)
    accuracy, against = alone(plan, trainer, weights, "site-1", drawn, 5)

    assert accuracy == 1.0
    assert beside_the_task(trainer, weights, drawn[0], against) < 1e-3
