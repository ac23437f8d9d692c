"""`LLM`: a model, its tokenizer, a cache and an engine behind one object.

llm = LLM("path/or/hub-name", kv="int8")
for output in llm.generate(["def fib(n):"], SamplingParams(temperature=0)):
    print(output.outputs[0].text)
"""

from __future__ import annotations

import json
import logging
import reprlib
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from serval.adapt.serving import AdapterBank
from serval.cache.budgeted import make_memory
from serval.cache.layouts import layout_class
from serval.cache.memory import layer_layouts
from serval.cache.policies.base import Policy
from serval.data.tokenizer import holds_tokenizer, load_tokenizer
from serval.engine.engine import Engine, EngineStats
from serval.engine.params import SamplingParams
from serval.engine.request import Delta, Request, RequestOutput
from serval.engine.sizing import cache_size
from serval.errors import ConfigError, RequestError
from serval.models import checkpoint
from serval.models.decoder import Decoder

if TYPE_CHECKING:
    from serval.engine.async_engine import AsyncLLM

logger = logging.getLogger(__name__)

Prompts = str | list[str] | list[int] | list[list[int]]
Loras = str | Sequence[str | None] | None
_CPU_ROWS, _GPU_ROWS = 512, 2048  # of a step


class LLM:
    """Generate text with one model.

    Args:
        model: a checkpoint directory, a hub name, or a `Decoder` (used as it is; `dtype` and
            `device` move it in place).
        tokenizer: a Hugging Face tokenizer or where to load one; by default the model's own.
        kv: cache layout (`serval methods` lists them), or one per attention layer.
        policy: what the cache keeps of long texts, such as "prefixkv:keep=0.2" (None: everything).
            Prefixes are then not reused; prompts being computed take exact storage beside
            `cache_bytes`, of at most `max_model_len` tokens together.
        max_model_len: tokens of prompt and output together; by default what the model was made
            for, or less if the memory does not hold one such sequence. More only with a layout that
            bounds what a token sees (kv="streaming").
        cache_bytes: storage for keys and values; by default room for 16 full sequences, at most a
            quarter of the free memory.
        block_size: tokens per cache block.
        max_batch_tokens: rows of one step; long prompts are cut into chunks of this size. By
            default 512 on CPUs, whose caches hold the activations of so many rows, else 2048, and
            at least `max_sequences`.
        max_sequences: sequences that run at once; by default 64, or as many as have their states in
            a quarter of cache_bytes, with a layout that keeps some (kv="oscar").
        dtype: by default float32 on CPUs, bfloat16 on GPUs.
        seed: for requests that bring no seed of their own.
        prefix_caching: reuse the cache of prompts that start alike.
        lora: name -> directory of a plain PEFT LoRA adapter, put into the decoder; `generate`,
            `chat` and `stream` choose one by name, per prompt.

    Raises `ConfigError`, `CheckpointError`, `CacheError`, or `DataError` for a bad tokenizer.
    """

    def __init__(
        self,
        model: str | Path | Decoder,
        *,
        tokenizer: Any = None,
        kv: str | Sequence[str] = "full",
        policy: str | Policy | None = None,
        max_model_len: int | None = None,
        cache_bytes: int | None = None,
        block_size: int = 32,
        max_batch_tokens: int | None = None,
        max_sequences: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        prefix_caching: bool = True,
        lora: Mapping[str, str | Path] | None = None,
    ) -> None:
        _check_limits(block_size, max_batch_tokens, max_sequences, max_model_len)
        directory = None
        if isinstance(model, Decoder):
            decoder = model if dtype is None and device is None else model.to(device, dtype)
        else:
            where = torch.device(device or "cpu")
            dtype = dtype or (torch.float32 if where.type == "cpu" else torch.bfloat16)
            directory = checkpoint.locate(model)
            decoder = checkpoint.load(directory, dtype=dtype, device=where)
        adapters = AdapterBank(decoder, lora) if lora else None
        self.decoder = decoder.eval()
        config = decoder.config
        self.tokenizer = _load_tokenizer(tokenizer, directory)
        weight = decoder.norm.weight
        specs = decoder.trunk_attention_layers  # drafting is not the engine's affair
        limit = config.max_position_embeddings
        if max_model_len is not None and max_model_len > limit:
            if not all(layout_class(name).unbounded for name in layer_layouts(specs, kv)):
                raise ConfigError(
                    f"max_model_len is {max_model_len}, the model was made for {limit} positions: "
                    f"choose at most {limit}, or kv='streaming'"
                )
            decoder.rotary.extend(max_model_len)
        size = cache_size(
            decoder,
            kv,
            block_size,
            cache_bytes=cache_bytes,
            max_sequences=max_sequences,
            max_model_len=max_model_len,
            max_batch_tokens=max_batch_tokens,
        )
        self.max_model_len, max_sequences = size.max_model_len, size.max_sequences
        self.memory = make_memory(
            decoder,
            kv,
            policy,
            cache_bytes=size.cache_bytes,
            max_model_len=self.max_model_len,
            block_size=block_size,
            prefix_caching=prefix_caching,
            max_sequences=max_sequences,
        )
        rows = _CPU_ROWS if weight.device.type == "cpu" else _GPU_ROWS
        self.engine = Engine(
            self.decoder,
            self.tokenizer,
            self.memory,
            max_model_len=self.max_model_len,
            max_batch_tokens=max_batch_tokens or max(rows, max_sequences),
            max_sequences=max_sequences,
            eos_token_ids=_eos_token_ids(decoder, self.tokenizer, directory),
            device=weight.device,
            seed=seed,
            adapters=adapters,
        )
        self.lock = threading.Lock()  # held by whoever steps or changes the engine
        self._async: AsyncLLM | None = None

    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        lora: Loras = None,
    ) -> list[RequestOutput]:
        """Continue one or many prompts (texts or token ids); returns outputs in their order.

        lora: the adapter to use, or one per prompt; None is the model alone. Raises `RequestError`
        before anything runs if any of them cannot be served.
        """
        batch = _as_batch(prompts)
        every = _params_per_prompt(params, len(batch))
        prepared = [
            self.engine.prepare(
                self.encode(prompt),
                own,
                prompt=prompt if isinstance(prompt, str) else None,
                lora=adapter,
            )
            for prompt, own, adapter in zip(
                batch, every, _loras_per_prompt(lora, len(batch)), strict=True
            )
        ]
        return self._run(prepared)

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        tools: list[dict[str, Any]] | None = None,
        lora: Loras = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, through the tokenizer's chat template; `lora` as for
        `generate`."""
        several = bool(messages) and isinstance(messages[0], list)
        conversations: list[Any] = list(messages) if several else [messages]
        texts = [self.chat_prompt(conversation, tools) for conversation in conversations]
        every = _params_per_prompt(params, len(texts))
        prepared = [
            self.engine.prepare(
                self.encode(text, add_special_tokens=False), own, prompt=text, lora=adapter
            )
            for text, own, adapter in zip(
                texts, every, _loras_per_prompt(lora, len(texts)), strict=True
            )
        ]
        return self._run(prepared)

    async def stream(
        self,
        prompt: str | list[int],
        params: SamplingParams | None = None,
        lora: str | None = None,
    ) -> AsyncIterator[Delta]:
        """Continue one prompt, giving each `Delta` as it is made; leaving the loop cancels it."""
        if self._async is None:
            from serval.engine.async_engine import AsyncLLM

            self._async = AsyncLLM(self)
        async for delta in self._async.stream(prompt, params, lora=lora):
            yield delta

    def chat_prompt(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> str:
        """The text that the chat template makes of a conversation; raises `RequestError`."""
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            raise RequestError("this model's tokenizer has no chat template: use generate")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise RequestError(f"a message is a dict with a role, got {message!r}")
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # a template may raise anything on what it does not expect
            raise RequestError(f"the chat template refused these messages: {error}") from error

    def encode(self, prompt: str | list[int], add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt; ids pass through."""
        if not isinstance(prompt, str):
            try:
                return [index(token) for token in prompt]
            except TypeError:
                raise RequestError(
                    f"a prompt is a text or a list of token ids, got {_short(prompt)}"
                ) from None
        if self.tokenizer is None:
            raise RequestError("this engine has no tokenizer: give token ids instead of text")
        try:
            return self.tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"]
        except (TypeError, ValueError) as error:  # lone surrogates, for example
            raise RequestError(f"the prompt cannot be tokenised: {error}") from error

    def stats(self) -> EngineStats:
        """What the engine is doing now."""
        return self.engine.stats()

    def _run(self, prepared: list[Request]) -> list[RequestOutput]:
        submitted: list[Request] = []
        try:
            with self.lock:
                for request in prepared:
                    self.engine.submit(request)
                    submitted.append(request)
            while not all(request.finished for request in prepared):
                with self.lock:
                    if not self.engine.idle:
                        self.engine.step()
        except BaseException:
            with self.lock:
                for request in submitted:
                    self.engine.abort(request.request_id)
            raise
        return [self.engine.output(request) for request in prepared]


