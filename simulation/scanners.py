"""How a scanner shows a patient: contrast, shading, blur and noise, and what it writes into the DICOM header.

Scanner = manufacturer, model and field strength; each of these also stands for one sequence, so that hospitals differ the
way they do in practice. The values imitate common protocols and are nobody's measurements. They were tuned on seeds from
100 up and are frozen: :func:`scanners_sha256` names the set that made a result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


@dataclass(frozen=True, kw_only=True)
class Intensities:
    """Signal of each tissue before gamma, shading and noise, in the order of a patient's tissue axis [1 = full scale]."""

    scalp: float
    bone: float
    csf: float
    grey_matter: float
    white_matter: float
    lesion: float


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """One device with one sequence."""

    manufacturer: str
    """DICOM Manufacturer, as that company's devices spell it."""

    model: str
    """DICOM Manufacturer's Model Name; invented."""

    field_strength_t: float
    """Magnetic field strength [T]."""

    sequence_name: str
    """DICOM Sequence Name, at most 16 characters."""

    series_description: str
    """DICOM Series Description."""

    scanning_sequence: tuple[str, ...]
    """DICOM Scanning Sequence: "SE" spin echo, "GR" gradient echo, "IR" inversion recovery."""

    echo_time_s: float
    """Echo time [s]."""

    repetition_time_s: float
    """Repetition time [s]."""

    inversion_time_s: float | None
    """Inversion time [s]; None without an inversion pulse."""

    contrast_agent: str | None
    """DICOM Contrast/Bolus Agent; None without one."""

    intensities: Intensities
    """Tissue contrast of the sequence."""

    variation: float
    """Standard deviation of each tissue's signal between acquisitions, as a natural logarithm [ratio]."""

    gamma: float
    """Exponent of the receiver's response to the signal [ratio]; 1 is linear."""

    bias_amplitude: float
    """Largest shading by the coil, as a natural logarithm [ratio]: 0.2 is within a factor of 1.22 up and down."""

    point_spread_mm: float
    """Standard deviation of the Gaussian blur within a slice [mm]."""

    noise: float
    """Standard deviation of the noise in each of the two channels (real, imaginary) [1 = full scale]."""

    gain: float
    """Stored pixel value of full scale [pixel value]; files hold 12 bits."""

    kspace_share: float = field(default=1.0, repr=False)
    """Share of the spatial frequencies along x and y that is measured; the rest is filled with zeros."""


SCANNERS: dict[str, Scanner] = {
    "siemens-t1gd-3t": Scanner(
        manufacturer="SIEMENS",
        model="MAGNETOM Aldera",
        field_strength_t=3.0,
        sequence_name="*tfl3d1_16",
        series_description="t1_mprage_tra_gd",
        scanning_sequence=("GR", "IR"),
        echo_time_s=0.00298,
        repetition_time_s=2.3,
        inversion_time_s=0.9,
        contrast_agent="Gadobutrol",
        intensities=Intensities(scalp=0.90, bone=0.10, csf=0.08, grey_matter=0.44, white_matter=0.60, lesion=0.95),
        variation=0.18,
        gamma=1.0,
        bias_amplitude=0.20,
        point_spread_mm=0.8,
        noise=0.038,
        gain=900.0,
    ),
    "ge-t2-1.5t": Scanner(
        manufacturer="GE MEDICAL SYSTEMS",
        model="SIGNA Vesper",
        field_strength_t=1.5,
        sequence_name="FSE-XL",
        series_description="Ax T2 FSE",
        scanning_sequence=("SE",),
        echo_time_s=0.102,
        repetition_time_s=4.5,
        inversion_time_s=None,
        contrast_agent=None,
        intensities=Intensities(scalp=0.52, bone=0.06, csf=0.85, grey_matter=0.46, white_matter=0.32, lesion=0.92),
        variation=0.18,
        gamma=0.9,
        bias_amplitude=0.12,
        point_spread_mm=1.0,
        noise=0.045,
        gain=2600.0,
    ),
    "philips-flair-3t": Scanner(
        manufacturer="Philips Medical Systems",
        model="Lumina 3.0T",
        field_strength_t=3.0,
        sequence_name="TIR",
        series_description="FLAIR tra",
        scanning_sequence=("SE", "IR"),
        echo_time_s=0.125,
        repetition_time_s=11.0,
        inversion_time_s=2.8,
        contrast_agent=None,
        intensities=Intensities(scalp=0.54, bone=0.08, csf=0.10, grey_matter=0.58, white_matter=0.46, lesion=0.83),
        variation=0.18,
        gamma=1.3,
        bias_amplitude=0.28,
        point_spread_mm=0.9,
        noise=0.045,
        gain=1500.0,
    ),
    "canon-pd-1.5t": Scanner(
        manufacturer="Canon Medical Systems",
        model="Vantage Hibari",
        field_strength_t=1.5,
        sequence_name="FSE2D",
        series_description="PD AX",
        scanning_sequence=("SE",),
        echo_time_s=0.018,
        repetition_time_s=2.8,
        inversion_time_s=None,
        contrast_agent=None,
        intensities=Intensities(scalp=0.65, bone=0.12, csf=0.40, grey_matter=0.74, white_matter=0.58, lesion=1.00),
        variation=0.18,
        gamma=0.9,
        bias_amplitude=0.15,
        point_spread_mm=1.1,
        noise=0.038,
        gain=2400.0,
    ),
}
"""The emulated scanners that hospitals get unless a plan names others."""

