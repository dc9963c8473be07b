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
    "P240": "there is no fingerprint of such images",
    "P241": "the fingerprint is of too few patients",
    "P242": "the configured plan cannot be written",
    "S243": "the run has no fingerprint",
    "C115": "the process that reads image files cannot be started",
    "C116": "the table of patients cannot be used",
    "C117": "the device in site.toml is not there",
    "P105": "the acceleration leaves no centre of k-space",
    "P110": "the network has no features that a discriminator could read",
    "C106": "federad has changed since the plan was approved",
    "C111": "this site's scanners are not declared",
    "R112": "no site can tell scanners apart",
    "R113": "the sites have fewer than two scanners to tell apart",
    "C118": "the archive cannot be asked",
    "C119": "the query for the archive cannot be used",
    "C120": "what the archive sends cannot be written",
    "C121": "some studies were not retrieved",
    "C122": "nothing can listen for the archive",
    "C123": "the study does not fit the model",
    "C124": "the prediction cannot be written",
    "C125": "a prepared volume was changed",
    "C126": "results could not be sent to the archive",
    "C127": "the list of excluded patients cannot be used",
    "C128": "the plan's data cannot be wiped now",
    "C129": "a file that the archive's table names cannot be used",
    "C130": "what answers is not the archive that this site trusts",
    "C131": "the archive does not let this site in",
    "C134": "what a site keeps for itself of a run is damaged",
    "C140": "no usable images were found in the data folder",
    "C141": "the plan needs data that this site does not have",
    "C142": "the cache could not be written",
    "C143": "the site folder is not ready",
    "C144": "the plan is not known at this site",
    "C145": "the same question was asked before with other weights",
    "C146": "the site configuration cannot be used",
    "C147": "a release was refused at the gate",
    "C148": "the invitation cannot be read",
    "C149": "the operator refused a request of this site",
    "C150": "the folder with this site's keys cannot be used",
    "C151": "the consortium cannot be reached",
    "C152": "a proxy stands between this site and the consortium",
    "C153": "what answered is not the consortium this site trusts",
    "C154": "the consortium no longer knows this site",
    "C155": "this site's clock differs from the consortium's",
    "C156": "another process is already running here",
    "C157": "the station's socket cannot be used",
    "C158": "the station does not answer",
    "C159": "an offered plan was not taken",
    "C160": "the plan that was named is not among the offered ones",
    "C161": "a bundle was refused",
    "C162": "the audit cannot be written or is not whole",
    "C163": "the command cannot be carried out",
    "C176": "the table of labels cannot be used",
    "C177": "only one of the plan's labels occurs at this site",
    "C178": "the plan begins at a model of which the ledger knows nothing",
    "C179": "a backup cannot be used",
    "C164": "the ledger cannot be written",
    "C165": "the ledger is missing",
    "C166": "the ledger is not whole",
    "C167": "the ledger is an older copy",
    "C168": "the ledger's anchor cannot be used",
    "C169": "the privacy budget does not suffice",
    "C170": "the plan is outside this site's policy",
    "C171": "this site does not train at this hour",
    "C172": "no noise is enough for the epsilon asked for",
    "C173": "the declared number of patients cannot be used",
    "C174": "the plan's delta is too large for this site",
    "C175": "the privacy accountant is not installed",
    "S180": "too few sites replied",
    "S181": "no site has joined",
    "S182": "an update cannot be added up exactly",
    "S183": "the consortium's folder cannot be used",
    "S184": "a site, a run or a name is not one that can be used",
    "S185": "an invitation was refused",
    "S186": "a certificate request was refused",
    "S188": "a parcel cannot be stored or is not there",
    "S189": "the consortium service cannot start",
    "S190": "the server is not running",
    "S191": "the server is running already",
    "S192": "a part of the server does not start",
    "S193": "nginx is not installed",
    "S194": "the port cannot be used",
    "S195": "the SuperLink refused a request",
    "S196": "the run is not in a state for this",
    "S197": "the journal of a run cannot be used",
    "S198": "the journal cannot be written",
    "S199": "the command was not carried out",
    "S200": "there is no such release",
    "S201": "the name fits several releases",
    "S202": "a release cannot be written",
    "S203": "a model cannot be released",
    "S204": "the export cannot be written",
    "S205": "an export does not give the same output",
    "S206": "a package for exporting is not installed",
    "M210": "weights do not fit the network",
    "M211": "a message cannot be read",
    "M212": "a signature does not hold",
    "M213": "a transfer is longer than is taken",
    "M214": "a release belongs to another consortium",
    "M215": "a release is not whole",
    "M216": "a network cannot be trained with privacy",
    "M217": "a discriminator does not fit the plan",
    "R230": "the simulation was asked for something impossible",
    "R231": "the result folder cannot be used",
    "R232": "a worker process died",
    "R233": "stopped by the user",
    "R234": "an optional part is not installed",
    "R235": "not emulated by a staged deployment",
    "R236": "a deployment cannot be staged",
    "R237": "MLflow did not take the results",
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
