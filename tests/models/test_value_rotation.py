"""Values rotated inside the weights: the model computes the same, for every cache layout."""

from __future__ import annotations

import gc

import pytest
import torch

from serval.adapt.lora import LoraOptions, adapters, add_adapters
from serval.cache.memory import PagedMemory, cache_budget
from serval.errors import ConfigError
from serval.models.batch import PackedBatch
from serval.models.config import AttentionVariants, ModelConfig
from serval.models.decoder import Decoder
from serval.models.value_rotation import restore_values, rotate_values
from serval.models.variants import with_variants

TOKENS = torch.arange(3, 60)


def decoder(**options) -> Decoder:
    torch.manual_seed(0)
    values = {
        "vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64,
        "max_position_embeddings": 128, "initializer_range": 0.2,
    }  # fmt: skip
    made = Decoder(ModelConfig(**{**values, **options})).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return made


@torch.inference_mode()
def logits(model: Decoder) -> torch.Tensor:
    return model.logits(model(TOKENS, PackedBatch.from_lengths([len(TOKENS)])))


@torch.inference_mode()
def cached(model: Decoder, kv: str) -> torch.Tensor:
    """Logits in chunks through a cache."""
    specs = model.trunk_attention_layers
    size = cache_budget(specs, kv, torch.float32, blocks=4, block_size=32, sequences=1)
    options = {"max_model_len": 64, "max_sequences": 1}
    memory = PagedMemory.of(model, kv, cache_bytes=size, **options)
    cache, parts = memory.manager.create(), []
    for part in TOKENS.split([33, 20, 1, 3]):
        memory.manager.append(cache, len(part))
        parts.append(model.logits(model(part, memory.batch([cache], [len(part)]))))
    return torch.cat(parts)


SHAPES = [
    {},
    {"num_key_value_heads": 4},
    {"qkv_bias": True, "output_bias": True},
    {"qk_norm": True, "head_dim": 24},  # blocks of 8
]


@pytest.mark.parametrize("options", SHAPES)
def test_the_model_computes_the_same(options: dict) -> None:
    model = decoder(**options)
    want, weight = logits(model), model.layers[0].self_attn.v_proj.weight.clone()
    for module in model.attention_modules:
        assert rotate_values(module)
        assert rotate_values(module)  # once only
    assert not torch.allclose(model.layers[0].self_attn.v_proj.weight, weight, atol=1e-2)
    torch.testing.assert_close(logits(model), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cached(model, "full"), want, atol=1e-4, rtol=1e-4)
    restore_values(model)
    assert not model.layers[0].self_attn.values_rotated
    torch.testing.assert_close(model.layers[0].self_attn.v_proj.weight, weight)
    torch.testing.assert_close(logits(model), want, atol=1e-4, rtol=1e-4)


def test_a_layout_prepares_the_model_once_and_others_read_it_unharmed() -> None:
    model = decoder()
    plain = {kv: cached(model, kv) for kv in ("full", "kivi:residual=32", "int4:residual=32")}
    first = cached(model, "oscar:residual=32")
    assert all(module.values_rotated for module in model.attention_modules)
    torch.testing.assert_close(cached(model, "oscar:residual=32"), first)
    for kv, want in plain.items():  # these turn the values back before they quantise them
        torch.testing.assert_close(cached(model, kv), want, atol=2e-2, rtol=2e-2)


def test_what_cannot_take_the_rotation_is_rotated_at_run_time() -> None:
    """An adapter beside v_proj and o_proj; the same numbers are stored as with folded weights."""
    model = decoder()
    want = cached(model, "oscar:residual=32")
    add_adapters(model, LoraOptions(rank=2))
    assert adapters(model)
    assert not model.attention_modules[0].values_rotated  # restored for the adapters
    torch.testing.assert_close(cached(model, "oscar:residual=32"), want, atol=2e-2, rtol=2e-2)
    assert not model.attention_modules[0].values_rotated


def test_the_basis_stays_while_a_cache_holds_values() -> None:
    model = decoder()
    size = cache_budget(
        model.trunk_attention_layers, "oscar", torch.float32, blocks=4, block_size=32, sequences=1
    )
    memory = PagedMemory.of(model, "oscar", cache_bytes=size, max_model_len=64, max_sequences=1)
    assert all(module.values_rotated for module in model.attention_modules)
    with pytest.raises(ConfigError, match="still in use"):
        restore_values(model)
    assert all(module.values_rotated for module in model.attention_modules)
    del memory
    gc.collect()
    restore_values(model)
    assert not any(module.values_rotated for module in model.attention_modules)


def test_models_that_share_weights_are_not_turned_under_each_other() -> None:
    model = decoder()
    rotate_values(model.attention_modules[0])
    wanted = logits(model)
    varied = with_variants(model, AttentionVariants(weights="softmax1"))
    assert not model.attention_modules[0].values_rotated
    before = logits(varied)
    for one in (model, varied):
        for module in one.attention_modules:
            assert not rotate_values(module)
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(varied), before)
    del varied, one, module
    gc.collect()
    assert rotate_values(model.attention_modules[0])
