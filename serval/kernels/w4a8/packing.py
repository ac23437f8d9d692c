"""The one layout of quantised weights that all w4a8 kernels read.

Sixteen output channels are a panel. A cell is 64 bytes, four per channel, so that each 32-bit lane
of a register belongs to one output channel: products need no horizontal sums, and one cell is one
AVX-512 register or two AVX2 registers. Codes are stored unsigned, as `vpmaddubsw` and `vpdpbusd`
want them; the kernels' sums start at minus what the offset adds.

    8 bits: byte i of a channel = w[k + i] + 128                                cell: 4 inputs
    4 bits: byte i = (w[k + i] + 8) | (w[k + 4 + i] + 8) << 4,   i < 4          cell: 8 inputs

A group whose size is no multiple of the cell is padded to one, so every group begins with a cell.
What is missing, channels or inputs, is stored as code 0.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from serval.errors import ConfigError
from serval.kernels import pages
from serval.kernels.w4a8 import gpu_layout
from serval.kernels.w4a8.overflow import INT32_MAX, LARGEST_ACTIVATION, accumulator_bound

PANEL = 16  # output channels in a panel
CELL_INPUTS = {8: 4, 4: 8}  # inputs in a cell by bits
_CHUNK = 64  # panels packed at a time: bounds the temporary memory

Mode = Literal["channel", "integer", "float"]


class PackedWeight(NamedTuple):
    """A matrix [N, K] ready for the kernels, or a stack of E of them (each tensor then has a
    leading dimension E). The tensors may be registered as buffers.

    Shapes are of the CPU's layout; GPUs have their own (gpu_layout.py), reached by `relayout`.

    data: uint8 [panels, cells, 16, 4], see the module. factor: float32 [N], what the finished sum
    of a channel is multiplied by: its scale, its row factor with integer scales, 1 with float
    group scales. group_scales: int16 or float32 [panels, G, 16]; None with one scale per channel.
    group_size: inputs of a group; None with one scale per channel.
    """

    data: Tensor
    factor: Tensor
    group_scales: Tensor | None
    bits: int
    inputs: int
    group_size: int | None

    @property
    def mode(self) -> Mode:
        """How scales are applied."""
        if self.group_scales is None:
            return "channel"
        return "integer" if self.group_scales.dtype == torch.int16 else "float"

    @property
    def outputs(self) -> int:
        """N."""
        return self.factor.shape[-1]

    @property
    def groups(self) -> int:
        """Scales per output channel."""
        return 1 if self.group_size is None else self.inputs // self.group_size

    @property
    def experts(self) -> int | None:
        """Matrices in a stack; None for a single matrix."""
        return self.data.shape[0] if self.data.dim() == 5 else None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in (self.data, self.factor, self.group_scales) if t is not None)

    def expert(self, index: int) -> PackedWeight:
        """One matrix of a stack, without copying."""
        scales = None if self.group_scales is None else self.group_scales[index]
        return self._replace(data=self.data[index], factor=self.factor[index], group_scales=scales)

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on another device, in the layout of that device's kernels."""
        scales = None if self.group_scales is None else self.group_scales.to(device)
        return self._replace(
            data=self.data.to(device), factor=self.factor.to(device), group_scales=scales
        ).native()

    def native(self) -> PackedWeight:
        """The same weight in the layout that the kernels of its device read."""
        if self.data.is_meta:
            return self
        return relayout(self, "gpu" if self.data.is_cuda else "cpu")


