"""The cache benchmark measures the same attention on all sides."""

from __future__ import annotations

import functools

import pytest
import torch

from serval.bench import kv
from serval.bench.ggml_attention import KINDS, ggml_reader
from serval.bench.harness import MissingPeerError, Setup
from serval.cache.layouts import layout_class

QUIET = {"note": lambda line: None}
ERRORS = {"full": 1e-5, "fp16": 0.01, "bf16": 0.03, "int8": 0.05, "oscar-int4": 0.1, "int4": 0.1}


@pytest.fixture
def work() -> kv.Work:
    return kv.Work(kv.TINY, 3, 200, quick=True)


def test_every_contestant_answers_alike(work: kv.Work) -> None:
    torch.manual_seed(0)
    q = torch.randn(3, 4, 32)
    want = kv.contiguous_reader(work, q, torch.float32)()
    for word, name in kv.LAYOUTS.items():
        read = kv.paged_reader(layout_class(name), work, q)
        error = float((read() - want).norm() / want.norm())
        assert error < ERRORS.get(word, 0.5), word
        assert torch.equal(read(), read()), "a step that is made again finds the same cache"
    rounded = kv.contiguous_reader(work, q, torch.bfloat16)()
    torch.testing.assert_close(rounded.float(), want, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_ggml_answers_alike(work: kv.Work, kind: str) -> None:
    torch.manual_seed(0)
    q = torch.randn(3, 4, 32)
    want = kv.contiguous_reader(work, q, torch.float32)()
    tokens = functools.partial(_tokens, work)
    try:
        read = ggml_reader(work.spec, q, work.tokens, kind, tokens, 2)
    except MissingPeerError as error:
        pytest.skip(str(error))
    for _ in range(3):  # both layers, and the first again
        error = float((read() - want).norm() / want.norm())
        assert error < (0.01 if kind == "f16" else 0.15)


def _tokens(work: kv.Work, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The contestants' tokens by place in a row of all sequences: the last one of a sequence is
    the one that its step adds."""
    n, place = divmod(first, work.tokens)
    assert place == 0
    assert count == work.tokens
    return kv.tokens_at(work.spec, n * work.context, count)


def test_layers_are_more_than_caches_hold() -> None:
    work = kv.Work(kv.LLAMA_8B, 1, 8192, quick=False)
    for per_token in (8192, 772.5):
        held = work.layers(per_token) * per_token * work.tokens
        assert 0.9 * kv.COLD < held < 1.1 * kv.COLD
    assert kv.Work(kv.LLAMA_8B, 4, 131072, quick=False).layers(8192) == 1


def test_bytes_that_a_step_reads() -> None:
    work = kv.Work(kv.LLAMA_8B, 2, 8192, quick=False)
    assert work.bytes_read(layout_class("fp16")) == 2 * 8256 * 4096
    packed, exact = 8192 * 772.5, 64 * 8192
    assert work.bytes_read(layout_class("oscar")) == 2 * (packed + exact)


def test_quick_cases() -> None:
    cases = kv.collect(Setup(quick=True, only="attention", **QUIET))
    assert len(cases) == 2 * len(kv.LAYOUTS)
    by_name = {case.case: case for case in cases}
    full, int8 = (by_name[f"{name}-tiny-attention-batch4-ctx128"] for name in ("full", "int8"))
    assert full.peer == "torch SDPA float32"
    assert int8.peer == "torch SDPA bfloat16"
    assert full.metrics["bytes_per_token"] == 2 * 2 * 32 * 4
    assert int8.metrics["bytes_per_token"] == 2 * (2 * 32 + 8)
    for case in cases:
        assert case.failed is None
        assert case.ours is not None
        assert case.ratio is not None


def test_few_bits_against_16_bits_and_llama_cpp() -> None:
    cases = kv.collect(Setup(quick=True, only="oscar-against", **QUIET))
    assert [case.peer for case in cases] == [*kv.PEERS] * 2
    assert all(case.ratio is not None or case.missing for case in cases)
    assert cases[0].ratio is not None


def test_a_whole_model_decodes() -> None:
    (case,) = kv.collect(Setup(quick=True, only="oscar-engine", **QUIET))
    assert case.failed is None
    assert case.peer == "serval int8, full cache"
    assert case.metrics["resident_gib"] > 0
    assert case.metrics["peer_tokens_per_second"] > 0


def test_what_does_not_fit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "memory_bytes", lambda: kv.RESERVE)
    cases = kv.collect(Setup(quick=True, only="int8", **QUIET))
    assert [case.case for case in cases] == [
        "int8-tiny-attention-batch1-ctx128",
        "int8-tiny-attention-batch4-ctx128",
    ]
    assert all("does not fit in memory" in str(case.failed) for case in cases)
    assert all(case.ours is None for case in cases)
