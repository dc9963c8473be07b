"""Writing that either happens or does not: whatever lies under its final name is complete.

A cache can be built again, so nothing is synced to disk; the rename is what a later reader trusts. One builder at a time
works in a folder.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree
from typing import Any

from shared_models.errors import FederadError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path`` to write a file or a folder to, and rename it to ``path`` at the end.

    Raises
    ------
    FederadError
        C142 if something could not be written; the half-written part is removed, and what lay at ``path`` still does.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        yield partial
        if path.is_dir():
            rmtree(path)
        partial.replace(path)
    except (OSError, sqlite3.OperationalError) as error:
        with suppress(OSError):
            _remove(partial)
        raise unwritable(path.parent, error) from error


def unwritable(folder: Path, error: Exception) -> FederadError:
    """C142."""
    return FederadError(
        "C142",
        happened=f"Writing below {folder} failed ({_cause(error)}).",
        because="Prepared images are kept there, so that no scan is decoded twice.",
        remedies=(
            "free space on that disk, or give the account that runs the site write permission there",
            "then start again: what was complete is kept and used",
        ),
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` under ``path``, all or nothing; C142 if that fails."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")


def _cause(error: Exception) -> str:
    return getattr(error, "strerror", None) or ("the disk is full or not writable" if str(error) else "unknown cause")


def _remove(path: Path) -> None:
    if path.is_dir():
        rmtree(path)
    else:
        path.unlink(missing_ok=True)
