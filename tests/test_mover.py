"""The mover, one behaviour at a time; and the contracts of tiers, policies and indexes on every implementation."""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import numpy as np
import pytest

from alaya_tiers.blocks import PAGE
from alaya_tiers.devices.cpu import plain_slab
from alaya_tiers.errors import AlayaError, BudgetTooSmall, IOFailed
from alaya_tiers.policies import EvictionPolicy, Lru, Scan, Window
from alaya_tiers.testing import EvictionPolicyTests, MemoryTierTests
from alaya_tiers.testing_world import Fault
from alaya_tiers.tiers.arena import Arena
from alaya_tiers.tiers.base import Accountant, MemoryTier
from alaya_tiers.tiers.device import DeviceTier
from alaya_tiers.tiers.host import HostTier
from tests.simulation import Player, Sim


class TestDeviceTier(MemoryTierTests):
    def make(self, accountant: Accountant, budget: int) -> MemoryTier:
        return DeviceTier(budget, self.slot_bytes, accountant)


class TestHostTier(MemoryTierTests):
    def make(self, accountant: Accountant, budget: int) -> MemoryTier:
        return HostTier(budget, self.slot_bytes, accountant)


class TestHostTierOfManySlabs(MemoryTierTests):
    slots, slot_bytes = 5, 8 << 20

    def make(self, accountant: Accountant, budget: int) -> MemoryTier:
        return HostTier(budget, self.slot_bytes, accountant)


class TestArenaOfLanes(MemoryTierTests):
    def make(self, accountant: Accountant, budget: int) -> MemoryTier:
        return Arena("host", budget, self.slot_bytes, accountant, plain_slab, slab_bytes=3 * self.slot_bytes, lanes=2)


def test_lanes_of_an_arena_lie_together() -> None:
    books = Accountant({"index": 2000})
    arena = Arena("index", 2000, 100, books, plain_slab, slab_bytes=700, lanes=3)
    starts = []
    for _ in range(2):
        slots = arena.take(3)
        assert slots is not None
        starts.append(arena.addresses(slots))
    assert (np.diff(starts, axis=0) == 100).all(), "the second run of each head is behind its first"
    assert (np.diff(starts[0]) == 200).all()
    last = arena.take(1)
    assert last is not None
    assert arena.addresses(last)[0] == starts[0][0] + 600, "what is left of a slab"
    arena.close()


class TestLru(EvictionPolicyTests):
    def make(self) -> EvictionPolicy:
        return Lru()


class TestScan(EvictionPolicyTests):
    def make(self) -> EvictionPolicy:
        return Scan()


class TestWindow(EvictionPolicyTests):
    def make(self) -> EvictionPolicy:
        return Window(32)


# ---------------------------------------------------------------------- the mover


def run(sim: Sim, body: Callable[[Sim], Coroutine[Any, Any, None]]) -> None:
    sim.play(body(sim))


async def filled(sim: Sim, runs: int, layer: int = 0) -> Player:
    """A player with ``runs`` sealed runs in one layer, written as far as there was a need."""
    player = Player(sim)
    for _ in range(2 * runs):
        await player.append(layer)
    await sim.settle()
    return player


async def cooled(sim: Sim, runs: int, layer: int = 0) -> Player:
    """The same with everything that left the device clean."""
    player = await filled(sim, runs, layer)
    await sim.mover.flush()
    await sim.settle()
    return player


def cold(sim: Sim, player: Player, layer: int = 0) -> list["np.ndarray[Any, Any]"]:
    """The runs of a layer that are on disk only, as block ids."""
    return [ids for ids in player.ids(layer).T if not sim.mover.ledger.readable(ids).any()]


def test_device_slots_come_from_the_blocks_the_window_gives_up() -> None:
    async def body(sim: Sim) -> None:
        player = await filled(sim, 4)  # 8 blocks fill the device
        book = sim.mover.ledger
        slots = sim.mover.try_device(2)
        assert slots is not None
        assert (book.host[player.ids(0)[:, 1]] >= 0).all(), "the oldest run after the sink leaves first"
        assert (book.device[player.ids(0)[:, [0, 2, 3]]] >= 0).all()
        sim.device.give(slots)
        await sim.finish(player)

    run(Sim(0, 8, 8, sink_tokens=16), body)


