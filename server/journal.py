"""The journal: every round durable before the next begins.

A folder with one SQLite file of round records and the weights of the rounds worth keeping (the last and the best) as
safetensors. A round is committed when its record is in SQLite; its weights are on disk before that, file and folder both.
Whoever opens the journal again finds the run's own id, seed and plan in it, and the last committed round whole.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared_models.errors import FederadError
from shared_models.weights import Weights, decode, encode, weights_sha256


@dataclass(frozen=True)
class RunIdentity:
    """What a run is, for ever: a run that goes on with another of these would be another run."""

    run: str
    """federad's own id."""

    seed: int
    plan_sha256: str


class Journal:
    """Rounds of one run, in a folder.

    Parameters
    ----------
    folder
        Made if it is not there.

    Promise
        Killed at any moment, it reopens as a whole beginning of the run: every record has its place, and the weights of
        the last committed round are those that were committed. Holds as far as the disk keeps what it says it has kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with _written():
            folder.mkdir(parents=True, exist_ok=True)
            with self._change() as db:
                db.execute("CREATE TABLE IF NOT EXISTS rounds (round INTEGER PRIMARY KEY, record TEXT NOT NULL)")
                db.execute(
                    "CREATE TABLE IF NOT EXISTS identity (one INTEGER PRIMARY KEY CHECK (one), text TEXT NOT NULL)"
                )

    def begin(self, identity: RunIdentity) -> None:
        """Note whose journal this is, or make sure of it.

        Raises
        ------
        FederadError
            S197 if it is another run's.
        """
        with _written(), self._change() as db:
            db.execute("INSERT OR IGNORE INTO identity VALUES (1, ?)", (json.dumps(asdict(identity), sort_keys=True),))
        if (kept := self.identity()) != identity:
            raise FederadError(
                "S197",
                happened=f"The journal in {self._folder.name} is that of run {kept.run if kept else 'nobody'}, with "
                f"another plan or seed than run {identity.run}.",
                because="Rounds of one run continued as another would make a model that nobody agreed on.",
                remedies=(
                    "resume the run that the journal belongs to",
                    "or start a new run: it gets a journal of its own",
                ),
            )

    def identity(self) -> RunIdentity | None:
        """Whose journal this is; None if nobody has said."""
        with closing(self._connect()) as db:
            row = db.execute("SELECT text FROM identity").fetchone()
        return RunIdentity(**json.loads(row[0])) if row else None

    def commit(
        self,
        round_: int,
        record: dict[str, Any],
        weights: Weights,
        average: Weights | None = None,
        state: Weights | None = None,
    ) -> None:
        """Make a round durable: its weights first, with the average over rounds and the strategy's state where there is
        such a thing, then its record.

        Raises
        ------
        FederadError
            S198 if the disk is full or cannot be written; the rounds before stay as they are.
        """
        self._keep(self.weights_path(round_), round_, weights)
        if average is not None:
            self._keep(self.average_path(round_), round_, average)
        if state:
            self._keep(self.state_path(round_), round_, state)
        self.amend(round_, record)

    def _keep(self, path: Path, round_: int, weights: Weights) -> None:
        temporary = path.with_suffix(".part")
        with _written():
            with temporary.open("wb") as stream:
                stream.write(encode(weights, json.dumps({"round": round_})))
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
            _sync_folder(self._folder)

    def amend(self, round_: int, record: dict[str, Any]) -> None:
        """Write a round's record, or what became known of it later (its weights are validated in the next round)."""
        text = json.dumps(record)
        with _written(), self._change() as db:
            db.execute("INSERT OR REPLACE INTO rounds VALUES (?, ?)", (round_, text))

    def records(self) -> list[dict[str, Any]]:
        """All committed rounds, oldest first."""
        with closing(self._connect()) as db:
            return [json.loads(row[0]) for row in db.execute("SELECT record FROM rounds ORDER BY round")]

    def weights(self, round_: int) -> Weights:
        """The weights after a round that was kept."""
        return decode(self.weights_path(round_).read_bytes())[0]

    def average(self, round_: int) -> Weights | None:
        """The average over the rounds up to one that was kept; None in plans that do not release it."""
        path = self.average_path(round_)
        return decode(path.read_bytes())[0] if path.exists() else None

    def committed_weights(self, round_: int, sha256: str) -> Weights:
        """The weights after a round, which must be those that its record names."""
        return self._committed(self.weights_path(round_), round_, sha256)

    def committed_average(self, round_: int, sha256: str) -> Weights:
        """The average over the rounds up to one, which must be the one that its record names."""
        return self._committed(self.average_path(round_), round_, sha256)

    def committed_state(self, round_: int, sha256: str) -> Weights:
        """What the strategy remembered after a round, which must be what its record names."""
        return self._committed(self.state_path(round_), round_, sha256)

    def _committed(self, path: Path, round_: int, sha256: str) -> Weights:
        """What a round's record names.

        Raises
        ------
        FederadError
            S197 if the file is missing or damaged.
        """
        try:
            weights = decode(path.read_bytes())[0]
            why = "" if weights_sha256(weights) == sha256 else "they are not the ones that were committed"
        except OSError as error:
            why = f"{path.name} cannot be read ({error.strerror})"
        except FederadError as error:
            why = f"{path.name} is damaged ({error.code})"
        if why:
            raise FederadError(
                "S197",
                happened=f"The weights after round {round_} cannot be used: {why}.",
                because="A run goes on from its last committed round, bit for bit, or not at all.",
                remedies=(
                    f"restore {path.name} and journal.sqlite together from a backup",
                    "or start the plan again as a new run",
                ),
            )
        return weights

    def keep_only(self, *rounds: int) -> None:
        """Drop the weights of all rounds but these, with their averages and states."""
        paths = (self.weights_path, self.average_path, self.state_path)
        kept = {path(round_) for round_ in rounds for path in paths}
        for kind in ("round", "average", "state"):
            for path in self._folder.glob(f"{kind}-*.safetensors"):
                if path not in kept:
                    path.unlink()

    def weights_path(self, round_: int) -> Path:
        """Where the weights after a round lie."""
        return self._folder / f"round-{round_:05d}.safetensors"

    def average_path(self, round_: int) -> Path:
        """Where the average over the rounds up to one lies, for plans that release it."""
        return self._folder / f"average-{round_:05d}.safetensors"

    def state_path(self, round_: int) -> Path:
        """Where what a strategy remembered after a round lies, for those that remember something."""
        return self._folder / f"state-{round_:05d}.safetensors"

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """A transaction that is on the disk when it is over."""
        with closing(self._connect()) as db:
            db.execute("PRAGMA synchronous = EXTRA")
            with db:
                yield db

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._folder / "journal.sqlite", timeout=30)


@contextmanager
def _written() -> Iterator[None]:
    """What goes wrong while writing, as S198."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise FederadError(
            "S198",
            happened=f"The journal cannot be written ({why}).",
            because="A round that is not on the disk did not happen. Everything committed before is kept.",
            remedies=("make room on the disk, or mend its permissions", "then: federad-server resume RUN"),
        ) from None


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
