"""Lesion or none, from emulated hospitals to the report: the same in every engine, with privacy and without."""

from __future__ import annotations

import json

import numpy as np
import pytest
from privately import TWO_STEPS

from server.journal import Journal
from shared_models.plan import Plan
from shared_models.weights import weights_sha256
from simulation.consortium import emulate
from simulation.engine import Execution, run_rounds
from simulation.run import Request, Watcher, simulate
from simulation.stations import SiteFolder, prepare_stations

SEED = 4
"""With it both sites have test patients with and without lesions, and validation patients of one kind: no AUC there."""


def plan_of(**tables: dict) -> Plan:
    return Plan.from_tables(
        {
            "name": "tiny",
            "rounds": 2,
            "task": {
                "kind": "classification", "labels": ["no lesion", "lesion"], "network": "resnet", "channels": [4, 8]
            },
            "data": {
                "modality": "MR", "dimensions": 2, "spacing_mm": [4.0, 4.0], "patch": [56, 48],
                "split": {"train": 0.5, "validation": 0.1, "test": 0.4},
            },
            "simulation": {"patients": 8, "slices": 1, "prevalence": [0.7, 0.4]},
            **tables,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory):
    return emulate(plan_of(), n_sites=2, folder=tmp_path_factory.mktemp("emulated"), seed=SEED)


def stations_of(plan, hospitals, folder):
    sites = [SiteFolder(h.name, h.folder, folder / h.name) for h in hospitals]
    prepare_stations(plan, sites, seed=SEED, workers=1, on_site=lambda _: None)
    return [site.station for site in sites]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_alone")
def test_final_weights_agree_bit_for_bit(hospitals, tmp_path):
    """
    In this process and on Flower's Ray engine.
    """
    plan = plan_of()
    stations = stations_of(plan, hospitals, tmp_path / "stations")
    shas = {
        weights_sha256(run_rounds(plan, stations, Journal(tmp_path / e.engine), seed=SEED, execution=e).last)
        for e in (Execution("in-process", 1), Execution("ray", 2))
    }
    assert len(shas) == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One run with comparison, on one site with little and one with much."""
    folder = tmp_path_factory.mktemp("run")
    simulate(Request(plan_of(), folder, 2, seed=SEED), Watcher())
    return folder


class TestRun:
    def test_result_holds_curves_and_confusion(self, folder):
        """
        Areas under curves are means over sites, and the confusion matrix adds up to everybody.
        """
        result = json.loads((folder / "result.json").read_text())
        test, per_site = result["test"], result["test"]["per_site"]
        cells = [f"{a} as {b}" for a in result["labels"] for b in result["labels"]]
        patients = {site: values["patients"] for site, values in per_site.items()}

        assert result["headline"] == "auc"
        assert {"auc", "average_precision", "balanced_accuracy", "f1", "localisation"} <= test.keys()
        assert sum(test[cell] for cell in cells) == pytest.approx(1.0)
        for name in ("auc", cells[0]):
            weighted = sum(per_site[site][name] * n for site, n in patients.items()) / sum(patients.values())
            assert test[name] == pytest.approx(weighted)
        assert {row["method"] for row in result["comparison"]["rows"]} == {
            "federated", "central", "local:site-1", "local:site-2"
        }  # fmt: skip

    def test_report_shows_confusion_and_heatmaps(self, folder):
        """
        Test patients by label and answer, and pictures with what speaks for the answer.
        """
        page = (folder / "report.html").read_text()

        assert 'id="confusion"' in page
        assert "what speaks for lesion" in page
        assert "taken for" in page
        with np.load(folder / "pictures.npz") as arrays:
            heat = [arrays[name] for name in arrays if name.endswith("/heat")]
        assert heat
        assert all(each.min() >= 0 and each.max() <= 1 for each in heat)


def test_with_privacy_only_bounded_metrics_leave(hospitals, tmp_path):
    """
    A private run trains with noise, and of its patients' labels it tells noised accuracy and log-likelihood alone.
    """
    plan = plan_of(
        strategy={"release": "last"},
        privacy=TWO_STEPS,
    )
    stations = stations_of(plan, hospitals, tmp_path / "stations")
    outcome = run_rounds(plan, stations, Journal(tmp_path / "journal"), seed=SEED, execution=Execution())

    assert outcome.test.mean is not None
    assert set(outcome.test.mean) == {"accuracy", "log_likelihood"}
    assert all(set(values) == {"accuracy", "log_likelihood"} for values in outcome.test.per_site.values())
    assert all(cost["epsilon"] > 0 for cost in outcome.cost.values())
