"""Bad input through the command line: a numbered error with its page, or a counted skip, and nothing lost."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pydicom
import pytest

from simulation import cli

DOCS = Path(__file__).parents[2] / "docs" / "errors"


@pytest.fixture
def federad_sim(monkeypatch, capsys):
    """Run the command as typed; its exit status, output and error output."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["federad-sim", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def plan_file(smoke_plan, tmp_path):
    """The smoke plan, changed by the test, as a file."""

    def write(**changes: str) -> Path:
        text = (Path(cli.__file__).parent / "plans" / "smoke.toml").read_text()
        for old, new in changes.values():
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "plan.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def site_folders(hospitals, tmp_path):
    """Copies of two emulated hospitals' folders, to be spoilt."""
    data = tmp_path / "data"
    for hospital in hospitals[:2]:
        shutil.copytree(hospital.folder, data / hospital.name)
    return data


def images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.dcm") if path.name != "seg.dcm")


def is_numbered(status: int, err: str, code: str) -> bool:
    """The exit status is the number, the message names it and its page exists; no traceback."""
    lines = err.splitlines()
    shown = any(line.startswith(code) for line in lines) and f"More: docs/errors/{code}.md" in lines
    return status == int(code[1:]) and shown and "Traceback" not in err and (DOCS / f"{code}.md").exists()


class TestNumberedErrors:
    @pytest.mark.parametrize(
        ("arguments", "code"),
        [
            (["--sites", "0"], "R230"),
            (["--sites", "1"], "R230"),
            (["--engine", "magic"], "R230"),
            (["--workers", "0"], "R230"),
            (["--data", "no/such/folder"], "R230"),
        ],
    )
    def test_impossible_request(self, federad_sim, plan_file, tmp_path, arguments, code):
        """
        A request that makes no sense is refused before anything is made.
        """
        status, _, err = federad_sim("run", plan_file(), "--out", tmp_path / "out", *arguments)
        assert is_numbered(status, err, code)

    @pytest.mark.parametrize(
        ("change", "code", "named"),
        [
            (('network = "unet"', 'network = "vnet"'), "P102", "vnet"),
            (("rounds = 2", "rounds = 0"), "P102", "rounds"),
            (("[simulation]", "[secure_sum]\nthreshold = 0.67\n[simulation]"), "P104", "secure_sum"),
            (("[simulation]", '[adaptation]\nmethod = "dann"\n[simulation]'), "P102", "method"),
            (("[simulation]", "[privacy]\nepsilon = 8.0\n[simulation]"), "P103", "batch_size"),
            (("patch = [64, 64]", "patch = [63, 64]"), "P103", "patch"),
            (('name = "smoke"', "name = smoke"), "P101", "line"),
        ],
    )
    def test_wrong_plan(self, federad_sim, plan_file, tmp_path, change, code, named):
        """
        A wrong plan is refused with the key, the value and the remedy.
        """
        status, _, err = federad_sim("run", plan_file(change=change), "--out", tmp_path / "out")
        assert is_numbered(status, err, code)
        assert named in err

    def test_missing_plan(self, federad_sim, tmp_path):
        """
        A plan that is not there is named.
        """
        status, _, err = federad_sim("run", tmp_path / "none.toml", "--out", tmp_path / "out")
        assert is_numbered(status, err, "P100")

    def test_folder_without_images(self, federad_sim, plan_file, tmp_path):
        """
        A site whose folder holds nothing usable is named, with what was found instead.
        """
        for name in ("a", "b"):
            (tmp_path / "data" / name).mkdir(parents=True)
            (tmp_path / "data" / name / "notes.txt").write_text("no images here")
        status, _, err = federad_sim("run", plan_file(), "--data", tmp_path / "data", "--out", tmp_path / "out")
        assert is_numbered(status, err, "C140")

    def test_plan_for_volumes_on_photographs(self, federad_sim, plan_file, tmp_path):
        """
        A plan in three dimensions on two-dimensional images says so.
        """
        from PIL import Image

        for name in ("a", "b"):
            for kind in ("images", "masks"):
                (tmp_path / "data" / name / kind).mkdir(parents=True)
                for i in range(4):
                    Image.new("L", (64, 64), 255 * (i % 2)).save(tmp_path / "data" / name / kind / f"{i}.png")
        plan = plan_file(
            dimensions=("dimensions = 2", "dimensions = 3"),
            patch=("patch = [64, 64]", "patch = [32, 32, 32]"),
            spacing=("spacing_mm = [2.0, 2.0]", "spacing_mm = [2.0, 2.0, 2.0]"),
        )
        status, _, err = federad_sim("run", plan, "--data", tmp_path / "data", "--out", tmp_path / "out")
        assert is_numbered(status, err, "C141")

    def test_result_folder_that_is_a_file(self, federad_sim, plan_file, tmp_path):
        """
        A result folder that cannot be made is named.
        """
        (tmp_path / "out").write_text("")
        status, _, err = federad_sim("run", plan_file(), "--out", tmp_path / "out")
        assert is_numbered(status, err, "R231")

    def test_json_carries_the_error_too(self, federad_sim, tmp_path):
        """
        With --json the same message is JSON on the output.
        """
        status, out, _ = federad_sim("run", tmp_path / "none.toml", "--out", tmp_path / "out", "--json")
        assert status == 100
        assert json.loads(out)["error"] == "P100"

    def test_unknown_command(self, federad_sim):
        """
        A mistyped command is a numbered error too.
        """
        status, _, err = federad_sim("rnu")
        assert is_numbered(status, err, "R230")

    def test_report_without_result(self, federad_sim, tmp_path):
        """
        A report of a folder without result says what folder it needs.
        """
        status, _, err = federad_sim("report", tmp_path)
        assert is_numbered(status, err, "R231")


