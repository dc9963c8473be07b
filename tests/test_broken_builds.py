"""The tests are tested: on builds that are broken on purpose they must fail."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from broken_builds.patches import PATCHES, Change, Patch
from broken_builds.runner import Outcome, named_by, unbroken, verdict

ROOT = Path(__file__).parents[1]

NINE = [patch for patch in PATCHES if patch.is_of_the_nine]

A_PATCH = Patch("a", (Change("f", "1", "2"),), ("t.py::test_one", "t.py::test_two"))


class TestPatches:
    @pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
    def test_patch_still_applies(self, patch, tmp_path):
        """
        Each old text stands exactly once in its file, what takes its place is other code, and it is Python.
        """
        for file in {change.file for change in patch.changes}:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text((ROOT / file).read_text())
        patch.apply(tmp_path)

        for file in {change.file for change in patch.changes}:
            broken, whole = (ast.dump(ast.parse((root / file).read_text())) for root in (tmp_path, ROOT))
            assert broken != whole

    def test_names_tell_them_apart(self):
        """
        No name comes twice, and every build has a test.
        """
        assert len({patch.name for patch in PATCHES}) == len(PATCHES)
        assert all(patch.caught_by for patch in PATCHES)
        assert len(NINE) == 9

    @pytest.mark.parametrize("test", named_by(PATCHES))
    def test_test_that_must_notice_is_there(self, test):
        """
        Every test that is named exists in its file.
        """
        file, *path = test.split("[")[0].split("::")
        nodes = ast.parse((ROOT / file).read_text()).body
        for name in path:
            (node,) = (n for n in nodes if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name)
            nodes = node.body

    def test_text_that_went_stale_is_an_error(self, tmp_path):
        """
        A patch whose old text is gone, or stands there twice, is not applied.
        """
        for text in ("none", "1 and 1"):
            (tmp_path / "f").write_text(text)
            with pytest.raises(ValueError, match="times in f"):
                A_PATCH.apply(tmp_path)


class TestVerdict:
    @pytest.mark.parametrize(
        ("failed", "n_wrong"),
        [
            ({"t.py::test_one": "AssertionError", "t.py::test_two[a-3]": "ValueError"}, 0),
            ({"t.py::test_one": "AssertionError"}, 1),
            ({"t.py::test_one_more": "AssertionError", "t.py::test_two": "AssertionError"}, 1),
            ({"t.py::test_one": "NameError", "t.py::test_two": "AssertionError"}, 1),
            ({}, 2),
        ],
    )
    def test_every_named_test_must_notice(self, failed, n_wrong):
        """
        One of two is not enough, and neither is a patch that cannot run.
        """
        assert len(verdict(A_PATCH, Outcome(frozenset(), failed))) == n_wrong

    def test_tests_that_did_not_run_have_noticed_nothing(self):
        """
        A build that cannot be imported, or hangs, is not caught.
        """
        assert verdict(A_PATCH, Outcome(frozenset(), {"t.py::test_one": "AssertionError"}, "no tests"))
        assert unbroken([A_PATCH], Outcome(frozenset(), {}, "no tests"))

    def test_source_as_it_is_must_pass_them_all(self):
        """
        A test that fails anyway, or that is not there, shows nothing.
        """
        passed = frozenset({"t.py::test_one", "t.py::test_two[1]"})

        assert unbroken([A_PATCH], Outcome(passed, {})) == []
        assert len(unbroken([A_PATCH], Outcome(passed, {"t.py::test_two[2]": "AssertionError"}))) == 1
        assert len(unbroken([A_PATCH], Outcome(frozenset({"t.py::test_one"}), {}))) == 1


@pytest.fixture(scope="module")
def results():
    """What became of the nine, in one process that has nothing of this one's."""
    command = [sys.executable, "-m", "tests.broken_builds", "--nine", "--json"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.system
class TestNine:
    def test_source_as_it_is_passes(self, results):
        """
        In the same copy, by the same runner: what is noticed below is the patch.
        """
        assert results["the source as it is"] == []

    @pytest.mark.parametrize("name", [patch.name for patch in NINE])
    def test_broken_build_is_noticed(self, results, name):
        """
        All the tests that are named for it fail. `make audit` looks at all builds in this way.
        """
        assert results[name] == []
