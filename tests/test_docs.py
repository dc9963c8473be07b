"""What the documents say is so."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from typer.main import get_command

from client.cli import app as site_app
from server.cli import app as server_app
from simulation.cli import app
from simulation.experiments import EXPERIMENTS
from simulation.experiments.tables import PAGES, RESULTS, filled

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PROGRAMS = {"federad-site": site_app, "federad-server": server_app, "federad-sim": app}
BY_HAND = {"docs/hospital.md": "federad-site", "docs/operator.md": "federad-server"}
"""Which program a document is about."""

IN_CONTAINERS = {"admin": "federad-site", "outside": "federad-site", "server": "federad-server"}
"""Services that ``docker compose run`` starts with a command, and the program that gets it."""


class TestReadme:
    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
    def test_tables_are_those_of_the_results(self, page):
        """
        Every figure in the tables comes from docs/results.
        """
        text = page.read_text()
        assert filled(text) == text

    def test_every_result_that_is_kept_is_shown(self):
        """
        On one of the pages, whatever it shows.
        """
        shown = "".join(page.read_text() for page in PAGES)
        assert {path.stem for path in RESULTS.glob("*.json")} == set(re.findall(r"<!-- results: ([\w-]+) -->", shown))

    def test_every_command_is_documented(self):
        """
        README names each command of federad-sim.
        """
        text = (ROOT / "README.md").read_text()
        for name in get_command(app).commands:
            assert f"federad-sim {name}" in text

    def test_commands_shown_exist(self):
        """
        Each `federad-sim` and `make` command in a document is one that exists.
        """
        commands = set(get_command(app).commands)
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        for document in DOCUMENTS:
            text = document.read_text()
            shown = re.findall(r"federad-sim ([a-z]+)", text)
            made = re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", text, re.MULTILINE)
            assert set(shown) <= commands, document
            assert {a or b for a, b in made} <= targets, document


class TestCommandLines:
    """What documents and deploy/ tell people, machines and containers to type."""

    @pytest.mark.parametrize("name", [*BY_HAND, "README.md"])
    def test_commands_in_documents_exist(self, name):
        """
        Each command of ours in a document is one that exists, with every option that it is given.
        """
        shown = list(command_lines((ROOT / name).read_text()))

        assert shown
        assert [line for line in shown if not understood(line)] == []

    def test_commands_in_deploy_exist(self):
        """
        So does each command in images, compose files, services and scripts.
        """
        files = [file for file in sorted((ROOT / "deploy").rglob("*")) if file.is_file()]
        shown = [line for file in files for line in command_lines(file.read_text())]
        for file in sorted((ROOT / "deploy").glob("compose.*.yaml")):
            for name, service in yaml.safe_load(file.read_text())["services"].items():
                if "command" in service:
                    shown.append([IN_CONTAINERS.get(name, "federad-site"), *service["command"]])

        assert {line[0] for line in shown} == {"federad-site", "federad-server"}
        assert [line for line in shown if not understood(line)] == []

    @pytest.mark.parametrize(("name", "program"), BY_HAND.items())
    def test_every_command_is_in_its_document(self, name, program):
        """
        A command that people may type is explained to those who will.
        """
        text = (ROOT / name).read_text()
        commands = get_command(PROGRAMS[program]).commands
        visible = {command for command, what in commands.items() if not what.hidden}

        assert {
            command for command in visible if not re.search(rf"\*\*`{command}\b|{program} {command}\b", text)
        } == set()

    def test_wrong_command_lines_are_found(self):
        """
        A command, an option or a part of a command that does not exist is noticed.
        """
        for line in ("federad-site aprove PLAN", "federad-server start --detached", "federad-site audit check"):
            assert not understood(shlex.split(line)), line


def command_lines(text: str) -> Iterator[list[str]]:
    """Our programs with their arguments, in code blocks, in backquotes and in scripts."""
    programs = "|".join(PROGRAMS)
    for match in re.finditer(rf"(?<![\w.-])(?<!-t )({programs})((?: +[^\s`\\;|&)(#\"',]+)*)", text):
        if match[2]:
            yield [match[1], *match[2].split()]
    for match in re.finditer(r"docker compose run --rm (\w+)((?: +[^\s`\\;|&)(#\"',]+)+)", text):
        yield [IN_CONTAINERS[match[1]], *match[2].split()]


def understood(line: list[str]) -> bool:
    """Whether a program knows the command and all of its options; arguments are anything."""
    command: click.Command = get_command(PROGRAMS[line[0]])
    words = line[1:]
    while isinstance(command, click.Group):
        if not words or (word := words.pop(0)).startswith("-"):
            return words == [] and line[1:] in (["--help"], [])
        if word not in command.commands:
            return word.isupper()
        command = command.commands[word]
    options = {name for parameter in command.params for name in parameter.opts} | {"--help"}
    return all(word.split("=")[0] in options for word in words if word.startswith("-"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    """
    Every relative link in a document leads to a file that is there.
    """
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_results_of_every_experiment_are_kept(name):
    """
    Each experiment has its full result with the command that made it, and not a quick one.
    """
    result = json.loads((RESULTS / f"{name}.json").read_text())
    assert result["quick"] is False
    assert result["seeds"] == list(EXPERIMENTS[name].seeds)
    assert name in result["command"]
