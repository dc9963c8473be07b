"""Versions, clocks, bundles and disks that are not as they should be, in a deployment."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress

import pytest
from faults.staged import ODD, ROOT, SITES, plan_of
from faults.town import needs_town
from operators import needs_nginx

pytestmark = [pytest.mark.slow, pytest.mark.system, needs_nginx, needs_town]

ORDER = """
import sys
from pathlib import Path
from flwr.cli.build import build_fab_from_files
from server import bundle, runs
from server.operator import open_consortium
from server.superlink import SuperLink
from shared_models.plan import Plan

def with_code():
    project = bundle._PROJECT.format(version="9", run=bundle.RUN_KEY)
    files = {
        "pyproject.toml": project.replace('["README.md"]', '["README.md", "client/*.py"]').encode(),
        "README.md": b"harmless",
        "client/app.py": b"from pathlib import Path\\nPath('%s').write_text('ran')\\n" % sys.argv[3].encode(),
    }
    made = bundle.Bundle(build_fab_from_files(files)[0])
    assert b"client/app.py" in made.content
    return made

runs.make_bundle = with_code
folder = Path(sys.argv[1])
consortium = open_consortium(folder)
print(runs.order_run(consortium, SuperLink(folder), Plan.load(Path(sys.argv[2])), 0, 3))
"""


class TestVersion:
    def test_site_of_another_version_is_told_both(self, staged):
        """
        M211 names its own version and the consortium's; with the right one installed the site is back.
        """
        staged.stop(ODD)
        staged.odd.disturb(protocol=7)
        staged.start(ODD)
        staged.until(lambda: staged.trouble(ODD).get("error") == "M211")
        assert "'7'" in staged.trouble(ODD)["happened"]
        assert "'1'" in staged.trouble(ODD)["happened"]

        staged.stop(ODD)
        staged.odd.mend()
        staged.start(ODD)
        staged.until_connected(ODD)


class TestClock:
    @pytest.mark.parametrize(("ahead_s", "word"), [(600, "10 minutes ahead"), (-600, "10 minutes behind")])
    def test_clock_that_is_ten_minutes_wrong_is_named(self, staged, ahead_s, word):
        """
        C155 says how far and in which direction, not "login failed"; the SuperNode, which Flower turns away, is not tried
        without pause. With the clock right the site is back.
        """
        staged.stop(ODD)
        staged.odd.set_clock(ahead_s)
        staged.start(ODD)
        staged.until(lambda: staged.trouble(ODD).get("error") == "C155")
        time.sleep(10)
        assert word in staged.trouble(ODD)["happened"]
        assert staged.status(ODD)["supernode"]["starts"] < 8

        staged.stop(ODD)
        staged.odd.mend()
        staged.start(ODD)
        staged.until_connected(ODD)


class TestBundle:
    def test_bundle_with_code_runs_nowhere_and_the_run_can_go_on_without_it(self, staged, tmp_path):
        """
        Every site refuses it and writes that down; the run pauses with the reason, and goes on with the right bundle.
        """
        ran, plan = tmp_path / "ran", plan_of("with-code", rounds=1)
        (tmp_path / "plan.toml").write_text(plan[1])
        command = [sys.executable, "-c", ORDER, str(staged.operator), str(tmp_path / "plan.toml"), str(ran)]
        ordered = subprocess.run(
            [*staged.town.at("op"), *command], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert ordered.returncode == 0, ordered.stderr
        run = staged.approved(plan, ordered.stdout.strip())
        staged.until_state(run, "paused")

        assert run.error["error"] == "S180"
        assert all(f"{name} (bundle-refused)" in run.error["happened"] for name in SITES)
        assert all("bundle-refused" in [line["event"] for line in staged.audit(name, "courier")] for name in SITES)
        staged.server("resume", run.run)
        staged.until_state(run, "finished")
        assert run.records()[0]["replied"] == list(SITES)
        assert not ran.exists()


class TestFullDisk:
    def test_disk_that_is_full_at_the_journal_pauses_the_run(self, staged, tmp_path):
        """
        S198; what was committed stays, and with room the run ends as undisturbed.
        """
        runs = staged.operator / "runs"
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(runs)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("cannot mount a small file system here")
        try:
            plan = plan_of("full-disk", rounds=3)
            staged.odd.disturb(rounds={"2": {"slow_s": 4}})
            run = staged.begin(plan)
            staged.until_committed(run, 1)
            with suppress(OSError), (runs / "ballast").open("wb", buffering=0) as stream:
                while True:
                    stream.write(b"\0" * 4096)
            staged.until_state(run, "paused")
            assert [record["round"] for record in run.records()] == [1]

            (runs / "ballast").unlink()
            staged.server("resume", run.run)
            staged.until_state(run, "finished")
            assert [record["replied"] for record in run.records()] == [list(SITES)] * 3
            assert run.result["weights_sha256"] == staged.in_process(plan[0], tmp_path)
        finally:
            subprocess.run(["umount", "-l", str(runs)], check=True)
