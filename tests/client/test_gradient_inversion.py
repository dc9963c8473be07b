"""Can the image be read off what leaves? An attacker who knows the weights, the label and the method tries to.

One round of one patient with one image is the most that an attacker can hope for. Two attacks: the gradient of a fully
connected first layer holds its input as a factor, exactly (Geiping et al. 2020, arXiv:2003.14053, proposition 3.1); for any
other network an image is looked for whose gradient has the same direction (the same paper, equation 4).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_private_training import Scripted, private_plan
from test_training import cohort_of, plan_with, start_of
from torch import Tensor, nn

from client.gate import Gate, Release
from client.ledger import Spent
from client.policy import Policy, cost_of
from client.privacy import rounded_gaussian
from client.training import Trainer
from shared_models.messages import Question, decode_answer
from shared_models.plan import Plan
from shared_models.task import task_for
from shared_models.weights import Weights, load_weights

DECLARED = 100

EPSILON = 8.0
"""The largest that a hospital permits unless it says otherwise: the least noise."""


class SeededNoise(Scripted):
    """Everybody takes part, with noise of the right size that is the same each time."""

    def __init__(self) -> None:
        super().__init__()
        self._words = np.random.default_rng(0)

    def gaussian(self, n: int, sigma: float) -> NDArray[np.int64]:
        return rounded_gaussian(self._words.integers(0, 2**64, n, dtype=np.uint64), sigma, lambda: 2**127)


def build_fully_connected(plan: Plan) -> nn.Module:
    """A network whose first layer sees all pixels."""
    labels, (y, x) = len(plan.task.labels), plan.data.patch
    return nn.Sequential(
        nn.Flatten(), nn.Linear(y * x, 16), nn.Tanh(), nn.Linear(16, labels * y * x), nn.Unflatten(1, (labels, y, x))
    )


@pytest.fixture
def fully_connected(monkeypatch):
    monkeypatch.setattr(type(task_for(plan_with())), "build_network", lambda self: build_fully_connected(self.plan))


ONE = {"samples_per_patient": 1, "optimizer": "sgd", "learning_rate": 0.1, "flips": False, "foreground": 0.0}


def plain() -> Plan:
    return plan_with({**ONE, "batch_size": 1, "epochs": 1})


def private() -> Plan:
    """One patient a step, one step a round, twenty rounds, epsilon 8."""
    privacy = {"noise_multiplier": None, "epsilon": EPSILON, "patients_per_step": 1, "steps_per_round": 1, "clip": 1.0}
    return private_plan(privacy=privacy, training=ONE).model_copy(update={"rounds": 20})


def what_leaves(plan: Plan) -> Weights:
    """The update of a site with one patient, as the server decodes it."""
    trainer, cohort = Trainer(plan, "cpu", randomness=SeededNoise()), cohort_of(plan, 1)
    if plan.privacy is None:
        update = trainer.train(start_of(plan), cohort, seed=0, site="site-1", round_=1).update
    else:
        noise = cost_of(plan, DECLARED, Spent()).noise_multiplier
        update = trainer.train_private(start_of(plan), cohort, round_=1, declared_size=DECLARED, noise_multiplier=noise)
    is_private = plan.privacy is not None
    question = Question("run-1", 1, "train", plan.sha256, "a" * 64)
    released = Gate("site-1", Policy(without_privacy=True)).release(
        question, [Release("update", update, is_noised=is_private)], is_private=is_private
    )
    return decode_answer(released.answer).update


def image_and_target(plan: Plan) -> tuple[Tensor, Tensor]:
    """What the patient's only sample is."""
    volume = cohort_of(plan, 1).volumes["p0-s0"]
    return torch.from_numpy(volume.image[:, 0])[None], torch.from_numpy(volume.label[None].astype(np.int64))


def read_off(update: Weights) -> NDArray[np.float64]:
    """The input of a fully connected first layer: each row of its gradient is the input times that row's bias."""
    weight, bias = (update[name].astype(np.float64) for name in ("1.weight", "1.bias"))
    return (bias @ weight) / (bias @ bias)


def psnr_db(found: NDArray[np.floating], image: Tensor) -> float:
    """Peak signal to noise ratio [dB]; infinity for the image itself."""
    truth = image.numpy().ravel().astype(np.float64)
    error = ((found.ravel() - truth) ** 2).mean()
    return 10 * math.log10((truth.max() - truth.min()) ** 2 / error) if error else math.inf


def looked_for(plan: Plan, update: Weights, target: Tensor, *, n_steps: int = 800) -> NDArray[np.float64]:
    """The image whose gradient points where the update points back to: cosine distance, by Adam on its sign."""
    task = task_for(plan)
    network = task.build_network()
    load_weights(network, start_of(plan))
    parameters = list(network.parameters())
    wanted = torch.cat([torch.from_numpy(-update[name]).ravel() for name, _ in network.named_parameters()])
    wanted = wanted / wanted.norm()
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((1, 1, *plan.data.patch), generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([image], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for _ in range(n_steps):
        loss = task.loss(network(image), target)
        gradient = torch.cat([p.ravel() for p in torch.autograd.grad(loss, parameters, create_graph=True)])
        distance = 1 - (gradient @ wanted) / gradient.norm()
        (image.grad,) = torch.autograd.grad(distance, [image])
        optimizer.step()
        schedule.step()
    return image.detach().numpy().astype(np.float64)


def correlation(found: NDArray[np.floating], image: Tensor) -> float:
    return float(np.corrcoef(found.ravel(), image.numpy().ravel())[0, 1])


@pytest.mark.usefixtures("fully_connected")
class TestFirstLayer:
    def test_without_privacy_the_image_is_read_off(self):
        """
        To 60 dB and more, which is every digit: this is what an exact update tells of a patient alone.
        """
        image, _ = image_and_target(plain())

        assert psnr_db(read_off(what_leaves(plain())), image) > 60

    def test_clipping_alone_hides_nothing(self, monkeypatch):
        """
        It is the noise that protects: a shorter gradient points the same way.
        """
        monkeypatch.setattr(SeededNoise, "gaussian", Scripted.gaussian)
        image, _ = image_and_target(private())

        assert psnr_db(read_off(what_leaves(private())), image) > 40


def test_with_privacy_the_image_stays_here(fully_connected):
    """
    At epsilon 8, the only patient in the step: below 12 dB, and no likeness.
    """
    image, _ = image_and_target(private())
    found = read_off(what_leaves(private()))

    assert psnr_db(found, image) < 12
    assert abs(correlation(found, image)) < 0.4


class TestAnyNetwork:
    def test_without_privacy_an_image_is_found_that_is_the_patients(self):
        """
        The house's own U-Net: nearly the patient's image, but for brightness and contrast.
        """
        image, target = image_and_target(plain())

        assert correlation(looked_for(plain(), what_leaves(plain()), target), image) > 0.8

    def test_with_privacy_what_is_found_is_not_the_patients(self):
        """
        The same search on the private update ends elsewhere.
        """
        image, target = image_and_target(private())

        assert abs(correlation(looked_for(private(), what_leaves(private()), target), image)) < 0.4
