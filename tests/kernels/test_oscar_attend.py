"""Attention over packed codes: equal to exact attention over the dequantised cache but for the
rounding of folded factors, which must stay far below the cache's own error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serval.errors import CacheError
from serval.kernels import oscar
from serval.kernels.oscar import QuantizedKV, reference

SHAPES = {  # format, query heads, block size
    "oscar-128": (QuantizedKV(2, 128, 128), 8, 32),
    "oscar-64-one-head": (QuantizedKV(3, 64, 64), 3, 128),
    "oscar-80": (QuantizedKV(2, 80, 96), 6, 64),
    "oscar-256-wide-group": (QuantizedKV(1, 256, 256), 16, 256),
    "oscar-int4": (QuantizedKV(2, 128, 64, 4, 4), 10, 32),
    "oscar-int4-256": (QuantizedKV(1, 256, 32, 4, 4), 2, 32),
    "kivi": (QuantizedKV(2, 96, 128, 2, 4, zero="min", norms=False), 4, 32),
    "per-token": (QuantizedKV(2, 80, 64, 2, 2, zero="min", keys="token", norms=False), 6, 32),
    "per-token-int4": (QuantizedKV(2, 128, 128, 4, 4, keys="token", norms=False), 14, 64),
    "reference-only": (QuantizedKV(2, 40, 24), 4, 32),
}


class Cache:
    """Two sequences with random packed tokens and exact rows."""

    def __init__(self, name: str, packed: tuple[int, int], more: tuple[int, int]) -> None:
        self.fmt, self.heads, size = SHAPES[name]
        fmt = self.fmt
        packed = tuple(n // size * size for n in packed)  # type: ignore[assignment]
        width = max(packed) // size + 1
        self.storage = oscar.allocate(fmt, 2 * width, size)
        self.tables = torch.randperm(2 * width).int().view(2, width)
        self.tokens = []
        for table, n in zip(self.tables, packed, strict=True):
            k = torch.randn(n, fmt.num_key_value_heads, fmt.head_dim) * (0.2 + torch.rand(n, 1, 1))
            v = torch.randn(n, fmt.num_key_value_heads, fmt.v_head_dim)
            oscar.store(fmt, k, v, table[: n // size], self.storage)
            self.tokens.append((k, v))
        self.residual = [
            torch.randn(5, 128, fmt.num_key_value_heads, dim)
            for dim in (fmt.head_dim, fmt.v_head_dim)
        ]
        self.states = torch.tensor([3, 1], dtype=torch.int32)
        self.stored = torch.tensor(packed, dtype=torch.int32)
        self.lengths = self.stored + torch.tensor(more, dtype=torch.int32)

    def attend(
        self, q: Tensor, starts: Tensor | None = None, sinks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        scale = self.fmt.head_dim**-0.5
        return oscar.attend(
            self.fmt, q, self.storage, self.tables, self.stored, *self.residual, self.states,
            self.lengths, scale, sinks, starts,
        )  # fmt: skip

    def exact(self, q: Tensor, n: int, original: bool = False) -> tuple[Tensor, Tensor]:
        """float64 attention of rows q over sequence n, on the dequantised or the original cache."""
        packed, length = int(self.stored[n]), int(self.lengths[n])
        k, v = oscar.fetch(self.fmt, self.storage, self.tables[n], packed)
        if original:
            k, v = self.tokens[n]
        place = torch.arange(packed, length) % 128
        k, v = (
            torch.cat([x, r[self.states[n].long(), place]]).double()
            for x, r in zip((k, v), self.residual, strict=True)
        )
        return reference.attend_exact(q.double(), k, v, self.fmt.head_dim**-0.5)


def far(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("name", SHAPES)
def test_the_fold_adds_far_less_error_than_the_cache(name: str) -> None:
    cache = Cache(name, (1312, 256), (77, 128))
    q = torch.randn(2, cache.heads, cache.fmt.head_dim) * 2
    o, lse = cache.attend(q)
    for n in range(2):
        want, want_lse = cache.exact(q[n : n + 1], n)
        original, _ = cache.exact(q[n : n + 1], n, original=True)
        added, own = far(o[n : n + 1], want), far(want, original)
        assert added < (0.12 if cache.fmt.value_bits == 2 else 0.2) * own, (added, own)
        total = far(o[n : n + 1], original)
        assert total < (1.03 if cache.fmt.value_bits == 2 else 1.05) * own + 1e-6, (total, own)
        torch.testing.assert_close(lse[n : n + 1].double(), want_lse, atol=0.05, rtol=0)


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("name", ["oscar-128", "oscar-int4", "per-token", "kivi"])
def test_sharp_attention_and_nothing_but_exact_rows(name: str) -> None:
    """Queries that single out few tokens; then sequences without packed tokens or without any."""
    cache = Cache(name, (640, 0), (0, 40))
    k = cache.tokens[0][0]
    group = cache.heads // k.shape[1]
    q = torch.stack([k[333], k[12]]).repeat_interleave(group, 1)
    o, lse = cache.attend(q)
    want, want_lse = cache.exact(q[:1], 0)
    assert far(o[:1], want) < 0.05
    torch.testing.assert_close(lse[:1].double(), want_lse, atol=0.3, rtol=0)
    want, want_lse = cache.exact(q[1:], 1)
    assert far(o[1:], want) < 1e-5
    torch.testing.assert_close(lse[1:].double(), want_lse, atol=1e-4, rtol=0)
    cache.lengths = cache.stored.clone()
    o, lse = cache.attend(q)
    assert (o[1] == 0).all()
    assert (lse[1] == float("-inf")).all()


@pytest.mark.usefixtures("arch")
def test_several_rows_and_sinks() -> None:
    cache = Cache("oscar-128", (416, 96), (50, 3))
    q, sinks = torch.randn(11, cache.heads, 128), torch.randn(cache.heads) + 5
    for counts in ((8, 3), (1, 10), (0, 11)):  # the fast kernel; more rows than it takes
        starts = torch.tensor([0, counts[0], 11], dtype=torch.int32)
        o, lse = cache.attend(q, starts, sinks)
        for n in range(2):
            mine = slice(int(starts[n]), int(starts[n + 1]))
            if mine.start == mine.stop:
                continue
            want, want_lse = cache.exact(q[mine], n)
            total = want_lse.logaddexp(sinks.double())
            assert far(o[mine], want * (want_lse - total).exp()[..., None]) < 0.04
            torch.testing.assert_close(lse[mine].double(), total, atol=0.02, rtol=0)


def test_threads_do_not_change_the_result() -> None:
    cache = Cache("oscar-128", (2048, 1056), (9, 99))
    q = torch.randn(2, cache.heads, 128)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(cache.attend(q))
    finally:
        torch.set_num_threads(threads)
    for o, lse in results[1:]:
        assert torch.equal(o, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_parts_merge_by_their_lse() -> None:
    q, k, v = torch.randn(3, 4, 16), torch.randn(50, 2, 16), torch.randn(50, 2, 16)
    parts = [reference.attend_exact(q, k[s], v[s], 0.3) for s in (slice(0, 20), slice(20, 50))]
    got = reference.merge(*parts[0], *parts[1])
    for mine, want in zip(got, reference.attend_exact(q, k, v, 0.3), strict=True):
        torch.testing.assert_close(mine, want)
    nothing = torch.zeros_like(parts[0][0]), torch.full_like(parts[0][1], float("-inf"))
    assert torch.equal(reference.merge(*nothing, *parts[0])[0], parts[0][0])


def test_what_does_not_fit_says_so() -> None:
    cache = Cache("oscar-128", (64, 32), (1, 1))
    q = torch.randn(2, cache.heads, 128)
    cache.lengths = cache.stored + 129
    with pytest.raises(CacheError, match="128 exact rows"):
        cache.attend(q)
    cache.lengths = cache.stored + 1
    cache.states = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(CacheError, match="5 slots"):
        cache.attend(q)
    cache.tables = cache.tables + 100
    with pytest.raises(CacheError, match="block_tables name blocks"):
        cache.attend(q)
