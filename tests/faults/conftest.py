"""One consortium in earnest for every test that lets something happen to it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from faults.staged import SITES, staged_consortium


@pytest.fixture(scope="session")
def consortium_in_town(hospitals):
    """The staged consortium; staged once."""
    with tempfile.TemporaryDirectory(prefix="fs-") as folder:
        data = {name: hospital.folder for name, hospital in zip(SITES, hospitals, strict=True)}
        with staged_consortium(Path(folder), data) as staged:
            yield staged


@pytest.fixture
def staged(consortium_in_town):
    """The staged consortium, with nothing wrong in it before and after."""
    staged = consortium_in_town
    yield staged
    staged.odd.mend()
    staged.server_odd.mend()
