"""Who is who, and which file is which: identifiers are checked before anything rests on them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from client.data import reader
from client.data.catalogue import Catalogue
from client.data.skips import Reason
from shared_models.errors import FederadError


@pytest.fixture
def build(tmp_path, secret):
    return lambda source: Catalogue.build(tmp_path / "catalogue.sqlite", source, secret=secret)


def reasons(catalogue):
    return Counter(skip.reason for skip in catalogue.skipped())


class TestPatients:
    @pytest.fixture
    def folder(self, tmp_path, write_series):
        """The same person under two numbers, and somebody else."""
        for number in ("old-1", "new-1", "2"):
            write_series(tmp_path / "data" / number, np.ones((2, 4, 4)), patient=number)
        return tmp_path / "data"

    def test_table_makes_two_numbers_one_patient(self, folder, build):
        """
        patients.csv says who is who; without it nobody guesses. It is no image and not counted.
        """
        assert len({s.patient for s in build(folder).studies()}) == 3

        (folder / "patients.csv").write_text("identifier,patient\nold-1,new-1\n")
        catalogue = build(folder)

        assert len(catalogue.studies()) == 3
        assert len({s.patient for s in catalogue.studies()}) == 2
        assert not catalogue.skipped()

    @pytest.mark.parametrize(
        "content",
        ["patient,number\n1,2\n", "identifier,patient\na,b\na,c\n", "identifier,patient\na,b\nb,a\n", b"\xff\xfe\x00"],
    )
    def test_table_that_contradicts_itself_is_an_error(self, folder, build, content):
        """
        Other columns, two patients for one number, a circle, no text.
        """
        (folder / "patients.csv").write_bytes(content if isinstance(content, bytes) else content.encode())

        with pytest.raises(FederadError, match="C116"):
            build(folder)

    def test_series_under_two_patients_is_left_out(self, tmp_path, folder, build, edit):
        """
        One series with slices of two patients: nobody knows whose it is, until the table says that they are one.
        """
        edit(folder / "old-1" / "im-000", lambda ds: setattr(ds, "PatientID", "3"))

        assert reasons(build(folder)) == {Reason.PATIENTS_DISAGREE: 2}

        (folder / "patients.csv").write_text("identifier,patient\n3,old-1\n")
        assert not build(folder).skipped()


class TestUids:
    def test_two_images_under_one_uid_are_named(self, tmp_path, build, write_series, edit):
        """
        A copy is a copy; another image under the same UID is a finding of its own.
        """
        series = write_series(tmp_path / "data", np.ones((2, 4, 4)))
        shutil.copy(series.files[0], tmp_path / "data" / "z-copy")
        shutil.copy(series.files[1], tmp_path / "data" / "z-other")
        edit(tmp_path / "data" / "z-other", lambda ds: setattr(ds, "PixelData", bytes(len(ds.PixelData))))

        assert reasons(build(tmp_path / "data")) == {Reason.DUPLICATE: 1, Reason.UID_TWICE: 1}

    def test_uid_that_is_none_is_named(self, tmp_path, build, write_series, edit):
        """
        Letters, or more than 64 characters.
        """
        series = write_series(tmp_path / "data", np.ones((4, 4, 4)))
        edit(series.files[0], lambda ds: setattr(ds, "SeriesInstanceUID", "1.2.x"))

        assert reasons(build(tmp_path / "data")) == {Reason.BAD_UID: 1}


class TestBids:
    def test_folder_gives_subjects_sessions_and_masks(self, tmp_path, build, write_nifti):
        """
        Two visits of one subject, with a mask among the derivatives; a mask of the whole brain is no label.
        """
        data, volume = tmp_path / "data", np.ones((3, 4, 5), dtype=np.int16)
        for visit in ("ses-1", "ses-2"):
            anat = f"sub-01/{visit}/anat/sub-01_{visit}"
            for name in (f"{anat}_T1w", f"{anat}_acq-3d_FLAIR", f"derivatives/raters/{anat}_label-lesion_mask"):
                write_nifti(data / f"{name}.nii.gz", volume)
            write_nifti(data / f"derivatives/prep/{anat}_desc-brain_mask.nii.gz", volume)
        write_nifti(data / "sub-02/anat/sub-02_T1w.nii", volume)
        (data / "dataset_description.json").write_text("{}")

        catalogue = build(data)

        studies = catalogue.studies()
        assert len({s.patient for s in studies}) == 2
        assert sorted((sorted(s.images), s.label is not None) for s in studies) == [
            (["acq-3d_flair", "t1w"], True),
            (["acq-3d_flair", "t1w"], True),
            (["t1w"], False),
        ]
        assert reasons(catalogue) == {Reason.NOT_SUPPORTED: 2, Reason.NOT_AN_IMAGE: 1}


class TestInterrupted:
    def test_killed_look_goes_on_where_it_was(self, tmp_path, secret, write_series, monkeypatch):
        """
        The process is killed amid 160 files: the next look opens only what was not seen, and finds everything.
        """
        write_series(tmp_path / "data", np.ones((160, 4, 4)))
        code = (
            "import sys, time; from pathlib import Path; from client.data.catalogue import Catalogue\n"
            "def slowly(done, total):\n    time.sleep(0.012); print(done, flush=True)\n"
            f"Catalogue.build(Path({str(tmp_path / 'c.sqlite')!r}), Path({str(tmp_path / 'data')!r}),"
            f" secret={secret!r}, on_progress=slowly)"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ)
        while int(process.stdout.readline()) < 120:
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        opened = []
        ask = reader.ask
        monkeypatch.setattr(reader, "ask", lambda *a, **k: opened.append(a) or ask(*a, **k))

        catalogue = Catalogue.build(tmp_path / "c.sqlite", tmp_path / "data", secret=secret)

        assert sum(len(s.files) for study in catalogue.studies() for s in study.images.values()) == 160
        assert 40 <= len(opened) < 140

    @pytest.mark.parametrize("content", [b"", b"not a database", b"SQLite format 3\0" + bytes(4096)])
    def test_lost_memory_costs_time_only(self, tmp_path, build, write_series, content):
        """
        What was remembered is damaged: everything is looked at again.
        """
        write_series(tmp_path / "data", np.ones((3, 4, 4)))
        first = build(tmp_path / "data").studies()
        (tmp_path / "catalogue.sqlite.seen").write_bytes(content)

        assert build(tmp_path / "data").studies() == first

    def test_nobody_is_in_what_is_remembered(self, tmp_path, build, write_series):
        """
        No patient ID, name, UID or path.
        """
        series = write_series(
            tmp_path / "data" / "ZXCVB-folder", np.ones((3, 4, 4)), patient="ZXCVB-4711", patient_name="ZXCVB"
        )
        build(tmp_path / "data")

        stored = b"".join(Path(p).read_bytes() for p in tmp_path.glob("catalogue.sqlite.seen*"))
        assert b"ZXCVB" not in stored.upper()
        assert str(series.datasets[0].StudyInstanceUID).encode() not in stored
