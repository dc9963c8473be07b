"""The page of ``federad-site check`` tells the hospital the truth, and stays there."""

from __future__ import annotations

import re
import shutil
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from client import page
from client.checks import run_check
from client.cli import app
from client.data.catalogue import Catalogue
from client.data.skips import Reason
from client.folder import SiteFolder
from client.readiness import look
from client.site import SiteConfig
from client.station import Station
from shared_models.plan import Plan

PLANS = Path(__file__).parents[2] / "simulation" / "plans"
SECRET = b"a secret of the tests, 32 bytes!"


@pytest.fixture
def site(tmp_path, hospitals):
    """A site that has not enrolled, with the data of an emulated hospital."""
    folder = SiteFolder(tmp_path / "site")
    folder.station.mkdir(parents=True)
    config = SiteConfig(name="st-mary", data=str(hospitals[0].folder), device="cpu", emulated=True)
    Station.create(folder.station, config, secret=SECRET)
    return folder


class TestPage:
    @pytest.fixture
    def text(self, site):
        run_check(site, "station")
        return (site.station / page.FILE).read_text(encoding="utf-8")

    def test_check_says_what_was_found_and_where_the_page_is(self, site):
        """
        Patients, studies, device; the page is for its owner alone.
        """
        device, data, _ = run_check(site, "station")

        assert device.text.startswith("trains on the CPU")
        assert "patients" in data.text
        assert data.error is None
        assert str(site.station / page.FILE) in data.text
        assert stat.S_IMODE((site.station / page.FILE).stat().st_mode) == 0o600

    def test_page_opens_without_a_network(self, text):
        """
        No script, no link, nothing to be fetched: pictures are in it.
        """
        assert not re.search(r"<script|<link|https?://|@import|url\(", text)
        assert text.count("data:image/png;base64,") >= 1
        assert text.count("<svg") >= 1

    def test_page_counts_each_kind_of_file_that_is_left_out(self, tmp_path, site):
        """
        A slice that is there twice is left out and a duplicate; what cannot be read is left out alone.
        """
        source = tmp_path / "images"
        shutil.copytree(site_data(site), source)
        slices = sorted(source.rglob("im-*.dcm"))[:2]
        for one in slices:
            shutil.copy(one, one.with_name(f"again-{one.name}"))
        (source / "torn.dcm").write_bytes(bytes(128) + b"DICM" + bytes(40))
        SiteConfig.load(site.station).model_copy(update={"data": str(source)}).save(site.station)
        run_check(site, "station")
        text = (site.station / page.FILE).read_text(encoding="utf-8")

        def tile(what: str) -> int:
            (number,) = re.findall(rf"<b>(\d+)</b><span>{what}</span>", text)
            return int(number)

        assert tile("duplicates or disputed") == 2
        assert tile("files left out") == 3
        assert tile("image files") == len(list(site_data(site).rglob("im-*.dcm")))

    def test_words_of_the_data_are_words_on_the_page(self, tmp_path, site):
        """
        A series description may hold anything; none of it becomes part of the page's code.
        """
        catalogue = Catalogue.build(tmp_path / "c.sqlite", site_data(site), secret=SECRET)
        found = look("<b>site</b>", catalogue.source, catalogue, SECRET, ("cpu", "because <i>"))

        text = page.html(found)

        assert "<b>site</b>" not in text
        assert "&lt;b&gt;site" in text
        assert "<i>" not in text

    def test_gpu_that_is_not_there_is_an_error(self, site):
        """
        C117 names the key of site.toml, and the data is looked at all the same.
        """
        config = SiteConfig.load(site.station).model_copy(update={"device": "cuda:7"})
        config.save(site.station)

        device, data, _ = run_check(site, "station")

        assert device.error is not None
        assert device.error["error"] == "C117"
        assert data.error is None


def site_data(site):
    return Path(SiteConfig.load(site.station).data)


class TestNumbers:
    def test_histogram_and_percentiles_are_those_of_the_volume(self, tmp_path, site):
        """
        What the page says of a series is what NumPy says of its voxels.
        """
        from client.data import dicom

        catalogue = Catalogue.build(tmp_path / "c.sqlite", site_data(site), secret=SECRET)
        shown = look("s", catalogue.source, catalogue, SECRET, ("cpu", "")).looks[0]
        study = next(s for s in catalogue.studies() if s.key == shown.study)
        places = catalogue.locate(SECRET)
        volume = dicom.read_volumes([places[f.key] for f in study.images[shown.name].files])[0].scan.image[0]

        np.testing.assert_allclose(shown.percentiles, np.percentile(volume, (1, 50, 99)), rtol=0.05, atol=1)
        assert 0.9 * volume.size <= sum(shown.histogram) <= volume.size
        assert shown.shape == volume.shape


class TestLeftOut:
    def test_each_file_is_named_with_its_reason_and_nowhere_else(self, tmp_path, site):
        """
        Loose ones and members of archives; the station keeps no name of them, nor does its page.
        """
        source = tmp_path / "images"
        shutil.copytree(site_data(site), source)
        (source / "Mustermann^Erika.dcm").write_bytes(bytes(128) + b"DICM" + bytes(40))
        with zipfile.ZipFile(source / "disc.zip", "w") as archive:
            archive.writestr("Muster/Max.dcm", bytes(128) + b"DICM" + bytes(50))
        SiteConfig.load(site.station).model_copy(update={"data": str(source)}).save(site.station)
        run_check(site, "station")
        said = CliRunner().invoke(app, ["left-out", "--site", str(site.root)]).output
        lines = [line.split("\t") for line in said.splitlines()]

        assert {file for _, file in lines} >= {"Mustermann^Erika.dcm", "disc.zip/Muster/Max.dcm"}
        assert all(reason in set(Reason) for reason, _ in lines)
        assert len(lines) == len(Station(site.station).catalogue().skipped())
        kept = b"".join(path.read_bytes() for path in site.root.rglob("*") if path.is_file())
        assert b"Muster" not in kept


class TestAgainstAPlan:
    def test_usable_patients_are_counted(self, site, smoke_plan):
        """
        ``check PLAN`` prepares the plan's cohort and says how many patients fit it.
        """
        _, data, _ = run_check(site, "station", str(PLANS / "smoke.toml"))

        assert data.error is None
        assert f"patients fit {smoke_plan.name}" in data.text
        assert f"Against the plan {smoke_plan.name}" in (site.station / page.FILE).read_text(encoding="utf-8")

    def test_look_at_new_images_leaves_an_approved_plan_its_patients(self, tmp_path, site, hospitals, smoke_plan):
        """
        As cron may do it during a run: new patients are found, and the next plan that is approved has them.
        """
        source = tmp_path / "images"
        shutil.copytree(site_data(site), source)
        SiteConfig.load(site.station).model_copy(update={"data": str(source)}).save(site.station)
        Station(site.station).approve(smoke_plan)
        before = people(Station(site.station), smoke_plan)
        n_before = len(Station(site.station).catalogue().studies())
        shutil.copytree(hospitals[1].folder, source / "new")
        run_check(site, "station")

        assert len(Station(site.station).catalogue().studies()) > n_before
        assert people(Station(site.station), smoke_plan) == before
        later = smoke_plan.model_copy(update={"name": "later"})
        Station(site.station).approve(later)
        assert people(Station(site.station), later) > before


def people(station: Station, plan: Plan) -> set[str]:
    cohort = station.cohort(plan)
    return {patient.key for split in ("train", "validation", "test") for patient in cohort.patients(split)}
