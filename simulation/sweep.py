"""Any keys of a plan over any values: an experiment whose arms are their combinations.

It is resumable as every experiment: a run whose result is there for the same plan and seed is not repeated.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from shared_models.errors import FederadError
from shared_models.plan import Plan
from simulation.experiments.harness import Experiment, Results, row

LARGEST_SWEEP = 200
"""Most combinations of one sweep."""


def sweep_of(plan: Path, settings: Sequence[str], *, seeds: Sequence[int], n_sites: int) -> Experiment:
    """The experiment that runs a plan with every combination of the values.

    Parameters
    ----------
    plan
        The plan file.
    settings
        Each ``TABLE.KEY=VALUE,VALUE,...`` with values as in TOML, such as ``adaptation.strength=0.1,0.3,1``; a word
        without quotes is text, and ``none`` leaves the key out.
    seeds
        Of the runs.
    n_sites
        Emulated hospitals.

    Raises
    ------
    FederadError
        P100 to P104 for a combination that is no plan, R230 for a setting that cannot be read.
    """
    base = Plan.load(plan)
    tables = tomllib.loads(plan.read_text(encoding="utf-8"))
    keys, values = zip(*(parse_setting(setting) for setting in settings), strict=True)
    combinations = list(itertools.product(*values))
    if len(combinations) > LARGEST_SWEEP:
        raise _unreadable(f"{len(combinations)} combinations", f"up to {LARGEST_SWEEP} are run in one sweep")
    plans = {
        arm_name(keys, combination): Plan.from_tables(_changed(tables, keys, combination), name=str(plan))
        for combination in combinations
    }
    return Experiment(
        name=f"sweep-{base.name}",
        title=f"{base.name} over {', '.join('.'.join(key) for key in keys)}",
        seeds=tuple(seeds),
        n_sites=n_sites,
        arms=lambda *, quick: plans,
        evaluate=evaluate,
        compares=False,
    )


def parse_setting(setting: str) -> tuple[tuple[str, ...], list[Any]]:
    """Key and values of ``adaptation.strength=0.1,0.3``; a comma within brackets or quotes divides nothing."""
    key, equals, text = setting.partition("=")
    parts = tuple(key.strip().split("."))
    values = re.findall(r'(?:\[[^\]]*\]|"[^"]*"|[^,\["]+)', text)
    if not equals or not all(re.fullmatch(r"[a-z0-9_]+", part) for part in parts) or not values:
        raise _unreadable(f"--set {setting}", "write TABLE.KEY=VALUE,VALUE")
    return parts, [_value(value.strip()) for value in values]


def arm_name(keys: Sequence[tuple[str, ...]], values: Sequence[Any]) -> str:
    """A name and folder for a combination, such as ``strength-0.3``."""
    parts = [f"{key[-1]}-{'none' if value is None else value}" for key, value in zip(keys, values, strict=True)]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(parts))


def evaluate(results: Results) -> dict[str, Any]:
    """The headline of every combination on the sites' test patients, and on unseen hospitals where there are any."""
    rows = []
    for arm, of_seed in results.items():
        headline = of_seed[0]["headline"]
        if all(result["test"] for result in of_seed):
            rows.append(row(arm, headline, "test", [result["test"][headline] for result in of_seed]))
        for name, found in (of_seed[0].get("scanners") or {}).get("unseen", {}).items():
            values = [result["scanners"]["unseen"][name][headline] for result in of_seed]
            rows.append(row(arm, headline, found["scanner"], values))
    return {"rows": rows, "claims": []}


def _changed(tables: dict[str, Any], keys: Sequence[tuple[str, ...]], values: Sequence[Any]) -> dict[str, Any]:
    changed = deepcopy(tables)
    for key, value in zip(keys, values, strict=True):
        table = changed
        for part in key[:-1]:
            table = table.setdefault(part, {})
        if value is None:
            table.pop(key[-1], None)
        else:
            table[key[-1]] = value
    return {name: table for name, table in changed.items() if table != {}}


def _value(text: str) -> Any:
    if text == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _unreadable(happened: str, remedy: str) -> FederadError:
    return FederadError(
        "R230",
        happened=f"The sweep cannot be run: {happened}.",
        because="It runs the plan once for every combination of values and seeds.",
        remedies=(remedy, "federad-sim sweep PLAN.toml --set adaptation.strength=0.1,0.3,1 --out DIR"),
    )
