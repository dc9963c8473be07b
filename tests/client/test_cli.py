"""``federad-site`` as a hospital types it, in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import network
import pytest
from deployed import FEDERAD_SITE, ROOT, descendants, is_alive, until

from client.audit import FILE
from client.folder import SiteFolder
from client.processes import holder, only_one
from shared_models.consortium import EnrolRequest


def run(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "FEDERAD_SITE"} | environment
    env |= {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [*FEDERAD_SITE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env, timeout=300)


def ok(*arguments: object, cwd: Path | None = None, **environment: str):
    """What a command that ends well says with --json."""
    done = run(*arguments, "--json", cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def operator(tmp_path):
    with network.Operator(tmp_path / "operator") as running:
        yield running


@pytest.fixture
def line(operator) -> str:
    return operator.consortium.invite("site-1").line()


@pytest.fixture
def root(tmp_path):
    """A site's folder, stopped in the end."""
    yield tmp_path / "site"
    run("stop", "--site", tmp_path / "site")


@pytest.fixture
def joined(line, hospitals, root) -> SiteFolder:
    ok("enrol", line, "--data", hospitals[0].folder, "--site", root)
    return SiteFolder(root)


@network.needs_nginx
class TestEnrol:
    def test_one_command_makes_the_site_and_joins(self, line, hospitals, root, operator):
        """
        No file has to be edited, and the next command is told.
        """
        told = ok("enrol", line, "--data", hospitals[0].folder, "--site", root)

        assert (told["site"], told["consortium"]) == ("site-1", "Demo")
        assert told["next"] == f"federad-site start --site {root}"
        assert operator.consortium.site("site-1").status == "enrolled"
        for private in ("station", "courier"):
            assert (root / private).stat().st_mode & 0o777 == 0o700
        assert ok("enrol", line, "--site", root)["site"] == "site-1"

    def test_invitation_may_be_a_file_and_the_folder_the_default(self, line, hospitals, tmp_path):
        """
        As a person does it in an empty folder: the next command needs no path.
        """
        (tmp_path / "invitation.txt").write_text(line)
        told = ok("enrol", "invitation.txt", "--data", hospitals[0].folder, cwd=tmp_path)

        assert told["folder"] == str(tmp_path / "federad-site")
        assert told["next"] == "federad-site start"
        assert ok("status", cwd=tmp_path)["station"] is None
        assert ok("status", cwd=tmp_path / "federad-site")["station"] is None
        assert ok("status", FEDERAD_SITE=str(tmp_path / "federad-site"))["folder"] == str(tmp_path / "federad-site")

    def test_request_and_reply_may_travel_as_files(self, line, hospitals, root, operator, tmp_path):
        """
        A hospital without a network path enrols by mail, and no private key is in what it sends.
        """
        told = ok(
            "enrol", line, "--data", hospitals[0].folder, "--site", root, "--request", tmp_path / "request.json"
        )  # fmt: skip
        assert told["next"].startswith("federad-site enrol --reply")
        assert "PRIVATE" not in (tmp_path / "request.json").read_text()
        reply = operator.consortium.enrol(EnrolRequest.decode((tmp_path / "request.json").read_bytes()))
        (tmp_path / "reply.json").write_bytes(reply.encode())

        assert ok("enrol", "--reply", tmp_path / "reply.json", "--site", root)["consortium"] == "Demo"

    def test_certificate_is_renewed_on_request(self, line, hospitals, root, operator):
        """
        Long before its last month, over the same key; the operator knows the new end.
        """
        ok("enrol", line, "--data", hospitals[0].folder, "--site", root)
        key, first = ((root / "courier" / name).read_bytes() for name in ("site.key", "site.crt"))

        told = ok("renew", "--site", root)

        assert (root / "courier" / "site.crt").read_bytes() != first
        assert (root / "courier" / "site.key").read_bytes() == key
        assert told["not_after"] == operator.consortium.site("site-1").not_after.isoformat()
        assert told["next"] == f"federad-site status --site {root}"

    @pytest.mark.parametrize(
        ("arguments", "code"),
        [
            (["enrol", "federad1:nonsense", "--data", "."], "C148"),
            (["enrol"], "C163"),
            (["enrol", "LINE"], "C163"),
            (["enrol", "LINE", "--data", "/no/such/folder"], "C163"),
            (["enrol", "--reply", "/no/such/file"], "C143"),
            (["init", "elsewhere", "--name", "bad name", "--data", "."], "C163"),
            (["start"], "C143"),
            (["status"], "C143"),
            (["plans"], "C143"),
            (["approve", "x"], "C143"),
            (["stop"], "C143"),
            (["check"], "C143"),
            (["audit", "verify"], "C143"),
            (["nonsense"], "C163"),
            (["approve"], "C163"),
            (["start", "--threads", "-1"], "C163"),
        ],
    )
    def test_mistakes_are_numbered_and_leave_no_site_behind(self, line, tmp_path, arguments, code):
        """
        The exit status is the number, the message has a way out, and there is no traceback.
        """
        done = run(*[line if argument == "LINE" else argument for argument in arguments], cwd=tmp_path)

        assert "Traceback" not in done.stderr
        assert done.returncode == int(code[1:])
        assert done.stderr.startswith(code)
        assert f"docs/errors/{code}.md" in done.stderr
        assert not (tmp_path / "federad-site" / "station" / "site.toml").exists()

    def test_folder_of_another_site_is_not_taken(self, joined, operator, hospitals):
        """
        A folder is one site's for ever.
        """
        other = operator.consortium.invite("site-2").line()
        done = run("enrol", other, "--data", hospitals[1].folder, "--site", joined.root)

        assert done.returncode == 163
        assert "site-1" in done.stderr


