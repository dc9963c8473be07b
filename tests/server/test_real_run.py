"""A consortium of three hospitals with everything real, and an operator who has a bad day."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from operators import federad_server, free_port, needs_nginx, new_consortium, running_server, short_folder, until

from client.station import Station
from server.consortium import Consortium
from server.journal import Journal
from server.runs import RunFolder
from shared_models.plan import Plan
from shared_models.release import verify_folder
from shared_models.weights import weights_sha256
from simulation.engine import Execution, run_rounds
from simulation.stations import forget_history

pytestmark = [pytest.mark.slow, pytest.mark.system, needs_nginx]

SITES = ("site-1", "site-2", "site-3")


def federad_site(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "client.cli", *words]
    root = Path(__file__).parents[2]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root, check=False)


class Staged:
    """The operator's folder, the sites' folders, and what people type."""

    def __init__(self, folder: Path, hospitals) -> None:
        self.folder, self.operator = folder, folder / "operator"
        self.operator.mkdir()
        self.consortium = new_consortium(self.operator, free_port())
        self.data = {name: hospital.folder for name, hospital in zip(SITES, hospitals, strict=True)}

    def site(self, *words: str, name: str) -> None:
        ended = federad_site(*words, "--site", str(self.folder / name))
        assert ended.returncode == 0, (words, name, ended.stdout, ended.stderr)

    def server(self, *words: str) -> dict:
        ended = federad_server(*words, "--dir", str(self.operator), "--json")
        assert ended.returncode == 0, (words, ended.stdout, ended.stderr)
        return json.loads(ended.stdout)

    def join(self, name: str) -> None:
        invitation = self.folder / f"{name}.txt"
        self.server("invite", name, "--to", str(invitation))
        self.site("enrol", str(invitation), "--data", str(self.data[name]), name=name)
        self.site("start", "--threads", "1", name=name)

    def begin(self, plan: Plan, *, n_sites: int) -> RunFolder:
        """Order a run and let every site approve it."""
        path = self.folder / f"{plan.name}.toml"
        path.write_text(as_toml(plan))
        run = self.server("run", str(path), "--sites", str(n_sites))["run"]
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda name: self.approve(plan, name), SITES))
        return RunFolder(self.operator, run)

    def approve(self, plan: Plan, name: str) -> None:
        if name not in {site.name for site in self.consortium.sites() if site.status == "enrolled"}:
            return
        until(lambda: federad_site("approve", plan.sha256, "--site", str(self.folder / name)).returncode == 0)

    def state(self, run: RunFolder) -> str:
        return Consortium(self.operator).run(run.run).state

    def server_app(self, run: RunFolder) -> int:
        """The process that holds the run's lock."""
        inode = (run.path / "lock").stat().st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5].endswith(f":{inode}"):
                return int(fields[4])
        raise AssertionError("nobody carries out the run")

    def weights_in_process(self, plan: Plan, folder: Path) -> str:
        """What the same stations make of the plan without a network between them."""
        stations = []
        for name in SITES:
            station = shutil.copytree(self.folder / name / "station", folder / name)
            forget_history(station)
            Station(station).approve(plan)
            stations.append(station)
        outcome = run_rounds(plan, stations, Journal(folder / "journal"), seed=0, execution=Execution(workers=1))
        return weights_sha256(outcome.last)


def as_toml(plan: Plan) -> str:
    """A plan as a file: its smoke test's text with another name and number of rounds."""
    text = (Path(__file__).parents[2] / "simulation" / "plans" / "smoke.toml").read_text()
    text = text.replace('name = "smoke"', f'name = "{plan.name}"').replace("rounds = 2", f"rounds = {plan.rounds}")
    assert Plan.from_toml(text).sha256 == plan.sha256
    return text


@pytest.fixture(scope="module")
def staged(hospitals):
    with short_folder() as folder, ExitStack() as stack:
        staged = Staged(folder, hospitals)
        stack.enter_context(running_server(staged.operator))
        for name in SITES:
            stack.callback(federad_site, "stop", "--site", str(folder / name))
            staged.join(name)
        yield staged


