"""SnapMLA's kernels: the properties of the method, and every instruction set against the
reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from serval import kernels
from serval.errors import CacheError
from serval.kernels.snapmla import reference
from serval.models.memory import CausalMemory


@dataclass
class Paged:
    """A paged cache of random tokens and queries over it, of several sequences."""

    latents: list[Tensor]
    ropes: list[Tensor]
    caches: tuple[Tensor, Tensor, Tensor]
    q: Tensor
    q_rope: Tensor
    tables: Tensor
    lens: Tensor
    starts: Tensor

    @classmethod
    def random(
        cls, lengths: list[int], queries: list[int], page: int, heads: int, dims: tuple[int, int]
    ) -> Paged:
        latent, rope = dims
        width = max(1, max(-(-length // page) for length in lengths))
        blocks = len(lengths) * width + 1
        tables = torch.randperm(blocks)[: len(lengths) * width].view(len(lengths), width).int()
        caches = empty(blocks, page, latent, rope)
        latents = [torch.randn(n, latent) * torch.randn(n, 1).exp() for n in lengths]
        ropes = [10 * torch.randn(n, rope) for n in lengths]
        for table, x, k in zip(tables, latents, ropes, strict=True):
            reference.write(x, k, slots_of(table, len(x), page), *caches)
        return cls(
            latents,
            ropes,
            caches,
            0.3 * torch.randn(sum(queries), heads, latent),
            0.05 * torch.randn(sum(queries), heads, rope),
            tables,
            torch.tensor(lengths).int(),
            torch.tensor([0, *queries]).cumsum(0).int(),
        )

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.q, self.q_rope, *self.caches, self.tables, self.lens, self.starts)


def empty(blocks: int, page: int, latent: int, rope: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.zeros(blocks, page, latent, dtype=torch.uint8),
        torch.zeros(blocks, page),
        torch.zeros(blocks, page, rope, dtype=torch.bfloat16),
    )


def slots_of(table: Tensor, count: int, page: int) -> Tensor:
    place = torch.arange(count)
    return table[place // page].long() * page + place % page


def keys_of(latent: Tensor, rope: Tensor, rope8: bool = False) -> reference.Keys:
    return reference.Keys(*reference.quantize(latent, rope, rope8))


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def exact(q: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, scale: float):
    """Attention of the last rows over unquantised latents, in float64: o, lse."""
    n, length = len(q), len(latent)
    keys = torch.cat([latent, rope], 1).double()
    z = torch.einsum("nhc,kc->nhk", torch.cat([q, q_rope], 2).double(), keys) * scale
    hidden = torch.arange(length)[None] > torch.arange(length - n, length)[:, None]
    z = z.masked_fill(hidden[:, None], -math.inf)
    return torch.einsum("nhk,kc->nhc", z.softmax(-1), latent.double()), z.logsumexp(-1)


SHAPES = {  # lengths, queries, page, heads, (C, R)
    "page 64": ([64], [1], 64, 16, (512, 64)),
    "many heads": ([200], [1], 32, 128, (512, 64)),
    "parts": ([1700, 40], [1, 1], 32, 4, (128, 32)),
    "mtp": ([1000, 33, 2], [4, 2, 1], 16, 20, (64, 16)),
    "odd": ([130, 7], [2, 1], 7, 5, (48, 8)),
    "chunk": ([300, 65, 12], [90, 65, 0], 128, 3, (16, 2)),
    "large page": ([900], [3], 256, 16, (448, 64)),
}


@pytest.mark.parametrize("rope8", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_equals_reference(arch: str, shape: str, rope8: bool) -> None:
    paged = Paged.random(*SHAPES[shape])
    want, lse = reference.paged_attention(*paged.inputs, 0.1, rope8)
    got, got_lse = kernels.snapmla_attention(*paged.inputs, 0.1, rope8)
    assert relative(got, want) < 2e-3  # a probability on the edge of two codes may fall either way
    torch.testing.assert_close(got_lse, lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rope8", [False, True])
@pytest.mark.parametrize("dims", [(512, 64), (48, 8), (7, 2)])
def test_storing_is_bitwise_that_of_the_reference(
    arch: str, dims: tuple[int, int], rope8: bool
) -> None:
    x = torch.randn(300, dims[0]) * torch.logspace(-30, 30, 300)[:, None]
    x[5] = 0
    k = 100 * torch.randn(300, dims[1])
    slots = torch.randperm(320)[:300]
    slots[7] = -1
    got, want = empty(20, 16, *dims), empty(20, 16, *dims)
    kernels.write_snapmla(x, k, slots, *got, rope8)
    reference.write(x, k, slots, *want, rope8)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    table = torch.randperm(20).int()
    fetched = kernels.fetch_snapmla(*got, table, 309)
    assert torch.equal(fetched, reference.fetch(*want, table, 309))


def test_every_code(arch: str) -> None:
    """All 254 numbers, through storing, reading back and the attention's own decoder."""
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    numbers = reference.values_of(codes)
    rows = torch.cat([numbers, torch.tensor([448.0, -448.0])])[:, None].expand(-1, 64)
    largest = torch.full((len(rows), 1), 448.0)  # scale 1, and a dim that selects the row
    latent = torch.cat([rows, largest], 1)
    caches = empty(len(rows), 1, 65, 2)
    kernels.write_snapmla(latent, torch.zeros(len(rows), 2), torch.arange(len(rows)), *caches)
    assert torch.equal(reference.values_of(caches[0][:, 0]), latent)
    table = torch.arange(len(rows)).int()
    assert torch.equal(kernels.fetch_snapmla(*caches, table, len(rows))[:, :65], latent)
    for n in range(len(rows)):  # one visible key: the output is that key
        o, _ = kernels.snapmla_attention(
            torch.zeros(1, 1, 65), torch.zeros(1, 1, 2), *caches, table[n : n + 1, None],
            torch.ones(1).int(), torch.tensor([0, 1]).int(), 1.0,
        )  # fmt: skip
        torch.testing.assert_close(o[0, 0], latent[n], atol=0, rtol=1e-6)


