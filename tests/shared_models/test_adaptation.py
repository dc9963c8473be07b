"""Samples that look like other scanners', and features that learn to hide theirs without harm."""

from __future__ import annotations

import math
from dataclasses import replace

import contracts
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shared_models.adaptation import (
    UNKNOWN,
    Adapted,
    find_taps,
    joined,
    left_of_adversary,
    randomised,
    sample_of,
    strength_at,
)
from shared_models.errors import FederadError
from shared_models.plan import Plan
from shared_models.scanners import ScannerTable
from shared_models.task import Task, task_for
from shared_models.tasks import OF_KSPACE, WITH_NUMBERS

CASES = contracts.every_case()

N_SCANNERS = len(ScannerTable(None))

ADVERSARY = {"adversarial": "scanner", "warm_up": 0.0}

READERS = [
    (case, reads) for case in CASES for reads in (None, "predictions") if reads is None or case[0] == "segmentation"
]
"""Every case with everything that a discriminator may read there."""


def plan_with(case: tuple[str, str, int] = ("segmentation", "unet", 2), **adaptation: object) -> Plan:
    return contracts.example_plan(*case, adaptation={**ADVERSARY, **adaptation})


def gradients(
    network: nn.Module,
    task: Task,
    batch: contracts.Batch,
    scanner: list[int],
    strength: float = 1.0,
    of: int | None = None,
) -> dict[str, Tensor]:
    """Of every parameter, after one backward pass with the adversary; of the loss of one sample alone."""
    assert isinstance(network, Adapted)
    torch.manual_seed(0)
    network.zero_grad(set_to_none=True)
    output = network.train()(batch[0])
    one = slice(None) if of is None else slice(of, of + 1)
    network.oppose(torch.tensor(scanner), batch[1], torch.ones(len(scanner), dtype=torch.bool), strength=strength)
    task.loss(output[one], batch[1][one]).backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


class TestAppearance:
    def test_sample_looks_otherwise_and_shows_the_same(self):
        """
        Most intensities change, the anatomy does not: edges stay where they were, mean and spread about what they were.
        """
        rng = np.random.default_rng(0)
        image = np.zeros((1, 48, 48), np.float32)
        image[:, 12:36, 12:36] = 2.0
        image += rng.normal(0, 0.1, image.shape).astype(np.float32)
        changed = [randomised(image, np.random.default_rng(i)) for i in range(20)]

        assert all(c.shape == image.shape and c.dtype == np.float32 and np.isfinite(c).all() for c in changed)
        assert 0.6 < np.mean([np.abs(c - image).mean() > 0.02 for c in changed]) < 1
        assert np.mean([abs(np.corrcoef(c.ravel(), image.ravel())[0, 1]) for c in changed]) > 0.8
        assert abs(np.mean([c.mean() for c in changed]) - image.mean()) < 0.2

    def test_outside_that_was_cut_away_stays_empty(self):
        """
        Zero means outside of the body there, and is no intensity of it.
        """
        image = np.zeros((1, 4, 8, 8), np.float32)
        image[:, :, 2:6, 2:6] = np.random.default_rng(0).normal(size=(1, 4, 4, 4))

        changed = randomised(image, np.random.default_rng(1))

        assert (changed[image == 0] == 0).all()
        assert (randomised(np.zeros_like(image), np.random.default_rng(1)) == 0).all()

    def test_own_random_numbers_decide_and_nothing_else(self):
        """
        The same stream gives the same sample, another one another.
        """
        image = np.random.default_rng(0).normal(size=(2, 16, 16)).astype(np.float32)

        assert np.array_equal(randomised(image, np.random.default_rng(3)), randomised(image, np.random.default_rng(3)))
        assert not np.array_equal(
            randomised(image, np.random.default_rng(3)), randomised(image, np.random.default_rng(4))
        )

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_every_task_draws_such_samples(self, case):
        """
        The target is what it is without, the image is not; what is measured of another magnitude has another target.
        """
        plan = contracts.example_plan(*case, adaptation={"appearance": True})
        volume = contracts.example_volume(plan)
        plain = task_for(contracts.example_plan(*case)).draw(volume, np.random.default_rng(5))
        sample = sample_of(task_for(plan), volume, np.random.default_rng(5))

        assert np.array_equal(sample.target, plain.target) == (case[0] not in OF_KSPACE)
        assert sample.image.shape == plain.image.shape
        assert not np.array_equal(sample.image, plain.image)

    @pytest.mark.parametrize("kind", ["segmentation", "classification"])
    def test_study_without_reference_is_drawn_where_the_plan_takes_it(self, kind):
        """
        It says so, and has a target of the usual shape in its place; elsewhere it is an error as ever.
        """
        plan = contracts.example_plan(kind, adaptation=ADVERSARY)
        volume = replace(
            contracts.example_volume(plan), label=None, category=None, foreground=np.empty((0, 3), np.int32)
        )
        sample = sample_of(task_for(plan), volume, np.random.default_rng(0))

        assert not sample.has_reference
        with pytest.raises(ValueError, match="cannot be trained on"):
            sample_of(task_for(contracts.example_plan(kind)), volume, np.random.default_rng(0))


