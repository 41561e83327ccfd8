"""Blocks of a request trace, by number: their names, which tiers hold them, and what policies want to know of each.

What a simulation does a million times: everything here works on whole arrays of blocks at once.
"""

from collections import deque
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from alaya_tiers.fading import Fading

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

DEVICE, HOST, SSD = "device", "host", "ssd"
TIERS = (DEVICE, HOST, SSD)

PIECE_BITS = 8
"""Names are looked up in pieces of so many neighbours: those of one context mostly follow each other."""
PIECE = 1 << PIECE_BITS

NONE = -1

FEW = 48
"""Keys up to which a loop is faster than arrays."""

HALF_LIFE = 512
"""Requests after which a use counts half as much for a block's heat."""


_NOTHING = np.full(PIECE, NONE, np.int32)


class Names:
    """Numbers of blocks by key, as a dict would have them, for many at a time."""

    def __init__(self) -> None:
        self._pieces: dict[int, npt.NDArray[np.int32]] = {}
        self._filled: dict[int, int] = {}

    def __len__(self) -> int:
        return sum(self._filled.values())

    def find(self, keys: Ids) -> Ids:
        """The number of each key, NONE where it has none. int64 [n]."""
        if keys.size <= FEW:
            pieces, none = self._pieces, _NOTHING
            one_by_one = [pieces.get(k >> PIECE_BITS, none)[k & (PIECE - 1)] for k in keys.tolist()]
            return np.array(one_by_one, np.int64)
        found = np.full(keys.size, NONE, np.int64)
        for piece, begin, end in _pieces(keys):
            if (numbers := self._pieces.get(piece)) is not None:
                found[begin:end] = numbers[keys[begin:end] & (PIECE - 1)]
        return found

    def put(self, keys: Ids, numbers: Ids) -> None:
        """New keys, all different."""
        for piece, begin, end in _pieces(keys):
            if piece not in self._pieces:
                self._pieces[piece], self._filled[piece] = np.full(PIECE, NONE, np.int32), 0
            self._pieces[piece][keys[begin:end] & (PIECE - 1)] = numbers[begin:end]
            self._filled[piece] += end - begin

    def drop(self, keys: Ids) -> None:
        """Keys that are there, all different."""
        keys = np.sort(keys)
        for piece, begin, end in _pieces(keys):
            self._pieces[piece][keys[begin:end] & (PIECE - 1)] = NONE
            self._filled[piece] -= end - begin
            if not self._filled[piece]:
                del self._pieces[piece], self._filled[piece]


def _pieces(keys: Ids) -> list[tuple[int, int, int]]:
    """(piece, begin, end) of runs of neighbours."""
    if not keys.size:
        return []
    pieces = keys >> PIECE_BITS
    cuts = np.flatnonzero(pieces[1:] != pieces[:-1]) + 1
    begins = [0, *cuts.tolist()]
    return list(zip(pieces[begins].tolist(), begins, [*begins[1:], keys.size], strict=True))


class Shelf:
    """A set of blocks: adding, removing and listing cost what they touch, however many blocks there are."""

    def __init__(self) -> None:
        self._members, self._place = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.size = 0

    @property
    def members(self) -> Ids:
        """All of it, in no order; a view that the next change spoils."""
        return self._members[: self.size]

    def has(self, ids: Ids) -> Mask:
        """Which of these are here."""
        return self._place[ids] >= 0

    def reach(self, n: int) -> None:
        """Have places for numbers below ``n``."""
        more = n - self._place.size
        self._place = np.append(self._place, np.full(more, NONE, np.int64))
        self._members = np.append(self._members, np.zeros(more, np.int64))

    def add(self, ids: Ids) -> None:
        """None of them is here."""
        end = self.size + ids.size
        self._members[self.size : end] = ids
        self._place[ids] = np.arange(self.size, end)
        self.size = end

    def remove(self, ids: Ids) -> None:
        """All of them are here. What lies at the end takes the places that become free."""
        places, left = self._place[ids], self.size - ids.size
        self._place[ids] = NONE
        tail = self._members[left : self.size]
        stay, holes = tail[self._place[tail] >= 0], places[places < left]
        self._members[holes], self._place[stay] = stay, holes
        self.size = left


