"""A plan that configures itself: from counts in public bins to spacing, patch, depth and batch."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from shared_models.configuration import divisors
from shared_models.errors import FederadError
from shared_models.fingerprint import (
    BINS,
    LARGEST_NORM,
    N_VALUES,
    Fingerprint,
    as_arrays,
    blank,
    fingerprint_plan,
    rounded,
    vector_of,
)
from shared_models.networks.dynunet import DynamicUNet
from shared_models.plan import Plan
from shared_models.self_configuration import configured, step_bytes, target_spacing, write_plan

TABLES = {
    "name": "lesions",
    "rounds": 5,
    "task": {"kind": "segmentation", "labels": ["background", "lesion"], "network": "unet", "channels": [8, 16]},
    "data": {"modality": "MR", "dimensions": 3, "patch": [16, 16, 16], "spacing_mm": [1.0, 1.0, 1.0]},
    "training": {"batch_size": 2, "samples_per_patient": 4, "learning_rate": 0.002},
}
PRIVATE = {
    **TABLES,
    "training": {"samples_per_patient": 4},
    "privacy": {"epsilon": 8.0, "patients_per_step": 8, "steps_per_round": 5},
}
THICK = ((5.0, 1.0, 1.0), (24, 224, 192))
FINE = ((0.7, 0.7, 0.7), (240, 320, 274))


def fingerprint(*groups, noise=0.0, n_sites=1):
    """Of so many patients each with one study of this spacing and size."""
    total = sum(n * vector_of([study]) for study, n in groups)
    return Fingerprint({name: np.float64(part) for name, part in as_arrays(total).items()}, n_sites, noise)


class TestFingerprint:
    def test_patient_counts_once_however_many_studies(self):
        """
        The part of each quantity adds up to 1, so no patient moves a sum by more than the root of their number.
        """
        for studies in ([THICK], [THICK, FINE], [THICK] * 9 + [FINE], [((99.0, 0.001, 3.0), (1, 10**6, 30))]):
            vector = vector_of(studies)

            assert vector.shape == (N_VALUES,)
            assert [float(part.sum()) for part in as_arrays(vector).values()] == pytest.approx([1.0] * len(BINS))
            assert np.linalg.norm(vector) <= LARGEST_NORM + 1e-12

    def test_medians_are_those_of_all_patients(self):
        """
        Sites are added up, so a large one counts for its patients; NumPy's median agrees to a bin.
        """
        random = np.random.default_rng(0)
        spacings = np.concatenate([random.uniform(0.9, 1.1, 70), random.uniform(2.9, 3.5, 50)])
        sites = [spacings[:20], spacings[20:]]
        means = [sum(vector_of([((5.0, mm, 1.0), (20, 64, 64))]) for mm in site) for site in sites]
        merged = Fingerprint.of(
            fingerprint_plan(Plan.from_tables(TABLES)), as_arrays(np.mean(means, axis=0)), n_sites=2
        )

        assert merged.quantile("spacing_mm.y") == pytest.approx(np.median(spacings), abs=0.06)
        assert merged.medians("size") == (20.0, 64.0, 64.0)
        assert merged.n_patients == pytest.approx(120, rel=1e-5)

    def test_noise_is_not_taken_for_patients(self):
        """
        Two hundred patients show through noise of 4; a fingerprint of noise alone is refused with P241.
        """
        random, noise = np.random.default_rng(1), 4 * LARGEST_NORM
        total = 200 * vector_of([THICK])
        of_many = fingerprint((THICK, 200))
        noised = {name: part + random.normal(0, noise, part.shape) for name, part in of_many.counts.items()}
        alone = {name: random.normal(0, 0.1 * noise, part.shape) for name, part in of_many.counts.items()}

        assert total.sum() == 200 * len(BINS)
        assert Fingerprint(noised, 1, noise).medians("spacing_mm") == (5.0, 1.0, 1.0)
        with pytest.raises(FederadError, match="P241"):
            Fingerprint(alone, 1, noise).medians("spacing_mm")

    def test_few_patients_make_no_fingerprint(self):
        """
        Nine patients are too few, ten are enough.
        """
        assert fingerprint((THICK, 10)).quantile("size.z") == 24
        with pytest.raises(FederadError, match="P241"):
            fingerprint((THICK, 9)).quantile("size.z")

    def test_exact_counts_are_rounded_shares(self):
        """
        Without noise neither the number of patients nor a single one among many can be read off.
        """
        almost = rounded(300 * vector_of([THICK]), 300, 300)
        with_one_more = rounded(300 * vector_of([THICK]) + vector_of([FINE]), 301, 300)

        np.testing.assert_array_equal(almost, with_one_more)

    def test_plan_that_asks_is_about_the_same_images(self):
        """
        It looks at the same modality, channels and split, keeps each image's own grid, trains nothing and asks once.
        """
        asked = fingerprint_plan(Plan.from_tables(TABLES))

        assert (asked.asks, asked.rounds, asked.data.spacing_mm, asked.privacy) == ("fingerprint", 1, None, None)
        assert asked.data.split == Plan.from_tables(TABLES).data.split

    def test_private_plan_is_asked_with_noise(self):
        """
        A plan with [privacy] asks for noised counts of everybody, whatever steps it pays for itself.
        """
        asked = fingerprint_plan(Plan.from_tables(PRIVATE))

        assert asked.privacy is not None
        assert (asked.privacy.noise_multiplier, asked.privacy.patients_per_step) == (4.0, 100_000)
        assert fingerprint_plan(Plan.from_tables(TABLES), noise=2.5).privacy is not None

    @pytest.mark.parametrize(
        "change",
        [
            {"rounds": 2},
            {"data": {"modality": "MR", "dimensions": 3, "patch": [16] * 3, "spacing_mm": [1.0] * 3}},
            {"data": {"modality": "MR", "dimensions": 2, "patch": [16] * 2}},
            {"adaptation": {"appearance": True}},
            {"strategy": {"name": "fedprox", "proximal_mu": 0.1}},
            {"strategy": {"release": "averaged", "average_decay": 0.9}},
            {"strategy": {"start": "5a" * 32}},
            {"privacy": {"epsilon": 1.0, "patients_per_step": 100_000, "steps_per_round": 1}},
            {"privacy": {"noise_multiplier": 4.0, "patients_per_step": 10, "steps_per_round": 1}},
            {"privacy": {"noise_multiplier": 4.0, "patients_per_step": 100_000, "steps_per_round": 2}},
        ],
    )
    def test_plan_that_asks_can_do_nothing_else(self, change):
        """
        A key that would train, or that would make the noise another one than the server knows, is a contradiction.
        """
        tables = json.loads(fingerprint_plan(Plan.from_tables(TABLES)).canonical_json())

        with pytest.raises(FederadError, match="P103"):
            Plan.from_tables({**tables, **change})

    def test_pictures_have_no_fingerprint(self):
        """
        Photographs do not say how large a pixel is: P240.
        """
        data = {"modality": "OP", "dimensions": 2, "patch": [64, 64]}

        with pytest.raises(FederadError, match="P240"):
            fingerprint_plan(Plan.from_tables({**TABLES, "data": data}))

    def test_nobody_is_of_the_same_shape(self):
        """
        What the question carries has the shapes of the answer.
        """
        filled = as_arrays(vector_of([THICK]))

        assert {name: array.shape for name, array in blank().items()} == {n: a.shape for n, a in filled.items()}


class TestConfiguration:
    def test_thick_slices_are_not_resampled_to_their_median(self):
        """
        Where slices are very coarse, the tenth percentile is taken along them, so that finer series lose less.
        """
        found = fingerprint(
            (((3.0, 1.0, 1.0), (40, 224, 192)), 20), (THICK, 70), (((6.0, 1.0, 1.0), (20, 224, 192)), 10)
        )

        assert target_spacing(found) == (3.0, 1.0, 1.0)

    def test_isotropic_images_keep_their_median(self):
        """
        No axis is coarse, so all are medians.
        """
        assert target_spacing(fingerprint((FINE, 30), (((1.0, 1.0, 1.0), (180, 224, 192)), 10))) == (0.7, 0.7, 0.7)

    @pytest.mark.parametrize("memory_gb", [0.02, 0.1, 1.0, 8.0])
    @pytest.mark.parametrize(
        "images", [THICK, FINE, ((2.0, 2.0, 2.0), (90, 112, 96)), ((8.0, 0.5, 0.5), (5, 512, 512))]
    )
    def test_step_fits_the_memory_and_uses_it(self, images, memory_gb):
        """
        Two patches and more fit; with twice the memory nothing gets smaller.
        """
        plan, found = Plan.from_tables(TABLES), fingerprint((images, 40))
        small, large = configured(plan, found, memory_gb), configured(plan, found, 2 * memory_gb)

        assert small.training.batch_size >= 2
        assert step_bytes(small) <= memory_gb * 1e9
        assert math.prod(small.data.patch) <= math.prod(large.data.patch)
        assert large.training.batch_size * math.prod(large.data.patch) <= 0.06 * 40 * math.prod(images[1]) or (
            large.training.batch_size == 2
        )

    def test_thick_slices_get_a_flat_patch(self):
        """
        The patch has the proportions of the images, and the plane is halved more often than the stack.
        """
        plan = configured(Plan.from_tables(TABLES), fingerprint((THICK, 40)), 0.3)
        z, y, x = plan.data.patch

        assert (plan.task.network, plan.data.dimensions, plan.data.spacing_mm) == ("dynunet", 3, (5.0, 1.0, 1.0))
        assert y > 4 * z
        assert x >= 0.75 * y
        through, along_y, along_x = divisors(plan.data.patch, plan.data.spacing_mm, len(plan.task.channels))
        assert through < min(along_y, along_x)

    def test_few_slices_are_learned_one_by_one(self):
        """
        Volumes of fewer than eight slices make a 2-D plan.
        """
        plan = configured(Plan.from_tables(TABLES), fingerprint((((8.0, 0.5, 0.5), (5, 512, 512)), 40)), 0.3)

        assert (plan.data.dimensions, plan.data.spacing_mm, len(plan.data.patch)) == (2, (0.5, 0.5), 2)

    def test_features_double_up_to_a_bound(self):
        """
        From the plan's own first number, to ten times that.
        """
        plan = configured(Plan.from_tables(TABLES), fingerprint((FINE, 40)), 8.0)

        assert plan.task.channels == (8, 16, 32, 64, 80, 80)

    def test_everything_else_stays(self):
        """
        What is not derived is as the plan said, and a round has as many steps.
        """
        plan = Plan.from_tables(TABLES)
        found = configured(plan, fingerprint((FINE, 40)), 1.0)

        assert (found.name, found.rounds, found.training.learning_rate) == ("lesions", 5, 0.002)
        ratio = found.training.samples_per_patient / found.training.batch_size
        assert ratio == pytest.approx(2.0, abs=0.5 / found.training.batch_size)

    def test_private_plan_keeps_its_public_numbers(self):
        """
        Under [privacy] steps and their divisor are what was agreed on; only the images' side is derived.
        """
        plan = Plan.from_tables(PRIVATE)
        found = configured(plan, fingerprint((FINE, 40)), 1.0)

        assert found.privacy == plan.privacy
        assert found.training.samples_per_patient == plan.training.samples_per_patient

    @pytest.mark.parametrize("residual_units", [0, 1])
    @pytest.mark.parametrize(
        ("spacing", "patch", "channels"),
        [((5.0, 1.0, 1.0), (8, 32, 32), (4, 8, 16, 32)), ((1.0, 1.0, 1.0), (16, 32, 16), (4, 8, 16))],
    )
    def test_memory_is_what_pytorch_keeps(self, spacing, patch, channels, residual_units):
        """
        The estimate is what is saved for the backward pass of the very network, to a tenth.
        """
        tables = {
            **TABLES,
            "task": {
                **TABLES["task"],
                "network": "dynunet",
                "channels": list(channels),
                "residual_units": residual_units,
            },
            "data": {"modality": "MR", "dimensions": 3, "patch": list(patch), "spacing_mm": list(spacing)},
        }
        plan = Plan.from_tables(tables)
        network, kept = DynamicUNet(plan), {}
        own = {parameter.data_ptr() for parameter in network.parameters()}

        def note(tensor):
            if tensor.data_ptr() not in own:
                storage = tensor.untyped_storage()
                kept[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            network(torch.randn(2, 1, *patch))

        assert sum(n_bytes for n_bytes, _ in kept.values()) == pytest.approx(step_bytes(plan), rel=0.11)

    def test_written_plan_is_the_same_plan(self, tmp_path):
        """
        The file reads back with the same hash, and nothing is overwritten (P242).
        """
        for number, tables in enumerate((TABLES, PRIVATE)):
            plan = configured(Plan.from_tables(tables), fingerprint((THICK, 40)), 0.1)
            write_plan(tmp_path / f"{number}.toml", plan, "lesions, configured")

            assert Plan.load(tmp_path / f"{number}.toml").sha256 == plan.sha256
            with pytest.raises(FederadError, match="P242"):
                write_plan(tmp_path / f"{number}.toml", plan, "again")
