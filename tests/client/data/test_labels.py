"""A study's label comes from a table, a folder, a report or the header, and nobody guesses."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ComprehensiveSRStorage, ExplicitVRLittleEndian, generate_uid

from client.data.catalogue import Catalogue
from client.data.cohort import Cohort, cohort_key
from client.data.skips import Reason
from client.readiness import Readiness, against
from shared_models.errors import FederadError
from shared_models.plan import Plan


def plan_of(*, modality="MR", labels=("healthy", "Lesion"), attribute=None, dimensions=2, **data):
    task = {"kind": "classification", "labels": list(labels), "network": "resnet", "channels": [8, 16]}
    if attribute:
        task["label_attribute"] = attribute
    return Plan.from_tables(
        {
            "name": "test",
            "rounds": 1,
            "task": task,
            "data": {"modality": modality, "dimensions": dimensions, "patch": [16] * dimensions} | data,
        }
    )


@pytest.fixture
def build(tmp_path, secret):
    """Catalogue and cohort of a folder, as a station builds them."""

    def build(source, plan=None):
        catalogue = Catalogue.build(tmp_path / "catalogue.sqlite", source, secret=secret)
        return Cohort.build(tmp_path / "cohort", catalogue, plan or plan_of(), secret=secret)

    return build


@pytest.fixture
def folder(tmp_path, write_series):
    """Four patients without outlines; the first one was there twice."""
    for n in range(4):
        values = np.random.default_rng(n).integers(100, 1000, (2, 20, 24))
        write_series(tmp_path / "data" / f"P-{n}" / "first", values, patient=f"P-{n}", BodyPartExamined=f"PART {n % 2}")
    write_series(tmp_path / "data" / "P-0" / "second", values + 1, patient="P-0", BodyPartExamined="PART 0")
    return tmp_path / "data"


def table(folder, *rows, head="patient,label"):
    (folder / "labels.csv").write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")


def several(labels=("mass", "effusion")):
    """A plan whose studies have any number of labels."""
    plan = plan_of(labels=labels)
    return plan.model_copy(update={"task": plan.task.model_copy(update={"target": "multi-label"})})


def found(cohort):
    """How many studies have each label."""
    patients = [patient for split in ("train", "validation", "test") for patient in cohort.patients(split)]
    return Counter(cohort.volume(study).category for patient in patients for study in patient.studies)


def reasons(cohort):
    return Counter(skipped.reason for skipped in cohort.skipped)


class TestSeveralLabels:
    def test_study_has_every_label_of_its_cell_and_rows(self, build, folder, tmp_path, secret):
        """
        Joined by semicolons or bars, or in rows of their own; none says that nothing was found.
        """
        table(folder, "P-0,Mass; effusion", "P-1,none", "P-2,effusion", "P-2,mass", "P-3,effusion|")
        cohort = build(folder, several())

        assert found(cohort) == {0b00: 1, 0b10: 1, 0b11: 3}
        assert reasons(cohort) == {}

    def test_contradictions_and_other_words_are_skipped_and_counted(self, build, folder):
        """
        Nothing found and something found; a label that the plan does not name; no row at all.
        """
        table(folder, "P-0,mass", "P-1,none; mass", "P-2,mass; fracture")
        with pytest.raises(FederadError, match="C177"):  # only P-0 is left, with one label
            build(folder, several())
        table(folder, "P-0,mass", "P-1,none; mass", "P-2,mass; fracture", "P-3,none")
        cohort = build(folder, several())

        assert found(cohort) == {0b00: 1, 0b01: 2}
        assert reasons(cohort) == {Reason.LABELS_DISAGREE: 1, Reason.LABEL_UNKNOWN: 1}

    def test_page_of_a_check_counts_each_label(self, build, folder):
        """
        A study counts for each of its labels.
        """
        table(folder, "P-0,mass; effusion", "P-1,none", "P-2,effusion", "P-3,none")
        readiness = Readiness("site", "data", "cpu", "none", 1.0)
        against(readiness, several(), build(folder, several()))

        assert readiness.labels == {"mass": 2.0, "effusion": 3.0}

    def test_plans_of_one_label_and_of_several_share_no_cohort(self):
        """
        The same words mean other things.
        """
        assert cohort_key(several()) != cohort_key(plan_of(labels=("mass", "effusion")))


class TestTable:
    def test_row_labels_all_studies_of_a_patient(self, build, folder):
        """
        In the plan's words, whatever their case; images need no outline.
        """
        table(folder, "P-0,LESION", "P-1,healthy", "P-2, lesion", "P-3,Healthy")
        cohort = build(folder)

        assert found(cohort) == {0: 2, 1: 3}
        assert reasons(cohort) == {}
        study = cohort.patients("train")[0].studies[0]
        assert cohort.volume(study).label is None
        assert len(cohort.volume(study).foreground) == 0

    def test_study_can_have_a_label_of_its_own(self, build, folder):
        """
        A row with a Study Instance UID is for that study, whatever its patient's row says.
        """
        uid = dcmread(next((folder / "P-0" / "second").iterdir())).StudyInstanceUID
        table(folder, "P-0,,lesion", f"P-0,{uid},healthy", "P-1,,lesion", head="patient,study,label")

        assert found(build(folder)) == {0: 1, 1: 2}

    def test_rows_of_other_sites_are_left_aside(self, build, folder):
        """
        One table above several data folders names the folder in a column of its own.
        """
        table(folder.parent, "P-0,lesion,data", "P-0,healthy,other", "P-1,healthy,data", head="patient,label,site")

        assert found(build(folder)) == {0: 1, 1: 2}

    def test_what_has_no_usable_label_is_skipped_and_counted(self, build, folder):
        """
        No row, an empty word, a word outside the plan's set, two words for one patient.
        """
        table(folder, "P-0,lesion", "P-0,healthy", "P-1,tumour", "P-2,")
        with pytest.raises(FederadError, match="C141") as error:
            build(folder)

        assert "labels of one study disagree: 2" in error.value.happened
        assert "study without a label: 2" in error.value.happened
        assert "label outside the plan's set: 1" in error.value.happened

    @pytest.mark.parametrize("content", [b"name,word\nP-0,lesion\n", b"", b"patient,label\nP-0,\xff\xfe\n"])
    def test_table_that_is_none_is_an_error(self, build, folder, content):
        """
        Without its columns, empty, or not text.
        """
        (folder / "labels.csv").write_bytes(content)
        with pytest.raises(FederadError, match="C176"):
            build(folder)

    def test_site_with_one_label_is_refused(self, build, folder):
        """
        Nothing could be learned or measured there; the message has no names in it.
        """
        table(folder, *(f"P-{n},lesion" for n in range(4)))
        with pytest.raises(FederadError, match="C177") as error:
            build(folder)

        assert "All 5 studies" in error.value.happened
        assert "P-" not in str(error.value)

    def test_nothing_in_the_cohort_names_anybody(self, build, folder, tmp_path):
        """
        The table's identifiers are nowhere in what is kept.
        """
        table(folder, "P-0,lesion", "P-1,healthy")
        build(folder)
        kept = b"".join(path.read_bytes() for path in (tmp_path / "cohort").rglob("*.json"))

        assert b"P-0" not in kept
        assert b"lesion" not in kept.lower()


class TestNumbers:
    def plan(self, target="proportion", **task):
        plan = plan_of(labels=("background", "lesion"))
        tables = plan.model_dump(mode="json", exclude_none=True)
        kept = {key: tables["task"][key] for key in ("labels", "network", "channels")}
        return Plan.from_tables(
            {"name": "test", "rounds": 1, "task": {**kept, "kind": "quantification", "target": target, **task}}
            | {"data": {"modality": "MR", "dimensions": 2, "patch": [16, 16]}}
        )

    def intervals(self, cohort):
        patients = [patient for split in ("train", "validation", "test") for patient in cohort.patients(split)]
        return Counter(cohort.volume(study).interval for patient in patients for study in patient.studies)

    def test_numbers_and_intervals_are_read(self, build, folder, tmp_path, secret):
        """
        Exact ones have both ends alike; what was read is there again when the cohort is opened.
        """
        table(folder, "P-0,0.05-0.10", "P-1,0", "P-2,half", "P-3,0.2 – 1")
        built = build(folder, self.plan())
        opened = Cohort.open(tmp_path / "cohort", secret=secret)

        for cohort in (built, opened):
            assert self.intervals(cohort) == {(0.05, 0.1): 2, (0.0, 0.0): 1, (0.2, 1.0): 1}
            assert reasons(cohort) == {Reason.LABEL_UNKNOWN: 1}

    def test_page_of_a_check_counts_who_has_any(self, build, folder):
        """
        Studies without and with, in the plan's word.
        """
        table(folder, "P-0,0.05-0.10", "P-1,0", "P-2,0", "P-3,0-0.01")
        found = Readiness("site", "data", "cpu", "none", 1.0)
        against(found, self.plan(), build(folder, self.plan()))

        assert found.labels_are_of_studies
        assert found.labels == {"no lesion": 2, "lesion": 3}

    def test_what_is_no_such_number_is_skipped_and_counted(self, build, folder):
        """
        A word, a share above the whole, an interval from above to below, two numbers for one patient.
        """
        table(folder, "P-0,3", "P-1,some", "P-2,0.4-0.2", "P-3,0.1", "P-3,0.2")
        with pytest.raises(FederadError, match="C141") as error:
            build(folder, self.plan())

        assert "label outside the plan's set: 4" in error.value.happened
        assert "labels of one study disagree: 1" in error.value.happened

    def test_same_number_in_other_digits_is_no_contradiction(self, build, folder):
        """
        0.5 and 0.50 are one number, and counts go beyond one.
        """
        table(folder, "P-0,3", "P-0,3.0", "P-1,12", "P-2,10-20", "P-3,0")

        assert self.intervals(build(folder, self.plan("count"))) == {(3, 3): 2, (12, 12): 1, (10, 20): 1, (0, 0): 1}

    def test_site_with_one_number_is_refused(self, build, folder):
        """
        Nothing could be learned or measured there.
        """
        table(folder, *(f"P-{n},0.1" for n in range(4)))
        with pytest.raises(FederadError, match="C177") as error:
            build(folder, self.plan())

        assert "one and the same number" in error.value.happened

    def test_plans_of_other_numbers_share_no_cohort(self):
        """
        A count is no share, and neither is a word.
        """
        words = plan_of(labels=("background", "lesion"))
        keys = {cohort_key(plan) for plan in (self.plan(), self.plan("count"), words)}

        assert len(keys) == 3


class TestOtherSources:
    def test_attribute_of_the_header(self, build, folder):
        """
        The plan names it by its keyword, and no table counts then.
        """
        table(folder, "P-0,part 1", "P-1,part 0")

        assert found(build(folder, plan_of(labels=("part 0", "part 1"), attribute="BodyPartExamined"))) == {0: 3, 1: 2}

    def test_attribute_that_is_not_there(self, build, folder):
        """
        An empty attribute is no label.
        """
        with pytest.raises(FederadError, match="study without a label: 5"):
            build(folder, plan_of(attribute="PatientComments"))

    def test_folders_of_pictures(self, build, tmp_path, write_picture):
        """
        The folder below images/ is the label, and the same file name in two of them is two pictures.
        """
        for n, label in enumerate(("normal", "normal", "pneumonia")):
            write_picture(tmp_path / "data" / "images" / label / f"{n % 2}.png", np.full((20, 24), 10 + n, np.uint8))
        write_picture(tmp_path / "data" / "images" / "2.png", np.full((20, 24), 9, np.uint8))
        cohort = build(tmp_path / "data", plan_of(modality="DX", labels=("normal", "pneumonia")))

        assert found(cohort) == {0: 2, 1: 1}
        assert reasons(cohort) == {Reason.NOT_LABELLED: 1}

    def test_nifti_by_its_folder(self, build, tmp_path, write_nifti):
        """
        The top folder stands for the patient, its path for the study.
        """
        for n in range(3):
            values = np.random.default_rng(n).integers(1, 9, (10, 12, 4)).astype(np.int16)
            write_nifti(tmp_path / "data" / f"s{n}" / "t1.nii.gz", values)
        table(tmp_path / "data", "s0,,healthy", "s1,s1,lesion", "s2,elsewhere,lesion", head="patient,study,label")
        cohort = build(tmp_path / "data", plan_of(dimensions=3))

        assert found(cohort) == {0: 1, 1: 1}
        assert reasons(cohort) == {Reason.NOT_LABELLED: 1}


def write_report(folder, *values, verified="VERIFIED", name="report.dcm", patient=None):
    """A structured report beside the images in a folder: a heading, and within it a code for each value, or a text."""
    about = dcmread(next(path for path in sorted(folder.iterdir()) if path.name.startswith("im-")))
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = ComprehensiveSRStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.PatientID, ds.StudyInstanceUID = patient or about.PatientID, about.StudyInstanceUID
    ds.SeriesInstanceUID, ds.Modality, ds.VerificationFlag = generate_uid(), "SR", verified
    heading = Dataset()
    heading.ValueType, heading.ContentSequence = "CONTAINER", []
    for value in values:
        item, code = Dataset(), Dataset()
        if value.startswith("text:"):
            item.ValueType, item.TextValue = "TEXT", value.removeprefix("text:")
        else:
            code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "1", "99TEST", value
            item.ValueType, item.ConceptCodeSequence = "CODE", [code]
        heading.ContentSequence.append(item)
    ds.ContentSequence = [heading]
    ds.save_as(folder / name, enforce_file_format=True)


class TestReports:
    def test_verified_report_labels_its_study(self, build, folder):
        """
        By a code or a text that is a label of the plan, beside others that are none.
        """
        write_report(folder / "P-0" / "first", "Unremarkable", "Healthy")
        write_report(folder / "P-1" / "first", "text:LESION", "text:nothing of the lesion kind")

        cohort = build(folder)

        assert found(cohort) == {0: 1, 1: 1}
        assert reasons(cohort) == {Reason.NOT_LABELLED: 3}

    def test_table_comes_before_a_report(self, build, folder):
        """
        What the hospital wrote down for this purpose counts.
        """
        table(folder, "P-0,lesion", "P-1,healthy")
        write_report(folder / "P-0" / "first", "healthy")

        assert found(build(folder)) == {0: 1, 1: 2}

    def test_reports_that_say_two_things_are_counted(self, build, folder):
        """
        In one report or in two.
        """
        write_report(folder / "P-0" / "first", "healthy", "lesion")
        write_report(folder / "P-1" / "first", "healthy")
        write_report(folder / "P-1" / "first", "lesion", name="second.dcm")
        write_report(folder / "P-2" / "first", "healthy")
        write_report(folder / "P-3" / "first", "lesion")

        assert reasons(build(folder)) == {Reason.LABELS_DISAGREE: 2, Reason.NOT_LABELLED: 1}

    def test_report_that_nobody_answers_for_is_no_label(self, build, folder, tmp_path):
        """
        A program's prediction that came back from the archive, and a report without images.
        """
        write_report(folder / "P-0" / "first", "healthy", verified="UNVERIFIED")
        write_report(folder / "P-1" / "first", "lesion", patient="somebody else")
        table(folder, "P-2,healthy", "P-3,lesion")

        assert found(build(folder)) == {0: 1, 1: 1}
        skipped = Catalogue.open(tmp_path / "catalogue.sqlite").skipped()
        assert Counter(one.reason for one in skipped) == {Reason.NOT_AN_IMAGE: 2}


class TestOutlines:
    def test_outline_is_kept_for_the_heatmap(self, build, hospital):
        """
        Where somebody has drawn what the label is about, the report can say where a heatmap should point.
        """
        table(hospital, "P-0,lesion", "P-1,healthy", "P-2,lesion")
        cohort = build(hospital)
        volumes = [
            cohort.volume(s)
            for split in ("train", "validation", "test")
            for p in cohort.patients(split)
            for s in p.studies
        ]

        assert all(volume.label is not None and volume.label.sum() == 3 * 4 * 7 for volume in volumes)

    def test_outline_that_cannot_be_used_costs_nothing(self, build, hospital, edit):
        """
        A segmentation of something else is left aside, and the study is used.
        """
        table(hospital, "P-0,tumour", "P-1,healthy", "P-2,tumour")
        cohort = build(hospital, plan_of(labels=("healthy", "tumour")))

        assert found(cohort) == {0: 1, 1: 2}
        assert cohort.volume(cohort.patients("train")[0].studies[0]).label is None

    def test_plans_with_and_without_outlines_share_no_cohort(self, plan):
        """
        The same labels on the same data are another cohort, since other studies are usable.
        """
        drawn, told = plan(labels=("background", "lesion")), plan_of(labels=("background", "lesion"))

        assert cohort_key(drawn) != cohort_key(told)
        assert cohort_key(told) != cohort_key(plan_of(labels=("background", "lesion"), attribute="StudyDescription"))
