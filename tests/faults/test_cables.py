"""What a network does to a deployment: cut, closed by a proxy, answered by somebody else, looked at from outside."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from faults.staged import ODD, PORT, ROOT, SITES, plan_of
from faults.town import needs_town
from operators import needs_nginx

from server import pki

pytestmark = [pytest.mark.slow, pytest.mark.system, needs_nginx, needs_town]

PROXY = """
import sys, time
sys.path.insert(0, "tests")
from network import Proxy
with Proxy(login="hospital:secret") as proxy:
    print(proxy.port, flush=True)
    while True:
        time.sleep(0.5)
        print(len(proxy.asked), flush=True)
"""

SCAN = """
import json, socket, sys
found = []
for port in range(1, 65536):
    with socket.socket() as probe:
        probe.settimeout(5)
        if probe.connect_ex((sys.argv[1], port)) == 0:
            probe.sendall(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
            try:
                said = probe.recv(100)
            except OSError:
                said = b""
            found.append([port, said.decode("latin-1")])
print(json.dumps(found))
"""


class TestCut:
    def test_site_cut_off_for_a_minute_and_a_half_while_it_trains_is_in_the_round(self, staged, tmp_path):
        """
        Flower gives it up and loses what it sends; back on the line it is asked again and answers from its store. Both ends
        had taken the link for open all the while.
        """
        plan = plan_of("cut", rounds=2)
        staged.odd.disturb(rounds={"1": {"step_s": 1.0}})
        run = staged.begin(plan)
        staged.until_training(ODD, run, 1)
        staged.town.cut(ODD)
        try:
            time.sleep(90)
            assert run.records() == []
        finally:
            staged.town.mend(ODD)
        staged.until_state(run, "finished")

        assert [record["replied"] for record in run.records()] == [list(SITES)] * 2
        assert staged.n_trained(ODD, run) == {1: 1, 2: 1}
        assert run.result["weights_sha256"] == staged.in_process(plan[0], tmp_path)


class TestProxy:
    def test_proxy_that_wants_a_login_is_named_without_a_storm_and_with_it_all_goes_through(self, staged):
        """
        C152 with 407 and a few tries a minute; started with name and password, the site trains through the proxy.
        """
        command = [*staged.town.at(ODD), sys.executable, "-c", PROXY]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as proxy:
            port = int(proxy.stdout.readline())
            staged.stop(ODD)
            staged.start(ODD, https_proxy=f"http://127.0.0.1:{port}")
            try:
                staged.until(lambda: staged.trouble(ODD).get("error") == "C152")
                assert "407" in staged.trouble(ODD)["happened"]
                time.sleep(20)
                staged.stop(ODD)
                staged.start(ODD, https_proxy=f"http://hospital:secret@127.0.0.1:{port}")
                staged.until_connected(ODD)
                run = staged.begin(plan_of("through-a-proxy", rounds=1))
                staged.until_state(run, "finished")
            finally:
                staged.stop(ODD)
                staged.start(ODD)
                proxy.kill()
            counts = [int(line) for line in proxy.stdout]
        staged.until_connected(ODD)

        assert run.records()[0]["replied"] == list(SITES)
        assert max(b - a for a, b in zip(counts, counts[40:], strict=False)) < 100


class TestCertificate:
    @pytest.mark.parametrize(("fault", "word"), [("expired", "ended on"), ("another name", "is for")])
    def test_run_waits_while_the_server_shows_a_certificate_that_is_none(self, staged, fault, word):
        """
        Every site says why it stays away (C153); when the right certificate is back, so are they, and the run goes on.
        """
        plan = plan_of(f"certificate-{fault[:7]}", rounds=2)
        staged.odd.disturb(rounds={"2": {"slow_s": 10}})
        run = staged.begin(plan)
        staged.until_committed(run, 1)
        with self.shown_instead(staged, fault):
            staged.until(lambda: all(staged.trouble(name).get("error") == "C153" for name in SITES))
            assert all(word in staged.trouble(name)["happened"] for name in SITES)
        staged.until_state(run, "finished", within_s=180)

        assert [record["replied"] for record in run.records()] == [list(SITES)] * 2

    @contextmanager
    def shown_instead(self, staged, fault):
        keys, authority = staged.operator / "keys", staged.consortium.authority
        files = [keys / "server.crt", keys / "server.key"]
        kept = [file.read_bytes() for file in files]
        key = pki.new_key()
        host = staged.consortium.config.host if fault == "expired" else "elsewhere.example"
        certificate = pki.server_certificate(authority, key.public_key(), host, -1 if fault == "expired" else 30)
        files[0].write_text(pki.certificate_pem(certificate))
        files[1].write_bytes(pki.key_pem(key))
        staged.signal("nginx", signal.SIGHUP)
        try:
            yield
        finally:
            for file, content in zip(files, kept, strict=True):
                file.write_bytes(content)
            staged.signal("nginx", signal.SIGHUP)


class TestOutsideView:
    def scan(self, staged, of, at):
        """Every port of somebody's that is open, and what it says to who speaks in the clear."""
        command = [*staged.town.at(at), sys.executable, "-c", SCAN, staged.town.address(of)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        return dict(json.loads(done.stdout))

    def test_hospital_finds_one_open_port_that_says_nothing_without_tls(self, staged):
        """
        All 65535 of the operator's, tried from a hospital's position.
        """
        assert self.scan(staged, of="op", at=SITES[0]) == {PORT: ""}

    def test_nothing_is_open_at_a_hospital(self, staged):
        """
        All 65535 of a hospital's, tried from the operator's position.
        """
        assert self.scan(staged, of=SITES[0], at="op") == {}
