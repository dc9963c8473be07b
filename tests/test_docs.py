"""What the documents say is so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.main import get_command

from simulation.cli import app
from simulation.experiments import EXPERIMENTS
from simulation.experiments.tables import RESULTS, filled

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


class TestReadme:
    def test_tables_are_those_of_the_results(self):
        """
        Every figure in README's tables comes from docs/results.
        """
        text = (ROOT / "README.md").read_text()
        assert filled(text) == text

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
