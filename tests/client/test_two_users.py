"""Two accounts: what the courier's may do at a hospital, and what it may not. Needs root, and makes the accounts."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import network
import pytest
from deployed import ROOT, descendants, until

from client.folder import DATA_USER, GROUP, NET_USER
from client.processes import holder

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="making accounts needs root"),
    pytest.mark.skipif(shutil.which("useradd") is None, reason="useradd is not installed"),
    network.needs_nginx,
]


@pytest.fixture(scope="module")
def accounts():
    """The accounts of an installed site; those that were not there before are removed."""
    made = []
    if subprocess.run(["getent", "group", GROUP], capture_output=True, check=False).returncode:
        subprocess.run(["groupadd", "--system", GROUP], check=True)
        made.append(["groupdel", GROUP])
    for name in (DATA_USER, NET_USER):
        if subprocess.run(["getent", "passwd", name], capture_output=True, check=False).returncode:
            command = ["useradd", "--system", "--user-group", "--groups", GROUP, "--no-create-home", name]
            subprocess.run(command, check=True)
            made.append(["userdel", name])
        subprocess.run(
            ["usermod", "--append", "--groups", GROUP, name], check=True
        )  # one left by a test that was killed
    yield
    for command in reversed(made):
        subprocess.run(command, check=False, capture_output=True)


@pytest.fixture(scope="module")
def place():
    """A folder that everybody may look into."""
    with tempfile.TemporaryDirectory(prefix="fs-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def python(place) -> str:
    """A Python with federad in it that every account may run."""
    if _may_run(sys.executable):
        return sys.executable
    system = shutil.which(f"python3.{sys.version_info.minor}", path="/usr/bin:/usr/local/bin")
    if system is None:
        pytest.skip("no Python here may be run by other accounts")
    subprocess.run([system, "-m", "venv", "--without-pip", place / "venv"], check=True)
    (packages,) = (place / "venv" / "lib").glob("python*/site-packages")
    (packages / "federad.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n{ROOT}\n")
    if not _may_run(str(place / "venv" / "bin" / "python")):
        pytest.skip("no Python here may be run by other accounts")
    return str(place / "venv" / "bin" / "python")


@pytest.fixture(scope="module")
def data(place, accounts, hospitals) -> Path:
    """A hospital's images, for the station's account only."""
    folder = place / "data"
    shutil.copytree(hospitals[0].folder, folder)
    shutil.copy(hospitals[0].folder.parent / "manifest.json", place)  # it says that this hospital is emulated
    user = pwd.getpwnam(DATA_USER)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user.pw_uid, user.pw_gid)
        path.chmod(0o700 if path.is_dir() else 0o600)
    return folder


@pytest.fixture(scope="module")
def site(place, accounts, python, data, smoke_plan):
    """A site that root has enrolled and started, with a plan approved."""
    with network.Operator(place / "operator") as operator:
        line = operator.consortium.invite("site-1").line()
        root = place / "site"
        _federad_site(python, "enrol", line, "--data", data, "--site", root)
        _federad_site(python, "start", "--site", root)
        operator.consortium.offer(smoke_plan, "run-1", 0)
        until(lambda: _federad_site(python, "plans", "--site", root))
        _federad_site(python, "approve", "smoke", "--site", root)
        yield root
        _federad_site(python, "stop", "--site", root)


class TestAccounts:
    def test_folders_belong_to_those_who_work_in_them(self, site):
        """
        Each part is its account's alone; only the socket's folder is open to the group.
        """
        shown = {path: site / path for path in ("station", "courier", "run")}
        owners = {name: (path.owner(), path.group(), oct(path.stat().st_mode & 0o7777)) for name, path in shown.items()}

        assert owners["station"][0::2] == (DATA_USER, "0o700")
        assert owners["courier"][0::2] == (NET_USER, "0o700")
        assert owners["run"] == (DATA_USER, GROUP, "0o2750")

    def test_everything_in_a_folder_belongs_to_its_account(self, site):
        """
        Also what root wrote while it enrolled and approved.
        """
        for part, name in (("station", DATA_USER), ("courier", NET_USER)):
            assert {path.owner() for path in (site / part).rglob("*")} == {name}

    def test_processes_work_under_their_accounts(self, site):
        """
        The station as one, the courier and all that it starts as the other, nothing of either as root.
        """
        users = {part: _user_of(holder(site / part / "process.lock")) for part in ("station", "courier")}
        below = {_user_of(pid) for pid in descendants(holder(site / "courier" / "process.lock"))}

        assert users == {"station": DATA_USER, "courier": NET_USER}
        assert below <= {NET_USER}


class TestCourier:
    def test_it_can_use_the_socket(self, python, site):
        """
        What it is there for: it asks, and hears of the plan's site.
        """
        code = """
            import sys
            from pathlib import Path
            from client.stub import StationStub
            with StationStub(Path(sys.argv[1])) as station:
                print(station.status()["site"])
        """
        done = _as(NET_USER, python, code, site / "run" / "station.sock")
        assert done.stdout.strip() == "site-1", done.stderr

    @pytest.mark.parametrize(
        "path", ["data", "site/station", "site/station/secret", "site/station/site.toml", "site/station/cohorts"]
    )
    def test_it_cannot_read_data_or_station(self, python, place, site, path):
        """
        Neither the images nor anything made from them.
        """
        code = """
            import os, sys
            from pathlib import Path
            path = Path(sys.argv[1])
            try:
                print("saw", os.listdir(path) if path.is_dir() else path.read_bytes())
            except PermissionError:
                print("refused")
        """
        assert _as(DATA_USER, python, code, place / path).stdout.startswith("saw")
        done = _as(NET_USER, python, code, place / path)
        assert done.stdout.strip() == "refused", done.stdout + done.stderr

    def test_it_cannot_look_into_the_stations_process(self, python, site):
        """
        Its memory, its open files and its environment are closed.
        """
        code = """
            import os, sys
            from pathlib import Path
            folder = Path("/proc") / sys.argv[1]
            for look in (
                lambda: (folder / "mem").open("rb").read(1),
                lambda: os.listdir(folder / "fd"),
                lambda: (folder / "environ").read_bytes(),
                lambda: os.kill(int(sys.argv[1]), 0),
            ):
                try:
                    look()
                    print("saw")
                except PermissionError:
                    print("refused")
        """
        done = _as(NET_USER, python, code, holder(site / "station" / "process.lock"))
        assert done.stdout.split() == ["refused"] * 4, done.stderr

    def test_it_cannot_put_another_socket_in_the_place(self, python, site):
        """
        It may open what is in the socket's folder, and change nothing there.
        """
        code = """
            import os, sys
            for change in (lambda: os.unlink(sys.argv[1]), lambda: os.open(sys.argv[1] + "2", os.O_CREAT)):
                try:
                    change()
                    print("changed")
                except PermissionError:
                    print("refused")
        """
        done = _as(NET_USER, python, code, site / "run" / "station.sock")
        assert done.stdout.split() == ["refused"] * 2, done.stderr

    def test_it_cannot_change_whose_plans_are_listened_to(self, python, site):
        """
        The operator's key that plans are checked with lies where the courier cannot write.
        """
        code = "import sys; open(sys.argv[1], 'w')"
        done = _as(NET_USER, python, code, site / "station" / "consortium.json")
        assert "PermissionError" in done.stderr


class TestOthers:
    def test_nobody_else_may_use_the_socket(self, python, site):
        """
        An account outside the group hears nothing.
        """
        code = """
            import socket, sys
            try:
                socket.socket(socket.AF_UNIX).connect(sys.argv[1])
                print("connected")
            except PermissionError:
                print("refused")
        """
        assert _as("nobody", python, code, site / "run" / "station.sock").stdout.strip() == "refused"

    def test_station_cannot_read_the_keys(self, python, site):
        """
        The two are kept apart in both directions: the keys for the network are the courier's.
        """
        code = "import sys; open(sys.argv[1]).read()"
        done = _as(DATA_USER, python, code, site / "courier" / "site.key")
        assert "PermissionError" in done.stderr

    @pytest.mark.parametrize("user", ["nobody", NET_USER])
    def test_command_of_somebody_else_is_refused_with_a_number(self, python, site, user):
        """
        Only root and the station's own account may decide on plans.
        """
        code = "import sys; from client.cli import main; sys.argv[0] = 'federad-site'; main()"
        done = _as(user, python, code, "approve", "smoke", "--site", site)
        assert done.returncode == 163, done.stderr
        assert "sudo" in done.stderr


def _federad_site(python: str, *arguments: object):
    command = [python, "-I", "-m", "client.cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def _as(user: str, python: str, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code under another account, with the groups of it."""
    account = pwd.getpwnam(user)
    import textwrap

    return subprocess.run(
        [python, "-I", "-c", textwrap.dedent(code), *map(str, arguments)],
        user=account.pw_uid, group=account.pw_gid, extra_groups=os.getgrouplist(user, account.pw_gid),
        capture_output=True, text=True, check=False, cwd="/", env={"PATH": os.defpath},
    )  # fmt: skip


def _may_run(executable: str) -> bool:
    nobody = pwd.getpwnam("nobody")
    command = [executable, "-I", "-c", "import client.cli, torch, grpc, flwr"]
    try:
        done = subprocess.run(
            command, user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=[], capture_output=True, check=False, cwd="/"
        )
    except PermissionError:
        return False
    return done.returncode == 0


def _user_of(pid: int | None) -> str:
    return pwd.getpwuid(Path(f"/proc/{pid}").stat().st_uid).pw_name
