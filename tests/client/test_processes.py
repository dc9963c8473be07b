"""Processes of a site: one of each, none left over, files that survive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from crashes import killed_at
from deployed import ROOT, is_alive, until

from client import processes as module
from client.processes import Backoff, end, holder, only_one, spawn, write_durably
from shared_models.errors import FederadError

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def run(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


class TestLock:
    def test_second_holder_is_refused_and_told_of_the_first(self, tmp_path):
        """
        C156 names the process; within one process too.
        """
        with only_one(tmp_path / "lock", "station"):
            assert holder(tmp_path / "lock") == os.getpid()
            with pytest.raises(FederadError, match=f"process {os.getpid()}") as error, only_one(tmp_path / "lock", "x"):
                pass
        assert error.value.code == "C156"
        assert holder(tmp_path / "lock") is None

    def test_killed_holder_leaves_no_lock(self, tmp_path):
        """
        The kernel takes it back, whatever the process that held it was doing.
        """
        code = """
            import sys, time
            from pathlib import Path
            from client.processes import only_one
            with only_one(Path(sys.argv[1]), "station"):
                print("held", flush=True)
                time.sleep(60)
        """
        process = run(code, tmp_path / "lock")
        assert process.stdout.readline() == "held\n"
        assert holder(tmp_path / "lock") == process.pid
        process.kill()
        process.wait()

        assert holder(tmp_path / "lock") is None
        with only_one(tmp_path / "lock", "station"):
            pass

    def test_missing_lock_has_no_holder(self, tmp_path):
        """
        Where nothing was ever started.
        """
        assert holder(tmp_path / "lock") is None


class TestChildren:
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_child_dies_with_its_parent(self, number):
        """
        Also when the parent has no chance to say so.
        """
        code = """
            import sys, time
            from client.processes import spawn
            child = spawn([sys.executable, "-c", "import time; time.sleep(60)"])
            print(child.pid, flush=True)
            time.sleep(60)
        """
        process = run(code)
        child = int(process.stdout.readline())
        assert is_alive(child)
        process.send_signal(number)
        process.wait()

        until(lambda: not is_alive(child), within_s=5)

    def test_end_takes_grandchildren_too(self):
        """
        The whole process group ends, also one that does not listen to SIGTERM.
        """
        code = """
            import signal, subprocess, sys, time
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)
            time.sleep(60)
        """
        child = spawn([sys.executable, "-c", textwrap.dedent(code)], output=subprocess.PIPE)
        grandchild = int(child.stdout.readline())
        began = time.monotonic()
        end(child, grace_s=0.5)

        assert child.poll() == -signal.SIGKILL
        until(lambda: not is_alive(grandchild), within_s=5)
        assert time.monotonic() - began < 5

    def test_polite_child_ends_politely(self):
        """
        SIGTERM is enough for most.
        """
        child = spawn(SLEEP)
        end(child)
        assert child.poll() == -signal.SIGTERM


class TestBackoff:
    def test_pauses_grow_to_a_limit_and_begin_anew(self):
        """
        1, 2, 4 ... seconds; after something lasted, 1 again.
        """
        backoff = Backoff(first_s=1, most_s=8, healthy_s=60)

        assert [backoff.pause_s(0.1) for _ in range(6)] == [1, 2, 4, 8, 8, 8]
        assert [backoff.pause_s(61), backoff.pause_s(0)] == [1, 2]
        backoff.reset()
        assert backoff.pause_s() == 1


class TestFiles:
    def test_killed_before_any_line_a_file_is_old_or_new(self, tmp_path):
        """
        Wherever writing dies, a reader finds all of the one or all of the other.
        """
        outcomes = set()
        for n_lines in range(1, 100):
            path = tmp_path / f"{n_lines}.json"
            write_durably(path, b"old")
            killed = killed_at(n_lines, module, lambda path=path: write_durably(path, b"new" * 10_000))
            outcomes.add(path.read_bytes())
            assert path.read_bytes() in (b"old", b"new" * 10_000)
            if not killed:
                break
        assert len(outcomes) == 2

    def test_only_its_owner_may_read_it(self, tmp_path):
        """
        0600, whatever the umask.
        """
        write_durably(tmp_path / "x", b"")
        assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600

    def test_failure_leaves_nothing_half(self, tmp_path):
        """
        A folder in its place: an error, and no leftovers.
        """
        (tmp_path / "x" / "y").mkdir(parents=True)
        with pytest.raises(OSError, match="directory"):
            write_durably(tmp_path / "x", b"data")
        assert [path.name for path in tmp_path.iterdir()] == ["x"]
