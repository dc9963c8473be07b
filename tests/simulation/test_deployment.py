"""A staged consortium: real processes, real keys, and the weights of the simulation."""

from __future__ import annotations

import os
import shutil
import socket

import psutil
import pytest

from client.station import Station
from server.journal import Journal
from shared_models.errors import FederadError
from shared_models.weights import weights_sha256
from simulation import deployment
from simulation.engine import Execution, run_rounds
from simulation.stations import forget_history

needs_nginx = pytest.mark.skipif(
    shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None, reason="nginx is not installed"
)


def named(folder):
    """Processes of this machine that have a path in ``folder`` in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in word for word in process.info["cmdline"] or []):
            found.append(process)
    return found


@pytest.mark.system
@pytest.mark.slow
@needs_nginx
class TestStaged:
    def test_deployment_gives_the_weights_of_the_simulation_and_is_taken_down(self, smoke_plan, stations, tmp_path):
        """
        Over TLS, through nginx, SuperLink, SuperNodes and sockets, the same plan and seed end on the same bits; afterwards
        nothing runs any more, and the journal holds the rounds.
        """
        events = []
        journal = Journal(tmp_path / "deployed")
        execution = Execution("deployment", staging=tmp_path / "staging")
        deployed = run_rounds(smoke_plan, stations, journal, seed=0, execution=execution, on_progress=events.append)
        for station in stations:
            forget_history(station)
            Station(station).approve(smoke_plan)
        here = run_rounds(smoke_plan, stations, Journal(tmp_path / "here"), seed=0, execution=Execution())

        assert weights_sha256(deployed.last) == weights_sha256(here.last)
        assert weights_sha256(deployed.best) == weights_sha256(here.best)
        assert deployed.test == here.test
        assert [r["replied"] for r in journal.records()] == [["site-1", "site-2", "site-3"]] * 2
        assert [e.round for e in events if e.what == "committed"] == [1, 2]
        assert named(tmp_path / "staging") == []
        assert not (tmp_path / "staging" / "operator" / "run" / "server.json").exists()

    def test_run_that_pauses_says_so_and_is_taken_down(self, smoke_plan, stations, tmp_path):
        """
        Updates above the limit of the plan are left out; the run pauses with S180 as in any engine, and its words arrive.
        """
        strategy = smoke_plan.strategy.model_copy(update={"max_update_norm": 1e-9})
        plan = smoke_plan.model_copy(update={"strategy": strategy})
        journal = Journal(tmp_path / "journal")

        with pytest.raises(FederadError, match="norm") as caught:
            run_rounds(plan, stations, journal, seed=0, execution=Execution("deployment", staging=tmp_path / "staging"))

        assert caught.value.code == "S180"
        assert journal.records() == []
        assert named(tmp_path / "staging") == []


class TestRefused:
    @pytest.mark.parametrize("trouble", [{"drop_out": 0.2}, {"delay_s": 1.0}, {"late_joiners": 1}])
    def test_emulated_trouble_is_refused_not_ignored(self, smoke_plan, stations, tmp_path, trouble):
        """
        R235 names the key, and nothing is staged.
        """
        table = smoke_plan.simulation.model_copy(update=trouble)
        plan = smoke_plan.model_copy(update={"simulation": table})
        staging = tmp_path / "staging"

        with pytest.raises(FederadError, match=next(iter(trouble))) as caught:
            run_rounds(
                plan, stations, Journal(tmp_path / "j"), seed=0, execution=Execution("deployment", staging=staging)
            )

        assert caught.value.code == "R235"
        assert not staging.exists()

    @needs_nginx
    def test_operator_that_cannot_start_names_its_log(self, smoke_plan, stations, tmp_path, monkeypatch):
        """
        With its port taken by another program the run ends with R236, and the log says why.
        """
        staging = tmp_path / "staging"
        with socket.create_server(("127.0.0.1", 0)) as taken:
            monkeypatch.setattr(deployment, "free_port", lambda: taken.getsockname()[1])
            execution = Execution("deployment", staging=staging)
            with pytest.raises(FederadError, match="did not start") as caught:
                run_rounds(smoke_plan, stations, Journal(tmp_path / "j"), seed=0, execution=execution)

        assert caught.value.code == "R236"
        assert "S194" in (staging / "logs" / "operator.log").read_text(encoding="utf-8")
