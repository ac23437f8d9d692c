"""How much an engine's cache holds: bytes, sequences at once, and how long one may become."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from serval.cache.memory import cache_bytes_per_token, cache_state_bytes
from serval.errors import CacheError
from serval.models.decoder import Decoder

logger = logging.getLogger(__name__)

_MOST_SEQUENCES = 64  # unless more are asked for
_STATES_SHARE = 0.25  # of the cache that states may take while nobody asks for more sequences
_DEFAULT_SEQUENCES = 16  # full-length sequences that the default budget holds
_DEFAULT_MEMORY = 0.25  # and at most this share of the free memory


@dataclass(frozen=True)
class CacheSize:
    """cache_bytes: storage of keys and values, states included. max_sequences: that run at once.
    max_model_len: tokens of one sequence."""

    cache_bytes: int
    max_sequences: int
    max_model_len: int


def cache_size(
    decoder: Decoder,
    kv: str | Sequence[str],
    block_size: int,
    *,
    cache_bytes: int | None,
    max_sequences: int | None,
    max_model_len: int | None,
    max_batch_tokens: int | None = None,
) -> CacheSize:
    """What was asked for, and the defaults of what was not (None).

    cache_bytes: room for 16 full sequences, at most a quarter of the free memory. max_sequences:
    64, or as many as have their states in a quarter of cache_bytes, no more than max_batch_tokens,
    the rows of a step. max_model_len: the model's, or
    less if the free memory does not hold one such sequence. Raises `CacheError` when it holds none.
    """
    weight, specs = decoder.norm.weight, decoder.trunk_attention_layers
    per_token = cache_bytes_per_token(specs, kv, weight.dtype)
    state = cache_state_bytes(specs, kv, weight.dtype)
    limit = max_model_len or decoder.config.max_position_embeddings
    budget = cache_bytes
    most = max_sequences or min(_MOST_SEQUENCES, max_batch_tokens or _MOST_SEQUENCES)
    if budget is None:
        blocks = (-(-limit // block_size) + 1) * min(most, _DEFAULT_SEQUENCES)
        wanted = blocks * math.ceil(per_token * block_size) + most * state
        budget = min(wanted, int(_DEFAULT_MEMORY * _free_memory(weight.device)))
    if max_sequences is None:
        share = int(budget * _STATES_SHARE) if per_token else budget
        max_sequences = max(1, min(most, share // state)) if state else most
    if cache_bytes is None:
        states = max_sequences * state
        room = budget - states
        if room < per_token * block_size:
            raise CacheError(_no_room(kv, budget, states, max_sequences))
        if max_model_len is None and 0 < per_token * (limit + block_size) > room:
            limit = max(0, int(room // (per_token * block_size))) * block_size
            logger.warning("the free memory holds %d tokens: max_model_len is set to it", limit)
    return CacheSize(budget, max_sequences, limit)


def _no_room(kv: str | Sequence[str], cache_bytes: int, states: int, max_sequences: int) -> str:
    least = f"the states of {max_sequences} sequences with kv={kv!r} alone are {states:,} bytes"
    return (
        f"a quarter of the free memory, {cache_bytes:,} bytes, holds no token: "
        f"{least if states else 'one block is more'}. Lower "
        f"{f'the options in kv={kv!r} or max_sequences' if states else 'block_size'}, or give "
        "cache_bytes"
    )


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
