"""Read k-space: fastMRI's HDF5, ISMRMRD, and NumPy files of research data; or make it up from magnitude images.

Whatever is read becomes fully sampled coil images ``(coil, z, y, x)`` with y the phase-encoding direction: what a plan
leaves out of their k-space, it leaves out itself. Where a model predicts, k-space may have gaps, and what was measured is
told beside the images.

============================  ===========================================================================================
HDF5 with ``kspace``          fastMRI (Zbontar et al. 2018, arXiv:1811.08839): complex ``(slice, [coil,] readout, phase)``;
                              its header says the readout's oversampling and field of view, which are cut off
HDF5 with ``dataset/data``    ISMRMRD (Inati et al. 2017, doi:10.1002/mrm.26089): Cartesian lines in two dimensions
.npz with ``kspace``          complex ``([coil,] phase, readout)``, its centre in the middle
.npz with ``re`` and ``im``   a complex image ``(y, x)``, with an optional factor ``scale``
.npz with ``magnitude``       a magnitude image ``(y, x)``
============================  ===========================================================================================

A patient is fastMRI's ``patient_id``, ISMRMRD's patientID, the subject that ``index.csv`` names, or a file of its own.
**Simulated** is what comes from magnitude images (these and any DICOM or NIfTI series): a smooth phase and a ring of
coils are made up, the same whenever the same image is read. They are used where the plan says ``simulated = true``.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from client.data.images import Index
from client.data.keys import key_of
from client.data.records import Facts, Kind, Role, Series
from client.data.scan import MAX_SIDE
from client.data.skips import Reason, UnusableError, unusable
from shared_models.mri import ring_of_coils, smooth_phase

ENDINGS = (".npz", ".h5", ".hdf5")

MEASURED, MAGNITUDE = "image", "magnitude"
"""Names of a series whose k-space was measured, and of one that has a magnitude alone."""

MAX_COILS = 256
"""Largest believable number of coils."""

LARGEST_GAP = 0.01
"""Share of empty samples inside the measured part of k-space that still counts as fully sampled."""

LARGEST_HEADER = 1 << 20
"""Longer XML headers are not read [bytes]."""

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


@dataclass(frozen=True)
class Coils:
    """Fully sampled images of one study."""

    images: NDArray[np.complex64]
    """``(coil, z, y, x)``, in the source's units."""

    spacing_mm: tuple[float, float, float]
    """Distance between voxel centres along (z, y, x) [mm]; 1.0 where the source does not say."""

    measured: NDArray[np.bool_] | None = None
    """Which samples of centred k-space were measured, ``(z, y, x)``; None where all were. Images are then zero-filled."""


def is_simulated(series: Series) -> bool:
    """Whether the k-space of a series would be made up from magnitudes."""
    return series.kind is not Kind.KSPACE or series.name == MAGNITUDE


def inspect(path: Path, relative: PurePosixPath, secret: bytes, index: Index) -> Facts:
    """What a file of k-space is, from its header.

    Raises
    ------
    UnusableError
        If it cannot be opened, holds no k-space, or holds it in a layout that is not read.
    """
    name, header = MEASURED, Header()
    if relative.suffix.lower() == ".npz":
        with unusable(Reason.DAMAGED), np.load(path, allow_pickle=False) as arrays:
            kinds = set(arrays.files)
        if MAGNITUDE in kinds:
            name = MAGNITUDE
        elif not ({"re", "im"} <= kinds or "kspace" in kinds):
            raise UnusableError(Reason.NOT_AN_IMAGE)
    else:
        with _opened(path) as file:
            _check_layout(file)
            header = _header(file)
            patient = file.attrs.get("patient_id")
        if patient is not None:
            header = Header(str(patient), header.scanner)
    subject = header.patient or index.subjects.get(relative.stem)
    place = str(relative.parent / relative.stem)
    key = key_of(secret, f"kspace:{relative}")
    return Facts(
        patient=key_of(secret, subject or place),
        study=key,
        series=key,
        instance=key,
        name=name,
        kind=Kind.KSPACE,
        role=Role.IMAGE,
        modality="MR",
        scanner=header.scanner,
        split=index.splits.get(relative.stem),
    )


