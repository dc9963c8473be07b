"""Where training begins: at fresh weights, or at a released model."""

from __future__ import annotations

import hashlib
from pathlib import Path

from shared_models.errors import FederadError
from shared_models.fingerprint import blank
from shared_models.plan import Plan
from shared_models.task import task_for
from shared_models.weights import Weights, decode, difference, initial_weights


def first_weights(plan: Plan, seed: int, file: Path | None = None) -> Weights:
    """The weights of which the first round is asked.

    Parameters
    ----------
    seed
        From which fresh weights derive.
    file
        The model whose SHA-256 the plan names as ``strategy.start``; not read for a plan that names none.

    Returns
    -------
    Weights
        Of the network; for a plan that asks for a fingerprint, one of nobody.

    Raises
    ------
    FederadError
        M210 if it is missing, is another model, or fits another network; M211 if it is no model.
    """
    if plan.asks == "fingerprint":
        return blank()
    task = task_for(plan)
    wanted = plan.strategy.start
    if wanted is None:
        return initial_weights(task.build_network, seed)
    if file is None:
        raise _unfit("the plan names one, and none was given")
    data = file.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != wanted:
        raise _unfit(f"the plan begins at the model with SHA-256 {wanted[:12]}..., and this file has {found[:12]}...")
    fresh = initial_weights(task.build_network, seed)
    weights = with_part_of(fresh, decode(data)[0])
    shapes = {name: array.shape for name, array in fresh.items()}
    if mismatch := difference(weights, shapes):
        raise _unfit(f"{mismatch}, for the plan's network")
    return weights


def with_part_of(fresh: Weights, begun: Weights) -> Weights:
    """A model with a fresh discriminator where the plan has one and the model none, or without the one that it has.

    Neither changes what the model predicts; weights that differ otherwise are returned as they are.
    """
    own, theirs = ({name for name in weights if name.startswith("discriminator.")} for weights in (fresh, begun))
    if own and not theirs:
        return {f"network.{name}": array for name, array in begun.items()} | {name: fresh[name] for name in sorted(own)}
    if theirs and not own:
        return {name.removeprefix("network."): array for name, array in begun.items() if name not in theirs}
    return begun


def _unfit(why: str) -> FederadError:
    return FederadError(
        "M210",
        happened=f"Training cannot begin at this model: {why}.",
        because="The sites agreed on a plan that begins at one model and no other.",
        remedies=(
            "give the file model.safetensors that the plan's start names: sha256sum model.safetensors",
            "or write its SHA-256 as start under [strategy], which makes another plan",
        ),
    )
