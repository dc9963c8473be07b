"""Quantification: what a number is compared with, how maps become one, how a set of patients is judged."""

from __future__ import annotations

from typing import Any

import contracts
import numpy as np
import pytest
import torch
from privately import TWO_STEPS
from scipy.stats import entropy

from shared_models.task import task_for
from shared_models.tasks.quantification import USUAL, Quantification
from shared_models.volume import Volume

CPU = torch.device("cpu")


def task_with(
    target: str = "proportion", dimensions: int = 2, loss: str | None = None, **tables: Any
) -> Quantification:
    tables.setdefault("data", {"patch": [8, 12, 16][-dimensions:]})
    if loss is not None:
        tables["training"] = {"loss": loss}
    made = task_for(contracts.example_plan("quantification", dimensions=dimensions, task={"target": target}, **tables))
    assert isinstance(made, Quantification)
    return made


def volume_of(interval: tuple[float, float] | None, sides: tuple[int, int, int] = (1, 12, 16)) -> Volume:
    return Volume(np.ones((1, *sides), np.float32), None, np.zeros((0, 3), np.int32), (1.0, 1.0, 1.0), None, interval)


def maps_of(number: float, task: Quantification, shape: tuple[int, ...] = (3, 4)) -> torch.Tensor:
    """Maps that come to a number, each place alike; what both maps share says nothing."""
    usual, n = USUAL[task.target], int(np.prod(shape))
    evidence = {
        "squared": lambda: number / usual - 1,
        "poisson": lambda: np.log(np.expm1(number / n)) - np.log(np.expm1(usual / n)),
        "proportion": lambda: np.log(number / (1 - number)) - np.log(usual / (1 - usual)),
    }[task.loss_name]()
    return torch.stack([torch.full(shape, 0.7), torch.full(shape, 0.7 + float(evidence))])[None].double()


CASES = [("proportion", None, 0.3), ("proportion", "squared", 0.3), ("count", None, 4.0), ("count", "squared", 4.0)]


class TestNumber:
    @pytest.mark.parametrize(("target", "loss", "number"), CASES)
    def test_maps_become_the_number_that_they_say(self, target, loss, number):
        """
        By the mean of probabilities, the sum of a density, or a mean that is linear: the maps made by hand come back.
        """
        task = task_with(target, loss=loss)

        assert float(task.numbers(maps_of(number, task))) == pytest.approx(number)
        assert float(task.numbers(torch.zeros(1, 2, 3, 4))) == pytest.approx(USUAL[target], rel=1e-4)

    @pytest.mark.parametrize(("target", "loss", "number"), CASES)
    def test_formula_says_what_is_done(self, target, loss, number):
        """
        What an exported model's reader is told, worked out in NumPy, is the number.
        """
        task = task_with(target, loss=loss)
        maps = np.random.default_rng(0).normal(size=(2, 12))
        said = task.formula.partition(" over ")[0]
        names = {"e": maps[1] - maps[0], "n": 12, "exp": np.exp, "log": np.log, "mean": np.mean, "sum": np.sum}

        by_hand = eval(said, {"__builtins__": {}}, names)
        assert float(task.numbers(torch.from_numpy(maps)[None])) == pytest.approx(by_hand, rel=1e-5)

    def test_share_that_is_affected_is_the_mean_over_places(self):
        """
        A quarter of the places certain, the others certainly not: a quarter.
        """
        maps = torch.full((1, 2, 2, 4), -50.0)
        maps[0, 1, 0, :2] = 50.0
        maps[0, 0] = 0.0

        assert float(task_with().numbers(maps)) == pytest.approx(0.25)

    def test_counts_in_parts_of_an_image_add_up(self):
        """
        Twice as many places that say the same are twice as many lesions.
        """
        task = task_with("count")
        once = maps_of(4.0, task, (12, 16))
        evidence = once[:, 1] - once[:, 0]
        half = torch.where(torch.arange(16) < 8, evidence, torch.full_like(evidence, -200.0))

        assert float(task.numbers(torch.stack([0 * half, half], dim=1))) == pytest.approx(2.0)

    def test_slices_of_a_study_are_averaged(self):
        """
        In 2-D each slice is asked for the study's number.
        """
        task = task_with()
        volume = volume_of((0.2, 0.2), (2, 12, 16))
        prediction = torch.cat([maps_of(0.2, task), maps_of(0.4, task)]).movedim(0, 1).numpy()

        assert task.number(prediction) == pytest.approx(0.3)
        assert task.measure(prediction, volume)["absolute_error"] == pytest.approx(0.1)

    @pytest.mark.parametrize(("target", "evidence", "expected"), [("proportion", 40.0, 1.0), ("count", -40.0, 0.0)])
    def test_plain_regression_answers_with_numbers_that_exist(self, target, evidence, expected):
        """
        No share beyond the whole, no count below none.
        """
        maps = np.zeros((2, 1, 3, 4))
        maps[1] = evidence

        assert task_with(target, loss="squared").number(maps) == expected


