"""One DICOM file, opened: its header, and what it says about itself.

Runs in the child process of ``reader``, as do ``dicom_planes`` and ``dicom_pixels``, and answers in plain numbers and
words; what they mean is decided by ``dicom`` and ``stacks``.
"""

from __future__ import annotations

import logging
import re
import struct
import zlib
from dataclasses import dataclass
from functools import cache, lru_cache
from io import SEEK_END, BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import pydicom
from pydicom import Dataset, uid
from pydicom.charset import convert_encodings
from pydicom.datadict import dictionary_has_tag, dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement, convert_raw_data_element
from pydicom.filereader import read_dataset, read_preamble
from pydicom.tag import BaseTag
from pydicom.uid import UID

from client.data.scan import MAX_SIDE
from client.data.skips import Reason, UnusableError, unusable
from client.data.zips import ALWAYS_ALLOWED, MAX_INFLATED, open_file

# pydicom's log quotes values of the header and tracebacks of decoders; what a reader needs is the counted reason.
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)

Facts = dict[str, Any]
"""What can be written as JSON."""

MAX_SQUEEZED = 4096
"""More than this is an attack on memory in compressed pixels: an even plane of JPEG 2000 comes to about 2,600."""

HEAD = 65_536
"""How much of a file is read at once; most headers end within [bytes]."""

MAX_FRAMES = 100_000

LABEL_MAP = UID("1.2.840.10008.5.1.4.1.1.66.7")
"""Label Map Segmentation Storage (PS3.4, B.5): one value per voxel instead of one frame per segment."""

SEGMENTATIONS = (uid.SegmentationStorage, LABEL_MAP)
DEFLATED_FRAMES = UID("1.2.840.10008.1.2.8.1")
"""Deflated Image Frame Compression (PS3.5, A.4.13): each frame deflated by itself."""

_IDENTITY = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
_GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
GRID_TAG = 0x00651051
"""United Imaging's sequence of the slices in a grid (MRVFrameSequence), each with its position."""
_SHAPE = (
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated", "BitsStored", "PixelRepresentation"),
    *("PhotometricInterpretation", "PlanarConfiguration", "ImageType", "SOPClassUID", "Modality"),
)
_ABOUT = [
    *("PatientID", "PatientName", *_IDENTITY, "SeriesDescription", "Manufacturer", "ManufacturerModelName"),
    *("MagneticFieldStrength", "ReferencedSeriesSequence", "BurnedInAnnotation", *_SHAPE, *_GEOMETRY),
    "ReferencedFrameOfReferenceSequence",
    "VerificationFlag",
    GRID_TAG,
]
LAYOUT = [
    *(*_SHAPE, *_GEOMETRY, "SOPInstanceUID", "SliceThickness", "SpacingBetweenSlices", "RescaleSlope"),
    *("RescaleIntercept", "InstanceNumber", "AcquisitionNumber", "TemporalPositionIdentifier", "EchoNumbers"),
    *("EchoTime", "TriggerTime", "DiffusionBValue", "ImagerPixelSpacing", "NominalScannedPixelSpacing"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "DetectorInformationSequence"),
    *("GridFrameOffsetVector", "DoseGridScaling", "SequenceOfUltrasoundRegions", "Units", "DecayCorrection"),
    *("PatientWeight", "RadiopharmaceuticalInformationSequence", "SeriesTime", "SeriesDate", "AcquisitionTime"),
    *("CorrectedImage", "ModalityLUTSequence", "ComplexImageComponent", "AcquisitionDate", GRID_TAG),
]

PROJECTIONS = frozenset(
    re.findall("[A-Z]+", "CR DX MG RG XA RF IO PX US SC OT OP OPT ES XC GM SM DM BI LS TG HC DG NM")
)
"""Modalities whose images have no place in the patient: rows and columns are all there is."""


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


def opened(path: Path, tags: list[Any]) -> Opened:
    """The header of a file, without its pixels.

    Raises
    ------
    UnusableError
        If the file is no DICOM or damaged.
    """
    with unusable(Reason.DAMAGED), open_file(path) as file:
        size = file.seek(0, SEEK_END)
        file.seek(0)
        head = file.read(HEAD)
        _require_dicom(head[:144])
        if (quickly := _walked(head, tags)) is not None:
            header, syntax, at = quickly
        else:
            file.seek(0)
            syntax = syntax_of(file)
            if syntax == uid.DeflatedExplicitVRLittleEndian:
                return _opened_deflated(file, size, tags)
            file.seek(0)
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags, force=True)
            if header.file_meta.get("MediaStorageSOPClassUID") == uid.MediaStorageDirectoryStorage:
                raise UnusableError(Reason.DIRECTORY)
            at = file.tell()
        is_implicit, is_little = header.original_encoding
        pixels_at = None if isinstance(file, BytesIO) else _pixels_at(file, at, size, syntax, header)
        return Opened(header, syntax, bool(is_implicit), bool(is_little), size - at, pixels_at)


