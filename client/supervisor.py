"""Station and courier as two children of one process: started together, each under the account its folder belongs to,
started again when one ends, ended together. Where systemd does this, it is not needed.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time

from client.folder import SiteFolder, owner_of
from client.processes import Backoff, end, only_one, spawn, until_told

log = logging.getLogger(__name__)

PASSED_ON_NOT = ("PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME")
"""What could lead a child to other code."""


class Child:
    """One of the two.

    Parameters
    ----------
    site
        The site's folder.
    name
        ``station`` or ``courier``: the command, and the folder whose owner it works for.
    arguments
        More for the command.
    """

    def __init__(self, site: SiteFolder, name: str, *arguments: str) -> None:
        self.name = name
        self._command = [*command(), name, "--site", str(site.root), *arguments]
        self._user = owner_of(site.root / name)
        self._process: subprocess.Popen[bytes] | None = None
        self._began = self._next = 0.0
        self._backoff = Backoff(most_s=30.0)

    def look_after(self) -> None:
        """Start it, or start it again after a pause; call it in the main thread."""
        now = time.monotonic()
        if self._process is not None and (status := self._process.poll()) is not None:
            end(self._process)
            self._process = None
            pause_s = self._backoff.pause_s(now - self._began)
            log.warning("The %s ended (%s); it is started again in %.0f s.", self.name, status, pause_s)
            self._next = now + pause_s
        if self._process is None and now >= self._next:
            env = {name: value for name, value in os.environ.items() if name not in PASSED_ON_NOT}
            self._process = spawn(self._command, env=env, user=self._user)
            self._began = now

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            end(self._process, grace_s=30.0)


def command() -> list[str]:
    """``federad-site``, in this Python, with modules from nowhere but where it was installed."""
    return [sys.executable, "-I", "-m", "client.cli"]


def supervise(site: SiteFolder, *, threads: int = 0) -> None:
    """Run station and courier until told to stop.

    Parameters
    ----------
    threads
        Computing threads of the station; 0 for as many as torch likes.

    Raises
    ------
    FederadError
        C156 if they run already.
    """
    stopped = until_told()
    with only_one(site.lock, "federad-site"):
        children = [Child(site, "station", "--threads", str(threads)), Child(site, "courier")]
        try:
            while True:
                for child in children:
                    child.look_after()
                if stopped.wait(0.5):
                    break
        finally:
            stops = [threading.Thread(target=child.stop) for child in children]
            for thread in stops:
                thread.start()
            for thread in stops:
                thread.join()
