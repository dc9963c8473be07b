"""NIfTI volumes and photographs come in with their axes, colours and labels right."""

from __future__ import annotations

from pathlib import PurePosixPath

import numpy as np
import pytest
from PIL import Image

from client.data import images
from client.data.preprocessing import prepare
from client.data.scan import Scan, indices_from_mask, stacked
from client.data.skips import Reason, UnusableError


class TestNifti:
    @pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, -1)])
    def test_voxel_lands_on_the_patient_axes(self, tmp_path, write_nifti, plan, signs):
        """
        Whatever way a file stores its axes, the voxel furthest left, back and up gets the largest x, y and z.

        NIfTI's axes grow to the right, the front and the head: furthest left is the lowest RAS x.
        """
        values = np.ones((4, 5, 6), dtype=np.int16)
        left, back, top = (0 if signs[0] > 0 else -1), (0 if signs[1] > 0 else -1), (-1 if signs[2] > 0 else 0)
        values[left, back, top] = 100
        path = write_nifti(
            tmp_path / "a.nii.gz", values, affine=np.diag([1.0 * signs[0], 2.0 * signs[1], 3.0 * signs[2], 1])
        )

        volume = prepare(images.read_nifti(path), plan(dimensions=3).data)

        assert volume.image.shape == (1, 6, 5, 4)
        assert volume.spacing_mm == (3.0, 2.0, 1.0)
        np.testing.assert_array_equal(np.argwhere(volume.image[0] == volume.image.max()), [[5, 4, 3]])

    def test_stored_axes_may_be_in_any_order(self, tmp_path, write_nifti, plan):
        """
        A file whose first axis runs to the head (a sagittal acquisition) is turned, not relabelled.
        """
        values = np.ones((6, 4, 5), dtype=np.int16)
        values[5, 0, 0] = 100  # top; leftmost; backmost
        affine = np.array([[0, 1.0, 0, 0], [0, 0, 2.0, 0], [3.0, 0, 0, 0], [0, 0, 0, 1]])

        volume = prepare(
            images.read_nifti(write_nifti(tmp_path / "a.nii", values, affine=affine)), plan(dimensions=3).data
        )

        np.testing.assert_array_equal(np.argwhere(volume.image[0] == volume.image.max()), [[5, 4, 3]])

    def test_label_must_share_the_grid(self, tmp_path, write_nifti):
        """
        Another shape is another size; the same shape elsewhere is another place.
        """
        scan = images.read_nifti(write_nifti(tmp_path / "a.nii", np.ones((3, 4, 5), dtype=np.int16)))
        smaller = write_nifti(tmp_path / "b.nii", np.ones((3, 4, 4), dtype=np.uint8))
        elsewhere = write_nifti(tmp_path / "c.nii", np.ones((3, 4, 5), dtype=np.uint8), spacing=(2, 1, 1))

        with pytest.raises(UnusableError, match="another size"):
            images.read_nifti_label(smaller, scan, 2)
        with pytest.raises(UnusableError, match="does not lie"):
            images.read_nifti_label(elsewhere, scan, 2)

    def test_channels_must_share_the_grid(self):
        """
        Two channels are stacked in the order asked for, if they have the same voxels.
        """
        a, b = Scan(np.ones((1, 2, 3, 4), np.float32), np.eye(4)), Scan(np.zeros((1, 2, 3, 4), np.float32), np.eye(4))
        moved = np.eye(4)
        moved[0, 3] = 0.5

        np.testing.assert_array_equal(stacked([b, a]).image[:, 0, 0, 0], [0, 1])
        with pytest.raises(UnusableError, match="different grids"):
            stacked([a, Scan(b.image, moved)])


class TestMaskValues:
    def test_two_labels_mean_anything_above_zero(self):
        """
        Masks are drawn as 0/1 or 0/255.
        """
        np.testing.assert_array_equal(indices_from_mask(np.array([0, 1, 7, 255]), 2), [0, 1, 1, 1])

    def test_more_labels_mean_the_value_itself(self):
        """
        The value is the index into the plan's labels, as uint8.
        """
        indices = indices_from_mask(np.array([0.0, 2.0, 1.0]), 3)

        np.testing.assert_array_equal(indices, [0, 2, 1])
        assert indices.dtype == np.uint8

    @pytest.mark.parametrize("value", [3, -1, 0.5, 256])
    def test_value_without_a_name_is_refused(self, value):
        """
        A label that the plan does not name is neither dropped nor renamed.
        """
        with pytest.raises(UnusableError) as error:
            indices_from_mask(np.array([0, value]), 3)
        assert error.value.reason is Reason.LABEL_VALUES


