"""The local loop, on patients that live in memory."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace

import contracts
import laws
import numpy as np
import pytest
import torch

from client.training import Trainer, build_optimizer, choose_device, learning_rate, resident_trainer
from shared_models.plan import Plan
from shared_models.task import mean_metrics, task_for
from shared_models.volume import Volume
from shared_models.weights import Weights, initial_weights, load_weights, weights_of


@dataclass(frozen=True)
class Person:
    """A patient with named studies."""

    key: str
    studies: tuple[str, ...]


@dataclass
class Cohort:
    """Volumes in memory; counts how often each study is read."""

    volumes: dict[str, Volume]
    people: dict[str, list[Person]]
    read: Counter[str] = field(default_factory=Counter)

    def patients(self, split: str) -> list[Person]:
        return self.people.get(split, [])

    def volume(self, study: str) -> Volume:
        self.read[study] += 1
        return self.volumes[study]


def cohort_of(plan: Plan, n_patients: int = 4, n_studies: int = 1, sides: tuple[int, int, int] | None = None) -> Cohort:
    """Patients to train on, two of whom are measured as well."""
    people = [Person(f"p{i}", tuple(f"p{i}-s{j}" for j in range(n_studies))) for i in range(n_patients)]
    studies = [study for person in people for study in person.studies]
    volumes = {study: contracts.example_volume(plan, i, sides) for i, study in enumerate(studies)}
    return Cohort(volumes, {"train": people, "validation": people[:2]})


def plan_with(training: dict | None = None, **tables: dict) -> Plan:
    table = {"optimizer": "adamw", "learning_rate": 0.01, "samples_per_patient": 2, "batch_size": 3}
    return contracts.example_plan(training={**table, **(training or {})}, **tables)


def start_of(plan: Plan) -> Weights:
    return initial_weights(task_for(plan).build_network, 0)


def trained(plan: Plan, cohort: Cohort, **place: object):
    return Trainer(plan, "cpu").train(start_of(plan), cohort, **{"seed": 0, "site": "site-1", "round_": 1, **place})


def distance(update: Weights) -> float:
    return float(np.sqrt(sum((array.astype(np.float64) ** 2).sum() for array in update.values())))


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


class TestSameTraining:
    @pytest.mark.parametrize("dimensions", [2, 3])
    def test_same_seed_gives_the_same_update_bit_for_bit(self, dimensions):
        """
        Training depends on the question alone: not on the trainer's past, nor on anybody's random numbers.
        """
        plan = plan_with(dimensions=dimensions)
        cohort = cohort_of(plan, sides=(8, 16, 16))
        fresh = trained(plan, cohort)
        used = Trainer(plan, "cpu")
        used.train(start_of(plan), cohort, seed=5, site="another", round_=9)
        used.measure(start_of(plan), cohort, "validation")
        torch.rand(10)
        again = used.train(start_of(plan), cohort, seed=0, site="site-1", round_=1)

        laws.assert_same_bits(again.update, fresh.update)
        assert (again.loss, again.n_patients) == (fresh.loss, 4)

    @pytest.mark.parametrize("place", [{"seed": 1}, {"site": "site-2"}, {"round_": 2}], ids=str)
    def test_other_seed_site_or_round_gives_another_update(self, place):
        """
        No two sites, rounds or runs draw the same patches.
        """
        plan = plan_with()
        cohort = cohort_of(plan, sides=(8, 16, 16))

        assert distance_between(trained(plan, cohort).update, trained(plan, cohort, **place).update) > 0

    def test_epochs_of_a_round_differ(self):
        """
        The second pass over the patients draws other patches than the first.
        """
        plan = plan_with({"samples_per_patient": 1, "batch_size": 1, "epochs": 2})
        cohort, seen = cohort_of(plan, n_patients=1, sides=(8, 32, 32)), []
        trainer = Trainer(plan, "cpu")
        draw = trainer.task.draw
        trainer.task.draw = lambda volume, rng: seen.append(draw(volume, rng)) or seen[-1]
        trainer.train(start_of(plan), cohort, seed=0, site="site-1", round_=1)

        assert len(seen) == 2
        assert not np.array_equal(seen[0].image, seen[1].image)

    def test_incoming_weights_are_left_as_they_were(self):
        """
        Weights are views into a message; training reads them and writes elsewhere.
        """
        plan = plan_with()
        weights = start_of(plan)
        before = {name: array.tobytes() for name, array in weights.items()}
        for array in weights.values():
            array.flags.writeable = False
        Trainer(plan, "cpu").train(weights, cohort_of(plan), seed=0, site="site-1", round_=1)

        assert {name: array.tobytes() for name, array in weights.items()} == before

    def test_update_is_new_minus_old(self):
        """
        Old weights plus the update are the trained ones, and the update is not a view that later training changes.
        """
        plan, trainer = plan_with(), Trainer(plan_with(), "cpu")
        cohort, weights = cohort_of(plan), start_of(plan)
        update = trainer.train(weights, cohort, seed=0, site="site-1", round_=1).update
        after = weights_of(trainer.network)
        trainer.train(weights, cohort, seed=0, site="site-1", round_=2)

        laws.assert_same_bits(update, {name: after[name] - weights[name] for name in weights})


def distance_between(one: Weights, other: Weights) -> float:
    return distance({name: one[name] - other[name] for name in one})


def whole_volume_plan(**training: object) -> Plan:
    """A plan whose samples are whole volumes, so that chance has no say."""
    table = {"foreground": 0.0, "flips": False, "samples_per_patient": 1, "batch_size": 4, "learning_rate": 0.1}
    return contracts.example_plan(training={**table, "optimizer": "sgd", **training})


def by_hand(plan: Plan, cohort: Cohort, n_steps: int, mu: float = 0.0) -> Weights:
    """Gradient descent in a few lines: all patients in each step, decay and proximal term added to the gradient."""
    task, start = task_for(plan), start_of(plan)
    network = task.build_network()
    load_weights(network, start)
    volumes = list(cohort.volumes.values())
    image = torch.stack([torch.from_numpy(volume.image[:, 0]) for volume in volumes])
    target = torch.stack([torch.from_numpy(volume.label.astype(np.int64)) for volume in volumes])
    weights = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    for _ in range(n_steps):
        leaves = {name: value.requires_grad_() for name, value in weights.items()}
        loss = task.loss(torch.func.functional_call(network, leaves, (image,)), target)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        weights = {
            name: (
                w
                - plan.training.learning_rate
                * (g + plan.training.weight_decay * w + mu * (w - torch.from_numpy(start[name])))
            ).detach()
            for (name, w), g in zip(leaves.items(), gradients, strict=True)
        }
    return {name: value.numpy() - start[name] for name, value in weights.items()}


class TestSteps:
    def assert_as_by_hand(self, plan: Plan, n_steps: int, mu: float = 0.0) -> None:
        cohort = cohort_of(plan)
        expected = by_hand(plan, cohort, n_steps, mu)
        update = trained(plan, cohort).update

        assert distance(expected) > 1e-3
        for name in expected:
            np.testing.assert_allclose(update[name], expected[name], rtol=1e-3, atol=2e-6, err_msg=name)

    def test_one_step_is_that_of_an_independent_gradient(self):
        """
        One step of gradient descent is minus learning rate times the gradient of the mean loss.
        """
        self.assert_as_by_hand(whole_volume_plan(), 1)

    def test_weight_decay_shrinks_weights(self):
        """
        Three steps with weight decay agree with the formula.
        """
        self.assert_as_by_hand(whole_volume_plan(epochs=3, weight_decay=0.1), 3)

    def test_proximal_term_pulls_back_to_the_start_of_the_round(self):
        """
        Three steps of FedProx agree with equation 2 of its paper (arXiv:1812.06127).
        """
        plan = whole_volume_plan(epochs=3)
        table = {**json.loads(plan.canonical_json()), "strategy": {"name": "fedprox", "proximal_mu": 2.0}}

        self.assert_as_by_hand(Plan.from_tables(table), 3, mu=2.0)

    @pytest.mark.parametrize(
        ("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
    )
    def test_optimiser_is_the_one_of_the_plan(self, name, kind):
        """
        Each optimiser comes with the plan's learning rate and weight decay.
        """
        plan = plan_with({"optimizer": name, "learning_rate": 0.25, "weight_decay": 0.125})
        optimizer = build_optimizer(plan, torch.nn.Linear(2, 2), 1)

        assert type(optimizer) is kind
        assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.25, 0.125)

    def test_momentum_of_sgd_looks_ahead(self):
        """
        Two steps along a slope of 1 with momentum 0.5 and rate 1, as Nesterov's method takes them: 1.5, then 1.75.
        """
        weight = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(weight.weight)
        plan = plan_with({"optimizer": "sgd", "momentum": 0.5, "learning_rate": 1.0})
        optimizer, passed = build_optimizer(plan, weight, 1), []
        for _ in range(2):
            weight.weight.grad = torch.ones(1, 1)
            optimizer.step()
            passed.append(-weight.weight.item())

        assert passed == [1.5, 3.25]

    def test_rate_falls_along_half_a_cosine_over_the_rounds(self):
        """
        With schedule = "cosine" the rate starts at the plan's, is half of it in the middle and near nothing at the end.
        """
        plan = plan_with({"schedule": "cosine", "learning_rate": 0.5})
        plan = plan.model_copy(update={"rounds": 100})
        rates = [learning_rate(plan, round_) for round_ in range(1, 101)]

        assert rates[0] == 0.5
        assert rates[50] == pytest.approx(0.25)
        assert 0 < rates[-1] < 0.5 / 1000
        assert rates == sorted(rates, reverse=True)
        assert build_optimizer(plan, torch.nn.Linear(2, 2), 51).param_groups[0]["lr"] == rates[50]

    def test_constant_rate_is_that_of_the_plan_in_every_round(self):
        """
        Without a schedule the last round trains like the first.
        """
        assert {learning_rate(plan_with(), round_) for round_ in (1, 2, 1000)} == {0.01}

    def test_later_round_of_a_schedule_takes_smaller_steps(self):
        """
        The schedule reaches the training itself: with the same samples a late step is as much shorter as its rate.
        """
        plan = whole_volume_plan(schedule="cosine").model_copy(update={"rounds": 4})
        cohort = cohort_of(plan)
        first, third = trained(plan, cohort).update, trained(plan, cohort, round_=3).update

        assert distance(third) == pytest.approx(0.5 * distance(first), rel=1e-3)

    @pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
    def test_loss_falls_over_thirty_steps(self, optimizer):
        """
        Each optimiser learns: after thirty steps the loss is well below that of the first five.
        """
        rate = 0.1 if optimizer == "sgd" else 0.02
        plan = plan_with({"optimizer": optimizer, "learning_rate": rate, "batch_size": 4, "samples_per_patient": 5})
        cohort, trainer, weights, losses = cohort_of(plan, sides=(4, 12, 12)), Trainer(plan, "cpu"), start_of(plan), []
        for round_ in range(1, 7):
            outcome = trainer.train(weights, cohort, seed=0, site="site-1", round_=round_)
            weights = {name: weights[name] + outcome.update[name] for name in weights}
            losses.append(outcome.loss)

        assert losses[-1] < 0.8 * losses[0]


class TestFedProx:
    def plan(self, mu: float | None) -> Plan:
        strategy = {"name": "fedavg"} if mu is None else {"name": "fedprox", "proximal_mu": mu}
        return plan_with({"optimizer": "sgd", "learning_rate": 1e-3, "epochs": 3}, strategy=strategy)

    def test_without_weight_it_is_fedavg_bit_for_bit(self):
        """
        A proximal term of weight 0 changes nothing.
        """
        cohort = cohort_of(self.plan(None))

        laws.assert_same_bits(trained(self.plan(0.0), cohort).update, trained(self.plan(None), cohort).update)

    def test_stronger_pull_stays_closer(self):
        """
        The larger the weight of the proximal term, the closer the update stays to the start.
        """
        cohort = cohort_of(self.plan(None))
        lengths = [distance(trained(self.plan(mu), cohort).update) for mu in (0.0, 10.0, 100.0, 900.0)]

        assert lengths == sorted(lengths, reverse=True)
        assert lengths[-1] < 0.5 * lengths[0]


class TestVisits:
    def test_every_patient_is_visited_as_often_as_the_plan_says(self):
        """
        In every epoch each patient is drawn samples_per_patient times, however many studies there are.
        """
        plan = plan_with({"samples_per_patient": 5, "epochs": 3, "batch_size": 4})
        cohort = cohort_of(plan, n_patients=3, n_studies=2)
        trained(plan, cohort)
        visits = Counter({person.key: sum(cohort.read[s] for s in person.studies) for person in cohort.people["train"]})

        assert visits == {"p0": 15, "p1": 15, "p2": 15}
        assert len(cohort.read) == 6

    def test_batches_have_the_plans_size_and_the_last_may_be_smaller(self):
        """
        Seven visits in batches of three are two batches of three and one of one.
        """
        plan = plan_with({"samples_per_patient": 1, "batch_size": 3})
        trainer, sizes = Trainer(plan, "cpu"), []
        trainer.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        trainer.train(start_of(plan), cohort_of(plan, n_patients=7), seed=0, site="site-1", round_=1)

        assert sizes == [3, 3, 1]

    def test_patients_are_met_in_random_order(self):
        """
        Visits are shuffled, and anew in each round.
        """
        plan = plan_with({"samples_per_patient": 1, "batch_size": 1})
        cohort = cohort_of(plan, n_patients=8)
        orders = []
        for round_ in (1, 2):
            cohort.read.clear()
            trained(plan, cohort, round_=round_)
            orders.append(list(cohort.read))

        assert sorted(orders[0]) == sorted(orders[1])
        assert orders[0] != orders[1] != sorted(orders[1])

    def test_test_and_validation_patients_are_never_trained_on(self):
        """
        Training reads the volumes of its own split and no other.
        """
        plan = plan_with()
        cohort = cohort_of(plan)
        people = cohort.people["train"]
        cohort.people = {"train": people[:2], "validation": people[2:3], "test": people[3:]}
        trained(plan, cohort)

        assert set(cohort.read) == {"p0-s0", "p1-s0"}

    def test_site_without_training_patients_moves_nothing(self):
        """
        An empty cohort trains on no patients, and its update is zero.
        """
        plan = plan_with()
        outcome = trained(plan, Cohort({}, {}))

        assert (outcome.n_patients, outcome.loss) == (0, 0.0)
        assert distance(outcome.update) == 0.0


class TestMeasure:
    def test_patients_of_the_split_are_measured_by_key(self):
        """
        Every patient of the split gets every metric, and nobody else does.
        """
        plan = plan_with()
        measured = Trainer(plan, "cpu").measure(start_of(plan), cohort_of(plan), "validation")

        assert list(measured) == ["p0", "p1"]
        assert all(set(metrics) >= set(task_for(plan).metrics) for metrics in measured.values())

    def test_studies_of_a_patient_are_averaged_first(self):
        """
        A patient with three studies counts once, with their mean.
        """
        plan = plan_with()
        cohort, trainer = cohort_of(plan, n_patients=1, n_studies=3), Trainer(plan, "cpu")
        together = trainer.measure(start_of(plan), cohort, "train")["p0"]
        cohort.people = {"train": [Person(study, (study,)) for study in cohort.volumes]}
        alone = trainer.measure(start_of(plan), cohort, "train")

        for name, value in together.items():
            assert value == pytest.approx(np.mean([metrics[name] for metrics in alone.values()]))

    def test_split_without_patients_measures_nothing(self):
        """
        Where nobody is, there is nothing to report, and no mean of it.
        """
        plan = plan_with()

        assert Trainer(plan, "cpu").measure(start_of(plan), cohort_of(plan), "test") == {}
        assert mean_metrics([]) == {}

    def test_measuring_changes_no_weights(self):
        """
        Validation looks and does not touch.
        """
        plan = plan_with()
        trainer, weights = Trainer(plan, "cpu"), start_of(plan)
        trainer.measure(weights, cohort_of(plan), "validation")

        laws.assert_same_bits(weights_of(trainer.network), weights)


class TestPrecision:
    def test_mixed_precision_trains_and_measures(self):
        """
        With bfloat16 the update is float32, finite, and near the one of full precision.
        """
        plan = plan_with({"precision": "bfloat16", "optimizer": "sgd"})
        full = plan_with({"optimizer": "sgd"})
        cohort = cohort_of(plan)
        half_update, full_update = trained(plan, cohort).update, trained(full, cohort).update
        measured = Trainer(plan, "cpu").measure(start_of(plan), cohort, "validation")

        assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in half_update.values())
        assert 0 < distance_between(half_update, full_update) < 0.2 * distance(full_update)
        assert all(np.isfinite(value) for metrics in measured.values() for value in metrics.values())


class TestTrainer:
    def test_one_trainer_serves_a_plan_and_the_next_plan_replaces_it(self):
        """
        A process that serves many sites holds one network.
        """
        plan, other = plan_with(), plan_with({"epochs": 2})
        first = resident_trainer(plan, "cpu")

        assert resident_trainer(replace_nothing(plan), "cpu") is first
        assert resident_trainer(other, "cpu") is not first
        assert resident_trainer.cache_info().currsize == 1

    def test_device_is_the_one_that_was_asked_for(self):
        """
        A hospital's choice stands; without one a GPU is taken where there is one.
        """
        assert choose_device("cpu") == "cpu"
        assert choose_device("cuda:1") == "cuda:1"
        assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


def replace_nothing(plan: Plan) -> Plan:
    """An equal plan that is another object."""
    return Plan.model_validate_json(plan.canonical_json())


class TestLabelless:
    def test_study_without_a_reference_is_not_trained_on_in_silence(self):
        """
        A volume nobody has drawn in stops the training instead of teaching that everything is background.
        """
        plan = plan_with()
        cohort = cohort_of(plan, n_patients=1)
        cohort.volumes = {study: replace(volume, label=None) for study, volume in cohort.volumes.items()}

        with pytest.raises(ValueError, match="reference"):
            trained(plan, cohort)


class TestProgress:
    @pytest.mark.parametrize("epochs", [1, 3])
    def test_every_step_is_told_and_changes_nothing(self, epochs):
        """
        Whoever listens hears each step of the steps there are, and the update is the same as without a listener.
        """
        plan = plan_with({"epochs": epochs})
        cohort = cohort_of(plan)
        told: list[tuple[int, int]] = []
        heard = trained(plan, cohort, on_progress=lambda done, total: told.append((done, total)))
        unheard = trained(plan, cohort)

        n_steps = epochs * 3  # 4 patients of 2 samples each make 8, in batches of 3
        assert told == [(step, n_steps) for step in range(1, n_steps + 1)]
        assert all(heard.update[name].tobytes() == unheard.update[name].tobytes() for name in heard.update)
