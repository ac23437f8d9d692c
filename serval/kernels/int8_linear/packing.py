"""The one weight layout that all int8 linear kernels read.

Sixteen output channels by four inputs make a 64-byte cell, `data[panel, k // 4, channel % 16, k %
4]`, stored as `w + 128`. One cell is one AVX-512 register (or two AVX2 registers): every 32-bit
lane belongs to one output channel, so a product needs no horizontal sums, and weights stream from
memory in order. The offset makes the weight the unsigned operand of `vpdpbusd`; kernels subtract
`128 * sum(x)` per token. Missing channels and inputs are stored as 128, that is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PANEL = 16  # output channels in a cell
DEPTH = 4  # inputs in a cell


class PackedInt8(NamedTuple):
    """An int8 weight ready for the kernels; both tensors may be registered as buffers."""

    data: Tensor  # uint8 [ceil(N / 16), ceil(K / 4), 16, 4]
    scale: Tensor  # float32 [N]


def pack_int8_weight(weight: Tensor, scale: Tensor) -> PackedInt8:
    """Lay out `weight` int8 [N, K] with per-channel `scale` [N] for `int8_linear`."""
    rows, columns = weight.shape
    if weight.dtype != torch.int8 or scale.numel() != rows:
        raise ValueError(
            f"pack_int8_weight got a {weight.dtype} weight {tuple(weight.shape)} with "
            f"{scale.numel()} scales; it expects an int8 weight [N, K] and N scales"
        )
    panels, cells = -(-rows // PANEL), -(-columns // DEPTH)
    padded = torch.zeros(panels * PANEL, cells * DEPTH, dtype=torch.int8, device=weight.device)
    padded[:rows, :columns] = weight
    cells_first = padded.view(panels, PANEL, cells, DEPTH).transpose(1, 2).contiguous()
    data = cells_first.view(torch.uint8).bitwise_xor_(0x80)
    return PackedInt8(data, scale.detach().reshape(rows).float().contiguous())


def unpack_int8_weight(packed: PackedInt8, columns: int) -> Tensor:
    """Recover the int8 weight [N, columns] from its packed form."""
    panels, cells = packed.data.shape[:2]
    flat = packed.data.bitwise_xor(0x80).view(torch.int8).transpose(1, 2)
    return flat.reshape(panels * PANEL, cells * DEPTH)[
        : packed.scale.numel(), :columns
    ].contiguous()
