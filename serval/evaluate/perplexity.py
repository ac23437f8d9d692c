"""Perplexity on held-out text, and how far a model's predictions moved from a reference's.

    perplexity = exp(mean over scored tokens of -ln p(token | what precedes it in its document))

Text is cut into windows that never cross documents. With a `stride` below the window, windows
overlap and only each one's last `stride` tokens are scored: every token then has at least
window - stride tokens of context (sliding context).

A perplexity can stay put while predictions change, so a reference model adds the mean next-token
divergence KL(reference || model) in nats and the share of positions with the same most likely
token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from random import Random
from typing import Any

import torch
import torch.nn.functional as F

from serval.errors import DataError
from serval.evaluate.scorer import PROMPT_SHARE, Scorer, prompt_length

Tick = Callable[[int], None]  # told how many more tokens were scored


@dataclass(frozen=True)
class Window:
    """tokens: one piece of a document; those from index `scored_from` on are scored."""

    tokens: list[int]
    scored_from: int = 1

    @property
    def scored(self) -> int:
        return len(self.tokens) - self.scored_from


@dataclass
class TextScore:
    """perplexity: exp(nats), nats: mean per token, stderr: of that mean, over windows. kl, same_top
    and reference_perplexity: only with a reference model, see the module's text."""

    perplexity: float
    nats: float
    stderr: float
    tokens: int
    windows: int
    kl: float | None = None
    same_top: float | None = None
    reference_perplexity: float | None = None


def cut(
    documents: Iterable[Sequence[int]],
    window: int,
    stride: int | None = None,
    max_tokens: int | None = None,
) -> list[Window]:
    """Windows of tokenised documents.

    window: most tokens in one; stride: tokens scored in each but the first (None: all, no overlap).
    Stops once `max_tokens` are scored. Raises DataError when nothing is left to score.
    """
    if window < 2 or (stride is not None and not 0 < stride < window):
        raise DataError(
            f"window {window}, stride {stride}: expected a window of at least 2 tokens and a "
            "stride from 1 to window - 1"
        )
    windows: list[Window] = []
    scored = 0
    for document in documents:
        done = 1  # the first token of a document has nothing to be predicted from
        while done < len(document):
            if done == 1 or stride is None:
                start = done - 1
                end = min(start + window, len(document))
            else:
                end = min(done + stride, len(document))
                start = max(0, end - window)
            piece = list(document[start:end])
            if max_tokens is not None:
                excess = max(0, scored + end - done - max_tokens)
                end, piece = end - excess, piece[: len(piece) - excess]
            windows.append(Window(piece, done - start))
            scored += end - done
            done = end
            if max_tokens is not None and scored >= max_tokens:
                return windows
    if not windows:
        raise DataError("the text is too short to score: no document has two tokens")
    return windows


def spread(
    documents: Iterable[Sequence[int]],
    window: int,
    stride: int | None,
    max_tokens: int,
    seed: int = 0,
) -> list[Window]:
    """As `cut`, but drawing windows from all over the text: one of every document in turn, so that
    few tokens do not mean few documents. Stops reading at eight times what is needed."""
    rng = Random(f"windows/{seed}")
    per_document: list[list[Window]] = []
    read = 0
    for document in documents:
        if len(document) > 1:
            pieces = cut([document], window, stride)
            rng.shuffle(pieces)
            per_document.append(pieces)
            read += len(document)
        if read >= 8 * max_tokens:
            break
    rng.shuffle(per_document)
    chosen: list[Window] = []
    room = max_tokens
    for turn in zip_longest(*per_document):
        for piece in turn:
            if piece is None:
                continue
            if piece.scored > room:
                piece = Window(piece.tokens[: piece.scored_from + room], piece.scored_from)
            chosen.append(piece)
            room -= piece.scored
            if room == 0:
                return chosen
    if not chosen:
        raise DataError("the text is too short to score: no document has two tokens")
    return chosen


