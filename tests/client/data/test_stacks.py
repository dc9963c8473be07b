"""Planes that belong together become one volume, and others do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.data import get_testdata_file
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    PositronEmissionTomographyImageStorage,
    RLELossless,
)

from client.data import dicom
from client.data.preprocessing import on_patient_axes, on_scan_grid, straightened
from client.data.scan import Scan
from client.data.skips import Reason, UnusableError
from shared_models.plan import DataTable

VALUES = np.arange(4 * 6 * 8).reshape(4, 6, 8)


def write_all(series, change):
    """Change every file; ``change`` gets the data set and its number."""
    for n, path in enumerate(series.files):
        ds = dcmread(path)
        change(ds, n)
        ds.save_as(path)
    return series.files


class TestVolumesOfOneSeries:
    def test_time_points_are_told_apart_by_their_order(self, tmp_path, write_series):
        """
        Two images at each place: the first of each by temporal position form the first volume.
        """
        series = write_series(tmp_path, np.concatenate([VALUES, VALUES + 1000]))

        def put(ds, n):
            ds.ImagePositionPatient = [0, 0, 4.0 * (n % 4)]
            ds.TemporalPositionIdentifier = 2 - n // 4  # the second half comes first

        files = write_all(series, put)

        later, earlier = sorted(dicom.read_volumes(files), key=lambda s: -s.scan.image[0, 0, 0, 0])
        first, second = dicom.read_volumes(files)
        assert len(first.uids) == len(second.uids) == 4
        np.testing.assert_array_equal(first.scan.image[0], VALUES + 1000)
        np.testing.assert_array_equal(second.scan.image[0], VALUES)
        assert later.scan.image.mean() > earlier.scan.image.mean()
        with pytest.raises(UnusableError, match="several volumes"):
            dicom.read_series(files, even=True)

    def test_echoes_are_told_apart_before_time(self, tmp_path, write_series):
        """
        Images of two echoes whose numbers run through each other.
        """
        series = write_series(tmp_path, np.concatenate([VALUES, VALUES + 1000]))

        def put(ds, n):
            ds.ImagePositionPatient = [0, 0, 4.0 * (n // 2)]
            ds.EchoTime = (20.0, 80.0)[n % 2]

        short, long = dicom.read_volumes(write_all(series, put))

        whole = np.concatenate([VALUES, VALUES + 1000])
        np.testing.assert_array_equal(short.scan.image[0], whole[::2])
        np.testing.assert_array_equal(long.scan.image[0], whole[1::2])

    def test_localizer_is_left_aside(self, tmp_path, write_series):
        """
        A scout across the slices, in the same series, does not keep the volume from being used.
        """
        series = write_series(tmp_path, np.concatenate([VALUES, VALUES[:1]]))

        def put(ds, n):
            if n == 4:
                ds.ImageType, ds.ImageOrientationPatient = ["ORIGINAL", "PRIMARY", "LOCALIZER"], [0, 1, 0, 0, 0, -1]

        assert dicom.read_series(write_all(series, put), even=True).scan.shape == (4, 6, 8)

    def test_tilted_gantry_is_a_sheared_volume(self, tmp_path, write_series):
        """
        Slices that lie evenly aside: the affine says so, and straightened they lie above each other.
        """
        image = np.zeros((5, 9, 12), dtype=int)
        for k in range(5):
            image[k, 5 - k, 4] = 900  # a needle along the normal through planes that drift by a row each
        series = write_series(tmp_path, image, spacing=(4.0, 2.0, 1.0))

        def put(ds, n):
            ds.ImagePositionPatient = [0.0, 2.0 * n, 4.0 * n]

        scan = dicom.read_series(write_all(series, put), even=True).scan

        np.testing.assert_allclose(scan.affine[:3, 2], [0, 2, 4], atol=1e-9)
        needle = straightened(scan)
        np.testing.assert_allclose(needle.affine[:3, 2], [0, 0, 4], atol=1e-9)
        np.testing.assert_array_equal(np.argwhere(needle.image[0] > 450), [[k, 3, 4] for k in range(5)])
        np.testing.assert_allclose(needle.affine @ [4, 3, 2, 1], scan.affine @ [4, 3, 2, 1], atol=1e-9)

    def test_what_is_found_in_a_tilted_series_comes_back_to_its_own_voxels(self):
        """
        A needle that straightening has put upright leans again where a prediction goes back to the scanner's slices.
        """
        values = np.zeros((1, 5, 9, 12), np.float32)
        for k in range(5):
            values[0, k, 5 - k, 4] = 1.0
        affine = np.array([[1.0, 0, 0, 0], [0, 2, 2, 0], [0, 0, 4, 0], [0, 0, 0, 1]])
        scan = Scan(values, affine)
        volume = on_patient_axes(scan, DataTable(modality="MR", dimensions=3, patch=(8, 8, 8)))

        back = on_scan_grid(volume.image, scan, volume.spacing_mm)

        np.testing.assert_allclose(back, values, atol=1e-5)

    def test_straight_scan_passes_as_it_is(self):
        """
        Nothing is resampled where nothing leans.
        """
        scan = Scan(np.ones((1, 3, 4, 5), np.float32), np.diag([1.0, 2.0, 3.0, 1.0]))

        assert straightened(scan) is scan


class TestPixels:
    @pytest.mark.parametrize(
        "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless]
    )
    def test_values_are_the_same_in_every_transfer_syntax(self, tmp_path, write_series, syntax):
        """
        However they are encoded.
        """
        series = write_series(tmp_path, VALUES - 90, RescaleSlope=2.0, RescaleIntercept=1.0)
        for path in series.files:
            ds = dcmread(path)
            if syntax == RLELossless:
                ds.compress(syntax)
                ds.save_as(path)
                continue
            stored, ds.file_meta.TransferSyntaxUID = ds.pixel_array, syntax
            if syntax == ExplicitVRBigEndian:
                ds.decode()
                ds.PixelData = stored.astype(">i2").tobytes()
                dcmwrite(path, ds, implicit_vr=False, little_endian=False, force_encoding=True)
            else:
                ds.save_as(path, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=True)

        np.testing.assert_array_equal(dicom.read_series(series.files, even=True).scan.image[0], (VALUES - 90) * 2.0 + 1)

    @pytest.mark.parametrize("implicit", [True, False])
    def test_file_without_meta_information_is_read(self, tmp_path, write_series, implicit):
        """
        Neither preamble nor transfer syntax, as old archives send them.
        """
        series = write_series(tmp_path, VALUES)
        for path in series.files:
            ds = dcmread(path)
            del ds.file_meta
            ds.preamble = None
            ds.save_as(path, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
            assert path.read_bytes()[128:132] != b"DICM"

        np.testing.assert_array_equal(dicom.read_series(series.files, even=True).scan.image[0], VALUES)

    def test_overlay_in_unused_bits_is_not_seen(self, tmp_path, write_series):
        """
        Twelve bits are stored in sixteen; what an old machine drew into the others is no intensity.
        """
        series = write_series(tmp_path, VALUES)

        def draw(ds, n):
            ds.PixelRepresentation, ds.BitsStored, ds.HighBit = 0, 12, 11
            ds.PixelData = (VALUES[n].astype(np.uint16) | 0x4000).tobytes()

        np.testing.assert_array_equal(dicom.read_series(write_all(series, draw), even=True).scan.image[0], VALUES)

    def test_each_slice_has_its_own_rescale_values(self, tmp_path, write_series):
        """
        As PET and Philips write them.
        """
        series = write_series(tmp_path, VALUES)

        def scale(ds, n):
            ds.RescaleSlope, ds.RescaleIntercept = n + 1.0, float(-n)

        slopes = np.arange(1.0, 5.0)[:, None, None]
        np.testing.assert_allclose(
            dicom.read_series(write_all(series, scale), even=True).scan.image[0], VALUES * slopes - (slopes - 1)
        )

    def test_photograph_has_three_channels(self, tmp_path, write_series):
        """
        Colour comes as red, green and blue; a picture of no modality with a place needs none.
        """
        rgb = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
        series = write_series(tmp_path, VALUES[:1])

        def colour(ds, _):
            ds.Modality, ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = "XC", 3, "RGB", 0
            ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
            ds.PixelData = rgb.tobytes()
            for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
                delattr(ds, tag)

        scan = dicom.read_series(write_all(series, colour), even=False).scan

        assert scan.affine is None
        np.testing.assert_array_equal(scan.image[:, 0], np.moveaxis(rgb, -1, 0))

    def test_radiograph_has_the_spacing_of_its_detector(self, tmp_path, write_series):
        """
        A projection has no place in the patient, and rows and columns with a distance.
        """
        series = write_series(tmp_path, VALUES[:1])

        def project(ds, _):
            ds.Modality, ds.ImagerPixelSpacing = "DX", [0.2, 0.1]
            for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
                delattr(ds, tag)

        scan = dicom.read_series(write_all(series, project), even=False).scan

        np.testing.assert_array_equal(np.diag(scan.affine), [0.1, 0.2, 1, 1])


class TestUnits:
    def test_ct_is_in_hounsfield_units(self, tmp_path, write_series):
        """
        By its own rescale values.
        """
        series = write_series(tmp_path, VALUES, Modality="CT", SOPClassUID=CTImageStorage, RescaleIntercept=-1024.0)

        stack = dicom.read_series(series.files, even=True)

        assert stack.unit == "HU"
        assert stack.scan.image.min() == -1024

    def test_pet_is_in_uptake_values_where_its_header_allows(self, tmp_path, write_series):
        """
        70 kg, 350 MBq, one half-life between injection and scan: a Bq/ml is 70,000 g / 175,000,000 Bq.
        """
        dose = Dataset()
        dose.RadionuclideTotalDose, dose.RadionuclideHalfLife = 350e6, 6600.0
        dose.RadiopharmaceuticalStartTime = "100000"
        header = {
            "Modality": "PT", "SOPClassUID": PositronEmissionTomographyImageStorage, "Units": "BQML",
            "CorrectedImage": ["ATTN", "DECY"], "DecayCorrection": "START", "SeriesTime": "115000.00",
            "PatientWeight": "70",
        }  # fmt: skip
        known = write_series(tmp_path / "a", VALUES, **header, RadiopharmaceuticalInformationSequence=Sequence([dose]))
        unknown = write_series(tmp_path / "b", VALUES, **header)

        suv, activity = (dicom.read_series(s.files, even=True) for s in (known, unknown))

        assert (suv.unit, activity.unit) == ("SUV", "Bq/ml")
        np.testing.assert_allclose(suv.scan.image[0], VALUES * 70_000 / 175e6, rtol=1e-5)
        np.testing.assert_array_equal(activity.scan.image[0], VALUES)


class TestContours:
    @pytest.fixture
    def series(self, tmp_path, write_series):
        return write_series(tmp_path, np.zeros((4, 20, 24)), spacing=(4.0, 2.0, 1.0), shuffle=2)

    def write(self, tmp_path, regions):
        """Regions by name, each a list of contours as (slice, rows and columns of a rectangle's edges)."""
        rt = Dataset()
        rt.SOPClassUID, rt.SOPInstanceUID, rt.Modality = "1.2.840.10008.5.1.4.1.1.481.3", "1.2.3", "RTSTRUCT"
        rt.StructureSetROISequence, rt.ROIContourSequence = [], []
        for number, (name, rectangles) in enumerate(regions.items(), start=1):
            roi, drawn = Dataset(), Dataset()
            roi.ROINumber, roi.ROIName, drawn.ReferencedROINumber, drawn.ContourSequence = number, name, number, []
            for k, top, bottom, left, right in rectangles:
                contour = Dataset()
                contour.ContourGeometricType = "CLOSED_PLANAR"
                corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
                contour.ContourData = [v for x, y in corners for v in (1.0 * x, 2.0 * y, 4.0 * k)]
                drawn.ContourSequence.append(contour)
            rt.StructureSetROISequence.append(roi)
            rt.ROIContourSequence.append(drawn)
        path = tmp_path / "structures.dcm"
        rt.save_as(path, implicit_vr=False, little_endian=True)
        return path

    def test_voxels_whose_centre_is_inside_are_filled(self, tmp_path, series):
        """
        A rectangle with a hole on one slice, and nothing on the others.
        """
        regions = {"Lesion": [(2, 3.5, 12.5, 4.5, 16.5), (2, 6.5, 8.5, 7.5, 10.5)]}
        stack = dicom.read_series(series.files, even=True)

        label = dicom.read_structures(self.write(tmp_path, regions), stack, ("background", "lesion"))

        expected = np.zeros((4, 20, 24), dtype=np.uint8)
        expected[2, 4:13, 5:17] = 1
        expected[2, 7:9, 8:11] = 0
        np.testing.assert_array_equal(label, expected)

    @pytest.mark.parametrize(
        ("regions", "reason"),
        [
            ({"bladder": [(2, 3, 12, 4, 16)]}, Reason.LABEL_NAMES),
            ({"lesion": [(7, 3, 12, 4, 16)]}, Reason.LABEL_PLACE),
            ({"lesion": [(1.5, 3, 12, 4, 16)]}, Reason.LABEL_PLACE),
        ],
    )
    def test_contours_of_elsewhere_are_refused(self, tmp_path, series, regions, reason):
        """
        Another name, a slice that is not there, a plane between two slices.
        """
        stack = dicom.read_series(series.files, even=True)

        with pytest.raises(UnusableError) as error:
            dicom.read_structures(self.write(tmp_path, regions), stack, ("background", "lesion"))

        assert error.value.reason is reason


class TestDose:
    def test_dose_grid_lies_where_its_offsets_say(self):
        """
        RT dose: frames by Grid Frame Offset Vector, in gray by Dose Grid Scaling; places as SimpleITK has them.
        """
        path = Path(get_testdata_file("rtdose.dcm"))

        (stack,) = dicom.read_volumes([path])

        image = SimpleITK.ReadImage(str(path))
        assert stack.scan.shape == image.GetSize()[::-1]
        np.testing.assert_allclose(stack.scan.affine[:3, 3], image.GetOrigin())
        np.testing.assert_allclose(np.diag(stack.scan.affine)[:3], image.GetSpacing())
        np.testing.assert_allclose(stack.scan.image[0], 1e-6 * SimpleITK.GetArrayFromImage(image), rtol=1e-6)
