"""Experiments on real images of several hospitals: who is left out, who is dealt where, and what is claimed of it."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

from client.data.images import Index
from shared_models.errors import FederadError
from shared_models.plan import Plan
from shared_models.scanners import is_scanner
from simulation.experiments import chest_radiographs, harness, unseen_camera
from simulation.run import Watcher


class TestUnseenCamera:
    def test_arms_differ_in_adaptation_alone(self):
        """
        One plan with and without, whichever camera is left out; where all take part nobody is left out.
        """
        plans = unseen_camera.arms(quick=False)

        assert len(plans) == 13
        for camera in unseen_camera.CAMERAS:
            plain = plans[f"{camera}, plain"]
            assert plain == plans["all take part"]
            for way, table in unseen_camera.TABLES.items():
                plan = plans[f"{camera}, {way}"]
                assert plan.model_copy(update={"adaptation": None}) == plain
                assert bool(plan.adaptation and plan.adaptation.appearance) is ("appearance" in way)
                assert plan.is_adversarial is ("adversary" in way)
                assert (plan.adaptation is None) is (table is None)
                assert unseen_camera.left_out(f"{camera}, {way}") == (camera,)
        assert unseen_camera.left_out("all take part") == ()

    def test_claims_are_means_over_cameras_of_differences_within_seeds(self):
        """
        Elsewhere and at home, seed by seed.
        """
        dice = {
            "plain": ((0.5, 0.6), (0.8, 0.8)),
            "appearance": ((0.55, 0.7), (0.79, 0.81)),
            "adversary": ((0.1, 0.1), (0.1, 0.1)),
            "appearance, adversary": ((0.57, 0.69), (0.1, 0.1)),
        }
        results = {
            f"{camera}, {way}": [
                {"scanners": {"unseen": {camera: {"dice": away}}}, "test": {"dice": home}}
                for away, home in zip(*dice[way], strict=True)
            ]
            for camera in unseen_camera.CAMERAS
            for way in dice
        }
        results["all take part"] = [{"test": {"per_site": {c: {"dice": 0.8} for c in unseen_camera.CAMERAS}}}] * 2
        claims = {one["id"]: one["values"] for one in unseen_camera.evaluate(results)["claims"]}

        assert claims["appearance_gain"] == pytest.approx([0.05, 0.1])
        assert claims["home_cost"] == pytest.approx([0.01, -0.01])
        assert claims["adversary_on_top"] == pytest.approx([0.02, -0.01])

    def test_photographs_are_dealt_with_the_camera_that_took_them(self, tmp_path):
        """
        What is published beside them stays; other collections stay behind.
        """
        source = tmp_path / "retina"
        for site in (*unseen_camera.CAMERAS, "another"):
            (source / site / "images").mkdir(parents=True)
            (source / site / "images" / "7.png").write_bytes(site.encode())
        lines = [f"{site},7,{site}-person,train" for site in (*unseen_camera.CAMERAS, "another")]
        (source / "index.csv").write_text("\n".join(["site,id,subject,split", *lines]))

        folder = unseen_camera.deal(source, tmp_path / "dealt", 0)

        for camera, device in unseen_camera.CAMERAS.items():
            index = Index.of(folder / camera)
            assert (folder / camera / "images" / "7.png").read_bytes() == camera.encode()
            assert index.scanners == {"7": device}
            assert is_scanner(device)
            assert (index.subjects, index.splits) == ({"7": f"{camera}-person"}, {"7": "train"})
        assert not (folder / "another").exists()

    def test_folder_without_a_collection_is_refused(self, tmp_path):
        """
        With what is missing, and what to give.
        """
        with pytest.raises(FederadError, match="drive") as refused:
            unseen_camera.deal(tmp_path, tmp_path / "dealt", 0)
        assert refused.value.code == "R230"


@pytest.fixture
def source(tmp_path):
    """A table as the data set has it, and a picture for each row: two each of the last one's patient."""
    folder = tmp_path / "radiographs"
    rows = [("hannover", f"h{k}", "COVID-19") for k in range(12)]
    rows += [("actualmed", f"a{k}", "COVID-19") for k in range(5)]
    rows += [("actualmed", f"n{k}", "No finding") for k in range(8)]
    rows += [("figure1", f"f{k}", "No finding") for k in range(4)]
    rows += [("figure1", f"p{k}", "Pneumonia") for k in range(2)]
    rows += [rows[0]]
    table = []
    for k, (site, subject, finding) in enumerate(rows):
        path = folder / site / f"{k:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((256, 256), k, np.uint8)).save(path)
        table.append({"site": site, "file": f"{site}/{path.name}", "subject": subject, "finding": finding})
    with (folder / "labels.csv").open("w", newline="") as lines:
        writer = csv.DictWriter(lines, table[0])
        writer.writeheader()
        writer.writerows(table)
    return folder