def _walked(head: bytes, tags: list[Any]) -> tuple[Dataset, UID, int] | None:
    """The wanted elements of an ordinary header, five times as fast as pydicom; None for any that is not ordinary.

    Ordinary is: a preamble, little endian, and all elements up to the pixels of stated length and within ``head``. Values
    are left to pydicom.
    """
    if head[128:132] != b"DICM":
        return None
    meta = _elements(head, 132, frozenset({0x00020002, 0x00020010}), is_implicit=False, end=0x00030000)
    named = None if meta is None else meta[0].get(BaseTag(0x00020010))
    if meta is None or named is None or named.value is None:
        return None
    kind = meta[0].get(BaseTag(0x00020002))
    if kind is not None and (kind.value or b"").rstrip(b"\0 ") == uid.MediaStorageDirectoryStorage.encode():
        raise UnusableError(Reason.DIRECTORY)
    syntax = UID(named.value.decode("ascii").rstrip("\0 "))
    if not syntax.is_transfer_syntax or not syntax.is_little_endian or syntax.is_deflated:
        return None
    is_implicit = syntax == uid.ImplicitVRLittleEndian
    found = _elements(head, meta[1], _numbers(tuple(tags)), is_implicit=is_implicit, end=0x7FE00008)
    if found is None:
        return None
    elements, at = found
    charset = elements.get(BaseTag(0x00080005))
    return Header(elements, _encodings(charset.value if charset is not None else b""), is_implicit), syntax, at


@lru_cache(maxsize=64)
def _encodings(charset: bytes | None) -> tuple[str, ...]:
    """Python's names of the character sets that a header names."""
    names = charset.decode("ascii").strip().split("\\") if charset else [""]
    return tuple(convert_encodings([name.strip() for name in names]))


class Header(Dataset):
    """A data set of which plain values are converted once for all files that hold the same bytes, as slices do.

    Nothing may be added to it: what was not there at first is not found by ``get``.
    """

    def __init__(self, elements: dict[BaseTag, RawDataElement], encodings: tuple[str, ...], is_implicit: bool) -> None:
        super().__init__(elements)  # type: ignore[arg-type]
        self.set_original_encoding(is_implicit, True, list(encodings))
        plain = {int(number): raw for number, raw in elements.items()}  # a tag compares itself slowly
        object.__setattr__(self, "_read", (plain, encodings))

    def get(self, key: Any, default: Any = None) -> Any:
        """The value of an attribute by its keyword; as a data set's for all other keys."""
        number = _number(key) if type(key) is str else None
        if number is None:
            return super().get(key, default)
        elements, encodings = self._read
        raw = elements.get(number)
        if raw is None:
            return default
        vr = raw.VR or _dictionary_vr(number)
        if vr not in _PLAIN or not raw.value or len(raw.value) > LONGEST_KEPT:
            return super().get(key, default)
        return _converted(number, vr, raw.value, encodings)


LONGEST_KEPT = 256
"""Longer values are not kept for the next file [bytes]."""


@cache
def _number(keyword: str) -> int | None:
    return tag_for_keyword(keyword)


@cache
def _dictionary_vr(number: int) -> str:
    return dictionary_VR(number) if dictionary_has_tag(number) else ""


@lru_cache(maxsize=4096)
def _converted(number: int, vr: str, value: bytes, encodings: tuple[str, ...]) -> Any:
    raw = RawDataElement(BaseTag(number), vr, len(value), value, 0, False, True)
    return convert_raw_data_element(raw, encoding=list(encodings)).value


@cache
def _numbers(tags: tuple[Any, ...]) -> frozenset[int]:
    """Tags as numbers, and that of the character set, without which no text can be read."""
    return frozenset({0x00080005, *(int(pydicom.tag.Tag(tag)) for tag in tags)})


_LONG = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
"""Value representations whose length has four bytes (PS3.5, 7.1.2)."""

