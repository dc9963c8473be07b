"""Runs of an operator: ordered, carried out by the ServerApp, stopped, resumed, looked at.

A run has federad's own id from beginning to end; Flower's changes with each attempt. What happened stands in the run's
folder (journal, events, result), what was ordered in the store (``consortium``). One process at a time carries out a run
and holds the folder's lock meanwhile, so that a process that was killed is known to be gone at once.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from server.bundle import RUN_KEY, make_bundle
from server.consortium import Consortium, RunRow
from server.superlink import SuperLink
from shared_models.consortium import Document
from shared_models.errors import FederadError
from shared_models.plan import Plan

if TYPE_CHECKING:  # the round loop loads torch, which a look at the runs does not need
    from flwr.serverapp import Grid

    from server.journal import Journal
    from server.rounds import Outcome, Progress
    from shared_models.fingerprint import Fingerprint
    from shared_models.release import Release

log = logging.getLogger(__name__)

State = Literal["offered", "starting", "waiting", "running", "paused", "interrupted", "stopped", "failed", "finished"]

ACTIVE: frozenset[str] = frozenset({"starting", "waiting", "running"})
"""States in which a process should be carrying out the run."""

RESUMABLE: frozenset[str] = frozenset({"offered", "paused", "interrupted", "stopped", "failed"})

PAUSING = frozenset({"S180", "S181", "S198", "S202"})
"""What a person can put right, so that the run can go on."""

LOCK_S = 90.0
"""How long a new process waits for the old one of the same run to end [s]; Flower takes up to 25 s to end a stopped one."""

LONGEST_NAME = 50
"""Characters of the plan's name in a run's id, which has at most 63."""

COMMON_NAMES = {"waiting": "waits for sites", "starting": "is being started"}


class Order(Document):
    """What the operator asked for when the run was ordered."""

    wait_for: int
    """Sites that must have approved and be online before the first round."""


@dataclass(frozen=True)
class Event:
    """One line of a run's history."""

    at: str
    what: str
    round: int = 0
    kind: str = ""
    site: str = ""
    detail: str = ""
    n_sites: int = 0


class RunFolder:
    """Everything of one run on the operator's disk.

    Parameters
    ----------
    folder
        The operator's folder.
    run
        federad's id.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.run = run
        self.path = folder / "runs" / run

    @cached_property
    def journal(self) -> Journal:
        """The run's journal."""
        from server.journal import Journal

        return Journal(self.path)

    @property
    def order(self) -> Order:
        """What was asked for."""
        return Order.decode((self.path / "order.json").read_bytes())

    @property
    def result(self) -> dict[str, Any] | None:
        """How the run ended; None while it has not."""
        return self._read("result.json")

    @property
    def error(self) -> dict[str, Any] | None:
        """Why the run last stopped before its end; None if it did not."""
        return self._read("error.json")

    def create(self, plan: Plan, order: Order) -> None:
        """Make the folder."""
        self.path.mkdir(mode=0o700, parents=True)
        self.write("plan.json", json.loads(plan.canonical_json()))
        self.write("order.json", order.model_dump())

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        temporary = self.path / f"{name}.part"
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(self.path / name)

    def records(self) -> list[dict[str, Any]]:
        """Committed rounds, oldest first; none before the first attempt."""
        return self.journal.records() if (self.path / "journal.sqlite").exists() else []

    def note(self, event: Progress) -> None:
        """Add to the history, for those who watch."""
        fields = {key: value for key, value in asdict(event).items() if key != "metrics"}
        line = {"at": datetime.now(UTC).isoformat(timespec="seconds"), **fields}
        with suppress(OSError), (self.path / "events.jsonl").open("a", encoding="utf-8") as stream:  # never stops a run
            stream.write(json.dumps(line) + "\n")

    def events(self, last: int = 200) -> list[Event]:
        """The end of the history."""
        try:
            with (self.path / "events.jsonl").open("rb") as stream:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - 300 * last))
                lines = stream.read().decode("utf-8", errors="replace").splitlines()
        except OSError:
            return []
        events = []
        for line in lines[-last:]:
            with suppress(ValueError, TypeError):  # the first of them may be cut
                events.append(Event(**json.loads(line)))
        return events

    @contextmanager
    def locked(self, timeout_s: float = 0.0, name: str = "lock") -> Iterator[None]:
        """Alone at this run; S196 if another process is at it for longer than ``timeout_s``."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        deadline = time.monotonic() + timeout_s
        with (self.path / name).open("a") as stream:
            while True:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise _in_no_state(self.run, "is being carried out by another process") from None
                    time.sleep(0.2)
            yield

    def is_carried_out(self) -> bool:
        """Whether a process holds the lock."""
        return is_locked(self.path / "lock")

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            content: dict[str, Any] = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock on a file; looking does not stand in another's way."""
    try:
        with path.open("r") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


