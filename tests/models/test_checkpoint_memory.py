"""Loading peaks at no more than 1.2 times what stays resident, measured in a fresh process."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from serval.models import checkpoint
from serval.models.config import ModelConfig, MoEConfig
from serval.models.decoder import Decoder

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
MODELS = {
    "dense": ModelConfig(**SIZES, num_hidden_layers=6, intermediate_size=4096),
    # Per-expert tensors, transposed and interleaved for gpt-oss, widened from bfloat16.
    "experts": ModelConfig(
        **SIZES,
        num_hidden_layers=3,
        intermediate_size=1024,
        moe=MoEConfig(8, 2, 1024, norm_topk_prob=True),
        qk_norm=True,
        family="qwen3_moe",
    ),
    "interleaved": ModelConfig(
        **SIZES,
        num_hidden_layers=3,
        intermediate_size=1024,
        qkv_bias=True,
        output_bias=True,
        attention_sinks=True,
        activation="clamped_swiglu",
        moe=MoEConfig(8, 2, 1024, scoring="softmax_topk", router_bias=True, expert_bias=True),
        family="gpt_oss",
    ),
}

PROBE = """
import sys
from serval.models import checkpoint
def kib(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))
import torch
torch.empty(8, dtype=torch.bfloat16).float().aminmax()
before = kib("VmRSS:")
decoder = checkpoint.load(sys.argv[1])
resident = sum(p.numel() * p.element_size() for p in decoder.parameters()) / 1024
print((kib("VmHWM:") - before) / resident, resident)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("name", MODELS)
def test_peak_memory_of_loading(name: str, tmp_path: Path) -> None:
    config = MODELS[name]
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.to_empty(device="cpu")
    for parameter in decoder.parameters():  # quicker than random, and pages are really written
        torch.nn.init.constant_(parameter, 0.01)
    dtype = None if name == "dense" else torch.bfloat16
    checkpoint.save(decoder, tmp_path / "model", dtype=dtype)
    del decoder
    result = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        check=True,
    )
    shutil.rmtree(tmp_path / "model")  # pytest would keep it
    ratio, resident_kib = (float(x) for x in result.stdout.split())
    assert resident_kib > 300 * 1024
    assert ratio <= 1.2