_SHORT = frozenset(re.findall(rb"[A-Z]{2}", b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US"))
_PLAIN = frozenset(vr.decode() for vr in _SHORT)


def _elements(
    head: bytes, at: int, wanted: frozenset[int], *, is_implicit: bool, end: int
) -> tuple[dict[BaseTag, RawDataElement], int] | None:
    """Elements from ``at`` on, up to the first that is ``end`` or beyond, and where that begins."""
    found: dict[BaseTag, RawDataElement] = {}
    last = -1
    while at + 12 <= len(head):
        group, element = _PAIR.unpack_from(head, at)
        number = group << 16 | element
        if number >= end:
            return found, at
        vr = None if is_implicit else head[at + 4 : at + 6]
        if vr is None:
            (length,), begin = _LENGTH.unpack_from(head, at + 4), at + 8
        elif vr in _SHORT:
            (length,), begin = _SHORT_LENGTH.unpack_from(head, at + 6), at + 8
        elif vr in _LONG:
            (length,), begin = _LENGTH.unpack_from(head, at + 8), at + 12
        else:
            return None
        if number <= last or begin + length > len(head):  # out of order, of unknown length, or beyond what was read
            return None
        last = number
        if number in wanted:
            name = None if vr is None else vr.decode("ascii")
            value = head[begin : begin + length]
            found[BaseTag(number)] = RawDataElement(BaseTag(number), name, length, value, begin, is_implicit, True)
        at = begin + length
    return None


_PAIR, _LENGTH, _SHORT_LENGTH = struct.Struct("<HH"), struct.Struct("<I"), struct.Struct("<H")


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


def syntax_of(file: BinaryIO) -> UID:
    """The transfer syntax that the meta information names; empty where there is none."""
    from pydicom.filereader import _read_file_meta_info

    if read_preamble(file, force=True) is None:
        file.seek(0)
    return UID(str(_read_file_meta_info(file).get("TransferSyntaxUID") or ""))


def _opened_deflated(file: BinaryIO, size: int, tags: list[Any]) -> Opened:
    data, header = inflated(file, size, tags)
    return Opened(
        header, UID(uid.DeflatedExplicitVRLittleEndian), False, True, len(data.getvalue()) - data.tell(), None
    )


def inflated(file: BinaryIO, size: int, tags: list[Any] | None) -> tuple[BytesIO, Dataset]:
    """A deflated data set, inflated as far as is believable; the file stands behind its meta information."""
    most = max(ALWAYS_ALLOWED, MAX_INFLATED * size)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    data = BytesIO(inflater.decompress(file.read(), most))
    if inflater.unconsumed_tail:
        raise UnusableError(Reason.TOO_LARGE)
    stop = None if tags is None else _before_pixels
    wanted: list[Any] | None = None if tags is None else [pydicom.tag.Tag(tag) for tag in tags]
    header = read_dataset(data, False, True, stop_when=stop, specific_tags=wanted)
    header.set_original_encoding(False, True, header.get("SpecificCharacterSet", "ISO_IR 6"))
    return data, header


def _before_pixels(tag: Any, vr: str | None, length: int) -> bool:
    return tag in (0x7FE00008, 0x7FE00009, 0x7FE00010)


_PIXELS = ((0x7FE0, 0x0008), (0x7FE0, 0x0009), (0x7FE0, 0x0010))
"""Float Pixel Data, Double Float Pixel Data, Pixel Data."""


def _pixels_at(file: BinaryIO, at: int, size: int, syntax: UID, header: Dataset) -> int | None:
    if is_squeezed(syntax):
        return None
    is_implicit, is_little = header.original_encoding
    file.seek(at)
    element = file.read(12)
    order = "<" if is_little else ">"
    if len(element) < 12 or struct.unpack_from(f"{order}HH", element) not in _PIXELS:
        return None
    (length,) = struct.unpack_from(f"{order}I", element, 4 if is_implicit else 8)
    begins = at + (8 if is_implicit else 12)
    return begins if length != 0xFFFFFFFF and begins + length <= size + 1 else None


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
    texts = {name: text(header, name) for name in ("PatientID", "PatientName", *_IDENTITY)}
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
        "description": text(header, "SeriesDescription"),
        "modality": text(header, "Modality") or None,
        "manufacturer": text(header, "Manufacturer"),
        "model": text(header, "ManufacturerModelName"),
        "field_t": None if what != "image" or not strength else float(strength),
        "reference": _referenced_series(header, what),
        "n_planes": _n_planes(header) if what == "image" else 1,
        "says_burned_in": text(header, "BurnedInAnnotation").upper() == "YES",
    }


REPORTS = (uid.BasicTextSRStorage, uid.EnhancedSRStorage, uid.ComprehensiveSRStorage, uid.Comprehensive3DSRStorage)


def _kind(file: Opened) -> str:
    """``image``, ``segmentation``, ``structures`` or ``report``, after checks that cost nothing."""
    header = file.header
    if header.get("SOPClassUID") in REPORTS:
        require_verified(header)
        return "report"
    if header.get("SOPClassUID") == uid.RTStructureSetStorage:
        return "structures"
    check_size(file)
    if header.get("SOPClassUID") in SEGMENTATIONS:
        return "segmentation"
    if text(header, "Modality") in PROJECTIONS or header.get("SOPClassUID") in _ENHANCED:
        return "image"
    if int(header.get("NumberOfFrames") or 1) > 1 and header.get("SOPClassUID") not in _STACKED:
        raise UnusableError(Reason.NOT_SUPPORTED)
    if header.get("SOPClassUID") not in _STACKED and not is_grid(header) and not all(map(header.get, _GEOMETRY)):
        raise UnusableError(Reason.TAGS_MISSING)
    return "image"


def require_verified(header: Dataset) -> None:
    """A report that nobody answers for, such as a program's, is no label (PS3.3, C.17.2)."""
    if text(header, "VerificationFlag") != "VERIFIED":
        raise UnusableError(Reason.NOT_AN_IMAGE)


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


def check_size(file: Opened) -> None:
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
    in_frames = is_squeezed(file.syntax)
    if in_frames:
        if n_bytes > max(ALWAYS_ALLOWED, MAX_SQUEEZED * file.after):
            raise UnusableError(Reason.TOO_LARGE)
    elif header.get("PhotometricInterpretation") == "YBR_FULL_422":
        n_bytes = n_bytes * 2 // 3
    if not in_frames and file.after < n_bytes:
        raise UnusableError(Reason.DAMAGED)


def is_squeezed(syntax: UID) -> bool:
    """Whether pixels are compressed frame by frame; within a deflated data set they are not."""
    if syntax == DEFLATED_FRAMES:
        return True
    return bool(syntax.is_transfer_syntax and syntax.is_compressed and not syntax.is_deflated)


def text(header: Dataset, name: str) -> str:
    """An attribute as text; empty where there is none."""
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


def is_mosaic(header: Dataset) -> bool:
    """Whether an image's slices are tiles of one plane, as Siemens writes them."""
    return "MOSAIC" in (header.get("ImageType") or [])


def is_grid(header: Dataset) -> bool:
    """Whether they are, as United Imaging writes them."""
    return GRID_TAG in header and bool(header[GRID_TAG].value) and "VFRAME" in (header.get("ImageType") or [])


def _n_planes(header: Dataset) -> int:
    frames = int(header.get("NumberOfFrames") or 1)
    return 2 if frames == 1 and (is_mosaic(header) or is_grid(header)) else max(frames, 1)


def identity(path: Path) -> Facts:
    """UIDs of study, series and object; whatever kind it is of."""
    file = opened(path, list(_IDENTITY))
    with unusable(Reason.DAMAGED):
        return {"uids": [text(file.header, name) for name in _IDENTITY]}


def attribute(path: Path, keyword: str) -> Facts:
    """The value of an attribute of the data set itself, as text; empty where it has none."""
    file = opened(path, [keyword])
    with unusable(Reason.DAMAGED):
        return {"value": str(file.header.get(keyword) or "")}


def is_colour(header: Dataset) -> bool:
    """Whether pixels are red, green and blue, or lead to such by a palette."""
    return int(header.get("SamplesPerPixel") or 1) > 1 or header.get("PhotometricInterpretation") == "PALETTE COLOR"


def floats(item: Dataset, name: str, n: int) -> list[float] | None:
    """``n`` numbers of the header; None where there are not so many."""
    values = item.get(name)
    if values is None or values == "" or isinstance(values, str | float | int):
        return None
    numbers = [float(v) for v in values]
    return numbers if len(numbers) == n else None


def number(item: Dataset, name: str, default: float = 0.0) -> float:
    """A number of the header; of several the first."""
    value = item.get(name)
    if isinstance(value, pydicom.multival.MultiValue | list):
        value = value[0] if len(value) else None
    return default if value is None or value == "" else float(value)


def group(frame: Dataset, shared: Dataset | None, name: str) -> Dataset | None:
    """A functional group of a frame, its own or the shared one (PS3.3, C.7.6.16)."""
    for holder in (frame, shared):
        if holder is not None and (items := holder.get(name)):
            return items[0]  # type: ignore[no-any-return]
    return None
