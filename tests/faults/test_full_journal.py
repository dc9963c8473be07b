"""A journal that cannot be written, without root: files may grow no further."""

from __future__ import annotations

import resource

import numpy as np
import pytest
from faults.flower import ArithmeticStation, FlowerGrid, Node
from operators import approve, enrol_site, new_consortium

from server.journal import Journal
from server.roster import ApprovedRoster
from server.rounds import Rounds
from shared_models.errors import FederadError

SITES = ("site-1", "site-2")


@pytest.fixture(scope="module")
def consortium(smoke_plan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("consortium")
    consortium = new_consortium(folder / "operator")
    consortium.offer(smoke_plan, "a-run", 0)
    for number, site in enumerate(SITES, start=1):
        enrol_site(consortium, site, folder / site)
        consortium.set_node_id(site, number)
    approve(consortium, smoke_plan, *SITES)
    return consortium


def rounds(plan, consortium, folder, on_progress=lambda _: None):
    grid = FlowerGrid([Node(number, ArithmeticStation(site)) for number, site in enumerate(SITES, start=1)])
    roster = ApprovedRoster(grid, consortium, plan.sha256)
    start = {"w": np.linspace(-1, 1, 3000, dtype=np.float32)}
    return Rounds(
        plan, grid, Journal(folder), run="a-run", seed=0, weights=start, roster=roster, on_progress=on_progress
    )


@pytest.fixture
def small_files():
    """Lets files grow to 4000 bytes and no further, from when it is called."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_run_pauses_and_goes_on_with_more_room(smoke_plan, consortium, tmp_path, small_files):
    """
    S198 in the middle of a commit; the round before stays, and with room the run ends as undisturbed.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = rounds(smoke_plan, consortium, tmp_path / "run", lambda event: event.what == "committed" and small_files())
    with pytest.raises(FederadError) as caught:
        full.run()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert caught.value.code == "S198"
    assert [record["round"] for record in Journal(tmp_path / "run").records()] == [1]
    resumed = rounds(smoke_plan, consortium, tmp_path / "run").run()
    undisturbed = rounds(smoke_plan, consortium, tmp_path / "calm").run()
    assert np.array_equal(resumed.last["w"], undisturbed.last["w"])
