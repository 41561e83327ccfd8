"""All blocks of a row while they are in memory that the CPU reads: found once, pinned for each attention over them.

The ledger counts what moves: until then addresses need not be asked for again. What is on ssd or in the memory of a
device is not at hand: its blocks come batch by batch (Engine.reading).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from alaya_tiers.attention import BlockList
from alaya_tiers.layer import AtHand, Layer, Row
from alaya_tiers.view import Heads, Spans


class Hand:
    """The blocks of a row, pinned. used: bool [kv_heads, runs], which of them were attended."""

    def __init__(self, state: Layer, known: AtHand) -> None:
        self._shape, self._length, self._known = state.shape, state.length, known
        self.used: npt.NDArray[np.bool_] = np.zeros(known.ids.shape, bool)

    def everything(self) -> BlockList:
        """All of them."""
        self.used[:] = True
        starts = np.arange(self.used.shape[1], dtype=np.int32) * self._shape.tokens
        counts = np.minimum(self._length - starts, self._shape.tokens).astype(np.int32)
        return self._listed(self._known.addresses, starts, counts)

    def blocks(self, spans: Spans, heads: Heads) -> BlockList:
        """Those of some kv heads."""
        chosen = heads[:, None], spans.run
        self.used[chosen] = True
        addresses = self._known.addresses[chosen] + spans.first.astype(np.int64) * self._shape.geometry.row_bytes
        return self._listed(addresses, (spans.run * self._shape.tokens + spans.first).astype(np.int32), spans.count)

    def rows(
        self, heads: Heads, counts: npt.NDArray[np.intp], run: npt.NDArray[np.intp], offset: npt.NDArray[np.intp]
    ) -> npt.NDArray[np.int64]:
        """Addresses of single tokens, of each of ``heads`` so many. run, offset: of each, its block and token there."""
        cell = np.repeat(heads * self.used.shape[1], counts) + run
        self.used.reshape(-1)[cell] = True
        found: npt.NDArray[np.int64] = self._known.addresses.reshape(-1)[cell]
        return found + offset * self._shape.geometry.row_bytes

    def _listed(
        self, addresses: npt.NDArray[np.int64], starts: npt.NDArray[np.int32], counts: npt.NDArray[np.int32]
    ) -> BlockList:
        g = self._shape.geometry
        return BlockList(addresses, starts, counts, g.k_dim, g.v_dim, g.dtype)


@contextmanager
def at_hand(state: Layer, row: Row) -> Iterator[Hand | None]:
    """All blocks of the row, readable inside; None where some are not. Raises SessionClosed."""
    engine, mover = state.engine, state.engine.mover
    with mover.lock:
        held = mover.hold()  # another thread may close the engine meanwhile
        known = row.at_hand
        if known is None or known.moves != mover.ledger.moves or known.ids.shape[1] != row.runs:
            row.at_hand = known = _found(state, row)
        if known is not None:
            flat = known.ids.reshape(-1)
            mover.ledger.pin(flat)
    if known is None:
        yield None
        return
    hand = Hand(state, known)
    try:
        yield hand
    finally:
        engine.used(flat if hand.used.all() else known.ids[hand.used])
        engine.unpin(flat)
        del held


def _found(state: Layer, row: Row) -> AtHand | None:
    """Where all blocks lie, if the CPU reads them there. The lock is held."""
    mover = state.engine.mover
    if not mover.device.on_cpu or not row.runs:
        return None
    ids = state.ids(row.first)
    return AtHand(mover.ledger.moves, ids, mover.addresses(ids)) if mover.ledger.readable(ids).all() else None
