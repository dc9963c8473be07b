"""The station: holds a hospital's data, device and history, and answers questions.

A question arrives as bytes and an answer leaves as bytes; everything in between happens here, and what leaves has passed
the gate. The courier that carries the bytes sees neither data nor reasons: trouble inside a station leaves as one word
from a closed list, and is written to the station's own log.

A station lives in one folder and can be reopened from it in any process::

    site.toml            what the hospital decides (``site``)
    secret               key of all hashes of patients, 32 random bytes
    consortium.json      whose plans are listened to, once the site has enrolled (``plans``)
    catalogue.sqlite     what was found in the data folder (``data.catalogue``)
    plans/               plans offered, approved and refused here (``plans``)
    cohorts/<key>/       patients, splits and prepared volumes of plans that look at the data alike (``data.cohort``)
    answers/             what has been answered (``answers``)
    outbox.sqlite        what waits to be told to the operator (``outbox``)
    audit.jsonl          what has left, and what was refused (``audit``)
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np

from client import audit
from client.answers import AnsweredBeforeError, AnswerStore, OtherWeightsError
from client.audit import AuditLog
from client.data.catalogue import Catalogue
from client.data.cohort import Cohort, cohort_key
from client.gate import TICKS, Gate, Release, StatusWord
from client.outbox import Outbox
from client.plans import ListedPlan, Plans
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
        self.audit = AuditLog(folder / audit.FILE)
        self.is_broken = False
        """Whether the device failed in a way that only a new process can mend."""
        self.busy_with: Question | None = None
        """The question being answered."""
        self._gate = Gate(self.config.name)
        self._answers = AnswerStore(folder / "answers")
        self._plans = Plans(folder)

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

    def trust(self, consortium: str, plan_key_pem: str) -> None:
        """Listen to the operator of ``consortium``, who signs plans with this key, and keep notices for it."""
        self._plans.trust(consortium, plan_key_pem)

    def approve(self, plan: Plan, on_progress: OnProgress | None = None) -> Cohort:
        """Let ``plan`` train here: catalogue the data, prepare its cohort, remember the plan, tell the operator.

        Raises
        ------
        FederadError
            C140 to C143 if the data folder, the cohort or the cache cannot be used.
        """
        secret = (self.folder / "secret").read_bytes()
        catalogue = Catalogue.build(self.folder / CATALOGUE, Path(self.config.data), secret=secret)
        cohort = Cohort.build(self._cohort_folder(plan), catalogue, plan, secret=secret, on_progress=on_progress)
        self._plans.approve(plan)
        self._decided(plan.sha256, "approved")
        return cohort

    def refuse(self, plan: Plan) -> None:
        """Let ``plan`` train here no more, and tell the operator; what was prepared for it is kept."""
        self._plans.refuse(plan)
        self._decided(plan.sha256, "refused")

    def plans(self) -> list[ListedPlan]:
        """Every plan that was offered here, the newest first."""
        return self._plans.listed()

    def plan_named(self, name: str) -> ListedPlan:
        """The offered plan with this name, or whose hash begins so; C160 if none or several fit."""
        return self._plans.named(name)

    def offer(self, data: bytes) -> None:
        """Keep a plan that the operator signed, for somebody here to decide on; the default is to ask.

        A plan that was decided on before, by its hash, is not asked about again: the operator hears the same word.

        Raises
        ------
        FederadError
            C159 if this site's operator did not sign it, or if it is no plan of this version.
        """
        signed = self._plans.offer(data)
        if signed is None:
            return
        self.audit.write("offered", plan=signed.plan_sha256, run=signed.run)
        state = self._plans.state(signed.plan_sha256)
        if state != "offered":
            self._tell(state, signed.plan_sha256, signed.run)

    def outbox(self, told: int = 0) -> tuple[int, list[bytes]]:
        """Notices that wait to be told, and the number of the last; those up to ``told`` have arrived and are dropped."""
        return Outbox(self.folder).waiting(told) if self._plans.pinned else (told, [])

    def started(self) -> None:
        """Tell the operator that this site is here."""
        self._put(Release("status", {"word": "started"}), topic="started")

    def cohort(self, plan: Plan) -> Cohort:
        """The cohort prepared for ``plan``; C143 if it was never approved here."""
        return Cohort.open(self._cohort_folder(plan))

    def catalogue(self) -> Catalogue:
        """What was found in the data folder; C143 if nobody looked yet."""
        return Catalogue.open(self.folder / CATALOGUE)

    def answer(self, data: bytes) -> bytes:
        """Answer a question: the same bytes whenever the same question comes.

        The audit has a line for the answer before this returns.

        Raises
        ------
        FederadError
            C162 if nothing may leave because the audit cannot be written.
        """
        question: Question | None = None
        try:
            ask = _readable(data)
            question = ask.question
            with self._alone():
                if (stored := self._stored(question)) is not None:
                    self._audit_answer(question, stored, again=True)
                    return stored
                releases = self._releases(ask)
                answer = self._gate.release(question, releases)
                self._answers.keep(question, answer)
                self._audit_answer(question, answer, again=False, released={r.kind: _n_values(r) for r in releases})
                return answer
        except _RefusedError as refused:
            log.warning("%s: refused %s: %s", self.name, _named(question), refused.refusal)
            return self._refuse(question, refused.refusal)
        except FederadError as error:
            log.warning("%s: declined %s: %s", self.name, _named(question), error)
            return self._refuse(question, "declined")
        except Exception as error:
            log.exception("%s: failed at %s", self.name, _named(question))
            self._after_failure(error)
            return self._refuse(question, "failed")

    def _releases(self, ask: Ask) -> list[Release]:
        plan = self._approved_plan(ask.question.plan_sha256)
        self.busy_with = ask.question
        try:
            trainer = resident_trainer(plan, self.config.device)
            return self._work(ask, trainer, self.cohort(plan))
        finally:
            self.busy_with = None

    def _refuse(self, question: Question | None, word: Refusal) -> bytes:
        """A word in place of an answer, once the audit has it."""
        refusal = self._gate.refuse(question, word)
        self.audit.write("refusal", word=word, **_facts(question))
        return refusal

    def _audit_answer(self, question: Question, answer: bytes, **facts: Any) -> None:
        sha256 = hashlib.sha256(answer).hexdigest()
        self.audit.write("answer", n_bytes=len(answer), sha256=sha256, **_facts(question), **facts)

    def _decided(self, sha256: str, word: StatusWord) -> None:
        self.audit.write(word, plan=sha256, by_uid=os.getuid())
        self._tell(word, sha256, self._plans.run_of(sha256))

    def _tell(self, word: StatusWord, sha256: str, run: str) -> None:
        self._put(Release("status", {"word": word}), plan_sha256=sha256, run=run)

    def _put(self, release: Release, *, topic: str = "", plan_sha256: str = "", run: str = "") -> None:
        """Lay a notice in the outbox, through the gate and with a line in the audit; nothing where nobody would hear it."""
        if not self._plans.pinned:
            return
        notice = self._gate.notice(release, plan_sha256=plan_sha256, run=run)
        self.audit.write("notice", **notice.model_dump(mode="json"))
        Outbox(self.folder).put(notice.encode(), topic=topic)

    def _progress(self, question: Question) -> OnProgress | None:
        """Tells the operator how far a round is, in tenths; None where nobody would hear it."""
        if not self._plans.pinned:
            return None
        last = 0

        def tell(done: int, total: int) -> None:
            nonlocal last
            tick = TICKS * done // max(total, 1)
            if tick <= last:
                return
            last = tick
            with suppress(Exception):  # a round is worth more than the news of it
                self._put(
                    Release("progress", {"round": question.round, "tick": tick}),
                    topic=f"progress {question.run}",
                    plan_sha256=question.plan_sha256,
                    run=question.run,
                )

        return tell

    def _after_failure(self, error: Exception) -> None:
        """Give back a device's memory; a device that was lost comes back only with a new process."""
        import torch

        if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
            self.is_broken = isinstance(error, torch.AcceleratorError)
            resident_trainer.cache_clear()
            with suppress(RuntimeError):
                torch.cuda.empty_cache()

    def _work(self, ask: Ask, trainer: Trainer, cohort: Cohort) -> list[Release]:
        question = ask.question
        measured = trainer.measure(ask.weights, cohort, "test" if question.kind == "test" else "validation")
        metrics = mean_metrics(list(measured.values()))
        counts = {"measured": len(measured)}
        if question.kind != "train":
            return [Release("metric", metrics), Release("count", counts)]
        if not cohort.patients("train"):
            raise _RefusedError("no-patients")
        trained = trainer.train(
            ask.weights,
            cohort,
            seed=ask.seed,
            site=self.name,
            round_=question.round,
            on_progress=self._progress(question),
        )
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
        plan = self._plans.approved(sha256)
        if plan is None:
            raise _RefusedError("unknown-plan")
        return plan

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


def _facts(question: Question | None) -> dict[str, Any]:
    """What the audit says of a question."""
    if question is None:
        return {}
    return {"run": question.run, "round": question.round, "kind": question.kind, "plan": question.plan_sha256}


def _n_values(release: Release) -> int:
    """How many numbers leave in a release."""
    return sum(int(np.size(value)) for value in release.value.values())
