"""A Llama as OpenVINO IR with int4 weights, for the OpenVINO GenAI peer; nothing is downloaded.

The graph is what optimum-intel exports with `--weight-format int4 --sym --group-size 128` (its
default group for most models): linears are int4 with a float16 scale per group of 128 inputs,
embedding and head int8 with a scale per row, rotary embedding, a stateful cache and scaled dot
product attention are the subgraphs that OpenVINO's passes know and fuse. As a script it writes the
file of random weights: `python -m serval.bench.openvino_model SHAPE DIRECTORY`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from serval.bench.harness import MissingPeerError
from serval.compress.scheme import QuantizedWeight, WeightScheme
from serval.models.config import ModelConfig
from serval.models.layers import inverse_frequencies

INSTALL = "pip install 'serval-llm[bench]'"
GROUP = 128  # inputs that share a scale
FILE = "openvino_model.xml"

# (Hugging Face name, [rows, columns]) -> the matrix as int4 groups, or int8 rows for the embedding
Weights = Callable[[str, tuple[int, int]], QuantizedWeight]


def group_of(columns: int) -> int:
    """Inputs per scale of a matrix with so many inputs."""
    return GROUP if columns % GROUP == 0 else columns


def scheme_of(name: str, columns: int) -> WeightScheme:
    """What OpenVINO's exporter would choose for the matrix `name`."""
    if "embed_tokens" in name:
        return WeightScheme(8, None, "none")
    return WeightScheme(4, group_of(columns), "none")


def import_openvino() -> Any:
    """The `openvino` package; raises MissingPeerError."""
    try:
        import openvino
    except ImportError as error:
        raise MissingPeerError("openvino-genai", INSTALL) from error
    return openvino


def build(config: ModelConfig, weights: Weights) -> Any:
    """The `openvino.Model`: input_ids, attention_mask, position_ids, beam_idx -> logits
    [batch, tokens, vocabulary]. config: a dense Llama with tied embeddings."""
    return _Builder(config, weights).model()


