"""The report shows what a result holds, names what it lacks, and needs nothing but itself."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared_models.detection import RATES, found_at
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
                "per_site": {s: {"dice": dice[s], "hd95_mm": 20 / i + 4.1} for s in SITES if s not in away},
            }
        )
    return {
        "plan": "demo",
        "plan_sha256": "9f2c" * 16,
        "task": "segmentation",
        "engine": "in-process",
        "workers": 2,
        "seed": 0,
        "started": "2026-03-02T09:14:07+00:00",
        "seconds": 96.4,
        "status": "finished",
        "headline": "dice",
        "metrics": {"dice": True, "hd95_mm": False},
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
        "best_round": max(rounds, key=lambda one: one["validation"]["dice"])["round"] if rounds else None,
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
        "privacy": None,
        "weights_sha256": "07be" * 16,
        "released_sha256": "51ac" * 16,
        "versions": {"federad": "0.1.0", "torch": "2.13.0", "flwr": "1.41.0"},
        "command": "federad-sim run simulation/plans/demo.toml --sites 4 --out runs/demo",
    }


def a_private_result() -> dict:
    """The same of a plan with ``[privacy]`` that pays for test figures."""
    result = a_result()
    cost = {"epsilon": 1.9703, "delta": 1e-5}

    def noised(value: float, half: float) -> dict:
        return {"value": value, "interval": [value - half, value + half], "cost": cost}

    result["test"] = {
        "dice": noised(0.8283, 0.08),
        "hd95_mm": noised(5.6821, 3.0),
        "per_site": {
            site: {"dice": noised(v["dice"], 0.1), "hd95_mm": noised(v["hd95_mm"], 4.0), "declared_size": 200}
            for site, v in result["test"]["per_site"].items()
        },
    }
    spent = {"unit": "patient", "epsilon": 7.93, "delta": 1e-5, "declared_size": 200}
    return result | {"privacy": dict.fromkeys(SITES, spent), "scanners_sha256": "ab12" * 16, "released": "last"}


def a_result_by_scanner() -> dict:
    """The same of a plan about scanners."""
    unseen = {"unseen-1": {"scanner": "Hitachi Koharu 0.4 T", "dice": 0.4321}}
    seen = {"SIEMENS Aldera 3 T": {"dice": 0.8772}, "GE Vesper 1.5 T": {"dice": 0.7914}}
    return a_result() | {
        "scanners": {
            "seen": seen,
            "unseen": unseen,
            "leakage": {"accuracy": 0.912, "chance": 0.25},
            "kept": {"accuracy": 0.834, "chance": 0.5},
        }
    }


def an_unfinished_result(n_rounds: int, **ending: str) -> dict:
    """What a run writes that broke off after some rounds."""
    result = {**a_result(n_rounds), "test": None, "comparison": None, **ending}
    return {k: v for k, v in result.items() if k not in ("best_round", "released", "released_sha256")}


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
    return {**arrays, "meta": np.array([json.dumps(one) for one in meta])}


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
        "title": "Together or each alone",
        "plans": {"": "9f2c" * 16},
        "quick": False,
        "seeds": [0, 1, 2],
        "rows": rows,
        "claims": [
            {
                "claim": "The shared model beats own models at home",
                "value": 0.0831,
                "values": [0.0831],
                "expected": 0.03,
                "holds": True,
                "id": "F1",
            },
            {
                "claim": "The shared model is close to central",
                "value": -0.0124,
                "values": [-0.0124],
                "expected": -0.01,
                "holds": False,
                "id": "F2",
            },
        ],
        "command": "federad-sim experiment federated-against-local --out runs/fal",
        "seconds": 5231.0,
    }


HOSTILE = "<script>alert('$x_1$')</script>"


class Page(HTMLParser):
    """A page as its reader meets it: tags with attributes, text, and the table of sites."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str | None, list[list[str]]] = {}
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self._rows: list[list[str]] = []
        self._is_style = False
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._is_style = tag == "style"
        if tag == "table":
            self._rows = self.tables.setdefault(dict(attributes).get("id"), [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th") and self._rows:
            self._rows[-1].append("")

    def handle_endtag(self, tag):
        self._is_style = False
        if tag == "table":
            self._rows = []

    def handle_data(self, data):
        if not self._is_style:
            self.words.append(data)
        if self._rows and self._rows[-1]:
            self._rows[-1][-1] += data.strip()

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def table(self, name: str) -> list[dict[str, str]]:
        heading, *rows = self.tables[name]
        return [dict(zip(heading, row, strict=True)) for row in rows]


def keep(folder: Path, result: dict, pictures: dict[str, np.ndarray] | None = None) -> Path:
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    if pictures is not None:
        np.savez_compressed(folder / "pictures.npz", **pictures)
    return folder


def a_page(folder: Path, result: dict, pictures: dict[str, np.ndarray] | None = None) -> Page:
    return Page(write_report(keep(folder, result, pictures)))


def close_tags_match(source: str) -> bool:
    """Every element that is opened is closed, in order."""
    void, opened = {"meta", "br", "image", "use", "path", "rect", "circle"}, []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag not in void:
                opened.append(tag)

        def handle_startendtag(self, tag, attributes):
            pass

        def handle_endtag(self, tag):
            if tag not in void:
                assert opened.pop() == tag

    Checker().feed(source)
    return not opened


class TestRunReport:
    def test_page_refers_to_nothing_outside_itself(self, tmp_path):
        """
        A report is opened on machines without a network, years later: all it needs is in it.
        """
        page = a_page(tmp_path, a_result(), some_pictures())

        for tag, attributes in page.tags:
            assert tag not in {"script", "link", "iframe", "object", "embed", "base"}
            for name in ("src", "href", "xlink:href", "action", "srcset", "poster"):
                assert re.match(r"data:image/(png|jpeg);base64,|#", attributes.get(name) or "#")
            assert not [name for name in attributes if name.startswith("on")]
        assert re.findall(r"url\((?!#)|@import|file:", page.source) == []
        addresses = set(re.findall(r"https?://[^\s\"'<>]*", page.source))
        assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names of SVG's vocabulary

    def test_summary_says_the_run_in_one_sentence(self, tmp_path):
        """
        The first thing one reads is what happened and what it was worth.
        """
        assert (
            "4 hospitals trained together for 12 rounds; the shared model reaches a test Dice of 0.83; "
            "the hospitals' own models reach 0.74 at home and 0.53 elsewhere."
        ) in a_page(tmp_path, a_result()).text

    def test_table_of_sites_shows_the_result_to_three_digits(self, tmp_path):
        """
        Every figure in the table is the one in result.json, and every difference is computed from those.
        """
        result = a_result()
        methods = {row["method"]: row for row in result["comparison"]["rows"]}

        *rows, total = a_page(tmp_path, result).table("sites")

        assert [row["Site"] for row in rows] == list(SITES)
        for row, site in zip(rows, result["sites"], strict=True):
            name, test = site["name"], result["test"]["per_site"][site["name"]]
            own, central = methods[f"local:{name}"]["per_site"][name], methods["central"]["per_site"][name]
            assert row["Scanner"] == site["scanner"]
            assert row["Patients:train / val. / test"] == " / ".join(str(n) for n in site["patients"].values())
            shown = {key: float(text.replace("−", "-")) for key, text in row.items() if key[:4] in SHOWN}
            assert shown == {
                "Test Dice": pytest.approx(test["dice"], abs=5.1e-4),
                "Test HD95 (mm)": pytest.approx(test["hd95_mm"], abs=5.1e-3),
                "Own model": pytest.approx(own, abs=5.1e-4),
                "Central model": pytest.approx(central, abs=5.1e-4),
                "Gain over own": pytest.approx(test["dice"] - own, abs=5.1e-4),
                "Gap to central": pytest.approx(test["dice"] - central, abs=5.1e-4),
            }
        assert (total["Test Dice"], total["Own model"], total["Central model"]) == ("0.828", "0.744", "0.837")

    def test_every_round_says_who_replied(self, tmp_path):
        """
        A missing and a refused reply are named with the round and the reason.
        """
        page = a_page(tmp_path, a_result())
        rows = page.table("rounds")

        assert len(rows) == 12
        assert (rows[3]["Replied"], rows[3]["Missing"]) == ("3 of 4", "site-3")
        assert rows[5]["Refused"] == "site-4: update norm 1204.5 is above 1000"
        assert "2 replies did not arrive in time (site-2 and site-3); 1 reply was refused (site-4)." in page.text

    def test_hostile_name_stays_text(self, tmp_path):
        """
        Names come from other hospitals; none of them becomes part of the page's code.
        """
        result = json.loads(json.dumps(a_result()).replace("site-2", HOSTILE))
        result.update(plan=HOSTILE, message=f'"{HOSTILE}', command=HOSTILE, engine=HOSTILE)
        result["sites"][0].update(scanner=HOSTILE, skipped={HOSTILE: 1})
        result["rounds"][2]["refused"] = [{"site": HOSTILE, "reason": HOSTILE}]
        pictures = some_pictures()
        pictures["meta"] = np.array([str(one).replace("site-2", HOSTILE) for one in pictures["meta"]])

        pages = [a_page(tmp_path, {**result, "status": status}, pictures) for status in ("failed", "finished")]

        for page in pages:
            assert "script" not in {tag for tag, _ in page.tags}
            assert page.text.count(HOSTILE) > 10
            assert close_tags_match(page.source)

    def test_shared_model_is_set_beside_own_and_central_ones(self, tmp_path):
        """
        The matrix holds what each hospital's own model reaches on everybody's patients.
        """
        rows = next(rows for rows in a_page(tmp_path, a_result()).tables.values() if rows[0][1:] == list(SITES))

        assert rows[2] == ["model of site-2", "0.47", "0.75", "0.51", "0.66"]
        assert rows[-1] == ["shared model", "0.86", "0.82", "0.84", "0.79"]

    def test_scanners_stand_apart_and_unseen_ones_are_called_so(self, tmp_path):
        """
        A plan about scanners has a line for each, and says how far its features betray them; others have no such table.
        """
        page = a_page(tmp_path, a_result_by_scanner())

        assert all(
            text in page.text
            for text in (
                "SIEMENS Aldera 3 T",
                "0.877",
                "Hitachi Koharu 0.4 T",
                "never",
                "0.432",
                "0.912",
                "0.834",
                "Worst scanner",
            )
        )
        assert "Scanner by scanner" not in a_page(tmp_path, a_result()).text

    def test_plain_words_say_what_left_and_that_nothing_is_proven(self, tmp_path):
        """
        Without [privacy] the page says so, and does not suggest a guarantee.
        """
        text = a_page(tmp_path, a_result()).text

        assert "Model updates: 45 times" in text
        assert "No formal guarantee." in text

    def test_budget_is_shown_where_there_is_one(self, tmp_path):
        """
        With [privacy] the page gives each site's declared size, epsilon of one patient and delta instead.
        """
        result = a_result()
        result["privacy"] = {
            site: {"unit": "patient", "epsilon": 7.93, "delta": 1e-5, "declared_size": 200} for site in SITES
        }

        text = a_page(tmp_path, result).text

        assert "epsilon of one patient delta" in text
        assert "200 7.93 1.0e-05" in text
        assert "No formal guarantee" not in text

    def test_noised_figures_stand_with_their_interval_and_their_price(self, tmp_path):
        """
        In the tile, at each site, and in the list of what left; without them the page says that the plan pays for none.
        """
        result = a_private_result()

        page = a_page(tmp_path, result)

        assert "noise: 0.748 to 0.908" in page.text
        assert any("noise: 0.761 to 0.961" in cell for row in page.table("sites") for cell in row.values())
        assert "for an epsilon of 1.97" in page.text
        assert "never left a station" not in page.text

        result |= {"test": None, "comparison": None, "scanners_sha256": None}
        text = a_page(tmp_path, result).text
        assert "the plan pays for none" in text
        assert "that is for emulated patients only" in text
        assert "never left a station" in text

    def test_private_comparison_says_what_each_model_is(self, tmp_path):
        """
        Own models at the same epsilon, the central one without privacy, all measured exactly on emulated patients.
        """
        page = a_page(tmp_path, a_private_result())

        assert "Shared model, exactly" in page.table("sites")[0]
        assert "trained alone with the same noise, rate and number of steps, so at the same epsilon" in page.text
        assert "without noise and so without any privacy" in page.text
        assert "exactly, which is for emulated patients only" in page.text

    def test_image_level_noise_is_shown_with_what_it_is_for_a_patient(self, tmp_path):
        """
        Both epsilons stand side by side, and that images are not patients.
        """
        result = a_result()
        spent = {"unit": "patient", "epsilon": 164.0, "image_epsilon": 8.0, "delta": 1e-5, "declared_size": 800}
        result["privacy"] = dict.fromkeys(SITES, spent)

        text = a_page(tmp_path, result).text

        assert "800 164 8.00 1.0e-05" in text
        assert "does not protect patients" in text

    def test_confusion_is_counted_in_patients(self, tmp_path):
        """
        Shares of all test patients become numbers of them; a metric that no site has is not shown.
        """
        result = a_result()
        shares = {"well as well": 0.5, "well as ill": 0.125, "ill as well": 0.125, "ill as ill": 0.25}
        result["labels"], result["metrics"] = ["well", "ill"], {"dice": True, "auc": True}
        result["test"] |= shares
        page = a_page(tmp_path, result)
        n = sum(site["patients"] for site in result["test"]["per_site"].values())
        rounded = [f"{shares[f'{a} as {b}'] * n:.0f}" for a in ("well", "ill") for b in ("well", "ill")]

        assert page.tables["confusion"] == [
            ["has \\ got", "well", "ill"],
            ["well", *rounded[:2]],
            ["ill", *rounded[2:]],
        ]
        assert "Test AUC" not in page.table("sites")[0]
        assert "test AUC" not in page.text
        assert "confusion" not in a_page(tmp_path, a_result()).tables

    def test_volumes_stand_beside_the_reference(self, tmp_path):
        """
        Bias with its sign, limits, error and correlation of each label at each site that has them, in millilitres.
        """
        result = a_result()
        result["labels"] = ["background", "lesion"]
        agreed = {"bias": -1.25, "limits": 3.5, "error": 1.5, "ICC": 0.91}
        result["test"]["per_site"]["site-2"] |= {f"volume {kind}: lesion": value for kind, value in agreed.items()}
        page = a_page(tmp_path, result)

        assert page.tables["volumes"][1:] == [["lesion", "site-2", "−1.25", "± 3.50", "1.50", "0.910"]]
        assert "volumes" not in a_page(tmp_path, a_result()).tables

    def test_heat_lies_over_the_picture(self, tmp_path):
        """
        Hot pixels are coloured, the others stay grey, and labels stand in words below.
        """
        pictures = some_pictures()
        heat = np.zeros(pictures["0/image"].shape, np.float32)
        heat[10:20, 10:20] = 1.0
        about = json.loads(str(pictures["meta"][0])) | {
            "shown": "probability",
            "probability": 0.87,
            "caption": "x or y",
        }
        only = {k: pictures[k] for k in ("0/image", "0/truth", "0/prediction")} | {"0/heat": heat}
        page = a_page(tmp_path, a_result(), {**only, "meta": np.array([json.dumps(about)])})
        (source,) = [attributes["href"] for tag, attributes in page.tags if tag == "image"]
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(str(source).split(",")[1])))).astype(int)
        is_coloured = np.ptp(shown, axis=2) > 8

        assert is_coloured[10:20, 10:20].all()
        assert not is_coloured[20:].any()
        assert "x or y" in page.text
        assert "0.870" in page.text

    def test_curve_of_what_is_found_is_drawn_where_there_is_one(self, tmp_path):
        """
        Lesions found over false places; tasks that find nothing in places have no such curve.
        """
        result = a_result()
        assert "Lesions found" not in a_page(tmp_path, result).text
        curve = {found_at(rate): 0.1 * k for k, rate in enumerate(RATES)}
        result["test"] |= curve
        for figures in result["test"]["per_site"].values():
            figures.update(curve)
        page = a_page(tmp_path, result)

        assert "Lesions found, against places that are none" in page.text
        assert "share of lesions found over false places a study" in (tmp_path / "report.html").read_text()

    def test_map_of_doubt_lies_below_its_picture_and_is_explained(self, tmp_path):
        """
        Undecided pixels are coloured, certain ones stay grey, in the same window as the picture above.
        """
        pictures = some_pictures()
        doubt = np.zeros(pictures["0/image"].shape, np.float32)
        doubt[10:20, 10:20] = 1.0
        about = json.loads(str(pictures["meta"][0])) | {"doubts": ["uncertainty"]}
        only = {k: pictures[k] for k in ("0/image", "0/truth", "0/prediction")} | {"0/doubt uncertainty": doubt}
        page = a_page(tmp_path, a_result(), {**only, "meta": np.array([json.dumps(about)])})
        above, below = [attributes["href"] for tag, attributes in page.tags if tag == "image"]
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(str(below).split(",")[1])))).astype(int)
        is_coloured = np.ptp(shown, axis=2) > 8

        assert above != below
        assert is_coloured[10:20, 10:20].all()
        assert not is_coloured[20:].any()
        assert "where the shared model is undecided" in page.text

    @pytest.mark.parametrize(
        ("lacking", "empty", "said"),
        [
            ("test", None, "No test figures"),
            ("comparison", None, "No comparison was made"),
            ("rounds", [], "No round was completed"),
        ],
    )
    def test_what_a_run_did_not_come_to_is_named(self, tmp_path, lacking, empty, said):
        """
        A result without one of its parts still makes a page, and the page says what is not there.
        """
        assert said in a_page(tmp_path, {**a_result(), lacking: empty}).text

    def test_run_that_broke_off_at_once_makes_a_page(self, tmp_path):
        """
        A run that stopped before its first round leaves a page that says just that.
        """
        result = an_unfinished_result(0, status="stopped", message="Stopped by the user.")

        page = a_page(tmp_path, {**result, "weights_sha256": None}, some_pictures())

        assert "Stopped by the user." in page.text
        assert "4 hospitals took part, and no round was completed." in page.text
        assert "Pictures are made when a run finishes." in page.text  # those that lie there are another run's

    def test_paused_run_shows_how_far_it_came(self, tmp_path):
        """
        A pause is not an ending: the page shows the rounds so far and the reason.
        """
        result = an_unfinished_result(5, status="paused", message="S180: 2 sites replied.")

        text = a_page(tmp_path, result).text

        assert "the run paused after 5 rounds; the shared model was not measured on test patients." in text
        assert "The completed rounds are kept" in text
        assert "S180: 2 sites replied." in text

    def test_run_that_failed_says_so(self, tmp_path):
        """
        An error of our own ends a run with rounds and a page.
        """
        result = an_unfinished_result(3, status="failed", message="An unexpected ValueError.")

        assert "Failed. The completed rounds are kept" in a_page(tmp_path, result).text

    def test_site_without_test_patients_has_dashes(self, tmp_path):
        """
        What was not measured is shown as nothing, never as 0.
        """
        result = a_result()
        result["rounds"][0].update(training_loss=None, validation=None)
        del result["test"]["per_site"]["site-3"]
        for row in result["comparison"]["rows"]:
            del row["per_site"]["site-3"]

        page = a_page(tmp_path, result)

        site = page.table("sites")[2]
        assert {site[column] for column in site if column[:4] in SHOWN} == {"–"}
        assert page.table("rounds")[0]["Dice"] == page.table("rounds")[0]["Training loss"] == "–"

    def test_site_that_could_not_train_has_no_own_model(self, tmp_path):
        """
        A hospital without training patients still takes part in the comparison.
        """
        result = a_result()
        result["comparison"]["rows"] = [r for r in result["comparison"]["rows"] if r["method"] != "local:site-3"]

        row = a_page(tmp_path, result).table("sites")[2]

        assert (row["Own model"], row["Gain over own"], row["Central model"]) == ("–", "–", "0.838")

    def test_single_site_makes_a_page(self, tmp_path):
        """
        One hospital has nobody to be compared with elsewhere, and no row for all sites.
        """
        result = a_result()
        result["sites"] = result["sites"][:1]
        result["comparison"].update(
            rows=[
                {"method": method, "per_site": {"site-1": 0.86}, "mean": 0.86}
                for method in ("federated", "central", "local:site-1")
            ],
            local_elsewhere=None,
        )

        page = a_page(tmp_path, result)

        assert len(page.table("sites")) == 1
        assert "1 hospital trained for 12 rounds; the shared model reaches a test Dice of 0.86." in page.text

    def test_hundred_sites_fit_on_one_page(self, tmp_path):
        """
        Many sites make a long page, never a failing or a huge one.
        """
        names = [f"site-{i}" for i in range(100)]
        result = a_result()
        result["sites"] = [{**result["sites"][0], "name": name} for name in names]
        for one in result["rounds"]:
            one.update(replied=names, missing=[], refused=[], per_site={name: {"dice": 0.5} for name in names})

        assert len(a_page(tmp_path, result).source) < 1_000_000

    def test_page_is_the_same_when_written_again(self, tmp_path):
        """
        The page depends on the result alone, so two reports can be compared.
        """
        keep(tmp_path, a_result(), some_pictures())

        assert write_report(tmp_path).read_bytes() == write_report(tmp_path).read_bytes()


