"""A site's side of each strategy: what it trains from, what of it leaves, and what it keeps for itself.

The server's side is in ``server/strategies``. What is kept lies in ``own`` and is part of no release.

Under ``[privacy]`` nothing that is kept may steer what leaves, unless it came out of noised steps itself: one patient
could otherwise move a released gradient by more than the clip. The normalisation layers of FedBN are trained by the same
noised steps as everything else, SCAFFOLD's control variates are computed from weights that have left, and Ditto's own
model, which no noise has touched, steers nothing but itself.
"""

from __future__ import annotations

import logging

import numpy as np
import torch

from client.training import PatientSource, Trainer
from shared_models.errors import FederadError
from shared_models.local_layers import staying
from shared_models.messages import Ask
from shared_models.schedule import learning_rate, local_steps
from shared_models.weights import Weights, difference

log = logging.getLogger(__name__)


class Side:
    """One question at one site; this one, for FedAvg and its relatives, adds nothing.

    Parameters
    ----------
    trainer
        Of the plan.
    ask
        The question.
    kept
        What this site kept of the run before it; empty in its first round.
    site
        Its name.
    """

    def __init__(self, trainer: Trainer, ask: Ask, kept: Weights, site: str) -> None:
        self.trainer, self.plan, self.ask, self.own, self.site = trainer, trainer.plan, ask, kept, site

    @property
    def weights(self) -> Weights:
        """What is measured, and where training starts."""
        return self.ask.weights

    @property
    def correction(self) -> Weights:
        """What is added to every gradient; empty for nothing."""
        return {}

    def leaving(self, update: Weights) -> Weights:
        """The part of an update that leaves."""
        return update

    def kept(self, update: Weights, cohort: PatientSource, n_patients: int) -> Weights:
        """What this site keeps after training; empty for nothing.

        Parameters
        ----------
        update
            All of it: new minus old weights.
        cohort
            Who trained.
        n_patients
            How many they were; under ``[privacy]`` it has no part in this.
        """
        return {}

    def own_metrics(self, cohort: PatientSource) -> dict[str, float]:
        """What the site's own model reaches on its own test patients; empty where there is no such model."""
        return {}


class FedBNSide(Side):
    """Normalisation layers stay at the site (Li et al. 2021, arXiv:2102.07623, algorithm 1)."""

    @property
    def weights(self) -> Weights:
        """The shared weights with this site's own normalisation layers."""
        return self.ask.weights | self.own

    def leaving(self, update: Weights) -> Weights:
        """Everything else."""
        stays = staying(self.plan, self.trainer.network)
        return {name: array for name, array in update.items() if name not in stays}

    def kept(self, update: Weights, cohort: PatientSource, n_patients: int) -> Weights:
        """The normalisation layers as they are now."""
        return {name: self.weights[name] + update[name] for name in staying(self.plan, self.trainer.network)}


class ScaffoldSide(Side):
    """Gradients corrected for how this site differs from all (Karimireddy et al. 2020, arXiv:1910.06378, algorithm 1).

    The control variate of the site is that of option II. It follows from the update, the control variate that the server
    sent and public numbers, so the server can compute what it needs of it and nothing more leaves than with FedAvg.
    """

    @property
    def correction(self) -> Weights:
        """``c - c_i``.

        Raises
        ------
        FederadError
            M210 if the server's control variate does not fit the network.
        """
        control = self.ask.control
        if mismatch := difference(control, {name: array.shape for name, array in self.ask.weights.items()}):
            raise FederadError(
                "M210",
                happened=f"The control variate does not fit the network: {mismatch}.",
                because="It belongs to another plan or another version of federad.",
                remedies=("check that both sides run the same version of federad",),
            )
        return {name: array - self.own[name] for name, array in control.items()} if self.own else dict(control)

    def kept(self, update: Weights, cohort: PatientSource, n_patients: int) -> Weights:
        """``c_i - c - update / (steps * learning rate)``."""
        n_steps = local_steps(self.plan, n_patients)
        if not n_steps:
            return self.own
        scale = n_steps * learning_rate(self.plan, self.ask.question.round)
        return {
            name: (-self.correction[name].astype(np.float64) - array / scale).astype(np.float32)
            for name, array in update.items()
        }


class DittoSide(Side):
    """A model of the site's own, drawn to the shared one (Li et al. 2021, arXiv:2012.04221, algorithm 1)."""

    def kept(self, update: Weights, cohort: PatientSource, n_patients: int) -> Weights:
        """The own model after this round.

        Under ``[privacy]`` whatever goes wrong with it leaves it as it was: were it to end the round, the round's fate
        would tell about a patient whom no noise hides.
        """
        try:
            return self.trainer.train_own(
                self.own or self.ask.weights,
                cohort,
                towards=self.ask.weights,
                strength=self.plan.strategy.personal_pull or 0.0,
                seed=self.ask.seed,
                site=self.site,
                round_=self.ask.question.round,
            )
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if self.plan.privacy is None:
                raise
            log.warning("%s: its own model stays as it was (%s)", self.site, type(error).__name__)
            return self.own

    def own_metrics(self, cohort: PatientSource) -> dict[str, float]:
        """The task's metrics of the own model, each with "own:" before its name; none under ``[privacy]``."""
        if not self.own or self.plan.privacy is not None:
            return {}
        measured = self.trainer.measure(self.own, cohort, "test")
        return {f"own:{name}": value for name, value in self.trainer.task.summary(list(measured.values())).items()}


SIDES: dict[str, type[Side]] = {"fedbn": FedBNSide, "scaffold": ScaffoldSide, "ditto": DittoSide}
"""By the plan's ``strategy.name``; any other adds nothing."""


def side_of(trainer: Trainer, ask: Ask, kept: Weights, site: str) -> Side:
    """The site's side of the strategy that the trainer's plan names."""
    return SIDES.get(trainer.plan.strategy.name, Side)(trainer, ask, kept, site)
