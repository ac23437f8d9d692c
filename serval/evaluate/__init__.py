"""Measuring models: perplexity and divergence on held-out text, retrieval from long contexts,
generation parity, speed, and lm-evaluation-harness tasks.

    result = run(EvalOptions("assets/serval-tiny", kv="int8"))

`Evaluator` prepares text and questions once for several variants of a model; `report.py` prints and
writes results.
"""

from __future__ import annotations

from serval.evaluate.pipeline import EvalOptions, EvalResult, Evaluator, run

__all__ = ["EvalOptions", "EvalResult", "Evaluator", "run"]
