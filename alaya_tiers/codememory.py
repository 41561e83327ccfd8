"""Memory of codes and their summaries: one budget for both, and who leaves when there is no room."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, Protocol

import numpy as np
import psutil
from torch import Tensor

from alaya_tiers import kernel, summaries
from alaya_tiers.blocks import round_up
from alaya_tiers.coded import Pieces
from alaya_tiers.config import Settings
from alaya_tiers.devices.cpu import plain_slab
from alaya_tiers.index.codes import Layout
from alaya_tiers.index.summary import Shape
from alaya_tiers.kept import Kept
from alaya_tiers.mover import Mover
from alaya_tiers.promises import Promises, S
from alaya_tiers.summaries import Summaries
from alaya_tiers.tiers.arena import Arena
from alaya_tiers.tiers.base import Accountant, Slots
from alaya_tiers.tiers.mirror import Mirror

SLAB_BYTES = 4 << 20
"""Codes take memory in smaller steps than blocks: they are an eighth of them."""

CODES_ALIGNED = 64
"""Bytes: as a GPU reads them."""

MOST_SUMMARIES = 2
"""The budget over what summaries alone would take, at least, where codes are left on disk."""


class Announced(Protocol):
    """Codes of a layer that will be promised, see coded.LayerCodes."""

    @property
    def of_codes(self) -> Pieces: ...

    @property
    def of_summaries(self) -> Pieces: ...


class CodeMemory(Generic[S]):
    """Used under the mover's lock. What was promised comes from sources of type S."""

    def __init__(self, settings: Settings, mover: Mover, accountant: Accountant) -> None:
        self._settings, self._mover, self._accountant = settings, mover, accountant
        budget = settings.index_budget
        self.budget = psutil.virtual_memory().total if budget is None else budget
        """Bytes of codes and summaries together."""
        self.arena: Arena | None = None
        self.mirror: Mirror | None = None
        self.summaries = Summaries(mover, accountant)
        self.promises = Promises[S]()
        """Codes that are not in memory and need not be made."""
        self.kept = Kept[S](mover.ledger)
        """The same, in memory or not."""
        self.closed = False
        """Nothing is taken any more."""
        self.tight = False
        """Whether there is more to load than the budget has room for: summaries alone are loaded, and codes when they
        are wanted, in the place of others. Not where summaries would take more than half of it: then codes that fit
        are loaded, and all other blocks attended exactly. So until nothing can be read again any more."""
        self._wanted = 0
        self._promised = self._reserved = 0  # bytes of codes that can be read again, and of their summaries
        self.announced = 0, 0
        """The same of what will be promised next."""

    @property
    def full(self) -> bool:
        """Whether codes found no room, or their summaries where these alone are kept, and there still is none."""
        if self.tight:
            return self.summaries.full
        return self._wanted > 0 and self.arena is not None and self.arena.free < self._wanted

    def announce(self, layers: Iterable[Announced]) -> None:
        """All codes that will be promised next. The lock is held."""
        codes = short = 0
        for layer in layers:
            runs = len(layer.of_codes.digests) - layer.of_codes.digests.count(0)
            codes += layer.of_codes.nbytes * runs
            short += layer.of_summaries.nbytes * runs
        self.announced = codes, short
        self._limit()

    def promised(self, layout: Layout, layer: int, runs: int, *, announced: bool = False) -> None:
        """So many more runs of a layer may be read again. The lock is held."""
        blocks = runs * self._mover.shapes[layer].geometry.kv_heads
        codes, short = blocks * layout.nbytes, blocks * Shape.of(layout).nbytes
        self._promised, self._reserved = self._promised + codes, self._reserved + short
        if announced:
            self.announced = max(0, self.announced[0] - codes), max(0, self.announced[1] - short)
        self._limit()

    def take(self, layout: Layout, n: int, heads: int) -> Slots | None:
        """``n`` slots for codes of blocks of so many heads; None when the budget is used up. The lock is held."""
        if self.closed:
            return None
        if self.arena is None:
            near = 0 if self._mover.lanes.device.on_cpu else self._settings.device_index_budget
            lanes = 1 if near else heads  # a mirror has the first slots of all, in their order
            self.arena = self._mover.codes = Arena(
                "index", self.budget, layout.nbytes, self._accountant, plain_slab, slab_bytes=SLAB_BYTES, lanes=lanes
            )
            self._limit()
            if near:
                slot = round_up(layout.nbytes, CODES_ALIGNED)
                self.mirror = Mirror(near, slot, self._accountant, self._mover.lanes.device)
        slots = self.arena.take(n)
        if slots is None and self.tight:
            self.make_room(n)
            slots = self.arena.take(n)
        self._wanted = n if slots is None else 0
        return slots

    def slots(self, layout: Layout, runs: int, heads: int) -> Slots:
        """Slots [n, heads] for as many runs as there is room for. The lock is held."""
        found = self.take(layout, runs * heads, heads)
        if found is None and self.arena is not None and not self.closed:
            found = self.take(layout, self.arena.free // heads * heads, heads)
            self._wanted = heads
        return np.empty((0, heads), np.int32) if found is None else found.reshape(-1, heads)

    def fill(self, slots: Slots, coded: Tensor, layout: Layout) -> None:
        """Put coded blocks, uint8 [n, bytes], into their slots. The lock is held."""
        assert self.arena is not None
        coded = coded.contiguous()
        source = coded.data_ptr() + np.arange(len(slots)) * layout.nbytes
        kernel.copy(source, self.arena.addresses(slots), np.full(len(slots), layout.nbytes), None)
        if self.mirror is not None:
            self.mirror.put(slots, coded)

    def make_room(self, n: int) -> None:
        """Have codes leave that can be read again, until ``n`` slots are free, as far as nobody reads them. The lock is
        held."""
        arena, book, kept = self.arena, self._mover.ledger, self.kept
        assert arena is not None
        for slots in kept.free():
            arena.give(slots)
        first = kept.oldest(max(0, n - arena.free))
        heads = np.array(
            [self._mover.shapes[layer].geometry.kv_heads for layer in book.layer[first].tolist()], np.int64
        )
        first = first[: int(np.searchsorted(np.cumsum(heads), n - arena.free)) + 1]
        for count in np.unique(heads[: first.size]).tolist():
            kept.leave(book.left((first[heads[: first.size] == count][:, None] + np.arange(count)).ravel()))
        for promise, some in kept.of(first):
            self.promises.add(promise, *kept.still(some, promise))
        for slots in kept.free():
            arena.give(slots)

    def _limit(self) -> None:
        """Where not everything fits, codes leave room for the summaries of all that was promised. The lock is held."""
        codes, short = self._promised + self.announced[0], self._reserved + self.announced[1]
        self.tight = codes > self.budget >= MOST_SUMMARIES * short or (self.tight and codes > 0)
        if self.arena is not None:
            self.arena.limit(self.budget - (short + summaries.SLAB_BYTES if self.tight else 0))

    def close(self) -> None:
        """Give up all memory of codes. The lock is held."""
        self.summaries.close()
        for memory in (self.arena, self.mirror):
            if memory is not None:
                memory.close()
        self.arena = self._mover.codes = self.mirror = None
