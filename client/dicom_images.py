"""A reconstruction as a new DICOM series: one object for each slice, which is what every archive takes.

MR Image IOD (DICOM PS3.3, A.4) where it is known how the slices lie in the patient. Where it is not, as in fastMRI's files,
that object cannot be written without making a place up: then Secondary Capture (A.8), whose images lie nowhere. Either
says that it is derived, from what, by which model, and that it is for research. What the source does not state is left
out, or empty where DICOM asks for the attribute.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from highdicom.sr import CodedConcept
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, SecondaryCaptureImageStorage, generate_uid
from pydicom.valuerep import format_number_as_ds

from client.data.kspace_header import Place
from client.dicom_results import PURPOSE, equipment, series_description

if TYPE_CHECKING:
    from client.inference import Case

SERIES_NUMBER = 9004

BRIGHTEST = 32767
"""Stored for the largest value: 15 bits, which signed and unsigned readers understand alike."""

OF_STUDY = (
    *("SpecificCharacterSet", "TimezoneOffsetFromUTC"),
    *("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "PatientAge", "PatientWeight"),
    *("PatientSize", "OtherPatientIDsSequence", "PatientIdentityRemoved", "DeidentificationMethod"),
    *("DeidentificationMethodCodeSequence", "LongitudinalTemporalInformationModified"),
    *("StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
    *("StudyDescription", "BodyPartExamined", "Laterality", "ProtocolName"),
)
"""Attributes that a new series has in common with its source."""

OF_IMAGE = (
    *("FrameOfReferenceUID", "PositionReferenceIndicator", "PatientPosition"),
    *("ScanningSequence", "SequenceVariant", "ScanOptions", "MRAcquisitionType", "SequenceName", "RepetitionTime"),
    *("EchoTime", "InversionTime", "EchoTrainLength", "EchoNumbers", "FlipAngle", "NumberOfAverages", "PixelBandwidth"),
    *("MagneticFieldStrength", "ImagingFrequency", "ImagedNucleus", "SliceThickness", "SpacingBetweenSlices"),
    *("AcquisitionDate", "AcquisitionTime", "AcquisitionNumber", "TemporalPositionIdentifier"),
)
"""Attributes of an MR image that its reconstruction keeps."""

EMPTY = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"),
    *("AccessionNumber", "ReferringPhysicianName"),
)
EMPTY_IN_MR = (
    *("PositionReferenceIndicator", "ScanOptions", "MRAcquisitionType", "EchoTime", "EchoTrainLength"),
    *("RepetitionTime", "PatientPosition", "SliceThickness"),
)
"""Attributes that must be there, if empty."""

SCANNER = ("Manufacturer", "ManufacturerModelName", "InstitutionName", "StationName", "DeviceSerialNumber")
"""Of the device that acquired, which stands among the contributing equipment."""


def write_series(case: Case, folder: Path, values: NDArray[np.float32], derivation: str) -> str:
    """Write a series of images, ``0001.dcm`` and so on in the order of the slices.

    Parameters
    ----------
    case
        Whose source is a DICOM series or a file of k-space.
    folder
        To be made.
    values
        Magnitudes ``(slice, row, column)`` on the scan's grid, in the source's units.
    derivation
        How they came about, in sentences.

    Returns
    -------
    str
        The name of the kind of object that was written.
    """
    place, pixel_mm, thickness_mm = _where(case)
    kind = MRImageStorage if place is not None else SecondaryCaptureImageStorage
    largest = float(values.max())
    step = largest / BRIGHTEST if largest > 0 else 1.0
    stored = np.round(values.clip(0) / step).astype(np.uint16)
    window = max(1.0, float(np.percentile(stored, 99.5)))
    now, made = datetime.now(), {**equipment(case), "series_number": SERIES_NUMBER}
    study = generate_uid(entropy_srcs=[case.study, "study"])
    frame_of_reference = generate_uid()
    folder.mkdir()
    for k, (source, reference) in enumerate(_sources(case)):
        one = Dataset()
        _copy(one, source, OF_STUDY)
        _fill(one, EMPTY)
        if not one.get("StudyInstanceUID"):
            one.StudyInstanceUID = study
        one.SOPClassUID, one.SOPInstanceUID = kind, generate_uid()
        one.Modality, one.SeriesInstanceUID = "MR", made["series_instance_uid"]
        one.SeriesNumber, one.InstanceNumber = SERIES_NUMBER, k + 1
        one.SeriesDescription = series_description(case)
        one.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
        one.ContentDate, one.ContentTime = f"{now:%Y%m%d}", f"{now:%H%M%S}"
        one.DerivationDescription = f"{derivation} 1 stored is {step:.6g} of the source's units. {PURPOSE}."[:1024]
        one.ImageComments = f"Learned reconstruction: {PURPOSE}"
        one.BurnedInAnnotation, one.LossyImageCompression = "NO", "00"
        _equip(one, source, made)
        if reference is not None:
            one.SourceImageSequence = [reference]
        if place is not None:
            _copy(one, source, OF_IMAGE)
            _fill(one, EMPTY_IN_MR)
            one.ScanningSequence = one.get("ScanningSequence") or "RM"  # research mode: the source does not say
            one.SequenceVariant = one.get("SequenceVariant") or "NONE"
            one.FrameOfReferenceUID = one.get("FrameOfReferenceUID") or frame_of_reference
            one.ImageOrientationPatient = [format_number_as_ds(v) for v in place.orientation]
            one.ImagePositionPatient = [format_number_as_ds(v) for v in place.corners[k]]
            one.PixelSpacing = [format_number_as_ds(v) for v in pixel_mm or ()]
        else:
            one.ConversionType, one.PatientOrientation = "WSD", None
            if pixel_mm is not None:
                one.PixelSpacing = [format_number_as_ds(v) for v in pixel_mm]
        if thickness_mm is not None and place is not None:
            one.SliceThickness = format_number_as_ds(thickness_mm)
        _draw(one, stored[k], window)
        _save(one, folder / f"{k + 1:04d}.dcm")
    return "MR image" if place is not None else "secondary capture image"


def _where(case: Case) -> tuple[Place | None, tuple[float, float] | None, float | None]:
    """Place, pixel size along (y, x) and thickness [mm], each as far as it is known."""
    if case.acquired is not None:
        return case.acquired.place, case.acquired.pixel_mm, case.acquired.thickness_mm
    affine = case.scan.affine
    if affine is None or not case.sources:
        return None, None, None
    column_mm, row_mm = (float(np.linalg.norm(affine[:3, axis])) for axis in (0, 1))
    orientation = (*affine[:3, 0] / column_mm, *affine[:3, 1] / row_mm)
    corners = [affine[:3, 3] + k * affine[:3, 2] for k in range(case.scan.shape[0])]
    place = Place(tuple(map(float, orientation)), tuple((float(x), float(y), float(z)) for x, y, z in corners))
    return place, (row_mm, column_mm), None


def _sources(case: Case) -> Iterator[tuple[Dataset, Dataset | None]]:
    """For each slice the header to take from, and a reference to the image it was made from."""
    if case.acquired is not None or not case.sources:
        header = case.acquired.header if case.acquired is not None else Dataset()
        yield from ((header, None) for _ in range(case.scan.shape[0]))
        return
    is_classic = len(case.sources) == case.scan.shape[0]
    for place in case.frames:
        source = case.sources[place if is_classic else 0]
        reference = Dataset()
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
        if not is_classic:
            reference.ReferencedFrameNumber = place + 1
        reference.PurposeOfReferenceCodeSequence = [
            CodedConcept.from_code(codes.DCM.SourceImageForImageProcessingOperation)
        ]
        yield source, reference


def _equip(one: Dataset, source: Dataset, made: dict[str, Any]) -> None:
    """What made the image, and beside it what acquired the data."""
    one.Manufacturer, one.ManufacturerModelName = made["manufacturer"], made["manufacturer_model_name"]
    one.DeviceSerialNumber, one.SoftwareVersions = made["device_serial_number"], made["software_versions"]
    scanner = Dataset()
    _copy(scanner, source, SCANNER)
    if scanner.get("Manufacturer"):
        scanner.PurposeOfReferenceCodeSequence = [CodedConcept.from_code(codes.DCM.AcquisitionEquipment)]
        one.ContributingEquipmentSequence = [scanner]


def _draw(one: Dataset, stored: NDArray[np.uint16], window: float) -> None:
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.Rows, one.Columns = stored.shape
    one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 0
    one.WindowCenter, one.WindowWidth = format_number_as_ds(window / 2), format_number_as_ds(window)
    one.PixelData = stored.astype("<u2").tobytes()
    one["PixelData"].VR = "OW"


def _save(one: Dataset, path: Path) -> None:
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    one.file_meta.MediaStorageSOPClassUID, one.file_meta.MediaStorageSOPInstanceUID = (
        one.SOPClassUID,
        one.SOPInstanceUID,
    )
    one.SpecificCharacterSet = one.get("SpecificCharacterSet") or "ISO_IR 192"
    one.save_as(path, enforce_file_format=True)


def _copy(one: Dataset, source: Dataset, keywords: tuple[str, ...]) -> None:
    for keyword in keywords:
        if keyword in source:
            one[keyword] = copy.deepcopy(source[keyword])


def _fill(one: Dataset, keywords: tuple[str, ...]) -> None:
    for keyword in keywords:
        if keyword not in one:
            setattr(one, keyword, None)
