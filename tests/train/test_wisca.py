"""WISCA: the function stays, the norms meet, optimizers follow, runs resume."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from serval.errors import ConfigError
from serval.models.batch import PackedBatch
from serval.models.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig
from serval.models.decoder import Decoder
from serval.optim import Mona, Muon
from serval.optim.covariant import multiply_
from serval.train.wisca import ADAPTERS, Report, WiscaCallback, wisca_
from serval.train.wisca.pairs import Member, Pair, balance
from serval.train.wisca.sites import rotary_pairs
from tests.train.toy import toy_config, toy_trainer

MLA = MLAConfig(16, 8, 4, 6, q_lora_rank=12, scale_q=1.3, scale_kv=0.7)
MODELS: dict[str, ModelConfig] = {
    "gqa-biases": toy_config(qkv_bias=True, output_bias=True, num_attention_heads=8),
    "mha-interleaved": toy_config(num_key_value_heads=4, rope=RopeConfig(interleaved=True)),
    "partly-rotated": toy_config(
        head_dim=16, rope=RopeConfig(fraction=0.5), tie_word_embeddings=True, num_mtp_layers=1
    ),
    "qk-norm": toy_config(qk_norm=True, qkv_bias=True),
    "sinks-window-moe": toy_config(
        attention_sinks=True,
        sliding_window=5,
        layer_types=["sliding", "full"],
        moe=MoEConfig(4, 2, 16, shared_intermediate_size=8, expert_bias=True),
    ),
    "clamped-experts": toy_config(
        moe=MoEConfig(4, 2, 16, expert_bias=True), activation="clamped_swiglu"
    ),
    "mla": toy_config(mla=MLA, qkv_bias=True, rope=RopeConfig(interleaved=True)),
    "mla-plain-queries": toy_config(mla=MLAConfig(16, 8, 4, 6)),
    "shortcut": toy_config(
        mla=MLA, block="shortcut", moe=MoEConfig(4, 3, 16, num_zero_experts=2), mlp_bias=True
    ),
}


def make(name: str, dtype: torch.dtype = torch.float64) -> Decoder:
    """A decoder whose every parameter, biases too, is far from its initial value."""
    decoder = Decoder(MODELS[name])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in decoder.named_parameters():
            mean, std = (1.0, 0.2) if "norm" in parameter_name else (0.0, 0.15)
            parameter.normal_(mean, std, generator=generator)
    return decoder.to(dtype)


def logits(decoder: Decoder) -> Tensor:
    tokens = torch.randint(64, (21,), generator=torch.Generator().manual_seed(1))
    batch = PackedBatch.from_lengths([13, 1, 7])
    hidden = decoder(tokens, batch, pre_norm=True)
    outputs = [decoder.logits(decoder.norm(hidden))]
    if decoder.mtp is not None:
        ahead = decoder.predict_ahead(0, hidden, tokens.roll(-1), batch)
        outputs.append(decoder.logits(decoder.norm(ahead)))
    return torch.cat(outputs)


@pytest.mark.parametrize("level", ["tensor", "head", "row"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@torch.no_grad()
def test_the_function_stays(name: str, level: Any, dtype: torch.dtype, bound: float) -> None:
    decoder = make(name, dtype)
    before, weights = logits(decoder), copy.deepcopy(decoder.state_dict())
    assert before.std() > 0.1
    report = wisca_(decoder, level, level, mlp="row" if level == "row" else "tensor")
    assert (logits(decoder) - before).abs().max() < bound
    layers = len(decoder.attention_layers)
    kinds = [pair.kind for pair in report.pairs]
    assert kinds.count("vo") == layers
    assert kinds.count("qk") == (0 if name == "qk-norm" else layers)
    assert ("mlp" in kinds) == (name != "clamped-experts")
    assert all(pair.residual < 1e-6 for pair in report.pairs)
    assert max(pair.before for pair in report.pairs) > 0.01
    again = wisca_(decoder, level, level, mlp="row" if level == "row" else "tensor")
    assert all((pair.factors - 1).abs().max() < 1e-6 for pair in again.pairs)
    for key, value in decoder.state_dict().items():
        fixed = any(part in key for part in ("gate_proj", "q_a_proj", "eh_proj", "norm"))
        fixed |= key.endswith(("o_proj.bias", "down_proj.bias", "down_bias", "sinks"))
        if fixed or ("proj" not in key and "gate_up" not in key):
            assert torch.equal(value, weights[key]), key


@torch.no_grad()
def test_the_factors_are_the_papers() -> None:
    """Equal initialisation: r = sqrt(1/g) for q and k, sqrt(g) for v and o."""
    torch.manual_seed(0)
    decoder = Decoder(toy_config(num_attention_heads=8, num_key_value_heads=2, hidden_size=128))
    attention = decoder.layers[0].self_attn
    sizes = [m.weight.abs().sum() for m in (attention.q_proj, attention.k_proj)]
    report = wisca_(decoder)
    qk, vo = report.pairs[:2]
    assert float(qk.factors) == pytest.approx(float((sizes[1] / sizes[0]).sqrt()), rel=1e-6)
    assert float(qk.factors) == pytest.approx(0.5, rel=0.03)
    assert float(vo.factors) == pytest.approx(2.0, rel=0.03)
    assert report.imbalance("qk") == pytest.approx(torch.log(torch.tensor(4.0)).item(), rel=0.05)
    q, k = attention.q_proj.weight, attention.k_proj.weight
    assert float(q.abs().sum() / k.abs().sum()) == pytest.approx(1.0, abs=1e-6)
    squares = wisca_(decoder, norm="l2")
    assert float(q.square().sum() / k.square().sum()) == pytest.approx(1.0, abs=1e-6)
    assert squares.pairs[0].residual < 1e-6


def test_rotary_pairs_share_a_factor() -> None:
    assert rotary_pairs(6, "half", 4).tolist() == [0, 1, 0, 1, 2, 3]
    assert rotary_pairs(6, "interleaved", 4).tolist() == [0, 0, 1, 1, 2, 3]
    assert rotary_pairs(6, "half", 3).tolist() == [0, 1, 0, 1, 2, 3]
    assert rotary_pairs(4, "none", 4).tolist() == [0, 1, 2, 3]
    assert rotary_pairs(4, None, 4).tolist() == [0, 0, 0, 0]


@torch.no_grad()
def test_sixteen_bit_weights_move_by_powers_of_two() -> None:
    decoder = make("gqa-biases", torch.bfloat16)
    before = copy.deepcopy(decoder.state_dict())
    first = wisca_(decoder)
    moved = 0
    for key, value in decoder.state_dict().items():
        ratio = (value.double() / before[key].double()).nan_to_num(1.0).flatten()
        assert torch.equal(ratio, ratio[:1].expand_as(ratio)), key  # nothing was rounded
        moved += float(ratio[0]) != 1.0
    assert moved
    assert all(pair.residual <= 0.7 for pair in first.pairs)  # within a factor of two
    assert all(torch.equal(p.factors, torch.ones_like(p.factors)) for p in wisca_(decoder).pairs)


# -- gradients and optimizers -------------------------------------------------------------------


def backward(decoder: Decoder) -> None:
    decoder.zero_grad()
    logits(decoder).log_softmax(-1)[:, 3].sum().neg().backward()


def optimizer_of(kind: str, decoder: Decoder) -> torch.optim.Optimizer:
    parameters = list(decoder.parameters())
    matrices = [p for n, p in decoder.named_parameters() if "proj" in n and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    groups = [
        {"params": matrices},
        {"params": [p for p in parameters if id(p) not in chosen], "algorithm": "adamw"},
    ]
    makers: dict[str, Any] = {
        "sgd": lambda: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(parameters, lr=1e-3, amsgrad=True),
        "adagrad": lambda: torch.optim.Adagrad(parameters, lr=1e-3),
        "muon": lambda: Muon(groups, lr=1e-3),
        "mona": lambda: Mona(groups, lr=1e-3),
        "mona-two": lambda: Mona(groups, lr=1e-3, form="two_buffers"),
        "mona-lite": lambda: Mona(groups, lr=1e-3, lite=True),
    }
    return makers[kind]()


def test_gradients_are_divided_by_the_factor() -> None:
    decoder = make("mla")
    backward(decoder)
    before = {n: (p.detach().clone(), p.grad.clone()) for n, p in decoder.named_parameters()}
    wisca_(decoder, "row", "row")
    carried = {n: p.grad.clone() for n, p in decoder.named_parameters()}
    backward(decoder)
    for name, parameter in decoder.named_parameters():
        factor = parameter.detach() / before[name][0]
        expected = before[name][1] / factor
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(carried[name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "kind", ["sgd", "adamw", "adagrad", "muon", "mona", "mona-two", "mona-lite"]
)
def test_optimizer_state_follows(kind: str) -> None:
    """Momenta of the jumped model are those of one that was always there: rescale first, then take
    gradients at the same points, and every state tensor agrees."""
    jumped = make("gqa-biases", torch.float32 if kind == "mona-lite" else torch.float64)
    moved = copy.deepcopy(jumped)
    wisca_(moved)
    left, right = optimizer_of(kind, jumped), optimizer_of(kind, moved)
    for optimizer in (left, right):
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # the points stay: states see the same function
            group["weight_decay"] = 0.0
    for _ in range(3):
        for decoder, optimizer in ((jumped, left), (moved, right)):
            backward(decoder)
            optimizer.step()
    wisca_(jumped, optimizer=left)
    bound = 1e-2 if kind == "mona-lite" else 1e-9
    compared = 0
    for one, other in zip(jumped.parameters(), moved.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
        for key, value in left.state[one].items():
            if isinstance(value, Tensor) and value.shape == one.shape:
                want = right.state[other][key]
                rest = bound * float(want.abs().max())
                torch.testing.assert_close(value, want, rtol=bound, atol=rest)
                compared += 1
    assert compared >= len(list(jumped.parameters()))


def test_state_may_stay_and_unknown_state_is_refused() -> None:
    decoder = make("gqa-biases")
    optimizer = optimizer_of("adamw", decoder)
    backward(decoder)
    optimizer.step()
    weight = decoder.layers[0].self_attn.q_proj.weight
    kept = optimizer.state[weight]["exp_avg"].clone()
    wisca_(copy.deepcopy(decoder), optimizer=optimizer)  # other weights: not this state
    wisca_(decoder, optimizer=optimizer, covariant=False)
    assert torch.equal(optimizer.state[weight]["exp_avg"], kept)
    optimizer.state[weight]["mystery"] = torch.ones_like(weight)
    before = weight.detach().clone()
    multiply_(weight, torch.full((1, 1), 3.0, dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"state 'mystery' cannot be rescaled.*covariant=False"):
        wisca_(decoder, optimizer=optimizer)
    torch.testing.assert_close(weight.detach(), 3 * before)  # refused before anything moved


@pytest.mark.parametrize("change", ["row_var", "blocks", "list"])
def test_state_of_another_shape_is_refused(change: str) -> None:
    """Without biases Adafactor keeps rows and columns only; 8-bit optimizers keep flat blocks under
    the known names."""
    decoder = make("mha-interleaved")
    weight = decoder.layers[0].self_attn.q_proj.weight
    if change == "row_var":
        optimizer: torch.optim.Optimizer = torch.optim.Adafactor(decoder.parameters())
        backward(decoder)
        optimizer.step()
        assert weight.shape not in [v.shape for v in optimizer.state[weight].values()]
    else:
        optimizer = torch.optim.SGD(decoder.parameters(), lr=1.0)
        state = optimizer.state[weight]
        state["exp_avg" if change == "blocks" else "history"] = (
            torch.zeros(weight.numel() // 8) if change == "blocks" else [torch.zeros(2)]
        )
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    with pytest.raises(ConfigError, match=r"cannot be rescaled.*covariant=False"):
        wisca_(decoder, optimizer=optimizer)
    assert all(torch.equal(tensor, before[n]) for n, tensor in decoder.state_dict().items())
    wisca_(decoder, optimizer=optimizer, covariant=False)


def test_a_jump_before_adamw_is_a_change_of_learning_rates() -> None:
    """Without decay, starting rescaled by c equals learning rates divided by c: what a jump at the
    start gains with AdamW, tuned rates gain too."""
    plain = make("gqa-biases")
    jumped = copy.deepcopy(plain)
    wisca_(jumped)
    factors = {
        name: float((after.detach() / before.detach()).flatten()[0])
        for (name, before), after in zip(plain.named_parameters(), jumped.parameters(), strict=True)
    }
    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.0, "eps": 1e-40}
    control = torch.optim.AdamW(
        [
            {"params": [p], "lr": settings["lr"] / factors[name]}
            for name, p in plain.named_parameters()
        ],
        **settings,
    )
    optimizer = torch.optim.AdamW(jumped.parameters(), **settings)
    start = logits(plain).detach()
    for _ in range(4):
        for decoder, each in ((plain, control), (jumped, optimizer)):
            backward(decoder)
            each.step()
    left, right = logits(plain), logits(jumped)
    assert (left - start).abs().max() > 0.1
    torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


# -- sharpness ----------------------------------------------------------------------------------


def product_pair(q: Tensor, k: Tensor) -> Pair:
    units = torch.zeros(1, dtype=torch.int64)
    members = [Member(q, units.view(1, 1), False), Member(k, units.view(1, 1), True)]
    return Pair("toy", "qk", members, {"tensor": units})


def test_the_balanced_point_is_the_flattest_and_the_one_that_trains() -> None:
    """(QK - C)^2: lambda_max = 2 (Q^2 + K^2) on the curve of solutions; from Q = 10, K = 0.2
    gradient descent at 0.02 diverges, from the balanced point it converges."""
    values = [torch.tensor([[x]], dtype=torch.float64) for x in (10.0, 0.1)]
    hessian = torch.autograd.functional.hessian(lambda a, b: (a * b - 1).square().sum(), (*values,))
    flat = torch.stack([torch.stack([h.squeeze() for h in row]) for row in hessian])
    assert float(torch.linalg.eigvalsh(flat)[-1]) == pytest.approx(2 * (100 + 0.01))
    ends = []
    for jump in (False, True):
        q = torch.tensor([[10.0]], dtype=torch.float64, requires_grad=True)
        k = torch.tensor([[0.2]], dtype=torch.float64, requires_grad=True)
        if jump:
            balance(product_pair(q, k), "tensor", "l1", None, True)
            assert q.item() == pytest.approx(2**0.5)
        optimizer = torch.optim.SGD([q, k], lr=0.02)
        for _ in range(400):
            optimizer.zero_grad()
            (q * k - 1).square().sum().backward()
            optimizer.step()
        ends.append((q * k - 1).square().item())
    assert not ends[0] < 1.0
    assert ends[1] < 1e-12


def test_attention_thrown_out_of_balance_becomes_flatter() -> None:
    """One head, q eight times too large and k too small: the largest eigenvalue falls, the loss
    stays."""
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.float64)
    target = torch.randn(6, 4, dtype=torch.float64)
    q, k = (torch.randn(4, 4, dtype=torch.float64) * 0.4 for _ in range(2))

    def loss(q: Tensor, k: Tensor) -> Tensor:
        scores = (x @ q.T) @ (x @ k.T).T / 2
        return (scores.softmax(-1) @ x - target).square().mean()

    def sharpness(q: Tensor, k: Tensor) -> float:
        blocks = torch.autograd.functional.hessian(loss, (q, k))
        rows = [torch.cat([b.reshape(16, 16) for b in row], dim=1) for row in blocks]
        return float(torch.linalg.eigvalsh(torch.cat(rows))[-1])

    q, k = q * 8, k / 8
    before = float(loss(q, k)), sharpness(q, k)
    balance(product_pair(q, k), "tensor", "l1", None, True)
    assert float(loss(q, k)) == pytest.approx(before[0], abs=1e-12)
    assert sharpness(q, k) < before[1] / 4


# -- what is left alone -------------------------------------------------------------------------


def test_what_cannot_be_rescaled_is_said() -> None:
    decoder = make("qk-norm")
    report = wisca_(decoder)
    assert "norm on queries and keys" in report.skipped["layers.0.self_attn qk"]
    with pytest.raises(ConfigError, match=r"nothing to rescale in Decoder.*norm on queries"):
        wisca_(decoder, vo=None)
    with pytest.raises(ConfigError, match=r"nothing to rescale in Linear; describe its attention"):
        wisca_(nn.Linear(2, 2))
    for wrong in ({"qk": "tensors"}, {"mlp": "head"}, {"norm": "l3"}):
        with pytest.raises(ConfigError, match=r"expected one of|expected l1"):
            wisca_(decoder, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="nothing to do"):
        wisca_(decoder, None, None, lora=None)


def test_zero_and_shared_weights_are_left() -> None:
    decoder = make("gqa-biases")
    first, second = decoder.layers[0].self_attn, decoder.layers[1].self_attn
    second.k_proj.weight = first.k_proj.weight
    with torch.no_grad():
        first.v_proj.weight.zero_()
    report = wisca_(decoder)
    assert report.skipped["layers.1.self_attn qk"] == "shares a weight with another layer"
    assert report.skipped["layers.0.self_attn qk"] == "shares a weight with another layer"
    assert report.skipped["layers.0.self_attn vo"] == "a side is zero or not finite"
    assert all(p.isfinite().all() for p in decoder.parameters())
    decoder.layers[1] = decoder.layers[0]  # the same layer twice is one layer
    assert [pair.name for pair in wisca_(decoder).pairs] == ["layers.0.self_attn"]


def test_an_adapter_describes_an_unknown_layer() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make("gqa-biases").layers[0].self_attn

    model = nn.ModuleList([Odd()])
    seen: list[str] = []

    def mine(name: str, module: nn.Module) -> Any:
        seen.append(name)
        return ADAPTERS[0](name, module.inner) if isinstance(module, Odd) else None

    report = wisca_(model, adapters=[mine])
    assert [pair.name for pair in report.pairs] == ["0", "0"]
    assert seen[0] == ""


# -- in training --------------------------------------------------------------------------------


class Watch(WiscaCallback):
    """Notes at which steps it acted (0: before the first)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.acted: list[int] = []
        self.step = 0

    def on_step_end(self, step: int, model: nn.Module, optimizer: Any, metrics: Any) -> None:
        self.step = step
        super().on_step_end(step, model, optimizer, metrics)
        assert ("wisca_qk" in metrics) == (step % self.every == 0)

    def _rescale(self, model: nn.Module, optimizer: Any) -> Report:
        self.acted.append(self.step)
        return super()._rescale(model, optimizer)


@pytest.mark.parametrize("optimizer", ["adamw", "mona-lite"])
def test_a_resumed_run_keeps_the_phase_and_every_bit(tmp_path: Path, optimizer: str) -> None:
    undisturbed = Watch(every=3)
    whole = toy_trainer(None, optimizer, steps=7, callbacks=[undisturbed])
    whole.fit()
    assert undisturbed.acted == [0, 3, 6]
    toy_trainer(tmp_path, optimizer, steps=4, checkpoint_every=2, callbacks=[Watch(every=3)]).fit()
    after = Watch(every=3)
    resumed = toy_trainer(tmp_path, optimizer, steps=7, callbacks=[after])
    resumed.fit()
    assert after.acted == [6]
    for name, tensor in whole.decoder.state_dict().items():
        assert torch.equal(tensor, resumed.decoder.state_dict()[name]), name


def test_callback_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="every is -1"):
        WiscaCallback(every=-1)
    with pytest.raises(ConfigError, match="qk is 'rows'"):
        WiscaCallback(qk="rows")  # type: ignore[arg-type]
