"""Patients and plans go: consent is withdrawn, a plan is wiped; and of those who stay nobody is named anywhere."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path

import pydicom
import pytest
from deployed import Operator, ask_of, make_site
from releases import publish
from typer.testing import CliRunner

from client import exclusions
from client.cli import app
from client.data.keys import key_of
from client.folder import SiteFolder
from client.inference import predict
from client.station import Station
from shared_models.errors import FederadError
from shared_models.messages import decode_answer

PATIENTS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def prepared(smoke_plan, hospitals, tmp_path_factory):
    """A site that has approved the plan, and its operator; to be copied."""
    root, operator = tmp_path_factory.mktemp("leaving") / "site", Operator()
    folder = make_site(root, hospitals[0].folder, operator)
    station = Station(folder.station)
    station.offer(operator.sign(smoke_plan))
    station.approve(smoke_plan)
    return folder, operator


@pytest.fixture
def site(prepared, tmp_path) -> SiteFolder:
    return SiteFolder(shutil.copytree(prepared[0].root, tmp_path / "site", ignore=shutil.ignore_patterns("*.sock")))


@pytest.fixture
def names(hospitals) -> list[str]:
    """PatientIDs of the hospital, sorted."""
    files = hospitals[0].folder.rglob("*.dcm")
    return sorted({str(pydicom.dcmread(file, specific_tags=["PatientID"]).PatientID) for file in files})


def people(station: Station, plan) -> set[str]:
    return {patient.key for split in PATIENTS for patient in station.cohort(plan).patients(split)}


def events(station: Station, word: str) -> list[dict]:
    return [entry for entry in station.audit.entries() if entry["event"] == word]


def code_of(work) -> str:
    with pytest.raises(FederadError) as caught:
        work()
    assert caught.value.remedies
    return caught.value.code


class TestExclusion:
    def test_excluded_patient_is_in_no_cohort_that_was_approved_before(self, site, smoke_plan, names):
        """
        From the next question on, in an open station, too; the prepared volume is gone, everybody else is as before.
        """
        station = Station(site.station)
        before, volumes = people(station, smoke_plan), set(site.station.glob("cohorts/*/volumes/*"))
        gone = key_of((site.station / "secret").read_bytes(), names[0])

        done = Station(site.station).exclude([names[0]])

        assert people(station, smoke_plan) == before - {gone}
        assert station.cohort(smoke_plan).n_excluded == 1
        assert len(volumes - set(site.station.glob("cohorts/*/volumes/*"))) == done.volumes_removed == 1
        assert (done.named, done.changed, done.in_all, done.in_catalogue) == (1, 1, 1, 1)

    def test_round_is_trained_without_the_excluded(self, site, smoke_plan, names):
        """
        Whoever was in training is not counted there any more, and the audit of the answer says how many are left out.
        """
        station, secret = Station(site.station), (site.station / "secret").read_bytes()
        training = {patient.key for patient in station.cohort(smoke_plan).patients("train")}
        left_out = next(name for name in names if key_of(secret, name) in training)
        station.exclude([left_out])

        answer = decode_answer(station.answer(ask_of(smoke_plan)))

        assert answer.counts["trained"] == len(training) - 1
        assert [entry["excluded"] for entry in events(station, "answer")] == [1]

    def test_approving_anew_leaves_them_out_with_a_counted_reason(self, site, smoke_plan, names):
        """
        A plan that is prepared afterwards does not see them; when they are taken back, they come back.
        """
        station = Station(site.station)
        everybody = people(station, smoke_plan)
        station.exclude(names[:2])

        cohort = station.approve(smoke_plan)
        reasons = [one.reason.value for one in cohort.skipped]
        station.exclude(names[:2], take_back=True)
        station.approve(smoke_plan)

        assert (cohort.n_excluded, reasons.count("consent withdrawn")) == (2, 2)
        assert people(station, smoke_plan) == everybody

    def test_any_identifier_of_a_patient_will_do(self, site, smoke_plan, names, hospitals, tmp_path):
        """
        Where the site's table says that two numbers are one person, either leaves that person out.
        """
        data = shutil.copytree(hospitals[0].folder, tmp_path / "data")
        (data / "patients.csv").write_text(f"identifier,patient\nOLD-NUMBER,{names[0]}\n")
        station = Station(site.station)
        station.config = station.config.model_copy(update={"data": str(data)})
        before = people(station, smoke_plan)

        done = station.exclude(["OLD-NUMBER"])

        assert people(station, smoke_plan) == before - {key_of((site.station / "secret").read_bytes(), names[0])}
        assert (done.in_catalogue, done.volumes_removed) == (1, 1)

    def test_list_and_audit_hold_numbers_and_no_names(self, site, names):
        """
        Whoever reads them learns how many and when, and not who.
        """
        station = Station(site.station)
        station.exclude(names[:3])

        text = (site.station / exclusions.FILE).read_text() + (site.station / "audit.jsonl").read_text()
        (entry,) = events(station, "excluded")
        assert not [name for name in names if name in text]
        assert (entry["named"], entry["in_all"], entry["in_catalogue"]) == (3, 3, 3)

    def test_list_that_cannot_be_read_stops_everything(self, site, smoke_plan, names):
        """
        C127 rather than a round with somebody who may be on it.
        """
        station = Station(site.station)
        for content in (b"Doe^Jane\n", b"\xff\n", b"0123\n"):
            (site.station / exclusions.FILE).write_bytes(content)
            assert code_of(lambda: station.cohort(smoke_plan)) == "C127"
            assert code_of(lambda: station.approve(smoke_plan)) == "C127"
            assert code_of(lambda: station.exclude(names[:1])) == "C127"
            assert decode_answer(station.answer(ask_of(smoke_plan))).refusal == "declined"

    def test_as_it_is_typed(self, site, names, tmp_path):
        """
        By name or from a file, with the number of those whom nobody knows here.
        """
        listed = tmp_path / "withdrawn.txt"
        listed.write_text(f"{names[1]}\n\nnobody-here\n")
        words = ["exclude", names[0], "--from", str(listed), "--site", str(site.root)]

        told = json.loads(CliRunner().invoke(app, [*words, "--json"]).output.splitlines()[-1])
        shown = CliRunner().invoke(app, words).output

        assert (told["named"], told["in_all"], told["in_catalogue"]) == (3, 3, 2)
        assert "1 of those named have no images here" in shown
        assert (
            code_of(lambda: CliRunner().invoke(app, ["exclude", "--site", str(site.root)], catch_exceptions=False))
            == "C163"
        )


class TestWipe:
    def test_wiped_plan_leaves_only_its_charges_and_the_audit(self, site, smoke_plan):
        """
        Every file of the list was there and is gone; ledger and audit are whole; the question is not answered again.
        """
        station = Station(site.station)
        station.answer(ask_of(smoke_plan))
        spent = len(station.ledger().spent().runs)
        before = {path: path.stat().st_size for path in site.station.rglob("*") if path.is_file()}
        station.refuse(smoke_plan)

        gone = station.wipe(smoke_plan)

        missing = {path: size for path, size in before.items() if not path.exists()}
        about = {"cohorts", "answers", "layouts", "own", "catalogue.sqlite", "catalogue.sqlite.seen"}
        assert sum(one.files for one in gone) == len([p for p in missing if about & set(p.parts)])
        assert sum(one.n_bytes for one in gone) == sum(size for p, size in missing.items() if about & set(p.parts))
        assert all(one.files > 0 for one in gone if "for itself" not in one.what)
        assert not [
            p for p in site.station.rglob("*") if p.is_file() and about & set(p.relative_to(site.station).parts)
        ]
        reopened = Station(site.station)
        assert reopened.audit.verify().n > 0
        assert len(reopened.ledger().spent().runs) == spent
        assert events(reopened, "wiped")[0]["gone"] == [one.as_json() for one in gone]

        reopened.approve(smoke_plan)
        assert decode_answer(reopened.answer(ask_of(smoke_plan))).refusal == "answered-before"

    def test_plan_in_use_is_not_wiped(self, site, smoke_plan):
        """
        C128 while it is approved, and while another plan trains on the same volumes.
        """
        station = Station(site.station)
        tables = json.loads(smoke_plan.canonical_json())
        other = type(smoke_plan).from_tables({**tables, "rounds": 3})
        assert code_of(lambda: station.wipe(smoke_plan)) == "C128"
        station.approve(other)
        station.refuse(smoke_plan)
        assert code_of(lambda: station.wipe(smoke_plan)) == "C128"
        assert people(station, other)

    def test_as_it_is_typed(self, site, smoke_plan):
        """
        The list with sizes, and why ledger and audit stay.
        """
        words = ["--site", str(site.root)]
        CliRunner().invoke(app, ["refuse", smoke_plan.name, *words], catch_exceptions=False)

        shown = CliRunner().invoke(app, ["wipe", smoke_plan.name, *words], catch_exceptions=False).output

        assert "prepared volumes" in shown
        assert "The ledger stays" in shown
        assert "The audit stays" in shown


PLANTED = {
    "PatientName": "Quixote^Dulcinea",
    "PatientID": "PLANTED-47110815",
    "PatientBirthDate": "19430219",
    "OtherPatientIDs": "SOCIAL-998877",
    "InstitutionName": "Hospital of La Mancha",
    "InstitutionAddress": "Windmill Road 7",
    "ReferringPhysicianName": "Panza^Sancho",
    "OperatorsName": "Rocinante^R",
    "AccessionNumber": "ACC-5544332211",
    "StudyDescription": "Head of Quixote",
    "SeriesDescription": "T2 Quixote^Dulcinea PLANTED-47110815 19430219",
    "ImageComments": "wife of Panza",
    "DeviceSerialNumber": "SER-66554433",
    "StationName": "BARATARIA1",
    "StudyID": "STU-123123123",
}


class TestNobodyIsNamed:
    def test_planted_identifiers_are_in_no_byte_that_is_kept_or_leaves(self, hospitals, smoke_plan, tmp_path, caplog):
        """
        Names, numbers, dates, UIDs and folder names of a cohort are nowhere in cache, catalogue, ledger, audit, logs,
        answers, notices, nor in a prediction whose identifiers are mapped; nor are their hashes without the secret.
        """
        caplog.set_level(logging.DEBUG)
        data, words = planted(hospitals[0].folder, tmp_path / "data")
        operator = Operator()
        folder = make_site(tmp_path / "site", data, operator)
        station = Station(folder.station)
        station.offer(operator.sign(smoke_plan))
        station.approve(smoke_plan)
        left = [station.answer(ask_of(smoke_plan)), station.answer(ask_of(smoke_plan, round_=2, kind="validate"))]
        station.exclude([PLANTED["PatientID"]])
        left += station.outbox()[1]
        from releases import CONSORTIUM

        station.trust(CONSORTIUM, operator.public_pem)
        sha256 = publish(folder.releases, operator.key, smoke_plan).sha256
        made = predict(folder, sha256, next(data.glob("Quixote*")), tmp_path / "out", deidentified=True)

        kept = [path.read_bytes() for root in (folder.root, made.folder) for path in root.rglob("*") if path.is_file()]
        everything = b"\0".join([*kept, *left, caplog.text.encode()])
        assert len(everything) > 100_000
        for word in words:
            for form in (word.encode(), word.encode("utf-16-le"), word.lower().encode(), hashed(word)):
                assert form not in everything, word

    def test_scan_finds_what_is_planted(self, hospitals, tmp_path):
        """
        The same words are all in the images that were given.
        """
        data, words = planted(hospitals[0].folder, tmp_path / "data")

        everything = b"".join(p.read_bytes() for p in data.rglob("*") if p.is_file())
        everything += " ".join(str(p) for p in data.rglob("*")).encode()
        assert not [word for word in words if word.encode() not in everything]


def hashed(word: str) -> bytes:
    return hashlib.sha256(word.encode()).hexdigest()[:16].encode()


def planted(source: Path, data: Path) -> tuple[Path, set[str]]:
    """A copy of a hospital's images in which one patient has identifiers in every place, and all of those."""
    shutil.copytree(source, data)
    patient = next(path for path in sorted(data.iterdir()) if path.is_dir())
    patient = patient.rename(data / "Quixote_Dulcinea_47110815")
    words = {"Quixote", "Dulcinea", "Panza", "47110815", *PLANTED.values()} - {PLANTED["SeriesDescription"]}
    for file in patient.rglob("*.dcm"):
        image = pydicom.dcmread(file)
        for keyword, value in PLANTED.items():
            setattr(image, keyword, value)
        image.StudyDate = image.SeriesDate = "20240229"
        image.add_new(0x00091001, "LO", "private Quixote")
        image.save_as(file)
        words |= {str(image.StudyInstanceUID), str(image.SeriesInstanceUID), str(image.SOPInstanceUID), "20240229"}
    return data, words
