"""Studies come from the hospital's archive into the site's folder: those that were asked for, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pydicom
import pytest
from archives import needs_orthanc, orthanc
from operators import free_port
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, RLELossless, generate_uid
from pynetdicom import AE, evt
from typer.testing import CliRunner

from client import retrieval
from client.archive import Failure, FetchError, NotTakenError, Query, only_part
from client.cli import app
from client.data.catalogue import INCOMING, Catalogue
from client.data.keys import key_of
from client.delivery import deliver
from client.exclusions import write as exclude
from client.folder import SiteFolder
from client.retrieval import Kept, query, retrieve
from client.site import Pacs, SiteConfig
from client.station import Station
from shared_models.errors import FederadError

EVERYTHING = Query(modality="MR")


@pytest.fixture
def site(tmp_path):
    """A site with an empty folder of images, which is told its archive."""

    def site(pacs: Pacs) -> SiteFolder:
        folder = SiteFolder(tmp_path / "site")
        folder.make()
        (tmp_path / "data").mkdir()
        Station.create(folder.station, SiteConfig(name="site-a", data=str(tmp_path / "data"), pacs=pacs))
        return folder

    return site


def objects(folder: Path) -> dict[str, pydicom.Dataset]:
    """Settled objects by UID."""
    found = [pydicom.dcmread(file) for file in folder.glob("data/retrieved/[0-9]*/*.dcm")]
    return {one.SOPInstanceUID: one for one in found}


def refused(code: str, work) -> str:
    with pytest.raises(FederadError) as caught:
        work()
    assert caught.value.code == code
    assert caught.value.remedies
    return caught.value.happened


class TestQuery:
    def test_values_become_keys_of_the_search(self):
        """
        One search for each pair of patient and accession number; blank lines and repetitions do not count.
        """
        asked = query(since="2024-01-01", until="2024-02-29", patients=["A ", "", "B", "A"], accessions=["7"])

        assert [(k["PatientID"], k["AccessionNumber"]) for k in asked.keys()] == [("A", "7"), ("B", "7")]  # noqa: SIM118
        assert {k["StudyDate"] for k in asked.keys()} == {"20240101-20240229"}  # noqa: SIM118

    @pytest.mark.parametrize(
        "given",
        [
            {},
            {"since": "yesterday"},
            {"since": "2024-02-30"},
            {"since": "2024-03-01", "until": "2024-02-01"},
            {"modality": "mr*"},
            {"description": "a\\b"},
            {"patients": ["SECRET-7", "*"]},
            {"accessions": ["SECRET-7?"]},
        ],
    )
    def test_query_that_is_none_is_refused(self, given):
        """
        Nothing asked for, no date, wildcards in a list: C119, which repeats nobody's number.
        """
        assert "SECRET" not in refused("C119", lambda: query(**given))

    def test_site_without_an_archive_is_told_so(self, tmp_path):
        """
        Nothing is fetched from anywhere that site.toml does not name.
        """
        folder = SiteFolder(tmp_path / "site")
        folder.make()
        Station.create(folder.station, SiteConfig(name="site-a", data=str(tmp_path)))

        refused("C163", lambda: retrieve(folder, EVERYTHING))


@pytest.fixture
def series(tmp_path, write_series):
    return write_series(tmp_path / "theirs", np.arange(128).reshape(2, 8, 8))


class TestKept:
    @pytest.fixture
    def kept(self, tmp_path):
        (tmp_path / "data").mkdir()
        kept = Kept(tmp_path / "data" / "retrieved", 10**9)
        kept.make()
        return kept

    @staticmethod
    def take(kept, uid: str, file: Path) -> Failure | None:
        try:
            kept.take(uid, [file.read_bytes()])
        except NotTakenError as error:
            return error.why
        return None

    def test_study_appears_when_all_of_it_has_come(self, tmp_path, kept, series):
        """
        Until then no catalogue sees any of it.
        """
        uids = [one.SOPInstanceUID for one in series.datasets]
        assert kept.begin(series.datasets[0].StudyInstanceUID, set(uids)) == set()
        assert self.take(kept, uids[0], series.files[0]) is None
        assert not kept.settle()
        with pytest.raises(FederadError, match="C140"):
            Catalogue.build(tmp_path / "catalogue", tmp_path / "data", secret=b"s")
        assert self.take(kept, uids[1], series.files[1]) is None
        assert kept.settle()

        assert len(Catalogue.build(tmp_path / "catalogue", tmp_path / "data", secret=b"s").studies()) == 1
        assert kept.begin(series.datasets[0].StudyInstanceUID, set(uids)) == set(uids)

    def test_object_that_nobody_asked_for_is_refused(self, tmp_path, kept, series, edit):
        """
        Another UID, another object under an expected UID, another study, no DICOM at all: nothing is written.
        """
        wanted, other = (one.SOPInstanceUID for one in series.datasets)
        kept.begin(series.datasets[0].StudyInstanceUID, {wanted})
        assert self.take(kept, other, series.files[1]) is Failure.NOT_ASKED
        assert self.take(kept, wanted, series.files[1]) is Failure.NOT_ASKED
        (tmp_path / "none").write_bytes(b"x" * 500)
        assert self.take(kept, wanted, tmp_path / "none") is Failure.NOT_ASKED
        edit(series.files[0], lambda one: setattr(one, "StudyInstanceUID", "1.2.3"))
        assert self.take(kept, wanted, series.files[0]) is Failure.NOT_ASKED

        assert not [p for p in (tmp_path / "data").rglob("*") if p.is_file()]
        assert kept.n_refused == 4

    @pytest.mark.parametrize("uid", ["../../x", "/x", "..", "1..2", ".1", "1.", "1/2", "", "1" * 65, "1\n", "a"])
    def test_uid_that_is_none_never_becomes_a_name(self, tmp_path, kept, uid, series):
        """
        Of a study or of an object, whoever gives it; nothing is written anywhere.
        """
        before = set(tmp_path.rglob("*"))
        with pytest.raises(FetchError, match="a UID that is none"):
            kept.begin(uid, set())
        kept.begin("1.2", {uid})
        assert self.take(kept, uid, series.files[0]) is Failure.BAD_UID

        assert {p for p in tmp_path.rglob("*") if p.name != "1.2"} == before

    def test_what_is_too_large_is_refused_before_it_is_written(self, kept, series, monkeypatch):
        """
        One object, and all together.
        """
        uid = series.datasets[0].SOPInstanceUID
        kept.begin(series.datasets[0].StudyInstanceUID, {uid})
        monkeypatch.setattr(retrieval, "OBJECT_BYTES", 100)
        assert self.take(kept, uid, series.files[0]) is Failure.TOO_LARGE
        monkeypatch.undo()
        kept.n_bytes = 10**9
        assert self.take(kept, uid, series.files[0]) is Failure.TOO_LARGE

    def test_full_disk_stops_with_its_own_error(self, kept, series, monkeypatch):
        """
        C120, and nothing half-written stays.
        """
        uid = series.datasets[0].SOPInstanceUID
        kept.begin(series.datasets[0].StudyInstanceUID, {uid})
        monkeypatch.setattr(retrieval, "SPARE_BYTES", 2**80)
        assert self.take(kept, uid, series.files[0]) is Failure.INCOMPLETE

        assert kept.trouble is not None
        assert kept.trouble.code == "C120"

    def test_folder_that_is_not_there_is_named(self, tmp_path):
        """
        C120: a folder of images that is not mounted is not made up.
        """
        refused("C120", Kept(tmp_path / "gone" / "retrieved", 1).make)


class TestMultipart:
    @pytest.mark.parametrize("n", [1, 7, 1000])
    def test_part_comes_out_whole_however_it_is_cut(self, n):
        """
        With and without a line before the boundary.
        """
        body = bytes(range(256)) * 3 + b"\r\n--x"
        message = b"--b\r\nContent-Type: application/dicom\r\n\r\n" + body + b"\r\n--b--\r\n"
        for whole in (message, b"\r\n" + message):
            chunks = [whole[k : k + n] for k in range(0, len(whole), n)]
            assert b"".join(only_part(chunks, 'multipart/related; type="application/dicom"; boundary="b"')) == body

    @pytest.mark.parametrize(
        ("content", "kind"),
        [
            (b"--b\r\n\r\nno end", "multipart/related; boundary=b"),
            (b"nothing", "multipart/related; boundary=b"),
            (b"<html>", "text/html"),
            (b"", "multipart/related"),
        ],
    )
    def test_message_that_is_cut_short_or_another_is_no_image(self, content, kind):
        """
        It is never taken for a whole one.
        """
        with pytest.raises(FetchError):
            b"".join(only_part([content], kind))


@contextmanager
def archive(series, *, title: str = "PACS", send=None, studies=None, objects=None, listen: int | None = None):
    """An archive of pynetdicom's own that may lie: gives how it is reached, and the statuses that its objects got.

    Parameters
    ----------
    send
        Data sets that it sends in place of those that it lists.
    studies, objects
        UIDs that it lists in place of the right ones.
    """
    listed = series.datasets
    statuses: list[int | None] = []

    def answer(status: int, **values):
        one = pydicom.Dataset()
        one.SpecificCharacterSet = "ISO_IR 192"
        for keyword, value in values.items():
            setattr(one, keyword, value)
        return status, one

    def find(event: evt.Event):
        first = listed[0]
        if event.identifier.QueryRetrieveLevel == "STUDY":
            for uid in studies or [first.StudyInstanceUID]:
                yield answer(0xFF00, StudyInstanceUID=uid, PatientID=first.PatientID, StudyDate="20240315")
        elif event.identifier.QueryRetrieveLevel == "SERIES":
            yield answer(0xFF00, SeriesInstanceUID=first.SeriesInstanceUID, Modality="MR")
        else:
            for uid in objects or [one.SOPInstanceUID for one in listed]:
                yield answer(0xFF00, SOPInstanceUID=uid, SOPClassUID=MRImageStorage)

    def get(_event: evt.Event):
        yield len(send or listed)
        for one in send or listed:
            yield 0xFF00, one

    def move(_event: evt.Event):
        yield "127.0.0.1", listen, {"ae_title": "FEDERAD"}
        yield len(send or listed)
        for one in send or listed:
            yield 0xFF00, one

    entity = AE(ae_title=title)
    entity.require_called_aet = True
    for model in ("1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.5.1.4.1.2.2.2", "1.2.840.10008.5.1.4.1.2.2.3"):
        entity.add_supported_context(model)
    entity.add_supported_context(MRImageStorage, ExplicitVRLittleEndian, scp_role=True, scu_role=True)
    entity.add_requested_context(MRImageStorage, ExplicitVRLittleEndian)
    handlers = [(evt.EVT_C_FIND, find), (evt.EVT_C_GET, get), (evt.EVT_C_MOVE, move)]
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
    try:
        port = server.socket.getsockname()[1]
        yield Pacs(host="127.0.0.1", port=port, ae_title="PACS", listen_port=listen), statuses
    finally:
        server.shutdown()


@pytest.mark.parametrize("way", ["C-GET", "C-MOVE"])
class TestArchiveThatLies:
    @pytest.fixture
    def listen(self, way):
        return free_port() if way == "C-MOVE" else None

    def test_what_was_asked_for_comes_once(self, tmp_path, site, series, listen):
        """
        As it was sent; a second time nothing is fetched.
        """
        with archive(series, listen=listen) as (pacs, _):
            folder = site(pacs)
            counted = retrieve(folder, EVERYTHING, dry_run=True)
            assert (counted.studies, counted.series, counted.fetched) == (1, 1, 0)
            assert not (tmp_path / "data" / "retrieved").exists()
            done = retrieve(folder, EVERYTHING)
            again = retrieve(folder, EVERYTHING)

        assert (done.complete, done.fetched, done.there, done.failed) == (1, 2, 0, {})
        assert (again.complete, again.fetched, again.there) == (1, 0, 2)
        assert objects(tmp_path) == {one.SOPInstanceUID: one for one in series.datasets}

    def test_objects_that_it_did_not_list_are_refused(self, tmp_path, site, series, write_series, listen):
        """
        The study is counted as failed, with the reason; what was asked for of it waits.
        """
        other = write_series(tmp_path / "other", np.ones((1, 8, 8), int), patient="P-2").datasets
        with archive(series, send=[series.datasets[0], *other], listen=listen) as (pacs, _):
            done = retrieve(site(pacs), EVERYTHING)

        assert done.failed == {Failure.NOT_ASKED: 1}
        assert done.refused == 1
        assert objects(tmp_path) == {}
        assert len(list((tmp_path / "data/retrieved" / INCOMING).rglob("*.dcm"))) == 1

    @pytest.mark.parametrize("lie", [{"studies": ["../../x"]}, {"objects": ["../../x"]}])
    def test_uid_that_is_none_is_counted(self, tmp_path, site, series, listen, lie):
        """
        Nothing is written under it.
        """
        with archive(series, listen=listen, **lie) as (pacs, _):
            done = retrieve(site(pacs), EVERYTHING)

        assert done.failed == {Failure.BAD_UID: 1}
        assert not list(tmp_path.glob("data/retrieved/**/*.dcm"))
        assert not [p for p in tmp_path.rglob("x*") if "site" not in p.parts]

    def test_patients_who_withdrew_are_not_fetched(self, tmp_path, site, series, listen):
        """
        They are counted.
        """
        with archive(series, listen=listen) as (pacs, _):
            folder = site(pacs)
            exclude(folder.station, [key_of((folder.station / "secret").read_bytes(), "P-1")])
            done = retrieve(folder, EVERYTHING)

        assert (done.studies, done.excluded, done.fetched) == (0, 1, 0)

    def test_answers_that_do_not_fit_the_query_are_left_aside(self, site, series, listen):
        """
        Archives ignore keys that they do not know.
        """
        with archive(series, listen=listen) as (pacs, _):
            folder = site(pacs)
            assert retrieve(folder, query(patients=["P-7"]), dry_run=True).studies == 0
            assert retrieve(folder, query(since="2024-03-16"), dry_run=True).studies == 0
            assert retrieve(folder, query(since="2024-03-15", patients=["P-1"]), dry_run=True).studies == 1


class TestListener:
    @staticmethod
    def store(port: int, calling: str, called: str, one: pydicom.Dataset) -> int | None:
        """The status that an object gets; None without an association."""
        entity = AE(ae_title=calling)
        entity.add_requested_context(MRImageStorage, ExplicitVRLittleEndian)
        association = entity.associate("127.0.0.1", port, ae_title=called)
        if not association.is_established:
            return None
        status = association.send_c_store(one).get("Status")
        association.release()
        return status

    def test_only_the_archive_may_send_and_only_what_was_asked_for(self, tmp_path, site, series):
        """
        Another title gets no association; the archive's own gets a refusal for what nobody asked for.
        """
        port, seen = free_port(), {}

        def meanwhile(_done: int, _total: int) -> None:
            seen["other"] = self.store(port, "OTHER", "FEDERAD", series.datasets[0])
            seen["called"] = self.store(port, "PACS", "ELSE", series.datasets[0])
            seen["archive"] = self.store(port, "PACS", "FEDERAD", series.datasets[0])

        with archive(series, listen=port) as (pacs, _):
            retrieve(site(pacs), EVERYTHING, on_progress=meanwhile)

        assert seen == {"other": None, "called": None, "archive": 0x0124}
        assert self.store(port, "PACS", "FEDERAD", series.datasets[0]) is None
        assert len(objects(tmp_path)) == 2

    def test_port_that_is_taken_is_named(self, site, series):
        """
        C122; only to count, nothing listens.
        """
        with archive(series) as (pacs, _):
            taken = pacs.model_copy(update={"listen_port": pacs.port})
            folder = site(taken)
            refused("C122", lambda: retrieve(folder, EVERYTHING))
            assert retrieve(folder, EVERYTHING, dry_run=True).studies == 1


class TestMessages:
    def test_archive_that_cannot_be_asked_is_named_and_no_patient(self, tmp_path, site, caplog, capsys):
        """
        C118 by each way; the query's identifiers stand neither in the message nor in a log.
        """
        port = free_port()
        folder = site(Pacs(host="127.0.0.1", port=port))
        asked = query(patients=["SECRET-7"], accessions=["SECRET-8"])
        said = [refused("C118", lambda: retrieve(folder, asked))]
        config = SiteConfig.load(folder.station)
        web = Pacs(dicomweb=f"http://127.0.0.1:{port}/dicom-web")
        config.model_copy(update={"pacs": web}).save(folder.station)
        said.append(refused("C118", lambda: retrieve(folder, asked)))

        printed = capsys.readouterr()
        assert "SECRET" not in "".join([*said, caplog.text, printed.out, printed.err])

    def test_command_counts(self, tmp_path, site, series):
        """
        --json gives the same numbers; failed studies are C121.
        """
        (tmp_path / "list").write_text("P-1\n")
        with archive(series) as (pacs, _):
            folder = site(pacs)
            typed = ["retrieve", "--patients", str(tmp_path / "list"), "--site", str(folder.root), "--json"]
            dry = CliRunner().invoke(app, [*typed, "--dry-run"])
            done = CliRunner().invoke(app, typed)
        with archive(series, objects=["x"]) as (pacs, _):
            config = SiteConfig.load(folder.station)
            config.model_copy(update={"pacs": pacs}).save(folder.station)
            failed = CliRunner().invoke(app, typed)

        assert json.loads(dry.stdout)["studies"] == 1
        assert json.loads(done.stdout)["fetched"] == 2
        assert isinstance(failed.exception, FederadError)
        assert failed.exception.code == "C121"
        assert "P-1" not in dry.output + done.output + failed.output + str(failed.exception)


@pytest.fixture(scope="module")
def listen_port():
    return free_port()


@pytest.fixture(scope="module")
def server(tmp_path_factory, listen_port):
    """Orthanc that knows this site, and where it listens: the address of its REST service and its DICOM port."""
    known = {"site": ["FEDERAD", "127.0.0.1", listen_port]}
    with orthanc(tmp_path_factory.mktemp("orthanc"), DicomModalities=known) as server:
        yield server


@pytest.mark.system
@needs_orthanc
@pytest.mark.parametrize("way", ["C-GET", "C-MOVE", "DICOMweb"])
class TestOrthanc:
    @pytest.fixture
    def pacs(self, server, way, listen_port):
        address, port = server
        if way == "DICOMweb":
            return Pacs(dicomweb=f"{address}/dicom-web")
        return Pacs(
            host="127.0.0.1", port=port, ae_title="ORTHANC", listen_port=listen_port if way == "C-MOVE" else None
        )

    @pytest.fixture
    def stored(self, server, tmp_path, write_series, write_seg):
        """A study with a series, its outline, and another series with run lengths; what else is there is removed."""
        address, port = server
        for one in json.load(urlopen(f"{address}/patients")):
            subprocess.run(["curl", "-sfX", "DELETE", f"{address}/patients/{one}"], check=True)
        study = generate_uid()
        rng = np.random.default_rng(0)
        first = write_series(tmp_path / "a", rng.integers(0, 900, (30, 20, 24)), study=study)
        second = write_series(tmp_path / "b", rng.integers(0, 900, (2, 20, 24)), study=study, description="T1")
        seg = write_seg(first, {"lesion": np.ones((30, 20, 24), bool)})
        for file in second.files:
            one = pydicom.dcmread(file)
            one.compress(RLELossless, generate_instance_uid=False)
            one.save_as(file)
        files = [*first.files, *second.files, seg]
        deliver(files, Pacs(host="127.0.0.1", port=port, ae_title="ORTHANC"))
        return {one.SOPInstanceUID: one for one in map(pydicom.dcmread, files)}

    def test_study_comes_as_it_is_stored(self, tmp_path, site, pacs, stored):
        """
        Pixel data are identical byte by byte in the syntax of the archive, and the catalogue has images and outline.
        """
        asked = query(since="2024-03-15", until="2024-03-15", modality="MR", patients=["P-1"], accessions=["A1"])
        folder = site(pacs)
        assert retrieve(folder, asked, dry_run=True).series == 3

        done = retrieve(folder, asked)

        assert (done.complete, done.fetched, done.failed) == (1, 33, {})
        came = objects(tmp_path)
        assert came.keys() == stored.keys()
        for uid, one in came.items():
            assert one.PixelData == stored[uid].PixelData
            assert one.file_meta.TransferSyntaxUID == stored[uid].file_meta.TransferSyntaxUID
        catalogue = Catalogue.build(tmp_path / "catalogue", tmp_path / "data", secret=b"s")
        (study,) = catalogue.studies()
        assert sorted(study.images) == ["t1", "t2 axial"]
        assert study.label is not None
        assert catalogue.skipped() == []

    def test_only_what_is_missing_is_fetched(self, tmp_path, site, pacs, stored):
        """
        Of a study that is here in part, whether settled or not, only the rest comes.
        """
        folder = site(pacs)
        retrieve(folder, EVERYTHING)
        study = next(iter(stored.values())).StudyInstanceUID
        settled = tmp_path / "data" / "retrieved" / study
        sorted(settled.iterdir())[0].unlink()
        assert retrieve(folder, EVERYTHING).fetched == 1

        settled.rename(tmp_path / "data" / "retrieved" / INCOMING / study)
        for file in sorted((tmp_path / "data" / "retrieved" / INCOMING / study).iterdir())[:2]:
            file.unlink()
        done = retrieve(folder, EVERYTHING)
        assert (done.fetched, done.there) == (2, 31)
        assert len(objects(tmp_path)) == 33

    def test_killed_in_the_middle_it_goes_on(self, tmp_path, site, pacs, stored):
        """
        Nothing half-written is ever settled, and what had come is not fetched again.
        """
        folder = site(pacs)
        command = [
            sys.executable,
            "-m",
            "client.cli",
            "retrieve",
            "--modality",
            "MR",
            "--site",
            str(folder.root),
            "--json",
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        incoming = tmp_path / "data" / "retrieved" / INCOMING
        until = time.monotonic() + 60
        while time.monotonic() < until and not list(incoming.glob("*/*.dcm")) and not objects(tmp_path):
            time.sleep(0.001)
        process.kill()
        process.wait()
        n_there = len(list(incoming.glob("*/*.dcm"))) + len(objects(tmp_path))
        assert 0 < n_there < 33, "killed too late to tell anything"

        done = retrieve(folder, EVERYTHING)

        assert (done.fetched, done.there) == (33 - n_there, n_there)
        assert objects(tmp_path).keys() == stored.keys()
        assert not list(incoming.rglob("*.*"))

    def test_archive_that_does_not_know_this_site(self, site, pacs, stored, way):
        """
        It is told why: C118, or for a destination that is not known a reason for the study.
        """
        if way == "DICOMweb":
            pacs = Pacs(dicomweb=f"{pacs.dicomweb}-not-there")
        elif way == "C-MOVE":
            pacs = pacs.model_copy(update={"calling_ae_title": "STRANGER"})
        else:
            pacs = pacs.model_copy(update={"ae_title": "ELSE"})

        refused("C118", lambda: retrieve(site(pacs), EVERYTHING))
