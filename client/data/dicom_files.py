"""One DICOM file, taken apart: what it says about itself, where each of its planes lies, its pixels as they are stored.

Runs in the child process of ``reader`` and answers in plain numbers and words; what they mean is decided by ``dicom`` and
``stacks``. Geometry follows DICOM PS3.3: Image Plane (C.7.6.2), multi-frame functional groups (C.7.6.16), and for Siemens
mosaics the tiles of one image, as dcm2niix reads them (Li et al. 2016, doi:10.1016/j.jneumeth.2016.03.001).
"""

from __future__ import annotations

import logging
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import Dataset, uid
from pydicom.filereader import read_dataset, read_preamble
from pydicom.uid import UID

from client.data.scan import MAX_SIDE
from client.data.skips import Reason, UnusableError, unusable

# pydicom's log quotes values of the header and tracebacks of decoders; what a reader needs is the counted reason.
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)

Share = Callable[[tuple[int, ...], str], NDArray[Any]]
"""Gives an array of a shape and dtype whose contents the asking process sees."""

Facts = dict[str, Any]
"""What can be written as JSON."""

MAX_INFLATED = 200
"""A deflated data set that grows by more than this is an attack on memory; real images shrink to a third."""

MAX_SQUEEZED = 4096
"""The same for compressed pixels: an even plane of JPEG 2000 comes to about 2,600."""

ALWAYS_ALLOWED = 64 * 2**20
"""Bytes of pixels that any file may claim [bytes]."""

MAX_FRAMES = 100_000
MAX_CONTOUR_VALUES = 20_000_000

_LABEL_MAP = UID("1.2.840.10008.5.1.4.1.1.66.7")
"""Label Map Segmentation Storage (PS3.4, B.5): one value per voxel instead of one frame per segment."""

_SEGMENTATIONS = (uid.SegmentationStorage, _LABEL_MAP)
_DEFLATED_FRAMES = UID("1.2.840.10008.1.2.8.1")
"""Deflated Image Frame Compression (PS3.5, A.4.13): each frame deflated by itself."""

_IDENTITY = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
_GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
_GRID_TAG = 0x00651051
"""United Imaging's sequence of the slices in a grid (MRVFrameSequence), each with its position."""
_PIXELS = ("FloatPixelData", "DoubleFloatPixelData", "PixelData")
_SHAPE = (
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated", "BitsStored", "PixelRepresentation"),
    *("PhotometricInterpretation", "PlanarConfiguration", "ImageType", "SOPClassUID", "Modality"),
)
_ABOUT = [
    *("PatientID", "PatientName", *_IDENTITY, "SeriesDescription", "Manufacturer", "ManufacturerModelName"),
    *("MagneticFieldStrength", "ReferencedSeriesSequence", "BurnedInAnnotation", *_SHAPE, *_GEOMETRY),
    "ReferencedFrameOfReferenceSequence",
    _GRID_TAG,
]
_LAYOUT = [
    *(*_SHAPE, *_GEOMETRY, "SOPInstanceUID", "SliceThickness", "SpacingBetweenSlices", "RescaleSlope"),
    *("RescaleIntercept", "InstanceNumber", "AcquisitionNumber", "TemporalPositionIdentifier", "EchoNumbers"),
    *("EchoTime", "TriggerTime", "DiffusionBValue", "ImagerPixelSpacing", "NominalScannedPixelSpacing"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "DetectorInformationSequence"),
    *("GridFrameOffsetVector", "DoseGridScaling", "SequenceOfUltrasoundRegions", "Units", "DecayCorrection"),
    *("PatientWeight", "RadiopharmaceuticalInformationSequence", "SeriesTime", "SeriesDate", "AcquisitionTime"),
    *("CorrectedImage", "ModalityLUTSequence", "ComplexImageComponent", "AcquisitionDate", _GRID_TAG),
]
_MOSAIC_TAGS = [0x0019100A, 0x00291010, 0x00290010]

PROJECTIONS = frozenset(
    re.findall("[A-Z]+", "CR DX MG RG XA RF IO PX US SC OT OP OPT ES XC GM SM DM BI LS TG HC DG NM")
)
"""Modalities whose images have no place in the patient: rows and columns are all there is."""

_CROSS_SECTIONS = ("MR", "CT", "PT")
"""Modalities whose images have a place, or are broken."""

_PLUGINS = {
    uid.RLELossless: ("pylibjpeg", "pydicom"),
    uid.JPEGBaseline8Bit: ("pylibjpeg", "gdcm"),
    uid.JPEGExtended12Bit: ("pylibjpeg", "gdcm"),
    uid.JPEGLossless: ("gdcm", "pylibjpeg"),
    uid.JPEGLosslessSV1: ("gdcm", "pylibjpeg"),
    uid.JPEGLSLossless: ("pyjpegls", "pylibjpeg", "gdcm"),
    uid.JPEGLSNearLossless: ("pyjpegls", "pylibjpeg", "gdcm"),
    uid.JPEG2000Lossless: ("pylibjpeg", "gdcm"),
    uid.JPEG2000: ("pylibjpeg", "gdcm"),
    uid.HTJ2KLossless: ("pylibjpeg",),
    uid.HTJ2KLosslessRPCL: ("pylibjpeg",),
    uid.HTJ2K: ("pylibjpeg",),
}
"""The fastest decoder of each compressed syntax first; the others for what it refuses."""


