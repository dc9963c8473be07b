"""A series lies where its header says, and a segmentation lies on its series."""

from __future__ import annotations

import numpy as np
import pytest
from pydicom import Dataset, dcmread

from client.data import dicom
from client.data.preprocessing import prepare
from client.data.skips import Reason, UnusableError

OBLIQUE = (0.8, 0.6, 0.0, -0.36, 0.48, 0.8)
"""Row and column direction of a doubly tilted plane; both have length 1 and their product is 0."""


def scan_of(series, *, even=True):
    return dicom.read_series(series.files, even=even).scan


class TestSeries:
    def test_slices_are_sorted_by_place_and_not_by_name(self, tmp_path, write_series):
        """
        Files in shuffled order come back in the order in which they lie in the patient.
        """
        values = np.arange(6 * 5 * 4).reshape(6, 5, 4)

        image = scan_of(write_series(tmp_path, values, shuffle=3)).image

        assert image.dtype == np.float32
        np.testing.assert_array_equal(image[0], values)

    @pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1), (-1, 0, 0, 0, 1, 0), OBLIQUE])
    def test_bright_voxel_is_at_its_patient_coordinates(self, tmp_path, write_series, orientation):
        """
        Position + column * row direction * column spacing + row * column direction * row spacing, as in the standard.
        """
        values = np.zeros((5, 7, 6), dtype=int)
        values[3, 5, 2] = 900
        series = write_series(
            tmp_path, values, orientation=orientation, origin=(-30.0, 12.5, 8.0), spacing=(3.0, 2.0, 0.5), shuffle=1
        )
        bright = next(ds for ds in series.datasets if ds.pixel_array.max() == 900)
        along_row, along_column = np.array(orientation[:3]), np.array(orientation[3:])
        expected_mm = np.array(bright.ImagePositionPatient, dtype=float) + 2 * 0.5 * along_row + 5 * 2.0 * along_column

        scan = scan_of(series)

        k, i, j = np.argwhere(scan.image[0] == 900)[0]
        np.testing.assert_allclose((scan.affine @ [j, i, k, 1])[:3], expected_mm, atol=1e-5)

    def test_bright_voxel_of_an_oblique_series_ends_up_on_the_patients_left_back_top(
        self, tmp_path, write_series, plan
    ):
        """
        A series whose axes all point the other way (right, front, feet) and lie oblique: after preparation the voxel
        furthest to the left, back and head has the largest indices, and the spacings go with their axes.
        """
        row, column = -np.array([np.cos(0.2), np.sin(0.2), 0]), -np.array([-np.sin(0.2), np.cos(0.2), 0])
        values = np.full((5, 7, 6), 10)
        values[0, 0, 0] = 900  # first column: the leftmost, since columns run to the right; first row: the backmost
        values[-1] += 5  # the last slice is towards the head: the normal of these two directions points up
        series = write_series(tmp_path, values, orientation=(*row, *column), spacing=(3.0, 2.0, 0.5), shuffle=2)

        volume = prepare(scan_of(series), plan().data)

        assert volume.spacing_mm == pytest.approx((3.0, 2.0, 0.5))
        assert volume.image.shape == (1, 5, 7, 6)
        np.testing.assert_array_equal(np.unravel_index(volume.image[0].argmax(), (5, 7, 6)), (0, 6, 5))
        assert volume.image[0, -1].mean() > volume.image[0, 1].mean()

    def test_slope_and_intercept_give_the_intensities(self, tmp_path, write_series):
        """
        Stored value times Rescale Slope plus Rescale Intercept.
        """
        values = np.arange(2 * 3 * 4).reshape(2, 3, 4)

        image = scan_of(write_series(tmp_path, values, RescaleSlope=2.5, RescaleIntercept=-7.0)).image

        np.testing.assert_allclose(image[0], values * 2.5 - 7.0)

    def test_inverted_grey_values_are_turned_round(self, tmp_path, write_series):
        """
        MONOCHROME1 stores bright as low.
        """
        values = np.arange(2 * 3 * 4).reshape(2, 3, 4)

        image = scan_of(write_series(tmp_path, values, PhotometricInterpretation="MONOCHROME1")).image

        np.testing.assert_array_equal(image[0], -values)

    def test_single_slice_takes_its_thickness(self, tmp_path, write_series):
        """
        One slice has no distance to a next one.
        """
        scan = scan_of(write_series(tmp_path, np.ones((1, 4, 4)), spacing=(5.0, 1.0, 1.0)))

        assert np.linalg.norm(scan.affine[:3, 2]) == pytest.approx(5.0)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda ds: setattr(ds, "ImageOrientationPatient", [0, 1, 0, 0, 0, -1]), Reason.SLICES_DIFFER),
            (lambda ds: setattr(ds, "PixelSpacing", [3, 3]), Reason.SLICES_DIFFER),
            (lambda ds: setattr(ds, "ImagePositionPatient", [0, 0, 8]), Reason.DUPLICATE_SLICES),
            (lambda ds: setattr(ds, "ImagePositionPatient", [0, 0, 5]), Reason.UNEVEN_SLICES),
            (lambda ds: setattr(ds, "ImagePositionPatient", [9, 0, 4]), Reason.BAD_GEOMETRY),
            (lambda ds: setattr(ds, "ImagePositionPatient", [0, 0, 999]), Reason.UNEVEN_SLICES),
            (lambda ds: setattr(ds, "Rows", 3), Reason.SLICES_DIFFER),
            (lambda ds: setattr(ds, "PixelData", ds.PixelData[:6]), Reason.DAMAGED),
            (lambda ds: setattr(ds, "PhotometricInterpretation", "PALETTE COLOR"), Reason.SLICES_DIFFER),
        ],
    )
    def test_slices_that_form_no_stack_are_refused(self, tmp_path, write_series, edit, change, reason):
        """
        The second of five slices is changed: each trouble has its own reason.
        """
        series = write_series(tmp_path, np.ones((5, 4, 4)))
        edit(series.files[1], change)

        with pytest.raises(UnusableError) as error:
            scan_of(series)

        assert error.value.reason is reason

    @pytest.mark.parametrize(
        "tags",
        [
            {"orientation": (2, 0, 0, 0, 1, 0)},
            {"orientation": (1, 0, 0, 1, 0, 0)},
            {"spacing": (4.0, 0.0, 1.0)},
            {"orientation": (0, 0, 0, 0, 0, 0)},
        ],
    )
    def test_impossible_geometry_is_refused(self, tmp_path, write_series, tags):
        """
        Directions that are no directions, pixels without a size.
        """
        with pytest.raises(UnusableError) as error:
            scan_of(write_series(tmp_path, np.ones((1, 4, 4)), **tags))

        assert error.value.reason is Reason.BAD_GEOMETRY

    def test_missing_slice_matters_in_three_dimensions_only(self, tmp_path, write_series):
        """
        Single slices are complete without their neighbour; a volume is not.
        """
        series = write_series(tmp_path, np.ones((5, 4, 4)))
        del series.files[2]

        assert scan_of(series, even=False).shape == (4, 4, 4)
        with pytest.raises(UnusableError, match="unevenly spaced"):
            scan_of(series)


