"""One reader on one series, in a process of its own; prints one JSON line.

``python -m tests.benchmarks.reading write FOLDER`` writes a CT-like series of 512 x 512 x 24 in five transfer syntaxes,
1,000 small files, and the series of two patients; ``... reading READER SYNTAX FOLDER`` reads one series. CPU seconds are
user plus system of this process and of those that it starts, the least of five lots of reads after one that warms up; a lot
lasts a tenth of a second, beside which asking for the time costs nothing. ``catalogue`` gives files per second of wall
time; ``visit`` the CPU seconds of cataloguing two patients and preparing them for a plan, and of doing both again.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

SLICES = 24
SYNTAXES = ("raw", "rle", "jpeg-ls", "jpeg-2000", "jpeg-lossless")
FLOORS = ("bytes", "floats")
"""What no reader can be faster than; for uncompressed series."""
READERS = (*FLOORS, "federad", "pydicom", "simpleitk", "dcm2niix", "monai")
SMALL = 1000
SECRET = b"the secret of the benchmarks ..."


def tree_cpu_s() -> float:
    """CPU seconds of this process, of those it has ended, and of those that live, finer than a clock's tick."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        for thread in Path(f"/proc/{child.pid}/task").iterdir():
            total += int((thread / "schedstat").read_text().split()[0]) / 1e9
    return total