class TestChestRadiographs:
    def test_source_gives_the_finding_away_in_training_and_nowhere_else(self, source, tmp_path):
        """
        Sick patients of the sites are Hannover's and those in use are not; nobody is in two places, and a patient's
        pictures stay together. Other findings are left aside.
        """
        folder = chest_radiographs.deal(source, tmp_path / "dealt", 3)
        found = {}
        for site in ("site-1", "site-2", "elsewhere"):
            with (folder / site / "index.csv").open(newline="") as lines:
                rows = list(csv.DictReader(lines))
            finding = {path.name: path.parent.name for path in (folder / site).glob("images/*/*.png")}
            assert finding.keys() == {one["file"] for one in rows}
            found[site] = [(one["subject"], finding[one["file"]], one["split"]) for one in rows]

        for site in ("site-1", "site-2"):
            assert {who[0] for who, finding, _ in found[site] if finding == "covid-19"} == {"h"}
            assert {(finding, split) for _, finding, split in found[site]} == {
                (finding, split) for finding in ("covid-19", "no finding") for split in ("train", "test")
            }
        assert {who[0] for who, finding, _ in found["elsewhere"] if finding == "covid-19"} == {"a"}
        assert {split for *_, split in found["elsewhere"]} == {"test"}
        people = [{who for who, *_ in rows} for rows in found.values()]
        assert sum(map(len, people)) == len(set.union(*people)) == 12 + 5 + 12
        assert sum(who == "h0" for rows in found.values() for who, *_ in rows) == 2

    def test_folder_without_the_table_is_refused(self, tmp_path):
        """
        With what is missing, and what to give.
        """
        with pytest.raises(FederadError, match="column finding") as refused:
            chest_radiographs.deal(tmp_path, tmp_path / "dealt", 0)
        assert refused.value.code == "R230"

    def test_claims_are_differences_within_seeds(self):
        """
        What plain training loses in use, and what the balanced loss gives back of it.
        """

        def result(own, in_use):
            return {"scanners": {"seen_mean": {"auc": own}, "unseen_mean": {"auc": in_use}}}

        results = {way: [result(0.9, 0.8), result(0.8, 0.5)] for way in chest_radiographs.WAYS}
        results["balanced"] = [result(0.9, 0.85), result(0.8, 0.45)]
        claims = {one["id"]: one["values"] for one in chest_radiographs.evaluate(results)["claims"]}

        assert claims["shortcut"] == pytest.approx([0.1, 0.3])
        assert claims["balanced_gain"] == pytest.approx([0.05, -0.05])


def test_experiment_deals_its_data_and_tests_where_an_arm_left_out(source, tmp_path):
    """
    Folders that an arm leaves out train nothing there and are measured, those without anybody to train on too.
    """
    labels = ["no finding", "covid-19"]
    plan = Plan.from_tables(
        {
            "name": "tiny",
            "rounds": 1,
            "task": {"kind": "classification", "labels": labels, "network": "resnet", "channels": [4, 8]},
            "data": {"modality": "DX", "dimensions": 2, "patch": [32, 32]},
            "training": {"samples_per_patient": 1},
            "strategy": {"minimum_sites": 1},
        }
    )
    kept = []
    experiment = harness.Experiment(
        name="tiny",
        title="a tiny one",
        seeds=(4,),
        n_sites=3,
        arms=lambda *, quick: {"elsewhere": plan, "elsewhere, site-2": plan},
        evaluate=lambda results: kept.append(results) or {"rows": [], "claims": []},
        data="radiographs",
        deal=chest_radiographs.deal,
        left_out=lambda arm: tuple(arm.split(", ")),
        compares=False,
    )
    harness.run_experiment(
        experiment, tmp_path / "run", quick=False, workers=1, watcher=Watcher(), command="x", data=source
    )
    [(one, two)] = zip(*kept[0].values(), strict=True)

    assert set(one["scanners"]["unseen"]) == {"elsewhere"}
    assert [site["name"] for site in one["sites"]] == ["site-1", "site-2"]
    assert set(two["scanners"]["unseen"]) == {"elsewhere", "site-2"}
    assert [site["name"] for site in two["sites"]] == ["site-1"]
