"""The one door: whatever leaves the hospital passes here, or does not leave.

Every outgoing number is a :class:`Release` of a named kind. The gate knows which kinds may leave, and it alone builds
the bytes that the courier carries: answers to questions, and notices of what this site decided and how far it is. What
the policy of the hospital says of a kind holds here: it leaves, it leaves only with noise that was paid for, or it stays.
Under ``[privacy]`` nothing that was computed from patients leaves without noise, whatever the policy says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from client.policy import Policy
from shared_models.consortium import Notice
from shared_models.errors import FederadError
from shared_models.messages import Answer, Question, Refusal, encode_answer
from shared_models.scanners import is_scanner
from shared_models.weights import norm_of

Kind = Literal["update", "fingerprint", "metric", "count", "cost", "moments"]
"""What may leave in an answer: a model update, counts of spacings and sizes of images, means over this site's patients,
numbers of patients, what privacy costs, sums of features by scanner."""

NoticeKind = Literal["status", "progress", "scanners"]
"""What may leave in a notice: a word about this site, how far it is in a round, the scanners that somebody here typed."""

StatusWord = Literal["approved", "refused", "started"]
"""Every word of a status: a plan was approved or refused here; the station was started."""

TICKS = 10
"""Progress leaves in tenths of a round: neither the number of steps nor of patients can be read off it."""


@dataclass(frozen=True)
class Release:
    """Something that is about to leave."""

    kind: Kind | NoticeKind
    value: Mapping[str, Any]
    is_noised: bool = False
    """Whether it came out of a mechanism whose noise was paid for."""


@dataclass(frozen=True)
class Passed:
    """What passed the door for one question."""

    answer: bytes
    manifest: dict[str, Any]
    """For this site's own people: by kind, the ``names`` in it; of an update each array's ``shapes`` and the joint L2
    ``norm``; of moments their ``shapes``; of a cost its ``values``, which are arithmetic on public numbers. Nothing
    else's values."""


class Gate:
    """The door of one site.

    Parameters
    ----------
    site
        The site's name, as the consortium knows it.
    policy
        What the hospital permits.
    """

    def __init__(self, site: str, policy: Policy | None = None) -> None:
        self.site = site
        self._policy = policy or Policy()

    def release(self, question: Question, releases: Sequence[Release], *, is_private: bool = False) -> Passed:
        """The bytes that answer ``question``, and what is in them. A kind that the policy does not let out is left out.

        Parameters
        ----------
        is_private
            Whether the plan has a table ``[privacy]``.

        Raises
        ------
        FederadError
            C147 if a kind is not on the list, comes twice, holds a value that is not finite, or is exact under
            ``[privacy]``.
        """
        values: dict[str, dict[str, Any]] = {}
        norms: dict[str, float] = {}
        for release in releases:
            if release.kind not in get_args(Kind) or release.kind in values:
                raise _not_released(f"a release of kind {release.kind!r}, which is unknown or came twice")
            if release.kind != "cost":
                if is_private and not release.is_noised:
                    raise _not_released(f"a release of kind {release.kind!r} that has no noise, under [privacy]")
                rule = self._policy.rule(release.kind, private=is_private)
                if rule == "forbidden" or (rule == "noised" and not release.is_noised):
                    continue
            values[release.kind] = {name: _EXACT[release.kind](value) for name, value in release.value.items()}
            norms[release.kind] = norm_of(values[release.kind])
            if not math.isfinite(norms[release.kind]):
                raise _not_released(f"a value of kind {release.kind!r} that is not a finite number")
        answer = Answer(
            site=self.site,
            question=question,
            update=values.get("update", {}) | values.get("fingerprint", {}),
            metrics=values.get("metric", {}),
            counts=values.get("count", {}),
            cost=values.get("cost", {}),
            moments=values.get("moments", {}),
        )
        return Passed(
            encode_answer(answer), {kind: _manifest(kind, named, norms[kind]) for kind, named in values.items()}
        )

    def refuse(self, question: Question | None, refusal: Refusal) -> bytes:
        """The bytes that say no, with a reason from the closed list and nothing else.

        Raises
        ------
        FederadError
            C147 for a reason that is not on the list.
        """
        if refusal not in get_args(Refusal):
            raise _not_released("a reason that is not on the list")
        return encode_answer(Answer(site=self.site, question=question, refusal=refusal))

    def notice(self, release: Release, *, plan_sha256: str = "", run: str = "") -> Notice | None:
        """What the operator is told outside an answer, about a plan and a run where it concerns one.

        None where the policy keeps such notices here.

        A ``status`` holds ``word``, one of :data:`StatusWord`; ``progress`` holds ``round`` and ``tick``, the tenths of
        the round that are done; ``scanners`` holds ``names``, each of a known maker and in plain characters.

        Raises
        ------
        FederadError
            C147 for another kind, another word, or a tick that is not one of ten.
        """
        value = dict(release.value)
        if (
            release.kind in get_args(NoticeKind)
            and self._policy.rule(cast("NoticeKind", release.kind), private=False) == "forbidden"
        ):
            return None
        if release.kind == "status" and value.keys() == {"word"} and value["word"] in get_args(StatusWord):
            word: StatusWord = value["word"]
            kind = "status" if word == "started" else word
            return Notice(kind=kind, plan_sha256=plan_sha256, run=run, word=word)
        if release.kind == "progress" and value.keys() == {"round", "tick"}:
            round_, tick = (_whole_number(value[key]) for key in ("round", "tick"))
            if tick <= TICKS:
                return Notice(kind="progress", plan_sha256=plan_sha256, run=run, round=round_, done=tick, total=TICKS)
        if (
            release.kind == "scanners"
            and value.keys() == {"names"}
            and all(is_scanner(name) for name in value["names"])
        ):
            return Notice(kind="scanners", scanners=tuple(value["names"]))
        raise _not_released(f"a notice of kind {release.kind!r}, which is unknown or holds something else than it may")


def _manifest(kind: str, values: Mapping[str, Any], norm: float) -> dict[str, Any]:
    if kind in ("update", "moments"):
        shapes = {name: list(array.shape) for name, array in values.items()}
        return {"shapes": shapes, "norm": norm} if kind == "update" else {"shapes": shapes}
    return {"values": dict(values)} if kind == "cost" else {"names": sorted(values)}


def _whole_number(value: Any) -> int:
    if isinstance(value, bool) or not float(value).is_integer() or value < 0:
        raise _not_released("a count that is not a whole number")
    return int(value)


def _float32(value: Any) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # what overflows becomes infinite and is stopped as such
        return np.asarray(value, np.float32)


_EXACT: dict[str, Callable[[Any], Any]] = {
    "update": _float32,
    "fingerprint": _float32,
    "metric": float,
    "count": _whole_number,
    "cost": float,
    "moments": _float32,
}
"""What the values of each kind are made into before they are looked at, so that what is checked is what leaves."""


def _not_released(what: str) -> FederadError:
    return FederadError(
        "C147",
        happened=f"The gate stopped {what}.",
        because="Only what is named and whole may leave this site.",
        remedies=("look at the training log of this site for the round's loss", "report it if the plan is in order"),
    )
