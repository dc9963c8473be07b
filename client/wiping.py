"""Removing what a plan has left in the station's folder, and a list of it as the proof.

Gone are the prepared volumes with the salt of their key, the stored answers, the layouts, what this site kept for itself
of the plan's runs, and the catalogue, as far as no other plan needs them. The ledger stays: what was spent on patients has
left and cannot be taken back, and without it they would pay again without anybody knowing. The audit stays, since it is the
proof of what has left.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.data.cohort import cohort_key
from client.data.sealed import SALT
from client.egress import LAYOUTS, egress
from client.own import OwnState
from client.processes import overwrite
from shared_models.errors import FederadError
from shared_models.plan import Plan

if TYPE_CHECKING:
    from client.station import Station

KEPT = {
    "ledger": "what was spent on patients has left and cannot be taken back; without it they would pay twice",
    "audit": "it is the proof of what has left, and of this",
}
"""What stays, and why."""


@dataclass(frozen=True)
class Gone:
    """One kind of thing that was removed."""

    what: str
    files: int
    n_bytes: int

    def as_json(self) -> dict[str, Any]:
        """For ``--json`` and the audit."""
        return asdict(self)


def wipe(station: Station, plan: Plan) -> list[Gone]:
    """Remove all of a refused plan but its charges; the list is of files that were there before and are not any more.

    Raises
    ------
    FederadError
        C128 if the plan is approved, if an approved one shares its prepared volumes, or if something could not be removed.
    """
    _require_refused(station, plan)
    others = [one for one in station.approved_plans() if one.sha256 != plan.sha256]
    folder = station.folder
    cohort = folder / "cohorts" / cohort_key(plan)
    removed = [
        _remove("prepared volumes, and the salt of their key", [cohort]),
        _remove("answers that were kept to be given again", station.ledger().forget_answers(plan.sha256)),
        _remove("layouts of updates", _layouts_of(folder, plan, others)),
        _remove("what this site kept for itself of its runs", _own_of(folder, plan)),
    ]
    if not others:
        removed.append(_remove("catalogue of the data folder", sorted(folder.glob("catalogue.sqlite*"))))
    return removed


def _require_refused(station: Station, plan: Plan) -> None:
    sharing = [one for one in station.approved_plans() if cohort_key(one) == cohort_key(plan)]
    if not sharing:
        return
    names = ", ".join(f"{one.name} ({one.sha256[:12]})" for one in sharing)
    raise FederadError(
        "C128",
        happened=f"{names} may train here on the prepared volumes that would be wiped.",
        because="A plan that is approved needs its patients' volumes whenever a round begins.",
        remedies=tuple(f"federad-site refuse {one.sha256[:12]}, if it shall train here no more" for one in sharing),
    )


def _layouts_of(folder: Path, plan: Plan, others: Iterable[Plan]) -> list[Path]:
    """Layouts that answers to this plan name, and no answer to an approved one."""
    kept_for = {one.sha256 for one in others}
    named: dict[bool, set[str]] = {True: set(), False: set()}
    for entry in egress(folder):
        layout = entry.get("released", {}).get("update", {}).get("layout")
        if layout and (entry.get("plan") == plan.sha256 or entry.get("plan") in kept_for):
            named[entry["plan"] == plan.sha256].add(layout)
    return [folder / LAYOUTS / f"{layout}.json" for layout in sorted(named[True] - named[False])]


def _own_of(folder: Path, plan: Plan) -> list[Path]:
    """What was kept of each run in which this plan was asked about."""
    runs = {entry["run"] for entry in egress(folder) if entry.get("plan") == plan.sha256 and "run" in entry}
    places = [OwnState(folder, run, plan.sha256).folder for run in sorted(runs)]
    return [place for place in places if place.is_dir()]


def _remove(what: str, paths: Iterable[Path]) -> Gone:
    """Remove files and folders, a salt first and overwritten; C128 if one of them is still there afterwards."""
    paths = list(paths)
    files = [
        file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*"))) if file.is_file()
    ]
    sizes = [file.stat().st_size for file in files]
    for file in files:
        if file.name == SALT:
            overwrite(file)
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    left = [path for path in (*files, *paths) if path.exists()]
    if left:
        raise FederadError(
            "C128",
            happened=f"{len(left)} of {len(files)} files could not be removed; the first is {left[0]}.",
            because="What is said to be gone must be gone.",
            remedies=("mend the permissions of that folder", "then type the same command again"),
        )
    return Gone(what, len(files), sum(sizes))