def test_absorbed_equals_expanded_attention_in_float64() -> None:
    torch.manual_seed(1)
    n, heads, nope, rope, rank, value = 21, 3, 16, 8, 32, 24
    q_nope, q_rope = (torch.randn(n, heads, d, dtype=torch.float64) for d in (nope, rope))
    latent, k_rope = (torch.randn(n, d, dtype=torch.float64) for d in (rank, rope))
    kv_b = torch.randn(heads, nope + value, rank, dtype=torch.float64)
    scale = (nope + rope) ** -0.5
    want = CausalMemory([0, n]).attend_latent(0, q_nope, q_rope, latent, k_rope, kv_b, scale)
    absorbed = torch.einsum("nhd,hdc->nhc", q_nope, kv_b[:, :nope])
    ones = torch.ones(n, dtype=torch.float64)
    o, _ = reference.decode(
        absorbed, ones[:, None].expand(n, heads), q_rope, latent, ones, k_rope, scale,
        torch.arange(1, n + 1), quantize_p=False,
    )  # fmt: skip
    got = torch.einsum("nhc,hvc->nhv", o, kv_b[:, nope:])
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


def test_what_fp8_can_represent_is_exact(arch: str) -> None:
    """Small integers times powers of two, with a largest of 448, and equal scores."""
    length = 64
    latent = torch.randint(-7, 8, (length, 32)).float()
    latent[:, 0], latent[:, 1] = 448.0, 0.0
    latent *= 2.0 ** torch.randint(-3, 4, (1, 1))
    rope = torch.randint(-8, 9, (length, 8)).float()
    q = torch.zeros(1, 4, 32)
    q[..., 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])  # meets zeros: every score is zero
    caches = empty(1, 64, 32, 8)
    kernels.write_snapmla(latent, rope, torch.arange(length), *caches)
    one = torch.tensor([length]).int()
    o, lse = kernels.snapmla_attention(
        q, torch.zeros(1, 4, 8), *caches, torch.zeros(1, 1).int(), one,
        torch.tensor([0, 1]).int(), 0.5,
    )  # fmt: skip
    torch.testing.assert_close(o, latent.mean(0).expand(1, 4, 32), atol=0, rtol=1e-6)
    torch.testing.assert_close(lse, torch.full((1, 4), math.log(length)), atol=1e-6, rtol=0)
    assert torch.equal(kernels.fetch_snapmla(*caches, torch.zeros(1).int(), length)[:, :32], latent)


def test_round_trip_bounds() -> None:
    torch.manual_seed(2)
    latent = torch.randn(200, 64) * torch.logspace(-6, 6, 200)[:, None]
    rope = torch.randn(200, 16) * 1e3
    keys = keys_of(latent, rope)
    back = keys.dequantize()
    floor = keys.scales[:, None] * 2.0**-10
    assert ((back[:, :64] - latent).abs() <= (latent.abs() / 16).maximum(floor) * 1.000001).all()
    assert ((back[:, 64:] - rope).abs() <= rope.abs() * 2.0**-8).all()