def read(path: Path, n_coils: int, *, with_gaps: bool = False) -> Coils:
    """Fully sampled coil images of a file, of the plan's number of coils; ``with_gaps``, also what is not fully sampled.

    More coils are compressed to the virtual ones with the most signal (Buehrer et al. 2007, doi:10.1002/mrm.21237); several
    are not compressed to one, which could not show what a single coil sees.

    Raises
    ------
    UnusableError
        If it cannot be decoded, is not fully sampled, or has too few coils.
    """
    if path.suffix.lower() == ".npz":
        coils = _read_numpy(path, n_coils)
    else:
        with _opened(path) as file, unusable(Reason.PIXELS):
            coils = _read_fastmri(file) if "kspace" in file else _read_ismrmrd(file)
    if coils.measured is not None and not with_gaps:
        raise UnusableError(Reason.UNDERSAMPLED)
    if not np.isfinite(coils.images).all():
        raise UnusableError(Reason.NOT_FINITE)
    have = len(coils.images)
    if have < n_coils or (n_coils == 1 and have > 1):
        raise UnusableError(Reason.COILS)
    return coils if have == n_coils else replace(coils, images=_compressed(coils.images, n_coils))


def simulated(magnitude: NDArray[np.float32], n_coils: int) -> NDArray[np.complex64]:
    """Coil images ``(coil, z, y, x)`` of magnitudes ``(z, y, x)``: each slice with a phase of its own, all with one ring.

    What is made up depends on the magnitudes alone.
    """
    content = hashlib.sha256(np.ascontiguousarray(magnitude, np.float32).tobytes()).digest()
    rng = np.random.default_rng(int.from_bytes(content[:16], "big"))
    shape = (magnitude.shape[1], magnitude.shape[2])
    coils = ring_of_coils(n_coils, shape, rng)
    phased = np.stack([plane * np.exp(1j * smooth_phase(shape, rng)) for plane in magnitude])
    return np.asarray(coils[:, None] * phased, np.complex64)


def _compressed(images: NDArray[np.complex64], n_coils: int) -> NDArray[np.complex64]:
    flat = images.reshape(len(images), -1)
    _, vectors = np.linalg.eigh(flat @ flat.conj().T)
    strongest = vectors[:, ::-1][:, :n_coils]
    return np.asarray((strongest.conj().T @ flat).reshape(n_coils, *images.shape[1:]), np.complex64)


# ------------------------------------------------------------------------------------------------------------- NumPy


def _read_numpy(path: Path, n_coils: int) -> Coils:
    with unusable(Reason.PIXELS), np.load(path, allow_pickle=False) as arrays:
        found = {name: np.asarray(arrays[name]) for name in arrays.files}
    if MAGNITUDE in found:
        plane = _plane(found[MAGNITUDE]).astype(np.float32)
        return Coils(simulated(plane[None], n_coils), (1.0, 1.0, 1.0))
    if "kspace" in found:
        kspace = found["kspace"]
        kspace = kspace[None] if kspace.ndim == 2 else kspace
        if kspace.ndim != 3 or not np.iscomplexobj(kspace):
            raise UnusableError(Reason.LAYOUT)
        _check_sizes(*kspace.shape[1:], n_coils=len(kspace))
        return Coils(_images(kspace[:, None]), (1.0, 1.0, 1.0), _measured(kspace[:, None]))
    real, imaginary = _plane(found["re"]), _plane(found["im"])
    if real.shape != imaginary.shape:
        raise UnusableError(Reason.LAYOUT)
    scale = np.float32(found.get("scale", np.float32(1.0)))
    image = (real.astype(np.float32) + 1j * imaginary.astype(np.float32)) * scale
    return Coils(np.asarray(image, np.complex64)[None, None], (1.0, 1.0, 1.0))


def _plane(values: NDArray[Any]) -> NDArray[Any]:
    if values.ndim != 2 or values.dtype.kind not in "iuf":
        raise UnusableError(Reason.LAYOUT)
    _check_sizes(*values.shape)
    return values


# ------------------------------------------------------------------------------------------------------------- HDF5


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    import h5py

    with unusable(Reason.DAMAGED):
        file = h5py.File(path, "r")
    with file:
        yield file


def _check_layout(file: Any) -> None:
    """One of the two layouts that are read, of a believable size."""
    with unusable(Reason.LAYOUT):
        if "kspace" in file:
            kspace = file["kspace"]
            if kspace.ndim not in (3, 4) or kspace.dtype.kind != "c":
                raise UnusableError(Reason.LAYOUT)
            _check_sizes(*kspace.shape[-2:], kspace.shape[0], n_coils=kspace.shape[1] if kspace.ndim == 4 else 1)
        elif "dataset" not in file or not {"data", "xml"} <= set(file["dataset"]):
            raise UnusableError(Reason.LAYOUT)


def _read_fastmri(file: Any) -> Coils:
    _check_layout(file)
    stored = np.asarray(file["kspace"], np.complex64)
    stored = stored[:, None] if stored.ndim == 3 else stored
    header = _header(file)
    kspace = stored.transpose(1, 0, 3, 2)  # (slice, coil, readout, phase) to (coil, z, y, x)
    images = _middle_of(_images(kspace), header.matrix)
    measured = _measured(kspace)
    if measured is None and "mask" in file and not np.asarray(file["mask"]).all():
        raise UnusableError(Reason.UNDERSAMPLED)
    return Coils(images, _spacing_mm(header), _lines_of(measured, images.shape[-1]))