# What the operator's commands do --------------------------------------------------------------------------------------


def order_run(consortium: Consortium, superlink: SuperLink, plan: Plan, seed: int, wait_for: int | None = None) -> str:
    """Offer a plan to all sites and start its run, which waits until enough have approved; federad's id of it.

    Raises
    ------
    FederadError
        S190 if the server is not running, S196 if fewer sites than the plan's minimum are asked for, S200 if the plan
        begins at a model that was never released here.
    """
    minimum = plan.strategy.minimum_sites
    if wait_for is not None and wait_for < minimum:
        raise FederadError(
            "S196",
            happened=f"--sites {wait_for} asks to begin with fewer sites than the plan's minimum of {minimum}.",
            because="A round needs the minimum, or makes another model than the one agreed on.",
            remedies=(f"--sites {minimum} or more", "or agree on a plan with a lower minimum_sites under [strategy]"),
        )
    require_running(superlink)
    _start_of(consortium, plan)
    run = f"{plan.name[:LONGEST_NAME]}-{uuid4().hex[:12]}"
    folder = RunFolder(consortium.folder, run)
    folder.create(plan, Order(wait_for=wait_for or minimum))
    consortium.offer(plan, run, seed)
    with folder.locked(name="launch.lock"):
        _launch(consortium, superlink, run)
    return run


def resume_run(consortium: Consortium, superlink: SuperLink, run: str) -> int:
    """Go on with a run from its last committed round; how many rounds are committed.

    Raises
    ------
    FederadError
        S184 if there is no such run, S190 if the server is not running, S196 if the run has ended or is going on.
    """
    folder = RunFolder(consortium.folder, run)
    consortium.run(run)
    require_running(superlink)
    with folder.locked(10.0, name="launch.lock"):
        row = consortium.run(run)
        state = state_of(consortium, superlink, row)
        if state == "finished":
            raise _in_no_state(run, "is finished", f"see its result: federad-server status {run}")
        if state in ACTIVE:
            raise _in_no_state(run, COMMON_NAMES.get(state, "is running"), f"follow it: federad-server watch {run}")
        _end_attempt(superlink, row)
        (folder.path / "error.json").unlink(missing_ok=True)
        _launch(consortium, superlink, run)
    return len(folder.records())


def stop_run(consortium: Consortium, superlink: SuperLink, run: str) -> None:
    """Stop a run; its committed rounds stay, and it can be resumed. S196 if it has ended."""
    folder = RunFolder(consortium.folder, run)
    consortium.run(run)
    with folder.locked(10.0, name="launch.lock"):
        row = consortium.run(run)
        if row.state == "finished":
            raise _in_no_state(run, "is finished", f"see its result: federad-server status {run}")
        consortium.set_run_state(run, "stopped")
        _end_attempt(superlink, row)


