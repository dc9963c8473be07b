"""Files broken in many ways: each is read, or left out with a reason, and none does harm."""

from __future__ import annotations

from pathlib import Path

import fuzz
import pytest

from client.data import reader


@pytest.mark.parametrize(
    "numbers", [range(150), pytest.param(range(150, 2000), marks=pytest.mark.system)], ids=["150", "2000"]
)
class TestMutants:
    def test_each_is_read_or_left_out_with_a_reason(self, tmp_path, monkeypatch, numbers):
        """
        No exception of another kind, nothing beyond 5 s or 1 GB, nothing written, and nobody named.
        """
        monkeypatch.setattr(reader, "_pool", reader._Pool())
        findings = fuzz.Findings()

        fuzz.fuzz(iter(numbers), 0, tmp_path, findings)

        assert findings.broken == []
        assert sum(findings.outcomes.values()) == len(numbers)
        assert len(findings.outcomes) > 5


class TestOfTheFuzzer:
    def test_whatever_escapes_is_found(self, tmp_path, monkeypatch):
        """
        A reader that fails in its own way, writes beside the file, or says the name is noticed.
        """

        def leaky(path: Path) -> str:
            (path.parent / "left behind").touch()
            raise KeyError(fuzz.NAME)

        monkeypatch.setattr(fuzz, "read_all", leaky)
        findings = fuzz.Findings()

        fuzz.fuzz(iter([1]), 0, tmp_path, findings)

        assert {why for _, why in findings.broken} == {"KeyError", "the patient was named", "something was written"}
