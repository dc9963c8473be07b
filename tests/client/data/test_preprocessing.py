"""A prepared volume has the plan's spacing, normalised intensities and labels in their place."""

from __future__ import annotations

import numpy as np
import pytest

from client.data.preprocessing import foreground_of, prepare
from client.data.scan import Scan
from client.data.skips import UnusableError


def scan(values, spacing_zyx=(1.0, 1.0, 1.0), label=None):
    """An axial scan in patient axes: ``values`` is (z, y, x)."""
    z, y, x = spacing_zyx
    return Scan(np.asarray(values, dtype=np.float32)[np.newaxis], np.diag([x, y, z, 1.0]), label)


def z_scores(values):
    return (values - values.mean()) / values.std()


class TestResampling:
    def test_linear_ramp_stays_linear_in_three_dimensions(self, plan):
        """
        Bilinear interpolation is exact for a ramp: the value at every new voxel is that of its place in mm.
        """
        z, y, x = np.meshgrid(np.arange(7) * 3.0, np.arange(9) * 2.0, np.arange(11) * 1.0, indexing="ij")

        volume = prepare(
            scan(5 + z + 2 * y + 3 * x, (3.0, 2.0, 1.0)), plan(dimensions=3, spacing_mm=[2.0, 1.0, 2.0]).data
        )

        assert volume.spacing_mm == (2.0, 1.0, 2.0)
        assert volume.image.shape[1:] == (10, 17, 6)
        z, y, x = np.meshgrid(np.arange(10) * 2.0, np.arange(17) * 1.0, np.arange(6) * 2.0, indexing="ij")
        np.testing.assert_allclose(volume.image[0], z_scores(5 + z + 2 * y + 3 * x), atol=1e-4)

    def test_two_dimensions_resample_in_plane_and_keep_the_slices(self, plan):
        """
        Each slice is resampled by itself; nothing is mixed along z.
        """
        y, x = np.meshgrid(np.arange(9) * 2.0, np.arange(11) * 1.0, indexing="ij")
        heights = np.array([1.0, 10.0, 4.0])[:, None, None]

        volume = prepare(scan(heights * (5 + y + x), (6.0, 2.0, 1.0)), plan(spacing_mm=[1.0, 0.5]).data)

        assert volume.spacing_mm == (6.0, 1.0, 0.5)
        y, x = np.meshgrid(np.arange(17) * 1.0, np.arange(21) * 0.5, indexing="ij")
        np.testing.assert_allclose(volume.image[0], z_scores(heights * (5 + y + x)), atol=1e-4)

    def test_label_follows_the_image_by_nearest_neighbour(self, plan):
        """
        Label values are never mixed, and label 3 stays where the image is bright.
        """
        label = np.zeros((4, 10, 12), dtype=np.uint8)
        label[1:3, 4:7, 3:9] = 3

        volume = prepare(scan(1 + label, (4.0, 2.0, 2.0), label), plan(spacing_mm=[1.0, 1.0]).data)

        assert volume.label.dtype == np.uint8
        assert set(np.unique(volume.label)) == {0, 3}
        np.testing.assert_array_equal(volume.label[:, ::2, ::2], label)
        bright = volume.image[0] > (volume.image.min() + volume.image.max()) / 2
        assert (bright == (volume.label == 3)).mean() > 0.95

    @pytest.mark.parametrize("dimensions", [2, 3])
    def test_without_a_spacing_every_voxel_is_kept(self, plan, dimensions):
        """
        Leaving spacing_mm out keeps each image's own grid.
        """
        values = np.random.default_rng(0).random((3, 5, 7)) + 1

        volume = prepare(scan(values, (6.0, 0.7, 0.9)), plan(dimensions=dimensions).data)

        assert volume.spacing_mm == pytest.approx((6.0, 0.7, 0.9))
        np.testing.assert_allclose(volume.image[0], z_scores(values), atol=1e-5)

    def test_one_slice_is_enough_in_two_dimensions_only(self, plan):
        """
        A patient with one slice takes part in a 2D plan; a 3D plan says that it needs a volume.
        """
        one = scan(np.random.default_rng(0).random((1, 6, 6)) + 1, (5.0, 2.0, 2.0))

        assert prepare(one, plan(spacing_mm=[1.0, 1.0]).data).image.shape == (1, 1, 11, 11)
        with pytest.raises(UnusableError, match="needs a volume"):
            prepare(one, plan(dimensions=3).data)

    def test_thick_sagittal_slices_are_no_axial_images(self, plan):
        """
        Their axial planes would be interpolation; fine isotropic volumes may be cut along any axis.
        """
        with pytest.raises(UnusableError, match="not axial"):
            prepare(scan(np.ones((40, 40, 5)), (1.0, 1.0, 6.0)), plan().data)

        assert prepare(scan(np.ones((9, 9, 9)), (1.0, 1.0, 1.2)), plan().data).image.shape == (1, 9, 9, 9)