@dataclass(frozen=True)
class Opened:
    """A header, and where in the file its pixels begin."""

    header: Dataset
    syntax: UID
    """Empty where the file does not say; then the pixels are not compressed."""
    is_implicit: bool
    is_little: bool
    after: int
    """Bytes from the beginning of the pixel element to the end of the file."""
    pixels_at: int | None
    """Where the values of uncompressed pixels begin in the file [bytes]; None where they do not lie there as they are."""


# --- opening -----------------------------------------------------------------------------------------------------------


def opened(path: Path, tags: list[Any]) -> Opened:
    """The header of a file, without its pixels.

    Raises
    ------
    UnusableError
        If the file is no DICOM or damaged.
    """
    with unusable(Reason.DAMAGED), path.open("rb") as file:
        size = path.stat().st_size
        _require_dicom(file.read(144))
        file.seek(0)
        syntax = _syntax(file)
        if syntax == uid.DeflatedExplicitVRLittleEndian:
            return _opened_deflated(file, size, tags)
        file.seek(0)
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags, force=True)
        is_implicit, is_little = header.original_encoding
        at = file.tell()
        return Opened(
            header, syntax, bool(is_implicit), bool(is_little), size - at, _pixels_at(file, at, size, syntax, header)
        )


def _require_dicom(head: bytes) -> None:
    """The preamble (PS3.10, 7.1), or without one a first element as DICOM begins with: of group 2 or 8, in either order."""
    if head[128:132] == b"DICM":
        return
    little, big = (struct.unpack_from(f"{e}HH", head) if len(head) >= 8 else (0, 0) for e in "<>")
    vr = head[4:6]
    is_named = vr.isalpha() and vr.isupper()
    length = struct.unpack_from("<I", head, 4)[0] if len(head) >= 8 else 0
    begins = (little[0] in (2, 8) and little[1] <= 0x0100) or (big[0] in (2, 8) and big[1] <= 0x0100 and is_named)
    if not (begins and (is_named or length <= 0x10000)):
        raise UnusableError(Reason.NOT_AN_IMAGE)


def _syntax(file: BinaryIO) -> UID:
    from pydicom.filereader import _read_file_meta_info

    if read_preamble(file, force=True) is None:
        file.seek(0)
    return UID(str(_read_file_meta_info(file).get("TransferSyntaxUID") or ""))


def _opened_deflated(file: BinaryIO, size: int, tags: list[Any]) -> Opened:
    data, header = _inflated(file, size, tags)
    return Opened(
        header, UID(uid.DeflatedExplicitVRLittleEndian), False, True, len(data.getvalue()) - data.tell(), None
    )


def _inflated(file: BinaryIO, size: int, tags: list[Any] | None) -> tuple[BytesIO, Dataset]:
    """A deflated data set, inflated as far as is believable; the file stands behind its meta information."""
    most = max(ALWAYS_ALLOWED, MAX_INFLATED * size)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    data = BytesIO(inflater.decompress(file.read(), most))
    if inflater.unconsumed_tail:
        raise UnusableError(Reason.TOO_LARGE)
    stop = None if tags is None else _before_pixels
    wanted = None if tags is None else [pydicom.tag.Tag(tag) for tag in tags]
    header = read_dataset(data, False, True, stop_when=stop, specific_tags=wanted)
    header.set_original_encoding(False, True, header.get("SpecificCharacterSet", "ISO_IR 6"))
    return data, header


def _before_pixels(tag: Any, vr: str | None, length: int) -> bool:
    return tag in (0x7FE00008, 0x7FE00009, 0x7FE00010)


def _pixels_at(file: BinaryIO, at: int, size: int, syntax: UID, header: Dataset) -> int | None:
    if _is_squeezed(syntax):
        return None
    is_implicit, is_little = header.original_encoding
    file.seek(at)
    element = file.read(12)
    order = "<" if is_little else ">"
    if len(element) < 12 or struct.unpack_from(f"{order}H", element)[0] != 0x7FE0:
        return None
    (length,) = struct.unpack_from(f"{order}I", element, 4 if is_implicit else 8)
    begins = at + (8 if is_implicit else 12)
    return begins if length != 0xFFFFFFFF and begins + length <= size + 1 else None


# --- what a file says about itself -------------------------------------------------------------------------------------


def describe(path: Path) -> Facts:
    """What the header of one file says; its pixels are not read.

    Raises
    ------
    UnusableError
        If the file is no DICOM, is cut short, lacks tags, or is of a kind that is not supported.
    """
    file = opened(path, _ABOUT)
    with unusable(Reason.DAMAGED):
        return _described(file)


