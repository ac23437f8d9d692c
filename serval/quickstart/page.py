"""The quickstart's report.html: one file, plots inside, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serval.evaluate import plots
from serval.evaluate.html import image, page, provenance, text
from serval.quickstart.measures import Measure, shown
from serval.quickstart.variants import BATCHES, Outcome


@dataclass
class Completion:
    """What the server answered: prompt and text, and tokens' pace as the client saw it."""

    prompt: str
    text: str
    command: str
    startup_seconds: float


def render(
    model: str,
    outcomes: Sequence[Outcome],
    completion: Completion | None,
    next_commands: Sequence[tuple[str, str]],
    seconds: float,
) -> str:
    """The page as HTML text."""
    parts = [
        f"<header><h1>{text(model)}, compressed with Serval</h1>"
        f"<p>{text(provenance(seconds))}</p></header>",
        _cards(outcomes),
        f"<section><h2>Before and after</h2>{_table(outcomes)}"
        '<p class="note">Changes are against the first column. Quality is measured on text held '
        "out of training and on generated retrieval tasks, through the same cache layout that "
        f"serves; speed with {outcomes[0].speed[0].prompt} prompt tokens and "
        f"{outcomes[0].speed[0].output} generated tokens per sequence.</p></section>",
        f"<section><h2>Memory and speed</h2><div class='row'>{_memory(outcomes)}"
        f"{_speed(outcomes)}</div></section>",
        _retrieval(outcomes),
    ]
    if completion is not None:
        parts.append(
            "<section><h2>Served</h2>"
            f"<p><code>{text(completion.command)}</code> answered after "
            f"{completion.startup_seconds:.1f} s; a greedy completion from "
            "<code>/v1/completions</code>:</p>"
            f"<pre><b>{text(completion.prompt)}</b>{text(completion.text)}</pre></section>"
        )
    rows = "".join(
        f"<tr><td>{text(what)}</td><td><code>{text(command)}</code></td></tr>"
        for what, command in next_commands
    )
    parts.append(f"<section><h2>Next</h2><table class='next'>{rows}</table></section>")
    return page(f"Serval: {model}", "\n".join(parts))


def _cards(outcomes: Sequence[Outcome]) -> str:
    """The last variant's gains at a glance."""
    base, last = outcomes[0], outcomes[-1]
    chosen = [m for m in shown(outcomes) if m.change != "none"]
    cards = []
    for measure in chosen:
        change = measure.difference(last, base)
        if change and measure.label in _HEADLINES:
            cards.append(
                f"<div class='card'><b>{text(change)}</b><span>{text(measure.label)}</span></div>"
            )
    if not cards:
        return ""
    return f"<section class='cards'>{''.join(cards)}</section>"


_HEADLINES = {
    "perplexity",
    "weights, loaded",
    "cache per token",
    f"decode, batch {BATCHES[0]}",
    f"decode, batch {BATCHES[-1]}",
}


def _table(outcomes: Sequence[Outcome]) -> str:
    heads = "".join(f"<th>{text(o.variant.name)}</th>" for o in outcomes)
    rows, group = [], ""
    for measure in shown(outcomes):
        if measure.group != group:
            group = measure.group
            rows.append(
                f"<tr class='group'><th colspan='{len(outcomes) + 1}'>{text(group)}</th></tr>"
            )
        cells = "".join(f"<td>{_cell(measure, o, outcomes[0])}</td>" for o in outcomes)
        rows.append(f"<tr><th>{text(measure.label)}</th>{cells}</tr>")
    return f"<table class='numbers'><tr><th></th>{heads}</tr>{''.join(rows)}</table>"


def _cell(measure: Measure, outcome: Outcome, base: Outcome) -> str:
    change = measure.difference(outcome, base)
    note = f"<small>{text(change)}</small>" if change else ""
    return text(measure.cell(outcome)) + note


def _memory(outcomes: Sequence[Outcome]) -> str:
    weights = {o.variant.name.replace(" + ", "\n+ "): o.weight_bytes / 1e6 for o in outcomes}
    cache = {o.variant.name.replace(" + ", "\n+ "): o.cache_bytes_per_token for o in outcomes}
    return image(plots.bars(weights, "Weights in memory", "MB", 1), "weights in memory") + image(
        plots.bars(cache, "Cache per token", "bytes", 0), "cache bytes per token"
    )


def _speed(outcomes: Sequence[Outcome]) -> str:
    pictures = []
    for kind in ("prefill", "decode"):
        groups = {f"batch {batch}": _tokens_per_second(outcomes, kind, batch) for batch in BATCHES}
        title = f"{kind.capitalize()}, tokens per second"
        pictures.append(image(plots.grouped_bars(groups, title), title))
    return "".join(pictures)


def _tokens_per_second(outcomes: Sequence[Outcome], kind: str, batch: int) -> dict[str, float]:
    return {
        o.variant.name: getattr(speed, kind)
        for o in outcomes
        for speed in o.speed
        if speed.batch == batch
    }


def _retrieval(outcomes: Sequence[Outcome]) -> str:
    pictures = [
        image(plots.heatmaps(o.quality.cells, o.variant.name), f"retrieval, {o.variant.name}")
        for o in outcomes
        if o.quality.cells
    ]
    if not pictures:
        return ""
    return (
        "<section><h2>Retrieval by context length and depth</h2>"
        "<p>A fact is hidden at some depth of a long context; exact match of the greedy answer, "
        f"%.</p><div class='row'>{''.join(pictures)}</div></section>"
    )
