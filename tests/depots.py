"""A depot that is a folder on this machine; nothing here loads more than a courier does."""

from __future__ import annotations

import hashlib
from pathlib import Path

from shared_models.errors import FederadError
from shared_models.wire import CHUNK_BYTES


class FolderDepot:
    """Parcels as files under their names."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def get_parcel(self, sha256, n_bytes):
        try:
            with (self._folder / sha256).open("rb") as file:
                while piece := file.read(CHUNK_BYTES):
                    yield piece
        except FileNotFoundError:
            raise FederadError("C151", happened="The way is broken.", because="", remedies=()) from None

    def put_parcel(self, parts):
        digest = hashlib.sha256()
        with (self._folder / "new").open("wb") as file:
            for part in parts:
                digest.update(part)
                file.write(part)
        (self._folder / "new").rename(self._folder / digest.hexdigest())