LABORATORY: dict[str, Scanner] = {
    "siemens-flair-1.5t": Scanner(
        manufacturer="Siemens Healthineers",
        model="MAGNETOM Brisa",
        field_strength_t=1.5,
        sequence_name="*tir2d1_16",
        series_description="t2_flair_tra",
        scanning_sequence=("SE", "IR"),
        echo_time_s=0.111,
        repetition_time_s=9.0,
        inversion_time_s=2.5,
        contrast_agent=None,
        intensities=Intensities(scalp=0.50, bone=0.08, csf=0.14, grey_matter=0.60, white_matter=0.48, lesion=0.86),
        variation=0.18,
        gamma=1.1,
        bias_amplitude=0.18,
        point_spread_mm=1.0,
        noise=0.05,
        gain=1100.0,
    ),
    "ge-t1gd-3t": Scanner(
        manufacturer="GE HEALTHCARE",
        model="SIGNA Meridian",
        field_strength_t=3.0,
        sequence_name="BRAVO",
        series_description="Ax BRAVO +C",
        scanning_sequence=("GR", "IR"),
        echo_time_s=0.0032,
        repetition_time_s=0.0082,
        inversion_time_s=0.45,
        contrast_agent="Gadoterate",
        intensities=Intensities(scalp=0.95, bone=0.08, csf=0.10, grey_matter=0.48, white_matter=0.66, lesion=0.92),
        variation=0.18,
        gamma=1.15,
        bias_amplitude=0.24,
        point_spread_mm=0.8,
        noise=0.04,
        gain=2300.0,
    ),
    "philips-t2-3t": Scanner(
        manufacturer="Philips Medical Systems",
        model="Lumina 3.0T",
        field_strength_t=3.0,
        sequence_name="TSE",
        series_description="T2W_TSE_TRA",
        scanning_sequence=("SE",),
        echo_time_s=0.08,
        repetition_time_s=3.0,
        inversion_time_s=None,
        contrast_agent=None,
        intensities=Intensities(scalp=0.58, bone=0.06, csf=0.80, grey_matter=0.50, white_matter=0.36, lesion=0.90),
        variation=0.18,
        gamma=1.05,
        bias_amplitude=0.26,
        point_spread_mm=0.9,
        noise=0.042,
        gain=1500.0,
    ),
    "united-pd-3t": Scanner(
        manufacturer="UIH",
        model="uMR Linden",
        field_strength_t=3.0,
        sequence_name="fse2d",
        series_description="pd_fse_tra",
        scanning_sequence=("SE",),
        echo_time_s=0.02,
        repetition_time_s=2.6,
        inversion_time_s=None,
        contrast_agent=None,
        intensities=Intensities(scalp=0.70, bone=0.10, csf=0.50, grey_matter=0.70, white_matter=0.54, lesion=0.96),
        variation=0.18,
        gamma=1.1,
        bias_amplitude=0.3,
        point_spread_mm=0.9,
        noise=0.04,
        gain=2000.0,
    ),
    "fujifilm-flair-0.4t": Scanner(
        manufacturer="Hitachi Medical Corporation",
        model="AIRIS Koharu",
        field_strength_t=0.4,
        sequence_name="FSE-IR",
        series_description="FLAIR AX",
        scanning_sequence=("SE", "IR"),
        echo_time_s=0.09,
        repetition_time_s=8.0,
        inversion_time_s=1.9,
        contrast_agent=None,
        intensities=Intensities(scalp=0.95, bone=0.22, csf=0.30, grey_matter=0.62, white_matter=0.54, lesion=0.88),
        variation=0.18,
        gamma=2.0,
        bias_amplitude=0.55,
        point_spread_mm=2.2,
        noise=0.07,
        gain=1800.0,
        kspace_share=0.6,
    ),
    "agfa-t2-0.2t": Scanner(
        manufacturer="AGFA",
        model="Openview",
        field_strength_t=0.2,
        sequence_name="SE2D",
        series_description="T2 SE",
        scanning_sequence=("SE",),
        echo_time_s=0.1,
        repetition_time_s=3.0,
        inversion_time_s=None,
        contrast_agent=None,
        intensities=Intensities(scalp=0.85, bone=0.25, csf=0.78, grey_matter=0.55, white_matter=0.45, lesion=0.88),
        variation=0.18,
        gamma=0.55,
        bias_amplitude=0.6,
        point_spread_mm=2.0,
        noise=0.09,
        gain=2400.0,
        kspace_share=0.55,
    ),
    "ge-t1-1.5t": Scanner(
        manufacturer="GE MEDICAL SYSTEMS",
        model="SIGNA Vesper",
        field_strength_t=1.5,
        sequence_name="SE",
        series_description="Ax T1 SE",
        scanning_sequence=("SE",),
        echo_time_s=0.012,
        repetition_time_s=0.55,
        inversion_time_s=None,
        contrast_agent=None,
        intensities=Intensities(scalp=0.90, bone=0.10, csf=0.16, grey_matter=0.50, white_matter=0.70, lesion=0.30),
        variation=0.18,
        gamma=1.0,
        bias_amplitude=0.2,
        point_spread_mm=1.0,
        noise=0.045,
        gain=2500.0,
    ),
    "siemens-t2star-1.5t": Scanner(
        manufacturer="SIEMENS",
        model="MAGNETOM Brisa",
        field_strength_t=1.5,
        sequence_name="*fl2d1",
        series_description="t2_fl2d_tra_hemo",
        scanning_sequence=("GR",),
        echo_time_s=0.025,
        repetition_time_s=0.8,
        inversion_time_s=None,
        contrast_agent=None,
        intensities=Intensities(scalp=0.55, bone=0.05, csf=0.62, grey_matter=0.58, white_matter=0.50, lesion=0.15),
        variation=0.18,
        gamma=1.1,
        bias_amplitude=0.3,
        point_spread_mm=0.8,
        noise=0.045,
        gain=1200.0,
    ),
}
"""Further scanners for experiments. The first four lie near those of :data:`SCANNERS`, the next two far outside (blurred,
shaded, noisy, another response), and the last two show other sequences, in which lesions are dark: T1 without a contrast
agent, and a gradient echo on which blood is."""