SHOWN = {"Test", "Own ", "Cent", "Gain", "Gap "}


class TestDirection:
    def test_task_says_what_is_better(self, tmp_path):
        """
        A metric's direction comes from the result, and a gain below zero is marked as poor.
        """
        result = a_result()
        result["metrics"]["hd95_mm"] = True

        page = a_page(tmp_path, result)

        assert "test HD95 (mm) higher is better" in page.text
        assert page.source.count('<i class="poor"') == 3 + 1  # gaps to central, all sites


class TestPictures:
    def test_every_picture_has_both_outlines(self, tmp_path):
        """
        Reference and model are drawn over each of the pictured patients, which are named only by rank.
        """
        page = a_page(tmp_path, a_result(), some_pictures())

        drawn = [attributes.get("class") for tag, attributes in page.tags if tag == "use"]
        assert drawn.count("truth") == drawn.count("prediction") == 12
        assert page.text.count("worst") == 4 + 1  # the legend says it too

    def test_photograph_keeps_its_colours_and_shape(self, tmp_path):
        """
        A colour photograph is reduced, not distorted.
        """
        rng = np.random.default_rng(0)
        disc = (np.hypot(*np.mgrid[-600:600, -800:800]) < 200).astype(np.uint8)
        about = [{"site": "site-1", "scanner": "camera", "which": "best", "dice": 1.0, "pixel_mm": [1.0, 1.0]}]
        pictures = {"0/image": rng.random((1200, 1600, 3), dtype=np.float32), "0/truth": disc, "0/prediction": disc}

        page = a_page(tmp_path, a_result(), {**pictures, "meta": np.array([json.dumps(one) for one in about])})

        image = next(attributes for tag, attributes in page.tags if tag == "image")
        assert (image["width"], image["height"]) == ("400", "300.0")

    def test_thick_slices_are_drawn_at_their_true_shape(self, tmp_path):
        """
        A pixel three times as tall as wide is shown so.
        """
        blank = np.zeros((20, 60), dtype=np.uint8)
        about = [{"site": "site-1", "scanner": "GE", "which": "best", "dice": 0.0, "pixel_mm": [3.0, 1.0]}]
        pictures = {"0/image": np.eye(20, 60, dtype=np.float32), "0/truth": blank, "0/prediction": blank}

        page = a_page(tmp_path, a_result(), {**pictures, "meta": np.array([json.dumps(one) for one in about])})

        image = next(attributes for tag, attributes in page.tags if tag == "image")
        assert (image["width"], image["height"]) == ("60", "60.0")

    def test_spoilt_pictures_are_left_out_and_the_page_says_so(self, tmp_path):
        """
        Half a file of pictures costs the pictures, not the report.
        """
        keep(tmp_path, a_result(), some_pictures())
        whole = (tmp_path / "pictures.npz").read_bytes()
        (tmp_path / "pictures.npz").write_bytes(whole[: len(whole) // 2])

        assert "no pictures.npz that can be read" in Page(write_report(tmp_path)).text


@pytest.mark.parametrize("write", [write_report, write_experiment_report])
class TestUnusableFolder:
    def test_missing_result_is_r231(self, tmp_path, write):
        """
        A folder without result.json is answered with the number and the way out.
        """
        with pytest.raises(FederadError) as caught:
            write(tmp_path / "nowhere")

        assert caught.value.code == "R231"
        assert "no result.json" in caught.value.happened

    @pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"rounds": 3, "experiment": 4}', "\ufffe"])
    def test_unreadable_result_is_r231(self, tmp_path, write, text):
        """
        A half-written or foreign file is refused rather than shown in part.
        """
        (tmp_path / "result.json").write_bytes(text.encode("utf-16" if text == "\ufffe" else "utf-8"))

        with pytest.raises(FederadError) as caught:
            write(tmp_path)

        assert caught.value.code == "R231"
        assert not (tmp_path / "report.html").exists()


class TestExperimentReport:
    def test_every_claim_stands_with_its_expectation(self, tmp_path):
        """
        A claim that failed is as visible as one that held.
        """
        page = Page(write_experiment_report(keep(tmp_path, an_experiment())))

        held, failed = page.table("claims")
        assert (held["Id"], held["Measured"], held["Expected"], held["Held"]) == (
            "F1",
            "0.083",
            "at least 0.030",
            "✓ yes",
        )
        assert (failed["Measured"], failed["Held"]) == ("−0.012", "✕ no")
        assert "1 of 2 claims held, over 3 seeds" in page.text
        assert "federad-sim experiment federated-against-local --out runs/fal" in page.text

    def test_methods_stand_beside_the_first_one_seed_by_seed(self, tmp_path):
        """
        What a method has more than the first on the same split, with an interval; the first has nothing to be set beside.
        """
        experiment = an_experiment()
        experiment["rows"][1]["values"] = [0.821, 0.848, 0.853]  # 0.010, 0.020 and 0.020 more than the first
        page = Page(write_experiment_report(keep(tmp_path, experiment)))

        (rows,) = (rows for rows in page.tables.values() if rows[0][-1] == "Less the first")
        cells = {(row[0], row[1]): row[-1] for row in rows[1:]}
        assert cells["federated", "seen scanners"] == ""
        assert cells["central", "seen scanners"] == "+0.017+0.002 to +0.031"
        assert cells["central", "a scanner never seen"] == "+0.012+0.012 to +0.012"

    def test_runs_in_the_same_folder_are_pictured_and_linked(self, tmp_path):
        """
        The median patient of each site for each way of training, and a link to each run's own report.
        """
        experiment = {**an_experiment(), "plans": {"plain": "9f2c" * 16, "other": "9f2c" * 16}}
        for arm in experiment["plans"]:
            of_arm = tmp_path / "seed-0" / arm
            of_arm.mkdir(parents=True)
            np.savez_compressed(of_arm / "pictures.npz", **some_pictures())
            (of_arm / "report.html").write_text("<p>a run</p>")
        page = Page(write_experiment_report(keep(tmp_path, experiment)))

        links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
        assert [link for link in links if str(link).startswith("seed-")] == [
            "seed-0/plain/report.html",
            "seed-0/other/report.html",
        ]
        n_sites = len({json.loads(str(text))["site"] for text in some_pictures()["meta"]})
        assert len([tag for tag, _ in page.tags if tag == "image"]) == 2 * n_sites

    def test_every_seed_of_a_claim_is_shown(self, tmp_path):
        """
        A mean over seeds does not hide what single seeds gave.
        """
        experiment = an_experiment()
        experiment["claims"][0]["values"] = [0.0742, 0.0831, 0.092]

        held, _ = Page(write_experiment_report(keep(tmp_path, experiment))).table("claims")

        assert held["Measured"] == "0.0830.074, 0.083, 0.092"

    def test_claim_stands_with_its_interval_and_its_side(self, tmp_path):
        """
        An upper bound is not shown as a lower one, and the interval of the seeds stands beside the value.
        """
        experiment = an_experiment()
        experiment["claims"][0] |= {"bound": "at most", "interval": [0.0612, 0.105]}

        held, _ = Page(write_experiment_report(keep(tmp_path, experiment))).table("claims")

        assert held["Measured"] == "0.08395 %: 0.061 to 0.105"
        assert held["Expected"] == "at most 0.030"

    def test_rows_on_lines_are_drawn_over_their_places(self, tmp_path):
        """
        Rows that name a line and a place make a second drawing, with the places in the order of the rows.
        """
        experiment = an_experiment()
        for row, (line, at) in zip(
            experiment["rows"], [("large", "none"), ("large", "8"), ("small", "8")], strict=False
        ):
            row |= {"line": line, "at": at, "interval": [row["mean"] - 0.1, row["mean"] + 0.1]}

        page = Page(write_experiment_report(keep(tmp_path, {**experiment, "axis": "epsilon for a patient"})))

        labels = [dict(attributes).get("aria-label") for tag, attributes in page.tags if tag == "svg"]
        assert labels[0] == "Dice over epsilon for a patient"
        assert len(labels) == 2
        drawing = page.text[: page.text.index("Strokes")]
        assert drawing.index("none") < drawing.index("8", drawing.index("none"))
        assert {"large", "small"} <= set(drawing.split())
        assert "95 % t-intervals over 3 seeds" in page.text

    def test_quick_experiment_says_that_it_proves_nothing(self, tmp_path):
        """
        Nobody takes a quick run for evidence.
        """
        page = Page(write_experiment_report(keep(tmp_path, {**an_experiment(), "quick": True})))

        assert "too little to support a claim" in page.text

    def test_measurements_on_different_splits_stand_together(self, tmp_path):
        """
        Where each split has one method only, the splits are named beside the methods in one table.
        """
        experiment = an_experiment()
        experiment["rows"] = [
            {"method": "local", "metric": "dice", "split": split, "mean": 0.7, "sd": 0.01, "values": [0.69, 0.71]}
            for split in ("own patients", "other sites' patients")
        ]

        page = Page(write_experiment_report(keep(tmp_path, experiment)))

        assert page.tables[None][:2] == [
            ["Method", "Split", "Mean", "SD"],
            ["local", "own patients", "0.700", "0.010"],
        ]

    def test_hostile_name_stays_text(self, tmp_path):
        """
        A name is shown as it is and becomes no part of the page's code.
        """
        experiment = json.loads(json.dumps(an_experiment()).replace("fedprox", HOSTILE))

        page = Page(write_experiment_report(keep(tmp_path, {**experiment, "title": HOSTILE})))

        assert HOSTILE in page.text
        assert "script" not in {tag for tag, _ in page.tags}
        assert close_tags_match(page.source)


class TestPagesOfErrors:
    def test_every_number_has_exactly_one_page(self):
        """
        A message ends with docs/errors/<number>.md, and that page is there; no page is without a number.
        """
        assert {page.stem for page in (ROOT / "docs" / "errors").glob("*.md")} == set(TITLES)

    @pytest.mark.parametrize("code", TITLES)
    def test_page_explains_and_offers_two_ways_out(self, code):
        """
        Number and title on the first line, then meaning, reason, and two or more things to do with a command to type.
        """
        first, *rest = (ROOT / "docs" / "errors" / f"{code}.md").read_text(encoding="utf-8").splitlines()

        assert first == f"# {code}: {TITLES[code]}"
        assert [line for line in rest if line.startswith("## ")] == ["## What it means", "## Why", "## What you can do"]
        assert sum(line.startswith("- ") for line in rest[rest.index("## What you can do") :]) >= 2
        assert "```" in rest
