"""Logits of every family equal `transformers`, loaded from its files and saved back to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from serval.models import checkpoint
from serval.models.batch import PackedBatch
from serval.models.config import ModelConfig
from serval.models.decoder import Decoder

LENGTHS = [5, 70, 1, 33]
TOLERANCE = 1e-4


def prompts(lengths: list[int] = LENGTHS, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, tiny_models.VOCAB, (n,), generator=generator) for n in lengths]


@torch.no_grad()
def packed_logits(decoder: Decoder, tokens: list[Tensor]) -> Tensor:
    batch = PackedBatch.from_lengths([len(t) for t in tokens])
    return decoder.logits(decoder(torch.cat(tokens), batch))


@torch.no_grad()
def reference_logits(model: torch.nn.Module, tokens: list[Tensor]) -> Tensor:
    return torch.cat([model(t[None], use_cache=False).logits[0] for t in tokens])


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_packed_prefill_equals_transformers_and_saves_back(name: str, tmp_path: Path) -> None:
    model = tiny_models.make(name)
    model.save_pretrained(tmp_path / "theirs")
    tokens = prompts()
    expected = reference_logits(model, tokens)
    decoder = checkpoint.load(tmp_path / "theirs")
    logits = packed_logits(decoder, tokens)
    assert expected.std() > 0.3
    assert (logits - expected).abs().max() <= TOLERANCE

    ours = checkpoint.save(decoder, tmp_path / "ours")
    again = checkpoint.load(ours)
    assert again.config == decoder.config
    for key, value in decoder.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key

    theirs, info = AutoModelForCausalLM.from_pretrained(
        ours, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert AutoConfig.from_pretrained(ours).model_type == model.config.model_type
    reloaded = reference_logits(theirs.eval(), tokens)
    assert (reloaded - expected).abs().max() <= TOLERANCE


# Case, dotted path in the decoder's config, a value that leaves the option out.
OPTIONS = [
    ("llama-biases-tied-llama3-rope", "rope.kind", "default"),
    ("llama-yarn-wide-heads", "rope.kind", "default"),
    ("llama-yarn-wide-heads", "rope.attention_factor", 1.0),
    ("llama-yarn-wide-heads", "rope.beta_fast", 32.0),
    ("qwen2-sliding-tied", "layer_types", None),
    ("qwen3-bias-layer-types", "sliding_window", 10),
    ("qwen3_moe", "moe.norm_topk_prob", False),
    ("gpt_oss", "layer_types", None),
    ("gpt_oss", "rope.truncate", True),
    ("gpt_oss", "activation", "silu"),
    ("deepseek_v3", "moe.topk_group", 4),
    ("deepseek_v3", "moe.routed_scaling_factor", 1.0),
    ("deepseek_v3", "rope.interleaved", False),
    ("deepseek_v3-yarn-mscale-biases", "rope.mscale_all_dim", None),
    ("deepseek_v3-yarn-mscale-biases", "rope.beta_slow", 1.0),
    ("deepseek_v3-yarn-mscale-biases", "moe.norm_topk_prob", True),
    ("longcat_flash", "mla.scale_q", 1.0),
    ("longcat_flash", "mla.scale_kv", 1.0),
    ("longcat_flash", "moe.routed_scaling_factor", 1.0),
]


@pytest.mark.parametrize(("name", "option", "value"), OPTIONS)
def test_the_comparison_would_notice(name: str, option: str, value: object, tmp_path: Path) -> None:
    """Leaving one option out moves the logits far beyond the tolerance."""
    tiny_models.make(name).save_pretrained(tmp_path)
    decoder = checkpoint.load(tmp_path)
    values = decoder.config.to_dict()
    section, _, key = option.rpartition(".")
    (values[section] if section else values)[key] = value
    without = Decoder(ModelConfig.from_dict(values)).eval()
    without.load_state_dict(decoder.state_dict())
    tokens = prompts()
    difference = (packed_logits(decoder, tokens) - packed_logits(without, tokens)).abs().max()
    assert difference > 20 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("gpt_oss", "sinks"), ("deepseek_v3", "e_score_correction_bias"), ("qwen2", "q_proj.bias")],
)
def test_the_comparison_would_notice_a_tensor(name: str, tensor: str, tmp_path: Path) -> None:
    tiny_models.make(name).save_pretrained(tmp_path)
    decoder, tokens = checkpoint.load(tmp_path), prompts()
    before = packed_logits(decoder, tokens)
    for key, value in decoder.state_dict().items():
        if key.endswith(tensor):
            value.zero_()
    assert (packed_logits(decoder, tokens) - before).abs().max() > 20 * TOLERANCE
