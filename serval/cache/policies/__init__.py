"""Cache policies: which tokens each layer keeps of a long prompt, and while text grows.

`POLICIES` maps the name used on the command line (`--policy prefixkv:keep=0.2`) to the class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from serval.cache.options import split_options
from serval.registry import Entry, resolve

if TYPE_CHECKING:
    from serval.cache.policies.base import Policy

POLICIES: dict[str, Entry] = {
    "prefixkv": Entry(
        "serval.cache.policies.prefixkv:PrefixKV",
        "most attended tokens; each layer keeps the same share of its attention",
        "2412.03409",
    ),
    "uniform": Entry(
        "serval.cache.policies.baselines:Uniform",
        "most attended tokens, equally many in every layer",
    ),
    "pyramid": Entry(
        "serval.cache.policies.baselines:Pyramid",
        "most attended tokens, fewer in later layers",
        "2406.02069",
    ),
    "h2o": Entry(
        "serval.cache.policies.baselines:H2O",
        "half most attended tokens, half last ones, equally many in every layer",
        "2306.14048",
    ),
    "local": Entry(
        "serval.cache.policies.baselines:Local",
        "the first and the last tokens, equally many in every layer",
        "2309.17453",
    ),
}


def make_policy(policy: str | Policy) -> Policy:
    """The policy that "name" or "name:option=value,..." means; an object passes through.

    Raises `ConfigError` for an unknown name, `CacheError` for a bad option.
    """
    if not isinstance(policy, str):
        return policy
    name, given = split_options(policy, "policy")
    kind: type[Policy] = resolve(POLICIES, name, "cache policy")
    return kind.configure(given)
