"""The laboratory: scanners near and far, several at a site, confounded with disease, and hospitals that train nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shared_models.errors import FederadError
from shared_models.plan import Plan
from shared_models.scanners import OTHER, parse_scanner
from simulation.atlas import Grid
from simulation.consortium import _assigned, _dealt, _dealt_unseen, emulate, emulate_unseen, emulation_sha256
from simulation.experiments import new_scanner
from simulation.experiments.confounded import CONFOUNDED
from simulation.experiments.private_adaptation import PRIVATE_ADAPTATION
from simulation.experiments.unseen_scanner import COLUMNS, UNSEEN_SCANNER, harmless
from simulation.patients import EmulatedPatient
from simulation.scanners import ALL_SCANNERS, LABORATORY, SCANNERS, acquire, low_frequencies, scanners_sha256

PAIR = "siemens-t1gd-3t+ge-t2-1.5t"


def plan_with(**simulation: object) -> Plan:
    return Plan.from_tables(
        {
            "name": "small",
            "rounds": 1,
            "task": {
                "kind": "segmentation",
                "labels": ["background", "lesion"],
                "network": "unet",
                "channels": [8, 16],
            },
            "data": {"modality": "MR", "dimensions": 2, "spacing_mm": [4.0, 4.0], "patch": [32, 32]},
            "simulation": {"patients": 2, "slices": 2, **simulation},
        }
    )


def scanners_and_lesions(plan: Plan, n: int = 400) -> list[tuple[str, bool]]:
    """What the first hospital's patients are scanned with, and whether they have a lesion."""
    share, grid = _dealt(plan, 1, 0)[0], Grid.slab(2, (4.0, 4.0, 4.0))
    assigned = [_assigned(share, EmulatedPatient(0, 1, i), grid, "lesion", Path("x")) for i in range(1, n + 1)]
    return [(one.scanner, one.has_lesions) for one in assigned]


class TestScanners:
    def test_laboratory_has_scanners_near_and_far(self):
        """
        Eight or more, each with a name of its own and a maker that the vocabulary knows.
        """
        assert len(ALL_SCANNERS) == len(SCANNERS) + len(LABORATORY) >= 8
        assert all(parse_scanner(s.manufacturer).maker != OTHER for s in ALL_SCANNERS.values())

    def test_hash_names_the_scanners_that_are_used(self):
        """
        A plan with the usual scanners keeps its hash whatever the laboratory holds.
        """
        assert scanners_sha256() == scanners_sha256(SCANNERS)
        assert scanners_sha256(["ge-t1-1.5t"]) != scanners_sha256() != scanners_sha256(["philips-t2-3t"])

    def test_fewer_frequencies_make_a_coarser_image(self):
        """
        A single bright pixel spreads, the mean stays, and all frequencies give it back.
        """
        point = np.zeros((1, 32, 32), np.float32)
        point[0, 16, 16] = 1.0
        blurred = low_frequencies(point, 0.5)

        assert blurred.max() < 0.5
        np.testing.assert_allclose(low_frequencies(point, 1.0), point, atol=1e-6)

    @pytest.mark.parametrize("name", LABORATORY)
    def test_every_scanner_shows_lesions(self, name):
        """
        Without noise a lesion differs from the white matter around it.
        """
        tissues = np.zeros((6, 1, 16, 16), np.float32)
        tissues[4] = 1.0
        tissues[4, 0, 4:12, 4:12], tissues[5, 0, 4:12, 4:12] = 0.0, 1.0
        image = np.mean(
            [acquire(ALL_SCANNERS[name], tissues, (4.0, 4.0, 4.0), np.random.default_rng(i)) for i in range(30)], axis=0
        )

        assert abs(image[0, 6:10, 6:10].mean() - image[0, :2].mean()) > 0.05