def state_of(consortium: Consortium, superlink: SuperLink, row: RunRow) -> State:
    """Where a run stands: what its process noted last, or ``interrupted`` if that process is gone."""
    state: State = row.state  # type: ignore[assignment]  # the store keeps the words that are given to it here
    if state not in ACTIVE or RunFolder(consortium.folder, row.run).is_carried_out():
        return state
    if state != "starting":  # its process held the lock when it noted this
        refreshed = consortium.run(row.run)
        return "interrupted" if refreshed.state == row.state else state_of(consortium, superlink, refreshed)
    try:
        status, _ = superlink.run_status(int(row.flower_run_id or 0))
    except FederadError:
        return "interrupted"
    return state if status in ("pending", "starting", "running") else "interrupted"


def require_running(superlink: SuperLink) -> None:
    """S190 unless the SuperLink answers."""
    if not superlink.is_healthy():
        raise FederadError(
            "S190",
            happened="The server of this operator's folder is not running.",
            because="Runs are carried out by it, and sites reach it.",
            remedies=("federad-server start", "or say which folder: --dir DIR, or FEDERAD_SERVER in the environment"),
        )


def _launch(consortium: Consortium, superlink: SuperLink, run: str) -> None:
    consortium.set_run_state(run, "starting", "")
    config = {RUN_KEY: run}
    flower_run_id = superlink.start_run(make_bundle(), config)
    consortium.set_run_state(run, "starting", flower_run_id)


def _end_attempt(superlink: SuperLink, row: RunRow) -> None:
    """Let Flower know that the last attempt is over; one that it does not know any more is."""
    if row.flower_run_id:
        with suppress(FederadError):
            superlink.stop_run(int(row.flower_run_id))


def fingerprint_of(consortium: Consortium, run: str) -> Fingerprint:
    """What the sites of a finished run that asked for fingerprints said together.

    Raises
    ------
    FederadError
        S184 if there is no such run, S243 if it asked for nothing of the kind or is not finished, S197 if its journal
        cannot be used.
    """
    from shared_models.fingerprint import Fingerprint

    row, folder = consortium.run(run), RunFolder(consortium.folder, run)
    if row.plan.asks != "fingerprint" or row.state != "finished":
        raise FederadError(
            "S243",
            happened=f"Run {run} trains a model."
            if row.plan.asks is None
            else f"Run {run} has not ended: its state is {row.state}.",
            because="A plan is configured from what all sites have said of their images.",
            remedies=(
                "federad-server fingerprint PLAN.toml asks the sites",
                f"follow a run that is going on: federad-server watch {run}",
            ),
        )
    (record,) = folder.records()
    mean = folder.journal.committed_weights(1, record["weights_sha256"])
    return Fingerprint.of(row.plan, mean, len(record["replied"]))


# What the ServerApp does ----------------------------------------------------------------------------------------------


def carry_out(grid: Grid, consortium: Consortium, run: str) -> None:
    """Wait for the sites, run the rounds, write down how it ended.

    Raises
    ------
    FederadError
        What the round loop raises (S180 and others); the state is ``paused`` or ``failed`` then, with ``error.json``.
    """
    folder = RunFolder(consortium.folder, run)
    with folder.locked(LOCK_S):
        row = _order_for(grid, consortium, run)
        if row is None:
            log.warning("run %s has been stopped or started anew since; this attempt ends", run)
            return
        _log_to(folder.path / "run.log")
        try:
            outcome = _rounds(grid, consortium, row, folder)
            release = _publish(consortium, folder, row, outcome) if row.plan.asks is None else None
        except FederadError as error:
            log.warning("run %s: %s", run, error)
            _leave(consortium, folder, "paused" if error.code in PAUSING else "failed", error.as_json())
            raise
        except Exception as error:
            log.exception("run %s failed", run)
            happened = f"Something unexpected happened ({type(error).__name__}); run.log in the run's folder has it."
            _leave(consortium, folder, "failed", {"error": "", "happened": happened})
            raise
        _finish(folder, row, outcome, release)
        consortium.set_run_state(run, "finished")
        consortium.close_run(run)


