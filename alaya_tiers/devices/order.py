"""Which stream must wait for which before it may touch a slot: pure bookkeeping, no device.

    access of a slot    must come after, if another stream did it
    ----------------    ---------------------------------------------
    read                the last write
    write               the last write, and every read since

What a stream has once waited for it need not wait for again.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from alaya_tiers.devices.base import STREAMS

Slots = npt.NDArray[np.int32]


class Wait(NamedTuple):
    """Before going on, wait for what ``stream`` was told as its ``tick``-th."""

    stream: int
    tick: int


class Order:
    """The last accesses of ``slots`` slots. Ticks count what each stream was told, from 1."""

    def __init__(self, slots: int) -> None:
        self._writer, self._wrote = np.zeros(slots, np.int8), np.zeros(slots, np.int64)
        self._read = np.zeros((STREAMS, slots), np.int64)
        self.ticks = [0] * STREAMS
        self._seen = np.zeros((STREAMS, STREAMS), np.int64)
        """[s, t]: the last tick of t that stream s comes after."""

    def before(self, stream: int, reads: Slots, writes: Slots) -> list[Wait]:
        """What ``stream`` must wait for before it reads and writes these slots; noted as waited for."""
        need = np.zeros(STREAMS, np.int64)
        for slots in (reads, writes):
            if slots.size:
                np.maximum.at(need, self._writer[slots], self._wrote[slots])
        if writes.size:
            np.maximum(need, self._read[:, writes].max(1), out=need)
        waits = []
        for other in range(STREAMS):
            if other != stream and need[other] > self._seen[stream, other]:
                waits.append(Wait(other, int(need[other])))
                self._seen[stream, other] = need[other]
        return waits

    def after(self, stream: int, reads: Slots, writes: Slots) -> int:
        """The stream was told to do so; the tick of it."""
        self.ticks[stream] += 1
        tick = self.ticks[stream]
        self._read[stream, reads] = tick
        self._writer[writes], self._wrote[writes] = stream, tick
        self._read[:, writes] = 0  # whoever comes after this write comes after them
        return tick
