"""Which weight compressors exist: the name given to `--weights` or `--rotate` -> where it lives."""

from __future__ import annotations

from serval.registry import Entry

# `serval.compress.recipe.Recipe`: block by block, with or without calibration.
RECIPES: dict[str, Entry] = {
    "int8": Entry(
        "serval.compress.int8:Int8",
        "int8 weights per output channel, int8 activations per token (W8A8)",
        "2208.07339",
    ),
    "rtn": Entry("serval.compress.rtn:RoundToNearest", "each weight to the nearest code"),
    "gptq": Entry(
        "serval.compress.gptq:GPTQ", "rounding errors are made good by later columns", "2210.17323"
    ),
    "awq": Entry(
        "serval.compress.awq:AWQ", "channels with large activations are scaled up", "2306.00978"
    ),
    "fptq": Entry(
        "serval.compress.fptq:FPTQ",
        "static or per-token activations by layer; logarithmic equalization in between",
        "2308.15987",
    ),
    "odyssey": Entry(
        "serval.compress.odyssey:Odyssey",
        "learnt clipping, then GPTQ with its scales; per output channel",
        "2311.09550",
    ),
}

# Changes of basis before the first block: `serval.compress.recipe.Rotation`.
ROTATIONS: dict[str, Entry] = {
    "hadamard": Entry(
        "serval.compress.rotate:HadamardRotation",
        "random Hadamard matrices on the residual stream and the value heads, folded into weights",
        "2404.00456",
    ),
}
