"""The egress manifest: for each answer, what was in it; for this hospital's own people, in the audit.

A line of the audit says of an answer its kinds, names, norm and cost, never its values. The names and shapes of an
update's arrays are the same in every round of a plan: they are kept once, in ``layouts/<SHA-256>.json``, and the line holds
the hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from client.audit import FILE, AuditLog
from client.processes import write_durably

LAYOUTS = "layouts"


def noted(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the audit says of an answer (``Passed.manifest``), with the layout of its update kept in ``folder``."""
    said = dict(manifest)
    if "update" in said:
        shapes = said["update"]["shapes"]
        text = json.dumps(shapes, sort_keys=True, indent=1).encode("ascii")
        sha256 = hashlib.sha256(text).hexdigest()
        path = folder / LAYOUTS / f"{sha256}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_durably(path, text)
        said["update"] = {
            "layout": sha256,
            "arrays": len(shapes),
            "values": sum(prod(shape) for shape in shapes.values()),
            "norm": float(f"{said['update']['norm']:.6g}"),
        }
    return said


def egress(folder: Path, run: str | None = None) -> Iterator[dict[str, Any]]:
    """Every answer and refusal in a station's audit, oldest first, checked; only those of ``run`` where one is given.

    Raises
    ------
    FederadError
        C162 if the audit is not whole.
    """
    for entry in AuditLog(folder / FILE).entries():
        if entry["event"] in ("answer", "refusal") and run in (None, entry.get("run")):
            yield entry


def told(entry: Mapping[str, Any]) -> str:
    """What left in an answer, in one line for a person."""
    if entry["event"] == "refusal":
        return f"refused: {entry['word']}"
    if entry.get("again"):
        return "the same bytes again"
    parts = []
    for kind, what in entry.get("released", {}).items():
        if kind == "update":
            parts.append(f"update of {what['values']:,} values in {what['arrays']} arrays, norm {what['norm']:.3g}")
        elif kind == "cost":
            parts.append("cost " + ", ".join(f"{name} {value:g}" for name, value in what["values"].items()))
        elif kind == "moments":
            parts += [f"moments of features, {' x '.join(map(str, shape))} values" for shape in what["shapes"].values()]
        else:
            parts.append(f"{kind} {', '.join(what['names'])}")
    return "; ".join(parts) or "an answer with nothing in it"
