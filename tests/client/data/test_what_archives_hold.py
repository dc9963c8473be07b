"""Every way of storing an image that archives hold, written here and read back: one small file of each."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import imagecodecs
import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    HTJ2K,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    MRImageStorage,
    RLELossless,
    RTStructureSetStorage,
    generate_uid,
)

from client.data import codecs, dicom
from client.data.catalogue import Catalogue
from client.data.cohort import Cohort
from client.data.dicom_files import DEFLATED_FRAMES, GRID_TAG
from client.data.skips import Reason, UnusableError

ROWS, COLUMNS = 24, 32
Encode = Callable[[np.ndarray], bytes]


def image(bits: int, seed: int = 0) -> np.ndarray:
    """A smooth image that uses all of its bits."""
    y, x = np.mgrid[:ROWS, :COLUMNS]
    top = 2**bits - 1
    values = (0.5 + 0.5 * np.sin((x + seed) / 5) * np.cos(y / 7)) * top
    return values.round().astype(np.uint8 if bits == 8 else np.uint16)


def run_lengths(values: np.ndarray) -> bytes:
    from rle.utils import encode_array

    ds = Dataset()
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.BitsAllocated = *values.shape, 1, 8 * values.itemsize
    ds.PixelRepresentation, ds.PhotometricInterpretation, ds.NumberOfFrames = 0, "MONOCHROME2", 1
    return next(encode_array(values, ds))


def deflated(values: np.ndarray) -> bytes:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    data = deflater.compress(values.tobytes()) + deflater.flush()
    return data + bytes(len(data) % 2)


def lossless(predictor: int, bits: int) -> Encode:
    return lambda v: imagecodecs.jpeg8_encode(v, lossless=True, predictor=predictor, bitspersample=bits)


def stored(path, frames: list[bytes], bits: int, syntax: str, **tags) -> None:
    """Put encoded frames in the place of a file's pixels."""
    ds = dcmread(path)
    ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit if syntax == DEFLATED_FRAMES else syntax
    ds.Rows, ds.Columns = ROWS, COLUMNS
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8 if bits == 8 else 16, bits, bits - 1, 0
    for name, value in tags.items():
        setattr(ds, name, value)
    ds.PixelData = encapsulate(frames)
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    ds.save_as(path, implicit_vr=False, little_endian=True)
    if syntax == DEFLATED_FRAMES:  # which pydicom does not know
        path.write_bytes(path.read_bytes().replace(JPEGBaseline8Bit.encode(), DEFLATED_FRAMES.encode() + b"\0", 1))


@pytest.fixture
def series(tmp_path, write_series):
    return write_series(tmp_path, np.zeros((2, ROWS, COLUMNS)))


CASES: list[tuple[str, int, Encode, int]] = [
    (RLELossless, 8, run_lengths, 0),
    (RLELossless, 16, run_lengths, 0),
    (JPEGBaseline8Bit, 8, lambda v: imagecodecs.jpeg8_encode(v, level=100), 2),
    (JPEGExtended12Bit, 12, lambda v: imagecodecs.jpeg8_encode(v, level=100, bitspersample=12), 2),
    *((JPEGLosslessSV1, bits, lossless(1, bits), 0) for bits in (8, 10, 12, 16)),
    *((JPEGLossless, 12, lossless(predictor, 12), 0) for predictor in range(1, 8)),
    (JPEGLSLossless, 12, imagecodecs.jpegls_encode, 0),
    (JPEGLSNearLossless, 12, lambda v: imagecodecs.jpegls_encode(v, level=3), 3),
    (JPEG2000Lossless, 16, lambda v: imagecodecs.jpeg2k_encode(v, codecformat="j2k", reversible=True, level=0), 0),
    (HTJ2KLossless, 16, lambda v: imagecodecs.htj2k_encode(v, reversible=True), 0),
    (HTJ2K, 16, lambda v: imagecodecs.htj2k_encode(v, reversible=True), 0),
    (DEFLATED_FRAMES, 16, deflated, 0),
]


