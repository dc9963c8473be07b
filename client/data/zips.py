"""DICOM files within zip archives (PS3.12, annex V), read where they lie: nothing is ever unpacked to a disk.

A member's path is the archive's with the member's name behind it, ``/data/export.zip/IMG/1.dcm``. Archives are taken
apart in the child process of ``reader`` like any other foreign file; a member is inflated into that process's memory, as
far as is believable, and its checksum must hold.
"""

from __future__ import annotations

import re
import stat
from functools import lru_cache
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from client.data.skips import Reason, UnusableError, unusable

ENDING = ".zip"

MAX_INFLATED = 200
"""What grows by more than this is an attack on memory; real images shrink to a third. Of a member, and of an archive."""

ALWAYS_ALLOWED = 64 * 2**20
"""Bytes that any member, and any archive, may come to [bytes]."""

MAX_MEMBERS = 100_000

_ENCRYPTED = 0x1
"""Bit of the general purpose flag (APPNOTE.TXT, 4.4.4)."""


def members(archive: Path) -> list[dict[str, Any]]:
    """What an archive holds, without its folders: name, size and checksum of each member, or why it is not read.

    A name that leads elsewhere, or is there twice, is replaced by the member's number. Called in the child process.

    Raises
    ------
    UnusableError
        If it is no archive, empty, or claims to hold implausibly much.
    """
    entries = _opened(archive)[1].items()
    return [{"name": name, "size": info.file_size, "crc": info.CRC, "reason": why} for name, (info, why) in entries]


def open_file(path: Path) -> BinaryIO:
    """A file, or a member of an archive, for reading; UnusableError if a member is not read."""
    try:
        return path.open("rb")
    except NotADirectoryError:
        archive = archive_of(path)
    name = path.relative_to(archive).as_posix()
    with unusable(Reason.DAMAGED):
        zipped, entries = _opened(archive)
        info, reason = entries[name]
        if reason is not None:
            raise UnusableError(reason)
        with zipped.open(info) as member:
            return BytesIO(member.read(info.file_size))  # at the end of which its checksum must hold


def archive_of(path: Path) -> Path:
    """The archive in which a member lies; UnusableError if there is none."""
    for parent in path.parents:
        if parent.is_file():
            return parent
    raise UnusableError(Reason.NOT_OPENED)


_Entries = dict[str, tuple[ZipInfo, Reason | None]]


def _opened(archive: Path) -> tuple[ZipFile, _Entries]:
    status = archive.stat()
    return _remembered(archive, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1)
def _remembered(archive: Path, size: int, mtime_ns: int) -> tuple[ZipFile, _Entries]:
    """The archive that was asked for last stays open: its table of contents is read once for all of its members."""
    with unusable(Reason.DAMAGED):
        try:
            zipped = ZipFile(archive)
        except BadZipFile:
            raise UnusableError(Reason.DAMAGED) from None
        infos = [info for info in zipped.infolist() if not info.is_dir()]
        if not infos:
            raise UnusableError(Reason.EMPTY)
        n_bytes = sum(info.file_size for info in infos)
        if len(infos) > MAX_MEMBERS or n_bytes > max(ALWAYS_ALLOWED, MAX_INFLATED * size):
            raise UnusableError(Reason.SWELLS)
        return zipped, _entries(infos)


def _entries(infos: list[ZipInfo]) -> _Entries:
    entries: _Entries = {}
    for number, info in enumerate(infos, start=1):
        name, reason = PurePosixPath(info.filename).as_posix(), _why_not(info)
        if name in entries:
            reason = Reason.UNSAFE_MEMBER
        if reason is Reason.UNSAFE_MEMBER:
            name = f"member {number}"
            while name in entries:
                name += "+"
        entries[name] = info, reason
    return entries


def _why_not(info: ZipInfo) -> Reason | None:
    name = info.filename
    leads_elsewhere = name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or ":" in name[:2]
    is_odd = not name.isprintable() or info.orig_filename != name
    if leads_elsewhere or is_odd or stat.S_ISLNK(info.external_attr >> 16):
        return Reason.UNSAFE_MEMBER
    if info.flag_bits & _ENCRYPTED:
        return Reason.ENCRYPTED
    if name.lower().endswith(ENDING):
        return Reason.NESTED
    if info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        return Reason.NO_DECODER
    if info.file_size > max(ALWAYS_ALLOWED, MAX_INFLATED * info.compress_size):
        return Reason.SWELLS
    return Reason.EMPTY if info.file_size == 0 else None
