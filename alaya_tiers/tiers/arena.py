"""Slots over slabs of memory that grow up to a budget: the common body of the device and the host tier."""

import ctypes
import mmap
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from alaya_tiers.tiers.base import Accountant, Addresses, Slots

SLAB_BYTES = 16 << 20
"""A slab's size: memory is mapped (and pinned, with CUDA) in steps of this, not in one stall at the start."""


class Slab(NamedTuple):
    """A piece of memory: its address, and the object that keeps it alive."""

    address: int
    owner: Any


def plain_slab(nbytes: int) -> Slab:
    """Page-aligned memory of this process."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return Slab(ctypes.addressof(ctypes.c_char.from_buffer(memory)), memory)


def pinned_slab(nbytes: int) -> Slab:
    """Host memory registered with CUDA."""
    memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return Slab(memory.data_ptr(), memory)


def cuda_slab(nbytes: int, device: torch.device) -> Slab:
    """GPU memory."""
    memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return Slab(memory.data_ptr(), memory)


class Arena:
    """A MemoryTier of at most ``budget`` bytes; slabs come from ``make_slab`` and are charged to the accountant."""

    def __init__(
        self, name: str, budget: int, slot_bytes: int, accountant: Accountant, make_slab: Callable[[int], Slab]
    ) -> None:
        self.name, self.slot_bytes, self.capacity = name, slot_bytes, budget // slot_bytes
        self._accountant, self._make_slab = accountant, make_slab
        self._per_slab = max(1, SLAB_BYTES // slot_bytes)
        self._slabs: list[Slab] = []
        self._addresses = np.zeros(self.capacity, np.int64)
        self._made = 0
        self._free: list[int] = []
        self._taken = np.zeros(self.capacity, bool)

    @property
    def free(self) -> int:
        return len(self._free) + self.capacity - self._made

    @property
    def used(self) -> int:
        """Slots taken."""
        return self.capacity - self.free

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

    def close(self) -> None:
        self._accountant.release(self.name, self._made * self.slot_bytes)
        self._slabs, self._free = [], []
        self.capacity = self._made = 0

    def _grow(self) -> None:
        n = min(self._per_slab, self.capacity - self._made)
        self._accountant.charge(self.name, n * self.slot_bytes)
        try:
            slab = self._make_slab(n * self.slot_bytes)
        except BaseException:
            self._accountant.release(self.name, n * self.slot_bytes)
            raise
        self._slabs.append(slab)
        self._addresses[self._made : self._made + n] = slab.address + np.arange(n) * self.slot_bytes
        self._free[:0] = range(self._made + n - 1, self._made - 1, -1)
        self._made += n
