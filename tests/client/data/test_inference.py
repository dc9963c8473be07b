"""A released model looks at a study, and what it found can be read anywhere and leads back to the images."""

from __future__ import annotations

import json
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

from client import inference
from client.cli import app
from client.data import dicom
from client.data.keys import key_of
from client.data.preprocessing import on_scan_grid, prepare
from client.data.scan import Scan
from client.findings import entropy, measured
from client.folder import SiteFolder
from client.inference import PAGE, predict
from client.plans import Plans
from client.site import SiteConfig
from client.station import Station
from shared_models.errors import FederadError
from shared_models.release import MODEL
from shared_models.signing import public_pem
from shared_models.task import task_for

KEY = Ed25519PrivateKey.generate()
OBLIQUE = (0.0, 0.96, 0.28, 0.0, -0.28, 0.96)
"""Sagittal and turned: other axes, other directions, and not parallel to any."""

LABELS = ["background", "lesion", "odd thing"]


@pytest.fixture
def site(tmp_path) -> SiteFolder:
    """A site that has enrolled and has fetched nothing yet."""
    folder = SiteFolder(tmp_path / "site")
    folder.make()
    (tmp_path / "data").mkdir(exist_ok=True)
    Station.create(folder.station, SiteConfig(name="site-a", data=str(tmp_path / "data"), device="cpu"))
    Plans(folder.station).trust(CONSORTIUM, public_pem(KEY.public_key()))
    return folder


@pytest.fixture
def released(site):
    """Fetch a release for a plan, by what publishes one."""

    def publish_for(plan=None, **options) -> str:
        return publish(site.releases, options.pop("key", KEY), plan or plan_of(), **options).sha256

    return publish_for


def volume_plan(**tables):
    """Three labels in 3-D on a grid of its own."""
    return plan_of(
        dimensions=3, task={"labels": LABELS}, data={"spacing_mm": [2.5, 1.5, 1.5], "patch": [16] * 3, **tables}
    )


