"""Codes that are on disk besides: they may leave memory and come back, as long as nobody reads them meanwhile."""

from __future__ import annotations

import weakref

import numpy as np
import numpy.typing as npt

from alaya_tiers.ledger import Ledger
from alaya_tiers.promises import Promise, Promises, Runs, S
from alaya_tiers.tiers.base import Slots


class Reader:
    """While it lives, codes that were in memory when it was made are not overwritten."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch


class Kept(Promises[S]):
    """Where the codes of runs are on disk, and which were wanted last. Runs are named as in Promises; the caller
    serialises calls.

    Slots that a run leaves are given to others only once all readers are gone that may have seen it there.
    """

    def __init__(self, book: Ledger) -> None:
        super().__init__()
        self._book = book
        self._wanted, self._now = np.zeros(0, np.int64), 0  # of each first block: when it was wanted last
        self._epoch = 0
        self._readers = weakref.WeakSet[Reader]()
        self._left: list[tuple[int, Slots]] = []

    def add(self, promise: Promise[S], first: Runs, runs: npt.NDArray[np.integer]) -> None:
        super().add(promise, first, runs)
        more = self._number.size - self._wanted.size
        self._wanted = np.append(self._wanted, np.zeros(max(0, more), np.int64))

    def want(self, first: Runs) -> None:
        """These runs are wanted now: they leave last."""
        self._now += 1
        self._wanted[first[self.holds(first)]] = self._now

    def oldest(self, most: int) -> Runs:
        """Runs whose codes are in memory and can be read again, those wanted longest ago first, without the last."""
        first = np.flatnonzero(self._number >= 0)
        first = first[(self._book.code[first] >= 0) & (self._wanted[first] < self._now)]
        return first[np.argsort(self._wanted[first], kind="stable")[:most]]

    def reader(self) -> Reader:
        """To be kept by whoever reads codes."""
        made = Reader(self._epoch)
        self._readers.add(made)
        return made

    def leave(self, slots: Slots) -> None:
        """These slots' codes are not in the book any more."""
        self._left.append((self._epoch, slots))
        self._epoch += 1

    def free(self) -> list[Slots]:
        """Slots that nobody reads any more, each told once."""
        least = min((reader.epoch for reader in self._readers), default=self._epoch)
        done = [slots for epoch, slots in self._left if epoch < least]
        self._left = [(epoch, slots) for epoch, slots in self._left if epoch >= least]
        return done
