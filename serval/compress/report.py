"""What `serval compress` prints when it is done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby

from rich.console import RenderableType

from serval.compress.method import Method
from serval.compress.pipeline import CompressResult

_NAMED = 8  # matrices listed by name per reason


def summary(result: CompressResult, method: Method) -> Iterator[RenderableType]:
    """Lines and tables: the plan, sizes, what was quantised how, kept in float, fell back."""
    table = method.resolve().recipe.table(result.plan)
    if table is not None:
        yield table
    saved = result.bytes_before / result.bytes_after
    yield (
        f"wrote {result.directory}: {result.bytes_before / 1e6:.1f} MB to "
        f"{result.bytes_after / 1e6:.1f} MB ({saved:.2f}x smaller), "
        f"{len(result.quantised)} matrices by {result.weights}, {result.seconds:.1f} s"
    )
    for scheme, names in _by_value(result.quantised).items():
        errors = [result.errors[name] for name in names if name in result.errors]
        mean = f", mean relative error {sum(errors) / len(errors):.4f}" if errors else ""
        yield f"{scheme}: {len(names)} matrices{mean}"
    for heading, reasons in (("not as asked", result.fell_back), ("kept in float", result.kept)):
        for why, names in _by_value(reasons).items():
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            yield f"{heading}: {', '.join(names[:_NAMED])}{more} ({why})"


def _by_value(values: Mapping[str, str]) -> dict[str, list[str]]:
    """Names by what they share, in order of name."""
    pairs = sorted((value, name) for name, value in values.items())
    return {value: [name for _, name in group] for value, group in groupby(pairs, lambda p: p[0])}
