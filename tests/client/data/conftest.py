"""Small hospitals that really exist as files: DICOM series and segmentations, NIfTI subjects, photographs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from shared_models.plan import Plan

SECRET = b"a secret of the tests, 32 bytes!"
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


@pytest.fixture(scope="session")
def secret():
    return SECRET


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real research images, where this checkout has them beside it."""
    folder = Path(__file__).parents[3].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder shared/data with real images is not here")
    return folder


@pytest.fixture(scope="session")
def plan():
    return make_plan


def make_plan(*, labels=("background", "lesion"), modality="MR", dimensions=2, **data: Any) -> Plan:
    """A plan that asks for the given data; everything else is small and ordinary."""
    return Plan.from_tables(
        {
            "name": "test",
            "rounds": 1,
            "task": {"kind": "segmentation", "labels": list(labels), "network": "unet", "channels": [8, 16]},
            "data": {"modality": modality, "dimensions": dimensions, "patch": [16] * dimensions} | data,
        }
    )


@dataclass
class WrittenSeries:
    """What was written, for a test to compare with."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    datasets: list[Dataset] = field(default_factory=list)


@pytest.fixture(scope="session")
def write_series():
    return _write_series


@pytest.fixture(scope="session")
def write_seg():
    return _write_seg


@pytest.fixture(scope="session")
def edit():
    return _edit


@pytest.fixture(scope="session")
def write_nifti():
    return _write_nifti


@pytest.fixture(scope="session")
def write_picture():
    return _write_picture


def _write_series(
    folder: Path,
    values: np.ndarray,
    *,
    patient: str = "P-1",
    patient_name: str = "Nobody^Known",
    study: str | None = None,
    description: str = "T2 axial",
    orientation=AXIAL,
    origin=(0.0, 0.0, 0.0),
    spacing=(4.0, 2.0, 1.0),
    shuffle: int | None = None,
    **tags: Any,
) -> WrittenSeries:
    """Write ``values`` (slice, row, column) as classic MR images; spacing is (slice, row, column) in mm.

    File names follow a shuffled order where ``shuffle`` seeds one, so that only the headers tell the true order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    normal = np.cross(orientation[:3], orientation[3:])
    order = list(range(len(values)))
    if shuffle is not None:
        np.random.default_rng(shuffle).shuffle(order)
    written = WrittenSeries(folder)
    series_uid, study_uid, frame_uid = generate_uid(), study or generate_uid(), generate_uid()
    for number, k in enumerate(order):
        ds = _mr_image(values[k], np.asarray(origin) + k * spacing[0] * normal)
        ds.PatientID, ds.PatientName, ds.StudyInstanceUID = patient, patient_name, study_uid
        ds.SeriesInstanceUID, ds.SeriesDescription, ds.FrameOfReferenceUID = series_uid, description, frame_uid
        ds.ImageOrientationPatient, ds.PixelSpacing = list(map(float, orientation)), [spacing[1], spacing[2]]
        ds.SliceThickness, ds.InstanceNumber = spacing[0], number + 1
        for tag, value in tags.items():
            setattr(ds, tag, value)
        path = folder / f"im-{number:03d}"
        ds.save_as(path, enforce_file_format=True)
        written.files.append(path)
        written.datasets.append(ds)
    return written


def _mr_image(values: np.ndarray, position: np.ndarray) -> Dataset:
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = MRImageStorage, generate_uid(), "MR"
    ds.PatientBirthDate, ds.PatientSex, ds.StudyDate, ds.StudyTime, ds.StudyID = (
        "19430219",
        "O",
        "20240315",
        "101500",
        "1",
    )
    ds.AccessionNumber, ds.SeriesNumber, ds.ReferringPhysicianName = "A1", 1, ""
    ds.Manufacturer, ds.ManufacturerModelName, ds.MagneticFieldStrength = "SIEMENS", "Aurora", 1.5
    ds.ImageType = ["ORIGINAL", "PRIMARY", "M", "SE"]
    ds.ImagePositionPatient = [float(round(v, 6)) for v in position]
    ds.Rows, ds.Columns = values.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.PixelData = np.ascontiguousarray(values, dtype="<i2").tobytes()
    ds.file_meta = _file_meta(ds)
    return ds


def _file_meta(ds: Dataset) -> Any:
    from pydicom.dataset import FileMetaDataset

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return meta


def _write_seg(
    series: WrittenSeries, masks: dict[str, np.ndarray], *, name: str = "seg.dcm", kind: str = "BINARY"
) -> Path:
    """Write ``{segment label: mask (written file, row, column)}`` as a DICOM segmentation that refers to the series."""
    described = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=label,
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=codes.SCT.Lesion,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number, label in enumerate(masks, start=1)
    ]
    segmentation = highdicom.seg.Segmentation(
        source_images=series.datasets,
        pixel_array=np.stack(list(masks.values()), axis=-1).astype(np.uint8),
        segmentation_type=highdicom.seg.SegmentationTypeValues(kind),
        segment_descriptions=described,
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="federad",
        manufacturer_model_name="tests",
        software_versions="1",
        device_serial_number="1",
    )
    segmentation.save_as(series.folder / name)
    return series.folder / name


def _edit(path: Path, change) -> None:
    """Read a DICOM file, let ``change`` alter it, and write it back."""
    ds = dcmread(path)
    change(ds)
    ds.save_as(path)


def _write_nifti(path: Path, values: np.ndarray, *, spacing=(1.0, 1.0, 1.0), affine=None) -> Path:
    """Write ``values`` (i, j, k); without an affine the axes run to the right, the front and the head (RAS)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([*spacing, 1.0]) if affine is None else affine), path)
    return path


def _write_picture(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


@pytest.fixture
def hospital(tmp_path, write_series, write_seg) -> Path:
    """A site with three patients: eight slices of noise each, with a box as lesion."""
    for n in range(3):
        _write_patient(tmp_path / "data" / f"P-{n}" / "visit", f"P-{n}", seed=n)
    return tmp_path / "data"


@pytest.fixture(scope="session")
def write_patient():
    return _write_patient


def _write_patient(folder: Path, patient: str, *, seed: int = 0, n_slices: int = 8, **options: Any) -> WrittenSeries:
    """One study with a series and a lesion on slices 2 to 4, rows 6 to 9, columns 5 to 11."""
    values = np.random.default_rng(seed).integers(100, 1000, (n_slices, 20, 24))
    series = _write_series(folder, values, patient=patient, **options)
    mask = np.zeros(values.shape, dtype=bool)
    mask[2:5, 6:10, 5:12] = True
    _write_seg(series, {"Lesion": mask})
    return series