def values(shape=(12, 20, 24), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(100, 1000, shape)


def code_of(work) -> FederadError:
    with pytest.raises(FederadError) as caught:
        work()
    assert caught.value.remedies
    return caught.value


def labels_of(seg: Path, headers: list[pydicom.Dataset]) -> np.ndarray:
    """A segmentation through highdicom, ``(label, slice, row, column)``, for the images in this order."""
    read = highdicom.seg.segread(seg)
    frames = read.get_pixels_by_source_instance(
        [one.SOPInstanceUID for one in headers], assert_missing_frames_are_empty=True, ignore_spatial_locations=True
    )
    return np.moveaxis(frames, -1, 0) > 0


class TestSegmentation:
    @pytest.mark.parametrize("orientation", [None, OBLIQUE], ids=["axial", "oblique"])
    def test_segmentation_reads_back_voxel_for_voxel(self, site, released, write_series, tmp_path, orientation):
        """
        On the scanner's own grid, whatever the model's: as what the network said, in highdicom, in dcmqi and in our reader.
        """
        options = {"orientation": orientation} if orientation else {}
        series = write_series(tmp_path / "study", values(), origin=(-12.0, 7.0, 30.5), shuffle=3, **options)
        plan = volume_plan()

        made = predict(site, released(plan), series.folder, tmp_path / "out")

        headers = sorted(series.datasets, key=place_along_normal)
        stack = dicom.read_series(series.files, even=True)
        expected = expected_labels(site, plan, stack.scan)
        assert 0.02 < (expected > 0).mean() < 0.98, "a prediction that shows nothing tells nothing"
        seg = made.folder / "segmentation.dcm"
        for index, mask in enumerate(labels_of(seg, headers), start=1):
            np.testing.assert_array_equal(mask, expected == index)
        np.testing.assert_array_equal(dicom.read_segmentation(seg, stack, LABELS), expected)
        for index, mask in read_by_dcmqi(seg, stack.scan, tmp_path / "dcmqi").items():
            np.testing.assert_array_equal(mask, expected == index)

    def test_segmentation_refers_to_its_images(self, site, released, write_series, tmp_path):
        """
        Same patient, study and frame of reference; the series and every image by UID; each frame lies on the image that it
        names; labels are coded, with a code of our own where there is no standard one, and the page says so.
        """
        series = write_series(tmp_path / "study", values(), shuffle=1)

        made = predict(site, released(volume_plan()), series.folder, tmp_path / "out")

        seg, source = pydicom.dcmread(made.folder / "segmentation.dcm"), series.datasets[0]
        for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID", "StudyDate"):
            assert seg[keyword].value == source[keyword].value
        assert seg.SeriesInstanceUID != source.SeriesInstanceUID
        (referenced,) = seg.ReferencedSeriesSequence
        assert referenced.SeriesInstanceUID == source.SeriesInstanceUID
        uids = {one.ReferencedSOPInstanceUID for one in referenced.ReferencedInstanceSequence}
        assert uids == {one.SOPInstanceUID for one in series.datasets}
        positions = {one.SOPInstanceUID: one.ImagePositionPatient for one in series.datasets}
        for frame in seg.PerFrameFunctionalGroupsSequence:
            (derived,) = frame.DerivationImageSequence
            named = derived.SourceImageSequence[0].ReferencedSOPInstanceUID
            assert frame.PlanePositionSequence[0].ImagePositionPatient == positions[named]
        types = [one.SegmentedPropertyTypeCodeSequence[0] for one in seg.SegmentSequence]
        assert [(one.CodeValue, one.CodingSchemeDesignator) for one in types] == [
            ("52988006", "SCT"),
            ("odd-thing", "99FEDERAD"),
        ]
        assert "odd thing" in made.summary["notes"][0]
        assert "not for clinical use" in seg.SeriesDescription

    def test_frames_of_one_file_are_referred_to_by_their_numbers(self, tmp_path):
        """
        Frames may lie in any order along the stack, and a file whose frames are not its slices is not referred to.
        """
        frames = []
        for z in (8.0, 0.0, 4.0):
            frame, place = pydicom.Dataset(), pydicom.Dataset()
            place.ImagePositionPatient = [0.0, 0.0, z]
            frame.PlanePositionSequence = [place]
            frames.append(frame)
        header = pydicom.Dataset()
        header.PerFrameFunctionalGroupsSequence = frames
        header.SOPClassUID, header.SOPInstanceUID = pydicom.uid.EnhancedMRImageStorage, "1.2.3"
        header.file_meta = pydicom.dataset.FileMetaDataset()
        header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        header.save_as(tmp_path / "one.dcm", enforce_file_format=True)
        affine = np.diag([1.0, 1.0, 4.0, 1.0])

        def order(n_slices: int):
            scan = Scan(np.zeros((1, n_slices, 2, 2), np.float32), affine)
            return inference._sources([tmp_path / "one.dcm"], scan)[1]

        assert order(3) == (1, 2, 0)
        assert order(9) == ()

    def test_study_in_an_archive_is_referred_to_by_its_images(self, site, released, write_series, tmp_path):
        """
        The zip file itself can be given.
        """
        series = write_series(tmp_path / "study", values((2, 20, 24)), shuffle=1)
        shutil.make_archive(str(tmp_path / "export"), "zip", series.folder)

        made = predict(site, released(), tmp_path / "export.zip", tmp_path / "out")

        (referred,) = pydicom.dcmread(made.folder / "segmentation.dcm").ReferencedSeriesSequence
        uids = {one.ReferencedSOPInstanceUID for one in referred.ReferencedInstanceSequence}
        assert uids == {one.SOPInstanceUID for one in series.datasets}

    def test_study_in_which_nothing_is_found_gives_an_empty_segmentation(self, site, released, write_series, tmp_path):
        """
        Which is said, and can be read.
        """
        series = write_series(tmp_path / "study", np.zeros((4, 20, 24), int))
        plan = plan_of()
        sha256 = publish_silent(site, plan)

        made = predict(site, sha256, series.folder, tmp_path / "out")

        assert made.summary["measures"][0]["volume_ml"] == 0
        assert "none of its labels" in made.summary["notes"][0]
        assert not labels_of(made.folder / "segmentation.dcm", series.datasets).any()

    def test_maps_lie_on_the_images_and_agree_with_the_segmentation(self, site, released, write_series, tmp_path):
        """
        Where a label's probability is above a half it is what was found, and where one is nearly certain nothing is in
        doubt; the maps' axes lead to the same places in the patient.
        """
        series = write_series(tmp_path / "study", values((5, 20, 24)), origin=(3.0, 4.0, 5.0))
        plan = plan_of()

        made = predict(site, released(plan), series.folder, tmp_path / "out")

        probability = nibabel.load(made.folder / "probability-lesion.nii.gz")
        doubt = nibabel.load(made.folder / "uncertainty.nii.gz").get_fdata()
        found = labels_of(made.folder / "segmentation.dcm", series.datasets)[0]
        p = probability.get_fdata()
        np.testing.assert_array_equal(p.transpose(2, 1, 0) > 0.5, found)
        np.testing.assert_allclose(
            doubt, -(p * np.log2(p.clip(1e-12)) + (1 - p) * np.log2((1 - p).clip(1e-12))), atol=1e-4
        )
        np.testing.assert_allclose(probability.affine @ [0, 0, 0, 1], [-3, -4, 5, 1])
        np.testing.assert_allclose(probability.affine @ [1, 0, 0, 1], [-4, -4, 5, 1])

    def test_research_images_get_their_own_kind_of_file(self, site, released, write_nifti, write_picture, tmp_path):
        """
        A NIfTI file gives a NIfTI label on its grid, a photograph a picture of its size, and neither a DICOM object.
        """
        rng = np.random.default_rng(0)
        scan = write_nifti(tmp_path / "scan.nii.gz", rng.random((20, 24, 6), np.float32) + 1, spacing=(1.0, 2.0, 4.0))
        photograph = write_picture(tmp_path / "eye.png", rng.integers(0, 255, (40, 48), np.uint8))
        sha256 = released()

        volume = predict(site, sha256, scan, tmp_path / "of-scan")
        flat = predict(site, sha256, photograph, tmp_path / "of-eye")

        label = nibabel.load(volume.folder / "segmentation.nii.gz")
        np.testing.assert_allclose(label.affine, nibabel.load(scan).affine)
        assert label.shape == (20, 24, 6)
        assert volume.summary["measures"][0]["volume_ml"] == pytest.approx(label.get_fdata().sum() * 8 / 1000)
        assert (flat.folder / "segmentation.png").is_file()
        assert flat.summary["measures"][0]["volume_ml"] is None
        assert not [*volume.folder.glob("*.dcm"), *flat.folder.glob("*.dcm")]


class TestMeasures:
    def test_parts_volume_and_diameter_of_known_boxes(self):
        """
        Two boxes that do not touch: their voxels in ml, two parts, and the space diagonal of the larger in mm, on voxels
        of 4 x 2 x 1 mm in an oblique grid.
        """
        turn = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]])
        affine = np.eye(4)
        affine[:3, :3] = turn @ np.diag([1.0, 2.0, 4.0])
        mask = np.zeros((6, 12, 20), bool)
        mask[1:3, 2:5, 3:13] = mask[4:6, 9:11, 15:17] = True

        found = measured(mask, Scan(np.zeros((1, *mask.shape), np.float32), affine))

        assert found["lesions"] == 2
        assert found["pixels"] == 60 + 8
        assert found["volume_ml"] == pytest.approx(68 * 8 / 1000)
        assert found["diameter_mm"] == pytest.approx(np.linalg.norm([9, 2 * 2, 1 * 4]))

    def test_largest_diameter_is_that_of_all_pairs(self):
        """
        The shortcut over candidates finds what comparing all voxels finds, on a part of any shape.
        """
        from scipy.spatial.distance import pdist

        noise = np.random.default_rng(4).random((9, 9, 9)) < 0.7
        scan = Scan(np.zeros((1, 9, 9, 9), np.float32), np.diag([1.0, 1.5, 3.0, 1.0]))
        assert measured(noise, scan)["lesions"] == 1

        assert measured(noise, scan)["diameter_mm"] == pytest.approx(pdist(np.argwhere(noise) * [3.0, 1.5, 1.0]).max())

    def test_doubt_is_nothing_where_certain_and_one_where_all_labels_are_alike(self):
        """
        For any number of labels.
        """
        for n in (2, 3, 5):
            p = np.zeros((n, 2), np.float32)
            p[0, 0], p[:, 1] = 1, 1 / n
            np.testing.assert_allclose(entropy(p), [0, 1], atol=1e-5)


