"""Adapting a trained model: low-rank adapters, supervised fine-tuning, merging, serving."""

from __future__ import annotations

from serval.registry import Entry

# How `serval tune` changes a model: recipe `method` -> the class that prepares it.
METHODS: dict[str, Entry] = {
    "full": Entry("serval.adapt.methods:Full", "every weight is trained"),
    "lora": Entry(
        "serval.adapt.methods:Lora", "low-rank updates of frozen linear layers", "2106.09685"
    ),
    "afa-lora": Entry(
        "serval.adapt.methods:AfaLora",
        "LoRA with an activation between its factors that fades to the identity",
        "2512.22455",
    ),
}
