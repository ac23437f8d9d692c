"""Received mass and row log-sum-exps against the attention matrix, over drawn shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serval import kernels
from serval.kernels.received_mass import reference

pytestmark = pytest.mark.usefixtures("arch")


def matrix(
    q: Tensor, k: Tensor, scale: float, first: int, window: int | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The attention matrix [H, n, m] and the lse [n, H], in float64."""
    group = q.shape[1] // k.shape[1]
    z = torch.einsum("qhd,khd->hqk", q.double(), k.double().repeat_interleave(group, 1)) * scale
    age = torch.arange(first, first + len(q))[:, None] - torch.arange(len(k))[None]
    seen = age >= 0
    if window is not None:
        seen &= age < window
    z = z.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        z = torch.cat([z, sinks.double()[:, None, None].expand(-1, len(q), 1)], -1)
    return z.softmax(-1)[..., : len(k)], z.logsumexp(-1).T


@given(
    queries=st.sampled_from([1, 2, 7, 64, 130, 300]),
    past=st.sampled_from([0, 1, 63, 200]),
    beyond=st.sampled_from([0, 0, 5]),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 8]),
    dim=st.sampled_from([1, 8, 24, 37, 64, 256]),
    window=st.sampled_from([None, None, 1, 17, 200]),
    sinks=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_agrees_with_the_attention_matrix(
    queries: int,
    past: int,
    beyond: int,
    kv_heads: int,
    group: int,
    dim: int,
    window: int | None,
    sinks: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    heads = kv_heads * group
    q = 2 * torch.randn(queries, heads, dim)
    k = torch.randn(past + queries + beyond, kv_heads, dim)
    bias = 2 * torch.randn(heads) if sinks else None
    weights, lse = matrix(q, k, dim**-0.5, past, window, bias)
    options = {"first": past, "window": window, "sinks": bias}
    mass, rows = kernels.received_mass(q, k, dim**-0.5, per_head=True, **options)
    torch.testing.assert_close(mass.double(), weights.sum(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows.double(), lse, rtol=1e-5, atol=1e-5)
    mean, again = kernels.received_mass(q, k, dim**-0.5, **options)
    torch.testing.assert_close(mean, mass.mean(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(rows, again)
    exact, _ = kernels.received_mass(q.double(), k.double(), dim**-0.5, per_head=True, **options)
    torch.testing.assert_close(exact, weights.sum(1), rtol=1e-12, atol=1e-12)


def test_keys_as_views_and_16_bits() -> None:
    """Rows of a larger tensor are read in place; 16-bit input counts as its float32 value."""
    torch.manual_seed(0)
    rows = torch.randn(100, 3, 96)
    q, k = rows[20:, :, :64], rows[:, :1, 32:]
    got, lse = kernels.received_mass(q, k, 0.2, first=20)
    want, rows_want = kernels.received_mass(q.contiguous(), k.contiguous(), 0.2, first=20)
    assert torch.equal(got, want)
    assert torch.equal(lse, rows_want)
    short = kernels.received_mass(q.bfloat16(), k.bfloat16(), 0.2, first=20)[0]
    wide = kernels.received_mass(q.bfloat16().float(), k.bfloat16().float(), 0.2, first=20)[0]
    assert torch.equal(short, wide)


def test_every_row_gives_one_unit_of_mass(threads: list[int]) -> None:
    """Large logits stay finite, the sum is the number of rows, whatever the number of threads."""
    torch.manual_seed(1)
    q, k = 40 * torch.randn(500, 4, 32), torch.randn(500, 2, 32)
    found = []
    for count in threads:
        torch.set_num_threads(count)
        found.append(kernels.received_mass(q, k, 1.0, first=0)[0])
    assert all(torch.equal(found[0], other) for other in found)
    assert found[0].sum().item() == pytest.approx(500, rel=1e-5)


@pytest.fixture
def threads() -> object:
    before = torch.get_num_threads()
    yield [1, 2, 3]
    torch.set_num_threads(before)


def test_blocks_of_the_reference_do_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    q, k = torch.randn(90, 4, 16).double(), torch.randn(120, 2, 16).double()
    whole = reference.received_mass(q, k, 0.3, 30, 50, None, True)
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 4 * 120 * 7)
    parts = reference.received_mass(q, k, 0.3, 30, 50, None, True)
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("shape", "first", "window", "text"),
    [
        ((4, 3, 8), 0, None, "divisible"),
        ((4, 2, 9), 0, None, "expects"),
        ((4, 2, 8), 3, None, "position 3"),
        ((4, 2, 8), -1, None, "position -1"),
        ((4, 2, 8), 0, 0, "window 0"),
    ],
)
def test_refusals(shape: tuple[int, ...], first: int, window: int | None, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        kernels.received_mass(torch.zeros(shape), torch.zeros(6, 2, 8), 1.0, first=first,
                              window=window)  # fmt: skip
