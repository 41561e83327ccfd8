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
import psutil
import torch
from torch import Tensor

from alaya_tiers import kernel, summaries
from alaya_tiers.attention import parts_of_row
from alaya_tiers.blocks import BlockShape, Geometry, round_up
from alaya_tiers.coded import Pieces
from alaya_tiers.config import Settings
from alaya_tiers.devices.cpu import plain_slab
from alaya_tiers.index.codes import MOST_DIMS, Layout, Scratch, encode
from alaya_tiers.index.summary import Shape
from alaya_tiers.kept import Kept
from alaya_tiers.ledger import NOWHERE, UNCODABLE, Ids
from alaya_tiers.mover import Mover
from alaya_tiers.promises import Promise, Promises
from alaya_tiers.summaries import Summaries
from alaya_tiers.tiers.arena import Arena
from alaya_tiers.tiers.base import Accountant, Slots
from alaya_tiers.tiers.mirror import Mirror, Mirrored

SLAB_BYTES = 4 << 20
"""Codes take memory in smaller steps than blocks: they are an eighth of them."""

CODES_ALIGNED = 64
"""Bytes: as a GPU reads them."""

TOGETHER = 8
"""Runs coded at a time on a device."""

MOST_WANTED = 64
"""Runs of blocks that one attention offers."""

MOST_SUMMARIES = 2
"""The budget over what summaries alone would take, at least, where codes are left on disk."""

SUMMARISED = 16
"""Runs of blocks whose codes are summarised together."""


