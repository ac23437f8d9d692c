"""GGUF files for llama.cpp: `serval export MODEL --gguf q4_0 --out FILE`.

Layout as llama.cpp's own converter writes it: names `blk.N.attn_q` and so on; for the llama family
rows of q and k permuted per head from half-split to interleaved rotary order; Llama 3's rotary
factors in `rope_freqs.weight`; matrices in the file's type, norms and biases in float32. In a Q4_0
file embedding and head are Q8_0. Values are rounded by the `gguf` package. Tensors are read,
rounded and written one at a time.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serval.compress.gguf_tokenizer import write_tokenizer
from serval.errors import CheckpointError, ConfigError, ServalError
from serval.models import checkpoint
from serval.models.checkpoint.files import list_tensors, locate, read_json
from serval.models.checkpoint.safetensors_file import read_into
from serval.models.config import ModelConfig
from serval.models.layers import inverse_frequencies
from serval.models.variants import require_plain

# (Hugging Face name, shape) -> float32 array of that tensor
Weights = Callable[[str, tuple[int, ...]], np.ndarray]
# (array, GGUF type) -> its bytes as that type
Encode = Callable[[np.ndarray, Any], np.ndarray]

KINDS = ("f32", "f16", "q8_0", "q4_0")
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass
class Exported:
    """What was written. tensors: how many; bytes: of the file."""

    path: Path
    kind: str
    tensors: int
    bytes: int
    seconds: float


def export(model: str | Path, out: str | Path, kind: str = "q4_0", force: bool = False) -> Exported:
    """Write the checkpoint `model` as the GGUF file `out`, complete or not at all.

    kind: one of KINDS. force: replace a file that is there. Raises ConfigError for a model that
    GGUF files of Serval cannot hold, CheckpointError naming a tensor or a full disk, ServalError
    when the `gguf` package is missing.
    """
    start = time.perf_counter()
    directory, out = locate(model), Path(out)
    if out.is_dir() or (out.exists() and not force):
        raise ConfigError(f"--out {out} exists; choose another file, or pass --force")
    if "quantization_config" in read_json(directory / "config.json"):
        raise ConfigError(f"{directory} is quantised; export the float checkpoint it was made from")
    config = checkpoint.read_config(directory)
    require_plain(config, "GGUF export")
    import_gguf()
    stored = list_tensors(directory)
    count = 0

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        nonlocal count
        count += 1
        if name not in stored:
            raise CheckpointError(f"tensor {name!r} is missing from {directory}")
        if stored[name].shape != shape:
            raise CheckpointError(
                f"tensor {name!r} in {stored[name].path} has shape {list(stored[name].shape)}; "
                f"config.json implies {list(shape)}"
            )
        values = torch.empty(shape)
        descriptor = os.open(stored[name].path, os.O_RDONLY)
        try:
            read_into(stored[name], values, descriptor=descriptor)
        finally:
            os.close(descriptor)
        return values.numpy()

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(out, config, read, kind, tokenizer=directory)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error.strerror or error}") from error
    return Exported(out, kind, count, out.stat().st_size, time.perf_counter() - start)


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(GGUF name, Hugging Face name, shape) of every tensor of a dense Llama or Qwen."""
    assert config.head_dim is not None
    assert config.num_key_value_heads is not None
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "attn_q": (q, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, q),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    if config.qk_norm:
        shapes |= {"attn_q_norm": (config.head_dim,), "attn_k_norm": (config.head_dim,)}
    biased = {"attn_q", "attn_k", "attn_v"} if config.qkv_bias else set()
    biased |= {"attn_output"} if config.output_bias else set()
    biased |= {"ffn_gate", "ffn_up", "ffn_down"} if config.mlp_bias else set()
    yield "token_embd.weight", "model.embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        for name, shape in shapes.items():
            ours, theirs = f"blk.{layer}.{name}", f"model.layers.{layer}.{_LAYER_TENSORS[name]}"
            yield f"{ours}.weight", f"{theirs}.weight", shape
            if name in biased:
                yield f"{ours}.bias", f"{theirs}.bias", shape[:1]
    yield "output_norm.weight", "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "output.weight", "lm_head.weight", (config.vocab_size, hidden)


