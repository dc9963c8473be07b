"""From emulated hospitals to stations: who joins without references, and who must not adapt."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from client.site import SiteConfig
from client.station import Station
from client.training import Trainer
from shared_models.errors import FederadError
from shared_models.plan import Plan
from shared_models.task import task_for
from shared_models.volume import Volume
from shared_models.weights import initial_weights
from simulation import by_scanner
from simulation.by_scanner import measure_scanners
from simulation.consortium import emulate
from simulation.run import Request, require_scanners
from simulation.stations import SiteFolder, cohort_of, prepare_stations

PAIR = "siemens-t1gd-3t+ge-t2-1.5t"
ADVERSARY = {"adversarial": "scanner", "warm_up": 0.0}
SPLIT = {"train": 0.5, "validation": 0.0, "test": 0.5}
PRIVACY = {"noise_multiplier": 1.0, "patients_per_step": 2, "steps_per_round": 1}


def plan_with(scanners: list[str], **tables: dict) -> Plan:
    return Plan.from_tables(
        {
            "name": "small",
            "rounds": 1,
            "task": {"kind": "segmentation", "labels": ["background", "lesion"], "network": "unet", "channels": [4, 8]},
            "data": {
                "modality": "MR",
                "dimensions": 2,
                "spacing_mm": [4.0, 4.0],
                "patch": [16, 16],
                "split": {"train": 0.5, "validation": 0.1, "test": 0.4},
            },
            "strategy": {"minimum_sites": 1, "release": "last"},
            "simulation": {"patients": 8, "slices": 1, "scanners": scanners, "unlabelled": ["ge-t2-1.5t"]},
            **tables,
        }
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> SiteFolder:
    """A hospital with two scanners, one of whose studies nobody has outlined."""
    folder = tmp_path_factory.mktemp("lab")
    (hospital,) = emulate(plan_with([PAIR]), n_sites=1, folder=folder / "hospitals", seed=0)
    return SiteFolder("site-1", hospital.folder, folder / "stations" / "site-1")


def prepared(plan: Plan, site: SiteFolder) -> SiteFolder:
    prepare_stations(plan, [site], seed=0, workers=1, on_site=lambda _: None)
    return site


class TestUnlabelled:
    def test_study_without_reference_trains_where_a_discriminator_does(self, site):
        """
        It is a training study of its scanner then, and nowhere else is anything measured on one.
        """
        plain, adversarial = plan_with([PAIR]), plan_with([PAIR], adaptation=ADVERSARY)
        labelled = cohort_of(prepared(plain, site), plain)
        everybody = cohort_of(prepared(adversarial, site), adversarial)

        assert labelled.scanners == ("SIEMENS MAGNETOM Aldera 3 T",)
        assert len(everybody.scanners) == 2
        assert len(everybody.patients("train")) > len(labelled.patients("train"))
        for split in ("validation", "test"):
            assert everybody.patients(split) == labelled.patients(split)
        unlabelled = {s for p in everybody.patients("train") for s in p.studies if everybody.is_unlabelled(s)}
        assert {everybody.scanner(study) for study in unlabelled} == {"GE MEDICAL SYSTEMS SIGNA Vesper 1.5 T"}
        assert all(everybody.volume(study).label is None for study in unlabelled)

    def test_privacy_leaves_studies_without_reference_out(self, site):
        """
        Nothing but other patients would bound their reversed gradient.
        """
        plan = plan_with([PAIR], adaptation=ADVERSARY, privacy=PRIVACY)

        assert cohort_of(prepared(plan, site), plan).scanners == ("SIEMENS MAGNETOM Aldera 3 T",)

    def test_seen_scanners_are_measured_each(self, site):
        """
        The table of scanners has test patients' metrics by scanner; with one scanner there is no leak to probe.
        """
        plan = plan_with([PAIR], adaptation=ADVERSARY)
        prepared(plan, site)
        weights = initial_weights(task_for(plan).build_network, 0)
        found = measure_scanners(plan, weights, [site], [])

        assert list(found["seen"]) == ["SIEMENS MAGNETOM Aldera 3 T"]
        assert found["seen_mean"]["dice"] >= 0
        assert (found["unseen"], found["leakage"]) == ({}, None)


class TestKspace:
    def test_discriminator_learns_from_two_scanners_and_none_is_without_reference(self, tmp_path):
        """
        Headers of k-space name scanners as those of images do; network and discriminator both move, and test patients of
        both scanners are measured.
        """
        plan = Plan.from_tables(
            {
                "name": "kspace",
                "rounds": 1,
                "task": {"kind": "reconstruction", "network": "cascade", "channels": [4, 4], "cascades": 1},
                "data": {"modality": "MR", "dimensions": 2, "patch": [32, 32], "split": SPLIT},
                "strategy": {"minimum_sites": 1, "release": "last"},
                "simulation": {"patients": 12, "slices": 1, "scanners": [PAIR], "unlabelled": ["ge-t2-1.5t"]},
                "adaptation": ADVERSARY | {"appearance": True},
            }
        )
        (hospital,) = emulate(plan, n_sites=1, folder=tmp_path / "hospitals", seed=0)
        site = prepared(plan, SiteFolder("site-1", hospital.folder, tmp_path / "stations" / "site-1"))
        cohort = cohort_of(site, plan)
        weights = initial_weights(task_for(plan).build_network, 0)
        update = Trainer(plan, "cpu").train(weights, cohort, seed=0, site="site-1", round_=1).update

        assert len(cohort.scanners) == 2
        assert not any(cohort.is_unlabelled(study) for p in cohort.patients("train") for study in p.studies)
        for part in ("network", "discriminator"):
            assert any(np.abs(array).max() > 0 for name, array in update.items() if name.startswith(part))
        assert set(measure_scanners(plan, weights, [site], [])["seen"]) == set(cohort.scanners)


class TestProbes:
    @pytest.mark.parametrize(("shows", "leakage", "kept"), [("scanner", 1.0, 0.5), ("label", 0.5, 1.0)])
    def test_each_reads_its_own_matter_off_features(self, shows, leakage, kept, monkeypatch):
        """
        Features that hold nothing but the scanner leak it and keep nothing of the label; the other way round as well.
        """
        rng, people = np.random.default_rng(0), {}
        for k in range(80):
            scanner, is_affected = ("ZEISS", "NIDEK")[k // 2 % 2], bool(k // 4 % 2)
            feature = rng.normal(10 * {"scanner": scanner == "ZEISS", "label": is_affected}[shows], 1)
            label = np.full((1, 16, 16), is_affected, np.uint8)
            image = np.full((1, *label.shape), feature, np.float32)
            people[f"p{k}"] = scanner, Volume(image, label, np.argwhere(label).astype(np.int32), (1.0, 1.0, 1.0))
        cohort = SimpleNamespace(
            patients=lambda split: [SimpleNamespace(key=key, studies=(key,)) for key in people],
            volume=lambda study: people[study][1],
            scanner=lambda study: people[study][0],
        )
        plan = plan_with([PAIR], adaptation={**ADVERSARY, "scanners": ["ZEISS", "NIDEK"]})
        monkeypatch.setattr(by_scanner, "cohort_of", lambda site, plan: cohort)
        monkeypatch.setattr(by_scanner, "descriptor_of", lambda network, image: image.numpy().mean((2, 3)))
        found = by_scanner.probed(Trainer(plan, "cpu"), initial_weights(task_for(plan).build_network, 0), [None])

        assert found["leakage"]["accuracy"] == pytest.approx(leakage, abs=0.2)
        assert found["kept"]["accuracy"] == pytest.approx(kept, abs=0.2)
        assert found["leakage"]["chance"] == found["kept"]["chance"] == 0.5


class TestRefused:
    def test_run_in_which_no_site_tells_scanners_apart_is_refused(self, site, tmp_path):
        """
        R112: the plan would run without what it says.
        """
        alone = plan_with([PAIR], adaptation={**ADVERSARY, "scanners": ["ZEISS", "NIDEK"]})
        apart = plan_with([PAIR], adaptation=ADVERSARY)
        prepared(apart, site)

        with pytest.raises(FederadError, match="R112"):
            require_scanners(Request(alone, tmp_path), [site])
        require_scanners(Request(apart, tmp_path), [site])

    def test_run_whose_sites_share_one_scanner_asks_for_no_moments(self, site, tmp_path):
        """
        R113: nothing could be told apart, wherever it is trained; two scanners at one site, or at two, are enough.
        """
        table = {"adversarial": "moments"}
        alone = plan_with([PAIR], rounds=2, adaptation={**table, "scanners": ["ZEISS", "NIDEK"]})
        apart = plan_with([PAIR], rounds=2, adaptation=table)
        prepared(apart, site)

        with pytest.raises(FederadError, match="R113"):
            require_scanners(Request(alone, tmp_path), [site])
        require_scanners(Request(apart, tmp_path), [site])

    @pytest.mark.parametrize("adversary", [ADVERSARY, {"adversarial": "moments", "moments_noise": 5.0}])
    def test_hospital_that_declares_no_scanner_approves_no_private_adversary(self, site, tmp_path, adversary):
        """
        C111: whether it has several must follow from what somebody typed; once typed, it is not the obstacle.
        """
        plan = plan_with([PAIR], rounds=2, adaptation=adversary, privacy=PRIVACY)
        config = {"name": "site-1", "data": str(site.data)}
        silent = Station.create(tmp_path / "silent", SiteConfig.model_validate_json(json.dumps(config)))
        declared = Station.create(
            tmp_path / "declared",
            SiteConfig.model_validate_json(json.dumps({**config, "scanners": ["SIEMENS 3 T", "GE 1.5 T"]})),
        )

        with pytest.raises(FederadError, match="C111"):
            silent.approve(plan, declared_size=10)
        with pytest.raises(FederadError) as error:
            declared.approve(plan, declared_size=10)
        assert error.value.code != "C111"