class _Builder:
    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        import_openvino()
        import openvino.opset13 as ops
        from openvino import Model, PartialShape, Tensor, Type
        from openvino.op import Constant
        from openvino.op.util import Variable, VariableInfo

        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        self.config, self.weights, self.ops = config, weights, ops
        self.Model, self.Tensor, self.Constant, self.Type = Model, Tensor, Constant, Type
        self.Variable, self.VariableInfo = Variable, VariableInfo
        self.PartialShape = PartialShape
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.sinks: list[Any] = []
        self.variables: list[Any] = []

    # -- constants ---------------------------------------------------------------------------------

    def ints(self, *values: int) -> Any:
        return self.ops.constant(np.array(values, np.int64))

    def float(self, value: Any) -> Any:
        return self.ops.constant(np.asarray(value, np.float32))

    def constant(self, codes: np.ndarray, shape: list[int], type_: Any) -> Any:
        return self.Constant(self.Tensor(codes, shape, type_), False)  # a copy

    def matrix(self, name: str, shape: tuple[int, int]) -> Any:
        """float32 [rows, columns] from int4 groups."""
        made = self.weights(name, shape)
        rows, columns = shape
        groups = made.scales.shape[1]
        nibbles = made.codes.numpy().view(np.uint8) & 15
        packed = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
        codes = self.constant(packed, [rows, groups, columns // groups], self.Type.i4)
        scales = made.scales.numpy().astype(np.float16)[..., None]
        wide = self.ops.multiply(self.ops.convert(codes, "f16"), self.ops.constant(scales))
        return self.ops.convert(self.ops.reshape(wide, self.ints(*shape), False), "f32")

    def table(self, name: str, shape: tuple[int, int]) -> Any:
        """float32 [rows, columns] from int8 rows."""
        made = self.weights(name, shape)
        codes = self.ops.constant(made.codes.numpy())
        scales = self.ops.constant(made.scales.numpy().astype(np.float16))
        return self.ops.convert(self.ops.multiply(self.ops.convert(codes, "f16"), scales), "f32")

    # -- layers ------------------------------------------------------------------------------------

    def linear(self, x: Any, name: str, outputs: int, inputs: int) -> Any:
        return self.ops.matmul(x, self.matrix(f"{name}.weight", (outputs, inputs)), False, True)

    def norm(self, x: Any) -> Any:
        """RMSNorm with gains of one, which random models have."""
        ops = self.ops
        square = ops.reduce_mean(ops.power(x, self.float(2.0)), self.ints(-1), keep_dims=True)
        root = ops.sqrt(ops.add(square, self.float(self.config.rms_norm_eps)))
        gain = self.float(np.ones((1, 1, self.config.hidden_size)))
        return ops.multiply(ops.multiply(x, ops.divide(self.float(1.0), root)), gain)

    def rotary(self, positions: Any) -> tuple[Any, Any]:
        """cos and sin, float32 [batch, 1, tokens, head_dim]."""
        ops, config = self.ops, self.config
        inverse, factor = inverse_frequencies(
            config.rope, self.head_dim, config.max_position_embeddings
        )
        assert factor == 1.0
        place = ops.unsqueeze(ops.convert(positions, "f32"), self.ints(-1))
        angles = ops.multiply(place, self.float(inverse.numpy().reshape(1, 1, -1)))
        both = ops.concat([angles, angles], -1)
        return tuple(ops.unsqueeze(f(both), self.ints(1)) for f in (ops.cos, ops.sin))  # type: ignore[return-value]

    def rotate(self, x: Any, cos: Any, sin: Any) -> Any:
        """x [batch, heads, tokens, head_dim], halves (i, i + head_dim / 2) rotated."""
        ops, half = self.ops, self.head_dim // 2
        step, axis = self.ints(1), self.ints(3)
        upper = ops.slice(x, self.ints(half), self.ints(2**62), step, axis)
        lower = ops.slice(x, self.ints(0), self.ints(half), step, axis)
        turned = ops.concat([ops.multiply(upper, self.float(-1.0)), lower], -1)
        return ops.add(ops.multiply(x, cos), ops.multiply(turned, sin))

    def split(self, x: Any, heads: int) -> Any:
        """[batch, tokens, heads * head_dim] -> [batch, heads, tokens, head_dim]."""
        ops = self.ops
        apart = ops.reshape(x, self.ints(0, 0, heads, self.head_dim), True)
        return ops.transpose(apart, self.ints(0, 2, 1, 3))

    def cached(self, new: Any, name: str, start: Any, beams: Any) -> Any:
        """`new` behind what the state holds, [batch, kv heads, all tokens, head_dim]."""
        info = self.VariableInfo()
        shape = [-1, self.kv_heads, -1, self.head_dim]
        info.data_shape, info.data_type = self.PartialShape(shape), self.Type.f32
        info.variable_id = name
        variable = self.Variable(info)
        past = self.ops.gather(
            self.ops.read_value(start, variable), beams, self.ops.constant(np.int64(0))
        )
        both = self.ops.concat([past, new], -2)
        self.sinks.append(self.ops.assign(both, variable))
        self.variables.append(variable)
        return both

    def repeated(self, x: Any) -> Any:
        """Each key-value head once for every query head that reads it."""
        ops, times = self.ops, self.heads // self.kv_heads
        if times == 1:
            return x
        wide = ops.unsqueeze(x, self.ints(2))
        wide = ops.broadcast(wide, self.ints(1, 1, times, 1, 1), broadcast_spec="BIDIRECTIONAL")
        return ops.reshape(wide, self.ints(0, self.heads, -1, self.head_dim), True)

    def attention(self, x: Any, layer: int, common: dict[str, Any]) -> Any:
        ops, hidden = self.ops, self.config.hidden_size
        name, inner = f"model.layers.{layer}.self_attn", self.heads * self.head_dim
        outer = self.kv_heads * self.head_dim
        q = self.split(self.linear(x, f"{name}.q_proj", inner, hidden), self.heads)
        k = self.split(self.linear(x, f"{name}.k_proj", outer, hidden), self.kv_heads)
        v = self.split(self.linear(x, f"{name}.v_proj", outer, hidden), self.kv_heads)
        q, k = (self.rotate(y, common["cos"], common["sin"]) for y in (q, k))
        start, beams = common["start"], common["beams"]
        k = self.cached(k, f"past_key_values.{layer}.keypresent.{layer}.key", start, beams)
        v = self.cached(v, f"past_key_values.{layer}.valuepresent.{layer}.value", start, beams)
        out = ops.scaled_dot_product_attention(
            q, self.repeated(k), self.repeated(v), common["mask"]
        )
        flat = ops.reshape(ops.transpose(out, self.ints(0, 2, 1, 3)), self.ints(0, 0, inner), True)
        return self.linear(flat, f"{name}.o_proj", hidden, inner)

    def feedforward(self, x: Any, layer: int) -> Any:
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        name = f"model.layers.{layer}.mlp"
        gate = self.ops.swish(self.linear(x, f"{name}.gate_proj", inner, hidden))
        up = self.linear(x, f"{name}.up_proj", inner, hidden)
        return self.linear(self.ops.multiply(gate, up), f"{name}.down_proj", hidden, inner)

    def mask(self, attention_mask: Any, tokens: Any, total: Any) -> Any:
        """bool [batch, 1, tokens, total]: no token sees a later one or padding."""
        ops, zero, one = self.ops, self.ops.constant(np.int64(0)), self.ops.constant(np.int64(1))
        keys = ops.range(zero, total, one, "i64")
        queries = ops.range(ops.subtract(total, tokens), total, one, "i64")
        causal = ops.less_equal(
            ops.unsqueeze(keys, self.ints(0, 1, 2)), ops.unsqueeze(queries, self.ints(0, 1, 3))
        )
        seen = ops.convert(ops.unsqueeze(attention_mask, self.ints(1, 2)), "boolean")
        return ops.logical_and(causal, seen)

    def model(self) -> Any:
        ops, config = self.ops, self.config
        names = ("input_ids", "attention_mask", "position_ids")
        inputs = [ops.parameter([-1, -1], np.int64, name=name) for name in names]
        inputs.append(ops.parameter([-1], np.int32, name="beam_idx"))
        for node in inputs:
            node.output(0).get_tensor().set_names({node.get_friendly_name()})
        ids, attention_mask, positions, beams = inputs
        scalar = self.ops.constant(np.int64(0))

        def size(node: Any, axis: int) -> Any:
            return ops.gather(ops.shape_of(node), self.ops.constant(np.int64(axis)), scalar)

        batch = ops.unsqueeze(size(ids, 0), self.ints(0))
        empty = ops.concat([batch, self.ints(self.kv_heads, 0, self.head_dim)], 0)
        cos, sin = self.rotary(positions)
        common = {
            "cos": cos,
            "sin": sin,
            "beams": beams,
            "start": ops.broadcast(self.float(0.0), empty),
            "mask": self.mask(attention_mask, size(ids, 1), size(attention_mask, 1)),
        }
        table = self.table("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
        x = ops.gather(table, ops.convert(ids, "i32"), self.ops.constant(np.int64(0)))
        for layer in range(config.num_hidden_layers):
            x = ops.add(x, self.attention(self.norm(x), layer, common))
            x = ops.add(x, self.feedforward(self.norm(x), layer))
        logits = ops.matmul(self.norm(x), table, False, True)
        result = ops.result(logits, name="logits")
        result.output(0).get_tensor().set_names({"logits"})
        return self.Model([result], self.sinks, inputs, self.variables, config.family)


def write(config: ModelConfig, weights: Weights, directory: Path) -> None:
    """Write the model into `directory`, complete or not at all."""
    openvino = import_openvino()
    temporary = directory.with_name(directory.name + ".writing")
    temporary.mkdir(parents=True, exist_ok=True)
    openvino.save_model(build(config, weights), temporary / FILE, compress_to_fp16=False)
    temporary.rename(directory)


def _write_random(shape: str, directory: Path) -> None:
    from serval.bench.ours import random_weight
    from serval.bench.shapes import SHAPES

    count = 0

    def weights(name: str, size: tuple[int, int]) -> QuantizedWeight:
        nonlocal count
        count += 1  # layers differ, or OpenVINO would keep one matrix for all of them
        made = random_weight(*size, scheme_of(name, size[1]))
        made.codes = made.codes.roll(count * 997)
        return made

    write(SHAPES[shape], weights, directory)


if __name__ == "__main__":
    _write_random(sys.argv[1], Path(sys.argv[2]))
