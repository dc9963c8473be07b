"""What is installed at a hospital and at the operator keeps its promises, as far as its files can show."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from deployed import Operator, make_site, running_station
from operators import new_consortium

from client.folder import DATA_USER, GROUP, NET_USER
from server.consortium import Consortium
from server.journal import Journal, RunIdentity
from shared_models.commands import START_VARIABLE, TYPED_VARIABLE
from shared_models.task import task_for
from shared_models.weights import initial_weights, weights_sha256

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
CONTAINERFILE = (DEPLOY / "Containerfile").read_text()

LARGEST_EXPOSURE = 2.5
"""Of ``systemd-analyze security``, from 0 (locked up) to 10 (a service without any setting has 9.6)."""


def services(name: str) -> dict[str, dict]:
    return yaml.safe_load((DEPLOY / name).read_text())["services"]


def mounts(service: dict) -> dict[str, dict]:
    """What a container sees, by place."""
    return {mount["target"]: mount for mount in service.get("volumes", [])}


EVERY_CONTAINER = {**services("compose.site.yaml"), **services("compose.operator.yaml")}


@pytest.fixture(scope="module")
def compose() -> list[str]:
    """Docker Compose, where it is installed."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            version = subprocess.run([*command, "version", "--short"], capture_output=True, text=True, check=False)
            if version.returncode == 0 and version.stdout.lstrip("v").startswith("2."):
                return command
    pytest.skip("Docker Compose 2 is not installed")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The files that install.sh writes for a hospital with paths of its own, and for an operator."""
    root = tmp_path_factory.mktemp("installed")
    install(root, "site", "--data", "/mnt/pacs", "--folder", "/data/site", "--anchor", "/mnt/other/anchor")
    install(root, "server", "--folder", "/data/consortium")
    return root


class TestContainers:
    @pytest.mark.parametrize("name", EVERY_CONTAINER)
    def test_container_can_change_nothing_but_its_folders(self, name):
        """
        Every container has a read-only root, no capabilities by default, and cannot get new privileges.
        """
        service = EVERY_CONTAINER[name]

        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in service["security_opt"]
        assert "privileged" not in service

    @pytest.mark.parametrize("name", ["station", "courier", "server"])
    def test_lasting_container_is_not_root(self, name):
        """
        What runs day and night runs under one of the image's two accounts, without any capability.
        """
        service = EVERY_CONTAINER[name]

        assert service["user"] in {"10001:10000", "10002:10000"}
        assert "cap_add" not in service
        assert service["restart"] == "unless-stopped"

    @pytest.mark.parametrize("name", services("compose.site.yaml"))
    def test_no_container_has_both_the_images_and_a_network(self, name):
        """
        Who sees scans has no network, and who has the network sees an empty folder or none.
        """
        service = EVERY_CONTAINER[name]
        sees_images = "${FEDERAD_DATA}" in mounts(service)

        assert sees_images == (name in {"station", "admin"})
        assert (service.get("network_mode") == "none") == sees_images

    def test_courier_sees_nothing_of_the_station_but_its_socket(self):
        """
        The courier has its own folder, and the socket's for reading.
        """
        seen = mounts(EVERY_CONTAINER["courier"])

        assert set(seen) == {"/site/courier", "/site/run"}
        assert seen["/site/run"]["read_only"] is True

    def test_images_are_never_written(self):
        """
        Wherever the images are seen, they are read-only.
        """
        seen = [mounts(service).get("${FEDERAD_DATA}") for service in EVERY_CONTAINER.values()]

        assert all(mount["read_only"] is True for mount in seen if mount)

    def test_mistyped_path_is_an_error(self):
        """
        A folder that is not there is never made by a container engine, as root and empty.
        """
        for file in ("compose.site.yaml", "compose.operator.yaml", "compose.anchor.yaml"):
            for service in services(file).values():
                assert all(mount["bind"]["create_host_path"] is False for mount in mounts(service).values())

    def test_gpu_is_handed_to_the_station_alone(self):
        """
        The GPU's file gives one NVIDIA device to the station and nothing else.
        """
        (name,) = services("compose.gpu.yaml")
        (device,) = services("compose.gpu.yaml")[name]["deploy"]["resources"]["reservations"]["devices"]

        assert name == "station"
        assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}

    @pytest.mark.parametrize(("compose", "env"), [("site", "site.env"), ("operator", "operator.env")])
    def test_example_sets_every_variable_that_is_needed(self, compose, env):
        """
        Whoever copies the example has no variable left to find.
        """
        needed = set(re.findall(r"\$\{(\w+):\?", (DEPLOY / f"compose.{compose}.yaml").read_text()))
        lines = (DEPLOY / env).read_text().splitlines()

        assert needed <= {line.split("=")[0] for line in lines if not line.startswith("#")}

    @pytest.mark.parametrize(
        ("env", "files"),
        [
            ("site.env", ("compose.site.yaml",)),
            ("site.env", ("compose.site.yaml", "compose.gpu.yaml", "compose.anchor.yaml")),
            ("operator.env", ("compose.operator.yaml",)),
        ],
    )
    def test_compose_takes_the_files(self, env, files, compose, tmp_path):
        """
        Docker Compose itself finds nothing wrong.
        """
        shutil.copy(DEPLOY / env, tmp_path / ".env")
        for file in files:
            shutil.copy(DEPLOY / file, tmp_path)
        done = subprocess.run(
            [*compose, *(word for file in files for word in ("-f", file)), "--profile", "admin", "config", "--quiet"],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "FEDERAD_ANCHOR_DIR": "/mnt/other"},
        )

        assert (done.returncode, done.stderr) == (0, "")


class TestImages:
    def test_what_is_copied_is_there_and_let_through(self):
        """
        Every source of a COPY exists, and the ignore file does not hold it back.
        """
        ignored = (DEPLOY / "Containerfile.dockerignore").read_text().splitlines()
        let_through = {line[1:] for line in ignored if line.startswith("!")}
        copied = [
            source
            for line in re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+)$", CONTAINERFILE, re.MULTILINE)
            for source in line.split()[:-1]
        ]

        assert ignored[1] == "*"
        assert set(copied) == let_through
        assert all((ROOT / source).exists() for source in copied)

    @pytest.mark.parametrize("target", ["site", "server"])
    def test_image_is_not_root_and_has_a_health_check(self, target):
        """
        Without a word from whoever starts it, a container runs under an account of its own.
        """
        stage = re.search(rf"^FROM base AS {target}\n(.*?)(?=^FROM|\Z)", CONTAINERFILE, re.MULTILINE | re.DOTALL)[1]

        assert re.findall(r"^USER (\S+)", stage, re.MULTILINE)[-1] in {DATA_USER, NET_USER}
        assert re.search(r"^FROM .* AS base$.*^HEALTHCHECK ", CONTAINERFILE, re.MULTILINE | re.DOTALL)

    def test_accounts_are_those_that_the_program_knows(self):
        """
        The image's accounts have the names by which a site's folder is divided, and the numbers of the compose files.
        """
        made = re.findall(r"useradd --uid (\d+) --gid (\S+) .* ([\w-]+)(?: \\)?$", CONTAINERFILE, re.MULTILINE)
        (group,) = re.findall(r"groupadd --gid (\d+) (\S+)", CONTAINERFILE)

        assert made == [("10001", GROUP, DATA_USER), ("10002", GROUP, NET_USER)]
        assert group == ("10000", GROUP)

    def test_versions_stand_in_one_place(self):
        """
        Nothing is installed but what constraints.txt pins, and no version is written a second time.
        """
        for text in (CONTAINERFILE, (DEPLOY / "install.sh").read_text()):
            installs = re.findall(r"pip\"? install (.*)", text)
            assert installs
            assert all("-c " in line and "==" not in line for line in installs)


class TestServices:
    def test_paths_of_the_hospital_stand_everywhere(self, installed):
        """
        No unit speaks of a path that the hospital does not have.
        """
        texts = {file.name: file.read_text() for file in (installed / "etc/systemd/system").iterdir()}

        assert set(texts) == {unit.name for unit in UNITS}
        assert not [name for name, text in texts.items() if "/var/lib/federad" in text or "/srv/images" in text]
        assert "ReadWritePaths=/data/site/station /data/site/run /mnt/other/anchor" in texts["federad-station.service"]
        assert "InaccessiblePaths=-/data/site/station -/mnt/pacs" in texts["federad-courier.service"]

    def test_station_has_no_network_and_courier_no_images(self):
        """
        What the compose files say of containers, the units say of services.
        """
        station, courier = ((DEPLOY / f"systemd/federad-{name}.service").read_text() for name in ("station", "courier"))

        assert "PrivateNetwork=yes" in station
        assert "RestrictAddressFamilies=AF_UNIX\n" in station
        assert f"User={DATA_USER}" in station
        assert "InaccessiblePaths=-/var/lib/federad/site/station -/srv/images" in courier
        assert f"User={NET_USER}" in courier

    @pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
    @pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
    def test_systemd_takes_the_unit(self, unit, tmp_path):
        """
        systemd itself finds nothing wrong, and little that the service could do beyond its work.
        """
        copy = tmp_path / unit.name
        copy.write_text(re.sub(r"/opt/federad/bin/\S+", shutil.which("true"), unit.read_text()))

        verified = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False
        )
        rated = subprocess.run(
            ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(copy)],
            capture_output=True,
            text=True,
            check=False,
        )

        assert not [line for line in verified.stderr.splitlines() if unit.stem in line]
        assert float(re.search(r"Overall exposure level for .*: ([\d.]+)", rated.stdout)[1]) <= LARGEST_EXPOSURE

    def test_commands_find_the_folder(self, installed):
        """
        The administrator's command knows where the site is.
        """
        assert (
            "FEDERAD_SITE=/data/site exec /opt/federad/bin/federad-site"
            in (installed / "usr/local/bin/federad-site").read_text()
        )
        assert "FEDERAD_SERVER=/data/consortium" in (installed / "usr/local/bin/federad-server").read_text()

    @pytest.mark.parametrize(
        ("role", "units"), [("site", ["federad-station", "federad-courier"]), ("server", ["federad-server"])]
    )
    def test_commands_name_the_next_as_the_administrator_types_it(self, installed, role, units):
        """
        With sudo, and with the services that were installed in place of a start by hand.
        """
        command = (installed / f"usr/local/bin/federad-{role}").read_text()
        set_before = command.splitlines()[1]

        assert f'{TYPED_VARIABLE}="sudo federad-{role}"' in set_before
        assert f'{START_VARIABLE}="sudo systemctl enable --now {" ".join(units)}"' in set_before
        assert all((installed / f"etc/systemd/system/{unit}.service").exists() for unit in units)
        subprocess.run(["sh", "-n", installed / f"usr/local/bin/federad-{role}"], check=True)

    def test_proxy_stands_in_one_file(self, tmp_path):
        """
        The courier's service and the administrator's command read the same file, which only root may, since a login may be
        in it; what stands in it already stays.
        """
        install(tmp_path, "site")
        settings = tmp_path / "etc/federad/site.env"
        assert settings.stat().st_mode & 0o777 == 0o600
        assert "EnvironmentFile=-/etc/federad/site.env" in (DEPLOY / "systemd/federad-courier.service").read_text()

        command = (tmp_path / "usr/local/bin/federad-site").read_text()
        shown = command.replace("/etc/federad", str(settings.parent)).replace("exec /opt", "exec env #")
        settings.write_text("HTTPS_PROXY=http://hospital:secret@proxy:3128\n")
        told = subprocess.run(["sh", "-c", shown], capture_output=True, text=True, check=True, env={"PATH": os.defpath})
        install(tmp_path, "site")

        assert "HTTPS_PROXY=http://hospital:secret@proxy:3128\n" in told.stdout
        assert settings.read_text().startswith("HTTPS_PROXY=")

    @pytest.mark.parametrize("path", ["images", "/srv/my images", "/srv/a#b", "/srv/$(id)", "/srv/a&b"])
    def test_path_that_a_unit_could_misread_is_refused(self, tmp_path, path):
        """
        Only plain absolute paths go into units.
        """
        done = install(tmp_path, "site", "--data", path, is_fine=False)

        assert path in done.stderr
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("arguments", [[], ["hospital"], ["site", "--data"], ["site", "--color", "red"]])
    def test_mistyped_installation_says_how(self, tmp_path, arguments):
        """
        A wrong command line shows the right ones and changes nothing.
        """
        assert "install.sh site" in install(tmp_path, *arguments, is_fine=False).stderr
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
    @pytest.mark.parametrize("script", ["install.sh", "federad-healthy"])
    def test_scripts_are_sound(self, script):
        """
        shellcheck finds nothing.
        """
        subprocess.run(["shellcheck", DEPLOY / script], check=True)


class TestHealth:
    def test_station_is_well_while_it_answers(self, hospitals, tmp_path):
        """
        A station's container is well when its socket answers, and not when the process is gone.
        """
        folder = make_site(tmp_path / "s", hospitals[0].folder, Operator())

        with running_station(folder):
            assert is_well(FEDERAD_SITE=folder.root)

        assert not is_well(FEDERAD_SITE=folder.root)

    def test_courier_is_well_while_its_status_is_fresh(self, tmp_path):
        """
        A courier that no longer writes its status, or has no SuperNode, is not well.
        """
        status = tmp_path / "courier" / "status.json"
        status.parent.mkdir()
        assert not is_well(FEDERAD_SITE=tmp_path)

        status.write_text('{"pid": 1, "supernode": {"running": true, "starts": 1}}')
        assert is_well(FEDERAD_SITE=tmp_path)

        os.utime(status, (time.time() - 300,) * 2)
        assert not is_well(FEDERAD_SITE=tmp_path)

        status.write_text('{"pid": 1, "supernode": {"running": false, "starts": 1}}')
        assert not is_well(FEDERAD_SITE=tmp_path)

    def test_server_that_is_stopped_is_not_well(self, tmp_path):
        """
        A consortium without its server is not well; one that runs is looked at where servers are started.
        """
        new_consortium(tmp_path / "consortium")

        assert not is_well(FEDERAD_SERVER=tmp_path / "consortium")


class TestOperatorsBackup:
    """docs/operator.md: stop, tar, start; and back."""

    def test_restored_folder_is_the_same_consortium(self, smoke_plan, tmp_path):
        """
        Keys, sites and the journal of a run come back as they were, at another place.
        """
        folder = tmp_path / "consortium"
        before = new_consortium(folder)
        line = before.invite("st-anna").line()
        weights = initial_weights(task_for(smoke_plan).build_network, 0)
        journal = Journal(folder / "runs" / "run-1")
        journal.begin(RunIdentity("run-1", 0, smoke_plan.sha256))
        journal.commit(1, {"round": 1}, weights)
        tar = next(line for line in commands("docs/operator.md") if "tar --create" in line)
        untar = next(line for line in commands("docs/operator.md") if "tar --extract" in line)

        as_documented(tar, tmp_path, tmp_path)
        (tmp_path / "elsewhere").mkdir()
        as_documented(untar, tmp_path, tmp_path / "elsewhere")

        after = Consortium(tmp_path / "elsewhere" / "consortium")
        assert after.authority.pem == before.authority.pem
        assert [site.name for site in after.sites()] == ["st-anna"]
        assert line.startswith("federad1:")
        restored = Journal(after.folder / "runs" / "run-1")
        assert restored.records() == [{"round": 1}]
        assert restored.identity() == journal.identity()
        restored.committed_weights(1, weights_sha256(weights))
        assert all(file.stat().st_mode & 0o077 == 0 for file in (after.folder / "keys").glob("*.key"))


def commands(document: str) -> list[str]:
    """The lines of a document's code blocks."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def as_documented(command: str, cwd: Path, place: Path) -> None:
    """Run a documented command with another place than the operator's."""
    line = command.removeprefix("sudo ").replace("/var/lib/federad", str(place))
    assert line.startswith("tar ")
    subprocess.run(line.split(), check=True, cwd=cwd)


def install(root: Path, *arguments: str, is_fine: bool = True) -> subprocess.CompletedProcess[str]:
    """install.sh, writing files alone."""
    done = subprocess.run(
        ["sh", DEPLOY / "install.sh", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"], "DESTDIR": str(root)},
    )
    assert (done.returncode == 0) == is_fine, done.stderr
    return done


def is_well(**environment: Path) -> bool:
    """What the health check of an image says."""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    env = {"PATH": path, **{name: str(value) for name, value in environment.items()}}
    return subprocess.run([DEPLOY / "federad-healthy"], capture_output=True, env=env, check=False).returncode == 0
