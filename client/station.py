"""The station: holds a hospital's data, device and history, and answers questions.

A question arrives as bytes and an answer leaves as bytes; everything in between happens here, and what leaves has passed
the gate. The courier that carries the bytes sees neither data nor reasons: trouble inside a station leaves as one word
from a closed list, and is written to the station's own log.

A station lives in one folder and can be reopened from it in any process::

    site.toml            what the hospital decides (``site``)
    secret               key of all hashes of patients, 32 random bytes
    catalogue.sqlite     what was found in the data folder (``data.catalogue``)
    plans/<sha256>.json  plans approved here
    cohorts/<key>/       patients, splits and prepared volumes of plans that look at the data alike (``data.cohort``)
    answers/             what has been answered (``answers``)
"""

from __future__ import annotations

import fcntl
import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from client.answers import AnsweredBeforeError, AnswerStore, OtherWeightsError
from client.data.catalogue import Catalogue
from client.data.cohort import Cohort, cohort_key
from client.gate import Gate, Release
from client.site import SiteConfig
from client.training import Trainer, mean_metrics, resident_trainer
from shared_models.errors import FederadError
from shared_models.messages import Ask, Question, Refusal, decode_ask
from shared_models.plan import Plan

log = logging.getLogger(__name__)

CATALOGUE = "catalogue.sqlite"

OnProgress = Callable[[int, int], None]
"""Told (done, in all) while something long goes on."""


class _RefusedError(Exception):
    """A question that gets a word instead of an answer."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal


class Station:
    """One hospital's station, opened from its folder.

    Parameters
    ----------
    folder
        A folder made by :meth:`create`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = SiteConfig.load(folder)
        self._gate = Gate(self.config.name)
        self._answers = AnswerStore(folder / "answers")

    @classmethod
    def create(cls, folder: Path, config: SiteConfig, *, secret: bytes | None = None) -> Self:
        """Make a station's folder.

        Parameters
        ----------
        secret
            Key of all hashes of patients. Random unless given; an emulated hospital gives one derived from the seed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        config.save(folder)
        key_file = folder / "secret"
        if secret is not None or not key_file.exists():
            key_file.touch(mode=0o600)
            key_file.write_bytes(secret or secrets.token_bytes(32))
        return cls(folder)

    @property
    def name(self) -> str:
        """The site's name."""
        return self.config.name

    def approve(self, plan: Plan, on_progress: OnProgress | None = None) -> Cohort:
        """Let ``plan`` train here: catalogue the data, prepare its cohort, remember the plan.

        Raises
        ------
        FederadError
            C140 to C143 if the data folder, the cohort or the cache cannot be used.
        """
        secret = (self.folder / "secret").read_bytes()
        catalogue = Catalogue.build(self.folder / CATALOGUE, Path(self.config.data), secret=secret)
        cohort = Cohort.build(self._cohort_folder(plan), catalogue, plan, secret=secret, on_progress=on_progress)
        plans = self.folder / "plans"
        plans.mkdir(exist_ok=True)
        (plans / f"{plan.sha256}.json").write_text(plan.canonical_json(), encoding="utf-8")
        return cohort

    def cohort(self, plan: Plan) -> Cohort:
        """The cohort prepared for ``plan``; C143 if it was never approved here."""
        return Cohort.open(self._cohort_folder(plan))

    def catalogue(self) -> Catalogue:
        """What was found in the data folder; C143 if nobody looked yet."""
        return Catalogue.open(self.folder / CATALOGUE)

    def answer(self, data: bytes) -> bytes:
        """Answer a question: the same bytes whenever the same question comes."""
        question: Question | None = None
        try:
            ask = _readable(data)
            question = ask.question
            with self._alone():
                return self._stored(question) or self._answer(ask)
        except _RefusedError as refused:
            log.warning("%s: refused %s: %s", self.name, _named(question), refused.refusal)
            return self._gate.refuse(question, refused.refusal)
        except FederadError as error:
            log.warning("%s: declined %s: %s", self.name, _named(question), error)
            return self._gate.refuse(question, "declined")
        except Exception:
            log.exception("%s: failed at %s", self.name, _named(question))
            return self._gate.refuse(question, "failed")

    def _answer(self, ask: Ask) -> bytes:
        plan = self._approved_plan(ask.question.plan_sha256)
        trainer = resident_trainer(plan, self.config.device)
        releases = self._work(ask, trainer, self.cohort(plan))
        answer = self._gate.release(ask.question, releases)
        self._answers.keep(ask.question, answer)
        return answer

    def _work(self, ask: Ask, trainer: Trainer, cohort: Cohort) -> list[Release]:
        question = ask.question
        measured = trainer.measure(ask.weights, cohort, "test" if question.kind == "test" else "validation")
        metrics = mean_metrics(list(measured.values()))
        counts = {"measured": len(measured)}
        if question.kind != "train":
            return [Release("metric", metrics), Release("count", counts)]
        if not cohort.patients("train"):
            raise _RefusedError("no-patients")
        trained = trainer.train(ask.weights, cohort, seed=ask.seed, site=self.name, round_=question.round)
        return [
            Release("update", trained.update),
            Release("metric", metrics | {"training_loss": trained.loss}),
            Release("count", counts | {"trained": trained.n_patients}),
        ]

    def _stored(self, question: Question) -> bytes | None:
        try:
            return self._answers.find(question)
        except OtherWeightsError:
            raise _RefusedError("other-weights") from None
        except AnsweredBeforeError:
            raise _RefusedError("answered-before") from None

    def _approved_plan(self, sha256: str) -> Plan:
        known = {file.stem: file for file in (self.folder / "plans").glob("*.json")}
        if sha256 not in known:
            raise _RefusedError("unknown-plan")
        return Plan.model_validate_json(known[sha256].read_text(encoding="utf-8"))

    def _cohort_folder(self, plan: Plan) -> Path:
        return self.folder / "cohorts" / cohort_key(plan)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One question at a time, also when two processes have this station open."""
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _readable(data: bytes) -> Ask:
    try:
        return decode_ask(data)
    except FederadError:
        raise _RefusedError("unreadable") from None


def _named(question: Question | None) -> str:
    return f"{question.kind} of round {question.round}" if question else "a message"
