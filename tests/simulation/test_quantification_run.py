"""What share is lesion, from emulated hospitals to the report, with privacy and without."""

from __future__ import annotations

import csv
import json

import highdicom as hd
import numpy as np
import pytest
from privately import TWO_STEPS

from client.data.labels import interval
from server.journal import Journal
from shared_models.plan import Plan
from simulation.consortium import GRADES, emulate, emulation_sha256, grade
from simulation.engine import Execution, run_rounds
from simulation.run import Request, Watcher, simulate
from simulation.stations import SiteFolder, prepare_stations

SEED = 4


def plan_of(target: str = "proportion", **tables: dict) -> Plan:
    return Plan.from_tables(
        {
            "name": "tiny",
            "rounds": 2,
            "task": {
                "kind": "quantification", "target": target, "labels": ["background", "lesion"], "network": "resnet",
                "channels": [4, 8],
            },
            "data": {
                "modality": "MR", "dimensions": 2, "spacing_mm": [4.0, 4.0], "patch": [56, 48],
                "split": {"train": 0.5, "validation": 0.1, "test": 0.4},
            },
            "simulation": {"patients": 6, "slices": 1, "prevalence": [0.7]},
            **tables,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One run, and its hospitals."""
    folder = tmp_path_factory.mktemp("run")
    simulate(Request(plan_of(), folder, 2, seed=SEED, compare=False), Watcher())
    return folder


def tables_of(hospitals):
    for site in sorted(hospitals.glob("site-*")):
        with (site / "labels.csv").open(newline="") as lines:
            yield site, list(csv.DictReader(lines))


class TestTables:
    def test_readers_write_the_interval_of_what_is_drawn(self, folder):
        """
        A row for each study; where nothing is drawn it is 0, elsewhere the more voxels the higher the grade.
        """
        for site, rows in tables_of(folder / "hospitals"):
            outlines = [hd.seg.segread(path) for path in site.rglob("seg.dcm")]
            drawn = {seg.StudyInstanceUID: int(seg.pixel_array.sum()) for seg in outlines}
            ends = {row["study"]: interval(row["label"]) for row in rows}
            assert drawn.keys() == ends.keys()
            assert {study for study, n in drawn.items() if not n} == {s for s, both in ends.items() if both == (0, 0)}
            for study, (low, high) in ends.items():
                # Of about 56 x 48 voxels of 4 mm roughly a third is brain.
                assert low / 2 < drawn[study] / 900 < 2 * high or drawn[study] == 0

    def test_counts_are_those_of_separate_parts(self, tmp_path):
        """
        One to four lesions were placed, of which some touch or miss the slice.
        """
        plan = plan_of("count", simulation={"patients": 3, "slices": 1})
        emulate(plan, n_sites=1, folder=tmp_path, seed=SEED)
        ((_, rows),) = tables_of(tmp_path)

        assert {row["label"] for row in rows} <= set("01234")
        hashes = {emulation_sha256(one, n_sites=1, seed=SEED) for one in (plan, plan_of(simulation=plan_dump(plan)))}
        assert len(hashes) == 2

    @pytest.mark.parametrize(
        ("share", "said"), [(0.0, "0"), (0.004, "0-0.01"), (0.02, "0.01-0.02"), (0.021, "0.02-0.05"), (1.0, "0.5-1")]
    )
    def test_grade_holds_its_upper_end(self, share, said):
        """
        What is written is read again as the interval that the share lies in.
        """
        assert grade(share) == said
        low, high = interval(said)
        assert low <= share <= high
        assert {low, high} <= set(GRADES)


def plan_dump(plan: Plan) -> dict:
    return {"patients": plan.simulation.patients, "slices": plan.simulation.slices}


class TestRun:
    def test_result_and_report_hold_the_agreement(self, folder):
        """
        ICC, error and bias of each site that has the patients for it, and pictures with both numbers in words.
        """
        result = json.loads((folder / "result.json").read_text())
        page = (folder / "report.html").read_text()

        assert result["headline"] == "icc"
        assert {"ratio", "absolute_error", "bias", "limits"} <= result["test"].keys()
        assert all({"ratio", "absolute_error"} <= values.keys() for values in result["test"]["per_site"].values())
        assert "ICC is the agreement" in page
        assert "taken for" in page
        assert "Numbers beside the reference" in page
        with np.load(folder / "pictures.npz") as arrays:
            assert any(name.endswith("/heat") for name in arrays)

    def test_with_privacy_the_bounded_ratio_alone_leaves(self, folder, tmp_path):
        """
        A private run trains with noise, and of its patients' numbers it tells a noised ratio.
        """
        plan = plan_of(
            strategy={"release": "last"},
            privacy=TWO_STEPS,
        )
        names = [site.name for site, _ in tables_of(folder / "hospitals")]
        sites = [SiteFolder(name, folder / "hospitals" / name, tmp_path / name) for name in names]
        prepare_stations(plan, sites, seed=SEED, workers=1, on_site=lambda _: None)
        stations = [site.station for site in sites]
        outcome = run_rounds(plan, stations, Journal(tmp_path / "journal"), seed=SEED, execution=Execution())

        assert outcome.test.mean is not None
        assert set(outcome.test.mean) == {"ratio"}
        assert all(cost["epsilon"] > 0 for cost in outcome.cost.values())
