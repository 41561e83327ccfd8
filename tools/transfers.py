"""Blocks read and written through our own SSD tier, beside the same requests made by nothing but preadv and pwritev."""

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from alaya_tiers.blocks import BlockShape, Geometry
from alaya_tiers.config import format_bytes
from alaya_tiers.loop import LoopThread
from alaya_tiers.seams import SystemDisk, Threads
from alaya_tiers.tiers.base import Accountant
from alaya_tiers.tiers.host import HostTier
from alaya_tiers.tiers.ssd import SsdTier
from alaya_tiers.tools.rawdisk import transfer

ROW = 512
"""Bytes of a token's key and value."""

BATCH = 8 << 20
"""What is asked for at a time, as by the engine."""

HUGE = 2 << 20

MOST = 4096
"""Requests of one measurement."""

IN_ORDER, AT_RANDOM = "read, in order", "read, at random"

Say = Callable[[str], None]
Order = npt.NDArray[np.int64]


@dataclass(slots=True)
class Transfer:
    """Reads or writes of one size and depth, in bytes a second of each round: ours, and plain ones."""

    what: str
    size: int
    depth: int
    ours: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios: neighbours in time, for the disk is not ours alone."""
        return statistics.median(a / b for a, b in zip(self.ours, self.plain, strict=True))


class Blocks:
    """Blocks of one size in an SSD tier of their own, and slots of memory for one of each."""

    def __init__(self, directory: Path, size: int, depth: int, nbytes: int, *, direct: bool) -> None:
        count, self.size, self.depth = nbytes // size, size, depth
        shape = BlockShape(Geometry(1, 64, 64, torch.float32), size // ROW)
        books = Accountant({"host": count * size, "ssd": None})
        self._host = HostTier(count * size, size, books)
        self._ssd = SsdTier(str(directory), SystemDisk(), books, count * shape.tokens, depth, direct=direct)
        self._pool, self._loop = Threads(depth, "bench-io"), LoopThread("bench-loop")
        slots = self._host.take(count)
        assert slots is not None
        self._addresses = self._host.addresses(slots)
        chance = np.random.default_rng(size)
        for slot in slots.tolist():
            self._host.tensor(slot).copy_(torch.from_numpy(chance.integers(0, 256, size, np.uint8)))
        places = [self._ssd.place(0, shape, 0, i * shape.tokens, 0) for i in range(count)]
        self._files = np.array([number for number, _ in places], np.int32)
        self._offsets = np.array([offset for _, offset in places], np.int64)
        self._digests = np.zeros(count, np.uint64)

    @property
    def path(self) -> str:
        """The one file they are in."""
        return self._ssd.files[0].path

    def write(self) -> float:
        """Bytes a second of writing all, in order."""
        return self._timed(np.arange(len(self._files)), self._write)

    def read(self, order: Order) -> float:
        """Bytes a second of reading these."""
        return self._timed(order, self._read)

    def close(self) -> None:
        """Give everything back."""

        async def nothing() -> None: ...

        self._loop.close(nothing)
        self._pool.close()
        self._ssd.close()
        self._host.close()

    def _timed(self, order: Order, move: Callable[[Order], Any]) -> float:
        began = time.perf_counter()
        self._loop.run(self._all(order, move))
        return order.size * self.size / (time.perf_counter() - began)

    async def _all(self, order: Order, move: Callable[[Order], Any]) -> None:
        """Batch by batch, two of them on their way."""
        gate, batch = asyncio.Semaphore(2), max(1, BATCH // self.size)

        async def one(some: Order) -> None:
            async with gate:
                await move(some)

        await asyncio.gather(*(one(order[i : i + batch]) for i in range(0, order.size, batch)))

    async def _read(self, some: Order) -> None:
        jobs = self._ssd.read_jobs(self._files[some], self._offsets[some], self._addresses[some], self._digests[some])
        await asyncio.gather(*(self._pool.run(job) for job in jobs))

    async def _write(self, some: Order) -> None:
        jobs = self._ssd.write_jobs(self._files[some], self._offsets[some], self._addresses[some])
        for which, digests in await asyncio.gather(*(self._pool.run(job) for job in jobs)):
            self._digests[some[which]] = digests


def transfers(
    directory: Path, sizes: list[int], depths: list[int], nbytes: int, rounds: int, *, direct: bool, say: Say
) -> Iterator[Transfer]:
    """Writes in order, reads in order and at random, for every size and depth. Raises StoreError, OSError."""
    for size in sizes:
        for depth in depths:
            say(f"{format_bytes(size)} x {depth}")
            with (
                tempfile.TemporaryDirectory(dir=directory) as folder,
                closing(Blocks(Path(folder) / "tier", size, depth, nbytes, direct=direct)) as blocks,
            ):
                yield from _transfers(blocks, Path(folder) / "plain", nbytes // size, rounds, direct=direct)


def _transfers(blocks: Blocks, beside: Path, count: int, rounds: int, *, direct: bool) -> Iterator[Transfer]:
    size, depth, first = blocks.size, blocks.depth, np.arange(min(count, MOST))
    written = Transfer("write", size, depth)
    for _ in range(rounds):  # the first into new files, the others over what is there
        written.ours.append(blocks.write())
        written.plain.append(transfer(beside, first * size, size, depth, direct=direct, write=True).rate)
    yield written
    apart = np.random.default_rng(0).permutation(np.arange(0, count, 2))  # no two are neighbours, to be read as one
    for what, order in ((IN_ORDER, first), (AT_RANDOM, apart[:MOST])):
        found = Transfer(what, size, depth)
        for _ in range(rounds):
            _forget(blocks.path, direct=direct)
            found.ours.append(blocks.read(order))
            _forget(blocks.path, direct=direct)
            found.plain.append(transfer(Path(blocks.path), order * size, size, depth, direct=direct).rate)
        yield found


def _forget(path: str, *, direct: bool) -> None:
    """Have the system forget what it holds of a file."""
    if not direct:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
