"""Names that a plan may use, and where the thing behind each name lives.

A registry is a plain table of ``name: "module:attribute"``; the module is imported when the name is first used, so that
reading a plan costs no import of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def look_up(registry: Mapping[str, str], name: str) -> Any:
    """The object registered under ``name``; ``KeyError`` if a plan was not validated first."""
    module, attribute = registry[name].split(":")
    return getattr(import_module(module), attribute)


def one_of(registry: Mapping[str, str]) -> Callable[[str], str]:
    """A check for a plan's key: the value is a name in ``registry``."""

    def check(name: str) -> str:
        if name not in registry:
            raise ValueError(f"{name!r} is none of: {', '.join(registry)}")
        return name

    return check