class Announced(Protocol):
    """Codes of a layer that will be promised, see coded.LayerCodes."""

    @property
    def of_codes(self) -> Pieces: ...

    @property
    def of_summaries(self) -> Pieces: ...


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
        self._settings, self._mover, self._accountant, self._wake = settings, mover, accountant, wake
        self._arena: Arena | None = None
        self._summaries = Summaries(mover, accountant)
        self._mirror: Mirror | None = None
        self._queue: deque[Ids] = deque()
        self._to_summarise: deque[Ids] = deque()
        self._queued: set[int] = set()
        self._ready = threading.Condition()
        self._working = self._closing = False
        self._making = threading.Lock()  # one block at a time: no block is coded twice
        self._summarising = threading.Lock()  # one at a time: no summary is read or made twice
        self._thread: threading.Thread | None = None
        self._loader: threading.Thread | None = None
        self._wanted = 0
        self.failure: Exception | None = None
        """Why the last block that has no codes has none; it is attended exactly."""
        self.seconds = 0.0
        """Time it took to make codes."""
        self._local = threading.local()
        self._latent_dim, self._latent = latent_dim, dict[int, bool]()  # of layers: are whole rows what is compared
        self._promises = Promises[Source]()
        self._kept = Kept[Source](mover.ledger)
        self._promised = self._reserved = 0
        """Bytes of codes that can be read again, and of their summaries."""
        self._announced = 0, 0
        self.tight = False
        """Whether there is more to load than the budget has room for: summaries alone are loaded, and codes when they
        are wanted, in the place of others. Not where summaries would take more than half of it: then codes that fit
        are loaded, and all other blocks attended exactly. So until nothing can be read again any more."""
        self._to_load: dict[int, list[tuple[Promise[Source], Ids]]] = {}  # of each layer: promises, first ids of runs
        self._loading: set[Promise[Source]] = set()

    @property
    def full(self) -> bool:
        """Whether codes found no room, or their summaries where these alone are kept, and there still is none."""
        if self.tight:
            return self._summaries.full
        return self._wanted > 0 and self._arena is not None and self._arena.free < self._wanted

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
            if self._arena is None:
                return
            self._arena.give(codes)
            if self._mover.summaries is not None:
                self._mover.summaries.give(short)
            if not self._arena.used:  # its slots may be too small now
                self._drop()

    def _is_latent(self, layer: int, g: Geometry) -> bool:
        return self._latent.get(layer, g.kv_heads == 1 and g.k_dim == self._latent_dim)

    def announce(self, layers: Iterable[Announced]) -> None:
        """Codes that will be promised next."""
        codes = short = 0
        for layer in layers:
            runs = sum(digest != 0 for digest in layer.of_codes.digests)
            codes += layer.of_codes.nbytes * runs
            short += layer.of_summaries.nbytes * runs
        with self._mover.lock:
            self._announced = codes, short
            self._limit()

    def promise(self, first: Ids, runs: npt.NDArray[np.integer], source: Source, layer: int) -> None:
        """Codes of runs (first block ids, numbers in the source) need not be made: they are loaded.

        When there is time, layer by layer, or when they are asked for.
        """
        promise = Promise(source, layer)
        with self._mover.lock:
            self._promises.add(promise, first, runs)
            self._kept.add(promise, first, runs)
            self._promised_of(layer, first.size, announced=True)
        with self._ready:
            self._to_load.setdefault(layer, []).append((promise, first))
            if self._loader is None and not self._closing:
                self._loader = threading.Thread(target=self._load_promised, name="alaya-codes", daemon=True)
                self._loader.start()

    def forget(self, first: Ids) -> None:
        """What was promised of these runs does not hold any more."""
        with self._mover.lock:
            self._promises.forget(first)
            gone = first[self._kept.holds(first)]
            for layer, count in zip(*np.unique(self._mover.ledger.layer[gone], return_counts=True), strict=True):
                self._promised_of(int(layer), -int(count))
            self._kept.forget(first)

    def _promised_of(self, layer: int, runs: int, *, announced: bool = False) -> None:
        """So many more runs may be read again. The lock is held."""
        blocks, layout = runs * self._mover.shapes[layer].geometry.kv_heads, self.layout_of(layer)
        codes, short = blocks * layout.nbytes, blocks * Shape.of(layout).nbytes
        self._promised, self._reserved = self._promised + codes, self._reserved + short
        if announced:
            self._announced = max(0, self._announced[0] - codes), max(0, self._announced[1] - short)
        self._limit()

    def export(self, ids: Ids) -> Tensor | None:
        """A copy of the codes of one run, uint8 [kv_heads, bytes]; None where it has none."""
        with self._mover.lock:
            away = (self._mover.ledger.code[ids] < 0).any() and self._kept.holds(ids[:1]).all()
        if away:
            self.bring(ids[:, None])
        with self._mover.lock:
            slots = self._mover.ledger.code[ids]
            if self._arena is None or (slots < 0).any():
                return None
            nbytes = self.layout_of(int(self._mover.ledger.layer[ids[0]])).nbytes
            return torch.stack([self._arena.tensor(slot)[:nbytes] for slot in slots.tolist()])

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
        if self._mirror is not None:
            return
        with self._mover.lock:
            missing = self._summaries.missing(ids)
        with self._ready:
            if missing.size and not (self._to_summarise or self._closing or self._summaries.full):
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
            here = here[~self._promises.holds(ids[0, here])]
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
            if too_wide or (self._arena is not None and layout.nbytes > self._arena.slot_bytes):
                book.coded(ids, UNCODABLE)
                return False
            if (slots := self._room(layout, ids.size, shape.geometry.kv_heads)) is None:
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
                if self._arena is not None:
                    if coded is None:
                        self._arena.give(slots)
                        if ids.size <= shape.geometry.kv_heads:  # of several runs some can be
                            book.coded(ids, UNCODABLE)
                    else:
                        self._fill(slots, coded, layout)
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
            cold = ~coded & self._kept.holds(first)
            coded = (coded | cold) & (book.summary[ids] >= 0).all(0)
            cold &= coded
            if not cold.any():
                return self.here(ids)
            short, held = self._summaries.addresses(ids[:, coded]), self._summaries.hold()
            nowhere = np.zeros((ids.shape[0], int(coded.sum())), np.int64)
            return Known(coded, nowhere, None, held, book.codings, short, int(cold.sum()) * ids.shape[0])

    def bring(self, ids: Ids) -> tuple[npt.NDArray[np.int64], object] | None:
        """Addresses of the codes of blocks [kv_heads, n], read from disk where they are not in memory, in the place of
        those that were wanted longest ago, and what keeps them there; None where that cannot be.
        """
        with self._mover.lock:
            self._kept.want(ids[0])
            if self._arena is not None and ids.size > self._arena.capacity:
                return None
            missing = self._missing(ids)
            if self._arena is not None:
                self._make_room(missing.size * ids.shape[0])  # for all at once
        self._load(ids[0, missing], ids.shape[0])
        with self._mover.lock:
            slots = self._mover.ledger.code[ids]
            if self._arena is None or (slots < 0).any():
                return None
            return self._arena.addresses(slots), (self._arena.hold(), self._kept.reader())

    def here(self, ids: Ids) -> Known:
        """The same of what is in memory already."""
        with self._mover.lock:
            code, codings = self._mover.ledger.code[ids], self._mover.ledger.codings
            coded: npt.NDArray[np.bool_] = np.asarray((code >= 0).all(0))
            if self._arena is None or not coded.any():
                return Known(coded, np.empty((ids.shape[0], 0), np.int64), None, None, codings)
            slots, mirror = code[:, coded], self._mirror
            held: list[object] = [self._arena.hold(), self._kept.reader()]
            mirrored = None
            if mirror is not None:
                mirrored = Mirrored(mirror, slots, self._mover.lock)
                held.append(mirror.hold())
            short = self._summaries.addresses(ids[:, coded])
            held.append(self._summaries.hold())
            return Known(coded, self._arena.addresses(slots), mirrored, held, codings, short)

    def hold(self, codings: int) -> object | None:
        """Keeps all codes in memory while it lives; None when some came or went since the ledger had counted these."""
        with self._mover.lock:
            if self._arena is None or self._mover.ledger.codings != codings:
                return None
            return self._arena.hold(), self._kept.reader(), self._summaries.hold()

    def _missing(self, ids: Ids) -> npt.NDArray[np.intp]:
        with self._mover.lock:
            return np.flatnonzero((self._mover.ledger.code[ids] == NOWHERE).all(0))

    def _load_summaries(self, ids: Ids) -> None:
        """Of blocks [kv_heads, n] whose summaries were kept, those that are missing. None twice."""
        with self._summarising:
            with self._mover.lock:
                missing = self._summaries.missing(ids)[0]
                wanted = [(promise, *self._kept.still(first, promise)) for promise, first in self._kept.of(missing)]
            for (source, layer), first, runs in wanted:
                every, layout = first[:, None] + np.arange(len(ids)), self.layout_of(layer)
                if not source.fits(layer, len(ids), layout):
                    self.forget(first)
                    continue
                read = partial(source.load_summaries, layer, runs.tolist())
                self.forget(first[~self._summaries.load(every, layout, self._budget, read)])

    def _load(self, first: Ids, heads: int) -> None:
        """Put codes that were kept of these runs where codes are, as far as there is room."""
        with self._mover.lock:
            wanted = self._promises.of(first)
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
            first, runs = self._promises.still(first, promise)
            if not first.size:
                return True
            layout = self.layout_of(layer)
            if not source.fits(layer, heads, layout) or (self._arena and layout.nbytes > self._arena.slot_bytes):
                self.forget(first)
                return True
            slots = self._slots(layout, len(first), heads)
            if not len(slots) or (arena := self._arena) is None:
                return False
            held, addresses = arena.hold(), arena.addresses(slots)
        tried, good = first[: len(slots)], np.zeros(len(slots), bool)
        try:
            good = source.load(layer, runs[: len(slots)].tolist(), addresses)
        finally:
            with self._mover.lock:
                if self._arena is arena:
                    known = self._promises.holds(tried, promise)
                    self._loaded(tried[:, None] + np.arange(heads), slots, good & known, layout)
                    self._promises.forget(tried[known])
                    self.forget(tried[known & ~good])
            del held
        return len(slots) == len(first)

    def _loaded(self, ids: Ids, slots: Slots, good: npt.NDArray[np.bool_], layout: Layout) -> None:
        """Codes of runs ``ids`` [n, kv_heads] were read into ``slots``: those that are good count. The lock is held."""
        assert self._arena is not None
        book = self._mover.ledger
        same = layout == self.layout_of(int(book.layer[ids[0, 0]]))
        good = good & same & (book.code[ids] == NOWHERE).all(1)
        self._arena.give(slots[~good].ravel())
        book.coded(ids[good].ravel(), slots[good].ravel())
        if self._mirror is not None and good.any():
            rows = [self._arena.tensor(slot)[: layout.nbytes] for slot in slots[good].ravel().tolist()]
            self._mirror.put(slots[good].ravel(), torch.stack(rows))

    def _slots(self, layout: Layout, runs: int, heads: int) -> Slots:
        """Slots [n, heads] for as many runs as there is room for. The lock is held."""
        found = self._room(layout, runs * heads, heads)
        if found is None and self._arena is not None and not self._closing:
            found = self._room(layout, self._arena.free // heads * heads, heads)
            self._wanted = heads
        return np.empty((0, heads), np.int32) if found is None else found.reshape(-1, heads)

    def _fill(self, slots: Slots, coded: Tensor, layout: Layout) -> None:
        assert self._arena is not None
        coded = coded.contiguous()
        source = coded.data_ptr() + np.arange(len(slots)) * layout.nbytes
        kernel.copy(source, self._arena.addresses(slots), np.full(len(slots), layout.nbytes), None)
        if self._mirror is not None:
            self._mirror.put(slots, coded)

    def close(self) -> None:
        """Stop after the blocks at hand; free all codes. Twice is fine."""
        with self._ready:
            self._closing = True
            self._queue.clear()
            self._ready.notify_all()
        for thread in (self._thread, self._loader):
            if thread is not None and thread is not threading.current_thread():
                thread.join()
        with self._mover.lock:
            self._drop()

    # ------------------------------------------------------------------ inside
    def _drop(self) -> None:
        """Give up all memory of codes. The lock is held."""
        self._summaries.close()
        for memory in (self._arena, self._mirror):
            if memory is not None:
                memory.close()
        self._arena = self._mover.codes = self._mirror = None

    def _room(self, layout: Layout, n: int, heads: int) -> Slots | None:
        """``n`` slots for codes of blocks of so many heads; None when the budget is used up."""
        if self._closing:
            return None
        if self._arena is None:
            budget = self._budget
            near = 0 if self._mover.lanes.device.on_cpu else self._settings.device_index_budget
            lanes = 1 if near else heads  # a mirror has the first slots of all, in their order
            self._arena = self._mover.codes = Arena(
                "index", budget, layout.nbytes, self._accountant, plain_slab, slab_bytes=SLAB_BYTES, lanes=lanes
            )
            self._limit()
            if near:
                slot = round_up(layout.nbytes, CODES_ALIGNED)
                self._mirror = Mirror(near, slot, self._accountant, self._mover.lanes.device)
        slots = self._arena.take(n)
        if slots is None and self.tight:
            self._make_room(n)
            slots = self._arena.take(n)
        self._wanted = n if slots is None else 0
        return slots

    def _make_room(self, n: int) -> None:
        """Have codes leave that can be read again, until ``n`` slots are free, as far as nobody reads them. The lock is
        held."""
        arena, book, kept = self._arena, self._mover.ledger, self._kept
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
            self._promises.add(promise, *kept.still(some, promise))
        for slots in kept.free():
            arena.give(slots)

    def _limit(self) -> None:
        """Where not everything fits, codes leave room for the summaries of all that was promised. The lock is held."""
        codes, short = self._promised + self._announced[0], self._reserved + self._announced[1]
        self.tight = codes > self._budget >= MOST_SUMMARIES * short or (self.tight and codes > 0)
        if self._arena is not None:
            self._arena.limit(self._budget - (short + summaries.SLAB_BYTES if self.tight else 0))

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

    @property
    def _budget(self) -> int:
        """Bytes of codes and summaries together."""
        budget = self._settings.index_budget
        return psutil.virtual_memory().total if budget is None else budget

    def _summarise(self, ids: Ids) -> None:
        arena, layer = self._arena, int(self._mover.ledger.layer[ids[0, 0]])
        if arena is not None:
            with self._summarising:
                self._summaries.make(ids, arena, self.layout_of(layer), self._budget)

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
