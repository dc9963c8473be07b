"""The catalogue finds what a folder holds, counts what it leaves out, and names nobody."""

from __future__ import annotations

import hmac
import json
import os
import random
import shutil
from collections import Counter

import numpy as np
import pytest

from client.data.catalogue import Catalogue
from client.data.skips import Reason
from shared_models.errors import FederadError


@pytest.fixture
def build(tmp_path, secret):
    """Build a catalogue of a folder, beside it."""

    def build(source, **options):
        return Catalogue.build(tmp_path / "catalogue.sqlite", source, secret=secret, **options)

    return build


def reasons(catalogue) -> dict[str, int]:
    return dict(Counter(s.reason for s in catalogue.skipped()))


class TestCatalogueOfDicom:
    def test_studies_are_found_whatever_files_are_called(self, hospital, build):
        """
        Three patients in three folders, files without an ending: one study each, with its series and its label.
        """
        studies = build(hospital).studies()

        assert len({s.patient for s in studies}) == 3
        for study in studies:
            assert list(study.images) == ["t2 axial"]
            assert len(study.images["t2 axial"].files) == 8
            assert study.label is not None
            assert study.label.reference == study.images["t2 axial"].key
            assert study.scanner == "SIEMENS Aurora 1.5 T"
            assert study.split is None

    def test_order_and_keys_do_not_depend_on_where_files_lie(self, hospital, build, tmp_path, secret):
        """
        The same files in one flat folder under random names give the same studies in the same order.
        """
        flat = tmp_path / "flat"
        flat.mkdir()
        paths = [p for p in hospital.rglob("*") if p.is_file()]
        random.Random(1).shuffle(paths)
        for n, path in enumerate(paths):
            shutil.copy(path, flat / f"{n}.bin")

        nested = build(hospital).studies()
        elsewhere = Catalogue.build(tmp_path / "flat.sqlite", flat, secret=secret).studies()

        assert [(s.patient, s.key) for s in nested] == [(s.patient, s.key) for s in elsewhere]
        assert [(s.patient, s.key) for s in nested] == sorted((s.patient, s.key) for s in nested)

    def test_patient_key_is_the_keyed_hash_of_the_patient_id(self, hospital, build, secret):
        """
        HMAC-SHA256 with the site's secret, first 16 hexadecimal digits.
        """
        expected = {hmac.new(secret, f"P-{n}".encode(), "sha256").hexdigest()[:16] for n in range(3)}

        assert {s.patient for s in build(hospital).studies()} == expected

    def test_two_visits_of_one_patient_are_two_studies(self, tmp_path, build, write_patient):
        """
        Patients are told apart by Patient ID, visits by Study Instance UID.
        """
        for visit in range(2):
            write_patient(tmp_path / "data" / str(visit), "P-1", seed=visit)

        studies = build(tmp_path / "data").studies()

        assert len(studies) == 2
        assert len({s.patient for s in studies}) == 1

    def test_two_series_of_one_description_stay_apart(self, tmp_path, build, write_series):
        """
        A repeated sequence gets a number, so that neither hides the other.
        """
        for n in range(2):
            write_series(tmp_path / "data" / str(n), np.ones((2, 8, 8)), study="1.2.3", description="T1")

        (study,) = build(tmp_path / "data").studies()

        assert list(study.images) == ["t1", "t1 #2"]

    def test_nobody_is_in_the_catalogue(self, tmp_path, build, write_patient):
        """
        Neither the bytes of the catalogue nor its skips hold a patient ID, a name, a date, a UID or a folder name.
        """
        series = write_patient(
            tmp_path / "data" / "ZXCVB-4711 Mustermann",
            "ZXCVB-4711",
            patient_name="Mustermann^Erika",
            description="T2 Mustermann Erika ZXCVB-4711 20240315",
        )
        (tmp_path / "data" / "ZXCVB-4711 letter.txt").write_text("Dear Mrs Mustermann")

        catalogue = build(tmp_path / "data")

        stored = (tmp_path / "catalogue.sqlite").read_bytes().lower()
        uid = str(series.datasets[0].StudyInstanceUID)
        for identifier in ("ZXCVB-4711", "Mustermann", "Erika", "20240315", "19430219", "letter", uid):
            assert identifier.lower().encode() not in stored
            assert identifier.lower() not in repr([catalogue.studies(), catalogue.skipped()]).lower()
        assert list(catalogue.studies()[0].images) == ["t2"]

    def test_files_can_be_found_again_with_the_secret_only(self, hospital, build):
        """
        Keys lead to paths where the secret is known; another secret is an error with a number.
        """
        (hospital / "letter.txt").write_text("not an image")
        catalogue = build(hospital)

        (skip,) = catalogue.skipped()

        assert catalogue.locate(b"a secret of the tests, 32 bytes!")[skip.key] == hospital / "letter.txt"
        with pytest.raises(FederadError, match="C143"):
            catalogue.locate(b"another")

    def test_unchanged_files_are_not_opened_again(self, hospital, build):
        """
        Content replaced behind an unchanged size and time goes unnoticed: nobody looked.
        """
        first = build(hospital).studies()
        for path in [p for p in hospital.rglob("*") if p.is_file()]:
            status = path.stat()
            path.write_bytes(b"\0" * status.st_size)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

        assert build(hospital).studies() == first

    def test_changed_files_are_looked_at_again(self, hospital, build):
        """
        A file that has become text since the last visit is left out.
        """
        build(hospital)
        (hospital / "P-0" / "visit" / "im-000").write_text("no longer an image")

        assert reasons(build(hospital)) == {Reason.NOT_AN_IMAGE: 1}

    def test_progress_counts_every_file(self, hospital, build):
        """
        The last call says that all files are done.
        """
        calls = []

        build(hospital, on_progress=lambda done, total: calls.append((done, total)))

        assert calls == [(n, 27) for n in range(1, 28)]


