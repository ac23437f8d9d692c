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