def _described(file: Opened) -> Facts:
    header = file.header
    what = _kind(file)
    texts = {name: _text(header, name) for name in ("PatientID", "PatientName", *_IDENTITY)}
    if not texts["PatientID"]:
        raise UnusableError(Reason.NO_PATIENT)
    if not all(texts[name] for name in _IDENTITY):
        raise UnusableError(Reason.TAGS_MISSING)
    if not all(re.fullmatch(r"[0-9.]{1,64}", texts[name]) for name in _IDENTITY):
        raise UnusableError(Reason.BAD_UID)
    strength = header.get("MagneticFieldStrength")
    return {
        "kind": what,
        "patient": texts["PatientID"],
        "patient_name": texts["PatientName"],
        "study": texts["StudyInstanceUID"],
        "series": texts["SeriesInstanceUID"],
        "instance": texts["SOPInstanceUID"],
        "description": _text(header, "SeriesDescription"),
        "modality": _text(header, "Modality") or None,
        "manufacturer": _text(header, "Manufacturer"),
        "model": _text(header, "ManufacturerModelName"),
        "field_t": None if what != "image" or not strength else float(strength),
        "reference": _referenced_series(header, what),
        "n_planes": _n_planes(header) if what == "image" else 1,
        "says_burned_in": _text(header, "BurnedInAnnotation").upper() == "YES",
    }


def _kind(file: Opened) -> str:
    """``image``, ``segmentation`` or ``structures``, after checks that cost nothing."""
    header = file.header
    if header.get("SOPClassUID") == uid.RTStructureSetStorage:
        return "structures"
    _check_size(file)
    if header.get("SOPClassUID") in _SEGMENTATIONS:
        return "segmentation"
    if _text(header, "Modality") in PROJECTIONS or header.get("SOPClassUID") in _ENHANCED:
        return "image"
    if int(header.get("NumberOfFrames") or 1) > 1 and header.get("SOPClassUID") not in _STACKED:
        raise UnusableError(Reason.NOT_SUPPORTED)
    if header.get("SOPClassUID") not in _STACKED and not _is_grid(header) and not all(map(header.get, _GEOMETRY)):
        raise UnusableError(Reason.TAGS_MISSING)
    return "image"


_STACKED = (uid.RTDoseStorage, uid.NuclearMedicineImageStorage)
"""Several frames without functional groups, evenly spaced along their normal."""


_ENHANCED = (
    *(
        uid.EnhancedMRImageStorage,
        uid.EnhancedCTImageStorage,
        uid.EnhancedPETImageStorage,
        uid.EnhancedMRColorImageStorage,
    ),
    *(uid.LegacyConvertedEnhancedMRImageStorage, uid.LegacyConvertedEnhancedCTImageStorage),
    *(uid.LegacyConvertedEnhancedPETImageStorage, uid.BreastTomosynthesisImageStorage, uid.ParametricMapStorage),
    *(uid.XRay3DAngiographicImageStorage, uid.XRay3DCraniofacialImageStorage, uid.EnhancedUSVolumeStorage),
)


def _check_size(file: Opened) -> None:
    """Whether the pixels that a header claims can be believed, before any of them is read."""
    header = file.header
    rows, columns = int(header.get("Rows") or 0), int(header.get("Columns") or 0)
    frames, samples = int(header.get("NumberOfFrames") or 1), int(header.get("SamplesPerPixel") or 1)
    if rows <= 0 or columns <= 0:
        raise UnusableError(Reason.NOT_AN_IMAGE)
    if max(rows, columns) > MAX_SIDE or not 0 <= frames <= MAX_FRAMES:
        raise UnusableError(Reason.TOO_LARGE)
    if samples not in (1, 3, 4):
        raise UnusableError(Reason.NOT_SUPPORTED)
    n_bytes = rows * columns * max(frames, 1) * samples * int(header.get("BitsAllocated") or 8) // 8
    is_squeezed = _is_squeezed(file.syntax)
    if is_squeezed:
        if n_bytes > max(ALWAYS_ALLOWED, MAX_SQUEEZED * file.after):
            raise UnusableError(Reason.TOO_LARGE)
    elif header.get("PhotometricInterpretation") == "YBR_FULL_422":
        n_bytes = n_bytes * 2 // 3
    if not is_squeezed and file.after < n_bytes:
        raise UnusableError(Reason.DAMAGED)


def _is_squeezed(syntax: UID) -> bool:
    """Whether pixels are compressed frame by frame; within a deflated data set they are not."""
    if syntax == _DEFLATED_FRAMES:
        return True
    return bool(syntax.is_transfer_syntax and syntax.is_compressed and not syntax.is_deflated)


def _text(header: Dataset, name: str) -> str:
    return str(header.get(name) or "").strip().strip("\0")


def _referenced_series(header: Dataset, what: str) -> str | None:
    """The series that a label was drawn on."""
    if what == "segmentation" and header.get("ReferencedSeriesSequence"):
        return str(header.ReferencedSeriesSequence[0].SeriesInstanceUID)
    if what != "structures":
        return None
    for frame in header.get("ReferencedFrameOfReferenceSequence") or []:
        for study in frame.get("RTReferencedStudySequence") or []:
            for series in study.get("RTReferencedSeriesSequence") or []:
                return str(series.SeriesInstanceUID)
    return None


