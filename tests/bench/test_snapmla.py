"""`serval bench snapmla`: configurations in the paper's order, the same attention on all sides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from serval import bench
from serval.bench import snapmla, snapmla_errors, snapmla_report
from serval.bench.harness import Setup
from serval.bench.table import read_report
from serval.evaluate.shipped import shipped_model
from serval.models import checkpoint
from serval.models.batch import PackedBatch

TOKENS = torch.arange(100, 170)
SPEC = snapmla_errors.DEEPSEEK


def logits(decoder) -> torch.Tensor:
    with torch.inference_mode():
        return decoder.logits(decoder(TOKENS, PackedBatch.from_lengths([len(TOKENS)])))


def test_configurations_fail_where_the_paper_says() -> None:
    pairs = [("snapmla", regime) for regime in snapmla_errors.REGIMES]
    found = {
        pair: snapmla_errors.errors(*pair, 1000, SPEC, 1)
        for pair in [*pairs, ("a", "rope"), ("b", "norms")]
    }
    for regime, most in (("gaussian", 0.07), ("rope", 0.04), ("norms", 0.25)):
        ours = found["snapmla", regime]
        assert ours["relative_l2"] < most
        assert ours["top1"] > 0.8
        assert ours["logit_std"] == pytest.approx(2.0, rel=0.01)
    assert found["a", "rope"]["relative_l2"] > 2 * found["snapmla", "rope"]["relative_l2"]
    assert found["b", "norms"]["relative_l2"] > 1.5 * found["snapmla", "norms"]["relative_l2"]
    assert found["snapmla", "rope"]["bytes"] == 644
    assert found["a", "rope"]["bytes"] == 580


def test_shared_scales_are_shared() -> None:
    latent, k_rope = torch.randn(130, 32) * torch.logspace(-2, 2, 130)[:, None], torch.randn(130, 8)
    keys = {c: snapmla_errors.keys_of(c, latent, k_rope) for c in snapmla_errors.CONFIGS}
    assert (keys["b"].scales == 1).all()
    assert keys["c"].scales.unique().numel() == 1
    assert keys["d"].scales.unique().numel() == 3
    assert keys["snapmla"].scales.unique().numel() == 130
    assert keys["d"].scales[:64].unique().item() == latent[:64].abs().max() / 448


def test_rescaling_keeps_the_function_and_coding_changes_it_a_little() -> None:
    source = shipped_model(snapmla.MODEL)
    decoder, other = (checkpoint.load(source, dtype=torch.float32).eval() for _ in range(2))
    want = logits(decoder)
    snapmla_errors.rescale_rotary_(other, 50.0)
    torch.testing.assert_close(logits(other), want, atol=2e-3, rtol=1e-3)
    spread = want.std()
    for config in snapmla_errors.CONFIGS:
        got = logits(snapmla_errors.CodedDecoder.of(decoder, config))
        assert 1e-4 * spread < (got - want).std() < 0.2 * spread


def test_all_readers_compute_the_same() -> None:
    torch.manual_seed(0)
    readers, widths = snapmla.make_readers(snapmla.TINY, 4, 150)
    want = readers["full"]()
    for name, read in readers.items():
        error = float((read().float() - want).norm() / want.norm())
        assert error < (0.05 if name == "snapmla" else 0.02), name
    assert widths == {"snapmla": 64 + 4 + 32, "full": 320, "bf16": 160}


def test_quick_run_and_picture(tmp_path: Path) -> None:
    target = tmp_path / "snapmla.json"
    bench.run("snapmla", target, quick=True, note=lambda line: None)
    report = read_report(target)
    cases = {(case.case, case.peer): case for case in report.cases}
    models = {case.case: case.metrics for case in report.cases if case.case.startswith("model-")}
    assert len(models) == 18
    assert models["model-full"]["kl"] == pytest.approx(0, abs=1e-6)
    assert models["model-full-rope50"]["kl"] == pytest.approx(0, abs=1e-5)
    assert models["model-a-rope50"]["kl"] > 3 * models["model-snapmla-rope50"]["kl"]
    assert models["model-a-rope1e6"]["kl"] > 30 * models["model-snapmla-rope1e6"]["kl"]
    assert abs(models["model-snapmla"]["perplexity_change"]) < 0.02
    peers = [peer for name, peer in cases if name == "attention-h4-ctx200"]
    assert peers == ["full", "torch SDPA float32", "bf16", "torch SDPA bfloat16"]
    assert all(case.failed is None and case.missing is None for case in report.cases)
    assert ("full-attention-h4-ctx200", "torch SDPA float32") in cases
    picture = tmp_path / "errors.png"
    snapmla_report.draw(report, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = snapmla_report.result_table(report)
    assert table.count("| snapmla |") == 3 + 3


def test_only_what_is_wanted() -> None:
    cases = snapmla.collect(Setup(quick=True, only="errors-b-norms", note=lambda line: None))
    assert [case.case for case in cases] == ["errors-b-norms-ctx65"]
