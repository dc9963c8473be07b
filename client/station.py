"""The station: holds a hospital's data, device and history, and answers questions.

A question arrives as bytes and an answer leaves as bytes; everything in between happens here, and what leaves has passed
the gate. The courier that carries the bytes sees neither data nor reasons: trouble inside a station leaves as one word
from a closed list, and is written to the station's own log.

A station lives in one folder and can be reopened from it in any process::

    site.toml            what the hospital decides (``site``)
    secret               key of all hashes of patients, 32 random bytes
    consortium.json      whose plans are listened to, once the site has enrolled (``plans``)
    excluded.txt         keys of patients who must not take part (``exclusions``)
    catalogue.sqlite     what was found in the data folder (``data.catalogue``)
    plans/               plans offered, approved and refused here (``plans``)
    cohorts/<key>/       patients, splits and prepared volumes of plans that look at the data alike (``data.cohort``)
    ledger.sqlite        what every patient has paid, and which question was answered how (``ledger``)
    answers/             the bytes of those answers (``answers``)
    own/                 what this site keeps for itself of runs whose strategy says so (``own``)
    outbox.sqlite        what waits to be told to the operator (``outbox``)
    audit.jsonl          what has left, and what was refused (``audit``)
    layouts/             names and shapes of the arrays that have left (``egress``)
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Self

from client import audit, exclusions
from client.answers import AnsweredBeforeError, OtherWeightsError
from client.audit import AuditLog
from client.code import code_sha256
from client.data.aliases import Aliases
from client.data.catalogue import Catalogue
from client.data.cohort import Cohort, cohort_key
from client.data.keys import key_of
from client.data.skips import Reason
from client.egress import noted
from client.fingerprint import fingerprint_releases
from client.gate import TICKS, Gate, Release, StatusWord
from client.ledger import Agreement, Ledger, Reservation, Spent
from client.outbox import Outbox
from client.own import OwnState
from client.plans import ListedPlan, Plans
from client.policy import Cost, Refused, cost_of, require_known_start, round_size
from client.site import SiteConfig
from client.training import resident_trainer
from client.work import exact_releases, noised_releases
from shared_models.errors import FederadError
from shared_models.messages import Ask, Question, Refusal, decode_ask
from shared_models.plan import Plan

if TYPE_CHECKING:
    from client.wiping import Gone

log = logging.getLogger(__name__)

CATALOGUE = "catalogue.sqlite"

OnProgress = Callable[[int, int], None]
"""Told (done, in all) while something long goes on."""


class _RefusedError(Exception):
    """A question that gets a word instead of an answer."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal


