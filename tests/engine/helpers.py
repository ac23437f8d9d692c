"""Small models and a byte-level tokenizer for engine tests."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from serval import LLM
from serval.models.batch import PackedBatch
from serval.models.config import MLAConfig, ModelConfig, MoEConfig
from serval.models.decoder import Decoder

VOCAB = 288


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes, a few merges (so that tokens span stop strings and characters), <eos> = 287."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = ["th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ti", "es", "or", "te"]
    pairs += ["of", "ed", "is", "it", "al", "ar", "st", "to", "nt", "ng", "se", "ha", "as", "ou"]
    vocab = {token: i for i, token in enumerate(letters + pairs)}
    vocab["<pad>"], vocab["<bos>"], vocab["<eos>"] = 285, 286, 287
    vocab["<extra>"] = 284
    bpe = models.BPE(vocab=vocab, merges=[(p[0], p[1]) for p in pairs])
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>"
    )
    fast.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    return fast


CONFIGS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "qk-norm": {"qk_norm": True, "qkv_bias": True, "tie_word_embeddings": True},
    "sliding-sinks": {
        "attention_sinks": True,
        "sliding_window": 7,
        "layer_types": ["sliding", "full"],
    },
    "moe": {"moe": MoEConfig(4, 2, 32, num_zero_experts=2)},
    "mla": {"mla": MLAConfig(16, 16, 8, 16, q_lora_rank=24)},
    "shortcut": {
        "mla": MLAConfig(16, 16, 8, 16),
        "moe": MoEConfig(4, 2, 32, num_zero_experts=2),
        "block": "shortcut",
    },
}


@cache
def tiny_decoder(name: str = "gqa") -> Decoder:
    """Two layers of random weights, sharp enough that greedy text is not one repeated token."""
    torch.manual_seed(7)
    config = ModelConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 64,
            "max_position_embeddings": 256,
            "initializer_range": 0.15,
            **CONFIGS[name],
        }
    )
    decoder = Decoder(config).eval()
    with torch.no_grad():
        if decoder.lm_head is not None:
            decoder.embed_tokens.weight.mul_(4)
        for parameter_name, parameter in decoder.named_parameters():
            if decoder.lm_head is None and parameter_name.endswith(
                ("o_proj.weight", "down_proj.weight")
            ):
                parameter.mul_(6)  # or a tied head would only repeat its input
            if parameter_name.endswith("sinks"):
                parameter.normal_()
    return decoder


def tiny_llm(name: str = "gqa", **options: Any) -> LLM:
    options = {"max_sequences": 8, "max_batch_tokens": 64, "block_size": 8, **options}
    decoder = tiny_decoder(name)
    if "oscar" in str(options.get("kv")):
        decoder = deepcopy(decoder)  # the layout turns weights, which changes their last bits
    return LLM(decoder, tokenizer=byte_tokenizer(), **options)


@torch.inference_mode()
def greedy(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    """The specification: run the whole text for every token."""
    tokens = list(prompt)
    for _ in range(count):
        hidden = decoder(torch.tensor(tokens), PackedBatch.from_lengths([len(tokens)]))
        tokens.append(int(decoder.logits(hidden[-1:]).argmax()))
    return tokens[len(prompt) :]
