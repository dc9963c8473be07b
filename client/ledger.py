"""The ledger: what every patient here has paid, for all runs and for ever.

It keeps mechanism events, never epsilons, and reckons from them with ``accounting``. A round is charged before its first
step and settled after its last::

    reserve ──► train ──► settle ──► leave

``reserve`` writes the charge durably, in the ledger and at its anchor, and refuses what the caps do not allow. ``settle``
stores the encoded answer in the same commit that says which charge it came from; its first byte leaves after that. Killed
anywhere, a site has at worst paid for a round that nobody got: a charge without an answer stays spent, and the same
round is trained again only under a new one.

One ledger stands for all cohorts of a site, since nothing here establishes that two of them share no patient. Runs
compose by a Renyi filter at one order, fixed with the first charge; within a run by PRV.

The entries are a chain (``chain``): ``begin``, ``agreed`` (what a plan was found to cost when it was approved), ``charge``,
``answer``, and ``lost`` where somebody began anew without the history, after which nothing bounds what was spent.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Self

from client.accounting import Event, epsilon, filter_order, rdp, rdp_to_epsilon
from client.answers import TABLE, AnsweredBeforeError, AnswerStore, OtherWeightsError
from client.audit import FILE as AUDIT_FILE
from client.audit import Head
from client.chain import Book, Chain, Entry, NoHistoryError, unwritable
from client.code import code_sha256
from shared_models.errors import FederadError
from shared_models.messages import Question

FILE = "ledger.sqlite"
ANCHOR = "ledger.anchor"
"""Beside the ledger, where ``site.toml`` names no other place: better than nothing, and lost together with it."""

TOLERANCE = 1e-6
"""Relative room at a cap for the last digits of an accountant."""


@dataclass(frozen=True)
class Caps:
    """What may be spent."""

    run: float
    """Epsilon of one run, by PRV."""

    delta: float
    """At which a run's epsilon is reckoned."""

    lifetime: float
    """Epsilon of all runs together, by the Renyi filter."""

    lifetime_delta: float


@dataclass(frozen=True)
class Agreement:
    """What a plan was found to cost when it was approved; fixed from its first charge on."""

    plan_sha256: str
    declared_size: int
    noise_multiplier: float
    """0 for a plan without privacy."""

    sampling_rate: float
    epsilon: float | None
    """Of the whole run; None where nothing bounds it."""

    delta: float


@dataclass(frozen=True)
class Charge:
    """A round that was paid for."""

    n: int
    """Number of its entry."""

    time: str
    question: Question
    cohort: str
    events: tuple[Event, ...]
    order: float | None
    """The filter's order, once it was fixed."""

    @property
    def is_private(self) -> bool:
        """Whether all of it had noise."""
        return all(event.is_private for event in self.events)


@dataclass(frozen=True)
class Reservation:
    """A charge, held by whoever trains for it."""

    n: int
    question: Question
    epsilon: float
    """Of the run so far, this round included."""

    lifetime_epsilon: float
    """Of everything so far, this round included; infinity where nothing bounds it."""


@dataclass(frozen=True)
class Known:
    """What the ledger knows of a question."""

    answer: bytes | None
    """The stored answer; None if the question is new."""

    agreement: Agreement | None
    """What its plan was found to cost when it was last approved; None if it never was."""


