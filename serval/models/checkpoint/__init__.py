"""Checkpoints in Hugging Face format: load and save, by directory or hub name.

    decoder = load("org/model")            # or a directory
    save(decoder, "out", tokenizer_dir="org-model-directory")

One file per family (`FAMILIES`, keyed by config.json's `model_type`): a `Family` translates the
config there and back, and maps parameters to stored tensors (`Piece`: a name and a strided view).
Loading builds the decoder on the meta device and reads each tensor from its safetensors file
straight into its parameter; nothing is memory-mapped, no code from a checkpoint is run, pickles are
refused.

Quantised modules take part without being named here (`quantized.py`):

- A module with `checkpoint_spec`, `checkpoint_tensors` and `load_checkpoint_tensors`
  (`CheckpointModule`) is saved as those tensors, under its name in the checkpoint plus theirs, for
  example `model.layers.0.mlp.up_proj.weight` and `.weight_scale`.
- Whoever swaps such modules into a decoder sets `decoder.quantization_config`, a dict with
  `quant_method`, which `save` writes to config.json. Module names in it ("ignore" lists) are those
  of the checkpoint: `module_name(config, "layers.0.mlp.gate")`.
- On load, `QUANTIZERS[quant_method]` is made and its `prepare(decoder, quantization_config,
  rename)` swaps the modules of the still empty decoder (meta device); then each module's spec is
  read and handed to `load_checkpoint_tensors(tensors, device)`, which may move or pack them.
"""

from __future__ import annotations

from serval.models.checkpoint.family import Family, Piece
from serval.models.checkpoint.files import locate
from serval.models.checkpoint.quantized import CheckpointModule, Quantizer
from serval.models.checkpoint.reading import load, read_config
from serval.models.checkpoint.registry import FAMILIES, QUANTIZERS, family_of
from serval.models.checkpoint.writing import choose_family, save
from serval.models.config import ModelConfig

__all__ = [
    "FAMILIES",
    "QUANTIZERS",
    "CheckpointModule",
    "Family",
    "Piece",
    "Quantizer",
    "choose_family",
    "load",
    "locate",
    "module_name",
    "read_config",
    "save",
]


def module_name(config: ModelConfig, path: str) -> str:
    """The checkpoint's name of the decoder's module or parameter `path`, in `config.family`."""
    return family_of(config).rename(path, config)
