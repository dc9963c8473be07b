"""The round loop: ask, wait until the deadline, check, add up as replies arrive, commit.

It replaces Flower's own ``Strategy.start``, which holds all replies in memory, accepts what it should not and ends the
run on the first bad shape. Here a reply that fails a check is named and left out, and the round goes on; a round with too
few good replies pauses the run and loses nothing that was committed.

The metrics of a round's weights arrive with the replies of the next round, since one message carries both; the last
round is followed by one question that validates and one that tests.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from server.accumulator import ExactMean, largest_norm, norm_of
from server.journal import Journal
from server.strategies import strategy_for
from shared_models.errors import FederadError
from shared_models.messages import Answer, Ask, AskKind, Question, decode_answer, encode_ask
from shared_models.parcel import pack, unpack
from shared_models.plan import Plan
from shared_models.task import task_for
from shared_models.weights import Weights, difference, weights_sha256

log = logging.getLogger(__name__)

POLL_S = 0.05
"""Pause between two looks for replies when none has come [s]; a Grid with sockets waits longer by itself."""


@dataclass(frozen=True)
class Progress:
    """Something worth showing while a run goes on."""

    what: Literal["waiting", "asked", "replied", "left out", "committed"]
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
    weights_sha256: str = ""


@dataclass(frozen=True)
class Measured:
    """Metrics of one set of weights at all sites that replied."""

    mean: dict[str, float] | None
    per_site: dict[str, dict[str, float]]
    patients: dict[str, int]


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    records: list[RoundRecord]
    best_round: int
    best: Weights
    last: Weights
    test: Measured
    """Metrics of the best weights on the sites' test patients."""


