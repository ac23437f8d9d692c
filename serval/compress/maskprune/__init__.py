"""MaskPrune: uniform structured pruning by learnt masks (arXiv 2502.14008), and one-shot baselines.

Attention heads (in groups that share keys and values) and feed-forward channels are removed until a
budget is met; every layer ends with the same widths, so the result is an ordinary checkpoint.

    sliced, report = prune_decoder(decoder, Pruning(keep=0.65), stream)
    result = run(PruneOptions("assets/serval-tiny", "out/pruned", keep=0.65))

`units.py` finds what can be removed and what it costs, `masks.py` puts masks and low-rank updates
into a decoder, `minimax.py` learns them, `scores.py` holds the one-shot rankings, `slicing.py`
makes the smaller decoder, `recover.py` trains, `pipeline.py` is the `serval prune` command around
it. A pruner is one class and one line in `serval.compress.registry.PRUNERS`; `pruner.py` says what
it implements.
"""

from __future__ import annotations

from serval.compress.maskprune.pipeline import PruneOptions, PruneResult, run
from serval.compress.maskprune.recover import Pruning, PruningReport, prune_decoder

__all__ = [
    "PruneOptions",
    "PruneResult",
    "Pruning",
    "PruningReport",
    "prune_decoder",
    "run",
]
