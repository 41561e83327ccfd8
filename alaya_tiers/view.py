"""What queries see, and the tiles of KV that many queries attend at a time."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers.attention import BlockList, gather
from alaya_tiers.errors import InputError

Heads = npt.NDArray[np.intp]
"""Numbers of some kv heads."""

TILE_TOKENS = 4096
"""Tokens gathered at a time for many rows: bounds the scratch memory of prefill."""


Gather = Callable[[BlockList, int, int], tuple[Tensor, Tensor]]


class Extra(Protocol):
    """A mask beyond intervals, of one sequence."""

    def __call__(self, positions: Tensor) -> Tensor:
        """positions: int64 [n]. Bool (True = visible) or additive float, [query_heads or 1, queries, n]."""
        ...


@dataclass(frozen=True, slots=True)
class Visible:
    """What the queries of one sequence see.

    lo, hi: int32 [queries]; query i sees positions lo[i] <= p < hi[i], of these only the ones in ``ranges``
    (start, end), ascending and apart, further narrowed by ``extra`` if given.
    """

    lo: npt.NDArray[np.int32]
    hi: npt.NDArray[np.int32]
    extra: Extra | None = None
    ranges: tuple[tuple[int, int], ...] | None = None

    @property
    def past(self) -> int | None:
        """Tokens before the first query, if query i sees just those and itself and the ones between; else None."""
        first = int(self.hi[0]) - 1
        ramp = np.arange(first + 1, first + 1 + self.hi.size)
        plain = self.extra is None and self.ranges is None
        return first if plain and not self.lo.any() and np.array_equal(self.hi, ramp) else None

    @classmethod
    def causal(cls, past: int, queries: int) -> "Visible":
        """Query i, at position past + i, sees itself and what came before."""
        return cls(np.zeros(queries, np.int32), np.arange(past + 1, past + queries + 1, dtype=np.int32))

    @classmethod
    def all(cls, length: int, queries: int, extra: Extra | None = None) -> "Visible":
        """Every query sees every token, but for ``extra``."""
        return cls(np.zeros(queries, np.int32), np.full(queries, length, np.int32), extra)

    @classmethod
    def only(cls, ranges: Iterable[tuple[int, int]], queries: int) -> "Visible":
        """Every query sees the tokens of some ranges (start, end) of positions, in any order. Raises InputError."""
        merged: list[tuple[int, int]] = []
        for start, end in sorted(ranges):
            if not 0 <= start <= end:
                raise InputError(
                    f"tokens {start} to {end} are no range: it starts at 0 or later and ends after its start"
                )
            if merged and start <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(end, merged[-1][1])
            elif start < end:
                merged.append((start, end))
        lo, hi = (merged[0][0], merged[-1][1]) if merged else (0, 0)
        return cls(np.full(queries, lo, np.int32), np.full(queries, hi, np.int32), None, tuple(merged))

    def part(self, start: int, end: int) -> "Visible":
        """What some of the queries see; not with ``extra``."""
        return self if end - start == self.lo.size else replace(self, lo=self.lo[start:end], hi=self.hi[start:end])

    def spans(self, length: int, size: int) -> "Spans":
        """The blocks of ``size`` tokens that hold what some query sees of the first ``length`` tokens."""
        lo, hi = (int(self.lo.min()), min(int(self.hi.max()), length)) if self.lo.size else (0, 0)
        ranges = self.ranges
        if ranges is None:  # whole blocks: what sees less of the outer ones is masked
            ranges = ((lo // size * size, min(-(-hi // size) * size, length)),)
        pieces = []
        for start, end in ranges:
            a, b = (start, end) if self.ranges is None else (max(start, lo), min(end, hi))
            runs = np.arange(a // size, -(-b // size)) if b > a else np.empty(0, np.intp)
            first = np.maximum(a - runs * size, 0)
            pieces.append((runs, first, np.minimum(b - runs * size, size) - first))
        run, first, count = (
            (np.concatenate(part) for part in zip(*pieces, strict=True)) if pieces else [np.empty(0, np.intp)] * 3
        )
        return Spans(run, first.astype(np.int32), count.astype(np.int32))


def check_asked(
    q: Tensor,
    shape: tuple[int, int, int],
    visible: Sequence[Visible],
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """Raises InputError for what no attention over ``shape`` = rows, kv heads, dims of a key can answer."""
    rows, kv_heads, dims = shape
    if q.ndim != 4 or q.shape[0] != rows or q.shape[3] != dims or q.shape[1] % kv_heads or not q.shape[1]:
        raise InputError(
            f"queries {list(q.shape)} do not fit: they are [{rows} rows, a multiple of {kv_heads} heads, n, {dims}]"
        )
    if len(visible) != rows or any(seen.lo.size != q.shape[2] for seen in visible):
        told = [seen.lo.size for seen in visible]
        raise InputError(f"one Visible for each of {rows} rows, of {q.shape[2]} queries each, not of {told}")
    if not math.isfinite(scale) or not (softcap is None or 0 < softcap < math.inf):
        raise InputError(f"scale {scale} is a finite number, and softcap {softcap} one above 0, or None")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise InputError(f"sinks are one logit for each of {q.shape[1]} query heads, not {list(sinks.shape)}")


@dataclass(frozen=True, slots=True)
class Spans:
    """Tokens of one sequence, ascending: of block ``run[i]``, ``count[i]`` tokens from ``first[i]`` on."""

    run: npt.NDArray[np.intp]
    first: npt.NDArray[np.int32]
    count: npt.NDArray[np.int32]

    def where(self, keep: npt.NDArray[np.bool_]) -> "Spans":
        """Some of them. keep: bool [n]."""
        return Spans(self.run[keep], self.first[keep], self.count[keep])


class Gathered(NamedTuple):
    """KV copied together. rows: [kv_heads, n, k_dim + v_dim]; positions: int64 [n]; cut: not all is seen by all."""

    rows: Tensor
    k_dim: int
    positions: Tensor
    cut: bool

    def on(self, place: torch.device) -> "Gathered":
        """The same there: in one copy that nobody waits for, where the memory is pinned."""
        return self._replace(rows=self.rows.to(place, non_blocking=place.type != "cpu"))

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


def tiles(blocks: BlockList, visible: Visible, gather: Gather = gather) -> Iterator[Gathered]:
    """Blocks copied together for many rows, at most TILE_TOKENS at a time, what no query sees left out.

    gather: attention.gather, or the same where the blocks are.
    """
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
