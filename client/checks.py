"""Is all in order here? What ``federad-site check`` looks at, each part under the account that will need it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.folder import SiteFolder
from shared_models.errors import FederadError

CHECK_S = 3600.0
"""Longest time for one part: the first look at a large data folder reads every file's header [s]."""

SOON_DAYS = 14
"""A certificate with less life than this should have been renewed [days]."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    text: str
    error: dict[str, Any] | None = None
    """The numbered error, as :meth:`FederadError.as_json` gives it; None if all is well."""

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def run_checks(folder: SiteFolder) -> list[Check]:
    """Both parts, each in a process under its own account."""
    return [one for part in ("station", "courier") for one in _elsewhere(folder, part)]


def run_check(folder: SiteFolder, part: str) -> list[Check]:
    """The checks of one part, in this process."""
    looked: dict[str, Callable[[], str]]
    if part == "station":
        looked = {"data": lambda: _data(folder.station), "ledger": lambda: _ledger(folder.station)}
    else:
        looked = {"keys": lambda: _keys(folder.courier), "connection": lambda: _connection(folder.courier)}
    return [_looked_at(name, look) for name, look in looked.items()]


def _looked_at(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, look())
    except FederadError as error:
        return Check(name, error.happened, error.as_json())


def _data(station: Path) -> str:
    """Look through the data folder; files seen before are not opened again."""
    from client.data.catalogue import Catalogue
    from client.site import SiteConfig
    from client.station import CATALOGUE

    config = SiteConfig.load(station)
    secret = (station / "secret").read_bytes()
    catalogue = Catalogue.build(station / CATALOGUE, Path(config.data), secret=secret)
    studies = catalogue.studies()
    patients = len({study.patient for study in studies})
    return f"{patients} patients, {len(studies)} studies in {config.data}"


def _ledger(station: Path) -> str:
    """The whole ledger and its anchor, read and checked."""
    from client.station import Station

    opened = Station(station)
    n_runs = len(opened.ledger().spent().runs)
    text = f"{n_runs} runs charged"
    if opened.config.anchor is None and not opened.config.emulated:
        return (
            f"{text}; its anchor lies beside it and is lost with it: set anchor in site.toml to a file on another disk"
        )
    return text


def _keys(courier: Path) -> str:
    from client.enrolment import certificate_ends
    from client.link import Membership

    member = Membership.load(courier)
    ends = certificate_ends(courier)
    days = (ends - datetime.now(UTC)).days
    if days < 0:
        raise FederadError(
            "C154",
            happened=f"This site's certificate ended on {ends:%Y-%m-%d}.",
            because="It is renewed while federad-site runs, before it ends.",
            remedies=("ask the operator for a new invitation and enrol again",),
        )
    soon = " (start federad-site to renew it)" if days < SOON_DAYS else ""
    return f"{member.site} in {member.name}; certificate good for {days} days{soon}"


def _connection(courier: Path) -> str:
    """The whole way there and back; the clock is compared on it."""
    from client.link import Link

    with Link.open(courier) as link:
        offered = len(link.plans())
        way = f"through {link.proxy}" if link.proxy else "directly"
        return f"{link.host}:{link.port} reached {way}, clocks agree, {offered} plans offered"


def _elsewhere(folder: SiteFolder, part: str) -> Iterator[Check]:
    """A part in a process of its own, which takes the account of its folder."""
    from client.supervisor import command

    done = subprocess.run(  # noqa: S603  # our own command
        [*command(), "check", "--part", part, "--json", "--site", str(folder.root)],
        capture_output=True,
        text=True,
        check=False,
        timeout=CHECK_S,
    )
    results = json.loads(done.stdout)
    if isinstance(results, dict):  # an error in place of a list
        results = [Check(part, results["happened"], results).as_json()]
    yield from (Check(**one) for one in results)