class TestWayBack:
    @pytest.mark.parametrize("permutation", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
    def test_grid_that_was_kept_comes_back_exactly(self, plan, permutation):
        """
        Flips and permutations of axes are undone voxel for voxel.
        """
        directions = np.diag([-1.0, 1.0, -1.0])[:, permutation] @ np.diag([1.0, 1.5, 2.0])
        affine = np.eye(4)
        affine[:3, :3] = directions
        scan = Scan(np.random.default_rng(0).random((2, 4, 5, 6), np.float32) + 1, affine)

        volume = prepare(scan, plan(dimensions=3).data)
        back = on_scan_grid(volume.image, scan, volume.spacing_mm)

        for channel, given in zip(back, scan.image, strict=True):
            np.testing.assert_allclose(channel, (given - given.mean()) / given.std(), rtol=1e-4, atol=1e-5)

    def test_resampled_ramp_comes_back_to_its_voxels(self, plan):
        """
        A field that is linear in space survives the way to the model's grid and back, in the right places.
        """
        affine = np.diag([1.0, 1.25, 3.0, 1.0])
        z, y, x = np.meshgrid(np.arange(9), np.arange(20), np.arange(24), indexing="ij")
        ramp = (x + 3 * y + 50 * z).astype(np.float32) + 1
        scan = Scan(ramp[np.newaxis], affine)

        volume = prepare(scan, plan(dimensions=3, spacing_mm=[1.5, 0.75, 0.75]).data)
        back = on_scan_grid(volume.image, scan, volume.spacing_mm)[0]

        inside = (slice(1, -1),) * 3
        slope, offset = np.polyfit(back[inside].ravel(), ramp[inside].ravel(), 1)
        np.testing.assert_allclose(slope * back[inside] + offset, ramp[inside], atol=0.02)


class TestRefusals:
    def test_model_that_is_not_the_signed_one_predicts_nothing(self, site, released, write_series, tmp_path):
        """
        Signed by another key, or with one byte changed after it came: M212, M215, and no folder appears.
        """
        series = write_series(tmp_path / "study", values((4, 20, 24)))
        foreign = released(key=Ed25519PrivateKey.generate(), run="other")
        changed = released(seed=1)
        file = site.releases / changed / MODEL
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.chmod(0o600)
        file.write_bytes(data)

        codes = {
            name: code_of(lambda name=name: predict(site, name, series.folder, tmp_path / "out")).code
            for name in (foreign, changed)
        }

        assert codes == {foreign: "M212", changed: "M215"}
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("plan", "tags", "named"),
        [
            (plan_of(data={"modality": "OP"}), {}, 'trained on modality "OP", and this study has MR'),
            (plan_of(dimensions=3), {"one_slice": True}, "needs a volume"),
            (plan_of(data={"channels": ["flair", "t1c"]}), {}, "channel of the plan is missing"),
            (plan_of(), {"PixelSpacing": None}, "needed DICOM tags are missing"),
        ],
        ids=["modality", "dimensions", "channels", "spacing"],
    )
    def test_study_that_does_not_fit_is_refused_with_its_reason(
        self, site, released, write_series, tmp_path, plan, tags, named
    ):
        """
        C123, saying what the model asks for and what is here; nothing is written.
        """
        one_slice = tags.pop("one_slice", False)
        series = write_series(tmp_path / "study", values((1 if one_slice else 4, 20, 24)), **tags)

        error = code_of(lambda: predict(site, released(plan), series.folder, tmp_path / "out"))

        assert error.code == "C123"
        assert named in error.happened
        assert not (tmp_path / "out").exists()

    def test_several_studies_or_none_are_refused(self, site, released, write_series, tmp_path):
        """
        One study is predicted at a time.
        """
        for name in "ab":
            write_series(tmp_path / "studies" / name, values((2, 20, 24)), patient=name)
        (tmp_path / "empty").mkdir()
        sha256 = released()

        for folder, said in (("studies", "holds 2 studies"), ("empty", "no usable image"), ("gone", "There is no")):
            error = code_of(lambda folder=folder: predict(site, sha256, tmp_path / folder, tmp_path / "out"))
            assert error.code == "C123"
            assert said in error.happened

    def test_nothing_is_overwritten(self, site, released, write_series, tmp_path):
        """
        A folder with something in it is refused with C124 and stays as it is.
        """
        series = write_series(tmp_path / "study", values((2, 20, 24)))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("kept")

        error = code_of(lambda: predict(site, released(), series.folder, tmp_path / "out"))

        assert error.code == "C124"
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]

    def test_release_that_is_not_here_is_named(self, site, released, tmp_path):
        """
        With what is here, and how to fetch one.
        """
        sha256 = released()

        error = code_of(lambda: predict(site, "f00", tmp_path, tmp_path / "out"))

        assert error.code == "C163"
        assert sha256[:12] in error.happened
        assert any("fetch" in remedy for remedy in error.remedies)