def continuations(windows: Sequence[Window], share: float = PROMPT_SHARE) -> list[Window]:
    """The windows with only what follows their prompts scored (see `Scorer`), less those where
    nothing is left. Raises DataError when none is."""
    scored = [
        Window(w.tokens, max(w.scored_from, prompt_length(len(w.tokens), share) + 1))
        for w in windows
    ]
    left = [window for window in scored if window.scored > 0]
    if not left:
        raise DataError("the text is too short to score: nothing is left behind the prompts")
    return left


def pack(windows: Sequence[Window], tokens: int) -> list[list[Window]]:
    """Group windows, in order, into batches of at most `tokens` tokens (at least one window)."""
    batches: list[list[Window]] = []
    room = 0
    for window in windows:
        if not batches or room < len(window.tokens):
            batches.append([])
            room = tokens
        batches[-1].append(window)
        room -= len(window.tokens)
    return batches


def score(
    scorer: Scorer,
    windows: Sequence[Window],
    *,
    reference: Scorer | None = None,
    batch_tokens: int = 4096,
    tick: Tick | None = None,
) -> TextScore:
    """Score `windows`; with a `reference` both models read the same text side by side.

    Memory: `batch_tokens` hidden states and, per model, one chunk of logits. The reference must
    share the vocabulary and have the same `chunk` (DataError).
    """
    if reference is not None:
        _check_pair(scorer, reference)
    totals = [0.0] * len(windows)  # nats of each window, in float64
    reference_nats = kl = 0.0
    same = at = 0
    for batch in pack(windows, batch_tokens):
        sequences = [window.tokens for window in batch]
        other = reference.logits(sequences) if reference is not None else None
        for n, first, logits in scorer.logits(sequences):
            window = batch[n]
            skip = max(0, window.scored_from - 1 - first)  # row i predicts token i + 1
            targets = window.tokens[first + skip + 1 : first + len(logits) + 1]
            expected = next(other)[2] if other is not None else None
            if not targets:
                continue
            rows = slice(skip, skip + len(targets))
            wanted = torch.tensor(targets, device=logits.device)
            log_p = F.log_softmax(logits[rows], dim=-1)
            totals[at + n] += F.nll_loss(log_p, wanted, reduction="sum").double().item()
            if expected is not None:
                log_q = F.log_softmax(expected[rows].to(log_p.device), dim=-1)
                reference_nats += F.nll_loss(log_q, wanted, reduction="sum").double().item()
                kl += F.kl_div(log_p, log_q, log_target=True, reduction="sum").double().item()
                same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        at += len(batch)
        if tick is not None:
            tick(sum(window.scored for window in batch))
    count = sum(window.scored for window in windows)
    nats = sum(totals) / count
    result = TextScore(
        perplexity=_exp(nats),
        nats=nats,
        stderr=_stderr(totals, windows, nats),
        tokens=count,
        windows=len(windows),
    )
    if reference is not None:
        result.kl, result.same_top = kl / count, same / count
        result.reference_perplexity = _exp(reference_nats / count)
    return result


def tokenize(texts: Iterable[str], tokenizer: Any) -> Iterable[list[int]]:
    """Token ids of each text, with the tokenizer's own special tokens (a BOS where it has one)."""
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"]
        if len(ids) > 1:
            yield ids


def _check_pair(scorer: Scorer, reference: Scorer) -> None:
    ours, theirs = scorer.decoder.config.vocab_size, reference.decoder.config.vocab_size
    if ours != theirs:
        raise DataError(
            f"the reference model has {theirs} tokens, the model {ours}; the divergence of their "
            "predictions needs one vocabulary"
        )
    if scorer.chunk != reference.chunk:
        raise DataError(f"chunk is {scorer.chunk} for the model, {reference.chunk} for the other")


def _stderr(totals: Sequence[float], windows: Sequence[Window], mean: float) -> float:
    """Standard error of a ratio of sums over windows (linearised)."""
    n = len(windows)
    if n < 2:
        return float("nan")
    count = sum(window.scored for window in windows)
    spread = sum((t - mean * w.scored) ** 2 for t, w in zip(totals, windows, strict=True))
    return math.sqrt(spread * n / (n - 1)) / count


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else float("inf")
