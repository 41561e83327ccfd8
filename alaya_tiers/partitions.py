"""The index's part of each sealed block: made in idle time, kept in memory of its own budget.

Tokens enter late, a block of them at a time. Nothing depends on a block's codes being there: until they are, or when
there is no room for them, the block is attended exactly, which brings it into memory where its codes can be made.
"""

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers.attention import parts_of_row
from alaya_tiers.blocks import BlockShape, Geometry
from alaya_tiers.codememory import Announced, CodeMemory
from alaya_tiers.config import Settings
from alaya_tiers.index.codes import MOST_DIMS, Layout, Scratch, encode
from alaya_tiers.ledger import NOWHERE, UNCODABLE, Ids
from alaya_tiers.mover import Mover
from alaya_tiers.promises import Promise
from alaya_tiers.tiers.base import Accountant, Slots
from alaya_tiers.tiers.mirror import Mirrored

TOGETHER = 8
"""Runs coded at a time on a device."""

MOST_WANTED = 64
"""Runs of blocks that one attention offers."""

SUMMARISED = 16
"""Runs of blocks whose codes are summarised together."""


class Source(Protocol):
    """Codes that were made before and kept."""

    def expect(self, layer: int) -> None:
        """The codes of a layer will be loaded soon: have them come meanwhile."""
        ...

    def fits(self, layer: int, heads: int, layout: Layout) -> bool:
        """Whether it has codes of a layer as they would be made."""
        ...

    def load(self, layer: int, runs: list[int], addresses: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Put codes of runs of a layer, ascending, to ``addresses`` [n, kv_heads]; which can be believed, bool [n].

        At the addresses of the others lies anything.
        """
        ...

    def load_summaries(self, layer: int, runs: list[int], addresses: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """The same of the summaries of codes."""
        ...


class Known(NamedTuple):
    """What is known of blocks' codes. coded: bool [n], which columns have some. codes: int64 [heads, those], addresses
    in host memory, 0 where they are on disk alone (``cold``: how many blocks' are). mirrored: the same in a device's
    memory. held: keeps them all in memory. codings: as the ledger counts. summaries: addresses as of codes, None where
    one of these blocks has none.
    """

    coded: npt.NDArray[np.bool_]
    codes: npt.NDArray[np.int64]
    mirrored: Mirrored | None
    held: object
    codings: int
    summaries: npt.NDArray[np.int64] | None = None
    cold: int = 0


class Partitions:
    """Codes of blocks, and the thread of low priority that makes them. wake: called when waiters may go on. latent_dim:
    numbers of the model's latents (MLA): keys of that shape will be attended as such."""

    def __init__(
        self,
        settings: Settings,
        mover: Mover,
        accountant: Accountant,
        wake: Callable[[], None],
        latent_dim: int | None = None,
    ) -> None:
        self._settings, self._mover, self._wake = settings, mover, wake
        self._memory = CodeMemory[Source](settings, mover, accountant)
        self._queue: deque[Ids] = deque()
        self._to_summarise: deque[Ids] = deque()
        self._queued: set[int] = set()
        self._ready = threading.Condition()
        self._working = self._closing = False
        self._making = threading.Lock()  # one block at a time: no block is coded twice
        self._summarising = threading.Lock()  # one at a time: no summary is read or made twice
        self._thread: threading.Thread | None = None
        self._loader: threading.Thread | None = None
        self.failure: Exception | None = None
        """Why the last block that has no codes has none; it is attended exactly."""
        self.seconds = 0.0
        """Time it took to make codes."""
        self._local = threading.local()
        self._latent_dim, self._latent = latent_dim, dict[int, bool]()  # of layers: are whole rows what is compared
        self._to_load: dict[int, list[tuple[Promise[Source], Ids]]] = {}  # of each layer: promises, first ids of runs
        self._loading: set[Promise[Source]] = set()

    @property
    def full(self) -> bool:
        """Whether codes found no room, or their summaries where these alone are kept, and there still is none."""
        return self._memory.full

    @property
    def tight(self) -> bool:
        """See CodeMemory."""
        return self._memory.tight

    @property
    def announced(self) -> bool:
        """Whether something is, and was not promised yet."""
        return any(self._memory.announced)

    def announce(self, layers: Iterable[Announced]) -> None:
        """All codes that will be promised next: none any more, if none are given."""
        with self._mover.lock:
            self._memory.announce(layers)

    @property
    def scratch(self) -> Scratch:
        """This thread's memory for scans."""
        scratch: Scratch = vars(self._local).setdefault("scratch", Scratch())
        return scratch

    def layout_of(self, layer: int, shape: BlockShape | None = None) -> Layout:
        """How blocks of a layer are coded. shape: of its blocks, if it has none yet."""
        shape = self._mover.shapes[layer] if shape is None else shape
        g = shape.geometry
        key, value, _ = parts_of_row(g.k_dim, g.v_dim, latent=self._is_latent(layer, g))
        return Layout(shape.tokens, key, value, self._settings.index_bits)

    def attended(self, layer: int, *, latent: bool) -> None:
        """How a layer's rows are attended, see attention.BlockList: codes that were made for the other way are let go.

        They were made before the first attention over a layer, which is what its keys look like until then.
        """
        if self._is_latent(layer, self._mover.shapes[layer].geometry) == latent:
            return
        with self._making, self._mover.lock:
            self._latent[layer] = latent
            codes, short = self._mover.ledger.uncode(layer)
            if self._memory.arena is None:
                return
            self._memory.arena.give(codes)
            if self._mover.summaries is not None:
                self._mover.summaries.give(short)
            if not self._memory.arena.used:  # its slots may be too small now
                self._memory.close()

    def _is_latent(self, layer: int, g: Geometry) -> bool:
        return self._latent.get(layer, g.kv_heads == 1 and g.k_dim == self._latent_dim)

    def promise(self, first: Ids, runs: npt.NDArray[np.integer], source: Source, layer: int) -> None:
        """Codes of runs (first block ids, numbers in the source) need not be made: they are loaded.

        When there is time, layer by layer, or when they are asked for.
        """
        promise = Promise(source, layer)
        with self._mover.lock:
            self._memory.promises.add(promise, first, runs)
            self._memory.kept.add(promise, first, runs)
            self._memory.promised(self.layout_of(layer), layer, first.size, announced=True)
        with self._ready:
            self._to_load.setdefault(layer, []).append((promise, first))
            if self._loader is None and not self._closing:
                self._loader = threading.Thread(target=self._load_promised, name="alaya-codes", daemon=True)
                self._loader.start()

    def forget(self, first: Ids) -> None:
        """What was promised of these runs does not hold any more."""
        with self._mover.lock:
            self._memory.promises.forget(first)
            gone = first[self._memory.kept.holds(first)]
            for layer, count in zip(*np.unique(self._mover.ledger.layer[gone], return_counts=True), strict=True):
                self._memory.promised(self.layout_of(int(layer)), int(layer), -int(count))
            self._memory.kept.forget(first)

    def export(self, ids: Ids) -> Tensor | None:
        """A copy of the codes of one run, uint8 [kv_heads, bytes]; None where it has none."""
        with self._mover.lock:
            away = (self._mover.ledger.code[ids] < 0).any() and self._memory.kept.holds(ids[:1]).all()
        if away:
            self.bring(ids[:, None])
        with self._mover.lock:
            slots = self._mover.ledger.code[ids]
            if self._memory.arena is None or (slots < 0).any():
                return None
            nbytes = self.layout_of(int(self._mover.ledger.layer[ids[0]])).nbytes
            return torch.stack([self._memory.arena.tensor(slot)[:nbytes] for slot in slots.tolist()])

    def offer(self, ids: Ids) -> None:
        """Sealed blocks of one run, one a kv head: their codes will be made when there is time."""
        first = int(ids[0])
        with self._ready:
            if self._closing or self.full or first in self._queued:
                return
            self._queue.append(ids)
            self._queued.add(first)
            self._wake_worker()

    def want_summaries(self, ids: Ids) -> None:
        """Summaries of blocks [kv_heads, n] that have codes are made when there is time. Not where a device scans."""
        if self._memory.mirror is not None:
            return
        with self._mover.lock:
            missing = self._memory.summaries.missing(ids)
        with self._ready:
            if missing.size and not (self._to_summarise or self._closing or self._memory.summaries.full):
                self._to_summarise.extend(np.split(missing, range(SUMMARISED, missing.shape[1], SUMMARISED), 1))
                self._wake_worker()

    def _wake_worker(self) -> None:
        """The condition is held."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="alaya-index", daemon=True)
            self._thread.start()
        self._ready.notify_all()

    def want(self, ids: Ids) -> None:
        """Offer columns of ``ids`` [heads, n] that are in memory, as what attention has just read, and have no codes.

        Those whose codes were kept are loaded when they are asked for.
        """
        missing = self._missing(ids)
        if not missing.size or self.full:
            return
        with self._mover.lock:
            here = missing[self._mover.ledger.readable(ids[:, missing]).all(0)]
            here = here[~self._memory.promises.holds(ids[0, here])]
        for column in here[:MOST_WANTED].tolist():
            self.offer(ids[:, column])

    def wait(self) -> None:
        """Until everything offered so far was tried."""
        with self._ready:
            self._ready.wait_for(
                lambda: self._closing or not (self._queue or self._to_summarise or self._working or self._loader)
            )

    @property
    def together(self) -> int:
        """Runs that are coded at a time: a GPU does little else than begin, with one."""
        return 1 if self._mover.lanes.device.on_cpu else TOGETHER

    def make(self, ids: Ids) -> bool:
        """Make the codes of blocks of one layer now, if they are in memory; whether they have some afterwards."""
        with self._making:
            began = time.perf_counter()
            made = self._make(ids)
            if made:
                self.seconds += time.perf_counter() - began
            return made

    def make_all(self, ids: Ids) -> None:
        """The same of runs [kv_heads, n] of a layer: all at once, or each by itself where that fails."""
        if not self.make(ids.ravel()) and ids.shape[1] > 1:
            for column in ids.T:
                self.make(column)

    def _make(self, ids: Ids) -> bool:
        mover, book = self._mover, self._mover.ledger
        with mover.lock:
            if not book.codable(ids):
                return bool((book.code[ids] >= 0).all())
            shape = mover.shapes[int(book.layer[ids[0]])]
            layout = self.layout_of(int(book.layer[ids[0]]))
            too_wide = layout.dims > MOST_DIMS[layout.bits]
            if too_wide or (self._memory.arena is not None and layout.nbytes > self._memory.arena.slot_bytes):
                book.coded(ids, UNCODABLE)
                return False
            if (slots := self._memory.take(layout, ids.size, shape.geometry.kv_heads)) is None:
                return False
            held = mover.hold()
            book.pin(ids)
        coded = None
        try:
            g = shape.geometry
            rows = mover.fetched(ids, shape.nbytes)
            rows = rows.to(mover.lanes.device.place).view(g.dtype).view(ids.size, -1, g.width)
            at = layout.k_dim if layout.k_dim + layout.v_dim == g.width else 0
            coded = encode(rows[..., : layout.k_dim], rows[..., at : at + layout.v_dim], layout)
            coded = None if coded is None else coded.cpu()
        finally:
            with mover.lock:
                if self._memory.arena is not None:
                    if coded is None:
                        self._memory.arena.give(slots)
                        if ids.size <= shape.geometry.kv_heads:  # of several runs some can be
                            book.coded(ids, UNCODABLE)
                    else:
                        self._memory.fill(slots, coded, layout)
                        book.coded(ids, slots)
                mover.give_back(book.unpin(ids))
                waited_for = mover.waited_for
            del held
            if waited_for:
                self._wake()
        return coded is not None

    def of(self, ids: Ids) -> Known:
        """Of blocks ``ids`` [heads, n]. Columns whose codes were kept are loaded, or their summaries alone where there
        is no room for the codes of all that was promised."""
        if not self.tight:
            self._load(ids[0, self._missing(ids)], ids.shape[0])
            return self.here(ids)
        self._load_summaries(ids)
        with self._mover.lock:
            book, first = self._mover.ledger, ids[0]
            coded = (book.code[ids] >= 0).all(0)
            cold = ~coded & self._memory.kept.holds(first)
            coded = (coded | cold) & (book.summary[ids] >= 0).all(0)
            cold &= coded
            if not cold.any():
                return self.here(ids)
            short, held = self._memory.summaries.addresses(ids[:, coded]), self._memory.summaries.hold()
            nowhere = np.zeros((ids.shape[0], int(coded.sum())), np.int64)
            return Known(coded, nowhere, None, held, book.codings, short, int(cold.sum()) * ids.shape[0])

    def bring(self, ids: Ids) -> tuple[npt.NDArray[np.int64], object] | None:
        """Addresses of the codes of blocks [kv_heads, n], read from disk where they are not in memory, in the place of
        those that were wanted longest ago, and what keeps them there; None where that cannot be.
        """
        with self._mover.lock:
            self._memory.kept.want(ids[0])
            if self._memory.arena is not None and ids.size > self._memory.arena.capacity:
                return None
            missing = self._missing(ids)
            if self._memory.arena is not None:
                self._memory.make_room(missing.size * ids.shape[0])  # for all at once
        self._load(ids[0, missing], ids.shape[0])
        with self._mover.lock:
            slots = self._mover.ledger.code[ids]
            if self._memory.arena is None or (slots < 0).any():
                return None
            return self._memory.arena.addresses(slots), (self._memory.arena.hold(), self._memory.kept.reader())

    def here(self, ids: Ids) -> Known:
        """The same of what is in memory already."""
        with self._mover.lock:
            code, codings = self._mover.ledger.code[ids], self._mover.ledger.codings
            coded: npt.NDArray[np.bool_] = np.asarray((code >= 0).all(0))
            if self._memory.arena is None or not coded.any():
                return Known(coded, np.empty((ids.shape[0], 0), np.int64), None, None, codings)
            slots, mirror = code[:, coded], self._memory.mirror
            held: list[object] = [self._memory.arena.hold(), self._memory.kept.reader()]
            mirrored = None
            if mirror is not None:
                mirrored = Mirrored(mirror, slots, self._mover.lock)
                held.append(mirror.hold())
            short = self._memory.summaries.addresses(ids[:, coded])
            held.append(self._memory.summaries.hold())
            return Known(coded, self._memory.arena.addresses(slots), mirrored, held, codings, short)

    def hold(self, codings: int) -> object | None:
        """Keeps all codes in memory while it lives; None when some came or went since the ledger had counted these."""
        with self._mover.lock:
            if self._memory.arena is None or self._mover.ledger.codings != codings:
                return None
            return self._memory.arena.hold(), self._memory.kept.reader(), self._memory.summaries.hold()

    def _missing(self, ids: Ids) -> npt.NDArray[np.intp]:
        with self._mover.lock:
            return np.flatnonzero((self._mover.ledger.code[ids] == NOWHERE).all(0))

    def _load_summaries(self, ids: Ids) -> None:
        """Of blocks [kv_heads, n] whose summaries were kept, those that are missing. None twice."""
        with self._summarising:
            with self._mover.lock:
                missing = self._memory.summaries.missing(ids)[0]
                wanted = [
                    (promise, *self._memory.kept.still(first, promise))
                    for promise, first in self._memory.kept.of(missing)
                ]
            for (source, layer), first, runs in wanted:
                every, layout = first[:, None] + np.arange(len(ids)), self.layout_of(layer)
                if not source.fits(layer, len(ids), layout):
                    self.forget(first)
                    continue
                read = partial(source.load_summaries, layer, runs.tolist())
                self.forget(first[~self._memory.summaries.load(every, layout, self._memory.budget, read)])

    def _load(self, first: Ids, heads: int) -> None:
        """Put codes that were kept of these runs where codes are, as far as there is room."""
        with self._mover.lock:
            wanted = self._memory.promises.of(first)
        for promise, some in wanted:
            if not self._fetch(promise, some, heads):
                return

    def _fetch(self, promise: Promise[Source], first: Ids, heads: int) -> bool:
        """Load what was promised of runs that begin with these blocks; whether there was room. None twice."""
        with self._ready:
            self._ready.wait_for(lambda: promise not in self._loading)
            self._loading.add(promise)
        try:
            return self._bring(promise, first, heads)
        finally:
            with self._ready:
                self._loading.discard(promise)
                self._ready.notify_all()

    def _bring(self, promise: Promise[Source], first: Ids, heads: int) -> bool:
        """Load into the arena what still is promised of these runs; whether there was room for all.

        The lock is not held while they are read: these slots are nobody's until the book says what is in them.
        """
        source, layer = promise
        with self._mover.lock:
            first, runs = self._memory.promises.still(first, promise)
            if not first.size:
                return True
            layout = self.layout_of(layer)
            if not source.fits(layer, heads, layout) or (
                self._memory.arena and layout.nbytes > self._memory.arena.slot_bytes
            ):
                self.forget(first)
                return True
            slots = self._memory.slots(layout, len(first), heads)
            if not len(slots) or (arena := self._memory.arena) is None:
                return False
            held, addresses = arena.hold(), arena.addresses(slots)
        tried, good = first[: len(slots)], np.zeros(len(slots), bool)
        try:
            good = source.load(layer, runs[: len(slots)].tolist(), addresses)
        finally:
            with self._mover.lock:
                if self._memory.arena is arena:
                    known = self._memory.promises.holds(tried, promise)
                    self._loaded(tried[:, None] + np.arange(heads), slots, good & known, layout)
                    self._memory.promises.forget(tried[known])
                    self.forget(tried[known & ~good])
            del held
        return len(slots) == len(first)

    def _loaded(self, ids: Ids, slots: Slots, good: npt.NDArray[np.bool_], layout: Layout) -> None:
        """Codes of runs ``ids`` [n, kv_heads] were read into ``slots``: those that are good count. The lock is held."""
        assert self._memory.arena is not None
        book = self._mover.ledger
        same = layout == self.layout_of(int(book.layer[ids[0, 0]]))
        good = good & same & (book.code[ids] == NOWHERE).all(1)
        self._memory.arena.give(slots[~good].ravel())
        book.coded(ids[good].ravel(), slots[good].ravel())
        if self._memory.mirror is not None and good.any():
            rows = [self._memory.arena.tensor(slot)[: layout.nbytes] for slot in slots[good].ravel().tolist()]
            self._memory.mirror.put(slots[good].ravel(), torch.stack(rows))

    def close(self) -> None:
        """Stop after the blocks at hand; free all codes. Twice is fine."""
        with self._ready:
            self._closing = self._memory.closed = True
            self._queue.clear()
            self._ready.notify_all()
        for thread in (self._thread, self._loader):
            if thread is not None and thread is not threading.current_thread():
                thread.join()
        with self._mover.lock:
            self._memory.close()

    # ------------------------------------------------------------------ inside
    def _work(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # Linux: the priority of this thread alone
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while True:
            with self._ready:
                self._working = False
                self._ready.notify_all()
                self._ready.wait_for(lambda: self._closing or self._queue or self._to_summarise)
                if self._closing:
                    return
                runs = self._next_runs() if self._queue else []
                some = None if runs else self._to_summarise.popleft()
                self._working = True
            try:
                if some is None:
                    self.make_all(np.stack(runs, 1))
                else:
                    self._summarise(some)
            except Exception as error:  # nothing depends on it
                self.failure = error

    def _summarise(self, ids: Ids) -> None:
        arena, layer = self._memory.arena, int(self._mover.ledger.layer[ids[0, 0]])
        if arena is not None:
            with self._summarising:
                self._memory.summaries.make(ids, arena, self.layout_of(layer), self._memory.budget)

    def _next_runs(self) -> list[Ids]:
        """Some of the queue, of one layer. The condition is held."""
        layer, runs = self._mover.ledger.layer, [self._queue.popleft()]
        while self._queue and len(runs) < self.together and layer[self._queue[0][0]] == layer[runs[0][0]]:
            runs.append(self._queue.popleft())
        self._queued.difference_update(int(ids[0]) for ids in runs)
        return runs

    def _load_promised(self) -> None:
        """Layer by layer, from the last source of each: attention, which may be there already, begins with the first.

        A thread of its own, of the usual priority: attention may have to wait for it.
        """
        while True:
            with self._ready:
                if self._closing or not self._to_load:
                    self._loader = None
                    self._ready.notify_all()
                    return
                layer = min(self._to_load)
                promise, first = self._to_load[layer].pop()
                following = self._to_load[layer][-1][0].source if self._to_load[layer] else None
                if following is None:
                    del self._to_load[layer]
            try:
                if following is not None:
                    following.expect(layer)
                if (shape := self._mover.shapes.get(layer)) is not None and not self.full:
                    heads = shape.geometry.kv_heads
                    if self.tight:
                        self._load_summaries(first + np.arange(heads)[:, None])
                    else:
                        self._fetch(promise, first, heads)
            except Exception as error:  # nothing depends on it
                self.failure = error
