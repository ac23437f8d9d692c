from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from serval.models.decoder import Decoder
from serval.train import loss as loss_module
from serval.train.loss import LanguageModelLoss, chunked_cross_entropy
from serval.train.stream import Targets, next_token_targets
from tests.train.toy import toy_config


def reference(hidden, weight, targets, row_weights, z_loss):  # type: ignore[no-untyped-def]
    logits = F.linear(hidden, weight).float()
    nll = F.cross_entropy(logits, targets, reduction="none")
    return (row_weights * (nll + z_loss * logits.logsumexp(-1) ** 2)).sum()


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 24),
    vocabulary=st.integers(2, 90),
    chunk=st.integers(1, 64),
    z_loss=st.sampled_from([0.0, 0.01]),
    masked=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_equals_torch_with_gradients(
    rows: int, width: int, vocabulary: int, chunk: int, z_loss: float, masked: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=generator, requires_grad=True)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    row_weights = torch.rand(rows, generator=generator)
    row_weights[torch.rand(rows, generator=generator) < masked] = 0.0
    want = reference(hidden, weight, targets, row_weights, z_loss)
    want_grads = torch.autograd.grad(want, (hidden, weight))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "_chunk_rows", lambda v, d: chunk)
        got, nll = chunked_cross_entropy(hidden, weight, targets, row_weights, z_loss)
        (got * 2.0).backward()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert nll <= got + 1e-5
    for tensor, grad in zip((hidden, weight), want_grads, strict=True):
        torch.testing.assert_close(tensor.grad, 2.0 * grad, rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_is_close() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 32), torch.randn(70, 32, requires_grad=True)
    targets, row_weights = torch.randint(70, (50,)), torch.full((50,), 1 / 50)
    want = reference(hidden, weight, targets, row_weights, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = chunked_cross_entropy(hidden, weight, targets, row_weights)
    got.backward()
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_without_gradients_none_are_computed() -> None:
    with torch.no_grad():
        loss, nll = chunked_cross_entropy(
            torch.randn(4, 8), torch.randn(9, 8), torch.randint(9, (4,)), torch.ones(4)
        )
    assert loss == nll
    assert not loss.requires_grad


def test_targets_stay_inside_documents() -> None:
    row = (torch.arange(6), [1, 3, 2], torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    targets = next_token_targets(row)
    assert targets.weights.tolist() == [0.0, 3.0, 4.0, 0.0, 6.0, 0.0]
    valid = targets.weights > 0
    assert targets.targets[valid].tolist() == [2, 3, 5]
    further = targets.ahead(1)
    assert further.weights.tolist() == [0.0, 4.0, 0.0, 0.0, 0.0, 0.0]
    assert further.targets[1] == 3
    assert targets.ahead(0) is targets


def test_grouped_rows_equal_separate_rows() -> None:
    torch.manual_seed(0)
    model = LanguageModelLoss(Decoder(toy_config()))
    rows = [next_token_targets((torch.randint(64, (12,)), [5, 7], None)) for _ in range(4)]
    apart = sum(model(row)[0] for row in rows)
    together = sum(model(row)[0] for row in Targets.grouped(rows, 2))
    torch.testing.assert_close(apart, together)


def test_mtp_loss_is_the_mean_over_depths() -> None:
    torch.manual_seed(0)
    decoder = Decoder(toy_config(num_mtp_layers=1))
    row = next_token_targets((torch.randint(64, (12,)), [12], None))
    model = LanguageModelLoss(decoder, mtp_weight=0.5)
    loss, nll = model(row)
    plain, _ = LanguageModelLoss(decoder, mtp_weight=0.0)(row)
    torch.testing.assert_close(plain.detach(), nll)
    assert loss > nll
    loss.backward()
    assert decoder.mtp is not None
    assert all(p.grad is not None for p in decoder.mtp.parameters())
    model.eval()
    assert model(row)[0] == model(row)[1]
