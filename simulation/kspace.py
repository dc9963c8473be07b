"""Emulated k-space: what the receivers of an emulated scanner would have stored, before anybody makes an image of it.

One file for each study in fastMRI's layout (HDF5: ``kspace`` as complex64 ``(slice, coil, readout, phase)``, an ISMRMRD
header, ``patient_id``), which goes through the same reader as a hospital's::

    site-1/EMU-0-1-001/study-1.h5

The signal is that of the emulated scanner, without its magnitude and gamma: tissues in that sequence's contrast, shading
and blur, a slowly varying phase for each slice, a ring of coils, and complex Gaussian noise in each coil. The readout is
sampled twice as densely as needed, as scanners do.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from shared_models.mri import ring_of_coils, smooth_phase
from simulation.scanners import Scanner, contrast, shading

OVERSAMPLING = 2
"""Readout samples over pixels of the image [ratio]."""

NOISE_SHARE = 0.25
"""Of a scanner's noise that its k-space has: what is reconstructed from had better be good [ratio]."""

_HEADER = """<?xml version="1.0" encoding="utf-8"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
 <subjectInformation><patientID>{patient}</patientID></subjectInformation>
 <acquisitionSystemInformation><systemVendor>{vendor}</systemVendor><systemModel>{model}</systemModel>
  <systemFieldStrength_T>{field}</systemFieldStrength_T><receiverChannels>{coils}</receiverChannels>
 </acquisitionSystemInformation>
 <experimentalConditions><H1resonanceFrequency_Hz>{frequency}</H1resonanceFrequency_Hz></experimentalConditions>
 <encoding>
  <encodedSpace><matrixSize><x>{encoded}</x><y>{y}</y><z>1</z></matrixSize>
   <fieldOfView_mm><x>{encoded_mm}</x><y>{y_mm}</y><z>{z_mm}</z></fieldOfView_mm></encodedSpace>
  <reconSpace><matrixSize><x>{x}</x><y>{y}</y><z>1</z></matrixSize>
   <fieldOfView_mm><x>{x_mm}</x><y>{y_mm}</y><z>{z_mm}</z></fieldOfView_mm></reconSpace>
  <encodingLimits><kspace_encoding_step_1><minimum>0</minimum><maximum>{last}</maximum><center>{centre}</center>
   </kspace_encoding_step_1></encodingLimits>
  <trajectory>cartesian</trajectory>
 </encoding>
</ismrmrdHeader>"""

PROTON_HZ_PER_T = 42_577_478


def coil_images(
    scanner: Scanner,
    tissues: NDArray[np.float32],
    spacing_mm: tuple[float, float, float],
    n_coils: int,
    random: np.random.Generator,
) -> NDArray[np.complex64]:
    """What each coil receives of a patient.

    Parameters
    ----------
    scanner
        The device; its gamma is left out, since receivers are linear.
    tissues
        Share of each tissue in a voxel, ``(tissue, z, y, x)``.
    spacing_mm
        Distance between voxel centres along (z, y, x) [mm].
    n_coils
        Receivers, 1 or more.
    random
        Where contrast, shading, phase, coils and noise come from.

    Returns
    -------
    NDArray
        Complex64 ``(coil, z, y, x)`` [1 = full scale].
    """
    shape = (tissues.shape[2], tissues.shape[3])
    in_plane = [0.0, *(scanner.point_spread_mm / step for step in spacing_mm[1:])]
    signal = shading(tissues.shape[1:], scanner.bias_amplitude, random) * contrast(
        replace(scanner, gamma=1.0), tissues, random
    )
    signal = ndimage.gaussian_filter(signal, in_plane)
    phased = np.stack([plane * np.exp(1j * smooth_phase(shape, random)) for plane in signal])
    images = ring_of_coils(n_coils, shape, random)[:, None] * phased
    real, imaginary = random.standard_normal((2, *images.shape)) * (NOISE_SHARE * scanner.noise)
    return np.asarray(images + real + 1j * imaginary, np.complex64)


def write_study(
    path: Path,
    images: NDArray[np.complex64],
    spacing_mm: tuple[float, float, float],
    scanner: Scanner,
    patient_id: str,
) -> None:
    """Write coil images ``(coil, z, y, x)`` as a file of k-space in fastMRI's layout, the same bytes every time."""
    import h5py

    n_coils, _, n_phase, n_readout = images.shape
    wide = np.zeros((*images.shape[:3], OVERSAMPLING * n_readout), np.complex64)
    first = (wide.shape[3] - n_readout) // 2
    wide[..., first : first + n_readout] = images
    axes = (-2, -1)
    kspace = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(wide, axes=axes), axes=axes, norm="ortho"), axes=axes)
    header = _HEADER.format(
        patient=escape(patient_id), vendor=escape(scanner.manufacturer), model=escape(scanner.model),
        field=scanner.field_strength_t, coils=n_coils, frequency=round(scanner.field_strength_t * PROTON_HZ_PER_T),
        encoded=wide.shape[3], x=n_readout, y=n_phase, last=n_phase - 1, centre=n_phase // 2,
        encoded_mm=wide.shape[3] * spacing_mm[2], x_mm=n_readout * spacing_mm[2], y_mm=n_phase * spacing_mm[1],
        z_mm=spacing_mm[0],
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w", track_order=True) as file:
        stored = kspace.transpose(1, 0, 3, 2).astype(np.complex64)
        file.create_dataset("kspace", data=stored if n_coils > 1 else stored[:, 0], track_times=False)
        file.create_dataset("ismrmrd_header", data=np.bytes_(header.encode()), track_times=False)
        file.attrs["patient_id"] = patient_id
        file.attrs["acquisition"] = scanner.series_description
