"""Which codes need not be made because they were kept, and where: pure bookkeeping, in arrays, for runs are many."""

from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

Runs = npt.NDArray[np.int64]
"""The first block id of each run of blocks."""

S = TypeVar("S")
NONE = -1


class Promise(NamedTuple, Generic[S]):
    """The codes of one layer in one source."""

    source: S
    layer: int


class Promises(Generic[S]):
    """What was promised of runs of blocks, each named by its first block id. The caller serialises calls."""

    def __init__(self) -> None:
        self._number = np.full(0, NONE, np.int32)  # of each block: of its promise
        self._run = np.zeros(0, np.int32)  # of each block: its run's number in the source
        self._made: dict[int, tuple[Promise[S], int]] = {}  # number -> the promise, and of how many runs it holds
        self._next = 0

    def __bool__(self) -> bool:
        return bool(self._made)

    def add(self, promise: Promise[S], first: Runs, runs: npt.NDArray[np.integer]) -> None:
        """Codes of runs ``first``, all different, are in a source, where they have the numbers ``runs``."""
        if not first.size:
            return
        self.forget(first)
        if (most := int(first.max()) + 1) > self._number.size:
            grow = max(most, 2 * self._number.size) - self._number.size
            self._number = np.append(self._number, np.full(grow, NONE, np.int32))
            self._run = np.append(self._run, np.zeros(grow, np.int32))
        self._number[first], self._run[first] = self._next, runs
        self._made[self._next] = promise, first.size
        self._next += 1

    def of(self, first: Runs) -> list[tuple[Promise[S], Runs]]:
        """By promise: runs. Others are left out."""
        first = first[self.holds(first)]
        numbers = self._number[first]
        return [(self._made[number][0], first[numbers == number]) for number in np.unique(numbers).tolist()]

    def still(self, first: Runs, promise: Promise[S]) -> tuple[Runs, npt.NDArray[np.int32]]:
        """The runs that this was promised of, in the order of their numbers in the source, and these numbers."""
        first = first[self.holds(first, promise)]
        first = first[np.argsort(self._run[first], kind="stable")]
        return first, self._run[first]

    def holds(self, first: Runs, promise: Promise[S] | None = None) -> npt.NDArray[np.bool_]:
        """Of which runs something was promised, or this. bool [n]."""
        numbers = self._numbers(first)
        if promise is None:
            return numbers >= 0
        same = [number for number in np.unique(numbers[numbers >= 0]).tolist() if self._made[number][0] == promise]
        return np.isin(numbers, same)

    def forget(self, first: Runs) -> None:
        """What was promised of these runs does not hold any more."""
        known = first[self.holds(first)]
        if not known.size:
            return
        for number, count in zip(*np.unique(self._number[known], return_counts=True), strict=True):
            promise, left = self._made.pop(int(number))
            if left > count:
                self._made[int(number)] = promise, left - int(count)
        self._number[known] = NONE

    def _numbers(self, first: Runs) -> npt.NDArray[np.int32]:
        numbers = np.full(first.size, NONE, np.int32)
        inside = first < self._number.size
        numbers[inside] = self._number[first[inside]]
        return numbers
