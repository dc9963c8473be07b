"""A reconstruction becomes a series that archives take: in its place where that is known, and nowhere where it is not."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from unittest.mock import Mock

import h5py
import nibabel
import numpy as np
import pydicom
import pytest
import releases
import SimpleITK
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydicom.uid import MRImageStorage, SecondaryCaptureImageStorage
from releases import CONSORTIUM, plan_of, publish

from client import findings_reconstruction
from client.data import dicom
from client.data.kspace_header import acquired
from client.data.skips import Reason, UnusableError
from client.findings import Findings
from client.folder import SiteFolder
from client.inference import predict
from client.plans import Plans
from client.site import SiteConfig
from client.station import Station
from shared_models.signing import public_pem
from simulation.kspace import write_study
from simulation.scanners import SCANNERS

KEY = Ed25519PrivateKey.generate()

N_Y, N_X, FOV_Y_MM, FOV_X_MM = 32, 24, 64.0, 36.0
READ, PHASE, NORMAL = np.array([0.0, 0.96, 0.28]), np.array([1.0, 0.0, 0.0]), np.array([0.0, 0.28, -0.96])
"""Directions of an oblique stack in LPS; the third is their cross product."""

MIDDLES = [np.array([5.0, -12.0, 40.0]) + k * 5.0 * NORMAL for k in range(3)]
"""Middle of the field of view of each slice [mm]."""

XML = f"""<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
 <subjectInformation><patientName>Quixote^Dulcinea</patientName><patientID>SECRET-4711</patientID>
  <patientBirthdate>1950-02-03</patientBirthdate><patientGender>F</patientGender></subjectInformation>
 <studyInformation><studyDate>2024-03-15</studyDate><studyInstanceUID>1.2.826.0.1.99</studyInstanceUID></studyInformation>
 <measurementInformation><patientPosition>HFS</patientPosition><frameOfReferenceUID>1.2.826.0.1.7</frameOfReferenceUID>
 </measurementInformation>
 <acquisitionSystemInformation><systemVendor>SIEMENS</systemVendor><systemModel>Aurora</systemModel>
  <systemFieldStrength_T>1.5</systemFieldStrength_T></acquisitionSystemInformation>
 <experimentalConditions><H1resonanceFrequency_Hz>63866217</H1resonanceFrequency_Hz></experimentalConditions>
 <encoding><encodedSpace><matrixSize><x>{N_X}</x><y>{N_Y}</y><z>1</z></matrixSize>
   <fieldOfView_mm><x>{FOV_X_MM}</x><y>{FOV_Y_MM}</y><z>5</z></fieldOfView_mm></encodedSpace>
  <reconSpace><matrixSize><x>{N_X}</x><y>{N_Y}</y><z>1</z></matrixSize>
   <fieldOfView_mm><x>{FOV_X_MM}</x><y>{FOV_Y_MM}</y><z>5</z></fieldOfView_mm></reconSpace>
  <encodingLimits><kspace_encoding_step_1><minimum>0</minimum><maximum>{N_Y - 1}</maximum><center>{N_Y // 2}</center>
  </kspace_encoding_step_1></encodingLimits><trajectory>cartesian</trajectory></encoding>
 <sequenceParameters><TR>500</TR><TE>12.5</TE></sequenceParameters>
</ismrmrdHeader>"""


def point_signal(place: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """What a coil receives of a point in the patient [mm], ``(y, x)``: from the physics, not from a transform."""
    k_x, k_y = (np.arange(-(n // 2), n - n // 2) for n in (N_X, N_Y))
    away = place - middle
    phase = k_x[None, :] * (away @ READ) / FOV_X_MM + k_y[:, None] * (away @ PHASE) / FOV_Y_MM
    return np.exp(-2j * np.pi * phase).astype(np.complex64)


def ismrmrd_file(path: Path, slices: list[np.ndarray], *, kept=range(N_Y), has_place: bool = True) -> Path:
    """Centred k-space ``(y, x)`` of one coil, line by line."""
    import ismrmrd

    path.parent.mkdir(exist_ok=True)
    with ismrmrd.Dataset(str(path), "dataset") as dataset:
        dataset.write_xml_header(XML.encode())
        for z, plane in enumerate(slices):
            for y in kept:
                line = ismrmrd.Acquisition.from_array(np.ascontiguousarray(plane[None, y]))
                line.idx.slice, line.idx.kspace_encode_step_1, line.center_sample = z, y, N_X // 2
                if has_place:
                    line.position[:], line.read_dir[:] = MIDDLES[z].tolist(), READ.tolist()
                    line.phase_dir[:], line.slice_dir[:] = PHASE.tolist(), NORMAL.tolist()
                dataset.append_acquisition(line)
    return path


def transformed(images: np.ndarray) -> np.ndarray:
    axes = (-2, -1)
    return np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(images, axes=axes), axes=axes, norm="ortho"), axes=axes)


def some_kspace(n: int = 3, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    smooth = np.zeros((n, N_Y, N_X), np.complex64)
    smooth[:, 8:24, 6:18] = 1 + rng.random((n, 16, 12))
    return list(transformed(smooth * 1000).astype(np.complex64))


def zero_filled(kspace: np.ndarray) -> np.ndarray:
    axes = (-2, -1)
    return np.abs(
        np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace, axes=axes), axes=axes, norm="ortho"), axes=axes)
    )


@pytest.fixture
def site(tmp_path) -> SiteFolder:
    folder = SiteFolder(tmp_path / "site")
    folder.make()
    Station.create(folder.station, SiteConfig(name="site-a", data=str(tmp_path), device="cpu"))
    Plans(folder.station).trust(CONSORTIUM, public_pem(KEY.public_key()))
    return folder


@pytest.fixture
def idle(site, monkeypatch):
    """A release whose network changes nothing: it answers with the zero-filled image, which is known."""
    honest = releases.weights_for
    monkeypatch.setattr(
        releases, "weights_for", lambda plan, seed: {k: np.zeros_like(v) for k, v in honest(plan, seed).items()}
    )

    def published(*, acceleration: float = 2.0, **data) -> str:
        task = {
            "kind": "reconstruction",
            "labels": [],
            "network": "cascade",
            "channels": [8, 8],
            "centre_fraction": 0.2,
        }
        plan = plan_of(
            task={**task, "acceleration": acceleration, "centre_fraction": 0.2, "reference": "magnitude"},
            data={"patch": [32, 24], **data},
        )
        return publish(site.releases, KEY, plan).sha256

    return published


def written(folder: Path) -> list[pydicom.Dataset]:
    return [pydicom.dcmread(path) for path in sorted((folder / "reconstruction").glob("*.dcm"))]


def values_of(one: pydicom.Dataset) -> np.ndarray:
    """Pixels in the source's units, as the object says."""
    step = float(one.DerivationDescription.split("1 stored is ")[1].split()[0])
    return one.pixel_array * step


class TestPlace:
    def test_point_comes_out_where_it_is_in_the_patient(self, site, idle, tmp_path):
        """
        Three points of three slices of an oblique stack, put into k-space by their phase: found at the same millimetres by
        ITK and by our own reader.
        """
        columns, rows = (3, 12, 20), (25, 16, 5)
        places = [
            MIDDLES[k] + (columns[k] - N_X // 2) * FOV_X_MM / N_X * READ + (rows[k] - N_Y // 2) * FOV_Y_MM / N_Y * PHASE
            for k in range(3)
        ]
        slices = [point_signal(place, middle) for place, middle in zip(places, MIDDLES, strict=True)]
        file = ismrmrd_file(tmp_path / "in" / "scan.h5", slices)

        made = predict(site, idle(acceleration=2.0), file, tmp_path / "out")

        reader = SimpleITK.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(made.folder / "reconstruction")))
        image = reader.Execute()
        read = SimpleITK.GetArrayFromImage(image)
        found = [np.unravel_index(int(plane.argmax()), plane.shape) for plane in read]
        at = [image.TransformIndexToPhysicalPoint((int(x), int(y), z)) for z, (y, x) in enumerate(found)]
        np.testing.assert_allclose(sorted(at), sorted(map(tuple, places)), atol=1e-3)
        scan = dicom.read_series(sorted((made.folder / "reconstruction").iterdir()), even=True).scan
        for plane in range(3):
            row, column = np.unravel_index(int(scan.image[0, plane].argmax()), scan.shape[1:])
            place = scan.affine @ [column, row, plane, 1]
            assert min(np.linalg.norm(place[:3] - one) for one in places) < 1e-3

    def test_what_the_header_says_is_in_every_image(self, site, idle, tmp_path):
        """
        Patient, study, scanner and parameters as stated; derived, from what and by what; valid for dciodvfy.
        """
        file = ismrmrd_file(tmp_path / "in" / "scan.h5", some_kspace())

        made = predict(site, idle(), file, tmp_path / "out")

        images = written(made.folder)
        assert len(images) == 3
        assert len({one.SOPInstanceUID for one in images}) == 3
        for k, one in enumerate(images):
            assert one.SOPClassUID == MRImageStorage
            assert (one.PatientID, str(one.PatientName), one.PatientSex) == ("SECRET-4711", "Quixote^Dulcinea", "F")
            assert (one.PatientBirthDate, one.StudyDate) == ("19500203", "20240315")
            assert (one.StudyInstanceUID, one.FrameOfReferenceUID) == ("1.2.826.0.1.99", "1.2.826.0.1.7")
            assert (one.RepetitionTime, one.EchoTime, one.MagneticFieldStrength) == (500, 12.5, 1.5)
            assert one.ContributingEquipmentSequence[0].Manufacturer == "SIEMENS"
            assert one.Manufacturer == "federad"
            assert list(one.ImageType[:2]) == ["DERIVED", "SECONDARY"]
            assert "k-space" in one.DerivationDescription
            assert "not for clinical use" in one.SeriesDescription
            np.testing.assert_allclose(one.PixelSpacing, [FOV_Y_MM / N_Y, FOV_X_MM / N_X])
            assert one.InstanceNumber == k + 1
        assert not errors_in(made.folder / "reconstruction" / "0001.dcm")

    @pytest.mark.parametrize("layout", ["fastmri", "lines without a place", "numbers"])
    def test_place_that_nobody_states_is_not_made_up(self, site, idle, tmp_path, layout):
        """
        Then the series is of secondary capture images without a position, and the page says so; pixel sizes stay where the
        file has them, and a patient who is not named stays empty.
        """
        folder = tmp_path / "in"
        folder.mkdir()
        if layout == "fastmri":
            images = np.abs(np.stack(some_kspace()))[None].astype(np.complex64)
            write_study(folder / "scan.h5", images, (5.0, 2.0, 1.5), SCANNERS["ge-t2-1.5t"], "P-1")
        elif layout == "numbers":
            np.savez(folder / "scan.npz", kspace=some_kspace(1)[0])
        else:
            ismrmrd_file(folder / "scan.h5", some_kspace(), has_place=False)

        made = predict(site, idle(), next(folder.iterdir()), tmp_path / "out")

        for one in written(made.folder):
            assert one.SOPClassUID == SecondaryCaptureImageStorage
            for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID", "SliceLocation"):
                assert keyword not in one
            assert ("PixelSpacing" in one) == (layout != "numbers")
            expected = {"fastmri": "P-1", "numbers": "", "lines without a place": "SECRET-4711"}
            assert str(one.PatientID or "") == expected[layout]
        assert not errors_in(made.folder / "reconstruction" / "0001.dcm")
        notes = " ".join(made.summary["notes"])
        assert "does not say where its slices lie" in notes
        assert ("of which patient" in notes) == (layout == "numbers")

    def test_header_that_lies_elsewhere_is_refused(self, tmp_path):
        """
        A link out of the file leads nowhere, whatever it names.
        """
        other = ismrmrd_file(tmp_path / "a" / "other.h5", some_kspace())
        with h5py.File(tmp_path / "link.h5", "w") as file:
            file["dataset"] = h5py.ExternalLink(str(other), "/dataset")

        with pytest.raises(UnusableError, match=Reason.LAYOUT.value):
            acquired(tmp_path / "link.h5", (3, N_Y, N_X))

        assert acquired(other, (3, N_Y, N_X)).place is not None


