"""Which weight compressors exist: the name given to `--weights` -> where it lives."""

from __future__ import annotations

from serval.registry import Entry

COMPRESSORS: dict[str, Entry] = {
    "int8": Entry(
        "serval.compress.int8:Int8",
        "int8 weights per output channel, int8 activations per token (W8A8)",
        "2208.07339",
    ),
}
