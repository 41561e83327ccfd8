"""Carries blocks between the tiers: the only module that awaits storage.

    update     device slots run out -> the window policy names victims -> copied to host slots -> dirty
    behind     dirty blocks above the watermark -> ssd -> clean
    attention  cold blocks -> the eviction policy frees host slots -> read and verified in place -> pinned

Memory-to-memory moves happen at once, under the lock. Whatever must wait for storage is a coroutine: it tries under the
lock and, when that fails, sleeps until something has changed. A read or write owns its slots until it is complete,
whoever awaited it: cancelling an await never frees memory that a thread still fills.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from alaya_tiers.blocks import BlockShape
from alaya_tiers.config import Settings
from alaya_tiers.devices.base import Device, Event
from alaya_tiers.devices.cpu import CPU
from alaya_tiers.errors import AlayaError, BudgetTooSmall, SessionClosed
from alaya_tiers.index.where import Ways
from alaya_tiers.ledger import IDLE, WRITING, Freed, Ids, Ledger, Mask, Slots
from alaya_tiers.policies import EvictionPolicy, EvictionView, PrefetchPolicy, PrefetchView, WritePolicy, WriteView
from alaya_tiers.seams import Executor
from alaya_tiers.tiers.arena import Arena
from alaya_tiers.tiers.base import Addresses
from alaya_tiers.tiers.lanes import Lanes
from alaya_tiers.tiers.ssd import SsdTier

T = TypeVar("T")

STAGED = 8
"""The part of the device tier that is kept for blocks brought for one attention: one in so many slots."""

FIRST_LOOK, LAST_LOOK = 50e-6, 1e-3
"""Seconds between two looks at the events of copies: a block of 128 KB is copied in some 5 microseconds."""


@dataclass(frozen=True, slots=True)
class Policies:
    """The decisions a mover asks for."""

    device: EvictionPolicy
    host: EvictionPolicy
    prefetch: PrefetchPolicy
    write: WritePolicy


@dataclass(slots=True)
class Traffic:
    """What was moved, in bytes and blocks since the start."""

    demoted_bytes: int = 0
    brought_bytes: int = 0
    written_bytes: int = 0
    read_bytes: int = 0
    read_ahead_bytes: int = 0
    dropped_blocks: int = 0
    reads: int = 0
    writes: int = 0
    stalls: int = 0


class PagePool(Protocol):
    """What a mover asks of the pool of pages, under its lock."""

    def forget(self, blocks: Ids) -> None:
        """Blocks are dead, and their pages with them."""
        ...

    def shrink(self, n: int) -> None:
        """Give up to ``n`` host slots back."""
        ...


class Mover:
    """Moves blocks as the policies decide. Synchronous methods never wait; coroutines run on one event loop.

    shapes: block shape by layer, filled as layers appear. publish: awaited with the number of each segment file that
    became full.
    """

    def __init__(
        self,
        settings: Settings,
        policies: Policies,
        device: Arena,
        host: Arena,
        ssd: SsdTier,
        executor: Executor,
        publish: Callable[[int], Coroutine[Any, Any, None]],
        on: Device = CPU,
    ) -> None:
        self.settings, self.policies, self.device, self.host, self.ssd = settings, policies, device, host, ssd
        self.ledger, self.traffic, self.lock = Ledger(), Traffic(), threading.RLock()
        self.shapes: dict[int, BlockShape] = {}
        self.codes: Arena | None = None
        self.summaries: Arena | None = None
        """Where codes of blocks are, and their summaries, if there are any."""
        self.pages: PagePool | None = None
        """Single pages of cold blocks, if there are any: they take slots of the host tier, and give them back."""
        self.garbage: list[str] = []
        """Files nothing lives in any more; the writer removes them."""
        self.publish = publish
        self.lanes = Lanes(on, device, host)
        self.on_loop: Callable[[Callable[[], None]], None] = lambda work: None
        """Has the loop call something soon, from any thread. Set by whoever runs the loop of a device with streams."""
        half = device.capacity // (2 * STAGED)
        self._staging: list[Slots | None] = [] if on.on_cpu else [device.take(half), device.take(half)]
        """Device slots for blocks that are brought for one attention: one half is attended, the other is filled."""
        self._landings: list[tuple[Event, Callable[[], Freed]]] = []
        self._watcher: asyncio.Task[None] | None = None
        self._executor = executor
        self._changed = asyncio.Event()
        self._publishing = asyncio.Lock()
        self._line = asyncio.Lock()
        self._waiters = 0
        self._flushing = False
        self._write_error: AlayaError | None = None
        self._writer: asyncio.Task[None] | None = None
        self._reader_ahead: asyncio.Task[None] | None = None
        self._operations: set[asyncio.Task[Any]] = set()
        self._workers: set[asyncio.Task[Any]] = set()
        self._closing = False

    # ------------------------------------------------------------------ at once, under the lock
    def demote(self, ids: Ids) -> bool:
        """Copy sealed device blocks down to the host tier and free their slots; False when there is no host room.

        Blocks not yet on disk never fill the host tier: one batch stays free for reading, so that attention over what
        is stored goes on even when nothing can be written.
        """
        reserve = max(self.host_floor // 2, self.batch_bytes) // self.host.slot_bytes
        if self.ledger.unsafe_count() + ids.size > self.host.capacity - reserve:
            return False
        slots = self.try_host(ids.size)
        if slots is None:
            return False
        sizes = self.sizes(ids)
        event = self.lanes.down(self.ledger.device[ids], slots, sizes)
        self.device.give(self.ledger.demoted(ids, slots, landing=event is not None))
        if event is not None:
            self.when(event, partial(self.ledger.landed, ids))
        self.traffic.demoted_bytes += int(sizes.sum())
        return True

    def when(self, event: Event, then: Callable[[], Freed]) -> None:
        """Do something with the ledger once a copy is complete, and give back what it frees."""
        self._landings.append((event, then))
        self.on_loop(self.kick_watcher)

    def land(self) -> bool:
        """Do what waits for copies that are complete; whether there was anything. Never blocks."""
        waiting, self._landings = self._landings, []
        for event, then in waiting:
            if event.done():
                self.give_back(then())
            else:
                self._landings.append((event, then))
        return len(self._landings) < len(waiting)

    def let_go(self, ids: Ids) -> int:
        """Give up copies in memory of blocks that are on disk too; how many. Others keep theirs."""
        book, gone = self.ledger, self._drop_copies(ids)
        above = np.intersect1d(ids, book.demotable_ids())
        for block in above[book.file[above] >= 0]:
            if not self.demote(block[None]):
                break
            gone += self._drop_copies(block[None])
        return gone

    def _drop_copies(self, ids: Ids) -> int:
        below = np.intersect1d(ids, self.ledger.droppable_ids())
        self.host.give(self.ledger.dropped(below))
        return int(below.size)

    @property
    def closing(self) -> bool:
        """Whether ``close`` was called."""
        return self._closing

    def may_read_ahead(self) -> bool:
        """Whether anything is on ssd that could be read ahead, and nothing is being read ahead now."""
        return self._reader_ahead is None and bool(self.ssd.files)

    def try_device(self, n: int) -> Slots | None:
        """``n`` device slots, demoting blocks if needed; None when that needs host room first.

        Raises BudgetTooSmall when open blocks alone fill the device tier.
        """
        short = n - self.device.free
        if short > 0:
            candidates = self.ledger.demotable_ids()
            victims = self.policies.device.victims(self._view(candidates), short)
            if victims.size < short and self._unstage():
                return self.try_device(n)
            if victims.size < short:
                if self.ledger.pinned_count():
                    return None
                open_slots = self.device.capacity - self.device.free - candidates.size
                smallest = (open_slots + n) * self.device.slot_bytes
                budget = self.settings.device_budget
                raise BudgetTooSmall(
                    "device", budget, smallest, f"the open blocks of this batch need {smallest:,} bytes"
                )
            if not self.demote(victims):
                return None
        return self.device.take(n)

    def bring(self, ids: Ids) -> Slots:
        """Copy some columns of pinned host blocks [heads, n] up for one attention, as many as pay: the first ones.

        int32 [heads, columns], the device slots they are in by the time a kernel told now reads them; the next but one
        call takes them again. The blocks stay pinned until they are copied.
        """
        s, (heads, columns) = self.settings, ids.shape
        slots = self._staging.pop(0) if self._staging else None
        if slots is None:
            return np.empty((heads, 0), np.int32)
        self._staging.append(slots)
        sizes = self.sizes(ids[:, :1].ravel())
        ways = Ways(s.bus_rate, s.device_rate, s.read_rate)
        n = ways.bring(columns, float(sizes.sum()), slots.size // heads)
        if n:
            flat, into = ids[:, :n].ravel(), slots[: heads * n]
            self.ledger.pin(flat)
            event = self.lanes.up(self.ledger.host[flat], into, self.sizes(flat))
            assert event is not None
            self.when(event, partial(self.ledger.unpin, flat))
            self.traffic.brought_bytes += int(self.sizes(flat).sum())
        return slots[: heads * n].reshape(heads, n)

    def _unstage(self) -> bool:
        """Give up what is kept for bringing blocks; whether there was any. Streams see to whoever still reads it."""
        slots = [some for some in self._staging if some is not None and some.size]
        for some in slots:
            self.device.give(some)
        self._staging = []
        return bool(slots)

    def try_host(self, n: int, among: Callable[[Ids], Ids] | None = None) -> Slots | None:
        """``n`` host slots, dropping clean copies if needed; None when there are not enough.

        among: narrows the ids that may be dropped.
        """
        short = n - self.host.free
        if short > 0:
            candidates = self.ledger.droppable_ids()
            if among is not None:
                candidates = among(candidates)
            if among is None and candidates.size < short and self.pages is not None:
                self.pages.shrink(short - candidates.size)
                short = n - self.host.free
            if candidates.size < short:
                return None
            if short <= 0:
                return self.host.take(n)
            victims = self.policies.host.victims(self._view(candidates), short)
            self.host.give(self.ledger.dropped(victims))
            self.traffic.dropped_blocks += victims.size
        return self.host.take(n)

    def spare_host(self) -> int:
        """Host slots that are free or hold a clean block nobody reads, but for two runs of blocks."""
        return max(0, self.host.free + self.ledger.droppable_ids().size - self.host_floor // self.host.slot_bytes)

    def pageable(self, ids: Ids) -> Mask:
        """Which blocks are on ssd only: single pages of them can be read."""
        book = self.ledger
        cold = (book.file[ids] >= 0) & (book.device[ids] < 0) & (book.host[ids] < 0) & (book.busy[ids] == IDLE)
        return np.asarray(cold)

    def addresses(self, ids: Ids) -> Addresses:
        """Where readable blocks lie in memory, int64 of the shape of ``ids``. The caller has pinned them."""
        device = np.ascontiguousarray(self.ledger.device[ids])
        on_device = device >= 0
        if on_device.all():
            return self.device.addresses(device)
        host = self.host.addresses(np.ascontiguousarray(self.ledger.host[ids]))
        return np.where(on_device, self.device.addresses(device), host)

    def tensor(self, block: int) -> Tensor:
        """The memory of a pinned block, uint8 [slot_bytes], on the device it lies on."""
        slot = int(self.ledger.device[block])
        return self.device.tensor(slot) if slot >= 0 else self.host.tensor(int(self.ledger.host[block]))

    def fetched(self, ids: Ids, nbytes: int) -> Tensor:
        """The first bytes of pinned blocks in memory of the CPU, uint8 [n, nbytes]. May wait: not for a forward."""
        with self.lock:
            near = self.ledger.device[ids] >= 0
            if self.device.on_cpu or not near.any():
                return torch.stack([self.tensor(block)[:nbytes] for block in ids.tolist()])
            rows, event = self.lanes.read(self.ledger.device[ids[near]], nbytes)
            found = torch.empty(ids.size, nbytes, dtype=torch.uint8)
            for i in np.flatnonzero(~near).tolist():
                found[i] = self.tensor(int(ids[i]))[:nbytes]
        while not event.done():
            time.sleep(FIRST_LOOK)
        found[torch.from_numpy(near)] = rows
        return found

    def copy_down(self, source: Ids, target: Ids, nbytes: int) -> None:
        """Copy the first ``nbytes`` of readable blocks to open ones, and unpin them when that is done."""
        book = self.ledger
        sizes = np.full(source.size, nbytes, np.int64)
        here = book.device[source] >= 0
        self.lanes.across(book.device[source[here]], book.device[target[here]], sizes[here])
        below, into = book.host[source[~here]], book.device[target[~here]]
        event = self.lanes.up(below, into, sizes[~here]) if below.size else None
        if event is None:
            self.give_back(book.unpin(source))
        else:
            self.when(event, partial(book.unpin, source))

    def hold(self) -> object:
        """Keeps the tiers' memory mapped for as long as it lives. Under the lock. Raises SessionClosed."""
        if self._closing:
            raise SessionClosed("this cache is closed; make a new one")
        return self.device.hold(), self.host.hold()

    def give_back(self, freed: Freed) -> None:
        """Return what dead blocks left behind to the tiers."""
        if freed.code.size and self.codes is not None:
            self.codes.give(freed.code)
        if freed.summary.size and self.summaries is not None:
            self.summaries.give(freed.summary)
        if freed.device.size:
            self.device.give(freed.device)
        if freed.host.size:
            self.host.give(freed.host)
        if freed.paged.size and self.pages is not None:
            self.pages.forget(freed.paged)
        if freed.file.size:
            self.garbage += self.ssd.forget(freed.file)

    def wants_writer(self) -> bool:
        """Whether write-behind has something to do and is not running."""
        return self._writer is None and bool(self.garbage or self._next_writes().size)

    @property
    def host_floor(self) -> int:
        """The smallest host budget that works, bytes: one run of blocks being attended, one on its way."""
        heads = max((shape.geometry.kv_heads for shape in self.shapes.values()), default=1)
        return 2 * heads * self.host.slot_bytes

    @property
    def batch_bytes(self) -> int:
        """What attention waits for at a time: a few of these must fit into the host tier."""
        return min(self.settings.batch_bytes, self.host.capacity * self.host.slot_bytes // 4)

    @property
    def waiting(self) -> int:
        """How many coroutines sleep until something changes."""
        return self._waiters

    @property
    def waited_for(self) -> bool:
        """Whether some coroutine sleeps until something changes."""
        return self._waiters > 0

    # ------------------------------------------------------------------ on the loop
    async def device_room(self, n: int) -> Slots:
        """``n`` device slots, waiting for write-behind if it must. Raises BudgetTooSmall, StoreError."""
        with self.working():
            return await self._until(lambda: self.try_device(n))

    async def load(self, ids: Ids, gate: asyncio.Lock) -> None:
        """Bring blocks into memory and pin them.

        Loads that share a gate get their room in the order they were started, so that what is asked for later never
        starves what is asked for sooner. Raises StoreError; nothing stays pinned then.
        """
        with self.working():
            async with gate:
                reading = await self._begin(ids)
            try:
                if reading is not None:
                    await asyncio.shield(reading)
            except BaseException:
                self._let_go(ids)
                raise

    async def flush(self) -> None:
        """Write every dirty host block, and the metadata of every segment file that lacks it.

        Raises StoreError; what was written stays written.
        """
        self._flushing = True
        try:
            self.kick_writer()
            with self.working():
                await self._until(lambda: None if self._unflushed() else True)
                for number, file in enumerate(self.ssd.files):
                    if file.live and file.written and not file.published:
                        await self._make_public(number)
        finally:
            self._flushing = False

    async def write_out(self, ids: Ids, say: Callable[[int], None] = lambda left: None) -> None:
        """Write these sealed blocks to disk, wherever they are. say: told how many are left. Raises StoreError."""
        with self.working():
            await self._until(partial(self._written_out, ids, say))

    async def make_public(self, numbers: list[int]) -> None:
        """Index and metadata of these files. Raises StoreError."""
        with self.working():
            for number in numbers:
                await self._make_public(number)

    async def run_all(self, jobs: list[Callable[[], None]]) -> None:
        """Run jobs on the executor, all to their end; raises the first error."""
        with self.working():
            for result in await self._all(jobs):
                if result is not None:
                    raise result

    async def run_reads(self, jobs: list[Callable[[], None]]) -> list[BaseException]:
        """Run reads to their end, even when the awaiting task is cancelled; the errors."""
        results = await self._owned(self._all(jobs))
        return [e for e in results if isinstance(e, BaseException)]

    def kick_writer(self) -> None:
        """Start writing behind, if there is anything to write. On the loop only."""
        if self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write_behind())

    def kick_reader(self, upcoming: Ids) -> None:
        """Read ahead what the policy picks of ``upcoming``, cold blocks in the order of need. On the loop only."""
        if self._reader_ahead is None and upcoming.size:
            self._reader_ahead = asyncio.get_running_loop().create_task(self._read_ahead(upcoming))

    def kick_watcher(self) -> None:
        """Start to watch for copies that become complete. On the loop only."""
        if self._watcher is None and self._landings:
            self._watcher = asyncio.get_running_loop().create_task(self._watch())

    def changed(self) -> None:
        """Wake whoever waits. On the loop only."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def close(self) -> None:
        """Wait until no read or write is under way; whoever waits for one gets SessionClosed."""
        with self.lock:
            self._closing = True
        self.changed()
        for task in (self._writer, self._reader_ahead, self._watcher):
            if task is not None:
                task.cancel()
        self.lanes.device.settle()
        while busy := [
            *self._operations, *self._workers, *filter(None, (self._writer, self._reader_ahead, self._watcher))
        ]:  # fmt: skip
            await asyncio.gather(*busy, return_exceptions=True)
            for name in ("_writer", "_reader_ahead", "_watcher"):  # cancelled before its first step: it clears no name
                if (task := getattr(self, name)) is not None and task.done():
                    setattr(self, name, None)

    # ------------------------------------------------------------------ inside
    async def _watch(self) -> None:
        """Ask the events of copies, less and less often: a host callback of CUDA may not take our lock."""
        pause = FIRST_LOOK
        try:
            while self._landings:
                with self.lock:
                    landed = self.land()
                    more = landed and self.wants_writer()
                if landed:
                    self.changed()
                if more:
                    self.kick_writer()
                pause = FIRST_LOOK if landed else min(2 * pause, LAST_LOOK)
                await asyncio.sleep(pause)
        finally:
            self._watcher = None

    async def _until(self, attempt: Callable[[], T | None]) -> T:
        """The first result of ``attempt`` that is not None; it is tried, under the lock, after every change."""
        first = True
        while True:
            if self._closing:
                raise SessionClosed("the cache was closed while this call waited for storage")
            changed = self._changed
            with self.lock:
                result = attempt()
                if result is not None:
                    return result
                if first:
                    first, self._write_error = False, None  # an old failure is tried again before it is believed
                    self.traffic.stalls += 1
                self._raise_if_stuck()
                self._waiters += 1
                if self._write_error is None and self.wants_writer():
                    self.kick_writer()
            try:
                await changed.wait()
            finally:
                with self.lock:
                    self._waiters -= 1

    def _raise_if_stuck(self) -> None:
        """Nothing in flight can make room: say why instead of waiting forever."""
        book = self.ledger
        if self._writer is not None or book.pinned_count() or book.fetching_count():
            return
        if self._write_error is not None:
            error, self._write_error = self._write_error, None
            raise error
        if not book.dirty_ids().size:
            smallest = self.host_floor
            raise BudgetTooSmall("host", self.settings.host_budget, smallest, "one batch of blocks does not fit")

    async def _claimed(self, ids: Ids) -> Ids:
        """See _claim. Whoever finds no room stands in line: what is asked for later waits, however little it is."""
        with self.lock:
            all_here = bool((self.ledger.readable(ids) | self.ledger.coming(ids)).all())
            may = not self._closing and (all_here or not self._line.locked())
            missing = self._claim(ids) if may else None
        if missing is not None:
            return missing
        async with self._line:
            return await self._until(partial(self._claim, ids))

    async def _begin(self, ids: Ids) -> asyncio.Task[None] | None:
        """Pin ids, wait for those somebody else is reading, start to read the cold ones; the task that does, if any."""
        while True:
            missing = await self._claimed(ids)
            reading = self._start(self._fetch(missing)) if missing.size else None
            theirs = np.setdiff1d(ids, missing, assume_unique=True)
            try:
                await self._until(partial(self._settled, theirs))
                with self.lock:
                    complete = bool(self.ledger.readable(theirs).all())
            except BaseException:
                self._let_go(ids)
                raise
            if complete:
                return reading
            self._let_go(ids)  # another's read of one of them failed: again, holding nothing meanwhile

    def _let_go(self, ids: Ids) -> None:
        with self.lock:
            self.give_back(self.ledger.unpin(ids))
        self.changed()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around what ``close`` must wait for."""
        task = asyncio.current_task()
        assert task is not None
        self._workers.add(task)
        try:
            yield
        finally:
            self._workers.discard(task)

    def _claim(self, ids: Ids) -> Ids | None:
        """Pin ids and reserve slots for the cold ones, all or nothing; the cold ones, now being fetched."""
        missing = ids[~self.ledger.readable(ids) & ~self.ledger.coming(ids)]
        self.ledger.pin(ids)
        slots = self.try_host(missing.size) if missing.size else np.empty(0, np.int32)
        if slots is None:
            self.ledger.unpin(ids)
            return None
        if missing.size:
            self.ledger.fetching(missing, slots)
        return missing

    def _written_out(self, ids: Ids, say: Callable[[int], None]) -> bool | None:
        """True when all blocks are on disk; those in the device tier go down as there is room."""
        book, batch = self.ledger, max(1, self.host.capacity // 4)
        waiting = ids[(book.device[ids] >= 0) & (book.pins[ids] == 0)]
        while waiting.size and self.demote(waiting[:batch]):
            waiting = waiting[batch:]
        left = int(np.count_nonzero((book.file[ids] < 0) | (book.busy[ids] == WRITING)))
        say(left)
        return None if left else True

    def _settled(self, ids: Ids) -> bool | None:
        """True when none of the blocks is on its way."""
        return None if self.ledger.coming(ids).any() else True

    async def _fetch(self, ids: Ids) -> None:
        """Read blocks into the slots the ledger names."""
        book = self.ledger
        with self.lock:
            jobs = self.ssd.read_jobs(
                book.file[ids], book.offset[ids], self.host.addresses(book.host[ids]), book.digest[ids]
            )
        errors = [e for e in await self._all(jobs) if isinstance(e, BaseException)]
        with self.lock:
            if errors:
                slots, freed = book.unfetched(ids)
                self.host.give(slots)
            else:
                freed = book.fetched(ids)
                self.traffic.read_bytes += int(self.sizes(ids).sum())
                self.traffic.reads += len(jobs)
            self.give_back(freed)
        self.changed()
        if errors:
            raise errors[0]

    async def _read_ahead(self, upcoming: Ids) -> None:
        """Read ahead, batch by batch, into slots of what was just used; stop at the first sign of pressure."""
        book, batch = self.ledger, max(1, self.settings.batch_bytes // self.host.slot_bytes)
        try:
            with self.lock:
                upcoming = upcoming[(book.refs[upcoming] > 0)]
                waiting = int(np.count_nonzero(book.ahead))
                room = int(self.settings.prefetch_share * self.host.capacity) - waiting
                chosen = self.policies.prefetch.plan(PrefetchView(upcoming, max(0, room)))
            while chosen.size:
                ids, chosen = chosen[:batch], chosen[batch:]
                with self.lock:
                    ids = ids[(book.refs[ids] > 0) & (book.host[ids] < 0) & (book.file[ids] >= 0)]
                    ids = ids[book.busy[ids] == 0]
                    slots = self.try_host(ids.size, lambda c: c[(book.used[c] >= book.pass_tick) & ~book.ahead[c]])
                    if self._waiters or slots is None:
                        if slots is not None:
                            self.host.give(slots)
                        return
                    book.fetching(ids, slots, ahead=True)
                try:
                    await self._owned(self._fetch(ids))
                except AlayaError:
                    return  # whoever really needs the block will meet the error
                self.traffic.read_ahead_bytes += int(self.sizes(ids).sum())
        finally:
            self._reader_ahead = None

    async def _write_behind(self) -> None:
        try:
            while True:
                with self.lock:
                    garbage, self.garbage = self.garbage, []
                if garbage:
                    await self._executor.run(partial(self._remove, garbage))
                try:
                    if not await self._owned(self._write()) and not self.garbage:
                        return
                except AlayaError as error:
                    self._write_error = error
                    return
        finally:
            self._writer = None
            self.changed()

    def _remove(self, paths: list[str]) -> None:
        for path in paths:
            self.ssd.remove(path)

    def _next_writes(self) -> Ids:
        batch = max(1, self.settings.batch_bytes // self.host.slot_bytes)
        wanted = self._flushing or self._waiters > 0
        book = self.ledger
        view = WriteView(book.dirty_ids(), book.writing_count(), self.host.capacity, wanted)
        return self.policies.write.plan(view)[:batch]

    async def _write(self) -> bool:
        """Write the next dirty host blocks to places of their own; False when there is nothing to write."""
        book = self.ledger
        with self.lock:
            ids = self._next_writes()
            if not ids.size:
                return False
            places = self._places(ids)
            files = np.array([number for number, _ in places], np.int32)
            offsets = np.array([offset for _, offset in places], np.int64)
            book.writing(ids, files, offsets)
            jobs = self.ssd.write_jobs(files, offsets, self.host.addresses(book.host[ids]))
        results = await self._all(jobs)
        errors = [e for e in results if isinstance(e, BaseException)]
        full: set[int] = set()
        with self.lock:
            if errors:
                for place in places:
                    self.garbage += self.ssd.unplace(*place)
                self.give_back(book.unwritten(ids))
            else:
                digests = np.empty(ids.size, np.uint64)
                for result in results:
                    assert not isinstance(result, BaseException)
                    digests[result[0]] = result[1]
                full = self.ssd.confirm(files)
                self.traffic.written_bytes += int(self.sizes(ids).sum())
                self.traffic.writes += len(jobs)
                self.give_back(book.written(ids, digests))
        self.changed()
        if errors:
            raise errors[0]
        for number in sorted(full):
            await self._make_public(number)
        return True

    async def _make_public(self, number: int) -> None:
        file = self.ssd.files[number]
        async with self._publishing:
            if file.kept or file.published:
                return
            written = file.written
            try:
                await self.publish(number)
            except AlayaError:
                if file.live:
                    raise
                return  # all its blocks died meanwhile and it was removed
            file.published = file.written == written
            if file.published:
                self.ssd.published(file)

    def _unflushed(self) -> bool:
        return self._writer is not None or bool(self.ledger.dirty_ids().size or self.ledger.landing_count())

    def _places(self, ids: Ids) -> list[tuple[int, int]]:
        book = self.ledger
        places: list[tuple[int, int]] = []
        try:
            for i in ids.tolist():
                layer = int(book.layer[i])
                where = (int(book.stream[i]), int(book.start[i]), int(book.head[i]))
                places.append(self.ssd.place(layer, self.shapes[layer], *where))
        except AlayaError:
            for place in places:
                self.garbage += self.ssd.unplace(*place)
            raise
        return places

    async def _all(self, jobs: list[Callable[[], T]]) -> list[T | BaseException]:
        """Results of all jobs; every one has ended when this returns."""
        return await asyncio.gather(*(self._executor.run(job) for job in jobs), return_exceptions=True)

    async def _owned(self, operation: Coroutine[Any, Any, T]) -> T:
        """Await an operation that goes on to its end even when the awaiting task is cancelled."""
        return await asyncio.shield(self._start(operation))

    def _start(self, operation: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run an operation to its end; ``close`` waits for it."""
        task = asyncio.get_running_loop().create_task(operation)
        self._operations.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._operations.discard(task)
        if not task.cancelled():
            task.exception()  # whoever still waits gets it; if nobody does, it is no news

    def _view(self, ids: Ids) -> EvictionView:
        book = self.ledger
        return EvictionView(
            ids, book.layer[ids], book.start[ids], book.used[ids], book.cursor, book.pass_tick, len(self.shapes),
            book.uses[ids].astype(np.int64), book.heat[ids].astype(np.float64), book.returned[ids], self.sizes(ids),
        )  # fmt: skip

    def sizes(self, ids: Ids) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """Bytes of each block, int64."""
        sizes = np.zeros(max(self.shapes) + 1, np.int64)
        for layer, shape in self.shapes.items():
            sizes[layer] = shape.nbytes
        return sizes[self.ledger.layer[ids]]
