"""Virtual time, and tiers of it: an event loop whose clock jumps, memory without bytes, a disk that only takes time."""

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch

from alaya_tiers.blocks import PAGE
from alaya_tiers.config import Settings
from alaya_tiers.seams import SystemDisk
from alaya_tiers.tiers.arena import Arena
from alaya_tiers.tiers.base import Accountant, Addresses, Slots
from alaya_tiers.tiers.ssd import LEAST_PAGES, SsdTier
from alaya_tiers.tools.profile import Profile

T = TypeVar("T")


class VirtualLoop(asyncio.BaseEventLoop):
    """Time passes only when nothing is ready, and then at once. What is ready runs in order: no chance, no threads."""

    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]
    _stopping: bool

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        while self._scheduled and (self._scheduled[0].cancelled() or not self._ready):
            timer = heapq.heappop(self._scheduled)
            if not timer.cancelled():
                self.now = max(self.now, timer.when())
                self._ready.append(timer)
        assert self._ready or self._stopping, "the simulation waits for something that never happens"
        for _ in range(len(self._ready)):
            handle = self._ready.popleft()
            if not handle.cancelled():
                handle._run()

    def _write_to_self(self) -> None:
        pass


class Memory(Arena):
    """A memory tier whose slots are all the same few bytes: it has room for any model, on any machine."""

    def __init__(self, name: str, budget: int, slot_bytes: int, accountant: Accountant) -> None:
        super().__init__(name, budget, slot_bytes, accountant, lambda n: torch.empty(0, dtype=torch.uint8))
        self._scratch = torch.zeros(slot_bytes, dtype=torch.uint8)

    def addresses(self, slots: Slots) -> Addresses:
        return np.full(slots.shape, self._scratch.data_ptr(), np.int64)


class Transfer:
    """A job of the disk: it does nothing, and ``TimedDisk`` knows how long that takes. extents: bytes of each; singly:
    many are asked for at once, as pages are."""

    def __init__(self, extents: list[int], result: Any, *, write: bool, singly: bool = False) -> None:
        self.extents, self.write, self.singly = extents, write, singly
        self._result = result

    def __call__(self) -> Any:
        return self._result


class Ssd(SsdTier):
    """The engine's own bookkeeping of the ssd tier, without files."""

    def __init__(self, settings: Settings, accountant: Accountant) -> None:
        super().__init__(
            "simulated", SystemDisk(), accountant, settings.segment_tokens, settings.io_threads, direct=True
        )

    def write_jobs(self, numbers: npt.NDArray[np.int32], offsets: Any, addresses: Addresses) -> list[Callable[[], Any]]:
        jobs: list[Callable[[], Any]] = []
        for runs in self._split(numbers, offsets, addresses):
            members = [i for run in runs for i in run.members]
            digests = np.zeros(len(members), np.uint64)
            jobs.append(Transfer([run.nbytes for run in runs], (members, digests), write=True))
        return jobs

    def read_jobs(
        self, numbers: npt.NDArray[np.int32], offsets: Any, addresses: Addresses, digests: Any
    ) -> list[Callable[[], None]]:
        split = self._split(numbers, offsets, addresses)
        return [Transfer([run.nbytes for run in runs], None, write=False) for runs in split]

    def page_jobs(
        self, numbers: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], addresses: Addresses, digests: Any = None
    ) -> list[Callable[[], None]]:
        order = np.lexsort((offsets, numbers))
        share = max(LEAST_PAGES, -(-len(order) // self._threads))
        jobs: list[Callable[[], None]] = []
        for i in range(0, len(order), share):
            some = order[i : i + share]
            joined = (np.diff(numbers[some]) == 0) & (np.diff(offsets[some]) == PAGE)
            begin = np.flatnonzero(np.append(True, ~joined))
            extents = np.diff(np.append(begin, some.size)) * PAGE
            jobs.append(Transfer(extents.tolist(), None, write=False, singly=True))
        return jobs

    def write_index(self, number: int) -> None:
        """No file, no index."""

    def remove(self, path: str) -> None:
        """There is no file."""


class TimedDisk:
    """A seams.Executor of ``threads`` threads: each transfer takes as long as a profile says, shared fairly."""

    def __init__(self, profile: Profile, threads: int) -> None:
        self._profile, self._free = profile, asyncio.Semaphore(threads)
        self._threads = threads
        self._running = 0

    async def run(self, work: Callable[[], T]) -> T:
        """The result of a job, after the time it takes."""
        if isinstance(work, Transfer):
            async with self._free:
                self._running += 1
                try:
                    await asyncio.sleep(self._seconds(work))
                finally:
                    self._running -= 1
        return work()

    def close(self) -> None:
        """Nothing is open."""

    def _seconds(self, work: Transfer) -> float:
        depth, seconds = self._running, 0.0
        if work.singly:
            sizes = np.array(work.extents)
            busy = float(np.maximum(self._profile.page, sizes / self._profile.ssd_read).sum())
            return self._profile.ssd[0].latency + busy * depth + float(sizes.sum()) / self._profile.digest
        for size in work.extents:
            known = self._profile.transfer(size, depth)
            rate = known.write if work.write else known.read
            seconds += size / rate * depth / min(depth, known.depth) + size / self._profile.digest
        return seconds


def run(loop: VirtualLoop, work: Any) -> Any:
    """The result of a coroutine; the loop is closed afterwards, whatever happens."""
    try:
        return cast("Any", loop.run_until_complete(work))
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
