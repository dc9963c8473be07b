"""Hospitals that train nothing, in a whole run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from shared_models.errors import FederadError
from shared_models.plan import Plan
from simulation.consortium import emulate
from simulation.run import Request, Watcher, simulate

SPLIT = {"train": 0.5, "validation": 0.0, "test": 0.5}
PRIVACY = {"noise_multiplier": 1.0, "patients_per_step": 2, "steps_per_round": 1}


def plan_with(**tables: dict) -> Plan:
    return Plan.from_tables(
        {
            "name": "tiny",
            "rounds": 1,
            "task": {"kind": "classification", "labels": ["no", "yes"], "network": "resnet", "channels": [4, 8]},
            "data": {"modality": "MR", "dimensions": 2, "spacing_mm": [4.0, 4.0], "patch": [56, 48], "split": SPLIT},
            "simulation": {"patients": 8, "slices": 1, "prevalence": [0.5]},
            **tables,
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    hospitals = {"patients": 8, "slices": 1, "prevalence": [0.5], "unseen": ["fujifilm-flair-0.4t"]}
    plan = plan_with(simulation=hospitals)
    folder = tmp_path_factory.mktemp("run")
    simulate(Request(plan, folder, 2, seed=0, compare=False), Watcher())
    return folder


def test_they_are_measured_apart_and_train_nothing(folder):
    """
    The table of scanners has them by name, with their scanner; no round knows them, nor does the run's own test.
    """
    result = json.loads((folder / "result.json").read_text())

    ((name, row),) = result["scanners"]["unseen"].items()
    assert (name, row["scanner"]) == ("unseen-1", "Hitachi Medical Corporation AIRIS Koharu 0.4 T")
    assert 0 <= row["accuracy"] <= 1
    assert row["scanner"] not in result["scanners"]["seen"]
    assert set(result["rounds"][0]["replied"]) == {"site-1", "site-2"} == set(result["test"]["per_site"])


def test_their_patients_are_shown_too(folder):
    """
    Pictures of every hospital, under the scanner's name.
    """
    with np.load(folder / "pictures.npz") as pictures:
        shown = [json.loads(str(one)) for one in pictures["meta"]]
    of_site = {one["site"]: one["scanner"] for one in shown}
    result = json.loads((folder / "result.json").read_text())

    assert of_site.keys() == {"site-1", "site-2", "unseen-1"}
    assert of_site["unseen-1"] == result["scanners"]["unseen"]["unseen-1"]["scanner"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folders of three sites, as somebody has them."""
    folder = tmp_path_factory.mktemp("images")
    emulate(plan_with(), n_sites=3, folder=folder, seed=0)
    return folder


class TestLeftOut:
    def test_it_trains_nothing_and_is_measured(self, images, tmp_path):
        """
        The others are the sites of the run; its test patients stand under its name.
        """
        simulate(Request(plan_with(), tmp_path, data=images, left_out=("site-2",), seed=0, compare=False), Watcher())
        result = json.loads((tmp_path / "result.json").read_text())

        assert set(result["rounds"][0]["replied"]) == {"site-1", "site-3"} == set(result["test"]["per_site"])
        assert set(result["scanners"]["unseen"]) == {"site-2"}
        assert 0 <= result["scanners"]["unseen"]["site-2"]["accuracy"] <= 1

    @pytest.mark.parametrize(
        ("asked", "word"),
        [
            ({"left_out": ("site-9",)}, "site-1, site-2, site-3"),
            ({"left_out": ("site-2",), "data": None}, "--data FOLDER"),
            ({"left_out": ("site-2",), "plan": plan_with(privacy=PRIVACY)}, "[privacy]"),
        ],
        ids=["unknown", "emulated", "private"],
    )
    def test_what_cannot_be_left_out_is_refused(self, images, tmp_path, asked, word):
        """
        A folder that is not there, hospitals that are emulated, patients whom a private plan may not measure exactly.
        """
        with pytest.raises(FederadError) as error:
            simulate(Request(**{"plan": plan_with(), "folder": tmp_path, "data": images, **asked}), Watcher())

        assert error.value.code == "R230"
        assert word in error.value.remedies[0]
