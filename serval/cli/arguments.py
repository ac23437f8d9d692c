"""Values of command-line options: lists and settings, refused with the option's name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

from serval.errors import ConfigError


def names(text: str) -> list[str]:
    """The parts of a comma-separated list, blanks left out."""
    return [name.strip() for name in text.split(",") if name.strip()]


def integers(option: str, text: str) -> list[int]:
    """A comma-separated list of whole numbers; raises ConfigError naming `option`."""
    try:
        return [int(part) for part in names(text)]
    except ValueError as error:
        raise ConfigError(
            f"{option} takes whole numbers separated by commas, got {text!r}"
        ) from error


def settings(option: str, pairs: Iterable[str]) -> dict[str, Any]:
    """`key=value` strings to a dict, values written as in YAML; raises ConfigError naming
    `option`."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"{option} takes key=value, got {pair!r}")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            why = " ".join(str(error).split())
            raise ConfigError(f"{option} {pair!r}: the value is not valid YAML: {why}") from error
    return found
