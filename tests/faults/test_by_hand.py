"""A consortium of an operator and two hospitals, typed by three people who follow what they are told."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from deployed import until
from operators import free_port, needs_nginx, short_folder

from client.station import Station
from server.consortium import Consortium

pytestmark = [pytest.mark.slow, pytest.mark.system, needs_nginx]

PROGRAMS = {"federad-server": "server.cli", "federad-site": "client.cli"}
FIRST = "federad-server init DIR --host NAME[:PORT]"
"""What the first page of docs/operator.md says; everything else is told by the commands themselves."""


class People:
    """Who sits where, what was typed, and what everybody was told.

    Parameters
    ----------
    folder
        Each has a desk in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.told = [FIRST]
        self.typed: list[str] = []
        self.said = ""

    def desk(self, who: str) -> Path:
        """Where somebody works."""
        desk = self.folder / who
        desk.mkdir(exist_ok=True)
        return desk

    def type(self, who: str, command: str) -> None:
        """Type a command that somebody was told of, in one's own folder."""
        assert any(is_example_of(command, told) for told in self.told), (command, self.told)
        self.typed.append(command)
        self.said = self.run(who, command)
        self.told += [told.strip() for told in re.findall(r"federad-(?:server|site) .*", self.said)]

    def run(self, who: str, command: str) -> str:
        """What a command prints."""
        program, *words = shlex.split(command)
        env = {name: value for name, value in os.environ.items() if not name.startswith("FEDERAD_")}
        line = [sys.executable, "-m", PROGRAMS[program], *words]
        done = subprocess.run(
            line, cwd=self.desk(who), env=env, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout


def is_example_of(command: str, told: str) -> bool:
    """Whether a command is what was told, with the words in capitals filled in."""
    pattern = [
        r"\S+" if re.fullmatch(r"\[?[A-Z]{2,}[A-Z.:\[\]a-z]*", word) else re.escape(word) for word in told.split()
    ]
    return re.fullmatch(" ".join(pattern), command) is not None


def test_only_what_was_told_is_an_example():
    """
    Names may be chosen, commands and options not.
    """
    assert is_example_of("federad-server invite royal", "federad-server invite SITE")
    assert is_example_of("federad-server init here --host a.b:1", FIRST)
    assert not is_example_of("federad-server invite royal --to x", "federad-server invite SITE")
    assert not is_example_of("federad-server revoke royal", "federad-server invite SITE")


def test_eleven_short_commands_train_a_model(hospitals):
    """
    From nothing to a finished run at two hospitals: each command was told by one before, and no file was edited.
    """
    plan = Path(__file__).parents[2] / "simulation" / "plans" / "smoke.toml"
    with short_folder() as folder:
        people = People(folder)
        (people.desk("operator") / "smoke.toml").write_bytes(plan.read_bytes())
        try:
            people.type("operator", f"federad-server init consortium --host localhost:{free_port()}")
            people.type("operator", "federad-server start --detach")
            lines = {}
            for site in ("royal", "general"):
                people.type("operator", f"federad-server invite {site}")
                lines[site] = next(line for line in people.said.splitlines() if line and " " not in line)
            for site, hospital in zip(lines, hospitals[:2], strict=True):
                people.type(site, f"federad-site enrol {lines[site]} --data {hospital.folder}")
                people.type(site, "federad-site start")
            people.type("operator", "federad-server run smoke.toml")
            approve = next(told for told in people.told if told.startswith("federad-site approve"))
            for site in lines:
                station = Station(people.desk(site) / "federad-site" / "station")
                until(lambda station=station: station.plans())  # a few seconds, in which people talk
                people.type(site, approve)
            consortium = Consortium(people.desk("operator") / "consortium")
            (run,) = consortium.runs()
            until(lambda: consortium.run(run.run).state == "finished", within_s=180)
        finally:
            for site in ("royal", "general"):
                with suppress(AssertionError):
                    people.run(site, "federad-site stop")
            with suppress(AssertionError):
                people.run("operator", "federad-server stop")

    assert len(people.typed) <= 11
    typed = [re.sub(r"enrol \S+ --data \S+", "enrol INVITATION --data DIR", command) for command in people.typed]
    assert max(map(len, typed)) <= 60