@dataclass(frozen=True)
class Spent:
    """Everything that was charged here."""

    charges: tuple[Charge, ...] = ()
    is_lost: bool = False
    """Whether the history before the first charge is lost, so that nothing bounds it."""

    settled: frozenset[int] = frozenset()
    """Charges whose answer was stored."""

    @property
    def order(self) -> float | None:
        """The filter's order; None before it was fixed."""
        return next((charge.order for charge in self.charges if charge.order is not None), None)

    @property
    def runs(self) -> dict[str, list[Event]]:
        """The events of each run, in the order of their first charges."""
        runs: dict[str, list[Event]] = {}
        for charge in self.charges:
            runs.setdefault(charge.question.run, []).extend(charge.events)
        return runs

    def run_epsilon(self, run: str, delta: float, more: Iterable[Event] = ()) -> float:
        """Epsilon of one run, with ``more`` events, by PRV."""
        return epsilon([*self.runs.get(run, ()), *more], delta)

    def lifetime_epsilon(
        self, delta: float, order: float | None = None, *, run: str = "", more: Iterable[Event] = ()
    ) -> float:
        """Epsilon of everything, whatever each run was chosen after seeing, by the Renyi filter.

        Parameters
        ----------
        order
            Where none was fixed yet.
        run, more
            Events that would be added to a run.
        """
        if self.is_lost:
            return math.inf
        order = self.order or order or filter_order(1.0, delta)
        runs = self.runs
        if more := tuple(more):
            runs.setdefault(run, []).extend(more)
        return rdp_to_epsilon(sum(rdp(events, order) for events in runs.values()), order, delta)

    def lifetime_epsilon_by_prv(self, delta: float) -> float:
        """The same as if all runs had been fixed in advance, to print beside it: never the one that decides."""
        if self.is_lost:
            return math.inf
        events = [event for charge in self.charges for event in charge.events]
        return epsilon([_as_training(event) for event in events], delta)