def _is_mosaic(header: Dataset) -> bool:
    return "MOSAIC" in (header.get("ImageType") or [])


def _is_grid(header: Dataset) -> bool:
    return _GRID_TAG in header and bool(header[_GRID_TAG].value) and "VFRAME" in (header.get("ImageType") or [])


def _n_planes(header: Dataset) -> int:
    frames = int(header.get("NumberOfFrames") or 1)
    return 2 if frames == 1 and (_is_mosaic(header) or _is_grid(header)) else max(frames, 1)


def attribute(path: Path, keyword: str) -> Facts:
    """The value of an attribute of the data set itself, as text; empty where it has none."""
    file = opened(path, [keyword])
    with unusable(Reason.DAMAGED):
        return {"value": str(file.header.get(keyword) or "")}


# --- where each plane lies ---------------------------------------------------------------------------------------------


def layout(path: Path) -> Facts:
    """Where each plane of an image file lies in the patient, and where its pixels lie in the file.

    Returns
    -------
    dict
        ``rows``, ``columns``, ``frames``, ``samples``; ``raw``: dtype and offset of uncompressed grey pixels, else None;
        ``unit``; ``planes``: one entry per plane with position, orientation, spacing (row, column), all [mm] and LPS or
        None, slope, intercept, ``tile`` (row and column of its first pixel in a mosaic), and what it is sorted by.
    """
    file = opened(path, _LAYOUT)
    with unusable(Reason.BAD_GEOMETRY):
        _kind_of_image(file)
        if int(file.header.get("NumberOfFrames") or 1) == 1 and _is_mosaic(file.header):
            file = opened(path, [*_LAYOUT, *_MOSAIC_TAGS])
        return _layout(file)


def _kind_of_image(file: Opened) -> None:
    _check_size(file)
    if file.header.get("SOPClassUID") in _SEGMENTATIONS:
        raise UnusableError(Reason.NOT_SUPPORTED)


def _layout(file: Opened) -> Facts:
    header = file.header
    frames = max(int(header.get("NumberOfFrames") or 1), 1)
    rows, columns = int(header.Rows), int(header.Columns)
    if header.get("PerFrameFunctionalGroupsSequence"):
        planes = _planes_of_groups(header, frames)
    elif frames > 1:
        planes = _planes_of_frames(header, frames)
    elif _is_mosaic(header):
        planes, rows, columns = _planes_of_mosaic(header)
    elif _is_grid(header):
        planes, rows, columns = _planes_of_grid(header)
    else:
        planes = [_classic(header) | {"position": _floats(header, "ImagePositionPatient", 3)}]
    factor, unit = _unit(header)
    for plane in planes:
        plane["slope"], plane["intercept"] = plane["slope"] * factor, plane["intercept"] * factor
    return {
        "rows": rows,
        "columns": columns,
        "stored_rows": int(header.Rows),
        "stored_columns": int(header.Columns),
        "frames": frames,
        "samples": 3 if _is_colour(header) else 1,
        "raw": _raw(file, frames),
        "is_inverted": _text(header, "PhotometricInterpretation") == "MONOCHROME1",
        "unit": unit,
        "instance": _text(header, "SOPInstanceUID"),
        "is_projection": _text(header, "Modality") not in _CROSS_SECTIONS,
        "planes": planes,
    }


def _is_colour(header: Dataset) -> bool:
    return int(header.get("SamplesPerPixel") or 1) > 1 or header.get("PhotometricInterpretation") == "PALETTE COLOR"


def _raw(file: Opened, frames: int) -> Facts | None:
    """How uncompressed grey pixels are stored, if they lie in the file as they are."""
    header, bits = file.header, int(file.header.get("BitsAllocated") or 0)
    if file.pixels_at is None or _is_colour(header) or header.get("ModalityLUTSequence"):
        return None
    if bits not in (8, 16, 32) or (bits == 8 and not file.is_little):
        return None
    if _text(header, "PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2"):
        raise UnusableError(Reason.NOT_SUPPORTED)
    n_values = int(header.Rows) * int(header.Columns) * frames
    if n_values * bits // 8 > file.after:
        raise UnusableError(Reason.DAMAGED)
    is_float = "PixelRepresentation" not in header and bits == 32 and "BitsStored" not in header
    letter = "f" if is_float else "i" if int(header.get("PixelRepresentation") or 0) else "u"
    return {
        "dtype": f"{'<' if file.is_little else '>'}{letter}{bits // 8}",
        "offset": file.pixels_at,
        "bits_stored": bits if is_float else int(header.get("BitsStored") or bits),
    }


def _floats(item: Dataset, name: str, n: int) -> list[float] | None:
    values = item.get(name)
    if values is None or values == "" or isinstance(values, str | float | int):
        return None
    numbers = [float(v) for v in values]
    return numbers if len(numbers) == n else None