def interleave_heads(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a q or k projection [H D, ...] from half-split to interleaved pairs."""
    rows = weight.shape[0]
    split = weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    config: ModelConfig,
    weights: Weights,
    kind: str = "f16",
    tokenizer: Path | None = None,
    *,
    table_kind: str | None = None,
    encode: Encode | None = None,
) -> Path:
    """Write a GGUF file, complete or not at all.

    weights: called with the Hugging Face name and shape of each tensor, returns it as float32.
    kind: one of KINDS. tokenizer: a checkpoint directory with a byte-level BPE `tokenizer.json`;
    without one the file has no vocabulary and takes token ids only. table_kind: another GGUF type
    for embedding and head. encode: rounds an array to a type instead of the `gguf` package.
    """
    gguf = import_gguf()
    _check(config, kind)
    types = gguf.GGMLQuantizationType
    encode = encode or gguf.quants.quantize
    table_kind = table_kind or {"q4_0": "q8_0"}.get(kind, kind)
    temporary = path.with_name(path.name + ".writing")
    writer = gguf.GGUFWriter(temporary, ARCHITECTURES[config.family])
    try:
        _write_facts(gguf, writer, config, kind)
        if tokenizer is None:
            writer.add_tokenizer_model("none")
            writer.add_vocab_size(config.vocab_size)
        else:
            write_tokenizer(gguf, writer, tokenizer, config)
        plan = []
        for name, hub, shape in tensor_shapes(config):
            table = name in ("token_embd.weight", "output.weight")
            wanted = (
                types.F32 if len(shape) == 1 else types[(table_kind if table else kind).upper()]
            )
            size = gguf.GGML_QUANT_SIZES[wanted][0]
            plan.append((name, hub, shape, types.F16 if shape[-1] % size else wanted))
        factors = _rope_factors(config)
        if factors is not None:
            writer.add_tensor_info(
                "rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes
            )
        for name, _, shape, type_ in plan:
            elements, size = gguf.GGML_QUANT_SIZES[type_]
            nbytes = int(np.prod(shape)) // elements * size
            writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        for name, hub, shape, type_ in plan:
            array = weights(hub, shape)
            permuted = heads.get(name.split(".")[-2])
            if permuted is not None and config.family == "llama":
                array = interleave_heads(array, permuted)
            writer.write_tensor_data(encode(np.ascontiguousarray(array), type_))
        writer.close()
        temporary.replace(path)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    return path


def import_gguf() -> Any:
    """The `gguf` package; raises ServalError."""
    try:
        import gguf
    except ImportError as error:
        raise ServalError("gguf is not installed; run: pip install 'serval-llm[gguf]'") from error
    return gguf


def _check(config: ModelConfig, kind: str) -> None:
    if kind not in KINDS:
        raise ConfigError(f"GGUF type is {kind!r}; expected one of: {', '.join(KINDS)}")
    if config.family not in ARCHITECTURES or config.moe is not None or config.mla is not None:
        raise ConfigError(
            f"models of family {config.family!r} cannot be exported to GGUF; dense ones of "
            f"{', '.join(ARCHITECTURES)} can"
        )
    windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
    if any(windows):
        raise ConfigError("a model with sliding-window layers cannot be exported to GGUF")
    if config.rope.interleaved or config.rope.fraction != 1.0:
        raise ConfigError("a model with interleaved or partial rotary embedding cannot be exported")


def _write_facts(gguf: Any, writer: Any, config: ModelConfig, kind: str) -> None:
    types = gguf.LlamaFileType
    writer.add_file_type(types.ALL_F32 if kind == "f32" else types[f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.rope.kind == "yarn":
        rope = config.rope
        if (
            rope.mscale
            or rope.attention_factor is not None
            or ((rope.beta_fast, rope.beta_slow) != (32.0, 1.0))
        ):
            raise ConfigError("YaRN with its own betas or attention factor cannot be exported")
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        original = rope.original_max_position_embeddings or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)


def _rope_factors(config: ModelConfig) -> np.ndarray | None:
    """float32 [head_dim / 2], default frequency over llama3 frequency: llama.cpp divides by it."""
    if config.rope.kind != "llama3":
        return None
    assert config.head_dim is not None
    plain = dataclasses.replace(config.rope, kind="default")
    positions = config.max_position_embeddings
    default, _ = inverse_frequencies(plain, config.head_dim, positions)
    scaled, _ = inverse_frequencies(config.rope, config.head_dim, positions)
    return (default / scaled).numpy()
