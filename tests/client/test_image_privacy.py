"""Privacy of single images: Opacus' gradients are the right ones, under our own rate, divisor, clip and noise."""

from __future__ import annotations

import math

import contracts
import numpy as np
import pytest
import torch
from test_private_training import Recorder, Scripted, by_loop, private_plan, trained
from test_training import cohort_of, distance, start_of
from torch import nn

from client.image_privacy import Hooked, ImageGradients, check_sample_gradients, images_of, one_image
from client.privacy import Mechanism
from client.training import Trainer
from shared_models.errors import FederadError
from shared_models.networks import NOT_BY_IMAGE
from shared_models.task import task_for
from shared_models.weights import load_weights

BY_IMAGE = [case for case in contracts.every_case() if case[1] not in NOT_BY_IMAGE]


def image_plan(case=("segmentation", "unet", 2), **tables: dict):
    return private_plan(
        case, **{**tables, "privacy": {"unit": "image", "images_per_patient": 100, **tables.get("privacy", {})}}
    )


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


class TestImages:
    def test_unit_is_a_slice_in_2d_and_a_volume_in_3d(self):
        """
        Every slice counts for itself where the network sees slices, every volume where it sees volumes.
        """
        flat, deep = (image_plan(("segmentation", "unet", n)) for n in (2, 3))

        assert len(images_of(cohort_of(flat, 2, 3, sides=(5, 8, 8)), 2, most=100)) == 2 * 3 * 5
        assert len(images_of(cohort_of(deep, 2, 3, sides=(8, 8, 8)), 3, most=100)) == 2 * 3

    def test_no_patient_has_more_images_than_the_plan_counts_on(self):
        """
        What it means for a patient follows from that number; others' images change nothing.
        """
        plan = image_plan()
        images = images_of(cohort_of(plan, 3, 2, sides=(5, 8, 8)), 2, most=7)

        assert [sum(image.study.startswith(f"p{k}-") for image in images) for k in range(3)] == [7, 7, 7]

    def test_one_slice_holds_that_slice_alone(self):
        """
        Pixels, reference and labelled voxels of other slices are gone.
        """
        volume = contracts.example_volume(image_plan(), 0, (4, 8, 8))
        z = int(volume.foreground[0, 0])
        one = one_image(volume, z)

        np.testing.assert_array_equal(one.image[:, 0], volume.image[:, z])
        np.testing.assert_array_equal(np.argwhere(one.label > 0), one.foreground)
        assert one.image.shape[1] == 1

    def test_study_that_cannot_be_read_has_no_images(self):
        """
        A lost study ends with itself.
        """
        cohort = cohort_of(image_plan(), 3)
        del cohort.volumes["p1-s0"]

        assert {image.study for image in images_of(cohort, 2, most=100)} == {"p0-s0", "p2-s0"}


class TestSampleGradients:
    @pytest.mark.parametrize("case", BY_IMAGE, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}d")
    @pytest.mark.parametrize("clip", [0.01, 100.0], ids=["all clipped", "none clipped"])
    def test_clipped_sum_is_that_of_a_loop(self, case, clip, monkeypatch):
        """
        For every network that a plan allows: the sum of clipped images equals one taken sample by sample with other tools.
        """
        plan = image_plan(case, privacy={"views": 2})
        task = task_for(plan)
        network = task.build_network().train()
        drawn: list = []
        draw = task.draw
        monkeypatch.setattr(task, "draw", lambda volume, rng: drawn.append(draw(volume, rng)) or drawn[-1])
        cohort = cohort_of(plan, 3, sides=(8, 8, 8))
        recorder = Recorder(Mechanism(sampling_rate=1.0, noise_multiplier=1.0, clip=clip, divisor=1))
        with ImageGradients(network, task, cohort, Trainer(plan, "cpu")._precision) as gradients:
            n_images = min(len(gradients), 11)
            drawn.clear()
            gradients.add_to(recorder, range(n_images), b"secret")
        expected = by_loop(network, task, [drawn[4 * i : 4 * i + 4] for i in range(n_images)], clip)

        assert len(drawn) == 4 * n_images
        assert np.linalg.norm(recorder.total.numpy() - expected) <= 1e-4 * np.linalg.norm(expected)

    def test_network_is_as_before_afterwards(self):
        """
        Outside the context no hook is left, and an ordinary backward pass works.
        """
        task = task_for(image_plan())
        network = task.build_network()
        with Hooked(network):
            assert any(module._forward_hooks for module in network.modules())
        for module in network.modules():
            assert not [*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks]
        task.loss(network(contracts.example_batch(task)[0]), contracts.example_batch(task)[1]).backward()

    @pytest.mark.parametrize("case", BY_IMAGE, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}d")
    def test_every_network_of_the_house_can_be_taken_apart(self, case):
        """
        All networks that a plan can name with images as the unit pass the check.
        """
        task = contracts.task_of(case)
        check_sample_gradients(task.build_network(), task)

    def test_parameter_used_through_two_modules_is_refused(self):
        """
        A layer that two lists hold, as in some networks, would count twice in silence.
        """
        task = contracts.task_of(("segmentation", "unet", 2))

        class Aliased(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = task.build_network()
                self.layer = nn.Conv2d(1, 1, 3, padding=1)
                self.again = nn.Sequential(self.layer)

            def forward(self, x):
                return self.body(self.layer(x))

        with pytest.raises(FederadError, match="M216"):
            check_sample_gradients(Aliased(), task)

    def test_input_in_another_memory_order_gives_the_right_gradient(self):
        """
        Opacus reads a convolution's input in row order; inputs are brought into it, whatever comes before the layer.
        """
        task = contracts.task_of(("segmentation", "unet", 2))

        class Turned(nn.Module):
            def forward(self, x):
                return x.to(memory_format=torch.channels_last) if x.shape[1] > 1 else x.mT.contiguous().mT

        network = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), Turned(), nn.Conv2d(3, 1, 3, padding=1), Turned())
        network.append(task.build_network())
        check_sample_gradients(network, task)

    def test_layer_that_overwrites_its_input_is_refused(self):
        """
        What Opacus cannot hook is refused before the first step, with a way out.
        """
        task = contracts.task_of(("segmentation", "unet", 2))
        network = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(inplace=True), task.build_network())
        with pytest.raises(FederadError, match=r"(?s)M216.*unit = .patient"):
            check_sample_gradients(network, task)

    def test_gradient_that_is_not_the_images_own_is_refused(self, monkeypatch):
        """
        A wrong gradient is noticed by comparison with an ordinary backward pass.
        """
        task = contracts.task_of(("segmentation", "unet", 2))
        real = Hooked.sample_gradients
        monkeypatch.setattr(Hooked, "sample_gradients", lambda self, *batch: 2 * real(self, *batch))
        with pytest.raises(FederadError, match=r"M216.*differs from the ordinary one by 100%"):
            check_sample_gradients(task.build_network(), task)


