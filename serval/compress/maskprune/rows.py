"""The packed rows that masks and updates are trained on.

recipe: the mix of text, generated tasks and conversations that the model was trained on, as the
    `recipe.yaml` beside it says
else a source of `serval.compress.calibrate`: text, "stdlib", "self" or "random"
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import yaml
from pydantic import ValidationError
from torch import Tensor

from serval.compress.calibrate import RANDOM, SELF, STDLIB, Calibration
from serval.data.options import DataOptions, TokenizerOptions, build
from serval.errors import ConfigError, DataError
from serval.models.config import ModelConfig
from serval.models.decoder import Decoder
from serval.train.stream import Row, TokenStream

RECIPE = "recipe"
RECIPE_FILE = "recipe.yaml"
MOST_ROWS = 8192  # rows of a fixed set; longer runs read it again in another order


class RowStream:
    """An endless, resumable stream over a fixed set of rows, in a new order every time round.

    rows: int64 [T] each, one document per row.
    """

    def __init__(self, rows: Sequence[Tensor], seed: int) -> None:
        self.rows, self.seed, self.at = rows, seed, 0

    def next(self) -> Row:
        """The next row, all its tokens weighted alike."""
        epoch, place = divmod(self.at, len(self.rows))
        self.at += 1
        order = list(range(len(self.rows)))
        Random(f"{self.seed}/{epoch}").shuffle(order)
        tokens = self.rows[order[place]]
        return tokens, [len(tokens)], None

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def default_source(model_dir: Path) -> str:
    """ "recipe" where the model brings one, else the standard library."""
    return RECIPE if (model_dir / RECIPE_FILE).is_file() else STDLIB


def make_stream(
    source: str,
    model_dir: Path,
    config: ModelConfig,
    load: Callable[[], Decoder],
    *,
    rows: int,
    length: int,
    field: str = "text",
    seed: int = 0,
    cache: Path | None = None,
) -> TokenStream:
    """A stream of rows of `length` tokens, at most the model's context.

    source: see the module's text; rows: how many will be read (a fixed set is not made larger).
    field: of JSONL or Parquet. cache: folder for the recipe's tokenised text. Raises ConfigError or
    DataError naming what cannot be read.
    """
    length = min(length, config.max_position_embeddings)
    if source == RECIPE:
        return build(_recipe_data(model_dir, length, cache), seed).train
    _require(source)
    chosen = Calibration(source, min(rows, MOST_ROWS), length, field, seed)
    return RowStream(chosen.tokens(config, model_dir, load), seed)


def text_state(source: str, model_dir: Path) -> str:
    """Changes when what a stream of `source` reads does."""
    if source != RECIPE:
        return Calibration(source).state()
    return hashlib.sha256((model_dir / RECIPE_FILE).read_bytes()).hexdigest()


def _require(source: str) -> None:
    if source not in (STDLIB, SELF, RANDOM) and not Path(source).expanduser().exists():
        raise DataError(
            f"text {source!r} does not exist; give a text file, a .jsonl or .parquet file, a "
            f"folder, or one of: {RECIPE}, {STDLIB}, {SELF}, {RANDOM}"
        )


def _recipe_data(model_dir: Path, length: int, cache: Path | None) -> DataOptions:
    path = model_dir / RECIPE_FILE
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        options = DataOptions.model_validate(values.get("data", {}))
    except (OSError, yaml.YAMLError, AttributeError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"{path} cannot be read ({first}); repair it, or choose another --data: a text file, "
            "a folder, stdlib, self or random"
        ) from error
    changes = {
        "tokenizer": TokenizerOptions(path=str(model_dir)),
        "row_tokens": length,
        "length_warmup_rows": 0,
        "cache": None if cache is None else str(cache),
    }
    try:
        return DataOptions.model_validate({**options.model_dump(), **_plain(changes)})
    except ValidationError as error:
        wrong = error.errors()[0]
        raise ConfigError(
            f"rows of {length} tokens do not suit the recipe {path}: {wrong['msg']}"
        ) from error


def _plain(changes: dict[str, Any]) -> dict[str, Any]:
    return {k: v.model_dump() if hasattr(v, "model_dump") else v for k, v in changes.items()}
