"""Back up a site's folder while it works, and put it back, here or on another machine.

A backup is one tar file, which any system can look into::

    station/...  courier/...   the files, each under its place in the site's folder
    backup.json                written last: which site, when, and size and SHA-256 of every file

Databases come as snapshots of one moment, and before the answers that they name; the audit comes after everything that it
speaks of. What can be made anew is left out: prepared images (``federad-site approve`` prepares them again), logs, and
Flower's own files.

The ledger's anchor is never in a backup: it is the one witness of what was spent after the backup was made. A restored
ledger takes over from it what is missing; without an anchor, everything counts as spent (``PRIVACY_RULES``, rule 17).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import sqlite3
import tarfile
import tomllib
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client.audit import FILE as AUDIT
from client.audit import AuditLog
from client.folder import SiteFolder, cannot
from client.ledger import ANCHOR, Ledger
from client.site import FILE as CONFIG
from client.site import SiteConfig
from shared_models.errors import FederadError

FORMAT = 1
"""Of the file. A newer one is refused; an older one is read for ever."""

MANIFEST = "backup.json"
PARTS = ("station", "courier")

LEFT_OUT = (
    "station/cohorts/*/volumes/*",
    "station/cohorts/*/salt",
    "station/logs/*",
    "courier/logs/*",
    "courier/flower/*",
    "courier/bin/*",
    "courier/status.json",
    "*lock",
    f"station/{ANCHOR}",
    "*.part",
    "*-journal",
    "*-wal",
    "*-shm",
)
"""What is made anew, belongs to a running process, or must not go back in time."""

LONGEST_MANIFEST = 64 * 2**20
CHUNK = 2**20
"""Bytes."""


class Entry(BaseModel):
    """A file in a backup."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    size: int = Field(ge=0)
    """Bytes."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """What a backup says of itself."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    format: int
    federad: str
    """The version that wrote it."""

    site: str
    made: str
    """When it was begun, ISO 8601, UTC."""

    files: dict[str, Entry]


@dataclass(frozen=True)
class Made:
    """A backup that was written."""

    file: Path
    manifest: Manifest

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return self.file.stat().st_size


def back_up(folder: SiteFolder, to: Path) -> Made:
    """Write a backup of a site, whether it is started or not.

    Parameters
    ----------
    to
        A file that is not there yet, or a folder, in which the file gets the site's name and the time.

    Promise
        The file is whole or not there. It holds every plan, decision, answer and audit line that was on the disk when it
        was begun. Holds for the account of both processes and for root; nobody else can read the file.

    Raises
    ------
    FederadError
        C163 if it cannot be written or something cannot be read, C146 without a site's configuration.
    """
    with _as_owner(folder.station):
        config = SiteConfig.load(folder.station)
    made = datetime.now(UTC)
    file = to / f"{config.name}-{made:%Y%m%dT%H%M%SZ}.tar" if to.is_dir() else to
    if file.exists():
        raise cannot(f"{file} is there already.", "A backup never takes the place of another.", "name a new file")
    partial = file.with_name(f".{file.name}.part")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as stream:
            manifest = _fill(folder, stream, config, made)
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(file)
    except (OSError, sqlite3.Error) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or str(error)
        raise cannot(
            f"The backup {file} cannot be written ({why}).",
            "Half a backup is worth nothing, so none was left.",
            "choose a place with room, outside the site's folder",
            "run it as root: sudo federad-site backup FILE",
        ) from None
    return Made(file, manifest)


def look_into(file: Path) -> Manifest:
    """Read a backup from end to end and compare every file in it with what it says of itself.

    Raises
    ------
    FederadError
        C179 if it is damaged, cut off, or of a newer version.
    """
    return _checked(file)


@dataclass(frozen=True)
class Restored:
    """A site that is back."""

    manifest: Manifest
    n_recovered: int | None
    """Entries of the ledger that its anchor knew and the backup did not; None without an anchor."""


