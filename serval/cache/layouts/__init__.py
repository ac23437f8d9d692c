"""Cache layouts: how one group of layers stores and reads its keys and values.

`LAYOUTS` maps the name used on the command line (`--kv int8`) to the class.
"""

from __future__ import annotations

from serval.registry import Entry

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
}
