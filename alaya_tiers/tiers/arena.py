"""Slots over slabs of memory that grow up to a budget: the common body of the device and the host tier."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from alaya_tiers.tiers.base import Accountant, Addresses, Slots

SLAB_BYTES = 16 << 20
"""A slab's size: memory is mapped (and pinned, with CUDA) in steps of this, not in one stall at the start."""


class Arena:
    """A MemoryTier of at most ``budget`` bytes; its slabs come from ``make_slab`` and are accounted for.

    lanes: slots that are taken this many at a time, one a kv head, come from as many parts of a new slab: the next ones
    of a head lie behind its last ones, as who reads head by head wants them.
    """

    def __init__(
        self,
        name: str,
        budget: int,
        slot_bytes: int,
        accountant: Accountant,
        make_slab: Callable[[int], Tensor],
        *,
        on_cpu: bool = True,
        slab_bytes: int = SLAB_BYTES,
        lanes: int = 1,
    ) -> None:
        self.on_cpu = on_cpu
        self.name, self.slot_bytes, self.capacity = name, slot_bytes, budget // slot_bytes
        self._accountant, self._make_slab = accountant, make_slab
        self._per_slab, self._lanes = max(1, slab_bytes // slot_bytes), lanes
        self._slabs: list[Tensor] = []
        self._addresses = np.zeros(self.capacity, np.int64)
        self._made = 0
        self._free: list[int] = []
        self._taken = np.zeros(self.capacity, bool)

    @property
    def free(self) -> int:
        left, more = self._accountant.left(self.name), self.capacity - self._made
        return len(self._free) + (more if left is None else min(more, left // self.slot_bytes))

    def limit(self, budget: int) -> None:
        """Let it grow to so many bytes from now on, at most to what it was made for; what it has stays."""
        self.capacity = max(self._made, min(self._addresses.size, budget // self.slot_bytes))

    @property
    def used(self) -> int:
        """Slots taken."""
        return self._made - len(self._free)

    def take(self, n: int) -> Slots | None:
        if n > self.free:
            return None
        while len(self._free) < n:
            self._grow()
        slots = np.array(self._free[len(self._free) - n :][::-1], np.int32)
        del self._free[len(self._free) - n :]
        self._taken[slots] = True
        return slots

    def give(self, slots: Slots) -> None:
        assert self._taken[slots].all(), f"{self.name} tier: a slot was given back twice"
        self._taken[slots] = False
        self._free.extend(slots.tolist())

    def addresses(self, slots: Slots) -> Addresses:
        return self._addresses[slots]

    def tensor(self, slot: int) -> Tensor:
        slab, index = divmod(slot, self._per_slab)
        return self._slabs[slab][index * self.slot_bytes : (index + 1) * self.slot_bytes]

    def span(self, slot: int, nbytes: int) -> Tensor:
        """Memory from a slot on, over its neighbours in its slab, uint8 [nbytes]."""
        slab, index = divmod(slot, self._per_slab)
        return self._slabs[slab][index * self.slot_bytes : index * self.slot_bytes + nbytes]

    def same_slab(self, a: Slots, b: Slots) -> npt.NDArray[np.bool_]:
        """Which pairs of slots are of one slab."""
        return np.asarray(a // self._per_slab == b // self._per_slab)

    def hold(self) -> object:
        return self._slabs

    def close(self) -> None:
        self._accountant.release(self.name, self._made * self.slot_bytes)
        self._slabs, self._free = [], []
        self.capacity = self._made = 0

    def _grow(self) -> None:
        n = min(self._per_slab, self.free - len(self._free))
        self._accountant.charge(self.name, n * self.slot_bytes)
        try:
            slab = self._make_slab(n * self.slot_bytes)
        except BaseException:
            self._accountant.release(self.name, n * self.slot_bytes)
            raise
        self._slabs.append(slab)
        self._addresses[self._made : self._made + n] = slab.data_ptr() + np.arange(n) * self.slot_bytes
        order, even = np.arange(n), n - n % self._lanes
        order[:even] = order[:even].reshape(self._lanes, -1).T.ravel()
        self._free[:0] = (self._made + order)[::-1].tolist()
        self._made += n
