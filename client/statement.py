"""The ledger as a person reads it: what each run has cost a patient here, and how that was reckoned."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from client.accounting import delta_limit, filter_order
from client.ledger import Charge
from client.station import Station

BAR = 40
"""Characters of the bar that stands for the lifetime cap."""


def statement(station: Station) -> dict[str, Any]:
    """Everything that was charged, run by run, with what the sums are made of.

    Returns
    -------
    dict
        ``runs``, each with its ``events``, ``rounds`` charged and answered, ``epsilon`` by PRV and ``lifetime`` (epsilon of
        everything up to and with this run, by the Renyi filter at ``order``); then ``spent``, ``spent_by_prv``, ``cap``,
        ``delta`` and ``head``. Infinity is null.

    Raises
    ------
    FederadError
        C164 to C168 if the ledger cannot be used.
    """
    ledger, policy = station.ledger(), station.config.permits
    spent = ledger.spent()
    agreed = {charge.question.plan_sha256: ledger.agreement(charge.question.plan_sha256) for charge in spent.charges}
    sizes = [agreement.declared_size for agreement in agreed.values() if agreement]
    delta = delta_limit(max(sizes, default=1))
    cap = policy.lifetime_epsilon
    order = spent.order or filter_order(cap if math.isfinite(cap) else 10.0, delta)
    runs, so_far = [], replace(spent, charges=())
    for run in spent.runs:
        charges = [charge for charge in spent.charges if charge.question.run == run]
        so_far = replace(so_far, charges=(*so_far.charges, *charges))
        agreement = agreed[charges[0].question.plan_sha256]
        runs.append(
            {
                "run": run,
                "plan_sha256": charges[0].question.plan_sha256,
                "began": charges[0].time,
                "rounds_charged": len(charges),
                "rounds_answered": sum(charge.n in spent.settled for charge in charges),
                "declared_size": agreement.declared_size if agreement else None,
                "events": _events(charges),
                "delta": agreement.delta if agreement else delta,
                "epsilon": _number(so_far.run_epsilon(run, agreement.delta if agreement else delta)),
                "lifetime": _number(so_far.lifetime_epsilon(delta, order)),
            }
        )
    head = ledger.head
    return {
        "runs": runs,
        "spent": _number(spent.lifetime_epsilon(delta, order)),
        "spent_by_prv": _number(spent.lifetime_epsilon_by_prv(delta)),
        "cap": _number(cap),
        "delta": delta,
        "order": order,
        "history_is_lost": spent.is_lost,
        "head": {"n": head.n, "hash": head.hash},
    }


def shown(told: dict[str, Any]) -> Group:
    """The statement for a terminal: a table of runs, the sum, and how much of the cap each run took."""
    table = Table(title="what each run has cost a patient here" if told["runs"] else "nothing has been charged yet")
    for column in ("run", "began", "rounds", "declared", "mechanism", "epsilon", "all runs"):
        table.add_column(column)
    for run in told["runs"]:
        rounds = f"{run['rounds_answered']} of {run['rounds_charged']} answered"
        mechanism = "\n".join(_mechanism(event) for event in run["events"])
        figures = (_figure(run["epsilon"]), _figure(run["lifetime"]))
        declared = str(run["declared_size"] or "")
        table.add_row(run["run"], run["began"][:16].replace("T", " "), rounds, declared, mechanism, *figures)
    cap = told["cap"]
    lines = [
        f"Spent: epsilon {_figure(told['spent'])} at delta {told['delta']:g} (Renyi filter, order {told['order']:g}). "
        f"Cap: {_figure(cap)}.",
        f"Had all runs been fixed beforehand: {_figure(told['spent_by_prv'])} (PRV).",
        "It holds for one patient with all studies here, added or removed, and covers what passed the gate.",
    ]
    return Group(table, *(Text(line) for line in lines), *_bars(told["runs"], cap))


def _bars(runs: list[dict[str, Any]], cap: float | None) -> list[Text]:
    """One line for each run: how full the lifetime cap is after it."""
    if cap is None:
        return []
    bars = []
    for run in runs:
        share = 1.0 if run["lifetime"] is None else min(run["lifetime"] / cap, 1.0)
        filled = round(share * BAR)
        style = "red" if share > 0.9 else "yellow" if share > 0.6 else "green"
        bars.append(Text.assemble(("█" * filled, style), "·" * (BAR - filled), f" {share:4.0%}  after {run['run']}"))
    return bars


def _events(charges: list[Charge]) -> list[dict[str, Any]]:
    """Equal mechanisms of a run, with their steps added up."""
    totals: dict[tuple[float, float, str, str], int] = {}
    for charge in charges:
        for event in charge.events:
            kind = (event.noise_multiplier, event.sampling_rate, event.unit, event.split)
            totals[kind] = totals.get(kind, 0) + event.steps
    return [
        {"noise_multiplier": noise, "sampling_rate": rate, "unit": unit, "split": split, "steps": steps}
        for (noise, rate, unit, split), steps in totals.items()
    ]


def _mechanism(event: dict[str, Any]) -> str:
    if event["noise_multiplier"] == 0:
        return "no noise"
    what = "steps" if event["split"] == "train" else f"means of {event['split']} patients"
    return f"{event['steps']} {what}, noise {event['noise_multiplier']:.4g}, q {event['sampling_rate']:.4g}"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _figure(value: float | None) -> str:
    return "without bound" if value is None else f"{value:.3g}"
