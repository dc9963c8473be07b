"""Reconstruction from folders of k-space to the report: the same in every engine, with privacy and without."""

from __future__ import annotations

import json

import numpy as np
import pytest
from privately import TWO_STEPS

from server.journal import Journal
from shared_models.mri import smooth_phase
from shared_models.plan import Plan
from shared_models.weights import weights_sha256
from simulation.engine import Execution, run_rounds
from simulation.run import Request, Watcher, simulate
from simulation.stations import SiteFolder, prepare_stations

SITES = ("east", "west")
SEED = 0


def plan_of(**tables: dict) -> Plan:
    return Plan.from_tables(
        {
            "name": "tiny",
            "rounds": 2,
            "task": {
                "kind": "reconstruction", "network": "cascade", "channels": [4, 4], "cascades": 2,
                "centre_fraction": 0.1, "site_acceleration": [["west", 6.0]],
            },
            "data": {
                "modality": "MR", "dimensions": 2, "patch": [32, 16],
                "split": {"train": 0.5, "validation": 0.1, "test": 0.4},
            },
            **tables,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two sites with eight slices each, and a folder that takes no part."""
    folder = tmp_path_factory.mktemp("kspace")
    y, x = np.meshgrid(*[np.linspace(-1, 1, 32)] * 2, indexing="ij")
    for site in (*SITES, "nobody"):
        rng = np.random.default_rng(len(site))
        (folder / site).mkdir()
        for i in range(8):
            boxes = sum(
                rng.uniform(0.2, 1)
                * ((abs(y - rng.uniform(-0.5, 0.5)) < 0.3) & (abs(x - rng.uniform(-0.5, 0.5)) < 0.3))
                for _ in range(4)
            )
            image = boxes * np.exp(1j * smooth_phase((32, 32), rng)) * 1000
            np.savez(folder / site / f"{i}.npz", re=image.real.astype(np.int16), im=image.imag.astype(np.int16))
    return folder


def stations_of(plan, data, folder):
    sites = [SiteFolder(name, data / name, folder / name) for name in SITES]
    prepare_stations(plan, sites, seed=SEED, workers=1, on_site=lambda _: None)
    return [site.station for site in sites]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_alone")
def test_final_weights_agree_bit_for_bit(data, tmp_path):
    """
    In this process and on Flower's Ray engine.
    """
    plan = plan_of()
    stations = stations_of(plan, data, tmp_path / "stations")
    shas = {
        weights_sha256(run_rounds(plan, stations, Journal(tmp_path / e.engine), seed=SEED, execution=e).last)
        for e in (Execution("in-process", 1), Execution("ray", 2))
    }
    assert len(shas) == 1


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """One run with comparison and report."""
    folder = tmp_path_factory.mktemp("run")
    simulate(Request(plan_of(), folder, data=data, sites=SITES, seed=SEED), Watcher())
    return folder


class TestRun:
    def test_result_sets_the_network_beside_methods_that_learn_nothing(self, folder):
        """
        PSNR and gain of each site that was named, and the zero-filled image and wavelets on the same patients.
        """
        result = json.loads((folder / "result.json").read_text())
        classical = result["classical"]

        assert [site["name"] for site in result["sites"]] == list(SITES)
        assert result["headline"] == "psnr"
        assert {"psnr", "gain_db", "ssim", "nmse", "zero_filled_psnr"} <= result["test"].keys()
        assert [row["method"] for row in classical] == ["zero-filled", "wavelet compressed sensing"]
        for site, values in result["test"]["per_site"].items():
            assert classical[0]["per_site"][site] == pytest.approx(values["zero_filled_psnr"])
            assert values["gain_db"] == pytest.approx(values["psnr"] - values["zero_filled_psnr"])

    def test_site_that_measures_less_starts_from_less(self, folder):
        """
        A sixth of the samples against a quarter.
        """
        per_site = json.loads((folder / "result.json").read_text())["test"]["per_site"]

        assert per_site["west"]["zero_filled_psnr"] < per_site["east"]["zero_filled_psnr"]

    def test_stability_is_looked_at(self, folder):
        """
        The worst small change that a search finds, an inserted disc, and other accelerations, for each site.
        """
        cards = json.loads((folder / "result.json").read_text())["stability"]

        assert set(cards) == set(SITES)
        for card in cards.values():
            assert card["amplification"] > 0.9
            assert 0 < card["structure_zero_filled"] <= 1
            assert card["psnr at 3x"] > card["psnr at 8x"]
        assert 'id="stability"' in (folder / "report.html").read_text()

    def test_report_shows_four_images_of_a_patient(self, folder):
        """
        Reference, zero-filled, reconstruction and error side by side, without outlines.
        """
        page = (folder / "report.html").read_text()

        assert "from the left: reference, zero-filled, reconstruction, error, 5 times as bright" in page
        assert "Wavelet compressed sensing" in page
        assert 'id="outline-' not in page
        with np.load(folder / "pictures.npz") as arrays:
            assert arrays["0/image"].shape == (32, 128)


def test_with_privacy_metrics_leave_with_noise(data, tmp_path):
    """
    A private run trains a cascade with noise, and every metric that leaves has a public range.
    """
    plan = plan_of(
        strategy={"release": "last"},
        privacy=TWO_STEPS,
    )
    stations = stations_of(plan, data, tmp_path / "stations")
    outcome = run_rounds(plan, stations, Journal(tmp_path / "journal"), seed=SEED, execution=Execution())

    assert outcome.test.mean is not None
    assert {"psnr", "ssim", "nmse", "gain_db"} <= set(outcome.test.mean)
    assert all(cost["epsilon"] > 0 for cost in outcome.cost.values())
