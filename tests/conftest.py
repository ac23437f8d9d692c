"""Every run of the suite draws the same examples; `make explore` draws new ones, many more."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

EXPLORE = "explore"

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.register_profile(EXPLORE, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under `explore`, ten times the examples that each test asks for."""
    if settings.get_current_profile_name() != EXPLORE:
        return
    for item in items:
        test = getattr(item, "obj", None)
        chosen = getattr(test, "_hypothesis_internal_use_settings", None)
        if chosen is not None:
            test._hypothesis_internal_use_settings = settings(  # type: ignore[union-attr]
                chosen, max_examples=10 * chosen.max_examples
            )
