"""Finding a checkpoint: a directory or a hub name, one safetensors file or shards with an index."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from serval.errors import CheckpointError
from serval.models.checkpoint.safetensors_file import StoredTensor, read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PRIVATE = "private.serval"  # tensors that only Serval reads, in the format of safetensors
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def locate(path_or_name: str | Path) -> Path:
    """The local directory of a checkpoint; a hub name is downloaded, or found in the hub's cache.

    Only safetensors, JSON and tokenizer files are fetched, never code or pickles. Raises
    CheckpointError when there is neither such a directory nor such a model.
    """
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"{path} is a file; expected a directory with config.json and model.safetensors"
        )
    name = str(path_or_name)
    if isinstance(path_or_name, Path) or not _HUB_NAME.fullmatch(name) or name.count("/") != 1:
        raise CheckpointError(
            f"there is no directory {name!r}; give a checkpoint directory or a Hugging Face name "
            "such as 'org/model'"
        )
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "tokenizer.model", "merges.txt", "chat_template.jinja"]
    patterns.append(PRIVATE)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many unrelated types
        lines = str(error).strip().splitlines()
        raise CheckpointError(
            f"there is no directory {name!r}, and the Hugging Face hub did not provide it "
            f"({type(error).__name__}: {lines[0] if lines else 'no details'}); check the name and "
            "the connection, or give a local directory"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises CheckpointError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; is {path.parent} a checkpoint?") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}; expected a JSON object")
    return value


def list_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint directory, by name. Reads headers only.

    Raises CheckpointError for an index that names files elsewhere, a missing shard, a tensor in two
    shards, one the index promises and its shard lacks, or a directory without safetensors.
    """
    tensors = _list_public(directory)
    if (directory / PRIVATE).exists():
        for name, stored in read_header(directory / PRIVATE).items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor {name!r} is in {tensors[name].path} and in {PRIVATE}"
                )
            tensors[name] = stored
    return tensors


def _list_public(directory: Path) -> dict[str, StoredTensor]:
    if (directory / INDEX).exists():
        return _list_shards(directory)
    if (directory / WEIGHTS).exists():
        return read_header(directory / WEIGHTS)
    others = sorted(p.name for p in directory.glob("*.safetensors"))
    if len(others) == 1:
        return read_header(directory / others[0])
    if others:
        raise CheckpointError(f"{directory} has {len(others)} safetensors files but no {INDEX}")
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise CheckpointError(
            f"{directory} holds {pickles[0]}, a pickle, which can run code when it is read; Serval "
            'loads safetensors only. Convert it once, where you trust it: python -c "from '
            f"transformers import AutoModelForCausalLM as M; M.from_pretrained('{directory}')"
            f".save_pretrained('{directory}-safetensors')\""
        )
    raise CheckpointError(f"{directory} has no {WEIGHTS} and no {INDEX}; is it a checkpoint?")


def _list_shards(directory: Path) -> dict[str, StoredTensor]:
    index = directory / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from tensor names to files")
    shards = sorted({shard for shard in weight_map.values() if isinstance(shard, str)})
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard):
            raise CheckpointError(
                f"{index} places tensor {name!r} in {shard!r}; expected the name of a "
                "safetensors file in the same directory"
            )
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        path = directory / shard
        if not path.exists():
            first = next(name for name, where in weight_map.items() if where == shard)
            raise CheckpointError(
                f"shard {path} is missing (it holds {first!r} and others); copy or download it"
            )
        for name, stored in read_header(path).items():
            if name in tensors:
                raise CheckpointError(f"tensor {name!r} is in {tensors[name].path} and in {path}")
            tensors[name] = stored
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].path.name != shard:
            raise CheckpointError(f"{index} places tensor {name!r} in {shard}, which lacks it")
    return tensors
