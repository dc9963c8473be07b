"""Is all in order here? What ``federad-site check`` looks at, each part under the account that will need it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.folder import SiteFolder
from shared_models.errors import FederadError

if TYPE_CHECKING:
    from shared_models.plan import Plan

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


def run_checks(folder: SiteFolder, plan: str | None = None) -> list[Check]:
    """Both parts, each in a process under its own account; with a plan, the data against it."""
    return [one for part in ("station", "courier") for one in _elsewhere(folder, part, plan)]


def run_check(folder: SiteFolder, part: str, plan: str | None = None) -> list[Check]:
    """The checks of one part, in this process."""
    looked: dict[str, Callable[[], str]]
    if part == "station":
        looked = {
            "device": lambda: "trains on {}: {}".format(*_device(folder.station)),
            "data": lambda: _data(folder.station, plan),
            "ledger": lambda: _ledger(folder.station),
        }
    else:
        looked = {"keys": lambda: _keys(folder.courier), "connection": lambda: _connection(folder.courier)}
    return [_looked_at(name, look) for name, look in looked.items()]


def _looked_at(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, look())
    except FederadError as error:
        return Check(name, error.happened, error.as_json())


def _data(station: Path, wanted: str | None) -> str:
    """Look through the data folder and write the page; files seen before are not opened again.

    With a plan its cohort is prepared, which an approval would do too.
    """
    from client.data.catalogue import Catalogue
    from client.data.cohort import Cohort, cohort_key
    from client.exclusions import left_out
    from client.page import write
    from client.readiness import against, look
    from client.site import SiteConfig
    from client.station import CATALOGUE

    config = SiteConfig.load(station)
    secret = (station / "secret").read_bytes()
    plan = None if wanted is None else _plan(station, wanted)
    catalogue = Catalogue.build(station / CATALOGUE, Path(config.data), secret=secret)
    try:
        device = _device(station)
    except FederadError as error:
        device = ("nothing", error.happened)
    found = look(config.name, Path(config.data), catalogue, secret, device)
    page = write(station, found)
    text = f"{found.n_patients} patients, {found.n_studies} studies in {config.data}"
    if plan is not None:
        excluded = left_out(station, Path(config.data), secret)
        cohort = Cohort.build(station / "cohorts" / cohort_key(plan), catalogue, plan, secret=secret, excluded=excluded)
        against(found, plan, cohort)
        page = write(station, found)
        text += f"; {sum(found.splits.values())} patients fit {plan.name}, {len(cohort.skipped)} studies do not"
    n_skipped = sum(found.skipped_files.values())
    text += f"; {n_skipped} files left out" if n_skipped else ""
    text += f"; look at {found.n_suspected} series" if found.n_suspected else ""
    return f"{text}; see {page}"


def _plan(station: Path, wanted: str) -> Plan:
    """A plan file, or a plan that was offered here."""
    from client.plans import Plans
    from shared_models.plan import Plan

    return Plan.load(Path(wanted)) if wanted.endswith(".toml") else Plans(station).named(wanted).plan


def _device(station: Path) -> tuple[str, str]:
    """The device that training would use, and why."""
    import torch

    from client.site import SiteConfig
    from client.training import choose_device

    wanted = SiteConfig.load(station).device
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted.startswith("cuda") and int(wanted.partition(":")[2] or 0) >= n_gpus:
        raise FederadError(
            "C117",
            happened=f'site.toml says device = "{wanted}", and {n_gpus or "no"} GPU can be used here.',
            because="Training would fail in its first round.",
            remedies=(
                "check the driver with nvidia-smi, and that the account that runs the station may use the GPU",
                'or set device = "auto" or "cpu" in site.toml',
            ),
        )
    chosen = choose_device(wanted)
    if not chosen.startswith("cuda"):
        reason = "site.toml says so" if wanted == "cpu" else "no GPU can be used here"
        return f"the CPU, {torch.get_num_threads()} threads", reason
    one = torch.cuda.get_device_properties(chosen)
    reason = "the first GPU there is" if wanted == "auto" else "site.toml says so"
    return f"{one.name}, {one.total_memory / 1e9:.0f} GB", f"{reason}, of {n_gpus}"


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
    soon = " (federad-site renew gives it a new one)" if days < SOON_DAYS else ""
    return f"{member.site} in {member.name}; certificate good for {days} days{soon}"


def _connection(courier: Path) -> str:
    """The whole way there and back; the clock is compared on it."""
    from client.link import Link

    with Link.open(courier) as link:
        offered = len(link.plans())
        way = f"through {link.proxy}" if link.proxy else "directly"
        return f"{link.host}:{link.port} reached {way}, clocks agree, {offered} plans offered"


def _elsewhere(folder: SiteFolder, part: str, plan: str | None) -> Iterator[Check]:
    """A part in a process of its own, which takes the account of its folder."""
    from client.supervisor import command

    done = subprocess.run(  # noqa: S603  # our own command
        [*command(), "check", *([plan] if plan else []), "--part", part, "--json", "--site", str(folder.root)],
        capture_output=True,
        text=True,
        check=False,
        timeout=CHECK_S,
    )
    results = json.loads(done.stdout)
    if isinstance(results, dict):  # an error in place of a list
        results = [Check(part, results["happened"], results).as_json()]
    yield from (Check(**one) for one in results)
