"""The Triton kernels of low-bit caches against the reference, on the GPU or in the interpreter."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from serval import kernels
from serval.kernels import oscar
from serval.kernels.oscar import QuantizedKV, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = {
    "oscar": QuantizedKV(2, 32, 32),
    "oscar-int4": QuantizedKV(1, 64, 48, 4, 4, zero="min"),
    "kivi": QuantizedKV(1, 80, 32, 2, 4, zero="min", norms=False),
    "symmetric": QuantizedKV(1, 16, 64, 4, 2, zero="symmetric", norms=False),
}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED,
    reason="no GPU; test_in_the_interpreter runs this in a process of its own",
)


def test_in_the_interpreter() -> None:
    """Triton decides when it is imported whether to interpret, so this needs a fresh process."""
    pytest.importorskip("triton", reason="Triton is not installed (extra: gpu)")
    if DEVICE == "cuda" or INTERPRETED:
        pytest.skip("the tests of this file run directly")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert run.stdout.count(".") >= 9, run.stdout


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """The Triton module."""
    return importlib.import_module("serval.kernels.oscar.gpu")


def on(*values: Tensor) -> list[Tensor]:
    return [x.to(DEVICE) for x in values]


@needs_triton
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_store(gpu: ModuleType, name: str, rotate: bool) -> None:
    torch.manual_seed(0)
    fmt = FORMATS[name]
    k = torch.randn(64, fmt.num_key_value_heads, fmt.head_dim) * torch.rand(64, 1, 1)
    v = torch.randn(64, fmt.num_key_value_heads, fmt.v_head_dim)
    v[3] = 0
    ids = torch.tensor([2], dtype=torch.int32)
    want = oscar.allocate(fmt, 3, 64, torch.zeros)
    got = on(*oscar.allocate(fmt, 3, 64, torch.zeros))
    gpu.store(fmt, *on(k, v, ids), got, rotate=rotate)
    rotated = kernels.hadamard(k) if rotate else k
    reference.store(fmt, rotated, v, ids, want)
    got = [x.cpu() for x in got]
    # Sums in another order may move a number across the border of two codes.
    assert (got[0] != want[0]).float().mean() < (0.02 if rotate or fmt.norms else 1e-9)
    mine, expected = (reference.fetch(fmt, s, ids, 64) for s in (got, want))
    assert float((mine[0] - expected[0]).norm() / expected[0].norm()) < 0.05
    assert torch.equal(mine[1], expected[1])


@needs_triton
@pytest.mark.parametrize("name", ["oscar", "kivi", "per-token"])
def test_attend(gpu: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(gpu, "PART", 64)  # several parts
    fmt = FORMATS.get(name) or QuantizedKV(1, 32, 48, 4, 2, keys="token", norms=False)
    heads = 2 * fmt.num_key_value_heads
    storage = oscar.allocate(fmt, 4, 32, torch.zeros)
    k = torch.randn(128, fmt.num_key_value_heads, fmt.head_dim)
    v = torch.randn(128, fmt.num_key_value_heads, fmt.v_head_dim)
    reference.store(fmt, k, v, torch.tensor([1, 3, 0, 2]), storage)
    tables = torch.tensor([[3, 1, 0], [2, 0, 0]], dtype=torch.int32)
    stored = torch.tensor([96, 32], dtype=torch.int32)
    lengths, states = stored + torch.tensor([7, 0]).int(), torch.tensor([1, 0], dtype=torch.int32)
    residual = [
        torch.randn(2, 32, fmt.num_key_value_heads, x) for x in (fmt.head_dim, fmt.v_head_dim)
    ]
    starts, sinks = torch.tensor([0, 1, 3], dtype=torch.int32), torch.randn(heads)
    q = torch.randn(3, heads, fmt.head_dim)
    want = reference.attend(
        fmt, q, storage, tables, stored, *residual, states, lengths, 0.2, sinks, starts
    )
    got = gpu.attend(
        fmt, *on(q), on(*storage), *on(tables, stored, *residual, states, lengths), 0.2,
        *on(sinks, starts),
    )  # fmt: skip
    for mine, expected in zip(got, want, strict=True):
        torch.testing.assert_close(mine.cpu(), expected, rtol=1e-4, atol=1e-5)
