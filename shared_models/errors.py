"""Errors that a person can act on, each with a number, a page and a way out.

An error says what happened here, why it matters and what its reader can do now (``docs/errors/`` has a page for each).
The number is also the exit status of the command, so a scheduler's log is enough to find the page. ``P`` codes concern a
plan, ``C`` codes one site, ``S`` codes the server, ``M`` codes a model, ``R`` codes a simulation. A retired number keeps
its page and is never used again.

Messages may leave the building in a log: counts, keys and settings are welcome, names and pixel values are not.
"""

from __future__ import annotations

from collections.abc import Sequence

TITLES: dict[str, str] = {
    "P100": "the plan file cannot be read",
    "P101": "the plan is not valid TOML",
    "P102": "a key of the plan is unknown, missing or has an impossible value",
    "P103": "two keys of the plan contradict each other",
    "P104": "the plan asks for something that this version does not implement",
    "C140": "no usable images were found in the data folder",
    "C141": "the plan needs data that this site does not have",
    "C142": "the cache could not be written",
    "C143": "the site folder is not ready",
    "C144": "the plan is not known at this site",
    "C145": "the same question was asked before with other weights",
    "C146": "the site configuration cannot be used",
    "C147": "a release was refused at the gate",
    "S180": "too few sites replied",
    "S181": "no site has joined",
    "S182": "an update cannot be added up exactly",
    "M210": "weights do not fit the network",
    "M211": "a message cannot be read",
    "R230": "the simulation was asked for something impossible",
    "R231": "the result folder cannot be used",
    "R232": "a worker process died",
    "R233": "stopped by the user",
    "R234": "an optional part is not installed",
}
"""Every number in use and its one-line title; ``docs/errors/<code>.md`` has the page."""


class FederadError(Exception):
    """A numbered error, worded for the person who reads it.

    Parameters
    ----------
    code
        One of :data:`TITLES`.
    happened
        What happened here, with the values that matter and without patient data.
    because
        Why it matters.
    remedies
        What the reader can do now, one action each.
    """

    def __init__(self, code: str, *, happened: str, because: str, remedies: Sequence[str]) -> None:
        if code not in TITLES:
            raise ValueError(f"{code!r} is not in the table of error numbers")
        super().__init__(code, happened)
        self.code = code
        self.happened = happened
        self.because = because
        self.remedies = tuple(remedies)

    @property
    def exit_status(self) -> int:
        """The number without its letter, between 100 and 255."""
        return int(self.code[1:])

    def __str__(self) -> str:
        """The message as a terminal shows it."""
        lines = [f"{self.code}  {self.happened}", f"      {self.because}", "What you can do:"]
        lines += [f"  - {remedy}" for remedy in self.remedies]
        lines += [f"More: docs/errors/{self.code}.md"]
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        """Survive the way back from a worker process."""
        return _rebuild, (self.code, self.happened, self.because, self.remedies)

    def as_json(self) -> dict[str, object]:
        """The same message for ``--json``."""
        return {
            "error": self.code,
            "title": TITLES[self.code],
            "happened": self.happened,
            "because": self.because,
            "remedies": list(self.remedies),
        }


def _rebuild(code: str, happened: str, because: str, remedies: Sequence[str]) -> FederadError:
    return FederadError(code, happened=happened, because=because, remedies=remedies)
