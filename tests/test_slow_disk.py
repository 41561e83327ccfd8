"""A disk on which every read and write takes 100 times as long as usual, and on which other things go wrong as well."""

import asyncio
import contextlib
import errno
import random
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alaya_tiers import DB, engine
from alaya_tiers.errors import IOFailed, OutOfSpace
from alaya_tiers.pages import Pages, Taken
from alaya_tiers.policies import EVICTION, Guess, by_name
from alaya_tiers.seams import Numbers, SystemDisk
from alaya_tiers.testing_world import Fault, SimClock
from tests.simulation import Player, Sim, cancelled_at
from tests.test_db import TIGHT, check, continued, made, stored
from tests.test_faults import WORKS, spilled, works
from tests.tiny import generate, prompt, small_cache

SLOW = 100.0

Step = Callable[[], Coroutine[Any, Any, Any]]


def failing(rng: random.Random, reach: int = 60) -> list[Fault]:
    """Reads and writes that fail, among the first ``reach`` of each, on a disk that never does all it is asked to."""
    faults = [Fault(op, kind="short", persistent=True) for op in ("read", "write")]
    for op, error in (("read", errno.EIO), ("write", errno.EIO), ("write", errno.ENOSPC)):
        faults += [Fault(op, rng.randint(1, reach), error=error) for _ in range(3)]
    return faults


async def insist(sim: Sim, work: Step) -> int:
    """Do a step until it succeeds; how often it failed, each time with an error that says so."""
    failed = 0
    while True:
        try:
            await work()
        except (IOFailed, OutOfSpace):
            failed += 1
            assert failed <= len(sim.disk.faults), "it fails more often than the disk does"
            sim.check()
        else:
            return failed


def test_everything_takes_100_times_as_long() -> None:
    took = list[float]()
    for slow in (1.0, SLOW):
        sim = Sim(3, slow=slow)

        async def main(sim: Sim = sim) -> None:
            await sim.executor.run(lambda: None)
            await sim.disk.save("/sim/a", b"")
            took.append(sim.loop.now)

        sim.play(main())
    assert took[1] == pytest.approx(SLOW * took[0])


@pytest.mark.parametrize("part", range(8))
def test_slow_and_failing_and_cancelled_every_byte_is_right(part: int) -> None:
    """Two sequences at once, whose steps are cancelled here and there."""
    for seed in range(8 * part, 8 * part + 8):
        sim = Sim(seed, 13, 5 + seed % 3, slow=SLOW, dirty_limit=(0.0, 0.5, 1.0)[seed % 3])
        errors = list[int]()

        async def life(player: Player, rng: random.Random, sim: Sim = sim, errors: list[int] = errors) -> None:
            for _ in range(10):
                if rng.random() < 0.4:
                    await cancelled_at(rng.randint(1, 30), insist(sim, player.step))
                if rng.random() < 0.15:
                    player.crop(rng.randrange(1 + max(map(len, player.runs.values()))))
                errors.append(await insist(sim, player.step))

        async def main(sim: Sim = sim, life: Any = life) -> None:
            players = [Player(sim), Player(sim)]
            sim.disk.faults = failing(sim.rng)
            async with asyncio.TaskGroup() as group:
                for player in players:
                    group.create_task(life(player, random.Random(sim.rng.random())))
            await insist(sim, sim.flush)
            await sim.settle()
            for player in players:
                for layer in player.runs:
                    await insist(sim, lambda player=player, layer=layer: player.attend(layer))  # type: ignore[misc]
            await sim.finish(*players)

        try:
            sim.play(main())
        except BaseException as error:
            error.add_note(f"{seed=}")
            raise
        assert any(fault.hits for fault in sim.disk.faults if fault.kind == "error")
        assert all(fault.hits for fault in sim.disk.faults if fault.kind == "short")


@pytest.mark.parametrize("what", WORKS)
def test_cancelled_at_any_suspension_while_it_is_slow_and_fails(what: str) -> None:
    for seed in range(3):
        k, reached = 1, True
        while reached:
            reached = cancelled(seed, what, k)
            k += 1
        assert k > 2, "it never suspended"


