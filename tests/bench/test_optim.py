"""The optimizer benchmarks: a fair peer, honest counting, a right eigenvalue, resumption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from serval.bench import optim, optim_quality
from serval.bench.harness import Setup


@pytest.fixture
def quiet() -> Setup:
    return Setup(quick=True, note=lambda line: None)


@pytest.mark.parametrize("shape", optim.LISTS)
def test_peer_and_ours_do_the_same_work(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.optim._muon,
        "_zeropower_via_newtonschulz",
        torch.optim._muon._zeropower_via_newtonschulz,
    )
    work = optim.Work(optim._tiny(optim.LISTS[shape]))
    ours = optim.ServalSteps(work, "muon", "float32")
    theirs = optim.TorchSteps(work, float32=True)
    for steps in (ours, theirs):
        steps.measure(2)
    other = dict(theirs.decoder.named_parameters())
    start = dict(work.decoder().named_parameters())
    for name, parameter in ours.decoder.named_parameters():
        torch.testing.assert_close(parameter, other[name], rtol=0, atol=2e-6)
        decays = "embed" not in name and "norm" not in name
        assert not decays or not torch.equal(parameter, start[name])
    assert ours.state_bytes() == pytest.approx(theirs.state_bytes(), rel=0.01)


def test_operations_are_counted() -> None:
    work = optim.Work(optim._tiny(optim.LLAMA_100M))
    hidden, inner, kv = 64, 96, 32
    count = 2 * 20 * hidden**3  # q and o
    count += 2 * (3 * kv**2 * hidden + 17 * kv**3)
    count += 3 * (3 * hidden**2 * inner + 17 * hidden**3)
    assert work.flops() == count


def test_the_lists_have_the_sizes_they_are_named_for() -> None:
    with torch.device("meta"):
        models = {name: optim.Decoder(config) for name, config in optim.LISTS.items()}
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in models.items()}
    assert sizes["llama-100m"] == pytest.approx(100e6, rel=0.02)
    stacks = [p for p in models["moe-64experts"].parameters() if p.ndim == 3]
    assert {p.shape[0] for p in stacks} == {64}


@pytest.mark.parametrize("values", [[3.0, 1.0, -2.0], [1.0, 0.5, -6.0]])
def test_eigenvalue_of_a_quadratic(values: list[float]) -> None:
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    hessian = q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T
    x = torch.randn(3, dtype=torch.float64)
    parameters = [x[:2].clone(), x[2:].clone()]

    def gradient() -> list[torch.Tensor]:
        slope = hessian @ torch.cat(parameters)
        return [slope[:2], slope[2:]]

    found = optim_quality.largest_eigenvalue(gradient, parameters, 200)
    assert found == pytest.approx(max(values), rel=1e-3)
    assert torch.equal(torch.cat(parameters), x)


def test_first_below_interpolates() -> None:
    curve = [(10, 5.0), (20, 3.0), (40, 2.0)]
    assert optim_quality.first_below(curve, 4.0) == pytest.approx(15 / 40)
    assert optim_quality.first_below(curve, 6.0) == pytest.approx(10 / 40)
    assert optim_quality.first_below(curve, 1.0) is None


def test_quality_runs_and_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: Setup
) -> None:
    monkeypatch.setenv("SERVAL_BENCH_DIR", str(tmp_path))
    words = [[(i * 7 + j) % 500 for j in range(64)] for i in range(24)]
    rows = [(torch.tensor(row), [64], None) for row in words]
    made: list[int] = []

    def make(size: optim_quality.Size) -> optim_quality.Text:
        made.append(1)
        return optim_quality.Text(rows[:20], rows[20:])  # type: ignore[arg-type]

    monkeypatch.setattr(optim_quality, "make_text", make)
    first = optim_quality.collect(quiet)
    assert [case.case for case in first] == [
        f"{name}-{model}" for model in ("dense", "moe") for name in optim_quality.OPTIMIZERS
    ]
    for case in first:
        assert 0 < case.metrics["validation_loss"] < 20
        assert case.metrics["seeds"] == 1
    again = optim_quality.collect(quiet)
    assert [case.metrics for case in again] == [case.metrics for case in first]
    assert len(made) == 1
