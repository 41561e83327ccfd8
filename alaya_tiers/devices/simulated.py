"""A device that is late and unforgiving: for tests, over plain memory, the same way every time for the same seed.

Copies happen late, in an order the seed decides, which respects only the order within a stream and the events it waits
for. Until a copy happened its target holds POISON (NaNs in every dtype), and its source must not change. What is copied
down the CPU sees when it has seen an event done that comes after it, not before. Kernels give their result at once, as
the program goes on with it; that they may still be running is what the clocks are for:

Every byte access is stamped with a vector clock (the CPU and each stream). Two accesses of a page of which one writes
are a Race unless one happened before the other by stream order, an event waited for, or an event the CPU saw done. So a
wait that is missing is found whether or not this run's order would have shown it.
"""

import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers.attention import BlockList, Partial
from alaya_tiers.devices.base import COMPUTE, DOWN, STREAMS, Addresses, Ask, Event, Hits, Scanning
from alaya_tiers.devices.cpu import Cpu, plain_slab

POISON = 0xFF
GRAIN = 4096
"""Bytes whose accesses are told apart: slots are at least so large, and aligned to it."""

CPU_CLOCK = STREAMS
NAMES = ("compute", "down", "up", "the CPU")

Clock = npt.NDArray[np.int64]


class Race(AssertionError):
    """Two accesses of the same memory that nothing orders."""


@dataclass(eq=False)
class _Mark:
    """An event: reached when its stream's queue has come to it."""

    stream: int
    clock: Clock
    ask: Callable[["_Mark"], bool]
    reached: bool = False
    forced: bool = False
    """All before it has taken effect, whether it is reached or not."""

    def done(self) -> bool:
        return self.ask(self)


@dataclass(eq=False)
class _Copy:
    source: Tensor
    target: Tensor
    was: Tensor | None
    """What the source held when the copy was asked for; None if that was still to come."""
    unseen: int = 0
    """The tick of DOWN that the CPU must have seen to see what was copied; 0 where it does not look."""
    happened: bool = False


@dataclass(eq=False)
class _Wait:
    mark: _Mark


_Entry = _Copy | _Mark | _Wait


@dataclass
class _Grain:
    """Who touched a page last: (clock index, tick) of its write, and of reads since by clock index."""

    write: tuple[int, int] = (CPU_CLOCK, 0)
    reads: dict[int, int] = field(default_factory=dict)


