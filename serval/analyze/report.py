"""The inspection as one HTML file, as pictures, and as lines for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from serval.analyze import figures
from serval.analyze.inspection import PRESENT, STRONG, Change, Inspection, top_tokens
from serval.errors import DataError
from serval.evaluate.html import image, page, provenance, text

# figure -> title, what it shows, how to read it
_EXPLAINED = {
    "sink-heads": (
        "Sinks, head by head",
        "Softmax makes every row of attention sum to 1. A head with nothing to look for still has "
        "to put its weight somewhere, and many models learn to park it on one token that means "
        "little, usually the first: an attention sink. The sink rate is the share of texts in "
        "which the first of {length} tokens gets more than {epsilon:g} of a head's weight on "
        "average. The second panel is the average weight itself over {tokens} tokens, the third "
        "that of whichever token gets most, so a sink at another place shows there.",
    ),
    "positions": (
        "Where in the text attention falls",
        "The average weight that each of the first positions gets from the tokens after it, per "
        "layer. A bright first column that stays bright in deep layers is a sink; a smooth fall "
        "from left to right is ordinary.",
    ),
    "entropy": (
        "How widely heads look",
        "Entropy 0 is a head that looks at a single token, for example the one before; the right "
        "panel divides by the entropy of looking at all visible tokens alike, so 1 is a head that "
        "averages. Rows that sum to less than 1 come from learned sink logits.",
    ),
    "keys-and-values": (
        "Keys and values of the first token",
        "A sink that does nothing has a small value (left, below 0.3) and a key that lies apart "
        "from the others (middle, near 0 or below). Where the right panel is high, the angle "
        "between a key and the mean key predicts which tokens are attended to, and a cache may "
        "drop tokens by it without computing attention (KeyDiff).",
    ),
    "hidden": (
        "Hidden states",
        "Sinks of large models come with massive activations: a few numbers thousands of times the "
        "median, which ruin low-precision formats. Kurtosis measures the same as heavy tails. The "
        "right panel is how far, in angle, tokens are from the first one.",
    ),
    "bias": (
        "What the first token adds",
        "If the first token is a sink, its weight times its value acts as a bias: nearly the same "
        "vector for every query (middle panel near 0), small beside the output (left), and heavier "
        "when the head has little to say (right panel below 0).",
    ),
    "changes": (
        "What happens without it",
        "How far next-token predictions move when something is taken away. A sink does nothing "
        "through its value and much through its key: masked, its weight falls on tokens that mean "
        "something. For an ordinary token both are small. Below: the cache quantised, with all "
        "tokens or all but some; and cut to a few tokens, with or without the first ones "
        "(StreamingLLM).",
    ),
}


def write(result: Inspection, out: Path) -> Path:
    """Write the report. Raises DataError when the file cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(render(result), encoding="utf-8")
    except OSError as error:
        raise DataError(f"the report cannot be written to {out}: {error}") from error
    return out


