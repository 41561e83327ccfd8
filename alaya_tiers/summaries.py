"""Summaries of blocks' codes, in memory: made when somebody wants them, from the codes alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from alaya_tiers import kernel
from alaya_tiers.devices.cpu import plain_slab
from alaya_tiers.index.codes import Layout
from alaya_tiers.index.summary import Shape, summarise
from alaya_tiers.ledger import Ids
from alaya_tiers.mover import Mover
from alaya_tiers.tiers.arena import Arena
from alaya_tiers.tiers.base import Accountant, Slots

SLAB_BYTES = 1 << 14
"""Memory comes in small steps: what summaries do not need is for codes."""


class Summaries:
    """Beside the codes, of their budget. Used under the mover's lock, but for ``make``."""

    def __init__(self, mover: Mover, accountant: Accountant) -> None:
        self._mover, self._accountant = mover, accountant
        self._arena: Arena | None = None
        self.full = False
        """There was no room for some."""

    def missing(self, ids: Ids) -> Ids:
        """Columns of blocks [kv_heads, n] that have none."""
        return ids[:, (self._mover.ledger.summary[ids] < 0).any(0)]

    def addresses(self, ids: Ids) -> npt.NDArray[np.int64] | None:
        """int64, as ids; None where a block has none."""
        slots = self._mover.ledger.summary[ids]
        return None if self._arena is None or (slots < 0).any() else self._arena.addresses(slots)

    def hold(self) -> object:
        """Something that keeps them in memory while it lives."""
        return None if self._arena is None else self._arena.hold()

    def load(
        self,
        ids: Ids,
        layout: Layout,
        budget: int,
        read: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.bool_]],
    ) -> npt.NDArray[np.bool_]:
        """Those of runs of blocks [n, kv_heads] that were kept, as far as there is room. Takes the lock.

        read: puts them to addresses [n, kv_heads]; which are good, bool [n]. Returns which are not known to be damaged.
        """
        with self._mover.lock:
            slots = self._room(ids.size, Shape.of(layout).nbytes, ids.shape[1], budget)
            arena = self._arena
            if slots is None or arena is None:
                return np.ones(len(ids), bool)
            held, slots = arena.hold(), slots.reshape(ids.shape)
            to = arena.addresses(slots)
        good = np.zeros(len(ids), bool)
        try:
            good = read(to)
        finally:
            with self._mover.lock:
                if self._arena is arena:
                    new = good & (self._mover.ledger.summary[ids] < 0).all(1)
                    arena.give(slots[~new].ravel())
                    self._mover.ledger.summarised(ids[new].ravel(), slots[new].ravel())
            del held
        return good

    def make(self, ids: Ids, codes: Arena, layout: Layout, budget: int) -> None:
        """Of blocks [kv_heads, n] of one layer that have codes, coded so, as far as there is room. Takes the lock."""
        mover, book = self._mover, self._mover.ledger
        with mover.lock:
            runs = ids[:, (book.code[ids] >= 0).all(0)]
            flat = self.missing(runs).T.ravel()
            slots, layer = book.code[flat], book.layer[flat]
            coded = torch.empty(flat.size, layout.nbytes, dtype=torch.uint8)
            to = coded.data_ptr() + np.arange(flat.size) * layout.nbytes
            kernel.copy(codes.addresses(slots), to, np.full(flat.size, layout.nbytes), None)
        if not flat.size:
            return
        made = summarise(coded, layout).numpy()
        with mover.lock:  # some may have gone meanwhile
            same = (book.code[flat] == slots) & (book.summary[flat] < 0) & (book.layer[flat] == layer)
            same = np.repeat(same.reshape(-1, len(ids)).all(1), len(ids))
            if mover.codes is codes and same.any():
                self._put(flat[same], np.ascontiguousarray(made[same]), len(ids), budget)

    def _put(self, flat: Ids, made: npt.NDArray[np.uint8], heads: int, budget: int) -> None:
        nbytes = made.shape[1]
        slots = self._room(flat.size, nbytes, heads, budget)
        if slots is None or self._arena is None:
            return
        source = made.ctypes.data + np.arange(flat.size) * nbytes
        kernel.copy(source, self._arena.addresses(slots), np.full(flat.size, nbytes), None)
        self._mover.ledger.summarised(flat, slots)

    def _room(self, n: int, nbytes: int, heads: int, budget: int) -> Slots | None:
        if self._arena is None:
            self._arena = self._mover.summaries = Arena(
                "index", budget, nbytes, self._accountant, plain_slab, slab_bytes=SLAB_BYTES, lanes=heads
            )
        slots = self._arena.take(n) if nbytes <= self._arena.slot_bytes else None
        self.full |= slots is None
        return slots

    def close(self) -> None:
        """Free all memory."""
        if self._arena is not None:
            self._arena.close()
        self._arena = self._mover.summaries = None