class Simulated(Cpu):
    """See above. ``races`` lists what was raised, for when it was raised where nobody looked.

    eagerness: chance, after each call, that one more thing happens. The smaller, the later everything is.
    """

    on_cpu = False

    def __init__(self, seed: int, *, eagerness: float = 0.8) -> None:
        self._rng, self._eagerness = random.Random(seed), eagerness
        self._lock = threading.RLock()
        self._queues: list[deque[_Entry]] = [deque() for _ in range(STREAMS)]
        self._clocks: list[Clock] = [np.zeros(STREAMS + 1, np.int64) for _ in range(STREAMS + 1)]
        self._grains: dict[int, _Grain] = {}
        self._unseen: list[tuple[int, Tensor, Tensor]] = []
        self.races: list[str] = []
        self.copies = self.waits = 0

    # ------------------------------------------------------------------ Device
    def scratch(self, nbytes: int) -> Tensor:
        return plain_slab(-(-nbytes // GRAIN) * GRAIN)[:nbytes]  # pages of its own

    def copy(self, stream: int, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        with self._lock:
            clock = self._tick(stream)
            for source, target in zip(sources, targets, strict=True):
                self._touch(stream, clock, _pages(source), write=False)
                self._touch(stream, clock, _pages(target), write=True)
                coming = any(isinstance(e, _Copy) and e.target.data_ptr() == source.data_ptr() for e in self._pending())
                unseen = int(clock[DOWN]) if stream == DOWN else 0
                self._queues[stream].append(_Copy(source, target, None if coming else source.clone(), unseen))
                target.fill_(POISON)
                self.copies += 1
            self._some_steps()

    def record(self, stream: int) -> Event:
        with self._lock:
            mark = _Mark(stream, self._clocks[stream].copy(), self._asked)
            self._queues[stream].append(mark)
            return mark

    def wait(self, stream: int, event: Event) -> None:
        with self._lock:
            assert isinstance(event, _Mark)
            np.maximum(self._clocks[stream], event.clock, out=self._clocks[stream])
            self._queues[stream].append(_Wait(event))
            self.waits += 1

    def write_rows(self, k: Tensor, v: Tensor, addresses: Addresses) -> None:
        nbytes = k.shape[1] * (k.shape[2] + v.shape[2]) * k.element_size()
        with self._kernel((), _ranges(addresses, nbytes)):
            super().write_rows(k, v, addresses)

    def fill(self, targets: Sequence[Tensor]) -> None:
        with self._kernel((), [page for target in targets for page in _pages(target)]):
            super().fill(targets)

    def attend(
        self,
        q: Tensor,
        blocks: BlockList,
        scale: float,
        lo: npt.NDArray[np.int32],
        hi: npt.NDArray[np.int32],
        softcap: float | None,
        top: Tensor | None = None,
    ) -> Partial:
        with self._kernel(_block_pages(blocks), ()):
            return super().attend(q, blocks, scale, lo, hi, softcap, top)

    def attend_lists(
        self,
        q: Tensor,
        addresses: Addresses,
        first: npt.NDArray[np.int64],
        dims: tuple[int, int],
        dtype: torch.dtype,
        scale: float,
        softcap: float | None,
    ) -> Partial:
        with self._kernel(_ranges(addresses, sum(dims) * dtype.itemsize), ()):
            return super().attend_lists(q, addresses, first, dims, dtype, scale, softcap)

    def gather(self, blocks: BlockList, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        with self._kernel(_block_pages(blocks), ()):
            return super().gather(blocks, lo, hi)

    def scan(self, ask: Ask) -> Scanning | None:
        pages = _ranges(ask.blocks, ask.nbytes)
        with self._kernel(pages, ()):
            begun = super().scan(ask)
        assert begun is not None
        return _Scan(self, begun, pages)

    def settle(self) -> None:
        with self._lock:
            while any(self._queues):
                self._step()
            for clock in self._clocks[:STREAMS]:
                self._seen(clock)

    # ------------------------------------------------------------------ inside
    def _pending(self) -> "Iterator[_Entry]":
        return (entry for queue in self._queues for entry in queue)

    def _kernel(self, reads: Iterable[int], writes: Iterable[int]) -> "_Running":
        return _Running(self, reads, writes)

    def begin_kernel(self, reads: Iterable[int], writes: Iterable[int]) -> None:
        """Stamp a kernel's accesses, and have happened all it comes after. The lock is held until ``end_kernel``."""
        self._lock.acquire()
        try:
            clock = self._tick(COMPUTE)
            self._touch(COMPUTE, clock, reads, write=False)
            self._touch(COMPUTE, clock, writes, write=True)
            self._force(self._queues[COMPUTE])
        except BaseException:
            self._lock.release()
            raise

    def end_kernel(self) -> None:
        """The result is there."""
        self._some_steps()
        self._lock.release()

    def _tick(self, who: int) -> Clock:
        clock = self._clocks[who]
        np.maximum(clock, self._clocks[CPU_CLOCK], out=clock)  # what the CPU launches comes after what it saw
        clock[who] += 1
        return clock

    def _touch(self, who: int, clock: Clock, pages: Iterable[int], *, write: bool) -> None:
        for page in pages:
            grain = self._grains.setdefault(page, _Grain())
            before = [grain.write, *grain.reads.items()] if write else [grain.write]
            for other, tick in before:
                if other != who and clock[other] < tick:
                    what = f"{NAMES[who]} {'writes' if write else 'reads'} page {page:#x}"
                    self.races.append(f"{what}, which {NAMES[other]} may still be using")
                    raise Race(self.races[-1])
            if write:
                grain.write, grain.reads = (who, int(clock[who])), {}
            else:
                grain.reads[who] = int(clock[who])

    def _asked(self, mark: _Mark) -> bool:
        with self._lock:
            self._some_steps()
            if mark.reached:
                self._seen(mark.clock)
            return mark.reached

    def _seen(self, clock: Clock) -> None:
        """The CPU knows that all up to this has happened."""
        known = self._clocks[CPU_CLOCK]
        np.maximum(known, clock, out=known)
        for tick, target, data in self._unseen:
            if tick <= known[DOWN]:
                target.copy_(data)
        self._unseen = [entry for entry in self._unseen if entry[0] > known[DOWN]]

    def _some_steps(self) -> None:
        while any(self._queues) and self._rng.random() < self._eagerness:
            self._step()

    def _step(self) -> None:
        """One thing happens, in a stream that does not wait."""
        ready = [queue for queue in self._queues if queue and not _blocked(queue[0])]
        self._happen(self._rng.choice(ready))

    def _force(self, queue: "deque[_Entry]", until: "_Mark | None" = None) -> None:
        """What a stream was told takes effect, and what that waits for. That its events are reached comes later."""
        for entry in queue:
            if entry is until:
                break
            if isinstance(entry, _Copy):
                self._copied(entry)
            elif isinstance(entry, _Wait) and not entry.mark.forced:
                entry.mark.forced = True
                self._force(self._queues[entry.mark.stream], entry.mark)

    def _happen(self, queue: "deque[_Entry]") -> None:
        entry = queue.popleft()
        if isinstance(entry, _Mark):
            entry.reached = entry.forced = True
        elif isinstance(entry, _Copy):
            self._copied(entry)

    def _copied(self, entry: _Copy) -> None:
        if entry.happened:
            return
        entry.happened = True
        if entry.was is not None and not torch.equal(entry.source, entry.was):
            self.races.append("memory changed before a copy had read it")
            raise Race(self.races[-1])
        if entry.unseen > self._clocks[CPU_CLOCK][DOWN]:
            self._unseen.append((entry.unseen, entry.target, entry.source.clone()))
        else:
            entry.target.copy_(entry.source)


class _Scan:
    """Both halves of a scan are kernels that read the codes."""

    def __init__(self, device: Simulated, begun: Scanning, pages: list[int]) -> None:
        self._device, self._begun, self._pages = device, begun, pages

    def best(self) -> npt.NDArray[np.int32]:
        return self._begun.best()

    def finish(self, start: Tensor) -> None:
        with _Running(self._device, self._pages, ()):
            self._begun.finish(start)

    def found(self) -> Hits:
        return self._begun.found()


class _Running:
    """A kernel that is being launched."""

    def __init__(self, device: Simulated, reads: Iterable[int], writes: Iterable[int]) -> None:
        self._device, self._reads, self._writes = device, reads, writes

    def __enter__(self) -> None:
        self._device.begin_kernel(self._reads, self._writes)

    def __exit__(self, *exception: object) -> None:
        self._device.end_kernel()


def _blocked(entry: _Entry) -> bool:
    return isinstance(entry, _Wait) and not entry.mark.reached


def _pages(memory: Tensor) -> range:
    start = memory.data_ptr()
    return range(start // GRAIN, -(-(start + memory.numel()) // GRAIN))


def _ranges(addresses: Addresses, nbytes: npt.NDArray[np.int64] | int) -> list[int]:
    """The pages of memory ranges."""
    sizes = np.broadcast_to(np.asarray(nbytes, np.int64), addresses.shape).ravel()
    starts = addresses.ravel()[sizes > 0]
    first, last = starts // GRAIN, (starts + sizes[sizes > 0] - 1) // GRAIN
    pages: set[int] = set()
    for a, b in zip(first.tolist(), last.tolist(), strict=True):
        pages.update(range(a, b + 1))
    return sorted(pages)


def _block_pages(blocks: BlockList) -> list[int]:
    return _ranges(blocks.addresses, blocks.counts.astype(np.int64) * blocks.row_bytes)
