"""Maps of what a model found reach the archive as DICOM parametric maps, and say what they were computed from."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from releases import CONSORTIUM, plan_of, publish
from typer.testing import CliRunner

from client.cli import app
from client.folder import SiteFolder
from client.inference import predict
from client.plans import Plans
from client.site import SiteConfig
from client.station import Station
from shared_models import uncertainty
from shared_models.errors import FederadError
from shared_models.signing import public_pem
from shared_models.uncertainty import Members

KEY = Ed25519PrivateKey.generate()
OBLIQUE = (0.0, 0.96, 0.28, 0.0, -0.28, 0.96)
LABELS = ["background", "lesion", "odd thing"]
MAPS = ("probability-lesion", "probability-odd-thing", "uncertainty")


@pytest.fixture
def site(tmp_path) -> SiteFolder:
    folder = SiteFolder(tmp_path / "site")
    folder.make()
    Station.create(folder.station, SiteConfig(name="site-a", data=str(tmp_path), device="cpu"))
    Plans(folder.station).trust(CONSORTIUM, public_pem(KEY.public_key()))
    return folder


def values(shape=(6, 20, 24), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(100, 1000, shape)


def three_labels(**task):
    return plan_of(
        dimensions=3, task={"labels": LABELS, **task}, data={"spacing_mm": [2.5, 1.5, 1.5], "patch": [16] * 3}
    )


def nifti(path: Path) -> np.ndarray:
    """A map, ``(slice, row, column)``."""
    return np.asarray(nibabel.load(path).dataobj).transpose(2, 1, 0)


def by_position(path: Path) -> dict[tuple[float, ...], np.ndarray]:
    """Frames of a parametric map by where they lie, read by pydicom."""
    read = pydicom.dcmread(path)
    frames = np.frombuffer(read.FloatPixelData, "<f4").reshape(read.NumberOfFrames, read.Rows, read.Columns)
    places = [tuple(f.PlanePositionSequence[0].ImagePositionPatient) for f in read.PerFrameFunctionalGroupsSequence]
    return dict(zip(places, frames, strict=True))


class TestParametricMap:
    def test_map_reads_back_voxel_for_voxel(self, site, write_series, tmp_path):
        """
        The same floats as in the NIfTI file of the same prediction, each on the image where it belongs, in pydicom, in
        highdicom and in dcmqi.
        """
        series = write_series(tmp_path / "study", values(), origin=(-12.0, 7.0, 30.5), shuffle=3, orientation=OBLIQUE)

        made = predict(
            site, publish(site.releases, KEY, three_labels()).sha256, series.folder, tmp_path / "o", maps="both"
        )

        for name in MAPS:
            expected = nifti(made.folder / f"{name}.nii.gz")
            assert expected.std() > 1e-4, "a map that shows nothing tells nothing"
            placed = {one.SOPInstanceUID: tuple(one.ImagePositionPatient) for one in series.datasets}
            normal = np.cross(*np.reshape(series.datasets[0].ImageOrientationPatient, (2, 3)).astype(float))
            order = sorted(placed.values(), key=lambda place: float(normal @ np.array(place, float)))
            frames = by_position(made.folder / f"{name}.dcm")
            np.testing.assert_array_equal(np.stack([frames[place] for place in order]), expected)
            volume = highdicom.imread(made.folder / f"{name}.dcm").get_volume(apply_real_world_transform=True)
            lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ nibabel.load(made.folder / f"{name}.nii.gz").affine
            compare(volume.array, volume.affine, expected, lps)
            array, affine = read_by_dcmqi(made.folder / f"{name}.dcm", tmp_path / f"dcmqi-{name}")
            compare(array, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, expected, lps)

    def test_map_says_what_it_is_and_whose(self, site, write_series, tmp_path):
        """
        Patient, study, frame of reference, every image, what a value means, that it has no unit, and that it is for
        research; each map is a series of its own, in which dciodvfy of dicom3tools, where it is installed, finds no error.
        """
        series = write_series(tmp_path / "study", values(), shuffle=1, BodyPartExamined="BRAIN")

        made = predict(
            site, publish(site.releases, KEY, three_labels()).sha256, series.folder, tmp_path / "o", maps="dicom"
        )

        assert not list(made.folder.glob("*.nii.gz"))
        maps = {name: pydicom.dcmread(made.folder / f"{name}.dcm") for name in MAPS}
        source, uids = series.datasets[0], {one.SOPInstanceUID for one in series.datasets}
        assert len({one.SeriesInstanceUID for one in (*maps.values(), source)}) == 4
        for name, one in maps.items():
            for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID", "StudyDate"):
                assert one[keyword].value == source[keyword].value
            (referenced,) = one.ReferencedSeriesSequence
            assert {r.ReferencedSOPInstanceUID for r in referenced.ReferencedInstanceSequence} == uids
            (mapping,) = one.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence
            assert (mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept) == (1, 0)
            assert mapping.MeasurementUnitsCodeSequence[0].CodeValue == "1"
            quantity = mapping.QuantityDefinitionSequence[0].ConceptCodeSequence[0]
            own = ("110854", "DCM") if name.startswith("probability") else (name, "99FEDERAD")
            assert (quantity.CodeValue, quantity.CodingSchemeDesignator) == own
            anatomy = one.SharedFunctionalGroupsSequence[0].FrameAnatomySequence[0]
            assert anatomy.AnatomicRegionSequence[0].CodeMeaning == "Brain"
            assert one.ContentQualification == "RESEARCH"
            assert "not for clinical use" in one.SeriesDescription
        validator = shutil.which("dciodvfy")
        if validator is not None:
            file = made.folder / "uncertainty.dcm"
            said = subprocess.run([validator, file], capture_output=True, text=True, check=False).stderr
            assert "ParametricMap" in said
            wrong = [line for line in said.splitlines() if line.startswith("Error")]
            assert not [line for line in wrong if "<Laterality>" not in line]  # which the images should have said

    def test_research_images_keep_their_own_kind_of_map(self, site, write_nifti, tmp_path):
        """
        NIfTI gives NIfTI, whatever was asked for, and the page says why.
        """
        scan = write_nifti(tmp_path / "scan.nii.gz", np.random.default_rng(0).random((20, 24, 6), np.float32) + 1)

        made = predict(site, publish(site.releases, KEY).sha256, scan, tmp_path / "o", maps="dicom")

        assert (made.folder / "uncertainty.nii.gz").is_file()
        assert not list(made.folder.glob("*.dcm"))
        assert "no DICOM images" in " ".join(made.summary["notes"])


class TestPasses:
    def test_mean_and_disagreement_are_those_of_all_members(self):
        """
        Added up one by one, they are what the formulas say of all together.
        """
        members = np.random.default_rng(0).dirichlet([1.0] * 3, (5, 4)).transpose(0, 2, 1).astype(np.float32)
        added = Members()
        for one in members:
            added.add(one)

        np.testing.assert_allclose(added.mean, members.mean(axis=0), atol=1e-6)
        expected = uncertainty.mutual_information(members.astype(np.float64)) / np.log(3)
        np.testing.assert_allclose(added.disagreement, expected, atol=1e-6)

    def test_passes_change_what_is_doubted_and_not_what_is_found(self, site, write_series, tmp_path):
        """
        The segmentation and its probabilities are the network's own; doubt comes from the passes, and the same again for
        the same study; the page says from how many.
        """
        series = write_series(tmp_path / "study", values((2, 20, 24)))
        sha256 = publish(site.releases, KEY, plan_of(task={"dropout": 0.3})).sha256

        plain, first, second = (
            predict(site, sha256, series.folder, tmp_path / name, passes=passes).folder
            for name, passes in (("plain", 0), ("first", 3), ("second", 3))
        )

        same, other = "probability-lesion.nii.gz", "uncertainty.nii.gz"
        np.testing.assert_array_equal(nifti(plain / same), nifti(first / same))
        assert np.abs(nifti(plain / other) - nifti(first / other)).max() > 1e-3
        np.testing.assert_array_equal(nifti(first / other), nifti(second / other))
        apart = nifti(first / "disagreement.nii.gz")
        assert 0 < apart.max() <= 1
        assert not (plain / "disagreement.nii.gz").exists()
        assert "3 passes with dropout" in (first / "report.html").read_text()

    def test_classification_says_how_far_passes_disagree(self, site, write_series, tmp_path):
        """
        In words on its page.
        """
        labels = ["no finding", "pneumonia"]
        plan = plan_of(task={"kind": "classification", "labels": labels, "network": "resnet", "dropout": 0.3})
        series = write_series(tmp_path / "study", values((2, 40, 48)))

        made = predict(site, publish(site.releases, KEY, plan).sha256, series.folder, tmp_path / "o", passes=4)

        assert re.search(r"4 passes with dropout disagree by 0\.\d\d", " ".join(made.summary["notes"]))

    def test_model_without_dropout_is_not_asked_for_passes(self, site, write_series, tmp_path):
        """
        C163, before anything is read.
        """
        sha256 = publish(site.releases, KEY).sha256

        with pytest.raises(FederadError, match="without dropout") as caught:
            predict(site, sha256, tmp_path / "nothing", tmp_path / "o", passes=5)

        assert caught.value.code == "C163"


class TestCommand:
    def test_maps_and_passes_are_asked_for_by_name(self, site, write_series, tmp_path):
        """
        As it is typed.
        """
        series = write_series(tmp_path / "study", values((2, 20, 24)))
        sha256 = publish(site.releases, KEY, plan_of(task={"dropout": 0.3})).sha256
        words = ["predict", sha256[:12], str(series.folder), "--to", str(tmp_path / "o"), "--site", str(site.root)]

        outcome = CliRunner().invoke(app, [*words, "--maps", "dicom", "--passes", "3"], catch_exceptions=False)

        assert outcome.exit_code == 0
        names = {path.name for path in (tmp_path / "o").glob("*.dcm")}
        assert names == {"segmentation.dcm", "probability-lesion.dcm", "uncertainty.dcm", "disagreement.dcm"}


def compare(array: np.ndarray, affine: np.ndarray, expected: np.ndarray, lps: np.ndarray) -> None:
    """Every voxel of an array with an affine to mm lies on a voxel of ``(slice, row, column)`` and has its value."""
    voxels = np.argwhere(np.ones(array.shape, bool))
    to_expected = np.linalg.inv(lps) @ affine
    places = voxels @ to_expected[:3, :3].T + to_expected[:3, 3]
    indices = np.rint(places).astype(int)
    np.testing.assert_allclose(places, indices, atol=1e-2)
    assert array.size == expected.size
    np.testing.assert_array_equal(array.ravel(), expected.transpose(2, 1, 0)[tuple(indices.T)])


def read_by_dcmqi(file: Path, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """A map and its affine (RAS) by dcmqi's converter."""
    folder.mkdir()
    reader = shutil.which("paramap2itkimage", path=Path(sys.executable).parent)
    assert reader, "dcmqi is not installed"
    command = [reader, "--inputDICOM", file, "--outputDirectory", folder, "-t", "nii"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=120)
    (written,) = folder.glob("*.nii*")
    read = nibabel.load(written)
    return np.asarray(read.dataobj), read.affine
