"""Methods that act during training, by the name of their section under `callbacks` in a recipe.

Each is a dataclass and a `serval.train.reporting.Callback`; its fields are the section's keys.
"""

from __future__ import annotations

from serval.registry import Entry

CALLBACKS: dict[str, Entry] = {
    "wisca": Entry(
        "serval.train.wisca:WiscaCallback",
        "rescales attention weights to the equivalent model whose pairs have equal norms",
        "2508.16676",
    ),
}
