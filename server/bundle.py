"""The bundle that Flower carries to the sites: configuration, and not a line of code.

Both apps it names are installed where they run; a site's courier refuses a bundle that holds anything else than these
files. The same version of federad makes the same bytes, so that the hash can be compared over the telephone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import version

RUN_KEY = "federad-run"
"""What the configuration of a run carries, to the sites as well: federad's own id of the run."""

_PROJECT = """\
[project]
name = "federad"
version = "{version}"
description = "Configuration of a federad consortium. The code is installed at each end and does not travel."
license = "Apache-2.0"

[tool.flwr.app]
publisher = "federad"
fab-include = ["README.md"]

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
{run} = ""
"""

_README = """\
# federad {version}

This bundle names two programs that are installed where they run. It carries no code, and a site refuses one that does.
"""


@dataclass(frozen=True)
class Bundle:
    """A Flower App Bundle."""

    content: bytes
    """A zip file."""

    @property
    def sha256(self) -> str:
        """Its identity, 64 hex digits."""
        return hashlib.sha256(self.content).hexdigest()


def make_bundle() -> Bundle:
    """The bundle of the installed version, made with Flower's own builder."""
    from flwr.cli.build import build_fab_from_files

    installed = version("federad")
    files = {
        "pyproject.toml": _PROJECT.format(version=installed, run=RUN_KEY).encode(),
        "README.md": _README.format(version=installed).encode(),
    }
    return Bundle(build_fab_from_files(files)[0])
