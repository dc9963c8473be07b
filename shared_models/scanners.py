"""Scanners by one spelling, and the consortium's table of them.

A scanner is manufacturer, model and field strength, as headers state them. The same company writes itself in several ways
there ("SIEMENS", "Siemens Healthineers"), so a name is parsed before it is compared. Which scanners a discriminator tells
apart is fixed in the plan or here, from public words alone: how common a scanner is at a site never decides
(``PRIVACY_RULES``, rules 1 and 12). All that the table does not name share its last place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

MAKERS: dict[str, tuple[str, ...]] = {
    "SIEMENS": ("siemens healthineers", "siemens healthcare gmbh", "siemens"),
    "GE": ("ge medical systems", "ge healthcare", "general electric", "ge"),
    "PHILIPS": ("philips medical systems", "philips healthcare", "philips"),
    "CANON": ("canon medical systems", "canon_mec", "canon", "toshiba_mec", "toshiba medical systems", "toshiba"),
    "FUJIFILM": ("fujifilm healthcare", "fujifilm corporation", "fujifilm", "hitachi medical corporation", "hitachi"),
    "UNITED IMAGING": ("united imaging healthcare", "united imaging", "uih"),
    "BRUKER": ("bruker biospin", "bruker"),
    "AGFA": ("agfa healthcare", "agfa"),
    "ZEISS": ("carl zeiss meditec", "zeiss"),
    "TOPCON": ("topcon",),
    "NIDEK": ("nidek",),
}
"""One spelling for each company, and how its devices write it, the longest first."""

SCANNER = r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,63}"
"""How a scanner is written where it is told to others: plain characters, at most 64."""

OTHER = "other"
"""Every scanner that a table does not name."""

STRENGTHS_T = (1.5, 3.0)
"""Field strengths that the default table tells apart [T]."""


@dataclass(frozen=True)
class ScannerName:
    """What a name says; what it leaves open is None."""

    maker: str
    """A key of :data:`MAKERS`, or :data:`OTHER`."""

    model: str | None = None
    """Lower case, single spaces."""

    field_strength_t: float | None = None
    """Field strength [T]."""

    def covers(self, scanner: ScannerName) -> bool:
        """Whether ``scanner`` is one of those that this name means."""
        return (
            self.maker == scanner.maker
            and self.model in (None, scanner.model)
            and self.field_strength_t in (None, scanner.field_strength_t)
        )


def parse_scanner(name: str) -> ScannerName:
    """Maker, model and field strength of a name such as "SIEMENS Aurora 1.5 T", "Siemens Healthineers" or "GE 3T"."""
    text = re.sub(r"\s+", " ", name.strip().lower())
    strength = re.search(r"(?:^| )(\d+(?:\.\d+)?) ?t$", text)
    field = float(strength[1]) if strength else None
    text = text[: strength.start()].strip() if strength else text
    for maker, spellings in MAKERS.items():
        for spelling in spellings:
            if text == spelling or text.startswith(f"{spelling} "):
                return ScannerName(maker, text[len(spelling) :].strip() or None, field)
    return ScannerName(OTHER, text or None, field)


def is_scanner(name: str) -> bool:
    """Whether a name is of the public vocabulary: it begins with a known maker and has plain characters only."""
    return re.fullmatch(SCANNER, name) is not None and parse_scanner(name).maker != OTHER


DEFAULT_TABLE: tuple[str, ...] = tuple(
    f"{maker}{strength}"
    for maker in ("SIEMENS", "GE", "PHILIPS", "CANON")
    for strength in (*(f" {t:g} T" for t in STRENGTHS_T), "")
)
"""What is told apart where a plan names no scanners: the four large makers, each at 1.5 T, at 3 T, and otherwise."""


class ScannerTable:
    """The scanners that a consortium tells apart; the last place is everybody else's.

    Parameters
    ----------
    names
        The plan's; None for :data:`DEFAULT_TABLE`. The first that covers a scanner gives it its place.
    """

    def __init__(self, names: Sequence[str] | None = None) -> None:
        self.names: tuple[str, ...] = (*(names or DEFAULT_TABLE), OTHER)
        self._parsed = [parse_scanner(name) for name in self.names[:-1]]

    def __len__(self) -> int:
        return len(self.names)

    def place(self, scanner: str | None) -> int:
        """Where a scanner stands in the table; -1 for a study that does not say what it was made with."""
        if not scanner:
            return -1
        parsed = parse_scanner(scanner)
        return next((i for i, name in enumerate(self._parsed) if name.covers(parsed)), len(self._parsed))
