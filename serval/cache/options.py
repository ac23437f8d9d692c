"""Names with options, as written on the command line: "oscar:bits=4,residual=32"."""

from __future__ import annotations

from serval.errors import CacheError


def split_options(text: str, argument: str) -> tuple[str, dict[str, str]]:
    """The name of "name" or "name:option=value,..." and its options as text. argument: what the
    user set, for messages, such as "kv". Raises `CacheError` for what it cannot read, and for an
    option that is given twice."""
    name, colon, rest = text.partition(":")
    given: dict[str, str] = {}
    for part in rest.split(",") if colon else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise CacheError(
                f"cannot read {part!r} in {argument}={text!r}: expected "
                "name:option=value,option=value"
            )
        if key in given:
            raise CacheError(
                f"{argument}={text!r} gives {key!r} twice, {given[key]} and {value}; leave one out"
            )
        given[key] = value
    return name, given