class TestAdversary:
    @pytest.mark.parametrize(("case", "reads"), READERS, ids=str)
    def test_network_answers_as_without(self, case, reads):
        """
        Its own parameters and its output are those of the plain network of the same seed.
        """
        torch.manual_seed(1)
        plain = task_for(contracts.example_plan(*case)).build_network().eval()
        torch.manual_seed(1)
        adapted = task_for(plan_with(case, reads=reads)).build_network().eval()
        image = contracts.example_batch(task_for(contracts.example_plan(*case)))[0]

        with torch.inference_mode():
            torch.testing.assert_close(adapted(image), plain(image), rtol=0, atol=0)

    @pytest.mark.parametrize(("case", "reads"), READERS, ids=str)
    def test_reversed_gradient_moves_features_and_stays_within_its_ratio(self, case, reads):
        """
        Both parts learn; however strong the adversary, features, or predictions where it reads these, are moved by no more
        than the ratio of the task's gradient.
        """
        plan = plan_with(case, gradient_ratio=0.1, reads=reads)
        task = task_for(plan)
        network, batch = task.build_network(), contracts.example_batch(task)
        without = gradients(network, task, batch, [0, 1, 0, 1], strength=0.0)
        with_it = gradients(network, task, batch, [0, 1, 0, 1], strength=1e6)
        moved = {name: (with_it[name] - without[name]).norm() for name in without if name.startswith("network.")}

        assert all(with_it[name].norm() > 0 for name in with_it if name.endswith("weight") and "discriminator" in name)
        assert max(moved.values()) > 0
        total = torch.stack([without[name].norm() for name in moved]).norm()
        assert torch.stack(list(moved.values())).norm() < total

    @pytest.mark.parametrize(
        ("case", "asked"),
        [(case, {"reads": reads}) for case, reads in READERS]
        + [(case, {"conditional": True}) for case in CASES if case[0] not in WITH_NUMBERS | OF_KSPACE],
        ids=str,
    )
    def test_nobody_moves_the_gradient_of_another(self, case, asked):
        """
        With the adversary, too, a patient's own gradient does not depend on who shares the batch.
        """
        task = task_for(plan_with(case, **asked))
        network, batch = task.build_network(), contracts.example_batch(task)
        scanner = [1, UNKNOWN, UNKNOWN, UNKNOWN]
        among_some = gradients(network, task, batch, scanner, of=0)
        among_others = gradients(network, task, contracts.in_other_company(batch), scanner, of=0)

        for name, gradient in among_some.items():
            torch.testing.assert_close(among_others[name], gradient, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("asked", [{}, {"reads": "predictions"}, {"conditional": True}], ids=str)
    def test_scanners_of_other_sites_are_neither_learned_nor_unlearned(self, asked):
        """
        Between two scanners of a site the discriminator decides alone: what it says of all others gets no gradient, also
        where a study of the batch names no scanner.
        """
        plan = plan_with(**asked)
        task = task_for(plan)
        network, batch = task.build_network(), contracts.example_batch(task)
        assert isinstance(network, Adapted)
        network.train()(batch[0])
        scanner = torch.tensor([1, 3, UNKNOWN, 3])
        network.oppose(scanner, batch[1], torch.ones(4, dtype=torch.bool), strength=1.0, among=(1, 3))
        last = list(network.discriminator.parameters())[-2:]

        for parameter in last:
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
            of_scanner = parameter.grad.unflatten(0, (-1, N_SCANNERS)).movedim(1, 0).flatten(1).abs().sum(1)
            assert {i for i, size in enumerate(of_scanner.tolist()) if size > 0} == {1, 3}

    def test_unknown_scanners_are_left_alone(self):
        """
        A batch of which no scanner is known is trained as without adversary.
        """
        task = task_for(plan_with())
        network, batch = task.build_network(), contracts.example_batch(task)
        opposed = gradients(network, task, batch, [UNKNOWN] * 4)

        assert not [name for name in opposed if name.startswith("discriminator")]

    def test_bound_of_a_sample_is_its_own(self):
        """
        Somebody with a long gradient in the batch lets nobody else's adversary grow.
        """
        against, has = torch.tensor([[1e6, 0.0], [0.0, 1e6]]), torch.tensor([True, True])
        among_some = joined(torch.tensor([[3.0, 4.0], [0.1, 0.0]]), against, has, 0.1)
        among_others = joined(torch.tensor([[3.0, 4.0], [900.0, 0.0]]), against, has, 0.1)

        torch.testing.assert_close(among_some[0], torch.tensor([3.5, 4.0]))
        torch.testing.assert_close(among_others[0], among_some[0])

    def test_sample_without_reference_is_bounded_by_the_others(self):
        """
        Where the task says nothing, the mean of what it says of the others bounds the adversary; alone, nothing does.
        """
        task_gradient = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        against = torch.tensor([[1e6, 0.0], [0.0, 1e6]])

        moved = joined(task_gradient, against, torch.tensor([True, False]), 0.1)
        alone = joined(task_gradient[1:], against[1:], torch.tensor([False]), 0.1)

        torch.testing.assert_close(moved, torch.tensor([[3.5, 4.0], [0.0, 0.5]]))
        torch.testing.assert_close(alone, against[1:])

    def test_discriminator_learns_and_features_unlearn(self):
        """
        On scanners that differ in brightness the discriminator's loss falls without reversal, and stays higher with it.
        """
        final = {}
        for strength in (0.0, 3.0):
            torch.manual_seed(0)
            task = task_for(plan_with(gradient_ratio=1.0))
            network = task.build_network().train()
            assert isinstance(network, Adapted)
            optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
            image, target = contracts.example_batch(task, n_patients=8)
            scanner = torch.arange(8) % 2
            image = image + 2.0 * scanner.view(-1, 1, 1, 1) * image.sign()
            for _ in range(60):
                optimizer.zero_grad()
                loss = task.loss(network(image), target)
                network.oppose(scanner, target, torch.ones(8, dtype=torch.bool), strength=strength)
                loss.backward()
                optimizer.step()
            network(image)
            network.oppose(scanner, target, torch.ones(8, dtype=torch.bool), strength=0.0)
            final[strength] = float(
                torch.stack([p.grad.norm() for p in network.discriminator.parameters() if p.grad is not None]).norm()
            )

        assert final[0.0] < final[3.0]

    def test_predictions_learn_to_hide_what_no_reference_teaches(self):
        """
        Where outlines are found at one scanner alone, a discriminator of predictions moves the other's, which have no
        reference, until about as much is outlined there.
        """
        found = {}
        for strength in (0.0, 3.0):
            torch.manual_seed(0)
            task = task_for(plan_with(gradient_ratio=1.0, reads="predictions"))
            network = task.build_network().train()
            assert isinstance(network, Adapted)
            optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
            image, target = contracts.example_batch(task, n_patients=8)
            scanner, has = torch.arange(8) % 2, torch.arange(8) % 2 == 0
            image = torch.where(has.view(-1, 1, 1, 1), image, -image)
            for _ in range(80):
                optimizer.zero_grad()
                loss = task.loss(network(image)[has], target[has])
                network.oppose(scanner, target, has, strength=strength)
                loss.backward()
                optimizer.step()
            with torch.inference_mode():
                outlined = network.eval()(image).softmax(1)[:, 1].flatten(1).mean(1)
            found[strength] = abs(float(outlined[has].mean() - outlined[~has].mean()))

        assert found[3.0] < found[0.0] / 2

    def test_variance_that_a_network_says_beside_its_logits_is_not_read(self):
        """
        A discriminator of predictions sees one probability for each label, whatever else the network answers.
        """
        plan = contracts.example_plan(
            adaptation={**ADVERSARY, "reads": "predictions"}, training={"loss": "heteroscedastic"}
        )
        task = task_for(plan)
        batch = contracts.example_batch(task)
        network = task.build_network()
        assert isinstance(network, Adapted)

        assert network(batch[0]).shape[1] == len(plan.task.labels) + 1
        assert any(name.startswith("discriminator") for name in gradients(network, task, batch, [0, 1, 0, 1]))

    def test_network_without_features_is_refused(self):
        """
        A network of no activation has nothing that a discriminator could read.
        """
        with pytest.raises(FederadError) as error:
            find_taps(nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 8, 8))

        assert error.value.code == "P110"

    def test_discriminator_takes_a_bounded_part_of_a_clip(self):
        """
        Under privacy one norm covers both; the discriminator's share is the ratio of the network's.
        """
        task = task_for(plan_with(gradient_ratio=0.05))
        network = task.build_network()
        assert isinstance(network, Adapted)
        gradients(network, task, contracts.example_batch(task), [0, 1, 2, 3])
        network.bound_discriminator()
        own, rest = (
            math.sqrt(sum(float((p.grad**2).sum()) for p in part.parameters() if p.grad is not None))
            for part in (network.discriminator, network.network)
        )

        assert own <= 0.05 * rest * (1 + 1e-5)


