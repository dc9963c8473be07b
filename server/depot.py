"""The depot: parcels too long for Flower's own channel, each in a file named by its SHA-256.

Whoever knows a parcel's hash may fetch it, and learns the hash only from the message that refers to it.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from uuid import uuid4

from shared_models.consortium import SHA256
from shared_models.errors import FederadError
from shared_models.wire import CHUNK_BYTES, bounded

MAX_PARCEL_BYTES = 8 << 30
"""Longest parcel that is taken [bytes]."""

_ABANDONED_S = 3600.0
"""After this long without a new byte a transfer is given up [s]."""


class Depot:
    """Parcels in a folder.

    Parameters
    ----------
    folder
        Made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def put(self, chunks: Iterable[bytes], limit: int = MAX_PARCEL_BYTES) -> str:
        """Store a parcel durably and give its SHA-256; memory holds one chunk at a time.

        Raises
        ------
        FederadError
            M213 if it is longer than ``limit`` bytes, S188 if it cannot be written. Nothing of it is kept then.
        """
        self._tidy()
        temporary = self._folder / f"{uuid4().hex}.part"
        digest = hashlib.sha256()
        try:
            with temporary.open("xb") as stream:
                for chunk in bounded(chunks, limit):
                    digest.update(chunk)
                    stream.write(chunk)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(self._folder / digest.hexdigest())
        except OSError as error:
            raise _not_stored(error) from None
        finally:
            temporary.unlink(missing_ok=True)
        return digest.hexdigest()

    def path(self, sha256: str) -> Path:
        """The file of a parcel; S188 if it is not there."""
        path = self._folder / sha256
        if not re.fullmatch(SHA256, sha256) or not path.is_file():
            raise FederadError(
                "S188",
                happened=f"There is no parcel {sha256[:64]!a} in the depot.",
                because="It was never stored here, or its round is over.",
                remedies=("ask for the round again", "report it if it happens twice in a run"),
            )
        return path

    def get(self, sha256: str) -> Iterator[bytes]:
        """A parcel chunk by chunk; S188 if it is not there."""
        return _read(self.path(sha256))

    def n_bytes(self, sha256: str) -> int:
        """Length of a parcel [bytes]; S188 if it is not there."""
        return self.path(sha256).stat().st_size

    def drop(self, sha256: str) -> None:
        """Forget a parcel, whether it is there or not."""
        if re.fullmatch(SHA256, sha256):
            (self._folder / sha256).unlink(missing_ok=True)

    def _tidy(self) -> None:
        """Remove what transfers left behind that were cut off with the process."""
        for part in self._folder.glob("*.part"):
            try:
                if time.time() - part.stat().st_mtime > _ABANDONED_S:
                    part.unlink()
            except FileNotFoundError:  # another process was faster
                continue


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _not_stored(error: OSError) -> FederadError:
    return FederadError(
        "S188",
        happened=f"A parcel could not be stored ({error.strerror or type(error).__name__}).",
        because="Weights that are too long for Flower's own channel wait in the operator's depot.",
        remedies=("make room on the disk of the operator's folder", "the site sends it again when it is asked again"),
    )