class Exchange:
    """One question to all sites, and their checked answers as they arrive.

    After :meth:`answers` is exhausted, ``refused`` and ``missing`` say what became of the others.
    """

    def __init__(self, rounds: Rounds, question: Question, weights: Weights) -> None:
        self._rounds = rounds
        self._question = question
        self._shapes = {name: array.shape for name, array in weights.items()}
        self._data = encode_ask(Ask(question, rounds.seed, weights))
        self.replied: list[str] = []
        self.refused: list[dict[str, str]] = []
        self.missing: list[str] = []
        self.n_asked = 0

    def answers(self) -> Iterator[tuple[Answer, float]]:
        """Each good answer with the norm of its update; the others are named in ``refused`` and ``missing``."""
        plan, grid = self._rounds.plan, self._rounds.grid
        deadline = time.monotonic() + plan.strategy.deadline_s
        nodes = sorted(grid.get_node_ids())
        self.n_asked = len(nodes)
        content = pack(self._data)
        group = str(self._question.round)
        messages = [
            Message(content, node, MessageType.QUERY, ttl=plan.strategy.deadline_s, group_id=group) for node in nodes
        ]
        waiting = dict(zip(grid.push_messages(messages), nodes, strict=True))
        self._rounds.tell("asked", self._question, n_sites=len(nodes))
        while waiting and time.monotonic() < deadline:
            replies = list(grid.pull_messages(list(waiting)))
            for reply in replies:
                node = waiting.pop(reply.metadata.reply_to_message_id)
                if time.monotonic() > deadline:
                    self._leave_out(self._rounds.name_of(node), "late")
                elif (checked := self._checked(reply, node)) is not None:
                    self.replied.append(checked[0].site)
                    yield checked
            if waiting and not replies:
                time.sleep(POLL_S)
        self.missing += [self._rounds.name_of(node) for node in waiting.values()]
        for name in self.missing:
            self._rounds.tell("left out", self._question, site=name, detail="no reply")

    def _checked(self, reply: Message, node: int) -> tuple[Answer, float] | None:
        if reply.has_error():
            self.missing.append(self._rounds.name_of(node))
            return None
        try:
            answer = decode_answer(unpack(reply))
        except FederadError as error:
            self._leave_out(self._rounds.name_of(node), error.happened)
            return None
        self._rounds.learn_name(node, answer.site)
        norm = norm_of(answer.update)
        if reason := self._fault(answer, norm):
            self._leave_out(answer.site, reason)
            return None
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
        if self._question.kind != "train":
            return "an update nobody asked for" if answer.update else None
        if mismatch := difference(answer.update, self._shapes):
            return mismatch
        weight = answer.counts.get("trained", 0)
        if weight < 1:
            return "trained on no patients"
        if not np.isfinite(norm):
            return "values that are not finite"
        limit = min(self._rounds.plan.strategy.max_update_norm, largest_norm(self.n_asked, weight))
        return f"norm {norm:.3g} above the limit of {limit:.3g}" if norm > limit else None

    def _leave_out(self, site: str, reason: str) -> None:
        self.refused.append({"site": site, "reason": reason})
        log.warning("%s of round %d: %s left out: %s", self._question.kind, self._question.round, site, reason)
        self._rounds.tell("left out", self._question, site=site, detail=reason)


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
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self.plan, self.grid, self.run_id, self.seed = plan, grid, run, seed
        self._journal = journal
        self._weights = weights
        self._on_progress = on_progress
        self._strategy = strategy_for(plan)
        self._headline = task_for(plan).headline
        self._names: dict[int, str] = {}
        self._records: list[RoundRecord] = []
        self._best: tuple[float, int] = (-np.inf, 0)

    def run(self) -> Outcome:
        """All rounds, then validation of the last weights and test of the best.

        Raises
        ------
        FederadError
            S180 if a round has fewer good replies than the plan's minimum, S181 if no site joins before the deadline.
            Everything committed before stays in the journal.
        """
        self._wait_for_sites()
        for number in range(1, self.plan.rounds + 1):
            self._train(number)
        self._note_validation(self._measure("validate", self.plan.rounds, self._weights))
        best_round = self._best_round()
        best = self._weights if best_round == self.plan.rounds else self._journal.weights(best_round)
        return Outcome(self._records, best_round, best, self._weights, self._measure("test", best_round, best))

    def tell(self, what: Any, question: Question, **details: Any) -> None:
        """Report progress on a question."""
        self._on_progress(Progress(what, question.round, question.kind, **details))

    def name_of(self, node: int) -> str:
        """The site behind a node, once it has given its name."""
        return self._names.get(node, f"node {node}")

    def learn_name(self, node: int, site: str) -> None:
        """Remember which site a node is."""
        self._names.setdefault(node, site)

    def _train(self, number: int) -> None:
        began = time.monotonic()
        mean = ExactMean({name: array.shape for name, array in self._weights.items()})
        losses: dict[str, tuple[float, int]] = {}
        exchange = self._exchange("train", number, self._weights)
        answers: list[Answer] = []
        for answer, norm in exchange.answers():
            weight = answer.counts["trained"]
            mean.add(answer.update, weight, norm)
            if "training_loss" in answer.metrics:
                losses[answer.site] = (answer.metrics["training_loss"], weight)
            answers.append(_without_update(answer))
        self._note_validation(_measured(answers))
        self._require_minimum(exchange, number)
        self._weights = self._strategy.step(self._weights, mean.mean())
        record = RoundRecord(
            number,
            seconds=round(time.monotonic() - began, 3),
            replied=sorted(exchange.replied),
            refused=sorted(exchange.refused, key=lambda entry: entry["site"]),
            missing=sorted(exchange.missing),
            training_loss=_weighted_mean([losses[site] for site in sorted(losses)]),
            weights_sha256=weights_sha256(self._weights),
        )
        self._records.append(record)
        self._journal.commit(number, asdict(record), self._weights)
        self._journal.keep_only(number, number - 1, self._best[1])
        self._on_progress(Progress("committed", number))

    def _measure(self, kind: AskKind, number: int, weights: Weights) -> Measured:
        exchange = self._exchange(kind, number, weights)
        return _measured([answer for answer, _ in exchange.answers()])

    def _exchange(self, kind: AskKind, number: int, weights: Weights) -> Exchange:
        return Exchange(self, Question(self.run_id, number, kind, self.plan.sha256, weights_sha256(weights)), weights)

    def _note_validation(self, measured: Measured) -> None:
        """Write down what the sites measured of the newest round's weights."""
        if not self._records or measured.mean is None:
            return
        record = self._records[-1]
        record.validation, record.per_site = measured.mean, measured.per_site
        self._journal.amend(record.round, asdict(record))
        self._best = max(self._best, (measured.mean[self._headline], record.round))

    def _best_round(self) -> int:
        """The round with the best validation; the last one where nobody has validation patients."""
        return self._best[1] or self.plan.rounds

    def _require_minimum(self, exchange: Exchange, number: int) -> None:
        if len(exchange.replied) >= self.plan.strategy.minimum_sites:
            return
        others = [f"{e['site']} ({e['reason']})" for e in exchange.refused] + [
            f"{s} (no reply)" for s in exchange.missing
        ]
        raise FederadError(
            "S180",
            happened=f"Round {number} is paused: {len(exchange.replied)} of {exchange.n_asked} sites gave a good reply, "
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
        while len(list(self.grid.get_node_ids())) < needed:
            if time.monotonic() > deadline:
                raise FederadError(
                    "S181",
                    happened=f"{len(list(self.grid.get_node_ids()))} of at least {needed} sites have joined within "
                    f"{self.plan.strategy.deadline_s:g} s.",
                    because="The plan does not start with fewer.",
                    remedies=("start the sites that are missing", "or lower minimum_sites under [strategy]"),
                )
            self._on_progress(Progress("waiting", 0, n_sites=needed))
            time.sleep(POLL_S)


def _without_update(answer: Answer) -> Answer:
    """An answer without its arrays, which have been added up and need no more memory."""
    return Answer(answer.site, answer.question, metrics=answer.metrics, counts=answer.counts)


def _measured(answers: list[Answer]) -> Measured:
    """Means over sites, weighted by patients measured, in the order of names so that arrival does not matter."""
    with_patients = sorted((a for a in answers if a.counts.get("measured", 0)), key=lambda a: a.site)
    per_site = {
        a.site: {name: value for name, value in a.metrics.items() if name != "training_loss"} for a in with_patients
    }
    patients = {a.site: a.counts["measured"] for a in with_patients}
    names = list(per_site[with_patients[0].site]) if with_patients else []
    mean = {name: float(_weighted_mean([(per_site[s][name], patients[s]) for s in per_site]) or 0.0) for name in names}
    return Measured(mean or None, per_site, patients)


def _weighted_mean(pairs: list[tuple[float, int]]) -> float | None:
    """The mean of values with weights; None without any."""
    total = sum(weight for _, weight in pairs)
    return float(sum(value * weight for value, weight in pairs) / total) if total else None