def _number(item: Dataset, name: str, default: float = 0.0) -> float:
    """A number of the header; of several the first."""
    value = item.get(name)
    if isinstance(value, pydicom.multival.MultiValue | list):
        value = value[0] if len(value) else None
    return default if value is None or value == "" else float(value)


def _classic(header: Dataset) -> Facts:
    """A plane but for its position: what a single-frame image says at the top of its data set."""
    image_type = [str(word) for word in (header.get("ImageType") or [])]
    spacing = next(
        (
            found
            for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
            if (found := _floats(header, name, 2))
        ),
        None,
    ) or _ultrasound_spacing(header)
    return {
        "frame": 0,
        "tile": None,
        "orientation": _floats(header, "ImageOrientationPatient", 6),
        "spacing": spacing,
        "thickness": _number(header, "SliceThickness") or 1.0,
        "slope": _number(header, "RescaleSlope") or 1.0,
        "intercept": _number(header, "RescaleIntercept"),
        "is_localizer": "LOCALIZER" in image_type,
        "contrast": [
            *image_type[2:],
            _text(header, "ComplexImageComponent"),
            _number(header, "EchoNumbers"),
            _number(header, "EchoTime"),
        ],
        "order": [
            _number(header, "TemporalPositionIdentifier"),
            _number(header, "AcquisitionNumber"),
            _number(header, "TriggerTime"),
            _number(header, "InstanceNumber"),
        ],
    }


def _ultrasound_spacing(header: Dataset) -> list[float] | None:
    """Of the only calibrated region of an ultrasound image (PS3.3, C.8.5.5), where it is in centimetres."""
    regions = header.get("SequenceOfUltrasoundRegions") or []
    if len(regions) != 1 or any(int(_number(regions[0], f"PhysicalUnits{xy}Direction")) != 3 for xy in "XY"):
        return None
    mm = [abs(10 * _number(regions[0], f"PhysicalDelta{xy}")) for xy in "YX"]
    return mm if min(mm) > 0 else None


def _planes_of_frames(header: Dataset, frames: int) -> list[Facts]:
    """Multi-frame without functional groups: a dose grid, a reconstructed nuclear volume, else a film without places."""
    base = _classic(header)
    position = _floats(header, "ImagePositionPatient", 3)
    offsets = header.get("GridFrameOffsetVector")
    detectors = header.get("DetectorInformationSequence") or []
    if offsets is not None and len(offsets) == frames and position and base["orientation"]:
        along = [float(v) - float(offsets[0]) * (float(offsets[0]) != 0) for v in offsets]
        base["slope"] = _number(header, "DoseGridScaling") or base["slope"]
    elif "TOMO" in " ".join(header.get("ImageType") or []) and detectors and _number(header, "SpacingBetweenSlices"):
        base["orientation"] = base["orientation"] or _floats(detectors[0], "ImageOrientationPatient", 6)
        position = position or _floats(detectors[0], "ImagePositionPatient", 3)
        along = [_number(header, "SpacingBetweenSlices") * k for k in range(frames)]
    else:
        along, position = [0.0] * frames, None
    if position is None or base["orientation"] is None:
        return [base | {"frame": k, "position": None, "order": [0.0, 0.0, 0.0, float(k)]} for k in range(frames)]
    orientation = np.array(base["orientation"])
    normal = np.cross(orientation[:3], orientation[3:])
    return [
        base | {"frame": k, "position": (np.array(position) + along[k] * normal).tolist(), "order": [0, 0, 0, float(k)]}
        for k in range(frames)
    ]


def _group(frame: Dataset, shared: Dataset | None, name: str) -> Dataset | None:
    """A functional group of a frame, its own or the shared one (PS3.3, C.7.6.16)."""
    for holder in (frame, shared):
        if holder is not None and (items := holder.get(name)):
            return items[0]  # type: ignore[no-any-return]
    return None


def _planes_of_groups(header: Dataset, frames: int) -> list[Facts]:
    """Enhanced multi-frame: each frame with its own or the shared functional groups."""
    per_frame = header.PerFrameFunctionalGroupsSequence
    if len(per_frame) != frames:
        raise UnusableError(Reason.DAMAGED)
    shared = (header.get("SharedFunctionalGroupsSequence") or [None])[0]
    base = _classic(header)
    return [_plane_of_group(base, frame, shared, k) for k, frame in enumerate(per_frame)]


