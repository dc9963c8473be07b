"""``federad-server`` as an operator types it, as far as no server has to run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from operators import approve, enrol_site, federad_server, free_port

from client.enrolment import make_request, take_reply
from server.cli import app, duration_s, split_host
from server.consortium import Consortium
from server.journal import Journal
from server.runs import Order, RunFolder, fingerprint_of
from shared_models.consortium import EnrolReply, Invitation
from shared_models.errors import FederadError
from shared_models.fingerprint import as_arrays, fingerprint_plan, vector_of
from shared_models.plan import Plan
from shared_models.weights import weights_sha256

ROOT = Path(__file__).parents[2]


@pytest.fixture
def made(tmp_path):
    """A folder with a consortium in it, and the consortium in the folder."""
    ended = federad_server("init", "consortium", "--host", f"localhost:{free_port()}", "--name", "Lab", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    return tmp_path


@pytest.fixture
def consortium(made):
    return Consortium(made / "consortium")


def command(*arguments: str, cwd, **environment):
    return federad_server(*arguments, cwd=cwd, **environment)


def told(ended):
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


class TestFolder:
    def test_init_makes_everything_and_says_what_comes_next(self, tmp_path):
        """
        One command makes folder, authority and keys, for the owner's eyes alone.
        """
        ended = command("init", "lab", "--host", "server.example.org", cwd=tmp_path)

        assert ended.returncode == 0, ended.stderr
        assert "server.example.org:443" in ended.stdout
        assert "next:  federad-server start --detach --dir lab" in ended.stdout
        assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "lab" / "keys").glob("*.key"))

    def test_init_never_overwrites_keys(self, made):
        """
        A second init on the same folder is an error and changes nothing.
        """
        before = (made / "consortium" / "keys" / "ca.key").read_bytes()
        ended = command("init", "consortium", "--host", "other.example.org", cwd=made)

        assert ended.returncode == 183
        assert (made / "consortium" / "keys" / "ca.key").read_bytes() == before

    def test_folder_is_found_by_option_environment_and_place(self, made, tmp_path_factory):
        """
        ``--dir``, else the environment, else the current folder, else ./consortium; hints say ``--dir`` where it is needed.
        """
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        folder = str(made / "consortium")

        assert "--dir" not in command("sites", cwd=made).stdout
        assert "--dir" not in command("sites", cwd=made / "consortium").stdout
        assert "--dir" not in command("sites", cwd=elsewhere, FEDERAD_SERVER=folder).stdout
        assert f"--dir {folder}" in command("sites", "--dir", folder, cwd=elsewhere).stdout
        assert command("sites", cwd=elsewhere).returncode == 183

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("a.example.org", ("a.example.org", 443)),
            ("A.example.org:8443", ("a.example.org", 8443)),
            ("10.0.0.1:1", ("10.0.0.1", 1)),
            ("[2001:db8::1]:8443", ("2001:db8::1", 8443)),
            ("[2001:db8::1]", ("2001:db8::1", 443)),
        ],
    )
    def test_host_is_a_name_with_or_without_a_port(self, text, expected):
        """
        443 unless it says otherwise.
        """
        assert split_host(text) == expected

    @pytest.mark.parametrize("host", ["", "a b", "a:b", "2001:db8::1", "https://a", "a:99999999"])
    def test_host_that_is_none_is_refused(self, tmp_path, host):
        """
        A mistyped host ends in a number and makes no folder.
        """
        ended = command("init", "lab", "--host", host, cwd=tmp_path)

        assert ended.returncode == 199, ended.stderr
        assert not (tmp_path / "lab").exists()

    @pytest.mark.parametrize("host", ["a_b.example", "-a.example", "300.1.1.1", "a:0", "a:70000"])
    def test_host_that_no_certificate_can_name_is_refused(self, tmp_path, host):
        """
        The same for one that is written well and means nothing.
        """
        ended = command("init", "lab", "--host", host, cwd=tmp_path)

        assert ended.returncode == 199, ended.stderr
        assert not (tmp_path / "lab").exists()


class TestSites:
    def test_invitation_is_one_line_that_can_be_pasted(self, made):
        """
        It is printed alone on its line, and says until when it can be used.
        """
        ended = command("invite", "site-1", cwd=made)
        invitation = Invitation.parse(ended.stdout.splitlines()[0])

        assert (invitation.site, invitation.consortium, invitation.host) == ("site-1", "Lab", "localhost")
        assert "federad-site enrol INVITATION --data DIR" in ended.stdout

    def test_invitation_to_a_file_is_for_one_pair_of_eyes(self, made):
        """
        The file is closed to others, and the terminal does not show the secret.
        """
        ended = command("invite", "site-1", "--to", "inv.txt", "--valid", "12h", cwd=made)
        text = (made / "inv.txt").read_text()

        assert (made / "inv.txt").stat().st_mode & 0o077 == 0
        assert Invitation.parse(text).site == "site-1"
        assert text.strip() not in ended.stdout

    @pytest.mark.parametrize(("text", "seconds"), [("30m", 1800), ("12h", 43_200), ("7d", 604_800), ("2w", 1_209_600)])
    def test_durations_are_read_as_written(self, text, seconds):
        """
        Minutes, hours, days and weeks.
        """
        assert duration_s(text) == seconds

    @pytest.mark.parametrize("text", ["", "7", "d", "7 years", "-1d", "1.5h"])
    def test_other_durations_are_refused(self, text):
        """
        What could mean several things means nothing.
        """
        with pytest.raises(FederadError) as caught:
            duration_s(text)

        assert caught.value.code == "S199"

    def test_site_enrols_by_files_alone(self, made, consortium, tmp_path):
        """
        Request in, reply out; the site takes the reply, and the list shows it as enrolled.
        """
        invitation = Invitation.parse(command("invite", "site-1", cwd=made).stdout.splitlines()[0])
        (made / "request.json").write_bytes(make_request(invitation, tmp_path / "courier").encode())
        ended = command("enrol-file", "request.json", "--to", "reply.json", cwd=made)

        assert ended.returncode == 0, ended.stderr
        reply = EnrolReply.decode((made / "reply.json").read_text())
        assert take_reply(tmp_path / "courier", reply).site == "site-1"
        (row,) = told(command("sites", "--json", cwd=made))
        assert (row["name"], row["status"]) == ("site-1", "enrolled")

    def test_request_that_is_none_is_refused(self, made):
        """
        A file of another kind, or none, ends in a number.
        """
        (made / "other.json").write_text("{}")

        assert command("enrol-file", "other.json", "--to", "reply.json", cwd=made).returncode == 211
        assert command("enrol-file", "missing.json", "--to", "reply.json", cwd=made).returncode == 199
        assert not (made / "reply.json").exists()

    def test_revoked_site_is_out_and_the_way_back_is_named(self, made, consortium, tmp_path):
        """
        ``revoke`` works without a running server, and says how to let the site in again.
        """
        enrol_site(consortium, "site-1", tmp_path / "keys")
        ended = command("revoke", "site-1", cwd=made)

        assert ended.returncode == 0
        assert "federad-server invite site-1" in ended.stdout
        assert consortium.site("site-1").status == "revoked"
        assert command("revoke", "nobody", cwd=made).returncode == 184


class TestRuns:
    @pytest.mark.parametrize("words", [("run", "PLAN"), ("stop",), ("resume", "a-run")])
    def test_without_a_server_the_message_says_to_start_it(self, made, consortium, smoke_plan, words):
        """
        S190, and nothing is offered to any site.
        """
        (made / "PLAN").write_text("")
        plan = made / "plan.toml"
        plan.write_bytes(_smoke())
        RunFolder(consortium.folder, "a-run").create(smoke_plan, Order(wait_for=2))
        consortium.offer(smoke_plan, "a-run", 0)
        ended = command(*(str(plan) if word == "PLAN" else word for word in words), cwd=made)

        assert ended.returncode == 190, ended.stderr
        assert "federad-server start" in ended.stderr
        assert [row.run for row in consortium.runs()] == ["a-run"]

    def test_status_shows_server_sites_and_runs(self, made, consortium, smoke_plan, tmp_path):
        """
        Also while nothing runs: what is known is in the store and in the journals.
        """
        for site in ("site-1", "site-2"):
            enrol_site(consortium, site, tmp_path / site)
        consortium.offer(smoke_plan, "a-run", 3)
        RunFolder(consortium.folder, "a-run").create(smoke_plan, Order(wait_for=2))
        approve(consortium, smoke_plan, "site-1")
        status = told(command("status", "--json", cwd=made))

        assert (status["running"], status["server"]) == (False, None)
        assert [row["name"] for row in status["sites"]] == ["site-1", "site-2"]
        (run,) = status["runs"]
        assert (run["run"], run["state"], run["seed"], run["n_rounds"]) == ("a-run", "offered", 3, 2)
        assert {site["name"]: site["says"] for site in run["sites"]} == {"site-1": "approved", "site-2": "undecided"}

    def test_status_of_a_run_shows_its_rounds_and_what_can_be_done(self, made, consortium, smoke_plan):
        """
        A paused run shows why, what was committed, and the command that goes on.
        """
        consortium.offer(smoke_plan, "a-run", 0)
        folder = RunFolder(consortium.folder, "a-run")
        folder.create(smoke_plan, Order(wait_for=2))
        record = {
            "round": 1,
            "seconds": 12.0,
            "replied": ["site-1", "site-2"],
            "refused": [{"site": "site-3", "reason": "values that are not finite"}],
            "missing": ["site-4"],
            "training_loss": 0.5,
            "validation": {"dice": 0.25},
            "per_site": {},
            "weights_sha256": "",
        }
        Journal(folder.path).amend(1, record)
        folder.write("error.json", {"error": "S180", "happened": "Round 2 is paused."})
        consortium.set_run_state("a-run", "paused")
        ended = command("status", "a-run", cwd=made, COLUMNS="160")

        assert ended.returncode == 0, ended.stderr
        for words in ("paused", "round 1 of 2", "values that are not finite", "site-4", "dice 0.250", "S180"):
            assert words in ended.stdout
        assert "next:  federad-server resume a-run" in ended.stdout

    def test_watching_a_run_that_stands_still_ends(self, made, consortium, smoke_plan):
        """
        ``watch`` shows the newest run and returns when nothing will happen by itself.
        """
        assert command("watch", cwd=made).returncode == 184
        consortium.offer(smoke_plan, "a-run", 0)
        RunFolder(consortium.folder, "a-run").create(smoke_plan, Order(wait_for=2))
        consortium.set_run_state("a-run", "stopped")
        ended = command("watch", "--json", cwd=made)

        assert json.loads(ended.stdout.splitlines()[-1])["state"] == "stopped"

    def test_finished_fingerprint_configures_a_plan(self, made, consortium, smoke_plan):
        """
        What three sites have said is read from the journal, and the plan that follows is one that can be run.
        """
        asked = fingerprint_plan(smoke_plan)
        consortium.offer(asked, "a-run", 0)
        folder = RunFolder(consortium.folder, "a-run")
        folder.create(asked, Order(wait_for=3))
        mean = as_arrays(20 * vector_of([((5.0, 1.0, 1.0), (20, 224, 192))]))
        record = {"round": 1, "replied": ["site-1", "site-2", "site-3"], "weights_sha256": weights_sha256(mean)}
        folder.journal.commit(1, record, mean)
        (made / "plan.toml").write_bytes(_smoke())
        words = ("configure", "a-run", "plan.toml", "--to", "configured.toml", "--memory-gb", "0.5")
        consortium.set_run_state("a-run", "finished")
        found = told(command(*words, "--json", cwd=made))
        plan = Plan.load(made / "configured.toml")

        assert found["plan_sha256"] == plan.sha256
        assert (plan.task.network, plan.data.dimensions, plan.data.spacing_mm) == ("dynunet", 3, (5.0, 1.0, 1.0))
        assert command(*words, cwd=made).returncode == 242

    def test_run_that_trains_has_no_fingerprint(self, made, consortium, smoke_plan):
        """
        A plan is not configured from a model, nor from a run that has not ended: S243.
        """
        consortium.offer(smoke_plan, "a-run", 0)
        consortium.set_run_state("a-run", "finished")
        consortium.offer(fingerprint_plan(smoke_plan), "another-run", 0)

        for name, why in (("a-run", "trains a model"), ("another-run", "has not ended")):
            with pytest.raises(FederadError, match=f"(?s)S243.*{why}"):
                fingerprint_of(consortium, name)

    def test_run_whose_process_is_gone_is_shown_as_interrupted(self, made, consortium, smoke_plan):
        """
        The store may say that it is running; nobody holds its lock, so it is not.
        """
        consortium.offer(smoke_plan, "a-run", 0)
        folder = RunFolder(consortium.folder, "a-run")
        folder.create(smoke_plan, Order(wait_for=2))
        consortium.set_run_state("a-run", "running", 17)

        assert told(command("status", "a-run", "--json", cwd=made))["state"] == "interrupted"
        with folder.locked():
            assert told(command("status", "a-run", "--json", cwd=made))["state"] == "running"


class TestWords:
    @pytest.mark.parametrize("words", [("nonsense",), ("invite",), ("run",), ("status", "--nonsense"), ("init", "x")])
    def test_mistyped_command_is_a_numbered_error(self, made, words):
        """
        S199 on the error stream, and as JSON where that was asked for.
        """
        ended = command(*words, "--json", cwd=made)

        assert ended.returncode == 199
        assert json.loads(ended.stdout)["error"] == "S199"
        assert "Traceback" not in ended.stderr

    def test_every_command_says_what_it_does(self):
        """
        The list of commands has a sentence for each, and each takes --json and --dir where it makes sense.
        """
        from typer.main import get_command

        shown = {name: c for name, c in get_command(app).commands.items() if not c.hidden}
        assert set(shown) == {
            "configure", "enrol-file", "export", "fingerprint", "init", "invite", "releases", "resume", "revoke", "run",
            "sites", "start", "status", "stop", "watch",
        }  # fmt: skip
        for name, one in shown.items():
            options = {option for parameter in one.params for option in parameter.opts}
            assert re.fullmatch(r"[A-Z].*[.]", (one.help or "").splitlines()[0]), name
            assert "--json" in options, name
            assert name == "init" or "--dir" in options, name


def _smoke() -> bytes:
    return (ROOT / "simulation" / "plans" / "smoke.toml").read_bytes()
