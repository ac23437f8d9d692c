"""Text to tokens and back, off the event loop when it would hold other clients up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from typing import Any, TypeVar

from serval.server.errors import APIError, bad_request
from serval.server.protocol import ChatMessage, Tool

T = TypeVar("T")

INLINE_CHARACTERS = 2048  # below, tokenising costs less than the trip to another thread
_RESERVED = {
    "messages",
    "conversation",
    "documents",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
    "processor_kwargs",
}


class TextCodec:
    """A Hugging Face tokenizer behind the few calls the server needs.

    Args: `chat_template` (Jinja source) replaces the tokenizer's own; None keeps it.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template or getattr(tokenizer, "chat_template", None)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="tokenise")

    def close(self) -> None:
        """Stop the worker threads; what they do now is still finished."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """Do `work` on text of `size` characters, in a thread when that is long."""
        if size < INLINE_CHARACTERS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def encode(self, text: str, *, special_tokens: bool, param: str) -> list[int]:
        """Token ids of `text`; raises APIError 400 naming `param` for text that is not Unicode."""
        try:
            return await self.run(len(text), lambda: self._encode(text, special_tokens))
        except (UnicodeError, TypeError) as error:
            raise bad_request(f"{param} is not valid Unicode text: {error}", param) from error

    async def encode_chat(
        self,
        messages: list[ChatMessage],
        tools: list[Tool] | None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: dict[str, Any] | None = None,
    ) -> tuple[str, list[int]]:
        """(prompt, its token ids) of a conversation, through the model's chat template."""
        if self.chat_template is None:
            raise bad_request(
                "this model has no chat template; start the server with --chat-template FILE, or "
                "use /v1/completions"
            )
        reserved = sorted(_RESERVED.intersection(extra or {}))
        if reserved:
            raise bad_request(
                f"chat_template_kwargs may not set {', '.join(reserved)}", "chat_template_kwargs"
            )
        plain = [self._message(message, i) for i, message in enumerate(messages)]
        size = sum(len(str(message.get("content") or "")) for message in plain)
        size += INLINE_CHARACTERS if tools else 0
        options = {
            "tools": [tool.model_dump(exclude_none=True) for tool in tools] if tools else None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "continue_final_message": continue_final_message,
            **(extra or {}),
        }
        prompt = await self.run(size, lambda: self._render(plain, options))
        return prompt, await self.encode(prompt, special_tokens=False, param="messages")

    def decode(self, token_ids: list[int]) -> str:
        """Text of `token_ids`, special tokens included; raises APIError 400 for unknown ids."""
        for token in token_ids:
            self.check_id(token, "tokens")
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False))

    def check_id(self, token: int, param: str) -> None:
        """Raise APIError 400 naming `param` unless `token` is in the vocabulary."""
        if not 0 <= token < self.vocab_size:
            raise bad_request(
                f"{param}: token id {token} is not in the vocabulary (0 to {self.vocab_size - 1})",
                param,
            )

    @cached_property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    @cached_property
    def _byte_level(self) -> bool:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return "ByteLevel" in str(getattr(backend, "decoder", ""))

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for; a token may be part of a character."""
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if self._byte_level:
            table = _byte_alphabet()
            if all(character in table for character in piece):
                return bytes(table[character] for character in piece)
            return piece.encode("utf-8", "replace")  # an added token, stored as plain text
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode("utf-8", "replace")

    def token_text(self, token: int) -> str:
        """`token_bytes` as text; what is not a whole character becomes U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def _encode(self, text: str, special_tokens: bool) -> list[int]:
        # A batch of one, because only encode_batch lets go of the interpreter lock.
        batch = self.tokenizer([text], add_special_tokens=special_tokens, verbose=False)
        return list(batch["input_ids"][0])

    def _render(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.chat_template, tokenize=False, **options
            )
        except (APIError, MemoryError):
            raise
        except Exception as error:  # templates raise whatever they like about what they are given
            raise bad_request(
                f"the model's chat template refuses these messages: {error}", "messages"
            ) from error
        return str(text)

    def _message(self, message: ChatMessage, index: int) -> dict[str, Any]:
        """The dict a template sees: text content, tool arguments as objects."""
        plain = message.model_dump(exclude_none=True)
        where = f"messages[{index}]"
        if message.role == "developer" and "developer" not in str(self.chat_template):
            plain["role"] = "system"
        if isinstance(message.content, list):
            texts = []
            for part in message.content:
                if part.type not in ("text", "input_text") or part.text is None:
                    raise bad_request(
                        f"{where}: content of type {part.type!r} is not supported; this server "
                        "reads text only",
                        "messages",
                    )
                texts.append(part.text)
            plain["content"] = "\n".join(texts)
        plain.setdefault("content", "")
        for call in plain.get("tool_calls", []):
            try:
                call["function"]["arguments"] = json.loads(call["function"]["arguments"] or "{}")
            except (ValueError, RecursionError) as error:
                raise bad_request(
                    f"{where}: a tool call's arguments are not JSON: {error}", "messages"
                ) from error
        return plain


@cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, inverted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + n): byte for n, byte in enumerate(others)})
    return table
