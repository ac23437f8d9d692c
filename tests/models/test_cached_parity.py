"""Chunked prefill and decode through the paged cache give `transformers`' logits, every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from torch import Tensor

from serval.cache.manager import SequenceCache
from serval.cache.memory import PagedMemory
from serval.models import checkpoint
from serval.models.decoder import Decoder

TOLERANCE = 1e-4
LENGTHS = [11, 70, 33]
# Per step, how many tokens of each sequence run: chunks of prompts mixed with single tokens.
STEPS = [[5, 40, 0], [1, 26, 20], [1, 1, 9], [1, 1, 1], [1, 1, 1], [1, 0, 1], [1, 1, 1]]


@torch.inference_mode()
def run_step(
    decoder: Decoder,
    memory: PagedMemory,
    work: list[tuple[SequenceCache, Tensor]],
) -> Tensor:
    """Append each sequence's `tokens` and compute them. Returns logits of all rows."""
    for cache, tokens in work:
        memory.manager.append(cache, len(tokens))
    batch = memory.batch([cache for cache, _ in work], [len(tokens) for _, tokens in work])
    return decoder.logits(decoder(torch.cat([tokens for _, tokens in work]), batch))


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_chunked_prefill_and_decode_equal_transformers(name: str, tmp_path: Path) -> None:
    model = tiny_models.make(name)
    model.save_pretrained(tmp_path)
    decoder = checkpoint.load(tmp_path)
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(3, tiny_models.VOCAB, (n,), generator=generator) for n in LENGTHS]
    with torch.no_grad():
        expected = [model(row[None], use_cache=False).logits[0] for row in rows]
    memory = PagedMemory(
        decoder.attention_layers, "full", cache_bytes=8 << 20, max_model_len=128, block_size=8
    )
    caches = [memory.manager.create() for _ in rows]
    for counts in STEPS:
        work, wanted = [], []
        for cache, row, reference, count in zip(caches, rows, expected, counts, strict=True):
            if count:
                span = slice(cache.num_tokens, cache.num_tokens + count)
                work.append((cache, row[span]))
                wanted.append(reference[span])
        logits = run_step(decoder, memory, work)
        assert (logits - torch.cat(wanted)).abs().max() <= TOLERANCE
        memory.manager.check_integrity()
    assert [c.num_tokens for c in caches] == [len(row) for row in rows]
