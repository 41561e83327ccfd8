"""Codes in the memory of a device, beside those in host memory: it scans at the speed of its memory.

What lies in slot n of the host's arena of codes lies in slot n here too, for as many slots as the budget has: nothing
is evicted, as a step scans all codes of a sequence, and what did not fit the CPU scans meanwhile.
"""

from collections import deque
from contextlib import AbstractContextManager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers.devices.base import Ask, Device, Event, Hits, Scanning
from alaya_tiers.tiers.arena import Arena
from alaya_tiers.tiers.base import Accountant, Slots
from alaya_tiers.tiers.lanes import Lanes

Lock = AbstractContextManager[object]


class Mirror:
    """Slots of ``slot_bytes`` on ``device``, ``budget`` bytes at most. Used under the mover's lock."""

    def __init__(self, budget: int, slot_bytes: int, accountant: Accountant, device: Device) -> None:
        self._arena = Arena("device_index", budget, slot_bytes, accountant, device.slab, on_cpu=False)
        self._lanes, self._device = Lanes(device, self._arena, self._arena), device
        self._there = np.zeros(self._arena.capacity, bool)
        self._coming: deque[tuple[Event, Tensor]] = deque()

    @property
    def device(self) -> Device:
        """Where the slots are."""
        return self._device

    def put(self, slots: Slots, coded: Tensor) -> None:
        """Codes that were put into these slots of the host's arena. coded: uint8 [n, bytes], on the CPU.

        They are on their way when this returns; a scan comes after them.
        """
        while self._coming and self._coming[0][0].done():
            self._coming.popleft()
        fits = slots < self._room_for(int(slots.max(initial=-1)))
        self._there[slots[slots < self._there.size]] = False
        if not fits.any():
            return
        mine, nbytes = slots[fits], coded.shape[1]
        rows = self._device.scratch(mine.size * nbytes).view(mine.size, nbytes)
        rows.copy_(coded if fits.all() else coded[torch.from_numpy(fits)])
        targets = [self._arena.tensor(slot)[:nbytes] for slot in mine.tolist()]
        self._coming.append((self._lanes.put(list(rows), mine, targets), rows))
        self._there[mine] = True

    def has(self, slots: Slots) -> npt.NDArray[np.bool_]:
        """Which of these slots of the host's arena lie here too."""
        here = slots < self._there.size
        here[here] = self._there[slots[here]]
        return here

    def scan(self, ask: Ask, slots: Slots) -> Scanning | None:
        """Begin a scan of these slots [heads, n]. ask: without addresses."""
        return self._lanes.scan(slots, ask._replace(blocks=self._arena.addresses(slots)))

    def finish(self, scanning: Scanning, start: Tensor, slots: Slots) -> None:
        """Its second half."""
        with self._lanes.reading(slots):
            scanning.finish(start)

    def hold(self) -> object:
        """Something that keeps the memory while it lives."""
        return self._arena.hold()

    def close(self) -> None:
        """Free all memory. Nothing is scanned any more."""
        self._device.settle()
        self._coming.clear()
        self._arena.close()
        self._there[:] = False

    def _room_for(self, slot: int) -> int:
        """Slots there are: memory is taken in the order of slots, when it is needed."""
        more = min(slot + 1, self._arena.capacity) - self._arena.used
        try:
            if more > 0:
                self._arena.take(more)  # in the order of their numbers, as none is ever given back
        except torch.OutOfMemoryError:  # the model took it
            self._arena.capacity = self._arena.used
        return self._arena.used


class Mirrored:
    """Codes of some kv heads and blocks that a mirror may have. slots: int32 [heads, n]. See index.codes.Elsewhere."""

    def __init__(self, mirror: Mirror, slots: Slots, lock: Lock) -> None:
        self._mirror, self._slots, self._lock = mirror, slots, lock
        with lock:
            self.there: npt.NDArray[np.bool_] = np.asarray(mirror.has(slots).all(0))

    def of(self, heads: npt.NDArray[np.intp]) -> "Mirrored":
        """Of some of the heads."""
        return Mirrored(self._mirror, self._slots[heads], self._lock)

    def scan(self, ask: Ask, columns: npt.NDArray[np.intp]) -> Scanning | None:
        slots = np.ascontiguousarray(self._slots[:, columns])
        with self._lock:
            begun = self._mirror.scan(ask, slots)
        return None if begun is None else _Scan(self._mirror, begun, slots, self._lock)


class _Scan:
    """A scan of a mirror's slots: both halves are told in order, and waited for without the lock."""

    def __init__(self, mirror: Mirror, begun: Scanning, slots: Slots, lock: Lock) -> None:
        self._mirror, self._begun, self._slots, self._lock = mirror, begun, slots, lock

    def best(self) -> npt.NDArray[np.int32]:
        return self._begun.best()

    def finish(self, start: Tensor) -> None:
        with self._lock:
            self._mirror.finish(self._begun, start, self._slots)

    def found(self) -> Hits:
        return self._begun.found()