def test_no_device_slots_before_the_host_has_room() -> None:
    async def body(sim: Sim) -> None:
        player = await filled(sim, 4)
        held = []
        while (slots := sim.mover.try_device(2)) is not None:
            held.append(slots)
        assert 1 <= len(held) <= 2, "the host holds two runs"
        assert sim.device.free == 0
        assert sim.mover.traffic.written_bytes == 0
        held.append(await sim.mover.device_room(2))
        assert sim.mover.traffic.written_bytes > 0
        for slots in held:
            sim.device.give(slots)
        await sim.finish(player)

    run(Sim(0, 8, 4, dirty_limit=1.0), body)


def test_open_blocks_that_fill_the_device_are_a_small_budget() -> None:
    async def body(sim: Sim) -> None:
        player = Player(sim)
        await player.append(0)
        await player.append(1)
        with pytest.raises(BudgetTooSmall) as caught:
            sim.mover.try_device(2)
        assert (caught.value.tier, caught.value.budget, caught.value.smallest) == ("device", 4 * PAGE, 5 * PAGE)
        assert sim.device.free == 1
        await sim.finish(player)

    run(Sim(0, 4, 4), body)


def test_host_slots_are_all_or_nothing_and_never_dirty_or_pinned_ones() -> None:
    async def body(sim: Sim) -> None:
        player = await cooled(sim, 8)
        book = sim.mover.ledger
        clean = book.droppable_ids()
        assert clean.size > 2
        book.pin(clean[:2])
        free = sim.host.free
        assert sim.mover.try_host(free + clean.size - 1) is None
        assert sim.host.free == free, "something was dropped for nothing"
        assert book.droppable_ids().size == clean.size - 2
        slots = sim.mover.try_host(free + clean.size - 2)
        assert slots is not None
        assert (book.host[clean[:2]] >= 0).all()
        sim.host.give(slots)
        player.unpin(clean[:2])
        await sim.finish(player)

    run(Sim(0, 4, 8), body)


def test_loads_of_one_gate_get_their_room_in_order() -> None:
    """However the disk answers: run n is in memory before run n + 1 may take the last slots."""

    async def body(sim: Sim) -> None:
        player = await cooled(sim, 9)
        runs, gate, done = cold(sim, player), asyncio.Lock(), list[int]()

        async def load(n: int) -> None:
            await sim.mover.load(runs[n], gate)
            done.append(n)

        tasks = [asyncio.get_running_loop().create_task(load(n)) for n in range(len(runs))]
        for n in range(len(runs)):
            await tasks[n]  # would hang if later runs had taken what this one needs
            await sim.pause()
            player.unpin(runs[n], used=True)
        assert len(done) == len(runs) > 3
        await sim.finish(player)

    for seed in range(10):
        run(Sim(seed, 4, 4), body)


def test_loads_of_different_gates_all_get_there() -> None:
    async def body(sim: Sim) -> None:
        player = await cooled(sim, 9)
        runs = cold(sim, player)

        async def use(ids: "np.ndarray[Any, Any]") -> None:
            await sim.mover.load(ids, asyncio.Lock())
            await sim.pause()
            assert sim.mover.ledger.readable(ids).all()
            player.unpin(ids, used=True)

        async with asyncio.TaskGroup() as group:
            for ids in runs * 3:
                group.create_task(use(ids))
        await sim.finish(player)

    for seed in range(10):
        run(Sim(seed, 4, 4), body)


