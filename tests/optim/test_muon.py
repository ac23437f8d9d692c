"""Muon against `torch.optim.Muon`, and what torch's lacks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from serval.errors import ConfigError
from serval.optim import Mona, Muon
from serval.optim.newton_schulz import orthogonalise

SHAPES = [(64, 64), (48, 96), (96, 48), (64, 64), (7, 130)]
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
BOTH = pytest.mark.parametrize("kind", [Muon, Mona])


def parameters(shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(0.1 * torch.randn(shape, generator=generator)) for shape in shapes]


def descend(
    optimizer: torch.optim.Optimizer, members: list[nn.Parameter], steps: int, first: int = 0
) -> list[Tensor]:
    """Steps on seeded gradients, which must come out unchanged; returns the weights."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        grads = []
        for parameter in members:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            grads.append(parameter.grad.clone())
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(members, grads, strict=True))
    return [parameter.detach().clone() for parameter in members]


def furthest(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("kind", "more"), [(Muon, {}), (Mona, {"alpha": 0.0})])
def test_equals_torch_over_twenty_steps(
    kind: type[Muon], more: dict[str, Any], nesterov: bool, adjust: str | None
) -> None:
    ours, theirs = parameters(), parameters()
    arguments = {"adjust_lr_fn": adjust, "nesterov": nesterov}
    left = descend(kind(ours, ns_dtype=torch.bfloat16, **arguments, **more), ours, 20)
    right = descend(torch.optim.Muon(theirs, **arguments), theirs, 20)
    assert furthest(left, right) <= 2e-6


