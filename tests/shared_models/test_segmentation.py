"""Segmentation: what is drawn, how it is judged, how a whole volume is predicted."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product
from math import sqrt

import contracts
import laws
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.nn import functional as F

from client.network_contract import check_network
from shared_models.task import task_for
from shared_models.tasks.segmentation import WINDOWS_AT_ONCE, Segmentation, dice, surface_distances_mm
from shared_models.volume import Volume


def task_with(dimensions: int = 2, patch: list[int] | None = None, **training: object) -> Segmentation:
    patch = patch or [8] * dimensions
    task = task_for(contracts.example_plan(dimensions=dimensions, data={"patch": patch}, training=training))
    assert isinstance(task, Segmentation)
    return task


def numbered(sides: tuple[int, int, int]) -> Volume:
    """A volume in which every voxel has a number of its own from 1, and the label follows from the number."""
    number = 1 + np.arange(np.prod(sides), dtype=np.float32).reshape(sides)
    label = label_of(number)
    return Volume(number[None], label, np.argwhere(label > 0).astype(np.int32), (1.0, 1.0, 1.0))


def label_of(number: np.ndarray) -> np.ndarray:
    """The label of a numbered voxel; what lies outside the image has number 0 and no label."""
    return np.where(number == 0, 0, np.floor(7.3 * number) % 3).astype(np.uint8)


def marked(sides: tuple[int, int, int], voxel: tuple[int, int, int]) -> Volume:
    """A volume with one labelled voxel."""
    label = np.zeros(sides, np.uint8)
    label[voxel] = 1
    return Volume(label[None].astype(np.float32), label, np.array([voxel], np.int32), (1.0, 1.0, 1.0))


def surface(mask: np.ndarray) -> np.ndarray:
    """Voxels of a mask with a neighbour across a face that is not in it."""
    inside = [
        voxel
        for voxel in np.argwhere(mask)
        if not all(
            (0 <= voxel[axis] + step < mask.shape[axis])
            and mask[tuple(voxel + step * np.eye(mask.ndim, dtype=int)[axis])]
            for axis, step in product(range(mask.ndim), (-1, 1))
        )
    ]
    return np.array(inside)


def hausdorff_by_hand(one: np.ndarray, other: np.ndarray, spacing: tuple[float, ...]) -> float:
    """Every distance between two surfaces, and the larger 95th percentile of the two directions."""
    if one.shape[0] == 1:
        one, other, spacing = one[0], other[0], spacing[1:]
    a, b = (surface(mask) * np.array(spacing) for mask in (one, other))
    distances = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    return float(max(np.percentile(distances.min(1), 95), np.percentile(distances.min(0), 95)))


class TestDraw:
    @pytest.mark.parametrize(("dimensions", "patch"), [(2, [8, 12]), (3, [8, 12, 10])])
    def test_sample_has_the_shape_of_the_patch(self, dimensions, patch):
        """
        An image with its channels and labels with an axis of one, in the patch's size, ready for the network.
        """
        task = task_with(dimensions, patch)
        sample = task.draw(numbered((15, 16, 17)), np.random.default_rng(0))

        assert (sample.image.shape, sample.image.dtype) == ((1, *patch), np.float32)
        assert (sample.target.shape, sample.target.dtype) == ((1, *patch), np.int64)
        assert sample.image.flags.c_contiguous
        assert sample.target.flags.c_contiguous

    def test_every_channel_is_cut_at_the_same_place(self):
        """
        Two sequences of one patient stay aligned.
        """
        task = task_for(contracts.example_plan(data={"channels": ["flair", "t1c"]}))
        volume = numbered((5, 20, 20))
        volume = replace(volume, image=np.concatenate([volume.image, -volume.image]))

        for seed in range(20):
            image = task.draw(volume, np.random.default_rng(seed)).image
            np.testing.assert_array_equal(image[1], -image[0])

    @pytest.mark.parametrize("dimensions", [2, 3])
    def test_same_generator_gives_the_same_sample(self, dimensions):
        """
        All randomness comes from the generator that was handed in.
        """
        task, volume = task_with(dimensions), numbered((12, 20, 20))
        draws = [task.draw(volume, np.random.default_rng(3)) for _ in range(2)]
        other = task.draw(volume, np.random.default_rng(4))

        np.testing.assert_array_equal(draws[0].image, draws[1].image)
        assert not np.array_equal(draws[0].image, other.image)

    @pytest.mark.parametrize("foreground", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("dimensions", [2, 3])
    def test_patch_is_a_window_inside_the_volume_and_labels_stay_with_their_voxels(self, dimensions, foreground):
        """
        A patch is a piece of the volume, straight or mirrored left to right, and never reaches outside.
        """
        task, volume = task_with(dimensions, foreground=foreground), numbered((9, 17, 19))
        mirrored = 0
        for seed in range(100):
            sample = task.draw(volume, np.random.default_rng(seed))
            image = sample.image[0].reshape(-1, 8, 8)
            flipped = image[0, 0, 0] > image[0, 0, 1]
            straight = image[..., ::-1] if flipped else image
            corner = np.unravel_index(int(straight.min()) - 1, volume.image.shape[1:])
            window = tuple(slice(c, c + n) for c, n in zip(corner, image.shape, strict=True))
            mirrored += flipped

            np.testing.assert_array_equal(straight, volume.image[0][window])
            np.testing.assert_array_equal(sample.target[0], label_of(sample.image[0]))
        assert 30 <= mirrored <= 70

    def test_every_place_is_as_likely(self):
        """
        Patches that look for nothing lie anywhere, the first and the last place of each axis included.
        """
        task, volume, rng = task_with(foreground=0.0, flips=False), numbered((3, 10, 10)), np.random.default_rng(0)
        places = Counter(float(task.draw(volume, rng).image[0, 0, 0]) for _ in range(27 * 40))

        assert places.keys() == set(volume.image[0, :, :3, :3].ravel().tolist())
        assert all(abs(n - 40) <= 5 * sqrt(40) for n in places.values())

    def test_without_flips_nothing_is_mirrored(self):
        """
        A plan that says flips = false keeps left and right.
        """
        task, volume = task_with(flips=False), numbered((3, 20, 20))

        for seed in range(50):
            assert (np.diff(task.draw(volume, np.random.default_rng(seed)).image[0], axis=1) == 1).all()

    @pytest.mark.parametrize("sides", [(1, 3, 5), (1, 8, 3), (2, 7, 30)], ids=str)
    @pytest.mark.parametrize("foreground", [0.0, 1.0])
    def test_small_volume_lies_whole_in_the_middle_of_its_patch(self, sides, foreground):
        """
        Where a volume is smaller than the patch it is kept whole, centred, and surrounded by the mean intensity, label 0.
        """
        task, volume = task_with(2, flips=False, foreground=foreground), numbered(sides)
        for seed in range(20):
            sample = task.draw(volume, np.random.default_rng(seed))
            rows, columns = (np.flatnonzero(sample.image[0].any(axis=axis)) for axis in (1, 0))

            for found, side in ((rows, sides[1]), (columns, sides[2])):
                assert len(found) == min(side, 8)
                assert found[0] == max((8 - side + 1) // 2, 0)
            np.testing.assert_array_equal(sample.target[0], label_of(sample.image[0]))

    @pytest.mark.parametrize("foreground", [0.0, 0.25, 0.8])
    @pytest.mark.parametrize("dimensions", [2, 3])
    def test_share_of_patches_with_the_lesion_is_the_plans(self, dimensions, foreground):
        """
        Over many draws a small lesion is met as often as the plan's share and chance together say, within five standard
        deviations of a binomial.
        """
        task, volume, n = task_with(dimensions, foreground=foreground), marked((16, 32, 32), (8, 14, 17)), 2000
        corners = [16 - size + 1 for size in ((8,) if dimensions == 3 else (1,))] + [32 - 8 + 1] * 2
        by_chance = (8 if dimensions == 3 else 1) * 8 * 8 / np.prod(corners)
        share = foreground + (1 - foreground) * by_chance
        rng = np.random.default_rng(1)
        met = sum(task.draw(volume, rng).target.any() for _ in range(n))

        assert abs(met - n * share) <= 5 * sqrt(n * share * (1 - share))

    def test_lesion_lies_in_the_middle_half_and_everywhere_in_it(self):
        """
        A patch drawn around a labelled voxel has it anywhere in the middle half of each axis.
        """
        task, volume = task_with(3, foreground=1.0, flips=False), marked((32, 32, 32), (16, 16, 16))
        places = np.array(
            [np.argwhere(task.draw(volume, np.random.default_rng(seed)).target[0])[0] for seed in range(200)]
        )

        assert places.min(0).tolist() == [2, 2, 2]
        assert places.max(0).tolist() == [5, 5, 5]

    def test_volume_without_a_lesion_is_drawn_from_everywhere(self):
        """
        A healthy patient is trained on too, whatever the share of foreground.
        """
        volume = numbered((4, 16, 16))
        healthy = replace(volume, label=np.zeros((4, 16, 16), np.uint8), foreground=np.zeros((0, 3), np.int32))
        task = task_with(foreground=1.0)
        seen = {int(task.draw(healthy, np.random.default_rng(seed)).image.min()) for seed in range(60)}

        assert len(seen) > 30

    def test_volume_is_left_as_it_was(self):
        """
        Drawing reads from a volume that may be a read-only map.
        """
        volume = numbered((4, 16, 16))
        volume.image.flags.writeable = volume.label.flags.writeable = False
        sample = task_with().draw(volume, np.random.default_rng(0))
        sample.image[:] = -1

        assert volume.image.min() == 1

    def test_volume_without_a_reference_is_not_drawn_from(self):
        """
        There is nothing to learn from where nobody has drawn.
        """
        with pytest.raises(ValueError, match="reference"):
            task_with().draw(replace(numbered((1, 16, 16)), label=None), np.random.default_rng(0))


class TestLoss:
    @pytest.mark.parametrize("dimensions", [2, 3])
    def test_loss_is_smoothed_dice_plus_cross_entropy(self, dimensions):
        """
        The loss is the sum of two means that a few lines of torch write out.
        """
        torch.manual_seed(0)
        output = torch.randn(3, 3, *[8] * dimensions)
        target = torch.randint(0, 3, (3, 1, *[8] * dimensions))
        p, t = output.softmax(1).flatten(2), F.one_hot(target[:, 0], 3).movedim(-1, 1).flatten(2)
        soft_dice = (2 * (p * t).sum(2) + 1) / (p.sum(2) + t.sum(2) + 1)
        cross_entropy = -(p.log() * t).sum(1)

        expected = (1 - soft_dice).mean() + cross_entropy.mean()
        torch.testing.assert_close(task_with(dimensions).loss(output, target), expected)


class TestDice:
    @laws.SAME_EXAMPLES
    @given(st.integers(0, 2**32), st.floats(0, 1), st.floats(0, 1))
    def test_dice_counts_voxels(self, seed, one, other):
        """
        Twice the voxels in both over the voxels in each, counted one by one.
        """
        rng = np.random.default_rng(seed)
        a, b = rng.random((3, 4, 5)) < one, rng.random((3, 4, 5)) < other
        pairs = list(zip(a.ravel().tolist(), b.ravel().tolist(), strict=True))
        sizes = sum(x + y for x, y in pairs)

        assert dice(a, b) == (2 * sum(x and y for x, y in pairs) / sizes if sizes else 1.0)


class TestHausdorff:
    masks = hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=5).flatmap(
        lambda shape: st.tuples(hnp.arrays(bool, shape), hnp.arrays(bool, shape))
    )
    spacings = st.tuples(*[st.sampled_from([0.5, 1.0, 1.7, 5.0])] * 3)

    @laws.SAME_EXAMPLES
    @given(masks, spacings)
    def test_distance_is_that_of_all_pairs(self, masks, spacing):
        """
        The distance in millimetres is the one found by measuring from every surface voxel to every other.
        """
        one, other = masks
        if one.any() and other.any():
            assert surface_distances_mm(one, other, spacing)[0] == pytest.approx(
                hausdorff_by_hand(one, other, spacing), abs=1e-4
            )

    def test_anisotropic_spacing_counts_millimetres(self):
        """
        One slice further is five millimetres where slices are five millimetres apart.
        """
        one, other = np.zeros((2, 5, 5, 5), bool)
        one[2, 2, 2] = other[3, 2, 2] = True

        assert surface_distances_mm(one, other, (5.0, 1.0, 1.0))[0] == pytest.approx(5.0)
        assert surface_distances_mm(one.swapaxes(0, 2), other.swapaxes(0, 2), (5.0, 1.0, 1.0))[0] == pytest.approx(1.0)

    def test_single_outlier_hardly_counts(self):
        """
        The 95th percentile forgives a stray voxel that the largest distance would not.
        """
        truth = np.zeros((1, 40, 40), bool)
        truth[0, :20, :] = True
        stray = truth.copy()
        stray[0, 39, 0] = True

        assert surface_distances_mm(stray, truth, (1.0, 1.0, 1.0))[0] == 0.0


class TestMeasure:
    SPACING = (3.0, 1.0, 2.0)
    DIAGONAL = sqrt((2 * 3.0) ** 2 + (4 * 1.0) ** 2 + (6 * 2.0) ** 2)

    def volume(self, label):
        return Volume(np.zeros((1, *label.shape), np.float32), label, np.zeros((0, 3), np.int32), self.SPACING)

    def test_empty_masks_are_measured_as_the_table_says(self):
        """
        Nothing there and nothing found is perfect; one of the two costs the diagonal of the volume.
        """
        task = task_for(contracts.example_plan(task={"labels": ["background", "lesion"]}))
        empty, drawn = np.zeros((2, 4, 6), np.uint8), np.zeros((2, 4, 6), np.uint8)
        drawn[1, 2, 3] = 1

        nothing = {
            "dice": 1.0,
            "hd95_mm": 0.0,
            "surface_mm": 0.0,
            "volume: lesion": 0.0,
            "reference volume: lesion": 0.0,
        }
        assert task.measure(empty, self.volume(empty)) == nothing
        for prediction, label in ((empty, drawn), (drawn, empty)):
            measured = task.measure(prediction, self.volume(label))
            distances = {"hd95_mm": pytest.approx(self.DIAGONAL), "surface_mm": pytest.approx(self.DIAGONAL)}
            assert measured.items() >= {"dice": 0.0, **distances}.items()

    def test_labels_are_measured_one_by_one_and_averaged(self):
        """
        A label that is found perfectly and one that is missed average to one half; background does not count.
        """
        label = np.zeros((2, 4, 6), np.uint8)
        label[0, 0, 0], label[1, 3, 5] = 1, 2
        prediction = np.where(label == 2, 0, label)

        measured = task_with().measure(prediction, self.volume(label))
        assert measured["dice"] == pytest.approx(0.5)
        assert measured["hd95_mm"] == pytest.approx(self.DIAGONAL / 2)

    def test_confused_labels_are_not_forgiven(self):
        """
        Finding the right place with the wrong label is no overlap.
        """
        label = np.ones((2, 4, 6), np.uint8)

        assert task_with().measure(2 * label, self.volume(label))["dice"] == 0.0

    def test_volume_without_a_reference_is_not_measured(self):
        """
        There is nothing to compare with where nobody has drawn.
        """
        with pytest.raises(ValueError, match="reference"):
            task_with().measure(np.zeros((1, 8, 8)), replace(numbered((1, 8, 8)), label=None))


def perfect(image: torch.Tensor) -> torch.Tensor:
    """A network that reads the label off the image."""
    return torch.cat([-((image - k) ** 2) for k in range(3)], dim=1)


class TestPredict:
    @pytest.mark.parametrize("dimensions", [2, 3])
    @pytest.mark.parametrize("sides", [(3, 5, 6), (1, 5, 11), (8, 8, 8), (9, 21, 30), (8, 7, 40)], ids=str)
    def test_perfect_network_gets_perfect_marks_at_any_size(self, dimensions, sides):
        """
        A volume smaller than the patch, equal to it or larger comes back whole: Dice 1, distance 0.
        """
        label = np.random.default_rng(0).integers(0, 3, sides).astype(np.uint8)
        volume = Volume(label[None].astype(np.float32), label, np.argwhere(label > 0).astype(np.int32), (2.0, 1.0, 1.0))
        task = task_with(dimensions)
        prediction = task.predict(perfect, volume, torch.device("cpu"))

        assert (prediction.shape, prediction.dtype) == (sides, np.uint8)
        np.testing.assert_array_equal(prediction, label)
        measured = task.measure(prediction, volume)
        assert (measured["dice"], measured["hd95_mm"], measured["surface_mm"]) == (1.0, 0.0, 0.0)

    @pytest.mark.parametrize("dimensions", [2, 3])
    def test_network_sees_windows_of_the_trained_size(self, dimensions):
        """
        Whatever the size of the volume, the network gets patches as in training, a few at a time.
        """
        seen = []

        def watching(image):
            seen.append(tuple(image.shape))
            return perfect(image)

        task_with(dimensions).predict(watching, numbered((12, 5, 30)), torch.device("cpu"))

        assert {shape[1:] for shape in seen} == {(1, *[8] * dimensions)}
        assert max(shape[0] for shape in seen) <= WINDOWS_AT_ONCE

    def test_volume_is_left_as_it_was(self):
        """
        Predicting reads from a volume that may be a read-only map.
        """
        volume = numbered((2, 16, 16))
        before = volume.image.copy()
        volume.image.flags.writeable = False
        task_with().predict(lambda image: perfect(image.mul_(0)), volume, torch.device("cpu"))

        np.testing.assert_array_equal(volume.image, before)

    def test_network_of_several_outputs_is_refused(self):
        """
        A network that answers with something other than one tensor is a mistake of the programmer.
        """
        with pytest.raises(TypeError, match="one tensor"):
            task_with().predict(
                lambda image: (perfect(image), perfect(image)), numbered((1, 8, 8)), torch.device("cpu")
            )


class TestPicture:
    def test_slice_with_the_most_is_shown(self):
        """
        The plane with the largest reference is shown, with its prediction, its pixel size and grey values from 0 to 1.
        """
        label = np.zeros((4, 8, 6), np.uint8)
        label[1, 0, 0], label[2, :3, :3] = 1, 2
        image = np.random.default_rng(0).normal(size=(1, 4, 8, 6)).astype(np.float32)
        picture = task_with().picture(label, Volume(image, label, np.argwhere(label > 0), (3.0, 1.0, 2.0)))

        np.testing.assert_array_equal(picture.truth, label[2])
        np.testing.assert_array_equal(picture.prediction, label[2])
        assert picture.image.shape == (8, 6)
        assert (picture.image.min(), picture.image.max()) == (0.0, 1.0)
        assert picture.pixel_mm == (1.0, 2.0)

    def test_colours_stay_colours_and_healthy_patients_show_the_middle(self):
        """
        Three channels are shown as one colour picture; without a reference the middle slice is shown.
        """
        image = np.zeros((3, 5, 8, 8), np.float32)
        image[:, 2] = np.random.default_rng(0).normal(size=(3, 8, 8))
        task = task_for(contracts.example_plan(data={"channels": ["red", "green", "blue"]}))
        picture = task.picture(
            np.zeros((5, 8, 8), np.uint8), Volume(image, None, np.zeros((0, 3), np.int32), (1, 1, 1))
        )

        assert picture.image.shape == (8, 8, 3)
        assert picture.image.max() == 1.0
        assert not picture.truth.any()

    def test_doubts_are_shown_of_the_same_slice(self):
        """
        A map of how unsure the model is comes with the plane that is shown.
        """
        label = np.zeros((4, 8, 6), np.uint8)
        label[2, :3, :3] = 1
        doubt = np.random.default_rng(0).random(label.shape).astype(np.float32)
        volume = Volume(np.zeros((1, *label.shape), np.float32), label, np.argwhere(label > 0), (1.0, 1.0, 1.0))
        picture = task_with().picture(label, volume, {"uncertainty": doubt})

        assert list(picture.doubts) == ["uncertainty"]
        np.testing.assert_array_equal(picture.doubts["uncertainty"], doubt[2])


class TestDoubts:
    def test_noise_that_was_learned_softens_probabilities_as_its_mean_would(self):
        """
        Closed form within 0.02 of a hundred thousand draws, and the likeliest label stays the likeliest.
        """
        task = task_for(contracts.example_plan(training={"loss": "heteroscedastic"}))
        means, variance = np.array([2.0, 0.5, -1.0]), 4.0
        answer = torch.tensor([*means, np.log(variance)], dtype=torch.float32).view(1, 4, 1, 1)
        volume = numbered((1, 8, 8))
        found = task.probabilities(lambda image: answer.repeat(len(image), 1, 8, 8), volume, torch.device("cpu"))
        drawn = means + np.sqrt(variance) * np.random.default_rng(0).standard_normal((100_000, 3))
        expected = (np.exp(drawn) / np.exp(drawn).sum(axis=1, keepdims=True)).mean(axis=0)

        np.testing.assert_allclose(found[:, 0, 0, 0], expected, atol=0.02)
        predicted = task.predict(lambda image: answer.repeat(len(image), 1, 8, 8), volume, torch.device("cpu"))
        assert (predicted == 0).all()

    @pytest.mark.parametrize("network", ["unet", "segresnet", "dynunet", "dual-path"])
    def test_network_with_learned_noise_answers_one_channel_more_and_keeps_patients_apart(self, network):
        """
        The private contract holds as for any other loss, and every parameter of the head is trained.
        """
        plan = contracts.example_plan(network=network, training={"loss": "heteroscedastic"})
        task = task_for(plan)
        image, target = contracts.example_batch(task)
        made = task.build_network()
        answer = made(image)
        task.loss(answer, target).backward()

        assert answer.shape[1] == len(plan.task.labels) + 1
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in list(made.parameters())[-1:])
        check_network(task.build_network(), task)

    def test_plan_without_dropout_has_one_map_and_one_with_it_two(self):
        """
        Certain voxels are 0, those of which nothing is known 1; passes that drop nothing agree about everything, and the
        same study gives the same maps again.
        """
        volume = numbered((1, 8, 8))
        undecided = task_with().doubts(_Constant([0.0, 0.0, 0.0]), volume, torch.device("cpu"))
        certain = task_with().doubts(_Constant([50.0, 0.0, 0.0]), volume, torch.device("cpu"))
        dropped = task_for(contracts.example_plan(task={"dropout": 0.5}))
        network = dropped.build_network().eval()
        with torch.inference_mode():
            first, again = (dropped.doubts(network, volume, torch.device("cpu")) for _ in range(2))
            steady = dropped.doubts(_Constant([1.0, 0.0, 0.0]), volume, torch.device("cpu"))

        assert undecided["uncertainty"] == pytest.approx(1.0)
        assert certain["uncertainty"] == pytest.approx(0.0, abs=1e-6)
        assert set(first) == {"uncertainty", "disagreement"}
        assert (first["disagreement"] > 0).any()
        assert (first["disagreement"] <= first["uncertainty"] + 1e-6).all()
        assert steady["disagreement"] == pytest.approx(0.0, abs=1e-6)
        np.testing.assert_array_equal(first["disagreement"], again["disagreement"])


class _Constant(torch.nn.Module):
    """Answers the same logits everywhere."""

    def __init__(self, logits):
        super().__init__()
        self._logits = torch.tensor(logits)

    def forward(self, image):
        return self._logits.view(1, -1, 1, 1).repeat(len(image), 1, *image.shape[2:])
