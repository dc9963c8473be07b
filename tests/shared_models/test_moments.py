"""What a release of moments looks like, and what a frozen discriminator does to features."""

from __future__ import annotations

import contracts
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import SAME_EXAMPLES
from torch import Tensor, nn

from shared_models.errors import FederadError
from shared_models.moments import (
    DIMENSIONS,
    TABLE,
    Confusion,
    Discriminator,
    Layout,
    clip_rows,
    describe,
    directions,
    fault_of,
)
from shared_models.plan import AdaptationTable, Plan, PrivacyTable
from shared_models.task import task_for

CASES = contracts.every_case()

SCANNERS = ("SIEMENS 3 T", "GE 1.5 T")
PRIVACY = PrivacyTable(noise_multiplier=1.0, patients_per_step=2, steps_per_round=1)


def plan_with(case: tuple[str, str, int] = ("segmentation", "unet", 2), *, private=False, **adaptation) -> Plan:
    keys = {"warm_up": 0.0, "scanners": SCANNERS, **({"moments_noise": 2.0} if private else {}), **adaptation}
    table = AdaptationTable(adversarial="moments", **keys)
    changes = {"rounds": 4, "adaptation": table, "privacy": PRIVACY if private else None}
    return contracts.example_plan(*case).model_copy(update=changes)