def test_tokens_are_independent_and_power_of_two_equivariant(arch: str) -> None:
    latent, rope = torch.randn(40, 64), torch.randn(40, 16)

    def stored(x: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        caches = empty(5, 8, 64, 16)
        kernels.write_snapmla(x, k, torch.arange(40), *caches)
        return caches

    bulk = stored(latent, rope)
    one_by_one = empty(5, 8, 64, 16)
    for t in range(40):
        kernels.write_snapmla(latent[t : t + 1], rope[t : t + 1], torch.tensor([t]), *one_by_one)
    for a, b in zip(bulk, one_by_one, strict=True):
        assert torch.equal(a, b)
    changed = latent.clone()
    changed[11] *= 1000
    others = torch.arange(40) != 11
    for a, b in zip(bulk, stored(changed, rope), strict=True):
        assert torch.equal(a.flatten(0, 1)[others], b.flatten(0, 1)[others])
    power = 2.0 ** torch.randint(-20, 20, (40, 1))
    codes, scales, _ = stored(latent * power, rope)
    assert torch.equal(codes, bulk[0])
    assert torch.equal(scales.flatten(), bulk[1].flatten() * power[:, 0])


def test_zero_latents_keep_their_rotary_keys(arch: str) -> None:
    caches = empty(1, 4, 16, 8)
    rope = torch.tensor([[1000.0] * 8, [-3.0] * 8])
    kernels.write_snapmla(torch.zeros(2, 16), rope, torch.arange(2), *caches)
    assert torch.equal(caches[1][0, :2], torch.ones(2))
    assert torch.equal(caches[2][0, :2].float(), rope)
    o, lse = kernels.snapmla_attention(
        torch.zeros(1, 1, 16), torch.full((1, 1, 8), 0.01), *caches, torch.zeros(1, 1).int(),
        torch.tensor([2]).int(), torch.tensor([0, 1]).int(), 1.0,
    )  # fmt: skip
    assert torch.equal(o, torch.zeros_like(o))
    assert lse.item() == pytest.approx(80.0, rel=0.01)


def test_without_quantised_probabilities_it_is_softmax() -> None:
    torch.manual_seed(3)
    keys = keys_of(torch.randn(300, 32) * torch.randn(300, 1).exp(), 10 * torch.randn(300, 8))
    q, q_rope = 0.3 * torch.randn(2, 4, 32), 0.05 * torch.randn(2, 4, 8)
    codes, scales, aligned = reference.quantize(q, q_rope)
    q_back = reference.values_of(codes) * scales[..., None]
    rope_back = aligned.float() * scales[..., None]
    back = keys.dequantize()
    want, lse = exact(q_back, rope_back, back[:, :32], back[:, 32:], 0.1)
    got, got_lse = reference.attend(q, q_rope, keys, 0.1, quantize_p=False)
    assert relative(got, want) < 1e-6
    torch.testing.assert_close(got_lse.double(), lse, atol=2e-6, rtol=2e-6)
    coded, coded_lse = reference.attend(q, q_rope, keys, 0.1)
    assert 1e-3 < relative(coded, want) < 0.05
    torch.testing.assert_close(coded_lse, got_lse, atol=2e-6, rtol=2e-6)  # L is not quantised


@pytest.mark.parametrize("splits", [2, 3, 7])
def test_splits_do_not_matter(splits: int) -> None:
    torch.manual_seed(4)
    keys = keys_of(torch.randn(1000, 32), 10 * torch.randn(1000, 8))
    q, q_rope = 0.3 * torch.randn(2, 4, 32), 0.05 * torch.randn(2, 4, 8)
    want, lse = reference.attend(q, q_rope, keys, 0.1)
    got, got_lse = reference.attend(q, q_rope, keys, 0.1, splits=splits)
    assert relative(got, want) < 2e-3
    torch.testing.assert_close(got_lse, lse, atol=1e-5, rtol=0)
    other, _ = reference.attend(q, q_rope, keys, 0.1, block=128)  # another quantisation
    assert relative(other, want) > 5e-3


@pytest.mark.parametrize(("batch", "heads", "length"), [(1, 64, 128), (2, 64, 640)])
def test_error_within_the_published_tolerance(
    arch: str, batch: int, heads: int, length: int
) -> None:
    """Inputs 0.1 randn in bfloat16, as the Triton port's own test draws them."""
    torch.manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return (0.1 * torch.randn(*shape)).bfloat16().float()

    for _ in range(batch):
        latent, rope = draw(length, 512), draw(length, 64)
        q, q_rope = draw(1, heads, 512), draw(1, heads, 64)
        caches = empty(length // 64, 64, 512, 64)
        kernels.write_snapmla(latent, rope, torch.arange(length), *caches)
        got, lse = kernels.snapmla_attention(
            q, q_rope, *caches, torch.arange(length // 64)[None].int(),
            torch.tensor([length]).int(), torch.tensor([0, 1]).int(), 192**-0.5,
        )  # fmt: skip
        want, want_lse = exact(q, q_rope, latent, rope, 192**-0.5)
        assert relative(got, want) <= 5e-2
        cosine = torch.cosine_similarity(got.double().flatten(), want.flatten(), dim=0)
        assert 1 - cosine <= 1e-3
        assert (lse - want_lse).abs().max() <= 2e-2


def test_scores_far_below_the_maximum_do_not_overflow(arch: str) -> None:
    """A later block whose probabilities are tiny makes the state's scale tiny, never infinite."""
    length = 192
    latent = torch.randn(length, 16)
    rope = torch.zeros(length, 2)
    rope[0], rope[64:128], rope[128:] = 100.0, -30.0, -200.0
    caches = empty(3, 64, 16, 2)
    kernels.write_snapmla(latent, rope, torch.arange(length), *caches)
    paged = (
        torch.zeros(1, 1, 16), torch.ones(1, 1, 2), *caches, torch.arange(3)[None].int(),
        torch.tensor([length]).int(), torch.tensor([0, 1]).int(),
    )  # fmt: skip
    for got, lse in (
        kernels.snapmla_attention(*paged, 0.4),
        reference.paged_attention(*paged, 0.4),
    ):
        assert relative(got[0, 0], latent[0]) < 0.1
        assert lse.item() == pytest.approx(80.0, rel=1e-2)


def test_threads_and_neighbours_do_not_change_a_result(arch: str) -> None:
    paged = Paged.random([1700, 900], [2, 1], 32, 4, (64, 16))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, _ = kernels.snapmla_attention(*paged.inputs, 0.1)
        torch.set_num_threads(2)
        two, _ = kernels.snapmla_attention(*paged.inputs, 0.1)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)
    alone, _ = kernels.snapmla_attention(
        paged.q[2:], paged.q_rope[2:], *paged.caches, paged.tables[1:], paged.lens[1:],
        torch.tensor([0, 1]).int(), 0.1,
    )  # fmt: skip
    assert torch.equal(alone, two[2:])


def test_what_lies_beyond_a_sequence_is_not_read(arch: str) -> None:
    paged = Paged.random([70], [1], 32, 4, (64, 16))
    want, _ = kernels.snapmla_attention(*paged.inputs, 0.1)
    codes, scales, rope = paged.caches
    last = int(paged.tables[0, 2])
    codes[last, 6:], scales[last, 6:], rope[last, 6:] = 0x7F, math.nan, math.nan
    got, _ = kernels.snapmla_attention(*paged.inputs, 0.1)
    assert torch.equal(got, want)


def test_bad_input_is_refused(arch: str) -> None:
    paged = Paged.random([70], [1], 32, 4, (64, 16))
    q, q_rope, codes, scales, rope, tables, lens, starts = paged.inputs
    caches = (codes, scales, rope)
    with pytest.raises(ValueError, match="uint8 codes"):
        kernels.snapmla_attention(q, q_rope, codes.float(), scales, rope, tables, lens, starts, 1.0)
    with pytest.raises(ValueError, match="expected caches"):
        kernels.snapmla_attention(q[..., :32], q_rope, *caches, tables, lens, starts, 1.0)
    with pytest.raises(CacheError, match="context_lens"):
        kernels.snapmla_attention(q, q_rope, *caches, tables, lens + 1000, starts, 1.0)
    with pytest.raises(CacheError, match="block_tables"):
        kernels.snapmla_attention(q, q_rope, *caches, tables + 99, lens, starts, 1.0)
    with pytest.raises(CacheError, match="block_tables"):
        kernels.fetch_snapmla(*caches, tables[0] + 99, 70)
    with pytest.raises(CacheError, match="slots 0 to 127"):
        kernels.write_snapmla(torch.ones(1, 64), torch.ones(1, 16), torch.tensor([128]), *caches)


def test_custom_ops_are_well_formed() -> None:
    paged = Paged.random([70], [1], 32, 4, (64, 16))
    utils = ("test_schema", "test_faketensor")
    inputs = (*paged.inputs, 0.1, False)
    torch.library.opcheck(torch.ops.serval.snapmla_attention, inputs, test_utils=utils)
    rows = (torch.randn(2, 64), torch.randn(2, 16), torch.arange(2), *paged.caches, False)
    torch.library.opcheck(torch.ops.serval.write_snapmla, rows, test_utils=utils)