@dataclass(frozen=True)
class Exclusion:
    """What excluding patients came to, in numbers."""

    named: int
    changed: int
    """Of those named, whose place changed."""

    in_all: int
    """Patients on the list now."""

    volumes_removed: int
    in_catalogue: int | None
    """Of those named, whom the catalogue knows; None where nobody looked yet."""

    def as_json(self) -> dict[str, int | None]:
        """For ``--json`` and the audit."""
        return asdict(self)


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
        self._gate = Gate(self.config.name, self.config.permits)
        self._plans = Plans(folder)
        self._code = code_sha256()
        self._secret = (folder / "secret").read_bytes()
        self._ledger: Ledger | None = None
        self._costs: dict[Agreement, Cost] = {}

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

    def approve(
        self,
        plan: Plan,
        on_progress: OnProgress | None = None,
        *,
        declared_size: int | None = None,
        start_is_foreign: bool = False,
    ) -> Cohort:
        """Let ``plan`` train here: catalogue the data, prepare its cohort, agree on what it may cost, tell the operator.

        Parameters
        ----------
        declared_size
            Public, rounded number of patients that training draws from. A plan with ``[privacy]`` needs one, and a
            person gives it: only at an emulated hospital the true number is rounded instead.
        start_is_foreign
            Whether a person here knows that no patient of this site was used for the model at which the plan begins.

        Raises
        ------
        FederadError
            C140 to C143 if the data folder, the cohort or the cache cannot be used, C164 to C168 if the ledger cannot,
            C169 or C170 if budget or policy do not permit the plan, C172 to C175 if it has no cost here, C178 if it
            begins at a model of which the ledger knows nothing, C111 if it tells scanners apart under ``[privacy]`` and
            none are declared.
        """
        cohort = self.prepare(plan, on_progress)
        n_patients = len(cohort.patients("train"))
        if plan.is_adversarial and plan.privacy is not None and not self._declared_scanners(cohort):
            raise _undeclared_scanners(plan)
        if declared_size is None:
            declared_size = self._undeclared(plan, cohort)
        ledger, policy = self.ledger(), self.config.permits
        spent = ledger.spent()
        cost = cost_of(plan, declared_size, spent, lifetime_cap=policy.lifetime_epsilon)
        decision = policy.at_approval(plan, cost, n_patients=n_patients, spent=spent)
        if isinstance(decision, Refused):
            raise decision.error
        if plan.privacy is not None and not (start_is_foreign or self.config.emulated):
            require_known_start(plan, spent)
        ledger.agree(cost.agreement(plan.sha256))
        self._plans.approve(plan, self._code)
        said = {"start_is_foreign": True} if start_is_foreign else {}
        self._decided(plan.sha256, "approved", code=self._code, **said)
        return cohort

    def prepare(self, plan: Plan, on_progress: OnProgress | None = None) -> Cohort:
        """Catalogue the data and prepare a plan's cohort, which decides nothing: no plan may train for it.

        Raises
        ------
        FederadError
            C140 to C143 if the data folder, the cohort or the cache cannot be used.
        """
        catalogue = Catalogue.build(self.folder / CATALOGUE, Path(self.config.data), secret=self._secret)
        return Cohort.build(
            self._cohort_folder(plan),
            catalogue,
            plan,
            secret=self._secret,
            excluded=self._left_out(),
            on_progress=on_progress,
        )

    def refuse(self, plan: Plan) -> None:
        """Let ``plan`` train here no more, and tell the operator; what was prepared for it is kept."""
        self._plans.refuse(plan)
        self._decided(plan.sha256, "refused")

    def exclude(self, patients: Iterable[str], *, take_back: bool = False) -> Exclusion:
        """Let patients take part no more, in whatever plan, and remove what was prepared of them.

        The audit has a line with the numbers, and the file with the keys names nobody.

        Parameters
        ----------
        patients
            Their PatientIDs, or what stands for one in a research folder: the name of the top folder, or the subject.
        take_back
            Let them take part again; volumes are prepared again when the plan is approved again.

        Raises
        ------
        FederadError
            C127 if the list cannot be read or written, C162 if the audit cannot be written.
        """
        keys = {key_of(self._secret, name.strip()) for name in patients if name.strip()}
        aliases = Aliases.of(Path(self.config.data), self._secret)
        with self._alone():
            before = exclusions.excluded(self.folder)
            after = before - keys if take_back else before | keys
            if after != before:
                exclusions.write(self.folder, after)
            gone = frozenset(aliases.patient(key) for key in after)
            n_volumes = sum(Cohort.forget(file.parent, gone) for file in self.folder.glob("cohorts/*/cohort.json"))
            n_known = self._n_known({aliases.patient(key) for key in keys})
            done = Exclusion(len(keys), len(before ^ after), len(after), n_volumes, n_known)
            self.audit.write("taken-back" if take_back else "excluded", by_uid=os.getuid(), **done.as_json())
        return done

    def _left_out(self) -> frozenset[str]:
        """Keys of the patients who must not take part now; C127 if nobody can tell."""
        return exclusions.left_out(self.folder, Path(self.config.data), self._secret)

    def _n_known(self, keys: set[str]) -> int | None:
        """How many of these keys the catalogue has; None where nobody looked yet."""
        try:
            return len({study.patient for study in self.catalogue().studies()} & keys)
        except FederadError:
            return None

    def wipe(self, plan: Plan) -> list[Gone]:
        """Remove what a plan that was refused has left here, but not its charges and the audit.

        Raises
        ------
        FederadError
            C128 if the plan's volumes are needed, or if something could not be removed; C162 and C164 to C168.
        """
        from client.wiping import wipe

        with self._alone():
            gone = wipe(self, plan)
            self.audit.write("wiped", plan=plan.sha256, by_uid=os.getuid(), gone=[one.as_json() for one in gone])
        return gone

    def approved_plans(self) -> list[Plan]:
        """Every plan that may train here."""
        return self._plans.all_approved()

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
        """Tell the operator that this site is here, and which scanners it declares.

        C162 if the audit lacks lines of which the ledger knows.
        """
        if (head := self.ledger().audit_head) is not None:
            self.audit.require(head)
        self._put(Release("status", {"word": "started"}), topic="started")
        if self.config.scanners is not None:
            self._put(Release("scanners", {"names": self.config.scanners}), topic="scanners")

    def ledger(self) -> Ledger:
        """What was spent here. All of it is checked now, and again whenever something is asked of it.

        Raises
        ------
        FederadError
            C164 to C168 if it cannot be used: nothing is trained then.
        """
        if self._ledger is None:
            self._ledger = Ledger.open(self.folder, self._secret, self._anchor)
        return self._ledger

    def recover_ledger(self) -> int:
        """After an older copy of the ledger was put back; how many entries were missing and count as spent now."""
        return Ledger.recover(self.folder, self._secret, self._anchor)

    def renew_anchor(self) -> None:
        """Write the ledger's second copy where ``site.toml`` says now."""
        Ledger.renew_anchor(self.folder, self._secret, self._anchor)

    def begin_ledger_anew(self) -> None:
        """Begin a ledger without the history, which counts as spent without bound."""
        Ledger.begin_anew(self.folder, self._secret, self._anchor)

    def cost(self, plan: Plan, declared_size: int | None = None) -> Cost | None:
        """What a plan would cost a patient here; None where neither now nor at its approval a size was declared."""
        ledger = self.ledger()
        agreed = ledger.agreement(plan.sha256) if declared_size is None else None
        size = declared_size or (agreed.declared_size if agreed else None)
        cap = self.config.permits.lifetime_epsilon
        return cost_of(plan, size, ledger.spent(), lifetime_cap=cap, agreed=agreed) if size else None

    @property
    def _anchor(self) -> Path | None:
        return Path(self.config.anchor) if self.config.anchor else None

    def cohort(self, plan: Plan) -> Cohort:
        """The cohort prepared for ``plan``, without patients who are excluded by now.

        Raises
        ------
        FederadError
            C127 if it is not known who is excluded, C143 if the plan was never approved here.
        """
        cohort = Cohort.open(self._cohort_folder(plan), self.name, secret=self._secret, excluded=self._left_out())
        cohort.declared_scanners = self._declared_scanners(cohort)
        return cohort

    def _declared_scanners(self, cohort: Cohort) -> tuple[str, ...] | None:
        """The scanners that ``site.toml`` names; only at an emulated hospital what its images say instead."""
        return self.config.scanners or (cohort.scanners if self.config.emulated else None)

    def catalogue(self) -> Catalogue:
        """What was found in the data folder; C143 if nobody looked yet."""
        return Catalogue.open(self.folder / CATALOGUE)

    def skipped_files(self) -> list[tuple[PurePosixPath, Reason]]:
        """The files that the last look left out, with reasons: for people here, whom names of files may name."""
        return self.catalogue().skipped_files(self._secret)

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
                ledger = self.ledger()
                with _in_a_word():
                    known = ledger.look_up(question)
                if (stored := known.answer) is not None:
                    self._audit_answer(question, len(stored), hashlib.sha256(stored).hexdigest(), again=True)
                    return stored
                self.busy_with = question
                return self._new_answer(ask, ledger, known.agreement)
        except _RefusedError as refused:
            log.warning("%s: refused %s: %s", self.name, _named(question), refused.refusal)
            return self._refuse(question, refused.refusal)
        except FederadError as error:
            word: Refusal = "budget" if error.code == "C169" else "declined"
            log.warning("%s: %s %s: %s", self.name, word, _named(question), error)
            return self._refuse(question, word)
        except Exception as error:
            log.exception("%s: failed at %s", self.name, _named(question))
            self._after_failure(error)
            return self._refuse(question, "failed")
        finally:
            self.busy_with = None

    def _new_answer(self, ask: Ask, ledger: Ledger, agreed: Agreement | None) -> bytes:
        """Permitted, paid for, computed, passed through the gate, settled: in this order."""
        question = ask.question
        plan = self._approved_plan(question.plan_sha256)
        if self._plans.code_of(plan.sha256) != self._code:
            raise _other_code(plan)
        if (question.kind == "fingerprint") != (plan.asks == "fingerprint"):
            raise _RefusedError("policy")
        cost = self._permitted(plan, question, agreed)
        cohort = self.cohort(plan)
        if question.kind in ("train", "fingerprint") and plan.privacy is None and not cohort.patients("train"):
            raise _RefusedError("no-patients")
        with _in_a_word():
            reservation = self._paid(question, plan, cost, ledger)
        if question.kind == "fingerprint":
            releases = fingerprint_releases(cohort, cost, reservation)
        else:
            releases = self._of_model(ask, plan, cohort, cost, reservation)
        passed = self._gate.release(question, releases, is_private=plan.privacy is not None)
        released = noted(self.folder, passed.manifest)
        sha256 = ledger.settle(reservation, question, passed.answer, audit=self.audit.head)
        left_out = {"excluded": cohort.n_excluded} if cohort.n_excluded else {}
        self._audit_answer(question, len(passed.answer), sha256, again=False, released=released, **left_out)
        return passed.answer

    def _of_model(
        self, ask: Ask, plan: Plan, cohort: Cohort, cost: Cost, reservation: Reservation | None
    ) -> list[Release]:
        """What a question about weights asks for."""
        trainer, told = resident_trainer(plan, self.config.device), self._progress(ask.question)
        own = OwnState(self.folder, ask.question.run, ask.question.plan_sha256)
        if plan.privacy is None:
            return exact_releases(trainer, cohort, ask, site=self.name, own=own, on_progress=told)
        return noised_releases(
            trainer, cohort, ask, site=self.name, own=own, cost=cost, reservation=reservation, on_progress=told
        )

    def _refuse(self, question: Question | None, word: Refusal) -> bytes:
        """A word in place of an answer, once the audit has it."""
        refusal = self._gate.refuse(question, word)
        self.audit.write("refusal", word=word, **_facts(question))
        return refusal

    def _audit_answer(self, question: Question, n_bytes: int, sha256: str, **facts: Any) -> None:
        self.audit.write("answer", n_bytes=n_bytes, sha256=sha256, **_facts(question), **facts)

    def _decided(self, sha256: str, word: StatusWord, **facts: Any) -> None:
        self.audit.write(word, plan=sha256, by_uid=os.getuid(), **facts)
        self._tell(word, sha256, self._plans.run_of(sha256))

    def _tell(self, word: StatusWord, sha256: str, run: str) -> None:
        self._put(Release("status", {"word": word}), plan_sha256=sha256, run=run)

    def _put(self, release: Release, *, topic: str = "", plan_sha256: str = "", run: str = "") -> None:
        """Lay a notice in the outbox, through the gate and with a line in the audit; nothing where nobody would hear it."""
        if not self._plans.pinned:
            return
        notice = self._gate.notice(release, plan_sha256=plan_sha256, run=run)
        if notice is None:
            return
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

    def _permitted(self, plan: Plan, question: Question, agreed: Agreement | None) -> Cost:
        """What the plan costs here, as agreed when it was approved, if the policy lets this round begin now."""
        if agreed is None:
            raise _RefusedError("unknown-plan")
        policy = self.config.permits
        cost = self._costs.get(agreed)
        if cost is None:
            cost = cost_of(plan, agreed.declared_size, Spent(), lifetime_cap=policy.lifetime_epsilon, agreed=agreed)
            self._costs[agreed] = cost
        decision = policy.at_round(plan, cost, question.round, datetime.now())
        if isinstance(decision, Refused):
            log.warning("%s: %s", self.name, decision.error)
            raise _RefusedError(decision.word)
        return cost

    def _paid(self, question: Question, plan: Plan, cost: Cost, ledger: Ledger) -> Reservation | None:
        """The charge for a question, written down before anything is computed; None where nothing will be released."""
        of_round = cost.of_round(question.round)
        events = {"train": of_round, "fingerprint": of_round, "validate": (), "test": cost.of_test()}[question.kind]
        if not cost.is_private:
            events = cost.events
        if not events:
            return None
        caps = self.config.permits.caps(cost)
        return ledger.reserve(question, cohort=cohort_key(plan), events=events, whole_run=cost.events, caps=caps)

    def _undeclared(self, plan: Plan, cohort: Cohort) -> int:
        """The size where nobody declared one: at an emulated hospital, and where it means nothing."""
        size, unit = len(cohort.patients("train")), "patients"
        if plan.privacy is not None and plan.privacy.images_per_patient is not None:
            from client.image_privacy import images_of

            size, unit = len(images_of(cohort, plan.data.dimensions, most=plan.privacy.images_per_patient)), "images"
        proposed = round_size(max(size, 1))
        if plan.privacy is None or self.config.emulated:
            return proposed
        raise FederadError(
            "C173",
            happened=f"This plan needs the number of {unit} that training draws from, declared by somebody here.",
            because="Sampling, noise and cost follow from it, and it is public: so it is a rounded number that you choose, "
            "and never the exact one.",
            remedies=(f"federad-site approve {plan.name} --patients-declared {proposed}", "or another rounded number"),
        )

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


def _other_code(plan: Plan) -> FederadError:
    return FederadError(
        "C106",
        happened=f"The installed federad is not the one with which the plan {plan.name} was approved.",
        because="What a plan costs a patient, and what may leave, was agreed to for that code.",
        remedies=(
            f"after an update of yours: federad-site approve {plan.name}",
            "if nobody here has updated it: leave the machine as it is and find out who did",
        ),
    )


def _undeclared_scanners(plan: Plan) -> FederadError:
    return FederadError(
        "C111",
        happened=f"The plan {plan.name} tells scanners apart, and site.toml declares none.",
        because="Whether this site has several is found in patients' images otherwise, and nothing of those may show.",
        remedies=(
            'type them into site.toml, such as scanners = ["SIEMENS Aurora 1.5 T"]: they are told to the operator',
            "or refuse this plan",
        ),
    )


@contextmanager
def _in_a_word() -> Iterator[None]:
    """What the ledger says of a question that it knows, as a refusal."""
    try:
        yield
    except OtherWeightsError:
        raise _RefusedError("other-weights") from None
    except AnsweredBeforeError:
        raise _RefusedError("answered-before") from None


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
