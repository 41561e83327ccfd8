"""The whole pipeline in one thread, on a virtual clock, over a simulated disk: the same way every time for a seed.

    VirtualLoop      an event loop whose time jumps to the next timer and whose ready queue is served in a seeded order
    SimExecutor      threads that are timers: work runs, and reports, some virtual time after it was asked for
    SimDisk          files in memory, with faults planned by operation and number
    Sim, Player      a mover over these, and sequences that append, fork, attend and check every byte they read
    ...Tests         what every memory tier, eviction policy and index must do; subclass with a way to make one

Needs no test framework; the classes work under pytest.
"""

import asyncio
import errno
import heapq
import os
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from alaya_tiers.attention import copy_blocks
from alaya_tiers.blocks import PAGE, BlockShape, Geometry
from alaya_tiers.config import Settings
from alaya_tiers.index import Index
from alaya_tiers.ledger import Ids
from alaya_tiers.mover import Mover, Policies
from alaya_tiers.policies import EVICTION, PREFETCH, EvictionPolicy, EvictionView, Watermark, Window, by_name
from alaya_tiers.tiers.base import Accountant, Addresses, MemoryTier, Slots
from alaya_tiers.tiers.device import DeviceTier
from alaya_tiers.tiers.host import HostTier
from alaya_tiers.tiers.ssd import SsdTier, memory

T = TypeVar("T")
POISON = 0xDB


class Hang(AssertionError):
    """Nothing is ready, no timer is set, and the awaited work is not done: it would wait forever."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Time passes only when nothing is ready; what is ready runs in an order that ``rng`` picks."""

    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]
    _stopping: bool

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng, self.now, self.turns = rng, 0.0, 0
        self.most_turns = 1_000_000
        """Turns after which a run counts as a livelock."""
        self.failures: list[dict[str, Any]] = []
        """What nobody caught."""
        self.set_exception_handler(lambda _, context: self.failures.append(context))

    def time(self) -> float:
        return self.now

    def run(self, work: Any) -> Any:
        """The result of a coroutine. Raises Hang, and what no task caught."""
        result = self.run_until_complete(work)
        for context in self.failures:
            raise context.get("exception") or AssertionError(context["message"])
        return result

    def _run_once(self) -> None:
        while self._scheduled and (self._scheduled[0].cancelled() or not self._ready):
            timer = heapq.heappop(self._scheduled)
            if not timer.cancelled():
                self.now = max(self.now, timer.when())
                self._ready.append(timer)
        self.turns += 1
        if self.turns > self.most_turns:
            raise Hang(f"no end after {self.turns} turns, at {self.now:.3f} s")
        if self._ready:
            self._ready.rotate(self.rng.randrange(len(self._ready)))
            handle = self._ready.popleft()
            if not handle.cancelled():
                handle._run()
        elif not self._stopping:
            raise Hang(f"nothing can happen any more, at {self.now:.3f} s")

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass


