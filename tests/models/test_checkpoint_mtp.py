"""The multi-token prediction head: stored in the families' names, computed as written down."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.longcat_flash import modeling_longcat_flash as longcat

from serval.models import checkpoint
from serval.models.batch import PackedBatch
from serval.models.config import ModelConfig
from serval.models.decoder import Decoder


def with_mtp(name: str, tmp_path: Path) -> tuple[Decoder, Path]:
    """A saved model of case `name` with an MTP head, larger weights than usual."""
    tiny_models.CONFIGS[name]().save_pretrained(tmp_path / "config")
    config = checkpoint.read_config(tmp_path / "config")
    dense = config.family == "longcat_flash"
    changes = {"num_mtp_layers": 1, "mtp_dense": dense}
    decoder = Decoder(ModelConfig.from_dict({**config.to_dict(), **changes})).eval()
    tiny_models.randomise(decoder, seed=5)
    return decoder, checkpoint.save(decoder, tmp_path / "model")


CASES = [
    "deepseek_v3",
    "deepseek_v3-yarn-mscale-biases",
    "glm4_moe_lite",
    "longcat_flash",
    "longcat_flash-yarn-bias-no-zero-experts",
]


@pytest.mark.parametrize("name", CASES)
def test_weights_come_back_exactly(name: str, tmp_path: Path) -> None:
    decoder, out = with_mtp(name, tmp_path)
    again = checkpoint.load(out)
    assert again.config == decoder.config
    mine, theirs = decoder.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert any(key.startswith("mtp.0.") for key in mine)
    for key in mine:
        assert torch.equal(mine[key], theirs[key]), key


@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_the_trunk(name: str, tmp_path: Path) -> None:
    decoder, out = with_mtp(name, tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    head = f"model.layers.{decoder.config.num_hidden_layers}."
    assert all(key.startswith((head, "model.mtp.")) for key in info["unexpected_keys"])
    tokens = torch.arange(3, 40)
    with torch.no_grad():
        logits = decoder.logits(decoder(tokens, PackedBatch.from_lengths([37])))
        assert (model.eval()(tokens[None]).logits[0] - logits).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["deepseek_v3", "longcat_flash"])
def test_checkpoints_without_the_head_load(name: str, tmp_path: Path) -> None:
    decoder, out = with_mtp(name, tmp_path)
    head = (f"model.layers.{decoder.config.num_hidden_layers}.", "model.mtp.")
    tensors = load_file(out / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if not k.startswith(head)}, out / "model.safetensors"
    )
    assert checkpoint.load(out).config.num_mtp_layers == 0


def test_the_trunk_leaves_the_head_out(tmp_path: Path) -> None:
    decoder, _ = with_mtp("deepseek_v3", tmp_path)
    trunk = decoder.trunk_attention_layers
    assert trunk == decoder.attention_layers[: decoder.config.num_hidden_layers]
    assert len(decoder.attention_layers) == len(trunk) + 1


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def load_prefix(module: nn.Module, tensors: dict[str, Tensor], prefix: str) -> None:
    module.load_state_dict(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )


def stack_experts(tensors: dict[str, Tensor], prefix: str, count: int) -> dict[str, Tensor]:
    def stack(part: str) -> Tensor:
        return torch.stack([tensors.pop(f"{prefix}{e}.{part}.weight") for e in range(count)])

    gate, up, down = (stack(part) for part in ("gate_proj", "up_proj", "down_proj"))
    stacked = {f"{prefix}gate_up_proj": torch.cat([gate, up], 1), f"{prefix}down_proj": down}
    return {**tensors, **stacked}


class Oracle:
    """The head by its definition, its block built from transformers' modules, from the file."""

    def __init__(self, model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
        self.model, self.tensors = model, tensors
        self.eps = model.config.rms_norm_eps

    def causal(self, length: int) -> Tensor:
        return torch.full((length, length), float("-inf")).triu(1)[None, None]

    def combined(self, hidden: Tensor, next_tokens: Tensor, names: tuple[str, str, str]) -> Tensor:
        enorm, hnorm, projection = (self.tensors[n] for n in names)
        embedded = rms_norm(self.model.model.embed_tokens(next_tokens), enorm, self.eps)
        joined = torch.cat([embedded, rms_norm(hidden, hnorm, self.eps)], -1)
        return joined @ projection.T

    def deepseek(self, hidden: Tensor, next_tokens: Tensor) -> Tensor:
        config = self.model.config
        prefix = f"model.layers.{config.num_hidden_layers}."
        names = ("enorm.weight", "hnorm.weight", "eh_proj.weight")
        x = self.combined(hidden, next_tokens, tuple(prefix + n for n in names))[None]
        layer = deepseek.DeepseekV3DecoderLayer(config, config.num_hidden_layers).eval()
        own = {k: v for k, v in self.tensors.items() if k.startswith(prefix)}
        own = stack_experts(own, f"{prefix}mlp.experts.", config.n_routed_experts)
        own = {k: v for k, v in own.items() if k.removeprefix(prefix) in layer.state_dict()}
        load_prefix(layer, own, prefix)
        positions = torch.arange(x.shape[1])[None]
        rotary = self.model.model.rotary_emb(x, positions)
        x = layer(x, attention_mask=self.causal(x.shape[1]), position_embeddings=rotary)[0]
        x = rms_norm(x, self.tensors[f"{prefix}shared_head.norm.weight"], self.eps)
        return x @ self.tensors[f"{prefix}shared_head.head.weight"].T

    def longcat(self, hidden: Tensor, next_tokens: Tensor) -> Tensor:
        config, prefix = self.model.config, "model.mtp.layers.0."
        names = ("enorm.m.weight", "hnorm.m.weight", "eh_proj.weight")
        x = self.combined(hidden, next_tokens, tuple(prefix + n for n in names))[None]
        attention = longcat.LongcatFlashMLA(config, 0).eval()
        load_prefix(attention, self.tensors, f"{prefix}self_attn.")
        mlp = longcat.LongcatFlashMLP(config)
        load_prefix(mlp, self.tensors, f"{prefix}transformer_layer.mlp.")
        positions = torch.arange(x.shape[1])[None]
        rotary = self.model.model.rotary_emb(x, positions)
        normed = rms_norm(x, self.tensors[f"{prefix}input_layernorm.weight"], self.eps)
        x = x + attention(normed, rotary, self.causal(x.shape[1]))[0]
        after = self.tensors[f"{prefix}post_attention_layernorm.weight"]
        x = (x + mlp(rms_norm(x, after, self.eps)))[0]
        x = rms_norm(x, self.tensors["model.mtp.norm.weight"], self.eps)
        return x @ self.model.lm_head.weight.T


@pytest.mark.parametrize("name", [c for c in CASES if "glm" not in c])
@torch.no_grad()
def test_logits_equal_the_definition(name: str, tmp_path: Path) -> None:
    decoder, out = with_mtp(name, tmp_path)
    assert decoder.mtp is not None
    model = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    oracle = Oracle(model, load_file(out / "model.safetensors"))
    tokens = torch.randint(3, tiny_models.VOCAB, (33,))
    lengths = [12, 20]  # packed: the head must not look across documents
    batch = PackedBatch.from_lengths(lengths)
    rows, following = (
        torch.cat([tokens[:12], tokens[12:32]]),
        torch.cat([tokens[1:13], tokens[13:]]),
    )
    hidden = decoder(rows, batch, pre_norm=True)
    ahead = decoder.predict_ahead(0, hidden, following, batch)
    logits = decoder.logits(decoder.mtp[0].norm(ahead))
    definition = oracle.deepseek if "deepseek" in name else oracle.longcat
    expected = torch.cat(
        [definition(h, t) for h, t in zip(hidden.split(lengths), following.split(lengths))]
    )
    assert expected.std() > 0.3
    assert (logits - expected).abs().max() <= 1e-4