class TestIntensities:
    def test_each_channel_has_mean_zero_and_deviation_one_where_it_is_not_zero(self, plan):
        """
        Zero is outside the body and stays zero; scale and offset of a scanner vanish.
        """
        rng = np.random.default_rng(0)
        image = rng.normal(500, 80, (2, 3, 20, 20)).astype(np.float32)
        image[1] = 0.01 * image[1] + 40
        image[:, :, :5] = 0

        volume = prepare(Scan(image, None), plan(channels=["a", "b"]).data)

        assert volume.image.dtype == np.float32
        assert (volume.image[:, :, :5] == 0).all()
        for channel in volume.image[:, :, 5:]:
            assert channel.mean() == pytest.approx(0, abs=1e-5)
            assert channel.std() == pytest.approx(1, abs=1e-5)

    def test_same_as_monai(self, plan):
        """
        A second library agrees: NormalizeIntensity(nonzero=True, channel_wise=True).
        """
        from monai.transforms import NormalizeIntensity

        image = np.random.default_rng(0).integers(0, 5, (2, 3, 8, 8)).astype(np.float32)

        expected = NormalizeIntensity(nonzero=True, channel_wise=True)(image.copy())
        np.testing.assert_allclose(prepare(Scan(image, None), plan().data).image, expected, atol=1e-5)

    def test_constant_and_empty_images_stay_finite(self, plan):
        """
        Nothing to divide by: all zero.
        """
        for value in (0.0, 7.0):
            assert not prepare(Scan(np.full((1, 1, 4, 4), value, np.float32), None), plan().data).image.any()

    def test_values_that_are_not_finite_are_refused(self, plan):
        """
        One NaN would make the whole volume NaN.
        """
        image = np.ones((1, 1, 4, 4), np.float32)
        image[0, 0, 1, 1] = np.nan

        with pytest.raises(UnusableError, match="not finite"):
            prepare(Scan(image, None), plan().data)

    def test_the_source_is_left_as_it_was(self, plan):
        """
        Preparing works on a copy.
        """
        one = scan(np.random.default_rng(0).random((2, 4, 4)))
        before = one.image.copy()

        prepare(one, plan().data)

        np.testing.assert_array_equal(one.image, before)


class TestPhotographs:
    def test_photograph_keeps_rows_and_columns_and_has_one_slice(self, plan):
        """
        A photograph has no patient axes and no millimetres.
        """
        volume = prepare(Scan(np.ones((3, 1, 4, 6), np.float32), None), plan(modality="OP").data)

        assert volume.image.shape == (3, 1, 4, 6)
        assert volume.spacing_mm == (1.0, 1.0, 1.0)

    def test_photograph_cannot_be_brought_to_millimetres(self, plan):
        """
        A plan with spacing_mm cannot use an image of unknown spacing.
        """
        with pytest.raises(UnusableError, match="spacing unknown"):
            prepare(Scan(np.ones((3, 1, 4, 6), np.float32), None), plan(modality="OP", spacing_mm=[1.0, 1.0]).data)


class TestForeground:
    def test_few_voxels_are_all_listed(self):
        """
        (z, y, x) of each voxel with a label above zero, int32.
        """
        label = np.zeros((3, 4, 5), dtype=np.uint8)
        label[1, 2, 3], label[2, 0, 4] = 1, 2

        found = foreground_of(label)

        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, [[1, 2, 3], [2, 0, 4]])

    def test_many_voxels_are_thinned_evenly(self):
        """
        At most 4096, spread over the whole lesion, every one of them labelled.
        """
        label = np.zeros((20, 40, 50), dtype=np.uint8)
        label[5:15, 10:30, 10:40] = 1

        found = foreground_of(label)

        assert len(found) == 4096
        assert len(np.unique(found, axis=0)) == 4096
        assert label[tuple(found.T)].all()
        per_slice = np.bincount(found[:, 0], minlength=20)[5:15]
        assert per_slice.max() - per_slice.min() <= 1

    def test_no_label_has_no_foreground(self):
        """
        An empty list of three columns.
        """
        assert foreground_of(None).shape == (0, 3)
        assert foreground_of(np.zeros((2, 3, 4), dtype=np.uint8)).shape == (0, 3)