class SimClock:
    """A seams.Clock that shows a virtual loop's time."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def monotonic(self) -> float:
        return self._loop.now


@dataclass(slots=True)
class Fault:
    """What goes wrong: the ``n``-th ``op`` of a disk (from 1), or every one from there on with ``persistent``.

    op: open, read, write, close, load, save or remove. kind: "error" raises ``error``; "short" does part of a read or
    write; "flip" changes one bit of what is read.
    """

    op: str
    n: int = 1
    kind: str = "error"
    error: int = errno.EIO
    persistent: bool = False
    seen: int = 0
    hits: int = 0

    def strikes(self, op: str) -> bool:
        """Count an operation; whether this is one to spoil."""
        if op != self.op:
            return False
        self.seen += 1
        hit = self.seen == self.n or (self.persistent and self.seen > self.n)
        self.hits += hit
        return hit


@dataclass(slots=True)
class SimFile:
    """Bytes, and which pages of them take room."""

    data: bytearray = field(default_factory=bytearray)
    pages: set[int] = field(default_factory=set)


class SimDisk:
    """A seams.Disk in memory. space: bytes it has room for, None = any. An unlinked file lives as long as its handles."""

    def __init__(self, rng: random.Random, space: int | None = None, trace: Callable[[object], None] = id) -> None:
        self.files: dict[str, SimFile] = {}
        self.faults: list[Fault] = []
        self.space, self.slow = space, 1.0
        self._rng, self._trace = rng, trace
        self.handles: dict[int, tuple[SimFile, bool]] = {}
        self._next = 3

    def open(self, path: str, *, create: bool, direct: bool) -> int:
        self._op("open", path)
        if path not in self.files:
            if not create:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            self.files[path] = SimFile()
        self._next += 1
        self.handles[self._next] = (self.files[path], direct)
        return self._next

    def read(self, handle: int, buffers: Sequence[memoryview], offset: int) -> int:
        file, direct = self.handles[handle]
        fault = self._op("read", (handle, offset, sum(map(len, buffers))))
        self._aligned(direct, buffers, offset)
        limit = self._part(buffers, direct) if fault == "short" else sum(map(len, buffers))
        data = bytearray(file.data[offset : offset + limit])
        if fault == "flip" and data:
            data[self._rng.randrange(len(data))] ^= 1 << self._rng.randrange(8)
        at = 0
        for buffer in buffers:
            part = data[at : at + len(buffer)]
            buffer[: len(part)] = part
            at += len(part)
        return at

    def write(self, handle: int, buffers: Sequence[memoryview], offset: int) -> int:
        file, direct = self.handles[handle]
        data = b"".join(buffers)
        fault = self._op("write", (handle, offset, xxhash.xxh3_64_intdigest(data)))
        self._aligned(direct, buffers, offset)
        if fault == "short":
            data = data[: self._part(buffers, direct)]
        for page in range(offset // PAGE, -(-(offset + len(data)) // PAGE)):
            if page not in file.pages:
                if self.space is not None and self.used + PAGE > self.space:
                    data = data[: max(0, page * PAGE - offset)]
                    break
                file.pages.add(page)
        if not data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if len(file.data) < offset + len(data):
            file.data.extend(bytes(offset + len(data) - len(file.data)))
        file.data[offset : offset + len(data)] = data
        return len(data)

    def close(self, handle: int) -> None:
        self._op("close", handle)
        del self.handles[handle]

    async def load(self, path: str) -> bytes:
        self._op("load", path)
        await asyncio.sleep(self._rng.random() * 1e-4 * self.slow)
        if path not in self.files:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return bytes(self.files[path].data)

    async def save(self, path: str, data: bytes) -> None:
        self._op("save", path)
        await asyncio.sleep(self._rng.random() * 1e-4 * self.slow)
        self.files[path] = SimFile(bytearray(data), set(range(-(-len(data) // PAGE))))

    def remove(self, path: str) -> None:
        self._op("remove", path)
        for name in [n for n in self.files if n == path or n.startswith(f"{path}/")]:
            del self.files[name]

    def free_bytes(self, path: str) -> int:
        return (1 << 40) if self.space is None else self.space - self.used

    @property
    def used(self) -> int:
        """Bytes of pages taken."""
        return PAGE * sum(len(file.pages) for file in self.files.values())

    def _op(self, op: str, about: object) -> str | None:
        self._trace((op, about))
        struck = [fault for fault in self.faults if fault.strikes(op)]
        for fault in struck:
            if fault.kind == "error":
                raise OSError(fault.error, os.strerror(fault.error))
        return struck[0].kind if struck else None

    def _part(self, buffers: Sequence[memoryview], direct: bool) -> int:
        unit = 512 if direct else 1
        return unit * self._rng.randint(1, max(1, sum(map(len, buffers)) // unit - 1))

    def _aligned(self, direct: bool, buffers: Sequence[memoryview], offset: int) -> None:
        if direct and (offset % 512 or any(len(b) % 512 for b in buffers)):
            raise OSError(errno.EINVAL, "direct IO at an odd offset or length")


class SimExecutor:
    """A seams.Executor without threads: work runs after a seeded delay, and reports after another, cancelled or not."""

    def __init__(self, rng: random.Random, disk: SimDisk, seconds: float = 1e-3) -> None:
        self._rng, self._disk, self._seconds = rng, disk, seconds
        self.running = 0

    async def run(self, work: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        self.running += 1
        loop.call_later(self._delay(), partial(self._work, loop, work, done))
        return await done

    def close(self) -> None:
        assert not self.running, "closed while work is in progress"

    def _delay(self) -> float:
        return self._rng.expovariate(1) * self._seconds * self._disk.slow

    def _work(self, loop: asyncio.AbstractEventLoop, work: Callable[[], T], done: "asyncio.Future[T]") -> None:
        try:
            report: Callable[[], None] = partial(done.set_result, work())
        except Exception as error:
            report = partial(done.set_exception, error)

        def finish() -> None:
            self.running -= 1
            if not done.done():
                report()

        loop.call_later(self._delay(), finish)


class _Poisoned:
    """A memory tier that overwrites what it gets back, and notices when that was written to before it is taken again."""

    slot_bytes: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._poisoned: set[int] = set()

    def take(self, n: int) -> Slots | None:
        slots: Slots | None = super().take(n)  # type: ignore[misc]
        for slot in [] if slots is None else slots.tolist():
            if slot in self._poisoned:
                self._poisoned.remove(slot)
                assert (self._bytes(slot) == POISON).all(), "a slot was written to while nobody owned it"
        return slots

    def give(self, slots: Slots) -> None:
        super().give(slots)  # type: ignore[misc]
        for slot in slots.tolist():
            self._bytes(slot)[:] = POISON
            self._poisoned.add(slot)

    def _bytes(self, slot: int) -> npt.NDArray[np.uint8]:
        address = int(self.addresses(np.array([slot], np.int32))[0])  # type: ignore[attr-defined]
        return np.frombuffer(memory(address, self.slot_bytes), np.uint8)


class PoisonedDevice(_Poisoned, DeviceTier):
    """A device tier that notices use after free."""


class PoisonedHost(_Poisoned, HostTier):
    """A host tier that notices use after free."""


@dataclass(frozen=True)
class Traced:
    """A policy that notes what it decided."""

    policy: Any
    note: Callable[[object], None]

    def victims(self, view: EvictionView, n: int) -> Ids:
        ids: Ids = self.policy.victims(view, n)
        self.note(("victims", ids.tolist()))
        return ids

    def plan(self, view: Any) -> Ids:
        ids: Ids = self.policy.plan(view)
        self.note(("plan", ids.tolist()))
        return ids


LAYERS = {
    0: BlockShape(Geometry(2, 32, 32, torch.float32), 16),
    1: BlockShape(Geometry(1, 16, 16, torch.float32), 16),
}


class Sim:
    """A mover on a virtual loop. device, host: slots of one page; shapes: of the layers."""

    def __init__(
        self,
        seed: int,
        device: int = 6,
        host: int = 4,
        *,
        shapes: dict[int, BlockShape] = LAYERS,
        space: int | None = None,
        **settings: Any,
    ) -> None:
        self.rng = random.Random(seed)
        self.loop = VirtualLoop(self.rng)
        self._trace = xxhash.xxh3_64()
        self.disk = SimDisk(self.rng, space, self.note)
        self.executor = SimExecutor(self.rng, self.disk)
        base = {"block_tokens": 16, "segment_tokens": 64, "sink_tokens": 16, "batch_bytes": 2 * PAGE, "io_threads": 2}
        s = self.settings = Settings(device_budget=device * PAGE, host_budget=host * PAGE, **(base | settings))
        limits = {"device": s.device_budget, "host": s.host_budget, "ssd": s.ssd_budget}
        books = self.accountant = Accountant(limits)
        policies = Policies(
            Traced(Window(s.sink_tokens), self.note),
            Traced(by_name(EVICTION, s.eviction), self.note),
            Traced(by_name(PREFETCH, s.prefetch), self.note),
            Traced(Watermark(s.dirty_limit), self.note),
        )
        self.ssd = SsdTier("/sim", self.disk, books, s.segment_tokens, s.io_threads, direct=True)
        self.device = PoisonedDevice(s.device_budget, PAGE, books, torch.device("cpu"))
        self.host = PoisonedHost(s.host_budget, PAGE, books, pinned=False)
        self.mover = Mover(s, policies, self.device, self.host, self.ssd, self.executor, self._publish)
        self.mover.shapes.update(shapes)
        self.stamps = self.streams = 0
        self.published: list[int] = []

    @property
    def trace(self) -> str:
        """A hash of every disk operation and decision so far, in order."""
        return self._trace.hexdigest()

    def note(self, event: object) -> None:
        """Add to the trace."""
        self._trace.update(f"{self.loop.now:.9f} {event!r}\n".encode())

    def new_stream(self) -> int:
        """A stream name nobody has."""
        self.streams += 1
        return self.streams

    async def pause(self) -> None:
        """Some virtual time, as attention takes."""
        await asyncio.sleep(self.rng.expovariate(1) * 1e-3)

    def check(self) -> None:
        """The books agree with each other and no budget is exceeded."""
        book = self.mover.ledger
        book.check_integrity()
        for tier, slots in ((self.device, book.device), (self.host, book.host)):
            assert tier.used == np.count_nonzero(slots >= 0), f"{tier.name}: slots taken and held differ"
        for name, limit in self.accountant.limits.items():
            assert limit is None or self.accountant.peak[name] <= limit, f"{name}: over budget"
        placed = np.count_nonzero(book.file >= 0)
        assert self.accountant.used["ssd"] == placed * PAGE == PAGE * sum(f.live for f in self.ssd.files)

    async def settle(self, *, pinned: int = 0) -> None:
        """Wait until nothing is in flight, however slow; check that nothing is left over."""
        await asyncio.sleep(1000 * self.disk.slow)
        book = self.mover.ledger
        assert not self.executor.running, "work is still in flight"
        assert not book.writing_count(), "blocks are still being written"
        assert not book.fetching_count(), "blocks are still being read"
        assert book.pinned_count() == pinned, "pins were left"
        assert not self.mover.waited_for, "somebody still waits"
        self.check()

    async def finish(self, *players: "Player") -> None:
        """Release all players; nothing may be left anywhere then."""
        await self.settle()
        for player in players:
            player.crop(0)
        if self.mover.wants_writer():
            self.mover.kick_writer()
        await self.settle()
        assert not self.mover.ledger.alive().size, "blocks outlive their sequences"
        assert (self.device.used, self.host.used, self.accountant.used["ssd"]) == (0, 0, 0)

    def close(self) -> None:
        """Free everything; loop, tiers and handles."""
        try:
            self.loop.run(self.mover.close())
            for tier in (self.device, self.host, self.ssd):
                tier.close()
            assert not self.disk.handles, "handles were left open"
            assert not any(self.accountant.used.values()), "bytes were left charged"
        finally:
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.close()

    async def _publish(self, number: int) -> None:
        await self.executor.run(partial(self.ssd.write_index, number))
        self.published.append(number)


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks of one run of tokens, one a kv head: the first id, and a stamp for each half that is filled."""

    first: int
    stamps: tuple[int, ...]


