"""What the server asks a site and what a site answers.

One message a round carries the weights in and all releases out. Both are safetensors bytes (see ``weights``) with a JSON
header, so that one byte string can be carried by Flower, kept in a station's store and sent again unchanged. The courier
at the site moves these bytes and reads nothing in them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any, Literal, get_args

from shared_models.errors import FederadError
from shared_models.weights import Weights, decode, encode, weights_sha256

SITE_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"
"""What a site may be called: it appears in logs, tables and file names."""

AskKind = Literal["train", "validate", "test", "fingerprint"]
"""``train``: validate the incoming weights, then train from them. ``validate``, ``test``: measure them on that split.
``fingerprint``: count spacings and sizes of images, for a plan that asks for nothing else."""

Refusal = Literal[
    "unreadable",
    "unknown-plan",
    "other-weights",
    "answered-before",
    "no-patients",
    "policy",
    "budget",
    "hours",
    "declined",
    "failed",
]
"""Every reason a site may give for not answering: a short closed list, so that a reason reveals nothing else.

``policy``, ``budget`` and ``hours`` follow from the plan, the clock, the site's rules and what was charged, all of which
are public; whatever depends on data is ``declined``.
"""


@dataclass(frozen=True)
class Question:
    """What makes a question the same question: asked twice, it gets the same answer."""

    run: str
    """federad's own id of the run, kept when a run is resumed."""

    round: int
    """Counted from 1; ``validate`` and ``test`` carry the round whose weights they bring."""

    kind: AskKind
    plan_sha256: str
    weights_sha256: str
    """Of everything that came with it: :func:`asked_sha256`."""


@dataclass(frozen=True)
class Ask:
    """A question with the weights it is about."""

    question: Question
    seed: int
    """Seed of the run, from which sites derive their own (never used for privacy)."""

    weights: Weights
    control: Weights = field(default_factory=dict)
    """The server's control variate, named like the weights, for the strategy that has one."""
    adversary: float = 1.0
    """What the run's automatic stop has left of the plan's adversary, 0 to 1; read where there is one."""
    discriminator: Weights = field(default_factory=dict)
    """The one that the server has trained on feature moments (``moments``); empty where there is none."""


COST = frozenset({"epsilon", "delta", "declared_size"})
"""What a cost says, where there is one."""


@dataclass(frozen=True)
class Answer:
    """What passed a site's gate for one question."""

    site: str
    question: Question | None
    """The question answered; None if it could not be read."""

    refusal: Refusal | None = None
    update: Weights = field(default_factory=dict)
    """New minus old weights, or the counts of a fingerprint; empty unless the site trained or counted."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Means over this site's patients, finite."""

    counts: Mapping[str, int] = field(default_factory=dict)
    """Numbers of patients, at least 0; none under ``[privacy]``."""

    cost: Mapping[str, float] = field(default_factory=dict)
    """Under ``[privacy]``: ``epsilon`` and ``delta`` of the run so far for a patient, and the ``declared_size`` they follow
    from; also ``image_epsilon``, of the whole run, if the plan's unit is one image. Arithmetic on public numbers."""

    moments: Weights = field(default_factory=dict)
    """Sums of features by scanner, in rounds in which the plan asks for them (``moments``)."""


CONTROL = "control:"
"""Before the name of each array of a control variate; no parameter's name has a colon."""

DISCRIMINATOR = "discriminator:"
"""Before the name of each array of a discriminator that came from the server."""

MOMENTS = "moments:"
"""Before the name of each array of moments."""


def asked_sha256(weights: Weights, control: Weights, discriminator: Weights | None = None) -> str:
    """SHA-256 of all arrays of a question, 64 hex digits; that of the weights where there is nothing else."""
    return weights_sha256(_together(weights, control, discriminator or {}))


def encode_ask(ask: Ask) -> bytes:
    """The bytes of a question."""
    header = {**asdict(ask.question), "seed": ask.seed, "adversary": ask.adversary}
    return encode(_together(ask.weights, ask.control, ask.discriminator), json.dumps(header, sort_keys=True))


