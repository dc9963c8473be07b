"""What a site keeps for itself from round to round of one run: its own model, its own layers, its control variate.

It lies in the station's folder and never leaves. What a question finds is what was kept by an earlier round, whatever
was begun since: asked again after a crash, a site trains from the same and gives the same bytes.

    own/<run and plan>/000007.safetensors    as it is after round 7; the round before it is kept beside it
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import numpy as np

from client.processes import write_durably
from shared_models.errors import FederadError
from shared_models.messages import Question
from shared_models.plan import OF_EACH_SITE, Plan
from shared_models.weights import Weights, decode, encode, weights_sha256

log = logging.getLogger(__name__)

FOLDER = "own"


class OwnState:
    """What is kept of one run of one plan.

    Parameters
    ----------
    station
        The station's folder.
    run, plan_sha256
        Of the questions.
    """

    def __init__(self, station: Path, run: str, plan_sha256: str) -> None:
        name = hashlib.sha256(json.dumps([run, plan_sha256]).encode()).hexdigest()[:32]
        self._folder = station / FOLDER / name

    @property
    def folder(self) -> Path:
        """Where it is kept; not there where nothing is."""
        return self._folder

    def before(self, question: Question) -> Weights:
        """What holds when a question is answered: after the round before it, or after its own if it only measures.

        Empty where this site has not trained yet.

        Raises
        ------
        FederadError
            C134 if it is damaged.
        """
        last = question.round - 1 if question.kind == "train" else question.round
        path = self._newest(last)
        return {} if path is None else _read(path)

    def keep(self, question: Question, arrays: Weights) -> None:
        """Make durable what holds after a round; of the rounds before, the one that it was made from is kept.

        A value that is not finite would spoil all rounds to come, so then everything stays as it was before.
        """
        if not all(np.isfinite(array).all() for array in arrays.values()):
            log.warning("training did not stay finite: what this site keeps for itself is that of the round before")
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"round": question.round, "sha256": weights_sha256(arrays)}, sort_keys=True)
        before = self._newest(question.round - 1)
        write_durably(self._folder / _name(question.round), encode(arrays, text))
        for path in self._folder.glob("*.safetensors"):
            if before is not None and path.name < before.name:
                path.unlink(missing_ok=True)

    def _newest(self, last: int) -> Path | None:
        """The newest that is no newer than round ``last``."""
        kept = sorted(path for path in self._folder.glob("*.safetensors") if path.name <= _name(last))
        return kept[-1] if kept else None


def own_model(station: Path, run: str, plan: Plan, shared: Weights) -> Weights | None:
    """The model of a run as this site uses it: the shared one with what stayed here, or Ditto's own in its place.

    None where the strategy keeps no part of a model at the sites, or where this site kept none.

    Raises
    ------
    FederadError
        C134 if what was kept is damaged.
    """
    if plan.strategy.name not in OF_EACH_SITE:
        return None
    kept = OwnState(station, run, plan.sha256).before(Question(run, plan.rounds, "test", plan.sha256, ""))
    return shared | kept if kept else None


def _name(round_: int) -> str:
    return f"{round_:020d}.safetensors"


def _read(path: Path) -> Weights:
    try:
        arrays, text = decode(path.read_bytes())
        if json.loads(text)["sha256"] == weights_sha256(arrays):
            return arrays
        why = "its values are not those that were written"
    except (OSError, FederadError, ValueError, KeyError, TypeError) as error:
        why = f"it cannot be read ({type(error).__name__})"
    raise FederadError(
        "C134",
        happened=f"What this site keeps for itself of a run is damaged: {path.parent.name}/{path.name}, {why}.",
        because="The next round is trained from it, and from anything else it would be another model.",
        remedies=(
            f"put the folder {FOLDER} of a backup back (federad-site restore)",
            f"or delete {FOLDER}/{path.parent.name}: this site then begins its own part anew in the next round",
        ),
    )
