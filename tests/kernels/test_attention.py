"""Paged attention and cache writes against their references over drawn shapes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serval import kernels
from serval.errors import CacheError
from serval.kernels.attention import reference
from serval.kernels.cache_write import reference as write_reference
from serval.kernels.latent_attention import reference as latent_reference

pytestmark = pytest.mark.usefixtures("arch")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@dataclass
class Paging:
    """A batch laid out over shuffled blocks."""

    tables: Tensor
    lens: Tensor
    starts: Tensor
    blocks: int
    tokens: int

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.tables, self.lens, self.starts


@st.composite
def pagings(draw: st.DrawFn, longest: int = 400) -> tuple[Paging, int]:
    """Sequences of different length, each with none, one, some or all of its tokens as queries."""
    page = draw(st.sampled_from([1, 4, 16, 32, 48]))
    lens = draw(st.lists(st.integers(1, longest), min_size=1, max_size=4))
    counts = [draw(st.sampled_from(sorted({0, 1, min(length, 7), length}))) for length in lens]
    width = max(-(-length // page) for length in lens) + 1
    blocks = len(lens) * width + 2
    tables = torch.randperm(blocks)[: len(lens) * width].view(len(lens), width).int()
    for row, length in zip(tables, lens, strict=True):
        row[-(-length // page) :] = -1  # never read
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    return Paging(tables, torch.tensor(lens).int(), starts, blocks, sum(counts)), page


@given(
    drawn=pagings(),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 7, 8]),
    dim=st.sampled_from([1, 8, 16, 24, 37, 64, 80]),
    v_dim=st.sampled_from([None, 5, 16, 64]),
    window=st.sampled_from([None, None, 1, 17, 200]),
    sinks=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_paged_attention(
    drawn: tuple[Paging, int],
    kv_heads: int,
    group: int,
    dim: int,
    v_dim: int | None,
    window: int | None,
    sinks: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    paging, page = drawn
    heads = kv_heads * group
    q = torch.randn(paging.tokens, heads, dim)
    k = torch.randn(paging.blocks, kv_heads, page, dim)
    v = torch.randn(paging.blocks, kv_heads, page, v_dim or dim)
    rest = (*paging.arguments, dim**-0.5, window, 2 * torch.randn(heads) if sinks else None)
    torch.testing.assert_close(
        kernels.paged_attention(q, k, v, *rest),
        reference.paged_attention(q, k, v, *rest),
        **TOLERANCE,
    )
    for dtype in (torch.bfloat16, torch.float16):  # read as stored: no further rounding
        torch.testing.assert_close(
            kernels.paged_attention(q, k.to(dtype), v.to(dtype), *rest),
            reference.paged_attention(q, k.to(dtype), v.to(dtype), *rest),
            **TOLERANCE,
        )
    (kq, ks), (vq, vs) = write_reference.quantize_rows(k), write_reference.quantize_rows(v)
    torch.testing.assert_close(
        kernels.paged_attention_int8(q, kq, vq, ks, vs, *rest),
        reference.paged_attention_int8(q, kq, vq, ks, vs, *rest),
        **TOLERANCE,
    )


@given(
    drawn=pagings(),
    heads=st.sampled_from([1, 2, 5, 16, 40]),
    latent=st.sampled_from([8, 24, 64, 256]),
    rope=st.sampled_from([3, 8, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=15, deadline=None)
def test_paged_latent_attention(
    drawn: tuple[Paging, int], heads: int, latent: int, rope: int, dtype: torch.dtype
) -> None:
    paging, page = drawn
    q, q_rope = torch.randn(paging.tokens, heads, latent), torch.randn(paging.tokens, heads, rope)
    cache = torch.randn(paging.blocks, page, latent + rope).to(dtype)
    rest = (*paging.arguments, (latent + rope) ** -0.5)
    torch.testing.assert_close(
        kernels.paged_latent_attention(q, q_rope, cache, *rest),
        latent_reference.paged_latent_attention(q, q_rope, cache, *rest),
        **TOLERANCE,
    )


def decode_batch(length: int = 2500, sequences: int = 3) -> tuple[Tensor, ...]:
    """q, keys, values and paging of a decode step whose contexts are long enough to be cut into
    parts."""
    width = -(-length // 32)
    shape = (sequences * width, 2, 32, 64)
    tables = torch.randperm(shape[0]).view(sequences, width).int()
    lens = torch.tensor([length - 20 * n for n in range(sequences)]).int()
    starts = torch.arange(sequences + 1).int()
    return (
        torch.randn(sequences, 8, 64),
        torch.randn(shape),
        torch.randn(shape),
        tables,
        lens,
        starts,
    )


def test_long_contexts_are_merged_exactly_and_independently_of_threads() -> None:
    q, k, v, *paging = decode_batch()
    sinks = torch.randn(8)
    expected = reference.paged_attention(q, k, v, *paging, 0.125, None, sinks)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(kernels.paged_attention(q, k, v, *paging, 0.125, None, sinks))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(results[0], expected, **TOLERANCE)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_strided_views_of_a_larger_arena() -> None:
    """Caches that interleave layers and queries that are slices of a fused product need no
    copies."""
    _, _, _, *paging = decode_batch(100)
    # block, layer, key or value, head, slot, channel
    arena = torch.randn(paging[0].numel(), 3, 2, 2, 32, 64)
    fused = torch.randn(3, 12, 64)
    for layer in range(3):
        k, v = arena[:, layer, 0], arena[:, layer, 1]
        torch.testing.assert_close(
            kernels.paged_attention(fused[:, :8], k, v, *paging, 0.1),
            reference.paged_attention(fused[:, :8], k, v, *paging, 0.1),
            **TOLERANCE,
        )


def test_bfloat16_queries_keep_their_dtype() -> None:
    q, k, v, *paging = decode_batch(70)
    out = kernels.paged_attention(q.bfloat16(), k, v, *paging, 0.1)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out.float(), kernels.paged_attention(q, k, v, *paging, 0.1), atol=2e-2, rtol=2e-2
    )
    half = kernels.paged_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), *paging, 0.1)
    torch.testing.assert_close(half, out, atol=3e-2, rtol=3e-2)


def test_large_scores_do_not_overflow() -> None:
    q, k, v, *paging = decode_batch(200)
    out = kernels.paged_attention(1e4 * q, k, v, *paging, 1.0)
    torch.testing.assert_close(
        out, reference.paged_attention(1e4 * q, k, v, *paging, 1.0), atol=1e-2, rtol=1e-2
    )


def test_inconsistent_paging_is_refused() -> None:
    q, k, v, tables, lens, starts = decode_batch(100)
    wrong = tables.clone()
    wrong[1, 0] = 99
    with pytest.raises(CacheError, match="to 99"):
        kernels.paged_attention(q, k, v, wrong, lens, starts, 0.1)
    with pytest.raises(CacheError, match="context_lens"):
        kernels.paged_attention(q, k, v, tables, lens + 10**6, starts, 0.1)
    with pytest.raises(CacheError, match="context_lens"):
        kernels.paged_attention(q, k, v, tables, lens, starts * 2, 0.1)
    with pytest.raises(ValueError, match="window 0"):
        kernels.paged_attention(q, k, v, tables, lens, starts, 0.1, window=0)
    with pytest.raises(ValueError, match="equal head dims"):
        kernels.paged_attention(q[:, :7], k, v, tables, lens, starts, 0.1)


@given(
    tokens=st.integers(0, 20),
    heads=st.integers(1, 4),
    dim=st.integers(1, 70),
    v_dim=st.integers(1, 70),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=20, deadline=None)
def test_cache_writes(tokens: int, heads: int, dim: int, v_dim: int, seed: int) -> None:
    torch.manual_seed(seed)
    blocks, page = 5, 6
    k, v = torch.randn(tokens, 2 * heads, dim)[:, ::2], torch.randn(tokens, heads, v_dim)
    slots = torch.randperm(blocks * page)[:tokens]
    if tokens > 2:
        slots[1] = -1
        k[2] = 0

    def caches(dtype: torch.dtype) -> list[Tensor]:
        made = [torch.zeros(blocks, heads, page, d, dtype=dtype) for d in (dim, v_dim)]
        return made + [torch.zeros(blocks, heads, page) for _ in range(2)]

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours, theirs = caches(dtype), caches(dtype)
        kernels.write_cache(k, v, slots, *ours[:2])
        write_reference.write_cache(k, v, slots, *theirs[:2])
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    ours, theirs = caches(torch.int8), caches(torch.int8)
    kernels.write_cache_int8(k, v, slots, *ours)
    write_reference.write_cache_int8(k, v, slots, *theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    if tokens:
        before = [cache.clone() for cache in ours]
        slots[-1] = blocks * page
        with pytest.raises(CacheError, match=f"slot {blocks * page}"):
            kernels.write_cache_int8(k, v, slots, *ours)
        assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_and_rounded_exactly(dtype: torch.dtype) -> None:
    """Subnormals, ties, both zeros, numbers beyond float16 (they saturate), NaN."""
    every = torch.arange(2**16).to(torch.int32).sub(2**15).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()]
    ties = torch.cat([(every[:-1] + every[1:]) / 2, every, every * 1.0003])
    x = torch.cat([ties, torch.tensor([1e-30, -1e-30, 70000.0, -1e30, float("nan")])])
    x = x[x.isfinite() | x.isnan()]
    x = torch.cat([x, x.new_zeros(-len(x) % 64)]).view(-1, 1, 64)
    caches = [torch.zeros(len(x), 1, 1, 64, dtype=dtype) for _ in range(2)]
    kernels.write_cache(x, x, torch.arange(len(x)), *caches)
    limit = torch.finfo(dtype).max
    expected = (x.clamp(-limit, limit) if dtype == torch.float16 else x).to(dtype)
    assert torch.equal(caches[0].view(-1, 1, 64).nan_to_num(7.0), expected.nan_to_num(7.0))
    assert caches[0].isnan().sum() == 1
    # One key per sequence: attention returns that key's value as it is stored.
    rows = caches[1].float().nan_to_num(0.0)
    tables, lens = torch.arange(len(x)).int()[:, None], torch.ones(len(x)).int()
    q, starts = torch.zeros(len(x), 1, 64), torch.arange(len(x) + 1).int()
    values = rows.to(dtype)
    got = kernels.paged_attention(q, torch.zeros_like(values), values, tables, lens, starts, 1.0)
    assert torch.equal(got, rows[:, 0])


def test_few_rows_and_many_agree() -> None:
    """A sequence's last queries give the same whether they come alone or with others."""
    _, k, v, tables, lens, _ = decode_batch(700, 1)
    q = torch.randn(40, 8, 64)
    whole = kernels.paged_attention(q, k, v, tables, lens, torch.tensor([0, 40]).int(), 0.125)
    for count in (1, 2, 3, 5, 6):
        starts = torch.tensor([0, count]).int()
        few = kernels.paged_attention(q[-count:], k, v, tables, lens, starts, 0.125)
        torch.testing.assert_close(few, whole[-count:], **TOLERANCE)
