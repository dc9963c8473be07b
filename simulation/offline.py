"""Nothing here calls home: switches of the packages underneath, set before they are imported."""

from __future__ import annotations

import os

SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "HF_HUB_OFFLINE": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def stay_offline() -> None:
    """Set every switch that the user has not set."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
