"""The small trained models that come with a checkout of Serval (`assets/`)."""

from __future__ import annotations

import os
from pathlib import Path

from serval.errors import ConfigError


def shipped_model(asset: str = "assets/serval-tiny") -> Path:
    """The directory `asset`, looked for here and beside the package. Raises ConfigError."""
    places = [Path(asset), Path(__file__).resolve().parents[2] / asset]
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise ConfigError(
        f"{asset} was not found here ({os.getcwd()}); run this in a checkout of Serval, or name a "
        "model of your own where the command takes one (serval quickstart --model DIRECTORY)"
    )
