"""Zip archives in the data folder are read where they lie, and whatever is wrong with one is counted."""

from __future__ import annotations

import shutil
import stat
import struct
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.fileset import FileSet

from client.data import dicom, reader, zips
from client.data.catalogue import Catalogue
from client.data.skips import Reason, UnusableError


@pytest.fixture
def build(tmp_path, secret):
    """Build a catalogue of a folder, beside it."""
    return lambda source: Catalogue.build(tmp_path / "catalogue.sqlite", source, secret=secret)


@pytest.fixture
def source(tmp_path, write_series):
    """A data folder with one plain series in it."""
    write_series(tmp_path / "data" / "plain", np.ones((1, 8, 8), int), patient="P-9")
    return tmp_path / "data"


def reasons(catalogue) -> dict[str, int]:
    return dict(Counter(s.reason for s in catalogue.skipped()))


def pack(archive: Path, *members: tuple[str | zipfile.ZipInfo, bytes], compression=zipfile.ZIP_DEFLATED) -> Path:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w", compression) as zipped:
        for name, data in members:
            zipped.writestr(name, data)
    return archive


def packed(archive: Path, files: list[Path], **options) -> Path:
    return pack(archive, *((f"IMG/{file.name}", file.read_bytes()) for file in files), **options)


def changed(archive: Path, field: int, value: bytes) -> None:
    """Write ``value`` at an offset of the first entry in the table of contents (APPNOTE.TXT, 4.3.12)."""
    data = bytearray(archive.read_bytes())
    at = data.index(b"PK\x01\x02") + field
    data[at : at + len(value)] = value
    archive.write_bytes(data)


class TestMembers:
    @pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    def test_series_in_an_archive_is_read_like_one_in_a_folder(
        self, tmp_path, source, build, secret, write_series, compression
    ):
        """
        The same values and places, found again by key, and nothing is unpacked anywhere.
        """
        values = np.random.default_rng(0).integers(0, 500, (3, 8, 9))
        series = write_series(tmp_path / "elsewhere", values, shuffle=1)
        packed(source / "export.ZIP", series.files, compression=compression)
        before = sorted(source.rglob("*"))

        catalogue = build(source)
        (study,) = [s for s in catalogue.studies() if len(next(iter(s.images.values())).files) == 3]
        (image,) = study.images.values()
        where = catalogue.locate(secret)
        read = dicom.read_series([where[file.key] for file in image.files], even=True)

        expected = dicom.read_series(series.files, even=True)
        assert np.array_equal(read.scan.image, expected.scan.image)
        assert np.array_equal(read.scan.affine, expected.scan.affine)
        assert catalogue.skipped() == []
        assert sorted(source.rglob("*")) == before

    def test_archive_beside_its_own_contents_counts_once(self, source, build, write_series):
        """
        Copies in and out of an archive are the same image twice; another image under the same UID is told apart.
        """
        series = write_series(source / "unpacked", np.ones((2, 8, 8), int))
        packed(source / "export.zip", series.files)

        assert reasons(build(source)) == {Reason.DUPLICATE: 2}

        other = series.files[0].read_bytes()[:-1] + b"x"
        pack(source / "export.zip", ("other", other))
        assert reasons(build(source)) == {Reason.UID_TWICE: 1}

    def test_archive_that_was_replaced_is_looked_at_again(self, tmp_path, source, build, write_series):
        """
        Its members are others then; those of an unchanged one are not opened again.
        """
        first = write_series(tmp_path / "a", np.ones((1, 8, 8), int), patient="P-1")
        second = write_series(tmp_path / "b", np.ones((2, 8, 8), int), patient="P-2")
        packed(source / "export.zip", first.files)
        assert len(build(source).studies()) == 2
        packed(source / "export.zip", second.files)

        assert sorted(len(s.images["t2 axial"].files) for s in build(source).studies()) == [1, 2]

    def test_research_formats_are_read_from_folders_only(self, source, build):
        """
        They are told by their place, and are counted as not read.
        """
        pack(source / "export.zip", ("sub-01/t1.nii.gz", b"x"), ("images/1.png", b"x"), ("README", b"hello"))

        assert reasons(build(source)) == {Reason.NOT_SUPPORTED: 2, Reason.NOT_AN_IMAGE: 1}


def link() -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo("link")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