def test_a_block_two_ask_for_is_read_once() -> None:
    async def body(sim: Sim) -> None:
        player = await cooled(sim, 9)
        ids = cold(sim, player)[0]
        before = sim.mover.traffic.read_bytes
        await asyncio.gather(*(sim.mover.load(ids, asyncio.Lock()) for _ in range(3)))
        assert sim.mover.traffic.read_bytes - before == ids.size * PAGE
        for _ in range(3):
            player.unpin(ids)
        await sim.finish(player)

    run(Sim(0, 4, 8), body)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_whoever_shared_a_read_that_failed_reads_again(n: int) -> None:
    async def body(sim: Sim) -> None:
        player = await cooled(sim, 9)
        ids = cold(sim, player)[0]
        sim.disk.faults = [Fault("read", n)]
        loads = [sim.mover.load(ids, asyncio.Lock()) for _ in range(3)]
        results = await asyncio.gather(*loads, return_exceptions=True)
        failed = [r for r in results if r is not None]
        assert all(isinstance(r, IOFailed) for r in failed)
        assert len(failed) <= 1, "one bad read failed those who could have read again"
        for _ in range(3 - len(failed)):
            player.unpin(ids)
        await sim.finish(player)

    run(Sim(0, 4, 8), body)


def test_a_failed_read_ahead_does_not_let_later_loads_starve_earlier_ones() -> None:
    """A load that waits for a block being read ahead must find room again when that read fails."""

    async def body(sim: Sim) -> None:
        player = await cooled(sim, 9)
        runs, gate = cold(sim, player), asyncio.Lock()
        sim.disk.slow = 20.0
        await sim.mover.load(runs[0], gate)
        player.unpin(runs[0], used=True)
        sim.disk.faults = [Fault("read")]
        sim.mover.kick_reader(runs[1])
        await asyncio.sleep(0)
        tasks = [asyncio.get_running_loop().create_task(sim.mover.load(ids, gate)) for ids in runs[1:4]]
        failed = 0
        for task, ids in zip(tasks, runs[1:4], strict=True):
            try:
                await task
            except IOFailed:
                failed += 1  # under some seeds it meets the fault itself
                continue
            await sim.pause()
            player.unpin(ids, used=True)
        assert failed + (not sim.disk.faults[0].hits) <= 1
        await sim.finish(player)

    for seed in range(20):
        run(Sim(seed, 4, 4, prefetch_share=1.0), body)


def test_reading_ahead_never_drops_what_was_read_ahead_and_not_used() -> None:
    async def body(sim: Sim) -> None:
        player = await cooled(sim, 16)
        book, runs = sim.mover.ledger, cold(sim, player)
        book.begin_pass(0)
        for ids in runs[:4]:  # fill the host with blocks used in this pass
            await sim.mover.load(ids, asyncio.Lock())
            player.unpin(ids, used=True)
        book.touch(book.droppable_ids())
        sim.mover.kick_reader(np.concatenate(runs[4:6]))
        await sim.settle()
        ahead = np.flatnonzero(book.ahead)
        assert ahead.tolist() == np.sort(np.concatenate(runs[4:6])).tolist(), "there was room to read two runs ahead"
        sim.mover.kick_reader(np.concatenate(runs[6:]))
        await sim.settle()
        assert (book.host[ahead] >= 0).all(), "what waits to be used was dropped"
        assert np.count_nonzero(book.ahead) <= sim.host.capacity // 2
        await sim.finish(player)

    run(Sim(0, 4, 8, prefetch_share=0.5), body)


@pytest.mark.parametrize("how", ["dropped sequence", "failed read"])
def test_what_was_read_ahead_in_vain_does_not_count_for_ever(how: str) -> None:
    async def body(sim: Sim) -> None:
        player = await cooled(sim, 9)
        book, runs = sim.mover.ledger, cold(sim, player)
        book.begin_pass(0)
        for ids in runs[:2]:
            await sim.mover.load(ids, asyncio.Lock())
            player.unpin(ids, used=True)
        if how == "failed read":
            sim.disk.faults = [Fault("read", persistent=True)]
        sim.mover.kick_reader(runs[2])
        await sim.settle()
        if how == "dropped sequence":
            assert book.ahead[runs[2]].all()
            player.crop(0)
        assert not book.ahead.any(), "room for reading ahead leaks"
        sim.disk.faults = []
        await sim.finish(player)

    run(Sim(0, 4, 4, prefetch_share=1.0), body)


