"""The command as a researcher uses it, in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from server.journal import Journal
from shared_models.plan import Plan
from shared_models.weights import decode, weights_sha256

PLANS = Path(__file__).parents[2] / "simulation" / "plans"
FEDERAD_SIM = [sys.executable, "-m", "simulation.cli"]


def run(*arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*prefix, *FEDERAD_SIM, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=PLANS.parents[1])


class TestRun:
    @pytest.mark.slow
    def test_smoke_plan_ends_with_result_report_and_model(self, tmp_path):
        """
        One command makes hospitals, trains, compares and reports; a second report is the same.
        """
        done = run("run", PLANS / "smoke.toml", "--sites", 2, "--out", tmp_path, "--workers", 2, "--json")
        assert done.returncode == 0, done.stderr

        result = json.loads(done.stdout)
        assert result == json.loads((tmp_path / "result.json").read_text())
        assert result["status"] == "finished"
        assert [row["method"] for row in result["comparison"]["rows"]] == [
            "federated", "central", "local:site-1", "local:site-2",
        ]  # fmt: skip
        weights, header = decode((tmp_path / "model.safetensors").read_bytes())
        assert weights_sha256(weights) == result["released_sha256"]
        assert json.loads(header)["plan"]["name"] == "smoke"

        page = (tmp_path / "report.html").read_bytes()
        assert run("report", tmp_path).returncode == 0
        assert (tmp_path / "report.html").read_bytes() == page

    @pytest.mark.slow
    def test_ctrl_c_stops_cleanly_and_keeps_what_is_done(self, tmp_path):
        """
        After Ctrl-C in the middle of a run the committed rounds, their weights and a report are there, without traceback.
        """
        plan = tmp_path / "plan.toml"
        plan.write_text((PLANS / "smoke.toml").read_text().replace("rounds = 2", "rounds = 5000"))
        out = tmp_path / "out"
        process = subprocess.Popen(
            [*FEDERAD_SIM, "run", str(plan), "--sites", "2", "--out", str(out), "--workers", "2"],
            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=PLANS.parents[1], start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  # a job in the background ignores it
        )  # fmt: skip
        while not (out / "journal" / "journal.sqlite").exists() or len(Journal(out / "journal").records()) < 3:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)

        assert process.returncode == 233
        assert "Traceback" not in err
        result = json.loads((out / "result.json").read_text())
        assert result["status"] == "stopped"
        assert len(result["rounds"]) >= 3
        last = Journal(out / "journal").weights(result["rounds"][-1]["round"])
        assert weights_sha256(last) == result["weights_sha256"]
        assert (out / "report.html").exists()

    @pytest.mark.system
    @pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="a network namespace needs root")
    def test_works_without_any_network(self, tmp_path):
        """
        In a network namespace without even a loopback the smoke plan ends well: nothing calls home.
        """
        prefix = ("unshare", "--net")
        done = run("run", PLANS / "smoke.toml", "--sites", 2, "--out", tmp_path, "--no-compare", prefix=prefix)
        assert done.returncode == 0, done.stderr


class TestData:
    def test_writes_hospitals_that_another_program_can_read(self, tmp_path):
        """
        `federad-sim data` writes DICOM that pydicom reads, with scanner headers, and lists the hospitals.
        """
        import pydicom

        done = run("data", PLANS / "smoke.toml", "--sites", 2, "--out", tmp_path, "--json", "--workers", 1)
        assert done.returncode == 0, done.stderr
        hospitals = json.loads(done.stdout)
        assert [h["name"] for h in hospitals] == ["site-1", "site-2"]
        headers = [pydicom.dcmread(next(Path(h["folder"]).rglob("im-001.dcm"))) for h in hospitals]
        assert headers[0].Manufacturer != headers[1].Manufacturer
        assert all(header.Modality == "MR" for header in headers)


class TestConfigure:
    @pytest.mark.slow
    def test_plan_configures_itself_from_its_sites(self, tmp_path):
        """
        `federad-sim configure` asks emulated hospitals and writes a plan for their spacing; nothing else is left behind.
        """
        plan = tmp_path / "plan.toml"
        plan.write_text(
            (PLANS / "smoke.toml").read_text().replace("patients = 6", "patients = 4\nspacing_mm = [8.0, 3.0, 3.0]")
        )
        done = run(
            "configure",
            plan,
            "--sites",
            3,
            "--out",
            tmp_path / "own.toml",
            "--memory-gb",
            0.05,
            "--workers",
            1,
            "--json",
        )
        assert done.returncode == 0, done.stderr
        found, told = Plan.load(tmp_path / "own.toml"), json.loads(done.stdout)

        assert (told["plan_sha256"], told["n_sites"]) == (found.sha256, 3)
        assert (found.data.dimensions, found.data.spacing_mm) == (2, (3.0, 3.0))
        assert found.simulation == Plan.load(plan).simulation
        assert sorted(path.name for path in tmp_path.iterdir()) == ["own.toml", "plan.toml"]


class TestExperiment:
    def test_alone_it_lists_them(self):
        """
        `federad-sim experiment` without a name lists every experiment with its title.
        """
        done = run("experiment")
        assert "federated-vs-central" in done.stdout
