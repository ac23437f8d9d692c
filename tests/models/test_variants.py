"""Attention variants as decoder options: neutral starts, training, cached decoding, checkpoints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from serval.cache.memory import PagedMemory
from serval.compress.gguf_file import export
from serval.compress.method import Method
from serval.compress.pipeline import compress_decoder
from serval.errors import CacheError, ConfigError
from serval.models import checkpoint
from serval.models.batch import PackedBatch
from serval.models.config import AttentionVariants, MLAConfig, ModelConfig
from serval.models.decoder import Decoder
from serval.models.variants import (
    ATTENTION_GATES,
    ATTENTION_WEIGHTS,
    require_plain,
    with_variants,
)
from serval.optim.groups import route
from serval.train.wisca.rescale import wisca_

LENGTH = 37
VARIANTS = {
    "softmax1": AttentionVariants("softmax1"),
    "sink_logit": AttentionVariants("sink_logit"),
    "k_bias": AttentionVariants("k_bias"),
    "kv_bias": AttentionVariants("kv_bias"),
    "clipped": AttentionVariants("clipped", alpha=12.0),
    "softpick": AttentionVariants("softpick"),
    "sigmoid": AttentionVariants("sigmoid"),
    "elastic": AttentionVariants("elastic"),
    "headwise": AttentionVariants(gate="headwise"),
    "elementwise": AttentionVariants(gate="elementwise"),
    "conditional": AttentionVariants(gate="conditional"),
    "conditional_mlp": AttentionVariants(gate="conditional_mlp"),
    "value_gate": AttentionVariants(value_gate=True),
    "value_bias": AttentionVariants(value_bias=True),
    "sink_logit and gate": AttentionVariants("sink_logit", gate="headwise", value_gate=True),
}
FIXED = ("softmax1", "clipped", "softpick", "sigmoid")


def config(variants: AttentionVariants, **options: object) -> ModelConfig:
    return ModelConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.15,
        attention=variants,
        **options,
    )


def made(variants: AttentionVariants, seed: int = 0, **options: object) -> Decoder:
    """A decoder whose bare parameters are drawn, so that every part matters."""
    torch.manual_seed(seed)
    decoder = Decoder(config(variants, **options)).eval()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.dim() == 1 and "norm" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return decoder


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(61, (length,), generator=torch.Generator().manual_seed(3))


def whole(decoder: Decoder, ids: Tensor) -> Tensor:
    return decoder.logits(decoder(ids, PackedBatch.from_lengths([len(ids)])))


def cached(decoder: Decoder, ids: Tensor, counts: list[int], kv: str = "full") -> Tensor:
    memory = PagedMemory.of(decoder, kv, cache_bytes=1 << 20, max_model_len=64, block_size=8)
    cache, parts = memory.manager.create(), []
    for span in ids.split(counts):
        memory.manager.append(cache, len(span))
        parts.append(decoder.logits(decoder(span, memory.batch([cache], [len(span)]))))
    return torch.cat(parts)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("window", [None, 9])
def test_cached_decoding_equals_the_full_pass(name: str, window: int | None) -> None:
    options: dict[str, object] = {}
    if window:
        options = {"sliding_window": window, "layer_types": ["sliding", "full"]}
    decoder, ids = made(VARIANTS[name], **options), tokens()
    with torch.inference_mode():
        expected = whole(decoder, ids)
        got = cached(decoder, ids, [11, 14, *[1] * 12])
    assert torch.allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_variant_does_something_and_stays_causal(name: str) -> None:
    decoder, ids = made(VARIANTS[name]), tokens()
    plain = Decoder(config(AttentionVariants())).eval()
    plain.load_state_dict(decoder.state_dict(), strict=False)
    changed = ids.clone()
    changed[-1] = (changed[-1] + 1) % 61
    with torch.inference_mode():
        assert not torch.allclose(whole(decoder, ids), whole(plain, ids), atol=1e-3)
        a, b = whole(decoder, ids), whole(decoder, changed)
    assert torch.equal(a[:-1], b[:-1]) or torch.allclose(a[:-1], b[:-1], atol=1e-6)


@pytest.mark.parametrize("name", [n for n in VARIANTS if n not in FIXED])
def test_a_neutral_start_is_plain_softmax_and_trains(name: str) -> None:
    torch.manual_seed(1)
    plain = Decoder(config(AttentionVariants())).eval()
    variant = with_variants(plain, dataclasses.replace(VARIANTS[name], neutral=True))
    ids = tokens()
    with torch.no_grad():
        assert torch.allclose(whole(variant, ids), whole(plain, ids), atol=1e-5)
    added = [
        parameter
        for key, parameter in variant.named_parameters()
        if key not in dict(plain.named_parameters())
    ]
    assert added
    loss = torch.nn.functional.cross_entropy(whole(variant, ids)[:-1], ids[1:])
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in added)


@pytest.mark.parametrize("name", VARIANTS)
def test_training_lowers_the_loss_and_reaches_every_parameter(name: str) -> None:
    decoder, ids = made(VARIANTS[name]).train(), tokens()
    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(whole(decoder, ids)[:-1], ids[1:])
        optimizer.zero_grad()
        loss.backward()
        if not losses:
            missing = [n for n, p in decoder.named_parameters() if p.grad is None]
            assert not missing
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert {named.name for named in route(decoder)} == {
        name for name, _ in decoder.named_parameters()
    }


def test_settings_without_effect_equal_softmax() -> None:
    ids = tokens()
    clipped = made(AttentionVariants("clipped", alpha=0.0))
    plain = Decoder(config(AttentionVariants())).eval()
    plain.load_state_dict(clipped.state_dict())
    with torch.inference_mode():
        assert torch.allclose(whole(clipped, ids), whole(plain, ids), atol=1e-5)


def test_softmax1_is_a_sink_logit_of_zero_and_a_bias_key_of_zero() -> None:
    ids, outputs = tokens(), []
    torch.manual_seed(5)
    weights = Decoder(config(AttentionVariants())).state_dict()
    for kind in ("softmax1", "sink_logit", "k_bias", "kv_bias"):
        decoder = Decoder(config(AttentionVariants(kind))).eval()  # what is learned starts at 0
        decoder.load_state_dict(weights, strict=False)
        with torch.inference_mode():
            outputs.append(whole(decoder, ids))
    for other in outputs[1:]:
        assert torch.allclose(outputs[0], other, atol=1e-5)


@pytest.mark.parametrize("gate", ["headwise", "elementwise", "conditional"])
def test_latent_attention_takes_gates_only(gate: str) -> None:
    mla = MLAConfig(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12)
    decoder, ids = made(AttentionVariants(gate=gate), mla=mla), tokens()
    with torch.inference_mode():
        got = cached(decoder, ids, [20, *[1] * 17])
        assert torch.allclose(got, whole(decoder, ids), atol=2e-5)
    with pytest.raises(ConfigError, match="latent attention takes a gate only"):
        config(AttentionVariants("softpick"), mla=mla)


@pytest.mark.parametrize("name", VARIANTS)
def test_checkpoints_keep_the_variant(name: str, tmp_path: Path) -> None:
    decoder, ids = made(VARIANTS[name]), tokens()
    checkpoint.save(decoder, tmp_path / "model")
    back = checkpoint.load(tmp_path / "model").eval()
    assert back.config.attention == VARIANTS[name]
    with torch.inference_mode():
        assert torch.equal(whole(back, ids), whole(decoder, ids))


def test_layouts_without_stored_keys_refuse_at_load() -> None:
    decoder = made(VARIANTS["softpick"])
    with pytest.raises(CacheError, match=r"'int8' .*'softpick'"):
        PagedMemory.of(decoder, "int8", cache_bytes=1 << 20, max_model_len=64)
    with torch.inference_mode():  # gates and sink logits run on every layout
        gated, ids = made(VARIANTS["sink_logit and gate"]), tokens()
        got = cached(gated, ids, [20, *[1] * 17], kv="int8")
        assert torch.allclose(got, whole(gated, ids), atol=0.3)
        got = cached(decoder, ids, [20, *[1] * 17], kv="bf16")
        assert torch.allclose(got, whole(decoder, ids), atol=0.1)


@pytest.mark.parametrize(("key", "value"), [("alpha", "4"), ("gate_init", "x"), ("gate", 1)])
def test_bad_variants_in_a_checkpoint_are_refused(key: str, value: object, tmp_path: Path) -> None:
    checkpoint.save(made(VARIANTS["clipped"]), tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["serval_attention"][key] = value
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=rf"config\.json: serval_attention: .*{key} is"):
        checkpoint.load(tmp_path)


def test_registry_and_config_agree() -> None:
    for name in ATTENTION_WEIGHTS:
        config(AttentionVariants(name))
    for name in ATTENTION_GATES:
        config(AttentionVariants(gate=name))
    for options, known in (({"weights": "?"}, ATTENTION_WEIGHTS), ({"gate": "?"}, ATTENTION_GATES)):
        with pytest.raises(ConfigError) as error:
            config(AttentionVariants(**options))
        assert all(repr(name) in str(error.value) for name in known)


def test_errors_name_the_key() -> None:
    for bad, message in [
        (AttentionVariants("softmax2"), "model.attention.weights"),
        (AttentionVariants(gate="wide"), "model.attention.gate"),
        (AttentionVariants(gate_init=1.0), "gate_init"),
        (AttentionVariants("softpick", neutral=True), "no parameter"),
    ]:
        with pytest.raises(ConfigError, match=message):
            config(bad)
    plain = config(AttentionVariants()).to_dict()
    for key, value in [
        ("gate_init", "x"), ("alpha", "4"), ("alpha", float("nan")), ("alpha", float("inf")),
        ("alpha", None), ("alpha", True), ("alpha", -1.0), ("sigmoid_bias", "0"),
        ("elastic_tau", float("-inf")), ("value_gate", "no"), ("value_bias", 1),
        ("neutral", None), ("weights", ["softmax"]), ("gate", 3),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=rf"model\.attention\.{key} is "):
            ModelConfig.from_dict({**plain, "attention": {key: value}})
    with pytest.raises(ConfigError, match="expected an object"):
        ModelConfig.from_dict({**plain, "attention": "softmax1"})
    with pytest.raises(ConfigError, match="attention_sinks"):
        config(AttentionVariants("sink_logit"), attention_sinks=True)
    with pytest.raises(ConfigError, match="softmax attention only"):
        require_plain(config(AttentionVariants("elastic")), "pruning")
    again = ModelConfig.from_dict(config(VARIANTS["elastic"]).to_dict())
    assert again.attention == VARIANTS["elastic"]


def test_methods_that_fold_weights_refuse(tmp_path: Path) -> None:
    decoder = made(VARIANTS["headwise"])
    checkpoint.save(decoder, tmp_path / "model")
    with pytest.raises(ConfigError, match="compression works on softmax attention only"):
        compress_decoder(decoder, Method())
    with pytest.raises(ConfigError, match="GGUF export works on softmax attention only"):
        export(tmp_path / "model", tmp_path / "model.gguf", "q8_0")


@pytest.mark.parametrize("name", VARIANTS)
def test_wisca_leaves_the_model_as_it_is(name: str) -> None:
    decoder, ids = made(VARIANTS[name]).double(), tokens()
    with torch.no_grad():
        before = whole(decoder, ids)
        wisca_(decoder, mlp="tensor")
        assert torch.allclose(whole(decoder, ids), before, atol=1e-9)