class TestValues:
    def test_stored_values_are_those_of_the_network(self, site, idle, tmp_path):
        """
        For a network that changes nothing: the zero-filled image of the plan's samples, in the file's own units, to half a
        stored step; and what it is measured against is the image from all of k-space.
        """
        file = ismrmrd_file(tmp_path / "in" / "scan.h5", some_kspace())

        made = predict(site, idle(acceleration=2.0), file, tmp_path / "out")

        first, second = made.summary["measures"]
        assert first["psnr"] == pytest.approx(second["psnr"])
        truth = np.stack([zero_filled(plane) for plane in some_kspace()])
        images = np.stack([values_of(one) for one in written(made.folder)])
        error = float(((images - truth) ** 2).mean())
        assert 10 * np.log10(truth.max() ** 2 / error) == pytest.approx(first["psnr"], abs=0.01)
        assert 10 < first["psnr"] < 60

    def test_what_a_scanner_left_out_is_not_asked_for(self, site, idle, tmp_path):
        """
        k-space with gaps is used as it was measured, whatever the plan's pattern: stored is its zero-filled image, there is
        no reference, and the page says so, and that the model learned at another acceleration.
        """
        kept = sorted({*range(12, 20), *range(0, N_Y, 4)})
        kspace = some_kspace()
        file = ismrmrd_file(tmp_path / "in" / "scan.h5", kspace, kept=kept)

        made = predict(site, idle(acceleration=4.0), file, tmp_path / "out")

        for one, plane in zip(written(made.folder), kspace, strict=True):
            measured = np.zeros_like(plane)
            measured[kept] = plane[kept]
            step = zero_filled(np.stack(kspace)).max() / 32767
            np.testing.assert_allclose(values_of(one), zero_filled(measured), atol=2 * step)
        assert "psnr" not in made.summary["measures"][0]
        assert made.summary["measures"][0]["acceleration"] == pytest.approx(N_Y / len(kept))
        assert "no image from the whole" in " ".join(made.summary["notes"])
        (warning,) = made.summary["warnings"]
        assert "used where it did not learn" in warning

    def test_missing_centre_is_told(self, site, idle, tmp_path):
        """
        A model looks for the coils there.
        """
        file = ismrmrd_file(tmp_path / "in" / "scan.h5", some_kspace(), kept=range(0, N_Y, 2))

        made = predict(site, idle(), file, tmp_path / "out")

        assert "cannot be relied on" in " ".join(made.summary["warnings"])


