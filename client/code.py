"""Which code computes on patients here, by its hash.

A plan is approved together with the code that will carry it out: what was found to cost so much, and to let nothing else
out, was found of that code.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import client
import shared_models


@cache
def code_sha256() -> str:
    """SHA-256 over names and contents of all files of the packages that a station runs, 64 hex digits.

    Read once in a process, so ask early: what is on the disk later may be another version than what was imported.
    """
    digest = hashlib.sha256()
    for package in (client, shared_models):
        (root,) = map(Path, package.__path__)
        for file in sorted(root.rglob("*")):
            if file.is_file() and file.suffix != ".pyc":
                content = hashlib.sha256(file.read_bytes()).hexdigest()
                digest.update(f"{root.name}/{file.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()