def padded_group(bits: int, inputs: int, group_size: int | None) -> int:
    """Inputs that a group takes in the packed form."""
    depth = CELL_INPUTS[bits]
    return -(-(group_size or inputs) // depth) * depth


def empty_packed_weight(
    outputs: int,
    inputs: int,
    *,
    bits: int,
    group_size: int | None = None,
    mode: Mode = "channel",
    experts: int | None = None,
    device: torch.device | str = "meta",
) -> PackedWeight:
    """A PackedWeight of the right shapes without values, in the layout of the device's kernels.
    Raises ConfigError as `pack_weight`."""
    _check_scheme(bits, inputs, group_size, mode)
    if torch.device(device).type == "cuda":
        like = _empty(outputs, inputs, bits, group_size, mode, experts, "meta")
        return gpu_layout.empty_parts(like, device)
    return _empty(outputs, inputs, bits, group_size, mode, experts, device)


def _empty(
    outputs: int,
    inputs: int,
    bits: int,
    group_size: int | None,
    mode: Mode,
    experts: int | None,
    device: torch.device | str,
) -> PackedWeight:
    """`empty_packed_weight` in the CPU's layout."""
    panels, groups = -(-outputs // PANEL), 1 if group_size is None else inputs // group_size
    cells = groups * padded_group(bits, inputs, group_size) // CELL_INPUTS[bits]
    lead = () if experts is None else (experts,)
    kinds = {"channel": None, "integer": torch.int16, "float": torch.float32}
    kind, scales = kinds[mode], None
    if kind is not None:
        scales = torch.empty(*lead, panels, groups, PANEL, dtype=kind, device=device)
    return PackedWeight(
        pages.zeros(*lead, panels, cells, PANEL, 4, dtype=torch.uint8, device=device),
        torch.empty(*lead, outputs, device=device),
        scales,
        bits,
        inputs,
        group_size,
    )


def _check_scheme(bits: int, inputs: int, group_size: int | None, mode: Mode) -> None:
    if bits not in CELL_INPUTS:
        raise ConfigError(f"packed weights have 4 or 8 bits, got bits={bits}")
    if group_size is not None and (group_size < 1 or inputs % group_size):
        raise ConfigError(
            f"group_size={group_size} does not divide the {inputs} inputs of the matrix; choose a "
            "divisor, or None for one scale per output channel"
        )
    if (group_size is None) != (mode == "channel"):
        raise ConfigError(
            "integer and float group scales need a group_size, one scale per channel has none; "
            f"got {mode} scales and group_size={group_size}"
        )


def pack_weight(
    codes: Tensor,
    scales: Tensor,
    *,
    bits: int,
    group_size: int | None = None,
    integer: Tensor | None = None,
    row_factor: Tensor | None = None,
) -> PackedWeight:
    """Lay out a quantised matrix for the kernels of the device that `codes` are on.

    codes: int8 [N, K] in [-8, 7] or [-128, 127]. scales: float32 [N, G] (or [N] when G = 1).
    integer, row_factor: int16 [N, G] and float32 [N], whose product then replaces `scales`
    (Integer Scale, arXiv 2405.14597).

    Raises ValueError when shapes, dtypes or codes do not fit, ConfigError when a row's sum could
    leave 32 bits: it must satisfy `127 * sum_g |I[n, g]| * sum_{k in g} |q[n, k]| <= 2^31 - 1`.
    """
    if codes.dim() != 2 or codes.dtype != torch.int8:
        raise ValueError(
            f"pack_weight got codes {codes.dtype} {tuple(codes.shape)}; it expects int8 [N, K]"
        )
    n, k = codes.shape
    if (integer is None) != (row_factor is None):
        raise ValueError("pack_weight takes integer scales and row_factor together, or neither")
    mode: Mode = "integer" if integer is not None else "float" if group_size else "channel"
    _check_scheme(bits, k, group_size, mode)
    groups = 1 if group_size is None else k // group_size
    _check_scales(n, groups, scales, integer, row_factor)
    packed = _empty(n, k, bits, group_size, mode, None, codes.device)
    if codes.is_meta:
        return packed
    for first in range(0, n, _CHUNK * PANEL):
        rows = slice(first, min(first + _CHUNK * PANEL, n))
        part = codes[rows].view(-1, groups, k // groups)
        _check_codes(part, bits, None if integer is None else integer[rows], first)
        panels = slice(first // PANEL, -(-rows.stop // PANEL))
        packed.data[panels] = _cells(part, bits)
    if integer is not None and row_factor is not None and packed.group_scales is not None:
        packed.factor.copy_(row_factor.detach().reshape(n))
        _panels(integer, packed.group_scales)
    elif packed.group_scales is not None:
        packed.factor.fill_(1.0)
        _panels(scales.detach().float().reshape(n, groups), packed.group_scales)
    else:
        packed.factor.copy_(scales.detach().reshape(n))
    return packed.native()


def _check_scales(
    n: int, groups: int, scales: Tensor, integer: Tensor | None, row_factor: Tensor | None
) -> None:
    if scales.numel() != n * groups or scales.shape[0] != n:
        raise ValueError(
            f"pack_weight got scales {tuple(scales.shape)} for {n} channels of {groups} groups; "
            f"it expects [{n}, {groups}]"
        )
    if integer is None or row_factor is None:
        return
    if integer.dtype != torch.int16 or tuple(integer.shape) != (n, groups):
        raise ValueError(
            f"pack_weight got integer scales {integer.dtype} {tuple(integer.shape)}; it expects "
            f"int16 [{n}, {groups}]"
        )
    if row_factor.numel() != n:
        raise ValueError(f"pack_weight got {row_factor.numel()} row factors for {n} channels")


def _check_codes(codes: Tensor, bits: int, integer: Tensor | None, first: int) -> None:
    """codes: [rows, G, g]; the rows begin at channel `first`."""
    if bits == 4 and codes.numel() and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise ValueError(
            f"pack_weight got 4-bit codes from {int(codes.min())} to {int(codes.max())}; they must "
            "lie in [-8, 7]"
        )
    rows, groups, size = codes.shape
    # Were every code the largest there is: mostly that fits, and codes need not be summed.
    largest = LARGEST_ACTIVATION * (1 << (bits - 1)) * size
    factors = 1 if integer is None else int(integer.long().abs().sum(-1).max()) if rows else 0
    if largest * factors <= INT32_MAX:
        return
    if integer is not None:
        bounds = accumulator_bound(codes.reshape(rows, -1), integer)
    else:  # every group has a sum of its own
        bounds = accumulator_bound(codes.reshape(-1, size)).view(rows, groups).amax(-1)
    over = bounds > INT32_MAX
    if bool(over.any()):
        row = int(over.nonzero()[0])
        raise ConfigError(
            f"channel {first + row} could overflow 32 bits: 127 * sum(|scale| * |code|) = "
            f"{int(bounds[row])} > {INT32_MAX}; use smaller integer scales for this channel"
        )


def _cells(codes: Tensor, bits: int) -> Tensor:
    """int8 [rows, G, g] -> uint8 [panels, cells, 16, 4]."""
    rows, groups, size = codes.shape
    depth = CELL_INPUTS[bits]
    length, panels = -(-size // depth) * depth, -(-rows // PANEL)
    padded = codes.new_zeros(panels * PANEL, groups, length)
    padded[:rows, :, :size] = codes
    cells = padded.view(panels, PANEL, -1, depth).transpose(1, 2)  # [panels, cells, 16, depth]
    if bits == 8:
        return cells.contiguous().view(torch.uint8).bitwise_xor_(0x80)
    unsigned = (cells + 8).view(torch.uint8) if cells.numel() else cells.to(torch.uint8)
    return unsigned[..., :4] | unsigned[..., 4:] << 4


def _panels(scales: Tensor, out: Tensor) -> None:
    """[N, G] -> [panels, G, 16]; channels that do not exist get 0."""
    n, groups = scales.shape
    padded = out.new_zeros(out.shape[0] * PANEL, groups)
    padded[:n] = scales
    out.copy_(padded.view(-1, PANEL, groups).transpose(1, 2))


def relayout(packed: PackedWeight, layout: Literal["cpu", "gpu"]) -> PackedWeight:
    """The same weight, or stack, as the kernels of a CPU or a GPU read it; `packed` itself when it
    already is so. Exact both ways. Raises ConfigError where a GPU's sums could leave 32 bits."""
    if gpu_layout.is_gpu_layout(packed) == (layout == "gpu"):
        return packed
    if packed.experts is not None:
        parts = [relayout(packed.expert(index), layout) for index in range(packed.experts)]
        return stack_weights(parts)
    codes, scales = _codes_and_scales(packed)
    if layout == "gpu":
        return gpu_layout.pack_parts(codes, scales, packed)
    made = _empty(
        packed.outputs, packed.inputs, packed.bits, packed.group_size, packed.mode, None,
        packed.data.device,
    )._replace(factor=packed.factor)  # fmt: skip
    made.data.copy_(_cells(codes.unflatten(1, (packed.groups, -1)), packed.bits))
    if scales is not None and made.group_scales is not None:
        _panels(scales, made.group_scales)
    return made


def _codes_and_scales(packed: PackedWeight) -> tuple[Tensor, Tensor | None]:
    """Codes int8 [N, K] and group scales [N, G] as stored, of either layout."""
    if gpu_layout.is_gpu_layout(packed):
        return gpu_layout.unpack_parts(packed)
    n, groups = packed.outputs, packed.groups
    panels = packed.data.shape[0]
    if packed.bits == 8:
        values = packed.data.bitwise_xor(0x80).view(torch.int8)
    else:
        both = torch.cat([packed.data & 0x0F, packed.data >> 4], dim=-1)
        values = both.view(torch.int8) - 8
    length = padded_group(packed.bits, packed.inputs, packed.group_size)
    values = values.transpose(1, 2).reshape(panels * PANEL, groups, length)
    codes = values[:n, :, : packed.inputs // groups].reshape(n, packed.inputs).contiguous()
    if packed.group_scales is None:
        return codes, None
    return codes, packed.group_scales.transpose(1, 2).reshape(-1, groups)[:n].contiguous()


def unpack_weight(packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Recover (codes int8 [N, K], scales float32 [N, G], integer int16 [N, G] or None, row_factor
    float32 [N] or None) exactly; with integer scales, `scales` is the product of the two."""
    codes, scales = _codes_and_scales(packed)
    if scales is None:
        return codes, packed.factor.view(-1, 1), None, None
    if packed.mode == "integer":
        return codes, scales.float() * packed.factor[:, None], scales, packed.factor
    return codes, scales, None, None


def stack_weights(weights: list[PackedWeight]) -> PackedWeight:
    """One stack of matrices of equal shape and scheme, for `quantized_grouped_linear`."""
    first = weights[0]
    for other in weights[1:]:
        if other[3:] != first[3:] or other.mode != first.mode or other.outputs != first.outputs:
            raise ValueError(
                f"stack_weights got {_kind(first)} and {_kind(other)}; all must be alike"
            )
    scales = [w.group_scales for w in weights if w.group_scales is not None]
    return first._replace(
        data=torch.stack([w.data for w in weights]),
        factor=torch.stack([w.factor for w in weights]),
        group_scales=torch.stack(scales) if scales else None,
    )


def _kind(packed: PackedWeight) -> str:
    return (
        f"[{packed.outputs}, {packed.inputs}] of {packed.bits} bits, {packed.mode} scales, "
        f"group_size={packed.group_size}"
    )
