"""The yardstick of compressed models, and the report made of what it measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from serval.bench.harness import Case, Report
from serval.bench.quality import Effort, LayerOutputs, RememberedScorer, Yardstick
from serval.bench.quality_report import draw, findings, main, result_table
from serval.bench.table import BEGIN, END, write_report
from serval.compress.outliers import inject_outliers
from serval.evaluate.scorer import Scorer
from serval.evaluate.shipped import shipped_model
from serval.models import checkpoint
from serval.models.decoder import Decoder

TINY = Effort(text_tokens=256, window=64, context_tokens=96, questions=2, layer_tokens=64)
MACHINE = {"cpu": "a processor", "threads": 2, "torch": "2", "date": "2026-01-01"}


@pytest.fixture(scope="module")
def yardstick() -> Yardstick:
    return Yardstick(shipped_model(), TINY)


def coarser(decoder: Decoder, bits: int) -> Decoder:
    """`decoder` with every matrix of its layers rounded to nearest per channel."""
    with torch.no_grad():
        for module in decoder.layers.modules():
            if isinstance(module, torch.nn.Linear):
                top = 2 ** (bits - 1)
                scale = module.weight.abs().amax(1, keepdim=True) / (top - 0.5)
                module.weight.copy_((module.weight / scale).round().clamp(-top, top - 1) * scale)
    return decoder


def test_the_float_model_is_at_no_distance_and_coarser_weights_are_further(yardstick) -> None:
    base = yardstick.measure(yardstick.decoder)
    assert base.kl == pytest.approx(0, abs=1e-6)
    assert (base.same_top, base.layer_error) == (1.0, 0.0)
    assert 1 < base.perplexity < 100
    assert base.retrieval > 0.5
    eight, four, two = (
        yardstick.measure(coarser(checkpoint.load(shipped_model()), bits)) for bits in (8, 4, 2)
    )
    assert 0 < eight.kl < four.kl < two.kl
    assert 0 < eight.layer_error < four.layer_error < two.layer_error
    assert two.retrieval < base.retrieval
    assert two.perplexity > base.perplexity


def test_layers_are_compared_by_what_they_add_not_by_how(yardstick) -> None:
    moved = checkpoint.load(shipped_model(), dtype=torch.float32)
    before = moved.layers[0].self_attn.q_proj.weight.clone()
    inject_outliers(moved)
    assert not torch.equal(before, moved.layers[0].self_attn.q_proj.weight)
    assert yardstick.layers.mean_error(moved) < 1e-5


def test_one_changed_layer_shows_in_that_layer_only(yardstick) -> None:
    changed = checkpoint.load(shipped_model(), dtype=torch.float32)
    with torch.no_grad():
        changed.layers[2].mlp.down_proj.weight.mul_(1.5)
    errors = yardstick.layers.errors(changed)
    assert errors[2] > 0.01
    assert max(errors[:2] + errors[3:]) == 0.0


def test_the_reference_is_computed_once(monkeypatch) -> None:
    decoder = checkpoint.load(shipped_model(), dtype=torch.float32).eval()
    remembered = RememberedScorer(decoder)
    sequences = [[5, 6, 7], [8, 9]]
    expected = list(Scorer(decoder).logits(sequences))
    first = list(remembered.logits(sequences))
    monkeypatch.setattr(Scorer, "logits", lambda *_: pytest.fail("computed again"))
    for rows in (first, list(remembered.logits(sequences))):
        for (n, at, logits), (m, place, wanted) in zip(rows, expected, strict=True):
            assert (n, at) == (m, place)
            assert torch.equal(logits, wanted)


def test_layer_outputs_do_not_depend_on_how_sequences_are_packed() -> None:
    decoder = checkpoint.load(shipped_model(), dtype=torch.float32).eval()
    together = LayerOutputs.of(decoder, [[5, 6, 7], [8, 9]])
    alone = LayerOutputs.of(decoder, [[8, 9]])
    for both, one in zip(together.added, alone.added, strict=True):
        assert torch.allclose(both[3:], one, atol=1e-4)


def case(recipe: str, granularity: str, kl: float, ppl: float, scales: str = "float") -> Case:
    metrics = {
        "model": "m",
        "recipe": recipe,
        "weights": "w4a8",
        "granularity": granularity,
        "scales": scales,
        "seeds": 3,
        "perplexity": ppl,
        "perplexity_change": ppl / 10 - 1,
        "kl": kl,
        "kl_spread": [0.9 * kl, 1.1 * kl],
        "same_top": 0.9,
        "retrieval": 0.75,
        "layer_error": 0.1,
    }
    if scales == "integer":
        metrics["integer_change"] = 0.0004
    suffix = "-integer" if scales == "integer" else ""
    return Case(f"m-{recipe}-w4a8-{granularity}{suffix}", None, metrics=metrics)


@pytest.fixture
def report() -> Report:
    cases = [
        case("rtn", "channel", 0.03, 10.3),
        case("odyssey", "channel", 0.012, 10.1),
        case("odyssey", "g128", 0.010, 10.09),
        case("odyssey", "g128", 0.010, 10.09, "integer"),
    ]
    return Report("w4a8-quality", MACHINE, cases)


def test_findings_are_computed_from_the_cases(report: Report) -> None:
    text = "\n".join(findings(report))
    assert "at most 0.040% (m-odyssey-w4a8-g128-integer); in 1 of 1 cases" in text
    assert "Odyssey's KL is 0.40 of" in text
    assert "inputs has m-odyssey-w4a8-g128: perplexity +0.90%" in text


def test_one_line_per_case_and_integer_scales_beside_float_ones(report: Report) -> None:
    table = result_table(report)
    rows = [line for line in table.splitlines() if "| w4a8 |" in line]
    assert len(rows) == 3
    assert "| 10.090 (+0.040%) |" in rows[2]
    assert "30.00 (27.00-33.00)" in rows[0]


def test_the_command_fills_the_page_and_draws(report: Report, tmp_path: Path) -> None:
    source, page, picture = tmp_path / "r.json", tmp_path / "p.md", tmp_path / "images" / "p.png"
    write_report(report, source)
    page.write_text(f"# Page\n{BEGIN}\nold\n{END}\nrest\n")
    main([str(source), "--page", str(page), "--picture", str(picture)])
    text = page.read_text()
    assert "old" not in text
    assert text.endswith("rest\n")
    assert "| odyssey |" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    draw(report, picture.with_suffix(".svg"))
    assert "<svg" in picture.with_suffix(".svg").read_text()


@pytest.mark.parametrize(
    ("change", "says"),
    [({"quick": True}, "--quick"), ({"bench": "decode"}, "'decode'"), ({"cases": 3}, "report")],
)
def test_what_is_no_result_is_refused(report, tmp_path, capsys, change, says) -> None:
    source, page = tmp_path / "r.json", tmp_path / "p.md"
    write_report(report, source)
    source.write_text(json.dumps({**json.loads(source.read_text()), **change}))
    page.write_text(f"{BEGIN}\nold\n{END}\n")
    with pytest.raises(SystemExit):
        main([str(source), "--page", str(page)])
    assert says in capsys.readouterr().err
    assert "old" in page.read_text()
