"""Classification: what is drawn, how a set of patients is judged, where a heatmap points."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import contracts
import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn import metrics as reference

from shared_models.plan import PrivacyTable
from shared_models.task import task_for
from shared_models.tasks.classification import Classification, area_under_curve, average_precision, pooled, sensitivity
from shared_models.volume import Volume

CPU = torch.device("cpu")


def task_with(labels: list[str] | None = None, dimensions: int = 2, **tables: Any) -> Classification:
    tables.setdefault("data", {"patch": [8, 12, 16][-dimensions:]})
    task = {"labels": labels or ["healthy", "lesion"]}
    made = task_for(contracts.example_plan("classification", dimensions=dimensions, task=task, **tables))
    assert isinstance(made, Classification)
    return made


def numbered(sides: tuple[int, int, int], category: int = 1) -> Volume:
    """A volume in which every voxel has a number of its own from 1."""
    image = 1 + np.arange(np.prod(sides), dtype=np.float32).reshape(1, *sides)
    return Volume(image, None, np.zeros((0, 3), np.int32), (1.0, 1.0, 1.0), category)


def patient(task: Classification, *studies: tuple[int, list[float]]) -> dict[str, float]:
    """A patient whose studies have these labels and probabilities, as the training loop averages them."""
    rows = []
    for category, probabilities in studies:
        maps = np.log(np.array(probabilities))[:, None, None, None] * np.ones((1, 1, 2, 2))
        rows.append(task.measure(maps, numbered((1, 12, 16), category)))
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def some_patients(n_labels: int, n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and probabilities that know something about them."""
    rng = np.random.default_rng(n_labels)
    truth = rng.integers(n_labels, size=n)
    scores = np.eye(n_labels)[truth] + rng.normal(size=(n, n_labels))
    powers = np.exp(scores)
    return truth, powers / powers.sum(axis=1, keepdims=True)


def by_hand_pooled(maps: np.ndarray, axes: tuple[int, ...], sharpness: float = 1.0) -> np.ndarray:
    """Log of the mean of exponentials."""
    return np.log(np.exp(sharpness * np.float64(maps)).mean(axis=axes)) / sharpness


class TestViews:
    @pytest.fixture
    def task(self):
        table = {"labels": ["healthy", "lesion"], "views": "orthogonal"}
        return task_for(contracts.example_plan("classification", dimensions=3, task=table))

    def test_planes_along_every_axis_are_drawn(self, task):
        """
        A 2-D network is trained on planes of the volume, each of which lies along one of three axes.
        """
        volume = numbered((8, 8, 8))
        steps = set()
        for seed in range(40):
            sample = task.draw(volume, np.random.default_rng(seed))
            assert sample.image.shape == (1, 8, 8)
            inside = sample.image[0][(sample.image[0] > 0).all(axis=1)][:, sample.image[0].min(axis=0) > 0]
            if inside.shape[0] > 1 and inside.shape[1] > 1:
                steps.add((abs(inside[1, 0] - inside[0, 0]), abs(inside[0, 1] - inside[0, 0])))

        assert steps == {(8.0, 1.0), (64.0, 1.0), (64.0, 8.0)}

    def test_views_are_averaged_and_the_heatmap_is_a_volume(self, task):
        """
        A network that answers with what it sees: its maps of all planes together are the volume again.
        """
        volume = numbered((8, 8, 8))
        prediction = task.predict(lambda image: torch.cat([-image, image], dim=1), volume, CPU)
        heat = task.heat(prediction, volume, 1)

        assert prediction.shape == (2, 24, 8, 8)
        np.testing.assert_allclose(heat, 2 * volume.image[0], rtol=1e-6)
        batch = torch.from_numpy(np.float64(prediction)).movedim(1, 0)
        np.testing.assert_allclose(task.probabilities(prediction), torch.softmax(pooled(batch, 1.0), 1).mean(0))

    def test_every_contract_of_a_task_is_kept(self, task):
        """
        What holds for slices and volumes holds for views.
        """
        batch = contracts.example_batch(task)
        contracts.assert_measures_what_it_names(task)
        contracts.assert_output_fits_the_task(task, task.build_network(), batch[0])
        contracts.assert_batch_gradient_is_mean_of_patients(task.build_network(), task, batch)


