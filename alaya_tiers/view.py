"""What queries see, and the tiles of KV that many queries attend at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers.attention import BlockList, gather

TILE_TOKENS = 4096
"""Tokens gathered at a time for many rows: bounds the scratch memory of prefill."""


class Extra(Protocol):
    """A mask beyond intervals, of one sequence."""

    def __call__(self, positions: Tensor) -> Tensor:
        """positions: int64 [n]. Bool (True = visible) or additive float, [query_heads or 1, queries, n]."""
        ...


@dataclass(frozen=True, slots=True)
class Visible:
    """What the queries of one sequence see.

    lo, hi: int32 [queries]; query i sees positions lo[i] <= p < hi[i], further narrowed by ``extra`` if given.
    """

    lo: npt.NDArray[np.int32]
    hi: npt.NDArray[np.int32]
    extra: Extra | None = None

    @property
    def past(self) -> int | None:
        """Tokens before the first query, if query i sees just those and itself and the ones between; else None."""
        first = int(self.hi[0]) - 1
        ramp = np.arange(first + 1, first + 1 + self.hi.size)
        return first if self.extra is None and not self.lo.any() and np.array_equal(self.hi, ramp) else None

    @classmethod
    def causal(cls, past: int, queries: int) -> "Visible":
        """Query i, at position past + i, sees itself and what came before."""
        return cls(np.zeros(queries, np.int32), np.arange(past + 1, past + queries + 1, dtype=np.int32))

    @classmethod
    def all(cls, length: int, queries: int, extra: Extra | None = None) -> "Visible":
        """Every query sees every token, but for ``extra``."""
        return cls(np.zeros(queries, np.int32), np.full(queries, length, np.int32), extra)


class Gathered(NamedTuple):
    """KV copied together. rows: [kv_heads, n, k_dim + v_dim]; positions: int64 [n]; cut: not all is seen by all."""

    rows: Tensor
    k_dim: int
    positions: Tensor
    cut: bool

    @property
    def run(self) -> int | None:
        """The first position, if they are consecutive."""
        first, n = int(self.positions[0]), self.positions.numel()
        return first if torch.equal(self.positions, torch.arange(first, first + n)) else None

    @property
    def k(self) -> Tensor:
        """[kv_heads, n, k_dim]."""
        return self.rows[..., : self.k_dim]

    @property
    def v(self) -> Tensor:
        """[kv_heads, n, v_dim]."""
        return self.rows[..., self.k_dim :]


def positions_of(starts: npt.NDArray[np.int32], counts: npt.NDArray[np.int32]) -> Tensor:
    """int64: the positions of all tokens of these runs, in their order."""
    runs = [np.arange(start, start + n) for start, n in zip(starts.tolist(), counts.tolist(), strict=True)]
    return torch.from_numpy(np.concatenate(runs))


def tiles(blocks: BlockList, visible: Visible) -> Iterator[Gathered]:
    """Blocks copied together for many rows, at most TILE_TOKENS at a time, what no query sees left out."""
    ends = blocks.starts + blocks.counts
    seen = (ends > visible.lo.min()) & (blocks.starts < visible.hi.max())
    whole = (blocks.starts >= visible.lo.max()) & (ends <= visible.hi.min())
    for columns, cut in ((np.flatnonzero(whole), False), (np.flatnonzero(seen & ~whole), True)):
        most = max(1, TILE_TOKENS // int(blocks.counts.max(initial=1)))
        for i in range(0, len(columns), most):
            some = columns[i : i + most]
            counts = blocks.counts[some]
            ends_here = np.cumsum(counts, dtype=np.int32)
            packed = replace(
                blocks,
                addresses=np.ascontiguousarray(blocks.addresses[:, some]),
                starts=ends_here - counts,
                counts=counts,
            )
            k, _ = gather(packed, 0, int(ends_here[-1]))
            rows = k.as_strided((*k.shape[:2], blocks.k_dim + blocks.v_dim), k.stride())
            yield Gathered(rows, blocks.k_dim, positions_of(blocks.starts[some], counts), cut)


def mask_of(positions: Tensor, visible: Visible, group: int, heads: int, *, cut: bool) -> Tensor | None:
    """[kv_heads or 1, group * queries, n] of the queries' view of ``positions``; None when they see all."""
    extra = None if visible.extra is None else visible.extra(positions)
    if cut:
        lo, hi = torch.from_numpy(visible.lo)[:, None], torch.from_numpy(visible.hi)[:, None]
        inside = ((positions >= lo) & (positions < hi))[None]
        if extra is None:
            extra = inside
        else:
            extra = extra & inside if extra.dtype == torch.bool else extra.masked_fill(~inside, -torch.inf)
    if extra is None:
        return None
    if extra.shape[0] == 1:
        return extra.repeat(1, group, 1)
    return extra.reshape(heads, -1, extra.shape[-1])
