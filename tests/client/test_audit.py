"""The audit: every line that was written is there, unchanged and in its place."""

from __future__ import annotations

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from crashes import killed_at

from client import audit as audit_module
from client.audit import LONGEST_LINE, AuditLog, Head
from shared_models.errors import FederadError


@pytest.fixture
def log(tmp_path):
    """An audit with a few lines."""
    log = AuditLog(tmp_path / "audit.jsonl")
    for number in range(5):
        log.write("answer", plan=f"{number:064x}", n_bytes=1000 * number, round=number)
    return log


class TestWriting:
    def test_what_was_written_can_be_read(self, log):
        """
        Every line comes back with what it said, its number and the time.
        """
        entries = list(log.entries())

        assert [entry["n"] for entry in entries] == [1, 2, 3, 4, 5]
        assert [entry["round"] for entry in entries] == [0, 1, 2, 3, 4]
        assert all(entry["event"] == "answer" and entry["time"].endswith("+00:00") for entry in entries)
        assert log.verify() == Head(5, entries[-1]["hash"])

    def test_nothing_written_is_whole(self, tmp_path):
        """
        An audit without a line verifies.
        """
        assert AuditLog(tmp_path / "audit.jsonl").verify() == Head()

    def test_several_writers_make_one_chain(self, tmp_path):
        """
        Station and command write at the same time, and no line is lost.
        """
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: AuditLog(tmp_path / "a.jsonl").write("answer", n_bytes=n), range(80)))

        entries = list(AuditLog(tmp_path / "a.jsonl").entries())
        assert sorted(entry["n_bytes"] for entry in entries) == list(range(80))
        assert AuditLog(tmp_path / "a.jsonl").verify().n == 80

    def test_only_its_owner_may_read_it(self, log):
        """
        The file is made with 0600.
        """
        assert log.path.stat().st_mode & 0o777 == 0o600

    def test_line_that_cannot_be_written_is_an_error(self, tmp_path):
        """
        C162, so that whoever wanted to release something does not.
        """
        with pytest.raises(FederadError, match="C162"):
            AuditLog(tmp_path / "missing" / "audit.jsonl").write("answer")

    def test_endless_line_is_not_written(self, log):
        """
        A line longer than the longest is a mistake of the programmer, and leaves the audit whole.
        """
        with pytest.raises(ValueError, match="bytes"):
            log.write("answer", word="x" * LONGEST_LINE)
        assert log.verify().n == 5


class TestTampering:
    def test_any_byte_that_changes_is_found(self, log):
        """
        Whatever byte of whatever line is another, verification names a line.
        """
        whole = log.path.read_bytes()
        rng = random.Random(0)
        for position in sorted(rng.sample(range(len(whole)), 200)):
            changed = bytearray(whole)
            changed[position] ^= 1 << rng.randrange(8)
            log.path.write_bytes(bytes(changed))
            with pytest.raises(FederadError, match="C162"):
                log.verify()

        log.path.write_bytes(whole)
        assert log.verify().n == 5

    @pytest.mark.parametrize("n", range(5))
    def test_line_that_is_gone_is_found(self, log, n):
        """
        Also the last one, which no other line points to.
        """
        lines = log.path.read_bytes().splitlines(keepends=True)
        log.path.write_bytes(b"".join(lines[:n] + lines[n + 1 :]))

        with pytest.raises(FederadError, match="C162"):
            log.verify()

    def test_everything_gone_is_found(self, log):
        """
        An empty file, and none at all.
        """
        log.path.write_bytes(b"")
        with pytest.raises(FederadError, match="5 lines are missing"):
            log.verify()
        log.path.unlink()
        with pytest.raises(FederadError, match="5 lines are missing"):
            log.verify()

    def test_lines_in_another_order_are_found(self, log):
        """
        Every line has its place.
        """
        lines = log.path.read_bytes().splitlines(keepends=True)
        lines[1], lines[2] = lines[2], lines[1]
        log.path.write_bytes(b"".join(lines))

        with pytest.raises(FederadError, match="line 2 was changed"):
            log.verify()

    def test_line_that_was_made_up_is_found(self, log):
        """
        A line with a right hash of its own, in the place of another.
        """
        lines = log.path.read_bytes().splitlines(keepends=True)
        entry = {key: value for key, value in json.loads(lines[2]).items() if key != "hash"} | {"n_bytes": 1}
        entry["hash"] = audit_module._hash_of(entry)
        lines[2] = audit_module._canonical(entry) + b"\n"
        log.path.write_bytes(b"".join(lines))

        with pytest.raises(FederadError, match="line 4 was changed"):
            log.verify()

    def test_last_line_that_was_made_up_is_found(self, log):
        """
        The note of the last line tells.
        """
        lines = log.path.read_bytes().splitlines(keepends=True)
        entry = {key: value for key, value in json.loads(lines[4]).items() if key != "hash"} | {"n_bytes": 1}
        entry["hash"] = audit_module._hash_of(entry)
        log.path.write_bytes(b"".join(lines[:4]) + audit_module._canonical(entry) + b"\n")

        with pytest.raises(FederadError, match="line 5 is not the one"):
            log.verify()

    def test_nothing_is_added_to_what_is_broken(self, log):
        """
        A cut audit takes no further line, so that nothing leaves until somebody has looked.
        """
        lines = log.path.read_bytes().splitlines(keepends=True)
        log.path.write_bytes(b"".join(lines[:3]))

        with pytest.raises(FederadError, match="C162"):
            log.write("answer")
        assert log.path.read_bytes() == b"".join(lines[:3])


class TestCrashes:
    def test_killed_before_any_line_the_audit_is_whole(self, tmp_path):
        """
        Wherever writing a line dies: it is there or it is not, the audit verifies, and the next line can be written.
        """
        outcomes = set()
        for n_lines in range(1, 1000):
            log = AuditLog(tmp_path / f"{n_lines}.jsonl")
            log.write("answer", n_bytes=1)
            killed = killed_at(n_lines, audit_module, lambda log=log: log.write("answer", n_bytes=2))
            outcomes.add(after := log.verify().n)

            assert after in (1, 2)
            assert killed or after == 2
            log.write("answer", n_bytes=3)
            assert log.verify().n == after + 1
            if not killed:
                break

        assert outcomes == {1, 2}

    def test_half_a_line_at_the_end_never_counted(self, log):
        """
        What a power cut left of a line is cut off before the next is written; nothing had left for it.
        """
        with log.path.open("ab") as file:
            file.write(b'{"event":"answer","n":6,')

        assert log.verify().n == 5
        log.write("answer")
        assert log.verify().n == 6

    def test_full_disk_leaves_the_audit_whole(self, log):
        """
        A line that fits only in part is taken back.
        """
        limit = log.path.stat().st_size + 20
        child = os.fork()
        if child == 0:
            import resource
            import signal

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                log.write("answer")
            except FederadError as error:
                os._exit(error.exit_status)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 162

        assert log.verify().n == 5
        log.write("answer")
        assert log.verify().n == 6