class Ledger:
    """A station's ledger; several processes may have it open.

    Open it with :meth:`open`.
    """

    def __init__(self, folder: Path, secret: bytes, anchor: Path | None = None) -> None:
        key = hmac.new(secret, b"federad ledger", hashlib.sha256).digest()
        self.folder = folder
        self.anchor = anchor or folder / ANCHOR
        self._chain = Chain(folder / FILE, key, self.anchor, TABLE)
        self._store = AnswerStore(folder / "answers")

    @classmethod
    def open(cls, folder: Path, secret: bytes, anchor: Path | None = None) -> Self:
        """The ledger in a station's folder, checked as a whole; begun where this station has no history.

        Parameters
        ----------
        secret
            The station's.
        anchor
            Where its second copy lies; beside it unless given.

        Raises
        ------
        FederadError
            C164 if it cannot be written, C165 if it is missing and there was one, C166 if it is not whole, C167 if it is an
            older copy, C168 if its anchor cannot be used.
        """
        ledger = cls(folder, secret, anchor)
        try:
            with ledger._chain.open() as book:
                ledger._store.tidy(book.db)
        except NoHistoryError:
            if trace := _trace_of_history(folder):
                raise _missing(folder / FILE, trace) from None
            ledger._chain.begin()
        return ledger

    @classmethod
    def recover(cls, folder: Path, secret: bytes, anchor: Path | None = None) -> int:
        """After an older copy was put back: everything that was anchored counts as spent, and answered as answered.

        Returns
        -------
        int
            The number of entries that were missing.

        Raises
        ------
        FederadError
            C166 if the anchor does not go on where the ledger ends; C164, C168 as in :meth:`open`.
        """
        return cls(folder, secret, anchor)._chain.recover()

    @classmethod
    def begin_anew(cls, folder: Path, secret: bytes, anchor: Path | None = None) -> Self:
        """Begin a ledger without the history, which counts as spent without bound; damaged files are moved aside.

        Only plans without privacy, or under a lifetime cap of infinity, can train after this.
        """
        ledger = cls(folder, secret, anchor)
        for path in (folder / FILE, folder / f"{FILE}-journal", ledger.anchor):
            try:
                if path.exists():
                    path.replace(_aside(path))
            except OSError as error:
                raise unwritable(path, error) from None
        ledger._chain.begin(lost=True)
        return ledger

    @classmethod
    def renew_anchor(cls, folder: Path, secret: bytes, anchor: Path | None = None) -> None:
        """Write the anchor at a new place; C168 if what is there already is not an older copy of it."""
        cls(folder, secret, anchor)._chain.renew_anchor()

    @property
    def head(self) -> Head:
        """Number of entries and hash of the last: says nothing to whoever lacks the station's secret."""
        with self._opened() as book:
            return Head(book.entries[-1]["n"], book.entries[-1]["hash"])

    @property
    def audit_head(self) -> Head | None:
        """The end of the audit as it was when the last answer was stored: the audit must still contain it."""
        with self._opened() as book:
            heads = [entry["audit"] for entry in book.entries if entry.get("audit")]
        return Head(*heads[-1]) if heads else None

    def spent(self) -> Spent:
        """Everything that was charged."""
        with self._opened() as book:
            return _spent(book.entries)

    def agree(self, agreement: Agreement) -> None:
        """Write down what an approved plan costs.

        Raises
        ------
        FederadError
            C173 if the plan has been charged for already and was agreed on otherwise.
        """
        with self._opened() as book:
            before = _agreement(book.entries, agreement.plan_sha256)
            if before == agreement:
                return
            charged = any(c.question.plan_sha256 == agreement.plan_sha256 for c in _spent(book.entries).charges)
            if before and charged:
                raise FederadError(
                    "C173",
                    happened=f"This plan was approved with {before.declared_size} patients declared and has trained here; "
                    f"now it would be approved with {agreement.declared_size}.",
                    because="What a run costs can be reckoned because its noise and sampling were fixed before it began.",
                    remedies=(
                        f"approve it as before: --patients-declared {before.declared_size}",
                        "or refuse the plan",
                    ),
                )
            book.append("agreed", **asdict(agreement))

    def agreement(self, plan_sha256: str) -> Agreement | None:
        """What a plan was found to cost when it was last approved; None if it never was."""
        with self._opened() as book:
            return _agreement(book.entries, plan_sha256)

    def look_up(self, question: Question) -> Known:
        """What is written down of a question.

        Raises
        ------
        OtherWeightsError
            If the same question was charged for, or answered, with other weights.
        AnsweredBeforeError
            If its bytes cannot be given again.
        FederadError
            As :meth:`open`.
        """
        with self._opened() as book:
            answer = self._store.look_up(book.db, question)
            if answer is None:
                _require_new(book.entries, question)
            elif hashlib.sha256(answer).hexdigest() not in _answers_to(book.entries, question):
                raise AnsweredBeforeError
            return Known(answer, _agreement(book.entries, question.plan_sha256))

    def reserve(
        self, question: Question, *, cohort: str, events: Sequence[Event], whole_run: Sequence[Event], caps: Caps
    ) -> Reservation:
        """Charge a round, durably; its first step may be taken after this returns.

        A run without privacy is charged once, with :data:`~client.accounting.WITHOUT_PRIVACY`: infinity does not grow.

        Parameters
        ----------
        cohort
            Of the patients it is about, for whoever reads the ledger; what is spent is added up over all cohorts.
        events
            Everything this round will release.
        whole_run
            Everything the run will release: before its first charge, all of it has to fit.
        caps
            Of this site.

        Raises
        ------
        OtherWeightsError
            If the same question was charged for, or answered, with other weights.
        AnsweredBeforeError
            If it was answered.
        FederadError
            C169, with the figures, if a cap does not allow it; nothing is charged. Else as :meth:`open`.
        """
        if not events:
            raise ValueError("a round that costs nothing is not trained")
        with self._opened() as book:
            _require_new(book.entries, question)
            spent = _spent(book.entries)
            free = all(event.is_private for event in events)
            if not free and (charge := _charged_without_privacy(spent, question)):
                return Reservation(charge.n, question, math.inf, math.inf)
            asked_for = events if question.run in spent.runs else whole_run
            order = order_of(spent, asked_for, caps)
            check_caps(spent, question.run, asked_for, caps)
            entry = book.append(
                "charge",
                question=asdict(question),
                cohort=cohort,
                events=[asdict(event) for event in events],
                order=order,
                code=_code_version(),
            )
            after = _spent(book.entries)
        return Reservation(
            entry["n"],
            question,
            after.run_epsilon(question.run, caps.delta),
            after.lifetime_epsilon(caps.lifetime_delta),
        )

    def settle(
        self, reservation: Reservation | None, question: Question, answer: bytes, *, audit: Head | None = None
    ) -> str:
        """Store the answer and say what it was charged to, in one commit; it may leave after this returns.

        Returns
        -------
        str
            SHA-256 of the answer.

        Parameters
        ----------
        reservation
            None for an answer that costs nothing.
        audit
            The end of the audit.

        Raises
        ------
        AnsweredBeforeError
            If the question has an answer already.
        ValueError
            If the reservation is for another question, or was settled.
        FederadError
            As :meth:`open`.
        """
        sha256 = hashlib.sha256(answer).hexdigest()
        with self._opened() as book:
            _require_new(book.entries, question)
            if reservation is not None:
                _require_open(_spent(book.entries), reservation, question)
            dropped = self._store.record(book.db, question, sha256, self._written(question, answer))
            book.append(
                "answer",
                question=asdict(question),
                charge=reservation.n if reservation else None,
                sha256=sha256,
                audit=[audit.n, audit.hash] if audit else None,
            )
        self._store.drop(dropped)
        return sha256

    def forget_answers(self, plan_sha256: str) -> list[Path]:
        """Give a plan's answers no more: their files, to be deleted. Questions and charges stay as they are."""
        with self._opened() as book:
            return self._store.forget(book.db, plan_sha256)

    def _written(self, question: Question, answer: bytes) -> str:
        try:
            return self._store.write(question, answer)
        except OSError as error:
            raise unwritable(self.folder / "answers", error) from None

    @contextmanager
    def _opened(self) -> Iterator[Book]:
        try:
            with self._chain.open() as book:
                yield book
        except NoHistoryError:
            raise _missing(self.folder / FILE, "it was there when the station was opened") from None


