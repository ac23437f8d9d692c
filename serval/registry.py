"""Registries: plain dicts from the name used on the command line to where its class lives.

Each seam of the design has one. Entries are import paths, so that listing the methods imports
none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from serval.errors import ConfigError


@dataclass(frozen=True)
class Entry:
    """One method: where it lives ("module:attribute"), one line about it, and the arXiv id of its
    paper, as plain digits."""

    target: str
    summary: str
    paper: str = ""

    def load(self) -> Any:
        module, _, attribute = self.target.partition(":")
        return getattr(import_module(module), attribute)


def resolve(registry: Mapping[str, Entry], name: str, kind: str) -> Any:
    """Return the class registered as `name`; raises ConfigError listing what exists."""
    if name not in registry:
        known = ", ".join(sorted(registry))
        raise ConfigError(f"unknown {kind} {name!r}; choose one of: {known}")
    return registry[name].load()
