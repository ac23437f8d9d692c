"""Reports as one HTML file: plots inside, nothing loaded from elsewhere."""

from __future__ import annotations

import html
import os
import platform
from base64 import b64encode
from datetime import datetime
from pathlib import Path

import torch

from serval import __version__


def page(title: str, body: str) -> str:
    """The whole document around `body`, which is HTML."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{text(title)}</title><style>{style}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def text(value: str) -> str:
    """`value` as text of a page."""
    return html.escape(value, quote=True)


def image(png: bytes, description: str) -> str:
    """A picture, inside the page."""
    data = b64encode(png).decode("ascii")
    return f"<img alt='{text(description)}' src='data:image/png;base64,{data}'>"


def provenance(seconds: float) -> str:
    """When, on what and with which versions; `seconds` it took in all."""
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    when = datetime.now().strftime("%Y-%m-%d %H:%M")
    return (
        f"{when} · {_processor()} · {cores} · PyTorch {torch.__version__} · "
        f"Serval {__version__} · {seconds:.0f} s in all"
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
