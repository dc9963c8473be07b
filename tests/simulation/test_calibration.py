"""How sure the models of a run are: what is counted, and what a page says of it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from client.training import Trainer
from shared_models.errors import FederadError
from shared_models.plan import Plan
from shared_models.uncertainty import entropy, expected_calibration_error
from shared_models.volume import Volume
from shared_models.weights import decode
from simulation import calibration
from simulation.calibration import WAYS, said, snapshots, truth_of
from simulation.engine import Execution
from simulation.run import Request, Watcher, simulate


def plan_of(kind: str = "segmentation", **tables: dict) -> Plan:
    of_kind = {
        "segmentation": {"labels": ["background", "lesion"], "network": "unet"},
        "classification": {"labels": ["no", "yes"], "network": "resnet"},
        "multi-label": {"labels": ["front lesion", "back lesion"], "network": "resnet", "target": "multi-label"},
        "reconstruction": {"network": "image-unet"},
    }[kind]
    kind = "classification" if kind == "multi-label" else kind
    return Plan.from_tables(
        {
            "name": "tiny",
            "rounds": 3,
            "task": {"kind": kind, "channels": [4, 8], **of_kind},
            "data": {
                "modality": "MR", "dimensions": 2, "patch": [48, 48],
                "split": {"train": 0.4, "validation": 0.2, "test": 0.4},
                **({} if kind == "reconstruction" else {"spacing_mm": [4.0, 4.0]}),
            },
            "simulation": {"patients": 6, "slices": 1, "prevalence": [0.5], "unseen": ["fujifilm-flair-0.4t"]},
            **tables,
        }
    )  # fmt: skip


@pytest.fixture(scope="module", params=["segmentation", "classification", "multi-label"])
def run(request, tmp_path_factory):
    """A plan, the folder of its run, and the result."""
    plan, folder = plan_of(request.param), tmp_path_factory.mktemp("run")
    return plan, folder, simulate(Request(plan, folder, 2, compare=False, uncertainty=True), Watcher())


class TestMembers:
    def test_they_are_of_the_last_half_and_the_last_round_is_among_them(self):
        """
        Five shared models, evenly spaced; fewer where there are fewer rounds.
        """
        assert snapshots(240) == (144, 168, 192, 216, 240)
        assert snapshots(2) == (1, 2)
        assert snapshots(1) == (1,)

    def test_site_models_of_a_round_make_up_the_shared_model_of_the_next(self, run):
        """
        Weighted as the sites are: two models, and the last round's weights lie between them in every number.
        """
        plan, folder, _ = run
        sites = [SimpleNamespace(station=path) for path in sorted((folder / "stations").glob("site-*"))]
        one, other = calibration.site_models(plan, sites, calibration.Journal(folder / "journal"))
        shared = decode((folder / "round-00003.safetensors").read_bytes())[0]

        for name, values in shared.items():
            low, high = np.minimum(one[name], other[name]), np.maximum(one[name], other[name])
            assert ((values >= low - 1e-4) & (values <= high + 1e-4)).all()
        assert any((one[name] != other[name]).any() for name in shared)


class TestWhole:
    def test_every_test_patient_is_looked_at_wherever_it_lies(self, run):
        """
        Those of hospitals that trained nothing are told apart; no calibration counts them.
        """
        _, _, result = run
        found = result["uncertainty"]
        shares = {site: figures["patients"] for site, figures in result["test"]["per_site"].items()}
        of_seen = [one["site"] for one in found["patients"] if one["seen"]]

        assert {site: of_seen.count(site) for site in shares} == shares
        assert {one["site"] for one in found["patients"] if not one["seen"]} == {"unseen-1"}
        assert found["ece"].keys() == found["points"].keys() == set(WAYS)
        assert all(0 <= error <= 1 for error in found["ece"].values())
        assert found["members"] == {"snapshots": 2, "sites": 2}

    def test_error_of_the_released_model_is_that_of_its_probabilities(self, run):
        """
        Counted once more by hand, over all places that are looked at.
        """
        plan, folder, result = run
        if plan.task.kind == "segmentation":
            pytest.skip("the ensemble decides where is looked")
        trainer, (weights, _) = Trainer(plan, "cpu"), decode((folder / "model.safetensors").read_bytes())
        confidence, is_right = [], []
        for path in sorted((folder / "stations").glob("site-*")):
            cohort = calibration.cohort_of(SimpleNamespace(station=path), plan)
            for patient in cohort.patients("test"):
                for study in patient.studies:
                    volume = cohort.volume(study)
                    p, truth = said(trainer, weights, volume), truth_of(trainer, volume)
                    confidence.append(p.max(0))
                    is_right.append(p.argmax(0) == truth)
        error = expected_calibration_error(np.concatenate(confidence), np.concatenate(is_right))

        assert result["uncertainty"]["ece"]["single"] == pytest.approx(error)

    def test_run_of_one_round_has_no_site_models(self, tmp_path):
        """
        The released model stands for them, and it is the only snapshot.
        """
        plan = plan_of().model_copy(update={"rounds": 1})
        found = simulate(Request(plan, tmp_path, 2, compare=False, uncertainty=True), Watcher())["uncertainty"]

        assert found["members"] == {"snapshots": 1, "sites": 0}
        assert found["ece"]["ensemble"] == pytest.approx(found["ece"]["single"])

    def test_page_shows_diagram_dots_and_flags(self, run):
        """
        Every way with its error, every number that flags.
        """
        _, folder, result = run
        page = (folder / "report.html").read_text()

        assert all(f'id="{name}"' in page for name in ("reliability", "calibration", "doubted", "flags"))
        assert f"{result['uncertainty']['ece']['ensemble']:.3f}" in page
        assert "mutual information" in page
        assert "entropy of the released model" in page


class TestNumbers:
    def outlined(self, plan: Plan, answers: list[np.ndarray], monkeypatch: pytest.MonkeyPatch):
        """What is found where members say these probabilities of a lesion ``(y, x)``; the first is the released."""
        label = np.zeros((1, 48, 48), np.uint8)
        label[0, 10:20, 10:20] = 1
        volume = Volume(
            np.zeros((1, *label.shape), np.float32), label, np.argwhere(label).astype(np.int32), (1.0, 4.0, 4.0)
        )
        monkeypatch.setattr(
            calibration, "said", lambda trainer, k, volume: np.stack([1 - answers[k], answers[k]])[:, None]
        )
        kinds = {"snapshots": list(range(1, len(answers))), "sites": [0]}
        return calibration._looked_at(Trainer(plan, "cpu"), volume, kinds, 0, 1.0)

    def test_members_that_agree_on_the_truth_are_sure_and_good(self, monkeypatch):
        """
        No disagreement, Dice 1, little entropy; where they say different things it is the other way round.
        """
        plan = plan_of()
        sure = np.full((48, 48), 0.001)
        sure[10:20, 10:20] = 0.999
        other = np.full((48, 48), 0.001)
        other[30:40, 30:40] = 0.999
        good = self.outlined(plan, [sure, sure, sure], monkeypatch)
        poor = self.outlined(plan, [other, sure, np.flipud(sure)], monkeypatch)

        assert (good.numbers["score"], good.numbers["disagreement"], good.is_poor) == (1.0, 0.0, False)
        assert good.numbers["mutual_information"] == pytest.approx(0)
        assert poor.is_poor
        assert poor.numbers["score_single"] == 0
        assert poor.numbers["disagreement"] > 0.5
        assert poor.numbers["mutual_information"] > 0.1 + good.numbers["mutual_information"]

    def test_places_far_from_every_outline_are_not_counted(self, monkeypatch):
        """
        Within 8 mm, two pixels here, of the square of ten; of each corner the one pixel that lies diagonally beside it.
        """
        sure = np.full((48, 48), 0.001)
        sure[10:20, 10:20] = 0.999
        confidence, is_right = self.outlined(plan_of(), [sure, sure], monkeypatch).counted["single"]

        assert len(confidence) == 10 * 10 + 4 * 2 * 10 + 4
        assert is_right.all()

    def test_entropy_is_that_of_what_was_outlined(self, monkeypatch):
        """
        Not of the many easy places around it; of members where together they outline nothing, and of all places where
        nobody outlines anything.
        """
        unsure = np.full((48, 48), 0.001)
        unsure[10:20, 10:20] = 0.6
        empty = np.full((48, 48), 0.001)
        surer = np.where(unsure == 0.6, 0.9, empty)
        of_outline, of_rest, of_mean = (
            float(entropy(np.array([1 - p, p])) / np.log(2)) for p in (0.6, 0.001, (0.6 + 0.001) / 2)
        )
        both = self.outlined(plan_of(), [unsure, unsure], monkeypatch).numbers
        half = self.outlined(plan_of(), [empty, unsure], monkeypatch).numbers
        most = self.outlined(plan_of(), [empty, surer, surer], monkeypatch).numbers
        none = self.outlined(plan_of(), [empty, empty], monkeypatch).numbers

        assert both["entropy"] == pytest.approx(of_outline, rel=1e-4)
        assert both["entropy_single"] == pytest.approx(of_outline, rel=1e-4)
        assert both["mutual_information"] == pytest.approx(0, abs=1e-6)
        assert half["entropy"] == pytest.approx(of_mean, rel=1e-4)
        assert half["mutual_information"] == pytest.approx(of_mean - (of_outline + of_rest) / 2, rel=1e-4)
        assert half["entropy_single"] == most["entropy_single"] == pytest.approx(of_rest, rel=1e-4)
        assert none["entropy"] == pytest.approx(of_rest, rel=1e-4)

    def test_flag_that_ranks_patients_by_what_is_missing_is_perfect(self):
        """
        And one that turns it round is as wrong as can be; where all are poor there is no curve.
        """
        patients = [
            {"score": s, "poor": s < 0.7, "entropy": 1 - s, "disagreement": s, "mutual_information": 0.0}
            for s in (0.2, 0.5, 0.8, 0.9)
        ]

        assert calibration._flags(patients, "entropy") == pytest.approx({"auroc": 1.0, "correlation": 1.0})
        assert calibration._flags(patients, "disagreement") == pytest.approx({"auroc": 0.0, "correlation": -1.0})
        assert calibration._flags(patients, "mutual_information") == {"auroc": 0.5, "correlation": None}
        assert calibration._flags(patients[:2], "entropy")["auroc"] is None

    def test_temperature_of_one_changes_nothing(self):
        """
        And a higher one makes probabilities more alike, in their order.
        """
        p = np.array([[0.7, 0.2], [0.3, 0.8]])

        assert calibration._scaled(p, 1.0) == pytest.approx(p)
        warm = calibration._scaled(p, 2.0)
        assert (warm.argmax(0) == p.argmax(0)).all()
        assert (warm.max(0) < p.max(0)).all()


class TestRefused:
    def test_what_has_no_probabilities_or_members_or_may_not_be_looked_at_is_refused(self, tmp_path):
        """
        R230, before anything is emulated or read.
        """
        private = plan_of(
            privacy={"noise_multiplier": 1.0, "patients_per_step": 2, "steps_per_round": 1},
            strategy={"release": "last"},
        )
        with pytest.raises(FederadError, match="R230"):
            Request(plan_of("reconstruction"), tmp_path, uncertainty=True)
        with pytest.raises(FederadError, match="R230"):
            Request(private, tmp_path, data=tmp_path, uncertainty=True)
        with pytest.raises(FederadError, match="R230"):
            Request(plan_of(), tmp_path, execution=Execution(engine="deployment"), uncertainty=True)
        Request(private, tmp_path, uncertainty=True)