def test_closing_ends_what_was_started_a_moment_ago_and_never_ran() -> None:
    """A task that is cancelled before its first step runs no line of its own: it waits for nobody."""

    async def body(sim: Sim) -> None:
        player = await cooled(sim, 9)
        sim.mover.kick_reader(cold(sim, player)[0])
        sim.mover.kick_writer()
        await sim.mover.close()

    run(Sim(0, 4, 4, prefetch_share=1.0), body)


def test_reading_ahead_gives_way_to_whoever_waits() -> None:
    async def body(sim: Sim) -> None:
        player = await cooled(sim, 12)
        runs, gate = cold(sim, player), asyncio.Lock()
        for ids in runs[:2]:
            await sim.mover.load(ids, gate)
        waiting = asyncio.get_running_loop().create_task(sim.mover.load(runs[2], gate))
        await sim.pause()
        sim.mover.ledger.touch(runs[0])
        player.unpin(runs[0], used=True)
        sim.mover.kick_reader(np.concatenate(runs[3:6]))
        await waiting
        assert not sim.mover.ledger.ahead.any()
        for ids in runs[1:3]:
            player.unpin(ids)
        await sim.finish(player)

    run(Sim(0, 4, 4, prefetch_share=1.0), body)


@pytest.mark.parametrize(("limit", "written"), [(0.0, 6), (0.5, 2), (0.75, 0), (1.0, 0)])
def test_write_behind_keeps_the_dirty_share_below_the_mark(limit: float, written: int) -> None:
    async def body(sim: Sim) -> None:
        player = await filled(sim, 5)  # 4 blocks on the device, 6 in the host
        await sim.settle()
        book = sim.mover.ledger
        assert np.count_nonzero(book.file >= 0) == written
        assert sim.mover.traffic.stalls == 0
        await sim.finish(player)

    run(Sim(0, 4, 8, dirty_limit=limit), body)


def test_flush_writes_everything_once() -> None:
    async def body(sim: Sim) -> None:
        player = await filled(sim, 5)
        await asyncio.gather(sim.mover.flush(), sim.mover.flush())
        assert not sim.mover.ledger.dirty_ids().size
        wrote = sim.mover.traffic.written_bytes
        await sim.mover.flush()
        assert sim.mover.traffic.written_bytes == wrote == 6 * PAGE
        await sim.finish(player)

    run(Sim(0, 4, 8, dirty_limit=1.0), body)


def test_write_out_writes_what_it_is_asked_to_wherever_it_is() -> None:
    """Blocks of the device tier go down as there is room, pinned ones when they are let go; others may wait."""

    async def body(sim: Sim) -> None:
        player, left = await filled(sim, 5), list[int]()
        ids, book = player.ids(0)[:, :-1].ravel(), sim.mover.ledger
        held = ids[book.device[ids] >= 0]
        assert held.size, "nothing is in the device tier"
        book.pin(held)
        writing = asyncio.get_running_loop().create_task(sim.mover.write_out(ids, left.append))
        await asyncio.sleep(100)
        assert not writing.done()
        player.unpin(held)
        await writing
        assert (book.file[ids] >= 0).all()
        assert left[0] >= left[-1] == 0
        await player.attend(0)
        await sim.finish(player)

    run(Sim(0, 4, 8, dirty_limit=1.0), body)


def test_a_failed_write_leaves_the_blocks_dirty_and_is_told_once() -> None:
    async def body(sim: Sim) -> None:
        player = await filled(sim, 5)
        sim.disk.faults = [Fault("write", persistent=True)]
        with pytest.raises(IOFailed):
            await sim.mover.flush()
        assert sim.mover.ledger.dirty_ids().size == 6
        assert sim.accountant.used["ssd"] == 0
        sim.disk.faults = []
        await sim.mover.flush()
        await player.attend(0)
        await sim.finish(player)

    run(Sim(0, 4, 8, dirty_limit=1.0), body)


