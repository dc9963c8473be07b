"""One file of k-space, opened: what it holds, and its numbers in one order of axes.

Runs in the child process of ``reader``, as does ``dicom_files``; what becomes of the numbers is ``kspace``'s matter. Sizes,
types, links and filters are checked before any number is read: a file may not claim what its bytes cannot hold, nor lead to
another file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from client.data.scan import MAX_SIDE
from client.data.skips import Reason, UnusableError, unusable
from client.data.zips import ALWAYS_ALLOWED, MAX_INFLATED

Facts = dict[str, Any]
"""What can be written as JSON."""

Share = Callable[[tuple[int, ...], str], NDArray[Any]]
"""Gives an array of a shape and dtype whose contents the asking process sees."""

NUMPY = ".npz"

MEASURED, MAGNITUDE = "image", "magnitude"
"""Names of a series whose k-space was measured, and of one that has a magnitude alone."""

MAX_COILS = 256
"""Largest believable number of coils."""

LARGEST_HEADER = 1 << 20
"""Longer XML headers are not read [bytes]."""

LONGEST_NAME = 1024
"""Longer names of patients are not read [characters]."""

FILTERS = frozenset({1, 2, 3, 32000})
"""How chunks may be stored: deflated, shuffled, with a checksum, or by LZF. HDF5 would look for a program to run for
others."""

_NAMESPACE = {"": "http://www.ismrm.org/ISMRMRD"}


@dataclass(frozen=True)
class Header:
    """What an ISMRMRD header (fastMRI has one too) says, as far as it matters here; None where it does not say it."""

    patient: str | None = None
    scanner: str | None = None
    matrix: tuple[int, int] | None = None
    """Reconstructed matrix along (readout, phase)."""

    encoded: tuple[int, int] | None = None
    """Encoded matrix along (readout, phase)."""

    field_of_view_mm: tuple[float, float, float] | None = None
    """Of the reconstructed matrix along (readout, phase, slice) [mm]."""

    centre_line: int | None = None
    """Number of the phase-encoding line through the centre."""


def describe(path: Path) -> Facts:
    """What a file of k-space is, from its header: ``name``, ``patient`` and ``scanner``, None where it does not say.

    Raises
    ------
    UnusableError
        If it cannot be opened, holds no k-space, or holds it in a layout that is not read.
    """
    if path.suffix.lower() == NUMPY:
        with _members(path) as members:
            if not (members.has(MAGNITUDE) or members.has("kspace") or (members.has("re") and members.has("im"))):
                raise UnusableError(Reason.NOT_AN_IMAGE)
            return {"name": MAGNITUDE if members.has(MAGNITUDE) else MEASURED, "patient": None, "scanner": None}
    with opened(path) as file:
        check_layout(file, path)
        header = _header(file)
        patient = patient_of(file)
    return {"name": MEASURED, "patient": patient or header.patient, "scanner": header.scanner}


def values(path: Path, share: Share) -> Facts:
    """The numbers of a file: ``kind`` says of what.

    ==============  ================================================================
    ``magnitude``   float32 ``(y, x)``
    ``image``       complex64 ``(coil, z, y, x)``
    ``k-space``     complex64 ``(coil, z, y, x)``, its centre in the middle
    ==============  ================================================================

    Returns
    -------
    dict
        ``kind``; ``matrix``, the reconstructed one along (readout, phase), or None; ``spacing_mm`` along (z, y, x);
        ``has_mask``, whether the file says itself that samples are missing.

    Raises
    ------
    UnusableError
        If it cannot be decoded, or its layout is not read.
    """
    with unusable(Reason.PIXELS):
        if path.suffix.lower() == NUMPY:
            with _members(path) as members:
                return _of_numpy(members, share) | {"matrix": None, "spacing_mm": (1.0, 1.0, 1.0), "has_mask": False}
        with opened(path) as file:
            check_layout(file, path)
            header = _header(file)
            has_mask = "kspace" in file and _has_mask(file)
            if "kspace" in file:
                _of_fastmri(file, share)
            else:
                _of_ismrmrd(file, header, path, share)
            return {
                "kind": "k-space",
                "matrix": header.matrix,
                "spacing_mm": _spacing_mm(header),
                "has_mask": has_mask,
            }


def check_sizes(*sides: int, n_coils: int = 1) -> None:
    """Refuse what is too large to be believed."""
    if max(sides) > MAX_SIDE or min(sides) < 1 or not 1 <= n_coils <= MAX_COILS or math.prod(sides) * n_coils > 2**31:
        raise UnusableError(Reason.TOO_LARGE)


def _check_swelling(n_bytes: int, stored: int) -> None:
    """Refuse what would become implausibly large."""
    if n_bytes > max(ALWAYS_ALLOWED, MAX_INFLATED * stored):
        raise UnusableError(Reason.TOO_LARGE)


# ------------------------------------------------------------------------------------------------------------- NumPy


class _Members:
    """The arrays of an .npz file: their headers are read and checked before they are. Objects are never unpickled."""

    def __init__(self, zipped: ZipFile) -> None:
        self._zipped = zipped
        self._infos = {info.filename.removesuffix(".npy"): info for info in zipped.infolist()}

    def has(self, name: str) -> bool:
        return name in self._infos

    def read(self, name: str, *, kinds: str, dimensions: tuple[int, ...]) -> NDArray[Any]:
        """An array of a kind of number (``dtype.kind``) and a number of axes that fit; LAYOUT if they do not."""
        info = self._infos[name]
        if info.compress_type not in (ZIP_STORED, ZIP_DEFLATED) or info.flag_bits & 1:
            raise UnusableError(Reason.NO_DECODER)
        _check_swelling(info.file_size, info.compress_size)
        with self._zipped.open(info) as member:
            version = npy.read_magic(member)
            read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, is_fortran, dtype = read_header(member)
            if dtype.kind not in kinds or dtype.hasobject or len(shape) not in dimensions:
                raise UnusableError(Reason.LAYOUT)
            n_bytes = math.prod(shape) * dtype.itemsize
            if min(shape, default=1) < 1 or n_bytes > info.file_size:
                raise UnusableError(Reason.DAMAGED)
            data = member.read(n_bytes)
        if len(data) != n_bytes:
            raise UnusableError(Reason.DAMAGED)
        flat = np.frombuffer(data, dtype)
        return flat.reshape(shape[::-1]).T if is_fortran else flat.reshape(shape)


@contextmanager
def _members(path: Path) -> Iterator[_Members]:
    with unusable(Reason.DAMAGED):
        zipped = ZipFile(path)
    with zipped, unusable(Reason.DAMAGED):
        yield _Members(zipped)


def _of_numpy(members: _Members, share: Share) -> Facts:
    if members.has(MAGNITUDE):
        magnitude = _plane(members, MAGNITUDE)
        share(magnitude.shape, "<f4")[...] = magnitude
        return {"kind": "magnitude"}
    if members.has("kspace"):
        kspace = members.read("kspace", kinds="c", dimensions=(2, 3))
        kspace = kspace[None] if kspace.ndim == 2 else kspace
        check_sizes(*kspace.shape[1:], n_coils=len(kspace))
        share((len(kspace), 1, *kspace.shape[1:]), "<c8")[:, 0] = kspace
        return {"kind": "k-space"}
    real, imaginary = _plane(members, "re"), _plane(members, "im")
    if real.shape != imaginary.shape:
        raise UnusableError(Reason.LAYOUT)
    scale = members.read("scale", kinds="iuf", dimensions=(0,)) if members.has("scale") else 1.0
    image = (real.astype(np.float32) + 1j * imaginary.astype(np.float32)) * np.float32(scale)
    share((1, 1, *image.shape), "<c8")[0, 0] = image
    return {"kind": "image"}


def _plane(members: _Members, name: str) -> NDArray[Any]:
    plane = members.read(name, kinds="iuf", dimensions=(2,))
    check_sizes(*plane.shape)
    return plane


# ------------------------------------------------------------------------------------------------------------- HDF5


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A file of HDF5; DAMAGED if it is none, or whatever goes wrong inside."""
    import h5py

    with unusable(Reason.DAMAGED):
        file = h5py.File(path, "r")
    with file, unusable(Reason.DAMAGED):
        yield file


