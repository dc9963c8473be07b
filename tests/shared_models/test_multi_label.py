"""Several labels for a study: each is learned, measured and shown by itself."""

from __future__ import annotations

from dataclasses import replace

import contracts
import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn import metrics as reference

from client.network_contract import check_network
from shared_models.errors import FederadError
from shared_models.plan import Plan, PrivacyTable
from shared_models.task import task_for
from shared_models.tasks.multi_label import MultiLabel
from shared_models.volume import Volume

CPU = torch.device("cpu")
LABELS = ["mass", "effusion", "nodule"]


def task_with(dimensions: int = 2, network: str = "resnet", **tables) -> MultiLabel:
    tables.setdefault("data", {"patch": [8, 8, 8][-dimensions:]})
    table = {"labels": LABELS, "target": "multi-label"}
    made = task_for(contracts.example_plan("classification", network, dimensions=dimensions, task=table, **tables))
    assert isinstance(made, MultiLabel)
    return made


def volume_of(category: int | None) -> Volume:
    image = np.random.default_rng(0).normal(size=(1, 2, 8, 8)).astype(np.float32)
    return Volume(image, None, np.zeros((0, 3), np.int32), (1.0, 1.0, 1.0), category)


def maps_of(logits) -> np.ndarray:
    """Class maps of two slices that say the same everywhere."""
    return np.broadcast_to(np.asarray(logits, np.float32)[:, None, None, None], (len(logits), 2, 4, 4)).copy()


def patients(n: int = 60):
    """Labels and logits that know something about them."""
    rng = np.random.default_rng(5)
    has = rng.random((n, 3)) < (0.2, 0.5, 0.4)
    return has, 2 * has - 1 + rng.normal(0, 1.5, size=(n, 3))


def rows_of(task, has, logits):
    bits = (has * (1, 2, 4)).sum(axis=1)
    return [task.measure(maps_of(row), volume_of(int(k))) for k, row in zip(bits, logits, strict=True)]


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("network", ["resnet", "scan-plane", "densenet", "efficientnet"])
def test_contracts_hold_as_for_one_label(dimensions, network):
    """
    Losses are means over samples, what is named is measured, patients stay apart, and what may leave with noise is a mean.
    """
    task = task_with(dimensions, network)
    image, target = contracts.example_batch(task)
    made = task.build_network()

    contracts.assert_output_fits_the_task(task, made, image)
    contracts.assert_loss_is_mean_of_samples(task, made(image), target)
    contracts.assert_ranges_are_of_means(task)
    check_network(made, task)


def test_loss_is_binary_cross_entropy_of_each_label_with_its_weight():
    """
    The mean over labels and samples, each label against not having it.
    """
    task = task_with(training={"class_weights": [1.0, 2.0, 0.5]})
    has, logits = patients(7)
    output = torch.from_numpy(logits.astype(np.float32))[:, :, None, None].repeat(1, 1, 4, 4)
    each = -np.log(np.where(has, expit(logits), 1 - expit(logits)))

    found = task.loss(output, torch.from_numpy(has.astype(np.float32)))
    assert float(found) == pytest.approx((each * (1.0, 2.0, 0.5)).mean(), rel=1e-5)


def test_sample_has_a_place_for_every_label():
    """
    1 where the study has it; a study without any has none.
    """
    task, rng = task_with(), np.random.default_rng(0)

    np.testing.assert_array_equal(task.draw(volume_of(0b101), rng).target, [1, 0, 1])
    np.testing.assert_array_equal(task.draw(volume_of(0), rng).target, [0, 0, 0])
    with pytest.raises(ValueError, match="without labels"):
        task.draw(volume_of(None), rng)


def test_metrics_are_those_of_each_label_by_itself():
    """
    Areas, precision, balanced accuracy and F1 as another library computes them for each label, and their means.
    """
    task = task_with()
    has, logits = patients()
    found = task.summary(rows_of(task, has, logits))
    p = expit(logits)
    auc = [reference.roc_auc_score(has[:, k], p[:, k]) for k in range(3)]

    assert [found[f"auc: {name}"] for name in LABELS] == pytest.approx(auc)
    assert found["auc"] == pytest.approx(np.mean(auc))
    assert found["average_precision"] == pytest.approx(reference.average_precision_score(has, p, average="macro"))
    assert found["f1"] == pytest.approx(reference.f1_score(has, p >= 0.5, average="macro"))
    balanced = [reference.balanced_accuracy_score(has[:, k], p[:, k] >= 0.5) for k in range(3)]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(balanced))
    assert found["accuracy"] == pytest.approx(1 - reference.hamming_loss(has, p >= 0.5))


def test_label_that_nobody_has_is_left_out_of_the_means():
    """
    An area of a label without patients on both sides is none; without any such label there are no areas at all.
    """
    task = task_with()
    has, logits = patients()
    has[:, 2] = False
    found = task.summary(rows_of(task, has, logits))

    assert "auc: nodule" not in found
    assert found["auc"] == pytest.approx((found["auc: mass"] + found["auc: effusion"]) / 2)
    assert "auc" not in task.summary(rows_of(task, has[:1], logits[:1]))


def test_heat_is_the_labels_own_and_points_at_the_outline():
    """
    What speaks for one label does not speak against another; a hit is the hottest place of a label that is there.
    """
    task = task_with()
    maps = maps_of([-3.0, -3.0, -3.0])
    maps[0, 1, 0, 0], maps[1, 0, 3, 3] = 6.0, 6.0
    outline = np.zeros((2, 8, 8), np.uint8)
    outline[1, :2, :2] = 1
    volume = replace(volume_of(0b001), label=outline)

    assert np.unravel_index(task.heat(maps, volume, 0).argmax(), (2, 8, 8))[0] == 1
    assert task.measure(maps, volume)["hit"] == 1.0
    assert task.measure(maps, replace(volume, category=0b010))["hit"] == 0.0
    assert task.measure(maps, replace(volume, category=0))["outlined"] == 0.0
    assert "mass" in task.picture(maps, volume).caption


def test_under_privacy_means_alone_are_measured():
    """
    Areas are of nobody's own, so they do not leave with noise.
    """
    plan = task_with().plan
    privacy = PrivacyTable(noise_multiplier=1.0, patients_per_step=1, steps_per_round=1)

    assert "auc" in task_for(plan).metrics
    assert set(task_for(plan.model_copy(update={"privacy": privacy})).metrics) == {"accuracy", "log_likelihood"}


@pytest.mark.parametrize(
    ("tables", "key"),
    [
        ({"training": {"balanced": True}}, "training.balanced"),
        ({"adaptation": {"adversarial": "scanner", "conditional": True}}, "adaptation.conditional"),
        ({"task": {"labels": [f"finding {n}" for n in range(31)], "target": "multi-label"}}, "task.labels"),
    ],
)
def test_what_is_about_one_label_is_refused_with_several(tables, key):
    """
    P103 names the key, and nothing is ignored in silence.
    """
    tables = {"task": {"labels": LABELS, "target": "multi-label"}, **tables}
    with pytest.raises(FederadError, match="P103") as error:
        contracts.example_plan("classification", **tables)
    assert key in str(error.value)
    assert isinstance(contracts.example_plan("classification"), Plan)