def order_of(spent: Spent, events: Sequence[Event], caps: Caps) -> float | None:
    """The filter's order; where none was fixed yet, the one for a run of ``events``; None without a lifetime cap."""
    if spent.order is not None or math.isinf(caps.lifetime):
        return spent.order
    return filter_order(caps.lifetime, caps.lifetime_delta, events)


def check_caps(spent: Spent, run: str, events: Sequence[Event], caps: Caps) -> None:
    """Make sure that a run may release ``events`` on top of what was charged.

    Raises
    ------
    FederadError
        C169 with the figures.
    """
    of_run = spent.run_epsilon(run, caps.delta, events)
    if of_run > caps.run * (1 + TOLERANCE):
        raise _over(
            f"This run would come to epsilon {of_run:.4g} at delta {caps.delta:g}, of which "
            f"{spent.run_epsilon(run, caps.delta):.4g} is spent, and one run may cost {caps.run:.4g}.",
            "a round that was cut short is paid for and has to be paid again: run_epsilon under [policy] in site.toml "
            "may leave room for that",
        )
    if math.isinf(caps.lifetime):
        return
    order = order_of(spent, events, caps)
    total = spent.lifetime_epsilon(caps.lifetime_delta, order, run=run, more=events)
    if total > caps.lifetime * (1 + TOLERANCE):
        so_far = spent.lifetime_epsilon(caps.lifetime_delta, order)
        raise _over(
            f"All runs together would come to epsilon {total:.4g} at delta {caps.lifetime_delta:g} (Renyi order "
            f"{order}), of which {so_far:.4g} is spent, and the lifetime cap is {caps.lifetime:.4g}."
            + (" A run without privacy, or a lost history, has no bound." if math.isinf(so_far) else ""),
            "lifetime_epsilon under [policy] in site.toml is this hospital's own decision: raise it only with whoever is "
            "responsible for data protection here",
        )


def _over(figures: str, remedy: str) -> FederadError:
    return FederadError(
        "C169",
        happened=f"The privacy budget does not suffice. {figures}",
        because="What is spent never comes back, and the caps are the promise this hospital gives its patients.",
        remedies=("federad-site ledger shows what was spent on what", remedy, "let the operator know"),
    )


