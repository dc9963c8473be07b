"""``make bench``: every figure in a process of its own, a table for people, JSON for the rest.

Ratios are formed within one run. CPU seconds, not wall time, so that a busy machine disturbs little.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.benchmarks.reading import FLOORS, READERS, SLICES, SYNTAXES

ENGINES = [("in-process", n) for n in (4, 16, 64)] + [("flower-ray", n) for n in (4, 16)]
AGGREGATIONS = [("ours", 4), ("ours", 20), ("flower", 20)]
NETWORKS = ("default", "larger", "cascade")
TARGETS = {
    "overhead": 0.05,
    "memory_64_over_4": 1.05,
    "aggregation": 4.0,
    "private_time": 1.4,
    "private_cascade_time": 1.6,
    "private_memory": 0.65,
    "adaptation": 0.25,
    "uncompressed_over_bytes": 1.3,
    "compressed_over_best": 1.1,
    "catalogued_per_s": 200,
    "known_per_s": 5000,
    "second_visit": 0.03,
}


def measure(module: str, *arguments: object, **variables: str) -> dict[str, Any]:
    """The JSON line that a benchmark prints last; ``variables`` are added to its environment."""
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **variables})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(".bench"))
    parser.add_argument("--only", choices=("engines", "aggregation", "privacy", "adaptation", "reading"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    result: dict[str, Any] = {}
    for part in (engines, aggregation, privacy, adaptation, reading):
        if options.only in (None, part.__name__):
            result |= part(console)
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


def privacy(console: Console) -> dict[str, Any]:
    """Time and memory of a private step over those of a plain one; three of each in turn, and their medians."""
    table = Table(
        title="Private step, secure noise included / plain step: 4 patients x 4 slices of 96 x 96, one thread"
    )
    for column in ("network", "parameters", "plain CPU s", "time", "target", "memory", "target"):
        table.add_column(column, justify="right")
    rows = []
    for network in track(NETWORKS, "privacy", console=console):
        pairs = [[measure("privacy", mode, network) for mode in ("plain", "private")] for _ in range(3)]
        plain, private = (
            measure("privacy", mode, network, MALLOC_MMAP_THRESHOLD_="65536") for mode in ("plain", "private")
        )
        row = {
            "network": network,
            "parameters": plain["parameters"],
            "plain_cpu_s": statistics.median(one["cpu_s"] for one, _ in pairs),
            "time": statistics.median(two["cpu_s"] / one["cpu_s"] for one, two in pairs),
            "memory": private["memory_mb"] / plain["memory_mb"],
        }
        rows.append(row)
        table.add_row(
            network,
            str(row["parameters"]),
            f"{row['plain_cpu_s']:.2f}",
            f"{row['time']:.2f}",
            f"<= {TARGETS['private_cascade_time' if network == 'cascade' else 'private_time']}",
            f"{row['memory']:.2f}",
            f"<= {TARGETS['private_memory']}",
        )
    console.print(table)
    return {"privacy": rows}


def adaptation(console: Console) -> dict[str, Any]:
    """What appearance randomisation and an adversary add to a step; medians of three processes."""
    rows = [measure("adaptation")["added"] for _ in track(range(3), "adaptation", console=console)]
    added = {name: statistics.median(row[name] for row in rows) for name in rows[0] if name != "plain"}
    table = Table(title="CPU that adaptation adds to a step of the demo, one thread")
    for column in (*added, "target of both"):
        table.add_column(column, justify="right")
    table.add_row(*(f"{value:.1%}" for value in added.values()), f"<= {TARGETS['adaptation']:.0%}")
    console.print(table)
    return {"adaptation": added}


def reading(console: Console) -> dict[str, Any]:
    """Reading a DICOM series against other readers, and cataloguing a folder."""
    with tempfile.TemporaryDirectory() as folder:
        measure("reading", "write", folder)
        cases = [
            (reader, syntax) for syntax in SYNTAXES for reader in READERS if reader not in FLOORS or syntax == "raw"
        ]
        rows = [attempt(reader, syntax, folder) for reader, syntax in track(cases, "reading", console=console)]
        speed = measure("reading", "catalogue", folder)
        visits = measure("reading", "visit", folder, OMP_NUM_THREADS="1")
    seconds = {(row["reader"], row["syntax"]): row["cpu_s"] for row in rows}
    table = Table(
        title=f"CPU s for a series of 512 x 512 x {SLICES} (16 bits), one thread; ours with geometry and units"
    )
    for column in ("syntax", *READERS, "ours / best", "target"):
        table.add_column(column, justify="right")
    ratios = {}
    for syntax in SYNTAXES:
        others = [seconds[reader, syntax] for reader in READERS if reader not in ("federad", *FLOORS)
                  and seconds.get((reader, syntax)) is not None]  # fmt: skip
        best = seconds["bytes", "raw"] if syntax == "raw" else min(others)
        ratios[syntax] = seconds["federad", syntax] / best
        target = TARGETS["uncompressed_over_bytes" if syntax == "raw" else "compressed_over_best"]
        cells = [seconds.get((reader, syntax)) for reader in READERS]
        shown = ["" if cell is None else f"{cell:.2f}" for cell in cells]
        table.add_row(syntax, *shown, f"{ratios[syntax]:.2f}", f"<= {target}")
    console.print(table)
    console.print(
        f"catalogue: {speed['first_per_s']:.0f} files/s at first (target >= {TARGETS['catalogued_per_s']}), "
        f"{speed['second_per_s']:.0f} files/s when nothing changed (target >= {TARGETS['known_per_s']})"
    )
    console.print(
        f"two patients catalogued and prepared: {visits['first_s']:.2f} CPU s, again {visits['second_s']:.3f}: "
        f"{visits['second_over_first']:.3f} of the first (target <= {TARGETS['second_visit']})"
    )
    return {"reading": rows, "reading_ratios": ratios, "catalogue": speed, "visits": visits}


def attempt(reader: str, syntax: str, folder: str) -> dict[str, Any]:
    """One reader on one syntax; without seconds where it cannot read it."""
    try:
        return measure("reading", reader, syntax, folder, OMP_NUM_THREADS="1")
    except SystemExit:
        return {"reader": reader, "syntax": syntax, "cpu_s": None}


if __name__ == "__main__":
    main()
