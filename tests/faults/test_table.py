"""The table of faults says what is tested."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [line for line in (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines() if "`tests/" in line]


def has(test: str) -> bool:
    """Whether a test, a class of tests or a file of them exists."""
    file, *names = test.split("::")
    try:
        body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    except OSError:
        return False
    for name in names:
        found = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name]
        if not found:
            return False
        body = found[0].body
    return True


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_every_fault_has_a_test_of_each_kind_that_exists(row):
    """
    One without a network, one in a deployment.
    """
    *_, alone, deployed, _ = row.split("|")
    for cell in (alone, deployed):
        (test,) = re.findall(r"`(tests/[^`]+)`", cell)
        assert has(test), test


def test_a_test_that_does_not_exist_is_found():
    """
    By its file, its class or its name.
    """
    assert has("tests/faults/test_table.py::test_a_test_that_does_not_exist_is_found")
    for wrong in ("tests/none.py", "tests/faults/test_table.py::Test", "tests/server/test_rounds.py::TestRun::test_no"):
        assert not has(wrong)