class TestCountedSkips:
    @pytest.mark.slow
    def test_bad_files_among_good_ones_cost_themselves_alone(
        self, federad_sim, plan_file, site_folders, tmp_path, caplog
    ):
        """
        Zero bytes, a cut file, a text, undecodable pixels, a mask without image, a single slice: the run goes on and
        result.json counts each with its reason.
        """
        site = site_folders / "site-1"
        patients = sorted(path for path in site.iterdir() if path.is_dir())
        (site / "empty.dcm").touch()
        (site / "letter.dcm").write_text("Dear colleague")
        victim = images(patients[0])[0]
        (site / "cut.dcm").write_bytes(victim.read_bytes()[:600])
        spoil_pixels(images(patients[1])[0])
        for image in images(patients[2]):
            image.unlink()
        for study in patients[3].iterdir():
            for image in images(study)[1:]:
                image.unlink()

        status, out, err = federad_sim(
            "run", plan_file(), "--data", site_folders, "--out", tmp_path / "out", "--no-compare", "--json",
            "--workers", "1",
        )  # fmt: skip
        assert status == 0, err
        assert "Traceback" not in err + caplog.text
        result = json.loads(out)
        skipped = result["sites"][0]["skipped"]
        assert sum(skipped.values()) >= 5, skipped
        assert len(skipped) >= 4, skipped
        assert [r["replied"] for r in result["rounds"]] == [["site-1", "site-2"]] * 2

    @pytest.mark.slow
    def test_site_without_validation_patients_takes_part(self, federad_sim, plan_file, site_folders, tmp_path):
        """
        Where nobody is there to validate on, the run goes on and the last weights are released.
        """
        plan = plan_file(split=("patch = [64, 64]", "patch = [64, 64]\nsplit = {train=0.7, validation=0.0, test=0.3}"))
        status, out, err = federad_sim(
            "run", plan, "--data", site_folders, "--out", tmp_path / "out", "--no-compare", "--json", "--workers", "1"
        )
        assert status == 0, err
        result = json.loads(out)
        assert all(site["patients"]["validation"] == 0 for site in result["sites"])
        assert all(record["validation"] is None for record in result["rounds"])
        assert result["released"] == "last"
        assert result["best_round"] == 2
        assert (tmp_path / "out" / "report.html").exists()


def spoil_pixels(path: Path) -> None:
    """A transfer syntax that the pixels do not have: the file reads, its pixels do not."""
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
    dataset.PixelData = pydicom.encaps.encapsulate([b"this is no image"])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path, enforce_file_format=True)
