"""The quantiser and the packing of low-bit caches: the exact properties of OScaR (arXiv:2605.19660)
and equality of every instruction set with the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serval import kernels
from serval.errors import CacheError
from serval.kernels import oscar
from serval.kernels.oscar import QuantizedKV, reference

FORMATS = {
    "oscar": QuantizedKV(2, 128, 128),
    "oscar-int4": QuantizedKV(3, 64, 96, 4, 4),
    "kivi": QuantizedKV(2, 96, 64, 2, 4, zero="min", norms=False),
    "per-token": QuantizedKV(1, 80, 80, 2, 2, zero="min", keys="token", norms=False),
    "per-token-int4": QuantizedKV(2, 64, 256, 4, 2, keys="token", norms=False),
    "q4_0": QuantizedKV(2, 64, 64, 4, 4, zero="symmetric", keys="token", norms=False),
    "odd-dims": QuantizedKV(2, 40, 24, 2, 2),
}


def through(fmt: QuantizedKV, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k, v stored and fetched."""
    storage = oscar.allocate(fmt, len(k) // 32, 32)
    ids = torch.randperm(len(k) // 32).int()
    oscar.store(fmt, k, v, ids, storage)
    return oscar.fetch(fmt, storage, ids, len(k))


def rows(fmt: QuantizedKV, count: int) -> tuple[Tensor, Tensor]:
    heads = fmt.num_key_value_heads
    return torch.randn(count, heads, fmt.head_dim), torch.randn(count, heads, fmt.v_head_dim)


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("name", FORMATS)
def test_records_are_those_of_the_reference(name: str) -> None:
    """Byte for byte, except where float sums in another order move a norm by an ulp."""
    fmt = FORMATS[name]
    k, v = rows(fmt, 192)
    k, v = k * torch.rand(192, 1, 1), v * torch.rand(192, 1, 1) * 50
    k[7], v[9], v[:, :, 0] = 0, 0, 3.0
    ids = torch.tensor([4, 0, 2])
    mine, want = (oscar.allocate(fmt, 5, 64) for _ in range(2))
    oscar.store(fmt, k, v, ids, mine)
    reference.store(fmt, k, v, ids, want)
    assert torch.equal(mine[1], want[1])
    assert (mine[0] != want[0]).float().mean() < (2e-3 if fmt.norms else 1e-9)
    if fmt.norms:
        torch.testing.assert_close(mine[2], want[2], rtol=1e-6, atol=0)
    for count in (192, 100, 32, 1):
        got, expected = (f(fmt, mine, ids, count) for f in (oscar.fetch, reference.fetch))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert got[0].shape == (count, *k.shape[1:])


@given(bits=st.sampled_from([2, 4]), n=st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_packing_is_lossless(bits: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2, 3, 32, 8 * n), generator=generator, dtype=torch.uint8)
    lines = reference.pack(codes, bits)
    assert lines.shape == (2, 3, 32 * 8 * n * bits // 8)
    assert torch.equal(reference.unpack(lines, bits), codes)


@pytest.mark.parametrize("zero", ["int", "min"])
@pytest.mark.parametrize("bits", [2, 4])
def test_numbers_on_the_grid_are_exact(bits: int, zero: str) -> None:
    levels = 2**bits - 1
    fmt = QuantizedKV(2, 32, 32, bits, bits, zero=zero, norms=False)  # type: ignore[arg-type]
    k, v = (torch.randint(0, levels + 1, (32, 2, 32)).float() for _ in range(2))
    k[0], k[1], v[..., 0], v[..., 1] = 0, levels, 0, levels  # every group spans its levels
    k = (k - 1) * 0.25
    v = (v + 5) * 0.5  # a zero point outside 0..levels
    got = through(fmt, k, v)
    assert torch.equal(got[0], k)
    assert torch.equal(got[1], v)


@pytest.mark.parametrize("name", FORMATS)
def test_errors_stay_within_a_step(name: str) -> None:
    fmt = FORMATS[name]
    k, v = rows(fmt, 32)
    got_k, got_v = through(fmt, k, v)
    norms = reference.token_norms(k)[:, None, None] if fmt.norms else torch.ones(32, 1, 1)
    bound = 1.0 if fmt.zero == "int" else 0.5  # the rounded zero point may cost half a step
    if fmt.keys == "channel":
        u = k / norms
        step = (u.amax(0) - u.amin(0)) / (2**fmt.key_bits - 1)
        assert ((got_k / norms - u).abs() <= step * bound * 1.01 + 1e-6).all()
    of_tokens = [(v, got_v, fmt.value_bits)]
    if fmt.keys == "token":
        of_tokens.append((k, got_k, fmt.key_bits))
    for x, got, bits in of_tokens:
        group, found = x[..., :32], got[..., :32]
        if fmt.zero == "symmetric":
            # 2^(b-1) steps to the number farthest from 0, one less on its other side
            farthest = group.gather(-1, group.abs().argmax(-1, keepdim=True))
            step = farthest.abs() / 2 ** (bits - 1)
            other = (2 ** (bits - 1) - 1) * step
            group = torch.where(
                farthest > 0, torch.maximum(group, -other), torch.minimum(group, other)
            )
            exact = found.gather(-1, x[..., :32].abs().argmax(-1, keepdim=True))
            torch.testing.assert_close(exact, farthest, rtol=1e-3, atol=1e-3)
        else:
            step = (group.amax(-1) - group.amin(-1))[..., None] / (2**bits - 1)
        error = (found - group).abs()
        assert (error <= step * bound * 1.01 + 1e-3).all()
        assert error.max() > 0.2 * step.max()  # it is quantised


@pytest.mark.parametrize("zero", ["int", "min"])
def test_constant_groups_are_exact(zero: str) -> None:
    fmt = QuantizedKV(2, 32, 64, zero=zero, norms=False)  # type: ignore[arg-type]
    k = torch.randn(1, 2, 32).half().float().expand(32, 2, 32)
    v = torch.randn(32, 2, 2, 1).half().float().expand(32, 2, 2, 32).reshape(32, 2, 64)
    got = through(fmt, k, v)
    assert torch.equal(got[0], k)
    assert torch.equal(got[1], v)


@pytest.mark.parametrize("bits", [2, 4])
def test_scaling_one_token_scales_it_and_touches_no_other(bits: int) -> None:
    fmt = QuantizedKV(2, 64, 64, bits, bits)
    k, v = rows(fmt, 64)
    before = through(fmt, k, v)
    for factor in (2.0**-7, 1000.0):
        louder = k.clone()
        louder[5] *= factor
        after = through(fmt, louder, v)
        others = torch.arange(64) != 5
        if factor < 1:  # a power of two changes no rounding
            assert torch.equal(after[0][others], before[0][others])
            assert torch.equal(after[0][5], before[0][5] * factor)
        torch.testing.assert_close(after[0][others], before[0][others], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(after[0][5], before[0][5] * factor, rtol=1e-4, atol=1e-4)
        assert torch.equal(after[1], before[1])
    kivi = QuantizedKV(2, 64, 64, bits, bits, norms=False)
    louder = k.clone()
    louder[5] *= 1000
    moved = (through(kivi, louder, v)[0] - through(kivi, k, v)[0])[others]
    assert moved.abs().max() > 0.1


def test_an_all_zero_token_survives() -> None:
    for fmt in FORMATS.values():
        k, v = rows(fmt, 32)
        k[3], v[4] = 0, 0
        got = through(fmt, k, v)
        assert all(x.isfinite().all() for x in got)
        assert got[0][3].abs().max() < (1e-3 if fmt.norms else 2)
        assert got[1][4].abs().max() == 0
        got = through(fmt, torch.zeros_like(k), torch.zeros_like(v))
        assert all((x == 0).all() for x in got)


def test_normalised_tokens_have_norm_one_over_all_heads() -> None:
    k = torch.randn(40, 8, 128) * torch.logspace(-3, 3, 40)[:, None, None]
    u = k / reference.token_norms(k)[:, None, None]
    torch.testing.assert_close(u.square().sum((1, 2)), torch.ones(40))


def test_rotation_must_come_before_the_norm() -> None:
    """The paper's worked example: one outlier channel makes a low-norm token's content 50 times
    finer than its group's range, unless the outlier is spread first."""
    tokens = torch.tensor([[1.0, 1.0, 1.0, 100.0], [0.1, 0.1, 0.1, 0.1]])

    def ratio(x: Tensor) -> float:
        u = x / x.norm(dim=-1, keepdim=True)
        return float(((u[0] - u[1]).abs() / u[0].abs())[:3].max())

    assert 45 < ratio(tokens) < 55
    assert ratio(kernels.hadamard(tokens)) < 1.2


def test_low_norm_tokens_survive_where_kivi_loses_them() -> None:
    """One token in 32 at a twentieth of the norm, four outlier channels a head (the paper's
    attention sinks)."""
    torch.manual_seed(0)
    k = torch.randn(512, 4, 64)
    k[:, :, [3, 17, 30, 51]] += 10
    k[::32] /= 20
    v = torch.randn(512, 4, 64)
    error = {}
    for name, rotate, norms in (("kivi", False, False), ("cr", True, False), ("oscar", True, True)):
        x = kernels.hadamard(k) if rotate else k
        fmt = QuantizedKV(4, 64, 64, zero="int" if rotate else "min", norms=norms)
        got = through(fmt, x, v)[0]
        relative = (got - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
        error[name] = float(relative[::32].mean())
    assert error["oscar"] < 0.3
    assert error["cr"] > 3 * error["oscar"]
    assert error["kivi"] > 5 * error["oscar"]


def test_bytes_are_those_allocated() -> None:
    for fmt in FORMATS.values():
        storage = oscar.allocate(fmt, 3, 64)
        assert sum(x.nbytes for x in storage) == 3 * 64 * oscar.bytes_per_token(fmt)
    llama = QuantizedKV(8, 128, 128)
    assert 2 * 2 * 8 * 128 / oscar.bytes_per_token(llama) >= 5.3


def test_what_does_not_fit_says_so() -> None:
    for wrong in (
        {"key_bits": 3}, {"group": 64}, {"zero": "half"}, {"keys": "head"}, {"keys": "token"},
        {"head_dim": 20},
    ):  # fmt: skip
        with pytest.raises(CacheError, match=next(iter(wrong.values())).__repr__()[:3] or "norms"):
            QuantizedKV(**{"num_key_value_heads": 2, "head_dim": 64, "v_head_dim": 64, **wrong})
    fmt = FORMATS["oscar"]
    with pytest.raises(CacheError, match="multiple of 32"):
        oscar.allocate(fmt, 4, 48)
    storage = oscar.allocate(fmt, 4, 32)
    with pytest.raises(CacheError, match="blocks 0 to 3"):
        oscar.store(fmt, *rows(fmt, 32), torch.tensor([4]), storage)
    with pytest.raises(ValueError, match="expects"):
        oscar.store(fmt, *rows(fmt, 40), torch.tensor([1]), storage)
    with pytest.raises(CacheError, match="1 blocks of 32"):
        oscar.fetch(fmt, storage, torch.tensor([1]), 33)


@pytest.mark.parametrize("compiled", [True, False])
def test_rows_go_where_their_length_says(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(oscar._HOLD, "get", lambda: None)
    wide = torch.randn(3, 2, 16 + 32 + 5)  # k and v are parts of wider rows
    k, v = wide[:, :, :16].contiguous(), wide.flatten(1)[:, 7 : 7 + 64].unflatten(1, (2, 32))
    residual = torch.zeros(4, 8, 2, 16), torch.zeros(4, 8, 2, 32)
    states, lengths = (torch.tensor(x, dtype=torch.int32) for x in ([3, 0, 1], [1, 16, 11]))
    oscar.hold(k, v, states, lengths, *residual)
    for held, new in zip(residual, (k, v), strict=True):
        wanted = torch.zeros_like(held)
        wanted[3, 0], wanted[0, 7], wanted[1, 2] = new
        assert torch.equal(held, wanted)


def test_rows_of_states_that_do_not_exist_are_refused() -> None:
    k, residual = torch.ones(2, 1, 32), torch.zeros(2, 8, 1, 32)
    for states, lengths in (([0, 2], [1, 1]), ([0, -1], [1, 1]), ([0, 1], [1, 0])):
        given = (torch.tensor(x, dtype=torch.int32) for x in (states, lengths))
        with pytest.raises(CacheError, match="do not fit 2 states"):
            oscar.hold(k, k, *given, residual, residual.clone())
    assert not residual.any()
