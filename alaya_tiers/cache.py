"""A session: keys and values in, attention out. Knows nothing of any model library."""

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers import sparse
from alaya_tiers.attention import (
    BlockList,
    Partial,
    attend_blocks,
    attend_causal,
    attend_dense,
    gather,
    merge,
    nothing,
    with_sinks,
)
from alaya_tiers.blocks import Geometry
from alaya_tiers.engine import Engine
from alaya_tiers.errors import ContextTooLong, InputError
from alaya_tiers.explain import Explanation, explain
from alaya_tiers.foresight import foreseen
from alaya_tiers.hand import at_hand
from alaya_tiers.layer import Layer, Row
from alaya_tiers.ledger import Ids
from alaya_tiers.listed import Asked, nothing_more
from alaya_tiers.near import Near, rows_of
from alaya_tiers.needs import Needs
from alaya_tiers.observe import observe
from alaya_tiers.pace import Meter
from alaya_tiers.picks import ahead
from alaya_tiers.recorder import Recorder, recording
from alaya_tiers.stats import Stats
from alaya_tiers.view import Gather, Gathered, Heads, Spans, Visible, check_asked, mask_of, positions_of, tiles

__all__ = ["Session", "Visible"]

BETWEEN, NEAR, HERE = range(3)
"""Of a run of blocks: some heads' in the device's memory; all heads'; all in memory that the CPU reads."""

FEW_ROWS = 32
"""Up to this many rows a kv head the compiled kernel reads blocks where they are; above, GEMMs read gathered tiles."""


