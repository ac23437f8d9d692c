"""The picture of `serval bench prefixkv`, from its JSON.

python -m serval.bench.prefixkv_report docs/results/prefixkv.json --picture docs/images/prefixkv.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from serval.bench.harness import Case
from serval.bench.table import read_report
from serval.errors import ConfigError
from serval.evaluate.plots import PALETTE, new_figure, png


def draw(cases: Sequence[Case]) -> bytes:
    """PNG: Lorenz curves per layer, and perplexity by budget per policy. Raises ConfigError when
    the report lacks either."""
    found = [case.metrics for case in cases if case.case == "importance"]
    scored = [case.metrics for case in cases if "perplexity" in case.metrics]
    if not found or not scored:
        raise ConfigError(
            "the report has no case 'importance' or no perplexities; run `serval bench prefixkv` "
            "without --only"
        )
    figure = new_figure(width=9.5, height=3.8)
    left, right = figure.subplots(1, 2)
    curves, unequal = found[0]["lorenz"], found[0]["gini"]
    for layer, (curve, value) in enumerate(zip(curves, unequal, strict=True)):
        share = [100 * n / (len(curve) - 1) for n in range(len(curve))]
        left.plot(
            share,
            [100 * y for y in curve],
            color=PALETTE[layer % len(PALETTE)],
            alpha=1.0 if layer < len(PALETTE) else 0.5,
            label=f"layer {layer}, Gini {value:.2f}",
        )
    left.plot([0, 100], [0, 100], ":", color="grey", linewidth=1)
    left.set_xlabel("least attended tokens, %")
    left.set_ylabel("attention they receive, %")
    left.set_title("how unevenly layers attend", fontsize=10)
    left.legend(fontsize=7)
    for index, policy in enumerate(dict.fromkeys(m["policy"] for m in scored)):
        mine = sorted((m["keep"], m["perplexity"]) for m in scored if m["policy"] == policy)
        right.plot(
            [100 * keep for keep, _ in mine],
            [value for _, value in mine],
            "o-",
            markersize=3,
            color=PALETTE[index % len(PALETTE)],
            label=policy,
        )
    right.axhline(scored[0]["whole_perplexity"], linestyle=":", color="grey", label="whole cache")
    right.set_xlabel("kept, %")
    right.set_ylabel("perplexity of the continuation")
    right.set_yscale("log")
    right.set_title("one budget, split in different ways", fontsize=10)
    right.legend(fontsize=7)
    return png(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description="Draw the result of `serval bench prefixkv`.")
    parser.add_argument("report", type=Path)
    parser.add_argument("--picture", type=Path, required=True)
    given = parser.parse_args(arguments)
    given.picture.parent.mkdir(parents=True, exist_ok=True)
    given.picture.write_bytes(draw(read_report(given.report).cases))


if __name__ == "__main__":
    main()
