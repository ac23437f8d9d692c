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
