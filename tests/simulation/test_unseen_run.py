"""Hospitals that train nothing, in a whole run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from shared_models.plan import Plan
from simulation.run import Request, Watcher, simulate

SPLIT = {"train": 0.5, "validation": 0.0, "test": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    plan = Plan.from_tables(
        {
            "name": "tiny",
            "rounds": 1,
            "task": {"kind": "classification", "labels": ["no", "yes"], "network": "resnet", "channels": [4, 8]},
            "data": {"modality": "MR", "dimensions": 2, "spacing_mm": [4.0, 4.0], "patch": [56, 48], "split": SPLIT},
            "simulation": {"patients": 8, "slices": 1, "prevalence": [0.5], "unseen": ["fujifilm-flair-0.4t"]},
        }
    )
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
