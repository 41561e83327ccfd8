"""The depth of page reads follows what the disk gives; on disks whose rates are known, the same way every time."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from alaya_tiers.blocks import PAGE
from alaya_tiers.depth import DEPTHS, ENOUGH, PROBE, USUAL, Depth
from alaya_tiers.errors import ConfigError
from alaya_tiers.seams import SystemDisk
from alaya_tiers.tiers.files import aligned
from alaya_tiers.tiers.queue import Queue
from alaya_tiers.tools.depths import ADAPTED, measure

MANY = 1024

Curve = Callable[[int], float]
"""Reads a second at a depth."""


def knee(at: int, beyond: float = 1.0) -> Curve:
    """As fast as there are reads under way up to ``at``; from there on the same, or less for each doubling."""
    return lambda depth: 1000.0 * min(depth, at) * (beyond ** np.log2(max(1, depth / at)))


def run(state: Depth, curve: Curve, batches: int, rng: random.Random, noise: float, n: int = MANY) -> Depth:
    for _ in range(batches):
        depth = state.choose(n)
        assert depth in DEPTHS
        state = state.observe(depth, n, 4 * n, 4 * n / (curve(depth) * rng.lognormvariate(0, noise)))
    return state


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("at", DEPTHS)
def test_it_settles_at_the_smallest_depth_that_reads_as_fast(at: int, noise: float) -> None:
    for seed in range(20):
        state = run(Depth(), knee(at), 60, random.Random(seed), noise)
        if noise:
            assert at / 2 <= state.depth <= 2 * at
        else:
            assert state.depth == at


def test_longer_lines_that_are_slower_are_left() -> None:
    assert run(Depth(), knee(16, 0.8), 60, random.Random(0), 0.05).depth == 16


def test_a_batch_that_was_disturbed_moves_nothing() -> None:
    state = run(Depth(), knee(64), 60, random.Random(0), 0)
    slow = state.observe(64, MANY, 4 * MANY, 100.0)
    assert slow.observe(128, MANY, 4 * MANY, 1e-6).depth == state.depth == 64


@pytest.mark.parametrize(("before", "after"), [(16, 128), (128, 16), (64, 8), (8, 256)])
def test_a_disk_that_changes_moves_it(before: int, after: int) -> None:
    state = run(Depth(), knee(before), 60, random.Random(0), 0)
    assert state.depth == before
    assert run(state, knee(after), 600, random.Random(0), 0).depth == after


def test_what_is_spent_on_trying_is_bounded() -> None:
    """In the long run, on a disk with its knee at 64: what is lost to a neighbour that is half as fast."""
    state, curve, seconds, batches = Depth(), knee(64), 0.0, 500
    for _ in range(batches):
        depth = state.choose(MANY)
        took = MANY / curve(depth)
        seconds += took
        state = state.observe(depth, MANY, MANY, took)
    assert seconds <= batches * MANY / curve(64) * (1 + 1 / PROBE)


def test_small_batches_teach_nothing() -> None:
    state = Depth()
    for n in (1, 64, 2 * USUAL - 1):
        assert state.choose(n) == USUAL
        assert state.observe(USUAL, n, 4 * n, 1e-9) is state
    assert state.observe(USUAL, MANY, MANY, 0.0) is state


def test_a_depth_is_tried_only_by_batches_that_can_tell() -> None:
    state = run(Depth(), knee(256), 300, random.Random(0), 0, n=150)
    assert state.depth == 64
    assert {replace(state, seen=n).choose(150) for n in range(4 * PROBE)} == {32, 64}


def test_enough_is_a_share_of_the_best() -> None:
    rates = dict(zip(DEPTHS, (1.0, 2.0, ENOUGH * 4 + 0.01, 3.9, 4.0, 4.0), strict=True))
    assert run(Depth(), rates.__getitem__, 60, random.Random(0), 0).depth == 32


# ---------------------------------------------------------------------- batches of jobs


class Hand:
    """A clock that is set."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def batch(queue: Queue, clock: Hand, jobs: int, each: int, seconds: float, *, whole: bool = True) -> None:
    """Jobs side by side, that end one after the other and all took ``seconds`` together."""
    reading = queue.batch(jobs, each)
    began = clock.now
    for job in range(jobs):
        clock.now = began
        with reading.reading() as reads:
            reads.n, reads.whole = each, whole or job > 0
            clock.now = began + seconds * (job + 1) / jobs


def test_a_batch_is_judged_when_all_its_jobs_have_ended() -> None:
    clock = Hand()
    queue = Queue(clock)
    batch(queue, clock, 4, MANY, 2.0)
    assert [rate for some in queue._known.rates for rate in some] == [4 * MANY / 2.0]
    batch(queue, clock, 4, MANY, 1.0, whole=False)
    assert queue._known.seen == 1, "one of its reads failed"


def test_a_fixed_depth_stays() -> None:
    clock = Hand()
    queue = Queue(clock, 5)
    for _ in range(20):
        assert queue.batch(4, MANY).depth == queue.depth == queue.usual == 5
        batch(queue, clock, 4, MANY, 1.0)
    assert queue._known == Depth()


@pytest.mark.parametrize("depth", [1, 7, 64, 255, 256, 1000])
def test_any_depth_reads_the_same(tmp_path: Path, depth: int) -> None:
    n, disk = 700, SystemDisk()
    data = np.random.default_rng(0).integers(0, 256, (n, PAGE), np.uint8)
    path = tmp_path / "file"
    path.write_bytes(data.tobytes())
    room = aligned(n * PAGE)
    handle = disk.open(str(path), create=False, direct=False)
    try:
        order = np.random.default_rng(1).permutation(n)
        where = room.ctypes.data + np.arange(n) * PAGE
        files = np.full(n, handle, np.int32)
        done = disk.read_pages(files, order * PAGE, np.arange(n + 1), where, PAGE, depth)
    finally:
        disk.close(handle)
    assert (done == PAGE).all()
    assert np.array_equal(room.reshape(n, PAGE), data[order])


def test_the_measurement_runs(tmp_path: Path) -> None:
    rates, depth = measure(tmp_path, 4 << 20, 100, 2, 2)
    assert list(rates) == [*map(str, DEPTHS), ADAPTED]
    assert all(len(some) == 2 and min(some) > 0 for some in rates.values())
    assert depth == USUAL
    with pytest.raises(ConfigError, match="--pages"):
        measure(tmp_path, 1 << 20, 257, 2, 2)
