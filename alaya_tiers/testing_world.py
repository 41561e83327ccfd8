"""The whole pipeline in one thread, on a virtual clock, over a simulated disk: the same way every time for a seed.

VirtualLoop      an event loop whose time jumps to the next timer and whose ready queue is served in a seeded order
SimExecutor      threads that are timers: work runs, and reports, some virtual time after it was asked for
SimDisk          files in memory, with faults planned by operation and number
"""

import asyncio
import contextlib
import errno
import heapq
import os
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from alaya_tiers.blocks import PAGE
from alaya_tiers.seams import Numbers, read_each

T = TypeVar("T")


class Hang(AssertionError):
    """Nothing is ready, no timer is set, and the awaited work is not done: it would wait forever."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Time passes only when nothing is ready; what is ready runs in an order that ``rng`` picks.

    But tasks start in the order they were made: that one asyncio promises.
    """

    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]
    _stopping: bool

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng, self.now, self.turns = rng, 0.0, 0
        self._starting = False
        self._starts: deque[asyncio.Handle] = deque()
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

    def abandon(self) -> None:
        """Cancel what still runs, for as long as it takes to end it, and close."""
        self.most_turns = self.turns + 10_000
        while tasks := asyncio.all_tasks(self):
            for task in tasks:
                task.cancel()
            with contextlib.suppress(Hang):
                self.run_until_complete(asyncio.wait(tasks))
        self.close()

    def create_task(self, coro: Any, **kwargs: Any) -> Any:
        self._starting = True
        try:
            return super().create_task(coro, **kwargs)
        finally:
            self._starting = False

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:  # type: ignore[override]
        handle = super().call_soon(callback, *args, context=context)
        if self._starting:
            self._starts.append(handle)
        return handle

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
            if handle in self._starts:
                self._ready.append(handle)
                handle = self._starts.popleft()
                self._ready.remove(handle)
            if not handle.cancelled():
                handle._run()
        elif not self._stopping:
            raise Hang(f"nothing can happen any more, at {self.now:.3f} s")

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

    op: open, read, write, close, load, save, remove, claim, fetch, sync or rename. kind: "error" raises ``error``;
    "short" does part of a read or write; "flip" changes one bit of what is read.
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
    """A seams.Disk in memory. space: bytes it has room for, None = any. An unlinked file lives on in its handles.

    slow: how many times as long as usual everything takes, on a SimExecutor.
    """

    def __init__(self, rng: random.Random, space: int | None = None, trace: Callable[[object], object] = id) -> None:
        self.files: dict[str, SimFile] = {}
        self.faults: list[Fault] = []
        self.space, self.slow = space, 1.0
        self._rng, self._trace = rng, trace
        self.handles: dict[int, tuple[SimFile, bool]] = {}
        self._next = 3
        self.claimed: dict[int, str] = {}
        self.leased: dict[int, tuple[str, bool]] = {}

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

    def read_pages(
        self,
        handles: npt.NDArray[np.int32],
        offsets: Numbers,
        first: Numbers,
        addresses: Numbers,
        page: int,
        depth: int = 0,
    ) -> Numbers:
        return read_each(self, handles, offsets, first, addresses, page)

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
        self.claimed.pop(handle, None)
        self.leased.pop(handle, None)

    async def load(self, path: str) -> bytes:
        await self._later("load", path)
        if path not in self.files:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return bytes(self.files[path].data)

    async def save(self, path: str, data: bytes) -> None:
        await self._later("save", path)
        self.files[path] = SimFile(bytearray(data), set(range(-(-len(data) // PAGE))))

    def remove(self, path: str) -> None:
        self._op("remove", path)
        for name in [n for n in self.files if n == path or n.startswith(f"{path}/")]:
            del self.files[name]

    def free_bytes(self, path: str) -> int:
        return (1 << 40) if self.space is None else self.space - self.used

    def claim(self, path: str) -> int:
        self._op("claim", path)
        if path in self.claimed.values():
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)
        self._next += 1
        self.handles[self._next], self.claimed[self._next] = (SimFile(), False), path
        return self._next

    def lease(self, path: str, *, shared: bool) -> int:
        self._op("lease", path)
        if path not in self.files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if any(name == path and not (shared and theirs) for name, theirs in self.leased.values()):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)
        self._next += 1
        self.handles[self._next], self.leased[self._next] = (self.files[path], False), (path, shared)
        return self._next

    def names(self, path: str) -> list[str]:
        below = (name.removeprefix(f"{path}/") for name in self.files if name.startswith(f"{path}/"))
        return sorted({name.partition("/")[0] for name in below})

    def fetch(self, path: str, most: int) -> bytes:
        self._op("fetch", path)
        if path not in self.files:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if len(self.files[path].data) > most:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
        return bytes(self.files[path].data)

    def expect(self, path: str, offset: int, nbytes: int) -> None:
        """It has no cache."""

    def sync(self, path: str) -> None:
        self._op("sync", path)

    def rename(self, old: str, new: str) -> None:
        self._op("rename", (old, new))
        self.files[new] = self.files.pop(old)

    def resolve(self, path: str) -> str:
        return path

    @property
    def used(self) -> int:
        """Bytes of pages taken."""
        return PAGE * sum(len(file.pages) for file in self.files.values())

    async def _later(self, op: str, path: str) -> None:
        await asyncio.sleep(self._rng.random() * 1e-4 * self.slow)
        self._op(op, path)

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