class Session:
    """K and V of all layers of a batch of sequences, wherever they are.

    engine: shared by forks. most_tokens: the model's positions, None = any number.
    """

    def __init__(self, engine: Engine, most_tokens: int | None = None) -> None:
        self.engine, self.most_tokens = engine, most_tokens
        self.layers: dict[int, Layer] = {}
        self.gathered = self.gathered_bytes = 0
        self.needs: Needs | None = None
        """What is known beforehand of what its heads will look for; stored with it."""
        self._meter = Meter(engine.steps, engine.clock)
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
        self._meter.begins(layer, k.shape[2])
        if (recorder := self.engine.recorder) is not None:
            recorder.put(self, state, k.shape[2], k.shape[0], self._stored(state))
        state.append(k.detach(), v.detach())

    def length(self, layer: int = 0) -> int:
        """Tokens of a layer, 0 for one that has none."""
        return self.layers[layer].length if layer in self.layers else 0

    def rows(self, layer: int) -> int:
        """Sequences of a layer."""
        return len(self.layers[layer].rows)

    def crop(self, length: int, layer: int | None = None) -> None:
        """Forget all tokens from ``length`` on, of one layer or all."""
        self.engine.check_open()
        for state in [self.layers[layer]] if layer is not None else self.layers.values():
            state.crop(min(length, state.length))
            if self.engine.recorder is not None:
                self.engine.recorder.cut(state, state.length)

    def select(self, layer: int, indices: Sequence[int]) -> None:
        """Make the batch of a layer rows ``indices`` of what it was."""
        self.engine.check_open()
        self.layers[layer].select(indices)

    def fork(self, layer: int) -> "Layer":
        """A layer that shares all blocks with this one's."""
        self.engine.check_open()
        made = self.layers[layer].fork()
        if self.engine.recorder is not None:
            self.engine.recorder.forked(self.layers[layer], made)
        return made

    # ------------------------------------------------------------------ read
    def attention(
        self,
        layer: int,
        q: Tensor,
        visible: Sequence[Visible],
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        *,
        latent: bool = False,
    ) -> Tensor:
        """Attention over what each query sees: exact, or sparse by the settings. visible: one for each row.

        q: [rows, query_heads, n, k_dim]; sinks: [query_heads], logits of what only takes weight away. softcap: scores
        (scaled) become softcap * tanh(score / softcap).
        latent: queries are compared with the whole row [k | v] (q: [..., k_dim + v_dim]) and k is summed; in MLA k is
        the latent, v the rotary key. Returns [rows, query_heads, n, v_dim] in q's dtype. Raises InputError, StoreError;
        the session is unchanged then.
        """
        self.engine.check_open()
        if layer not in self.layers:
            raise InputError(f"layer {layer} holds no keys: update() them first")
        g = self.layers[layer].shape.geometry
        dims = g.k_dim + g.v_dim if latent else g.k_dim
        check_asked(q, (len(self.layers[layer].rows), g.kv_heads, dims), visible, scale, softcap, sinks)
        state, began, touched = self.layers[layer], self.engine.clock.monotonic(), replace(self.engine.touched)
        scanned = 0 if (use := self.engine.sparse) is None else use.scanned_bytes
        if self.engine.partitions is not None:
            self.engine.partitions.attended(layer, latent=latent)
        with self.engine.mover.lock:
            self.engine.mover.ledger.begin_pass(layer)
        rows, heads, n, _ = q.shape
        v_dim = g.k_dim if latent else g.v_dim
        out = q.new_empty(rows, heads, n, v_dim)
        for r, row in enumerate(state.rows):
            done = 0
            if self.engine.sparse is not None and visible[r].extra is None:
                done = self._sparse(state, row, q[r], visible[r], scale, softcap, sinks, out[r], latent=latent)
            if done < n:
                seen = visible[r].part(done, n) if done else visible[r]
                part = self._exact(
                    state, row, self._grouped(state, q[r, :, done:]), seen, scale, softcap, latent=latent
                )
                out[r, :, done:] = _with_sinks(part, sinks).out.view(heads, n - done, v_dim)
        if self.engine.partitions is not None:
            for row in state.rows:
                self.engine.partitions.want(state.ids(row.first[: state.length // state.shape.tokens]))
        seconds = self.engine.clock.monotonic() - began
        if n <= max(1, FEW_ROWS * state.shape.geometry.kv_heads // heads):
            state.history.measured, state.touched = seconds, self.engine.touched.since(touched)
            state.scanned = 0 if use is None else use.scanned_bytes - scanned
        self._meter.attended()
        if (recorder := self.engine.recorder) is not None:
            recorder.read(self, state, n, heads, self._stored(state), seconds)
        return out

    def _sparse(
        self,
        state: Layer,
        row: Row,
        q: Tensor,
        visible: Visible,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
        out: Tensor,
        *,
        latent: bool,
    ) -> int:
        """Sparse attention of the first queries, into ``out``; of how many. The others are to be attended exactly."""
        engine, (heads, n, _) = self.engine, q.shape
        use, partitions = engine.sparse, engine.partitions
        most = max(1, FEW_ROWS * state.shape.geometry.kv_heads // heads)
        assert use is not None
        assert partitions is not None
        if n > most and not engine.settings.sparse_prefill:
            return 0
        history = state.history if n <= most else state.prefill
        q = q.cpu()  # scan and lists are the CPU's work; blocks of the device are attended there
        for start in range(0, n, most):
            end = min(n, start + most)
            asked = Asked(state, row, self._grouped(state, q[:, start:end]), scale, softcap, latent)
            part = sparse.attend(
                asked, history, visible.part(start, end), partial(self._blocks, state, row), use, partitions
            )
            if part is None:
                use.exact += heads * (n - start)
                return start
            part = Partial(part.out.to(out.device), part.lse.to(out.device))
            out[:, start:end] = _with_sinks(part, sinks).out.view(heads, end - start, -1)
        self._read_ahead(asked)
        return n

    def _read_ahead(self, asked: Asked) -> None:
        """Have what the next layer may want of this row's sequence on its way. asked: of this one, the last tokens."""
        state, row, partitions = asked.state, asked.row, self.engine.partitions
        assert partitions is not None
        numbers = sorted(self.layers)
        after = self.layers[numbers[(numbers.index(state.number) + 1) % len(numbers)]]
        place = state.rows.index(row)
        if place < len(after.rows):
            ahead(row, after, after.rows[place], partial(foreseen, asked, after, after.rows[place], partitions))

    def gather(self, layer: int) -> tuple[Tensor, Tensor]:
        """All of a layer as tensors k [rows, kv_heads, length, k_dim] and v: what tiers try never to make."""
        self.engine.check_open()
        k, v = self.read(layer, 0, self.layers[layer].length)
        self.gathered += 1
        self.gathered_bytes = max(self.gathered_bytes, k.nbytes + v.nbytes)
        return k, v

    def read(self, layer: int, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """The same of tokens ``lo`` to ``hi``. Raises StoreError."""
        self.engine.check_open()
        state = self.layers[layer]
        g = state.shape.geometry
        k = torch.empty(len(state.rows), g.kv_heads, hi - lo, g.k_dim, dtype=g.dtype)
        v = torch.empty(len(state.rows), g.kv_heads, hi - lo, g.v_dim, dtype=g.dtype)
        wanted = Visible(np.array([lo], np.int32), np.array([hi], np.int32))
        everything = Visible.all(state.length, 1)
        for r, row in enumerate(state.rows):
            for piece in self._pieces(state, row, wanted):
                for part in _tiled(piece, everything, gather):
                    here = (part.positions >= lo) & (part.positions < hi)
                    some = slice(None) if here.all() else here
                    at = part.positions[some] - lo
                    k[r, :, at], v[r, :, at] = part.k[:, some].to(k.device), part.v[:, some].to(v.device)
        return k, v

    def flush(self) -> None:
        """Write all full blocks and what they belong to into the store, where any Zarr reader finds them.

        The last tokens, fewer than a block, stay in memory. Raises StoreError; what is in memory stays there.
        """
        self.engine.check_open()
        self.engine.flush(self._contexts)

    def build_index(
        self,
        say: Callable[[int, int], None] = lambda done, all_of_them: None,
        *,
        ends: Sequence[int] = (),
        made: Callable[[int], None] = lambda part: None,
    ) -> None:
        """In sparse mode: make now what idle time has not made yet of the index, reading what is not in memory.

        Nothing needs it: what has no index is attended exactly. It may be interrupted at any point, and goes on from
        there when called again. say: told how many runs of blocks were tried, of how many. ends: tokens, ascending,
        where parts of the context end, which are made one after the other; made: told the number of each. Raises
        StoreError.
        """
        self.engine.check_open()
        if self.engine.sparse is not None:
            sparse.build(list(self.layers.values()), say, ends, made)
            if (recorder := self.engine.recorder) is not None:
                for state in self.layers.values():
                    recorder.built(state)

    @contextmanager
    def record(self, path: str | os.PathLike[str]) -> Iterator[Recorder]:
        """Inside, what this session and all others of its engine do is written to a file, line by line: a trace that
        ``alaya-tiers simulate`` replays.

        What is yielded takes marks: ``recorder.mark("decode")``. Costs below 2 % of a decode step; in sparse mode every
        head looks for keys meanwhile, so that what it finds is known to any replay. Raises ConfigError.
        """
        with recording(self.engine, path, self.engine.store.model) as recorder:
            yield recorder

    def explain(self) -> Explanation:
        """In sparse mode: what the optimizer planned for the last token, layer by layer, beside what it took."""
        return explain(self.engine.settings, self.layers.values())

    def stats(self) -> Stats:
        """What happened so far."""
        layers = list(self.layers.values())  # at once: a live view asks from another thread
        kv_bytes = sum(s.length * s.shape.geometry.token_bytes * len(s.rows) for s in layers)
        tokens = max((state.length for state in layers), default=0)
        return replace(
            observe(self.engine, tokens, kv_bytes), gathered=self.gathered, gathered_bytes=self.gathered_bytes
        )

    def clear(self) -> None:
        """Let go of all blocks: the session is as new. Also when it is dropped while its forks live on."""
        if not self.engine.closed:
            for state in self.layers.values():
                state.clear()
        self.layers.clear()
        self.needs = None

    # ------------------------------------------------------------------ inside
    def _stored(self, state: Layer) -> int:
        """Tokens of a layer that are on ssd only: for a recorder that meets it for the first time."""
        if self.engine.recorder is None or self.engine.recorder.knows(state) or not state.rows:
            return 0
        with self.engine.mover.lock:
            cold = ~self.engine.mover.ledger.readable(state.rows[0].first)
        return int(cold.sum()) * state.shape.tokens

    def _layer(self, number: int, k: Tensor, v: Tensor) -> Layer:
        """The layer's state, checked against new KV."""
        self.engine.check_open()
        if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3] or k.dtype != v.dtype:
            raise InputError(
                f"keys {tuple(k.shape)} {k.dtype} and values {tuple(v.shape)} {v.dtype} are not alike: "
                "both must be [rows, heads, n, dim]"
            )
        if k.device != v.device or k.is_meta:
            raise InputError(f"keys on {k.device} and values on {v.device} cannot be stored together")
        geometry = Geometry(k.shape[1], k.shape[3], v.shape[3], k.dtype)
        state = self.layers.get(number)
        if state is None:
            shape = self.engine.fit(number, geometry, k.device)
            state = self.layers[number] = Layer(self.engine, number, shape, k.shape[0])
        elif state.shape.geometry != geometry:
            raise InputError(f"layer {number} holds {state.shape.geometry}, the new keys and values are {geometry}")
        if self.engine.mover.device.on_cpu and k.device.type != "cpu":
            raise InputError(f"keys on {k.device}, but the device tier is on the CPU: say which model will run first")
        if len(state.rows) == 1 < k.shape[0]:
            state.select([0] * k.shape[0])  # one stored context, many beams or samples: they share its blocks
        if len(state.rows) != k.shape[0]:
            raise InputError(f"layer {number} holds {len(state.rows)} sequences, got {k.shape[0]}")
        return state

    @staticmethod
    def _grouped(state: Layer, q: Tensor) -> Tensor:
        """Queries [query_heads, n, dim] by kv head: [kv_heads, query heads of it x n, dim]."""
        g = state.shape.geometry
        return q.reshape(g.kv_heads, q.shape[0] // g.kv_heads * q.shape[1], -1)

    def _exact(
        self, state: Layer, row: Row, q: Tensor, visible: Visible, scale: float, softcap: float | None, *, latent: bool
    ) -> Partial:
        """Attention over all that is visible. q: [kv_heads, rows, k_dim]."""
        g, part = state.shape.geometry, None
        for more in self._partials(state, row, q, visible, scale, softcap, latent=latent):
            part = more if part is None else merge((part, more))
        return nothing(q, g.k_dim if latent else g.v_dim) if part is None else part

    def _partials(
        self, state: Layer, row: Row, q: Tensor, visible: Visible, scale: float, softcap: float | None, *, latent: bool
    ) -> Iterator[Partial]:
        """Attention over one batch of readable blocks after the other. q: [kv_heads, rows, k_dim]."""
        if not visible.lo.size:
            return
        group = q.shape[1] // visible.lo.size
        few = q.shape[1] <= FEW_ROWS and visible.extra is None
        lo, hi = np.concatenate([visible.lo] * group), np.concatenate([visible.hi] * group)
        past = None if few else visible.past
        for piece in self._pieces(state, row, visible):
            if few and isinstance(piece, Near) and not latent:
                yield piece.attend(q, scale, lo, hi, softcap)
                continue
            if few and isinstance(piece, BlockList):
                yield attend_blocks(q, replace(piece, latent=latent), scale, lo, hi, softcap)
                continue
            for tile in _tiled(piece, visible, partial(gather, room=self.engine.mover.lanes.device.scratch)):
                tile = tile.on(q.device)
                k, v = (tile.rows, tile.k) if latent else (tile.k, tile.v)
                if past is not None and tile.cut and tile.run is not None:
                    yield attend_causal(q, k, v, scale, tile.run - past, visible.lo.size, softcap)
                    continue
                mask = mask_of(tile.positions, visible, group, q.shape[0], cut=tile.cut)
                yield attend_dense(q, k, v, scale, None if mask is None else mask.to(q.device), softcap)

    def _pieces(self, state: Layer, row: Row, visible: Visible) -> Iterator["BlockList | Near | Gathered"]:
        """The blocks of what is visible, batch by batch, each readable until the next is asked for."""
        spans = visible.spans(state.length, state.shape.tokens)
        if spans.run.size == row.runs and visible.ranges is None:
            with at_hand(state, row) as hand:
                if hand is not None:
                    yield hand.everything()
            if hand is not None:
                self.engine.read_ahead(partial(self._upcoming, state.number))
                return
        yield from self._pieces_of(state, row, spans, None)

    def _blocks(self, state: Layer, row: Row, spans: Spans, heads: Heads) -> Iterator["BlockList | Near"]:
        """Some blocks of some kv heads."""
        for piece in self._pieces_of(state, row, spans, heads):
            if isinstance(piece, Gathered):
                rows = piece.rows.cpu().contiguous()
                yield _as_list(piece, rows)
                del rows  # read until now
            else:
                yield piece

    def _pieces_of(
        self, state: Layer, row: Row, spans: Spans, heads: Heads | None
    ) -> Iterator["BlockList | Near | Gathered"]:
        if not spans.run.size:
            return
        g, size = state.shape.geometry, state.shape.tokens
        runs, place = np.unique(spans.run, return_inverse=True)  # two ranges can meet in a block
        ids = state.ids(row.first[runs])
        ids = ids if heads is None else ids[heads]
        upcoming = partial(self._upcoming, state.number) if self.engine.sparse is None else nothing_more
        book = self.engine.mover.ledger
        for columns, batch in self.engine.reading(ids, upcoming):
            on_cpu = self.engine.on_cpu(batch)
            here = np.where(on_cpu.all(0), 2, (~on_cpu).all(0))
            column = np.full(runs.size, -1)
            column[columns] = np.arange(columns.size)
            for where in (NEAR, BETWEEN, HERE):  # what the device does in its own time comes first
                some = spans.where((of_span := column[place]) >= 0)
                of_span = of_span[of_span >= 0]
                chosen = here[of_span] == where
                if not chosen.any():
                    continue
                some, blocks_of = some.where(chosen), batch[:, of_span[chosen]]
                starts = (some.run * size + some.first).astype(np.int32)
                if where == BETWEEN:
                    yield _gathered(state, blocks_of, some, starts)
                    continue
                addresses = self.engine.addresses(blocks_of) + some.first.astype(np.int64) * g.row_bytes
                blocks = BlockList(addresses, starts, some.count, g.k_dim, g.v_dim, g.dtype)
                if where == NEAR:
                    yield Near(self.engine, book.device[blocks_of], blocks)
                    continue
                if not self.engine.mover.device.on_cpu:
                    yield from self._split(state, blocks_of, blocks, some.first)
                    continue
                yield blocks

    def _split(
        self, state: Layer, ids: Ids, blocks: BlockList, first: npt.NDArray[np.int32]
    ) -> Iterator["BlockList | Near"]:
        """Blocks of the host tier [kv_heads, n]: as many as pay brought to the device, the rest where they are."""
        slots = self.engine.bring(ids)
        n = slots.shape[1]
        if n:
            at = self.engine.mover.device.addresses(slots) + first[:n].astype(np.int64) * state.shape.geometry.row_bytes
            brought = replace(blocks, addresses=at, starts=blocks.starts[:n], counts=blocks.counts[:n])
            yield Near(self.engine, slots, brought)
        if n < blocks.starts.size:
            left = np.ascontiguousarray(blocks.addresses[:, n:])
            yield replace(blocks, addresses=left, starts=blocks.starts[n:], counts=blocks.counts[n:])

    def _upcoming(self, layer: int) -> Iterator[Ids]:
        """Block ids in the order exact attention will read them after ``layer``."""
        numbers = sorted(self.layers)
        after = numbers.index(layer) + 1
        for number in numbers[after:] + numbers[:after]:
            state = self.layers[number]
            for row in state.rows:
                yield state.ids(row.first)

    def _contexts(self) -> dict[str, Any]:
        """What the manifest says of every sequence: its length and where its full blocks are."""
        if not self.layers:
            return {"contexts": []}
        first = self.layers[min(self.layers)]
        size = max(state.shape.tokens for state in self.layers.values())
        return {
            "contexts": [
                {
                    "tokens": first.length,
                    "stored_tokens": first.length // size * size,
                    "layers": {str(n): self._folders(state, r) for n, state in self.layers.items()},
                }
                for r in range(len(first.rows))
            ]
        }

    def _folders(self, state: Layer, r: int) -> list[str]:
        """The segment folders of a row's full blocks, in order."""
        mover = self.engine.mover
        first = state.rows[r].first[: state.length // state.shape.tokens]
        names = [Path(mover.ssd.files[number].path).parts[-6] for number in mover.ledger.file[first].tolist()]
        return [name for i, name in enumerate(names) if i == 0 or name != names[i - 1]]


def _with_sinks(part: Partial, sinks: Tensor | None) -> Partial:
    """sinks: [query_heads]."""
    if sinks is None:
        return part
    kv_heads, rows = part.lse.shape
    return with_sinks(
        part, sinks.view(kv_heads, -1, 1).expand(-1, -1, rows * kv_heads // sinks.numel()).reshape(kv_heads, -1)
    )


def _let_go(layers: dict[int, Layer], engine: Engine) -> None:
    """A session was collected, perhaps in the middle of the engine's work: leave its blocks to the next call."""
    engine.bury([state.ids(row.first).ravel() for state in layers.values() for row in state.rows])


def _gathered(state: Layer, ids: Ids, spans: Spans, starts: npt.NDArray[np.int32]) -> Gathered:
    """Runs of blocks of which some heads are on the device, copied together there. ids: [kv_heads, spans]."""
    g, parts = state.shape.geometry, list(zip(spans.first.tolist(), spans.count.tolist(), strict=True))
    shape = (g.k_dim, g.v_dim, g.dtype)
    heads = [
        torch.cat([rows_of(state.engine, block, shape, *part) for block, part in zip(of_head, parts, strict=True)])
        for of_head in ids.tolist()
    ]
    return Gathered(torch.stack(heads), g.k_dim, positions_of(starts, spans.count), True)


def _as_list(tile: Gathered, rows: Tensor) -> BlockList:
    """A tile as blocks of one token. rows: the tile's, contiguous in memory the CPU reads; not kept."""
    heads, n, width = rows.shape
    at = rows.data_ptr() + np.arange(heads * n).reshape(heads, n) * width * rows.element_size()
    starts, ones = tile.positions.numpy().astype(np.int32), np.ones(n, np.int32)
    return BlockList(at, starts, ones, tile.k_dim, width - tile.k_dim, rows.dtype)


def _tiled(piece: "BlockList | Near | Gathered", visible: Visible, here: Gather) -> Iterable[Gathered]:
    """See tiles. here: copies what the CPU reads."""
    if isinstance(piece, Gathered):
        return [piece]
    if isinstance(piece, Near):
        return tiles(piece.blocks, visible, piece.gather)
    return tiles(piece, visible, here)
