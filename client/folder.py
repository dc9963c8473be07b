"""A site's folder: what lies where, and to whom it belongs.

::

    station/   the station's, with everything about the data; nobody else may look into it
    courier/   the courier's, with the site's keys; nobody else may look into it
    run/       the socket, which both may open
    releases/  models fetched from the consortium, each checked against the operator's signature; the station reads them
    logs/      what the supervisor has to say

Made by root on a machine that has the accounts ``federad-data`` and ``federad-net`` (and the group ``federad`` with both in
it), ``station/`` belongs to the first and ``courier/`` to the second, and each process works under its own. Made by
anybody else, all of it is that person's, and the two processes are kept apart by nothing but their code.
"""

from __future__ import annotations

import grp
import os
import pwd
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from shared_models.errors import FederadError

VARIABLE = "FEDERAD_SITE"
DEFAULT = "federad-site"
DATA_USER, NET_USER, GROUP = "federad-data", "federad-net", "federad"


@dataclass(frozen=True)
class SiteFolder:
    """The folder of one site."""

    root: Path

    @classmethod
    def find(cls, given: Path | None) -> Self:
        """The folder that is meant: the one given, else ``$FEDERAD_SITE``, else the current one if it is a site's, else
        ``federad-site`` in it."""
        if given is not None:
            return cls(given.absolute())
        if named := os.environ.get(VARIABLE):
            return cls(Path(named).absolute())
        here = Path.cwd()
        return cls(here if cls(here).is_made else here / DEFAULT)

    @property
    def station(self) -> Path:
        """The station's folder."""
        return self.root / "station"

    @property
    def courier(self) -> Path:
        """The courier's folder."""
        return self.root / "courier"

    @property
    def releases(self) -> Path:
        """Fetched models."""
        return self.root / "releases"

    @property
    def socket(self) -> Path:
        """Where the station listens."""
        return self.root / "run" / "station.sock"

    @property
    def logs(self) -> Path:
        """The supervisor's log is here; station and courier have their own."""
        return self.root / "logs"

    @property
    def lock(self) -> Path:
        """Held by the supervisor."""
        return self.root / "site.lock"

    @property
    def is_made(self) -> bool:
        """Whether there is a site here; without the right to look into ``station/``, its being there counts."""
        try:
            return (self.station / "site.toml").is_file()
        except PermissionError:
            return True

    def make(self) -> None:
        """Make the folders, each for the account whose it is.

        Raises
        ------
        FederadError
            C163 if this account may not make them.
        """
        data, net, group = _accounts()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)
            _make(self.station, 0o700, data, -1)
            _make(self.courier, 0o700, net, -1)
            _make(self.releases, 0o755, net, -1)
            _make(self.socket.parent, 0o2750 if group >= 0 else 0o700, data, group)
        except OSError as error:
            raise cannot(
                f"The folder {self.root} cannot be made ({error.strerror}).",
                "Everything that belongs to this site lies there.",
                "choose another with --site FOLDER, or run this as an account that may write there",
            ) from None

    def hand_over(self, folder: Path) -> None:
        """Give everything in a folder that was just made to its owner, since root has written there."""
        if os.geteuid() != 0:
            return
        owner = folder.stat()
        for path in folder.rglob("*"):
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)

    def require(self) -> None:
        """Make sure that there is a site here.

        Raises
        ------
        FederadError
            C143 if not.
        """
        if not self.is_made:
            raise FederadError(
                "C143",
                happened=f"There is no site in {self.root}.",
                because="A site's folder holds its keys, its plans and everything about its data.",
                remedies=(
                    "federad-site enrol INVITATION --data DIR makes one",
                    f"say where it is with --site FOLDER, or set {VARIABLE}",
                ),
            )


def owner_of(folder: Path) -> int:
    """The account that a folder belongs to; this process's own where it cannot be seen."""
    try:
        return folder.stat().st_uid
    except OSError:
        return os.geteuid()


def become_owner(folder: Path) -> None:
    """Work under the account that ``folder`` belongs to, from now on.

    Raises
    ------
    FederadError
        C163 if this process is somebody else's and may not.
    """
    owner = owner_of(folder)
    if owner == os.geteuid():
        return
    name = name_of(owner)
    if os.geteuid() != 0:
        raise cannot(
            f"{folder} belongs to {name}, and this command runs as {name_of(os.geteuid())}.",
            "Only the station's own account may look at what concerns the data.",
            f"run it as root or as {name}: sudo federad-site ...",
        )
    account = pwd.getpwuid(owner)
    os.setgroups(os.getgrouplist(account.pw_name, account.pw_gid))
    os.setgid(account.pw_gid)
    os.setuid(owner)
    os.environ["HOME"] = account.pw_dir


def name_of(user: int) -> str:
    """The name of an account, or its number."""
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def cannot(happened: str, because: str, *remedies: str) -> FederadError:
    """C163."""
    return FederadError("C163", happened=happened, because=because, remedies=remedies)


def _accounts() -> tuple[int, int, int]:
    """Data account, network account and their group; -1 each where there are none or this is not root."""
    try:
        if os.geteuid() == 0:
            return pwd.getpwnam(DATA_USER).pw_uid, pwd.getpwnam(NET_USER).pw_uid, grp.getgrnam(GROUP).gr_gid
    except KeyError:
        pass
    return -1, -1, -1


def _make(folder: Path, mode: int, user: int, group: int) -> None:
    if folder.is_dir():
        return
    folder.mkdir()
    if user >= 0:
        os.chown(folder, user, group if group >= 0 else pwd.getpwuid(user).pw_gid)
    folder.chmod(mode)
