"""The step loop: add requests, call `step` until they are finished.

One step: the scheduler picks work, the runner computes logits, the sampler chooses tokens, and each
token is delivered to its sequence, which may end. Not thread-safe: one thread at a time.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from serval.adapt.serving import AdapterBank
from serval.cache.memory import PagedMemory
from serval.engine.constrained import ConstraintCompiler
from serval.engine.detokenizer import Detokenizer
from serval.engine.params import SamplingParams
from serval.engine.penalties import TokenCounts
from serval.engine.request import (
    Delta,
    FinishReason,
    Logprob,
    Request,
    RequestOutput,
    Sequence,
)
from serval.engine.results import Results, check_stop_strings
from serval.engine.runner import Runner
from serval.engine.sampler import sample
from serval.engine.scheduler import Scheduler, Work
from serval.errors import RequestError
from serval.models.decoder import Decoder


@dataclass
class EngineStats:
    """What the engine is doing. Token and request counts are totals since it was made;
    tokens_per_second is the mean over the last few seconds of work; staging_bytes are those of
    prompts that a cache policy keeps outside the cache until they are complete."""

    running: int
    waiting: int
    cache_used_blocks: int
    cache_total_blocks: int
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    prefix_hit_tokens: int
    finished_requests: int
    steps: int
    tokens_per_second: float
    staging_bytes: int = 0


class Engine:
    """Continuous batching over one decoder and one paged cache.

    Args:
        decoder: the model, in eval mode.
        tokenizer: a Hugging Face tokenizer, or None (token ids in, token ids out).
        memory: the paged cache, sized for the decoder.
        eos_token_ids: tokens that end a text.
        adapters: LoRA adapters installed in the decoder, by which a request may be answered.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Any,
        memory: PagedMemory,
        *,
        max_model_len: int,
        max_batch_tokens: int,
        max_sequences: int,
        eos_token_ids: list[int],
        device: torch.device,
        seed: int = 0,
        adapters: AdapterBank | None = None,
    ) -> None:
        self.adapters = adapters
        self.decoder, self.tokenizer, self.memory = decoder, tokenizer, memory
        self.manager = memory.manager
        self.max_model_len = max_model_len
        self.vocab_size = decoder.config.vocab_size
        self.eos_token_ids = list(eos_token_ids)
        self.seed = seed
        self.scheduler = Scheduler(self.manager, max_batch_tokens, max_sequences)
        self.runner = Runner(decoder, memory, max_batch_tokens, max_sequences, device)
        self.requests: dict[str, Request] = {}
        self._constraints = ConstraintCompiler(tokenizer, self.vocab_size, self.eos_token_ids)
        self._results = Results(tokenizer)
        self._arrivals = itertools.count()
        self._prompt_tokens = self._generated = self._finished = self._steps = 0
        self._recent: list[tuple[float, float, int]] = []  # (start, end, tokens) of recent steps

    # Requests

    def add_request(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        request_id: str | None = None,
        on_delta: Callable[[Delta], None] | None = None,
        lora: str | None = None,
    ) -> Request:
        """Queue a prompt. Raises `RequestError` if it cannot be served; then nothing is queued."""
        request = self.prepare(
            prompt_token_ids,
            params,
            prompt=prompt,
            request_id=request_id,
            on_delta=on_delta,
            lora=lora,
        )
        self.submit(request)
        return request

    def prepare(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        request_id: str | None = None,
        on_delta: Callable[[Delta], None] | None = None,
        lora: str | None = None,
    ) -> Request:
        """Check a prompt and compile its constraint, touching nothing of the engine's state: any
        thread may call it. lora: name of the adapter to answer with (None: the model alone).
        Raises `RequestError`."""
        self.check(prompt_token_ids, params)
        adapter = self._adapter(lora)
        arrival = next(self._arrivals)
        seed = params.seed
        if seed is None:
            text = f"{self.seed}/{arrival}".encode()
            seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        return Request(
            request_id or f"request-{arrival}",
            prompt,
            list(prompt_token_ids),
            params,
            arrival,
            seed,
            on_delta,
            constraint=self._constraints.compile(params),
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
            adapter=adapter,
        )

    def _adapter(self, name: str | None) -> int:
        if name is None:
            return 0
        names = [] if self.adapters is None else self.adapters.names
        if self.adapters is None or name not in names:
            known = ", ".join(map(repr, names)) or "none"
            raise RequestError(f"there is no adapter {name!r}; this engine has: {known}")
        return self.adapters.index(name)

    def submit(self, request: Request) -> None:
        """Queue a prepared request. Raises `RequestError` if its id is in use."""
        params = request.params
        if request.request_id in self.requests:
            raise RequestError(f"request id {request.request_id!r} is already in use")
        stop_ids = set(params.stop_token_ids or [])
        if not params.ignore_eos:
            stop_ids.update(self.eos_token_ids)
        # Other weights make other keys and values of the same tokens.
        root = request.adapter.to_bytes(4, "little") if request.adapter else b""
        first = Sequence(request, 0, self.manager.create(root), frozenset(stop_ids))
        first.width = params.n
        first.constraint = request.constraint
        if params.logprobs is not None:
            first.logprobs = []
        if params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty:
            first.counts = TokenCounts(request.prompt_token_ids)
        streams = request.on_delta is not None
        if self.tokenizer is not None and (streams or params.stop_strings):
            first.detokenizer = Detokenizer(self._results.decode(params.skip_special_tokens))
        request.sequences.append(first)
        self.requests[request.request_id] = request
        self.scheduler.add(first)

    def check(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Raise `RequestError` if this engine cannot serve such a request."""
        length = len(prompt_token_ids)
        if length == 0:
            raise RequestError("the prompt is empty: give at least one token")
        room = self.max_model_len - (0 if params.max_tokens == 0 else 1)
        if length > room:
            raise RequestError(
                f"the prompt has {length} tokens; this model's context is {self.max_model_len} "
                "tokens for prompt and output together: shorten the prompt"
            )
        if params.n > self.scheduler.max_sequences:
            raise RequestError(
                f"n={params.n} is more than this engine runs at once "
                f"({self.scheduler.max_sequences}): lower n or raise max_sequences"
            )
        bad = [t for t in prompt_token_ids if not 0 <= t < self.vocab_size]
        if bad:
            raise RequestError(
                f"prompt token {bad[0]} is not in the vocabulary of {self.vocab_size} tokens"
            )
        for name in ("logit_bias", "stop_token_ids"):
            outside = [t for t in getattr(params, name) or [] if t >= self.vocab_size]
            if outside:
                raise RequestError(
                    f"{name} names token {outside[0]}; the vocabulary has {self.vocab_size} tokens"
                )
        if self.tokenizer is None and (params.stop_strings or params.constrained):
            raise RequestError(
                "stop strings and constraints need a tokenizer; this engine has none"
            )

    def abort(self, request_id: str, reason: str | None = None) -> bool:
        """Cancel a request and free its blocks now. False if it is unknown or already finished.
        `reason` becomes the stop_reason of what it had not finished."""
        request = self.requests.pop(request_id, None)
        if request is None:
            return False
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                sequence.stop_reason = reason
                self._finish(sequence, "abort")
                self._send(sequence, [])
        self.refuse(request, reason)
        self._close(request)
        return True

    def refuse(self, request: Request, reason: str | None) -> None:
        """Tell a listener that the continuations that never started will not come."""
        if request.on_delta is not None:
            for branch in range(len(request.sequences), request.params.n):
                request.on_delta(Delta(request.request_id, branch, "", [], None, "abort", reason))

    def abort_all(self, reason: str | None = None) -> None:
        """Cancel everything, for example after a step failed."""
        for request_id in list(self.requests):
            self.abort(request_id, reason)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return self.scheduler.idle

    # The step

    def step(self) -> list[Request]:
        """Advance every scheduled sequence. Returns the requests that finished.

        When the model fails, all requests are cancelled and the error is passed on: the cache's
        books stay right.
        """
        began = time.perf_counter()
        work = self.scheduler.schedule()
        if not work:
            return []
        try:
            logits = self.runner.run(work)
            sequences = self._after_run(work)
            rows = [row for row, group in enumerate(sequences) for _ in group]
            flat = [sequence for group in sequences for sequence in group]
            if len(flat) > len(sequences):
                logits = logits[rows]
            tokens, logprobs = sample(logits, flat) if flat else ([], [])
        except BaseException as error:
            self.abort_all(f"{type(error).__name__}: {error}")
            raise
        finished = []
        for sequence, token, entry in zip(flat, tokens, logprobs, strict=True):
            self._deliver(sequence, token, entry)
            request = sequence.request
            if sequence.finish_reason is not None and request.finished:
                self._close(request)
                finished.append(request)
        self._steps += 1
        self._generated += len(flat)
        self._recent.append((began, time.perf_counter(), len(flat)))
        if len(self._recent) > 512:
            del self._recent[:256]
        return finished

    def _after_run(self, work: list[Work]) -> list[list[Sequence]]:
        """Publish finished blocks and fork siblings. Returns, per logits row, who samples from it
        (several right after a prompt with n > 1)."""
        groups = []
        for item in work:
            sequence = item.sequence
            self.manager.commit(sequence.cache, sequence.tokens)
            if item.start < sequence.num_prompt:
                self._prompt_tokens += min(item.count, sequence.num_prompt - item.start)
            if not item.samples:
                continue
            self.memory.settle(sequence.cache)
            group = [sequence]
            while sequence.width > 1:
                sequence.width -= 1
                sibling = sequence.fork(len(group), self.manager.fork(sequence.cache))
                sequence.request.sequences.append(sibling)
                self.scheduler.add_running(sibling)
                group.append(sibling)
            groups.append(group)
        return groups

    def _deliver(self, sequence: Sequence, token: int, entry: dict[int, Logprob]) -> None:
        """Give a sequence its next token, decide whether it ends, and send the delta."""
        params = sequence.params
        if params.max_tokens == 0:
            self._finish(sequence, "length")
            self._send(sequence, [])
            return
        if token < 0:
            sequence.stop_reason = (
                "no token can be chosen: the model's logits are not finite, or the constraint "
                "leaves none"
            )
            self._finish(sequence, "abort")
            self._send(sequence, [])
            return
        sequence.append(token)
        if sequence.counts is not None:
            sequence.counts.add(token)
        if sequence.logprobs is not None:
            sequence.logprobs.append(self._results.name_tokens(entry))
        stopped = token in sequence.stop_ids
        constraint = sequence.constraint
        if constraint is not None and not (stopped and token in self.eos_token_ids):
            constraint.accept(token)
        if sequence.detokenizer is not None and not stopped:
            sequence.detokenizer.add(token)
        reason: FinishReason | None = None
        if stopped:
            reason = "stop"
            sequence.hidden_tokens = 1
            if token not in self.eos_token_ids or token in (params.stop_token_ids or []):
                sequence.stop_reason = token
        elif constraint is not None and constraint.complete:
            reason = "stop"
            if constraint.error:
                reason = "abort"
                sequence.stop_reason = f"no token can follow the constraint: {constraint.error}"
        elif self._at_limit(sequence):
            reason = "length"
        if sequence.detokenizer is not None:
            if reason is not None:
                sequence.detokenizer.finish()
            if params.stop_strings and sequence.num_output >= params.min_tokens:
                reason = check_stop_strings(sequence) or reason
        if reason is not None:
            self._finish(sequence, reason)
        self._send(sequence, [token])

    def _at_limit(self, sequence: Sequence) -> bool:
        limit = sequence.params.max_tokens
        if limit is not None and sequence.num_output >= limit:
            return True
        return sequence.length >= self.max_model_len

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        self.scheduler.remove(sequence)

    def _close(self, request: Request) -> None:
        self.requests.pop(request.request_id, None)
        request.on_delta = None  # its listener refers to it: no cycle outlives the request
        self._finished += 1

    def output(self, request: Request) -> RequestOutput:
        """The result of a request as far as it got."""
        return self._results.output(request)

    def _send(self, sequence: Sequence, tokens: list[int]) -> None:
        if sequence.request.on_delta is not None:
            sequence.request.on_delta(self._results.delta(sequence, tokens))

    def stats(self) -> EngineStats:
        """A snapshot; cheap enough to call after every step."""
        now = time.perf_counter()
        recent = [(a, b, n) for a, b, n in self._recent if now - b < 5.0]
        busy = sum(b - a for a, b, _ in recent)
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            cache_used_blocks=self.manager.used_blocks,
            cache_total_blocks=self.manager.total_blocks,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated,
            preemptions=self.scheduler.preemptions,
            prefix_hit_tokens=self.scheduler.prefix_hit_tokens,
            finished_requests=self._finished,
            steps=self._steps,
            tokens_per_second=sum(n for _, _, n in recent) / busy if busy else 0.0,
            staging_bytes=self.memory.staging_bytes,
        )
