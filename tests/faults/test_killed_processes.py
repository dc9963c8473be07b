"""Every process of a deployment, killed in the middle of its work."""

from __future__ import annotations

import os
import signal

import pytest
from faults.staged import ODD, SITES, plan_of
from faults.town import needs_town
from operators import needs_nginx

pytestmark = [pytest.mark.slow, pytest.mark.system, needs_nginx, needs_town]

SLOWLY = {"step_s": 0.6}

BACK_S = 45.0
"""How long a killed process may cost a round on a busy machine [s]; Flower alone takes its node for alive for a minute."""


class TestSite:
    def test_whatever_is_killed_at_a_site_costs_no_round(self, staged, tmp_path):
        """
        Station, courier, SuperNode, SuperExec and supervisor, each killed while its site trains: it is back in less than
        Flower's minute, every round has every site, none trained twice to its end, and the weights are those of an
        undisturbed run.
        """
        plan = plan_of("killed", rounds=5)
        staged.odd.disturb(rounds=dict.fromkeys(map(str, range(1, 6)), SLOWLY))
        run = staged.begin(plan)
        victims = ["client.cli station", "client.cli courier", "client.guard import supernode", "flower_superexec"]
        for round_, word in enumerate(victims, start=1):
            staged.until_training(ODD, run, round_)
            os.kill(staged.process(ODD, word), signal.SIGKILL)
            staged.until_committed(run, round_, within_s=BACK_S)
        staged.until_training(ODD, run, 5)
        os.kill(staged.supervisor(ODD), signal.SIGKILL)
        staged.stop(ODD)
        staged.start(ODD)  # as systemd would
        staged.until_state(run, "finished")

        assert [record["replied"] for record in run.records()] == [list(SITES)] * 5
        assert staged.n_trained(ODD, run) == dict.fromkeys(range(1, 6), 1)
        assert run.result["weights_sha256"] == staged.in_process(plan[0], tmp_path)


class TestServer:
    def test_parts_that_are_killed_are_back_and_the_run_goes_on(self, staged):
        """
        nginx, the consortium service and the SuperExec, each killed during a round: started again by themselves, and every
        round ends with every site.
        """
        names = ("nginx", "consortium service", "SuperExec")
        run = staged.begin(plan_of("parts", rounds=4))
        before = {}
        for number, name in enumerate(names, start=1):
            staged.until_committed(run, number)
            before[name] = staged.pid_of(name)
            os.kill(before[name], signal.SIGKILL)
        staged.until_state(run, "finished")

        assert all(staged.pid_of(name) != before[name] for name in names)
        assert [record["replied"] for record in run.records()] == [list(SITES)] * 4

    def test_server_app_that_is_killed_adding_up_and_writing_makes_the_same_model(self, staged, tmp_path):
        """
        Killed between two updates, before the weights are in their file, before their record, and after: the server takes
        the run up by itself each time, sites train once a round, and the weights are those of an undisturbed run.
        """
        plan = plan_of("adding-up", rounds=4)
        moments = [
            ("server.accumulator:ExactMean.add", 2),
            ("server.journal:encode", 1),
            ("server.journal:_sync_folder", 1),
            ("server.journal:Journal.keep_only", 1),
        ]
        staged.server_odd.disturb(kill=moments[0][0], call=moments[0][1])
        run = staged.begin(plan)
        for number, (_, _) in enumerate(moments, start=1):
            staged.until_true(run, lambda: not staged.server_odd.is_disturbed)
            staged.until_committed(run, number)
            if number < len(moments):
                kill, call = moments[number]
                staged.server_odd.disturb(kill=kill, call=call)
        staged.until_state(run, "finished")

        assert [record["replied"] for record in run.records()] == [list(SITES)] * 4
        assert all(staged.n_trained(name, run) == dict.fromkeys(range(1, 5), 1) for name in SITES)
        assert run.result["weights_sha256"] == staged.in_process(plan[0], tmp_path)
