"""Which matrix is stored how: one scheme for all, and exceptions by shell pattern."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from serval.compress.scheme import WeightScheme
from serval.errors import ConfigError

CHANNEL = "channel"
_SMALLEST_GROUP = 32


@dataclass(frozen=True)
class Override:
    """What is different for matrices whose checkpoint name fits `pattern`. changes: fields of
    `WeightScheme`."""

    pattern: str
    changes: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Override:
        """From `PATTERN:key=value,...`, for example `*down_proj:bits=8,group_size=channel`. Keys:
        bits, group_size, activations, scales. Raises ConfigError."""
        pattern, colon, settings = text.rpartition(":")
        changes: dict[str, Any] = {}
        for pair in settings.split(","):
            key, sign, value = (part.strip() for part in pair.partition("="))
            if not colon or not pattern or not sign or key not in _READ:
                raise ConfigError(
                    f"override {text!r}: expected PATTERN:key=value,... with keys "
                    f"{', '.join(_READ)}, for example '*down_proj:bits=8'"
                )
            if key in changes:
                raise ConfigError(f"override {text!r} gives {key!r} twice; leave one out")
            changes[key] = _READ[key](value)
        return cls(pattern, changes)


def group_size(text: str | int) -> int | None:
    """A number of inputs, or None for "channel"; raises ConfigError."""
    if text == CHANNEL:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(
            f"group size {text!r}: expected a number of inputs, or {CHANNEL!r}"
        ) from error


def _bits(text: str) -> int:
    if text not in ("4", "8"):
        raise ConfigError(f"weights can have 4 or 8 bits, got bits={text}")
    return int(text)


def _one_of(key: str, *names: str) -> Any:
    def read(text: str) -> str:
        if text not in names:
            raise ConfigError(f"{key}={text!r}: expected one of {', '.join(names)}")
        return text

    return read


_READ: dict[str, Any] = {
    "bits": _bits,
    "group_size": group_size,
    "activations": _one_of("activations", "token", "static", "none"),
    "scales": _one_of("scales", "float", "integer"),
}


@dataclass(frozen=True)
class SchemeRules:
    """default: for every matrix. fit: halve the default's group size until it divides a matrix's
    inputs, for a size nobody asked for; else it must divide them. overrides: for the matrices they
    fit, in this order. ignore: patterns of matrices to keep in float."""

    default: WeightScheme
    fit: bool = False
    overrides: Sequence[Override] = field(default_factory=tuple)
    ignore: Sequence[str] = field(default_factory=tuple)

    def ignores(self, name: str) -> bool:
        """Whether the matrix was asked to stay in float."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.ignore)

    def check_used(self, names: Sequence[str]) -> None:
        """Raise ConfigError for a pattern that fits none of `names`, which would change nothing."""
        for option, patterns in (
            ("ignore", self.ignore),
            ("override", [override.pattern for override in self.overrides]),
        ):
            for pattern in patterns:
                if not fnmatch.filter(names, pattern):
                    raise ConfigError(
                        f"{option} pattern {pattern!r} fits no matrix of this model; names look "
                        f"like {names[0]!r}"
                    )

    def scheme(self, name: str, inputs: int) -> WeightScheme:
        """Of the matrix `name` with `inputs` columns; raises ConfigError naming it when its groups
        do not divide them."""
        scheme = self._fitted(inputs) if self.fit else self.default
        for override in self.overrides:
            if fnmatch.fnmatchcase(name, override.pattern):
                changes = dict(override.changes)
                if changes.get("group_size", 1) is None:
                    changes.setdefault("scales", "float")  # per channel there is nothing to convert
                scheme = replace(scheme, **changes)
        try:
            scheme.groups(inputs)
        except ConfigError as error:
            raise ConfigError(
                f"{name}: {error} (--ignore {name}, or --override '{name}:group_size=...')"
            ) from error
        return scheme

    def _fitted(self, inputs: int) -> WeightScheme:
        size = self.default.group_size
        while size is not None and inputs % size:
            size = size // 2 if size > _SMALLEST_GROUP else None
        scales = "float" if size is None else self.default.scales
        return replace(self.default, group_size=size, scales=scales)
