"""The Triton kernels for quantised weights against the reference, on the GPU or in Triton's
interpreter, and their compilation for Hopper."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from serval import kernels
from serval.kernels.w4a8 import gpu_layout, reference
from serval.kernels.w4a8.packing import (
    PackedWeight,
    pack_weight,
    relayout,
    stack_weights,
    unpack_weight,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED,
    reason="no GPU; test_in_the_interpreter runs this in a process of its own",
)
SCHEMES = [  # bits, inputs, group_size, mode
    (4, 200, None, "channel"),
    (4, 256, 128, "integer"),
    (4, 160, 32, "integer"),  # five units: the last block is half empty
    (4, 192, 96, "float"),
    (4, 120, 40, "integer"),  # groups are padded
    (4, 48, 48, "integer"),
    (8, 200, None, "channel"),
    (8, 256, 64, "integer"),
    (8, 120, 40, "float"),
]
NAMES = [f"{bits}bit-{mode}-{group}" for bits, _, group, mode in SCHEMES]


def matrix(rows: int, bits: int, inputs: int, group: int | None, mode: str) -> PackedWeight:
    """A weight of random codes, extremes included, in the CPU's layout."""
    low = -(1 << (bits - 1))
    codes = torch.randint(low, -low, (rows, inputs), dtype=torch.int8)
    codes[0], codes[-1] = low, -low - 1
    scales = torch.rand(rows, inputs // (group or inputs)) * 0.1 + 0.01
    if mode != "integer":
        return pack_weight(codes, scales, bits=bits, group_size=group)
    integer = torch.randint(1, 400, scales.shape, dtype=torch.int16)
    factor = torch.rand(rows) * 1e-3
    return pack_weight(
        codes, scales, bits=bits, group_size=group, integer=integer, row_factor=factor
    )


def on_gpu(packed: PackedWeight) -> PackedWeight:
    return packed.to("cuda") if DEVICE == "cuda" else relayout(packed, "gpu")


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_layout_keeps_everything(scheme: tuple[int, int, int | None, str]) -> None:
    packed = matrix(37, *scheme)
    there = relayout(packed, "gpu")
    assert gpu_layout.is_gpu_layout(there)
    assert not gpu_layout.is_gpu_layout(packed)
    for first, second in zip(unpack_weight(packed), unpack_weight(there), strict=True):
        assert (first is None) == (second is None)
        assert first is None or torch.equal(first, second)
    back = relayout(there, "cpu")
    assert torch.equal(back.data, packed.data)
    assert back.group_scales is None or torch.equal(back.group_scales, packed.group_scales)
    stack = stack_weights([packed, matrix(37, *scheme)])
    for made, filled in ((packed, there), (stack, relayout(stack, "gpu"))):
        empty = gpu_layout.empty_parts(made, "meta")
        for name in ("data", "factor", "group_scales"):
            shape, wanted = getattr(empty, name), getattr(filled, name)
            assert (shape is None) == (wanted is None)
            assert wanted is None or (shape.shape, shape.dtype) == (wanted.shape, wanted.dtype)
    assert torch.equal(relayout(stack, "gpu").data[0], there.data)
    assert torch.equal(relayout(relayout(stack, "gpu"), "cpu").data, stack.data)
    tokens = torch.tensor([[0, 36], [5, 5]])
    rows = kernels.quantized_embedding(tokens, there)
    assert torch.equal(rows, reference.embedding(tokens, packed))
    x = torch.randn(2, packed.inputs)  # a weight in the other layout is slower, not wrong
    expected = reference.quantized_linear(x, packed)
    assert torch.equal(kernels.quantized_linear(x, there), expected)
    assert torch.equal(kernels.quantized_linear_multi(x, [there])[0], expected)
    twice = kernels.quantized_grouped_linear(x, relayout(stack, "gpu"), [2, 0])
    assert torch.equal(twice, expected)


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
    assert run.stdout.count(".") >= 35, run.stdout


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """The Triton module."""
    return importlib.import_module("serval.kernels.w4a8.gpu")


def same(got: Tensor, expected: Tensor, exact: bool) -> None:
    if exact:
        assert torch.equal(got.cpu(), expected)
    else:
        torch.testing.assert_close(got.cpu(), expected, rtol=2e-4, atol=2e-4)


@needs_triton
@pytest.mark.parametrize("activations", ["token", "none"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_linear(
    gpu: ModuleType, scheme: tuple[int, int, int | None, str], activations: str
) -> None:
    packed = matrix(150, *scheme)
    x, bias = torch.randn(3, 7, packed.inputs), torch.randn(150)
    expected = reference.quantized_linear(x, packed, bias, activations)
    exact = activations == "token" and packed.mode != "float"
    for parts in (1, 2):
        got = gpu.quantized_linear(
            x.to(DEVICE), on_gpu(packed), bias.to(DEVICE), activations, parts=parts
        )
        same(got, expected, exact)


@needs_triton
@pytest.mark.parametrize("rows", [1, 20, 40, 130])
def test_every_tile_shape(gpu: ModuleType, rows: int) -> None:
    packed = matrix(70, 4, 320, 32, "integer")
    x = torch.randn(rows, 320)
    got = gpu.quantized_linear(x.to(DEVICE), on_gpu(packed))
    same(got, reference.quantized_linear(x, packed), True)


@needs_triton
def test_unusual_inputs(gpu: ModuleType) -> None:
    packed = matrix(65, 4, 96, 32, "integer")
    x = torch.randn(96, 12).T  # not contiguous
    x[1] = 0
    x[2] *= 1e30
    x[3] *= 1e-30
    x[4, 5] = float("nan")
    x[5, 6] = float("inf")
    weight = on_gpu(packed)
    got = gpu.quantized_linear(x.to(DEVICE), weight).cpu()
    expected = reference.quantized_linear(x, packed)
    assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert got[4:6].isnan().all()
    assert not got[[0, 1, 2, 3]].isnan().any()
    static = reference.quantized_linear(x[:4], packed, None, "static", 0.01)
    same(gpu.quantized_linear(x[:4].to(DEVICE), weight, None, "static", 0.01), static, True)
    half = x[:2].half()
    same(
        gpu.quantized_linear(half.to(DEVICE), weight),
        reference.quantized_linear(half, packed),
        True,
    )
    assert gpu.quantized_linear(x[:0].to(DEVICE), weight).shape == (0, 65)


@needs_triton
def test_multi(gpu: ModuleType) -> None:
    weights = [matrix(40, 4, 120, 40, "integer"), matrix(9, 8, 120, None, "channel")]
    x, biases = torch.randn(5, 120), [torch.randn(40), None]
    outs = gpu.quantized_linear_multi(
        x.to(DEVICE),
        [on_gpu(weight) for weight in weights],
        [None if bias is None else bias.to(DEVICE) for bias in biases],
    )
    for out, weight, bias in zip(outs, weights, biases, strict=True):
        same(out, reference.quantized_linear(x, weight, bias), True)


@needs_triton
@pytest.mark.parametrize("counts", [[0, 5, 0, 1], [40, 0, 0, 3], [0, 0, 0, 0]])
@pytest.mark.parametrize("parts", [1, 3])
def test_grouped(gpu: ModuleType, counts: list[int], parts: int) -> None:
    weights = [matrix(70, 4, 192, 64, "integer") for _ in counts]
    x, bias = torch.randn(sum(counts), 192), torch.randn(len(counts), 70)
    got = gpu.quantized_grouped_linear(
        x.to(DEVICE), on_gpu(stack_weights(weights)), counts, bias.to(DEVICE), parts=parts
    )
    runs = zip(x.split(counts), weights, bias, strict=True)
    expected = [reference.quantized_linear(*run) for run in runs]
    same(got, torch.cat(expected), True)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_calls_reach_the_gpu() -> None:
    """The public calls on CUDA tensors give what they give on the CPU."""
    packed = matrix(96, 4, 256, 128, "integer")
    there, x = packed.to("cuda"), torch.randn(9, 256)
    expected = reference.quantized_linear(x, packed)
    assert torch.equal(kernels.quantized_linear(x.cuda(), there).cpu(), expected)
    assert torch.equal(kernels.quantized_linear_multi(x.cuda(), [there] * 2)[1].cpu(), expected)
    stack = stack_weights([packed, packed]).to("cuda")
    assert torch.equal(kernels.quantized_grouped_linear(x.cuda(), stack, [4, 5]).cpu(), expected)
    half = kernels.quantized_linear(x.cuda().bfloat16(), there, activations="none").cpu()
    exact = reference.quantized_linear(x.bfloat16(), packed, None, "none")
    torch.testing.assert_close(half, exact, rtol=2e-2, atol=2e-2 * float(exact.abs().max()))


HOPPER = {  # bits, mode, int8 activations, rows, H, units of a group, split -> instruction
    "w4a8-decode": ((4, "integer", True, 1, 64, 2, True), "s32.s8.s8"),
    "w4a8-prefill": ((4, "integer", True, 512, 64, 2, False), "s32.s8.s8"),
    "w4a8-groups-of-32": ((4, "float", True, 64, 32, 1, False), "s32.s8.s8"),
    "w8a8": ((8, "channel", True, 512, 64, 2, False), "s32.s8.s8"),
    "w4a16": ((4, "float", False, 16, 64, 2, False), "f32.bf16.bf16"),
}


@pytest.mark.skipif(INTERPRETED, reason="compiled in the parent process")
@pytest.mark.parametrize("case", HOPPER)
def test_compiles_for_hopper(gpu: ModuleType, case: str) -> None:
    """Without a GPU: machine code for sm_90 whose products run on tensor cores, without spills."""
    triton = pytest.importorskip("triton", reason="Triton is not installed (extra: gpu)")
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    (bits, mode, int8, rows, half, units, split), instruction = HOPPER[case]
    shape = gpu.tiling(rows)
    constants = {
        "BITS": bits, "MODE": gpu.MODES[mode], "INT8": int8, "BIAS": True, "GROUPED": True,
        "SPLIT": split, "PTX": True, "H": half, "GROUP_UNITS": units, "STORED": gpu_layout.TILE,
        "BM": shape.rows, "BN": shape.channels,
    }  # fmt: skip
    kinds = {
        "X": "*i8" if int8 else "*bf16", "XScale": "*fp32", "Data": "*i8",
        "Scales": "*i16" if mode == "integer" else "*fp32", "Factor": "*fp32", "Bias": "*bf16",
        "Out": "*bf16", "Parts": "*i32", "Rows": "*i32",
    }  # fmt: skip
    kernel = gpu.gpu_kernels.product
    names = kernel.arg_names
    source = compiler.ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (at,): [["tt.divisibility", 16]]
            for at, name in enumerate(names)
            if name in kinds or name in ("N", "x_row", "data_expert")
        },
    )
    options = {
        "num_warps": shape.warps,
        "num_stages": shape.stages,
        "enable_fp_fusion": False,
    }
    made = triton.compile(source, target=target, options=options)
    found = set(
        re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k\d+\.([\w.]+)", made.asm["ptx"])
    )
    assert found == {instruction}
    assert "cp.async" in made.asm["ptx"]
    assert made.metadata.shared <= 227 * 1024