def _order_for(grid: Grid, consortium: Consortium, run: str, timeout_s: float = 20.0) -> RunRow | None:
    """The run, if this attempt is the one that was ordered last."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        row = consortium.run(run)
        if row.state not in ACTIVE:
            return None
        if row.flower_run_id == str(grid.run.run_id):
            return row
        if row.flower_run_id:
            return None
        time.sleep(0.2)  # the command that started us has not noted our number yet
    return None


def _rounds(grid: Grid, consortium: Consortium, row: RunRow, folder: RunFolder) -> Outcome:
    from server.roster import ApprovedRoster
    from server.rounds import RETURN_S, Progress, Rounds
    from shared_models.start import first_weights

    superlink = SuperLink(consortium.folder)
    roster = ApprovedRoster(grid, consortium, row.plan.sha256, superlink.n_starts)
    consortium.set_run_state(row.run, "waiting")
    wait_for = folder.order.wait_for
    deadline = time.monotonic() + RETURN_S if folder.records() else float("inf")
    n_before = -1
    while (n_present := len(roster.present())) < wait_for and time.monotonic() < deadline:
        if n_present != n_before:
            folder.note(Progress("waiting", len(folder.records()) + 1, n_sites=n_present, detail=f"of {wait_for}"))
        n_before = n_present
        time.sleep(roster.look_s)
    consortium.set_run_state(row.run, "running")
    return Rounds(
        row.plan,
        grid,
        folder.journal,
        run=row.run,
        seed=row.seed,
        weights=first_weights(row.plan, row.seed, _start_of(consortium, row.plan)),
        roster=roster,
        depot=consortium.depot,
        on_progress=folder.note,
    ).run()


def _start_of(consortium: Consortium, plan: Plan) -> Path | None:
    """The released model at which a plan begins, if it names one; S200 if it was never released here."""
    from server.registry import FOLDER, Registry

    return Registry(consortium.folder / FOLDER).path(plan.strategy.start) if plan.strategy.start else None


def _leave(consortium: Consortium, folder: RunFolder, state: State, error: dict[str, Any]) -> None:
    """Note that the run came to no end, unless the operator stopped it meanwhile."""
    with suppress(OSError):  # a full disk; run.log and the state may still have room
        folder.write("error.json", error)
    with suppress(sqlite3.Error):  # the server notes it as interrupted then
        if consortium.run(folder.run).state in ACTIVE:
            consortium.set_run_state(folder.run, state)


def _publish(consortium: Consortium, folder: RunFolder, row: RunRow, outcome: Outcome) -> Release:
    """Release the model that the plan chose; again after a crash, it is the same release."""
    from server.registry import FOLDER, Registry

    return Registry(consortium.folder / FOLDER).publish(
        row.plan,
        row.run,
        outcome.best,
        folder.records(),
        outcome.test,
        consortium.plan_key,
        consortium=consortium.config.name,
        cost=outcome.cost,
    )


def _finish(folder: RunFolder, row: RunRow, outcome: Outcome, release: Release | None) -> None:
    """``result.json``, in the form of a simulation's; the model lies in its release, counts of images in the journal."""
    from server.results import result_of
    from shared_models.task import task_for

    plan, task = row.plan, task_for(row.plan)
    folder.write(
        "result.json",
        {
            "plan": plan.name,
            "plan_sha256": plan.sha256,
            "run": row.run,
            "task": plan.task.kind,
            "headline": task.headline,
            "metrics": task.metrics,
            "engine": "deployment",
            "seed": row.seed,
            "sites": [{"name": site} for site in sorted({s for record in outcome.records for s in record.replied})],
            **result_of(plan, outcome),
            "release": release.sha256 if release is not None else None,
            "status": "finished",
        },
    )


def _log_to(file: Path) -> None:
    handler = logging.FileHandler(file, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    house = logging.getLogger("server")
    house.setLevel(logging.INFO)
    house.addHandler(handler)


def _in_no_state(run: str, what: str, remedy: str = "federad-server status") -> FederadError:
    return FederadError(
        "S196",
        happened=f"Run {run} {what}.",
        because="One process at a time carries out a run, from its first round to its last.",
        remedies=(remedy,),
    )