class TestTraining:
    def test_divisor_and_rate_are_the_plans(self):
        """
        One slice alone, clipped, moves the weights by lr C / B; the coins have the declared rate.
        """
        plan = image_plan(privacy={"clip": 1e-3, "patients_per_step": 8, "steps_per_round": 1})
        source = Scripted(takes_part=1)
        update = trained(plan, cohort_of(plan, 2, sides=(4, 8, 8)), source, declared_size=80)

        assert distance(update) == pytest.approx(0.1 * 1e-3 / 8, rel=1e-3)
        assert source.rates == [0.1]
        (sigma,) = source.sigmas
        assert 2**20 <= sigma < 2**21

    def test_bad_image_changes_nothing_for_the_others(self):
        """
        A study without a reference, or with values that are not finite, gives zero.
        """
        plan = image_plan(privacy={"clip": 0.05})
        cohort = cohort_of(plan, 3)
        whole = trained(plan, cohort, Scripted(takes_part=2))
        cohort.volumes["p2-s0"].image.fill(math.nan)
        spoilt = trained(plan, cohort, Scripted(takes_part=3))

        assert distance({n: whole[n] - spoilt[n] for n in whole}) < 1e-4 * distance(whole)

    def test_nobody_gets_noise_all_the_same(self):
        """
        An empty batch of images is noised like any other.
        """
        plan = image_plan()
        source = Scripted(takes_part=0, noise=True)
        update = trained(plan, cohort_of(plan, 2), source)

        assert all((part != 0).mean() > 0.8 for part in update.values())

    def test_smaller_physical_batches_give_the_same_update(self, monkeypatch):
        """
        Where images do not fit into memory together they are taken in halves; one that does not fit alone is silent.
        """
        plan = image_plan(privacy={"steps_per_round": 1})
        cohort = cohort_of(plan, 5)
        whole = trained(plan, cohort, Scripted())
        real = Hooked.sample_gradients
        tried: list[int] = []

        def limited(self, task, batch, *precision):
            if precision:
                tried.append(len(batch[0]))
                if len(batch[0]) > limit:
                    raise torch.OutOfMemoryError("CUDA out of memory")
            return real(self, task, batch, *precision)

        monkeypatch.setattr(Hooked, "sample_gradients", limited)
        limit = 2
        parts = trained(plan, cohort, Scripted())
        assert tried == [10, 4, 2, 2, 6, 2, 4, 2, 2]
        assert distance({n: whole[n] - parts[n] for n in whole}) < 1e-4 * distance(whole)
        limit = 1
        assert distance(trained(plan, cohort, Scripted())) == 0

    def test_mixed_precision_trains_as_well(self):
        """
        With bfloat16 the update stays near that of float32.
        """
        exact, mixed = (
            trained(image_plan(training={"precision": p}), cohort_of(image_plan()), Scripted())
            for p in ("float32", "bfloat16")
        )

        assert 0 < distance({n: exact[n] - mixed[n] for n in exact}) < 0.3 * distance(exact)

    def test_trainer_measures_as_before_afterwards(self):
        """
        A trainer that has been through image-level training answers other questions unchanged.
        """
        plan = image_plan()
        cohort, trainer = cohort_of(plan), Trainer(plan, "cpu", randomness=Scripted())
        load_weights(trainer.network, start_of(plan))
        before = trainer.measure(start_of(plan), cohort, "validation")
        trainer.train_private(start_of(plan), cohort, round_=1, declared_size=4, noise_multiplier=1.0)

        assert trainer.measure(start_of(plan), cohort, "validation") == before
