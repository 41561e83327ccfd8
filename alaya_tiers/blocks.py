"""The nouns: what is moved, which shape it has, how large it is.

A *block* is the keys and values of ``tokens`` consecutive tokens of one (layer, kv head), kept row by row::

    row t:  | k[0 .. k_dim-1] | v[0 .. v_dim-1] |        rows are contiguous, nothing in between

so a token's key and value are one extent in memory and on disk, and any run of tokens is one too. Inside the engine
a block is a small integer, its *block id*; the ids of the kv heads of one run of tokens are consecutive.
"""

from dataclasses import dataclass

import torch

from alaya_tiers.errors import ConfigError

PAGE = 4096
"""Alignment of slots in memory and of extents on disk, bytes: what O_DIRECT asks for."""


def round_up(n: int, unit: int) -> int:
    """The smallest multiple of ``unit`` that is at least ``n``."""
    return -(-n // unit) * unit


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shape of the K and V of one layer.

    kv_heads: heads stored per token. k_dim, v_dim: width of one key, one value. dtype: of both.
    """

    kv_heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype

    @property
    def width(self) -> int:
        """Elements of one row (a key and its value)."""
        return self.k_dim + self.v_dim

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.width * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in this layer, all kv heads."""
        return self.kv_heads * self.row_bytes


@dataclass(frozen=True, slots=True)
class BlockShape:
    """A layer's geometry cut into blocks that fit one slot.

    tokens is a power of two, so that blocks divide segments whatever the layer's geometry.
    """

    geometry: Geometry
    tokens: int

    @property
    def nbytes(self) -> int:
        """Payload bytes of a full block."""
        return self.tokens * self.geometry.row_bytes

    @classmethod
    def fit(cls, geometry: Geometry, slot_bytes: int, most_tokens: int) -> "BlockShape":
        """The longest block of this geometry that fits ``slot_bytes``, at most ``most_tokens`` tokens.

        Raises ConfigError when not even one token fits.
        """
        fitting = min(slot_bytes // geometry.row_bytes, most_tokens)
        if fitting < 1:
            raise ConfigError(
                f"one token of {geometry} takes {geometry.row_bytes} bytes, more than a slot of {slot_bytes}: "
                "raise block_tokens"
            )
        return cls(geometry, 1 << (fitting.bit_length() - 1))
