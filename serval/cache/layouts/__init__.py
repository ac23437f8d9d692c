"""Cache layouts: how one group of layers stores and reads its keys and values.

`LAYOUTS` maps the name used on the command line (`--kv int8`) to the class. A name may bring
options: `oscar:bits=4,residual=32`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from serval.cache.options import split_options
from serval.registry import Entry, resolve

if TYPE_CHECKING:
    from serval.cache.layouts.base import Layout

LAYOUTS: dict[str, Entry] = {
    "full": Entry(
        "serval.cache.layouts.full:FullLayout",
        "keys, values and latents as the model computes them",
        "2309.06180",
    ),
    "bf16": Entry(
        "serval.cache.layouts.half:Bfloat16Layout",
        "keys, values and latents in bfloat16",
    ),
    "fp16": Entry(
        "serval.cache.layouts.half:Float16Layout",
        "keys, values and latents in float16",
    ),
    "int8": Entry(
        "serval.cache.layouts.int8:Int8Layout",
        "int8 keys and values, one scale per token and head",
    ),
    "oscar": Entry(
        "serval.cache.layouts.oscar:OScaRLayout",
        "2 bits (bits=4): rotated keys per channel and norms per token, the last 128 tokens exact",
        "2605.19660",
    ),
    "kivi": Entry(
        "serval.cache.layouts.oscar:KiviLayout",
        "2 bits (bits=4): keys per channel, values per token, the last 128 tokens exact",
        "2402.02750",
    ),
    "int4": Entry(
        "serval.cache.layouts.oscar:PerTokenInt4Layout",
        "4 bits, one scale per token and 32 channels, the last 128 tokens exact",
    ),
    "int2": Entry(
        "serval.cache.layouts.oscar:PerTokenInt2Layout",
        "2 bits, one scale per token and 32 channels, the last 128 tokens exact",
    ),
    "q4_0": Entry(
        "serval.cache.layouts.oscar:Q4_0Layout",
        "4 bits as in ggml, one scale per token and 32 channels, the last 32 tokens exact",
    ),
    "snapmla": Entry(
        "serval.cache.layouts.snapmla:SnapMLALayout",
        "FP8 latents with a scale per token and bfloat16 rotary keys, for MLA models",
        "2602.10718",
    ),
    "streaming": Entry(
        "serval.cache.layouts.streaming:StreamingLayout",
        "the first 4 tokens and the last 1020, in constant memory (sinks=, recent=)",
        "2309.17453",
    ),
}


@cache
def layout_class(kv: str) -> type[Layout]:
    """The layout that `kv` ("name" or "name:option=value,...") means.

    Raises `ConfigError` for an unknown name, `CacheError` for a bad option.
    """
    name, given = split_options(kv, "kv")
    kind: type[Layout] = resolve(LAYOUTS, name, "cache layout")
    return kind.configure(given, kv) if given else kind
