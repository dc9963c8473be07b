"""The guard: the hospital's own ``flwr-clientapp``, first on the PATH of the SuperNode.

Flower sends a bundle to every site, unpacks it and puts its folder first on Python's path, so that a module in it takes
the place of the installed one. Here nothing is unpacked: a bundle may hold its configuration, a README and Flower's own
list of contents; one with anything else is refused, and the refusal is written to the courier's audit. What runs is the
installed ``client.app``, whatever the bundle names. Flower can also be asked to start other programs at a site (an agent,
a model, a server); the guard stands in the place of all of them and refuses.

This rests on names inside flwr 1.41; where one is missing, nothing runs.
"""

from __future__ import annotations

import hashlib
import io
import os
import shlex
import stat
import sys
import tomllib
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from client.audit import FILE, AuditLog
from shared_models.errors import FederadError
from shared_models.parcel import Trouble

ALLOWED = frozenset({"pyproject.toml", "README.md", ".info/CONTENT"})
"""All that a bundle may hold: nothing in these is ever run."""

LARGEST_FILE = 1 << 20
"""Bytes of a file in a bundle."""

COURIER = "FEDERAD_COURIER"
"""Environment variable with the courier's folder."""

REPLACED = ("install_from_fab", "get_load_client_app_fn", "install_app_dependencies", "Error")
"""What the guard puts its own in the place of, in ``flwr.supernode.runtime.run_clientapp``."""

REFUSED: Trouble = "bundle-refused"


class BundleRefusedError(Exception):
    """A bundle that is not only configuration."""


def inspect_bundle(content: bytes) -> None:
    """Look into a bundle without unpacking it.

    Raises
    ------
    BundleRefusedError
        If it holds anything but :data:`ALLOWED`, or is no proper bundle; says why in words of our own.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as bundle:
            entries = bundle.infolist()
            names = [entry.filename for entry in entries]
            foreign = sorted(set(names) - ALLOWED)
            if foreign:
                raise BundleRefusedError(
                    f"{len(foreign)} files that are not configuration, among them {foreign[0]!a:.80}"
                )
            if len(names) != len(set(names)):
                raise BundleRefusedError("a file that comes twice")
            if "pyproject.toml" not in names:
                raise BundleRefusedError("no configuration")
            for entry in entries:
                if entry.file_size > LARGEST_FILE or not _is_plain(entry):
                    raise BundleRefusedError("a file that is too large or is none")
                with bundle.open(entry) as file:
                    text = file.read(LARGEST_FILE + 1)
                if len(text) > LARGEST_FILE:
                    raise BundleRefusedError("a file that is too large or is none")
                if entry.filename == "pyproject.toml":
                    tomllib.loads(text.decode())
    except (zipfile.BadZipFile, zlib.error, ValueError, NotImplementedError, RuntimeError, EOFError, OSError):
        raise BundleRefusedError("something that cannot be read as a bundle") from None


def write_executables(folder: Path, courier: Path) -> None:
    """Make the folder that comes first on the SuperNode's PATH: the guard under every name that Flower may start.

    Parameters
    ----------
    folder
        Where they go; made if it is not there.
    courier
        The courier's folder, for the audit of refusals.
    """
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for task, command in TASK_TYPE_TO_COMMAND.items():
        entry = "main" if task == TaskType.CLIENT_APP else "refuse"
        _write_executable(folder / command, f"from client.guard import {entry}; {entry}()", courier)
    _write_executable(
        folder / "flower-superexec", "from flwr.supercore.cli import flower_superexec; flower_superexec()", courier
    )


def main() -> None:
    """Be ``flwr-clientapp``, with Flower's own arguments."""
    import flwr.supernode.runtime.run_clientapp as runtime
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    if missing := [name for name in REPLACED if not hasattr(runtime, name)]:
        _refuse("another-flower", missing=missing)
    for name, own in zip(REPLACED, (_install, _load_installed, _install_nothing, _wordless), strict=True):
        setattr(runtime, name, own)
    flwr_clientapp()


