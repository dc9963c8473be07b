"""The ways to execute one plan on one machine: the same ``ServerApp`` and ``ClientApp`` in each."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from uuid import uuid4

from flwr.app import Context, RecordDict, UserConfig
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from server.app import make_server_app
from server.journal import Journal
from server.rounds import Outcome, Progress, Rounds
from shared_models.plan import Plan
from shared_models.start import first_weights

Engine = Literal["in-process", "ray", "deployment"]

FLOWER_RUN_ID = 1
"""Flower's id of a simulated run; federad's own is a word."""


@dataclass(frozen=True)
class Execution:
    """What to run and how; nothing here changes the result of a plan without ``[privacy]``."""

    engine: Engine = "in-process"
    workers: int = 1
    staging: Path = Path("deployment")
    """Where the engine ``deployment`` stages its consortium; made anew for each run."""


def run_rounds(
    plan: Plan,
    stations: list[Path],
    journal: Journal,
    *,
    seed: int,
    execution: Execution,
    start: Path | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Outcome:
    """Run ``plan`` on the stations in these folders, which have approved it.

    ``start`` is the file that a plan with ``strategy.start`` begins at.

    Raises
    ------
    FederadError
        S180 to S182 from the round loop; what was committed stays in ``journal``. R234 to R236 if the engine cannot be
        used.
    """
    if execution.engine == "deployment":
        from simulation.deployment import run_deployed

        return run_deployed(plan, stations, journal, seed=seed, folder=execution.staging, on_progress=on_progress)
    outcomes: list[Outcome] = []
    run = f"{plan.name}-{uuid4().hex[:12]}"

    def rounds_on(grid: Grid) -> Rounds:
        weights = first_weights(plan, seed, start)
        return Rounds(plan, grid, journal, run=run, seed=seed, weights=weights, on_progress=on_progress)

    server_app = make_server_app(rounds_on, outcomes.append)
    if execution.engine == "ray":
        from simulation.ray_engine import run_on_ray

        run_on_ray(plan, stations, server_app, workers=execution.workers)
    else:
        from simulation.grid import InProcessGrid

        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = FLOWER_RUN_ID, 1, 1
        context = Context(
            run_id=FLOWER_RUN_ID, node_id=0, node_config=UserConfig(), state=RecordDict(), run_config=UserConfig()
        )
        with InProcessGrid(plan, stations, workers=execution.workers, run=Run.create_empty(FLOWER_RUN_ID)) as grid:
            server_app(grid, context)
    return outcomes[0]


def usable_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))
