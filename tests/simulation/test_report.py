"""The report shows what a result holds, names what it lacks, and needs nothing but itself."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from shared_models.errors import TITLES, FederadError
from simulation.report import write_experiment_report, write_report

ROOT = Path(__file__).parents[2]
SITES = ("site-1", "site-2", "site-3", "site-4")
SCANNERS = ("Siemens Avanto 1.5 T", "Philips Achieva 3 T", "GE Signa HDxt 1.5 T", "Siemens Skyra 3 T")


def a_result(n_rounds: int = 12) -> dict:
    """What a finished run on four emulated hospitals writes."""
    rng = np.random.default_rng(7)
    tests = {"site-1": 0.861, "site-2": 0.8174, "site-3": 0.8416, "site-4": 0.79}
    local = {
        "site-1": (0.7913, 0.5107, 0.6402, 0.4931),
        "site-2": (0.4712, 0.7488, 0.5093, 0.6614),
        "site-3": (0.6207, 0.4419, 0.7621, 0.4105),
        "site-4": (0.4688, 0.6833, 0.4527, 0.6752),
    }
    rounds = []
    for i in range(1, n_rounds + 1):
        dice = {
            site: round(
                0.84 - 0.06 * k - (0.72 - 0.1 * k) * float(np.exp(-i / (2.2 + k / 2))) + 0.012 * rng.normal(), 5
            )
            for k, site in enumerate(SITES)
        }
        missing = ["site-3"] if i == 4 else ["site-2"] if i == 8 else []
        refused = [{"site": "site-4", "reason": "update norm 1204.5 is above 1000"}] if i == 6 else []
        away = {*missing, *(one["site"] for one in refused)}
        rounds.append(
            {
                "round": i,
                "seconds": round(6.1 + rng.random(), 2),
                "replied": [site for site in SITES if site not in away],
                "refused": refused,
                "missing": missing,
                "training_loss": round(0.11 + 0.8 * float(np.exp(-i / 3)) + 0.01 * rng.random(), 5),
                "validation": {
                    "dice": round(float(np.mean(list(dice.values()))), 5),
                    "hd95_mm": round(20 / i + 4.1, 3),
                },
                "per_site": {site: {"dice": value} for site, value in dice.items() if site not in away},
            }
        )
    return {
        "plan": "demo",
        "plan_name": "demo",
        "plan_sha256": "9f2c" * 16,
        "task": "segmentation",
        "engine": "in-process",
        "workers": 2,
        "seed": 0,
        "started": "2026-03-02T09:14:07+00:00",
        "seconds": 96.4,
        "status": "finished",
        "headline": "dice",
        "sites": [
            {
                "name": site,
                "scanner": scanner,
                "patients": {"train": 36 + k, "validation": 9, "test": 15 - k},
                "skipped": {"no outline": 2} if k == 1 else {},
            }
            for k, (site, scanner) in enumerate(zip(SITES, SCANNERS, strict=True))
        ],
        "rounds": rounds,
        "best_round": max(rounds, key=lambda one: one["validation"]["dice"])["round"],
        "released": "best",
        "test": {
            "dice": 0.8283,
            "hd95_mm": 5.6821,
            "per_site": {
                site: {"dice": dice, "hd95_mm": 4.21 + 0.917 * k, "patients": 15 - k}
                for k, (site, dice) in enumerate(tests.items())
            },
        },
        "comparison": {
            "metric": "dice",
            "rows": [
                {"method": "federated", "per_site": tests, "mean": 0.8275},
                {
                    "method": "central",
                    "per_site": {"site-1": 0.8702, "site-2": 0.8291, "site-3": 0.8377, "site-4": 0.8114},
                    "mean": 0.8371,
                },
                *(
                    {
                        "method": f"local:{site}",
                        "per_site": dict(zip(SITES, values, strict=True)),
                        "mean": round(sum(values) / 4, 5),
                    }
                    for site, values in local.items()
                ),
            ],
            "local_own": 0.74435,
            "local_elsewhere": 0.5303,
            "seconds": 210.0,
        },
        "weights_sha256": "07be" * 16,
        "versions": {"federad": "0.1.0", "torch": "2.13.0", "flwr": "1.41.0"},
        "command": "federad-sim run simulation/plans/demo.toml --sites 4 --out runs/demo",
    }


def some_pictures() -> dict[str, np.ndarray]:
    """Heads with lesions: the best, the median and the worst patient of each site."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:108, :90].astype(np.float32)
    arrays, meta = {}, []
    for k, (site, scanner) in enumerate(zip(SITES, SCANNERS, strict=True)):
        for j, which in enumerate(("best", "median", "worst")):
            head = ((y - 54) / 46) ** 2 + ((x - 45) / 37) ** 2
            folds = np.sin(x / (3 + k / 3) + 2 * np.cos(y / 7)) * np.cos(y / (4 + j / 3))
            cy, cx, r = 40 + 24 * rng.random(), 30 + 28 * rng.random(), 4.5 + 3.5 * rng.random()
            truth = ((y - cy) / r) ** 2 + ((x - cx) / (1.3 * r)) ** 2 < 1 + 0.25 * np.sin(
                np.arctan2(y - cy, x - cx) * 3
            )
            shift = (0.4, 1.6, 3.6)[j]
            prediction = ((y - cy - shift) / r) ** 2 + ((x - cx + shift / 2) / (1.2 * r)) ** 2 < 1
            image = np.where(head < 1, 0.55 + 0.12 * folds, 0.02)
            image = (
                np.where((head < 1.12) & (head > 1), 0.95, image)
                + 0.5 * truth * (head < 1)
                + 0.03 * rng.normal(size=y.shape)
            )
            index = 3 * k + j
            arrays[f"{index}/image"] = image.astype(np.float32)
            arrays[f"{index}/truth"] = truth.astype(np.uint8)
            arrays[f"{index}/prediction"] = prediction.astype(np.uint8)
            dice = 2 * (truth & prediction).sum() / (truth.sum() + prediction.sum())
            meta.append({"site": site, "scanner": scanner, "which": which, "dice": float(dice), "pixel_mm": [2.0, 2.0]})
    return {**arrays, "meta": np.array(json.dumps(meta))}


def an_experiment() -> dict:
    """What an experiment over three seeds writes."""
    rows = []
    for split, gain in (("seen scanners", 0.0), ("a scanner never seen", -0.08)):
        for method, mean in (("federated", 0.824), ("central", 0.836), ("local, at home", 0.741), ("fedprox", 0.829)):
            values = [round(mean + gain + d, 4) for d in (-0.013, 0.004, 0.009)]
            rows.append(
                {
                    "method": method,
                    "metric": "dice",
                    "split": split,
                    "mean": float(np.mean(values)),
                    "sd": float(np.std(values, ddof=1)),
                    "values": values,
                }
            )
    return {
        "experiment": "federated-against-local",
        "quick": False,
        "seeds": [0, 1, 2],
        "rows": rows,
        "claims": [
            {
                "claim": "The shared model beats own models at home",
                "value": 0.0831,
                "expected": 0.03,
                "holds": True,
                "id": "F1",
            },
            {
                "claim": "The shared model is close to central",
                "value": -0.0124,
                "expected": -0.01,
                "holds": False,
                "id": "F2",
            },
        ],
        "command": "federad-sim experiment federated-against-local --out runs/fal",
        "seconds": 5231.0,
    }
