"""The guard: what comes from the server is configuration, and what runs is what the hospital installed."""

from __future__ import annotations

import io
import os
import subprocess
import time
import warnings
import zipfile
from pathlib import Path

import pytest
from flowers import PROJECT, lab
from flwr.cli.build import build_fab_from_files
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND

import client.guard as module
from client.audit import FILE, AuditLog
from client.courier import SuperNode
from client.guard import REPLACED, BundleRefusedError, inspect_bundle, write_executables
from client.service import StationServer
from server.bundle import make_bundle

SHADOW = b"""
from pathlib import Path
Path(%r).write_text("ran")
from flwr.clientapp import ClientApp
app = ClientApp()
"""


def zipped(*files: tuple[str | zipfile.ZipInfo, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, content in files:
            file.writestr(name, content)
    return buffer.getvalue()


def a_link() -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo("README.md")
    entry.external_attr = 0o120777 << 16
    return entry


class TestInspection:
    def test_bundle_that_the_operator_makes_passes(self):
        """
        Configuration, README and Flower's list of contents.
        """
        inspect_bundle(make_bundle().content)
        inspect_bundle(build_fab_from_files({"pyproject.toml": PROJECT.encode(), "README.md": b"# x"})[0])

    @pytest.mark.parametrize(
        "name",
        [
            "client/app.py", "client/__init__.py", "app.py", "evil.pth", "client.so", "numpy/__init__.py", "README.md.py",
            "../client/app.py", "/etc/cron.d/x", "pyproject.toml/x", "readme.md", "README.md ", "./README.md", "data.json",
            ".info/RECORD", "config.yaml", "client/", "LICENSE", "README.md\\..\\x.py",
        ],
    )  # fmt: skip
    def test_anything_else_is_refused(self, name):
        """
        Whatever the name: code, data, a path that leads elsewhere.
        """
        content = zipped(("pyproject.toml", PROJECT.encode()), (name, b"x"))
        with pytest.raises(BundleRefusedError, match="not configuration"):
            inspect_bundle(content)

    @pytest.mark.parametrize(
        ("content", "why"),
        [
            (b"", "cannot be read"),
            (b"PK\x03\x04 no zip", "cannot be read"),
            (zipped(("README.md", b"x")), "no configuration"),
            (zipped(("pyproject.toml", b"")), None),
            (zipped(("pyproject.toml", b"not = [toml")), "cannot be read"),
            (zipped(("pyproject.toml", b"\xff\xfe")), "cannot be read"),
            (zipped(("pyproject.toml", PROJECT.encode()), ("pyproject.toml", b"")), "twice"),
            (zipped(("pyproject.toml", b"#" * (2 << 20))), "too large"),
            (zipped(("pyproject.toml", PROJECT.encode()), (a_link(), b"/etc/passwd")), "too large or is none"),
            (zipped(("pyproject.toml", PROJECT.encode()))[:-30], "cannot be read"),
        ],
        ids=[
            "empty",
            "no zip",
            "no configuration",
            "nothing in it",
            "no toml",
            "no text",
            "twice",
            "bomb",
            "link",
            "cut",
        ],
    )
    def test_strange_bundles_are_refused(self, content, why):
        """
        A bundle is what it should be or it is refused; an empty configuration is harmless, and Flower refuses it itself.
        """
        if why is None:
            inspect_bundle(content)
            return
        with pytest.raises(BundleRefusedError, match=why):
            inspect_bundle(content)

    def test_size_that_the_list_denies_is_found(self):
        """
        A file larger than its entry says is read no further than the limit.
        """
        content = bytearray(zipped(("pyproject.toml", b"#" * (4 << 20))))
        for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
            at = content.find(signature) + offset
            content[at : at + 4] = (100).to_bytes(4, "little")
        with pytest.raises(BundleRefusedError):
            inspect_bundle(bytes(content))

    def test_reason_is_short_and_printable_whatever_the_name(self):
        """
        A name is the server's text: it goes into the audit cut and escaped.
        """
        with pytest.raises(BundleRefusedError) as error:
            inspect_bundle(zipped(("\x1b[2J" + "a" * 5000, b"x")))
        assert len(str(error.value)) < 200
        assert str(error.value).isprintable()


class TestInstalledFlower:
    def test_flower_has_what_the_guard_replaces(self):
        """
        The names that the guard puts its own in the place of are there in the version that is pinned.
        """
        import flwr.supernode.runtime.run_clientapp as runtime

        assert all(hasattr(runtime, name) for name in REPLACED)
        assert {"install_from_fab", "Error"} <= set(runtime.run_clientapp.__code__.co_names)

    def test_every_program_that_flower_may_start_is_the_guards(self, tmp_path):
        """
        The folder that comes first on the PATH has each of them.
        """
        write_executables(tmp_path / "bin", tmp_path)
        names = {path.name for path in (tmp_path / "bin").iterdir()}
        assert names == {*TASK_TYPE_TO_COMMAND.values(), "flower-superexec"}

    @pytest.mark.parametrize("program", sorted({*TASK_TYPE_TO_COMMAND.values()} - {"flwr-clientapp"}))
    def test_other_programs_refuse(self, tmp_path, program):
        """
        An agent, a server or a model is never started at a hospital, and that somebody tried is written down.
        """
        write_executables(tmp_path / "bin", tmp_path)
        done = subprocess.run([tmp_path / "bin" / program, "--token", "x"], capture_output=True, check=False)

        assert done.returncode == 161
        (line,) = AuditLog(tmp_path / FILE).entries()
        assert (line["event"], line["program"]) == ("program-refused", program)

    def test_modules_in_the_way_are_not_imported(self, tmp_path):
        """
        Neither the working folder nor PYTHONPATH can put a module in the place of the installed one.
        """
        shadow = tmp_path / "shadow" / "client"
        shadow.mkdir(parents=True)
        for name in ("__init__.py", "guard.py"):
            (shadow / name).write_text(f"raise SystemExit('{name} ran')")
        write_executables(tmp_path / "bin", tmp_path)
        done = subprocess.run(
            [tmp_path / "bin" / "flwr-serverapp"],
            cwd=shadow.parent, env={**os.environ, "PYTHONPATH": str(shadow.parent)}, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 161

    def test_another_flower_runs_nothing(self, tmp_path, monkeypatch):
        """
        Where a name is missing, the guard ends instead of letting Flower go on without it.
        """
        import flwr.supernode.runtime.run_clientapp as runtime

        monkeypatch.setenv(module.COURIER, str(tmp_path))
        monkeypatch.delattr(runtime, "install_from_fab")
        with pytest.raises(SystemExit) as stop:
            module.main()

        assert stop.value.code == 161
        (line,) = AuditLog(tmp_path / FILE).entries()
        assert line["missing"] == ["install_from_fab"]


class Parrot:
    name = "parrot"
    busy_with = None
    is_broken = False

    def answer(self, data):
        return b"answer to " + data

    def offer(self, data): ...

    def outbox(self, told):
        return told, []


@pytest.fixture(scope="module")
def flower(tmp_path_factory):
    with lab(tmp_path_factory.mktemp("lab")) as made:
        yield made


@pytest.mark.slow
class TestRealFlower:
    """A SuperLink, a SuperNode and real bundles."""

    @pytest.fixture
    def supernode(self, flower, tmp_path):
        node = SuperNode(flower.courier, tmp_path / "s.sock")
        with StationServer(Parrot(), tmp_path / "s.sock"):
            node.look_after()
            assert node.is_running
            try:
                yield node
            finally:
                node.stop()

    def test_code_is_refused_and_configuration_runs(self, flower, supernode, tmp_path):
        """
        A bundle that brings its own client/app.py is not unpacked, none of it runs, the server hears one word, and the
        courier's audit has it; a bundle without code is answered by the installed app through the same node.
        """
        marker = tmp_path / "ran"
        code = SHADOW % str(marker)
        heard = flower.ask({"client/__init__.py": b"", "client/app.py": code, "flwr/__init__.py": code})

        assert heard == ["bundle-refused"]
        assert not marker.exists()
        assert not (flower.courier / "flower" / "apps").exists()
        refused = [line for line in AuditLog(flower.courier / FILE).entries() if line["event"] == "bundle-refused"]
        assert "client/" in refused[-1]["held"]
        assert "C161" in flower.log()

        assert flower.ask({"README.md": b"# configuration"}) == ["answer to question"]
        assert not (flower.courier / "flower" / "apps").exists()
        assert AuditLog(flower.courier / FILE).verify().n == len(refused)

    def test_node_that_was_killed_is_started_again_and_answers(self, flower, supernode):
        """
        SIGKILL of the SuperNode: the courier starts it again, with the same node, and nothing of the first is left.
        """
        first = supernode.pids
        os.kill(first[0], 9)
        deadline = time.monotonic() + 30
        while supernode.n_starts < 2 and time.monotonic() < deadline:
            supernode.look_after()
            time.sleep(0.1)

        assert supernode.is_running
        assert not {pid for pid in first if Path(f"/proc/{pid}").exists()}
        assert flower.ask({"README.md": b"# again"}) == ["answer to question"]