class TestOrdered:
    def test_loss_is_the_squared_distance_of_cumulative_distributions(self):
        """
        Written down in NumPy; the further from the true grade, the dearer.
        """
        task = task_with(["none", "mild", "severe"])
        task = task_for(task.plan.model_copy(update={"task": task.plan.task.model_copy(update={"target": "ordinal"})}))
        maps = torch.randn(4, 3, 2, 2)
        target = torch.tensor([0, 1, 2, 2])
        p = softmax(by_hand_pooled(maps.numpy(), (2, 3)), axis=1)
        expected = ((p.cumsum(1) - np.eye(3)[target].cumsum(1)) ** 2).sum(1).mean()

        assert float(task.loss(maps, target)) == pytest.approx(expected, rel=1e-5)
        near, far = (float(task.loss(10 * torch.eye(3)[None, k, :, None, None], torch.tensor([0]))) for k in (1, 2))
        assert near < far

    def test_kappa_and_rank_error_are_those_of_scikit_learn(self):
        """
        Forty patients with grades; chance alone has no kappa.
        """
        truth, probabilities = some_patients(4)
        task = task_with(["0", "1", "2", "3"])
        task = task_for(task.plan.model_copy(update={"task": task.plan.task.model_copy(update={"target": "ordinal"})}))
        found = task.summary([patient(task, (int(t), list(p))) for t, p in zip(truth, probabilities, strict=True)])
        predicted = probabilities.argmax(axis=1)

        kappa = reference.cohen_kappa_score(truth, predicted, weights="quadratic")
        assert found["quadratic_kappa"] == pytest.approx(kappa)
        assert found["rank_error"] == pytest.approx(np.abs(truth - predicted).mean())

    def test_names_without_order_have_neither(self):
        """
        A distance between names that are in no order would mean nothing.
        """
        task = task_with(["a", "b", "c"])
        found = task.summary([patient(task, (k, [0.2, 0.3, 0.5])) for k in range(3)])

        assert not {"rank_error", "quadratic_kappa"} & found.keys()


class TestSensitivity:
    def test_it_is_that_of_the_curve(self):
        """
        The highest point of scikit-learn's curve at a false positive rate of a tenth or less.
        """
        truth, probabilities = some_patients(2, 60)
        weight = np.ones(len(truth))
        fpr, tpr, _ = reference.roc_curve(truth, probabilities[:, 1], drop_intermediate=False)

        assert sensitivity(probabilities[:, 1], truth == 1, weight) == pytest.approx(tpr[fpr <= 0.1].max())


class TestDraw:
    @pytest.mark.parametrize(("dimensions", "shape"), [(2, (1, 12, 16)), (3, (1, 8, 12, 16))])
    def test_sample_is_a_whole_image_with_its_label(self, dimensions, shape):
        """
        An image of the patch's size, ready for the network, and one number.
        """
        sample = task_with(dimensions=dimensions).draw(numbered((8, 12, 16)), np.random.default_rng(0))

        assert (sample.image.shape, sample.image.dtype) == (shape, np.float32)
        assert (sample.target.shape, sample.target.dtype, int(sample.target)) == ((), np.int64, 1)
        assert sample.image.flags.c_contiguous

    def test_window_stays_near_the_centre(self):
        """
        It is shifted by a sixteenth of a side at most, and zero where it reaches outside.
        """
        task = task_with(training={"flips": False})
        corners = set()
        for seed in range(200):
            image = task.draw(numbered((1, 12, 16)), np.random.default_rng(seed)).image[0]
            inside = np.argwhere(image > 0)
            corners.add((*inside.min(axis=0), *(inside.max(axis=0) - [11, 15])))

        assert corners == {(*np.maximum(s, 0), *np.minimum(s, 0)) for s in np.ndindex(3, 3) for s in [np.array(s) - 1]}

    def test_all_slices_come_up(self):
        """
        In 2-D a sample is one slice, any of them; some are mirrored left to right.
        """
        task, volume = task_with(), numbered((5, 12, 16))
        drawn = [task.draw(volume, np.random.default_rng(seed)).image[0] for seed in range(100)]

        assert {int((image.max() - 1) // (12 * 16)) for image in drawn} == set(range(5))
        assert {bool(image[6, 5] < image[6, 6]) for image in drawn} == {True, False}

    def test_study_without_a_label_is_no_sample(self):
        """
        Neither for training nor for measuring.
        """
        task, volume = task_with(), replace(numbered((1, 12, 16)), category=None)
        with pytest.raises(ValueError, match="label"):
            task.draw(volume, np.random.default_rng(0))
        with pytest.raises(ValueError, match="label"):
            task.measure(np.zeros((2, 1, 2, 2)), volume)


class TestLoss:
    def test_it_is_the_weighted_cross_entropy_of_pooled_maps(self):
        """
        The logarithm of the true label's probability times its weight, and the mean over samples, whoever they are.
        """
        task = task_with(training={"class_weights": [1.0, 3.0]})
        maps, target = torch.randn(4, 2, 3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0])
        probabilities = softmax(by_hand_pooled(maps.numpy(), (2, 3)), 1)
        expected = np.mean([-[1.0, 3.0][k] * np.log(p[k]) for k, p in zip(target.tolist(), probabilities, strict=True)])

        assert float(task.loss(maps, target)) == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("sharpness", [0.01, 5.0, 100.0])
    def test_plan_says_how_sharp_the_pooling_is(self, sharpness):
        """
        From nearly the mean to nearly the maximum.
        """
        maps = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(1))
        logits = pooled(maps, sharpness).numpy()

        np.testing.assert_allclose(logits, by_hand_pooled(maps.numpy(), (2, 3), sharpness), rtol=1e-4, atol=1e-5)
        assert (logits <= maps.amax((2, 3)).numpy() + 1e-6).all()
        assert (logits >= maps.mean((2, 3)).numpy() - 1e-6).all()


