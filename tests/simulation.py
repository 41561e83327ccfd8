"""A mover on a virtual loop, and sequences that check every byte they read: the model the pipeline is tested by."""

import asyncio
import contextlib
import random
import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from alaya_tiers.attention import copy_blocks
from alaya_tiers.blocks import PAGE, BlockShape, Geometry
from alaya_tiers.config import Settings
from alaya_tiers.ledger import Ids
from alaya_tiers.mover import Mover, Policies
from alaya_tiers.pages import Pages
from alaya_tiers.policies import EVICTION, PREFETCH, EvictionView, Watermark, Window, by_name
from alaya_tiers.seams import memory
from alaya_tiers.testing_world import SimClock, SimDisk, SimExecutor, VirtualLoop
from alaya_tiers.tiers.base import Accountant, Slots
from alaya_tiers.tiers.device import DeviceTier
from alaya_tiers.tiers.host import HostTier
from alaya_tiers.tiers.queue import Queue
from alaya_tiers.tiers.ssd import SsdTier

POISON = 0xDB

T = TypeVar("T")


class _Poisoned:
    """A memory tier that overwrites what it gets back, and notices when somebody wrote there before the next take."""

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
    """A mover on a virtual loop. device, host: slots of one page; shapes: of the layers; slow: see SimDisk."""

    def __init__(
        self,
        seed: int,
        device: int = 6,
        host: int = 4,
        *,
        shapes: dict[int, BlockShape] = LAYERS,
        space: int | None = None,
        slow: float = 1.0,
        **settings: Any,
    ) -> None:
        self.rng = random.Random(seed)
        self.loop = VirtualLoop(self.rng)
        self._trace = xxhash.xxh3_64()
        self.disk = SimDisk(self.rng, space, self.note)
        self.disk.slow = slow
        self.executor = SimExecutor(self.rng, self.disk)
        base = {"block_tokens": 16, "segment_tokens": 64, "sink_tokens": 16, "batch_bytes": 2 * PAGE, "io_threads": 2}
        s = self.settings = Settings(device_budget=device * PAGE, host_budget=host * PAGE, **(base | settings))
        limits = {"device": s.device_budget, "host": s.host_budget, "ssd": s.ssd_budget}
        books = self.accountant = Accountant(limits)
        policies = Policies(
            Traced(Window(s.sink_tokens), self.note),
            Traced(by_name(EVICTION, s.eviction_of_blocks), self.note),
            Traced(by_name(PREFETCH, s.prefetch), self.note),
            Traced(Watermark(s.dirty_limit), self.note),
        )
        queue = Queue(SimClock(self.loop))
        self.ssd = SsdTier("/sim", self.disk, books, s.segment_tokens, s.io_threads, direct=True, queue=queue)
        self.device = PoisonedDevice(s.device_budget, PAGE, books)
        self.host = PoisonedHost(s.host_budget, PAGE, books)
        self.mover = Mover(s, policies, self.device, self.host, self.ssd, self.executor, self._publish)
        self.mover.shapes.update(shapes)
        self.stamps = self.streams = 0
        self.published: list[int] = []
        self.pages: Pages | None = None
        """Of the mover, if a test made some."""

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

    async def flush(self) -> None:
        """What Engine.flush does: write everything, and publish every file that something lives in."""
        await self.mover.flush()
        for number, file in enumerate(self.ssd.files):
            if file.live and not (file.full and number in self.published):
                await self.mover.publish(number)

    async def pause(self) -> None:
        """Some virtual time, as attention takes."""
        await asyncio.sleep(self.rng.expovariate(1) * 1e-3)

    def check(self) -> None:
        """The books agree with each other and no budget is exceeded."""
        book = self.mover.ledger
        book.check_integrity()
        frames = 0 if self.pages is None else int(np.count_nonzero(self.pages._frames >= 0))
        for tier, held in ((self.device, book.device), (self.host, book.host)):
            more = frames if tier is self.host else 0
            assert tier.used == np.count_nonzero(held >= 0) + more, f"{tier.name}: slots taken and held differ"
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

    def play(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``, the last thing that happens here."""
        try:
            return cast("T", self.loop.run(work))
        finally:
            self.close()

    def close(self) -> None:
        """Free everything: loop, tiers and handles. After a failure, only the loop."""
        try:
            if asyncio.all_tasks(self.loop):
                return
            self.loop.run(self.mover.close())
            for tier in (self.device, self.host, self.ssd):
                tier.close()
            assert not self.disk.handles, "handles were left open"
            assert not any(self.accountant.used.values()), "bytes were left charged"
        finally:
            self.loop.abandon()

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
            self.unpin(resident, used=True)
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
                    self.unpin(ids[:, columns].ravel(), used=True)
        finally:
            while loading := [task for _, task in running if not task.done()]:
                with contextlib.suppress(asyncio.CancelledError):  # it ends when they have
                    await asyncio.wait(loading)
            for columns, task in running:
                if not task.cancelled() and task.exception() is None:
                    self.unpin(ids[:, columns].ravel())

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

    def unpin(self, ids: Ids, *, used: bool = False) -> None:
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
        self.unpin(old)
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
        addresses = self.mover.addresses(ids[:, columns])
        for again in (False, True):
            for head, row in enumerate(addresses):
                for address, run in zip(row.tolist(), (self.runs[layer][c] for c in columns), strict=True):
                    self.verify(address, run, head, nbytes)
            if columns.size and not again:
                await self.sim.pause()

    def verify(self, address: int, run: Run, head: int, nbytes: int) -> None:
        """AssertionError where what lies there is not the block of a run."""
        for part, stamp in enumerate(run.stamps):
            want = self._words(stamp, head, nbytes)
            found = np.frombuffer(memory(address, nbytes), np.int64)[part * want.size :][: want.size]
            assert (found == want).all(), f"head {head} run {run}: found {found[:2]}"


@types.coroutine
def interrupted(work: Coroutine[Any, Any, Any], k: int) -> Generator[Any, Any, bool]:
    """Await ``work`` in the present task, cancelling that task at the ``k``-th suspension; whether there was one."""
    task = asyncio.current_task()
    assert task is not None
    suspensions, thrown = 0, None
    while True:
        try:
            future = work.send(None) if thrown is None else work.throw(thrown)
        except StopIteration:
            return suspensions >= k
        suspensions += 1
        if suspensions == k:
            task.cancel()
        thrown = None
        try:
            yield future
        except BaseException as error:
            thrown = error


async def cancelled_at(k: int, work: Coroutine[Any, Any, Any]) -> bool:
    """Run ``work`` in a task of its own, cancelled at its ``k``-th suspension; whether it got that far."""

    async def body() -> bool:
        return bool(await interrupted(work, k))

    task = asyncio.get_running_loop().create_task(body())
    result = (await asyncio.gather(task, return_exceptions=True))[0]
    if isinstance(result, asyncio.CancelledError):
        return True
    if isinstance(result, BaseException):
        raise result
    return result