class TestDealing:
    def test_patients_of_a_site_are_dealt_to_its_scanners(self):
        """
        By chance, each scanner about as many.
        """
        dealt = [scanner for scanner, _ in scanners_and_lesions(plan_with(scanners=[PAIR]))]

        assert set(dealt) == set(PAIR.split("+"))
        assert 0.4 < dealt.count("ge-t2-1.5t") / len(dealt) < 0.6

    def test_confounded_patients_come_to_the_scanner_of_their_disease(self):
        """
        Nine in ten of those with a lesion to the first, nine in ten of the others to the second.
        """
        dealt = scanners_and_lesions(plan_with(scanners=[PAIR], prevalence=[0.5], confounding=[0.9]))
        first = PAIR.split("+", maxsplit=1)[0]

        for has_lesion, share in ((True, 0.9), (False, 0.1)):
            of_kind = [scanner for scanner, has in dealt if has == has_lesion]
            assert abs(np.mean([scanner == first for scanner in of_kind]) - share) < 0.06

    @pytest.mark.parametrize(
        "wrong",
        [
            {"scanners": ["ge-t2-1.5t"], "prevalence": [0.5], "confounding": [0.9]},
            {"scanners": [PAIR], "confounding": [0.9]},
            {"scanners": ["siemens-t1gd-3t+nobody"]},
            {"unlabelled": ["nobody"]},
        ],
        ids=["one scanner", "everybody has a lesion", "unknown in a pair", "unknown without labels"],
    )
    def test_what_cannot_be_dealt_is_refused(self, wrong):
        """
        R230 names the key.
        """
        with pytest.raises(FederadError, match="R230"):
            _dealt(plan_with(**wrong), 2, 0)

    def test_sizes_and_shares_of_labels_can_be_skewed(self):
        """
        Drawn once for a seed, and nearly alike where the skew is weak.
        """
        sizes = [
            [share.n_patients for share in _dealt(plan_with(patients=50, size_skew=s), 6, 0)] for s in (0.5, 1000.0)
        ]
        shares = [
            [share.prevalence for share in _dealt(plan_with(prevalence=[0.5], label_skew=s), 6, 0)]
            for s in (0.5, 1000.0)
        ]

        for skewed, alike in (sizes, shares):
            assert np.std(skewed) > 4 * np.std(alike)
        assert min(sizes[0]) >= 1

    def test_unseen_hospitals_have_patients_of_their_own(self):
        """
        No number of an unseen hospital is one of a site's, so nobody is in both.
        """
        plan = plan_with(unseen=["ge-t1-1.5t", "siemens-t1gd-3t"], prevalence=[0.9], unseen_prevalence=[0.1])
        sites, unseen = _dealt(plan, 3, 0), _dealt_unseen(plan, 3)

        assert not {share.number for share in sites} & {share.number for share in unseen}
        assert [(share.name, share.prevalence) for share in unseen] == [("unseen-1", 0.1), ("unseen-2", 0.1)]

    def test_what_trains_nothing_changes_no_site(self):
        """
        Plans that differ in their unseen hospitals share their sites.
        """
        plain, more = plan_with(), plan_with(unseen=["ge-t2-1.5t"])

        assert emulation_sha256(plain, n_sites=2, seed=0) == emulation_sha256(more, n_sites=2, seed=0)

    def test_files_say_the_scanner_and_lack_the_reference_where_asked(self, tmp_path):
        """
        Studies of an unlabelled scanner come without a segmentation, all others with one; unseen hospitals lie apart.
        """
        plan = plan_with(patients=4, scanners=[PAIR], unlabelled=["ge-t2-1.5t"], unseen=["fujifilm-flair-0.4t"])
        site = emulate(plan, n_sites=1, folder=tmp_path / "hospitals", seed=0)[0]
        (unseen,) = emulate_unseen(plan, n_sites=1, folder=tmp_path / "unseen", seed=0)
        import pydicom

        found = {}
        for study in sorted(site.folder.glob("*/study-*")):
            maker = pydicom.dcmread(study / "im-001.dcm", stop_before_pixels=True).Manufacturer
            found.setdefault(maker, set()).add((study / "seg.dcm").is_file())

        assert found == {"SIEMENS": {True}, "GE MEDICAL SYSTEMS": {False}}
        assert len(list(unseen.folder.glob("*/study-*/seg.dcm"))) >= 4


class TestExperiments:
    @pytest.mark.parametrize("experiment", [UNSEEN_SCANNER, CONFOUNDED, PRIVATE_ADAPTATION], ids=lambda e: e.name)
    @pytest.mark.parametrize("quick", [False, True])
    def test_arms_are_plans_on_few_sets_of_hospitals(self, experiment, quick):
        """
        Every arm is a plan that anybody could write, and arms of one comparison share their hospitals.
        """
        plans = experiment.arms(quick=quick)

        for plan in plans.values():
            assert Plan.model_validate_json(plan.canonical_json()).sha256 == plan.sha256
        assert len({emulation_sha256(plan, n_sites=4, seed=0) for plan in plans.values()}) <= 4

    def test_claims_follow_from_the_results(self):
        """
        Half of the drop given back is a share of 0.5, and a loss that its interval does not show is no harm.
        """

        def result(seen: float, near: float, far: float) -> dict:
            unseen = {name: {"dice": near if name in COLUMNS["near"] else far} for c in COLUMNS for name in COLUMNS[c]}
            return {"scanners": {"seen": {"a": {"dice": seen}}, "unseen": unseen, "leakage": None}}

        results = {
            arm: [result(0.8, 0.75, 0.4), result(0.8, 0.75, 0.5)] if arm == "plain" else [result(0.79, 0.76, 0.65)] * 2
            for arm in UNSEEN_SCANNER.arms(quick=True)
        }
        claims = {claim["id"]: claim for claim in UNSEEN_SCANNER.evaluate(results)["claims"]}

        assert claims["drop_removed"]["values"] == pytest.approx([0.625, 0.5])
        assert claims["seen_cost"]["value"] == pytest.approx(0.01)
        assert claims["adversarial_far"]["holds"]
        assert harmless("x", "far", [-0.05, 0.02])["holds"]
        assert not harmless("x", "far", [-0.05, -0.05])["holds"]