def supernode(courier: str) -> None:
    """Be ``flower-supernode``, with Flower's own arguments.

    Flower takes a SuperNode that was killed for alive until it has heard nothing of it for a minute, and lets no other in
    under its key meanwhile. So this one says goodbye for the one before, whose number lies in the courier's folder. And
    where Flower's loop ends by an error (a certificate that does not hold, an answer it does not expect), a thread of its
    own would keep a process alive that asks for nothing any more: here the process ends, and the courier starts another.
    """
    from importlib import import_module

    from flwr.proto.fleet_pb2 import DeactivateNodeRequest
    from flwr.supernode.cli import flower_supernode

    number = Path(courier) / "flower" / "node-number"
    connection: Any = import_module("flwr.supernode.fleet_http_connection")

    class Client(connection.FleetHttpClient):  # type: ignore[misc]  # Flower does not export it by name
        def ActivateNode(self, request: Any) -> Any:  # noqa: N802  # Flower's name for it
            with suppress(Exception):  # whatever is wrong will be wrong with the next call too, which says so
                self.DeactivateNode(DeactivateNodeRequest(node_id=int(number.read_text(encoding="ascii"))))
            reply = super().ActivateNode(request)
            with suppress(OSError):
                number.write_text(str(reply.node_id), encoding="ascii")
            return reply

    connection.FleetHttpClient = Client
    try:
        flower_supernode()
    finally:
        os._exit(1)


def refuse() -> NoReturn:
    """Be any other program that Flower may be asked to start, and do not."""
    _refuse("other-program", program=Path(os.environ.get("FEDERAD_PROGRAM", "")).name)


def _install(content: bytes, *_: Any, **__: Any) -> None:
    """In the place of unpacking a bundle."""
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        inspect_bundle(content)
    except BundleRefusedError as error:
        _audit("bundle-refused", sha256=sha256, n_bytes=len(content), held=str(error))
        print(_refusal(sha256, str(error)), file=sys.stderr)
        raise


def _load_installed(**_: Any) -> Any:
    """In the place of importing what the bundle names."""

    def load(*_: Any) -> Any:
        from client.app import app

        return app

    return load


def _install_nothing(*_: Any, **__: Any) -> NoReturn:
    """In the place of installing packages that the bundle names."""
    _audit("packages-refused")
    raise BundleRefusedError("packages to install")


def _wordless(code: int, reason: str | None = None) -> Any:
    """In the place of Flower's error, which would carry the text of an exception to the server."""
    from flwr.app import Error

    return Error(code, REFUSED if reason and BundleRefusedError.__name__ in reason else "failed")


def _refuse(why: str, **facts: Any) -> NoReturn:
    _audit("program-refused", why=why, **facts)
    print(f"The guard refused: {why}.", file=sys.stderr)
    sys.exit(161)


def _audit(event: str, **facts: Any) -> None:
    """Write a refusal down; a refusal stands whether or not that succeeds."""
    try:
        AuditLog(Path(os.environ[COURIER]) / FILE).write(event, **facts)
    except (KeyError, FederadError) as error:
        print(error, file=sys.stderr)


def _refusal(sha256: str, held: str) -> FederadError:
    return FederadError(
        "C161",
        happened=f"The bundle {sha256[:16]} was refused: it holds {held}.",
        because="What comes from the server is configuration; the code that runs here is what this hospital installed.",
        remedies=(
            "nothing has to be done here: nothing of it was unpacked or run",
            "ask the operator what was sent: federad-server makes bundles without code",
        ),
    )


def _is_plain(entry: zipfile.ZipInfo) -> bool:
    mode = entry.external_attr >> 16
    return not entry.is_dir() and not entry.flag_bits & 1 and stat.S_IFMT(mode) in (0, stat.S_IFREG)


def _write_executable(path: Path, code: str, courier: Path) -> None:
    """A program that runs ``code`` in this Python, which looks for modules nowhere but where it was installed."""
    variables = {COURIER: str(courier), "FEDERAD_PROGRAM": path.name}
    given = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    path.write_text(f'#!/bin/sh\nexec env {given} {shlex.quote(sys.executable)} -I -c {shlex.quote(code)} "$@"\n')
    path.chmod(0o700)
