"""Sites that are too slow, or too few, in a deployment."""

from __future__ import annotations

import pytest
from faults.staged import GOOD, ODD, SITES, plan_of
from faults.town import needs_town
from operators import needs_nginx

pytestmark = [pytest.mark.slow, pytest.mark.system, needs_nginx, needs_town]


class TestDeadline:
    def test_slow_site_is_missing_once_and_counts_again(self, staged):
        """
        The round ends at its deadline with the others; what the site finishes too late counts nowhere, and it is in the
        next round.
        """
        plan = plan_of("slow", rounds=2, strategy={"deadline_s": 25.0})
        staged.odd.disturb(rounds={"1": {"slow_s": 32}})
        run = staged.begin(plan)
        staged.until_state(run, "finished")
        first, second = run.records()

        assert (first["replied"], first["missing"]) == (list(GOOD), [ODD])
        assert 25 <= first["seconds"] < 32
        assert second["replied"] == list(SITES)
        assert staged.n_trained(ODD, run) == {1: 1, 2: 1}

    def test_fewer_than_the_minimum_pause_the_run_until_somebody_resumes_it(self, staged, tmp_path):
        """
        S180 after the deadline, with the name of the site that is missing; when it is back, the run ends as undisturbed.
        """
        plan = plan_of("few", rounds=2, strategy={"minimum_sites": 3, "deadline_s": 20.0})
        staged.odd.disturb(rounds={"2": {"slow_s": 3}})
        run = staged.begin(plan)
        staged.until_committed(run, 1)
        staged.stop(ODD)
        staged.until_state(run, "paused")
        assert run.error["error"] == "S180"
        assert f"{ODD} (no reply)" in run.error["happened"]
        assert len(run.records()) == 1

        staged.start(ODD)
        staged.until_connected(ODD)
        staged.server("resume", run.run)
        staged.until_state(run, "finished")
        assert [record["replied"] for record in run.records()] == [list(SITES)] * 2
        assert run.result["weights_sha256"] == staged.in_process(plan[0], tmp_path)
