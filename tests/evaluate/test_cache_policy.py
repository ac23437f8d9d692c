"""Evaluation under a cache policy, and profiles of one."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from serval.cache.policies.profile import Profile
from serval.cli import app
from serval.errors import CacheError, ConfigError, DataError
from serval.evaluate import EvalOptions, cache_profile, run
from serval.evaluate.cache_profile import ProfileOptions, draw_samples
from serval.evaluate.perplexity import Window, continuations
from serval.evaluate.scorer import Scorer
from tests.evaluate.toy import tokens, toy_decoder


def logits_of(scorer: Scorer, sequences) -> list[torch.Tensor]:
    rows: list[list[torch.Tensor]] = [[] for _ in sequences]
    for n, first, logits in scorer.logits(sequences):
        assert first == sum(map(len, rows[n]))
        rows[n].append(logits)
    return [torch.cat(parts) for parts in rows]


@pytest.mark.parametrize("chunk", [20, 256])
def test_prompts_are_exact_and_what_follows_is_not(chunk: int) -> None:
    decoder = toy_decoder()
    sequences = [tokens(80, 1), tokens(3, 2), tokens(61, 3)]
    exact = logits_of(Scorer(decoder, chunk=chunk), sequences)
    whole = logits_of(Scorer(decoder, "full", chunk, "uniform:keep=1"), sequences)
    less = logits_of(Scorer(decoder, "full", chunk, "uniform:keep=0.2,least=0"), sequences)
    for n, want in enumerate(exact):
        prompt = len(want) // 2
        torch.testing.assert_close(whole[n], want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(less[n][:prompt], want[:prompt], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(less[0][40:], exact[0][40:], atol=0.1)


def test_only_continuations_are_scored() -> None:
    windows = [Window(list(range(10))), Window(list(range(8)), 7), Window([1, 2])]
    assert [(w.scored_from, w.scored) for w in continuations(windows)] == [(6, 4), (7, 1)]
    assert continuations(windows[:1], 0.75)[0].scored == 2
    with pytest.raises(DataError, match="behind the prompts"):
        continuations(windows[2:])


def test_eval_takes_a_policy(model, texts) -> None:
    options = EvalOptions(
        model,
        policy="prefixkv:keep=0.3,least=0",
        text=str(texts),
        text_tokens=100,
        window=64,
        tasks=("needle",),
        lengths=[96],
        samples=1,
        depths=1,
        reference=model,
    )
    result = run(options)
    assert result.policy == "prefixkv:keep=0.3,least=0"
    assert result.text is not None
    assert result.text.kl is not None
    assert result.text.kl > 0
    assert sum(cell.total for cell in result.cells) == 1
    with pytest.raises(ConfigError, match="--lm-eval"):
        EvalOptions(model, policy="h2o", lm_eval=("hellaswag",))


def test_a_profile_of_a_checkpoint(model, texts, tmp_path) -> None:
    found = cache_profile.run(
        ProfileOptions(model, "prefixkv:keep=0.4,least=0", str(texts), samples=2, length=90)
    )
    assert sum(found.profile.fractions) / 2 == pytest.approx(0.4, abs=1e-5)
    assert len(found.gini) == len(found.retained) == 2
    assert found.profile.tokens == 180
    path = tmp_path / "profile.json"
    found.profile.write(path)
    assert Profile.read(path).model == str(model)
    policy = f"prefixkv:keep=0.4,least=0,profile={path}"
    options = EvalOptions(model, policy=policy, text=str(texts), text_tokens=40, tasks=())
    assert run(options).text is not None
    with pytest.raises(ConfigError, match="context of 512"):
        cache_profile.run(ProfileOptions(model, text=str(texts), length=600))
    with pytest.raises(ConfigError, match="--samples"):
        ProfileOptions(model, samples=0)


def test_where_a_profile_goes_is_checked_before_it_is_measured(tmp_path) -> None:
    words = ["profile-kv", str(tmp_path / "no model"), "--out", str(tmp_path)]
    error = CliRunner().invoke(app, words).exception
    assert isinstance(error, CacheError)
    assert "it is a folder" in str(error)


def test_samples_come_from_different_documents() -> None:
    documents = [[n] * 20 for n in range(4)]
    samples = draw_samples(documents, 4, 15)
    assert sorted(sample[0] for sample in samples) == [0, 1, 2, 3]
    assert len(draw_samples(documents, 6, 20)) == 6
    with pytest.raises(ConfigError, match="no text has 21"):
        draw_samples(documents, 1, 21)
