"""What goes back to whoever asked: deltas while a request runs, its output at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serval.engine.detokenizer import decode_function, find_stop, held_back
from serval.engine.request import (
    CompletionOutput,
    Delta,
    FinishReason,
    Logprob,
    Request,
    RequestOutput,
    Sequence,
)


class Results:
    """Turns sequences into text and outputs with one tokenizer (or None: texts stay empty)."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._decoders: dict[bool, Callable[[Any], str]] = {}

    def decode(self, skip_special_tokens: bool) -> Callable[[Any], str]:
        """The tokenizer's decode function, list of ids -> text."""
        if skip_special_tokens not in self._decoders:
            decode = decode_function(self.tokenizer, skip_special_tokens)
            self._decoders[skip_special_tokens] = decode
        return self._decoders[skip_special_tokens]

    def delta(self, sequence: Sequence, tokens: list[int]) -> Delta:
        """What `tokens`, just added, changed; text that may start a stop string is held back."""
        final = sequence.finish_reason is not None
        stops = sequence.params.stop_strings
        held = 0
        if stops and not final and sequence.detokenizer is not None:
            held = held_back(sequence.detokenizer.text, stops)
        return Delta(
            sequence.request.request_id,
            sequence.branch,
            sequence.new_text(final, held),
            tokens,
            sequence.logprobs[-1:] if sequence.logprobs is not None and tokens else None,
            sequence.finish_reason,
            sequence.stop_reason,
        )

    def output(self, request: Request) -> RequestOutput:
        """The result of a request as far as it got."""
        outputs = [
            CompletionOutput(
                sequence.branch,
                self._text(sequence),
                sequence.output_ids,
                sequence.logprobs,
                sequence.finish_reason,
                sequence.stop_reason,
            )
            for sequence in sorted(request.sequences, key=lambda s: s.branch)
        ]
        for entry in request.prompt_logprobs or []:
            self.name_tokens(entry or {})
        return RequestOutput(
            request.request_id,
            request.prompt,
            request.prompt_token_ids,
            outputs,
            request.prompt_logprobs,
            request.num_cached_tokens,
        )

    def name_tokens(self, entry: dict[int, Logprob]) -> dict[int, Logprob]:
        """Fill in the text of each token of one position."""
        if self.tokenizer is not None:
            decode = self.decode(False)
            for token, found in entry.items():
                found.text = found.text or decode([token])
        return entry

    def _text(self, sequence: Sequence) -> str:
        if self.tokenizer is None:
            return ""
        if sequence.detokenizer is not None:
            return sequence.detokenizer.text[: sequence.text_end]
        ids = sequence.output_ids
        kept = ids[: len(ids) - sequence.hidden_tokens]
        return self.decode(sequence.params.skip_special_tokens)(kept)


def check_stop_strings(sequence: Sequence) -> FinishReason | None:
    """Look for a stop string in the text that is new since the last call; cut the text there."""
    assert sequence.detokenizer is not None
    text, params = sequence.detokenizer.text, sequence.params
    found = find_stop(text, sequence.stop_scanned, params.stop_strings)
    sequence.stop_scanned = len(text)
    if found is None:
        return None
    at, stop = found
    sequence.text_end = at + len(stop) if params.include_stop_str_in_output else at
    sequence.stop_reason = stop
    return "stop"
