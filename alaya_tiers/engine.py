"""Wires budgets, tiers, ledger, mover and loop together; what a session and its forks share."""

import asyncio
import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers.attention import write_rows
from alaya_tiers.blocks import PAGE, BlockShape, Geometry, round_up
from alaya_tiers.config import Settings
from alaya_tiers.damage import ADVICE
from alaya_tiers.devices import device_at
from alaya_tiers.devices.base import Device
from alaya_tiers.errors import BudgetTooSmall, InputError, OutOfSpace, SessionClosed, StoreCorrupt
from alaya_tiers.ledger import Ids, Slots
from alaya_tiers.loop import LoopThread
from alaya_tiers.mover import Mover, Policies, Traffic
from alaya_tiers.pace import Steps
from alaya_tiers.pages import Pages
from alaya_tiers.partitions import Partitions
from alaya_tiers.policies import EVICTION, GUESS, PREFETCH, Watermark, Window, by_name
from alaya_tiers.recorder import Recorder
from alaya_tiers.seams import Clock, Disk, Executor, SystemClock, SystemDisk, Threads
from alaya_tiers.snapshot import Model, Shelf
from alaya_tiers.stats import SparseUse, Touched
from alaya_tiers.store import Store
from alaya_tiers.tiers.base import Accountant, Addresses
from alaya_tiers.tiers.device import DeviceTier
from alaya_tiers.tiers.host import HostTier
from alaya_tiers.tiers.ssd import SsdTier
from alaya_tiers.tiers.zarr_format import storable
from alaya_tiers.wear import Wear, counted

T = TypeVar("T")
Columns = npt.NDArray[np.intp]

LOADS_AHEAD = 2
"""Batches that are on their way while one is attended."""


