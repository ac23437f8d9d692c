"""How GPUs store a four- or eight-bit weight, and the way there and back. Plain PyTorch.

Inputs are cut into units of `H` (64, or 32 where groups are odd multiples of 32); two consecutive
units make a block. With four bits byte j of a block's row holds input j of its first unit in the
low nibble and input j of its second unit in the high one, both in two's complement, so that one
mask turns a byte into the signed byte 16 w (FastGEMM, arXiv:2311.09550). A kernel multiplies the
two units one after the other: nothing is interleaved, nothing moves between threads. With eight
bits the two units lie side by side.

`TILE` output channels of one block are contiguous, so that a program reads whole cache lines and
walks memory in order: `data[channel // TILE, block, channel % TILE, byte]`. Scales lie one group
after the other, channels contiguous, which is how a program loads them.

A group that is no multiple of 32 inputs is padded with zeros; then activations are padded alike
(`Layout.pad_inputs`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from serval.errors import ConfigError

if TYPE_CHECKING:
    from serval.kernels.w4a8.packing import PackedWeight

TILE = 128  # output channels that are stored together
LARGEST_GROUP = 132_104  # 16 * 8 * 127 times this fits int32


@dataclass(frozen=True)
class Layout:
    """Where inputs of a matrix with `inputs` columns and groups of `group` inputs lie."""

    inputs: int
    group: int
    bits: int

    @property
    def padded_group(self) -> int:
        """Inputs of a group with its padding."""
        return -(-self.group // 32) * 32

    @property
    def groups(self) -> int:
        """Scales of an output channel."""
        return self.inputs // self.group

    @property
    def unit(self) -> int:
        """H: inputs of a product; a group is a whole number of them."""
        return 32 if self.groups > 1 and self.padded_group % 64 else 64

    @property
    def group_units(self) -> int:
        """Units that share a scale."""
        return 2 * self.blocks if self.groups == 1 else self.padded_group // self.unit

    @property
    def blocks(self) -> int:
        """Pairs of units."""
        return max(1, -(-self.groups * self.padded_group // (2 * self.unit)))

    @property
    def width(self) -> int:
        """Columns of activations as the kernel reads them."""
        return self.blocks * 2 * self.unit

    @property
    def row_bytes(self) -> int:
        """Bytes of one output channel in a block."""
        return self.unit * self.bits // 4

    def pad_inputs(self, x: Tensor) -> Tensor:
        """x [..., K] with each group padded to `padded_group`: x itself where nothing is needed."""
        extra = self.padded_group - self.group
        if not extra or self.groups == 1:
            return x
        apart = x.unflatten(-1, (self.groups, self.group))
        return functional.pad(apart, (0, extra)).flatten(-2)

    def unpad_inputs(self, x: Tensor) -> Tensor:
        """The inverse of `pad_inputs`, for rows [..., width]."""
        if self.groups == 1:
            return x[..., : self.inputs]
        apart = x[..., : self.groups * self.padded_group]
        apart = apart.unflatten(-1, (self.groups, self.padded_group))
        return apart[..., : self.group].flatten(-2)


def pack_codes(codes: Tensor, layout: Layout) -> Tensor:
    """codes int8 [..., N, K] -> int8 [..., ceil(N / TILE), blocks, TILE, row bytes]."""
    rows = codes.shape[-2]
    wide = layout.pad_inputs(codes)
    wide = functional.pad(wide, (0, layout.width - wide.shape[-1], 0, -rows % TILE))
    cells = wide.unflatten(-1, (layout.blocks, 2, layout.unit))  # [..., N, blocks, 2, H]
    if layout.bits == 4:
        cells = (cells[..., 0, :] & 0x0F) | (cells[..., 1, :] << 4)
    else:
        cells = cells.flatten(-2)
    return cells.unflatten(-3, (-1, TILE)).transpose(-3, -2).contiguous()


def _expand(cells: Tensor, layout: Layout) -> Tensor:
    """Stored rows [..., blocks, row bytes] -> codes [..., K]."""
    if layout.bits == 4:
        cells = torch.cat(((cells << 4) >> 4, cells >> 4), dim=-1)
    return layout.unpad_inputs(cells.flatten(-2))


def unpack_codes(data: Tensor, rows: int, layout: Layout) -> Tensor:
    """The codes int8 [..., rows, K] that `pack_codes` was given."""
    cells = data.transpose(-3, -2).flatten(-4, -3)[..., :rows, :, :]
    return _expand(cells, layout).contiguous()


def select_codes(data: Tensor, rows: Tensor, layout: Layout) -> Tensor:
    """Codes int8 [T, K] of the output channels `rows` int64 [T], without unpacking the others."""
    return _expand(data[rows // TILE, :, rows % TILE], layout)


# -- whole weights ---------------------------------------------------------------------------------


def layout_of(packed: PackedWeight) -> Layout:
    """Where the inputs of `packed` lie in the GPU's layout."""
    return Layout(packed.inputs, packed.group_size or packed.inputs, packed.bits)


def is_gpu_layout(packed: PackedWeight) -> bool:
    """Whether `packed` is in this layout: its bytes are signed, the CPU's are not."""
    return packed.data.dtype == torch.int8


def pack_parts(codes: Tensor, group_scales: Tensor | None, packed: PackedWeight) -> PackedWeight:
    """`packed` with its codes int8 [..., N, K] and group scales [..., N, G] in this layout. Raises
    ConfigError for groups whose sums could leave 32 bits."""
    layout = layout_of(packed)
    if layout.group > LARGEST_GROUP:
        raise ConfigError(
            f"a sum over {layout.group} inputs may leave 32 bits on a GPU; use a group_size of at "
            f"most {LARGEST_GROUP}"
        )
    if group_scales is not None:
        group_scales = group_scales.transpose(-2, -1).contiguous()  # [..., G, N]
    return packed._replace(data=pack_codes(codes, layout), group_scales=group_scales)


def unpack_parts(packed: PackedWeight) -> tuple[Tensor, Tensor | None]:
    """Codes int8 [..., N, K] and group scales [..., N, G] of a weight in this layout."""
    scales = packed.group_scales
    codes = unpack_codes(packed.data, packed.outputs, layout_of(packed))
    return codes, None if scales is None else scales.transpose(-2, -1).contiguous()


def empty_parts(packed: PackedWeight, device: torch.device | str) -> PackedWeight:
    """On `device`, without values, what a weight of the shapes of `packed`, in the CPU's layout,
    becomes in this one."""
    layout, lead = layout_of(packed), packed.factor.shape[:-1]
    tiles, scales = -(-packed.outputs // TILE), packed.group_scales
    shape = (*lead, tiles, layout.blocks, TILE, layout.row_bytes)
    if scales is not None:
        kind = scales.dtype
        scales = torch.empty(*lead, layout.groups, packed.outputs, dtype=kind, device=device)
    return packed._replace(
        data=torch.empty(shape, dtype=torch.int8, device=device),
        factor=torch.empty(*lead, packed.outputs, device=device),
        group_scales=scales,
    )


def select_rows(packed: PackedWeight, rows: Tensor) -> Tensor:
    """float32 [..., K]: the matrix's `rows` int64 [...], of a weight in this layout."""
    layout = layout_of(packed)
    flat = rows.reshape(-1)
    values = select_codes(packed.data, flat, layout).float()
    scales = packed.factor[flat][:, None]
    if packed.group_scales is not None:
        scales = packed.group_scales[:, flat].T.float() * scales
    values = values.unflatten(-1, (layout.groups, layout.group)) * scales[..., None]
    return values.reshape(*rows.shape, layout.inputs)
