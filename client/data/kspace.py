"""Read k-space: fastMRI's HDF5, ISMRMRD, and NumPy files of research data; or make it up from magnitude images.

Whatever is read becomes fully sampled coil images ``(coil, z, y, x)`` with y the phase-encoding direction: what a plan
leaves out of their k-space, it leaves out itself. Where a model predicts, k-space may have gaps, and what was measured is
told beside the images. Files are taken apart in a child process (``kspace_files``).

============================  ===========================================================================================
HDF5 with ``kspace``          fastMRI (Zbontar et al. 2018, arXiv:1811.08839): complex ``(slice, [coil,] readout, phase)``;
                              its header says the readout's oversampling and field of view, which are cut off
HDF5 with ``dataset/data``    ISMRMRD (Inati et al. 2017, doi:10.1002/mrm.26089): Cartesian lines in two dimensions
.npz with ``kspace``          complex ``([coil,] phase, readout)``, its centre in the middle
.npz with ``re`` and ``im``   a complex image ``(y, x)``, with an optional factor ``scale``
.npz with ``magnitude``       a magnitude image ``(y, x)``
============================  ===========================================================================================

A patient is fastMRI's ``patient_id``, ISMRMRD's patientID, the subject that ``index.csv`` names, or a file of its own. A
scanner is the one that the header names, or ``index.csv`` where it names none.
**Simulated** is what comes from magnitude images (these and any DICOM or NIfTI series): a smooth phase and a ring of
coils are made up, the same whenever the same image is read. They are used where the plan says ``simulated = true``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from client.data import reader
from client.data.images import Index
from client.data.keys import key_of
from client.data.kspace_files import MAGNITUDE, MEASURED, NUMPY, check_sizes
from client.data.records import Facts, Kind, Role, Series
from client.data.skips import Reason, UnusableError, unusable
from shared_models.mri import ring_of_coils, smooth_phase

__all__ = ["ENDINGS", "MAGNITUDE", "MEASURED", "Coils", "inspect", "is_simulated", "read", "simulated"]

ENDINGS = (NUMPY, ".h5", ".hdf5")

LARGEST_GAP = 0.01
"""Share of empty samples inside the measured part of k-space that still counts as fully sampled."""


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
    said = reader.ask("k-space header", path).facts
    with unusable(Reason.DAMAGED):
        subject = said["patient"] or index.subjects.get(relative.stem)
        place = str(relative.parent / relative.stem)
        key = key_of(secret, f"kspace:{relative}")
        return Facts(
            patient=key_of(secret, str(subject or place)),
            study=key,
            series=key,
            instance=key,
            name={MAGNITUDE: MAGNITUDE, MEASURED: MEASURED}[said["name"]],
            kind=Kind.KSPACE,
            role=Role.IMAGE,
            modality="MR",
            scanner=str(said["scanner"]) if said["scanner"] else index.scanners.get(relative.stem),
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
    coils = _coils(path, n_coils)
    if coils.measured is not None and not with_gaps:
        raise UnusableError(Reason.UNDERSAMPLED)
    if not np.isfinite(coils.images).all():
        raise UnusableError(Reason.NOT_FINITE)
    have = len(coils.images)
    if have < n_coils or (n_coils == 1 and have > 1):
        raise UnusableError(Reason.COILS)
    return coils if have == n_coils else replace(coils, images=_compressed(coils.images, n_coils))


def _coils(path: Path, n_coils: int) -> Coils:
    reply = reader.ask("k-space", path)
    with unusable(Reason.PIXELS):
        (values,) = reply.arrays
        z_mm, y_mm, x_mm = (float(mm) for mm in reply.facts["spacing_mm"])
        spacing_mm = (z_mm, y_mm, x_mm)
        if reply.facts["kind"] == "magnitude":
            check_sizes(*values.shape)
            return Coils(simulated(values.astype(np.float32)[None], n_coils), spacing_mm)
        check_sizes(*values.shape[1:], n_coils=len(values))
        values = values.astype(np.complex64, copy=False)
        if reply.facts["kind"] == "image":
            return Coils(values, spacing_mm)
        matrix, measured = reply.facts["matrix"], _measured(values)
        if measured is None and reply.facts["has_mask"]:
            raise UnusableError(Reason.UNDERSAMPLED)  # by a mask that its samples do not show
        images = _middle_of(_images(values), None if matrix is None else int(matrix[0]))
        return Coils(images, spacing_mm, _lines_of(measured, images.shape[-1]))


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


def _middle_of(images: NDArray[np.complex64], n_readout: int | None) -> NDArray[np.complex64]:
    """The part of the readout that the reconstructed matrix keeps: scanners sample twice of it."""
    n = images.shape[-1]
    kept = n if n_readout is None else min(n, n_readout)
    first = (n - kept) // 2
    return images[..., first : first + kept]