def n_committed(run: RunFolder) -> int:
    return len(run.records())


class TestRun:
    def test_run_survives_its_processes_and_its_operator(self, staged, smoke_plan, tmp_path):
        """
        ServerApp killed, SuperLink killed, run stopped and resumed: the weights are those of an undisturbed run.
        """
        plan = smoke_plan.model_copy(update={"name": "bad-day", "rounds": 7})
        run = staged.begin(plan, n_sites=3)
        until(lambda: n_committed(run) >= 1, within_s=180)
        os.kill(staged.server_app(run), signal.SIGKILL)  # the server takes the run up again by itself
        until(lambda: n_committed(run) >= 2, within_s=180)
        os.kill(staged.server("status")["server"]["processes"]["SuperLink"], signal.SIGKILL)
        until(lambda: n_committed(run) >= 3, within_s=180)
        assert staged.server("stop", run.run)["run"] == run.run
        assert staged.state(run) == "stopped"
        until(lambda: not run.is_carried_out(), within_s=60)
        staged.server("resume", run.run)
        until(lambda: staged.state(run) == "finished", within_s=240)

        assert all(record["replied"] == list(SITES) for record in run.records())
        assert [event.round for event in run.events() if event.what == "resumed"]
        assert run.result["weights_sha256"] == staged.weights_in_process(plan, tmp_path)

    def test_finished_run_is_neither_resumed_nor_stopped(self, staged, smoke_plan):
        """
        S196 for both, with the way to its result.
        """
        (run,) = [row for row in staged.server("status")["runs"] if row["plan"] == "bad-day"]
        for command in ("resume", "stop"):
            ended = federad_server(command, run["run"], "--dir", str(staged.operator))
            assert ended.returncode == 196, ended.stderr
            assert "federad-server status" in ended.stderr

    def test_finished_run_is_released_for_hospitals_and_for_other_software(self, staged):
        """
        Its model is listed, exported, and fetched by a hospital, which checks the operator's signature.
        """
        (card,) = staged.server("releases")
        run = RunFolder(staged.operator, card["run"])
        staged.server("export", card["run"], "--to", str(staged.folder / "model.onnx"))
        staged.site("fetch", card["run"], name="site-1")
        fetched = verify_folder(
            staged.folder / "site-1" / "releases" / card["model_sha256"],
            staged.consortium.plan_key.public_key(),
            staged.consortium.config.name,
        )

        assert run.result["release"] == fetched.sha256
        assert weights_sha256(fetched.weights()) == run.result["released_sha256"]
        assert (staged.folder / "model.onnx").stat().st_size > 0

    def test_updates_are_deleted_from_flower_s_database_when_a_run_is_over(self, staged):
        """
        Nothing that a site sent stays with the SuperLink.
        """
        import sqlite3

        def n_objects() -> int:
            with sqlite3.connect(f"file:{staged.operator}/flower/state.db?mode=ro", uri=True) as db:
                tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
                kept = [table for table in tables if table in ("objects", "message_ins", "message_res")]
                assert len(kept) == 3, tables
                return sum(db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0] for table in kept)

        until(lambda: n_objects() == 0, within_s=60)

    def test_revoked_site_is_out_before_its_next_answer(self, staged, smoke_plan):
        """
        Revoked during a run, a site is left out of it at once, its node is gone, and the others go on.
        """
        plan = smoke_plan.model_copy(update={"name": "one-leaves", "rounds": 3})
        run = staged.begin(plan, n_sites=3)
        until(lambda: n_committed(run) >= 1, within_s=180)
        staged.server("revoke", "site-3")
        after = n_committed(run) + 1
        until(lambda: staged.state(run) == "finished", within_s=300)

        assert run.records()[0]["replied"] == list(SITES)
        assert all("site-3" not in record["replied"] for record in run.records()[after:])
        assert run.records()[-1]["replied"] == ["site-1", "site-2"]
