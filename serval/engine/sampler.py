"""From logits to tokens, for all sequences of a step at once.

Order: logit bias, penalties, min_tokens, constraint; then greedy, or temperature, top-k, top-p and
min-p (the order of Hugging Face's logits processors) and one draw by inverse transform sampling in
order of token id. One uniform number per token, a function of the request's seed and position
alone, makes the text independent of whatever else is in the batch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from serval.engine.request import Logprob, Sequence

_FIRST_CANDIDATES = 512  # top-p seldom needs more; a row that does is looked at completely
_BINS = 4096


@torch.inference_mode()
def sample(logits: Tensor, sequences: list[Sequence]) -> tuple[list[int], list[dict[int, Logprob]]]:
    """Choose the next token of each sequence.

    Args: logits: float32 [R, V], one row per sequence; overwritten.
    Returns: the tokens, and per sequence the log-probabilities asked for (empty when none were).
    A row from which nothing can be chosen (NaN, or a constraint left no token) gives -1.
    """
    wanted = [i for i, s in enumerate(sequences) if s.params.logprobs is not None]
    raw = logits[wanted].log_softmax(-1) if wanted else None  # before anything changes them
    for row, sequence in enumerate(sequences):
        if sequence.adjusts_logits:
            _adjust(logits[row], sequence)
    best, tokens = _largest(logits)
    failed = [i for i, value in enumerate(best) if not math.isfinite(value)]
    drawn = [i for i, s in enumerate(sequences) if not s.params.greedy]
    if drawn:
        every = len(drawn) == len(sequences)
        chosen = draw(
            logits if every else logits[drawn],
            [sequences[i].params for i in drawn],
            [sequences[i].uniform() for i in drawn],
        )
        for i, token in zip(drawn, chosen, strict=True):
            tokens[i] = token
    for i in failed:
        tokens[i] = -1
    found: list[dict[int, Logprob]] = [{} for _ in sequences]
    if raw is not None:
        counts = [sequences[i].params.logprobs or 0 for i in wanted]
        entries = token_logprobs(raw, [tokens[i] for i in wanted], counts)
        for i, entry in zip(wanted, entries, strict=True):
            found[i] = entry
    return tokens, found


def _largest(logits: Tensor) -> tuple[list[float], list[int]]:
    """Largest value of each row of logits [R, V] and its place; NaN counts as largest."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        rows = logits.numpy()  # whose argmax is vectorised, unlike torch's
        greedy = rows.argmax(-1)
        return rows[np.arange(len(rows)), greedy].tolist(), greedy.tolist()
    best, places = logits.max(-1)
    return best.tolist(), places.tolist()


def _adjust(row: Tensor, sequence: Sequence) -> None:
    """Bias, penalties, min_tokens and constraint on one row of logits [V], in place."""
    params = sequence.params
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=row.device)
        row[ids] += torch.tensor(list(params.logit_bias.values()), device=row.device)
    if sequence.counts is not None:
        sequence.counts.apply(
            row, params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        )
    if sequence.num_output < params.min_tokens and sequence.stop_ids:
        row[list(sequence.stop_ids)] = float("-inf")
    if sequence.constraint is not None:
        allowed = torch.from_numpy(sequence.constraint.allowed())[: len(row)].to(row.device)
        if params.min_tokens and not bool(torch.isfinite(row[allowed]).any()):
            row[allowed] = (
                0.0  # the grammar is complete: it ends the text, whatever min_tokens says
            )
        row.masked_fill_(~allowed, float("-inf"))


def draw(logits: Tensor, params: list, uniforms: list[float]) -> list[int]:
    """One token per row of logits [R, V], with `SamplingParams` and a number in [0, 1) per row."""
    vocab = logits.shape[-1]
    plain = [i for i, p in enumerate(params) if not p.top_k and p.top_p >= 1.0]
    filtered = [i for i, p in enumerate(params) if p.top_k or p.top_p < 1.0]
    tokens = [0] * len(params)
    for rows, narrow in ((plain, False), (filtered, True)):
        if not rows:
            continue
        mine = [params[i] for i in rows]
        some = logits if len(rows) == len(params) else logits[rows]
        temperature = _column([p.temperature for p in mine], some)
        # The maximum becomes 0 first, so that a tiny temperature cannot overflow to inf - inf.
        scaled = (some - some.max(-1, keepdim=True).values) / temperature
        uniform = torch.tensor([uniforms[i] for i in rows], dtype=torch.float64).to(some.device)
        if narrow:
            picked = _draw_filtered(scaled, mine, uniform, vocab)
        else:
            probs = scaled.softmax(-1)
            picked = _pick(_keep_min_p(probs, mine), uniform)
        for i, token in zip(rows, picked.tolist(), strict=True):
            tokens[i] = token
    return tokens


