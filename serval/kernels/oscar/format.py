"""The storage format of a low-bit key-value cache: what is quantised how, and where each byte lies.

Numbers are quantised in groups of 32 to `s (code - c) + m` with c = (2^bits - 1) / 2, the middle of
the codes. A record holds one key-value head's keys and values of 32 tokens, in sections that start
at multiples of 64 bytes:

    key codes | key scales | key middles | value codes | value scales | value middles

Codes come in lines of 64 bytes. A line is 16 lanes of 4 bytes; a 2-bit line carries four planes, a
4-bit line two. For keys, lane l, byte i, bits 2 (2 j + t) of line r is the code of token 16 t + l
and channel 8 r + 4 j + i; with 4 bits, bits 4 t of line r is token 16 t + l and channel 4 r + i.
Values have a block of lines per group of 32 channels, with tokens and channels exchanged: a lane is
a channel, a line 8 (or 4) tokens. So a 32-bit lane holds four numbers of one dot product, for both
products of attention, and neither needs a permutation.

A scale is an int16 n in 0..16384 standing for n 2^e; the exponents e of a record's keys and values
are one byte each (e + 120), beside the records. A middle is a float16. Groups of keys run along the
tokens, one per channel (KIVI, arXiv:2402.02750; OScaR, arXiv:2605.19660), or along the channels;
those of values along the channels. Where 32 does not divide the head dim the last group is shorter.

Bits per number at 2 bits, head dim 128 and 8 heads: 2 + 32/32 (scale, middle) + 0.004 (exponents)
+ 0.016 (float32 norms of keys) = 3.018, 5.30 times fewer than 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from serval.errors import CacheError

GROUP = 32  # numbers that share a scale; tokens of a record
TOP = 16384  # largest integer scale
BIAS = 120  # of the stored exponents
LINE = 64  # bytes
ZEROS = ("int", "min", "symmetric")


def _up(n: int, m: int) -> int:
    return -(-n // m) * m


@dataclass(frozen=True)
class QuantizedKV:
    """How the keys and values of one layer are stored.

    Attributes:
        num_key_value_heads, head_dim, v_head_dim: the layer's shape; head dims are multiples of 8.
        key_bits, value_bits: 2 or 4.
        group: numbers that share a scale and a zero point; this storage knows 32.
        zero: "int" rounds the zero point z to an integer, so that 0 stays 0 (OScaR's code);
            "min" keeps the group's smallest number exact (KIVI); "symmetric" puts 0 beside the
            middle and keeps the number farthest from it (ggml's q4_0).
        keys: "channel" groups keys along tokens, "token" along channels.
        norms: divide each key token by its norm over all heads first, and keep the norm (OScaR);
            with keys="channel" only.

    Raises CacheError when a value is none of these.
    """

    num_key_value_heads: int
    head_dim: int
    v_head_dim: int
    key_bits: int = 2
    value_bits: int = 2
    group: int = GROUP
    zero: Literal["int", "min", "symmetric"] = "int"
    keys: Literal["channel", "token"] = "channel"
    norms: bool = True

    def __post_init__(self) -> None:
        def wrong(key: str, expected: str) -> CacheError:
            return CacheError(f"quantised cache got {key}={getattr(self, key)!r}; use {expected}")

        for key in ("key_bits", "value_bits"):
            if getattr(self, key) not in (2, 4):
                raise wrong(key, "2 or 4")
        if self.group != GROUP:
            raise wrong("group", str(GROUP))
        if self.zero not in ZEROS:
            raise wrong("zero", "'int', 'min' or 'symmetric'")
        if self.keys not in ("channel", "token"):
            raise wrong("keys", "'channel' or 'token'")
        if self.norms and self.keys == "token":
            raise wrong("norms", "norms=False with keys='token', which has a scale per token")
        for key in ("head_dim", "v_head_dim"):
            if getattr(self, key) % 8 or getattr(self, key) < 8:
                raise wrong(key, "a multiple of 8; other head dims need kv='full' or 'int8'")

    @property
    def key_groups(self) -> int:
        """Groups of a token's channels; with keys="channel" unused."""
        return -(-self.head_dim // GROUP)

    @property
    def value_groups(self) -> int:
        """Groups of a token's channels."""
        return -(-self.v_head_dim // GROUP)

    @property
    def key_parameters(self) -> int:
        """Scales of a record's keys."""
        return self.head_dim if self.keys == "channel" else self.key_groups * GROUP

    @cached_property
    def offsets(self) -> tuple[int, int, int, int, int, int]:
        """First byte of each section of a record, in the order above."""
        sizes = (
            GROUP * self.head_dim * self.key_bits // 8,
            2 * self.key_parameters,
            2 * self.key_parameters,
            GROUP * GROUP * self.value_groups * self.value_bits // 8,
            2 * GROUP * self.value_groups,
        )
        found, at = [0], 0
        for size in sizes:
            at += _up(size, LINE)
            found.append(at)
        return tuple(found)  # type: ignore[return-value]

    @cached_property
    def record_bytes(self) -> int:
        """Bytes of one record."""
        return self.offsets[-1] + _up(2 * GROUP * self.value_groups, LINE)


def bytes_per_token(fmt: QuantizedKV) -> float:
    """Bytes that a stored token of one layer takes, all parameters counted."""
    per_record = fmt.num_key_value_heads * (fmt.record_bytes + 2)
    return per_record / GROUP + (4 if fmt.norms else 0)


def shapes(fmt: QuantizedKV, block_size: int) -> list[tuple[tuple[int, ...], str]]:
    """Shape of one block and dtype name of each storage tensor: records, exponents, then norms if
    the format has them. Raises CacheError unless 32 divides block_size."""
    if block_size % GROUP or block_size < GROUP:
        raise CacheError(
            f"a quantised cache packs groups of {GROUP} tokens into blocks; got block_size="
            f"{block_size}, use a multiple of {GROUP}"
        )
    heads, records = fmt.num_key_value_heads, block_size // GROUP
    found: list[tuple[tuple[int, ...], str]] = [
        ((heads, records, fmt.record_bytes), "uint8"),
        ((heads, records, 2), "uint8"),
    ]
    if fmt.norms:
        found.append(((block_size,), "float32"))
    return found