def _dataset(parent: Any, name: str) -> Any:
    """A data set that lies in this file, in chunks that are read here, and claims no more than its bytes can hold."""
    import h5py

    if not isinstance(parent.get(name, getlink=True), h5py.HardLink):
        raise UnusableError(Reason.LAYOUT)  # a soft or external link, which may lead to any file
    found = parent[name]
    if not isinstance(found, h5py.Dataset) or found.is_virtual or found.external or found.shape is None:
        raise UnusableError(Reason.LAYOUT)
    filters = found.id.get_create_plist()
    if not {filters.get_filter(n)[0] for n in range(filters.get_nfilters())} <= FILTERS:
        raise UnusableError(Reason.NO_DECODER)
    _check_swelling(math.prod(found.shape) * found.dtype.itemsize, found.id.get_storage_size())
    return found


def _group(file: Any) -> Any:
    """ISMRMRD's group; None where there is none in this file."""
    import h5py

    if not isinstance(file.get("dataset", getlink=True), h5py.HardLink):
        return None
    found = file["dataset"]
    return found if isinstance(found, h5py.Group) else None


def check_layout(file: Any, path: Path) -> None:
    """One of the two layouts that are read, of a believable size."""
    with unusable(Reason.LAYOUT):
        if "kspace" in file:
            kspace = _dataset(file, "kspace")
            if kspace.ndim not in (3, 4) or kspace.dtype.kind != "c":
                raise UnusableError(Reason.LAYOUT)
            check_sizes(*kspace.shape[-2:], kspace.shape[0], n_coils=kspace.shape[1] if kspace.ndim == 4 else 1)
            return
        group = _group(file)
        if group is None or not {"data", "xml"} <= set(group):
            raise UnusableError(Reason.LAYOUT)
        lines = _dataset(group, "data")
        if lines.ndim != 1 or not {"head", "data"} <= set(lines.dtype.names or ()):
            raise UnusableError(Reason.LAYOUT)
        if len(lines) * lines.dtype["head"].itemsize > 2 * path.stat().st_size:
            raise UnusableError(Reason.TOO_LARGE)