def cancelled(seed: int, what: str, k: int) -> bool:
    """Cancel this at its ``k``-th suspension; whether there was one."""
    sim = Sim(seed, 6, 4, slow=SLOW)

    async def main() -> bool:
        player = await spilled(sim)
        work = works(player)[what]
        sim.disk.faults = failing(sim.rng, 12)
        reached = await cancelled_at(k, insist(sim, work))
        sim.check()
        for layer in player.runs:
            await insist(sim, lambda layer=layer: player.attend(layer))  # type: ignore[misc]
        await sim.settle()
        await insist(sim, player.step)
        await sim.finish(player)
        return reached

    try:
        return bool(sim.play(main()))
    except BaseException as error:
        error.add_note(f"{seed=} {what=} {k=}")
        raise


# ---------------------------------------------------------------------- single pages


class Everything:
    """A guess policy that wants all it is shown."""

    def sources(self, precision: object, turn: int) -> tuple[str, ...]:
        return ("last",)

    def plan(self, view: Any) -> list[Guess]:
        return [Guess("last", view)]


class Picker:
    """Picks single pages out of a player's cold blocks, as sparse attention does, and checks what it gets."""

    def __init__(self, sim: Sim, player: Player) -> None:
        self.sim, self.player, self.got = sim, player, 0
        loop = sim.loop
        clock, lru = SimClock(loop), by_name(EVICTION, "lru")
        self.pages = sim.pages = Pages(
            sim.mover, lru, Everything(), 0.5, 0.5, clock, lambda work: asyncio.run_coroutine_threadsafe(work, loop)
        )  # fmt: skip

    def guess(self, layer: int) -> None:
        """Have the pages of a layer read ahead."""
        names = self.player.ids(layer).ravel() * self.pages.per
        self.pages.suggest(lambda: self.pages.absent(names))  # type: ignore[arg-type, return-value]

    async def pick(self, layer: int) -> None:
        mover, book = self.sim.mover, self.sim.mover.ledger
        ids = self.player.ids(layer)
        heads, columns = np.nonzero(mover.pageable(ids))
        some = sorted(self.sim.rng.sample(range(heads.size), min(heads.size, 3)))
        blocks = ids[heads[some], columns[some]]
        order = np.argsort(blocks)
        book.pin(blocks)
        taken = self.pages.take(blocks[order] * self.pages.per) if blocks.size else None
        if taken is None:
            mover.give_back(book.unpin(blocks))
            return
        try:
            await ended(taken)
            for future in taken.reading:
                future.result()
            self.verify(layer, taken, heads[some][order], columns[some][order])
            await self.sim.pause()
            self.verify(layer, taken, heads[some][order], columns[some][order])
            self.got += blocks.size
        finally:
            while not all(future.done() for future in taken.reading):
                with contextlib.suppress(asyncio.CancelledError):
                    await ended(taken)
            self.pages.give(taken)
            mover.give_back(book.unpin(blocks))
            mover.changed()

    def verify(self, layer: int, taken: Taken, heads: Numbers, columns: Numbers) -> None:
        """AssertionError where a page is not that of its block."""
        player, nbytes = self.player, self.sim.mover.shapes[layer].nbytes
        for address, head, column in zip(self.pages.addresses(taken.slots), heads, columns, strict=True):
            player.verify(int(address), player.runs[layer][column], int(head), nbytes)

    def settled(self) -> None:
        pages = self.pages
        assert not pages._pins.any(), "pins of pages were left"
        assert not pages._coming.any()
        assert not pages._batches
        pages.shrink(pages.room)
        assert not (pages._frames >= 0).any(), "frames were left"


async def ended(taken: Taken) -> None:
    """Until its reads are; cancelling this cancels none of them."""
    one = asyncio.Event()
    for future in taken.reading:
        future.add_done_callback(lambda _: one.set())
    while not all(future.done() for future in taken.reading):
        one.clear()
        await one.wait()


async def picking(sim: Sim) -> Picker:
    """A picker of which most blocks are on disk only."""
    player = Player(sim)
    for _ in range(24):
        for layer in player.runs:
            await player.append(layer)
    await sim.flush()
    picker = Picker(sim, player)
    await picker.pick(0)  # there is room now
    assert picker.got
    return picker


