"""A second installation of federad, in which a test can make things go wrong while its processes run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

SABOTAGE = Path(__file__).parent / "sabotage"


class Installation:
    """A Python with federad in it, and with ``sabotage/sitecustomize.py`` in front of everything.

    Parameters
    ----------
    folder
        Where it is made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.python = folder / "bin" / "python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.packages = folder / "lib" / version / "site-packages"
        self.packages.mkdir(parents=True)
        self.python.parent.mkdir()
        shutil.copy(SABOTAGE / "sitecustomize.py", self.packages)
        (self.packages / "real.pth").write_text(
            f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n{Path(__file__).parents[2]}\n"
        )
        real = Path(sys.executable).resolve()
        (folder / "pyvenv.cfg").write_text(f"home = {real.parent}\nversion = {sys.version.split()[0]}\n")
        self.python.write_text(
            "#!/bin/bash\n"
            f"if [ -e {folder}/clock ]; then\n"
            f'    export FEDERAD_TEST_CLOCK="$(<{folder}/clock)" LD_PRELOAD={folder}/clock.so\n'
            "fi\n"
            f'exec -a {self.python} {real} "$@"\n'
        )
        self.python.chmod(0o755)

    def disturb(self, **wishes: object) -> None:
        """Let things go wrong from now on; what is read anew at each question needs no new process."""
        partial = self.packages / "sabotage.part"
        partial.write_text(json.dumps(wishes))
        partial.replace(self.packages / "sabotage.json")

    @property
    def is_disturbed(self) -> bool:
        """Whether a wish is left; a process that was killed at a call has taken it away."""
        return (self.packages / "sabotage.json").exists()

    def set_clock(self, ahead_s: int) -> None:
        """Let the clock of processes that are started from now on be wrong."""
        library = self._folder / "clock.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SABOTAGE / "clock.c"], check=True)
        (self._folder / "clock").write_text(f"{ahead_s}\n")

    def mend(self) -> None:
        """As it should be again; for the clock, in processes that are started from now on."""
        for path in (self.packages / "sabotage.json", self._folder / "clock"):
            path.unlink(missing_ok=True)
