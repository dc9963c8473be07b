"""A whole run on emulated hospitals with one scanner each, of which one has nothing outlined."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from server.journal import Journal
from shared_models.messages import decode_answer
from shared_models.moments import TABLE
from shared_models.plan import Plan
from simulation.engine import Execution, run_rounds
from simulation.stations import SiteFolder, prepare_stations


@pytest.fixture
def plan(smoke_plan) -> Plan:
    """Two rounds: moments in the first, features that are moved in the second."""
    tables = json.loads(smoke_plan.canonical_json())
    tables["task"]["channels"], tables["data"]["patch"] = [4, 8], [32, 32]
    tables["training"] |= {"samples_per_patient": 1}
    tables["adaptation"] = {"adversarial": "moments", "warm_up": 0.0}
    return Plan.from_tables(tables)


def test_server_trains_on_what_three_sites_released_and_features_move(plan, hospitals, tmp_path, monkeypatch):
    """
    Round 1 brings a row from each site, and round 2 another update than a run whose server trained nothing; a site without
    a single mask gives its row and no update.
    """
    monkeypatch.setattr("client.moments.FEWEST", 1)
    monkeypatch.setattr("server.moments.FEWEST", 1)
    last = tmp_path / "images without masks"
    folders = []
    for hospital in hospitals:
        folders.append(SiteFolder(hospital.name, hospital.folder, tmp_path / "stations" / hospital.name))
    shutil.copytree(hospitals[2].folder, last)
    for mask in last.rglob("seg.dcm"):
        mask.unlink()
    folders[2] = SiteFolder(hospitals[2].name, last, folders[2].station)
    prepare_stations(plan, folders, seed=0, workers=1, on_site=lambda _: None)
    stations = [folder.station for folder in folders]
    journal = Journal(tmp_path / "journal")
    outcome = run_rounds(plan, stations, journal, seed=0, execution=Execution())

    noted = outcome.records[0].discriminator
    assert outcome.records[0].replied == [folder.name for folder in folders]
    assert len(noted["scanners"]) == 3
    assert (noted["left_out"] == "") == (noted["accuracy"] is not None)
    assert outcome.records[1].discriminator is None
    (sent,) = (stations[2] / "answers").glob("000001-train-*.safetensors")
    answer = decode_answer(sent.read_bytes())
    assert (answer.update, answer.counts["trained"]) == ({}, 0)
    assert np.count_nonzero(answer.moments[TABLE].any(axis=1)) == 1
