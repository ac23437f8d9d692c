"""How a quantised matrix lies in a checkpoint: the two integer formats of compressed-tensors.

Per linear of weight [N, K] with G scales per output channel:

    int-quantized    weight          int8 [N, K], one code per byte, whatever its bits
    pack-quantized   weight_packed   int32 [N, ceil(K bits / 32)], code k of a row (plus 2^(bits-1))
                                     at bits `bits (k mod 32 / bits)` of its word, lowest first
                     weight_shape    int64 [2] = (N, K)
    both             weight_scale    floating [N, G]
                     input_scale     floating [1], static activations only
                     weight_zero_point  int8 [N, G], packed along N in pack-quantized
                     weight_g_idx    int32 [K], group of each input; activation order only

Integer scales have no field in the standard: `weight_scale` holds integer * row_factor, so that
other engines compute the same model, and `weight_row_factor` [N] goes into a file that only Serval
reads (`checkpoint.files.PRIVATE`); the integers are recovered exactly by division.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from serval.compress.scheme import QuantizedWeight, WeightScheme
from serval.errors import CheckpointError, ConfigError

Format = Literal["int-quantized", "pack-quantized"]
FORMATS: tuple[Format, ...] = ("int-quantized", "pack-quantized")
Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]

ROW_FACTOR = "weight_row_factor"


def default_format(scheme: WeightScheme) -> Format:
    """4 bits packed: half the bytes, and what most engines read; 8 bits as plain int8."""
    return "pack-quantized" if scheme.bits == 4 else "int-quantized"


def check_format(name: str | None) -> Format | None:
    """`name` if it is a format or None; raises ConfigError."""
    if name is not None and name not in FORMATS:
        raise ConfigError(f"format is {name!r}; expected one of: {', '.join(FORMATS)}")
    return name


@dataclass(frozen=True)
class Storage:
    """Scheme, format and dtypes of one stored matrix.

    scale_dtype: of scales and bias. zero_points, group_index, input_zero_point: whether those
    tensors are stored (checkpoints made elsewhere).
    """

    scheme: WeightScheme
    format: Format
    scale_dtype: torch.dtype = torch.float32
    zero_points: bool = False
    group_index: bool = False
    input_zero_point: bool = False

    @classmethod
    def of(cls, weight: QuantizedWeight, format: Format | None = None) -> Storage:
        """How to store `weight`; format None: the scheme's default."""
        return cls(
            weight.scheme,
            format or default_format(weight.scheme),
            # a product of integer and factor needs float32 to be exact enough to be recovered
            torch.float32 if weight.integer is not None else weight.scale_dtype,
            weight.zero_points is not None,
            weight.order is not None,
        )

    def spec(self, rows: int, columns: int) -> Spec:
        """Shape and dtype of each stored tensor of a matrix [rows, columns]."""
        groups = self.scheme.groups(columns)
        packed = self.format == "pack-quantized"
        per_word = 32 // self.scheme.bits
        if packed:
            words = -(-columns // per_word)
            spec: Spec = {
                "weight_packed": ((rows, words), torch.int32),
                "weight_shape": ((2,), torch.int64),
            }
        else:
            spec = {"weight": ((rows, columns), torch.int8)}
        spec["weight_scale"] = ((rows, groups), self.scale_dtype)
        if self.zero_points:
            words = -(-rows // per_word)
            plain = ((rows, groups), torch.int8)
            spec["weight_zero_point"] = ((words, groups), torch.int32) if packed else plain
        if self.group_index:
            spec["weight_g_idx"] = ((columns,), torch.int32)
        if self.scheme.scales == "integer":
            spec[ROW_FACTOR] = ((rows,), torch.float32)
        if self.scheme.activations == "static":
            spec["input_scale"] = ((1,), self.scale_dtype)
            if self.input_zero_point:
                spec["input_zero_point"] = ((1,), torch.int8)
        return spec

    def encode(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The stored tensors of `weight`, those of `spec`."""
        codes = weight.codes
        if weight.order is not None:
            codes = torch.empty_like(codes).index_copy_(1, weight.order.to(codes.device), codes)
        tensors = {"weight_scale": weight.scales.to(self.scale_dtype)}
        if self.format == "pack-quantized":
            tensors["weight_packed"] = pack_int32(codes, self.scheme.bits)
            tensors["weight_shape"] = torch.tensor(codes.shape)
        else:
            tensors["weight"] = codes
        if weight.zero_points is not None:
            zeros = weight.zero_points
            packed = self.format == "pack-quantized"
            tensors["weight_zero_point"] = (
                pack_int32(zeros.T, self.scheme.bits).T.contiguous() if packed else zeros
            )
        if weight.order is not None:
            size = codes.shape[1] // weight.scales.shape[1]
            place = weight.order.argsort()  # of each input among the columns
            tensors["weight_g_idx"] = (place // size).to(codes.device, torch.int32)
        if weight.row_factor is not None:
            tensors[ROW_FACTOR] = weight.row_factor
        if self.scheme.activations == "static":
            assert weight.input_scale is not None
            tensors["input_scale"] = torch.tensor([weight.input_scale]).to(self.scale_dtype)
            if self.input_zero_point:
                tensors["input_zero_point"] = torch.zeros(1, dtype=torch.int8)
        return tensors

    def decode(
        self,
        tensors: Mapping[str, Tensor],
        name: str = "",
        shape: tuple[int, int] | None = None,
    ) -> QuantizedWeight:
        """The matrix whose stored tensors are given; `name` is the module's for error messages,
        `shape` what the model expects. Raises CheckpointError, beginning with the tensor's name,
        when they contradict each other or the scheme."""
        at = f"{name}." if name else ""
        bits = self.scheme.bits
        scales = tensors["weight_scale"].float()
        if self.format == "pack-quantized":
            rows, columns = tensors["weight_shape"].tolist()
            packed = tensors["weight_packed"]
            fits = rows == packed.shape[0] and -(-columns * bits // 32) == packed.shape[1]
            if not fits or (shape is not None and shape != (rows, columns)):
                raise CheckpointError(
                    f"{at}weight_shape is ({rows}, {columns}), which does not fit "
                    f"weight_packed {tuple(packed.shape)} of {bits} bits"
                    + ("" if shape is None else f" of a matrix {shape}")
                )
            codes = unpack_int32(packed, bits, columns)
        else:
            codes = tensors["weight"]
            if bits < 8:
                low, high = codes.aminmax()
                if low < self.scheme.lowest or high > self.scheme.highest:
                    raise CheckpointError(
                        f"{at}weight holds codes from {int(low)} to {int(high)}; {bits} bits "
                        f"reach from {self.scheme.lowest} to {self.scheme.highest}"
                    )
        if not torch.isfinite(scales).all():
            raise CheckpointError(f"{at}weight_scale holds NaN or infinity")
        weight = QuantizedWeight(codes, scales, self.scheme, self.scale_dtype)
        if self.zero_points:
            self._decode_zero_points(weight, tensors["weight_zero_point"], at)
        if self.group_index:
            _decode_order(weight, tensors["weight_g_idx"], at)
        if self.scheme.scales == "integer":
            weight.row_factor = tensors[ROW_FACTOR]
            weight.integer = _integers(scales, weight.row_factor, at)
        if self.scheme.activations == "static":
            weight.input_scale = float(tensors["input_scale"])
            if not 0 < weight.input_scale < float("inf"):
                raise CheckpointError(
                    f"{at}input_scale is {weight.input_scale}; a scale is a positive number"
                )
            if self.input_zero_point and tensors["input_zero_point"].any():
                raise CheckpointError(
                    f"{at}input_zero_point is not 0; Serval reads symmetric activations only"
                )
        return weight

    def _decode_zero_points(self, weight: QuantizedWeight, zeros: Tensor, at: str) -> None:
        if self.format == "pack-quantized":
            zeros = unpack_int32(zeros.T, self.scheme.bits, weight.codes.shape[0]).T.contiguous()
        if not zeros.any():
            return
        if self.scheme.activations != "none":
            raise CheckpointError(
                f"{at}weight_zero_point is not 0; with quantised activations Serval reads "
                "symmetric weights only"
            )
        weight.zero_points = zeros

    def group(self, targets: list[str]) -> dict[str, Any]:
        """The config group (`quantization_config.config_groups`) of `targets` stored like this."""
        scheme, per_group = self.scheme, self.scheme.group_size is not None
        weights = {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": not self.zero_points,
            "strategy": "group" if per_group else "channel",
            "group_size": scheme.group_size,
            "dynamic": False,
            "actorder": "group" if self.group_index else None,
        }
        inputs = None
        if scheme.activations != "none":
            dynamic = scheme.activations == "token"
            inputs = {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token" if dynamic else "tensor",
                "group_size": None,
                "dynamic": dynamic,
            }
        return {
            "targets": targets,
            # said here too, or readers take W4A8 for int-quantized
            "format": self.format,
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
        }

    def for_table(self) -> Storage:
        """Of an embedding: its input are token ids, which no config group quantises."""
        return dataclasses.replace(
            self, scheme=dataclasses.replace(self.scheme, activations="none")
        )


def _integers(scales: Tensor, factor: Tensor, at: str) -> Tensor:
    """The int16 [N, G] whose products with factor [N] are `scales`."""
    ratio = scales / factor.unsqueeze(1)
    integer = ratio.round()
    whole = (ratio - integer).abs() < 0.05  # float32 products are off by 0.004 at most
    if not (whole & (integer.abs() < 2**15)).all():
        raise CheckpointError(
            f"{at}weight_scale is not a 16-bit integer times {at}{ROW_FACTOR}; the two files "
            "do not belong together"
        )
    return integer.to(torch.int16)


def _decode_order(weight: QuantizedWeight, index: Tensor, at: str) -> None:
    """Sort columns into runs of one group each."""
    columns, groups = weight.codes.shape[1], weight.scales.shape[1]
    if (index == -1).all():
        return  # declared but not used
    expected = torch.arange(columns, dtype=index.dtype) // (columns // groups)
    if torch.equal(index, expected):
        return
    order = index.argsort(stable=True)
    if not torch.equal(index[order], expected):
        raise CheckpointError(
            f"{at}weight_g_idx does not put {columns // groups} inputs into each of {groups} groups"
        )
    weight.order = order
    weight.codes = weight.codes[:, order].contiguous()


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """int8 [R, C] of 4 or 8 bits -> int32 [R, ceil(C bits / 32)], as in the module's docstring."""
    rows, columns = codes.shape
    per_word = 32 // bits
    unsigned = codes.contiguous().view(torch.uint8) + (1 << (bits - 1))  # modulo 256
    unsigned = F.pad(unsigned, (0, -columns % per_word))
    if bits == 4:
        unsigned = unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)
    return unsigned.reshape(-1).view(torch.int32).view(rows, -1)  # flat: strides of 1 row vary


def unpack_int32(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_int32`: int8 [R, columns]."""
    unsigned = packed.reshape(-1).view(torch.uint8).view(packed.shape[0], -1)
    if bits == 4:
        unsigned = torch.stack([unsigned & 15, unsigned >> 4], dim=-1).flatten(1)
    return (unsigned[:, :columns] - (1 << (bits - 1))).view(torch.int8).contiguous()
