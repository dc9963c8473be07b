"""Names that a plan may use, and what stands behind them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import contracts
import pytest

from shared_models.networks import NETWORKS
from shared_models.registry import look_up, one_of
from shared_models.task import Task, task_for
from shared_models.tasks import TASKS


class TestLookUp:
    def test_name_finds_its_object(self):
        """
        The object is found where the table says it lives.
        """
        assert look_up({"loads": "json:loads"}, "loads")(" [1] ") == [1]

    def test_unknown_name_is_a_key_error(self):
        """
        A name that no plan could have is a mistake of the programmer.
        """
        with pytest.raises(KeyError):
            look_up({}, "unet")

    @pytest.mark.parametrize("name", NETWORKS)
    def test_every_network_can_be_built(self, name):
        """
        Each network's entry leads to a function.
        """
        assert callable(look_up(NETWORKS, name))

    @pytest.mark.parametrize("name", TASKS)
    def test_every_task_is_one(self, name):
        """
        Each task's entry makes a task of a plan, with a headline metric of which more is better.
        """
        task = task_for(contracts.example_plan(name))

        assert isinstance(look_up(TASKS, name)(contracts.example_plan(name)), type(task))
        assert isinstance(task, Task)
        assert task.metrics[task.headline]


class TestOneOf:
    def test_known_name_passes_and_another_is_told_the_list(self):
        """
        A wrong name is answered with the names there are.
        """
        check = one_of({"unet": "", "vnet": ""})

        assert check("vnet") == "vnet"
        with pytest.raises(ValueError, match="'xnet' is none of: unet, vnet"):
            check("xnet")


def test_reading_a_plan_does_not_load_torch():
    """
    The command line answers quickly: naming a network costs nothing until it is built.
    """
    plan = Path(__file__).parents[2] / "simulation" / "plans" / "demo.toml"
    code = (
        "import sys, pathlib; from shared_models.plan import Plan;"
        "Plan.load(pathlib.Path(sys.argv[1])); print('torch' in sys.modules)"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code, str(plan)], capture_output=True, text=True, cwd=root, check=True)

    assert done.stdout.strip() == "False"
