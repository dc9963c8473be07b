"""What an operator sees of a run: its state, who takes part, how each round went, how far each site is in this one."""

from __future__ import annotations

import json
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from server.consortium import Consortium, RunRow
from server.operator import server_status
from server.runs import ACTIVE, RunFolder, state_of
from server.superlink import SuperLink
from shared_models.errors import FederadError

REFRESH_S = 1.0
LAST_ROUNDS = 12
LAST_EVENTS = 6

Described = dict[str, Any]


def describe_run(consortium: Consortium, row: RunRow) -> Described:
    """Everything that is known of a run."""
    superlink = SuperLink(consortium.folder)
    folder = RunFolder(consortium.folder, row.run)
    state = state_of(consortium, superlink, row)
    return {
        "run": row.run,
        "plan": row.plan.name,
        "plan_sha256": row.plan.sha256,
        "asks": row.plan.asks,
        "seed": row.seed,
        "state": state,
        "folder": str(folder.path),
        "n_rounds": row.plan.rounds,
        "rounds": folder.records(),
        "minimum_sites": row.plan.strategy.minimum_sites,
        "sites": _describe_sites(consortium, superlink, row),
        "events": [vars(event) for event in folder.events(LAST_EVENTS)],
        "error": folder.error if state not in ACTIVE and state != "finished" else None,
        "weights_sha256": (folder.result or {}).get("weights_sha256"),
        "test": (folder.result or {}).get("test"),
    }


def _describe_sites(consortium: Consortium, superlink: SuperLink, row: RunRow) -> list[Described]:
    try:
        online = {node.node_id for node in superlink.list_nodes() if node.is_online}
    except FederadError:
        online = set()
    said = dict.fromkeys(consortium.approvals(row.plan.sha256), "approved")
    said |= dict.fromkeys(consortium.refusals(row.plan.sha256), "refused")
    progress = consortium.progress(row.run)
    return [
        {
            "name": site.name,
            "online": site.node_id in online,
            "says": said.get(site.name, "undecided"),
            "progress": progress.get(site.name),
        }
        for site in consortium.sites()
        if site.status == "enrolled"
    ]


def follow(consortium: Consortium, run: str, *, as_json: bool) -> Described:
    """Show a run until nothing more happens by itself, and how it stands then; as JSON, one line for each change."""
    with Live(console=Console(quiet=as_json), refresh_per_second=4) as live:
        before = ""
        while True:
            described = describe_run(consortium, consortium.run(run))
            live.update(run_view(described))
            if as_json and (line := json.dumps(described)) != before:
                print(line, flush=True)
                before = line
            if not _goes_on(consortium, described):
                return described
            time.sleep(REFRESH_S)


def _goes_on(consortium: Consortium, described: Described) -> bool:
    """Whether the run moves by itself: one that was interrupted is taken up by a server that runs."""
    if described["state"] != "interrupted":
        return described["state"] in ACTIVE
    return consortium.run(described["run"]).state in ACTIVE and server_status(consortium.folder) is not None


def run_view(described: Described) -> Group:
    """A run for the terminal."""
    done = len(described["rounds"])
    head = Text.assemble(
        (described["run"], "bold"),
        "  ",
        (described["state"], _colour(described["state"])),
        f"  round {done} of {described['n_rounds']} committed",
    )
    parts: list[Any] = [head, _sites_table(described)]
    if described["rounds"]:
        parts.append(_rounds_table(described["rounds"][-LAST_ROUNDS:]))
    if described["state"] in ACTIVE:
        parts += [Text(_event_line(event), style="dim") for event in described["events"]]
    if described["error"]:
        parts.append(Text(f"{described['error'].get('error', '')}  {described['error']['happened']}", style="yellow"))
    if described["weights_sha256"]:
        parts.append(Text(f"weights {described['weights_sha256']}", style="dim"))
    return Group(*parts)


def runs_table(runs: list[Described]) -> Table:
    """All runs, a line for each."""
    table = Table(title="runs" if runs else "no run yet")
    for column in ("run", "state", "rounds", "approved"):
        table.add_column(column)
    for run in runs:
        approved = sum(site["says"] == "approved" for site in run["sites"])
        state = Text(run["state"], style=_colour(run["state"]))
        table.add_row(run["run"], state, f"{len(run['rounds'])}/{run['n_rounds']}", str(approved))
    return table


def _sites_table(described: Described) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("site", "connected", "plan", "this round"):
        table.add_column(column, style=None)
    now = len(described["rounds"]) + 1
    for site in described["sites"]:
        progress = site["progress"]
        is_now = progress is not None and progress["round"] == now and progress["total"] > 0
        bar = _bar(progress["done"], progress["total"]) if is_now and described["state"] in ACTIVE else ""
        table.add_row(site["name"], Text("yes", style="green") if site["online"] else "no", site["says"], bar)
    return table


def _rounds_table(records: list[Described]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("round", "seconds", "replied", "left out", "loss", "validation"):
        table.add_column(column)
    for record in records:
        refused = [f"{entry['site']}: {entry['reason']}" for entry in record["refused"]]
        left_out = ", ".join([*refused, *(f"{site}: no reply" for site in record["missing"])])
        loss = "" if record["training_loss"] is None else f"{record['training_loss']:.4f}"
        validation = "  ".join(f"{name} {value:.3f}" for name, value in (record["validation"] or {}).items())
        replied = ", ".join(record["replied"])
        table.add_row(str(record["round"]), f"{record['seconds']:.0f}", replied, left_out, loss, validation)
    return table


def _event_line(event: Described) -> str:
    where = f"round {event['round']}" if event["round"] else ""
    words = (event["at"][11:19], event["what"], where, event["kind"], event["site"], event["detail"])
    count = f"{event['n_sites']} sites" if event["n_sites"] else ""
    return "  ".join(word for word in (*words, count) if word)


def _bar(done: int, total: int) -> str:
    filled = round(20 * min(done, total) / total)
    return f"{'━' * filled}{'╌' * (20 - filled)} {done}/{total}"


def _colour(state: str) -> str:
    if state in ("paused", "interrupted", "failed"):
        return "yellow"
    return "green" if state in ("running", "finished") else "cyan"
