"""A data set in one file becomes sites: everybody somewhere, nobody twice, as skewed as the plan says."""

from __future__ import annotations

import csv
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from shared_models.errors import FederadError
from shared_models.plan import Plan
from simulation.medmnist import deal, site_shares


def plan_of(skew: float | None = None, labels=("normal", "pneumonia")) -> Plan:
    return Plan.from_tables(
        {
            "name": "dealt",
            "rounds": 1,
            "task": {"kind": "classification", "labels": list(labels), "network": "resnet", "channels": [4, 8]},
            "data": {"modality": "DX", "dimensions": 2, "patch": [8, 8]},
            "simulation": {"label_skew": skew} if skew else {},
        }
    )


def write(path, n=60, labels=None, images=None):
    """A file in which every image is of one grey of its own."""
    arrays = {}
    for k, (split, size) in enumerate((("train", n), ("val", n // 3), ("test", n // 2))):
        greys = (100 * k + np.arange(size) % 100).astype(np.uint8)
        arrays[f"{split}_images"] = np.tile(greys[:, None, None], (1, 8, 8)) if images is None else images(size)
        arrays[f"{split}_labels"] = (
            (np.arange(size) % 3 == 0).astype(np.uint8)[:, None] if labels is None else labels(size)
        )
    np.savez(path, **arrays)
    return path


def table(path):
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


class TestDealing:
    def test_every_image_goes_to_one_site_with_its_label_and_split(self, tmp_path):
        """
        Pictures, labels and published splits are those of the file.
        """
        sites = deal(write(tmp_path / "a.npz"), plan_of(1.0), n_sites=3, folder=tmp_path / "sites", seed=0)
        names = Counter()
        for site in sites:
            labels = {row["patient"]: row["label"] for row in table(site / "labels.csv")}
            splits = {row["id"]: row["split"] for row in table(site / "index.csv")}
            for path in (site / "images").iterdir():
                split, number = path.stem.split("-")
                names[path.stem] += 1
                assert splits[path.stem] == split
                assert labels[path.stem] == ("pneumonia" if int(number) % 3 == 0 else "normal")
                first = {"train": 0, "val": 100, "test": 200}[split]
                assert np.unique(np.asarray(Image.open(path))) == [first + int(number)]

        assert len(names) == 60 + 20 + 30
        assert set(names.values()) == {1}

    def test_shares_are_those_of_the_plan(self, tmp_path):
        """
        Equal without a skew, a Dirichlet draw with one, and every label's shares are met to within one image.
        """
        assert (site_shares(plan_of(), 4, 0) == 0.25).all()
        skewed = site_shares(plan_of(0.3), 4, 0)
        assert skewed.sum(axis=1) == pytest.approx([1.0, 1.0])
        assert skewed.std() > site_shares(plan_of(100.0), 4, 0).std()
        assert (site_shares(plan_of(0.3), 4, 1) != skewed).all()

        sites = deal(write(tmp_path / "a.npz"), plan_of(0.3), n_sites=4, folder=tmp_path / "sites", seed=0)
        for k, site in enumerate(sites):
            rows = [row for row in table(site / "labels.csv") if row["patient"].startswith("train")]
            for label, n in (("normal", 40), ("pneumonia", 20)):
                share = skewed[["normal", "pneumonia"].index(label), k]
                assert abs(sum(row["label"] == label for row in rows) - n * share) <= 1

    def test_sites_are_found_again_or_dealt_anew(self, tmp_path):
        """
        What is there is left as it is for the same question, and replaced for another.
        """
        source, folder = write(tmp_path / "a.npz"), tmp_path / "sites"
        (site, _) = deal(source, plan_of(1.0), n_sites=2, folder=folder, seed=0)
        (site / "images" / "mark.txt").touch()
        deal(source, plan_of(1.0), n_sites=2, folder=folder, seed=0)
        assert (site / "images" / "mark.txt").exists()
        deal(source, plan_of(1.0), n_sites=2, folder=folder, seed=1)
        assert not (site / "images" / "mark.txt").exists()

    def test_somebody_elses_files_are_left_alone(self, tmp_path):
        """
        A folder that holds something else is not filled.
        """
        (tmp_path / "sites").mkdir()
        (tmp_path / "sites" / "thesis.txt").touch()
        with pytest.raises(FederadError, match="R231"):
            deal(write(tmp_path / "a.npz"), plan_of(), n_sites=2, folder=tmp_path / "sites", seed=0)
        assert (tmp_path / "sites" / "thesis.txt").exists()


class TestOtherFiles:
    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"images": lambda n: np.zeros((n, 8, 8, 8), np.uint8)}, "shape"),
            ({"images": lambda n: np.zeros((n, 8, 8), np.float32)}, "float32"),
            ({"labels": lambda n: np.zeros((n, 14), np.uint8)}, "labels of shape"),
            ({"labels": lambda n: np.full((n, 1), 2)}, "labels up to 2"),
        ],
    )
    def test_file_of_another_kind_is_refused(self, tmp_path, changed, said):
        """
        Volumes, several labels each, labels without a name in the plan.
        """
        with pytest.raises(FederadError, match=f"(?s)R230.*{said}"):
            deal(write(tmp_path / "a.npz", **changed), plan_of(), n_sites=2, folder=tmp_path / "sites", seed=0)

    def test_damaged_file_is_refused(self, tmp_path):
        """
        As is one that is no archive, or holds something else.
        """
        (tmp_path / "a.npz").write_bytes(b"nothing")
        np.savez(tmp_path / "b.npz", other=np.zeros(3))
        for name in ("a.npz", "b.npz"):
            with pytest.raises(FederadError, match="R230"):
                deal(tmp_path / name, plan_of(), n_sites=2, folder=tmp_path / "sites", seed=0)
