"""GGUF files for llama.cpp: of a Hugging Face Llama state dict, or with random weights of a shape.

Layout as llama.cpp's own converter writes it: names `blk.N.attn_q` and so on; rows of q and k
permuted per head from half-split to interleaved rotary order; Llama 3's rotary factors in
`rope_freqs.weight`; all matrices in the file's type, norms in float32.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from serval.bench.harness import MissingPeerError
from serval.bench.shapes import cache_directory, random_block
from serval.errors import ConfigError
from serval.models.config import ModelConfig
from serval.models.layers import inverse_frequencies

# (name in a file without its type, hub name) -> float32 array of that matrix
Weights = Callable[[str, tuple[int, ...]], np.ndarray]

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(GGUF name, Hugging Face name, shape) of every tensor of a dense Llama."""
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
    yield "token_embd.weight", "model.embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        for name, hub in _LAYER_TENSORS.items():
            yield f"blk.{layer}.{name}.weight", f"model.layers.{layer}.{hub}.weight", shapes[name]
    yield "output_norm.weight", "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "output.weight", "lm_head.weight", (config.vocab_size, hidden)


def interleave_heads(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a q or k projection from half-split to interleaved rotary pairs."""
    rows, columns = weight.shape
    split = weight.reshape(heads, 2, rows // heads // 2, columns)
    return split.swapaxes(1, 2).reshape(rows, columns)


def write_gguf(
    path: Path,
    config: ModelConfig,
    weights: Weights,
    kind: str = "F16",
    tokenizer: Path | None = None,
) -> Path:
    """Write a GGUF file, complete or not at all.

    weights: called with the Hugging Face name and shape of each tensor, returns it as float32.
    kind: F32, F16 or Q8_0. tokenizer: a `tokenizer.json` (byte-level BPE); without one the file
    has no vocabulary and takes token ids only.
    """
    gguf = import_gguf()
    types = gguf.GGMLQuantizationType
    if kind not in ("F32", "F16", "Q8_0"):
        raise ConfigError(f"GGUF type is {kind!r}; expected F32, F16 or Q8_0")
    temporary = path.with_name(path.name + ".writing")
    writer = gguf.GGUFWriter(temporary, "llama")
    _write_facts(gguf, writer, config, kind)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(config.vocab_size)
    else:
        _write_tokenizer(gguf, writer, json.loads(tokenizer.read_text()), config)
    if config.rope.kind == "llama3":
        writer.add_tensor("rope_freqs.weight", _rope_factors(config))
    made: dict[tuple[Any, ...], np.ndarray] = {}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, hub, shape in tensor_shapes(config):
        array = weights(hub, shape)
        permuted = heads.get(name.split(".")[-2])
        # Random weights return one array for many tensors: quantise it once, store it by reference.
        key = (id(array), array.shape, permuted)
        kind_here = types.F32 if len(shape) == 1 else types[kind]
        if key not in made:
            value = array if permuted is None else interleave_heads(array, permuted)
            made[key] = gguf.quants.quantize(np.ascontiguousarray(value), kind_here)
            made[("keep", *key)] = array  # an id is unique only while its array lives
        writer.add_tensor(name, made[key], raw_dtype=kind_here)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.replace(path)
    return path


def import_gguf() -> Any:
    """The `gguf` package; raises MissingPeerError."""
    try:
        import gguf
    except ImportError as error:
        raise MissingPeerError("gguf", "pip install 'serval-llm[bench]'") from error
    return gguf


def _write_facts(gguf: Any, writer: Any, config: ModelConfig, kind: str) -> None:
    types = gguf.LlamaFileType
    files = {"F32": types.ALL_F32, "F16": types.MOSTLY_F16, "Q8_0": types.MOSTLY_Q8_0}
    writer.add_file_type(files[kind])
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


def _rope_factors(config: ModelConfig) -> np.ndarray:
    """float32 [head_dim / 2], default frequency over llama3 frequency: llama.cpp divides by it."""
    assert config.head_dim is not None
    plain = dataclasses.replace(config.rope, kind="default")
    positions = config.max_position_embeddings
    default, _ = inverse_frequencies(plain, config.head_dim, positions)
    scaled, _ = inverse_frequencies(config.rope, config.head_dim, positions)
    return (default / scaled).numpy()


def _write_tokenizer(
    gguf: Any, writer: Any, tokenizer: dict[str, Any], config: ModelConfig
) -> None:
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise ConfigError(f"tokenizer model is {model.get('type')!r}; expected byte-level BPE")
    added = {token["id"]: token["content"] for token in tokenizer.get("added_tokens", ())}
    names = {index: token for token, index in model["vocab"].items()} | added
    tokens = [names.get(i, f"<unused{i}>") for i in range(config.vocab_size)]
    kinds = [
        gguf.TokenType.CONTROL
        if i in added
        else gguf.TokenType.NORMAL
        if i in names
        else gguf.TokenType.UNUSED
        for i in range(config.vocab_size)
    ]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    ends = config.eos_token_ids()
    if ends:
        writer.add_eos_token_id(ends[0])


def random_gguf(config: ModelConfig, kind: str) -> Path:
    """The cached GGUF file with random weights of this shape and type, written on first use."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()
    path = cache_directory() / f"random-{digest[:16]}-{kind}.gguf"
    if path.exists():
        return path
    block = random_block()
    made: dict[tuple[int, ...], np.ndarray] = {}

    def weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if shape not in made:
            if len(shape) == 1:
                made[shape] = np.ones(shape, np.float32)
            else:
                made[shape] = np.resize(block, shape)
        return made[shape]

    return write_gguf(path, config, weights, kind)