class TestCompressed:
    @pytest.mark.parametrize(("syntax", "bits", "encode", "tolerance"), CASES)
    def test_values_come_back_from_every_compression(self, series, syntax, bits, encode, tolerance):
        """
        The same values where nothing is lost, and next to them where the compression is lossy.
        """
        images = [image(bits, seed) for seed in range(2)]
        for path, values in zip(series.files, images, strict=True):
            stored(path, [encode(values)], bits, syntax)

        found = dicom.read_series(series.files, even=True).scan.image[0]

        assert np.abs(found - np.stack(images)).max() <= tolerance
        assert np.ptp(found) > 0.9 * 2**bits

    def test_signed_values_keep_their_sign(self, series):
        """
        Twelve bits with a sign, in lossless JPEG and in run lengths.
        """
        values = image(12).astype(np.int16) - 2048
        for path, syntax in zip(series.files, (JPEGLosslessSV1, RLELossless), strict=True):
            unsigned = values.view(np.uint16) & (0xFFF if syntax == JPEGLosslessSV1 else 0xFFFF)
            frame = lossless(1, 12)(unsigned) if syntax == JPEGLosslessSV1 else run_lengths(unsigned)
            stored(path, [frame], 12, syntax, PixelRepresentation=1)

        found = dicom.read_series(series.files, even=True).scan.image[0]

        np.testing.assert_array_equal(found, np.stack([values, values]))

    @pytest.mark.parametrize(("syntax", "encode"), [(RLELossless, run_lengths), (JPEGLosslessSV1, lossless(1, 16))])
    def test_quick_decoder_says_what_another_says_or_refuses(self, series, syntax, encode):
        """
        The same values as pydicom's decoder; a frame of another size or depth than the header says is none.
        """
        frame = encode(image(16))
        stored(series.files[0], [frame], 16, syntax)
        theirs = next(get_decoder(syntax).iter_array(dcmread(series.files[0]), decoding_plugin="pylibjpeg"))[0]
        ours = np.empty((ROWS, COLUMNS), np.uint16)

        codecs.decode(frame, syntax, ours)

        np.testing.assert_array_equal(ours, theirs)
        for other in (np.empty((ROWS + 1, COLUMNS), np.uint16), np.empty((ROWS, COLUMNS), np.uint8)):
            with pytest.raises((ValueError, RuntimeError)):
                codecs.decode(frame, syntax, other)

    @pytest.mark.parametrize("syntax", [RLELossless, JPEGLosslessSV1])
    def test_colour_is_left_to_another_decoder(self, tmp_path, write_series, syntax):
        """
        Red, green and blue come back as they were.
        """
        series = write_series(tmp_path, np.zeros((1, ROWS, COLUMNS)))
        rgb = np.stack([image(8, seed) for seed in (0, 5, 9)], axis=-1)
        tags = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0, "Modality": "XC"}
        if syntax == RLELossless:
            ds = dcmread(series.files[0])
            for name, value in tags.items():
                setattr(ds, name, value)
            ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
            ds.PixelData = rgb.tobytes()
            ds.compress(syntax)
            ds.save_as(series.files[0])
        else:
            frame = imagecodecs.jpeg8_encode(rgb, lossless=True, predictor=1, colorspace="rgb", outcolorspace="rgb")
            stored(series.files[0], [frame], 8, syntax, **tags)

        np.testing.assert_array_equal(
            dicom.read_series(series.files, even=False).scan.image[:, 0], np.moveaxis(rgb, -1, 0)
        )

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
    def test_run_lengths_that_end_early_are_no_image(self, series, share):
        """
        No decoder fills in what is missing without a word.
        """
        whole = run_lengths(image(16))
        stored(series.files[0], [whole[: int(share * len(whole)) // 2 * 2] or b"\0\0"], 16, RLELossless)

        with pytest.raises(UnusableError, match=Reason.PIXELS.value):
            dicom.read_volumes(series.files[:1])


class TestUncompressed:
    @pytest.mark.parametrize(
        ("dtype", "bits"), [("u1", 8), ("i1", 8), ("<u2", 16), ("<i2", 12), ("<u2", 12), ("<u4", 32), ("<i4", 32)]
    )
    def test_whole_numbers_of_every_size_come_back(self, tmp_path, write_series, dtype, bits):
        """
        Signed and unsigned, in one, two and four bytes, with all bits in use or some of them.
        """
        info = np.iinfo(dtype)
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if info.min < 0 else (0, 2**bits - 1)
        values = np.linspace(low, high, ROWS * COLUMNS).round().astype(dtype).reshape(ROWS, COLUMNS)
        series = write_series(tmp_path, np.zeros((1, ROWS, COLUMNS)))
        ds = dcmread(series.files[0])
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8 * info.dtype.itemsize, bits, bits - 1
        ds.PixelRepresentation, ds.PixelData = int(info.min < 0), values.tobytes()
        ds.save_as(series.files[0])

        found = dicom.read_series(series.files, even=True).scan.image[0, 0]

        np.testing.assert_array_equal(found, values.astype(np.float32))

    def test_sign_is_that_of_the_bits_in_use(self, series):
        """
        Of twelve bits in sixteen the twelfth is the sign, whatever stands above it.
        """
        values = image(12).astype(np.int16) - 2048
        for path in series.files:
            ds = dcmread(path)
            ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 12, 11, 1
            ds.PixelData = (values.view(np.uint16) & 0xFFF).tobytes()
            ds.save_as(path)

        np.testing.assert_array_equal(dicom.read_series(series.files, even=True).scan.image[0, 1], values)

    def test_palette_becomes_red_green_and_blue(self, tmp_path, write_series):
        """
        Stored numbers lead to colours; the picture has three channels.
        """
        series = write_series(tmp_path, np.zeros((1, 2, 3)))
        indices = np.array([[0, 1, 2], [3, 2, 1]], np.uint8)
        tables = {"Red": [0, 100, 200, 65535], "Green": [1, 2, 3, 4], "Blue": [9, 8, 7, 6]}
        ds = dcmread(series.files[0])
        ds.PhotometricInterpretation, ds.Modality = "PALETTE COLOR", "US"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
        for n, (name, table) in enumerate(tables.items()):
            ds.add_new(0x00281101 + n, "US", [4, 0, 16])
            setattr(ds, f"{name}PaletteColorLookupTableData", np.array(table, "<u2").tobytes())
        ds.PixelData = indices.tobytes()
        ds.save_as(series.files[0])

        found = dicom.read_series(series.files, even=False).scan.image

        np.testing.assert_array_equal(found[:, 0], np.array(list(tables.values()))[:, indices])


def bare(sop_class: str, values: np.ndarray) -> Dataset:
    """A data set with pixels ``(frame, row, column)`` and no place."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = sop_class
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.PatientID, ds.Modality = "P-1", "MR"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = generate_uid(), generate_uid()
    ds.NumberOfFrames, ds.Rows, ds.Columns = values.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    ds.PixelData = values.astype("<u2").tobytes()
    return ds


def item(**tags) -> Dataset:
    ds = Dataset()
    for name, value in tags.items():
        setattr(ds, name, value)
    return ds


class TestSeveralSlicesInOneFile:
    def test_frames_of_an_enhanced_image_find_their_places(self, tmp_path):
        """
        Two times of three places in any order, each frame with its own position and rescale values.
        """
        rng = np.random.default_rng(0)
        values = rng.integers(0, 1000, (6, 4, 5))
        order = [(t, k) for t in (1, 2) for k in range(3)]
        rng.shuffle(order)
        ds = bare(EnhancedMRImageStorage, values)
        ds.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
        ds.SharedFunctionalGroupsSequence = [
            item(
                PixelMeasuresSequence=[item(PixelSpacing=[2.0, 1.5], SliceThickness=3.0)],
                PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
            )
        ]
        ds.PerFrameFunctionalGroupsSequence = [
            item(
                FrameContentSequence=[item(TemporalPositionIndex=t)],
                PlanePositionSequence=[item(ImagePositionPatient=[10.0, 20.0, 3.0 * k])],
                PixelValueTransformationSequence=[item(RescaleSlope=t + 1.0, RescaleIntercept=-1.0 * k)],
            )
            for t, k in order
        ]
        ds.save_as(tmp_path / "enhanced.dcm", enforce_file_format=True)

        first, second = dicom.read_volumes([tmp_path / "enhanced.dcm"])

        for t, found in ((1, first), (2, second)):
            expected = np.stack([values[order.index((t, k))] * (t + 1.0) - k for k in range(3)])
            np.testing.assert_allclose(found.scan.image[0], expected)
            np.testing.assert_allclose(found.scan.affine[:3, 3], [10, 20, 0])
            np.testing.assert_allclose(np.diag(found.scan.affine)[:3], [1.5, 2, 3])
        with pytest.raises(UnusableError, match=Reason.SEVERAL_VOLUMES.value):
            dicom.read_series([tmp_path / "enhanced.dcm"], even=True)

    def test_number_of_groups_must_be_that_of_frames(self, tmp_path):
        """
        A file that describes two of its three frames is damaged.
        """
        ds = bare(EnhancedMRImageStorage, np.zeros((3, 4, 5)))
        ds.PerFrameFunctionalGroupsSequence = [item(FrameContentSequence=[item(TemporalPositionIndex=1)])] * 2
        ds.save_as(tmp_path / "enhanced.dcm", enforce_file_format=True)

        with pytest.raises(UnusableError) as error:
            dicom.read_volumes([tmp_path / "enhanced.dcm"])
        assert error.value.reason is Reason.DAMAGED

    def test_tiles_of_a_mosaic_become_slices(self, tmp_path):
        """
        Three slices as tiles of two by two; the header's place is where a tile of the whole size would begin.
        """
        tiles = np.random.default_rng(1).integers(0, 1000, (4, 4, 5))
        tiles[3] = 0
        plane = np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])])
        ds = bare(MRImageStorage, plane[None])
        ds.ImageType = ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]
        ds.ImageOrientationPatient, ds.PixelSpacing = [1, 0, 0, 0, 1, 0], [2.0, 1.5]
        ds.SliceThickness, ds.SpacingBetweenSlices = 3.0, 3.5
        ds.ImagePositionPatient = [10 - 1.5 * 5 / 2, 20 - 2.0 * 4 / 2, 30.0]
        ds.add_new(0x00190010, "LO", "SIEMENS MR HEADER")
        ds.add_new(0x0019100A, "US", 3)
        ds.save_as(tmp_path / "mosaic.dcm", enforce_file_format=True)

        scan = dicom.read_series([tmp_path / "mosaic.dcm"], even=True).scan

        np.testing.assert_array_equal(scan.image[0], tiles[:3])
        np.testing.assert_allclose(scan.affine[:3, 3], [10, 20, 30])
        np.testing.assert_allclose(np.diag(scan.affine)[:3], [1.5, 2, 3.5])

    def test_tiles_of_a_grid_lie_where_each_says(self, tmp_path):
        """
        As United Imaging writes them: three slices in two by two tiles, with their places in a private sequence.
        """
        tiles = np.random.default_rng(2).integers(0, 1000, (4, 4, 5))
        ds = bare(MRImageStorage, np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])])[None])
        ds.ImageType = ["ORIGINAL", "PRIMARY", "DIFFUSION", "VFRAME"]
        ds.ImageOrientationPatient, ds.PixelSpacing, ds.SliceThickness = [1, 0, 0, 0, 1, 0], [2.0, 1.5], 3.0
        ds.add_new(0x00650010, "LO", "Image Private Header")
        ds.add_new(GRID_TAG, "SQ", [item(ImagePositionPatient=[1.0, 2.0, 4.0 * k]) for k in range(3)])
        ds.save_as(tmp_path / "grid.dcm", enforce_file_format=True)

        scan = dicom.read_series([tmp_path / "grid.dcm"], even=True).scan

        np.testing.assert_array_equal(scan.image[0], tiles[:3])
        np.testing.assert_allclose(scan.affine[:3, 3], [1, 2, 0])
        np.testing.assert_allclose(np.diag(scan.affine)[:3], [1.5, 2, 4])

    def test_acquisitions_of_one_series_are_volumes_of_their_own(self, tmp_path, write_series):
        """
        Two passes over the same places, told apart by their number and by nothing else.
        """
        values = np.random.default_rng(3).integers(0, 1000, (6, 4, 5))
        series = write_series(tmp_path, values)
        for n, path in enumerate(series.files):
            ds = dcmread(path)
            ds.ImagePositionPatient, ds.AcquisitionNumber = [0, 0, 4.0 * (n // 2)], 2 - n % 2
            ds.save_as(path)

        first, second = dicom.read_volumes(series.files)

        np.testing.assert_array_equal(first.scan.image[0], values[1::2])
        np.testing.assert_array_equal(second.scan.image[0], values[::2])


class TestStructures:
    def test_outlines_of_a_study_are_its_label(self, tmp_path, write_series, secret, plan):
        """
        A structure set beside the images it refers to: from the folder to the prepared volume.
        """
        data = tmp_path / "data"
        series = write_series(data, np.random.default_rng(4).integers(100, 900, (4, 20, 24)))
        first = series.datasets[0]
        corners = [(4, 3), (16, 3), (16, 12), (4, 12)]
        contour = item(ContourGeometricType="CLOSED_PLANAR", ContourData=[v for x, y in corners for v in (x, 2 * y, 8)])
        rt = bare(RTStructureSetStorage, np.zeros((1, 1, 1)))
        for name in ("NumberOfFrames", "Rows", "Columns", "PixelData"):
            delattr(rt, name)
        rt.PatientID, rt.StudyInstanceUID, rt.Modality = first.PatientID, first.StudyInstanceUID, "RTSTRUCT"
        rt.StructureSetROISequence = [item(ROINumber=1, ROIName="Lesion")]
        rt.ROIContourSequence = [item(ReferencedROINumber=1, ContourSequence=[contour])]
        of_series = item(SeriesInstanceUID=first.SeriesInstanceUID)
        of_study = item(ReferencedSOPInstanceUID=first.StudyInstanceUID, RTReferencedSeriesSequence=[of_series])
        rt.ReferencedFrameOfReferenceSequence = [item(RTReferencedStudySequence=[of_study])]
        rt.save_as(data / "structures.dcm", enforce_file_format=True)

        catalogue = Catalogue.build(tmp_path / "catalogue.sqlite", data, secret=secret)
        cohort = Cohort.build(tmp_path / "cohort", catalogue, plan(), secret=secret)

        (patient,) = (p for split in ("train", "validation", "test") for p in cohort.patients(split))
        label = np.asarray(cohort.volume(patient.studies[0]).label)
        inside = np.argwhere(label)
        assert label.shape == (4, 20, 24)
        assert set(inside[:, 0]) == {2}
        assert len(inside) == pytest.approx(12 * 9, abs=25)
        np.testing.assert_allclose(inside[:, 1:].mean(axis=0), [7.5, 10], atol=0.6)


class TestLabelMap:
    def test_values_of_a_label_map_are_its_segments(self, tmp_path, write_series, write_seg):
        """
        One value for each voxel in place of one frame for each segment.
        """
        series = write_series(tmp_path, np.ones((3, 8, 10)))
        lesion = np.zeros((3, 8, 10), bool)
        oedema = lesion.copy()
        lesion[1, 2:4, 3:6], oedema[1:, 5:7, 1:9] = True, True
        path = write_seg(series, {"oedema": oedema, "lesion": lesion}, kind="LABELMAP")

        stack = dicom.read_series(series.files, even=True)
        label = dicom.read_segmentation(path, stack, ("background", "lesion", "oedema"))

        np.testing.assert_array_equal(label, np.where(lesion, 1, np.where(oedema, 2, 0)))
