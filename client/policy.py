"""What a hospital permits: which plans, at which hours, at which cost, and what may leave.

The table ``[policy]`` of ``site.toml`` says it; what is left out has a careful default. A decision is either
:class:`Permitted` or :class:`Refused`. A refusal tells the operator one word, which follows from public facts alone (the
plan, the declared size, the clock, what was charged: ``PRIVACY_RULES``, rule 18), and somebody here a numbered error. The
number of patients, which is not public, is looked at when a person approves a plan, and never after.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, time
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from client.accounting import (
    WITHOUT_PRIVACY,
    Event,
    calibrate,
    delta_limit,
    epsilon,
    filter_order,
    image_epsilon,
)
from client.ledger import Agreement, Caps, Spent, check_caps
from shared_models.errors import FederadError
from shared_models.messages import Refusal
from shared_models.plan import Plan, PrivacyTable
from shared_models.schedule import moments_rounds

Rule = Literal["allowed", "noised", "forbidden"]
"""Whether values of a kind may leave: as they are, only with noise that was paid for, or not at all."""

Kind = Literal["update", "fingerprint", "metric", "count", "moments", "status", "progress", "scanners"]

ALWAYS = "always"


def _hours(text: str) -> str:
    if text != ALWAYS and not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d", text):
        raise ValueError('write "always" or a time from and to, such as "20:00-06:00"')
    if text != ALWAYS and text[:5] == text[6:]:
        raise ValueError('from and to are the same time: write "always" or two different ones')
    return text


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Releases(_Table):
    """``[policy.releases]``: what may leave, by kind."""

    update: Rule | None = Field(default=None, description="weights after training")
    fingerprint: Rule | None = Field(
        default=None, description="how many patients have images of which spacing and size, before a plan"
    )
    metric: Rule | None = Field(default=None, description="means of measurements over patients")
    count: Rule | None = Field(default=None, description="numbers of patients")
    moments: Rule | None = Field(default=None, description="sums of features over the patients of each scanner")
    status: Literal["allowed", "forbidden"] = Field(
        default="allowed", description="that a plan was approved or refused"
    )
    progress: Literal["allowed", "forbidden"] = Field(default="allowed", description="tenths of a round that are done")
    scanners: Literal["allowed", "forbidden"] = Field(
        default="allowed", description="the scanners that site.toml names; none are told where it names none"
    )


class Policy(_Table):
    """``[policy]``: what this hospital permits."""

    lifetime_epsilon: float = Field(
        default=10.0, gt=0, description="most that all runs together may cost a patient, for ever [epsilon]"
    )
    run_epsilon: float = Field(default=8.0, gt=0, description="most that one run may cost a patient [epsilon]")
    minimum_patients: int = Field(
        default=10, ge=1, description="a plan that would train on fewer patients is not approved"
    )
    tasks: tuple[str, ...] | None = Field(
        default=None, description="kinds of task that may be trained; leave it out for all"
    )
    hours: Annotated[str, AfterValidator(_hours)] = Field(
        default=ALWAYS, description='when rounds may begin, local time: "always" or "20:00-06:00"'
    )
    max_rounds: int = Field(default=1000, ge=1, description="most rounds of one run")
    without_privacy: bool = Field(
        default=False, description="whether plans without [privacy] may train here: nothing then protects a patient"
    )
    image_level: bool = Field(
        default=False, description='whether plans with unit = "image" may train here: they do not protect patients'
    )
    releases: Releases = Field(default_factory=Releases, description="what may leave, by kind")

    @classmethod
    def for_emulated(cls, given: Self | None = None) -> Self:
        """The policy of an emulated hospital, which protects nobody: what ``given`` does not say is open."""
        open_ = cls(
            lifetime_epsilon=math.inf,
            run_epsilon=math.inf,
            minimum_patients=1,
            max_rounds=10_000,
            without_privacy=True,
            image_level=True,
        )
        said = given.model_fields_set if given else set()
        return open_.model_copy(update={key: getattr(given, key) for key in said})

    def rule(self, kind: Kind, *, private: bool) -> Rule:
        """What holds for a kind of release, for plans with or without ``[privacy]``.

        What the hospital did not say is ``noised`` with privacy, and ``allowed`` without, where the plan itself had to be
        permitted.
        """
        said: Rule | None = getattr(self.releases, kind)
        return said or ("noised" if private else "allowed")

    def caps(self, cost: Cost) -> Caps:
        """What the ledger holds a run to; nothing bounds a permitted run without privacy."""
        if not cost.is_private:
            return Caps(run=math.inf, delta=cost.delta, lifetime=math.inf, lifetime_delta=cost.lifetime_delta)
        return Caps(
            run=self.run_epsilon, delta=cost.delta, lifetime=self.lifetime_epsilon, lifetime_delta=cost.lifetime_delta
        )

    def at_approval(self, plan: Plan, cost: Cost, *, n_patients: int, spent: Spent) -> Permitted | Refused:
        """Whether somebody here may approve a plan.

        Parameters
        ----------
        cost
            Of the plan here (:func:`cost_of`).
        n_patients
            That it would train on, exactly: it stays in the message for the person here.
        spent
            Everything charged so far.
        """
        if n_patients < self.minimum_patients:
            return Refused(
                "declined",
                _outside(
                    f"the plan would train on {n_patients} patients, and minimum_patients is {self.minimum_patients}"
                ),
            )
        decision = self._of_plan(plan, cost)
        if isinstance(decision, Refused):
            return decision
        try:
            check_caps(spent, "", cost.events, self.caps(cost))
        except FederadError as error:
            return Refused("budget", error)
        return decision

    def at_round(self, plan: Plan, cost: Cost, round_: int, now: datetime) -> Permitted | Refused:
        """Whether a round of an approved plan may begin; what it costs is for the ledger to allow.

        Parameters
        ----------
        now
            Local time.
        """
        if not is_open(self.hours, now.time()):
            return Refused(
                "hours",
                FederadError(
                    "C171",
                    happened=f"A round was asked for at {now:%H:%M}, and hours under [policy] is {self.hours!r}.",
                    because="Outside these hours this site does not train.",
                    remedies=(
                        "nothing: the operator can ask again when the hours begin",
                        'or set hours = "always" under [policy] in site.toml and start the site again',
                    ),
                ),
            )
        if round_ > min(plan.rounds, self.max_rounds):
            return Refused(
                "policy", _outside(f"round {round_} is beyond the last of {min(plan.rounds, self.max_rounds)}")
            )
        return self._of_plan(plan, cost)

    def _of_plan(self, plan: Plan, cost: Cost) -> Permitted | Refused:
        """What follows from the plan alone."""
        if self.tasks is not None and plan.task.kind not in self.tasks:
            return _no(f"its task is {plan.task.kind}, and tasks is {list(self.tasks)}")
        if plan.rounds > self.max_rounds:
            return _no(f"it has {plan.rounds} rounds, and max_rounds is {self.max_rounds}")
        if plan.privacy is None and not self.without_privacy:
            return _no("it has no [privacy], and without_privacy is false")
        if plan.privacy is not None and plan.privacy.unit == "image" and not self.image_level:
            return _no(
                f"it protects images and not patients (epsilon {cost.epsilon:.4g} for a patient), and image_level is false"
            )
        kind: Kind = "fingerprint" if plan.asks == "fingerprint" else "update"
        rule = self.rule(kind, private=plan.privacy is not None)
        if rule == "forbidden" or (rule == "noised" and plan.privacy is None):
            return _no(f"no such {kind} may leave: releases.{kind} is {rule!r}")
        return Permitted(cost)


@dataclass(frozen=True)
class Cost:
    """What a plan costs a patient here, if all of it is run once."""

    declared_size: int
    """Public, rounded number of patients (or images) that training draws from."""

    noise_multiplier: float
    """0 without privacy."""

    sampling_rate: float
    steps_per_round: int
    rounds: int
    events: tuple[Event, ...]
    """Of the whole run."""

    epsilon: float
    """Of the whole run for a patient, by PRV; infinity without privacy."""

    epsilon_by_rdp: float
    image_epsilon: float | None
    """For one image, of an image-level plan: the smaller figure that such plans are advertised with."""

    delta: float
    lifetime_delta: float
    lifetime_before: float
    """Epsilon of everything so far, by the Renyi filter at ``order``."""

    lifetime_after: float
    order: float | None
    """None for a plan without privacy, before anything was charged."""

    metrics_every: int = 0
    metrics_noise: float | None = None
    unit: Literal["patient", "image"] = "patient"
    images_per_patient: int = 1
    moments_rounds: range = range(0)
    """In which moments of features leave."""

    moments_noise: float | None = None

    @property
    def is_private(self) -> bool:
        """Whether the plan has a table [privacy]."""
        return self.noise_multiplier > 0

    def of_round(self, round_: int) -> tuple[Event, ...]:
        """What a round releases, counted from 1: its training steps, and metrics and moments of the weights that came, if
        due."""
        if not self.is_private:
            return (WITHOUT_PRIVACY,)
        metrics = self._metrics(1, "validation") if self.has_metrics(round_) else ()
        moments = _moment_events(self.moments_noise, 1) if round_ in self.moments_rounds else ()
        return (self._training(self.steps_per_round), *metrics, *moments)

    def has_metrics(self, round_: int) -> bool:
        """Whether a round releases noised metrics."""
        return bool(self.metrics_every) and round_ % self.metrics_every == 0

    def of_test(self) -> tuple[Event, ...]:
        """What the one measurement at the end releases; nothing where the plan has no noised metrics."""
        if not self.is_private:
            return (WITHOUT_PRIVACY,)
        return self._metrics(1, "test")

    def agreement(self, plan_sha256: str) -> Agreement:
        """To be written into the ledger with the approval."""
        return Agreement(
            plan_sha256=plan_sha256,
            declared_size=self.declared_size,
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.sampling_rate,
            epsilon=self.epsilon if math.isfinite(self.epsilon) else None,
            delta=self.delta,
        )

    def _training(self, steps: int) -> Event:
        return Event(
            self.noise_multiplier, self.sampling_rate, steps, unit=self.unit, images_per_patient=self.images_per_patient
        )

    def _metrics(self, n: int, split: Literal["validation", "test"]) -> tuple[Event, ...]:
        return (Event(self.metrics_noise, 1.0, n, split=split),) if self.metrics_noise and n else ()


@dataclass(frozen=True)
class Permitted:
    """Yes, at this cost."""

    cost: Cost


@dataclass(frozen=True)
class Refused:
    """No."""

    word: Refusal
    """What the operator hears."""

    error: FederadError
    """What somebody here reads."""


def round_size(n: int) -> int:
    """A public number near ``n`` to propose as the declared size: 5, 10, ..., 95, 100, 150, ..., 950, 1000, 1500, ..."""
    step = 5 * int(10 ** max(0, len(str(n)) - 2))
    return max(step, (2 * n + step) // (2 * step) * step)


def require_round(declared: int) -> int:
    """The declared size, which must be one that :func:`round_size` gives.

    Raises
    ------
    FederadError
        C173 if it is not: an exact number of patients tells whether one of them is here.
    """
    if declared >= 1 and round_size(declared) == declared:
        return declared
    raise FederadError(
        "C173",
        happened=f"{declared} patients were declared, which is not a rounded number.",
        because="The declared number is public and stands in the arithmetic; an exact one would tell of single patients.",
        remedies=(f"declare {round_size(max(declared, 1))}", "it need not be exact: noise and sampling follow from it"),
    )


def require_known_start(plan: Plan, spent: Spent) -> None:
    """Make sure that what patients paid for the model at which a plan begins stands on the ledger.

    Raises
    ------
    FederadError
        C178 if the plan begins at a model, and its run was never charged here.
    """
    if plan.strategy.start is None or plan.strategy.start_run in spent.runs:
        return
    made_by = f"run {plan.strategy.start_run}" if plan.strategy.start_run else "a run that it does not name"
    raise FederadError(
        "C178",
        happened=f"The plan begins at a model made by {made_by}, of which this site's ledger knows nothing.",
        because="If patients of this hospital were used for that model, it may tell of them already, and nobody has "
        "counted that: the plan's epsilon would say too little.",
        remedies=(
            f"if you know that no patient of this hospital was: federad-site approve {plan.name} --start-is-foreign",
            f"else: federad-site refuse {plan.name}, and ask the operator for a plan without start",
        ),
    )


def is_open(hours: str, now: time) -> bool:
    """Whether rounds may begin: from the first time on, and before the second, over midnight too."""
    if hours == ALWAYS:
        return True
    start, end = (time.fromisoformat(part) for part in hours.split("-"))
    return start <= now < end if start < end else now >= start or now < end


def cost_of(
    plan: Plan,
    declared_size: int,
    spent: Spent,
    *,
    lifetime_cap: float = math.inf,
    agreed: Agreement | None = None,
) -> Cost:
    """What a plan would cost a patient here.

    Parameters
    ----------
    declared_size
        Public number of patients that training draws from (images, where ``unit = "image"``).
    spent
        Everything charged so far.
    lifetime_cap
        From which the filter's order follows, where nothing was charged yet.
    agreed
        What was found when the plan was approved: its noise then stands, and is not looked for again.

    Raises
    ------
    FederadError
        C172 if no noise is enough, C174 if the plan's delta is too large for so few patients, C175 without an accountant.
    """
    privacy = plan.privacy
    size = require_round(declared_size)
    lifetime_delta = delta_limit(size)
    if privacy is None:
        return Cost(
            declared_size=size,
            noise_multiplier=0.0,
            sampling_rate=1.0,
            steps_per_round=1,
            rounds=plan.rounds,
            events=(WITHOUT_PRIVACY,),
            epsilon=math.inf,
            epsilon_by_rdp=math.inf,
            image_epsilon=None,
            delta=lifetime_delta,
            lifetime_delta=lifetime_delta,
            lifetime_before=spent.lifetime_epsilon(lifetime_delta),
            lifetime_after=math.inf,
            order=spent.order,
        )
    if privacy.delta > lifetime_delta:
        raise FederadError(
            "C174",
            happened=f"The plan has delta = {privacy.delta:g}, and with {size} patients declared it may be at most "
            f"{lifetime_delta:g}.",
            because="Delta is the probability that the promise fails; it must be well below one patient in all.",
            remedies=("let the operator know: delta in the plan has to be smaller", "or refuse the plan"),
        )
    rate = min(1.0, privacy.patients_per_step / size)
    steps = privacy.steps_per_round * plan.rounds
    images = privacy.images_per_patient or 1
    metrics = _metric_events(privacy, plan.rounds)
    asked, moments_noise = moments_rounds(plan), plan.adaptation.moments_noise if plan.adaptation else None
    extra = (*metrics, *_moment_events(moments_noise, len(asked)))
    # The epsilon of an image-level plan is an image's; what it means for a patient is reckoned from the noise.
    counted = extra if privacy.unit == "patient" else ()
    noise = (
        (agreed.noise_multiplier if agreed else None)
        or privacy.noise_multiplier
        or calibrate(_given(privacy), privacy.delta, rate, steps, counted)
    )
    training = Event(noise, rate, steps, unit=privacy.unit, images_per_patient=images)
    events = (training, *extra)
    order = spent.order or filter_order(lifetime_cap if math.isfinite(lifetime_cap) else 10.0, lifetime_delta, events)
    return Cost(
        declared_size=size,
        noise_multiplier=noise,
        sampling_rate=rate,
        steps_per_round=privacy.steps_per_round,
        rounds=plan.rounds,
        events=events,
        epsilon=epsilon(events, privacy.delta),
        epsilon_by_rdp=epsilon(events, privacy.delta, accountant="rdp"),
        image_epsilon=image_epsilon([training], privacy.delta) if privacy.unit == "image" else None,
        delta=privacy.delta,
        lifetime_delta=lifetime_delta,
        lifetime_before=spent.lifetime_epsilon(lifetime_delta, order),
        lifetime_after=spent.lifetime_epsilon(lifetime_delta, order, run="", more=events),
        order=order,
        metrics_every=privacy.metrics_every,
        metrics_noise=privacy.metrics_noise,
        unit=privacy.unit,
        images_per_patient=images,
        moments_rounds=asked,
        moments_noise=moments_noise,
    )


def _given(privacy: PrivacyTable) -> float:
    if privacy.epsilon is None:
        raise ValueError("a [privacy] table with neither epsilon nor noise_multiplier")
    return privacy.epsilon


def _metric_events(privacy: PrivacyTable, rounds: int) -> Sequence[Event]:
    """Noised metrics of a whole run: of validation patients now and then, of test patients once at the end."""
    if not privacy.metrics_every or privacy.metrics_noise is None:
        return ()
    n = rounds // privacy.metrics_every
    validation = (Event(privacy.metrics_noise, 1.0, n, split="validation"),) if n else ()
    return (*validation, Event(privacy.metrics_noise, 1.0, 1, split="test"))


def _moment_events(noise: float | None, n: int) -> tuple[Event, ...]:
    """So many releases of moments, each a sum over all training patients."""
    return (Event(noise, 1.0, n, split="train"),) if noise and n else ()


def _no(why: str) -> Refused:
    return Refused("policy", _outside(why))


def _outside(why: str) -> FederadError:
    return FederadError(
        "C170",
        happened=f"This site's policy does not permit the plan: {why}.",
        because="What [policy] in site.toml does not permit does not happen here, whatever the server asks for.",
        remedies=(
            "federad-site refuse PLAN lets the operator know",
            "or change [policy] in site.toml, with whoever is responsible for data protection here",
        ),
    )
