"""Text longer than the model's context: StreamingLLM's claim (arXiv 2309.17453, fig. 3) on the
shipped model.

Perplexity of 8192 tokens of held-out text, four times the context of `assets/serval-tiny`, by where
in the text a token stands: with every key kept (positions run out of the trained range), with the
last 1024 tokens, and with 4 sinks and the last 1020. Positions of the two short caches stay within
the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from serval.bench.harness import Case, Setup
from serval.cache.memory import PagedMemory, cache_budget
from serval.data.tokenizer import load_tokenizer
from serval.errors import DataError
from serval.evaluate.perplexity import tokenize
from serval.evaluate.shipped import shipped_model
from serval.evaluate.texts import evaluation_texts
from serval.models import checkpoint
from serval.models.decoder import Decoder

CHUNK, BLOCK = 256, 32
ROOM, SINKS = 1024, 4


def caches(room: int) -> dict[str, str]:
    """Case name -> layout."""
    rest = room - SINKS
    return {
        "every key kept": "full",
        f"last {room} tokens": f"streaming:sinks=0,recent={room}",
        f"{SINKS} sinks and the last {rest}": f"streaming:sinks={SINKS},recent={rest}",
    }


@torch.inference_mode()
def losses(decoder: Decoder, tokens: list[int], kv: str, chunk: int = CHUNK) -> Iterator[float]:
    """Nats of each token after the first, from one sequence through the cache in chunks. The
    decoder's rotary tables must reach as far as the text."""
    specs, dtype = decoder.trunk_attention_layers, decoder.norm.weight.dtype
    blocks = -(-len(tokens) // BLOCK)
    size = cache_budget(specs, kv, dtype, blocks=blocks, block_size=BLOCK, sequences=1)
    memory = PagedMemory.of(
        decoder, kv, cache_bytes=size, max_model_len=len(tokens), block_size=BLOCK, max_sequences=1
    )
    cache = memory.manager.create()
    flat = torch.tensor(tokens)
    for first in range(0, len(tokens), chunk):
        rows = flat[first : first + chunk]
        memory.manager.append(cache, len(rows))
        logits = decoder.logits(decoder(rows, memory.batch([cache], [len(rows)]))).float()
        targets = flat[first + 1 : first + 1 + len(rows)]
        yield from F.cross_entropy(logits[: len(targets)], targets, reduction="none").tolist()


def collect(setup: Setup) -> list[Case]:
    """A case per cache: perplexity in each stretch of the model's context."""
    directory = shipped_model()
    tokenizer = load_tokenizer(directory)
    decoder = checkpoint.load(directory).eval()
    context = 128 if setup.quick else decoder.config.max_position_embeddings
    length, room = 4 * context, ROOM if not setup.quick else 64
    texts = evaluation_texts(None, directory, note=setup.note)
    documents = [d for d in tokenize(texts, tokenizer) if len(d) >= length]
    if not documents:
        raise DataError(f"no held-out document has {length} tokens")
    documents = documents[: 1 if setup.quick else 4]
    decoder.rotary.extend(length)
    cases = []
    for name, kv in caches(room).items():
        if not setup.wants(name):
            continue
        rows = torch.tensor([list(losses(decoder, d[:length], kv)) for d in documents])
        means = [part.mean().item() for part in rows.split(context, dim=1)]
        stretches = {
            f"perplexity_{i * context}_to_{(i + 1) * context}": math.exp(mean)
            for i, mean in enumerate(means)
        }
        cases.append(Case(name, None, metrics={"texts": len(documents), **stretches}))
        setup.note(f"  {name}: " + ", ".join(f"{math.exp(mean):.2f}" for mean in means))
    return cases
