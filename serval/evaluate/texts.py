"""Which text a model is scored on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import yaml
from pydantic import ValidationError

from serval.data.options import DataOptions, held_out_texts
from serval.data.sources import documents
from serval.errors import ConfigError, DataError

RECIPE = "recipe.yaml"  # beside a model's weights: how it was trained


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def evaluation_texts(
    text: str | None,
    model_dir: Path,
    note: Callable[[str], None] = _say,
    field: str = "text",
) -> list[str]:
    """Documents to score; `note` is told which. field: which one of JSONL or Parquet holds them.

    text: a folder of text files, a .jsonl or .parquet file, or "stdlib". None and "stdlib" give
    the held-out documents of the recipe beside the model if there is one, else those of the
    standard library. Raises DataError or ConfigError naming what cannot be read.
    """
    if text is None or text == "stdlib":
        trained = _recipe_data(model_dir)
        options = trained or DataOptions.model_validate({})
        try:
            texts = held_out_texts(options)
        except DataError as error:
            raise DataError(
                f"{error} (the text held out by {model_dir / RECIPE}; choose another with --text)"
            ) from error
        recipe = f"the recipe {model_dir / RECIPE}" if trained else "no recipe beside the model"
        chosen = f"held out of {options.path or 'the standard library'} ({recipe})"
    else:
        path = Path(text).expanduser()
        if not path.exists():
            raise DataError(
                f"--text {text!r} does not exist; give a folder, a .jsonl or .parquet file, "
                "or 'stdlib'"
            )
        kind = {".jsonl": "jsonl", ".parquet": "parquet"}.get(path.suffix.lower(), "folder")
        if path.is_file() and kind == "folder":
            texts = [path.read_text(encoding="utf-8", errors="replace")]
        else:
            texts = list(documents(kind, str(path), field))
        chosen = str(path)
    if not texts:
        raise DataError("no text was held out for validation; give some with --text")
    note(f"text: {len(texts)} documents, {chosen}")
    return texts


def _recipe_data(model_dir: Path) -> DataOptions | None:
    path = model_dir / RECIPE
    if not path.is_file():
        return None
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return DataOptions.model_validate(values.get("data", {}))
    except (yaml.YAMLError, AttributeError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"{path} cannot be read ({first}); repair it, or choose the text with --text"
        ) from error
