"""The round loop: ask, wait until the deadline, check, add up as replies arrive, commit.

It replaces Flower's own ``Strategy.start``, which holds all replies in memory, accepts what it should not and ends the
run on the first bad shape. Here a reply that fails a check is named and left out, and the round goes on; a round with too
few good replies pauses the run and loses nothing that was committed. A site that was lost on the way is asked again when it
is back: its station answers from its store, and neither trains nor spends a second time.

The metrics of a round's weights arrive with the replies of the next round, since one message carries both; the last
round is followed by one question that validates and one that tests.

A run that was interrupted goes on from the last committed round of its journal, under the same id, with the same result.
"""

from __future__ import annotations

import logging
import mmap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from server.accumulator import ExactMean, largest_norm
from server.journal import Journal, RunIdentity
from server.moments import MomentsRule
from server.roster import LearntRoster, Roster
from server.strategies import strategy_for
from shared_models.adaptation import left_of_adversary
from shared_models.errors import FederadError
from shared_models.local_layers import staying
from shared_models.messages import Answer, Ask, AskKind, Question, asked_sha256, decode_answer, encode_ask
from shared_models.moments import fault_of
from shared_models.parcel import INLINE_LIMIT, Reference, pack, pack_reference, trouble_in, unpack
from shared_models.plan import OF_EACH_SITE, Plan
from shared_models.schedule import local_steps, moments_rounds
from shared_models.task import task_for
from shared_models.weights import Weights, averaged, difference, norm_of, weights_sha256

if TYPE_CHECKING:
    from server.depot import Depot

log = logging.getLogger(__name__)

POLL_S = 0.05
"""Pause between two looks for replies when none has come [s]; a Grid with sockets waits longer by itself."""

RETURN_S = 180.0
"""How long a round that has enough replies waits for a site that was lost [s]. A connection that was cut for a minute and a
half is back by then; a site that is down for the night does not hold up the others until the deadline."""

AGAIN_S = 3.0
LONGEST_AGAIN_S = 60.0
"""Pause before a site whose courier failed is asked again, doubled each time [s]."""

MOST_TRIES = 6
"""A site whose courier failed this often in one round is left out."""

FINAL = frozenset({"unreadable", "bundle-refused"})
"""Words of a courier that no waiting will change."""

INVALID_BUNDLE = 7
"""Flower's own number for a bundle that a node refused."""


@dataclass(frozen=True)
class Progress:
    """Something worth showing while a run goes on."""

    what: Literal["waiting", "resumed", "asked", "asked again", "replied", "lost", "left out", "committed"]
    round: int
    kind: AskKind = "train"
    site: str = ""
    detail: str = ""
    n_sites: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass
class RoundRecord:
    """What is known of one round."""

    round: int
    seconds: float = 0.0
    replied: list[str] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)
    """Sites whose reply was left out or that said no, with the reason."""

    missing: list[str] = field(default_factory=list)
    """Sites that gave no reply before the deadline."""

    training_loss: float | None = None
    validation: dict[str, float] | None = None
    """Means over sites with validation patients, weighted by their number, of the weights after this round."""

    per_site: dict[str, dict[str, float]] = field(default_factory=dict)
    cost: dict[str, dict[str, float]] = field(default_factory=dict)
    """Under ``[privacy]``: what the run has cost a patient of each site so far, as the site reckons."""

    weights_sha256: str = ""
    average_sha256: str | None = None
    """Of the average over the rounds so far, in plans that release it."""

    state_sha256: str | None = None
    """Of what the server remembers from round to round beside the weights, where it remembers something."""

    discriminator: dict[str, Any] | None = None
    """What became of the moments that were released in it (``moments.Noted``); None where none were asked for."""


@dataclass(frozen=True)
class Measured:
    """Metrics of one set of weights at all sites that replied."""

    mean: dict[str, float] | None
    per_site: dict[str, dict[str, float]]
    patients: dict[str, int]
    """How many it was; under ``[privacy]`` the number that each site declared."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    records: list[RoundRecord]
    best_round: int
    best: Weights
    last: Weights
    test: Measured
    """Metrics of the best weights on the sites' test patients."""

    cost: dict[str, dict[str, float]] = field(default_factory=dict)
    """Under ``[privacy]``: what the run has cost a patient of each site."""


@dataclass
class _Asked:
    """How far asking one node has come."""

    present: str = ""
    """The word of its presence when it was asked last; another one means that it has been away."""

    messages: set[str] = field(default_factory=set)
    """Those of ours that it has not answered."""

    n_failed: int = 0
    lost_at: float = 0.0
    not_before: float = 0.0
    is_done: bool = False


