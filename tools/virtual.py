"""Virtual time, and tiers of it: an event loop whose clock jumps, memory without bytes, a disk that only takes time."""

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
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

TICK = 1e-12
"""Seconds that are none."""


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
    many are asked for at once, as pages are; begins: it is the first of a batch that somebody asked for."""

    def __init__(
        self, extents: list[int], result: Any, *, write: bool, singly: bool = False, begins: bool = False
    ) -> None:
        self.extents, self.write, self.singly, self.begins = extents, write, singly, begins
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
        return [
            Transfer([run.nbytes for run in runs], None, write=False, begins=not number)
            for number, runs in enumerate(split)
        ]

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
            jobs.append(Transfer(extents.tolist(), None, write=False, singly=True, begins=not i))
        return jobs

    def write_index(self, number: int) -> None:
        """No file, no index."""

    def remove(self, path: str) -> None:
        """There is no file."""


@dataclass(slots=True)
class _Job:
    """left: seconds of what the disk does with many transfers at once. alone: times that, how fast it is alone."""

    left: float
    alone: float
    done: "asyncio.Future[None]"


class TimedDisk:
    """A seams.Executor of ``threads`` threads: transfers share what a profile says the disk does, and take turns for
    what a batch costs beside it."""

    def __init__(self, profile: Profile, threads: int) -> None:
        self._profile, self._free = profile, asyncio.Semaphore(threads)
        self._jobs: list[_Job] = []
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def run(self, work: Callable[[], T]) -> T:
        """The result of a job, after the time it takes."""
        if isinstance(work, Transfer):
            async with self._free:
                await self._served(work)
        return work()

    def close(self) -> None:
        """Nothing is open."""

    async def _served(self, work: Transfer) -> None:
        loop = asyncio.get_running_loop()
        seconds, alone = self._seconds(work)
        self._advance(loop.time())
        job = _Job(seconds, alone, loop.create_future())
        self._jobs.append(job)
        self._wait(loop)
        await job.done

    def _speed(self, job: _Job) -> float:
        return 1 / len(self._jobs) if len(self._jobs) > 1 else job.alone

    def _advance(self, now: float) -> None:
        for job in self._jobs:
            job.left -= (now - self._since) * self._speed(job)
        self._since = now

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if self._jobs:
            first = min(job.left / self._speed(job) for job in self._jobs)
            self._timer = loop.call_at(self._since + max(0.0, first), self._ended, loop)

    def _ended(self, loop: asyncio.AbstractEventLoop) -> None:
        self._advance(loop.time())
        for job in [job for job in self._jobs if job.left <= TICK]:
            self._jobs.remove(job)
            if not job.done.done():
                job.done.set_result(None)
        self._wait(loop)

    def _seconds(self, work: Transfer) -> tuple[float, float]:
        """Seconds among many transfers at once, and how much faster it is alone."""
        known, sizes = self._profile, np.array(work.extents)
        beside = known.load * work.begins + float(sizes.sum()) / known.digest
        if work.singly:
            return beside + known.ssd[0].latency + float(np.maximum(known.page, sizes / known.ssd_read).sum()), 1.0
        many, alone = (
            beside + float((sizes / known.rates_of(work.extents, deep=deep, write=work.write)).sum())
            for deep in (True, False)
        )
        return many, many / alone


def run(loop: VirtualLoop, work: Any) -> Any:
    """The result of a coroutine; the loop is closed afterwards, whatever happens."""
    try:
        return cast("Any", loop.run_until_complete(work))
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