class TestQuantification:
    def test_report_holds_the_number(self, site, released, write_series, tmp_path):
        """
        On the page, in the program's form, in a TID 1500 report, and with a map of the evidence on the images.
        """
        target = "proportion"
        task = {"kind": "quantification", "target": target, "labels": ["background", "lesion"], "network": "resnet"}
        series = write_series(tmp_path / "study", values((3, 40, 48)))

        made = predict(site, released(plan_of(task=task)), series.folder, tmp_path / "out")

        (row,) = made.summary["measures"]
        assert row["label"] == "lesion"
        assert row[target] >= 0
        assert "<h1>" in (page := (made.folder / "report.html").read_text())
        assert "lesion: " in page
        (group,) = highdicom.sr.srread(made.folder / "report.dcm").content.get_image_measurement_groups()
        (stated,) = group.get_measurements()
        assert stated.value == pytest.approx(row[target], abs=1e-6)
        assert nibabel.load(made.folder / "evidence-lesion.nii.gz").shape == (48, 40, 3)


class TestClassification:
    def test_report_holds_the_probabilities_and_refers_to_the_images(self, site, released, write_series, tmp_path):
        """
        A TID 1500 report: each label with its probability, the most probable as the finding, every image referred to; and
        a map of the evidence on the images.
        """
        labels = ["no finding", "pneumonia", "lesion"]
        plan = plan_of(task={"kind": "classification", "labels": labels, "network": "resnet"})
        series = write_series(tmp_path / "study", values((3, 40, 48)))

        made = predict(site, released(plan), series.folder, tmp_path / "out")

        rows = made.summary["measures"]
        assert [row["label"] for row in rows] == labels
        assert sum(row["probability"] for row in rows) == pytest.approx(1)
        report = highdicom.sr.srread(made.folder / "report.dcm")
        (group,) = report.content.get_image_measurement_groups()
        stated = {one.name.meaning: one.value for one in group.get_measurements()}
        for row in rows:
            assert stated[f"Probability of {row['label']}"] == pytest.approx(row["probability"], abs=1e-6)
        said = {one.name.meaning: one.value for one in group.get_qualitative_evaluations()}
        assert (
            labels[int(np.argmax([row["probability"] for row in rows]))].lower()
            in said["Most probable label"].meaning.lower()
        )
        (evidence,) = report.CurrentRequestedProcedureEvidenceSequence
        uids = {one.ReferencedSOPInstanceUID for one in evidence.ReferencedSeriesSequence[0].ReferencedSOPSequence}
        assert uids == {one.SOPInstanceUID for one in series.datasets}
        (heat,) = made.folder.glob("evidence-*.nii.gz")
        assert nibabel.load(heat).shape == (48, 40, 3)

    def test_study_with_several_labels_has_a_finding_for_each(self, site, released, write_series, tmp_path):
        """
        Each label stands with a probability of its own, and those of at least one half as findings of the report.
        """
        labels = ["mass", "effusion", "nodule"]
        task = {"kind": "classification", "target": "multi-label", "labels": labels, "network": "resnet"}
        series = write_series(tmp_path / "study", values((3, 40, 48)))

        made = predict(site, released(plan_of(task=task)), series.folder, tmp_path / "out")

        rows = made.summary["measures"]
        assert [row["found"] for row in rows] == [row["probability"] >= 0.5 for row in rows]
        report = highdicom.sr.srread(made.folder / "report.dcm")
        (group,) = report.content.get_image_measurement_groups()
        assert len(group.get_measurements()) == 3
        evaluations = [one for one in group.get_qualitative_evaluations() if one.name.meaning == "Label found"]
        said = [one.value.meaning.lower() for one in evaluations]
        found = [row["label"] for row in rows if row["found"]]
        assert len(said) == len(found)
        assert all(label in meaning for label, meaning in zip(found, said, strict=True))