def _plane_of_group(base: Facts, frame: Dataset, shared: Dataset | None, k: int) -> Facts:
    def value(group: str, read: Callable[[Dataset], Any]) -> Any:
        item = _group(frame, shared, group)
        return None if item is None else read(item)

    content = _group(frame, shared, "FrameContentSequence") or Dataset()
    transform = _group(frame, shared, "PixelValueTransformationSequence") or _group(
        frame, shared, "RealWorldValueMappingSequence"
    )
    slope, intercept = base["slope"], base["intercept"]
    if transform is not None:
        slope = _number(transform, "RescaleSlope") or _number(transform, "RealWorldValueSlope") or 1.0
        intercept = _number(transform, "RescaleIntercept") or _number(transform, "RealWorldValueIntercept")
    kind = value("MRImageFrameTypeSequence", lambda i: [str(w) for w in i.get("FrameType") or []]) or []
    diffusion = _group(frame, shared, "MRDiffusionSequence") or Dataset()
    measures = _group(frame, shared, "PixelMeasuresSequence")
    return base | {
        "frame": k,
        "position": value("PlanePositionSequence", lambda i: _floats(i, "ImagePositionPatient", 3)),
        "orientation": value("PlaneOrientationSequence", lambda i: _floats(i, "ImageOrientationPatient", 6)),
        "spacing": None if measures is None else _floats(measures, "PixelSpacing", 2),
        "thickness": (_number(measures, "SliceThickness") if measures is not None else 0.0) or 1.0,
        "slope": slope,
        "intercept": intercept,
        "contrast": [
            *kind[2:],
            str(value("MRImageFrameTypeSequence", lambda i: _text(i, "ComplexImageComponent")) or ""),
            value("MREchoSequence", lambda i: _number(i, "EffectiveEchoTime")) or 0.0,
        ],
        "order": [
            _number(content, "TemporalPositionIndex"),
            _number(diffusion, "DiffusionBValue"),
            _number(content, "FrameAcquisitionNumber"),
            float(k),
        ],
    }


