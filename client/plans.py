"""The plans of a site: offered by the operator, approved or refused here.

A plan is offered with the operator's signature, which is checked with the key that this site pinned when it enrolled.
Nothing is approved by itself: somebody at the hospital says yes or no, and what is approved is a hash, so that a plan
changed afterwards is another plan::

    plans/offered/<sha256>.json   the signed offer
    plans/refused/<sha256>        plans that were refused here
    plans/<sha256>.json           plans approved here (canonical JSON)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from client.processes import write_durably
from shared_models.consortium import Document, SignedPlan
from shared_models.errors import FederadError
from shared_models.plan import Plan
from shared_models.signing import load_public

State = Literal["offered", "approved", "refused"]

PIN = "consortium.json"
"""In the station's folder: whose plans are listened to. The courier, which is not trusted, cannot write there."""

LONGEST_OFFER = 1 << 20
"""Bytes of a signed plan."""


class Pin(Document):
    """The operator, as this site knows it."""

    consortium: str
    plan_key_pem: str


@dataclass(frozen=True)
class ListedPlan:
    """A plan that was offered here, and what this site said."""

    plan: Plan
    state: State
    run: str
    """The run it was last offered for."""

    issued: str
    """When the operator signed that offer."""


class Plans:
    """The plans in a station's folder.

    Parameters
    ----------
    folder
        The station's.
    """

    def __init__(self, folder: Path) -> None:
        self._pin = folder / PIN
        self._approved = folder / "plans"
        self._offered = folder / "plans" / "offered"
        self._refused = folder / "plans" / "refused"

    @property
    def pinned(self) -> bool:
        """Whether this site has enrolled, so that there is somebody to tell things to."""
        return self._pin.exists()

    def trust(self, consortium: str, plan_key_pem: str) -> None:
        """Listen to the operator of ``consortium``, who signs plans with this key."""
        load_public(plan_key_pem)
        write_durably(self._pin, Pin(consortium=consortium, plan_key_pem=plan_key_pem).encode())

    def offer(self, data: bytes) -> SignedPlan | None:
        """Keep an offered plan for somebody to decide on.

        Returns
        -------
        SignedPlan or None
            The offer; None if it has been here before.

        Raises
        ------
        FederadError
            C159 if it was not signed by this site's operator, or is no plan of this version.
        """
        signed = self._verified(data)
        file = self._offered / f"{signed.plan_sha256}.json"
        if _read(file) == (content := signed.encode()):
            return None
        self._offered.mkdir(parents=True, exist_ok=True)
        write_durably(file, content)
        return signed

    def state(self, sha256: str) -> State:
        """What this site said to a plan; ``offered`` while it said nothing."""
        if (self._approved / f"{sha256}.json").exists():
            return "approved"
        return "refused" if (self._refused / sha256).exists() else "offered"

    def approved(self, sha256: str) -> Plan | None:
        """The approved plan with this hash; None if there is none, or if its file holds another."""
        known = {file.stem: file for file in self._approved.glob("*.json")}
        if sha256 not in known:
            return None
        plan = _plan_of(known[sha256].read_text(encoding="utf-8"))
        return plan if plan.sha256 == sha256 else None

    def all_approved(self) -> list[Plan]:
        """Every plan that may train here."""
        plans = (self.approved(file.stem) for file in sorted(self._approved.glob("*.json")))
        return [plan for plan in plans if plan is not None]

    def code_of(self, sha256: str) -> str | None:
        """Hash of the code with which a plan was approved; None if that was not noted."""
        content = _read(self._approved / f"{sha256}.code")
        return content.decode("ascii", "replace") if content is not None else None

    def approve(self, plan: Plan, code: str) -> None:
        """Let a plan train here, by the code with this hash."""
        self._approved.mkdir(exist_ok=True)
        write_durably(self._approved / f"{plan.sha256}.code", code.encode("ascii"))
        write_durably(self._approved / f"{plan.sha256}.json", plan.canonical_json().encode())
        (self._refused / plan.sha256).unlink(missing_ok=True)

    def refuse(self, plan: Plan) -> None:
        """Let a plan train here no more."""
        self._refused.mkdir(parents=True, exist_ok=True)
        (self._refused / plan.sha256).touch()
        for kind in ("json", "code"):
            (self._approved / f"{plan.sha256}.{kind}").unlink(missing_ok=True)

    def listed(self) -> list[ListedPlan]:
        """Every plan that was offered here, the newest first."""
        return sorted(self._listed(), key=lambda listed: (listed.issued, listed.plan.sha256), reverse=True)

    def named(self, name: str) -> ListedPlan:
        """The offered plan with this name, or whose hash begins so.

        Raises
        ------
        FederadError
            C160 if none or several fit.
        """
        listed = self.listed()
        fitting = [one for one in listed if one.plan.name == name or (name and one.plan.sha256.startswith(name))]
        if len(fitting) == 1:
            return fitting[0]
        shown = ", ".join(f"{one.plan.name} {one.plan.sha256[:12]}" for one in fitting or listed)
        raise FederadError(
            "C160",
            happened=f"{len(fitting) or 'No'} plans fit {name!r}. {'These' if fitting else 'Offered'}: {shown or 'none'}.",
            because="A plan is approved or refused by its hash, so it must be clear which one is meant.",
            remedies=(
                "federad-site plans lists them; give the first characters of the hash",
                "a plan appears there a few seconds after the operator offers it, while this site is started",
            ),
        )

    def run_of(self, sha256: str) -> str:
        """The run that a plan was last offered for; empty if it never was."""
        data = _read(self._offered / f"{sha256}.json")
        return SignedPlan.decode(data).run if data else ""

    def _listed(self) -> Iterator[ListedPlan]:
        for file in self._offered.glob("*.json"):
            try:
                signed = self._verified(file.read_bytes())
            except FederadError:  # of an earlier version or consortium: nothing to decide on any more
                continue
            plan = Plan.model_validate_json(signed.plan)
            yield ListedPlan(plan, self.state(plan.sha256), signed.run, signed.issued)

    def _verified(self, data: bytes) -> SignedPlan:
        if len(data) > LONGEST_OFFER:
            raise _not_taken(f"it has {len(data)} bytes")
        if (pinned := _read(self._pin)) is None:
            raise _not_taken("this site has not enrolled, and knows no operator")
        pin = Pin.decode(pinned)
        try:
            signed = SignedPlan.decode(data)
            signed.verify(load_public(pin.plan_key_pem))
        except FederadError as error:
            raise _not_taken("its signature does not hold" if error.code == "M212" else "it cannot be read") from None
        if signed.consortium != pin.consortium:
            raise _not_taken("it belongs to another consortium")
        try:
            plan = Plan.model_validate_json(signed.plan)
        except ValueError:
            raise _not_taken("it was written for another version of federad") from None
        if plan.canonical_json() != signed.plan:
            raise _not_taken("it reads differently in this version of federad, so that its hash is another")
        return signed


@lru_cache(maxsize=8)
def _plan_of(text: str) -> Plan:
    """A plan from its canonical JSON; each question of a run names the same one."""
    return Plan.model_validate_json(text)


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None


def _not_taken(why: str) -> FederadError:
    return FederadError(
        "C159",
        happened=f"An offered plan was not taken: {why}.",
        because="Only a plan that the operator signed as it stands can be put before somebody here to decide on.",
        remedies=(
            "tell the operator, who can offer it again",
            "if the operator runs another version of federad, bring both to the same one",
            "if the consortium was set up anew, enrol this site again",
        ),
    )