class TestDeidentified:
    def test_no_identifier_is_in_any_file_and_references_agree(self, site, released, write_series, tmp_path):
        """
        On demand: UIDs are mapped alike in all that is written, and the report says what was not looked at.
        """
        planted = {"PatientID": "SECRET-4711", "PatientName": "Quixote^Dulcinea", "InstitutionName": "General Hospital"}
        series = write_series(tmp_path / "study", values((3, 20, 24)), patient="SECRET-4711", **planted)

        made = predict(site, released(), series.folder, tmp_path / "out", deidentified=True)

        written = b"".join(path.read_bytes() for path in made.folder.iterdir())
        source = series.datasets[0]
        for text in (
            *planted.values(),
            "Quixote",
            "Dulcinea",
            source.StudyInstanceUID,
            source.SOPInstanceUID,
            source.StudyDate,
        ):
            assert text.encode() not in written, text
        seg = pydicom.dcmread(made.folder / "segmentation.dcm")
        assert seg.PatientID == key_of((site.station / "secret").read_bytes(), "SECRET-4711")
        report = json.loads((made.folder / "deidentification.json").read_text())
        assert report["headers"] == 3
        assert "not looked at" in report["not_handled"]["pixels"]


class TestPage:
    def test_page_opens_offline_and_says_what_it_is(self, site, released, write_series, tmp_path):
        """
        Nothing is loaded from elsewhere, nobody is named; it warns, and tells release, plan, sites, privacy and measures.
        """
        series = write_series(tmp_path / "study", values((3, 20, 24)), patient="SECRET-4711")
        cost = {"north": {"epsilon": 3.5, "delta": 1e-6, "declared_size": 100}}
        sha256 = released(cost=cost)

        text = predict(site, sha256, series.folder, tmp_path / "out").page.read_text()

        assert not re.search(r"""(src|href)=["'](?!data:)|url\(|<script""", text)
        assert "SECRET" not in text
        assert "Nobody" not in text
        for said in (
            "Not for clinical use",
            sha256,
            "lesions",
            "north",
            "epsilon 3.5",
            "volume [ml]",
            "data:image/png",
        ):
            assert said in text, said


