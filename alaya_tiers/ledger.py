"""Where every block is: events in, facts out. No IO, no loop, no memory: pure bookkeeping in numpy arrays.

A block (see ``alaya_tiers.blocks``) has three independent places and a life:

    device slot   host slot   on ssd    what it is                                        who may change it
    ------------  ----------  --------  ------------------------------------------------  -------------------------
    yes           -           -         open (rows are appended) or sealed, dirty          opened, sealed
    -             yes         -         sealed, dirty: the only copy, must be written      demoted
    -             yes         yes       clean: the host copy may be dropped                written, fetched
    -             -           yes       cold: must be fetched before attention             dropped
    -             FETCHING    yes       a read is on its way; not readable yet             fetching, (un)fetched
    -             LANDING     any       a copy from the device is on its way; not readable  demoted, landed
    -             WRITING     -         readable, not droppable                            writing, (un)written

A block is readable in its old place until the new place has confirmed. ``refs`` counts the sequences that hold a block,
``pins`` the operations that read its memory; neither is ever clamped. A block without refs leaves as soon as it has no
pins and nothing in flight; ``release`` and the events that end an operation return what became free.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from alaya_tiers.fading import HALF_LIFE, Fading

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Slots = npt.NDArray[np.int32]

IDLE, FETCHING, WRITING, LANDING = 0, 1, 2, 3
NOWHERE, UNCODABLE = -1, -2

_FIELDS: dict[str, tuple[type, int]] = {
    "device": (np.int32, NOWHERE),
    "host": (np.int32, NOWHERE),
    "file": (np.int32, NOWHERE),
    "offset": (np.int64, 0),
    "digest": (np.uint64, 0),
    "refs": (np.int32, 0),
    "pins": (np.int32, 0),
    "busy": (np.int8, IDLE),
    "sealed": (np.bool_, 0),
    "layer": (np.int32, 0),
    "head": (np.int32, 0),
    "stream": (np.int32, 0),
    "start": (np.int64, 0),
    "used": (np.int64, 0),
    "ahead": (np.bool_, 0),
    "code": (np.int32, NOWHERE),
    "summary": (np.int32, NOWHERE),
    "paged": (np.bool_, 0),
    "uses": (np.int32, 0),
    "heat": (np.float32, 0),
    "returned": (np.bool_, 0),
}


class Freed(NamedTuple):
    """What dead blocks leave behind: slots to give back, extents to forget, and which of them had pages in memory."""

    device: Slots
    host: Slots
    file: npt.NDArray[np.int32]
    code: Slots = np.empty(0, np.int32)
    summary: Slots = np.empty(0, np.int32)
    paged: Ids = np.empty(0, np.int64)


class Ledger:
    """The book. Every method is synchronous and pure bookkeeping; the caller serialises calls.

    Arguments named ``ids`` are int64 arrays of distinct block ids.
    """

    device: Slots
    host: Slots
    file: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    digest: npt.NDArray[np.uint64]
    refs: npt.NDArray[np.int32]
    pins: npt.NDArray[np.int32]
    busy: npt.NDArray[np.int8]
    sealed: Mask
    layer: npt.NDArray[np.int32]
    head: npt.NDArray[np.int32]
    stream: npt.NDArray[np.int32]
    start: npt.NDArray[np.int64]
    used: npt.NDArray[np.int64]
    ahead: Mask
    """Read before it was asked for, and not asked for yet."""
    code: Slots
    """Slot of the block's codes, NOWHERE until they are made, UNCODABLE when they cannot be."""
    summary: Slots
    """Slot of the summary of the block's codes, or NOWHERE."""
    paged: Mask
    """Single pages of it were read, and may still be in memory."""
    uses: npt.NDArray[np.int32]
    """Attentions that read it since it came to the tier it is in."""
    heat: npt.NDArray[np.float32]
    """All attentions that read it, older ones counting less, see ``Fading``."""
    returned: Mask
    """Whether its host copy was dropped before."""

    def __init__(self) -> None:
        for name, (dtype, default) in _FIELDS.items():
            setattr(self, name, np.full(0, default, dtype))
        self._made = 0
        self._reusable: dict[int, list[int]] = {}  # group size -> first ids of dead groups
        self._group = np.empty(0, np.int32)
        self.moves = 0
        """Grows whenever a block comes into memory, leaves it, or changes its place there."""
        self.codings = 0
        """Grows whenever codes, or their summaries, of blocks that live come or go."""
        self.tick = 0
        self.pass_tick = 0
        self.cursor = 0
        self._fading, self._layers = Fading(), 1

    # ------------------------------------------------------------------ life of a block
    def opened(self, layer: int, stream: int, start: int, slots: Slots) -> int:
        """New open blocks, one for each kv head, in device ``slots``; the first id (the others follow)."""
        self.moves += 1
        first = self._new_ids(len(slots))
        ids = np.arange(first, first + len(slots))
        for name, (_, default) in _FIELDS.items():
            getattr(self, name)[ids] = default
        self.device[ids], self.refs[ids], self.used[ids] = slots, 1, self.tick
        self.layer[ids], self.stream[ids], self.start[ids] = layer, stream, start
        self.head[ids] = np.arange(len(slots))
        self._group[first] = len(slots)
        return first

    def adopted(
        self,
        layer: int,
        starts: npt.NDArray[np.int64],
        files: npt.NDArray[np.int32],
        offsets: npt.NDArray[np.int64],
        digests: npt.NDArray[np.uint64],
    ) -> Ids:
        """Sealed blocks that are on ssd already, held once; the first ids of their runs, int64 [runs].

        starts, files: [runs]; offsets, digests: [heads, runs].
        """
        heads, runs = digests.shape
        first = self._new_ids(heads * runs)
        ids = slice(first, first + heads * runs)
        for name, (_, default) in _FIELDS.items():
            getattr(self, name)[ids] = default
        self.refs[ids], self.used[ids], self.sealed[ids] = 1, self.tick, True
        self.layer[ids], self.stream[ids], self.head[ids] = layer, -1, np.tile(np.arange(heads), runs)
        self.start[ids], self.file[ids] = np.repeat(starts, heads), np.repeat(files, heads)
        self.offset[ids], self.digest[ids] = offsets.T.ravel(), digests.T.ravel()
        self._group[ids.start : ids.stop : heads] = heads
        return np.arange(ids.start, ids.stop, heads)

    def seal(self, ids: Ids) -> None:
        """The blocks are full: from here on they never change, and may move."""
        self.sealed[ids] = True

    def retain(self, ids: Ids) -> None:
        """One more sequence holds the blocks."""
        assert (self.refs[ids] > 0).all(), "a dead block was retained"
        self.refs[ids] += 1

    def release(self, ids: Ids) -> Freed:
        """One sequence less holds the blocks."""
        self.refs[ids] -= 1
        assert (self.refs[ids] >= 0).all(), "a block was released more often than retained"
        return self._reap(ids)

    def pin(self, ids: Ids) -> None:
        """The blocks' memory is being read: it may not be reused."""
        assert (self.refs[ids] > 0).all(), "a dead block was pinned"
        self.pins[ids] += 1

    def unpin(self, ids: Ids) -> Freed:
        """The reading that ``pin`` announced is over."""
        self.pins[ids] -= 1
        assert (self.pins[ids] >= 0).all(), "a block was unpinned more often than pinned"
        return self._reap(ids)

    # ------------------------------------------------------------------ moves
    def demoted(self, ids: Ids, slots: Slots, *, landing: bool = False) -> Slots:
        """Sealed blocks were copied to host ``slots``, or are being copied; the device slots that became free."""
        assert (self.host[ids] < 0).all(), "a block was demoted that the host already has"
        assert self.sealed[ids].all(), "an open block was demoted"
        freed = self.device[ids]
        self.moves += 1
        self.device[ids], self.host[ids], self.uses[ids] = NOWHERE, slots, 0
        if landing:
            assert (self.busy[ids] == IDLE).all()
            self.busy[ids] = LANDING
        return freed

    def landed(self, ids: Ids) -> Freed:
        """The copies that ``demoted`` announced are complete."""
        assert (self.busy[ids] == LANDING).all()
        self.moves += 1
        self.busy[ids] = IDLE
        return self._reap(ids)

    def writing(self, ids: Ids, files: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64]) -> None:
        """A write of dirty host blocks to their places has started."""
        assert ((self.busy[ids] == IDLE) & (self.file[ids] < 0)).all()
        self.busy[ids], self.file[ids], self.offset[ids] = WRITING, files, offsets

    def written(self, ids: Ids, digests: npt.NDArray[np.uint64]) -> Freed:
        """The blocks are on disk."""
        self.busy[ids], self.digest[ids] = IDLE, digests
        return self._reap(ids)

    def unwritten(self, ids: Ids) -> Freed:
        """The write failed: the blocks are dirty again. The caller takes their places back first."""
        self.busy[ids], self.file[ids] = IDLE, NOWHERE
        return self._reap(ids)

    def fetching(self, ids: Ids, slots: Slots, *, ahead: bool = False) -> None:
        """A read of cold blocks into host ``slots`` has started, ahead of need or not."""
        assert ((self.busy[ids] == IDLE) & (self.host[ids] < 0) & (self.file[ids] >= 0)).all()
        self.busy[ids], self.host[ids], self.ahead[ids], self.uses[ids] = FETCHING, slots, ahead, 0

    def fetched(self, ids: Ids) -> Freed:
        """The read is complete and verified. It does not count as a use of the present pass: attention is to come."""
        self.moves += 1
        self.busy[ids], self.used[ids] = IDLE, self.pass_tick - 1
        return self._reap(ids)

    def unfetched(self, ids: Ids) -> tuple[Slots, Freed]:
        """The read failed; the host slots to give back."""
        slots = self.host[ids]
        self.busy[ids], self.host[ids], self.ahead[ids] = IDLE, NOWHERE, False
        return slots, self._reap(ids)

    def dropped(self, ids: Ids) -> Slots:
        """The host copies of clean blocks are given up; their slots."""
        assert self.droppable(ids).all(), "a block was dropped that is dirty, pinned or busy"
        slots = self.host[ids]
        self.moves += 1
        self.host[ids], self.ahead[ids], self.returned[ids] = NOWHERE, False, True
        return slots

    # ------------------------------------------------------------------ codes
    def codable(self, ids: Ids) -> bool:
        """Whether codes of these blocks could be made now: sealed, held, in memory, and not coded yet."""
        return bool((self.sealed[ids] & (self.refs[ids] > 0) & (self.code[ids] == NOWHERE) & self.readable(ids)).all())

    def uncode(self, layer: int) -> tuple[Slots, Slots]:
        """Forget all codes of a layer and their summaries; the slots they were in."""
        of_layer = np.flatnonzero(self.layer == layer)
        codes, summaries = self.code[of_layer], self.summary[of_layer]
        self.codings += 1
        self.code[of_layer] = self.summary[of_layer] = NOWHERE
        return codes[codes >= 0], summaries[summaries >= 0]

    def left(self, ids: Ids) -> Slots:
        """Codes of blocks leave memory, and can be read again; the slots they were in."""
        slots = self.code[ids]
        self.codings += 1
        self.code[ids] = NOWHERE
        return slots

    def coded(self, ids: Ids, slots: Slots | int) -> None:
        """The codes of blocks are in ``slots``, or UNCODABLE."""
        assert (self.code[ids] == NOWHERE).all(), "a block was coded twice"
        self.codings += 1
        self.code[ids] = slots

    def summarised(self, ids: Ids, slots: Slots) -> None:
        """Summaries of the codes of blocks are in ``slots``."""
        assert (self.summary[ids] == NOWHERE).all(), "a block was summarised twice"
        self.codings += 1
        self.summary[ids] = slots

    # ------------------------------------------------------------------ use
    def begin_pass(self, layer: int) -> None:
        """Attention of ``layer`` starts: what is used from here on was used in this pass."""
        self.tick += 1
        self.pass_tick, self.cursor, self._layers = self.tick, layer, max(self._layers, layer + 1)

    def touch(self, ids: Ids) -> None:
        """The blocks were attended."""
        self.used[ids], self.ahead[ids] = self.tick, False
        self.uses[ids] += 1
        self.heat[ids] += self._fading.worth(self.heat, self.tick, HALF_LIFE * self._layers)

    # ------------------------------------------------------------------ facts
    def readable(self, ids: Ids) -> Mask:
        """Which blocks are in memory now."""
        on_host = (self.host[ids] >= 0) & (self.busy[ids] != FETCHING) & (self.busy[ids] != LANDING)
        return np.asarray((self.device[ids] >= 0) | on_host)

    def coming(self, ids: Ids | slice) -> Mask:
        """Which blocks are on their way into host memory."""
        busy = self.busy[ids]
        return np.asarray((busy == FETCHING) | (busy == LANDING))

    def droppable(self, ids: Ids | slice) -> Mask:
        """Which blocks have a clean host copy that nobody reads."""
        clean = (self.host[ids] >= 0) & (self.file[ids] >= 0)
        return np.asarray(clean & (self.busy[ids] == IDLE) & (self.pins[ids] == 0))

    def droppable_ids(self) -> Ids:
        """All clean, idle, unpinned host copies."""
        return np.flatnonzero(self.droppable(slice(self._made)))

    def demotable_ids(self) -> Ids:
        """All sealed, unpinned device blocks."""
        n = self._made
        return np.flatnonzero((self.device[:n] >= 0) & self.sealed[:n] & (self.pins[:n] == 0))

    def dirty_ids(self) -> Ids:
        """All host blocks that must be written and are not being written, oldest first."""
        n = self._made
        ids = np.flatnonzero((self.host[:n] >= 0) & (self.file[:n] < 0) & (self.busy[:n] == IDLE) & (self.refs[:n] > 0))
        return ids[np.argsort(self.used[ids], kind="stable")]

    def unsafe_count(self) -> int:
        """How many host blocks are not safely on disk: dirty, or being written."""
        n = self._made
        return int(np.count_nonzero((self.host[:n] >= 0) & ((self.file[:n] < 0) | (self.busy[:n] == WRITING))))

    def writing_count(self) -> int:
        """How many blocks are being written."""
        return int(np.count_nonzero(self.busy[: self._made] == WRITING))

    def fetching_count(self) -> int:
        """How many blocks are on their way into host memory."""
        return int(np.count_nonzero(self.coming(slice(self._made))))

    def landing_count(self) -> int:
        """How many of them come from the device."""
        return int(np.count_nonzero(self.busy[: self._made] == LANDING))

    def pinned_count(self) -> int:
        """How many blocks are pinned."""
        return int(np.count_nonzero(self.pins[: self._made]))

    def alive(self) -> Ids:
        """All blocks some sequence holds."""
        return np.flatnonzero(self.refs[: self._made] > 0)

    def check_integrity(self) -> None:
        """Recount everything that is counted incrementally; AssertionError when the book is wrong."""
        n = self._made
        for place in (self.device[:n], self.host[:n]):
            held = place[place >= 0]
            assert held.size == np.unique(held).size, "two blocks share a slot"
        living = (self.refs[:n] > 0) | (self.pins[:n] > 0) | (self.busy[:n] != IDLE)
        nowhere = (self.device[:n] < 0) & (self.host[:n] < 0) & (self.file[:n] < 0)
        assert not (living & nowhere).any(), "a living block is nowhere"
        assert not (~living & ~nowhere).any(), "a dead block still holds a place"
        assert ((self.device[:n] < 0) | (self.host[:n] < 0)).all(), "a block is in two memory tiers"

    # ------------------------------------------------------------------ inside
    def _new_ids(self, n: int) -> int:
        if self._reusable.get(n):
            return self._reusable[n].pop()
        first, self._made = self._made, self._made + n
        if self._made > self.device.size:
            grow = max(1024, self._made) - self.device.size + self._made
            for name, (dtype, default) in _FIELDS.items():
                setattr(self, name, np.append(getattr(self, name), np.full(grow, default, dtype)))
            self._group = np.append(self._group, np.zeros(grow, np.int32))
        return first

    def _reap(self, ids: Ids) -> Freed:
        dead = ids[(self.refs[ids] == 0) & (self.pins[ids] == 0) & (self.busy[ids] == IDLE)]
        if not dead.size:
            return NOTHING
        self.moves += 1
        device, host, file = self.device[dead], self.host[dead], self.file[dead]
        code, summary = self.code[dead], self.summary[dead]
        freed = Freed(
            device[device >= 0], host[host >= 0], file[file >= 0], code[code >= 0], summary[summary >= 0],
            dead[self.paged[dead]],
        )  # fmt: skip
        for places in (self.device, self.host, self.file, self.code, self.summary):
            places[dead] = NOWHERE
        self.sealed[dead] = self.ahead[dead] = self.paged[dead] = False
        for first in self._dead_groups(dead):
            self._reusable.setdefault(int(self._group[first]), []).append(first)
        return freed

    def _dead_groups(self, dead: Ids) -> Iterator[int]:
        """First ids of the groups of which ``dead`` held the last living members."""
        for first in np.unique(dead - self.head[dead]).tolist():
            ids = np.s_[first : first + int(self._group[first])]
            gone = (self.refs[ids] == 0) & (self.pins[ids] == 0) & (self.busy[ids] == IDLE)
            if gone.all() and ((self.device[ids] < 0) & (self.host[ids] < 0) & (self.file[ids] < 0)).all():
                yield first


NOTHING = Freed(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int32))
