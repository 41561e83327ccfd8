"""What a tier of memory is, and the one accountant of all bytes."""

import threading
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from alaya_tiers.config import format_bytes
from alaya_tiers.errors import OutOfSpace

Slots = npt.NDArray[np.int32]
Addresses = npt.NDArray[np.int64]


class MemoryTier(Protocol):
    """Memory cut into slots of one size, each at a fixed address for the tier's life. No verb blocks.

    The caller serialises calls (the mover holds its lock). A slot belongs to whoever took it until it is given back.
    """

    name: str
    slot_bytes: int
    capacity: int
    """Slots the budget allows."""

    on_cpu: bool
    """Whether addresses are readable by the CPU."""

    @property
    def free(self) -> int:
        """Slots that can be taken now."""
        ...

    def take(self, n: int) -> Slots | None:
        """``n`` slots, contents undefined; None, and nothing taken, when fewer are free."""
        ...

    def give(self, slots: Slots) -> None:
        """Return slots; a slot given twice is an AssertionError."""
        ...

    def addresses(self, slots: Slots) -> Addresses:
        """Address of the first byte of each slot, aligned to a page."""
        ...

    def tensor(self, slot: int) -> Tensor:
        """A slot's memory, uint8 [slot_bytes]."""
        ...

    def hold(self) -> object:
        """Something that keeps the memory mapped while it lives, even when the tier is closed."""
        ...

    def close(self) -> None:
        """Free all memory. Nothing may read or write a slot any more."""
        ...


class Accountant:
    """Counts every byte of every tier and refuses the one that would go over.

    Thread-safe. ``limits`` maps a tier's name to its budget in bytes, None meaning no limit.
    """

    def __init__(self, limits: dict[str, int | None]) -> None:
        self.limits = dict(limits)
        self.used = dict.fromkeys(limits, 0)
        self.peak = dict.fromkeys(limits, 0)
        self._lock = threading.Lock()

    def charge(self, tier: str, nbytes: int) -> None:
        """Take ``nbytes`` of a tier's budget; OutOfSpace, and nothing taken, when that is more than is left."""
        with self._lock:
            used, limit = self.used[tier] + nbytes, self.limits[tier]
            if limit is not None and used > limit:
                raise OutOfSpace(
                    f"the {tier} tier's budget of {format_bytes(limit)} is used up: {format_bytes(self.used[tier])} "
                    f"are taken and {format_bytes(nbytes)} more are needed. Raise {tier}_budget or drop some contexts."
                )
            self.used[tier] = used
            self.peak[tier] = max(self.peak[tier], used)

    def left(self, tier: str) -> int | None:
        """Bytes of a tier's budget that are not taken; None where there is no limit."""
        with self._lock:
            limit = self.limits[tier]
            return None if limit is None else limit - self.used[tier]

    def release(self, tier: str, nbytes: int) -> None:
        """Give ``nbytes`` back. Giving back more than was taken is an AssertionError, never clamped."""
        with self._lock:
            self.used[tier] -= nbytes
            assert self.used[tier] >= 0, f"{tier} tier: {-self.used[tier]} bytes released that were never charged"