class TestStory:
    def test_emulated_hospital_gets_the_model_and_uses_it(self, site, smoke_plan, hospitals, tmp_path):
        """
        As it is typed: a release of the smoke plan on one of the hospital's own studies, with progress and a page.
        """
        sha256 = publish(site.releases, KEY, smoke_plan).sha256
        study = next(path for path in sorted(hospitals[0].folder.iterdir()) if path.is_dir())

        words = ["predict", sha256[:12], str(study), "--to", str(tmp_path / "out"), "--site", str(site.root), "--json"]
        outcome = CliRunner().invoke(app, words, catch_exceptions=False)

        told = json.loads(outcome.stdout.splitlines()[-1])
        assert told["release"] == sha256
        assert told["clinical_use"] is False
        assert {"segmentation.dcm", "uncertainty.nii.gz", "probability-lesion.nii.gz", PAGE, "prediction.json"} == {
            path.name for path in (tmp_path / "out").iterdir()
        }
        images = [
            path for path in study.rglob("*.dcm") if pydicom.dcmread(path, specific_tags=["Modality"]).Modality == "MR"
        ]
        stack = dicom.read_series(images, even=False)
        expected = expected_labels(site, smoke_plan, stack.scan)
        found = dicom.read_segmentation(tmp_path / "out" / "segmentation.dcm", stack, smoke_plan.task.labels)
        np.testing.assert_array_equal(found, expected)