ALL_SCANNERS = SCANNERS | LABORATORY
"""Every emulated scanner by the name that a plan uses."""


SEQUENCE = (
    *("sequence_name", "series_description", "scanning_sequence", "contrast_agent", "intensities"),
    *("echo_time_s", "repetition_time_s", "inversion_time_s"),
)
"""What belongs to the sequence of a :class:`Scanner`, and not to its device."""


def with_sequence(scanner: Scanner, other: Scanner) -> Scanner:
    """A device with the sequence of another."""
    return replace(scanner, **{key: getattr(other, key) for key in SEQUENCE})


def scanners_sha256(named: Iterable[str] = ()) -> str:
    """SHA-256 of every value in :data:`SCANNERS`, and in those of the laboratory that are ``named``: 64 hex digits."""
    chosen = SCANNERS | {name: LABORATORY[name] for name in sorted(set(named) & LABORATORY.keys())}
    values = {name: asdict(scanner) for name, scanner in chosen.items()}
    for of_one in values.values():
        if of_one["kspace_share"] == 1.0:  # a value that came later leaves no trace where it changes nothing
            del of_one["kspace_share"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def acquire(
    scanner: Scanner,
    tissues: NDArray[np.float32],
    spacing_mm: tuple[float, float, float],
    random: np.random.Generator,
) -> NDArray[np.float32]:
    """Magnitude image of a patient.

    Parameters
    ----------
    scanner
        The device.
    tissues
        Share of each tissue in a voxel [0 to 1], ``(tissue, z, y, x)`` in the order of
        :data:`~simulation.patients.TISSUES_WITH_LESION`.
    spacing_mm
        Distance between voxel centres along (z, y, x) [mm].
    random
        Where small differences between acquisitions, the coil's shading and the noise come from.

    Returns
    -------
    NDArray
        Signal [1 = full scale], zero or above, float32, ``(z, y, x)``.
    """
    in_plane = [0.0, *(scanner.point_spread_mm / step for step in spacing_mm[1:])]
    signal = shading(tissues.shape[1:], scanner.bias_amplitude, random) * contrast(scanner, tissues, random)
    blurred = ndimage.gaussian_filter(signal, in_plane)
    if scanner.kspace_share < 1:
        blurred = low_frequencies(blurred, scanner.kspace_share)
    return add_rician_noise(blurred, scanner.noise, random)


def low_frequencies(signal: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    """The magnitude of what the inner ``share`` of the frequencies along y and x shows, ``(z, y, x)``."""
    spectrum = np.fft.fft2(signal)
    for axis in (1, 2):
        outer = np.abs(np.fft.fftfreq(signal.shape[axis])) > share / 2
        spectrum.swapaxes(axis, -1)[..., outer] = 0
    return np.abs(np.fft.ifft2(spectrum)).astype(np.float32)


def contrast(
    scanner: Scanner, tissues: NDArray[np.float32], random: np.random.Generator | None = None
) -> NDArray[np.float32]:
    """Noise-free, evenly lit signal ``(z, y, x)`` [1 = full scale]; the scanner's mean contrast if ``random`` is None."""
    intensities = np.array(astuple(scanner.intensities))
    if random is not None:
        intensities *= np.exp(random.normal(0, scanner.variation, size=len(intensities)))
    signal = sum(np.float32(value) * tissue for value, tissue in zip(intensities, tissues, strict=True))
    received: NDArray[np.float32] = np.power(signal, np.float32(scanner.gamma))
    return received


def shading(shape: tuple[int, ...], amplitude: float, random: np.random.Generator) -> NDArray[np.float32]:
    """Smooth multiplicative field ``(z, y, x)`` between exp(-amplitude) and exp(amplitude): a quadratic in each axis."""
    axes = [np.linspace(-1, 1, n, dtype=np.float32) for n in shape]
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    terms = [z, y, x, x * y, 2 * y**2 - 1, 2 * x**2 - 1]
    weights = random.normal(size=len(terms))
    weights /= np.abs(weights).sum()
    exponent = sum(np.float32(amplitude * w) * term for w, term in zip(weights, terms, strict=True))
    field: NDArray[np.float32] = np.exp(exponent)
    return field


def add_rician_noise(signal: NDArray[np.float32], sigma: float, random: np.random.Generator) -> NDArray[np.float32]:
    """Magnitude of the signal plus complex Gaussian noise (Gudbjartsson and Patz 1995, doi:10.1002/mrm.1910340618).

    ``sigma`` is the standard deviation in each channel, in the unit of ``signal``; shape and dtype are kept.
    """
    real, imaginary = random.standard_normal((2, *signal.shape), dtype=np.float32) * np.float32(sigma)
    magnitude: NDArray[np.float32] = np.hypot(signal + real, imaginary)
    return magnitude