def write_pictures(result: Inspection, folder: Path) -> list[Path]:
    """Write every figure as PNG. Raises DataError when a file cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for name, draw in figures.FIGURES.items():
            path = folder / f"{name}.png"
            path.write_bytes(draw(result))
            paths.append(path)
    except OSError as error:
        raise DataError(f"pictures cannot be written to {folder}: {error}") from error
    return paths


def summary(result: Inspection) -> list[str]:
    """The findings in a few lines."""
    heads = result.survey.heads
    dormant = int(heads.dormant.sum())
    place = divmod(int(heads.first_token.argmax()), result.heads)
    lines = [
        result.verdict,
        f"sink rate {result.sink_rate.mean():.1f} % (weight above {result.options.epsilon:g}); the "
        f"first token gets {100 * heads.first_token.mean():.1f} % of attention on average, most in "
        f"layer {place[0]} head {place[1]} ({100 * heads.first_token.max():.1f} %); "
        f"{dormant} of {result.layers * result.heads} heads are dormant",
        f"hidden states reach {_peak(result):.0f}, kurtosis {_kurtosis(result):.1f}, "
        f"{_massive(result)} massive activations",
    ]
    zero, masked = result.changes[0].result, result.changes[1].result
    if zero is not None and masked is not None:
        lines.append(
            f"without the first token's value predictions move by {zero.kl:.4f} nats, without its "
            f"key by {masked.kl:.4f}"
        )
    return lines


def advice(result: Inspection) -> list[str]:
    """What the findings mean for someone who wants this model smaller or longer."""
    lines = []
    rate = result.sink_rate.mean().item()
    if rate >= PRESENT:
        lines.append(
            "Keep the first tokens: do not evict them from the cache, do not quantise them below "
            "8 bits, and let sparse attention always see them."
        )
    else:
        lines.append(
            "No token needs to be kept for its attention weight alone: caches may treat the first "
            "tokens like any others."
        )
    kept = [c for c in result.changes if c.group == "quantised cache" and c.result is not None]
    if kept and kept[0].result is not None:
        bare = kept[0].result.kl
        best = min(kept[1:], key=lambda c: c.result.kl if c.result else bare)
        assert best.result is not None
        gain = 1 - best.result.kl / bare if bare else 0.0
        worth = "is worth it" if gain > 0.1 else "changes little"
        lines.append(
            f"In a {result.options.bits}-bit cache, keeping sinks exact {worth}: {bare:.4f} nats "
            f"without, {best.result.kl:.4f} with the best choice ({best.name.partition(', ')[2]})."
        )
    short = [c for c in result.changes if c.group == "short cache" and c.result is not None]
    if len(short) == 2 and short[0].result is not None and short[1].result is not None:
        a, b = short[0].result.kl, short[1].result.kl
        lines.append(
            f"A cache of a quarter of the tokens costs {a:.4f} nats when it holds the most recent "
            f"ones, {b:.4f} when it also keeps the first four (kv='streaming')."
        )
    if _massive(result):
        lines.append(
            "Massive activations are present: expect trouble from 8-bit activations per tensor; "
            "rotate first (compress --rotate hadamard)."
        )
    return lines


def render(result: Inspection) -> str:
    """The page as HTML text."""
    options = result.options
    parts = [
        f"<header><h1>{text(result.model)}: where attention goes</h1>"
        f"<p>{text(provenance(result.seconds))}</p></header>",
        _cards(result),
        f"<section><h2>{text(result.verdict)}</h2><ul>"
        + "".join(f"<li>{text(line)}</li>" for line in advice(result))
        + f"</ul><p class='note'>{result.layers} attention layers of {result.heads} heads, "
        f"{result.sequences} sequences of {result.tokens} tokens. A rate of {STRONG:g} % or more "
        f"counts as strong, below {PRESENT:g} % as absent.</p></section>",
    ]
    for name, (title, explanation) in _EXPLAINED.items():
        words = explanation.format(
            length=min(64, result.tokens), epsilon=options.epsilon, tokens=result.tokens
        )
        extra = {"positions": _tokens, "hidden": _hidden, "changes": _changes}.get(name)
        parts.append(
            f"<section><h2>{text(title)}</h2><p>{text(words)}</p>"
            f"{image(figures.FIGURES[name](result), title)}"
            f"{extra(result) if extra else ''}</section>"
        )
    parts.append(_circuits(result))
    return page(f"Serval: attention of {result.model}", "\n".join(parts))


def _cards(result: Inspection) -> str:
    heads = result.survey.heads
    masked = result.changes[1].result
    cards = {
        "sink rate": f"{result.sink_rate.mean():.1f} %",
        "weight of the first token": f"{100 * heads.first_token.mean():.1f} %",
        "dormant heads": f"{int(heads.dormant.sum())} of {result.layers * result.heads}",
        "largest hidden number": f"{_peak(result):,.0f}",
        "KL with the first key masked": "" if masked is None else f"{masked.kl:.3f}",
    }
    return (
        "<section class='cards'>"
        + "".join(
            f"<div class='card'><b>{text(value)}</b><span>{text(label)}</span></div>"
            for label, value in cards.items()
            if value
        )
        + "</section>"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = "".join(f"<th>{text(name)}</th>" for name in head)
    body = "".join(
        "<tr>"
        + f"<th>{text(row[0])}</th>"
        + "".join(f"<td>{text(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<table class='numbers'><tr>{cells}</tr>{body}</table>"


def _tokens(result: Inspection) -> str:
    rows = [
        (repr(result.strings.get(token, str(token))), f"{100 * weight:.1f} %", str(count))
        for token, weight, count in top_tokens(result.survey)
    ]
    return (
        "<p>The tokens that some head attends to most, on average over their occurrences:</p>"
        + _table(("token", "weight in its strongest head", "seen"), rows)
    )


def _hidden(result: Inspection) -> str:
    rows = []
    for number, layer in enumerate(result.survey.layers):
        stats = max(layer, key=lambda s: s.peak)
        largest = ", ".join(
            f"{a.value:.0f} (token {a.token}, channel {a.channel})" for a in stats.largest
        )
        massive = str(sum(s.massive for s in layer))
        rows.append((str(number), f"{stats.median:.2f}", largest, massive))
    where, channels = result.channels
    return (
        _table(("block", "median |h|", "largest, in the text where they are greatest", "massive"),
               rows)
        + f"<p class='note'>Massive: above 100 and 1000 times the median. Outliers emerge after "
        f"block {where}, on channels {text(', '.join(map(str, channels)))}.</p>"
    )  # fmt: skip


def _changes(result: Inspection) -> str:
    def row(change: Change) -> tuple[str, str, str]:
        if change.result is None:
            return change.name, "not possible", change.failed or ""
        return change.name, f"{change.result.kl:.4f}", f"{100 * change.result.same_top:.1f} %"

    head = ("change", "KL, nats per token", "same most likely token")
    return _table(head, [row(change) for change in result.changes])


def _circuits(result: Inspection) -> str:
    rows = []
    for layer, s in sorted(result.survey.circuits.spikes.items()):
        share = "" if s.share is None else f"{100 * s.share:.0f} %"
        weight = "" if s.weight is None else f"{s.weight:.3f}"
        source = f"{s.input_value:.1f} (channel {s.input_channel})"
        target = f"{s.output_value:.1f} (channel {s.output_channel})"
        rows.append((str(layer), source, target, weight, share))
    parts = [
        "<section><h2>Outlier circuits</h2><p>The largest output of each feed-forward layer, the "
        "largest input at that token, and the weight between the two channels. A share near 100 % "
        "means that this one weight makes the spike (a super weight): it must not be pruned or "
        "rounded carelessly.</p>",
        _table(("block", "input", "output", "weight", "its share of the output"), rows),
    ]
    experts = result.survey.circuits.super_experts()
    if experts:
        parts.append(
            "<p>Experts whose output spikes (above the 99.5th percentile of all, and a tenth of "
            "the largest; among few experts the largest always qualifies): pruning such a super "
            "expert breaks a model.</p>"
            + _table(
                ("block", "expert", "peak"),
                [(str(layer), str(expert), f"{peak:.1f}") for layer, expert, peak in experts],
            )
        )
    return "".join(parts) + "</section>"


def _peak(result: Inspection) -> float:
    return max(s.peak for layer in result.survey.layers for s in layer)


def _kurtosis(result: Inspection) -> float:
    return max(sum(s.kurtosis for s in layer) / len(layer) for layer in result.survey.layers)


def _massive(result: Inspection) -> int:
    return sum(s.massive for layer in result.survey.layers for s in layer)
