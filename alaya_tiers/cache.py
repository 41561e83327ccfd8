"""A session: keys and values in, attention out. Knows nothing of any model library."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers.attention import (
    BlockList,
    Partial,
    attend_blocks,
    attend_dense,
    gather,
    merge,
    with_sinks,
    write_rows,
)
from alaya_tiers.blocks import BlockShape, Geometry
from alaya_tiers.engine import Engine
from alaya_tiers.errors import ContextTooLong, InputError, SessionClosed
from alaya_tiers.ledger import Ids
from alaya_tiers.stats import Stats, TierUse

FEW_ROWS = 32
"""Up to this many rows a kv head the compiled kernel reads blocks where they are; above, GEMMs read gathered tiles."""

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

    @classmethod
    def causal(cls, past: int, queries: int) -> "Visible":
        """Query i, at position past + i, sees itself and what came before."""
        return cls(np.zeros(queries, np.int32), np.arange(past + 1, past + queries + 1, dtype=np.int32))

    @classmethod
    def all(cls, length: int, queries: int, extra: Extra | None = None) -> "Visible":
        """Every query sees every token, but for ``extra``."""
        return cls(np.zeros(queries, np.int32), np.full(queries, length, np.int32), extra)


class Row:
    """One sequence of a layer: the first block id of each run of tokens, oldest first."""

    def __init__(self, stream: int, first: npt.NDArray[np.int64] | None = None) -> None:
        self.stream = stream
        self._first = np.empty(16, np.int64) if first is None else first.copy()
        self.runs = 0 if first is None else first.size

    @property
    def first(self) -> npt.NDArray[np.int64]:
        """int64 [runs]."""
        return self._first[: self.runs]

    def append(self, first: int) -> None:
        """One more run."""
        if self.runs == self._first.size:
            self._first = np.append(self._first, np.empty(max(16, self.runs), np.int64))
        self._first[self.runs] = first
        self.runs += 1


class Layer:
    """The KV of one layer: as many rows as the batch has sequences, all of the same length."""

    def __init__(self, engine: Engine, number: int, shape: BlockShape, rows: int) -> None:
        self.engine, self.number, self.shape = engine, number, shape
        self.length = 0
        self.rows = [Row(engine.new_stream()) for _ in range(rows)]

    def ids(self, first: npt.NDArray[np.int64]) -> Ids:
        """Block ids of runs, [kv_heads, runs]."""
        return first + np.arange(self.shape.geometry.kv_heads)[:, None]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens to every row. k: [rows, kv_heads, n, k_dim], v: [rows, kv_heads, n, v_dim].

        All or nothing: on an error the layer is as it was.
        """
        try:
            for row, k_row, v_row in zip(self.rows, k, v, strict=True):
                self._append(row, k_row, v_row)
        except BaseException:
            self._trim()
            raise
        self.length += k.shape[2]

    def crop(self, length: int) -> None:
        """Forget all tokens from ``length`` on."""
        self.length = length
        self._trim()

    def select(self, indices: Sequence[int]) -> None:
        """The batch becomes rows ``indices`` of the old one; rows may repeat. Blocks are shared, none is copied."""
        old = self.rows
        first_use = {i: n for n, i in reversed(list(enumerate(indices)))}
        self.rows = [old[i] if first_use[i] == n else self._share(old[i]) for n, i in enumerate(indices)]
        for i, row in enumerate(old):
            if i not in first_use:
                self._release(row, 0)

    def fork(self) -> "Layer":
        """The same rows again, sharing all blocks."""
        other = Layer(self.engine, self.number, self.shape, 0)
        other.length, other.rows = self.length, [self._share(row) for row in self.rows]
        return other

    def clear(self) -> None:
        """Let go of all blocks."""
        self.crop(0)

    def _append(self, row: Row, k: Tensor, v: Tensor) -> None:
        size = self.shape.tokens
        mover, done, n = self.engine.mover, 0, k.shape[1]
        while done < n:
            offset = (self.length + done) % size
            ids = self._open(row, self.length + done, offset)
            take = min(size - offset, n - done)
            self._write(ids, offset, k[:, done : done + take], v[:, done : done + take])
            done += take
            if offset + take == size:
                with mover.lock:
                    mover.ledger.seal(ids)

    def _write(self, ids: Ids, offset: int, k: Tensor, v: Tensor) -> None:
        """Put rows into open blocks, from row ``offset`` on. k, v: [kv_heads, n, dim]."""
        g = self.shape.geometry
        if self.engine.mover.device.on_cpu:
            write_rows(k, v, self.engine.addresses(ids) + offset * g.row_bytes)
            return
        for head, block in enumerate(ids.tolist()):
            rows = self.rows_of(block)[offset : offset + k.shape[1]]
            rows[:, : g.k_dim], rows[:, g.k_dim :] = k[head], v[head]

    def rows_of(self, block: int) -> Tensor:
        """A pinned or open block as a tensor [block_tokens, k_dim + v_dim]."""
        g = self.shape.geometry
        return self.engine.tensor(block)[: self.shape.nbytes].view(g.dtype).view(-1, g.width)

    def _open(self, row: Row, position: int, offset: int) -> Ids:
        """The open blocks that hold ``position``, belonging to this row alone."""
        engine, heads, book = self.engine, self.shape.geometry.kv_heads, self.engine.mover.ledger
        run = position // self.shape.tokens
        if run == row.runs:
            row.append(engine.open_blocks(self.number, row.stream, position, heads))
            return self.ids(row.first[run:]).ravel()
        old = self.ids(row.first[run:]).ravel()
        if not book.sealed[old[0]] and book.refs[old[0]] == 1:
            return old
        row.stream = engine.new_stream()  # shared with another row, or sealed before a crop: go on in a copy
        first = engine.open_blocks(self.number, row.stream, position - offset, heads)
        new = np.arange(first, first + heads)
        try:
            engine.copy_rows(old, new, offset * self.shape.geometry.row_bytes)
        except BaseException:
            engine.release(new)
            raise
        row.first[run] = first
        engine.release(old)
        return new

    def _trim(self) -> None:
        """Drop the runs beyond ``length``; a row that loses a sealed block goes on under another stream name."""
        for row in self.rows:
            self._release(row, -(-self.length // self.shape.tokens))

    def _release(self, row: Row, keep: int) -> None:
        if row.runs <= keep:
            return
        ids = self.ids(row.first[keep:]).ravel()
        row.runs = keep
        row.stream = self.engine.new_stream()
        self.engine.release(ids)

    def _share(self, row: Row) -> Row:
        ids = self.ids(row.first).ravel()
        with self.engine.mover.lock:
            self.engine.mover.ledger.retain(ids)
        return Row(self.engine.new_stream(), row.first)


class Session:
    """K and V of all layers of a batch of sequences, wherever they are.

    engine: shared by forks. most_tokens: the model's positions, None = any number.
    """

    def __init__(self, engine: Engine, most_tokens: int | None = None) -> None:
        self.engine, self.most_tokens = engine, most_tokens
        self.layers: dict[int, Layer] = {}
        self.gathered = self.gathered_bytes = 0
        self.on_failure: Callable[[int], None] = lambda length: None
        """Called with the length to go back to when attention fails in the middle of a step."""
        weakref.finalize(self, _let_go, self.layers, engine).atexit = False

    # ------------------------------------------------------------------ write
    def update(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Append the KV of new tokens. k: [rows, kv_heads, n, k_dim], v: [rows, kv_heads, n, v_dim], of one dtype.

        Raises InputError, ContextTooLong, BudgetTooSmall, StoreError; nothing was appended then.
        """
        state = self._layer(layer, k, v)
        if self.most_tokens is not None and state.length + k.shape[2] > self.most_tokens:
            raise ContextTooLong(
                f"{state.length} tokens in the cache and {k.shape[2]} more exceed the model's {self.most_tokens} "
                "positions; "
                "shorten the prompt, or pass max_tokens=... if the model really extrapolates"
            )
        state.append(k.detach(), v.detach())

    def length(self, layer: int = 0) -> int:
        """Tokens of a layer, 0 for one that has none."""
        return self.layers[layer].length if layer in self.layers else 0

    def rows(self, layer: int) -> int:
        """Sequences of a layer."""
        return len(self.layers[layer].rows)

    def crop(self, length: int, layer: int | None = None) -> None:
        """Forget all tokens from ``length`` on, of one layer or all."""
        for state in [self.layers[layer]] if layer is not None else self.layers.values():
            state.crop(min(length, state.length))

    def select(self, layer: int, indices: Sequence[int]) -> None:
        """Make the batch of a layer rows ``indices`` of what it was."""
        self.layers[layer].select(indices)

    def fork(self, layer: int) -> "Layer":
        """A layer that shares all blocks with this one's."""
        return self.layers[layer].fork()

    # ------------------------------------------------------------------ read
    def attention(
        self,
        layer: int,
        q: Tensor,
        visible: Sequence[Visible],
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Exact attention. q: [rows, query_heads, n, k_dim]; visible: one for each row; sinks: [query_heads] logits.

        Returns [rows, query_heads, n, v_dim] in q's dtype. Raises StoreError; the session is unchanged then.
        """
        state = self.layers[layer]
        with self.engine.mover.lock:
            self.engine.mover.ledger.begin_pass(layer)
        g = state.shape.geometry
        rows, heads, n, _ = q.shape
        out = q.new_empty(rows, heads, n, g.v_dim)
        for r, row in enumerate(state.rows):
            grouped = q[r].reshape(g.kv_heads, heads // g.kv_heads * n, -1)
            parts = list(self._partials(state, row, grouped, visible[r], scale, softcap))
            part = merge(parts) if parts else _nothing(grouped, g.v_dim)
            if sinks is not None:
                part = with_sinks(part, sinks.view(g.kv_heads, -1, 1).expand(-1, -1, n).reshape(g.kv_heads, -1))
            out[r] = part.out.view(heads, n, g.v_dim)
        return out

    def gather(self, layer: int) -> tuple[Tensor, Tensor]:
        """All of a layer as tensors k [rows, kv_heads, length, k_dim] and v: what tiers try never to make."""
        state = self.layers[layer]
        g = state.shape.geometry
        k = torch.empty(len(state.rows), g.kv_heads, state.length, g.k_dim, dtype=g.dtype)
        v = torch.empty(len(state.rows), g.kv_heads, state.length, g.v_dim, dtype=g.dtype)
        everything = Visible.all(state.length, 1)
        for r, row in enumerate(state.rows):
            for piece in self._pieces(state, row, 0, state.length):
                for part in _tiles(piece, everything) if isinstance(piece, BlockList) else [piece]:
                    k[r, :, part.positions], v[r, :, part.positions] = part.k.to(k.device), part.v.to(v.device)
        self.gathered += 1
        self.gathered_bytes = max(self.gathered_bytes, k.nbytes + v.nbytes)
        return k, v

    def flush(self) -> None:
        """Write all full blocks and what they belong to into the store, where any Zarr reader finds them.

        The last tokens, fewer than a block, stay in memory. Raises StoreError; what is in memory stays there.
        """
        engine = self.engine
        engine.flush(
            {
                "contexts": [
                    {
                        "tokens": self.length(min(self.layers)),
                        "stored_tokens": self.length(min(self.layers)) // size * size,
                        "layers": {str(n): self._places(state, r) for n, state in self.layers.items()},
                    }
                    for r in range(self.rows(min(self.layers)))
                    for size in [max(state.shape.tokens for state in self.layers.values())]
                ]
            }
            if self.layers
            else {"contexts": []}
        )

    def stats(self) -> Stats:
        """What happened so far."""
        engine = self.engine
        books, tiers = engine.accountant, {}
        for name, limit in books.limits.items():
            tiers[name] = TierUse(limit, engine.used_bytes(name), books.peak[name])
        traffic = engine.traffic
        return Stats(
            tokens=max((state.length for state in self.layers.values()), default=0),
            kv_bytes=sum(s.length * s.shape.geometry.token_bytes * len(s.rows) for s in self.layers.values()),
            tiers=tiers,
            touched=replace(engine.touched),
            read_bytes=traffic.read_bytes,
            read_ahead_bytes=traffic.read_ahead_bytes,
            written_bytes=traffic.written_bytes,
            waited_seconds=engine.waited_seconds,
            gathered=self.gathered,
            gathered_bytes=self.gathered_bytes,
            direct_io=engine.direct_io,
            path=None if engine.store.temporary else engine.store.path,
        )

    def clear(self) -> None:
        """Let go of all blocks: the session is as new. Also when it is dropped while its forks live on."""
        if not self.engine.closed:
            for state in self.layers.values():
                state.clear()
        self.layers.clear()

    # ------------------------------------------------------------------ inside
    def _layer(self, number: int, k: Tensor, v: Tensor) -> Layer:
        """The layer's state, checked against new KV."""
        if self.engine.closed:
            raise SessionClosed("this cache is closed; make a new one")
        if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3] or k.dtype != v.dtype:
            raise InputError(
                f"keys {tuple(k.shape)} {k.dtype} and values {tuple(v.shape)} {v.dtype} are not alike: "
                "both must be [rows, heads, n, dim]"
            )
        geometry = Geometry(k.shape[1], k.shape[3], v.shape[3], k.dtype)
        state = self.layers.get(number)
        if state is None:
            shape = self.engine.fit(number, geometry, k.device)
            state = self.layers[number] = Layer(self.engine, number, shape, k.shape[0])
        elif state.shape.geometry != geometry:
            raise InputError(f"layer {number} holds {state.shape.geometry}, the new keys and values are {geometry}")
        if len(state.rows) == 1 < k.shape[0]:
            state.select([0] * k.shape[0])  # one stored context, many beams or samples: they share its blocks
        if len(state.rows) != k.shape[0]:
            raise InputError(f"layer {number} holds {len(state.rows)} sequences, got {k.shape[0]}")
        return state

    def _partials(
        self, state: Layer, row: Row, q: Tensor, visible: Visible, scale: float, softcap: float | None
    ) -> Iterator[Partial]:
        """Attention over one batch of readable blocks after the other. q: [kv_heads, rows, k_dim]."""
        if not visible.lo.size:
            return
        group = q.shape[1] // visible.lo.size
        few = q.shape[1] <= FEW_ROWS and visible.extra is None
        lo, hi = np.concatenate([visible.lo] * group), np.concatenate([visible.hi] * group)
        for piece in self._pieces(state, row, int(lo.min()), int(hi.max())):
            if few and isinstance(piece, BlockList):
                yield attend_blocks(q, piece, scale, lo, hi, softcap)
                continue
            for k, v, positions, cut in _tiles(piece, visible) if isinstance(piece, BlockList) else [piece]:
                mask = _mask(positions, visible, group, k.shape[0], cut=cut)
                mask = mask if mask is None else mask.to(q.device)
                yield attend_dense(q, k.to(q.device), v.to(q.device), scale, mask, softcap)

    def _pieces(self, state: Layer, row: Row, lo: int, hi: int) -> Iterator["BlockList | Gathered"]:
        """The blocks of positions ``lo`` to ``hi``, batch by batch, each readable until the next is asked for."""
        g, size = state.shape.geometry, state.shape.tokens
        hi = min(hi, state.length)
        if hi <= lo:
            return
        runs = np.arange(lo // size, -(-hi // size))
        starts = (runs * size).astype(np.int32)
        counts = np.minimum(size, state.length - starts).astype(np.int32)
        ids = state.ids(row.first[runs[0] : runs[-1] + 1])
        for columns, batch in self.engine.reading(ids, partial(self._upcoming, state.number)):
            here = self.engine.on_cpu(batch).all(0)
            if not here.all():
                there = np.flatnonzero(~here)
                yield _gathered(state, batch[:, there], starts[columns[there]], counts[columns[there]])
                columns, batch = columns[here], batch[:, here]
            if columns.size:
                addresses = self.engine.addresses(batch)
                yield BlockList(addresses, starts[columns], counts[columns], g.k_dim, g.v_dim, g.dtype)

    def _upcoming(self, layer: int) -> Iterator[Ids]:
        """Block ids in the order exact attention will read them after ``layer``."""
        numbers = sorted(self.layers)
        after = numbers.index(layer) + 1
        for number in numbers[after:] + numbers[:after]:
            state = self.layers[number]
            for row in state.rows:
                yield state.ids(row.first)

    def _places(self, state: Layer, r: int) -> list[list[int]]:
        """[stream, segment] of each run of tokens of a row, in order; what the manifest says of it."""
        row, book, size = state.rows[r], self.engine.mover.ledger, self.engine.settings.segment_tokens
        first = row.first[: state.length // state.shape.tokens]
        pairs = np.stack([book.stream[first], book.start[first] // size], 1)
        return [list(map(int, pair)) for i, pair in enumerate(pairs) if i == 0 or (pair != pairs[i - 1]).any()]


def _nothing(q: Tensor, v_dim: int) -> Partial:
    """Attention over no tokens. q: [kv_heads, rows, k_dim]."""
    return Partial(torch.zeros(*q.shape[:2], v_dim), torch.full(q.shape[:2], -torch.inf))


def _let_go(layers: dict[int, Layer], engine: Engine) -> None:
    """A session was collected, perhaps in the middle of the engine's work: leave its blocks to the next call."""
    engine.bury([state.ids(row.first).ravel() for state in layers.values() for row in state.rows])


class Gathered(NamedTuple):
    """KV copied together. k, v: [kv_heads, n, dim]; positions: int64 [n]; cut: some query does not see all of it."""

    k: Tensor
    v: Tensor
    positions: Tensor
    cut: bool


def _gathered(state: Layer, ids: Ids, starts: npt.NDArray[np.int32], counts: npt.NDArray[np.int32]) -> Gathered:
    """Blocks of which some are in GPU memory, copied together there. ids: [kv_heads, columns]."""
    device = state.engine.mover.device.tensor(0).device
    rows = torch.stack(
        [
            torch.cat([state.rows_of(block)[:n].to(device) for block, n in zip(of_head, counts.tolist(), strict=True)])
            for of_head in ids.tolist()
        ]
    )
    k_dim = state.shape.geometry.k_dim
    return Gathered(rows[..., :k_dim], rows[..., k_dim:], _positions(starts, counts), True)


def _positions(starts: npt.NDArray[np.int32], counts: npt.NDArray[np.int32]) -> Tensor:
    """int64: the positions of all tokens of these runs, in their order."""
    runs = [np.arange(start, start + n) for start, n in zip(starts.tolist(), counts.tolist(), strict=True)]
    return torch.from_numpy(np.concatenate(runs))


def _tiles(blocks: BlockList, visible: Visible) -> Iterator[Gathered]:
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
            k, v = gather(packed, 0, int(ends_here[-1]))
            yield Gathered(k, v, _positions(blocks.starts[some], counts), cut)


def _mask(positions: Tensor, visible: Visible, group: int, heads: int, *, cut: bool) -> Tensor | None:
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