def _check_limits(
    block_size: int,
    max_batch_tokens: int | None,
    max_sequences: int | None,
    max_model_len: int | None,
) -> None:
    values = {
        "block_size": block_size,
        "max_batch_tokens": 1 if max_batch_tokens is None else max_batch_tokens,
        "max_sequences": 1 if max_sequences is None else max_sequences,
        "max_model_len": 1 if max_model_len is None else max_model_len,
    }
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a positive integer, got {value!r}")
    if max_batch_tokens is not None and max_batch_tokens < (max_sequences or 1):
        raise ConfigError(
            f"max_batch_tokens ({max_batch_tokens}) must be at least max_sequences "
            f"({max_sequences}), so that every running sequence advances in each step"
        )


def _as_batch(prompts: Prompts) -> list[Any]:
    if not isinstance(prompts, (str, list, tuple)):
        raise RequestError(f"prompts are a text or a list of prompts, got {_short(prompts)}")
    single = isinstance(prompts, str) or (prompts and isinstance(prompts[0], int))
    return [prompts] if single else list(prompts)


def _short(value: Any) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"


def _params_per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling parameters for {count} prompts: give one each")
    return list(params)


def _loras_per_prompt(lora: Loras, count: int) -> list[str | None]:
    if lora is None or isinstance(lora, str):
        return [lora] * count
    if len(lora) != count:
        raise RequestError(f"{len(lora)} adapters for {count} prompts: give one each")
    return list(lora)


def _load_tokenizer(tokenizer: Any, directory: Path | None) -> Any:
    if tokenizer is not None and not isinstance(tokenizer, (str, Path)):
        return tokenizer
    where = tokenizer if tokenizer is not None else directory
    if where is None:
        return None
    if tokenizer is None and not holds_tokenizer(Path(where)):
        return None
    return load_tokenizer(where)


def _eos_token_ids(decoder: Decoder, tokenizer: Any, directory: Path | None) -> list[int]:
    """All end-of-text tokens that the config, generation_config.json and the tokenizer name."""
    ids = list(decoder.config.eos_token_ids())
    path = None if directory is None else directory / "generation_config.json"
    if path is not None and path.exists():
        try:
            named = json.loads(path.read_text()).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{path} is not a JSON object: {error}") from None
        ids += named if isinstance(named, list) else [] if named is None else [named]
    own = getattr(tokenizer, "eos_token_id", None)
    ids += [] if own is None else [own]
    return [i for i in dict.fromkeys(ids) if 0 <= i < decoder.config.vocab_size]