def _draw_filtered(scaled: Tensor, params: list, uniform: Tensor, vocab: int) -> Tensor:
    """Draw under top-k and top-p, looking at the best candidates only. Returns int64 [R]."""
    ks = [min(p.top_k or vocab, vocab) for p in params]
    width = max(k if k < vocab else min(_FIRST_CANDIDATES, vocab) for k in ks)
    values, ids = scaled.topk(width, dim=-1)  # [R, W], descending
    limit = torch.tensor(ks, device=scaled.device)[:, None]
    inside = torch.arange(width, device=scaled.device)[None] < limit
    values = values.masked_fill(~inside, float("-inf"))
    whole = torch.where(limit < vocab, values.logsumexp(-1, keepdim=True), 0.0)
    if any(k >= vocab for k in ks):
        whole = torch.where(limit < vocab, whole, scaled.logsumexp(-1, keepdim=True))
    probs = (values - whole).exp()
    nucleus = _column([p.top_p for p in params], scaled)
    before = probs.cumsum(-1) - probs
    missing = (limit[:, 0] > width) & (before[:, -1] + probs[:, -1] < nucleus[:, 0])
    probs = probs.masked_fill(before >= nucleus, 0.0)
    probs = _keep_min_p(probs, params)
    ids, order = ids.sort(-1)
    picked = ids.gather(-1, _pick(probs.gather(-1, order), uniform)[:, None])[:, 0]
    for row, beyond in enumerate(missing.tolist()):
        if beyond:
            probs = _nucleus(scaled[row], params[row].top_p)[None]
            probs = _keep_min_p(probs, params[row : row + 1])
            picked[row] = _pick(probs, uniform[row : row + 1])[0]
    return picked


def _nucleus(scaled: Tensor, top_p: float) -> Tensor:
    """Probabilities [V] with all outside the nucleus at 0, for logits with maximum 0.

    A histogram finds the bin in which the nucleus ends; only that bin is sorted.
    """
    probs = scaled.softmax(-1)
    bins = (scaled * (-_BINS / 30)).clamp_(max=_BINS - 1).long()
    mass = torch.bincount(bins, weights=probs.double(), minlength=_BINS)
    before = mass.cumsum(0) - mass
    edge = int((before < top_p).sum()) - 1
    keep = bins < edge
    last = (bins == edge).nonzero()[:, 0]
    last = last[scaled[last].argsort(descending=True)]
    inside = probs[last].double()
    keep[last[before[edge] + inside.cumsum(0) - inside < top_p]] = True
    return probs.masked_fill_(~keep, 0.0)


def _keep_min_p(probs: Tensor, params: list) -> Tensor:
    if not any(p.min_p for p in params):
        return probs
    floor = probs.amax(-1, keepdim=True) * _column([p.min_p for p in params], probs)
    return probs.masked_fill(probs < floor, 0.0)


def _pick(probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse transform sampling: probs [R, W] (any sum), uniform float64 [R] -> int64 [R]."""
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    target = (uniform * cumulative[:, -1])[:, None]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=probs.shape[-1] - 1)


def _column(values: list[float], like: Tensor) -> Tensor:
    """[R, 1] of `like`'s kind; what is too small for it becomes its smallest number, not 0."""
    column = torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
    positive = column > 0
    column = column.to(like.dtype)
    return column.clamp_min_(torch.finfo(like.dtype).tiny) if bool(positive.all()) else column


def token_logprobs(
    logprobs: Tensor, tokens: list[int], counts: list[int]
) -> list[dict[int, Logprob]]:
    """Per row of log-probabilities [R, V]: the token's entry, then those of the `count` best."""
    if not tokens:
        return []
    chosen = torch.tensor(tokens, device=logprobs.device).clamp_(min=0)[:, None]
    own = logprobs.gather(1, chosen)
    ranks = ((logprobs > own).sum(-1) + 1).tolist()
    width = min(max(counts), logprobs.shape[-1])
    values, ids = logprobs.topk(width)  # [R, width]
    best = zip(ids.tolist(), values.tolist(), strict=True)
    entries = []
    for token, count, value, rank, (others, theirs) in zip(
        tokens, counts, own[:, 0].tolist(), ranks, best, strict=True
    ):
        entry = {token: Logprob(value, rank)}
        for place in range(min(count, width)):
            entry.setdefault(others[place], Logprob(theirs[place], place + 1))
        entries.append(entry)
    return entries


def prompt_logprobs(
    logits: Tensor, targets: np.ndarray, count: int
) -> list[dict[int, Logprob] | None]:
    """Entries for consecutive prompt tokens: logits [R, V] of the rows before `targets` [R]."""
    tokens = targets.tolist()
    return [*token_logprobs(logits.log_softmax(-1), tokens, [count] * len(tokens))]
