"""``make bench``: every figure in a process of its own, a table for people, JSON for the rest.

Ratios are formed within one run. CPU seconds, not wall time, so that a busy machine disturbs little.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

ENGINES = [("in-process", n) for n in (4, 16, 64)] + [("flower-ray", n) for n in (4, 16)]
AGGREGATIONS = [("ours", 4), ("ours", 20), ("flower", 20)]
TARGETS = {"overhead": 0.05, "memory_64_over_4": 1.05, "aggregation": 4.0}


def measure(module: str, *arguments: object) -> dict[str, Any]:
    """The JSON line that a benchmark prints last."""
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(".bench"))
    parser.add_argument("--only", choices=("engines", "aggregation"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    result: dict[str, Any] = {}
    if options.only != "aggregation":
        result |= engines(console)
    if options.only != "engines":
        result |= aggregation(console)
    (options.out / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"written to {options.out / 'bench.json'}")


def engines(console: Console) -> dict[str, Any]:
    """Overhead and memory of the engines."""
    with tempfile.TemporaryDirectory() as folder:
        measure("hospitals", folder)
        rows = [measure("engine", engine, n, folder) for engine, n in track(ENGINES, "engines", console=console)]
    table = Table(title="CPU outside training / CPU of training, one worker, first round left out")
    for column in ("engine", "sites", "training CPU s", "overhead", "target", "peak MB"):
        table.add_column(column, justify="right")
    for row in rows:
        target = f"<= {TARGETS['overhead']:.0%}" if row["engine"] == "in-process" else ""
        table.add_row(
            row["engine"],
            str(row["sites"]),
            f"{row['training_cpu_s']:.1f}",
            f"{row['overhead']:.1%}",
            target,
            f"{row['peak_mb']:.0f}",
        )
    console.print(table)
    peaks = {row["sites"]: row["peak_mb"] for row in rows if row["engine"] == "in-process"}
    memory = peaks[64] / peaks[4]
    console.print(f"peak memory at 64 sites / at 4 sites: {memory:.3f} (target <= {TARGETS['memory_64_over_4']})")
    return {"engines": rows, "memory_64_over_4": memory, "targets": TARGETS}


def aggregation(console: Console) -> dict[str, Any]:
    """Cost and memory of adding up."""
    rows = [measure("aggregation", *case) for case in track(AGGREGATIONS, "aggregation", console=console)]
    table = Table(title="Adding up replies of 30 M parameters (120 MB each), one thread")
    for column in ("", "replies", "CPU s", "memory passes", "target", "extra peak MB"):
        table.add_column(column, justify="right")
    for row in rows:
        target = f"<= {TARGETS['aggregation']:g}" if row["aggregation"] == "ours" else ""
        table.add_row(
            row["aggregation"],
            str(row["replies"]),
            f"{row['cpu_s']:.2f}",
            f"{row['ratio']:.1f}",
            target,
            f"{row['extra_peak_mb']:.0f}",
        )
    console.print(table)
    return {"aggregation": rows}


if __name__ == "__main__":
    main()