def test_what_dies_while_the_writer_is_about_to_write_it_is_not_written() -> None:
    """Between choosing what to write and writing it, a sequence may end and its ids be used again."""

    async def body(sim: Sim) -> None:
        doomed, other = await cooled(sim, 6), Player(sim)
        player = await filled(sim, 5)
        assert sim.mover.ledger.dirty_ids().size
        doomed.crop(0)
        assert sim.mover.garbage, "files to remove, which the writer does after it chose what to write"
        sim.disk.slow = 50.0
        flush = asyncio.get_running_loop().create_task(sim.mover.flush())
        await asyncio.sleep(1e-3)
        player.crop(0)
        for _ in range(4):
            await other.append(0)
        await flush
        sim.check()
        await other.attend(0)
        await sim.finish(player, other)

    for seed in range(5):
        run(Sim(seed, 6, 12, dirty_limit=1.0), body)


def test_flush_does_not_mind_what_dies_meanwhile() -> None:
    """A sequence ends, and its files go, while another's flush is about to publish them."""

    async def body(sim: Sim) -> None:
        player, doomed = await filled(sim, 5), await filled(sim, 5, 1)
        flush = asyncio.get_running_loop().create_task(sim.mover.flush())
        await asyncio.sleep(sim.rng.random() * 0.02)
        doomed.crop(0)
        if sim.mover.wants_writer():
            sim.mover.kick_writer()
        await flush
        await player.attend(0)
        await sim.finish(player)

    for seed in range(60):
        run(Sim(seed, 4, 16, dirty_limit=1.0), body)


def test_a_file_is_removed_when_nothing_lives_in_it() -> None:
    async def body(sim: Sim) -> None:
        player = await cooled(sim, 12)
        assert sim.disk.files
        await sim.finish(player)
        assert not sim.disk.files
        assert not sim.disk.handles

    run(Sim(0, 4, 8), body)


def test_new_blocks_of_an_old_place_outlive_the_removal_of_its_file() -> None:
    """The later runs of a segment die, and its file with them, while the first is about to be written there."""

    async def body(sim: Sim) -> None:
        player = await filled(sim, 4)  # of one segment; the sink leaves the device last
        book = sim.mover.ledger
        assert sim.mover.demote(player.ids(0, 1).ravel()[:6])
        await sim.mover.flush()
        first = player.ids(0)[:, 0]
        assert sim.mover.demote(first)
        sim.mover._flushing = True
        sim.mover.kick_writer()
        for _ in range(sim.rng.randrange(4)):
            await asyncio.sleep(0)
        player.crop(1)
        await sim.settle()
        sim.mover._flushing = False
        await sim.mover.flush()
        if sim.mover.wants_writer():
            sim.mover.kick_writer()
        await sim.settle()
        slots = book.dropped(first)
        sim.host.give(slots)
        sim.ssd._handles.close()
        await player.attend(0)
        await sim.finish(player)

    for seed in range(40):
        try:
            run(Sim(seed, 8, 12, dirty_limit=1.0), body)
        except BaseException as error:
            error.add_note(f"{seed=}")
            raise


def test_a_waiter_sleeps_while_writes_cannot_help() -> None:
    """The ssd budget is used up and the host full: one failure is enough until something changes."""

    async def body(sim: Sim) -> None:
        player = await filled(sim, 2)
        ids = player.ids(0)[:, 0]
        sim.mover.ledger.pin(ids)  # as attention does while it computes
        waiting = asyncio.get_running_loop().create_task(full(player))
        await asyncio.sleep(1)
        before = sim.loop.turns
        await asyncio.sleep(1)
        assert sim.loop.turns - before < 100, "the writer is started over and over to fail"
        player.unpin(ids)
        with pytest.raises(AlayaError):
            await waiting
        player.crop(0)
        await sim.finish(player)

    async def full(player: Player) -> None:
        while True:
            await player.append(0)

    sim = Sim(0, 4, 4, ssd_budget=PAGE)
    sim.loop.most_turns = 20_000
    run(sim, body)


def test_content_of_a_layer_with_smaller_blocks_is_kept_too() -> None:
    async def body(sim: Sim, layer: int) -> None:
        player = await cooled(sim, 9, layer)
        await player.attend(layer)
        await sim.finish(player)

    for layer in (0, 1):
        run(Sim(layer, 4, 4), partial(body, layer=layer))