def decode_ask(data: bytes) -> Ask:
    """Read a question; its weights are checked against their hash.

    Raises
    ------
    FederadError
        M211 if the bytes are not a whole and consistent question.
    """
    arrays, text = decode(data)
    header = _header(text, Question.__annotations__.keys() | {"seed", "adversary"})
    seed, adversary = header.pop("seed"), header.pop("adversary")
    question = _question(header)
    if not _is_finite(adversary) or not 0 <= adversary <= 1:
        raise _unreadable("what is left of the adversary is no share")
    if not _is_int(seed) or question.weights_sha256 != weights_sha256(arrays):
        raise _unreadable("the weights are not the ones it names")
    rest, control = parted(arrays, CONTROL)
    weights, discriminator = parted(rest, DISCRIMINATOR)
    return Ask(question, seed, weights, control, adversary, discriminator)


def _together(weights: Weights, control: Weights, discriminator: Weights) -> Weights:
    return weights | prefixed(CONTROL, control) | prefixed(DISCRIMINATOR, discriminator)


def prefixed(prefix: str, arrays: Weights) -> Weights:
    """The arrays under names that begin with ``prefix``."""
    return {prefix + name: array for name, array in arrays.items()}


def parted(arrays: Weights, prefix: str) -> tuple[Weights, Weights]:
    """The arrays whose names do not begin with ``prefix``, and those that do, under the rest of their names."""
    others = {name: array for name, array in arrays.items() if not name.startswith(prefix)}
    return others, {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}


def encode_answer(answer: Answer) -> bytes:
    """The bytes of an answer. At a site, only the gate calls this."""
    header = {
        "site": answer.site,
        "question": asdict(answer.question) if answer.question else None,
        "refusal": answer.refusal,
        "metrics": dict(answer.metrics),
        "counts": dict(answer.counts),
        "cost": dict(answer.cost),
    }
    arrays = answer.update | prefixed(MOMENTS, answer.moments)
    return encode(arrays, json.dumps(header, sort_keys=True, allow_nan=False))


def decode_answer(data: bytes) -> Answer:
    """Read an answer; every field of its header has the type it should have.

    Raises
    ------
    FederadError
        M211 if the bytes are not a whole answer.
    """
    arrays, text = decode(data)
    update, moments = parted(arrays, MOMENTS)
    header = _header(text, {"site", "question", "refusal", "metrics", "counts", "cost"})
    site, refusal, metrics, counts, cost = (header[key] for key in ("site", "refusal", "metrics", "counts", "cost"))
    question = None if header["question"] is None else _question(header["question"])
    if not isinstance(site, str) or not re.fullmatch(SITE_NAME, site):
        raise _unreadable("the site has no name")
    if refusal is not None and refusal not in get_args(Refusal):
        raise _unreadable("the reason is not on the list")
    if not isinstance(metrics, dict) or not all(_is_finite(v) for v in metrics.values()):
        raise _unreadable("a metric is not a finite number")
    if not isinstance(counts, dict) or not all(_is_int(v) and v < 2**31 for v in counts.values()):
        raise _unreadable("a count is not a whole number")
    if not isinstance(cost, dict) or not all(_is_finite(v) for v in cost.values()):
        raise _unreadable("a cost is not a finite number")
    if cost and not COST <= cost.keys() <= COST | {"image_epsilon"}:
        raise _unreadable("a cost lacks one of its figures, or has another")
    if cost and (min(cost.values()) < 0 or not 1 <= cost["declared_size"] < 2**31):
        raise _unreadable("a cost is none that can be")
    return Answer(site, question, refusal, update, metrics, counts, cost, moments)


def _header(text: str, keys: set[str]) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise _unreadable("its header is not JSON") from None
    if not isinstance(header, dict) or header.keys() != keys:
        raise _unreadable("its header has other fields")
    return header


def _question(fields: Any) -> Question:
    if not isinstance(fields, dict) or fields.keys() != Question.__annotations__.keys():
        raise _unreadable("its header has other fields")
    words = [fields[key] for key in ("run", "kind", "plan_sha256", "weights_sha256")]
    if not all(isinstance(word, str) and len(word) <= 200 for word in words) or not _is_int(fields["round"]):
        raise _unreadable("its header has values of another type")
    if fields["kind"] not in get_args(AskKind):
        raise _unreadable("its kind or round is none that exists")
    return Question(**fields)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_finite(value: object) -> bool:
    return isinstance(value, float) and isfinite(value)


def _unreadable(reason: str) -> FederadError:
    return FederadError(
        "M211",
        happened=f"A message cannot be read: {reason}.",
        because="It is damaged, or was written by something other than federad.",
        remedies=("check that both sides run the same version of federad", "ask the other side to send it again"),
    )
