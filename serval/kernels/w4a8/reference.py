"""Linear layers with quantised weights in plain PyTorch: exact integers, then scales.

With s the scale of an activation row and r the factor of an output channel:

    channel:  y[t, n] = FLOAT( sum_k X[t, k] Q[n, k] ) * (s[t] * r[n])
    integer:  y[t, n] = FLOAT( sum_g I[n, g] sum_{k in g} X[t, k] Q[n, k] ) * (s[t] * r[n])
    float:    y[t, n] = s[t] * sum_g FLOAT( sum_{k in g} X[t, k] Q[n, k] ) * S[n, g]

"integer" is Integer Scale (arXiv 2405.14597): one conversion to float per output instead of one per
group. Products are taken in float64, whose 53 bits hold every sum that fits 32 bits exactly.

The second half of the file is FastGEMM as OdysseyLLM defines it (arXiv 2311.09550): a nibble in
two's complement, moved to the high half of its byte, *is* 16 times its value as int8, so no
instruction is spent on sign extension and 1/16 disappears in the channel scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serval.kernels.w4a8 import gpu_layout
from serval.kernels.w4a8.overflow import LARGEST_ACTIVATION
from serval.kernels.w4a8.packing import (
    PANEL,
    PackedWeight,
    padded_group,
    unpack_weight,
)


def quantize_activations(x: Tensor, input_scale: float | None = None) -> tuple[Tensor, Tensor]:
    """x [..., K] -> (int8 [..., K] in [-127, 127], scale float32 [...]).

    Per token, scale = max|x| / 127, or with the given static `input_scale`. A row that holds NaN or
    infinity gets the scale NaN, so its outputs are NaN.
    """
    wide = x.float()
    if input_scale is None:
        scale = wide.abs().amax(-1) * (1.0 / LARGEST_ACTIVATION)
    else:
        scale = wide.new_full(wide.shape[:-1], input_scale)
    inverse = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
    finite = torch.isfinite(wide).all(-1)
    codes = (
        (wide * inverse[..., None])
        .nan_to_num_()
        .round()
        .clamp_(-LARGEST_ACTIVATION, LARGEST_ACTIVATION)
    )
    return codes.to(torch.int8), torch.where(finite, scale, float("nan"))


def integer_sums(codes: Tensor, packed: PackedWeight) -> Tensor:
    """The sums before the last scaling: codes int8 [..., K] -> float64 [..., N], exact integers
    (with float group scales: float32 sums in the order of the groups)."""
    weight, scales, integer, _ = unpack_weight(packed)
    wide, columns = codes.double(), weight.double().T  # [..., K], [K, N]
    if packed.group_size is None:
        return wide @ columns
    total = wide.new_zeros(*codes.shape[:-1], packed.outputs)
    if integer is None:
        total = total.float()
    for group in range(packed.groups):
        inputs = slice(group * packed.group_size, (group + 1) * packed.group_size)
        part = wide[..., inputs] @ columns[inputs]
        if integer is None:
            total += part.float() * scales[:, group]
        else:
            total += part * integer[:, group].double()
    return total


def quantized_linear(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None = None,
    activations: str = "token",
    input_scale: float | None = None,
) -> Tensor:
    """x [..., K] -> [..., N] in x's dtype; options as in `serval.kernels.quantized_linear`."""
    if activations == "none":
        out = x.float() @ dequantize(packed).T
    else:
        codes, scale = quantize_activations(x, input_scale if activations == "static" else None)
        sums = integer_sums(codes, packed).float()
        out = sums * (scale[..., None] * packed.factor)
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype)


def dequantize(packed: PackedWeight) -> Tensor:
    """The float32 matrix [N, K]."""
    codes, scales, _, _ = unpack_weight(packed)
    groups = packed.groups
    values = codes.view(packed.outputs, groups, -1).float() * scales.unsqueeze(-1)
    return values.view(packed.outputs, packed.inputs)


def embedding(tokens: Tensor, packed: PackedWeight) -> Tensor:
    """Rows of the matrix, float32: tokens int64 [...] -> [..., K]."""
    if gpu_layout.is_gpu_layout(packed):
        return gpu_layout.select_rows(packed, tokens)
    panel, lane = tokens // PANEL, tokens % PANEL
    cells = packed.data[panel, :, lane]  # [..., cells, 4]
    if packed.bits == 8:
        values = cells.float() - 128
    else:
        values = torch.cat([cells & 0x0F, cells >> 4], dim=-1).float() - 8
    scales = packed.factor[tokens].unsqueeze(-1)
    if packed.group_scales is not None:
        scales = packed.group_scales[panel, :, lane].float() * scales
    length = padded_group(packed.bits, packed.inputs, packed.group_size)
    values = values.reshape(*tokens.shape, packed.groups, length)
    rows = values[..., : packed.inputs // packed.groups] * scales.unsqueeze(-1)
    return rows.reshape(*tokens.shape, packed.inputs)


# -- FastGEMM (OdysseyLLM, section on the kernel) -------------------------------------------------


def pack_high_nibbles(codes: Tensor) -> Tensor:
    """int8 [N, K] in [-8, 7], K even -> bytes uint8 [N, K / 2] of two's-complement nibbles, the
    even input in the low half."""
    bits = codes.view(torch.uint8) & 0x0F
    return bits[:, 0::2] | bits[:, 1::2] << 4


def high_nibbles(packed: Tensor) -> Tensor:
    """bytes uint8 [N, K / 2] -> int8 [N, K] of 16 times the codes: one mask, and one shift for the
    low half; no sign extension, no subtraction."""
    low, high = (packed << 4) & 0xF0, packed & 0xF0
    return torch.stack([low, high], dim=-1).flatten(-2).view(torch.int8)


def fast_gemm(codes: Tensor, packed: Tensor, scale: Tensor, x_scale: Tensor) -> Tensor:
    """FastGEMM: activation codes int8 [M, K], nibbles uint8 [N, K / 2], channel scales float32 [N],
    row scales float32 [M] -> float32 [M, N].

    The integer sum is 16 times that of sign-extended weights; the channel scale carries 1/16, which
    is exact. `|16 q| <= 128` and `|x| <= 127` keep 32 bits up to K = 132,104.
    """
    sums = codes.double() @ high_nibbles(packed).double().T
    return sums.float() * (x_scale[:, None] * (scale / 16.0))
