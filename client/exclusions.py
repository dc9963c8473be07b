"""Patients who must not take part, because they withdrew their consent or somebody here decided so.

A text file in the station's folder with one key (:func:`~client.data.keys.key_of`) on each line, which names nobody. It is
read before every question is answered, so it holds for plans that were approved long ago, too. What a model has learned
from a patient in earlier rounds stays in the model, and what was charged stays charged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from client.data.keys import KEY_LENGTH
from client.processes import write_durably
from shared_models.errors import FederadError

FILE = "excluded.txt"


def excluded(folder: Path) -> frozenset[str]:
    """Keys of the patients who are left out at the station in ``folder``; none where nobody ever was.

    Raises
    ------
    FederadError
        C127 if the list is there and cannot be read: nothing is computed then, since somebody may be missing from it.
    """
    try:
        keys = (folder / FILE).read_text(encoding="ascii").split()
    except FileNotFoundError:
        return frozenset()
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(folder, type(error).__name__) from None
    if not all(re.fullmatch(f"[0-9a-f]{{{KEY_LENGTH}}}", key) for key in keys):
        raise _unusable(folder, "a line is no key")
    return frozenset(keys)


def write(folder: Path, keys: Iterable[str]) -> None:
    """Replace the list, durably; C127 if it cannot be written."""
    try:
        write_durably(folder / FILE, "".join(f"{key}\n" for key in sorted(keys)).encode("ascii"))
    except OSError as error:
        raise _unusable(folder, str(error.strerror)) from None


def _unusable(folder: Path, why: str) -> FederadError:
    return FederadError(
        "C127",
        happened=f"The list of excluded patients, {folder / FILE}, cannot be used: {why}.",
        because="Without it nobody knows who must not take part, so nothing is prepared or trained.",
        remedies=(
            "put the list back from the last backup: it holds one key of 16 hexadecimal digits on each line",
            "or remove the file and name all patients again: federad-site exclude --from FILE",
        ),
    )