def restore(file: Path, folder: SiteFolder, *, data: Path | None = None, anchor: Path | None = None) -> Restored:
    """Put a backup into a folder that holds no site yet.

    What the ledger's anchor knows beyond the backup counts as spent and answered. Without an anchor nobody knows what was
    spent since, so all of it counts as spent, without bound.

    Parameters
    ----------
    data
        Where the images lie on this machine, if elsewhere than when the backup was made.
    anchor
        The ledger's anchor, to be copied to where the site's configuration says; left out, it is there or it is lost.

    Promise
        Nothing is written before the whole backup was read and found in order. A restore that was cut off leaves no site,
        and can be done again.

    Raises
    ------
    FederadError
        C179 if the backup cannot be used, C163 if there is a site in the folder already or it cannot be written, C166 if
        the anchor is not this ledger's.
    """
    manifest = _checked(file)
    _require_empty(folder)
    config = _config(file, data)
    named = tomllib.loads(config.decode()).get("anchor")
    anchored = _require_anchor(anchor, Path(named) if named else None) if anchor is not None else None
    new = SiteFolder(folder.root / ".restoring")
    try:
        shutil.rmtree(new.root, ignore_errors=True)  # of a restore that was cut off
        new.make()
        with tarfile.open(file, "r:") as archive:
            for name, content in _files(archive):
                _put(new, name, content)
        _put(new, f"station/{CONFIG}", io.BytesIO(config))
        witness = Path(named) if named else new.station / ANCHOR
        with _as_owner(new.station):
            if anchored is not None and not witness.exists():
                _write(witness, io.BytesIO(anchored))
            n_recovered = _reckon(new.station, witness)
            AuditLog(new.station / AUDIT).write("restored", made=manifest.made, recovered=n_recovered)
        for part in PARTS:
            (new.root / part).rename(folder.root / part)
        folder.make()
        shutil.rmtree(new.root, ignore_errors=True)
    except OSError as error:
        raise cannot(
            f"{folder.root} cannot be written ({error.strerror}).",
            "The site is not there before all of it is.",
            "make room, or run it as root: sudo federad-site restore FILE",
            "then run the same command again",
        ) from None
    return Restored(manifest, n_recovered)


# Writing ----------------------------------------------------------------------------------------------------------------


def _fill(folder: SiteFolder, stream: BinaryIO, config: SiteConfig, made: datetime) -> Manifest:
    entries: dict[str, Entry] = {}
    anchor = Path(config.anchor) if config.anchor else None
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for part in PARTS:
            with _as_owner(folder.root / part):
                for name, path in _listed(folder, part):
                    if path == anchor:
                        continue
                    with (
                        suppress(FileNotFoundError),
                        _opened(path) as (content, size),
                    ):  # an answer may be dropped meanwhile
                        hashed = _Hashed(content)
                        archive.addfile(_member(name, size, made), hashed)
                        entries[name] = Entry(size=size, sha256=hashed.hexdigest())
        manifest = Manifest(
            format=FORMAT,
            federad=importlib.metadata.version("federad"),
            site=config.name,
            made=made.isoformat(timespec="seconds"),
            files=entries,
        )
        text = manifest.model_dump_json(indent=1).encode()
        archive.addfile(_member(MANIFEST, len(text), made), io.BytesIO(text))
    return manifest


def _listed(folder: SiteFolder, part: str) -> list[tuple[str, Path]]:
    """The files of a part: databases first; the audit last, after the note of its last line, which it may be ahead of."""
    found = []
    for where, _, names in os.walk(folder.root / part, onerror=_raise):
        for name in names:
            path = Path(where, name)
            inside = path.relative_to(folder.root).as_posix()
            if path.is_file() and not path.is_symlink() and not any(fnmatch(inside, one) for one in LEFT_OUT):
                found.append((inside, path))
    return sorted(found, key=lambda one: (*_is_late(one[1]), one))


def _is_late(path: Path) -> tuple[bool, bool, bool]:
    return path.name == AUDIT, path.name.startswith(AUDIT), path.suffix != ".sqlite"


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A file's content as it is at one moment, and its size [bytes]."""
    if path.suffix == ".sqlite":
        data = _snapshot(path)
        yield io.BytesIO(data), len(data)
        return
    with path.open("rb") as file:  # the audit may have half a line at its end, which counts for none
        yield file, os.fstat(file.fileno()).st_size


def _snapshot(path: Path) -> bytes:
    """A database as after its last transaction."""
    address = f"{path.absolute().as_uri()}?mode=rw"
    with (
        closing(sqlite3.connect(address, uri=True, timeout=60)) as database,
        closing(sqlite3.connect(":memory:")) as copy,
    ):
        database.backup(copy)
        return copy.serialize()


def _member(name: str, size: int, made: datetime) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size, 0o600, int(made.timestamp())
    return member


