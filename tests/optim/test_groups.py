from __future__ import annotations

import pytest
import torch
from torch import nn

from serval.errors import ConfigError
from serval.models.config import MoEConfig
from serval.models.decoder import Decoder
from serval.optim import OPTIMIZERS, OptimizerOptions, Role, RoleOptions, build, route
from tests.train.toy import toy_config

MOE = MoEConfig(4, 2, 16, shared_intermediate_size=16, router_bias=True, expert_bias=True)


def roles_of(model: nn.Module) -> dict[str, Role]:
    return {named.name: named.role for named in route(model)}


def test_every_parameter_of_a_decoder_has_one_role() -> None:
    config = toy_config(moe=MOE, qkv_bias=True, attention_sinks=True, qk_norm=True)
    model = Decoder(config)
    roles = roles_of(model)
    assert set(roles) == dict(model.named_parameters()).keys()
    layer = "layers.0."
    assert roles["embed_tokens.weight"] is Role.EMBEDDING
    assert roles["lm_head.weight"] is Role.HEAD
    assert roles["norm.weight"] is Role.NORM
    assert roles[layer + "self_attn.q_norm.weight"] is Role.NORM
    assert roles[layer + "self_attn.q_proj.weight"] is Role.HIDDEN_MATRIX
    assert roles[layer + "self_attn.q_proj.bias"] is Role.BIAS
    assert roles[layer + "self_attn.sinks"] is Role.BIAS
    assert roles[layer + "mlp.gate.weight"] is Role.ROUTER
    assert roles[layer + "mlp.gate.bias"] is Role.ROUTER_BIAS
    assert roles[layer + "mlp.experts.gate_up_proj"] is Role.EXPERT_STACK
    assert roles[layer + "mlp.experts.down_bias"] is Role.BIAS
    assert roles[layer + "mlp.shared_experts.up_proj.weight"] is Role.HIDDEN_MATRIX


def test_tied_head_is_an_embedding_and_listed_once() -> None:
    roles = roles_of(Decoder(toy_config(tie_word_embeddings=True)))
    assert roles["embed_tokens.weight"] is Role.EMBEDDING
    assert Role.HEAD not in roles.values()


def test_a_module_may_declare_roles_and_frozen_parameters_are_left_out() -> None:
    class Mixer(nn.Module):
        parameter_roles = {"kernel": Role.HIDDEN_MATRIX}  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.zeros(2, 3))
            self.frozen = nn.Parameter(torch.zeros(2, 3), requires_grad=False)

    assert roles_of(Mixer()) == {"kernel": Role.HIDDEN_MATRIX}


def test_an_unknown_matrix_is_an_error_that_names_it() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(2, 3))

    with pytest.raises(ConfigError, match=r"'inner\.table' of Unknown.*parameter_roles"):
        route(nn.ModuleDict({"inner": Unknown()}))


def test_roles_change_learning_rate_and_decay() -> None:
    options = OptimizerOptions(
        lr=0.1, weight_decay=0.5, roles={Role.EMBEDDING: RoleOptions(lr=2.0, weight_decay=0.25)}
    )
    optimizer = build("adamw", Decoder(toy_config()), options)
    groups = {group["role"]: group for group in optimizer.param_groups}
    assert groups["embedding"]["lr"] == pytest.approx(0.2)
    assert groups["embedding"]["weight_decay"] == 0.25
    assert groups["norm"]["weight_decay"] == 0.0
    assert groups["hidden_matrix"]["weight_decay"] == 0.5
    optimizer.set_multiplier(0.5)
    assert groups["embedding"]["lr"] == pytest.approx(0.1)


def test_muon_takes_hidden_matrices_and_expert_stacks_and_adamw_the_rest() -> None:
    model = Decoder(toy_config(moe=MOE))
    optimizer = build("muon", model, OptimizerOptions(lr=1e-3, muon_lr=2e-2))
    (muon,) = optimizer.optimizers
    for group in muon.param_groups:
        orthogonalised = group["role"] in ("hidden_matrix", "expert_stack")
        assert group["algorithm"] == ("muon" if orthogonalised else "adamw")
        assert group["lr"] == group["base_lr"] == (2e-2 if orthogonalised else 1e-3)
    stacks = {g["names"][0]: g["split_sizes"] for g in muon.param_groups if "_proj" in str(g)}
    assert stacks["layers.0.mlp.experts.gate_up_proj"] == (16, 16)
    assert stacks["layers.0.mlp.experts.down_proj"] is None