class TestWhatIsLeftOut:
    """One bad file beside a good hospital: it is counted with its reason, and everything else is there."""

    @pytest.fixture
    def series_file(self, hospital):
        return hospital / "P-0" / "visit" / "im-003"

    def test_empty_file(self, hospital, build):
        """A file of zero bytes."""
        (hospital / "empty.dcm").touch()
        self.expect(build(hospital), Reason.EMPTY)

    @pytest.mark.parametrize("content", [b"hello", b"%PDF-1.7 ...", b"PK\x03\x04" + bytes(200), bytes(5000)])
    def test_file_that_is_no_image(self, hospital, build, content):
        """Text, PDF, ZIP, zeros."""
        (hospital / "im-9.dcm").write_bytes(content)
        self.expect(build(hospital), Reason.NOT_AN_IMAGE)

    def test_truncated_pixels(self, hospital, build, series_file):
        """The header promises more pixels than the file has bytes."""
        series_file.write_bytes(series_file.read_bytes()[:-300])
        self.expect(build(hospital), Reason.DAMAGED, n_slices=23)

    def test_truncated_header(self, hospital, build, series_file):
        """The file ends in its header: which reason is given depends on where, that one is given does not."""
        whole = series_file.read_bytes()
        for length in range(140, 900, 20):
            series_file.write_bytes(whole[:length])
            catalogue = build(hospital)
            assert len(catalogue.skipped()) == 1
            assert self.n_slices(catalogue) == 23

    def test_image_without_patient_id(self, hospital, build, series_file, edit):
        """Without a patient ID nobody knows whose privacy it is."""
        edit(series_file, lambda ds: setattr(ds, "PatientID", ""))
        self.expect(build(hospital), Reason.NO_PATIENT, n_slices=23)

    @pytest.mark.parametrize(
        "tag", ["PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "SeriesInstanceUID"]
    )
    def test_image_without_geometry_or_identity(self, hospital, build, series_file, edit, tag):
        """An image that does not say where it lies."""
        edit(series_file, lambda ds: delattr(ds, tag))
        self.expect(build(hospital), Reason.TAGS_MISSING, n_slices=23)

    def test_implausibly_large_image(self, hospital, build, series_file, edit):
        """A header that claims billions of pixels is not believed."""
        edit(series_file, lambda ds: (setattr(ds, "Rows", 65535), setattr(ds, "Columns", 65535)))
        self.expect(build(hospital), Reason.TOO_LARGE, n_slices=23)

    def test_multi_frame_image(self, hospital, build, series_file, edit):
        """Several frames in one file are for a later version."""
        edit(series_file, lambda ds: (setattr(ds, "NumberOfFrames", 2), setattr(ds, "Rows", 10)))
        self.expect(build(hospital), Reason.NOT_SUPPORTED, n_slices=23)

    def test_copied_image(self, hospital, build, series_file):
        """The same SOP Instance UID twice counts once."""
        shutil.copy(series_file, hospital / "copy")
        self.expect(build(hospital), Reason.DUPLICATE)

    def test_segmentation_of_a_series_that_is_not_there(self, hospital, build):
        """A label whose images were not exported."""
        for path in (hospital / "P-0" / "visit").glob("im-*"):
            path.unlink()
        self.expect(build(hospital), Reason.NO_IMAGE, n_slices=16)

    def test_dangling_link(self, hospital, build):
        """A link to nowhere."""
        (hospital / "link").symlink_to(hospital / "nowhere")
        self.expect(build(hospital), Reason.NOT_OPENED)

    def test_pipe(self, hospital, build):
        """A named pipe is not read from, which would wait for ever."""
        os.mkfifo(hospital / "pipe")
        self.expect(build(hospital), Reason.NOT_AN_IMAGE)

    def test_any_damage_is_counted_and_none_escapes(self, hospital, build, series_file):
        """
        Bytes flipped at random in two files, 100 times: it is read or counted, and no other exception comes out.
        """
        whole = series_file.read_bytes()
        seg = hospital / "P-0" / "visit" / "seg.dcm"
        whole_seg = seg.read_bytes()
        rng = random.Random(0)
        for _ in range(100):
            for path, content in ((series_file, whole), (seg, whole_seg)):
                broken = bytearray(content)
                for _ in range(20):
                    broken[rng.randrange(128, min(2500, len(broken)))] = rng.randrange(256)
                path.write_bytes(broken)
            catalogue = build(hospital)
            n_known = sum(len(s.files) for study in catalogue.studies() for s in study.images.values())
            n_labels = sum(len(study.label.files) for study in catalogue.studies() if study.label)
            assert n_known + n_labels + len(catalogue.skipped()) == 27

    def expect(self, catalogue, reason, *, n_slices=24):
        assert reasons(catalogue) == {reason: 1}
        assert self.n_slices(catalogue) == n_slices

    def n_slices(self, catalogue):
        return sum(len(s.files) for study in catalogue.studies() for s in study.images.values())


class TestCatalogueOfResearchFolders:
    def test_nifti_folder_gives_series_by_file_name(self, tmp_path, build, write_nifti):
        """
        <subject>/<name>.nii.gz: the folder is the patient, the name the series, label or seg or mask the label.
        """
        for subject, label in (("anna", "label"), ("bert", "seg"), ("carl", "carl_mask")):
            for name in ("flair", "t1c", label):
                write_nifti(tmp_path / "data" / subject / f"{name}.nii.gz", np.ones((3, 4, 5), dtype=np.int16))

        studies = build(tmp_path / "data").studies()

        assert len({s.patient for s in studies}) == 3
        assert all(list(s.images) == ["flair", "t1c"] and s.label is not None for s in studies)

    def test_damaged_nifti_is_counted(self, tmp_path, build, write_nifti):
        """
        A compressed file that is cut within its header, and a four-dimensional one.
        """
        write_nifti(tmp_path / "data" / "a" / "flair.nii.gz", np.ones((3, 4, 5), dtype=np.int16))
        write_nifti(tmp_path / "data" / "b" / "flair.nii.gz", np.ones((3, 4, 5, 2), dtype=np.int16))
        (tmp_path / "data" / "a" / "t1.nii.gz").write_bytes((tmp_path / "data/a/flair.nii.gz").read_bytes()[:30])

        assert reasons(build(tmp_path / "data")) == {Reason.DAMAGED: 1, Reason.NOT_SUPPORTED: 1}

    @pytest.fixture
    def photographs(self, tmp_path, write_picture):
        """Four eyes of three people; the third has no mask, and one mask has no image."""
        folder = tmp_path / "collection" / "here"
        for name in ("1L", "1R", "2", "3"):
            write_picture(folder / "images" / f"{name}.png", np.full((6, 8, 3), 90, np.uint8))
        for name in ("1L", "1R", "2", "lost"):
            write_picture(folder / "masks" / f"{name}.png", np.full((6, 8), 255, np.uint8))
        write_picture(folder / "fov" / "2.png", np.full((6, 8), 255, np.uint8))
        (tmp_path / "collection" / "index.csv").write_text(
            "site,id,subject,split\nhere,1L,one,train\nhere,1R,one,train\nhere,2,two,test\nelsewhere,3,two,val\n"
        )
        return folder

    def test_photographs_are_paired_with_their_masks(self, photographs, build):
        """
        A colour photograph has three channels; a mask without an image is counted, an image without a mask is kept.
        """
        catalogue = build(photographs)

        studies = catalogue.studies()
        assert len(studies) == 4
        assert all(list(s.images) == ["blue", "green", "red"] for s in studies)
        assert Counter(len(s.label.files) if s.label else 0 for s in studies) == {1: 2, 2: 1, 0: 1}
        assert reasons(catalogue) == {Reason.NO_IMAGE: 1}

    def test_index_says_who_is_who(self, photographs, build):
        """
        Both eyes of a subject are one patient with the published split; rows of another site are not ours.
        """
        by_patient = Counter((s.patient, s.split) for s in build(photographs).studies())

        assert sorted((n, split or "") for (_, split), n in by_patient.items()) == [(1, ""), (1, "test"), (2, "train")]

    def test_picture_that_is_none_is_counted(self, photographs, build):
        """
        Text with the ending of a picture, and a picture outside the three folders.
        """
        (photographs / "images" / "4.png").write_text("no picture")
        shutil.copy(photographs / "images" / "1L.png", photographs / "logo.png")

        found = reasons(build(photographs))

        assert found == {Reason.NO_IMAGE: 1, Reason.DAMAGED: 1, Reason.NOT_AN_IMAGE: 1}


class TestErrors:
    @pytest.mark.parametrize("content", [None, "text"])
    def test_folder_without_any_image_is_an_error_with_counts(self, tmp_path, build, content):
        """
        Missing, empty or full of other things: C140 says what was looked at, by count.
        """
        if content:
            (tmp_path / "data").mkdir()
            (tmp_path / "data" / "Mustermann.txt").write_text(content)

        with pytest.raises(FederadError, match="C140") as error:
            build(tmp_path / "data")

        assert ("not an image: 1" if content else "empty or not there") in str(error.value)
        assert "Mustermann" not in str(error.value)
        assert not (tmp_path / "catalogue.sqlite").exists()

    @pytest.mark.parametrize("content", [None, b"", b"not a database", b"SQLite format 3\0" + bytes(4096)])
    def test_catalogue_that_cannot_be_read_is_an_error_with_a_number(self, tmp_path, content):
        """
        Missing, empty, or not a catalogue.
        """
        if content is not None:
            (tmp_path / "catalogue.sqlite").write_bytes(content)

        with pytest.raises(FederadError, match="C143"):
            Catalogue.open(tmp_path / "catalogue.sqlite")

    def test_catalogue_is_the_same_when_opened_again(self, hospital, build, tmp_path):
        """
        What build returns is what open reads.
        """
        built, opened = build(hospital), Catalogue.open(tmp_path / "catalogue.sqlite")

        assert (built.studies(), built.skipped()) == (opened.studies(), opened.skipped())
        assert json.dumps([s.key for s in built.studies()]) == json.dumps([s.key for s in opened.studies()])


class TestRealFolders:
    def test_every_real_dicom_file_is_used_or_counted(self, shared_data, build):
        """
        412 files of six vendors, some broken on purpose: each is in a series or has its reason.
        """
        source = shared_data / "dicom"
        catalogue = build(source)

        n_files = sum(p.is_file() for p in source.rglob("*")) - 1  # the index is not an image and not counted
        used = {f.key for study in catalogue.studies() for s in study.images.values() for f in s.files}
        labels = {f.key for study in catalogue.studies() if study.label for f in study.label.files}
        assert len(used | labels) + len(catalogue.skipped()) == n_files
        assert len(used) > 300
