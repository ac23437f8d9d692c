"""Which compressors exist: the name on the command line (`compress --weights`, `--rotate`,
`prune --method`) -> where it lives."""

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

# Structured pruning: `serval.compress.maskprune.pruner.Pruner`.
_PRUNE = "serval.compress.maskprune"
PRUNERS: dict[str, Entry] = {
    "maskprune": Entry(
        f"{_PRUNE}.pruner:MaskPrune",
        "learnt masks, one learnt width for all layers' heads and one for their channels",
        "2502.14008",
    ),
    "taylor": Entry(
        f"{_PRUNE}.scores:Taylor", "units by |weight x gradient|, as LLM-Pruner", "2305.11627"
    ),
    "wanda": Entry(f"{_PRUNE}.scores:Wanda", "units by |weight| x input norm", "2306.11695"),
    "magnitude": Entry(f"{_PRUNE}.scores:Magnitude", "units by the norm of their weights"),
    "uniform": Entry(f"{_PRUNE}.scores:Uniform", "evenly spaced units of every layer, unranked"),
    "random": Entry(f"{_PRUNE}.scores:Random", "units by lot"),
}
