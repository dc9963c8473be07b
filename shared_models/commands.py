"""How a command is typed where this program is installed: as a service with sudo, in a clone just so.

Whoever installs it says so in two environment variables (``deploy/install.sh``), so that what one command names as the next
can be typed as it stands.
"""

from __future__ import annotations

import os

TYPED_VARIABLE = "FEDERAD_TYPED"
"""What is typed in place of the program's name."""

START_VARIABLE = "FEDERAD_START"
"""What is typed to start everything."""


def typed(program: str, command: str) -> str:
    """A command of ``program`` as it is typed here."""
    if command.split(maxsplit=1)[0] == "start" and (start := os.environ.get(START_VARIABLE)):
        return start
    return f"{os.environ.get(TYPED_VARIABLE) or program} {command}"