class TestPrediction:
    @pytest.mark.parametrize("dimensions", [2, 3])
    def test_probabilities_are_those_of_the_pooled_map_and_averaged_over_slices(self, dimensions):
        """
        A network that tells intensities apart: each slice has its own say in 2-D, the volume has one in 3-D.
        """
        task = task_with(dimensions=dimensions)
        volume = numbered((8, 12, 16))
        volume = replace(volume, image=volume.image / volume.image.max())
        maps = task.predict(lambda image: torch.cat([image, 2 * image], 1), volume, CPU)
        image = np.stack([volume.image[0], 2 * volume.image[0]])
        logits = by_hand_pooled(image, (2, 3)) if dimensions == 2 else by_hand_pooled(image, (1, 2, 3))[:, None]

        assert maps.shape == (2, 8, 12, 16)
        np.testing.assert_allclose(task.probabilities(maps), softmax(logits, 0).mean(axis=1), rtol=1e-5)

    def test_many_slices_are_predicted_like_few(self):
        """
        How many go through the network at once changes nothing.
        """
        task = task_with()
        network = task.build_network().eval()
        volume = numbered((40, 12, 16))
        volume = replace(volume, image=volume.image / volume.image.max())
        with torch.inference_mode():
            together = task.predict(network, volume, CPU)
            alone = task.predict(network, replace(volume, image=volume.image[:, 35:36]), CPU)

        np.testing.assert_allclose(together[:, 35], alone[:, 0], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("dimensions", [2, 3])
    @pytest.mark.parametrize("sides", [(8, 12, 16), (8, 20, 30), (8, 7, 9)])
    def test_heat_lies_where_the_evidence_is(self, dimensions, sides):
        """
        On the image's own grid, whether the image is as large as the patch, larger or smaller.
        """
        task, volume = task_with(dimensions=dimensions), numbered(sides)
        place = (3, sides[1] // 2, sides[2] // 2)
        image = np.zeros((1, *sides), np.float32)
        image[(0, *place)] = 1.0
        maps = task.predict(lambda x: torch.cat([-x, x], 1), replace(volume, image=image), CPU)
        heat = task.heat(maps, volume, 1)

        assert heat.shape == sides
        assert np.unravel_index(heat.argmax(), sides) == place
        np.testing.assert_allclose(task.heat(maps, volume, 0), -heat)

    def test_coarse_maps_are_interpolated_to_the_place_they_came_from(self):
        """
        A map of a quarter of the size points to the right quarter of the image.
        """
        task, volume = task_with(data={"patch": [16, 16]}), numbered((1, 16, 16))
        maps = np.zeros((2, 1, 4, 4))
        maps[1, 0, 2, 1] = 5.0
        z, y, x = np.unravel_index(task.heat(maps, volume, 1).argmax(), (1, 16, 16))

        assert (z, 8 <= y < 12, 4 <= x < 8) == (0, True, True)

    def test_hit_is_a_peak_inside_the_outline(self):
        """
        The heat is that of the label the study has; without an outline there is nothing to hit.
        """
        task, volume = task_with(data={"patch": [16, 16]}), numbered((1, 16, 16))
        maps = np.zeros((2, 1, 4, 4))
        maps[1, 0, 2, 1] = 5.0
        outline = np.zeros((1, 16, 16), np.uint8)
        outline[0, 8:12, 4:8] = 1

        def said(**changed: Any) -> tuple[float, float]:
            row = task.measure(maps, replace(volume, **changed))
            return row["outlined"], row["hit"]

        assert said(label=outline) == (1.0, 1.0)
        assert said(label=outline[:, ::-1]) == (1.0, 0.0)
        assert said(label=outline, category=0) == (1.0, 0.0)
        assert said(label=np.zeros_like(outline)) == (0.0, 0.0)
        assert said() == (0.0, 0.0)


class TestSummary:
    def test_curves_agree_with_a_second_library(self):
        """
        Ties and weights included: scikit-learn's numbers.
        """
        rng = np.random.default_rng(0)
        for _ in range(50):
            truth, scores = rng.random(30) < 0.4, np.round(rng.normal(size=30), 1)
            weight = rng.choice([0.5, 1.0], 30)
            if not 0 < truth.sum() < 30:
                continue
            auc = reference.roc_auc_score(truth, scores, sample_weight=weight)
            precision = reference.average_precision_score(truth, scores, sample_weight=weight)

            assert area_under_curve(scores, truth, weight) == pytest.approx(auc, abs=1e-12)
            assert average_precision(scores, truth, weight) == pytest.approx(precision, abs=1e-12)

    @pytest.mark.parametrize("n_labels", [2, 3, 5])
    def test_all_metrics_agree_with_a_second_library(self, n_labels):
        """
        Of the second label where there are two, else the mean over labels, each against the rest.
        """
        task = task_with([f"label {k}" for k in range(n_labels)])
        truth, probabilities = some_patients(n_labels)
        found = task.summary([patient(task, (int(k), list(p))) for k, p in zip(truth, probabilities, strict=True)])
        got = probabilities.argmax(1)
        each = [1] if n_labels == 2 else range(n_labels)
        matrix = reference.confusion_matrix(truth, got, normalize="all")

        assert found["auc"] == pytest.approx(
            np.mean([reference.roc_auc_score(truth == k, probabilities[:, k]) for k in each])
        )
        assert found["average_precision"] == pytest.approx(
            np.mean([reference.average_precision_score(truth == k, probabilities[:, k]) for k in each])
        )
        assert found["balanced_accuracy"] == pytest.approx(reference.balanced_accuracy_score(truth, got))
        assert found["f1"] == pytest.approx(
            reference.f1_score(truth, got, average="binary" if n_labels == 2 else "macro")
        )
        assert found["accuracy"] == pytest.approx(reference.accuracy_score(truth, got))
        clipped = np.maximum(probabilities[np.arange(len(truth)), truth], 0.01)
        assert found["log_likelihood"] == pytest.approx(np.log(clipped).mean())
        for k in range(n_labels):
            for j in range(n_labels):
                assert found[f"label {k} as label {j}"] == pytest.approx(matrix[k, j])

    def test_patient_with_several_studies_counts_once(self):
        """
        With the mean probability of the studies; two studies that disagree about the label share the patient.
        """
        task = task_with()
        twice = patient(task, (1, [0.9, 0.1]), (1, [0.3, 0.7]))
        changed = patient(task, (0, [0.8, 0.2]), (1, [0.4, 0.6]))

        assert task.summary([twice])["log_likelihood"] == pytest.approx(np.log(0.4))
        assert task.summary([twice])["lesion as healthy"] == pytest.approx(1.0)
        assert task.summary([changed])["healthy as healthy"] == pytest.approx(0.5)
        assert task.summary([changed])["lesion as lesion"] == pytest.approx(0.5)
        assert task.summary([changed])["auc"] == pytest.approx(1.0)

    def test_what_one_label_leaves_undefined_is_left_out(self):
        """
        Patients of one label have no curve, and none of the numbers is made up.
        """
        task = task_with()
        found = task.summary([patient(task, (1, [0.2, 0.8])), patient(task, (1, [0.6, 0.4]))])

        assert not {"auc", "average_precision", "localisation"} & found.keys()
        assert found["balanced_accuracy"] == pytest.approx(0.5)

    def test_with_privacy_only_bounded_means_are_named(self):
        """
        What may leave is accuracy and log-likelihood, both means over patients within a range.
        """
        plan = task_with().plan.model_copy(
            update={"privacy": PrivacyTable(noise_multiplier=1.0, patients_per_step=1, steps_per_round=1)}
        )
        task = task_for(plan)
        worst = patient(task_with(), (1, [1.0 - 1e-9, 1e-9]))

        assert list(task.metrics) == ["accuracy", "log_likelihood"]
        for name, (low, high) in task.ranges.items():
            assert low - 1e-12 <= task.summary([worst])[name] <= high


def test_picture_shows_the_slice_that_speaks_most():
    """
    In greys, with the heat of the second of two labels between 0 and 1, and both labels in words.
    """
    task, volume = task_with(data={"patch": [16, 16]}), numbered((3, 16, 16), category=0)
    maps = np.zeros((2, 3, 4, 4))
    maps[1, 2, 2, 1] = 5.0
    shown = task.picture(maps, volume)

    assert shown.caption == "healthy, taken for lesion"
    assert shown.image.shape == shown.truth.shape == shown.prediction.shape == (16, 16)
    assert shown.heat is not None
    assert (shown.heat.min(), shown.heat.max()) == (0.0, 1.0)
    assert not shown.truth.any()