def _planes_of_mosaic(header: Dataset) -> tuple[list[Facts], int, int]:
    """A Siemens mosaic: slices as tiles of one image, row by row; rows and columns of a tile come along.

    The header's position is where the first tile would begin if it were as large as the whole image.
    """
    csa = _csa(header)
    n = int(header[0x0019100A].value or 0) if 0x0019100A in header else 0
    n = n or int(float((csa.get("NumberOfImagesInMosaic") or ["0"])[0]))
    base = _classic(header)
    position, orientation, spacing = _floats(header, "ImagePositionPatient", 3), base["orientation"], base["spacing"]
    if not 0 < n <= 4096 or position is None or orientation is None or spacing is None:
        raise UnusableError(Reason.TAGS_MISSING)
    side = int(np.ceil(np.sqrt(n)))
    rows, columns = int(header.Rows) // side, int(header.Columns) // side
    along_row, along_column = np.array(orientation[:3]), np.array(orientation[3:])
    first = (
        np.array(position)
        + along_row * spacing[1] * (int(header.Columns) - columns) / 2
        + along_column * spacing[0] * (int(header.Rows) - rows) / 2
    )
    step = _mosaic_normal(csa, np.cross(along_row, along_column)) * (
        _number(header, "SpacingBetweenSlices") or base["thickness"]
    )
    planes = [
        base | {"position": (first + k * step).tolist(), "tile": [k // side * rows, k % side * columns]}
        for k in range(n)
    ]
    return planes, rows, columns


def _planes_of_grid(header: Dataset) -> tuple[list[Facts], int, int]:
    """United Imaging's grid: slices as tiles of one image, row by row, each with its position in a private sequence."""
    slices = header[_GRID_TAG].value
    side = int(np.ceil(np.sqrt(len(slices))))
    rows, columns = int(header.Rows) // -(-len(slices) // side), int(header.Columns) // side
    base = _classic(header)
    orientation = base["orientation"] or _floats(slices[0], "ImageOrientationPatient", 6)
    planes = [
        base
        | {
            "position": _floats(one, "ImagePositionPatient", 3),
            "orientation": orientation,
            "tile": [k // side * rows, k % side * columns],
        }
        for k, one in enumerate(slices)
    ]
    return planes, rows, columns


def _mosaic_normal(csa: dict[str, list[str]], normal: NDArray[np.float64]) -> NDArray[np.float64]:
    """The direction in which a mosaic's slices follow each other; Siemens' private header knows it."""
    said = [float(v) for v in csa.get("SliceNormalVector", [])[:3]]
    return normal if len(said) != 3 or float(np.dot(said, normal)) >= 0 else -normal


def _csa(header: Dataset) -> dict[str, list[str]]:
    """Siemens' private header (0029,xx10) as text, version "SV10": name, number of items, and the items."""
    if 0x00291010 not in header:
        return {}
    data = bytes(header[0x00291010].value or b"")
    if data[:4] != b"SV10" or len(data) < 16:
        return {}
    (n_tags,) = struct.unpack_from("<I", data, 8)
    found: dict[str, list[str]] = {}
    at = 16
    for _ in range(min(n_tags, 1000)):
        name = data[at : at + 64].split(b"\0", 1)[0].decode("ascii", "replace")
        (n_items,) = struct.unpack_from("<i", data, at + 76)
        at += 84
        items = []
        for _ in range(min(n_items, 1000)):
            (length,) = struct.unpack_from("<i", data, at + 4)
            if not 0 <= length <= len(data):
                return found
            items.append(data[at + 16 : at + 16 + length].split(b"\0", 1)[0].decode("ascii", "replace").strip())
            at += 16 + (length + 3) // 4 * 4
        found[name] = [item for item in items if item]
    return found


def _unit(header: Dataset) -> tuple[float, str]:
    """What stored values, rescaled, are to be multiplied with, and in which unit they are then.

    CT is in Hounsfield units by its rescale values. PET in Bq/ml becomes SUV by body weight where the header has all that
    it needs (the vendor-neutral part of the QIBA consensus); else it stays in its unit.
    """
    modality = _text(header, "Modality")
    if modality == "CT":
        return 1.0, "HU"
    if modality != "PT":
        return 1.0, ""
    units = _text(header, "Units").upper()
    if units == "GML":
        return 1.0, "SUV"
    factor = _suv_factor(header) if units == "BQML" else None
    return (1.0, {"BQML": "Bq/ml", "CNTS": "counts"}.get(units, "")) if factor is None else (factor, "SUV")


def _suv_factor(header: Dataset) -> float | None:
    """Body weight [g] over the activity left at the time that decay was corrected to [Bq]."""
    doses = header.get("RadiopharmaceuticalInformationSequence") or []
    weight_g = 1000 * _number(header, "PatientWeight")
    if len(doses) != 1 or weight_g <= 0 or "ATTN" not in (header.get("CorrectedImage") or []):
        return None
    total, half_life_s = _number(doses[0], "RadionuclideTotalDose"), _number(doses[0], "RadionuclideHalfLife")
    injected, began = _seconds(_text(doses[0], "RadiopharmaceuticalStartTime")), _seconds(_text(header, "SeriesTime"))
    if total <= 0 or half_life_s <= 0:
        return None
    decay = _text(header, "DecayCorrection").upper()
    if decay == "ADMIN":
        return weight_g / total
    if decay != "START" or injected is None or began is None:
        return None
    waited_s = (began - injected) % 86_400
    return float(weight_g / (total * 2 ** (-waited_s / half_life_s)))


def _seconds(time: str) -> float | None:
    """Seconds since midnight of a DICOM time, HHMMSS.FFFFFF."""
    match = re.fullmatch(r"(\d{2})(\d{2})(\d{2}(?:\.\d+)?)", time)
    return None if match is None else 3600 * int(match[1]) + 60 * int(match[2]) + float(match[3])


# --- pixels ------------------------------------------------------------------------------------------------------------


def pixels(path: Path, share: Share) -> Facts:
    """All frames of an image as they are stored, decoded: ``(frame, row, column)``, colour with a last axis of three."""
    with unusable(Reason.PIXELS):
        file = opened(path, _LAYOUT)
        _check_size(file)
        image, syntax = _whole(path)
        rows, columns, frames = int(image.Rows), int(image.Columns), max(int(image.get("NumberOfFrames") or 1), 1)
        shape = (frames, rows, columns, *((3,) if _is_colour(image) else ()))
        into = share(shape, _stored_dtype(image))
        for k, frame in enumerate(_decoded(image, syntax)):
            into[k] = frame.reshape(shape[1:])
        if k + 1 != frames:
            raise UnusableError(Reason.DAMAGED)
    return {}


def _whole(path: Path) -> tuple[Dataset, UID]:
    with path.open("rb") as file:
        syntax = _syntax(file)
        if syntax == uid.DeflatedExplicitVRLittleEndian:
            _, image = _inflated(file, path.stat().st_size, None)
            image.file_meta = pydicom.dataset.FileMetaDataset()
            image.file_meta.TransferSyntaxUID = UID(uid.ExplicitVRLittleEndian)
            return image, UID(uid.ExplicitVRLittleEndian)
        file.seek(0)
        image = pydicom.dcmread(file, force=True)
    if not syntax:
        is_implicit, is_little = image.original_encoding
        syntax = UID(
            uid.ExplicitVRBigEndian
            if not is_little
            else uid.ImplicitVRLittleEndian
            if is_implicit
            else uid.ExplicitVRLittleEndian
        )
        image.file_meta.TransferSyntaxUID = syntax
    return image, syntax


def _stored_dtype(image: Dataset) -> str:
    bits = int(image.BitsAllocated)
    if "FloatPixelData" in image or "DoubleFloatPixelData" in image:
        return f"f{bits // 8}"
    if image.get("ModalityLUTSequence"):
        return "f4"
    if image.get("PhotometricInterpretation") == "PALETTE COLOR":
        return "u2" if int(image.RedPaletteColorLookupTableDescriptor[2]) > 8 else "u1"
    return f"{'i' if int(image.get('PixelRepresentation') or 0) else 'u'}{max(bits // 8, 1)}"


def _decoded(image: Dataset, syntax: UID) -> Iterator[NDArray[Any]]:
    """Frame after frame: grey as it is stored, colour as red, green and blue."""
    if syntax == _DEFLATED_FRAMES:
        yield from _inflated_frames(image)
        return
    try:
        decoder = pydicom.pixels.get_decoder(syntax)
    except NotImplementedError as error:
        raise UnusableError(Reason.NO_DECODER) from error
    if not decoder.is_available:
        raise UnusableError(Reason.NO_DECODER)
    is_palette = image.get("PhotometricInterpretation") == "PALETTE COLOR"
    for frame, _ in _by_the_first_that_can(image, syntax, decoder):
        if image.get("ModalityLUTSequence"):
            yield pydicom.pixels.apply_modality_lut(frame, image)
        else:
            yield pydicom.pixels.apply_color_lut(frame, image)[..., :3] if is_palette else frame


def _by_the_first_that_can(image: Dataset, syntax: UID, decoder: Any) -> Iterator[tuple[NDArray[Any], Any]]:
    plugins = [name for name in _PLUGINS.get(syntax, ()) if name in decoder.available_plugins]
    for n, name in enumerate(plugins):
        frames = decoder.iter_array(image, decoding_plugin=name)
        try:
            first = next(frames)
        except Exception:
            if n + 1 == len(plugins):
                raise
            continue
        yield first
        yield from frames
        return
    yield from decoder.iter_array(image)


def _inflated_frames(image: Dataset) -> Iterator[NDArray[Any]]:
    shape = (int(image.Rows), int(image.Columns))
    n_bits = shape[0] * shape[1] * int(image.BitsAllocated)
    frames = max(int(image.get("NumberOfFrames") or 1), 1)
    for data in pydicom.encaps.generate_frames(image.PixelData, number_of_frames=frames):
        values = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, (n_bits + 7) // 8)
        if int(image.BitsAllocated) == 1:
            bits = np.unpackbits(np.frombuffer(values, np.uint8), bitorder="little")
            yield bits[: shape[0] * shape[1]].reshape(shape)
        else:
            yield np.frombuffer(values, f"<{_stored_dtype(image)}").reshape(shape)


# --- labels ------------------------------------------------------------------------------------------------------------


def segmentation(path: Path, share: Share) -> Facts:
    """The segments of a DICOM segmentation (PS3.3, A.51 and C.8.20), its frames in one array ``(frame, row, column)``."""
    with unusable(Reason.PIXELS):
        _check_size(opened(path, _LAYOUT))
        seg, syntax = _whole(path)
        frames = seg.PerFrameFunctionalGroupsSequence
        shared = (seg.get("SharedFunctionalGroupsSequence") or [None])[0]
        into = share((len(frames), int(seg.Rows), int(seg.Columns)), _stored_dtype(seg))
        for k, (pixels, _) in enumerate(zip(_decoded(seg, syntax), frames, strict=True)):
            into[k] = pixels
        return {
            "is_label_map": seg.SOPClassUID == _LABEL_MAP,
            "is_fractional": _text(seg, "SegmentationType") == "FRACTIONAL",
            "maximum": int(seg.get("MaximumFractionalValue") or 1),
            "segments": [[int(s.SegmentNumber), str(s.SegmentLabel)] for s in seg.SegmentSequence],
            "frames": [_frame_of_segmentation(frame, shared) for frame in frames],
        }


def _frame_of_segmentation(frame: Dataset, shared: Dataset | None) -> Facts:
    place = _group(frame, shared, "PlanePositionSequence")
    plane = _group(frame, shared, "PlaneOrientationSequence")
    derivation = _group(frame, shared, "DerivationImageSequence")
    which = _group(frame, shared, "SegmentIdentificationSequence")
    sources = derivation.get("SourceImageSequence", []) if derivation is not None else []
    return {
        "position": None if place is None else _floats(place, "ImagePositionPatient", 3),
        "orientation": None if plane is None else _floats(plane, "ImageOrientationPatient", 6),
        "segment": None if which is None else int(which.ReferencedSegmentNumber),
        "sources": [[str(s.ReferencedSOPInstanceUID), int(_number(s, "ReferencedFrameNumber") or 0)] for s in sources],
    }


def structures(path: Path) -> Facts:
    """The regions of an RT structure set (PS3.3, C.8.8.5 and C.8.8.6): name and closed planar contours, [mm, LPS]."""
    with unusable(Reason.DAMAGED):
        names_and_contours = ["StructureSetROISequence", "ROIContourSequence", "SOPClassUID"]
        rt = opened(path, names_and_contours).header
        names = {int(roi.ROINumber): _text(roi, "ROIName") for roi in rt.get("StructureSetROISequence") or []}
        regions: dict[int, list[list[float]]] = {number: [] for number in names}
        n_values = 0
        for region in rt.get("ROIContourSequence") or []:
            number = int(region.ReferencedROINumber)
            for contour in region.get("ContourSequence") or []:
                if _text(contour, "ContourGeometricType") != "CLOSED_PLANAR":
                    continue
                values = [float(v) for v in contour.ContourData]
                n_values += len(values)
                if n_values > MAX_CONTOUR_VALUES:
                    raise UnusableError(Reason.TOO_LARGE)
                if len(values) >= 9 and len(values) % 3 == 0:
                    regions.setdefault(number, []).append(values)
        return {"regions": [[names.get(number, ""), contours] for number, contours in regions.items()]}