def place_along_normal(one: pydicom.Dataset) -> float:
    orientation = np.array(one.ImageOrientationPatient, float)
    return float(np.cross(orientation[:3], orientation[3:]) @ np.array(one.ImagePositionPatient, float))


def expected_labels(site: SiteFolder, plan, scan: Scan) -> np.ndarray:
    """What the network says of a scan, by the task itself, brought to the scan's grid with MONAI's own resampling."""
    import torch
    from monai.data import MetaTensor
    from monai.transforms import ResampleToMatch

    from shared_models.release import Release

    (folder,) = (
        path
        for path in site.releases.iterdir()
        if path.is_dir() and Release.open(path).manifest.plan_sha256 == plan.sha256
    )
    volume = prepare(scan, plan.data)
    with torch.inference_mode():
        probabilities = task_for(plan).probabilities(Release.open(folder).network(), volume, torch.device("cpu"))
    back = on_scan_grid(probabilities, scan, volume.spacing_mm)
    turned = prepare(Scan(scan.image, scan.affine), plan.data.model_copy(update={"spacing_mm": None}))
    to_match = MetaTensor(
        torch.zeros(1, *turned.image.shape[:0:-1]),
        affine=torch.diag(torch.tensor([*turned.spacing_mm[::-1], 1.0], dtype=torch.float64)),
    )
    given = MetaTensor(
        torch.from_numpy(probabilities.transpose(0, 3, 2, 1).copy()),
        affine=torch.diag(torch.tensor([*volume.spacing_mm[::-1], 1.0], dtype=torch.float64)),
    )
    by_monai = ResampleToMatch(mode="bilinear", padding_mode="border")(given, to_match).numpy().transpose(0, 3, 2, 1)
    np.testing.assert_allclose(np.sort(by_monai.ravel()), np.sort(back.ravel()), atol=1e-4)
    return back.argmax(axis=0)


def publish_silent(site: SiteFolder, plan) -> str:
    """A released model that says background everywhere."""
    import releases

    honest = releases.weights_for
    try:
        releases.weights_for = lambda plan, seed: {
            name: np.zeros_like(array) if not is_last(name, array) else np.array([5.0, -5.0], np.float32)
            for name, array in honest(plan, seed).items()
        }
        return publish(site.releases, KEY, plan).sha256
    finally:
        releases.weights_for = honest


def is_last(name: str, array: np.ndarray) -> bool:
    return name.endswith("bias") and array.shape == (2,)


def read_by_dcmqi(seg: Path, scan: Scan, folder: Path) -> dict[int, np.ndarray]:
    """Masks of all segments, ``(slice, row, column)`` on the scan's grid, by dcmqi's converter: each a file of its own."""
    folder.mkdir()
    reader = shutil.which("segimage2itkimage", path=Path(sys.executable).parent)
    assert reader, "dcmqi is not installed"
    command = [reader, "--inputDICOM", seg, "--outputDirectory", folder, "-t", "nii"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=120)
    masks = {}
    for file in folder.glob("*.nii.gz"):
        read = nibabel.load(file)
        to_scan = np.linalg.inv(np.diag([-1.0, -1.0, 1.0, 1.0]) @ scan.affine) @ read.affine
        voxels = np.argwhere(np.asarray(read.dataobj) > 0)
        places = np.rint(voxels @ to_scan[:3, :3].T + to_scan[:3, 3]).astype(int)
        mask = np.zeros(scan.shape, bool)
        mask[tuple(places[:, ::-1].T)] = True
        masks[int(file.name.split(".")[0].split("-")[-1])] = mask
    assert masks
    return masks
