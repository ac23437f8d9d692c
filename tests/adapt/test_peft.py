"""Exchange with PEFT, and AFA-LoRA as a PEFT variant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from serval.adapt.lora import LoraLinear, LoraOptions, adapters, merge, set_beta
from serval.adapt.peft_format import CONFIG, WEIGHTS, load_adapter, read_adapter, save_adapter
from serval.errors import CheckpointError, ConfigError
from serval.models import checkpoint
from tests.adapt.toy import KINDS, adapted, logits, toy_decoder

peft = pytest.importorskip("peft")


class TwoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = nn.Linear(24, 40)
        self.o_proj = nn.Linear(40, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.q_proj(x).relu())


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def afa_model(**options):
    from serval.adapt.peft_variant import AfaLoraConfig, get_afa_model

    torch.manual_seed(1)
    config = AfaLoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"], **options)
    return randomised(get_afa_model(TwoLinears(), config))


def plain_model():
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"])
    return randomised(peft.get_peft_model(TwoLinears(), config))


X = torch.randn(50, 24, generator=torch.Generator().manual_seed(9))


def test_our_layer_is_peft_lora_bit_for_bit_at_beta_zero() -> None:
    theirs = plain_model().base_model.model.q_proj
    for options in (LoraOptions(4, 8.0), LoraOptions(4, 8.0, activation="relu")):
        ours = LoraLinear(TwoLinears().q_proj, options)
        ours.beta = 0.0
        with torch.no_grad():
            ours.lora_A.copy_(theirs.lora_A["default"].weight)
            ours.lora_B.copy_(theirs.lora_B["default"].weight)
        x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
        ours(x).square().sum().backward()
        theirs(y).square().sum().backward()
        assert torch.equal(ours(X), theirs(X))
        assert torch.equal(x.grad, y.grad)
        assert torch.equal(ours.lora_A.grad, theirs.lora_A["default"].weight.grad)
        theirs.zero_grad()


def test_the_variant_is_peft_lora_bit_for_bit_at_beta_zero_and_ours_at_any_beta() -> None:
    from serval.adapt.peft_variant import set_beta as set_peft_beta

    model = afa_model(afa_activation="silu")
    assert not torch.allclose(model(X), plain_model()(X))  # beta = 1
    layer = model.base_model.model.q_proj
    ours = LoraLinear(TwoLinears().q_proj, LoraOptions(4, 8.0, activation="silu"))
    with torch.no_grad():
        ours.lora_A.copy_(layer.lora_A["default"].weight)
        ours.lora_B.copy_(layer.lora_B["default"].weight)
    for beta in (1.0, 0.3, 0.0):
        set_peft_beta(model, beta)
        ours.beta = beta
        assert torch.equal(layer(X), ours(X))
    assert torch.equal(model(X), plain_model()(X))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        p.numel() for p in plain_model().parameters() if p.requires_grad
    )


def test_the_variant_merges_only_when_linear() -> None:
    from serval.adapt.peft_variant import set_beta as set_peft_beta

    model = afa_model()
    with pytest.raises(ConfigError, match="still non-linear"):
        model.merge_adapter()
    set_peft_beta(model, 0.0)
    before = model(X)
    bound = 1e-6 * float(before.detach().abs().max())
    model.merge_adapter()
    assert torch.allclose(model(X), before, rtol=0, atol=bound)
    model.unmerge_adapter()
    assert torch.allclose(model(X), before, rtol=0, atol=bound)
    merged = model.merge_and_unload(safe_merge=True)
    assert torch.allclose(merged(X), before, rtol=0, atol=bound)


def test_a_plain_adapter_may_stand_beside_an_annealed_one() -> None:
    from serval.adapt.peft_variant import AfaLoraConfig
    from serval.adapt.peft_variant import set_beta as set_peft_beta

    model = afa_model()
    model.add_adapter("plain", peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    model.set_adapter("plain")
    with torch.no_grad():
        layer = model.base_model.model.q_proj
        layer.lora_A["plain"].weight.copy_(layer.lora_A["default"].weight)
        layer.lora_B["plain"].weight.copy_(layer.lora_B["default"].weight)
    assert set(layer.lora_variant) == {"default"}
    alone = TwoLinears().q_proj(X) + layer.lora_B["plain"](layer.lora_A["plain"](X)) * 2.0
    torch.testing.assert_close(layer(X), alone)
    set_peft_beta(model, 0.5)  # of the other adapter
    torch.testing.assert_close(layer(X), alone)
    model.add_adapter("again", AfaLoraConfig(r=2, target_modules=["q_proj"]))
    assert set(layer.lora_variant) == {"default", "again"}


def test_gpt2s_transposed_layers_carry_the_variant() -> None:
    import transformers

    from serval.adapt.peft_variant import AfaLoraConfig, get_afa_model
    from serval.adapt.peft_variant import set_beta as set_peft_beta

    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    told = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False}
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **told)).eval()
    config = AfaLoraConfig(r=4, target_modules=["c_attn", "lm_head"])
    model = randomised(get_afa_model(base, config)).eval()
    tokens = torch.arange(20)[None]
    bent = model(tokens).logits
    with pytest.raises(ConfigError, match="still non-linear"):
        model.merge_adapter()
    set_peft_beta(model, 0.0)
    before = model(tokens).logits
    assert (before - bent).abs().max() > 1e-3
    model.merge_adapter()
    after = model(tokens).logits
    assert 0 < (after - before).abs().max() <= 1e-6 * before.abs().max()


def test_layers_that_cannot_carry_the_variant_are_named() -> None:
    from serval.adapt.peft_variant import AfaLoraConfig, get_afa_model

    model = nn.Sequential()
    model.words = nn.Embedding(9, 24)
    model.inner = TwoLinears()
    with pytest.raises(ConfigError, match="target 'words' is a Embedding; AFA-LoRA adapts"):
        get_afa_model(model, AfaLoraConfig(target_modules=["words"]))
    for other in ({"use_dora": True}, {"target_parameters": ["q_proj.weight"]}):
        with pytest.raises(ConfigError, match=f"together with {next(iter(other))}"):
            AfaLoraConfig(target_modules=["q_proj"], **other)


def test_a_base_of_packed_integers_is_adapted_but_not_merged_into() -> None:
    """What bitsandbytes does: an nn.Linear whose weight holds codes."""
    from serval.adapt.peft_variant import AfaLoraConfig, get_afa_model
    from serval.adapt.peft_variant import set_beta as set_peft_beta

    class Packed(nn.Linear):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__(linear.in_features, linear.out_features, bias=False)
            self.step = float(linear.weight.detach().abs().max()) / 127
            codes = (linear.weight.detach() / self.step).round().to(torch.int8)
            self.weight = nn.Parameter(codes, requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight.to(x.dtype) * self.step)

    plain = TwoLinears()
    model = TwoLinears()
    model.q_proj = Packed(plain.q_proj)
    base = model.q_proj(X)
    model = randomised(get_afa_model(model, AfaLoraConfig(r=4, target_modules=["q_proj"])))
    layer = model.base_model.model.q_proj
    code = layer.lora_A["default"](X)
    torch.testing.assert_close(layer(X), base + layer.lora_B["default"](code.relu()) * 2.0)
    set_peft_beta(model, 0.0)
    torch.testing.assert_close(layer(X), base + layer.lora_B["default"](code) * 2.0)
    codes = layer.base_layer.weight.clone()
    with pytest.raises(ConfigError, match="cannot be merged into a Packed of int8 weights"):
        model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, codes)


def test_a_late_end_is_warned_of_by_the_callback() -> None:
    from serval.adapt.peft_variant import AfaAnnealing

    with pytest.warns(UserWarning, match=r"afa_anneal_end is 0.9.*last 10% of the steps"):
        AfaAnnealing(afa_model(afa_anneal_end=0.9))


class Betas(TrainerCallback):
    """beta of a layer in its forward passes, one per optimizer step."""

    def __init__(self, model: nn.Module, stop: int = 0) -> None:
        self.seen: list[float] = []
        self.stop = stop
        layer = next(m for m in model.modules() if hasattr(m, "afa_beta"))
        layer.register_forward_pre_hook(lambda *_: self.seen.append(layer.afa_beta["default"]))

    def on_step_end(self, args, state, control, **_):
        control.should_save = control.should_training_stop = state.global_step == self.stop


def test_a_transformers_trainer_anneals_and_a_resumed_one_ends_in_the_same_bits(
    tmp_path: Path,
) -> None:
    from serval.adapt.peft_variant import (
        AfaAnnealing,
        AfaLoraConfig,
        get_afa_model,
        load_afa_model,
        save_plain_lora,
    )

    checkpoint.save(toy_decoder(), tmp_path / "base")
    rows = [{"input_ids": row, "labels": row} for row in (torch.arange(320) * 7 % 96).view(16, 20)]

    def base() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)

    def train(model, where: str, stop: int = 0, resume: str | None = None) -> list[float]:
        args = TrainingArguments(
            output_dir=str(tmp_path / where),
            max_steps=8,
            per_device_train_batch_size=2,
            gradient_checkpointing=True,
            learning_rate=1e-2,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        betas = Betas(model, stop)
        callbacks = [AfaAnnealing(model), betas]
        trainer = Trainer(model, args, train_dataset=rows, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        return betas.seen

    def fresh() -> nn.Module:
        torch.manual_seed(2)
        config = AfaLoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], afa_anneal_end=0.5, afa_activation="silu"
        )
        return get_afa_model(base(), config)

    whole = fresh()
    seen = train(whole, "whole")
    wanted = [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0]
    assert seen[::2] == seen[1::2] == wanted  # the recomputed pass has the same beta
    train(fresh(), "cut", stop=3)
    saved = tmp_path / "cut" / "checkpoint-3"
    assert json.loads((saved / CONFIG).read_text())["afa_beta"] == 0.25
    again = load_afa_model(base(), saved)
    assert train(again, "again", resume=str(saved))[::2] == wanted[3:]
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    save_plain_lora(again, tmp_path / "plain")
    stock = peft.PeftModel.from_pretrained(base(), str(tmp_path / "plain")).eval()
    tokens = torch.arange(25)[None]
    with torch.no_grad():
        torch.testing.assert_close(stock(tokens).logits, again.eval()(tokens).logits)


def test_the_variant_saves_its_beta_and_exports_a_plain_lora(tmp_path: Path) -> None:
    from serval.adapt.peft_variant import load_afa_model, save_plain_lora
    from serval.adapt.peft_variant import set_beta as set_peft_beta

    model = afa_model(afa_activation="gelu")
    set_peft_beta(model, 0.25)
    model.save_pretrained(str(tmp_path / "middle"))
    again = load_afa_model(TwoLinears(), tmp_path / "middle")
    assert again.peft_config["default"].afa_beta == 0.25
    assert torch.equal(again(X), model(X))
    with pytest.raises(ConfigError, match=r"still non-linear \(beta = 0.25\)"):
        save_plain_lora(model, tmp_path / "plain")
    set_peft_beta(model, 0.0)
    save_plain_lora(model, tmp_path / "plain")
    assert "afa" not in (tmp_path / "plain" / CONFIG).read_text()
    stock = peft.PeftModel.from_pretrained(TwoLinears(), str(tmp_path / "plain"))
    assert torch.equal(stock(X), model(X))
    with pytest.raises(ConfigError, match="no AFA-LoRA adapter"):
        load_afa_model(TwoLinears(), tmp_path / "plain")


def test_the_callback_sets_beta_from_the_global_step() -> None:
    from serval.adapt.peft_variant import AfaAnnealing, AfaLoraConfig

    model = afa_model(afa_anneal_end=0.5)
    callback = AfaAnnealing(model)
    layer = model.base_model.model.q_proj
    for step, beta in ((0, 1.0), (2, 0.6), (5, 0.0), (9, 0.0), (2, 0.6)):
        callback.on_step_begin(None, SimpleNamespace(global_step=step, max_steps=10), None)
        assert layer.afa_beta["default"] == pytest.approx(beta)
    with pytest.raises(ConfigError, match="no AfaLoraConfig"):
        AfaAnnealing(plain_model())
    with pytest.raises(ConfigError, match="'sine'; choose one of"):
        AfaLoraConfig(afa_activation="sine")


@pytest.mark.parametrize("kind", ["gqa", "biases"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_runs_our_adapter(kind: str, rslora: bool, tmp_path: Path) -> None:
    """Our decoder, `transformers` + PEFT with the exported adapter, and the merged checkpoint."""
    base = toy_decoder(kind)
    checkpoint.save(base, tmp_path / "base")
    decoder = adapted(kind, activation="relu", rslora=rslora)
    save_adapter(decoder, tmp_path / "adapter", "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    tokens = torch.arange(25) * 7 % 96
    with torch.no_grad():
        theirs = model(tokens[None]).logits[0]
    ours = logits(decoder)
    torch.testing.assert_close(ours[:25], theirs, rtol=0, atol=2e-5)
    again = toy_decoder(kind)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), ours)
    merge(again)
    checkpoint.save(again, tmp_path / "merged")
    merged = checkpoint.load(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), ours, rtol=0, atol=2e-5)


def test_an_adapter_that_peft_wrote(tmp_path: Path) -> None:
    checkpoint.save(toy_decoder(), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.mlp.down_proj": 2},
        alpha_pattern={"down_proj": 10},
    )
    model = randomised(peft.get_peft_model(model, config)).eval()
    model.save_pretrained(str(tmp_path / "adapter"))
    decoder = toy_decoder()
    load_adapter(decoder, tmp_path / "adapter")
    tokens = torch.arange(25) * 7 % 96
    with torch.no_grad():
        theirs = model(tokens[None]).logits[0]
    torch.testing.assert_close(logits(decoder)[:25], theirs, rtol=0, atol=2e-5)
    save_adapter(decoder, tmp_path / "again")  # ranks and alphas that differ go there and back
    back = read_adapter(tmp_path / "again", toy_decoder())
    assert {n: (r.a.shape[0], r.scaling) for n, r in back.layers.items()} == {
        n: (m.lora_A.shape[0], m.scaling) for n, m in adapters(decoder).items()
    }


def test_experts_are_named_out_of_the_targets(tmp_path: Path) -> None:
    save_adapter(adapted("moe-mla"), tmp_path / "a")
    written = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert isinstance(written["lora_alpha"], int)
    targets = written["target_modules"]
    assert "model.layers.0.mlp.shared_experts.gate_proj" in targets
    decoder = toy_decoder("moe-mla")
    load_adapter(decoder, tmp_path / "a")
    assert torch.equal(logits(decoder), logits(adapted("moe-mla")))


def test_saving_a_non_linear_adapter_is_refused(tmp_path: Path) -> None:
    decoder = adapted(activation="relu", beta=0.1)
    with pytest.raises(ConfigError, match=r"still non-linear \(beta = 0.1\)"):
        save_adapter(decoder, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    set_beta(decoder, 0.0)
    save_adapter(decoder, tmp_path / "a")
    with pytest.raises(ConfigError, match="no adapter to save"):
        save_adapter(toy_decoder(), tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; expected 'LORA'"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"lora_bias": True}, "lora_bias = True is not supported"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config is not supported"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"use_afa": True, "afa_beta": 0.5}, r"middle of its annealing \(afa_beta = 0.5\)"),
    ],
)
def test_adapters_that_are_no_plain_lora(change: dict, message: str, tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "a")
    path = tmp_path / "a" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        read_adapter(tmp_path / "a", toy_decoder())


def test_broken_adapters(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "good")
    with pytest.raises(CheckpointError, match="no adapter directory"):
        read_adapter(tmp_path / "none", toy_decoder())
    tensors = load_file(tmp_path / "good" / WEIGHTS)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert name in tensors
    cases = {
        "lacks its lora_A": {k: v for k, v in tensors.items() if k != name},
        r"this model's layer is \[32, 32\]": tensors | {name: torch.zeros(4, 31)},
        "no finite floats": tensors | {name: torch.full((4, 32), torch.nan)},
        "no linear layer 'model.layers.7": tensors
        | {
            "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32),
            "base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight": torch.zeros(32, 4),
        },
        "not a factor": tensors | {"base_model.model.lm_head.weight": torch.zeros(4, 32)},
        "holds no tensors": {},
    }
    for number, (message, changed) in enumerate(cases.items()):
        target = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", target)
        save_file(changed, target / WEIGHTS)
        with pytest.raises(CheckpointError, match=message):
            read_adapter(target, toy_decoder())
    (tmp_path / "good" / WEIGHTS).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_adapter(tmp_path / "good", toy_decoder())
    (tmp_path / "good" / WEIGHTS).unlink()
    (tmp_path / "good" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is missing .*pickle"):
        read_adapter(tmp_path / "good", toy_decoder())


def test_every_kind_of_decoder_exchanges(tmp_path: Path) -> None:
    for kind in KINDS:
        save_adapter(adapted(kind), tmp_path / kind)
        assert len(read_adapter(tmp_path / kind, toy_decoder(kind)).layers) == len(
            adapters(adapted(kind))
        )
