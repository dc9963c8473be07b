"""The pixels of a DICOM file, decoded, and the labels that are drawn or said in one; runs in the child of ``reader``.

Compressed pixels go to the decoder that was fastest on them when measured (docs/decisions/dependencies.md).
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import Dataset, uid
from pydicom.dataelem import RawDataElement
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
from pydicom.tag import BaseTag
from pydicom.uid import UID

from client.data import codecs
from client.data.dicom_files import (
    DEFLATED_FRAMES,
    LABEL_MAP,
    LAYOUT,
    Facts,
    Opened,
    check_size,
    floats,
    group,
    inflated,
    is_colour,
    is_squeezed,
    number,
    opened,
    require_verified,
    syntax_of,
    text,
)
from client.data.skips import Reason, UnusableError, unusable
from client.data.zips import open_file

Share = Callable[[tuple[int, ...], str], NDArray[Any]]
"""Gives an array of a shape and dtype whose contents the asking process sees."""

MAX_ITEMS = 10_000
"""Content items that one report may hold."""

MAX_CONTOUR_VALUES = 20_000_000
"""Coordinates of contours that one file may hold."""

_PLUGINS = {
    uid.RLELossless: ("pylibjpeg", "pydicom"),
    uid.JPEGBaseline8Bit: ("pylibjpeg",),
    uid.JPEGExtended12Bit: ("pylibjpeg",),
    uid.JPEGLossless: ("pylibjpeg",),
    uid.JPEGLosslessSV1: ("pylibjpeg",),
    uid.JPEGLSLossless: ("pylibjpeg",),
    uid.JPEGLSNearLossless: ("pylibjpeg",),
    uid.JPEG2000Lossless: ("pylibjpeg",),
    uid.JPEG2000: ("pylibjpeg",),
    uid.HTJ2KLossless: ("pylibjpeg",),
    uid.HTJ2KLosslessRPCL: ("pylibjpeg",),
    uid.HTJ2K: ("pylibjpeg",),
}
"""The fastest decoder of each compressed syntax first; the others for what it refuses. GDCM is none of them: it read
nothing that these refuse, and ended its process on damaged files. Grey run lengths, lossless JPEG and JPEG-LS are
first tried by ``codecs``, in a half to a fifth of the time."""


def pixels(path: Path, share: Share) -> Facts:
    """All frames of an image as they are stored, decoded: ``(frame, row, column)``, colour with a last axis of three."""
    with unusable(Reason.PIXELS):
        file = opened(path, _FOR_PIXELS)
        check_size(file)
        image, syntax = _with_frames(path, file)
        rows, columns, frames = int(image.Rows), int(image.Columns), max(int(image.get("NumberOfFrames") or 1), 1)
        shape = (frames, rows, columns, *((3,) if is_colour(image) else ()))
        into = share(shape, _stored_dtype(image))
        if not _decoded_in_place(image, syntax, into):
            for k, frame in enumerate(_decoded(image, syntax)):
                into[k] = frame.reshape(shape[1:])
            if k + 1 != frames:
                raise UnusableError(Reason.DAMAGED)
    return {}


_FOR_PIXELS = [
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit"),
    *("PixelRepresentation", "PhotometricInterpretation", "PlanarConfiguration", "ModalityLUTSequence", "SOPClassUID"),
]
"""What a decoder asks of a header."""


def _with_frames(path: Path, file: Opened) -> tuple[Dataset, UID]:
    """The header as it is, with its compressed frames behind it; whatever is less ordinary is parsed as a whole."""
    header = file.header
    is_plain = not header.get("ModalityLUTSequence") and header.get("PhotometricInterpretation") != "PALETTE COLOR"
    if not (is_plain and is_squeezed(file.syntax) and file.syntax != DEFLATED_FRAMES and not file.is_implicit):
        return _whole(path)
    with open_file(path) as stream:
        stream.seek(-file.after, os.SEEK_END)
        is_encapsulated = stream.read(len(_ENCAPSULATED)) == _ENCAPSULATED
        frames = stream.read() if is_encapsulated else b""
    if not is_encapsulated:
        return _whole(path)
    tag = BaseTag(0x7FE00010)
    header[tag] = RawDataElement(tag, "OB", 0xFFFFFFFF, frames, 0, False, True)
    return header, file.syntax


_ENCAPSULATED = b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff"


def _whole(path: Path) -> tuple[Dataset, UID]:
    with open_file(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        syntax = syntax_of(file)
        if syntax == uid.DeflatedExplicitVRLittleEndian:
            _, image = inflated(file, size, None)
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


def _decoded_in_place(image: Dataset, syntax: UID, into: NDArray[Any]) -> bool:
    """Decode grey frames right where they are to lie; False if pydicom's decoders have to."""
    is_plain = into.ndim == 3 and not image.get("ModalityLUTSequence")
    if syntax not in codecs.SYNTAXES or not is_plain or image.get("PhotometricInterpretation") == "PALETTE COLOR":
        return False
    k = -1
    try:
        for k, frame in enumerate(pydicom.encaps.generate_frames(image.PixelData, number_of_frames=len(into))):
            codecs.decode(frame, syntax, into[k])
    except Exception:
        return False
    unused = 8 * into.itemsize - int(image.get("BitsStored") or 0)
    if 0 < unused < 8 * into.itemsize:
        np.right_shift(np.left_shift(into, unused, out=into), unused, out=into)
    return k + 1 == len(into)


