"""Whatever a file does to its reader, the station goes on and counts it."""

from __future__ import annotations

import os
import signal
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless, RTStructureSetStorage

from client.data import dicom, parser, reader
from client.data.reader import Reader
from client.data.skips import Reason, UnusableError


def ask(one: Reader, path, what="describe"):
    return one.ask(what, path=str(path), size=path.stat().st_size)


def reason_of(do, *arguments, **named) -> Reason:
    with pytest.raises(UnusableError) as error:
        do(*arguments, **named)
    return error.value.reason


@pytest.fixture
def one():
    """A reader of this test's own."""
    own = Reader()
    yield own
    own.close()


@pytest.fixture
def series(tmp_path, write_series):
    return write_series(tmp_path, np.arange(2 * 8 * 8).reshape(2, 8, 8))


class TestReader:
    def test_dead_process_is_replaced_and_the_file_read_again(self, one, series):
        """
        A process that somebody ended says nothing about the file that it was reading.
        """
        before = ask(one, series.files[0]).facts
        os.kill(one._process.pid, signal.SIGKILL)

        assert ask(one, series.files[0]).facts == before

    def test_file_that_ends_its_process_every_time_is_counted(self, one, series):
        """
        Twice is enough: the third file finds a reader again.
        """
        assert reason_of(ask, one, series.files[0], "no such ability, and the process ends") is Reason.CRASHED
        assert ask(one, series.files[1]).facts["kind"] == "image"

    def test_decoder_that_panics_is_no_reason_to_end(self):
        """
        One in Rust that gives up raises what is no ``Exception``; the file is damaged, and its process stays.
        """

        class Panic(BaseException):
            pass

        def give_up(path):
            raise Panic("index out of bounds")

        assert parser._answer(give_up, {"path": "a.dcm"}) == {"unusable": Reason.DAMAGED}

    def test_file_that_never_ends_is_given_up(self, one, series, monkeypatch):
        """
        A reader that stands still is ended after its time.
        """
        ask(one, series.files[0])
        monkeypatch.setattr(reader, "WALL_S", 0.3 - 4 * reader.CPU_S)
        os.kill(one._process.pid, signal.SIGSTOP)

        began = time.monotonic()

        assert reason_of(ask, one, series.files[0]) is Reason.TOO_SLOW
        assert time.monotonic() - began < 3

    def test_computing_time_is_limited(self, one, tmp_path, monkeypatch):
        """
        A reader that computes for ever is ended by the kernel, however busy the machine is.
        """
        contour, region, rt = Dataset(), Dataset(), Dataset()
        contour.ContourGeometricType = "CLOSED_PLANAR"
        contour.add_new(0x30060050, "UN", b"1.5\\" * 600_000 + b"1.5 ")
        region.ReferencedROINumber, region.ContourSequence = 1, [contour]
        rt.SOPClassUID, rt.SOPInstanceUID, rt.ROIContourSequence = RTStructureSetStorage, "1.2", [region]
        path = tmp_path / "long.dcm"
        rt.save_as(path, implicit_vr=True, little_endian=True)
        monkeypatch.setattr(reader, "CPU_S", 0.0)
        monkeypatch.setattr(reader, "BYTES_PER_S", 1e12)
        monkeypatch.setattr(reader, "WALL_S", 300.0)

        assert reason_of(ask, one, path, "structures") is Reason.TOO_SLOW

    def test_process_can_write_no_file(self, one, series, tmp_path):
        """
        Its limit on the size of files is zero, and it was given neither the secret nor a place to write to.
        """
        ask(one, series.files[0])
        limits = Path(f"/proc/{one._process.pid}/limits").read_text().splitlines()
        (line,) = [line for line in limits if line.startswith("Max file size")]

        assert line.split()[3:5] == ["0", "0"]

    def test_process_ends_with_whoever_asks(self, one, series):
        """
        No reader outlives its station: when nobody can ask any more it ends by itself.
        """
        ask(one, series.files[0])
        process = one._process
        process.stdin.close()

        assert process.wait(timeout=10) == 0

    def test_several_threads_have_a_reader_each(self, series):
        """
        Answers do not get mixed up.
        """
        wrong = []

        def read(path, uid):
            for _ in range(20):
                if reader.ask("describe", path).facts["instance"] != uid:
                    wrong.append(path)

        threads = [
            threading.Thread(target=read, args=(path, str(ds.SOPInstanceUID)))
            for path, ds in zip(series.files, series.datasets, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert not wrong


class TestHostileFiles:
    """Each file is small and asks for much; each is refused quickly, with a reason."""

    @pytest.fixture(autouse=True)
    def quickly(self):
        began = time.monotonic()
        yield
        assert time.monotonic() - began < 10

    def test_nested_sequences(self, series, tmp_path):
        """
        Two thousand sequences within each other, a few kilobytes.
        """
        innermost = Dataset()
        innermost.PatientID = "x"
        content = b""
        for _ in range(2000):
            item = struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content
            content = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, len(item)) + item
        whole = series.files[0].read_bytes()
        begin = whole.index(struct.pack("<HH", 0x0008, 0x0016))
        path = tmp_path / "nested"
        path.write_bytes(whole[:begin] + content + whole[begin:])

        assert self.outcome(path) in (None, Reason.DAMAGED, Reason.CRASHED)

    def test_deflated_to_a_thousandth(self, tmp_path, series, edit):
        """
        400 KB that inflate to 400 MB.
        """
        path = self.with_syntax(series.files[0], DeflatedExplicitVRLittleEndian)
        whole = path.read_bytes()
        deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        bomb = b"".join(deflater.compress(bytes(1 << 20)) for _ in range(400)) + deflater.flush()
        (length,) = struct.unpack_from("<I", whole, 140)
        path.write_bytes(whole[: 144 + length] + bomb)

        assert self.outcome(path) is Reason.TOO_LARGE

    def test_run_lengths_that_claim_gigabytes(self, series):
        """
        A kilobyte of run lengths whose header says 16,000 times 16,000 pixels of 100 frames.
        """
        path = self.with_syntax(series.files[0], RLELossless)
        ds = dcmread(path)
        ds.Rows = ds.Columns = 16_000
        ds.NumberOfFrames, ds.Modality = 100, "OT"
        ds["PixelData"].VR = "OB"
        ds.PixelData = struct.pack("<HHIHHI", 0xFFFE, 0xE000, 0, 0xFFFE, 0xE000, 64) + struct.pack(
            "<16I", 1, 64, *[0] * 14
        )
        ds["PixelData"].is_undefined_length = True
        ds.save_as(path)

        assert self.outcome(path) is Reason.TOO_LARGE

    def test_pixels_that_end_before_they_should(self, series):
        """
        A file that is cut after it was looked at is an unusable one, not an exception.
        """
        path = series.files[0]
        planes = dicom.planes_of([path])
        path.write_bytes(path.read_bytes()[:-40])

        assert reason_of(dicom.stack, planes, even=False) is Reason.DAMAGED

    def with_syntax(self, path, syntax):
        ds = dcmread(path)
        ds.file_meta.TransferSyntaxUID = syntax
        if syntax.is_deflated:
            ds.save_as(path)
        else:
            whole = path.read_bytes()
            path.write_bytes(whole.replace(b"1.2.840.10008.1.2.1\0", str(syntax).encode().ljust(20, b"\0")))
        return path

    def outcome(self, path) -> Reason | None:
        try:
            dicom.inspect(path, b"secret")
            dicom.read_volumes([path])
        except UnusableError as error:
            return error.reason
        return None
