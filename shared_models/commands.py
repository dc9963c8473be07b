"""What the commands have in common: how they end, and how the next one is typed where this program is installed.

As a service it is typed with sudo, in a clone just so. Whoever installs it says so in two environment variables
(``deploy/install.sh``), so that what one command names as the next can be typed as it stands.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

import typer

from shared_models.errors import FederadError

TYPED_VARIABLE = "FEDERAD_TYPED"
"""What is typed in place of the program's name."""

START_VARIABLE = "FEDERAD_START"
"""What is typed to start everything."""

TYPER_INTERRUPTED = 130
"""What typer makes of Ctrl-C."""


def run_command(app: typer.Typer, *, stopped: FederadError, misunderstood: Callable[[str], FederadError]) -> None:
    """Run what was typed; a numbered error becomes a message and an exit status, never a traceback.

    Parameters
    ----------
    app
        A typer application.
    stopped
        What a person is told who has stopped it.
    misunderstood
        The error for a mistake on the command line, from typer's sentence about it.
    """
    as_json = "--json" in sys.argv
    try:
        if app(standalone_mode=False) == TYPER_INTERRUPTED:
            raise KeyboardInterrupt
    except FederadError as error:
        sys.exit(_tell(error, as_json))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(_tell(stopped, as_json))
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's own usage errors have one
            raise
        sys.exit(_tell(misunderstood(str(error.format_message())), as_json))


def _tell(error: FederadError, as_json: bool) -> int:
    """Print an error where its reader looks, and return the exit status."""
    if as_json:
        print(json.dumps(error.as_json()))
    print(error, file=sys.stderr)
    return error.exit_status


def typed(program: str, command: str) -> str:
    """A command of ``program`` as it is typed here."""
    if command.split(maxsplit=1)[0] == "start" and (start := os.environ.get(START_VARIABLE)):
        return start
    return f"{os.environ.get(TYPED_VARIABLE) or program} {command}"
