"""The two forms of the iteration against float64 and against torch's own function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from serval.errors import ConfigError
from serval.optim.newton_schulz import COEFFICIENTS, Iteration, Workspace, orthogonalise

SHAPES = [(48, 48), (32, 80), (90, 40), (1, 9), (9, 1)]


def matrices(kind: str, m: int, n: int) -> Tensor:
    """Three matrices [3, m, n] of a given spectrum."""
    x = torch.randn(3, m, n, dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    spectrum = {
        "gaussian": s,
        "geometric": torch.logspace(0, -6, s.shape[1], dtype=s.dtype).expand_as(s),
        "low rank": s * (torch.arange(s.shape[1]) < 4),
        "rank one": s * (torch.arange(s.shape[1]) < 1),
    }[kind]
    return (u * spectrum[:, None, :] @ v).float()


def error(x: Tensor, coefficients: str, dtype: torch.dtype) -> float:
    """Largest relative difference from float64, over the batch."""
    exact = orthogonalise(x, Iteration.make(coefficients, dtype=torch.float64))
    ours = orthogonalise(x, Iteration.make(coefficients, dtype=dtype)).double()
    return float(((ours - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))).max())


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["gaussian", "geometric", "low rank", "rank one"])
def test_float32_follows_float64(coefficients: str, shape: tuple[int, int], kind: str) -> None:
    """To 1e-3 with the original coefficients and 8e-3 with the steeper ones, where bfloat16 is off
    by 0.1 to 3."""
    torch.manual_seed(0)
    x = matrices(kind, *shape)
    before = x.clone()
    found = error(x, coefficients, torch.float32)
    assert torch.equal(x, before)
    if kind == "gaussian":
        assert found < (1e-4 if 1 in shape else 1e-5)
        return
    assert found < (1e-3 if coefficients == "original" else 8e-3)
    if 1 not in shape:
        assert 0.1 < error(x, coefficients, torch.bfloat16) < 3.0


@pytest.mark.parametrize("shape", SHAPES)
def test_the_forms_agree_in_float64(shape: tuple[int, int]) -> None:
    from serval.optim import newton_schulz

    x = torch.randn(2, *shape, dtype=torch.float64)
    for name in COEFFICIENTS:
        iteration = Iteration.make(name, dtype=torch.float64)
        plain = newton_schulz._general(x, iteration)
        torch.testing.assert_close(
            newton_schulz._gram(x, iteration, Workspace()), plain, rtol=0, atol=1e-11
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_torchs_function(shape: tuple[int, int]) -> None:
    x = torch.randn(3, *shape)
    ours = orthogonalise(x, Iteration.make(dtype=torch.bfloat16))
    for index in range(3):
        theirs = _zeropower_via_newtonschulz(x[index], COEFFICIENTS["original"][0], 5, 1e-7)
        torch.testing.assert_close(ours[index], theirs, rtol=1e-2, atol=4e-3)


@pytest.mark.parametrize(("coefficients", "low", "high"), [
    ("original", 0.6, 1.2), ("dion", 0.9, 1.1), ("polar_express", 0.8, 1.2),
])  # fmt: skip
def test_singular_values_are_near_one(coefficients: str, low: float, high: float) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(
        orthogonalise(torch.randn(1, 64, 256), Iteration.make(coefficients))
    )
    assert low < values.min() <= values.max() < high


def test_zero_gives_zero_and_an_empty_batch_is_empty() -> None:
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            out = orthogonalise(torch.zeros(2, *shape), Iteration.make(dtype=dtype))
            assert torch.equal(out, torch.zeros(2, *shape, dtype=dtype))
    assert orthogonalise(torch.zeros(0, 3, 4), Iteration.make()).shape == (0, 3, 4)


def test_a_workspace_may_serve_any_sequence_of_shapes() -> None:
    workspace = Workspace()
    for shape in [(4, 20, 33), (1, 33, 20), (7, 8, 8), (4, 20, 33)]:
        x = torch.randn(shape)
        alone = orthogonalise(x, Iteration.make())
        assert torch.equal(orthogonalise(x, Iteration.make(), workspace), alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficients": "quintic"}, "expected one of original"),
        ({"coefficients": (1.0, 2.0)}, "expected three numbers"),
        ({"steps": 0}, "ns_steps is 0"),
        ({"dtype": torch.float16}, "float16 overflows"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Iteration.make(**options)  # type: ignore[arg-type]


def test_a_triple_per_step_repeats_its_last() -> None:
    assert len(Iteration.make("polar_express", 3).triples) == 3
    longer = Iteration.make([(1.0, 0.0, 0.0), (2.0, 0.0, 0.0)], 4).triples
    assert [a for a, _, _ in longer] == [1.0, 2.0, 2.0, 2.0]
