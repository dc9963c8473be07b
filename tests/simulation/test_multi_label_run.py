"""Several findings a study, from emulated hospitals to the report."""

from __future__ import annotations

import csv
import json

import highdicom as hd
import numpy as np
import pytest

from shared_models.errors import FederadError
from shared_models.plan import Plan
from simulation.consortium import FINDINGS, emulate
from simulation.run import Request, Watcher, simulate

SEED = 4


def plan_of(labels=tuple(FINDINGS), **tables: dict) -> Plan:
    return Plan.from_tables(
        {
            "name": "tiny",
            "rounds": 2,
            "task": {
                "kind": "classification", "target": "multi-label", "labels": list(labels), "network": "resnet",
                "channels": [4, 8],
            },
            "data": {
                "modality": "MR", "dimensions": 2, "spacing_mm": [4.0, 4.0], "patch": [56, 48],
                "split": {"train": 0.4, "validation": 0.1, "test": 0.5},
            },
            "simulation": {"patients": 8, "slices": 1, "prevalence": [0.7]},
            **tables,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One run, and its hospitals."""
    folder = tmp_path_factory.mktemp("run")
    simulate(Request(plan_of(), folder, 2, seed=SEED, compare=False), Watcher())
    return folder


def test_table_says_what_is_drawn(folder):
    """
    Each study's row names the halves of the head that hold an outline, or says that nothing was found.
    """
    n_nothing = 0
    for site in sorted((folder / "hospitals").glob("site-*")):
        with (site / "labels.csv").open(newline="") as lines:
            said = {row["study"]: set(row["label"].split("; ")) for row in csv.DictReader(lines)}
        outlines = {seg.StudyInstanceUID: seg for seg in (hd.seg.segread(path) for path in site.rglob("seg.dcm"))}
        assert said.keys() == outlines.keys()
        for study, words in said.items():
            frames = np.atleast_3d(outlines[study].pixel_array.T).T  # (frame, row, column)
            rows = np.flatnonzero(frames.any(axis=(0, 2)))
            if not len(rows):
                assert words == {"none"}
                n_nothing += 1
                continue
            half = -(-frames.shape[1] // 2)
            assert ("front lesion" in words) == (rows[0] < half)
            assert ("back lesion" in words) == (rows[-1] >= half)
    assert n_nothing > 0


def test_result_holds_every_label_and_pictures_say_what_was_found(folder):
    """
    The headline is the mean area; each label that can have one has its own.
    """
    result = json.loads((folder / "result.json").read_text())
    page = (folder / "report.html").read_text()

    assert (result["headline"], result["status"]) == ("auc", "finished")
    assert {"accuracy", "log_likelihood", "auc"} <= result["test"].keys()
    assert any(name.startswith("auc: ") for name in result["test"])
    assert "; found " in page


def test_finding_that_is_not_emulated_is_refused(tmp_path):
    """
    R230 names those that are.
    """
    with pytest.raises(FederadError, match="R230") as error:
        emulate(plan_of(("front lesion", "fracture")), n_sites=1, folder=tmp_path, seed=SEED)
    assert "several lesions" in str(error.value)