class Exchange:
    """One question to all sites, and their checked answers as they arrive.

    After :meth:`answers` is exhausted, ``replied``, ``refused`` and ``missing`` say what became of each site.
    """

    def __init__(
        self, rounds: Rounds, question: Question, weights: Weights, control: Weights, discriminator: Weights
    ) -> None:
        self._rounds, self._roster, self._grid = rounds, rounds.roster, rounds.grid
        self._question = question
        self._shapes = rounds.shapes
        self._sent = Ask(question, rounds.seed, weights, control, rounds.adversary, discriminator)
        self._asked: dict[int, _Asked] = {}
        self._waiting: dict[str, int] = {}
        self._deadline = 0.0
        self._next_look = 0.0
        self._n_most = 0
        self.n_updates = 0
        """Good answers with an update; others bring moments alone."""

        self.replied: list[str] = []
        self.refused: list[dict[str, str]] = []
        self.missing: list[str] = []

    @property
    def n_asked(self) -> int:
        """Sites that were asked."""
        return len(self._asked)

    def answers(self) -> Iterator[tuple[Answer, float]]:
        """Each good answer with the norm of its update; the others are named in ``refused`` and ``missing``.

        An answer is the caller's until the next one is asked for: one at a time is in memory.
        """
        self._deadline = time.monotonic() + self._rounds.plan.strategy.deadline_s
        self._n_most = self._roster.n_most()
        with self._rounds.enclosed(encode_ask(self._sent)) as content:
            self._look(content)
            self._rounds.tell("asked", self._question, n_sites=self.n_asked)
            while self._goes_on():
                replies = list(self._grid.pull_messages(list(self._waiting))) if self._waiting else []
                is_quiet = not replies
                while replies:
                    checked = self._received(replies.pop(0))
                    if checked is not None:
                        yield checked
                    del checked
                if is_quiet and self._goes_on():
                    time.sleep(POLL_S)
                self._look(content)
        lost = [self._roster.name_of(node) for node, asked in self._asked.items() if not asked.is_done]
        self.missing += lost + self._roster.absent(self._asked)
        for name in self.missing:
            self._rounds.tell("left out", self._question, site=name, detail="no reply")

    def _goes_on(self) -> bool:
        """Whether another reply may come in time, and is worth waiting for."""
        now = time.monotonic()
        if now >= self._deadline:
            return False
        if self._waiting or not self._roster.asks_again:
            return bool(self._waiting)
        lost = [asked for asked in self._asked.values() if not asked.is_done]
        n_counting = self.n_updates if self._question.kind == "train" else len(self.replied)
        if n_counting < self._rounds.plan.strategy.minimum_sites:
            return bool(lost or self._roster.absent(self._asked))
        return any(now - asked.lost_at < RETURN_S for asked in lost)

    def _look(self, content: RecordDict) -> None:
        """Ask who is there and was not asked, or has been away since."""
        now = time.monotonic()
        if self._asked and (not self._roster.asks_again or now < self._next_look):
            return
        self._next_look = now + self._roster.look_s
        present = self._roster.present()
        self._ask(sorted(node for node in present if self._is_due(node, present[node], now)), present, content)

    def _is_due(self, node: int, present: str, now: float) -> bool:
        asked = self._asked.get(node)
        if asked is None:
            return True
        return not asked.is_done and (asked.present != present or (not asked.messages and now >= asked.not_before))

    def _ask(self, nodes: list[int], present: Mapping[int, str], content: RecordDict) -> None:
        ttl = self._deadline - time.monotonic()
        if not nodes or ttl <= 0:
            return
        group = str(self._question.round)
        messages = [Message(content, node, MessageType.QUERY, ttl=ttl, group_id=group) for node in nodes]
        for node, message_id in zip(nodes, self._grid.push_messages(messages), strict=True):
            if node in self._asked:
                self._rounds.tell("asked again", self._question, site=self._roster.name_of(node))
            asked = self._asked.setdefault(node, _Asked())
            asked.present = present[node]
            if message_id:  # Flower gives None for one that it could not take
                asked.messages.add(message_id)
                self._waiting[message_id] = node
            else:
                self._lose(node, "the message could not be sent")

    def _received(self, reply: Message) -> tuple[Answer, float] | None:
        """What a reply is worth: a good answer, or nothing."""
        message_id = reply.metadata.reply_to_message_id
        if (node := self._waiting.pop(message_id, None)) is None:
            return None
        self._asked[node].messages.discard(message_id)
        if reply.has_error():
            self._failed(node, reply)
            return None
        if time.monotonic() > self._deadline:
            self._leave_out(node, "late")
            return None
        return self._checked(reply, node)

    def _failed(self, node: int, reply: Message) -> None:
        """A reply without an answer: the site is asked again where that can help."""
        if not self._roster.asks_again:
            self._done(node)
            self.missing.append(self._roster.name_of(node))
            return
        word = trouble_in(reply)
        if word in FINAL or reply.error.code == INVALID_BUNDLE:
            self._leave_out(node, word or "bundle-refused")
            return
        asked = self._asked[node]
        asked.n_failed += word is not None
        if asked.n_failed >= MOST_TRIES:
            self._leave_out(node, f"{word}, {asked.n_failed} times")
        else:
            self._lose(node, word or f"Flower's error {reply.error.code}")

    def _lose(self, node: int, why: str) -> None:
        asked = self._asked[node]
        asked.lost_at = time.monotonic()
        asked.not_before = asked.lost_at + min(AGAIN_S * 2.0**asked.n_failed, LONGEST_AGAIN_S)
        log.warning("%s of round %d: %s lost: %s", *self._what(), self._roster.name_of(node), why)
        self._rounds.tell("lost", self._question, site=self._roster.name_of(node), detail=why)

    def _checked(self, reply: Message, node: int) -> tuple[Answer, float] | None:
        try:
            answer = decode_answer(self._rounds.opened(reply))
        except FederadError as error:
            if error.code == "S188" and self._roster.asks_again:  # the parcel that it names is not there
                self._lose(node, "its parcel has not arrived")
            else:
                self._leave_out(node, error.happened)
            return None
        if reason := self._roster.fault_of(node, answer.site):
            self._leave_out(node, reason)
            return None
        norm = norm_of(answer.update)
        if reason := self._fault(answer, norm):
            self._leave_out(node, reason)
            return None
        self._done(node)
        self.replied.append(answer.site)
        self.n_updates += bool(answer.update)
        self._rounds.tell("replied", self._question, site=answer.site, metrics=answer.metrics)
        return answer, norm

    def _fault(self, answer: Answer, norm: float) -> str | None:
        """Why an answer does not count; None if it does."""
        if answer.refusal:
            return answer.refusal
        if answer.site in self.replied:
            return "a second reply under the same name"
        if answer.question != self._question:
            return "answers another question"
        if self._question.kind not in ("train", "fingerprint"):
            return "an update nobody asked for" if answer.update or answer.moments else None
        if fault := fault_of(answer.moments, self._rounds.plan, self._question.round):
            return fault
        return None if self._rounds.trains_nothing(answer) else self._fault_of_update(answer, norm)

    def _fault_of_update(self, answer: Answer, norm: float) -> str | None:
        if mismatch := difference(answer.update, self._shapes):
            return mismatch
        weight = self._rounds.weight_of(answer)
        if weight < 1:
            return "trained on no patients"
        if not np.isfinite(norm):
            return "values that are not finite"
        limit = min(self._rounds.plan.strategy.max_update_norm, largest_norm(max(self._n_most, self.n_asked), weight))
        return f"norm {norm:.3g} above the limit of {limit:.3g}" if norm > limit else None

    def _leave_out(self, node: int, reason: str) -> None:
        self._done(node)
        site = self._roster.name_of(node)
        self.refused.append({"site": site, "reason": reason})
        log.warning("%s of round %d: %s left out: %s", *self._what(), site, reason)
        self._rounds.tell("left out", self._question, site=site, detail=reason)

    def _done(self, node: int) -> None:
        """Nothing more is expected of a node; what else was sent to it is forgotten."""
        asked = self._asked[node]
        asked.is_done = True
        for message_id in asked.messages:
            self._waiting.pop(message_id, None)

    def _what(self) -> tuple[str, int]:
        return self._question.kind, self._question.round