class TestImages:
    def test_magnitudes_give_a_series_on_their_own_grid(self, site, idle, write_series, tmp_path):
        """
        Where the plan allows k-space that is made up: same patient, study and places, each image refers to the one it was
        made from, and the page says that no scanner measured it.
        """
        y, x = np.mgrid[:32, :24]
        blob = np.exp(-((y - 18) ** 2 + (x - 10) ** 2) / 50)
        values = np.stack([20 + 300 * (k + 1) * blob for k in range(3)]).astype(int)
        series = write_series(tmp_path / "study", values, origin=(-3.0, 4.0, 9.0), shuffle=2, ScanningSequence="GR")

        made = predict(site, idle(acceleration=2.0, simulated=True), series.folder, tmp_path / "out")

        sources = {one.SOPInstanceUID: one for one in series.datasets}
        images = written(made.folder)
        assert len(images) == 3
        for one in images:
            (reference,) = one.SourceImageSequence
            source = sources[reference.ReferencedSOPInstanceUID]
            for keyword in ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID", "ScanningSequence"):
                assert one[keyword].value == source[keyword].value
            for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
                np.testing.assert_allclose(one[keyword].value, source[keyword].value)
            assert np.corrcoef(values_of(one).ravel(), source.pixel_array.ravel())[0, 1] > 0.9
            assert values_of(one).mean() == pytest.approx(source.pixel_array.mean(), rel=0.1)
        assert not errors_in(made.folder / "reconstruction" / "0001.dcm")
        assert "no scanner measured them" in " ".join(made.summary["warnings"])
        assert 'class="warning">The study has magnitudes alone' in made.page.read_text()

    def test_nifti_gives_nifti(self, site, idle, write_nifti, tmp_path):
        """
        On its own grid.
        """
        scan = write_nifti(tmp_path / "scan.nii.gz", np.random.default_rng(0).random((24, 32, 3), np.float32) + 1)

        made = predict(site, idle(simulated=True), scan, tmp_path / "out")

        read = nibabel.load(made.folder / "reconstruction.nii.gz")
        np.testing.assert_allclose(read.affine, nibabel.load(scan).affine)
        assert read.shape == (24, 32, 3)
        assert not list(made.folder.rglob("*.dcm"))


