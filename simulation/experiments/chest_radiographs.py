"""A finding that goes with the hospital: COVID-19 in chest radiographs of three sources, one of which has nothing else.

Every radiograph from Hannover shows a patient with COVID-19; those without a finding come from two other collections
(Actualmed, Figure 1). Two sites get half of Hannover's patients and a third of those without a finding each, so a network
may tell the collection instead of the disease. In use nobody is from Hannover: Actualmed's patients with COVID-19, and the
last third without a finding. That is a real case of ``confounded``, with few patients (seven of them without a finding in
use): what it shows are ways to train beside each other, never how well anything is diagnosed (DeGrave et al. 2021,
doi:10.1038/s42256-021-00338-7, show how such networks fail).

Nobody says which devices took the pictures, so nothing is there for an adversary to decide.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import simulation
from shared_models.plan import AdaptationTable, Plan
from shared_models.seeds import generator
from simulation.experiments.harness import Experiment, Results, claim, row
from simulation.run import impossible

NONE, COVID = "no finding", "covid-19"

IN_USE = "elsewhere"
"""The folder of those who come later."""

SITES = ("site-1", "site-2")

PIXELS = 128
"""Width and height of a dealt picture: half of the original's."""

WAYS: dict[str, tuple[bool, bool]] = {
    "plain": (False, False),
    "balanced": (True, False),
    "appearance": (False, True),
    "balanced, appearance": (True, True),
}
"""Whether labels count alike, and whether appearance is randomised."""

TRAINING_SHARE = 0.7
"""Of the patients of a site."""

Row = dict[str, str]


def arms(*, quick: bool) -> dict[str, Plan]:
    """A plan for each way; ``quick`` takes half of the rounds."""
    base = Plan.load(Path(simulation.__path__[0]) / "plans" / "chest-radiographs.toml")
    base = base.model_copy(update={"rounds": base.rounds // 2}) if quick else base
    return {way: _plan(base, *what) for way, what in WAYS.items()}


def _plan(base: Plan, is_balanced: bool, has_appearance: bool) -> Plan:
    training = base.training.model_copy(update={"balanced": True if is_balanced else None})
    adaptation = AdaptationTable(appearance=True) if has_appearance else None
    return base.model_copy(update={"training": training, "adaptation": adaptation})


def deal(source: Path, folder: Path, seed: int) -> Path:
    """Two confounded sites and those who come later, as folders of pictures; ``seed`` chooses who goes where.

    Raises
    ------
    FederadError
        R230 if ``source`` has no table of findings.
    """
    try:
        with (source / "labels.csv").open(newline="", encoding="utf-8") as lines:
            rows = [one for one in csv.DictReader(lines) if one["finding"].lower() in (NONE, COVID)]
    except (OSError, KeyError):
        raise impossible(
            f"{source} has no labels.csv with a column finding.",
            "The table says who has which finding, and at which source.",
            "--data ../shared/data/chest_xray",
        ) from None
    rng = generator(seed, "chest radiographs")
    sources = {who: one["site"] for one in rows if (who := one["subject"]) and one["finding"].lower() == COVID}
    hannover, actualmed = (
        _shuffled((who for who, where in sources.items() if where == name), rng) for name in ("hannover", "actualmed")
    )
    healthy = _shuffled({one["subject"] for one in rows} - sources.keys(), rng)
    shutil.rmtree(folder, ignore_errors=True)
    for k, site in enumerate(SITES):
        splits = _split(hannover[k :: len(SITES)]) | _split(healthy[k::3])
        _write(source, folder / site, rows, splits)
    _write(source, folder / IN_USE, rows, dict.fromkeys([*actualmed, *healthy[2::3]], "test"))
    return folder


def _split(people: list[str]) -> dict[str, str]:
    """Whether each trains; those of one finding are given at a time, so that both are in both."""
    n = round(TRAINING_SHARE * len(people))
    return dict.fromkeys(people[:n], "train") | dict.fromkeys(people[n:], "test")


def _shuffled(people: Iterable[str], rng: np.random.Generator) -> list[str]:
    return [str(one) for one in rng.permutation(sorted(people))]


def _write(source: Path, site: Path, rows: list[Row], splits: dict[str, str]) -> None:
    """Pictures of those who have a split, sorted by finding, and who they are of."""
    rows = [one for one in rows if one["subject"] in splits]
    for one in rows:
        picture = site / "images" / one["finding"].lower() / Path(one["file"]).name
        picture.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(source / one["file"]) as image:
            image.resize((PIXELS, PIXELS), Image.Resampling.BOX).save(picture)
    with (site / "index.csv").open("w", newline="", encoding="utf-8") as lines:
        table = csv.writer(lines)
        table.writerow(("file", "subject", "split"))
        table.writerows((Path(one["file"]).name, one["subject"], splits[one["subject"]]) for one in rows)


def evaluate(results: Results) -> dict[str, Any]:
    """AUC of every way where the source gives the finding away and where it does not, and the claims."""

    def auc(way: str, where: str) -> list[float]:
        return [float(result["scanners"][where]["auc"]) for result in results[way]]

    own, in_use = ({way: auc(way, where) for way in WAYS} for where in ("seen_mean", "unseen_mean"))
    return {
        "rows": [
            *(row(way, "auc", "test patients of the confounded sites", own[way]) for way in WAYS),
            *(row(way, "auc", "patients in use", in_use[way]) for way in WAYS),
        ],
        "claims": [
            claim(
                "shortcut",
                "AUC of plain training that is lost where the source no longer gives the finding away",
                [a - b for a, b in zip(own["plain"], in_use["plain"], strict=True)],
                at_least=0.1,
            ),
            claim(
                "balanced_gain",
                "AUC that the balanced loss, recommended for confounded scanners, gains there",
                [a - b for a, b in zip(in_use["balanced"], in_use["plain"], strict=True)],
                at_least=0.0,
            ),
        ],
    }


CHEST_RADIOGRAPHS = Experiment(
    name="chest-radiographs",
    title="A finding in chest radiographs that goes with the hospital",
    seeds=(0, 1, 2, 3, 4),
    n_sites=3,
    arms=arms,
    evaluate=evaluate,
    data="../shared/data/chest_xray",
    deal=deal,
    left_out=lambda arm: (IN_USE,),
    compares=False,
)
"""AUC where the source misleads."""