@network.needs_nginx
@pytest.mark.slow
class TestLife:
    def test_from_start_to_stop(self, joined, operator, smoke_plan):
        """
        Start, see a plan, approve it, see the audit, refuse it, stop: each command ends well and names the next.
        """
        site = ["--site", joined.root]
        started = ok("start", *site, "--threads", 1)
        assert started["station"]["site"] == "site-1"
        assert started["courier"]["connected"]
        assert started["next"].startswith("federad-site plans")
        pid = holder(joined.lock)
        assert run("start", *site).returncode == 156

        operator.consortium.offer(smoke_plan, "run-1", 0)
        until(lambda: ok("plans", *site))
        (listed,) = ok("plans", *site)
        assert (listed["name"], listed["state"], listed["sha256"]) == ("smoke", "offered", smoke_plan.sha256)
        assert run("approve", "other", *site).returncode == 160
        approved = ok("approve", "smoke", *site)
        assert approved["patients"]["train"] > 0
        until(lambda: operator.consortium.approvals(smoke_plan.sha256) == {"site-1"})
        assert ok("refuse", smoke_plan.sha256[:8], *site)["state"] == "refused"
        until(lambda: operator.consortium.approvals(smoke_plan.sha256) == set())

        heads = ok("audit", "verify", *site)
        assert heads["station"]["lines"] >= 4
        checks = {check["name"]: check for check in ok("check", *site)}
        assert set(checks) == {"device", "data", "keys", "connection", "ledger"}
        assert not any(check["error"] for check in checks.values())

        children = descendants(pid)
        assert ok("stop", *site)["stopped"] is True
        until(lambda: not any(map(is_alive, {pid, *children})), within_s=10)
        assert ok("status", *site)["station"] is None
        assert ok("stop", *site)["stopped"] is False

    def test_every_command_reads_well_without_json(self, joined, operator, smoke_plan):
        """
        For people: what is, and the next command.
        """
        site = ["--site", joined.root]
        for arguments, said in (
            (["status"], "not running"),
            (["start"], "are running"),
            (["status"], "waiting for questions"),
            (["plans"], "No plan has been offered yet"),
            (["check"], "patients"),
            (["audit", "verify"], "whole"),
            (["stop"], "Stopped"),
        ):
            done = run(*arguments, *site)
            assert done.returncode == 0, done.stderr
            assert said in done.stdout
            assert "next:" in done.stdout

    def test_what_dies_is_started_again(self, joined):
        """
        SIGKILL of the station or of the courier: the supervisor starts another.
        """
        site = ["--site", joined.root]
        ok("start", *site)
        for lock in (joined.station / "process.lock", joined.courier / "process.lock"):
            first = holder(lock)
            os.kill(first, signal.SIGKILL)
            until(lambda first=first, lock=lock: holder(lock) not in (None, first))
        until(lambda: (ok("status", *site)["courier"] or {}).get("trouble", 1) is None)
        assert ok("status", *site)["station"]["site"] == "site-1"

    def test_site_that_runs_as_services_is_stopped_by_who_started_it(self, joined):
        """
        ``stop`` does not claim that it was not running: it names systemd and Docker, which would start it again.
        """
        with only_one(joined.station / "process.lock", "station"):
            stopped = run("stop", "--site", joined.root)
            started = run("start", "--site", joined.root)

        assert (stopped.returncode, started.returncode) == (163, 156)
        assert "sudo systemctl stop federad-courier federad-station" in stopped.stderr
        assert "docker compose down" in stopped.stderr

    def test_killed_supervisor_takes_everything_along(self, joined):
        """
        Nothing is left that would be in the way of a new start.
        """
        site = ["--site", joined.root]
        ok("start", *site)
        pid = holder(joined.lock)
        children = descendants(pid)
        os.kill(pid, signal.SIGKILL)
        until(lambda: not any(map(is_alive, children)), within_s=10)
        assert ok("start", *site)["station"]["site"] == "site-1"

    def test_foreground_ends_with_ctrl_c(self, joined):
        """
        As in a container: both processes run until told, and the command ends with 0.
        """
        command = [*FEDERAD_SITE, "start", "--foreground", "--site", str(joined.root)]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        until(lambda: ok("status", "--site", joined.root)["station"])
        children = descendants(process.pid)
        process.send_signal(signal.SIGINT)

        assert process.wait(60) == 0
        until(lambda: not any(map(is_alive, children)), within_s=10)

    def test_consortium_that_is_away_is_named_and_the_site_starts(self, joined, operator):
        """
        The operator sleeps: start says so with a number, and goes on trying.
        """
        operator.stop_service()
        told = ok("start", "--site", joined.root)
        assert told["courier"]["trouble"]["error"] == "C151"
        check = run("check", "--site", joined.root, "--json")
        assert check.returncode == 151

    def test_tampered_audit_ends_with_its_number(self, joined, operator, smoke_plan):
        """
        162, and the first line that does not fit.
        """
        from client.station import Station

        Station(joined.station).refuse(smoke_plan)
        file = joined.station / FILE
        file.write_text(file.read_text().replace("refused", "refuset", 1))
        done = run("audit", "verify", "--site", joined.root)

        assert done.returncode == 162
        assert "line 1" in done.stderr

    def test_ctrl_c_while_preparing_ends_with_its_number(self, joined, operator, smoke_plan, hospitals):
        """
        233 and no traceback; the same command again goes on.
        """
        command = [*FEDERAD_SITE, "check", "--site", str(joined.root)]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)

        assert process.returncode in (233, 0)
        assert "Traceback" not in said


def test_help_loads_no_torch():
    """
    The command answers at once: heavy packages are loaded only where they are needed.
    """
    code = "import client.cli, sys; sys.exit(bool({'torch', 'flwr', 'grpc'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
