"""Break a copy of the source, run the tests that must notice, and say whether they did.

Every build gets a copy of its own in a temporary folder and a process of its own, forked from one in which the libraries
are imported already and nothing of the house is: so a build costs little more than its tests.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from .patches import Patch

ROOT = Path(__file__).parents[2]

SOURCE = ("shared_models", "client", "server", "simulation", "tests", "pyproject.toml")
"""What a build is copied from."""

LIBRARIES = (
    "numpy", "scipy.stats", "torch", "monai.networks.nets", "monai.losses", "monai.metrics", "monai.inferers", "opacus",
    "dp_accounting.pld", "dp_accounting.rdp", "flwr.app", "flwr.clientapp", "flwr.serverapp", "hypothesis", "pydicom",
    "highdicom", "nibabel", "pydantic", "safetensors.numpy", "cryptography.x509", "mpmath", "typer", "nilearn",
)  # fmt: skip

OUTCOME, LOG = "outcome.json", "tests.log"

LIMIT_S = 600
"""A build whose tests take longer has not been noticed by them."""

NO_NOTICE = ("NameError", "ImportError", "ModuleNotFoundError", "SyntaxError", "IndentationError", "UnboundLocalError")
"""A test that fails with one of these has found a patch that does not run, and not what it breaks."""


@dataclass(frozen=True)
class Outcome:
    """What became of some tests in a build."""

    passed: frozenset[str]
    failed: dict[str, str]
    """Name of each test that failed, and of the exception."""

    trouble: str = ""
    """Why they did not run to their end; empty if they did."""


def verdict(patch: Patch, outcome: Outcome) -> list[str]:
    """What is wrong with the tests of a patch; nothing if all of them have noticed it."""
    if outcome.trouble:
        return [outcome.trouble]
    found = []
    for test in patch.caught_by:
        errors = [error for name, error in outcome.failed.items() if name == test or name.startswith(f"{test}[")]
        if not errors:
            found.append(f"{test} did not notice")
        elif all(error in NO_NOTICE for error in errors):
            found.append(f"{test} failed with {errors[0]}: the patch does not run")
    return found


def unbroken(patches: Sequence[Patch], outcome: Outcome) -> list[str]:
    """What is wrong in the build that nobody broke; nothing if all of the tests pass there."""
    if outcome.trouble:
        return [outcome.trouble]
    found = [f"{name} fails on the source as it is ({error})" for name, error in outcome.failed.items()]
    for test in named_by(patches):
        if not any(name == test or name.startswith(f"{test}[") for name in outcome.passed | outcome.failed.keys()):
            found.append(f"{test} is not there")
    return found


def named_by(patches: Iterable[Patch]) -> list[str]:
    """The tests that patches name, each once."""
    return list(dict.fromkeys(test for patch in patches for test in patch.caught_by))


def audit(patches: Sequence[Patch]) -> Iterator[tuple[str, list[str]]]:
    """The source as it is, then each broken build: its name, and what is wrong with its tests."""
    for library in LIBRARIES:
        import_module(library)
    yield "the source as it is", unbroken(patches, outcome_of(None, named_by(patches)))
    for patch in patches:
        yield patch.name, verdict(patch, outcome_of(patch, patch.caught_by))


def outcome_of(patch: Patch | None, tests: Sequence[str]) -> Outcome:
    """Run tests in a copy of the source, with a patch applied to it."""
    with tempfile.TemporaryDirectory(prefix="federad-build-") as folder:
        build = Path(folder)
        copy(build)
        if patch is not None:
            patch.apply(build)
        child = os.fork()
        if child == 0:
            _run(build, tests)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        try:
            told = json.loads((build / OUTCOME).read_text())
            return Outcome(frozenset(told["passed"]), told["failed"], told["trouble"])
        except (OSError, ValueError):
            log = (build / LOG).read_text(errors="replace") if (build / LOG).exists() else ""
            return Outcome(frozenset(), {}, f"the tests ended with {status}\n{log[-2000:]}")


def copy(build: Path) -> None:
    """Copy the source into an empty folder."""
    for name in SOURCE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, build / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, build / name)


def _run(build: Path, tests: Sequence[str]) -> None:
    """The rest of a forked process: run the tests in ``build`` and write down what became of them."""
    try:
        signal.alarm(LIMIT_S)
        log = os.open(build / LOG, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(build)
        os.environ["PYTHONPATH"] = str(build)
        os.environ["TMPDIR"] = str(build)
        tempfile.tempdir = None
        sys.dont_write_bytecode = True
        sys.path[:] = [str(build), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
        recorder = _Recorder()
        options = [
            "-q",
            "-p",
            "no:cacheprovider",
            "-c",
            str(build / "pyproject.toml"),
            "--basetemp",
            str(build / "tmp"),
        ]
        code = pytest.main([*options, *tests], plugins=[recorder])
        trouble = "" if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) else f"pytest ended with {code!r}"
        trouble = trouble or _elsewhere(build)
        if trouble:
            trouble += "\n" + (build / LOG).read_text(errors="replace")[-2000:]
        told = {"passed": sorted(recorder.passed), "failed": recorder.failed, "trouble": trouble}
        (build / OUTCOME).write_text(json.dumps(told))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(0)


def _elsewhere(build: Path) -> str:
    """What of the house came from another place than the build; empty if nothing did."""
    for package in ("shared_models", "client"):
        file = getattr(sys.modules.get(package), "__file__", None)
        if file is None or not Path(file).is_relative_to(build):
            return f"the tests did not run {package} of the build, but {file}"
    return ""


class _Recorder:
    """A plugin that notes which tests passed, and with what the others failed."""

    def __init__(self) -> None:
        self.passed: set[str] = set()
        self.failed: dict[str, str] = {}

    @pytest.hookimpl
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[Any]) -> None:
        if call.when != "call":
            return
        if call.excinfo is None:
            self.passed.add(item.nodeid)
        elif not call.excinfo.errisinstance(pytest.skip.Exception):
            self.failed[item.nodeid] = call.excinfo.type.__name__
