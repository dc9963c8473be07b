"""Emulated hospitals: real DICOM, the same bytes however they are made, and nobody else's files touched."""

import csv
import json
from hashlib import sha256

import highdicom as hd
import numpy as np
import pydicom
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from shared_models.errors import FederadError
from shared_models.plan import Plan
from simulation import consortium
from simulation.atlas import Grid
from simulation.consortium import emulate
from simulation.patients import EmulatedPatient
from simulation.scanners import SCANNERS
from simulation.stations import SiteFolder, cohort_of, prepare_stations


def small_plan(*, data=None, simulation=None, labels=("background", "lesion")):
    return Plan.from_tables(
        {
            "name": "small",
            "rounds": 1,
            "task": {"kind": "segmentation", "labels": labels, "network": "unet", "channels": [8, 16]},
            "data": {"modality": "MR", "dimensions": 2, "spacing_mm": [4.0, 4.0], "patch": [32, 32], **(data or {})},
            "simulation": {"patients": 2, "slices": 4, **(simulation or {})},
        }
    )


def files_of(folder):
    """Hash of every DICOM file by its place in the folder."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.dcm"))
    }


def slices_of(study):
    return [pydicom.dcmread(path) for path in sorted(study.glob("im-*.dcm"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hospitals")


@pytest.fixture(scope="module")
def hospitals(folder):
    return emulate(small_plan(simulation={"patients": 8}), n_sites=4, folder=folder, seed=100)


@pytest.fixture(scope="module")
def study(hospitals):
    """The first study of the first patient of site 2."""
    return hospitals[1].folder / "EMU-100-2-001" / "study-1"


class TestFolders:
    def test_every_hospital_has_its_scanner_and_patients(self, hospitals, folder):
        """
        Scanners are dealt in the order of the catalogue, every patient has a folder.
        """
        assert [hospital.name for hospital in hospitals] == ["site-1", "site-2", "site-3", "site-4"]
        assert [hospital.scanner for hospital in hospitals] == list(SCANNERS)[:4]
        for hospital in hospitals:
            assert hospital.folder == folder / hospital.name
            assert len(list(hospital.folder.iterdir())) == 8

    def test_scanners_are_dealt_in_the_plans_order(self, tmp_path):
        plan = small_plan(simulation={"patients": 1, "slices": 1, "scanners": ["canon-pd-1.5t", "ge-t2-1.5t"]})
        hospitals = emulate(plan, n_sites=3, folder=tmp_path, seed=100)
        assert [hospital.scanner for hospital in hospitals] == ["canon-pd-1.5t", "ge-t2-1.5t", "canon-pd-1.5t"]

    def test_some_patients_have_two_studies(self, hospitals):
        """
        Their second study is another one: other UIDs, a later date, the same person.
        """
        returning = [patient for patient in hospitals[1].folder.iterdir() if (patient / "study-2").exists()]
        assert 0 < len(returning) < 8
        first, second = (slices_of(returning[0] / name)[0] for name in ("study-1", "study-2"))
        assert first.PatientID == second.PatientID
        assert first.StudyInstanceUID != second.StudyInstanceUID
        assert first.StudyDate < second.StudyDate
        assert (first.pixel_array != second.pixel_array).mean() > 0.5

    def test_all_identifiers_are_unique(self, folder, hospitals):
        """
        No two files share a SOP Instance UID, no two studies a Study Instance UID, no two hospitals a patient.
        """
        headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in folder.rglob("*.dcm")]
        assert len({header.SOPInstanceUID for header in headers}) == len(headers)
        studies = {(header.PatientID, header.StudyDate) for header in headers}
        assert len({header.StudyInstanceUID for header in headers}) == len(studies)
        assert len({header.PatientID for header in headers}) == 4 * 8


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("once")
    emulate(small_plan(), n_sites=2, folder=folder, seed=100, workers=1)
    return files_of(folder)


class TestDeterminism:
    @pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
    def test_same_seed_gives_the_same_bytes(self, once, tmp_path, workers):
        """
        Made again, in this process or in two others, every file is the same to the last byte.
        """
        emulate(small_plan(), n_sites=2, folder=tmp_path, seed=100, workers=workers)
        assert files_of(tmp_path) == once

    def test_another_seed_changes_every_file(self, once, tmp_path):
        """
        Another seed means other patients: no file, image or segmentation, is the same.
        """
        emulate(small_plan(), n_sites=2, folder=tmp_path, seed=101)
        assert not set(files_of(tmp_path).values()) & set(once.values())

    def test_a_further_hospital_leaves_the_others_as_they_were(self, once, tmp_path):
        emulate(small_plan(), n_sites=3, folder=tmp_path, seed=100)
        assert once.items() < files_of(tmp_path).items()


class TestImages:
    def test_header_names_the_scanner(self, hospitals):
        """
        Manufacturer, model, field strength and sequence of every hospital are those of its scanner.
        """
        for hospital in hospitals:
            scanner, header = SCANNERS[hospital.scanner], pydicom.dcmread(next(hospital.folder.rglob("im-001.dcm")))
            assert header.Manufacturer == scanner.manufacturer
            assert header.ManufacturerModelName == scanner.model
            assert header.MagneticFieldStrength == scanner.field_strength_t
            assert header.SequenceName == scanner.sequence_name
            assert header.EchoTime == pytest.approx(1000 * scanner.echo_time_s)
            assert header.RepetitionTime == pytest.approx(1000 * scanner.repetition_time_s)
            assert ("InversionTime" in header) == (scanner.inversion_time_s is not None)
            assert ("ContrastBolusAgent" in header) == (scanner.contrast_agent is not None)

    def test_files_are_classic_mr_images(self, study):
        """
        One file per slice: MR Image Storage, explicit little endian, unsigned 16 bits, 12 of them used.
        """
        slices = slices_of(study)
        assert len(slices) == 4
        for image in slices:
            assert image.SOPClassUID == pydicom.uid.MRImageStorage
            assert image.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRLittleEndian
            assert image.pixel_array.dtype == np.uint16
            assert 0 < image.pixel_array.max() < 4096

    def test_geometry_is_that_of_the_grid(self, study):
        """
        Positions, spacings and thickness put every voxel where the plan's grid has it, in DICOM's order (x, y, z).
        """
        grid, slices = Grid.slab(4, (4.0, 4.0, 4.0)), slices_of(study)
        for index, image in enumerate(slices):
            z, y, x = grid.points_mm()[:, index, 0, 0]
            assert_allclose(image.ImagePositionPatient, [x, y, z])
            assert_allclose(image.ImageOrientationPatient, [1, 0, 0, 0, 1, 0])
            assert_allclose(image.PixelSpacing, [4.0, 4.0])
            assert image.SliceThickness == image.SpacingBetweenSlices == 4.0
            assert image.pixel_array.shape == grid.shape[1:]

    def test_highdicom_reads_the_series_as_one_volume(self, study):
        """
        Slices are regular and share a frame of reference: a reader that insists on both accepts them.
        """
        volume = hd.get_volume_from_series(slices_of(study))
        assert volume.spatial_shape == (4, 56, 48)
        assert_allclose(volume.spacing, [4.0, 4.0, 4.0])

    def test_plan_of_three_dimensions_gets_its_own_slice_spacing(self, tmp_path):
        data = {"dimensions": 3, "spacing_mm": [3.0, 4.0, 6.0], "patch": [8, 32, 32]}
        emulate(small_plan(data=data, simulation={"patients": 1}), n_sites=1, folder=tmp_path, seed=100)
        image = slices_of(tmp_path / "site-1" / "EMU-100-1-001" / "study-1")[0]
        assert (image.SliceThickness, *image.PixelSpacing) == (3.0, 4.0, 6.0)
        assert image.pixel_array.shape == (56, 32)

    def test_nothing_looks_like_a_person(self, study):
        image = slices_of(study)[0]
        assert "Emulated" in str(image.PatientName)
        assert image.PatientID.startswith("EMU-")
        assert not image.PatientBirthDate


class TestSegmentation:
    def test_mask_comes_back_in_its_place(self, study):
        """
        Read back by highdicom, the outline is the emulated patient's mask, voxel by voxel on the same grid.
        """
        segmentation = hd.seg.segread(study / "seg.dcm")
        anatomy = EmulatedPatient(100, 2, 1).anatomy(Grid.slab(4, (4.0, 4.0, 4.0)), study=1)
        uids = [image.SOPInstanceUID for image in slices_of(study)]
        mask = segmentation.get_pixels_by_source_instance(uids, combine_segments=True)
        assert anatomy.lesion_mask.any()
        assert_array_equal(mask, anatomy.lesion_mask)

    def test_mask_and_images_share_their_geometry(self, study):
        """
        Taken as volumes in space, image and outline lie on top of one another.
        """
        image = hd.get_volume_from_series(slices_of(study))
        segmentation = hd.seg.segread(study / "seg.dcm")
        outline = segmentation.get_volume(combine_segments=True).match_geometry(image)
        assert outline.geometry_equal(image)
        anatomy = EmulatedPatient(100, 2, 1).anatomy(Grid.slab(4, (4.0, 4.0, 4.0)), study=1)
        order = np.argsort([image.get_plane_position(i)[0].ImagePositionPatient[2] for i in range(4)])
        assert_array_equal(outline.array[order], anatomy.lesion_mask)

    def test_segment_carries_the_plans_label(self, tmp_path):
        plan = small_plan(labels=("background", "plaque"), simulation={"patients": 1, "slices": 2})
        emulate(plan, n_sites=1, folder=tmp_path, seed=100)
        segmentation = hd.seg.segread(next(tmp_path.rglob("seg.dcm")))
        assert segmentation.get_segment_description(1).segment_label == "plaque"
        assert segmentation.number_of_segments == 1
        assert segmentation.segmentation_type == hd.seg.SegmentationTypeValues.BINARY


class TestFolderIsFilledOnce:
    @pytest.fixture
    def plan(self):
        return small_plan(simulation={"patients": 1, "slices": 1})

    @pytest.fixture
    def calls(self):
        return []

    @pytest.fixture
    def fill(self, plan, tmp_path, calls):
        def fill(seed=100):
            return emulate(plan, n_sites=2, folder=tmp_path, seed=seed, progress=lambda *call: calls.append(call))

        return fill

    def test_progress_counts_patients(self, fill, calls):
        fill()
        assert calls == [(1, 2), (2, 2)]

    def test_second_time_nothing_is_made(self, fill, calls):
        """
        The manifest matches, so the folder is used as it is and the same hospitals come back.
        """
        first = fill()
        calls.clear()
        assert fill() == first
        assert calls == []

    def test_another_seed_fills_it_afresh(self, fill, tmp_path):
        """
        Nothing of the earlier hospitals is left between the new ones.
        """
        fill(seed=100)
        fill(seed=101)
        assert {path.name for path in tmp_path.glob("site-*/*")} == {"EMU-101-1-001", "EMU-101-2-001"}

    def test_half_finished_folder_is_filled_afresh(self, fill, tmp_path, calls, monkeypatch):
        """
        Interrupted after the first patient there is no manifest, and the next attempt starts over.
        """

        def interrupted(assignments, workers):
            consortium._write_patient(assignments[0])
            raise KeyboardInterrupt
            yield

        with monkeypatch.context() as patched:
            patched.setattr(consortium, "_each", interrupted)
            with pytest.raises(KeyboardInterrupt):
                fill()
        assert not (tmp_path / "manifest.json").exists()

        fill()
        assert calls == [(1, 2), (2, 2)]
        assert (tmp_path / "manifest.json").exists()

    def test_missing_file_is_noticed(self, fill, tmp_path, calls):
        fill()
        next(tmp_path.rglob("seg.dcm")).unlink()
        calls.clear()
        fill()
        assert calls == [(1, 2), (2, 2)]

    def test_manifest_says_what_the_files_depend_on(self, fill, tmp_path):
        fill()
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        assert manifest["inputs"]["seed"] == 100
        assert manifest["inputs"]["scanners"] == list(SCANNERS)[:2]
        assert manifest["files"] == len(list(tmp_path.rglob("*.dcm")))

    def test_somebody_elses_files_are_left_alone(self, fill, tmp_path):
        """
        A folder with a site-1 that no emulation made is refused, and its files stay.
        """
        theirs = tmp_path / "site-1" / "scan.dcm"
        theirs.parent.mkdir()
        theirs.write_bytes(b"precious")
        with pytest.raises(FederadError, match="R231"):
            fill()
        assert theirs.read_bytes() == b"precious"


@pytest.fixture(scope="module")
def study_of_two(tmp_path_factory):
    """Of a hospital that takes a second series of every patient."""
    plan = small_plan(simulation={"scanners": ["siemens-t1gd-3t"], "second_series": "united-pd-3t", "patients": 8})
    (hospital,) = emulate(plan, n_sites=1, folder=tmp_path_factory.mktemp("two"), seed=100)
    return hospital.folder / "EMU-100-1-001" / "study-1"


class TestSecondSeries:
    def test_second_series_is_the_same_patient_on_the_same_device(self, study_of_two):
        """
        Another sequence and another series of one study: the slices lie where the first one's lie, and show otherwise.
        """
        first = slices_of(study_of_two)
        second = [pydicom.dcmread(path) for path in sorted(study_of_two.glob("second-*.dcm"))]

        assert len(first) == len(second) == 4
        for one, other in zip(first, second, strict=True):
            for same in (
                "PatientID",
                "StudyInstanceUID",
                "FrameOfReferenceUID",
                "ImagePositionPatient",
                "Manufacturer",
            ):
                assert one[same].value == other[same].value
            assert one.MagneticFieldStrength == other.MagneticFieldStrength
            assert (one.SeriesDescription, other.SeriesDescription) == ("t1_mprage_tra_gd", "pd_fse_tra")
            assert np.corrcoef(one.pixel_array.ravel(), other.pixel_array.ravel())[0, 1] < 0.95
            assert "ContrastBolusAgent" in one
            assert "ContrastBolusAgent" not in other
        uids = {ds.SOPInstanceUID for ds in (*first, *second)}
        assert len(uids) == 8
        assert len({ds.SeriesInstanceUID for ds in (*first, *second)}) == 2

    def test_first_series_is_what_it_is_without(self, study_of_two, tmp_path):
        """
        Byte by byte, with its outline.
        """
        plan = small_plan(simulation={"scanners": ["siemens-t1gd-3t"]})
        (alone,) = emulate(plan, n_sites=1, folder=tmp_path, seed=100)
        without = files_of(alone.folder / "EMU-100-1-001" / "study-1")

        assert without == {
            name: digest for name, digest in files_of(study_of_two).items() if not name.startswith("second")
        }

    def test_channels_of_a_plan_are_found_by_their_descriptions(self, study_of_two, tmp_path):
        """
        A plan that names both sequences gets both, in its order, with the outline on them.
        """
        plan = small_plan(
            data={"channels": ["pd", "t1"]},
            simulation={"scanners": ["siemens-t1gd-3t"], "second_series": "united-pd-3t"},
        )
        site = SiteFolder("site-1", study_of_two.parents[1], tmp_path / "station")
        prepare_stations(plan, [site], seed=0, workers=1, on_site=lambda _: None)
        cohort = cohort_of(site, plan)
        (volume, *_) = (
            cohort.volume(s) for split in ("train", "test") for p in cohort.patients(split) for s in p.studies
        )
        inside = volume.label == 1

        assert volume.image.shape[0] == 2
        assert all(channel[inside].mean() > 1 for channel in volume.image)
        assert not np.allclose(volume.image[0], volume.image[1], atol=0.5)


class TestRefusals:
    @pytest.mark.parametrize(
        ("plan", "says"),
        [
            (small_plan(simulation={"scanners": ["siemens-t1-7t"]}), "siemens-t1-7t"),
            (small_plan(simulation={"slices": 46}), "slices = 45 or fewer"),
            (small_plan(labels=("background", "oedema", "core")), "2 structures"),
            (small_plan(data={"modality": "OP"}), 'modality = "MR"'),
            (small_plan(simulation={"second_series": "united-pd-7t"}), "united-pd-7t"),
        ],
        ids=["scanner", "slices", "labels", "modality", "second series"],
    )
    def test_what_is_not_emulated_is_refused_before_anything_is_written(self, plan, says, tmp_path):
        """
        R230 names the value and the way out; the folder is not even created.
        """
        with pytest.raises(FederadError) as refusal:
            emulate(plan, n_sites=1, folder=tmp_path / "out", seed=100)
        assert refusal.value.code == "R230"
        assert says in str(refusal.value)
        assert not (tmp_path / "out").exists()

    def test_unknown_scanner_is_answered_with_the_known_ones(self, tmp_path):
        with pytest.raises(FederadError) as refusal:
            emulate(small_plan(simulation={"scanners": ["mystery"]}), n_sites=1, folder=tmp_path, seed=100)
        assert all(name in str(refusal.value) for name in SCANNERS)


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """Two hospitals of which one has no lesions."""
    plan = small_plan(simulation={"patients": 6, "slices": 2, "prevalence": [0.5, 0.0]})
    return emulate(plan, n_sites=2, folder=tmp_path_factory.mktemp("prevalence"), seed=100)


class TestPrevalence:
    def test_table_says_who_has_a_lesion(self, sites):
        """
        In the plan's words; the outline of those who have none is empty, and it is the same one otherwise.
        """
        for site, n_expected in zip(sites, (range(1, 6), [0]), strict=True):
            with (site.folder / "labels.csv").open() as lines:
                labels = {row["patient"]: row["label"] for row in csv.DictReader(lines)}
            assert set(labels) == {path.name for path in site.folder.iterdir() if path.is_dir()}
            for patient, label in labels.items():
                seg = hd.seg.segread(site.folder / patient / "study-1" / "seg.dcm")
                assert seg.pixel_array.any() == (label == "lesion")
            assert sum(label == "lesion" for label in labels.values()) in n_expected

    def test_head_without_lesions_is_the_same_head(self):
        """
        What is not lesion stays as it is, and a patient of a rarer disease is among those of a commoner.
        """
        patient, grid = EmulatedPatient(100, 1, 1), Grid.slab(2, (4.0, 4.0, 4.0))
        healthy, ill = (patient.anatomy(grid, 1, with_lesions=on) for on in (False, True))
        elsewhere = ill.tissues[-1] == 0

        assert not healthy.lesion_mask.any()
        assert not healthy.tissues[-1].any()
        assert_array_equal(healthy.tissues[:, elsewhere], ill.tissues[:, elsewhere])
        patients = [EmulatedPatient(100, 1, k) for k in range(50)]
        assert {p.index for p in patients if p.has_lesion(0.2)} < {p.index for p in patients if p.has_lesion(0.6)}
        assert not any(p.has_lesion(0.0) for p in patients)
        assert all(p.has_lesion(1.0) for p in patients)

    def test_plan_without_prevalence_gives_the_files_it_always_gave(self, hospitals):
        """
        No table, and everybody has a lesion.
        """
        assert not (hospitals[0].folder / "labels.csv").exists()

    def test_same_patient_with_and_without_lesions_has_other_identifiers(self, sites, tmp_path):
        """
        Two files that differ never share a UID.
        """
        everybody = emulate(small_plan(simulation={"patients": 6, "slices": 2}), n_sites=2, folder=tmp_path, seed=100)
        one, other = (
            pydicom.dcmread(s[1].folder / "EMU-100-2-001" / "study-1" / "im-001.dcm") for s in (sites, everybody)
        )

        assert one.PixelData != other.PixelData
        assert one.SOPInstanceUID != other.SOPInstanceUID
