"""The ServerApp's memory does not grow with the number of sites."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("large_model.py")


def peak_bytes(n_sites, folder) -> int:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (SCRIPT.parents[1], SCRIPT.parents[2])))}
    command = [sys.executable, str(SCRIPT), str(n_sites), str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout.split()[-1])


@pytest.mark.slow
def test_peak_is_the_same_for_four_and_for_twenty_replies(tmp_path):
    """
    With 30 million parameters, 120 MB, the peak of the ServerApp's process differs by less than 5 %.
    """
    few, many = peak_bytes(4, tmp_path / "few"), peak_bytes(20, tmp_path / "many")
    print(f"4 replies {few / 1e6:.0f} MB, 20 replies {many / 1e6:.0f} MB")

    assert abs(many - few) < 0.05 * few
