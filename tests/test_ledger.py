"""The ledger against a model of plain objects, under random histories."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from alaya_tiers.ledger import NOTHING, Freed, Ledger


@dataclass
class Block:
    """What the ledger should say of one block."""

    id: int
    layer: int
    head: int
    start: int
    device: int | None
    host: int | None = None
    file: int | None = None
    busy: str = ""
    refs: int = 1
    pins: int = 0
    sealed: bool = False
    ahead: bool = False
    used: int = 0

    @property
    def living(self) -> bool:
        return bool(self.refs or self.pins or self.busy)


@dataclass
class Slots:
    """A tier: hands out the lowest free number."""

    taken: set[int] = field(default_factory=set)

    def take(self, n: int) -> list[int]:
        new = [i for i in range(len(self.taken) + n) if i not in self.taken][:n]
        self.taken |= set(new)
        return new

    def give(self, slots: list[int]) -> None:
        assert set(slots) <= self.taken
        self.taken -= set(slots)


def array(values: list[int], dtype: type = np.int64) -> "np.ndarray[Any, Any]":
    return np.array(values, dtype)


class LedgerMachine(RuleBasedStateMachine):
    """Every event on some blocks that may have it."""

    def __init__(self) -> None:
        super().__init__()
        self.book = Ledger()
        self.blocks: dict[int, Block] = {}
        self.dead: set[int] = set()
        self.device, self.host, self.files = Slots(), Slots(), Slots()
        self.tick = 0

    def some(self, data: st.DataObject, *, which: Any) -> list[Block]:
        """One or more distinct blocks that ``which`` holds for, in any order; none when there are none."""
        candidates = [b for b in self.blocks.values() if which(b)]
        return data.draw(st.lists(st.sampled_from(candidates), min_size=1, unique_by=id)) if candidates else []

    def reap(self, freed: Freed) -> None:
        """What the event freed is what the model frees."""
        dead = [b for b in self.blocks.values() if not b.living]
        for tier, slots, place in (
            (self.device, freed.device, "device"),
            (self.host, freed.host, "host"),
            (self.files, freed.file, "file"),
        ):
            expected = [getattr(b, place) for b in dead if getattr(b, place) is not None]
            assert sorted(slots.tolist()) == sorted(expected)
            tier.give(expected)
        for b in dead:
            del self.blocks[b.id]
            self.dead.add(b.id)

    # ------------------------------------------------------------------ life
    @rule(heads=st.integers(1, 4), layer=st.integers(0, 2), start=st.integers(0, 100))
    def opened(self, heads: int, layer: int, start: int) -> None:
        slots = self.device.take(heads)
        first = self.book.opened(layer, 7, start, array(slots, np.int32))
        for head, slot in enumerate(slots):
            assert first + head not in self.blocks, "the id of a living block was given out again"
            self.dead.discard(first + head)
            self.blocks[first + head] = Block(first + head, layer, head, start, slot, used=self.tick)

    @rule(heads=st.integers(1, 4))
    def opened_and_gone_cold(self, heads: int) -> None:
        """A short cut to where the interesting events start."""
        self.opened(heads, 1, 5)
        blocks = list(self.blocks.values())[-heads:]
        ids = array([b.id for b in blocks])
        slots, files = self.host.take(heads), self.files.take(heads)
        self.book.seal(ids)
        self.device.give(self.book.demoted(ids, array(slots, np.int32)).tolist())
        self.book.writing(ids, array(files, np.int32), array([0] * heads))
        assert self.book.written(ids, array([0] * heads, np.uint64)) is NOTHING
        self.host.give(self.book.dropped(ids).tolist())
        for b, file in zip(blocks, files, strict=True):
            b.sealed, b.device, b.file = True, None, file

    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        blocks = self.some(data, which=lambda b: b.device is not None and b.refs)
        self.book.seal(array([b.id for b in blocks]))
        for b in blocks:
            b.sealed = True

    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        blocks = self.some(data, which=lambda b: b.refs)
        self.book.retain(array([b.id for b in blocks]))
        for b in blocks:
            b.refs += 1

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = self.some(data, which=lambda b: b.refs)
        for b in blocks:
            b.refs -= 1
        self.reap(self.book.release(array([b.id for b in blocks])))

    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        blocks = self.some(data, which=lambda b: b.refs)
        self.book.pin(array([b.id for b in blocks]))
        for b in blocks:
            b.pins += 1

    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        blocks = self.some(data, which=lambda b: b.pins)
        for b in blocks:
            b.pins -= 1
        self.reap(self.book.unpin(array([b.id for b in blocks])))

    # ------------------------------------------------------------------ moves
    @rule(data=st.data())
    def demoted(self, data: st.DataObject) -> None:
        blocks = self.some(data, which=lambda b: b.device is not None and b.sealed and not b.pins and b.refs)
        slots = self.host.take(len(blocks))
        freed = self.book.demoted(array([b.id for b in blocks]), array(slots, np.int32))
        assert freed.tolist() == [b.device for b in blocks]
        for b, slot in zip(blocks, slots, strict=True):
            self.device.give([b.device if b.device is not None else -1])
            b.device, b.host = None, slot

    @rule(data=st.data())
    def writing(self, data: st.DataObject) -> None:
        blocks = self.some(data, which=lambda b: b.host is not None and b.file is None and not b.busy and b.refs)
        files = self.files.take(len(blocks))
        self.book.writing(array([b.id for b in blocks]), array(files, np.int32), array([0] * len(blocks)))
        for b, file in zip(blocks, files, strict=True):
            b.file, b.busy = file, "writing"

    @rule(data=st.data(), ok=st.booleans())
    def wrote(self, data: st.DataObject, ok: bool) -> None:
        blocks = self.some(data, which=lambda b: b.busy == "writing")
        ids = array([b.id for b in blocks])
        for b in blocks:
            b.busy = ""
        if ok:
            freed = self.book.written(ids, array([b.id + 1000 for b in blocks], np.uint64))
        else:
            for b in blocks:
                self.files.give([b.file if b.file is not None else -1])
                b.file = None
            freed = self.book.unwritten(ids)
        self.reap(freed)

    @rule(data=st.data(), ahead=st.booleans())
    def fetching(self, data: st.DataObject, ahead: bool) -> None:
        cold = lambda b: b.file is not None and b.host is None and b.device is None and not b.busy and b.refs  # noqa: E731
        blocks = self.some(data, which=cold)
        slots = self.host.take(len(blocks))
        self.book.fetching(array([b.id for b in blocks]), array(slots, np.int32), ahead=ahead)
        for b, slot in zip(blocks, slots, strict=True):
            b.host, b.busy, b.ahead = slot, "fetching", ahead

    @rule(data=st.data(), ok=st.booleans())
    def fetched(self, data: st.DataObject, ok: bool) -> None:
        blocks = self.some(data, which=lambda b: b.busy == "fetching")
        ids = array([b.id for b in blocks])
        for b in blocks:
            b.busy = ""
        if ok:
            for b in blocks:
                b.used = self.book.pass_tick - 1
            self.reap(self.book.fetched(ids))
        else:
            slots, freed = self.book.unfetched(ids)
            assert slots.tolist() == [b.host for b in blocks]
            self.host.give(slots.tolist())
            for b in blocks:
                b.host, b.ahead = None, False
            self.reap(freed)

    @rule(data=st.data())
    def dropped(self, data: st.DataObject) -> None:
        clean = lambda b: b.host is not None and b.file is not None and not b.busy and not b.pins  # noqa: E731
        blocks = self.some(data, which=clean)
        slots = self.book.dropped(array([b.id for b in blocks]))
        assert slots.tolist() == [b.host for b in blocks]
        self.host.give(slots.tolist())
        for b in blocks:
            b.host, b.ahead = None, False

    # ------------------------------------------------------------------ use
    @rule(layer=st.integers(0, 2))
    def begin_pass(self, layer: int) -> None:
        self.book.begin_pass(layer)
        self.tick += 1

    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        blocks = self.some(data, which=lambda b: b.refs)
        self.book.touch(array([b.id for b in blocks]))
        for b in blocks:
            b.used, b.ahead = self.tick, False

    # ------------------------------------------------------------------ what must never be let through
    @precondition(lambda self: self.dead)
    @rule(data=st.data())
    def dead_blocks_stay_dead(self, data: st.DataObject) -> None:
        ids = array([data.draw(st.sampled_from(sorted(self.dead)))])
        with pytest.raises(AssertionError):
            self.book.retain(ids)

    # ------------------------------------------------------------------ facts
    @invariant()
    def agrees(self) -> None:
        book, blocks = self.book, list(self.blocks.values())
        book.check_integrity()
        ids = array([b.id for b in blocks])
        assert book.device[ids].tolist() == [-1 if b.device is None else b.device for b in blocks]
        assert book.host[ids].tolist() == [-1 if b.host is None else b.host for b in blocks]
        assert book.file[ids].tolist() == [-1 if b.file is None else b.file for b in blocks]
        for name in ("refs", "pins", "sealed", "layer", "head", "start", "used", "ahead"):
            assert getattr(book, name)[ids].tolist() == [getattr(b, name) for b in blocks], name
        readable = [b.device is not None or (b.host is not None and b.busy != "fetching") for b in blocks]
        assert book.readable(ids).tolist() == readable
        assert book.coming(ids).tolist() == [b.busy == "fetching" for b in blocks]
        self.same(book.alive(), lambda b: b.refs)
        self.same(book.demotable_ids(), lambda b: b.device is not None and b.sealed and not b.pins)
        self.same(
            book.droppable_ids(), lambda b: b.host is not None and b.file is not None and not b.busy and not b.pins
        )
        self.same(book.dirty_ids(), lambda b: b.host is not None and b.file is None and not b.busy and b.refs)
        assert (np.diff(book.used[book.dirty_ids()]) >= 0).all(), "dirty blocks come oldest first"
        assert book.pinned_count() == sum(b.pins > 0 for b in blocks)
        assert book.writing_count() == sum(b.busy == "writing" for b in blocks)
        assert book.fetching_count() == sum(b.busy == "fetching" for b in blocks)
        assert np.count_nonzero(book.ahead) == sum(b.ahead for b in blocks), "dead blocks count as read ahead"

    def same(self, ids: "np.ndarray[Any, Any]", which: Any) -> None:
        assert sorted(ids.tolist()) == sorted(b.id for b in self.blocks.values() if which(b))


LedgerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=60)
TestLedger = LedgerMachine.TestCase


def one(book: Ledger, heads: int = 2, first_slot: int = 0) -> "np.ndarray[Any, Any]":
    first = book.opened(0, 0, 0, array(list(range(first_slot, first_slot + heads)), np.int32))
    return first + np.arange(heads)


def test_counts_never_go_below_zero() -> None:
    book = Ledger()
    ids = one(book)
    with pytest.raises(AssertionError, match="unpinned more often"):
        book.unpin(ids)
    book = Ledger()
    ids = one(book)
    book.release(ids)
    with pytest.raises(AssertionError, match="released more often"):
        book.release(ids)
    with pytest.raises(AssertionError, match="dead"):
        book.retain(ids)


def test_a_dead_block_cannot_be_pinned() -> None:
    """A pin of a dead block would, when it ends, give its ids out a second time."""
    book = Ledger()
    ids = one(book)
    book.release(ids)
    with pytest.raises(AssertionError):
        book.pin(ids)


def test_moves_of_the_wrong_blocks_are_refused() -> None:
    book = Ledger()
    ids = one(book)
    with pytest.raises(AssertionError, match="open block"):
        book.demoted(ids, array([0, 1], np.int32))
    book.seal(ids)
    book.demoted(ids, array([0, 1], np.int32))
    with pytest.raises(AssertionError):
        book.demoted(ids, array([2, 3], np.int32))
    with pytest.raises(AssertionError):
        book.dropped(ids)
    with pytest.raises(AssertionError):
        book.fetching(ids, array([2, 3], np.int32))
    book.writing(ids, array([0, 0], np.int32), array([0, 4096]))
    with pytest.raises(AssertionError):
        book.writing(ids, array([0, 0], np.int32), array([0, 4096]))
    with pytest.raises(AssertionError):
        book.dropped(ids)
    book.written(ids, array([1, 2], np.uint64))
    book.pin(ids[:1])
    with pytest.raises(AssertionError):
        book.dropped(ids)


def test_ids_of_dead_groups_are_used_again_and_only_whole_groups() -> None:
    book = Ledger()
    first, second = one(book, 2), one(book, 2, 2)
    assert book.release(first[:1]).device.tolist() == [0]
    third = one(book, 2, 4)
    assert not set(third) & {*first, *second}, "half a group was reused"
    book.release(first[1:])
    assert one(book, 3, 6)[0] not in first, "a group of another size took it"
    assert one(book, 2, 9).tolist() == first.tolist()
    book.check_integrity()


def test_the_book_grows_and_forgets_nothing() -> None:
    book = Ledger()
    groups = [one(book, 3, 3 * n) for n in range(1000)]
    assert len({int(i) for g in groups for i in g}) == 3000
    book.check_integrity()
    for group in groups:
        book.release(group)
    assert not book.alive().size
    size = book.device.size
    for n in range(1000):
        one(book, 3, 3 * n)
    assert book.device.size == size, "dead ids were not reused"


def test_adopted_blocks_are_cold_and_die_like_others() -> None:
    book = Ledger()
    starts, files = np.array([0, 16, 32]), np.array([7, 7, 8], np.int32)
    offsets, digests = np.arange(6).reshape(2, 3) * 4096, np.arange(6, dtype=np.uint64).reshape(2, 3)
    first = book.adopted(5, starts, files, offsets, digests)
    ids = first + np.arange(2)[:, None]
    assert book.sealed[ids].all()
    assert not book.readable(ids.ravel()).any()
    assert (book.file[ids] == files).all()
    assert (book.offset[ids] == offsets).all()
    assert (book.digest[ids] == digests).all()
    assert (book.start[ids] == starts).all()
    assert book.head[ids].tolist() == [[0] * 3, [1] * 3]
    book.check_integrity()
    book.fetching(ids[:, 1], np.array([3, 4], np.int32))
    book.fetched(ids[:, 1])
    freed = book.release(ids.ravel())
    assert sorted(freed.file.tolist()) == [7] * 4 + [8] * 2
    assert freed.host.tolist() == [3, 4]
    assert not book.alive().size
    again = one(book, 2)
    assert set(again.tolist()) <= set(ids.ravel().tolist()), "dead ids were not reused"
    book.check_integrity()


def test_nothing_freed_is_nothing() -> None:
    book = Ledger()
    ids = one(book)
    book.pin(ids)
    assert book.release(ids) is NOTHING
    assert book.unpin(ids).device.tolist() == [0, 1]


def test_what_attention_reads_counts_and_fades() -> None:
    """Two layers, a pass of each a step: 16 steps later a use counts half."""
    book = Ledger()
    old, new = one(book), one(book, first_slot=2)
    book.begin_pass(1)
    book.touch(old)
    for _ in range(31):
        book.begin_pass(0)
    book.begin_pass(1)
    book.touch(new)
    assert book.heat[new] == pytest.approx(2 * book.heat[old])
    before = book.heat[new] / book.heat[old]
    for _ in range(100 * 32):
        book.begin_pass(0)
    third = one(book, first_slot=4)
    book.touch(third)
    assert book.heat.max() == book.heat[third].max() < 1e30, "all counts were scaled before they grew too large"
    assert book.heat[new] / book.heat[old] == pytest.approx(before)


def test_uses_are_counted_since_it_came() -> None:
    book = Ledger()
    ids = one(book)
    book.seal(ids)
    book.touch(ids)
    book.demoted(ids, array([0, 1], np.int32))
    assert (book.uses[ids].tolist(), book.returned[ids].tolist()) == ([0, 0], [False, False])
    book.touch(ids[:1])
    book.writing(ids, array([0, 0], np.int32), array([0, 4096]))
    book.written(ids, array([1, 2], np.uint64))
    book.dropped(ids)
    book.fetching(ids, array([2, 3], np.int32))
    book.fetched(ids)
    book.touch(ids)
    assert (book.uses[ids].tolist(), book.returned[ids].tolist()) == ([1, 1], [True, True])
    assert book.heat[ids[0]] == 1.5 * book.heat[ids[1]]
