"""What both sides reckon of a site's training from public numbers: step sizes, numbers of steps, and when moments leave."""

from __future__ import annotations

import math

from shared_models.plan import Plan


def learning_rate(plan: Plan, round_: int) -> float:
    """The learning rate of a round; constant within it.

    With ``schedule = "cosine"`` it falls along half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983, without
    restarts) from the plan's value in round 1 to almost nothing in the last.
    """
    if plan.training.schedule == "constant":
        return plan.training.learning_rate
    return plan.training.learning_rate * 0.5 * (1 + math.cos(math.pi * (round_ - 1) / plan.rounds))


def moments_rounds(plan: Plan) -> range:
    """The rounds in which sites release moments of features; none in most plans.

    From the round before the first in which features are moved, every ``moments_every`` rounds, and not in the last one,
    after which no discriminator is used.
    """
    table = plan.adaptation
    if table is None or not plan.asks_for_moments:
        return range(0)
    first = next(r for r in range(1, plan.rounds + 1) if (r - 1) / max(plan.rounds - 1, 1) > table.warm_up)
    return range(first - 1, plan.rounds, table.moments_every)


def local_steps(plan: Plan, n_patients: int) -> int:
    """Steps of the optimiser that a site with ``n_patients`` training patients takes in a round.

    Under ``[privacy]`` the plan says it, and the number of patients, which nobody knows, has no part in it.
    """
    if plan.privacy is not None:
        return plan.privacy.steps_per_round
    training = plan.training
    return training.epochs * math.ceil(n_patients * training.samples_per_patient / training.batch_size)
