"""Reconstruction: what a sample holds, what a cascade keeps, how images are measured."""

from __future__ import annotations

from dataclasses import replace

import contracts
import numpy as np
import pytest
import torch
from contracts import example_plan

from shared_models import mri, stability
from shared_models.adaptation import sample_of
from shared_models.compressed_sensing import wavelet_reconstruction
from shared_models.errors import FederadError
from shared_models.plan import AdaptationTable
from shared_models.task import task_for
from shared_models.volume import Volume


def a_plan(*, coils=1, patch=(64, 48), network="cascade", **task):
    keys = {"acceleration": 4.0, "centre_fraction": 0.1, **task}
    return example_plan("reconstruction", network, task=keys, data={"coils": coils, "patch": list(patch)})


def a_head(coils=1, n_slices=2, shape=(64, 48), seed=0):
    """Ellipses with a phase, as the coils of a ring see them."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    planes = []
    for _ in range(n_slices):
        plane = 1.0 * (np.hypot(y / 0.85, x / 0.8) < 1)
        for _ in range(6):
            cy, cx, radius = rng.uniform(-0.5, 0.5), rng.uniform(-0.5, 0.5), rng.uniform(0.05, 0.3)
            plane += rng.uniform(-0.4, 0.6) * (np.hypot(y - cy, x - cx) < radius)
        planes.append(plane * np.exp(1j * mri.smooth_phase(shape, rng)))
    images = mri.ring_of_coils(coils, shape, rng)[:, None] * np.stack(planes) / 2
    channels = np.stack([images.real, images.imag], axis=1).reshape(2 * coils, n_slices, *shape).astype(np.float32)
    return Volume(channels, None, np.zeros((0, 3), np.int32), (4.0, 1.0, 1.0), key="head", site="site-1")


class TestSample:
    def test_sample_is_what_was_measured_and_the_target_is_all_of_it(self):
        """
        k-space of the target times the mask, with 1 as the largest value of its zero-filled image.
        """
        task = task_for(a_plan(coils=2))
        sample = task.draw(a_head(coils=2), np.random.default_rng(0))
        measured, mask = mri.to_complex(torch.from_numpy(sample.image)[None, :-1]), torch.from_numpy(sample.image[-1])
        target = mri.to_complex(torch.from_numpy(sample.target)[None])

        assert (sample.image.shape, sample.target.shape) == ((5, 64, 48), (4, 64, 48))
        assert mask.mean() == pytest.approx(0.25)
        torch.testing.assert_close(measured, mri.fourier(target) * mask, rtol=1e-4, atol=1e-5)
        assert mri.root_sum_of_squares(mri.inverse_fourier(measured)).max() == pytest.approx(1.0, abs=1e-4)

    def test_window_is_a_part_of_the_readout(self):
        """
        Along x any part of a slice, along y all of it; a smaller slice is set amid zeros.
        """
        narrow, wide = task_for(a_plan(patch=(64, 16))), task_for(a_plan(patch=(80, 64)))

        assert narrow.draw(a_head(), np.random.default_rng(0)).target.shape == (2, 64, 16)
        padded = wide.draw(a_head(), np.random.default_rng(0)).target
        assert padded.shape == (2, 80, 64)
        assert not padded[:, :8].any()
        assert not padded[:, :, :8].any()

    def test_site_measures_what_the_plan_says_of_it(self):
        """
        Sites with an acceleration of their own have their own share of lines, the others the plan's.
        """
        task = task_for(a_plan(site_acceleration=[["site-1", 8.0]]))
        shares = [
            task.draw(replace(a_head(), site=site), np.random.default_rng(0)).image[-1].mean()
            for site in ("site-1", "site-2")
        ]

        assert shares == pytest.approx([1 / 8, 1 / 4])

    def test_slice_too_small_for_its_centre_is_p105(self):
        """
        Eight lines at acceleration 8 leave one, and the centre takes it.
        """
        task = task_for(a_plan(acceleration=8.0))

        with pytest.raises(FederadError, match="P105"):
            task.zero_filled(a_head(shape=(8, 8)))


@pytest.fixture(scope="module")
def samples():
    """One slice as it is, and as a plan with appearance randomisation varies it; this one is among those that change."""
    plan = a_plan(coils=2)
    varied = plan.model_copy(update={"adaptation": AdaptationTable(appearance=True)})
    plain = task_for(plan).draw(a_head(coils=2), np.random.default_rng(0))
    return plain, sample_of(task_for(varied), a_head(coils=2), np.random.default_rng(0))


class TestAppearance:
    def test_what_is_measured_is_that_of_the_changed_target(self, samples):
        """
        Still the k-space of the target under the same mask, with 1 as the largest value of the zero-filled image.
        """
        plain, sample = samples
        measured, mask = mri.to_complex(torch.from_numpy(sample.image)[None, :-1]), torch.from_numpy(sample.image[-1])
        target = mri.to_complex(torch.from_numpy(sample.target)[None])

        assert np.array_equal(sample.image[-1], plain.image[-1])
        assert not np.allclose(sample.target, plain.target, atol=0.01)
        torch.testing.assert_close(measured, mri.fourier(target) * mask, rtol=1e-4, atol=1e-5)
        assert mri.root_sum_of_squares(mri.inverse_fourier(measured)).max() == pytest.approx(1.0, abs=1e-4)

    def test_phase_and_coils_stay(self, samples):
        """
        Each coil's image keeps its phase and its share of the magnitude wherever there is signal.
        """
        before, after = (mri.to_complex(torch.from_numpy(sample.target)[None])[0] for sample in samples)
        both = (before.abs() > 0.1).all(0) & (after.abs() > 0.1).all(0)

        assert both.sum() > 200
        turned = torch.angle(after * before.conj())[:, both]
        assert turned.abs().max() < 1e-3
        torch.testing.assert_close((after[0] / after[1])[both], (before[0] / before[1])[both], rtol=1e-3, atol=1e-3)


class TestCascade:
    @pytest.mark.parametrize("coils", [1, 3])
    @pytest.mark.parametrize("mask", ["variable-density", "equispaced", "radial"])
    def test_measured_samples_are_returned_as_they_are(self, coils, mask):
        """
        Where the plan says noiseless, k-space of the answer is the measured one wherever something was measured.
        """
        task = task_for(a_plan(coils=coils, mask=mask, consistency="noiseless"))
        torch.manual_seed(0)
        network = task.build_network()
        sample = torch.from_numpy(task.draw(a_head(coils=coils), np.random.default_rng(0)).image)[None]
        with torch.inference_mode():
            kspace = mri.fourier(mri.to_complex(network(sample)))
        is_measured = (sample[:, -1:] > 0).expand_as(kspace)
        measured = mri.to_complex(sample[:, :-1])

        torch.testing.assert_close(kspace[is_measured], measured[is_measured], rtol=0, atol=2e-6)
        assert not torch.allclose(kspace[~is_measured], measured[~is_measured], atol=1e-3)

    def test_without_consistency_measured_samples_move(self):
        """
        The same network without its steps in k-space says something else also where it was told.
        """
        task = task_for(a_plan(consistency="none"))
        torch.manual_seed(0)
        sample = torch.from_numpy(task.draw(a_head(), np.random.default_rng(0)).image)[None]
        with torch.inference_mode():
            kspace = mri.fourier(mri.to_complex(task.build_network()(sample)))
        is_measured = (sample[:, -1:] > 0).expand_as(kspace)

        assert not torch.allclose(kspace[is_measured], mri.to_complex(sample[:, :-1])[is_measured], atol=1e-3)

    def test_noisy_plans_learn_how_far_to_trust(self):
        """
        Each step's weight of the measurement is a parameter, and gets a gradient.
        """
        task = task_for(a_plan(consistency="noisy", cascades=2))
        network = task.build_network()
        image, target = contracts.example_batch(task)
        task.loss(network(image), target).backward()
        weights = {name: p for name, p in network.named_parameters() if "log_weights" in name}

        assert len(weights) == 2
        assert all(p.grad is not None and p.grad.abs() > 0 for p in weights.values())

    def test_five_networks_of_five_layers_by_default(self):
        """
        With four numbers under channels a cascade is the paper's D5-C5.
        """
        network = task_for(a_plan(channels=[8, 8, 8, 8])).build_network()
        layers = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]

        assert len(layers) == 25


class TestMeasures:
    def test_perfect_answer_is_perfect(self):
        """
        The reference itself scores 100 dB, SSIM 1 and no error, and the zero-filled image less.
        """
        task, head = task_for(a_plan(coils=2)), a_head(coils=2)
        measured = task.measure(head.image, head)

        assert measured["psnr"] == 100.0
        assert measured["ssim"] == pytest.approx(1.0)
        assert measured["nmse"] == 0.0
        assert 15 < measured["zero_filled_psnr"] < 40
        assert measured["gain_db"] == 100.0 - measured["zero_filled_psnr"]

    def test_figures_are_those_of_a_few_lines_of_numpy(self):
        """
        Complex PSNR against the largest magnitude of the study, NMSE of magnitudes.
        """
        task, head = task_for(a_plan()), a_head()
        rng = np.random.default_rng(1)
        answer = head.image + rng.normal(0, 0.01, head.image.shape).astype(np.float32)
        truth, said = (a[0].astype(float) + 1j * a[1] for a in (head.image, answer))
        measured = task.measure(answer, head)

        error = np.mean(np.abs(said - truth) ** 2)
        assert measured["psnr"] == pytest.approx(10 * np.log10(np.abs(truth).max() ** 2 / error))
        of_magnitude = (np.abs(said) - np.abs(truth)) ** 2
        assert measured["nmse"] == pytest.approx(of_magnitude.sum() / (np.abs(truth) ** 2).sum())
        assert measured["magnitude_psnr"] == pytest.approx(
            10 * np.log10(np.abs(truth).max() ** 2 / of_magnitude.mean())
        )

    def test_target_of_the_plan_decides_what_psnr_is(self):
        """
        A wrong phase costs nothing where the plan compares magnitudes.
        """
        head = a_head()
        turned = np.stack([-head.image[1], head.image[0]])
        complex_, magnitude = (
            task_for(a_plan(reference=target)).measure(turned, head)["psnr"] for target in ("complex", "magnitude")
        )

        assert complex_ < 20
        assert magnitude == 100.0

    def test_mask_of_a_study_is_the_same_whoever_measures_it(self):
        """
        Another task object sees the same samples; another study or another site does not.
        """
        first, again = task_for(a_plan()), task_for(a_plan())
        head = a_head()

        assert np.array_equal(first.zero_filled(head), again.zero_filled(head))
        assert not np.array_equal(first.zero_filled(head), first.zero_filled(replace(head, key="other")))
        assert not np.array_equal(first.zero_filled(head), first.zero_filled(replace(head, site="site-2")))

    def test_picture_lays_four_images_side_by_side(self):
        """
        Reference, zero-filled, reconstruction and error; the error of a perfect answer is black.
        """
        task, head = task_for(a_plan()), a_head()
        picture = task.picture(head.image, head)

        assert picture.image.shape == (64, 4 * 48)
        assert len(picture.panels) == 4
        assert picture.image.min() >= 0
        assert picture.image.max() <= 1
        assert picture.image[:, :48].max() > 0.9
        assert not picture.image[:, 3 * 48 :].any()


class TestLoss:
    @pytest.mark.parametrize("target", ["complex", "magnitude"])
    def test_brightness_of_a_patient_does_not_count(self, target):
        """
        The same image twice as bright, and twice as wrong, has the same loss.
        """
        task = task_for(a_plan(coils=2, reference=target))
        truth, said = (torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(s)) for s in (0, 1))

        torch.testing.assert_close(task.loss(2 * said, 2 * truth), task.loss(said, truth), rtol=1e-3, atol=0)

    def test_window_without_signal_pulls_gently(self):
        """
        Where there is nothing to see, a network that sees a little has a small loss and no steep slope.
        """
        task, said = task_for(a_plan()), torch.full((1, 2, 16, 16), 0.01, requires_grad=True)
        loss = task.loss(said, torch.zeros(1, 2, 16, 16))
        loss.backward()

        assert loss < 1
        assert said.grad.norm() <= 1.0


class TestCompressedSensing:
    @pytest.mark.parametrize("coils", [1, 4])
    def test_wavelets_are_better_than_zeros_and_keep_what_was_measured(self, coils):
        """
        On ellipses at acceleration 4 some decibels are gained without learning anything.
        """
        task, head = task_for(a_plan(coils=coils)), a_head(coils=coils)
        scores = {name: task.measure(images, head) for name, images in task.classical(head).items()}

        assert scores["zero-filled"]["gain_db"] == pytest.approx(0.0)
        assert scores["wavelet compressed sensing"]["gain_db"] > 1.0

    def test_everything_measured_is_everything_known(self):
        """
        With a full mask the image comes back.
        """
        image = torch.from_numpy(a_head(n_slices=1).image)[None, :, 0]
        kspace = mri.fourier(mri.to_complex(image))
        found = wavelet_reconstruction(kspace, torch.ones(1, 1, 64, 48), torch.ones_like(kspace))

        torch.testing.assert_close(mri.to_channels(found), image, rtol=0, atol=1e-5)


class TestStability:
    def test_linear_answers_have_the_amplification_of_their_matrix(self):
        """
        The zero-filled image changes as much as its samples, and three times of it three times as much.
        """
        task = task_for(a_plan(coils=2))
        sample = torch.from_numpy(task.draw(a_head(coils=2), np.random.default_rng(0)).image)[None]

        assert stability.amplification(stability.zero_filled, sample) == pytest.approx(1.0, rel=1e-3)
        assert stability.amplification(lambda s: 3 * stability.zero_filled(s), sample) == pytest.approx(3.0, rel=1e-3)

    def test_search_finds_the_direction_that_matters(self):
        """
        Where one sample alone is amplified tenfold, the search gets there.
        """
        sample = torch.cat(
            [torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(1, 1, 8, 8)], 1
        )
        weight = torch.ones(1, 2, 8, 8)
        weight[0, 0, 3, 5] = 10.0

        assert stability.amplification(lambda s: s[:, :2] * weight, sample) == pytest.approx(10.0, rel=0.05)

    def test_disc_comes_back_in_full_where_everything_is_measured(self):
        """
        And in part from a quarter of the lines.
        """
        image = torch.from_numpy(a_head(n_slices=1).image)[None, :, 0]
        quarter = torch.from_numpy(mri.sampling_mask("variable-density", (64, 48), 4.0, 0.1, np.random.default_rng(0)))
        full, part = (stability.structure(stability.zero_filled, image, mask) for mask in (
            torch.ones(1, 1, 64, 48), quarter[None, None].float()
        ))  # fmt: skip

        assert full.network == pytest.approx(1.0, rel=1e-3)
        assert 0.1 < part.zero_filled < 0.8