class TestSchedule:
    def test_reversal_waits_and_then_rises_to_its_strength(self):
        """
        The task comes first; in the last round the plan's strength is reached.
        """
        table = contracts.example_plan(
            adaptation={"adversarial": "scanner", "strength": 0.5, "warm_up": 0.25}
        ).adaptation
        course = [strength_at(table, round_, 21) for round_ in range(1, 22)]

        assert course[:6] == [0.0] * 6
        assert course[6:] == sorted(course[6:])
        assert course[-1] == pytest.approx(0.5, rel=1e-3)
        assert strength_at(None, 3, 21) == 0.0

    def test_fall_of_held_out_quality_halves_and_then_stops_it(self):
        """
        One fall costs half, a second one the rest; noise within the tolerance costs nothing, nor do three bad rounds, which
        any run with few held-out patients has.
        """
        plan = contracts.example_plan(adaptation=ADVERSARY).model_copy(update={"rounds": 40})
        steady = [0.6, 0.61, 0.6, 0.605] * 5

        assert left_of_adversary(plan, []) == 1.0
        assert left_of_adversary(plan, steady) == 1.0
        assert left_of_adversary(plan, [None] * 20) == 1.0
        assert left_of_adversary(plan, [*steady, 0.5, 0.5, 0.5, *steady]) == 1.0
        assert left_of_adversary(plan, [*steady, *[0.5] * 4]) == 0.5
        assert left_of_adversary(plan, [*steady, *[0.5] * 11, *[0.3] * 4]) == 0.0

    def test_what_fell_before_it_began_is_not_its_fault(self):
        """
        Rounds of the warm-up are not compared.
        """
        plan = contracts.example_plan(adaptation={"adversarial": "scanner", "warm_up": 0.5}).model_copy(
            update={"rounds": 40}
        )

        assert left_of_adversary(plan, [0.9, 0.9, 0.9, *[0.4] * 20]) == 1.0
