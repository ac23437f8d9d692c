"""`serval merge`: a checkpoint and a plain LoRA become one ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from serval.adapt.lora import merge
from serval.adapt.peft_format import load_adapter
from serval.errors import ConfigError
from serval.models import checkpoint
from serval.models.checkpoint.files import read_json


def merge_checkpoint(
    model: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    chat_template: str | None = None,
    force: bool = False,
) -> Path:
    """Write `model` with `adapter` merged into its weights at `out`, in the model's own dtype and
    format, with its tokenizer; products are float32. chat_template: Jinja source to write beside
    it, instead of the tokenizer's.

    Raises ConfigError when `out` holds a checkpoint and `force` is off, or the model is quantised;
    CheckpointError for a model or adapter that cannot be read.
    """
    out, source = Path(out), checkpoint.locate(model)
    if out.resolve() == source.resolve():
        raise ConfigError(f"--out {out} is the model itself; choose another directory")
    if (out / "config.json").exists() and not force:
        raise ConfigError(f"{out} holds a checkpoint already; give --force to replace it")
    values = read_json(source / "config.json")
    stored = values.get("dtype") or values.get("torch_dtype") or "float32"
    dtype = getattr(torch, stored, None) if isinstance(stored, str) else None
    decoder = checkpoint.load(source, dtype=torch.float32)
    load_adapter(decoder, adapter)
    merge(decoder)
    tokenizer = source if (source / "tokenizer_config.json").exists() else None
    written = checkpoint.save(
        decoder,
        out,
        tokenizer_dir=tokenizer,
        dtype=dtype if isinstance(dtype, torch.dtype) else torch.float32,
    )
    if chat_template is not None:
        (written / "chat_template.jinja").write_text(chat_template)
    return written
