"""De-identification of headers, held against every line of DICOM PS3.15, table E.1-1."""

from __future__ import annotations

import re

import pydicom
import pytest
from pydicom import DataElement, Dataset
from pydicom.data import get_testdata_file
from pydicom.datadict import dictionary_VR, keyword_for_tag
from pydicom.uid import UID, ExplicitVRLittleEndian

from client.data.deidentify import TABLE, Deidentifier, action_for
from client.data.keys import key_of

SECRET = b"a secret of the tests, 32 bytes!"
CANARY = "Quixote"

VALUES = {
    "AE": CANARY, "AS": "045Y", "CS": "QUIXOTE", "DA": "19430219", "DS": "47.11", "DT": "19430219101112.5", "IS": "4711",
    "LO": CANARY, "LT": CANARY, "PN": f"{CANARY}^D", "SH": CANARY, "ST": CANARY, "TM": "101112", "UC": CANARY,
    "UI": "1.2.826.0.1.4711.19430219", "UR": f"http://{CANARY}", "UT": CANARY, "OB": CANARY.encode() + b"\0",
    "OW": CANARY.encode() + b"\0", "UN": CANARY.encode(), "US": 4711, "UL": 4711, "FD": 47.11, "FL": 47.11, "SS": 4711,
}  # fmt: skip


def rows() -> list[tuple[int, str, str]]:
    """Tag, keyword and action of each line; of a repeating group its first."""
    lines = [line.split("\t") for line in TABLE.read_text().splitlines() if not line.startswith("#")][1:]
    return [
        (int(tag.replace("50xxxxxx", "50000005").replace("x", "0"), 16), keyword, (dates or [basic])[0])
        for tag, keyword, basic, *dates in lines
    ]


def element(tag: int) -> DataElement:
    """An attribute with something in it that must not stay."""
    vr = dictionary_VR(tag).split(" or ")[0]
    if vr == "SQ":
        inner = Dataset()
        inner.PersonName = CANARY
        if action_for(tag) != "X/Z/U*":  # references stay, with what else they hold
            inner.CodeMeaning = inner.CodeValue = CANARY
        inner.ReferencedSOPInstanceUID = VALUES["UI"]
        return DataElement(tag, vr, [inner])
    return DataElement(tag, vr, VALUES[vr])


def cleaned(data: Dataset) -> tuple[Dataset, Deidentifier]:
    worker = Deidentifier(SECRET)
    return worker.apply(data), worker


def patient(**tags) -> Dataset:
    data = Dataset()
    data.PatientID, data.SOPClassUID, data.SOPInstanceUID = "P-1", UID("1.2.840.10008.5.1.4.1.1.4"), "1.2.3.4711"
    for keyword, value in tags.items():
        setattr(data, keyword, value)
    return data


class TestTable:
    def test_table_is_whole(self):
        """
        All 620 lines of the standard's table that name an attribute or a repeating group, each with actions that it knows;
        private attributes are the one line that is code.
        """
        found = rows()

        assert len(found) == len({tag for tag, *_ in found}) == 620
        assert {action for *_, action in found} <= {"X", "Z", "D", "U", "C", "X/Z", "X/D", "Z/D", "X/Z/D", "X/Z/U*"}
        for tag, keyword, _ in found:
            assert keyword_for_tag(tag) in (keyword, "") or tag >> 24 in (0x50, 0x60), keyword

    @pytest.mark.parametrize("depth", [0, 1, 2], ids=["on top", "in a sequence", "in a sequence of a sequence"])
    def test_every_attribute_gets_its_action_wherever_it_stands(self, depth):
        """
        Removed, empty, a dummy, a mapped UID or an earlier date; never what it was.
        """
        for tag, keyword, action in rows():
            if tag >> 16 in (0x0000, 0x0002, 0x0004):
                continue  # of messages, of the file's own header and of directories: no data set holds them
            inner = Dataset()
            inner.add(element(tag))
            data = inner
            for _ in range(depth):
                data, held = Dataset(), data
                data.add_new(0x00081115 if depth == 1 else 0x300A00B0, "SQ", [held])
            data.PatientID = "P-1"

            made, _ = cleaned(data)

            for _ in range(depth):
                made = made[0x00081115 if depth == 1 else 0x300A00B0].value[0]
            after = made.get(tag)
            text = "" if after is None else str(after.value)
            for word in (CANARY, "QUIXOTE", "19430219", "4711"):
                assert word not in re.sub(r"2\.25\.\d+", "", text), keyword
            if action == "X":
                assert after is None, keyword
            elif action in ("D", "U"):
                assert after is not None, keyword
                assert not after.is_empty, keyword
            elif after is not None and action == "Z" and after.keyword not in ("PatientID", "PatientName"):
                assert after.is_empty, keyword

    def test_private_attributes_and_overlays_go_at_every_depth(self):
        """
        Whatever group they are in; so does what is of no known kind.
        """
        inner = Dataset()
        inner.add_new(0x00291010, "LO", CANARY)
        data = patient(ReferencedImageSequence=[inner])
        data.add_new(0x00091001, "LO", CANARY)
        data.add_new(0x60023000, "OW", b"\1\1")
        data.add_new(0x50040010, "US", 1)
        data.add_new(0x0008FFF0, "UN", CANARY.encode())

        made, worker = cleaned(data)

        assert CANARY not in str(made)
        assert worker.handled.private_removed == 2
        assert not [one for one in made.iterall() if one.tag.group in (0x6002, 0x5004) or one.tag.is_private]