def _has_mask(file: Any) -> bool:
    """Whether a file of fastMRI has a mask that leaves samples out."""
    if "mask" not in file:
        return False
    mask = _dataset(file, "mask")
    if mask.dtype.kind not in "biuf":
        raise UnusableError(Reason.LAYOUT)
    return not np.asarray(mask).all()


def _of_fastmri(file: Any, share: Share) -> None:
    stored = _dataset(file, "kspace")
    by_slice = np.asarray(stored, np.complex64)
    by_slice = by_slice[:, None] if stored.ndim == 3 else by_slice
    kspace = by_slice.transpose(1, 0, 3, 2)  # (slice, coil, readout, phase) to (coil, z, y, x)
    share(kspace.shape, "<c8")[...] = kspace


def _of_ismrmrd(file: Any, header: Header, path: Path, share: Share) -> None:
    """Cartesian lines, placed where each says it belongs; repetitions and other contrasts than the first are left aside."""
    lines = np.asarray(_dataset(_group(file), "data"))
    heads = lines["head"]
    index = heads["idx"]
    is_noise = (heads["flags"] & (1 << 18)) != 0  # ACQ_IS_NOISE_MEASUREMENT is flag 19, counted from 1
    is_first = np.all([index[key] == 0 for key in ("contrast", "phase", "repetition", "set")], axis=0)
    if index["kspace_encode_step_2"].any() or (heads["trajectory_dimensions"][~is_noise] > 0).any():
        raise UnusableError(Reason.LAYOUT)
    if header.encoded is None or header.centre_line is None:
        raise UnusableError(Reason.LAYOUT)
    n_readout, n_phase = header.encoded
    used = np.flatnonzero(~is_noise & is_first)
    n_slices, n_coils = int(index["slice"][used].max()) + 1, int(heads["active_channels"][used[0]])
    check_sizes(n_readout, n_phase, n_slices, n_coils=n_coils)
    _check_swelling(8 * n_coils * n_slices * n_phase * n_readout, path.stat().st_size)
    kspace = share((n_coils, n_slices, n_phase, n_readout), "<c8")
    kspace[...] = 0
    for i in used:
        samples = np.asarray(lines["data"][i], np.float32).view(np.complex64).reshape(n_coils, -1)
        y = int(index["kspace_encode_step_1"][i]) - header.centre_line + n_phase // 2
        x = n_readout // 2 - int(heads["center_sample"][i])
        kspace[:, int(index["slice"][i]), y, x : x + samples.shape[1]] = samples


