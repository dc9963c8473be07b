"""Flower's own simulation engine on Ray: the one file that knows it.

Any actor may get any site, so stations are reopened from their folders. Ray starts its workers at niceness 15 unless told
otherwise, which starves them on a shared machine.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

from flwr.serverapp import ServerApp

from shared_models.errors import FederadError
from shared_models.plan import Plan
from simulation.grid import courier


def run_on_ray(plan: Plan, folders: list[Path], server_app: ServerApp, *, workers: int) -> None:
    """Run ``server_app`` with one virtual node for each station folder, on ``workers`` actors of one CPU each.

    Raises
    ------
    FederadError
        R234 if Ray is not installed; otherwise whatever the server app raises.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise FederadError(
            "R234",
            happened="Ray is not installed.",
            because='It runs the engine "ray".',
            remedies=("pip install 'federad[simulation]'", "or use --engine in-process"),
        ) from None
    from flwr.simulation import run_simulation

    n_gpus = _gpus()
    workers = min(workers, len(folders))
    logging.getLogger("flwr").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            run_simulation(
                server_app=server_app,
                client_app=courier(plan, folders),
                num_supernodes=len(folders),
                backend_config={
                    "client_resources": {"num_cpus": 1, "num_gpus": n_gpus / workers},
                    "init_args": {"num_cpus": workers, "include_dashboard": False, "log_to_driver": False},
                },
            )
    finally:
        ray.shutdown()


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
