"""The KV of one layer: which blocks, in which order, for each sequence of the batch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from alaya_tiers.blocks import BlockShape
from alaya_tiers.engine import Engine
from alaya_tiers.index.codes import Layout
from alaya_tiers.index.plan import History, Rates, Step
from alaya_tiers.ledger import Ids
from alaya_tiers.stats import Touched
from alaya_tiers.tiers.mirror import Mirrored
from alaya_tiers.view import Spans


class AtHand(NamedTuple):
    """All blocks of a row, when all of them were in memory the CPU reads and the ledger had counted ``moves``.

    ids, addresses: int64 [kv_heads, runs].
    """

    moves: int
    ids: Ids
    addresses: npt.NDArray[np.int64]


class Divided(NamedTuple):
    """What a row's queries see, as sparse attention divides it.

    outside: attended exactly; middle: blocks that have codes, ``cold`` of them on disk alone. codes: their addresses,
    int64 [kv_heads, middle]; summaries: the same of their summaries, None where one has none; mirrored: of codes in a
    device's memory. codings: what the ledger had counted; held: keeps the codes in memory.
    key: while it is the same and so are codings, all of this is.
    """

    key: tuple[int, ...]
    outside: Spans
    middle: Spans
    codes: npt.NDArray[np.int64]
    summaries: npt.NDArray[np.int64] | None
    mirrored: Mirrored | None
    codings: int
    held: object
    layout: Layout
    step: Step
    rates: Rates
    cold: int = 0


class Row:
    """One sequence of a layer: the first block id of each run of tokens, oldest first."""

    at_hand: AtHand | None = None
    """What the last attention found, so that the next one need not look for it again."""
    divided: Divided | None = None
    """The same of sparse attention; ``held`` is not."""
    picked: npt.NDArray[np.int64] | None = None
    """Pages of blocks that the last sparse attention wanted tokens of, ascending."""

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
        self.history, self.prefill = History(shape.geometry.kv_heads), History(shape.geometry.kv_heads)
        """What sparse attention needed lately: decoding, and in chunks of a prompt."""
        self.touched, self.scanned = Touched(), 0
        """Bytes that the last decode step used, of blocks and of codes; and those other sessions used meanwhile."""

    def ids(self, first: npt.NDArray[np.int64]) -> Ids:
        """Block ids of runs, [kv_heads, runs]."""
        return first + np.arange(self.shape.geometry.kv_heads)[:, None]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens to every row. k: [rows, kv_heads, n, k_dim], v: [rows, kv_heads, n, v_dim].

        All or nothing: on an error the layer is as it was.
        """
        held = self.engine.hold()  # another thread may close the engine meanwhile
        try:
            for row, k_row, v_row in zip(self.rows, k, v, strict=True):
                self._append(row, k_row, v_row)
        except BaseException:
            self._trim()
            raise
        finally:
            del held
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

    def seal(self) -> None:
        """Make all blocks final, the last ones with zeros where no token is: what comes next goes on in copies.

        Raises StoreError, BudgetTooSmall; nothing is lost then.
        """
        held, book, n = self.engine.hold(), self.engine.mover.ledger, self.length % self.shape.tokens
        for row in self.rows:
            if n and not book.sealed[row.first[-1]]:
                ids = self._open(row, self.length, n)  # a copy, where a fork shares it: it may be longer than we are
                self.engine.blank(ids, n * self.shape.geometry.row_bytes, self.shape.nbytes)
                with self.engine.mover.lock:
                    book.seal(ids)
            row.stream = self.engine.new_stream()
        del held

    def clear(self) -> None:
        """Let go of all blocks."""
        self.crop(0)

    def _append(self, row: Row, k: Tensor, v: Tensor) -> None:
        size = self.shape.tokens
        done, n = 0, k.shape[1]
        while done < n:
            offset = (self.length + done) % size
            ids = self._open(row, self.length + done, offset)
            take = min(size - offset, n - done)
            at = offset * self.shape.geometry.row_bytes
            self.engine.write(ids, at, k[:, done : done + take], v[:, done : done + take])
            done += take
            if offset + take == size:
                self.engine.sealed(ids)

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