def write(folder: Path) -> None:
    """The series in all syntaxes, and the small files."""
    from imagecodecs import jpeg8_encode, jpegls_encode
    from pydicom import dcmread
    from pydicom.uid import CTImageStorage, JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless, generate_uid
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    base = gaussian_filter(rng.random((512, 512)), 12)
    base = (base - base.min()) / np.ptp(base) * 3000
    for k in range(SLICES):
        values = np.clip(base + rng.normal(0, 12, base.shape), 0, 4095).astype(np.uint16)
        ds = _slice(values, k, "1.2.3", CTImageStorage)
        ds.save_as(_in(folder / "raw") / f"{k:03d}.dcm", enforce_file_format=True)
        for name, syntax in (("rle", RLELossless), ("jpeg-2000", JPEG2000Lossless)):
            ds.PixelData = values.tobytes()
            ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
            ds.compress(syntax, generate_instance_uid=False)
            ds.save_as(_in(folder / name) / f"{k:03d}.dcm", enforce_file_format=True)
        plain = folder / "raw" / f"{k:03d}.dcm"
        _squeezed(plain, _in(folder / "jpeg-ls") / plain.name, JPEGLSLossless, jpegls_encode(values))
        lossless = jpeg8_encode(values, lossless=True, predictor=1, bitspersample=12)
        _squeezed(plain, _in(folder / "jpeg-lossless") / plain.name, JPEGLosslessSV1, lossless)
    for patient in range(2):
        for path in sorted((folder / "raw").iterdir()):
            ds = dcmread(path)
            ds.PatientID, ds.StudyInstanceUID, ds.SeriesInstanceUID = (
                str(patient),
                f"1.2.5.{patient}",
                f"1.2.6.{patient}",
            )
            ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            ds.save_as(_in(folder / "visited" / str(patient)) / path.name, enforce_file_format=True)
    (folder / "visited" / "labels.csv").write_text("patient,label\n0,a\n1,b\n")
    for n in range(SMALL):
        small = _slice(np.zeros((32, 32), np.uint16), n % 20, f"1.2.3.{n // 20}", CTImageStorage)
        small.PatientID, small.StudyInstanceUID = str(n // 20), f"1.2.4.{n // 20}"
        small.save_as(_in(folder / "small" / str(n // 20)) / f"{n}.dcm", enforce_file_format=True)


def _in(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _slice(values, k, series, storage):
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = storage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.PatientID, ds.PatientName, ds.StudyInstanceUID, ds.SeriesInstanceUID = "1", "B^A", "1.2.4", series
    ds.Modality, ds.Manufacturer, ds.ManufacturerModelName, ds.InstanceNumber = "CT", "SIEMENS", "Aurora", k + 1
    ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, 1.5 * k], [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing, ds.SliceThickness, ds.RescaleSlope, ds.RescaleIntercept = [0.7, 0.7], 1.5, 1, -1024
    ds.Rows, ds.Columns = values.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.SamplesPerPixel = 16, 12, 11, 0, 1
    ds.PhotometricInterpretation, ds.PixelData = "MONOCHROME2", values.tobytes()
    return ds


def _squeezed(source: Path, target: Path, syntax: str, frame: bytes) -> None:
    """A file with its one frame as it was compressed."""
    from pydicom import dcmread
    from pydicom.encaps import encapsulate

    ds = dcmread(source)
    ds.PixelData = encapsulate([frame])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.file_meta.TransferSyntaxUID = syntax
    ds.save_as(target, enforce_file_format=True)


def read_bytes(paths: list[Path]) -> None:
    """What any reader has to do at least: every byte into one array."""
    sizes = [path.stat().st_size for path in paths]
    whole, at = np.empty(sum(sizes), np.uint8), 0
    for path, size in zip(paths, sizes, strict=True):
        with path.open("rb", buffering=0) as file:
            file.readinto(whole[at : at + size])
        at += size


def read_floats(paths: list[Path]) -> None:
    """What any reader of intensities has to do at least: those bytes as float32, rescaled; no header is looked at."""
    n_values = 512 * 512
    image, room = np.empty((len(paths), n_values), np.float32), np.empty(paths[0].stat().st_size + 1000, np.uint8)
    for k, path in enumerate(paths):
        with path.open("rb", buffering=0) as file:
            n = file.readinto(room)
        image[k] = room[n - 2 * n_values : n].view("<u2")
        image[k] += -1024


def read_federad(paths: list[Path]) -> None:
    """Ours: checked geometry, intensities in Hounsfield units as float32."""
    from client.data import dicom

    dicom.read_series(paths, even=True)


def read_pydicom(paths: list[Path]) -> None:
    """Stored values, in the order of the files, as pydicom decodes by default."""
    import pydicom

    np.stack([pydicom.dcmread(path).pixel_array for path in paths])


def read_simpleitk(paths: list[Path]) -> None:
    """GDCM within ITK, rescaled."""
    import SimpleITK

    series = SimpleITK.ImageSeriesReader()
    series.SetFileNames(series.GetGDCMSeriesFileNames(str(paths[0].parent)))
    SimpleITK.GetArrayViewFromImage(series.Execute())


def read_dcm2niix(paths: list[Path]) -> None:
    """The program, its start and the file that it writes included."""
    import dcm2niix

    with tempfile.TemporaryDirectory() as out:
        command = [dcm2niix.bin, "-b", "n", "-z", "n", "-o", out, paths[0].parent]
        subprocess.run(command, check=True, capture_output=True)
        if not list(Path(out).glob("*.nii")):
            raise SystemExit("dcm2niix converted nothing")


def read_monai(paths: list[Path]) -> None:
    """MONAI's PydicomReader."""
    from monai.transforms import LoadImage

    LoadImage(reader="PydicomReader", image_only=True)(str(paths[0].parent))


def measured(read: Callable[[list[Path]], None], paths: list[Path], times: int = 5, lot_s: float = 0.1) -> float:
    """The least CPU seconds of a read, over several lots of them."""
    read(paths)
    began = tree_cpu_s()
    read(paths)
    n = max(1, math.ceil(lot_s / (tree_cpu_s() - began)))
    spent = []
    for _ in range(times):
        began = tree_cpu_s()
        for _ in range(n):
            read(paths)
        spent.append((tree_cpu_s() - began) / n)
    return min(spent)


def catalogue(folder: Path) -> dict[str, float]:
    """Files per second at the first and at the second look."""
    from client.data import reader
    from client.data.catalogue import Catalogue

    source, rates = folder / "small", []
    path = folder / "catalogue.sqlite"
    reader.ask("describe", next(source.rglob("*.dcm")))
    for _ in range(2):
        began = time.perf_counter()
        Catalogue.build(path, source, secret=SECRET)
        rates.append(SMALL / (time.perf_counter() - began))
    for left in folder.glob("catalogue.sqlite*"):
        left.unlink()
    return {"first_per_s": rates[0], "second_per_s": rates[1]}


def visit(folder: Path) -> dict[str, float]:
    """CPU seconds of looking at a hospital for the first time, catalogue and prepared volumes, and for the second."""
    from client.data.catalogue import Catalogue
    from client.data.cohort import Cohort
    from shared_models.plan import Plan

    task = {"kind": "classification", "labels": ["a", "b"], "network": "resnet", "channels": [8, 16]}
    data = {"modality": "CT", "dimensions": 2, "patch": [64, 64], "spacing_mm": [1.0, 1.0]}
    plan = Plan.from_tables({"name": "visit", "rounds": 1, "task": task, "data": data})

    def look(site: Path) -> float:
        began = tree_cpu_s()
        catalogue = Catalogue.build(site / "catalogue.sqlite", folder / "visited", secret=SECRET)
        Cohort.build(site / "cohort", catalogue, plan, secret=SECRET)
        return tree_cpu_s() - began

    with tempfile.TemporaryDirectory() as warm, tempfile.TemporaryDirectory() as site:
        look(Path(warm))
        first = look(Path(site))
        second = min(look(Path(site)) for _ in range(5))
    return {"first_s": first, "second_s": second, "second_over_first": second / first}


def main() -> None:
    what, *rest = sys.argv[1:]
    if what == "write":
        write(Path(rest[0]))
        print(json.dumps({"written": rest[0]}))
    elif what in ("catalogue", "visit"):
        print(json.dumps(globals()[what](Path(rest[0]))))
    else:
        paths = sorted((Path(rest[1]) / rest[0]).iterdir())
        seconds = measured(globals()[f"read_{what}"], paths)
        size = sum(path.stat().st_size for path in paths) / 1e6
        print(json.dumps({"reader": what, "syntax": rest[0], "cpu_s": seconds, "mb": size}))


if __name__ == "__main__":
    main()
