"""The courier: what it carries, what it keeps alive, and that it takes everything with it when it ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from datetime import timedelta

import network
import pytest
from deployed import FEDERAD_SITE, ROOT, descendants, is_alive, make_site, until
from deployed import Operator as Signer

from client import courier as module
from client import enrolment
from client.courier import Errands, environment, node_config, rotating
from client.folder import SiteFolder
from client.link import Membership
from client.service import StationServer
from client.station import Station
from client.stub import StationAwayError
from shared_models.errors import FederadError
from shared_models.signing import public_pem

MEMBER = Membership(
    name="Demo",
    host="fl.example.org",
    port=443,
    site="site-1",
    plan_key_pem=public_pem(Signer().key.public_key()),
    invitation="0" * 32,
)


@pytest.fixture
def operator(tmp_path):
    """A consortium service behind its front, without Flower."""
    with network.Operator(tmp_path / "operator") as running:
        yield running


@pytest.fixture
def site(operator, hospitals, tmp_path) -> SiteFolder:
    """A site that has joined."""
    folder = make_site(tmp_path / "site", hospitals[0].folder, Signer())
    shutil.rmtree(folder.courier)
    member = enrolment.enrol(operator.consortium.invite("site-1"), folder.courier, {})
    Station(folder.station).trust(member.name, member.plan_key_pem)
    return folder


@network.needs_nginx
class TestErrands:
    def test_plan_is_brought_and_the_decision_told(self, operator, site, smoke_plan):
        """
        A signed plan comes from the consortium to the station as "offered"; what is decided there comes back.
        """
        operator.consortium.offer(smoke_plan, "run-7", 0)
        station = Station(site.station)
        errands = Errands(site.courier, site.socket)
        with StationServer(station, site.socket):
            errands.run()
            (listed,) = station.plans()
            assert (listed.state, listed.run, listed.plan) == ("offered", "run-7", smoke_plan)
            assert operator.consortium.approvals(smoke_plan.sha256) == set()

            station.approve(smoke_plan)
            errands.run()
            assert operator.consortium.approvals(smoke_plan.sha256) == {"site-1"}
            station.refuse(smoke_plan)
            errands.run()
            assert operator.consortium.approvals(smoke_plan.sha256) == set()
            errands.run()
            assert station.outbox()[1] == []
        errands.close()

    def test_notice_is_kept_until_it_arrived(self, operator, site, smoke_plan):
        """
        While the consortium is away nothing is forgotten; afterwards everything is told.
        """
        operator.consortium.offer(smoke_plan, "run-7", 0)
        station = Station(site.station)
        errands = Errands(site.courier, site.socket)
        with StationServer(station, site.socket):
            errands.run()
            operator.stop_service()
            station.approve(smoke_plan)
            for _ in range(2):
                with pytest.raises(FederadError, match="C151"):
                    errands.run()
            assert len(station.outbox()[1]) == 1
        errands.close()

    def test_station_that_is_away_is_noticed(self, operator, site):
        """
        Without a station nothing is fetched and nothing told.
        """
        errands = Errands(site.courier, site.socket)
        with pytest.raises(StationAwayError):
            errands.run()
        errands.close()

    def test_certificate_is_renewed_before_it_ends(self, operator, site, monkeypatch):
        """
        A certificate near its end is replaced, and the errand goes on with the new one.
        """
        before = (site.courier / "site.crt").read_bytes()
        renew = enrolment.renew
        monkeypatch.setattr(
            module.enrolment,
            "renew",
            lambda courier, link: (
                renew(courier, link, before=timedelta(days=10_000))
                if (site.courier / "site.crt").read_bytes() == before
                else False
            ),
        )
        errands = Errands(site.courier, site.socket)
        with StationServer(Station(site.station), site.socket):
            errands.run()
            errands.run()
        errands.close()

        assert (site.courier / "site.crt").read_bytes() != before

    def test_revoked_site_is_told_so(self, operator, site):
        """
        After revocation the next errand ends with the consortium's word.
        """
        operator.consortium.revoke("site-1")
        errands = Errands(site.courier, site.socket)
        with StationServer(Station(site.station), site.socket), pytest.raises(FederadError) as error:
            errands.run()
        assert error.value.code in {"C149", "C154"}


class TestSurroundings:
    def test_supernode_gets_little_of_the_environment(self, tmp_path, monkeypatch):
        """
        Nothing of this process's environment but language and time zone, and a PATH on which the guard comes first.
        """
        for name in ("SECRET", "PYTHONPATH", "LD_PRELOAD", "FLWR_HOME", "http_proxy", "ALL_PROXY", "https_proxy"):
            monkeypatch.setenv(name, "x")
        monkeypatch.delenv("https_proxy")
        env = environment(tmp_path, MEMBER)

        assert set(env) <= {*module.SWITCHES, *module.PASSED_ON, "PATH", "HOME", "FLWR_HOME"}
        assert env["PATH"].split(":")[0] == str(tmp_path / "bin")
        assert env["FLWR_HOME"].startswith(str(tmp_path))
        assert env["FLWR_TELEMETRY_ENABLED"] == "0"

    @pytest.mark.parametrize(("excepted", "passed"), [("", True), (".example.org", False)])
    def test_proxy_is_passed_on_if_the_link_takes_it(self, tmp_path, monkeypatch, excepted, passed):
        """
        Flower goes the way that the link goes.
        """
        monkeypatch.setenv("https_proxy", "http://proxy:3128")
        monkeypatch.setenv("no_proxy", excepted)

        assert environment(tmp_path, MEMBER).get("https_proxy") == ("http://proxy:3128" if passed else None)

    @pytest.mark.parametrize("name", ["plain", "with blank", 'with "quotes"', "a=b c='", "back\\slash", "ümlaut"])
    def test_paths_survive_flowers_spelling(self, tmp_path, name):
        """
        What the ClientApp is told is the path as it is, or C163 says that it cannot be told.
        """
        from flwr.common.config import parse_config_args

        if "'" in name:
            with pytest.raises(FederadError, match="C163"):
                node_config(tmp_path / name, tmp_path / "s.sock")
            return
        told = parse_config_args([node_config(tmp_path / name, tmp_path / "s.sock")])
        assert told == {"station-socket": str(tmp_path / "s.sock"), "courier-folder": str(tmp_path / name)}

    def test_log_of_a_child_does_not_grow_without_end(self, tmp_path, monkeypatch):
        """
        A chatty child fills a few files of limited size.
        """
        monkeypatch.setattr(module, "LOG_BYTES", 10_000)
        logger = rotating(tmp_path / "supernode.log")
        for number in range(5_000):
            logger.info("line %d", number)

        files = list(tmp_path.iterdir())
        assert len(files) <= 1 + module.LOGS_KEPT
        assert sum(file.stat().st_size for file in files) < 50_000


@network.needs_nginx
@pytest.mark.slow
class TestProcess:
    @pytest.fixture
    def courier(self, site):
        process = self.start(site)
        until(lambda: self.log(site) and len(descendants(process.pid)) >= 2, process)
        yield process
        process.kill()
        process.wait()

    def start(self, site) -> subprocess.Popen[str]:
        command = [*FEDERAD_SITE, "courier", "--site", str(site.root)]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    def log(self, site) -> str:
        file = site.courier / "logs" / "supernode.log"
        return file.read_text() if file.exists() else ""

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
    def test_children_end_with_it(self, courier, number):
        """
        However the courier ends, nothing that it started goes on; told to stop, it ends with 0.
        """
        children = descendants(courier.pid)
        assert len(children) >= 2
        os.kill(courier.pid, number)
        status = courier.wait(40)

        until(lambda: not any(map(is_alive, children)), within_s=10)
        assert status == (-9 if number == signal.SIGKILL else 0)

    def test_second_courier_for_one_folder_is_refused(self, site, courier):
        """
        It ends with 156 and names the first.
        """
        second = self.start(site)
        _, said = second.communicate(timeout=60)
        assert second.returncode == 156
        assert f"process {courier.pid}" in said

    def test_it_says_what_is_wrong_and_when_it_is_mended(self, site, courier):
        """
        The status has the number of the trouble while there is some, and when the consortium was reached last.
        """
        import json

        until(lambda: "C158" in (site.courier / "status.json").read_text(), courier)
        with StationServer(Station(site.station), site.socket):
            until(lambda: json.loads((site.courier / "status.json").read_bytes())["trouble"] is None, courier)
            assert json.loads((site.courier / "status.json").read_bytes())["connected"]

    def test_site_that_has_not_enrolled_is_told(self, tmp_path, hospitals):
        """
        C150, before anything is started.
        """
        folder = make_site(tmp_path / "other", hospitals[0].folder, Signer())
        process = self.start(folder)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 150
        assert "enrol" in said

    def test_supernode_that_does_not_stay_is_tried_again_with_pauses(self, site, courier):
        """
        Without a SuperLink at the other end the SuperNode ends; the courier starts it again, not at once.
        """
        began = time.monotonic()
        until(lambda: self.log(site).count("Starting Flower SuperNode") >= 2, courier)
        assert time.monotonic() - began < 60
        time.sleep(3)
        assert self.log(site).count("Starting Flower SuperNode") < 6