class _Hashed(io.RawIOBase):
    """A stream that knows the SHA-256 of what was read from it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._hash = stream, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._hash.update(data)
        return data

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


# Reading ----------------------------------------------------------------------------------------------------------------


def _checked(file: Path) -> Manifest:
    """The manifest of a backup that was read from end to end and is whole; C179 otherwise."""
    found: dict[str, Entry] = {}
    try:
        manifest = _manifest(file)
        with tarfile.open(file, "r:") as archive:
            for name, content in _files(archive):
                hashed, size = _Hashed(content), 0
                while chunk := hashed.read(CHUNK):
                    size += len(chunk)
                found[name] = Entry(size=size, sha256=hashed.hexdigest())
    except (OSError, tarfile.TarError) as error:
        raise _unusable(
            file, f"it cannot be read ({getattr(error, 'strerror', None) or type(error).__name__})"
        ) from None
    if found != manifest.files:
        wrong = sorted(name for name in {*found, *manifest.files} if found.get(name) != manifest.files.get(name))
        raise _unusable(file, f"{len(wrong)} of its files are not what was written, {wrong[0]} among them")
    if f"station/{CONFIG}" not in found:
        raise _unusable(file, "it holds no site")
    return manifest


def _manifest(file: Path) -> Manifest:
    with tarfile.open(file, "r:") as archive:
        last = None
        for last in archive:  # noqa: B007  # the manifest is the last
            pass
        if last is None or last.name != MANIFEST or not last.isreg() or last.size > LONGEST_MANIFEST:
            raise _unusable(file, "its end is missing, or it is no backup of a site")
        text = _content(archive, last).read()
    try:
        fields = json.loads(text)
        if isinstance(fields, dict) and isinstance(fields.get("format"), int) and fields["format"] > FORMAT:
            raise _unusable(file, f"it was written by federad {fields.get('federad')}, which is newer than this one")
        return Manifest.model_validate_json(text)
    except (ValidationError, ValueError, RecursionError):
        raise _unusable(file, f"its {MANIFEST} cannot be read") from None


def _files(archive: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and content of every file but the manifest; nothing else may be in there, and nothing twice."""
    seen = set()
    for member in archive:
        if member.name == MANIFEST:
            continue
        path = PurePosixPath(member.name)
        plain = member.isreg() and len(path.parts) > 1 and path.parts[0] in PARTS and ".." not in path.parts
        if not plain or str(path) != member.name or member.name in seen:
            raise tarfile.ExtractError
        seen.add(member.name)
        yield member.name, _content(archive, member)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = archive.extractfile(member)
    if content is None:
        raise tarfile.ExtractError
    return content


def _put(folder: SiteFolder, name: str, content: IO[bytes]) -> None:
    """Write one file under the account whose it is, so that nobody else ever owned it."""
    path = folder.root / name
    with _as_owner(folder.root / PurePosixPath(name).parts[0]):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(path, content)


def _write(path: Path, content: IO[bytes]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        while chunk := content.read(CHUNK):
            file.write(chunk)
        file.flush()
        os.fsync(descriptor)


def _reckon(station: Path, witness: Path) -> int | None:
    """Bring the restored ledger up to what was spent (rule 17); None where only ``everything`` is certain."""
    secret = (station / "secret").read_bytes()
    if witness.exists():
        return Ledger.recover(station, secret, witness)
    Ledger.begin_anew(station, secret, witness)
    return None


def _require_empty(folder: SiteFolder) -> None:
    for part in PARTS:
        if (folder.root / part).exists():
            raise cannot(
                f"There is {folder.root / part} already.",
                "A restore goes into an empty place: what a site has answered and spent is never overwritten.",
                "choose another folder with --site FOLDER",
                "or stop the site that is there and move its folder away; keep it, --anchor needs its ledger.anchor",
            )


def _require_anchor(anchor: Path, to: Path | None) -> bytes:
    """The anchor's content, which may go to a place where there is none, or the same; C163 otherwise."""
    try:
        lines = anchor.read_bytes()
        there = to.read_bytes() if to is not None and to.exists() else lines
    except OSError as error:
        raise cannot(
            f"The anchor {anchor} cannot be read ({error.strerror}).",
            "It says what was spent after the backup was made.",
            f"check the path; beside a ledger it is called {ANCHOR}",
        ) from None
    if there != lines:
        raise cannot(
            f"There is another anchor at {to}, where this site's configuration has it.",
            "The two say different things about what was spent: one belongs to another site, or is older.",
            "leave --anchor out to use the one that is there",
            "or move that one aside, and keep it",
        )
    return lines


def _config(file: Path, data: Path | None) -> bytes:
    """The ``site.toml`` of a backup, with another data folder where one is given."""
    with tarfile.open(file, "r:") as archive:
        text = _content(archive, archive.getmember(f"station/{CONFIG}")).read()
    if data is None:
        return text
    own = f"data = {json.dumps(str(data.absolute()), ensure_ascii=False)}"
    return re.sub(r"^data\s*=.*$", lambda _: own, text.decode(), count=1, flags=re.MULTILINE).encode()


@contextmanager
def _as_owner(folder: Path) -> Iterator[None]:
    """Read and write as the account that ``folder`` belongs to, where this is root; files that are open stay so."""
    owner = folder.stat()
    if os.geteuid() != 0 or owner.st_uid == 0:
        yield
        return
    group = os.getegid()
    os.setegid(owner.st_gid)
    os.seteuid(owner.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)


def _raise(error: OSError) -> None:
    raise error


def _unusable(file: Path, why: str) -> FederadError:
    return FederadError(
        "C179",
        happened=f"The backup {file} cannot be used: {why}.",
        because="A site is restored whole or not at all, and nothing was written.",
        remedies=(
            "use another backup; copy it again if it came over a network",
            "install the version of federad that wrote it, or a newer one",
        ),
    )
