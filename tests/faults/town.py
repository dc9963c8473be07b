"""A network of their own for an operator and some hospitals: each in a network namespace, joined by a bridge.

A cable that is cut here is cut for real: packets are lost without a word, as when somebody trips over it. Needs root, and
touches nothing of the machine's own network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_HAS_TOOLS = all(shutil.which(name) for name in ("ip", "nsenter"))


def _can_make() -> bool:
    """Whether this process may make network namespaces and bridges here."""
    if os.geteuid() != 0 or not _HAS_TOOLS:
        return False
    name = f"fd{os.getpid()}-try"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return False
    made = subprocess.run(
        ["ip", "-n", name, "link", "add", "name", "street", "type", "bridge"], capture_output=True, check=False
    ).returncode
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return made == 0


needs_town = pytest.mark.skipif(not _can_make(), reason="network namespaces need root and the package iproute2")


class Town:
    """Who lives here, and the cables between them.

    Parameters
    ----------
    names
        The inhabitants, in the order of their addresses.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._street = f"fd{os.getpid()}-net"

    def build(self) -> None:
        """Lay the cables."""
        _ip("netns", "add", self._street)
        self._in_street("link", "add", "name", "street", "type", "bridge")
        self._in_street("link", "set", "dev", "street", "up")
        for name in self._names:
            home = self._home(name)
            _ip("netns", "add", home)
            self._in_street("link", "add", "name", name, "type", "veth", "peer", "name", "eth", "netns", home)
            self._in_street("link", "set", "dev", name, "master", "street", "up")
            _ip("-n", home, "address", "add", f"{self.address(name)}/24", "dev", "eth")
            _ip("-n", home, "link", "set", "lo", "up")
            _ip("-n", home, "link", "set", "eth", "up")

    def take_down(self) -> None:
        """Leave nothing behind."""
        for name in (*(self._home(name) for name in self._names), self._street):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def address(self, name: str) -> str:
        """Where somebody is reached."""
        return f"10.213.7.{1 + self._names.index(name)}"

    def at(self, name: str) -> list[str]:
        """What a command begins with that is typed there."""
        return ["nsenter", f"--net=/run/netns/{self._home(name)}", "--"]

    def cut(self, name: str) -> None:
        """From now on nothing reaches ``name``, nor anybody from there, and nobody is told."""
        self._in_street("link", "set", "dev", name, "nomaster")

    def mend(self, name: str) -> None:
        """Repair the cable."""
        self._in_street("link", "set", "dev", name, "master", "street")

    def _home(self, name: str) -> str:
        return f"fd{os.getpid()}-{name}"

    def _in_street(self, *words: str) -> None:
        _ip("-n", self._street, *words)


@contextmanager
def built(names: tuple[str, ...]) -> Iterator[Town]:
    """A town, for as long as it is needed."""
    town = Town(names)
    try:
        town.build()
        yield town
    finally:
        town.take_down()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
