"""A disk that is really full: a small file system under the cache of a station."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from client.site import SiteConfig
from client.station import Station
from shared_models.errors import FederadError

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root"),
]


@pytest.fixture
def small_disk(tmp_path):
    """An empty file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def grow(folder) -> None:
    subprocess.run(["mount", "-o", "remount,size=200m", str(folder)], check=True)


class TestFullDisk:
    def test_cache_that_does_not_fit_is_named_and_nothing_is_lost(self, small_disk, hospitals, smoke_plan, tmp_path):
        """
        A full disk ends in C142; what was prepared is kept, and with more room the same command ends well.
        """
        station = Station.create(
            small_disk / "station", SiteConfig(name="site-1", data=str(hospitals[0].folder), emulated=True)
        )
        with pytest.raises(FederadError) as caught:
            station.approve(smoke_plan)
        assert caught.value.code == "C142"
        kept = set((small_disk / "station").glob("cohorts/*/volumes/*/entry.json"))

        grow(small_disk)
        cohort = station.approve(smoke_plan)
        elsewhere = Station.create(
            tmp_path / "station",
            SiteConfig(name="site-1", data=str(hospitals[0].folder), emulated=True),
            secret=(small_disk / "station" / "secret").read_bytes(),
        ).approve(smoke_plan)

        assert kept
        assert all(path.exists() for path in kept)
        assert cohort.patients("train") == elsewhere.patients("train")

    def test_answer_that_cannot_be_stored_does_not_leave(self, small_disk, hospitals, smoke_plan, tmp_path):
        """
        Without room to store an answer the station gives a word instead; with room it answers the same question.
        """
        from shared_models.messages import Ask, Question, decode_answer, encode_ask
        from shared_models.task import task_for
        from shared_models.weights import initial_weights, weights_sha256

        station = Station.create(
            tmp_path / "station", SiteConfig(name="site-1", data=str(hospitals[0].folder), emulated=True)
        )
        station.approve(smoke_plan)
        shutil.rmtree(tmp_path / "station" / "answers")
        (small_disk / "answers").mkdir()
        (tmp_path / "station" / "answers").symlink_to(small_disk / "answers")
        station = Station(tmp_path / "station")
        (small_disk / "ballast").write_bytes(b"\0" * (1000 * 1024))

        weights = initial_weights(task_for(smoke_plan).build_network, 0)
        ask = encode_ask(Ask(Question("r", 1, "train", smoke_plan.sha256, weights_sha256(weights)), 0, weights))
        assert decode_answer(station.answer(ask)).refusal == "declined"
        grow(small_disk)
        assert decode_answer(station.answer(ask)).refusal is None