class TestHostileArchives:
    @pytest.mark.parametrize(
        "name", ["../../outside", "/outside", "a/../../outside", "..\\outside", "C:\\outside", "a\x01b", link()]
    )
    def test_member_that_leads_elsewhere_is_counted(self, tmp_path, source, build, write_series, name):
        """
        Also where it is an image, and where a file of that name is there; nothing is read or written outside.
        """
        series = write_series(tmp_path / "elsewhere", np.ones((1, 8, 8), int))
        shutil.copy(series.files[0], tmp_path / "outside")
        pack(source / "in" / "export.zip", (name, series.files[0].read_bytes()))
        before = sorted(tmp_path.rglob("*"))

        catalogue = build(source)

        assert reasons(catalogue) == {Reason.UNSAFE_MEMBER: 1}
        assert len(catalogue.studies()) == 1
        assert {p for p in tmp_path.rglob("*") if not p.name.startswith("catalogue")} == set(before)

    def test_name_that_is_there_twice_is_counted(self, tmp_path, source, build, write_series):
        """
        The first one is read.
        """
        files = write_series(tmp_path / "elsewhere", np.ones((2, 8, 8), int)).files
        with pytest.warns(UserWarning, match="Duplicate"):
            pack(source / "a.zip", ("x", files[0].read_bytes()), ("x", files[1].read_bytes()))

        catalogue = build(source)

        assert reasons(catalogue) == {Reason.UNSAFE_MEMBER: 1}
        assert len(catalogue.studies()) == 2

    def test_archive_within_an_archive_is_counted(self, tmp_path, source, build):
        """
        It is not opened, whatever is in it.
        """
        inner = pack(tmp_path / "inner.zip", ("x", b"x"))
        pack(source / "outer.zip", ("deeper/inner.zip", inner.read_bytes()), ("disguised.dcm", inner.read_bytes()))

        assert reasons(build(source)) == {Reason.NESTED: 1, Reason.NOT_AN_IMAGE: 1}

    def test_encrypted_member_is_counted(self, source, build):
        """
        With its own reason, so that somebody can unlock it.
        """
        archive = pack(source / "a.zip", ("x", b"secret" * 50))
        changed(archive, 8, struct.pack("<H", 1))

        assert reasons(build(source)) == {Reason.ENCRYPTED: 1}

    def test_compression_that_is_not_read_is_counted(self, source, build):
        """
        What DICOM allows is read: stored and deflated (PS3.12, V.1).
        """
        pack(source / "a.zip", ("x", b"x" * 500), compression=zipfile.ZIP_BZIP2)

        assert reasons(build(source)) == {Reason.NO_DECODER: 1}

    def test_member_that_swells_is_counted_and_not_inflated(self, source, build):
        """
        By what it claims; a claim that is too small ends in a wrong checksum.
        """
        archive = pack(source / "a.zip", ("bomb", bytes(zips.ALWAYS_ALLOWED + 1)), ("noise", bytes(300) * 2))
        size = archive.stat().st_size
        assert size < zips.ALWAYS_ALLOWED / zips.MAX_INFLATED
        assert reasons(build(source)) == {Reason.SWELLS: 1}  # the archive as a whole

        changed(archive, 24, struct.pack("<I", 1000))
        assert reasons(build(source)) == {Reason.DAMAGED: 1, Reason.NOT_AN_IMAGE: 1}

    def test_one_member_among_honest_ones_that_swells(self, tmp_path, source, build, monkeypatch):
        """
        The others are read.
        """
        noise = np.random.default_rng(0).bytes(zips.ALWAYS_ALLOWED // zips.MAX_INFLATED + 2**17)
        archive = pack(source / "a.zip", ("bomb", bytes(10)), ("noise", noise))
        changed(archive, 24, struct.pack("<I", zips.ALWAYS_ALLOWED + 1))

        assert reasons(build(source)) == {Reason.SWELLS: 1, Reason.NOT_AN_IMAGE: 1}

    @pytest.mark.parametrize("data", [b"PK\x03\x04 no archive", b"x" * 100, b"PK\x05\x06" + bytes(18)])
    def test_archive_that_is_none_or_empty_is_counted(self, source, build, data):
        """
        As one file.
        """
        (source / "a.zip").write_bytes(data)

        assert sum(reasons(build(source)).values()) == 1

    def test_any_damage_is_counted_and_none_escapes(self, tmp_path, source, build, write_series):
        """
        Bytes changed anywhere, and archives cut short: each file is used or has a reason.
        """
        whole = packed(tmp_path / "whole.zip", write_series(tmp_path / "x", np.ones((1, 8, 8), int)).files).read_bytes()
        rng = np.random.default_rng(0)
        for n in range(20):
            data = bytearray(whole)
            for at in rng.integers(0, len(data), 3):
                data[at] ^= int(rng.integers(1, 256))
            (source / f"{n}.zip").write_bytes(data[: int(rng.integers(len(data) // 2, len(data) + 1))])

        catalogue = build(source)

        assert sum(reasons(catalogue).values()) >= 18
        assert not list(source.rglob("*.dcm"))

    def test_archive_that_is_gone_is_no_surprise(self, tmp_path):
        """
        A member of nothing cannot be opened.
        """
        with pytest.raises(UnusableError, match="cannot be opened"):
            reader.ask("describe", tmp_path / "gone.zip" / "x")


class TestDicomdir:
    @pytest.fixture
    def disc(self, tmp_path, write_series):
        """A file-set as it is burned on a disc: images, and a DICOMDIR that lists them."""
        fileset = FileSet()
        for file in write_series(tmp_path / "x", np.ones((2, 8, 8), int)).files:
            image = pydicom.dcmread(file)
            image.SeriesNumber, image.StudyTime = 1, "101500"
            fileset.add(image)
        fileset.write(tmp_path / "disc")
        assert (tmp_path / "disc" / "DICOMDIR").is_file()
        return tmp_path / "disc"

    def test_list_of_files_is_no_error(self, disc, build):
        """
        The images that it lists are found where they lie, and it is not counted as left out.
        """
        catalogue = build(disc)

        assert catalogue.skipped() == []
        assert [len(s.images["t2 axial"].files) for s in catalogue.studies()] == [2]

    def test_disc_may_be_zipped(self, tmp_path, disc, build):
        """
        With the DICOMDIR in it.
        """
        (tmp_path / "data").mkdir()
        shutil.make_archive(str(tmp_path / "data" / "disc"), "zip", disc)

        catalogue = build(tmp_path / "data")

        assert catalogue.skipped() == []
        assert [len(s.images["t2 axial"].files) for s in catalogue.studies()] == [2]