def patient_of(file: Any) -> str | None:
    """fastMRI's ``patient_id``."""
    if "patient_id" not in file.attrs:
        return None
    about = file.attrs.get_id("patient_id")
    if about.shape not in ((), (1,)) or about.dtype.itemsize > LONGEST_NAME:
        raise UnusableError(Reason.LAYOUT)
    return _word(file.attrs["patient_id"])[:LONGEST_NAME] or None


def _word(stored: Any) -> str:
    value = np.asarray(stored).reshape(-1)[0]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def xml_of(file: Any) -> ElementTree.Element | None:
    """The ISMRMRD header of either layout; None where there is none. DAMAGED if it is no XML or tries tricks."""
    group = _group(file)
    parent, name = (file, "ismrmrd_header") if "ismrmrd_header" in file else (group, "xml")
    if parent is None or name not in parent:
        return None
    stored = _dataset(parent, name)
    if math.prod(stored.shape) != 1 or stored.dtype.itemsize > LARGEST_HEADER:
        raise UnusableError(Reason.DAMAGED)
    text = _word(stored).encode()
    if len(text) > LARGEST_HEADER or b"<!" in text.replace(b"<!--", b""):
        raise UnusableError(Reason.DAMAGED)
    return ElementTree.fromstring(text)  # noqa: S314 (without declarations nothing in it expands)


def _header(file: Any) -> Header:
    """What the header says; an empty one where there is none."""
    root = xml_of(file)
    if root is None:
        return Header()
    return Header(
        patient=_text(root, "subjectInformation/patientID"),
        scanner=_scanner(root),
        matrix=_whole(root, "encoding/reconSpace/matrixSize"),
        encoded=_whole(root, "encoding/encodedSpace/matrixSize"),
        field_of_view_mm=_millimetres(root),
        centre_line=_number(root, "encoding/encodingLimits/kspace_encoding_step_1/center"),
    )


def _text(root: ElementTree.Element, path: str) -> str | None:
    found = root.find(path, _NAMESPACE)
    return found.text.strip() if found is not None and found.text and found.text.strip() else None


def _number(root: ElementTree.Element, path: str) -> int | None:
    text = _text(root, path)
    return None if text is None else int(text)


def _whole(root: ElementTree.Element, path: str) -> tuple[int, int] | None:
    x, y = _number(root, f"{path}/x"), _number(root, f"{path}/y")
    return None if x is None or y is None or min(x, y) < 1 else (x, y)


def _millimetres(root: ElementTree.Element) -> tuple[float, float, float] | None:
    texts = [_text(root, f"encoding/reconSpace/fieldOfView_mm/{axis}") for axis in "xyz"]
    values = [float(text) for text in texts if text is not None]
    return (values[0], values[1], values[2]) if len(values) == 3 and all(0 < v < math.inf for v in values) else None


def _scanner(root: ElementTree.Element) -> str | None:
    at = "acquisitionSystemInformation"
    names = [_text(root, f"{at}/systemVendor"), _text(root, f"{at}/systemModel")]
    strength = _text(root, f"{at}/systemFieldStrength_T")
    parts = [re.sub(r"\s+", " ", name) for name in names if name]
    return " ".join([*parts, *([f"{float(strength):g} T"] if strength else [])]) or None


def _spacing_mm(header: Header) -> tuple[float, float, float]:
    if header.field_of_view_mm is None or header.matrix is None:
        return (1.0, 1.0, 1.0)
    (x_mm, y_mm, z_mm), (x, y) = header.field_of_view_mm, header.matrix
    return (z_mm, y_mm / y, x_mm / x)