async def finish(sim: Sim, picker: Picker) -> None:
    sim.disk.faults = []
    for layer in picker.player.runs:
        await picker.pick(layer)
        await picker.player.attend(layer)
    await picker.pages.idle()
    await sim.settle()
    picker.settled()
    await sim.finish(picker.player)


@pytest.mark.parametrize("part", range(4))
def test_pages_read_slowly_and_badly_are_right_or_an_error(part: int) -> None:
    """While whole blocks come and go."""
    seen = list[tuple[int, ...]]()
    for seed in range(8 * part, 8 * part + 8):
        sim = Sim(seed, 7, 12, slow=SLOW)

        async def main(sim: Sim = sim) -> None:
            picker = await picking(sim)
            sim.disk.faults = failing(sim.rng)

            async def picks() -> None:
                for n in range(40):
                    pick = partial(picker.pick, n % 2)
                    picker.guess(n % 2)
                    if n % 3:
                        await insist(sim, pick)
                    else:
                        await cancelled_at(sim.rng.randint(1, 4), insist(sim, pick))
                    await asyncio.sleep(sim.rng.random() * 1e-3 * SLOW)

            async def steps() -> None:
                for _ in range(4):
                    await insist(sim, picker.player.step)

            async with asyncio.TaskGroup() as group:
                group.create_task(picks())
                group.create_task(steps())
            await finish(sim, picker)
            seen.append((picker.got, *(picker.pages.use.guessed.values())))

        try:
            sim.play(main())
        except BaseException as error:
            error.add_note(f"{seed=}")
            raise
    assert np.mean([got for got, *_ in seen]) > 20
    assert any(guessed for _, *guessed in seen)


def test_picking_pages_cancelled_at_any_suspension_leaves_none_pinned() -> None:
    for seed in range(6):
        k, reached = 1, True
        while reached:
            sim = Sim(seed, 7, 12, slow=SLOW)

            async def main(sim: Sim = sim, k: int = k) -> bool:
                picker = await picking(sim)
                sim.disk.faults = failing(sim.rng, 10)
                reached = await cancelled_at(k, insist(sim, lambda: picker.pick(0)))
                await finish(sim, picker)
                return reached

            reached = sim.play(main())
            k += 1
        assert k > 2, "it never suspended"


# ---------------------------------------------------------------------- real threads and files


class SlowDisk(SystemDisk):
    """The real one; reading and writing take 100 times as long as they did."""

    @contextlib.contextmanager
    def slowly(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            time.sleep((SLOW - 1) * (time.perf_counter() - began))

    def read(self, handle: int, buffers: Sequence[memoryview], offset: int) -> int:
        with self.slowly():
            return super().read(handle, buffers, offset)

    def read_pages(self, *arguments: Any) -> Numbers:
        with self.slowly():
            return super().read_pages(*arguments)

    def write(self, handle: int, buffers: Sequence[memoryview], offset: int) -> int:
        with self.slowly():
            return super().write(handle, buffers, offset)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "SystemDisk", SlowDisk)


@pytest.mark.usefixtures("slow_disk")
def test_the_tokens_are_the_same(model: Any) -> None:
    inputs = {"input_ids": prompt()}
    want = generate(model, None, inputs)
    with small_cache(model) as cache:
        disk: Any = cache.session.engine.store.disk
        assert isinstance(disk._disk, SlowDisk)
        assert generate(model, cache, inputs).equal(want)
        stats = cache.stats()
        assert stats.read_bytes > 0
        assert stats.queues.pinned == 0


@pytest.mark.usefixtures("slow_disk")
def test_a_stored_prefix_gives_the_same_tokens(tmp_path: Path) -> None:
    model, text = made(), prompt(1, 100)
    with DB(tmp_path, **TIGHT) as db:
        stored(model, db, text)
    with DB(tmp_path, **TIGHT) as db:
        continued(model, db, torch.cat([text, prompt(1, 5)], 1), 100).close()
        check(db)
