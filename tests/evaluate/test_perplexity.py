from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serval.errors import DataError, RequestError
from serval.evaluate.perplexity import cut, pack, score, spread
from serval.evaluate.scorer import Scorer
from serval.models.batch import PackedBatch
from tests.evaluate.toy import tokens, toy_decoder


@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    window=st.integers(2, 24),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_every_token_but_the_first_is_scored_once(lengths, window, data):
    stride = data.draw(st.none() | st.integers(1, window - 1))
    limit = data.draw(st.none() | st.integers(1, 40))
    documents = [[100 * d + i for i in range(n)] for d, n in enumerate(lengths)]
    expected = [t for document in documents for t in document[1:]]
    if not expected:
        with pytest.raises(DataError, match="too short"):
            cut(documents, window, stride, limit)
        return
    windows = cut(documents, window, stride, limit)
    assert [t for w in windows for t in w.tokens[w.scored_from :]] == expected[:limit]
    assert all(len(w.tokens) <= window and w.scored_from >= 1 for w in windows)
    if stride is not None:
        for w in windows:
            whole = w.tokens[0] % 100 == 0  # starts its document
            assert whole or w.scored_from >= min(window - stride, w.scored_from)
            assert whole or len(w.tokens) == window or limit is not None


@pytest.mark.parametrize("stride", [None, 4])
def test_spread_reads_every_document_and_scores_no_token_twice(stride):
    documents = [list(range(100 * d, 100 * d + 30)) for d in range(6)]
    few = spread(documents, 8, stride, 40)
    assert sum(w.scored for w in few) == 40
    assert {w.tokens[0] // 100 for w in few} == set(range(6))
    every = spread(documents, 8, stride, 10_000)
    scored = [t for w in every for t in w.tokens[w.scored_from :]]
    assert sorted(scored) == [t for d in documents for t in d[1:]]
    assert spread(documents, 8, stride, 40) == few
    with pytest.raises(DataError, match="too short"):
        spread([[3], []], 8, stride, 40)


def test_packs_keep_order_and_budget():
    windows = cut([tokens(9), tokens(30), tokens(3), tokens(4)], 20)
    batches = pack(windows, 24)
    assert [w for batch in batches for w in batch] == windows
    assert all(len(b) == 1 or sum(len(w.tokens) for w in b) <= 24 for b in batches)


@pytest.mark.parametrize("kv", [None, "full"])
@pytest.mark.parametrize("chunk", [7, 256])
def test_scorer_gives_the_logits_of_a_plain_forward(kv, chunk):
    decoder = toy_decoder()
    sequences = [tokens(33, 1), tokens(5, 2), tokens(64, 3)]
    rows: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
    for n, first, logits in Scorer(decoder, kv, chunk).logits(sequences):
        assert first == sum(len(r) for r in rows[n])
        assert len(logits) <= chunk
        rows[n].append(logits)
    for n, sequence in enumerate(sequences):
        with torch.no_grad():
            hidden = decoder(torch.tensor(sequence), PackedBatch.from_lengths([len(sequence)]))
            expected = decoder.logits(hidden)
        torch.testing.assert_close(torch.cat(rows[n]), expected, atol=1e-4, rtol=1e-4)


def test_perplexity_is_that_of_the_formula():
    decoder = toy_decoder()
    sequence = tokens(50, 4)
    windows = cut([sequence], 32, stride=8)
    got = score(Scorer(decoder, chunk=16), windows)
    nats = []
    for window in windows:
        with torch.no_grad():
            batch = PackedBatch.from_lengths([len(window.tokens)])
            logits = decoder.logits(decoder(torch.tensor(window.tokens), batch))
        log_p = logits.log_softmax(-1)
        for i in range(window.scored_from, len(window.tokens)):
            nats.append(-log_p[i - 1, window.tokens[i]].item())
    assert got.tokens == 49
    assert got.nats == pytest.approx(sum(nats) / 49, rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(sum(nats) / 49), rel=1e-5)


def test_reference_measures():
    decoder, other = toy_decoder(0), toy_decoder(1)
    windows = cut([tokens(40, 5), tokens(21, 6)], 16)
    same = score(Scorer(decoder), windows, reference=Scorer(decoder, "full"))
    assert same.kl == pytest.approx(0, abs=1e-5)
    assert same.same_top == 1.0
    assert same.reference_perplexity == pytest.approx(same.perplexity, rel=1e-4)
    far = score(Scorer(decoder), windows, reference=Scorer(other))
    log_p, log_q = [], []
    for window in windows:
        for model, out in ((decoder, log_p), (other, log_q)):
            with torch.no_grad():
                hidden = model(
                    torch.tensor(window.tokens), PackedBatch.from_lengths([len(window.tokens)])
                )
                out.append(model.logits(hidden)[:-1].log_softmax(-1))
    p, q = torch.cat(log_p), torch.cat(log_q)
    assert far.kl == pytest.approx((q.exp() * (q - p)).sum(-1).mean().item(), rel=1e-4)
    assert far.same_top == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())


def test_int8_cache_moves_predictions_a_little():
    decoder = toy_decoder()
    windows = cut([tokens(200, 7)], 128)
    got = score(Scorer(decoder, "int8"), windows, reference=Scorer(decoder))
    assert 0 < got.kl < 0.05
    assert got.same_top > 0.9


def test_batches_do_not_change_the_score():
    windows = cut([tokens(70, s) for s in range(3)], 64)
    scores = [score(Scorer(toy_decoder(), "full", 16), windows, batch_tokens=b) for b in (1, 4096)]
    assert scores[0].nats == pytest.approx(scores[1].nats, rel=1e-5)


def test_bad_input_is_named():
    with pytest.raises(RequestError, match=r"300 tokens.*256"):
        next(Scorer(toy_decoder()).logits([tokens(300)]))
    with pytest.raises(DataError, match="stride 0"):
        cut([tokens(9)], 8, 0)
    windows = cut([tokens(9)], 8)
    with pytest.raises(DataError, match="one vocabulary"):
        score(Scorer(toy_decoder()), windows, reference=Scorer(toy_decoder(vocab_size=321)))
