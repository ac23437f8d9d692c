"""`serval inspect`: the report, its pictures, its numbers and its refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from serval.analyze import InspectOptions, figures, report
from serval.analyze.figures import FIGURES
from serval.analyze.inspection import inspect_decoder, windows
from serval.cli import app
from serval.data.tokenizer import save_tokenizer, train_tokenizer
from serval.errors import ConfigError, DataError
from serval.models import checkpoint
from tests.analyze.models import decoder_of, tokens_of
from tests.evaluate.toy import toy_decoder

TEXT = "def read(path):\n    with open(path) as file:\n        return file.read()\n\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    checkpoint.save(toy_decoder(vocab_size=300, max_position_embeddings=128), folder)
    save_tokenizer(train_tokenizer([TEXT, "red fox 12\n" * 9, "cat = dog\n" * 9], 300), folder, 128)
    (folder / "text.py").write_text(TEXT * 30)
    return folder


def invoke(*words: str) -> object:
    return CliRunner().invoke(app, ["inspect", *words])


def test_the_command_writes_report_pictures_and_numbers(model: Path, tmp_path: Path) -> None:
    result = invoke(
        str(model), "--text", str(model / "text.py"), "--sequences", "2", "--tokens", "48",
        "--rate-sequences", "3", "--out", str(tmp_path / "new" / "report.html"),
        "--pictures", str(tmp_path / "pictures"), "--json", str(tmp_path / "result.json"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output  # type: ignore[attr-defined]
    assert "sink rate" in result.output  # type: ignore[attr-defined]
    page = (tmp_path / "new" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(FIGURES) - 1  # all but the overview
    assert not re.search(r"(src|href)='(?!data:)", page)  # nothing is loaded from elsewhere
    assert "no attention sink" in page
    assert "What happens without it" in page
    pictures = sorted(p.stem for p in (tmp_path / "pictures").iterdir())
    assert pictures == sorted(FIGURES)
    values = json.loads((tmp_path / "result.json").read_text())
    assert len(values["heads"]["first_token"]) == 2
    assert len(values["heads"]["first_token"][0]) == 4
    names = [change["name"] for change in values["changes"]]
    assert "first token's key masked" in names
    assert "2-bit cache, first 4 kept" in names
    assert all(change["result"]["kl"] >= -1e-6 for change in values["changes"])


@pytest.mark.parametrize("kind", ["mla", "moe", "windows and sinks", "shortcut"])
def test_every_kind_of_decoder(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout that cannot serve a model is reported, not an error."""
    monkeypatch.setattr(report, "image", lambda png, description: "")
    monkeypatch.setattr(figures, "FIGURES", dict.fromkeys(FIGURES, lambda result: b""))
    sequences = [tokens_of(32, seed).tolist() for seed in (1, 2)]
    options = InspectOptions("toy", sequences=2, tokens=32)
    result = inspect_decoder(decoder_of(kind), sequences, sequences, options)
    page = report.render(result)
    assert ("Experts whose output spikes" in page) == (kind in ("moe", "shortcut"))
    failed = [change.failed for change in result.changes if change.result is None]
    expected = {"mla": "MLA", "windows and sinks": "sliding-window"}.get(kind)
    assert bool(failed) == bool(expected)
    if expected:
        assert all(expected in str(text) for text in failed)
        assert "not possible" in page
    assert len(report.summary(result)) == 4


def test_a_model_with_a_sink_is_told_so() -> None:
    """All heads look at the first token, which is unlike the others: a strong, dormant sink. The
    first key masked moves predictions more than its small value does."""
    decoder = decoder_of("gqa")
    sequences = [[59, *tokens_of(47, seed).clamp(max=40).tolist()] for seed in (1, 2)]
    decoder.embed_tokens.weight[59] = 0.0
    decoder.embed_tokens.weight[59, 0] = 300.0  # massive
    decoder.embed_tokens.weight[:59, 0] = 0.0
    decoder.embed_tokens.weight[:59, 1] = 30.0  # what the others have in common
    for layer in decoder.layers:
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[:, :2] = 0.0
        attention.q_proj.weight[7::8, 1] = 6.0  # slow rotary pair: position hardly matters
        attention.k_proj.weight[7::8, 0] = 6.0
        attention.o_proj.weight[:2] = 0.0
        layer.mlp.down_proj.weight[:2] = 0.0
    options = InspectOptions("toy", sequences=2, tokens=48)
    result = inspect_decoder(decoder, sequences, sequences, options)
    assert result.sink_rate.mean() > 90
    assert "strong attention sink" in result.verdict
    assert result.survey.heads.dormant.float().mean() > 0.5
    assert result.survey.heads.received.float().mean() > 0.9
    assert all(0 in kept for kept in result.kept["outlier tokens (KVSink)"])
    assert all(kept == [0] for kept in result.kept["attended tokens"])
    zero = result.change("first token's value set to 0")
    masked = result.change("first token's key masked")
    assert zero is not None
    assert masked is not None
    assert masked.kl > 3 * zero.kl
    short = [c.result.kl for c in result.changes if c.group == "short cache" and c.result]
    assert short[1] < 0.5 * short[0]  # sinks kept
    assert any("Keep the first tokens" in line for line in report.advice(result))


def test_windows_come_from_the_text() -> None:
    documents = [list(range(100)), list(range(30)), list(range(500, 580))]
    found = windows(documents, 40, 3, seed=0)
    assert len(found) == 3
    for tokens in found:
        assert any(tokens == d[i : i + 40] for d in documents for i in range(len(d)))
    with pytest.raises(DataError, match="longest has 100"):
        windows(documents, 101, 1, seed=0)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--tokens", "4"], "--tokens must be at least 16"),
        (["--bits", "0"], "--bits must be at least 1"),
        (["--bits", "9"], "--bits must be at most 8"),
        (["--epsilon", "1.5"], "--epsilon must lie between 0 and 1"),
        (["--tau", "1000"], "--tau must lie between 1 and --tokens"),
        (["--tokens", "4096"], "exceeds the model's context of 128"),
        (["--text", "missing.txt"], "does not exist"),
    ],
)
def test_refusals(model: Path, words: list[str], text: str) -> None:
    error = invoke(str(model), *words).exception  # type: ignore[attr-defined]
    assert isinstance(error, ConfigError | DataError)
    assert text in str(error)


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    sequences = [tokens_of(20).tolist()]
    options = InspectOptions("toy", sequences=1, tokens=20)
    result = inspect_decoder(decoder_of("gqa"), sequences, sequences, options)
    for write in (report.write, report.write_pictures):
        with pytest.raises(DataError, match="cannot be written"):
            write(result, blocked / "deeper")
    assert torch.isfinite(result.sink_rate).all()