def discriminator(n: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    torch.manual_seed(seed)
    return Discriminator(n).as_arrays()


def gradients(plan: Plan, network: nn.Module, batch: contracts.Batch, strength: float, of: int | None = None):
    """Of every parameter, after one backward pass with a frozen discriminator; of the loss of one sample alone."""
    torch.manual_seed(0)
    network.train().zero_grad(set_to_none=True)
    confusion = Confusion(discriminator(), plan)
    output = confusion.answer(network, batch[0])
    one = slice(None) if of is None else slice(of, of + 1)
    confusion.oppose(torch.ones(len(batch[0]), dtype=torch.bool), strength=strength)
    task_for(plan).loss(output[one], batch[1][one]).backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


class TestLayout:
    @SAME_EXAMPLES
    @given(
        st.booleans(),
        st.sampled_from([0.3, 1.0, 7.0]),
        st.integers(1, 3),
        st.floats(0, 1e6),
        st.integers(0, 2**32 - 1),
    )
    def test_one_patient_adds_a_vector_of_bounded_norm_over_all_scanners(self, private, clip, n_scanners, size, seed):
        """
        However long the features and however many scanners a patient saw, the joint norm is at most the public bound.
        """
        layout = Layout.of(plan_with(private=private, moments_clip=clip))
        rng = np.random.default_rng(seed)
        vector = layout.patient({k: size * rng.normal(size=DIMENSIONS) for k in range(n_scanners)})

        assert vector.shape == layout.shape == (3, 1 + DIMENSIONS * (1 if private else 2))
        assert np.linalg.norm(vector) <= layout.largest * (1 + 1e-12)
        assert vector[:, 0].sum() == pytest.approx(clip)

    def test_row_holds_count_features_and_squares(self):
        """
        As written out by hand, for a feature within the clip; a patient without a known scanner adds nothing.
        """
        layout = Layout.of(plan_with(moments_clip=2.0))
        feature = np.linspace(-0.3, 0.4, DIMENSIONS)
        vector = layout.patient({1: feature})

        np.testing.assert_allclose(vector[1], [2.0, *feature, *(feature**2 / 2)])
        assert not vector[[0, 2]].any()
        assert not layout.patient({}).any()


class TestDescription:
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_features_of_every_network_have_a_length_of_about_one(self, case):
        """
        So the clip means the same for every network; what is described is each image's own.
        """
        plan = plan_with(case)
        network = task_for(plan).build_network().eval()
        image = contracts.example_batch(task_for(plan))[0]
        with torch.no_grad():
            together = describe(network, image)
            alone = describe(network, image[:1])

        assert together.shape == (4, DIMENSIONS)
        assert (together.norm(dim=1) > 0.4).all()
        assert (together.norm(dim=1) < 2).all()
        torch.testing.assert_close(alone, together[:1], rtol=1e-4, atol=1e-5)

    def test_directions_are_the_same_for_everyone(self):
        """
        They are public, and no seed of a run or state of a process decides them.
        """
        np.random.default_rng().normal()
        torch.manual_seed(7)

        assert directions(40)[0, 0] == pytest.approx(-0.011622203445606712, rel=1e-12)
        assert directions(40).shape == (40, DIMENSIONS)

    def test_row_is_clipped_by_itself(self):
        """
        Long ones to the clip, short ones not at all.
        """
        clipped = clip_rows(torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]), 1.0)

        torch.testing.assert_close(clipped, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


class TestConfusion:
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_features_move_and_stay_within_the_ratio(self, case):
        """
        The network answers as without; however strong the adversary, what it adds is less than the task's gradient.
        """
        plan = plan_with(case, gradient_ratio=0.1)
        network, batch = task_for(plan).build_network(), contracts.example_batch(task_for(plan))
        torch.manual_seed(0)
        plain = network.train()(batch[0])
        torch.manual_seed(0)
        torch.testing.assert_close(Confusion(discriminator(), plan).answer(network, batch[0]), plain, rtol=0, atol=0)
        without, with_it = (gradients(plan, network, batch, strength) for strength in (0.0, 1e9))
        moved = torch.stack([(with_it[name] - without[name]).norm() for name in without]).norm()

        assert 0 < moved < torch.stack([gradient.norm() for gradient in without.values()]).norm()

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_nobody_moves_the_gradient_of_another(self, case):
        """
        With the adversary, too, a patient's own gradient does not depend on who shares the batch.
        """
        plan = plan_with(case)
        network, batch = task_for(plan).build_network(), contracts.example_batch(task_for(plan))
        among_some = gradients(plan, network, batch, 1.0, of=0)
        among_others = gradients(plan, network, contracts.in_other_company(batch), 1.0, of=0)

        for name, gradient in among_some.items():
            torch.testing.assert_close(
                among_others[name], gradient, rtol=1e-4, atol=1e-6 * max(1.0, float(gradient.abs().max()))
            )

    def test_descent_brings_features_to_where_scanners_look_alike(self):
        """
        Steps along the gradient lower the divergence from "every scanner alike", whatever the sample's own scanner.
        """
        plan = plan_with()
        arrays = discriminator()
        confusion, told = Confusion(arrays, plan), Discriminator.from_arrays(arrays, plan)
        torch.manual_seed(1)
        features = [torch.rand(4, 8, 6, 6)]

        def divergence(features: list[Tensor]) -> float:
            from shared_models.moments import described

            logs = torch.log_softmax(told(clip_rows(described(features), 1.0)), dim=1)
            return float(-logs.mean() - np.log(3))

        before = divergence(features)
        for _ in range(50):
            features = [f - 20 * g for f, g in zip(features, confusion.gradients(features), strict=True)]

        assert 0 <= divergence(features) < 0.5 * before

    @pytest.mark.parametrize("kind", ["missing", "other shape", "too many scanners", "one scanner"])
    def test_discriminator_that_does_not_fit_is_refused(self, kind):
        """
        M217: it came from the other side.
        """
        arrays = discriminator({"too many scanners": 4, "one scanner": 1}.get(kind, 2))
        if kind == "missing":
            del arrays["hidden.bias"]
        if kind == "other shape":
            arrays["centre"] = np.zeros(DIMENSIONS + 1, np.float32)

        with pytest.raises(FederadError, match="M217"):
            Confusion(arrays, plan_with())

    def test_reading_one_moves_nobodys_random_numbers(self):
        """
        Training with and without it draws the same.
        """
        torch.manual_seed(3)
        expected = torch.rand(3)
        torch.manual_seed(3)
        Confusion(ARRAYS, plan_with())

        torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


ARRAYS = discriminator()


class TestFault:
    def table(self, plan: Plan) -> np.ndarray:
        layout = Layout.of(plan)
        features = {k: np.full(DIMENSIONS, 0.1) for k in range(2)}
        return (10 * layout.patient(features)).astype(np.float32)

    @pytest.mark.parametrize("private", [False, True])
    def test_what_a_site_releases_is_taken(self, private):
        """
        In a round in which the plan asks for it; and no moments are no fault.
        """
        plan = plan_with(private=private, moments_every=2)

        assert fault_of({TABLE: self.table(plan)}, plan, 1) is None
        assert fault_of({}, plan, 1) is None
        assert "nobody asked" in fault_of({TABLE: self.table(plan)}, plan, 2)

    @pytest.mark.parametrize("private", [False, True])
    @pytest.mark.parametrize("kind", ["name", "rows", "columns", "dtype", "not finite"])
    def test_other_arrays_are_named(self, private, kind):
        """
        Another name, size or type, or values that are none.
        """
        plan = plan_with(private=private)
        table = self.table(plan)
        wrong = {
            "name": {"other": table},
            "rows": {TABLE: table[:2]},
            "columns": {TABLE: np.zeros((3, 2), np.float32)},
            "dtype": {TABLE: table.astype(np.float64)},
            "not finite": {TABLE: table * np.float32(np.nan)},
        }[kind]

        assert "moments" in fault_of(wrong, plan, 1)

    @pytest.mark.parametrize("column", [0, 1, 1 + DIMENSIONS])
    def test_sums_that_no_patients_can_have_are_left_out(self, column):
        """
        Without noise a count bounds everything in its row.
        """
        table = self.table(plan_with())
        table[1, column] = -50

        assert "no patients" in fault_of({TABLE: table}, plan_with(), 1)