def test_float32_iteration_equals_torchs_made_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    from serval.bench.optim import use_float32

    monkeypatch.setattr(
        torch.optim._muon,
        "_zeropower_via_newtonschulz",
        torch.optim._muon._zeropower_via_newtonschulz,
    )
    use_float32()
    ours, theirs = parameters(), parameters()
    left = descend(Muon(ours, adjust_lr_fn="match_rms_adamw"), ours, 20)
    right = descend(torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw"), theirs, 20)
    assert furthest(left, right) <= 2e-6


@BOTH
def test_a_stack_is_a_loop_over_its_matrices(kind: type[Muon]) -> None:
    for shape in [(3, 16, 40), (5, 40, 16), (2, 24, 24)]:
        (stack,) = parameters([shape])
        each = [nn.Parameter(matrix.detach().clone()) for matrix in stack]
        one, many = kind([stack]), kind(each)
        for step in range(4):
            stack.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
            for parameter, grad in zip(each, stack.grad, strict=True):
                parameter.grad = grad.clone()
            one.step()
            many.step()
        assert furthest([stack.detach()], [torch.stack([p.detach() for p in each])]) <= 1e-6


@BOTH
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw", "update_norm"])
def test_a_fused_projection_is_its_parts(kind: type[Muon], adjust: str) -> None:
    sizes = (24, 8, 8)
    for stack in ((), (3,)):
        (fused,) = parameters([(*stack, 40, 16)])
        parts = [nn.Parameter(p.clone()) for p in fused.detach().split(sizes, dim=-2)]
        one = kind([fused], split_sizes=sizes, adjust_lr_fn=adjust)
        many = kind(parts, adjust_lr_fn=adjust)
        for step in range(3):
            grad = torch.randn(fused.shape, generator=torch.Generator().manual_seed(step))
            fused.grad = grad
            for part, piece in zip(parts, grad.split(sizes, dim=-2), strict=True):
                part.grad = piece.clone()
            one.step()
            many.step()
        together = torch.cat([p.detach() for p in parts], dim=-2)
        assert furthest([fused.detach()], [together]) <= 1e-6


BATCHED = [(32, 64)] * 5 + [(4, 32, 64), (64, 32), (64, 32)]


@BOTH
@pytest.mark.parametrize(
    ("limit", "sizes"),
    [
        (1, [1, 1, 1, 1, 1, 4, 1, 1]),  # a stack is not divided
        (5000, [2, 2, 1, 4, 2]),
        (1 << 20, [9, 2]),  # one call per shape
    ],
)
def test_batching_changes_nothing(
    kind: type[Muon], limit: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the size of the batches; sizes: matrices in each call of the iteration."""
    ours, other, apart = parameters(BATCHED), parameters(BATCHED), parameters(BATCHED)
    whole = descend(kind(ours), ours, 3)
    each = [kind([p]) for p in apart]
    calls: list[int] = []

    def counted(x: Tensor, *rest: Any) -> Tensor:
        calls.append(len(x))
        return orthogonalise(x, *rest)

    monkeypatch.setattr("serval.optim.muon._batch_elements", lambda device: limit)
    monkeypatch.setattr("serval.optim.muon.orthogonalise", counted)
    assert furthest(whole, descend(kind(other), other, 3)) <= 1e-6
    assert calls == sizes * 3
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for parameter, optimizer in zip(apart, each, strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    assert furthest(whole, [p.detach() for p in apart]) <= 1e-6


@BOTH
def test_a_fused_projection_is_one_call_per_part(
    kind: type[Muon], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, ...]] = []

    def counted(x: Tensor, *rest: Any) -> Tensor:
        calls.append(tuple(x.shape))
        return orthogonalise(x, *rest)

    monkeypatch.setattr("serval.optim.muon.orthogonalise", counted)
    members = parameters([(24, 16)] * 3)
    descend(kind(members, split_sizes=(16, 8)), members, 1)
    assert calls == [(3, 16, 16), (3, 8, 16)]


@BOTH
def test_scale_of_the_gradient_does_not_matter(kind: type[Muon]) -> None:
    ours, other = parameters(), parameters()
    one, thousand = kind(ours, weight_decay=0.0), kind(other, weight_decay=0.0)
    for step in range(10):
        for left, right in zip(ours, other, strict=True):
            grad = torch.randn(left.shape, generator=torch.Generator().manual_seed(step))
            left.grad, right.grad = grad, 1000 * grad
        one.step()
        thousand.step()
    assert furthest([p.detach() for p in ours], [p.detach() for p in other]) <= 1e-3 * 1e-3


@BOTH
def test_a_step_commutes_with_rotations(kind: type[Muon]) -> None:
    q, r = (torch.linalg.qr(torch.randn(n, n))[0] for n in (24, 40))
    (plain,) = parameters([(24, 40)])
    rotated = nn.Parameter(q @ plain.detach() @ r)
    one, other = kind([plain], lr=0.1), kind([rotated], lr=0.1)
    for step in range(3):
        plain.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(step))
        rotated.grad = q @ plain.grad @ r
        one.step()
        other.step()
    assert furthest([q @ plain.detach() @ r], [rotated.detach()]) <= 1e-4


def test_scalings() -> None:
    steps = {}
    for adjust in ("original", "match_rms_adamw", "spectral_unclamped", "update_norm"):
        (weight,) = parameters([(16, 64)])
        before = weight.detach().clone()
        (after,) = descend(
            Muon([weight], lr=1.0, weight_decay=0.0, adjust_lr_fn=adjust), [weight], 1
        )
        steps[adjust] = before - after
    direction = steps["original"]  # a factor of 1 for a wide matrix
    torch.testing.assert_close(steps["match_rms_adamw"], direction * 0.2 * 8)
    torch.testing.assert_close(steps["spectral_unclamped"], direction * 0.5)
    assert steps["update_norm"].square().mean().sqrt() == pytest.approx(0.2, rel=1e-4)


def test_decay_uses_the_unscaled_rate() -> None:
    (weight,) = parameters([(16, 64)])
    before = weight.detach().clone()
    optimizer = Muon([weight], lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before * 0.95)
    weight.grad = None
    state = copy.deepcopy(optimizer.state[weight])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before * 0.95)
    assert torch.equal(state["momentum_buffer"], optimizer.state[weight]["momentum_buffer"])


@BOTH
def test_adamw_lives_in_the_same_object(kind: type[Muon]) -> None:
    (matrix,), rest = parameters([(8, 12)]), parameters([(10, 4), (12,)])
    twins = [nn.Parameter(p.detach().clone()) for p in rest]
    group = {"params": rest, "algorithm": "adamw", "lr": 0.01, "weight_decay": 0.2}
    descend(kind([{"params": [matrix]}, group]), [matrix, *rest], 5)
    adamw = torch.optim.AdamW(twins, lr=0.01, weight_decay=0.2, betas=(0.9, 0.95))
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        torch.randn(matrix.shape, generator=generator)
        for twin in twins:
            twin.grad = torch.randn(twin.shape, generator=generator)
        adamw.step()
    assert furthest([p.detach() for p in rest], [p.detach() for p in twins]) <= 1e-6


STATES = [
    (Muon, {}, 4),
    (Mona, {}, 8),
    (Mona, {"form": "two_buffers"}, 12),
    (Mona, {"lite": True}, 6),
]


@pytest.mark.parametrize(("kind", "more", "size"), STATES)
def test_bytes_of_state(kind: type[Muon], more: dict[str, Any], size: int) -> None:
    members = parameters()
    optimizer = kind(members, **more)
    descend(optimizer, members, 1)
    for parameter in members:
        tensors = [t for t in optimizer.state[parameter].values() if t.ndim > 0]
        assert sum(t.nbytes for t in tensors) == size * parameter.numel()
        assert optimizer.state[parameter]["momentum_buffer"].dtype == torch.float32


@pytest.mark.parametrize(("kind", "more", "size"), STATES)
def test_state_dict_continues_bit_for_bit(
    kind: type[Muon], more: dict[str, Any], size: int, tmp_path: Any
) -> None:
    members = parameters()
    optimizer = kind(members, **more)
    descend(optimizer, members, 3)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    copies = [nn.Parameter(p.detach().clone()) for p in members]
    whole = descend(optimizer, members, 4, first=3)
    resumed = kind(copies, **more)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert all(a.equal(b) for a, b in zip(whole, descend(resumed, copies, 4, first=3), strict=True))


def test_torchs_state_is_taken_over_and_mona_may_follow_muon() -> None:
    members = parameters()
    theirs = torch.optim.Muon(members)
    descend(theirs, members, 3)
    copies = [nn.Parameter(p.detach().clone()) for p in members]
    ours = Mona(copies, alpha=0.0, ns_dtype=torch.bfloat16)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    whole = descend(theirs, members, 3, first=3)
    assert furthest(whole, descend(ours, copies, 3, first=3)) <= 2e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"params": [nn.Parameter(torch.ones(3))]}, r"shape \[3\]; put it into a group"),
        ({"params": [nn.Parameter(torch.ones(2, 2, 2, 2))]}, "Muon takes matrices"),
        ({"split_sizes": (3, 4)}, "add up to 7, the parameter of shape"),
        ({"adjust_lr_fn": "rms"}, "adjust_lr_fn is 'rms'"),
        ({"algorithm": "sgd"}, "algorithm is 'sgd'"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"betas": (2.0, 2.0)}, r"betas is \[2.0, 2.0\]; expected two numbers, 0 <= beta < 1"),
        ({"adam_eps": -1e-8}, "adam_eps is -1e-08"),
        ({"ns_dtype": torch.float16}, "float16 overflows"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Muon(**{"params": parameters([(8, 8)]), **options})


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Muon, {"wight_decay": 0.0}),
        (Muon, {"alpha": 3.0}),
        (Mona, {"bta": 0.5}),
        (Mona, {"wight_decay": 0.0}),
    ],
)
def test_unknown_keywords_are_refused(kind: type[Muon], options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(options))):
        kind(parameters([(8, 8)]), **options)


def test_a_sparse_gradient_is_refused() -> None:
    (weight,) = parameters([(4, 4)])
    weight.grad = torch.eye(4).to_sparse()
    with pytest.raises(ConfigError, match="sparse"):
        Muon([weight]).step()


def test_closure_and_bfloat16_parameters() -> None:
    weight = nn.Parameter(torch.randn(8, 16, dtype=torch.bfloat16))
    before = weight.detach().clone()
    optimizer = Muon([weight], lr=0.1)

    def closure() -> Tensor:
        loss = weight.float().square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert weight.dtype == torch.bfloat16
    assert weight.isfinite().all()
    assert not torch.equal(weight.detach(), before)