def _missing(path: Path, trace: str) -> FederadError:
    return FederadError(
        "C165",
        happened=f"The ledger {path} is missing, although this station has a history ({trace}).",
        because="A new ledger would start at zero, and what was spent could be spent again.",
        remedies=(
            "put its newest backup back, then: federad-site ledger --after-restore",
            "with the anchor alone: put the anchor back, then federad-site ledger --after-restore",
            "without either: federad-site ledger --begin-anew, which counts everything so far as spent",
        ),
    )


def _trace_of_history(folder: Path) -> str:
    """What shows that something was trained here before; empty if nothing does."""
    if any((folder / "answers").glob("*.safetensors")):
        return "there are answers"
    if any(folder.glob("ledger.*.before-*")):
        return "an earlier ledger was moved aside"
    try:
        with (folder / AUDIT_FILE).open("rb") as lines:
            told = any(b'"event":"answer"' in line and b'"kind":"train"' in line for line in lines)
    except FileNotFoundError:
        return ""
    return "the audit tells of trained rounds" if told else ""


def _spent(entries: Iterable[Entry]) -> Spent:
    entries = list(entries)
    charges = tuple(
        Charge(
            n=entry["n"],
            time=entry["time"],
            question=Question(**entry["question"]),
            cohort=entry["cohort"],
            events=tuple(Event(**event) for event in entry["events"]),
            order=entry["order"],
        )
        for entry in entries
        if entry["event"] == "charge"
    )
    settled = frozenset(entry["charge"] for entry in entries if entry["event"] == "answer" and entry["charge"])
    return Spent(charges, is_lost=bool(entries[0].get("lost")), settled=settled)


def _agreement(entries: Sequence[Entry], plan_sha256: str) -> Agreement | None:
    for entry in reversed(entries):
        if entry["event"] == "agreed" and entry["plan_sha256"] == plan_sha256:
            return Agreement(**{field.name: entry[field.name] for field in fields(Agreement)})
    return None


def _require_new(entries: Iterable[Entry], question: Question) -> None:
    """No answer to the question yet, and no charge for it with other weights."""
    asked = asdict(question)
    same = {key: asked[key] for key in ("run", "round", "kind", "plan_sha256")}
    for entry in entries:
        before = entry.get("question")
        if before is None or {key: before[key] for key in same} != same:
            continue
        if before["weights_sha256"] != question.weights_sha256:
            raise OtherWeightsError
        if entry["event"] == "answer":
            raise AnsweredBeforeError


def _answers_to(entries: Iterable[Entry], question: Question) -> set[str]:
    """Hashes of the answers to a question: one or none."""
    return {e["sha256"] for e in entries if e["event"] == "answer" and Question(**e["question"]) == question}


def _require_open(spent: Spent, reservation: Reservation, question: Question) -> None:
    charge = next((charge for charge in spent.charges if charge.n == reservation.n), None)
    if charge is None:
        raise ValueError("a reservation that is not in the ledger")
    if charge.is_private and (charge.question != question or charge.n in spent.settled):
        raise ValueError("a reservation for another question, or one that was settled")
    if (charge.question.run, charge.question.plan_sha256) != (question.run, question.plan_sha256):
        raise ValueError("a reservation for another run")


def _charged_without_privacy(spent: Spent, question: Question) -> Charge | None:
    this = (question.run, question.plan_sha256)
    for charge in spent.charges:
        if not charge.is_private and (charge.question.run, charge.question.plan_sha256) == this:
            return charge
    return None


def _as_training(event: Event) -> Event:
    return Event(**{**asdict(event), "split": "train"})


def _aside(path: Path) -> Path:
    n = next(n for n in range(1, 10_000) if not path.with_name(f"{path.name}.before-{n}").exists())
    return path.with_name(f"{path.name}.before-{n}")


def _code_version() -> str:
    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "none"

    return f"federad {of('federad')} {code_sha256()[:12]}, opacus {of('opacus')}"
