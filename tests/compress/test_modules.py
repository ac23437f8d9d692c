"""Quantised modules compute what their integers say, under every scheme."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from serval.compress.expert_stack import QuantizedExperts
from serval.compress.install import empty_module, install
from serval.compress.modules import QuantizedEmbedding, QuantizedLinear, TiedHead
from serval.compress.scheme import QuantizedWeight, WeightScheme, quantize
from serval.compress.storage import Storage
from serval.compress.targets import targets
from serval.errors import CheckpointError, ConfigError
from serval.models.layers import shared_input
from tests.compress.toy import decoder, moe_decoder

SCHEMES = [
    WeightScheme(4),
    WeightScheme(4, 16),
    WeightScheme(4, 16, scales="integer"),
    WeightScheme(4, 16, "static"),
    WeightScheme(4, 16, "none"),
    WeightScheme(4, None, "none"),
    WeightScheme(8),
    WeightScheme(8, None, "static"),
    WeightScheme(8, 32, "none"),
    WeightScheme(8, 16, scales="integer"),
]
NAMES = [f"W{s.bits}-{s.group_size}-{s.activations}-{s.scales}" for s in SCHEMES]
INPUT_SCALE = 0.03


def rounded(weight: Tensor, scheme: WeightScheme) -> QuantizedWeight:
    """Rounded to nearest; integer scales out of 500, a static scale where there is one."""
    made = quantize(weight, replace(scheme, scales="float"))
    if scheme.scales == "integer":
        factor = made.scales.amax(1) / 500
        integer = (made.scales / factor[:, None]).round().clamp(1)
        made.integer, made.row_factor = integer.to(torch.int16), factor
        made.scales = made.integer.float() * factor[:, None]
    if scheme.activations == "static":
        made.input_scale = INPUT_SCALE
    return replace(made, scheme=scheme)


def as_seen(x: Tensor, scheme: WeightScheme) -> Tensor:
    """Activations as the scheme rounds them."""
    if scheme.activations == "none":
        return x
    step = x.abs().amax(-1, keepdim=True) / 127
    if scheme.activations == "static":
        step = torch.tensor(INPUT_SCALE)
    return (x / step).round().clamp(-127, 127) * step


def linear_of(scheme: WeightScheme, bias: bool = False, seed: int = 0) -> QuantizedLinear:
    torch.manual_seed(seed)
    linear = nn.Linear(64, 41, bias=bias)
    weight = rounded(linear.weight.detach(), scheme)
    made = QuantizedLinear.like(linear, Storage.of(weight))
    made.take(weight, "cpu")
    made.bias = linear.bias
    return made


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
@pytest.mark.parametrize("rows", [1, 7])
def test_linear_is_the_product_of_its_integers(scheme: WeightScheme, rows: int) -> None:
    made = linear_of(scheme, bias=rows > 1)
    x = torch.randn(rows, 64)
    weight = made.quantized()
    with torch.no_grad():
        expected = nn.functional.linear(as_seen(x, scheme), weight.dequantize(), made.bias)
        torch.testing.assert_close(made(x), expected, atol=1e-5, rtol=1e-4)
        assert made(x[0]).shape == (41,)


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_what_was_taken_is_given_back(scheme: WeightScheme) -> None:
    weight = rounded(torch.randn(41, 64), scheme)
    made = QuantizedLinear(64, 41, Storage.of(weight))
    made.take(weight, "cpu")
    back = made.quantized()
    for name in ("codes", "scales", "integer", "row_factor", "input_scale"):
        first, second = getattr(weight, name), getattr(back, name)
        assert torch.equal(first, second) if isinstance(first, Tensor) else first == second


def test_scales_stay_float32_and_copies_are_apart() -> None:
    made = linear_of(WeightScheme(4, 16))
    factor, scales = made.factor.clone(), made.group_scales.clone()
    x = torch.randn(3, 64)
    before = made(x)
    twin = copy.deepcopy(made)
    assert twin.data.data_ptr() != made.data.data_ptr()
    assert twin.packed.data.data_ptr() == twin.data.data_ptr()
    twin.bfloat16()
    assert torch.equal(twin.factor, factor)
    assert torch.equal(twin.group_scales, scales)
    assert torch.equal(twin(x), before)


def test_scattered_groups_and_zero_points() -> None:
    """w = (q - z) s, and group j of the codes holds inputs order[16 j : 16 j + 16]."""
    torch.manual_seed(0)
    scheme = WeightScheme(4, 16, "none")
    weight = rounded(torch.randn(41, 64), scheme)
    weight.zero_points = torch.randint(-8, 8, (41, 4), dtype=torch.int8)
    weight.order = torch.randperm(64)
    made = QuantizedLinear(64, 41, Storage.of(weight))
    made.take(weight, "cpu")
    x = torch.randn(5, 64)
    torch.testing.assert_close(made(x), x @ weight.dequantize().T, atol=1e-4, rtol=1e-4)
    column = int(weight.order[20])  # lies in group 1
    expected = (weight.codes[:, 20] - weight.zero_points[:, 1]) * weight.scales[:, 1]
    torch.testing.assert_close(weight.dequantize()[:, column], expected)
    assert torch.equal(made.quantized().zero_points, weight.zero_points)
    assert torch.equal(made.quantized().order, weight.order)


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_modules_of_one_input_agree_with_each_alone(scheme: WeightScheme) -> None:
    modules = [linear_of(scheme, bias=seed == 1, seed=seed) for seed in range(3)]
    x = torch.randn(4, 64)
    for joint, module in zip(shared_input(x, *modules), modules, strict=True):
        torch.testing.assert_close(joint, module(x), atol=1e-6, rtol=1e-6)


def test_modules_that_differ_or_are_watched_are_called_one_by_one() -> None:
    x = torch.randn(4, 64)
    token, static = linear_of(WeightScheme(4)), linear_of(WeightScheme(4, None, "static"))
    assert QuantizedLinear.together([token, static], x) is None
    outputs = shared_input(x, token, static)
    assert torch.equal(outputs[1], static(x))
    seen: list[Tensor] = []
    hook = token.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    shared_input(x, token, linear_of(WeightScheme(4), seed=1))
    hook.remove()
    assert len(seen) == 1
    plain = nn.Linear(64, 8)
    assert torch.equal(shared_input(x, plain, token)[0], plain(x))


@pytest.mark.parametrize("scheme", [WeightScheme(8), WeightScheme(4, 16)])
def test_embedding_and_tied_head_share_one_table(scheme: WeightScheme) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(203, 64)
    weight = quantize(table.weight.detach(), scheme)
    made = QuantizedEmbedding.like(table, Storage.of(weight))
    made.take(weight, "cpu")
    tokens = torch.tensor([[0, 17], [202, 5]])
    torch.testing.assert_close(made(tokens), weight.dequantize()[tokens])
    hidden = torch.randn(3, 64)
    exact = as_seen(hidden, scheme) @ weight.dequantize().T
    torch.testing.assert_close(TiedHead(made)(hidden), exact, atol=1e-4, rtol=1e-4)
    # a config group cannot quantise token ids
    assert made.storage.scheme.activations == "none"


def expert_weights(stack: nn.Module, gate_up: WeightScheme, down: WeightScheme):
    for expert in range(4):
        gate, up = stack.gate_up_proj[expert].detach().chunk(2)
        yield rounded(gate, gate_up)
        yield rounded(up, gate_up)
        yield rounded(stack.down_proj[expert].detach(), down)


@pytest.mark.parametrize(
    ("gate_up", "down"),
    [
        (WeightScheme(4), WeightScheme(4)),
        (WeightScheme(4, 16), WeightScheme(8)),
        (WeightScheme(4, 16, scales="integer"), WeightScheme(4, 12, scales="integer")),
        (WeightScheme(8, None, "static"), WeightScheme(8, None, "static")),
        (WeightScheme(4, 32, "none"), WeightScheme(4, 36, "none")),
    ],
)
def test_experts_are_the_products_of_their_integers(
    gate_up: WeightScheme, down: WeightScheme
) -> None:
    model = moe_decoder()
    target = next(t for t in targets(model) if t.kind == "experts")
    stack = target.module
    weights = list(expert_weights(stack, gate_up, down))
    made = install(model, target, weights)
    assert isinstance(made, QuantizedExperts)
    assert model.layers[0].mlp.experts is made
    x, counts = torch.randn(9, 64), [4, 0, 3, 2]
    expected, start = torch.empty(9, 64), 0
    with torch.no_grad():
        for expert, count in enumerate(counts):
            gate, up, last = (w.dequantize() for w in weights[3 * expert : 3 * expert + 3])
            seen = as_seen(x[start : start + count], gate_up)
            inner = nn.functional.silu(seen @ gate.T) * (seen @ up.T)
            expected[start : start + count] = as_seen(inner, down) @ last.T
            start += count
        torch.testing.assert_close(made(x, counts), expected, atol=1e-4, rtol=1e-3)
        again = made.matrix(2, "up_proj")
    assert torch.equal(again.codes, weights[7].codes)
    assert torch.equal(again.scales, weights[7].scales)


def test_experts_that_cannot_share_a_product_are_refused() -> None:
    model = moe_decoder()
    target = next(t for t in targets(model) if t.kind == "experts")
    weights = list(expert_weights(target.module, WeightScheme(4), WeightScheme(4)))
    odd = [
        *weights[:3],
        quantize(target.module.gate_up_proj[1][:36], WeightScheme(8)),
        *weights[4:],
    ]
    with pytest.raises(ConfigError, match=r"experts\.1\.gate_proj is quantised unlike"):
        install(model, target, odd)
    static = WeightScheme(4, None, "static")
    weights = list(expert_weights(target.module, static, static))
    weights[1].input_scale = 0.5
    with pytest.raises(CheckpointError, match=r"expert 0: .* input_scale 0\.03 and 0\.5"):
        install(model, target, weights)


def test_a_new_bias_replaces_the_old_one() -> None:
    model = decoder(qkv_bias=True, family="qwen2")
    target = next(t for t in targets(model) if t.path.endswith("q_proj"))
    weight = quantize(target.module.weight.detach(), WeightScheme(4))
    old = target.module.bias
    assert torch.equal(install(model, target, weight).bias, old)
    bias = torch.arange(64.0)
    made = install(model, target, weight, bias)
    assert torch.equal(made.bias, bias)
    assert made.storage.format == "pack-quantized"
    assert install(model, target, weight, format="int-quantized").storage.format == "int-quantized"
    assert empty_module(target, [made.storage]).data.is_meta
