"""Word lists for generated tasks: common nouns and adjectives that never look like code."""

from __future__ import annotations

_ADJECTIVES = """
amber ancient brave bright bronze calm clever cobalt copper coral crimson crystal dusty eager
early emerald fancy fierce frozen gentle giant golden grand happy hidden hollow humble icy
indigo ivory jolly keen lively lone lucky lunar mellow merry mighty misty noble olive pale
patient plain polar proud purple quick quiet rapid rusty scarlet secret sharp shiny silent
silver simple sleepy smooth solar steady sunny swift tall tiny velvet violet wild wise yellow
"""

_NOUNS = """
anchor apple arrow badger basket beacon bear bell birch bottle bridge candle canyon castle cedar
cliff clover comet crane crown desert dragon drum eagle engine falcon feather fern field fiddle
flame forest fox garden glacier hammer harbor hawk hill horse island jungle kettle kite ladder
lake lantern lemon lion maple meadow mirror moon mountain needle ocean orchid otter owl palace
panda pearl pebble piano pigeon planet pond rabbit raven river rocket saddle sail salmon shadow
shell ship sparrow spoon spring stone storm sun tiger tower train tulip turtle valley violin
wagon whale willow window wolf
"""

ADJECTIVES = _ADJECTIVES.split()
NOUNS = _NOUNS.split()


def key_names() -> list[str]:
    """All two-word keys, "amber-anchor" and so on, in a fixed order."""
    return [f"{a}-{n}" for a in ADJECTIVES for n in NOUNS]