class Rounds:
    """One run of a plan.

    Parameters
    ----------
    plan, seed
        What is run, and the seed from which sites derive their randomness.
    grid
        Flower's way to the sites, or the simulation's.
    journal
        Where rounds become durable.
    run
        federad's own id of the run.
    weights
        Where training starts.
    roster
        Who is asked; every node of the grid unless given.
    depot
        Where questions and answers lie that are too long for Flower's own channel; without one there are none.
    on_progress
        Told what happens as it happens.
    """

    def __init__(
        self,
        plan: Plan,
        grid: Grid,
        journal: Journal,
        *,
        run: str,
        seed: int,
        weights: Weights,
        roster: Roster | None = None,
        depot: Depot | None = None,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self.plan, self.grid, self.run_id, self.seed = plan, grid, run, seed
        self.roster = roster or LearntRoster(grid)
        self._depot = depot
        self._journal = journal
        self._weights = weights
        self._on_progress = on_progress
        self._strategy = strategy_for(plan)
        self._moments = MomentsRule(plan, seed) if plan.asks_for_moments else None
        task = task_for(plan)
        stays = staying(plan, task.build_network()) if plan.strategy.name in OF_EACH_SITE else frozenset()
        self.shapes = {name: array.shape for name, array in weights.items() if name not in stays}
        self._headline, self._metrics = task.headline, tuple(task.metrics)
        self._records: list[RoundRecord] = []
        self._best: tuple[float, int] = (-np.inf, 0)
        self._average: Weights | None = None
        self._cost: dict[str, dict[str, float]] = {}

    def run(self) -> Outcome:
        """All rounds, then validation of the last weights and test of the best.

        Raises
        ------
        FederadError
            S180 if a round has fewer good replies than the plan's minimum, S181 if no site joins before the deadline,
            S197 if the journal is another run's or damaged, S198 if it cannot be written. Everything committed before
            stays in the journal.
        """
        self._go_on()
        self._wait_for_sites()
        for number in range(len(self._records) + 1, self.plan.rounds + 1):
            self._train(number)
        if self.plan.asks is not None:  # counts of images are no model, and nothing measures them
            nothing = Measured(None, {}, {})
            return Outcome(self._records, 1, self._weights, self._weights, nothing, dict(sorted(self._cost.items())))
        self._note_validation(self._measure("validate", self.plan.rounds, self._weights))
        best_round = self._best_round()
        if self._average is not None:
            best = self._average
        else:
            best = self._weights if best_round == self.plan.rounds else self._journal.weights(best_round)
        tested = self._measure("test", best_round, best)
        return Outcome(self._records, best_round, best, self._weights, tested, dict(sorted(self._cost.items())))

    def weight_of(self, answer: Answer) -> int:
        """How much an update counts: by patients, or all alike if the plan says so or ``[privacy]`` hides their number.

        Counts of a fingerprint are of patients themselves.
        """
        if self.plan.privacy is not None or self.plan.asks is not None:
            return 1
        trained = answer.counts.get("trained", 0)
        return min(trained, 1) if self.plan.strategy.weighting == "equal" else trained

    def trains_nothing(self, answer: Answer) -> bool:
        """Whether a site takes part with moments alone, since nobody has given it a reference."""
        may = self.plan.asks_for_moments and self.plan.takes_unlabelled
        return may and not answer.update and answer.counts.get("trained") == 0

    @property
    def adversary(self) -> float:
        """What the automatic stop has left of a plan's adversary."""
        return left_of_adversary(self.plan, [(record.validation or {}).get(self._headline) for record in self._records])

    def tell(self, what: Any, question: Question, **details: Any) -> None:
        """Report progress on a question."""
        self._on_progress(Progress(what, question.round, question.kind, **details))

    @contextmanager
    def enclosed(self, data: bytes) -> Iterator[RecordDict]:
        """The content of a message with ``data``, which lies in the depot while it is needed if it is long."""
        if self._depot is None or len(data) <= INLINE_LIMIT:
            yield pack(data)
            return
        from shared_models.wire import chunks

        reference = Reference(self._depot.put(chunks(data)), len(data))
        del data
        try:
            yield pack_reference(reference)
        finally:
            self._depot.drop(reference.sha256)

    def opened(self, reply: Message) -> bytes:
        """The bytes of a reply; those in the depot stay on the disk, and are gone from it when nobody looks at them.

        Raises
        ------
        FederadError
            S188 if they are not in the depot, M211 if they are not of the length that the reply says.
        """
        content = unpack(reply)
        if not isinstance(content, Reference):
            return content
        if self._depot is None:
            raise _unexpected("it names a parcel, and there is no depot here")
        with self._depot.path(content.sha256).open("rb") as stream:
            if stream.seek(0, 2) != content.n_bytes:
                raise _unexpected(f"its parcel has {stream.tell()} bytes instead of {content.n_bytes}")
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._depot.drop(content.sha256)
        return cast(bytes, mapped)  # it can be read and cut like bytes, and needs no memory of its own

    def _go_on(self) -> None:
        """Take up a run where its journal ends; a new journal has nothing to take up."""
        self._journal.begin(RunIdentity(self.run_id, self.seed, self.plan.sha256))
        self._records = [RoundRecord(**record) for record in self._journal.records()]
        if not self._records:
            return
        last = self._records[-1]
        self._cost = dict(last.cost)
        self._weights = self._journal.committed_weights(last.round, last.weights_sha256)
        if last.average_sha256 is not None:
            self._average = self._journal.committed_average(last.round, last.average_sha256)
        if last.state_sha256 is not None:
            state = self._journal.committed_state(last.round, last.state_sha256)
            self._strategy.state = self._moments.restore(state) if self._moments is not None else state
        for record in self._records[:-1]:  # the last round's weights are validated again, with the next question
            self._note_best(record)
        self._on_progress(Progress("resumed", last.round))

    def _train(self, number: int) -> None:
        began = time.monotonic()
        mean = ExactMean(self.shapes)
        per_step = ExactMean(self.shapes) if self._strategy.wants_mean_per_step else None
        losses: dict[str, tuple[float, int]] = {}
        control = self._strategy.control(self._weights)
        discriminator = self._moments.discriminator if self._moments is not None else {}
        exchange = self._exchange(self.plan.asks or "train", number, self._weights, control, discriminator)
        answers: list[Answer] = []
        moments: dict[str, Weights] = {}
        for answer, norm in exchange.answers():
            if answer.moments:
                moments[answer.site] = {name: array.copy() for name, array in answer.moments.items()}
            if not answer.update:
                answers.append(_without_update(answer))
                continue
            weight = self.weight_of(answer)
            mean.add(answer.update, weight, norm)
            if per_step is not None:
                n_steps = np.float32(local_steps(self.plan, answer.counts.get("trained", 0)))
                per_step.add({name: np.asarray(a / n_steps) for name, a in answer.update.items()}, weight, norm)
            if "training_loss" in answer.metrics:
                losses[answer.site] = (answer.metrics["training_loss"], weight)
            answers.append(_without_update(answer))
            del answer
        self._note_validation(self._measured(answers))
        self._require_minimum(exchange, number)
        if per_step is not None:
            share = len(exchange.replied) / (len(exchange.replied) + len(exchange.refused) + len(exchange.missing))
            self._strategy.learn(per_step.mean(), share=share, round_=number)
        self._weights = self._strategy.step(self._weights, mean.mean())
        noted = None
        if self._moments is not None and number in moments_rounds(self.plan):
            noted = asdict(self._moments.learn(moments, number))
        state = self._strategy.state | (self._moments.state if self._moments is not None else {})
        if (decay := self.plan.strategy.average_decay) is not None:
            self._average = averaged(self._average, self._weights, number, decay)
        record = RoundRecord(
            number,
            seconds=round(time.monotonic() - began, 3),
            replied=sorted(exchange.replied),
            cost=dict(sorted(self._cost.items())),
            refused=sorted(exchange.refused, key=lambda entry: entry["site"]),
            missing=sorted(exchange.missing),
            training_loss=_weighted_mean([losses[site] for site in sorted(losses)]),
            weights_sha256=weights_sha256(self._weights),
            average_sha256=weights_sha256(self._average) if self._average is not None else None,
            state_sha256=weights_sha256(state) if state else None,
            discriminator=noted,
        )
        self._records.append(record)
        self._journal.commit(number, asdict(record), self._weights, self._average, state)
        self._journal.keep_only(number, number - 1, self._best[1])
        self._on_progress(Progress("committed", number))

    def _measure(self, kind: AskKind, number: int, weights: Weights) -> Measured:
        exchange = self._exchange(kind, number, weights)
        return self._measured([answer for answer, _ in exchange.answers()])

    def _measured(self, answers: list[Answer]) -> Measured:
        if self.plan.privacy is not None:
            self._cost |= {answer.site: dict(answer.cost) for answer in answers if answer.cost}
        return _measured(answers)

    def _exchange(
        self,
        kind: AskKind,
        number: int,
        weights: Weights,
        control: Weights | None = None,
        discriminator: Weights | None = None,
    ) -> Exchange:
        control, discriminator = control or {}, discriminator or {}
        is_known = weights is self._weights and not control and not discriminator and self._records
        sha256 = self._records[-1].weights_sha256 if is_known else asked_sha256(weights, control, discriminator)
        question = Question(self.run_id, number, kind, self.plan.sha256, sha256)
        return Exchange(self, question, weights, control, discriminator)

    def _note_validation(self, measured: Measured) -> None:
        """Write down what the sites measured of the newest round's weights."""
        if not self._records or measured.mean is None:
            return
        record = self._records[-1]
        record.validation = self._named(measured.mean) or None
        record.per_site = {site: self._named(metrics) for site, metrics in measured.per_site.items()}
        self._journal.amend(record.round, asdict(record))
        self._note_best(record)

    def _named(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics that the task names; what else it tells is for the test at the end."""
        return {name: metrics[name] for name in self._metrics if name in metrics}

    def _note_best(self, record: RoundRecord) -> None:
        if record.validation is not None and self._headline in record.validation:
            self._best = max(self._best, (record.validation[self._headline], record.round))

    def _best_round(self) -> int:
        """The round whose weights are released; the last one where nobody has validation patients."""
        return self._best[1] or self.plan.rounds if self.plan.strategy.release == "best" else self.plan.rounds

    def _require_minimum(self, exchange: Exchange, number: int) -> None:
        if exchange.n_updates >= self.plan.strategy.minimum_sites:
            return
        others = [f"{e['site']} ({e['reason']})" for e in exchange.refused] + [
            f"{s} (no reply)" for s in exchange.missing
        ]
        raise FederadError(
            "S180",
            happened=f"Round {number} is paused: {exchange.n_updates} of {exchange.n_asked} sites gave a good reply, "
            f"the plan needs {self.plan.strategy.minimum_sites}. Without one: {', '.join(others) or 'none'}.",
            because=f"Fewer sites would make another model than the one agreed on. Rounds up to {number - 1} are kept.",
            remedies=(
                "bring the sites named above back and run again",
                "or agree on a plan with a lower minimum_sites or a longer deadline_s under [strategy]",
            ),
        )

    def _wait_for_sites(self) -> None:
        """Until the minimum is there: Flower's engine shows no node in the first moments of a run."""
        deadline = time.monotonic() + self.plan.strategy.deadline_s
        needed = self.plan.strategy.minimum_sites
        while (n_present := len(self.roster.present())) < needed:
            if time.monotonic() > deadline:
                raise FederadError(
                    "S181",
                    happened=f"{n_present} of at least {needed} sites have joined within "
                    f"{self.plan.strategy.deadline_s:g} s.",
                    because="The plan does not start with fewer.",
                    remedies=("start the sites that are missing", "or lower minimum_sites under [strategy]"),
                )
            self._on_progress(Progress("waiting", 0, n_sites=needed))
            time.sleep(max(POLL_S, self.roster.look_s))


def _unexpected(what: str) -> FederadError:
    return FederadError(
        "M211",
        happened=f"A reply cannot be read: {what}.",
        because="It is damaged, or was written by something other than federad.",
        remedies=("check that both sides run the same version of federad", "the site is left out of this round"),
    )


def _without_update(answer: Answer) -> Answer:
    """An answer without its arrays, which have been added up and need no more memory."""
    return Answer(answer.site, answer.question, metrics=answer.metrics, counts=answer.counts, cost=answer.cost)


def _measured(answers: list[Answer]) -> Measured:
    """Means over the sites that have a metric, weighted by patients measured, in the order of names so that arrival does
    not matter."""
    with_patients = sorted((a for a in answers if a.metrics and _n_measured(a)), key=lambda a: a.site)
    per_site = {
        a.site: {name: value for name, value in a.metrics.items() if name != "training_loss"} for a in with_patients
    }
    patients = {a.site: _n_measured(a) for a in with_patients}
    names = dict.fromkeys(name for metrics in per_site.values() for name in metrics)
    mean = {name: _weighted_mean([(m[name], patients[s]) for s, m in per_site.items() if name in m]) for name in names}
    return Measured({name: value for name, value in mean.items() if value is not None} or None, per_site, patients)


def _n_measured(answer: Answer) -> int:
    """How many patients an answer's metrics are about; under ``[privacy]`` the declared number stands for it."""
    return int(answer.counts.get("measured", 0) or answer.cost.get("declared_size", 0))


def _weighted_mean(pairs: list[tuple[float, int]]) -> float | None:
    """The mean of values with weights; None without any."""
    total = sum(weight for _, weight in pairs)
    return float(sum(value * weight for value, weight in pairs) / total) if total else None