class TestMaps:
    def test_same_identifier_becomes_the_same_thing_everywhere(self):
        """
        In two objects, as a single UID and in a list, at the top and in a reference; not at another site.
        """
        reference = Dataset()
        reference.ReferencedSOPInstanceUID = "1.2.3.4711"
        one, _ = cleaned(patient())
        other, _ = cleaned(patient(SOPInstanceUID="1.2.3.5", SourceImageSequence=[reference]))

        mapped = other.SourceImageSequence[0].ReferencedSOPInstanceUID
        assert one.SOPInstanceUID == mapped == one.file_meta.MediaStorageSOPInstanceUID
        assert UID(mapped).is_valid
        assert mapped.startswith("2.25.")
        assert Deidentifier(b"elsewhere").uid("1.2.3.4711") != mapped
        assert one.PatientID == other.PatientID == key_of(SECRET, "P-1")
        assert one.SOPClassUID == "1.2.840.10008.5.1.4.1.1.4"

    def test_dates_of_a_patient_keep_their_distances(self):
        """
        All move back by one number of days, which another patient does not share; times of day stay.
        """
        made, _ = cleaned(patient(StudyDate="20240301", AcquisitionDateTime="20240229235959.5", StudyTime="101500"))
        other, _ = cleaned(patient(PatientID="P-2", StudyDate="20240301"))

        days = Deidentifier(SECRET).days("P-1")
        assert made.StudyDate == (pydicom.valuerep.DA("20240301") - _days(days)).strftime("%Y%m%d")
        between = pydicom.valuerep.DA(made.StudyDate) - pydicom.valuerep.DA(made.AcquisitionDateTime[:8])
        assert between == _days(1)
        assert made.AcquisitionDateTime.endswith("235959.5")
        assert made.StudyTime == "101500"
        assert other.StudyDate != made.StudyDate
        assert 1 <= days <= 3652

    def test_date_that_is_none_is_removed(self):
        """
        Text in the place of a date may be anything.
        """
        data = patient()
        with pydicom.config.disable_value_validation():
            data.add(DataElement("StudyDate", "DA", "Quixote's"))
            made, _ = cleaned(data)

        assert "StudyDate" not in made


class TestResult:
    def test_it_says_what_was_done_and_what_was_not(self):
        """
        In the object, by the standard's codes; in the report, with attributes of text that the table does not name.
        """
        made, worker = cleaned(patient(Manufacturer="Acme", InstitutionName="La Mancha", BurnedInAnnotation="YES"))

        assert made.PatientIdentityRemoved == "YES"
        assert [one.CodeValue for one in made.DeidentificationMethodCodeSequence] == ["113100", "113107"]
        assert made.LongitudinalTemporalInformationModified == "MODIFIED"
        report = worker.handled.as_json()
        assert report["replaced"] == {"InstitutionName": 1, "PatientID": 1}
        assert report["not_handled"]["text_of_attributes_outside_the_table"] == {"Manufacturer": 1}
        assert "Acme" not in str(report)

    def test_given_object_stays_as_it_was(self):
        """
        And nothing of its file header but the encoding comes along.
        """
        data = patient(PatientName="Doe^Jane")
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.SourceApplicationEntityTitle = "QUIXOTE"

        made, _ = cleaned(data)

        assert data.PatientName == "Doe^Jane"
        assert "SourceApplicationEntityTitle" not in made.file_meta
        assert made.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian

    @pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "rtplan.dcm", "liver_1frame.dcm"])
    def test_real_objects_stay_readable_and_lose_their_identifiers(self, name, tmp_path):
        """
        Written and read again, with no word of the patient, of a person or of an institution left.
        """
        data = pydicom.dcmread(get_testdata_file(name))
        people = [one for one in data.iterall() if one.VR == "PN" and one.value]
        people += [data[k] for k in ("PatientID", "StudyInstanceUID", "StudyDate") if data.get(k)]

        made, _ = cleaned(data)
        made.save_as(tmp_path / "out.dcm", enforce_file_format=True)

        read = (tmp_path / "out.dcm").read_bytes()
        pydicom.dcmread(tmp_path / "out.dcm")
        for one in people:
            for word in re.split(r"[\^= ]+", str(one.value)):
                assert len(word) < 4 or word.encode() not in read, (name, one.keyword)


def _days(n: int):
    from datetime import timedelta

    return timedelta(days=n)


def test_action_of_an_attribute_outside_the_table_is_none():
    """
    Rows and Modality stay; an overlay's rows go nowhere but with its group.
    """
    assert action_for(0x00280010) is None
    assert action_for(0x00080060) is None
    assert action_for(0x60103000) == "X"