class TestPrivateAdaptation:
    def test_privacy_is_all_that_costs(self):
        """
        At epsilon 8 the four ways differ in their adaptation alone, and so do those without privacy.
        """
        plans = PRIVATE_ADAPTATION.arms(quick=False)
        private, open_ = plans["plain"], plans["open plain"]

        assert private.privacy is not None
        assert private.privacy.epsilon == 8.0
        assert open_.privacy is None
        assert private.simulation == open_.simulation
        for name, plan in plans.items():
            like = open_ if name.startswith("open") else private
            assert plan.model_copy(update={"adaptation": None}) == like

    def test_gain_that_is_lost_is_formed_seed_by_seed(self):
        """
        Randomisation gains 0.2 without privacy and 0.15 at epsilon 8.
        """

        def result(far: float) -> dict:
            unseen = {name: {"dice": far} for column in COLUMNS.values() for name in column}
            return {"scanners": {"seen": {"a": {"dice": 0.7}}, "unseen": unseen, "leakage": None}}

        far = {"plain": 0.4, "appearance": 0.55, "open plain": 0.5, "open appearance": 0.7}
        results = {arm: [result(far.get(arm, 0.5))] * 2 for arm in PRIVATE_ADAPTATION.arms(quick=True)}
        found = PRIVATE_ADAPTATION.evaluate(results)
        claims = {one["id"]: one for one in found["claims"]}

        assert claims["gain_lost"]["values"] == pytest.approx([0.05, 0.05])
        assert claims["drop_removed"]["values"] == pytest.approx([0.5, 0.5])
        assert {row["method"] for row in found["rows"]} == set(results)


class TestNewScanner:
    def test_ways_differ_in_adaptation_and_labels_alone(self):
        """
        Nobody has outlined the new scanner's scans but for the arm that shows what that would give. Where the sequence is
        another, a second series is not.
        """
        plans = new_scanner.arms(quick=False)

        assert plans["far, plain"].simulation.second_series is None
        assert plans["sequence, plain"].simulation.second_series == new_scanner.SECOND_SERIES
        assert plans["sequence, plain"].data.channels == new_scanner.CHANNELS

        for case in ("far", "sequence"):
            new = new_scanner.NEW[case]
            labels = plans[f"{case}, labels"]
            plain = plans[f"{case}, plain"].simulation
            assert labels.simulation == plain.model_copy(update={"unlabelled": None})
            assert plain.unlabelled == (new,)
            for way, table in new_scanner.TABLES.items():
                plan = plans[f"{case}, {way}"]
                assert (plan.adaptation is None) == (table is None)
                assert plan.model_copy(update={"adaptation": None, "simulation": plain}) == plans[f"{case}, plain"]

    def test_where_k_space_is_its_own_reference_the_new_scanner_takes_part_or_not(self):
        """
        Its patients elsewhere are the same ones for every way, which are told apart by appearance and by who trains.
        """
        plans = new_scanner.arms(quick=False)
        plain, appearance, labels = (plans[f"reconstruction, {way}"] for way in ("plain", "appearance", "labels"))
        new = new_scanner.NEW["reconstruction"]

        assert appearance.model_copy(update={"adaptation": None}) == plain
        assert all(new not in scanner for scanner in plain.simulation.scanners)
        assert labels.simulation.scanners == tuple(f"{old}+{new}" for old in plain.simulation.scanners)
        assert labels.simulation.unlabelled is None
        assert plain.model_copy(update={"simulation": labels.simulation}) == labels

    def test_share_of_the_gap_is_formed_seed_by_seed(self):
        """
        Half of the way from the plain model to the one with labels, at one seed and a tenth at the other.
        """
        dice = {
            "plain": (0.2, 0.4),
            "labels": (0.6, 0.5),
            "predictions": (0.4, 0.41),
            "appearance": (0.4, 0.41),
        }
        results = {
            f"{case}, {way}": [{"scanners": {"unseen_mean": {metric: v}}} for v in dice.get(way, (0.3, 0.3))]
            for case, metric in new_scanner.METRICS.items()
            for way in new_scanner.WAYS[case]
        }
        claims = {one["id"]: one["values"] for one in new_scanner.evaluate(results)["claims"]}

        assert claims["far_gap_recovered"] == pytest.approx([0.5, 0.1])
        assert claims["sequence_gap_recovered"] == pytest.approx([0.5, 0.1])