def muon_update(weight: torch.Tensor, **options: object) -> torch.Tensor:
    """What one Muon step with learning rate 1 subtracts from `weight` for a fixed gradient."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    layer.weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    build("muon", layer, OptimizerOptions(lr=1.0, weight_decay=0.0, **options)).step()  # type: ignore[arg-type]
    return weight - layer.weight.detach()


def test_muon_adjust_scales_the_same_direction() -> None:
    weight = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    original = muon_update(weight, muon_adjust="original")
    matched = muon_update(weight, muon_adjust="match_rms_adamw")
    # Tall matrices: sqrt(rows / columns) against 0.2 sqrt(longer side).
    torch.testing.assert_close(matched, original * 0.2 * 8 / 2, rtol=1e-3, atol=1e-5)


def test_muon_with_more_steps_is_nearer_to_orthogonal() -> None:
    weight = torch.zeros(32, 32)

    def spread(steps: int) -> float:
        values = torch.linalg.svdvals(muon_update(weight, ns_steps=steps, muon_adjust="original"))
        return float(values.max() / values.min())

    assert spread(9) < 2 < spread(1)


def test_unknown_optimizer_lists_the_choices() -> None:
    with pytest.raises(ConfigError, match="unknown optimizer 'sgd'; choose one of: adamw, mona"):
        build("sgd", Decoder(toy_config()), OptimizerOptions())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_materialising_state_moves_no_weight(name: str) -> None:
    torch.manual_seed(0)
    model = Decoder(toy_config())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = build(name, model, OptimizerOptions(lr=0.1))
    optimizer.materialise_state()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    state = optimizer.state_tensors()
    assert {key.split("|")[0] for key in state} == dict(model.named_parameters()).keys()
    assert all(group["lr"] == group["base_lr"] for group in optimizer.param_groups)


class Body(nn.Module):
    """Embedding of 40 words, one hidden matrix, and a head of a name to be chosen."""

    def __init__(self, head: str, tied: bool = False, first: bool = False) -> None:
        super().__init__()
        if first:
            setattr(self, head, nn.Linear(8, 40, bias=False))
        self.wte = nn.Embedding(40, 8)
        self.position = nn.Embedding(12, 8)
        self.up_proj = nn.Linear(8, 12)
        if not first:
            setattr(self, head, nn.Linear(8, 40, bias=False))
        if tied:
            getattr(self, head).weight = self.wte.weight


def test_a_linear_tied_to_an_embedding_is_an_embedding_even_when_it_comes_first() -> None:
    roles = roles_of(Body("out", tied=True, first=True))
    assert roles["out.weight"] is Role.EMBEDDING
    assert "wte.weight" not in roles
    assert roles["up_proj.weight"] is Role.HIDDEN_MATRIX


def test_a_head_of_another_name_is_found_or_asked_about() -> None:
    assert roles_of(Body("embed_out"))["embed_out.weight"] is Role.HEAD
    unknown = Body("to_words")
    with pytest.raises(ConfigError, match=r"'to_words\.weight' has 40 rows.*Role\.HEAD"):
        route(unknown)
    unknown.to_words.parameter_roles = {"weight": Role.HEAD}
    assert roles_of(unknown)["to_words.weight"] is Role.HEAD

    class Told(Body):
        def get_output_embeddings(self) -> nn.Module:
            return self.to_words

    wrapped = nn.ModuleDict({"inner": Told("to_words")})
    assert roles_of(wrapped)["inner.to_words.weight"] is Role.HEAD


def test_a_hidden_matrix_may_have_as_many_rows_as_the_vocabulary() -> None:
    """In a model whose head is known, tied or not."""
    for tied in (False, True):
        model = Decoder(toy_config(intermediate_size=64, tie_word_embeddings=tied))
        assert roles_of(model)["layers.0.mlp.up_proj.weight"] is Role.HIDDEN_MATRIX


def test_heads_of_transformers_models_are_found() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    roles = roles_of(transformers.BertForMaskedLM(config))
    heads = [name for name, role in roles.items() if role is Role.HEAD]
    assert heads == ["cls.predictions.decoder.weight"]
    assert roles["bert.encoder.layer.0.intermediate.dense.weight"] is Role.HIDDEN_MATRIX


def test_low_rank_factors_go_to_adamw() -> None:
    from serval.adapt.lora import LoraLinear, LoraOptions

    model = Body("lm_head").requires_grad_(False)
    model.up_proj = LoraLinear(model.up_proj, LoraOptions(rank=2))  # type: ignore[assignment]
    roles = roles_of(model)
    assert set(roles) == {"up_proj.lora_A", "up_proj.lora_B"}
    assert set(roles.values()) == {Role.LOW_RANK_FACTOR}
    notes: list[str] = []
    for name in ("muon", "mona", "mona-lite"):
        optimizer = build(name, model, OptimizerOptions(), notes.append)
        assert {group["algorithm"] for group in optimizer.param_groups} == {"adamw"}
    assert len(notes) == 3
    assert all("nothing to orthogonalise here" in note for note in notes)


def test_factors_of_peft_go_to_adamw() -> None:
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=2, target_modules=["up_proj", "wte"], modules_to_save=["position"])
    roles = roles_of(peft.get_peft_model(Body("embed_out"), options))
    factors = [name for name, role in roles.items() if role is Role.LOW_RANK_FACTOR]
    assert len(factors) == 4
    assert all("lora_" in name for name in factors)
    assert set(roles.values()) == {Role.LOW_RANK_FACTOR, Role.EMBEDDING}


@pytest.mark.parametrize("values", [{"lr": -1.0}, {"lr": float("nan")}, {"weight_decay": -0.1}])
def test_numbers_of_a_role_are_checked(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"of a role is .*expected a finite number"):
        RoleOptions(**values)
