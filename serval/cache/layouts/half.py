"""Keys, values and latents rounded to 16 bits when stored; arithmetic stays in float32.

Half the bytes of `full` under a float32 model. bfloat16 keeps float32's range and 8 significant
bits (relative error at most 2^-9), float16 has 11 (2^-12) and saturates at 65,504, far beyond
what normalised keys and values reach.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from serval.cache.layouts.full import FullLayout


class Bfloat16Layout(FullLayout):
    """`FullLayout` with bfloat16 storage, whatever the model's dtype."""

    name = "bf16"
    stored: ClassVar[torch.dtype | None] = torch.bfloat16


class Float16Layout(FullLayout):
    """`FullLayout` with float16 storage, whatever the model's dtype."""

    name = "fp16"
    stored: ClassVar[torch.dtype | None] = torch.float16