class TestPhotographs:
    def test_colours_come_in_the_order_asked_for(self, tmp_path, write_picture):
        """
        Rows stay rows; the channel axis follows the plan.
        """
        values = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)
        path = write_picture(tmp_path / "a.png", values)

        scan = images.read_picture(path, ("green", "red"))

        assert scan.image.shape == (2, 1, 4, 6)
        assert scan.image.dtype == np.float32
        np.testing.assert_array_equal(scan.image[:, 0], values[..., [1, 0]].transpose(2, 0, 1))

    def test_grey_keeps_sixteen_bits(self, tmp_path, write_picture):
        """
        A grey picture is not squeezed into 8 bits.
        """
        values = np.array([[0, 1000], [40000, 65535]], dtype=np.uint16)

        scan = images.read_picture(write_picture(tmp_path / "a.png", values), ("image",))

        np.testing.assert_array_equal(scan.image[0, 0], values)

    def test_outside_the_field_of_view_is_background(self, tmp_path, write_picture):
        """
        A mask counts only where the camera saw something.
        """
        mask = write_picture(tmp_path / "mask.png", np.full((2, 3), 255, np.uint8))
        fov = write_picture(tmp_path / "fov.png", np.array([[0, 255, 255], [0, 0, 255]], np.uint8))

        np.testing.assert_array_equal(images.read_mask(mask, fov, 2), [[[0, 1, 1], [0, 0, 1]]])

    def test_one_bit_and_coloured_masks_are_masks(self, tmp_path, write_picture):
        """
        Some are stored with one bit per pixel, some as a colour picture.
        """
        drawn = np.array([[0, 1], [1, 0]], dtype=bool)
        Image.fromarray(drawn).save(tmp_path / "bit.png")
        coloured = write_picture(
            tmp_path / "colour.png", np.dstack([drawn * 200, drawn * 0, drawn * 0]).astype(np.uint8)
        )

        np.testing.assert_array_equal(images.read_mask(tmp_path / "bit.png", None, 2)[0], drawn)
        np.testing.assert_array_equal(images.read_mask(coloured, None, 2)[0], drawn)

    def test_truncated_picture_is_refused(self, tmp_path, write_picture):
        """
        Its header reads, its pixels do not.
        """
        path = write_picture(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8))
        path.write_bytes(path.read_bytes()[:2000])

        with pytest.raises(UnusableError) as error:
            images.read_picture(path, images.COLOURS)
        assert error.value.reason is Reason.PIXELS


class TestIndex:
    def test_index_without_a_site_column_counts_for_all(self, tmp_path):
        """
        An index inside the folder need not name the folder.
        """
        (tmp_path / "index.csv").write_text("id,subject,split\na,anna,val\nb,bert,\n")

        index = images.Index.of(tmp_path)

        assert index.subjects == {"a": "anna", "b": "bert"}
        assert index.splits == {"a": "validation"}

    def test_index_says_which_camera_took_a_photograph(self, tmp_path, secret, write_picture):
        """
        Photographs have no header for it; masks were taken by nobody. An empty field names no camera.
        """
        (tmp_path / "index.csv").write_text("id,scanner\na,NIDEK  NM-200-D \nb, \n")
        index = images.Index.of(tmp_path)

        def scanners(relative):
            path = tmp_path / relative
            path.parent.mkdir(exist_ok=True)
            write_picture(path, np.zeros((50, 60), np.uint8))
            return [one.scanner for one in images.inspect_picture(path, PurePosixPath(relative), secret, index)]

        assert scanners("images/a.png") == ["NIDEK NM-200-D"]
        assert scanners("masks/a.png") == scanners("images/b.png") == scanners("images/c.png") == [None]

    def test_folder_without_an_index_has_an_empty_one(self, tmp_path):
        """
        Then every photograph is a patient of its own.
        """
        assert images.Index.of(tmp_path / "nowhere") == images.Index({}, {})