class TestSegmentation:
    LABELS = ("background", "oedema", "Lesion")

    @pytest.fixture
    def series(self, tmp_path, write_series):
        return write_series(tmp_path, np.ones((5, 7, 6)), orientation=OBLIQUE, spacing=(3.0, 2.0, 0.5), shuffle=5)

    @pytest.fixture
    def mask(self):
        """In the order of the files, not of the slices; two files have nothing."""
        mask = np.random.default_rng(0).random((5, 7, 6)) > 0.7
        mask[[1, 4]] = False
        return mask

    def expected(self, series, mask, index):
        """The mask in the order of the slices along the normal, by their positions."""
        along = np.cross(OBLIQUE[:3], OBLIQUE[3:])
        order = np.argsort([along @ np.array(ds.ImagePositionPatient, dtype=float) for ds in series.datasets])
        return mask[order] * index

    def read(self, path, series, labels=LABELS):
        return dicom.read_segmentation(path, dicom.read_series(series.files, even=True), labels)

    def test_mask_lies_on_the_slices_it_was_drawn_on(self, series, mask, write_seg):
        """
        Each frame goes to the slice it names; slices without a frame are background.
        """
        label = self.read(write_seg(series, {"lesion": mask}), series)

        assert label.dtype == np.uint8
        np.testing.assert_array_equal(label, self.expected(series, mask, 2))

    @pytest.mark.parametrize("shape", [(5, 7, 5), (9, 3, 5), (9, 3, 3), (4, 4, 4)])
    def test_frames_of_any_number_of_pixels_are_read(self, tmp_path, write_series, write_seg, shape):
        """
        Frames of single bits follow each other without a gap, so one may begin and end anywhere within a byte.
        """
        series = write_series(tmp_path, np.ones(shape), shuffle=5)
        mask = np.random.default_rng(1).random(shape) > 0.5
        mask[:, 0, 0] = True
        order = np.argsort([float(ds.ImagePositionPatient[2]) for ds in series.datasets])

        np.testing.assert_array_equal(self.read(write_seg(series, {"lesion": mask}), series), mask[order] * 2)

    def test_frames_without_a_name_go_by_their_position(self, series, mask, write_seg, edit):
        """
        Where a frame names no slice, the place of its plane decides.
        """
        path = write_seg(series, {"LESION": mask})

        def forget_sources(ds: Dataset):
            for frame in ds.PerFrameFunctionalGroupsSequence:
                del frame.DerivationImageSequence

        edit(path, forget_sources)

        np.testing.assert_array_equal(self.read(path, series), self.expected(series, mask, 2))

    def test_segments_get_the_index_of_their_name(self, series, mask, write_seg):
        """
        The order in the file does not matter, unknown segments are background, the later label wins an overlap.
        """
        other = np.roll(mask, 1, axis=2)
        path = write_seg(series, {"Skull": ~mask, "lesion": mask, "Oedema": other})

        label = self.read(path, series)

        expected = np.where(self.expected(series, mask, 1), 2, self.expected(series, other, 1))
        np.testing.assert_array_equal(label, expected)

    def test_segmentation_without_a_known_name_is_refused(self, series, mask, write_seg):
        """
        A segment of another name is not guessed to be the lesion.
        """
        with pytest.raises(UnusableError, match="no segment is named"):
            self.read(write_seg(series, {"nodule": mask}), series)

    def test_segmentation_of_another_size_is_refused(self, series, mask, write_seg, edit):
        """
        Rows and columns must be those of the images.
        """
        path = write_seg(series, {"lesion": mask})
        edit(path, lambda ds: setattr(ds, "Rows", 6))

        with pytest.raises(UnusableError, match="another size"):
            self.read(path, series)

    def test_segmentation_of_another_place_is_refused(self, series, tmp_path, mask, write_seg, write_series):
        """
        Drawn on another series a few millimetres away: no frame lies on ours.
        """
        away = write_series(
            tmp_path / "b", np.ones((5, 7, 6)), orientation=OBLIQUE, spacing=(3, 2, 0.5), origin=(9, 9, 9)
        )

        with pytest.raises(UnusableError, match="does not lie on its image"):
            self.read(write_seg(away, {"lesion": mask}), series)

    def test_flipped_segmentation_is_refused(self, series, mask, write_seg, edit):
        """
        The same slices by name, but rows and columns along other directions.
        """
        path = write_seg(series, {"lesion": mask})

        def flip(ds: Dataset):
            plane = ds.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0]
            plane.ImageOrientationPatient = [-v for v in plane.ImageOrientationPatient]

        edit(path, flip)

        with pytest.raises(UnusableError, match="does not lie on its image"):
            self.read(path, series)

    def test_fractional_segmentation_counts_from_one_half(self, series, mask, write_seg, edit):
        """
        Probabilities of 0.4 are background, of 0.6 lesion.
        """
        path = write_seg(series, {"lesion": mask})

        def make_fractional(ds: Dataset):
            ds.SegmentationType, ds.MaximumFractionalValue = "FRACTIONAL", 100
            ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
            sources = [f.DerivationImageSequence[0].SourceImageSequence[0] for f in ds.PerFrameFunctionalGroupsSequence]
            by_uid = {str(d.SOPInstanceUID): mask[n] for n, d in enumerate(series.datasets)}
            values = [np.where(by_uid[s.ReferencedSOPInstanceUID], 60, 40) for s in sources]
            ds.PixelData = np.array(values, dtype=np.uint8).tobytes()

        edit(path, make_fractional)

        np.testing.assert_array_equal(self.read(path, series), self.expected(series, mask, 2))


class TestRealSeries:
    def test_real_series_stack_up_and_decode(self, shared_data):
        """
        150 slices of a GE fMRI series: evenly spaced, decoded, plausible.
        """
        paths = sorted((shared_data / "dicom" / "ge_mr750_fmri").rglob("*.dcm"))
        by_place = {}
        for path in paths:
            by_place.setdefault(tuple(dcmread(path, stop_before_pixels=True).ImagePositionPatient), path)

        scan = dicom.read_series(list(by_place.values()), even=True).scan

        assert scan.shape[0] == len(by_place)
        assert 1 < np.linalg.norm(scan.affine[:3, 2]) < 10
        assert np.isfinite(scan.image).all()
        assert scan.image.std() > 0
