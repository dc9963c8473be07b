"""What a deployment costs over the training itself."""

from __future__ import annotations

import time

import pytest
from faults.staged import plan_of
from operators import needs_nginx

from server.journal import Journal
from simulation.consortium import emulate
from simulation.engine import Execution, run_rounds
from simulation.stations import SiteFolder, prepare_stations

pytestmark = [pytest.mark.slow, pytest.mark.system, needs_nginx]

FIRST_ROUND_S = 90.0
OVERHEAD_S = 10.0


def test_four_sites_cost_ten_seconds_a_round_and_are_at_work_in_a_minute_and_a_half(tmp_path, capsys):
    """
    A plan with next to nothing to train: the first round is over within 90 s of the command, staging included, and a round
    takes at most 10 s longer than in process.
    """
    plan, _ = plan_of("nothing", rounds=6, simulation={"patients": 6, "slices": 2})
    hospitals = emulate(plan, n_sites=4, folder=tmp_path / "hospitals", seed=0, workers=1, progress=None)
    sites = [SiteFolder(h.name, h.folder, tmp_path / "stations" / h.name) for h in hospitals]
    prepare_stations(plan, sites, seed=0, workers=1, on_site=lambda _: None)
    stations = [site.station for site in sites]
    journal, committed, began = Journal(tmp_path / "deployed"), [], time.monotonic()
    run_rounds(
        plan,
        stations,
        journal,
        seed=0,
        execution=Execution("deployment", staging=tmp_path / "staging"),
        on_progress=lambda event: event.what == "committed" and committed.append(time.monotonic() - began),
    )
    here = Journal(tmp_path / "here")
    run_rounds(plan, stations, here, seed=0, execution=Execution(workers=1))
    costs = [a["seconds"] - b["seconds"] for a, b in zip(journal.records(), here.records(), strict=True)]
    with capsys.disabled():
        print(f"\nfirst round after {committed[0]:.0f} s; seconds over the training: {[round(c, 1) for c in costs]}")

    assert committed[0] <= FIRST_ROUND_S
    assert sorted(costs)[len(costs) // 2] <= OVERHEAD_S