def _read_ismrmrd(file: Any) -> Coils:
    """Cartesian lines, placed where each says it belongs; repetitions and other contrasts than the first are left aside."""
    header = _header(file)
    lines = np.asarray(file["dataset"]["data"])
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
    _check_sizes(n_readout, n_phase, n_slices, n_coils=n_coils)
    kspace = np.zeros((n_coils, n_slices, n_phase, n_readout), np.complex64)
    for i in used:
        samples = np.asarray(lines["data"][i], np.float32).view(np.complex64).reshape(n_coils, -1)
        y = int(index["kspace_encode_step_1"][i]) - header.centre_line + n_phase // 2
        x = n_readout // 2 - int(heads["center_sample"][i])
        kspace[:, int(index["slice"][i]), y, x : x + samples.shape[1]] = samples
    images = _middle_of(_images(kspace), header.matrix)
    return Coils(images, _spacing_mm(header), _lines_of(_measured(kspace), images.shape[-1]))


def _header(file: Any) -> Header:
    """The ISMRMRD header of either layout; empty where there is none. DAMAGED if it is no XML or tries tricks."""
    stored = file.get("ismrmrd_header")
    if stored is None and "dataset" in file:
        stored = file["dataset"].get("xml")
    if stored is None:
        return Header()
    with unusable(Reason.DAMAGED):
        value = np.asarray(stored).reshape(-1)[0]
        text = value if isinstance(value, bytes) else str(value).encode()
        if len(text) > LARGEST_HEADER or b"<!" in text.replace(b"<!--", b""):
            raise UnusableError(Reason.DAMAGED)
        root = ElementTree.fromstring(text)  # noqa: S314 (without declarations nothing in it expands)
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
    return None if x is None or y is None else (x, y)


def _millimetres(root: ElementTree.Element) -> tuple[float, float, float] | None:
    texts = [_text(root, f"encoding/reconSpace/fieldOfView_mm/{axis}") for axis in "xyz"]
    values = [float(text) for text in texts if text is not None]
    return (values[0], values[1], values[2]) if len(values) == 3 and min(values) > 0 else None


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


# ------------------------------------------------------------------------------------------------- what all must keep


def _images(kspace: NDArray[np.complex64]) -> NDArray[np.complex64]:
    """Coil images of centred k-space ``(coil, z, y, x)``."""
    axes = (-2, -1)
    centred = np.fft.ifft2(np.fft.ifftshift(kspace, axes=axes), axes=axes, norm="ortho")
    return np.asarray(np.fft.fftshift(centred, axes=axes), np.complex64)


def _measured(kspace: NDArray[np.complex64]) -> NDArray[np.bool_] | None:
    """Which samples of ``(coil, z, y, x)`` were measured, ``(z, y, x)``; None where each slice has all within its borders.

    UnusableError if a slice has none.
    """
    is_measured = np.abs(kspace).sum(axis=0) > 0
    is_whole = True
    for plane in is_measured:
        where = np.argwhere(plane)
        if not len(where):
            raise UnusableError(Reason.UNDERSAMPLED)
        (top, left), (bottom, right) = where.min(axis=0), where.max(axis=0) + 1
        is_whole &= plane[top:bottom, left:right].mean() >= 1 - LARGEST_GAP
    return None if is_whole else np.asarray(is_measured, np.bool_)


def _lines_of(measured: NDArray[np.bool_] | None, n_readout: int) -> NDArray[np.bool_] | None:
    """The same for images whose readout was cut: lines along it, each measured where most of it was."""
    if measured is None or measured.shape[-1] == n_readout:
        return measured
    return np.repeat(measured.mean(axis=-1, keepdims=True) > 0.5, n_readout, axis=-1)


def _middle_of(images: NDArray[np.complex64], matrix: tuple[int, int] | None) -> NDArray[np.complex64]:
    """The part of the readout that the reconstructed matrix (readout, phase) keeps: scanners sample twice of it."""
    n = images.shape[-1]
    kept = n if matrix is None else min(n, matrix[0])
    first = (n - kept) // 2
    return images[..., first : first + kept]


def _check_sizes(*sides: int, n_coils: int = 1) -> None:
    if max(sides) > MAX_SIDE or min(sides) < 1 or not 1 <= n_coils <= MAX_COILS or math.prod(sides) * n_coils > 2**31:
        raise UnusableError(Reason.TOO_LARGE)