class Engine:
    """One store, one set of budgets, one mover. Made at construction, its memory at the first update.

    Thread-safe as far as its callers hold ``mover.lock`` around what they read from the ledger.
    """

    def __init__(
        self,
        settings: Settings,
        path: str | None = None,
        model: Model | None = None,
        *,
        disk: Disk | None = None,
        executor: Executor | None = None,
        clock: Clock | None = None,
        device: Device | None = None,
    ) -> None:
        self.settings = settings
        self.sparse = SparseUse() if settings.mode == "sparse" else None
        """What sparse mode used; None in exact mode."""
        budgets = {"device": settings.device_budget, "host": settings.host_budget, "ssd": settings.ssd_budget}
        codes = {"index": settings.index_budget, "device_index": settings.device_index_budget}
        self.accountant = Accountant(budgets | ({} if self.sparse is None else codes))
        self.policies = Policies(
            device=Window(settings.sink_tokens),
            host=by_name(EVICTION, settings.eviction_of_blocks),
            prefetch=by_name(PREFETCH, settings.prefetch),
            write=Watermark(settings.dirty_limit),
        )
        self._of_pages = by_name(EVICTION, settings.eviction_of_pages), by_name(GUESS, settings.guess)
        self.clock: Clock = clock or SystemClock()
        self.recorder: Recorder | None = None
        """Told what sessions do, while somebody records them."""
        self.wear = Wear(settings.write_budget)
        self.store = Store(path, model, counted(disk or SystemDisk(), self.wear))
        self.shelf: Shelf = self.store
        """Whose contexts are read: those of the store, or of a snapshot."""
        if not self.store.temporary:
            self.wear.load(self.store.disk, self.store.path)
            self.store.closing = partial(self.wear.save, self.store.disk, self.store.path)
        self.touched = Touched()
        self.steps = Steps()
        self.waited_seconds = self.stalled_seconds = 0.0
        self.stalls = 0
        """How often new blocks had to wait until older ones were written, for ``stalled_seconds`` in all."""
        self._executor, self.device = executor, device
        """device: what the first tier lives on, once there are keys; None = of the place of the first ones."""
        self._mover: Mover | None = None
        self._loop: LoopThread | None = None
        self.partitions: Partitions | None = None
        """What the index knows, in sparse mode, from the first ``fit`` on."""
        self.on_full: Callable[[], bool] = lambda: False
        """Called by a forward for which the ssd tier has no room; whether it is worth another try."""
        self.pages: Pages | None = None
        """Single pages of cold blocks, in sparse mode, from the first ``fit`` on."""
        self._streams = itertools.count()
        self._fitting = threading.RLock()  # two sessions may bring the first layer at once, or one while another closes
        self._pid = os.getpid()
        self._buried: deque[Ids] = deque()
        self._finalizer = weakref.finalize(self, _close, self.store, None, None, None, None)

    # ------------------------------------------------------------------ set-up
    @property
    def mover(self) -> Mover:
        """The mover; there is one from the first ``fit`` on."""
        assert self._mover is not None, "no layer has been fitted yet"
        return self._mover

    @property
    def started(self) -> bool:
        """Whether there is memory yet."""
        return self._mover is not None

    def fit(self, layer: int, geometry: Geometry, device: torch.device) -> BlockShape:
        """The block shape of a layer seen for the first time. Raises BudgetTooSmall, ConfigError, InputError."""
        if not storable(geometry.dtype):
            raise InputError(f"keys and values of {geometry.dtype} cannot be stored; use float32, bfloat16 or float16")
        with self._fitting:
            self.check_open()
            return self._fit(layer, geometry, device)

    def _fit(self, layer: int, geometry: Geometry, device: torch.device) -> BlockShape:
        s = self.settings
        if self._mover is None:
            slot = round_up(s.block_tokens * geometry.row_bytes, PAGE)
            for tier, budget, slots in (
                ("device", s.device_budget, geometry.kv_heads),
                ("host", s.host_budget, 2 * geometry.kv_heads),
            ):
                if budget < slots * slot:
                    raise BudgetTooSmall(tier, budget, slots * slot, f"a run of blocks takes {slots * slot:,} bytes")
            self._start(slot, device)
        shape = BlockShape.fit(geometry, self.mover.host.slot_bytes, s.block_tokens)
        known = self.mover.shapes.setdefault(layer, shape)
        if known != shape:
            raise InputError(f"layer {layer} holds {known.geometry}, got {geometry}")
        if s.host_budget < self.mover.host_floor:
            raise BudgetTooSmall("host", s.host_budget, self.mover.host_floor, "two runs of blocks must fit")
        return shape

    def sealed(self, ids: Ids) -> None:
        """A run of blocks is full."""
        with self.mover.lock:
            self.mover.ledger.seal(ids)
        if self.partitions is not None:
            self.partitions.offer(ids)

    def new_stream(self) -> int:
        """A name for the blocks of one sequence, none of which another sequence writes."""
        return next(self._streams)

    def _start(self, slot_bytes: int, device: torch.device) -> None:
        s = self.settings
        executor = self._executor or Threads(s.io_threads, "alaya-io")
        ssd = self.store.tier(s, self.accountant, self.clock)
        ssd.writes = self.wear
        publish = partial(_publish, self.store, ssd, executor, s.segment_tokens, self.wear)
        on = self.device or device_at(device)
        device_tier = DeviceTier(s.device_budget, slot_bytes, self.accountant, on)
        host_tier = HostTier(s.host_budget, slot_bytes, self.accountant, on)
        self._mover = Mover(s, self.policies, device_tier, host_tier, ssd, executor, publish, on)
        self._loop = LoopThread()
        self._mover.on_loop = self._loop.call
        if self.sparse is not None:
            wake = partial(self._loop.call, self._mover.changed)
            self.partitions = Partitions(s, self._mover, self.accountant, wake, latent_dim(self.shelf.model))
            self.pages = Pages(
                self._mover, *self._of_pages, s.page_share, s.prefetch_share, self.clock, self._loop.submit
            )
        self._finalizer.detach()
        self._finalizer = weakref.finalize(self, _close, self.store, self._mover, self._loop, executor, self.partitions)

    # ------------------------------------------------------------------ the write path
    def open_blocks(self, layer: int, stream: int, start: int, heads: int) -> int:
        """New open blocks of one run of tokens, one a kv head; the first id. Raises StoreError, BudgetTooSmall."""
        self._reap()
        mover = self.mover
        with mover.lock:
            mover.hold()  # closed meanwhile, it has no room, which is not the budget's fault
            slots = mover.try_device(heads)
            if slots is not None:
                first = mover.ledger.opened(layer, stream, start, slots)
        if slots is None:
            slots = self._device_room(heads)
            with mover.lock:
                first = mover.ledger.opened(layer, stream, start, slots)
        if mover.wants_writer():
            self._bridge.call(mover.kick_writer)
        return first

    def _device_room(self, heads: int) -> Slots:
        while True:
            try:
                return self._stall(self.mover.device_room(heads))
            except OutOfSpace:
                if not self.on_full():
                    raise

    def hold(self) -> object:
        """Keeps the tiers' memory mapped while it lives, even when the engine is closed. Raises SessionClosed."""
        with self.mover.lock:
            return self.mover.hold()

    def copy_rows(self, source: Ids, target: Ids, nbytes: int) -> None:
        """Copy the first ``nbytes`` of blocks, wherever they are, to open blocks. The caller holds the memory."""
        mover = self.mover
        self._wait(mover.load(source, asyncio.Lock()))
        with mover.lock:
            mover.copy_down(source, target, nbytes)
            wake = mover.waited_for
        if wake:
            self.notify()

    def release(self, ids: Ids) -> None:
        """One sequence less holds the blocks."""
        with self.mover.lock:
            self.mover.give_back(self.mover.ledger.release(ids))

    def bury(self, dead: list[Ids]) -> None:
        """The same for blocks of a session that is gone; safe at any moment, done by the next call."""
        self._buried.extend(dead)

    def _reap(self) -> None:
        while self._buried:
            try:
                dead = self._buried.popleft()
            except IndexError:  # another thread was faster
                return
            self.release(dead)

    def flush(self, contexts: Callable[[], dict[str, Any]]) -> None:
        """Write all sealed blocks, then what ``contexts`` says they make up. Raises StoreError."""
        if self._mover is None:
            return
        mover = self.mover
        while True:
            with mover.lock:
                ids = mover.ledger.demotable_ids()
                if not ids.size:
                    break
                room = mover.demote(ids[: max(1, mover.host.capacity // 2)])
            if not room:
                self._wait(mover.flush())
        self._wait(mover.flush())
        self._bridge.run(self.store.save_manifest(contexts()))

    def let_go(self, ids: Ids) -> int:
        """Free the memory of blocks that are on disk and nobody reads now; how many. They can be read again."""
        if self._mover is None:
            return 0
        with self.mover.lock:
            return self.mover.let_go(ids)

    def write_out(self, ids: Ids, say: Callable[[int], None] = lambda left: None) -> None:
        """Write these sealed blocks to disk. say: told how many are left. Raises StoreError."""
        self._wait(self.mover.write_out(ids, say))

    def publish(self, files: list[int]) -> None:
        """Write index and metadata of these files of the ssd tier that lack them. Raises StoreError."""
        self._wait(self.mover.make_public(files))
        self.store.closing()

    def run_all(self, jobs: list[Callable[[], None]]) -> None:
        """Run jobs of storage side by side, all to their end; raises the first error."""
        self._wait(self.mover.run_all(jobs))

    def save_groups(self) -> list[str]:
        """See Store.save_groups."""
        return self._wait(self.store.save_groups())

    # ------------------------------------------------------------------ the read path
    def reading(self, ids: Ids, upcoming: Callable[[], Iterator[Ids]]) -> Iterator[tuple[Columns, Ids]]:
        """The blocks ``ids`` [kv_heads, columns], each readable while the iterator stands on it.

        What is in memory comes first, then batches of the rest as they arrive: (columns, ids [kv_heads, len(columns)]).
        upcoming: the ids attention will ask for next, in order, for reading ahead. Raises StoreError;
        nothing stays pinned.
        """
        mover, book = self.mover, self.mover.ledger
        with mover.lock:
            held = mover.hold()  # until this generator ends: another thread may close the engine meanwhile
            landed = mover.land() and mover.waited_for
            here = book.readable(ids).all(0)
            resident = ids if here.all() else ids[:, here]
            flat = resident.ravel()
            book.pin(flat)
            self._count(flat)
        if landed:
            self.notify()
        if resident is ids:
            try:
                yield np.arange(ids.shape[1]), ids
            finally:
                self.unpin(flat, used=True)
            self.read_ahead(upcoming)
            del held
            return
        cold = np.flatnonzero(~here)
        loads = Loads(self, ids, cold)
        try:
            try:
                loads.start()
                if flat.size:
                    yield np.flatnonzero(here), resident
            finally:
                self.unpin(flat, used=True)
            while (columns := loads.next()) is not None:
                if loads.all_started:
                    self.read_ahead(upcoming)
                batch = ids[:, columns]
                try:
                    yield columns, batch
                finally:
                    self.unpin(batch.ravel(), used=True)
        finally:
            loads.abandon()
            del held

    def read_ahead(self, upcoming: Callable[[], Iterator[Ids]]) -> None:
        """Hand the reader the next cold blocks, as many as it may read ahead."""
        mover = self.mover
        if not mover.may_read_ahead():
            return
        room, found = int(self.settings.prefetch_share * mover.host.capacity), []
        for ids in upcoming():
            with mover.lock:
                flat = ids.T.ravel()
                flat = flat[~mover.ledger.readable(flat) & ~mover.ledger.coming(flat)]
            found.append(flat[:room])
            room -= found[-1].size
            if room <= 0:
                break
        if found and (cold := np.concatenate(found)).size:
            self._bridge.call(partial(mover.kick_reader, cold))

    def addresses(self, ids: Ids) -> Addresses:
        """Where pinned blocks that are ``on_cpu`` lie, int64 of the shape of ``ids``."""
        with self.mover.lock:
            return self.mover.addresses(ids)

    def on_cpu(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Which of the pinned blocks the CPU can read, bool of the shape of ``ids``."""
        if self.mover.device.on_cpu:
            return np.ones(ids.shape, bool)
        return np.asarray(self.mover.ledger.device[ids] < 0)

    def tensor(self, block: int) -> Tensor:
        """The memory of a pinned block, uint8 [slot_bytes], on the device it lies on."""
        return self.mover.tensor(block)

    def write(self, ids: Ids, offset: int, k: Tensor, v: Tensor) -> None:
        """Put rows into open blocks, one a head, from byte ``offset`` on. k, v: [kv_heads, n, dim]."""
        mover = self.mover
        if mover.device.on_cpu:
            write_rows(k, v, self.addresses(ids) + offset)
            return
        with mover.lock:
            mover.lanes.write(k, v, mover.ledger.device[ids], offset)

    def bring(self, ids: Ids) -> Slots:
        """See Mover.bring."""
        with self.mover.lock:
            return self.mover.bring(ids)

    def blank(self, ids: Ids, start: int, end: int) -> None:
        """Put zeros into bytes ``start`` to ``end`` of open blocks."""
        with self.mover.lock:
            self.mover.lanes.blank(self.mover.ledger.device[ids], start, end)

    def note_rows(self, nbytes: int) -> None:
        """Keys and values of so many bytes were picked out of pages."""
        if self.pages is not None:
            self.pages.use.rows += nbytes

    def _count(self, ids: Ids) -> None:
        """Note where attention found blocks of one layer that are in memory."""
        book = self.mover.ledger
        nbytes = self.mover.shapes[int(book.layer[ids[0]])].nbytes if ids.size else 0
        device = int(np.count_nonzero(book.device[ids] >= 0))
        ahead = int(np.count_nonzero(book.ahead[ids]))
        self.touched.device += device * nbytes
        self.touched.ahead += ahead * nbytes
        self.touched.host += (ids.size - device - ahead) * nbytes

    def used(self, ids: Ids) -> None:
        """Attention used these pinned blocks of one layer, which were in memory when it began."""
        with self.mover.lock:
            self._count(ids)
            self.mover.ledger.touch(ids)

    def unpin(self, ids: Ids, *, used: bool = False) -> None:
        """The blocks' memory is no longer read; with ``used`` attention used them."""
        mover = self.mover
        with mover.lock:
            if used:
                mover.ledger.touch(ids)
            mover.give_back(mover.ledger.unpin(ids))
            wake = mover.waited_for
        if wake:
            self._bridge.call(mover.changed)

    # ------------------------------------------------------------------ facts
    def used_bytes(self, tier: str) -> int:
        """Bytes of blocks in a tier."""
        if self._mover is None or self.closed:
            return 0
        if tier in ("ssd", "index", "device_index"):
            return self.accountant.used[tier]
        memory = self._mover.device if tier == "device" else self._mover.host
        return (memory.capacity - memory.free) * memory.slot_bytes

    @property
    def traffic(self) -> Traffic:
        """What was moved."""
        return self._mover.traffic if self._mover is not None else Traffic()

    @property
    def direct_io(self) -> bool:
        """Whether the disk is read and written past the page cache."""
        return self._mover is not None and self._mover.ssd.direct

    # ------------------------------------------------------------------ the bridge
    @property
    def _bridge(self) -> LoopThread:
        assert self._loop is not None
        return self._loop

    def notify(self) -> None:
        """Wake whoever waits for storage."""
        self._bridge.call(self.mover.changed)

    def on_loop(self, work: Callable[[], None]) -> None:
        """Do something soon, on the loop."""
        self._bridge.call(work)

    def submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Start a coroutine on the loop."""
        return self._bridge.submit(work)

    def wait_for(self, future: "Future[T]") -> T:
        """The result of a future; the time it took counts as waiting for storage."""
        began = self.clock.monotonic()
        try:
            return future.result()
        except StoreCorrupt as error:
            self.shelf.blame(error, ADVICE[self.settings.on_corrupt])
            raise
        finally:
            self.waited_seconds += self.clock.monotonic() - began

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return self.wait_for(self.submit(work))

    def _stall(self, work: Coroutine[Any, Any, T]) -> T:
        began = self.clock.monotonic()
        try:
            return self._wait(work)
        finally:
            self.stalls += 1
            self.stalled_seconds += self.clock.monotonic() - began

    def close(self) -> None:
        """Finish what is in flight, give back all memory, remove what nobody can read later. Twice is fine."""
        if os.getpid() != self._pid:  # the lock may be held by a thread that this process does not have
            self._finalizer()
            return
        with self._fitting:
            self._finalizer()

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called, or this is a process forked from the engine's own."""
        return not self._finalizer.alive or os.getpid() != self._pid

    def check_open(self) -> None:
        """Raises SessionClosed if it is closed."""
        if self.closed:
            raise SessionClosed("this cache is closed, or was made before a fork of the process; make a new one")


class Loads:
    """The cold columns of one attention, on their way in batches, a few at a time, in order."""

    def __init__(self, engine: Engine, ids: Ids, columns: Columns) -> None:
        self._engine, self._ids = engine, ids
        mover = engine.mover
        column_bytes = ids.shape[0] * mover.host.slot_bytes
        most = max(1, mover.batch_bytes // column_bytes)
        self._batches = deque(columns[i : i + most] for i in range(0, len(columns), most))
        self._gate = asyncio.Lock()
        self._running: deque[tuple[Columns, Future[None]]] = deque()

    @property
    def all_started(self) -> bool:
        """Whether no batch is left to be asked for."""
        return not self._batches

    def start(self) -> None:
        """Have up to LOADS_AHEAD batches on their way."""
        mover = self._engine.mover
        while self._batches and len(self._running) < LOADS_AHEAD:
            columns = self._batches.popleft()
            ids = self._ids[:, columns].ravel()
            with mover.lock:
                sizes = mover.sizes(ids)
                ahead = mover.ledger.ahead[ids]
            self._engine.touched.ahead += int(sizes[ahead].sum())
            self._engine.touched.waited += int(sizes[~ahead].sum())
            self._running.append((columns, self._engine.submit(mover.load(ids, self._gate))))

    def next(self) -> Columns | None:
        """The next batch, in memory and pinned; None after the last."""
        if not self._running:
            return None
        columns, future = self._running[0]
        self._engine.wait_for(future)
        self._running.popleft()
        self.start()
        return columns

    def abandon(self) -> None:
        """Wait for what is still on its way and let go of it."""
        while self._running:
            columns, future = self._running.popleft()
            if future.exception() is None:
                self._engine.unpin(self._ids[:, columns].ravel())


async def _publish(
    store: Store, ssd: SsdTier, executor: Executor, segment_tokens: int, wear: Wear, number: int
) -> None:
    await executor.run(partial(ssd.write_index, number))
    await store.publish(ssd, number, segment_tokens)
    if wear.due:
        await executor.run(store.closing)


def _close(
    store: Store,
    mover: Mover | None,
    loop: LoopThread | None,
    executor: Executor | None,
    partitions: Partitions | None,
) -> None:
    """What is left of an engine, taken down from the top."""
    if threading.current_thread().name.startswith(
        "alaya-"
    ):  # garbage-collected on a thread that cannot wait for itself
        threading.Thread(target=_close, args=(store, mover, loop, executor, partitions)).start()
        return
    if partitions is not None and loop is not None and loop.here:
        partitions.close()
    if loop is not None and mover is not None and executor is not None and loop.here:
        loop.close(mover.close)
        executor.close()
        for tier in (mover.device, mover.host, mover.ssd):
            tier.close()
    store.close()


def latent_dim(model: Model | None) -> int | None:
    """Numbers of what an MLA model keeps of a token in place of keys, by its configuration; None for others."""
    config = (model or {}).get("text_config") or model or {}
    rank = config.get("kv_lora_rank")
    return rank if isinstance(rank, int) else None