class TestLoss:
    def test_proportion_is_judged_by_its_divergence_from_the_interval(self):
        """
        Kullback-Leibler divergence as SciPy has it from the nearest end, nothing within, both seen in one batch's mean.
        """
        task = task_with()
        below, within, above = (maps_of(p, task) for p in (0.1, 0.25, 0.6))
        target = torch.tensor([[0.2, 0.3]])
        expected = [entropy([0.2, 0.8], [0.1, 0.9]), 0.0, entropy([0.3, 0.7], [0.6, 0.4])]

        for maps, loss in zip((below, within, above), expected, strict=True):
            assert float(task.loss(maps, target)) == pytest.approx(loss, abs=1e-9, rel=1e-5)
        together = task.loss(torch.cat([below, within, above]), target.expand(3, 2))
        assert float(together) == pytest.approx(np.mean(expected), rel=1e-5)

    def test_count_is_judged_by_its_poisson_deviance(self):
        """
        Half the deviance, as NumPy has it; nothing within an interval.
        """
        task = task_with("count")
        for true, predicted in ((0.0, 2.0), (3.0, 1.5), (3.0, 3.0)):
            expected = predicted - true + (true * np.log(true / predicted) if true else 0.0)
            target = torch.tensor([[true, true]])
            assert float(task.loss(maps_of(predicted, task), target)) == pytest.approx(expected, abs=1e-6)
        assert float(task.loss(maps_of(12.0, task), torch.tensor([[10.0, 20.0]]))) == pytest.approx(0.0, abs=1e-6)

    @pytest.mark.parametrize("target", ["count", "proportion"])
    def test_plain_regression_looks_at_the_middle_alone(self, target):
        """
        The squared distance, in units of what is usual.
        """
        task = task_with(target, loss="squared")

        loss = float(task.loss(maps_of(0.4, task), torch.tensor([[0.1, 0.3]])))
        assert loss == pytest.approx((0.2 / USUAL[target]) ** 2, rel=1e-5)

    @pytest.mark.parametrize(("target", "loss", "number"), CASES)
    def test_every_loss_pulls_towards_the_label(self, target, loss, number):
        """
        And is finite with a gradient where a network is certain of the contrary.
        """
        task = task_with(target, loss=loss)
        maps = torch.zeros(1, 2, 3, 4, requires_grad=True)
        (gradient,) = torch.autograd.grad(task.loss(maps, torch.tensor([[number, number]])), maps)
        assert (gradient[:, 1] < 0).all()
        certain = torch.full((1, 2, 3, 4), -300.0)
        certain[:, 0] = 300.0
        assert torch.isfinite(task.loss(certain, torch.tensor([[number, number]])))


class TestDraw:
    def test_sample_has_the_window_and_the_interval(self):
        """
        One slice and both ends.
        """
        sample = task_with().draw(volume_of((0.05, 0.1), (3, 12, 16)), np.random.default_rng(0))

        assert sample.image.shape == (1, 12, 16)
        np.testing.assert_allclose(sample.target, [0.05, 0.1])
        assert sample.target.dtype == np.float32

    def test_study_without_a_number_is_not_used(self):
        """
        It can be neither trained on nor measured.
        """
        with pytest.raises(ValueError, match="trained"):
            task_with().draw(volume_of(None), np.random.default_rng(0))
        with pytest.raises(ValueError, match="measured"):
            task_with().measure(np.zeros((2, 1, 3, 4)), volume_of(None))


@pytest.mark.parametrize(("target", "loss"), [("count", None), ("count", "squared"), ("proportion", "squared")])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_every_target_and_loss_keeps_the_contracts(target, loss, dimensions):
    """
    What holds for the example of the contracts holds for the others.
    """
    task = task_with(target, dimensions, loss, data={"patch": [8] * dimensions})
    image, interval = contracts.example_batch(task)
    contracts.assert_loss_is_mean_of_samples(task, task.build_network()(image), interval)
    contracts.assert_measures_what_it_names(task)
    contracts.assert_ranges_are_of_means(task)


class TestSummary:
    ROWS = (
        {"predicted": 0.2, "reference": 0.1, "absolute_error": 0.1, "ratio": 0.5},
        {"predicted": 0.4, "reference": 0.4, "absolute_error": 0.0, "ratio": 1.0},
        {"predicted": 0.5, "reference": 0.7, "absolute_error": 0.2, "ratio": 0.7},
    )

    def test_agreement_is_that_of_all_patients_together(self):
        """
        ICC(A,1) by two-way mean squares in NumPy, and bias; no mean over patients.
        """
        x = np.array([[row["predicted"], row["reference"]] for row in self.ROWS])
        rows = 2 * np.var(x.mean(axis=1), ddof=1)
        columns = 3 * np.var(x.mean(axis=0), ddof=1)
        rest = (2 * np.var(x.ravel()) * 3 - rows * 2 - columns) / 2
        found = task_with().summary(self.ROWS)

        assert found["icc"] == pytest.approx((rows - rest) / (rows + rest + 2 / 3 * (columns - rest)))
        assert found["bias"] == pytest.approx(-0.1 / 3)
        assert found["absolute_error"] == pytest.approx(0.1)
        assert found["ratio"] == pytest.approx(2.2 / 3)

    def test_agreement_is_left_out_where_it_is_undefined(self):
        """
        One patient agrees with nobody.
        """
        assert "icc" not in task_with().summary(self.ROWS[:1])

    def test_under_privacy_the_bounded_ratio_alone_is_given(self):
        """
        One patient could move an agreement by any amount.
        """
        task = task_with(privacy=TWO_STEPS, strategy={"release": "last"})

        assert task.headline == "ratio"
        assert set(task.summary(self.ROWS)) == {"ratio"} == set(task.metrics) == set(task.ranges)


def test_picture_says_both_numbers():
    """
    In words, with the evidence on the slice where there is most.
    """
    task = task_with()
    picture = task.picture(maps_of(0.3, task).movedim(0, 1).numpy(), volume_of((0.2, 0.4)))

    assert picture.caption == "30.0%, taken for 30.0%"
    assert picture.heat is not None
    assert picture.heat.max() == 1.0