class Blocks:
    """Columns of numbers, one row a block, and the three shelves. ghosts: how many blocks that left are remembered.

    key, start: name, and position of the first token. used: order of last use; time: seconds then. heat: uses of late,
    on a scale of its own. context: number of the request that brought it first; tenant: whose that was. until: when its
    pause is over, inf where nothing is known. writing: on its way to the ssd. next: number of the request that wants it
    next, where that is known.
    """

    COLUMNS: ClassVar[dict[str, Any]] = {
        "key": np.int64, "start": np.int64, "used": np.int64, "time": np.float64, "heat": np.float64,
        "context": np.int64, "tenant": np.int16, "until": np.float64, "writing": np.bool_,
        "next": np.int64, "_left": np.int64,
    }  # fmt: skip

    key: Ids
    start: Ids
    used: Ids
    time: npt.NDArray[np.float64]
    heat: npt.NDArray[np.float64]
    context: Ids
    tenant: npt.NDArray[np.int16]
    until: npt.NDArray[np.float64]
    writing: Mask
    next: Ids
    _left: Ids

    def __init__(self, ghosts: int) -> None:
        self.names = Names()
        self.shelf = {tier: Shelf() for tier in TIERS}
        self._uses, self._returned = np.zeros((len(TIERS), 0), np.int32), np.zeros((len(TIERS), 0), np.bool_)
        for name, kind in self.COLUMNS.items():
            setattr(self, name, np.zeros(0, kind))
        self._spare, self._n_spare = np.zeros(0, np.int64), 0
        self._most_ghosts, self._n_ghosts, self._leaving = ghosts, 0, 0
        self._ghosts: deque[tuple[int, Ids]] = deque()
        self._tick, self._fading = 0, Fading()
        self.pass_tick = 0

    @property
    def rows(self) -> int:
        """How many there is room for."""
        return self.key.size

    def anywhere(self, ids: Ids) -> Mask:
        """Which of these some tier has."""
        return self.shelf[DEVICE].has(ids) | self.shelf[HOST].has(ids) | self.shelf[SSD].has(ids)

    def prefix(self, keys: Ids) -> Ids:
        """Blocks of the keys up to the first that no tier has."""
        ids = self.names.find(keys)
        if not self.rows:
            return ids[:0]
        here = (ids >= 0) & self.anywhere(ids)
        return ids if here.all() else ids[: int(np.argmin(here))]

    def known(self, keys: Ids, number: int, block_tokens: int) -> Ids:
        """Blocks of all keys, all different; those that were not known are brought by request ``number``."""
        ids = self.names.find(keys)
        new = np.flatnonzero(ids == NONE)
        if new.size:
            if self._n_spare < new.size:
                self._grow(new.size)
            self._n_spare -= new.size
            fresh = ids[new] = self._spare[self._n_spare : self._n_spare + new.size].copy()
            self.names.put(keys[new], fresh)
            self.key[fresh], self.start[fresh], self.context[fresh] = keys[new], new * block_tokens, number
            self.heat[fresh], self.next[fresh], self.writing[fresh], self.until[fresh] = 0, 0, False, np.inf
            self._returned[:, fresh] = False
        return ids

    def _grow(self, n: int) -> None:
        old = self.rows
        more = max(1024, old, n)
        for name, kind in self.COLUMNS.items():
            setattr(self, name, np.append(getattr(self, name), np.zeros(more, kind)))
        for tier in TIERS:
            self.shelf[tier].reach(old + more)
        self._uses = np.append(self._uses, np.zeros((len(TIERS), more), np.int32), 1)
        self._returned = np.append(self._returned, np.zeros((len(TIERS), more), np.bool_), 1)
        spare = np.concatenate([self._spare[: self._n_spare], np.arange(old + more - 1, old - 1, -1)])
        self._spare, self._n_spare = np.append(spare, np.zeros(old, np.int64)), spare.size

    def touch(self, ids: Ids, number: int, now: float, counted: Ids) -> None:
        """Used by request ``number``; the first block last, so that what leaves first is the end. counted: by their
        uses, those of ``ids`` for which this is one."""
        self.pass_tick = self._tick + 1
        self.used[ids] = np.arange(self._tick + ids.size, self._tick, -1)
        self._tick += ids.size
        self.time[ids], self.until[ids] = now, np.inf
        self.heat[counted] += self._fading.worth(self.heat, number, HALF_LIFE)
        self._uses[:, counted] += 1

    def uses(self, tier: str, ids: Ids) -> Ids:
        """How often each was used since it came to this tier. int64 [n]."""
        return np.asarray(self._uses[TIERS.index(tier)][ids], np.int64)

    def returned(self, tier: str, ids: Ids) -> Mask:
        """Which of them were in this tier before."""
        return np.asarray(self._returned[TIERS.index(tier)][ids], np.bool_)

    def come(self, tier: str, ids: Ids, uses: int = 0) -> None:
        """They are in this tier from now on; uses: how often they were used there."""
        self.shelf[tier].add(ids)
        self._uses[TIERS.index(tier)][ids] = uses

    def leave(self, tier: str, ids: Ids) -> None:
        """They are in this tier no longer."""
        self.shelf[tier].remove(ids)
        self._returned[TIERS.index(tier)][ids] = True

    def forget(self, ids: Ids) -> int:
        """Of these, what no tier has any more becomes a ghost; how many."""
        gone = ids[~self.anywhere(ids)]
        if gone.size:
            self._leaving += 1
            self._left[gone] = self._leaving
            self._ghosts.append((self._leaving, gone))
            self._n_ghosts += gone.size
            while self._n_ghosts > self._most_ghosts:
                number, old = self._ghosts.popleft()
                self._n_ghosts -= old.size
                self._free(old[(self._left[old] == number) & ~self.anywhere(old)])
        return int(gone.size)

    def _free(self, ids: Ids) -> None:
        self.names.drop(self.key[ids])
        self._left[ids] = 0
        self._spare[self._n_spare : self._n_spare + ids.size] = ids
        self._n_spare += ids.size
