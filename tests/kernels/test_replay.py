"""Recorded kernel calls give on new inputs what the ordinary way gives; what cannot be replayed is
noticed."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from serval import kernels
from serval.kernels import jit
from serval.kernels.replay import Pool, Tape, record

WIDTH = 96


@pytest.fixture(autouse=True)
def compiled() -> None:
    if jit.load("replay") is None:
        pytest.skip("no compiler")


def recorded(compute: Callable[[], Tensor], pool: Pool | None = None) -> Tape:
    with torch.inference_mode():
        _, tape = record(pool or Pool(), compute)
    assert isinstance(tape, Tape), tape
    return tape


def packed(bits: int, group: int | None, rows: int = WIDTH) -> kernels.PackedWeight:
    codes = torch.randint(-7, 8, (rows, WIDTH), dtype=torch.int8)
    groups = 1 if group is None else WIDTH // group
    return kernels.pack_weight(codes, torch.rand(rows, groups), bits=bits, group_size=group)


def layer(x: Tensor, weights: dict[str, Tensor], quantized: kernels.PackedWeight) -> Tensor:
    """A computation with views, several outputs and freed memory in it."""
    y, total = kernels.add_rms_norm(x, x, weights["norm"], 1e-5)
    gate, up = kernels.quantized_linear_multi(y, [quantized, quantized])
    heads = kernels.swiglu(gate, up).view(x.shape[0], 6, -1)
    q, _ = kernels.rotary(heads[:, :4], heads[:, 4:], weights["cos"], weights["sin"], weights["at"])
    rows = kernels.linear(q.flatten(1), weights["down"], weights["bias"])
    return kernels.add_rms_norm(rows, total, weights["norm"], 1e-5)[0]


def inputs(rows: int) -> dict[str, Tensor]:
    return {
        "norm": torch.rand(WIDTH),
        "cos": torch.randn(32, 8),
        "sin": torch.randn(32, 8),
        "at": torch.randint(0, 32, (rows,)),
        "down": torch.randn(WIDTH, 64),
        "bias": torch.randn(WIDTH),
    }


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("bits", "group"), [(4, None), (4, 32), (8, None)])
def test_replay_equals_the_ordinary_way(rows: int, bits: int, group: int | None) -> None:
    quantized, weights, x = packed(bits, group), inputs(rows), torch.randn(rows, WIDTH)
    tape = recorded(lambda: layer(x, weights, quantized))
    assert len(tape.calls) == 6
    for _ in range(3):
        gc.collect()
        x.normal_()
        weights["at"].random_(32)
        with torch.inference_mode():
            want = layer(x, weights, quantized)
        got = tape.run()
        assert got is not None
        assert torch.equal(got, want)


def test_memory_is_reused_within_a_tape_and_between_tapes() -> None:
    quantized, weights, pool = packed(4, None), inputs(4), Pool()
    x = torch.randn(4, WIDTH)

    def deep() -> Tensor:
        y = x
        for _ in range(20):
            y = layer(y, weights, quantized)
        return y

    recorded(lambda: layer(x, weights, quantized), pool)
    once = pool.nbytes
    tape = recorded(deep, pool)
    assert pool.nbytes <= 2 * once  # not 20 times
    with torch.inference_mode():
        want = deep()
    got = tape.run()
    assert got is not None
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("compute", "word"),
    [
        (lambda x: kernels.swiglu(x, x) + 1, "add"),
        (lambda x: kernels.swiglu(x, x).clone(), "clone"),
        (lambda x: kernels.swiglu(x, x).mul_(2), "mul_"),
        (lambda x: kernels.swiglu(x, x).to(torch.bfloat16), "to"),
        (lambda x: kernels.swiglu(x, x)[: int(x.tolist()[0][0] * 0) + 1], "tolist"),
        (lambda x: kernels.swiglu(x, x)[: int(x[0, 0].item() * 0) + 1], "item"),
        (lambda x: kernels.swiglu(x, x).T, "contiguous"),
    ],
)
def test_what_cannot_be_replayed_is_noticed(compute: Callable[[Tensor], Tensor], word: str) -> None:
    x = torch.rand(3, WIDTH)
    torch.manual_seed(1)
    want = compute(x)
    torch.manual_seed(1)
    with torch.inference_mode():
        got, why = record(Pool(), lambda: compute(x))
    assert isinstance(why, str)
    assert word in why
    assert torch.equal(got, want)


def test_a_kernel_without_packed_form_is_noticed() -> None:
    table = packed(4, None)
    tokens = torch.tensor([1, 2])
    with torch.inference_mode():
        _, why = record(Pool(), lambda: kernels.quantized_embedding(tokens, table))
    assert isinstance(why, str)
    assert "quantized_embedding" in why


def test_a_kernel_that_refuses_stops_the_replay() -> None:
    q, at = torch.randn(2, 2, 16), torch.tensor([0, 1])
    cos = sin = torch.randn(8, 8)
    tape = recorded(lambda: kernels.rotary(q, q, cos, sin, at)[0])
    assert tape.run() is not None
    at[1] = 8
    assert tape.run() is None
    at[1] = 7
    assert tape.run() is not None


def test_nothing_is_recorded_outside() -> None:
    x = torch.randn(2, WIDTH)
    tape = recorded(lambda: kernels.swiglu(x, x))
    count = len(tape.calls)
    kernels.swiglu(x, x)
    assert len(tape.calls) == count == 1