class Player:
    """A sequence: what it appended it finds again, byte for byte, or gets a typed error."""

    def __init__(self, sim: Sim, runs: dict[int, list[Run]] | None = None) -> None:
        self.sim, self.mover = sim, sim.mover
        self.stream = sim.new_stream()
        self.runs = {n: [] for n in self.mover.shapes} if runs is None else {n: list(r) for n, r in runs.items()}

    def ids(self, layer: int, start: int = 0) -> Ids:
        """Block ids from run ``start`` on, [kv_heads, runs]."""
        first = np.array([run.first for run in self.runs[layer][start:]], np.int64)
        return np.asarray(first + np.arange(self.mover.shapes[layer].geometry.kv_heads)[:, None])

    async def append(self, layer: int) -> None:
        """Half a block of new tokens. On an error nothing was appended."""
        runs, book = self.runs[layer], self.mover.ledger
        self.sim.stamps += 1
        stamp = self.sim.stamps
        if not runs or len(runs[-1].stamps) == 2:
            run = Run(await self._open(layer, len(runs)), (stamp,))
            runs.append(run)
        else:
            run = Run(runs[-1].first, (*runs[-1].stamps, stamp))
            if book.refs[run.first] > 1:
                run = Run(await self._copy(layer, len(runs) - 1), run.stamps)
            runs[-1] = run
        ids = self.ids(layer, len(runs) - 1).ravel()
        for address, (part, data) in zip(self.mover.addresses(ids), self._contents(layer, run), strict=True):
            view = np.frombuffer(memory(int(address), PAGE), np.int64)
            view[part * data.size : (part + 1) * data.size] = data
        if len(run.stamps) == 2:
            book.seal(ids)

    async def attend(self, layer: int, batch: int = 1, ahead: int = 2) -> None:
        """Read every block of a layer, pinned, in batches of ``batch`` runs; AssertionError when a byte is wrong."""
        book = self.mover.ledger
        book.begin_pass(layer)
        ids = self.ids(layer)
        here = book.readable(ids).all(0)
        resident = ids[:, here].ravel()
        book.pin(resident)
        try:
            await self._verify(layer, np.flatnonzero(here))
        finally:
            self._unpin(resident, used=True)
        cold = np.flatnonzero(~here)
        waiting = deque(cold[i : i + batch] for i in range(0, len(cold), batch))
        running: deque[tuple[npt.NDArray[np.intp], asyncio.Task[None]]] = deque()
        gate = asyncio.Lock()
        try:
            while waiting or running:
                while waiting and len(running) < ahead:
                    columns = waiting.popleft()
                    load = self.mover.load(ids[:, columns].ravel(), gate)
                    running.append((columns, asyncio.get_running_loop().create_task(load)))
                await running[0][1]
                columns, _ = running.popleft()
                try:
                    await self._verify(layer, columns)
                finally:
                    self._unpin(ids[:, columns].ravel(), used=True)
        finally:
            for columns, task in running:
                if not isinstance((await asyncio.gather(task, return_exceptions=True))[0], BaseException):
                    self._unpin(ids[:, columns].ravel())

    def read_ahead(self, layer: int) -> None:
        """Have the mover read what attention of ``layer`` will need."""
        flat, book = self.ids(layer).T.ravel(), self.mover.ledger
        if self.mover.may_read_ahead():
            self.mover.kick_reader(flat[~book.readable(flat) & ~book.coming(flat)])

    async def step(self) -> None:
        """What a forward does: append to every layer and attend it."""
        for layer in self.runs:
            await self.append(layer)
            await self.attend(layer)
            self.read_ahead((layer + 1) % len(self.runs))

    def fork(self) -> "Player":
        """Another sequence with the same blocks."""
        for layer in self.runs:
            self.mover.ledger.retain(self.ids(layer).ravel())
        return Player(self.sim, self.runs)

    def crop(self, runs: int) -> None:
        """Forget all runs from ``runs`` on, in every layer."""
        for layer in self.runs:
            self._release(self.ids(layer, runs).ravel())
            del self.runs[layer][runs:]
        self.stream = self.sim.new_stream()

    def _release(self, ids: Ids) -> None:
        self.mover.give_back(self.mover.ledger.release(ids))

    def _unpin(self, ids: Ids, *, used: bool = False) -> None:
        if used:
            self.mover.ledger.touch(ids)
        self.mover.give_back(self.mover.ledger.unpin(ids))
        self.mover.changed()

    async def _open(self, layer: int, index: int) -> int:
        mover, shape = self.mover, self.mover.shapes[layer]
        heads = shape.geometry.kv_heads
        slots = mover.try_device(heads)
        if slots is None:
            slots = await mover.device_room(heads)
        first = mover.ledger.opened(layer, self.stream, index * shape.tokens, slots)
        if mover.wants_writer():
            mover.kick_writer()
        return first

    async def _copy(self, layer: int, index: int) -> int:
        self.stream = self.sim.new_stream()
        first, old = await self._open(layer, index), self.ids(layer, index).ravel()
        new = first + np.arange(old.size)
        try:
            await self.mover.load(old, asyncio.Lock())
        except BaseException:
            self._release(new)
            raise
        nbytes = self.mover.shapes[layer].nbytes
        copy_blocks(self.mover.addresses(old), self.mover.addresses(new), nbytes)
        self._unpin(old)
        self._release(old)
        return first

    def _contents(self, layer: int, run: Run) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """For each kv head the last filled half of a run, and the words that belong there."""
        shape = self.mover.shapes[layer]
        for head in range(shape.geometry.kv_heads):
            yield len(run.stamps) - 1, self._words(run.stamps[-1], head, shape.nbytes)

    def _words(self, stamp: int, head: int, nbytes: int) -> npt.NDArray[np.int64]:
        return np.arange(nbytes // 16, dtype=np.int64) | (stamp << 24 | head << 16)

    async def _verify(self, layer: int, columns: npt.NDArray[np.intp]) -> None:
        """Check pinned runs now, and again after a while: nobody may touch them in between."""
        ids, nbytes = self.ids(layer), self.mover.shapes[layer].nbytes
        for again in (False, True):
            addresses = self.mover.addresses(ids[:, columns])
            for head, row in enumerate(addresses):
                for address, run in zip(row.tolist(), (self.runs[layer][c] for c in columns), strict=True):
                    for part, stamp in enumerate(run.stamps):
                        want = self._words(stamp, head, nbytes)
                        found = np.frombuffer(memory(address, nbytes), np.int64)[part * want.size :][: want.size]
                        assert (found == want).all(), f"layer {layer} head {head} run {run}: found {found[:2]}, {again=}"
            if columns.size and not again:
                await self.sim.pause()
