"""Depths of reads by what batches of them took: where the decisions of depth.py meet threads and a clock."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from alaya_tiers.depth import USUAL, Depth
from alaya_tiers.seams import Clock


class Queue:
    """How many page reads each thread keeps under way. Thread-safe.

    fixed: always so many; None = adapted to the disk.
    """

    def __init__(self, clock: Clock, fixed: int | None = None) -> None:
        self._clock, self._fixed = clock, fixed
        self._known, self._lock = Depth(), threading.Lock()

    @property
    def depth(self) -> int:
        """In use now."""
        return self._known.depth if self._fixed is None else self._fixed

    @property
    def usual(self) -> int:
        """For reads that are not adapted: those of whole blocks, of which a batch has too few."""
        return USUAL if self._fixed is None else self._fixed

    def batch(self, jobs: int, each: int) -> "Batch":
        """For reads that so many jobs are about to do side by side, up to ``each`` in each."""
        return Batch(self, jobs, self._known.choose(each) if self._fixed is None else self._fixed)

    def now(self) -> float:
        """Seconds."""
        return self._clock.monotonic()

    def ended(self, batch: "Batch", seconds: float) -> None:
        """All jobs of a batch have read all they were to."""
        with self._lock:
            self._known = self._known.observe(batch.depth, batch.reads // batch.jobs, batch.reads, seconds)


class Batch:
    """Jobs that read side by side. They are judged together: one alone would win by a longer line than the others'."""

    def __init__(self, queue: Queue, jobs: int, depth: int) -> None:
        self.jobs, self.depth, self.reads = jobs, depth, 0
        self._queue, self._left, self._lock = queue, jobs, threading.Lock()
        self._began = float("inf")

    @contextmanager
    def reading(self) -> Iterator["Reads"]:
        """Around the reads of one job. A batch in which one fails or comes short tells nothing."""
        reads, began = Reads(), self._queue.now()
        yield reads
        ended = self._queue.now()
        with self._lock:
            self._began = min(self._began, began)
            self.reads += reads.n
            self._left -= reads.whole
            last = not self._left
        if last:
            self._queue.ended(self, ended - self._began)


class Reads:
    """What a job did. n: reads; whole: whether all of them did what they were to."""

    n, whole = 0, False
