"""The sampler draws from the right distribution; penalties and filters equal transformers'."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from serval import SamplingParams
from serval.cache.manager import SequenceCache
from serval.engine.penalties import TokenCounts
from serval.engine.request import Request, Sequence
from serval.engine.sampler import _draw_filtered, draw, sample

from .helpers import tiny_llm


def sequence(params: SamplingParams, prompt: list[int], output: list[int] = ()) -> Sequence:
    request = Request("r", None, prompt, params, 0, params.seed or 0)
    made = Sequence(request, 0, SequenceCache([], [], []), frozenset({0}))
    if params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty:
        made.counts = TokenCounts(prompt)
    for token in output:
        made.append(token)
        if made.counts is not None:
            made.counts.add(token)
    if params.logprobs is not None:
        made.logprobs = []
    return made


def expected(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities by transformers' warpers, in their order."""
    row = TemperatureLogitsWarper(params.temperature)(None, logits[None])
    if params.top_k:
        row = TopKLogitsWarper(params.top_k)(None, row)
    if params.top_p < 1:
        row = TopPLogitsWarper(params.top_p)(None, row)
    if params.min_p:
        row = MinPLogitsWarper(params.min_p)(None, row)
    return row.softmax(-1)[0]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.sampled_from([5, 40, 700, 1500]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 30, 600, 5000]),
    top_p=st.sampled_from([0.01, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.5]),
    spread=st.sampled_from([0.01, 1.0, 5.0]),
)
def test_filters_equal_transformers(seed, vocab, temperature, top_k, top_p, min_p, spread) -> None:
    """The inverse transform is read off exactly: each token's share of a fine uniform grid."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocab, generator=generator) * spread
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    want = expected(logits, params)
    grid = 200
    uniforms = [(i + 0.5) / grid for i in range(grid)]
    tokens = draw(logits.expand(grid, -1), [params] * grid, uniforms)
    edges = want.double().cumsum(0)
    strangers = {token for token in tokens if want[token] == 0}
    assert len(strangers) <= 1  # rounding may move a filter's limit by one token
    for uniform, token in zip(uniforms, tokens, strict=True):
        # Allow for rounding at a bin's edge, and for a filter's limit falling between two tokens.
        low, high = float(edges[token] - want[token]), float(edges[token])
        assert low - 6e-3 <= uniform <= high + 6e-3


def test_rows_are_drawn_apart() -> None:
    """A batch that mixes every kind of row gives each what it gets alone."""
    torch.manual_seed(0)
    kinds = [
        SamplingParams(),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.7),
        SamplingParams(top_p=0.9999, temperature=3.0),
        SamplingParams(top_k=900, top_p=0.95, min_p=0.01),
        SamplingParams(min_p=0.3),
        SamplingParams(temperature=1e-6),
    ]
    params = kinds * 5
    logits = torch.randn(len(params), 2000)
    uniforms = torch.rand(len(params), dtype=torch.float64).tolist()
    together = draw(logits, params, uniforms)
    alone = [draw(logits[i : i + 1], [p], [u])[0] for i, (p, u) in enumerate(zip(params, uniforms))]
    assert together == alone
    coldest = [i for i, p in enumerate(params) if p.temperature < 1e-3]
    assert [together[i] for i in coldest] == logits[coldest].argmax(-1).tolist()


def test_narrow_nucleus_beyond_the_candidates() -> None:
    """Nearly uniform logits: the nucleus needs more tokens than the first look takes."""
    params = [SamplingParams(top_p=0.9)]
    logits = torch.randn(1, 4000) * 1e-3
    drawn = {draw(logits, params, [u])[0] for u in np.linspace(0, 0.999, 300)}
    assert len(drawn) > 290
    assert _draw_filtered(logits, params, torch.tensor([0.0], dtype=torch.float64), 4000)[0] >= 0


def chi_square(counts: np.ndarray, probs: np.ndarray) -> float:
    keep = probs * counts.sum() >= 5
    want = np.append(probs[keep], probs[~keep].sum()) * counts.sum()
    got = np.append(counts[keep], counts[~keep].sum())
    keep = want > 0
    statistic = ((got - want)[keep] ** 2 / want[keep]).sum()
    free = keep.sum() - 1
    return (statistic - free) / np.sqrt(2 * free)  # roughly normal


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 8}, {"top_p": 0.8}, {"min_p": 0.05}, {"temperature": 0.5, "top_p": 0.95}],
)
def test_text_follows_the_distribution(options: dict) -> None:
    """Chi-square over many seeds, through the counter-based uniforms."""
    logits = torch.randn(30, generator=torch.Generator().manual_seed(1)) * 1.5
    count = 2500
    params = [SamplingParams(seed=seed, **options) for seed in range(count)]
    tokens, _ = sample(logits.expand(count, -1).clone(), [sequence(p, [1, 2]) for p in params])
    counts = np.bincount(tokens, minlength=30)
    assert abs(chi_square(counts, expected(logits, params[0]).numpy())) < 4
    one = sequence(SamplingParams(seed=5, **options), [1, 2])
    drawn = []
    for _ in range(count):  # and along one text
        tokens, _ = sample(logits[None].clone(), [one])
        one.append(tokens[0])
        drawn.append(tokens[0])
    counts = np.bincount(drawn, minlength=30)
    assert abs(chi_square(counts, expected(logits, params[0]).numpy())) < 4


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    prompt=st.lists(st.integers(0, 49), min_size=1, max_size=30),
    output=st.lists(st.integers(0, 49), max_size=100),
    repetition=st.sampled_from([1.0, 1.3, 0.7]),
    presence=st.sampled_from([0.0, 0.8, -0.5]),
    frequency=st.sampled_from([0.0, 0.2]),
)
def test_penalties(seed, prompt, output, repetition, presence, frequency) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(seed))
    params = SamplingParams(
        temperature=0,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    seen = torch.tensor([prompt + output])
    want = RepetitionPenaltyLogitsProcessor(repetition)(seen, logits[None])[0]
    counts = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=50)
    want = want - frequency * counts - presence * (counts > 0)
    row = logits.clone()
    one = sequence(params, prompt, output)
    if one.counts is not None:
        one.counts.copy().apply(row, repetition, presence, frequency)
    torch.testing.assert_close(row, want)
    tokens, _ = sample(logits[None].clone(), [one])
    assert tokens == [int(want.argmax())]


def test_logit_bias_and_min_tokens() -> None:
    logits = torch.zeros(2, 10)
    logits[:, 0] = 5.0  # the stop token of `sequence`
    biased = sequence(SamplingParams(temperature=0, logit_bias={7: 6.0}), [1])
    patient = sequence(SamplingParams(temperature=0, min_tokens=2), [1])
    logits[1, 4] = 1.0
    tokens, _ = sample(logits.clone(), [biased, patient])
    assert tokens == [7, 4]
    patient.append(4)
    patient.append(4)
    assert sample(logits[1:].clone(), [patient])[0] == [0]


def test_logprobs_come_before_penalties_and_temperature() -> None:
    logits = torch.randn(1, 20)
    params = SamplingParams(temperature=0.2, logit_bias={3: 50.0}, logprobs=4)
    (token,), (entry,) = sample(logits.clone(), [sequence(params, [1])])
    want = logits.log_softmax(-1)[0]
    assert token == 3
    assert next(iter(entry)) == 3
    assert {t: f.logprob for t, f in entry.items()} == pytest.approx(
        {t: float(want[t]) for t in {3, *want.topk(4).indices.tolist()}}
    )


def test_uniforms_differ_by_seed_branch_and_position() -> None:
    request = Request("r", None, [1], SamplingParams(), 0, -1)
    values = set()
    for branch in range(3):
        one = Sequence(request, branch, SequenceCache([], [], []), frozenset())
        for _ in range(100):
            value = one.uniform()
            assert 0 <= value < 1
            values.add(value)
            one.append(1)
    assert len(values) == 300


def test_min_tokens_through_the_engine() -> None:
    llm = tiny_llm()
    bias = {287: 100.0}  # <eos> at once, if it may
    short = SamplingParams(temperature=0, logit_bias=bias)
    (output,) = llm.generate([[1, 2]], short)
    assert output.outputs[0].token_ids == [287]
    assert output.outputs[0].text == ""
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason is None
    (output,) = llm.generate([[1, 2]], SamplingParams(temperature=0, logit_bias=bias, min_tokens=5))
    assert len(output.outputs[0].token_ids) == 6
    params = SamplingParams(temperature=0, logit_bias=bias, ignore_eos=True, max_tokens=4)
    (output,) = llm.generate([[1, 2]], params)
    assert output.outputs[0].token_ids == [287] * 4
    params = SamplingParams(temperature=0, logit_bias={65: 100.0}, stop_token_ids=[65])
    (output,) = llm.generate([[1, 2]], params)
    assert output.outputs[0].stop_reason == 65
    assert output.outputs[0].text == ""