def _decoded(image: Dataset, syntax: UID) -> Iterator[NDArray[Any]]:
    """Frame after frame: grey as it is stored, colour as red, green and blue."""
    if syntax == DEFLATED_FRAMES:
        yield from _inflated_frames(image)
        return
    if int(image.BitsAllocated) == 1 and not syntax.is_encapsulated:
        yield from _packed_frames(image)
        return
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise UnusableError(Reason.NO_DECODER) from error
    if not decoder.is_available:
        raise UnusableError(Reason.NO_DECODER)
    is_palette = image.get("PhotometricInterpretation") == "PALETTE COLOR"
    for frame, _ in _by_the_first_that_can(image, syntax, decoder):
        if image.get("ModalityLUTSequence"):
            yield apply_modality_lut(frame, image)
        else:
            yield apply_color_lut(frame, image)[..., :3] if is_palette else frame


def _packed_frames(image: Dataset) -> Iterator[NDArray[Any]]:
    """Frames of single bits, which follow each other without a gap: one may begin within a byte (PS3.5, 8.1.1).

    pydicom's decoder of single frames cannot take those apart whose number of pixels is no multiple of 8.
    """
    rows, columns = int(image.Rows), int(image.Columns)
    packed = np.frombuffer(image.PixelData, np.uint8)
    for k in range(max(int(image.get("NumberOfFrames") or 1), 1)):
        begin, end = k * rows * columns, (k + 1) * rows * columns
        bits = np.unpackbits(packed[begin // 8 : -(-end // 8)], bitorder="little")
        yield bits[begin % 8 : begin % 8 + rows * columns].reshape(rows, columns)


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


def segmentation(path: Path, share: Share) -> Facts:
    """The segments of a DICOM segmentation (PS3.3, A.51 and C.8.20), its frames in one array ``(frame, row, column)``."""
    with unusable(Reason.PIXELS):
        check_size(opened(path, LAYOUT))
        seg, syntax = _whole(path)
        frames = seg.PerFrameFunctionalGroupsSequence
        shared = (seg.get("SharedFunctionalGroupsSequence") or [None])[0]
        into = share((len(frames), int(seg.Rows), int(seg.Columns)), _stored_dtype(seg))
        for k, (pixels, _) in enumerate(zip(_decoded(seg, syntax), frames, strict=True)):
            into[k] = pixels
        return {
            "is_label_map": seg.SOPClassUID == LABEL_MAP,
            "is_fractional": text(seg, "SegmentationType") == "FRACTIONAL",
            "maximum": int(seg.get("MaximumFractionalValue") or 1),
            "segments": [[int(s.SegmentNumber), str(s.SegmentLabel)] for s in seg.SegmentSequence],
            "frames": [_frame_of_segmentation(frame, shared) for frame in frames],
        }


def _frame_of_segmentation(frame: Dataset, shared: Dataset | None) -> Facts:
    place = group(frame, shared, "PlanePositionSequence")
    plane = group(frame, shared, "PlaneOrientationSequence")
    derivation = group(frame, shared, "DerivationImageSequence")
    which = group(frame, shared, "SegmentIdentificationSequence")
    sources = derivation.get("SourceImageSequence", []) if derivation is not None else []
    return {
        "position": None if place is None else floats(place, "ImagePositionPatient", 3),
        "orientation": None if plane is None else floats(plane, "ImageOrientationPatient", 6),
        "segment": None if which is None else int(which.ReferencedSegmentNumber),
        "sources": [[str(s.ReferencedSOPInstanceUID), int(number(s, "ReferencedFrameNumber") or 0)] for s in sources],
    }


def report(path: Path, words: list[str]) -> Facts:
    """Which of some words, in lower case, a structured report says: as the whole of a coded value or of a text.

    Content items are those of PS3.3, C.17.3; where they stand in the tree does not matter.
    """
    with unusable(Reason.DAMAGED):
        header = opened(path, ["ContentSequence", "VerificationFlag", "SOPClassUID"]).header
        require_verified(header)
        waiting, said, n_items = [header], set(), 0
        while waiting:
            for item in waiting.pop().get("ContentSequence") or []:
                n_items += 1
                if n_items > MAX_ITEMS:
                    raise UnusableError(Reason.TOO_LARGE)
                waiting.append(item)
                codes = item.get("ConceptCodeSequence") or []
                said |= {text(item, "TextValue").lower(), *(text(code, "CodeMeaning").lower() for code in codes)}
        return {"said": sorted(said & set(words))}


def structures(path: Path) -> Facts:
    """The regions of an RT structure set (PS3.3, C.8.8.5 and C.8.8.6): name and closed planar contours, [mm, LPS]."""
    with unusable(Reason.DAMAGED):
        names_and_contours = ["StructureSetROISequence", "ROIContourSequence", "SOPClassUID"]
        rt = opened(path, names_and_contours).header
        names = {int(roi.ROINumber): text(roi, "ROIName") for roi in rt.get("StructureSetROISequence") or []}
        regions: dict[int, list[list[float]]] = {number: [] for number in names}
        n_values = 0
        for region in rt.get("ROIContourSequence") or []:
            number = int(region.ReferencedROINumber)
            for contour in region.get("ContourSequence") or []:
                if text(contour, "ContourGeometricType") != "CLOSED_PLANAR":
                    continue
                values = [float(v) for v in contour.ContourData]
                n_values += len(values)
                if n_values > MAX_CONTOUR_VALUES:
                    raise UnusableError(Reason.TOO_LARGE)
                if len(values) >= 9 and len(values) % 3 == 0:
                    regions.setdefault(number, []).append(values)
        return {"regions": [[names.get(number, ""), contours] for number, contours in regions.items()]}