class TestPage:
    def test_page_sets_it_beside_the_zero_filled_image_and_says_how_steady_it_is(self, site, idle, tmp_path):
        """
        Pictures with one scale, of the image from all of k-space and the error too; the stability card in words.
        """
        file = ismrmrd_file(tmp_path / "in" / "scan.h5", some_kspace())

        text = predict(site, idle(), file, tmp_path / "out").page.read_text()

        for said in (
            "zero-filled",
            "from all of k-space",
            "error, 5 times as bright",
            "PSNR [dB]",
            "small bright disc",
        ):
            assert said in text, said
        assert "SECRET" not in text
        assert "Quixote" not in text

    def test_model_that_loses_structures_is_warned_of(self):
        """
        In a sentence of its own, where it keeps less of one that it has not seen than the zero-filled image does.
        """
        card = {"amplification": 2.4, "structure": 0.30, "structure_zero_filled": 0.31}
        found = {}
        for name, kept in (("worse", 0.30), ("better", 0.90)):
            task = Mock(card=lambda *_, kept=kept: card | {"structure": kept})
            found[name] = Findings("")
            findings_reconstruction._tell_stability(Mock(), task, Mock(), found[name])

        assert len(found["worse"].warnings) == 1
        assert found["better"].warnings == []
        assert "90% comes back (zero-filled: 31%)" in found["better"].notes[0]

    def test_deidentified_series_names_nobody(self, site, idle, tmp_path):
        """
        Nor the study, nor when.
        """
        file = ismrmrd_file(tmp_path / "in" / "scan.h5", some_kspace())

        made = predict(site, idle(), file, tmp_path / "out", deidentified=True)

        everything = b"".join(path.read_bytes() for path in made.folder.rglob("*") if path.is_file())
        for text in (b"SECRET", b"Quixote", b"1.2.826.0.1.99", b"20240315", b"19500203"):
            assert text not in everything, text
        assert written(made.folder)[0].PatientIdentityRemoved == "YES"


def errors_in(file: Path) -> list[str]:
    """What dciodvfy of dicom3tools finds wrong, where it is installed."""
    validator = shutil.which("dciodvfy")
    if validator is None:
        return []
    said = subprocess.run([validator, file], capture_output=True, text=True, check=False).stderr
    return [line for line in said.splitlines() if line.startswith("Error") and "<Laterality>" not in line]
