"""The copies between device tier and host tier, and the kernels that read the device tier, in an order that is safe.

Device slots are safe by streams alone: whoever touches one makes its stream wait for the last who did (``order.py``),
so a slot may be given back and taken again while a kernel or a copy still reads it. Host slots are the CPU's: whoever
asked for a copy keeps them until its event is done.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers import kernel
from alaya_tiers.attention import BlockList, Partial
from alaya_tiers.devices.base import COMPUTE, DOWN, STREAMS, UP, Ask, Device, Event, Scanning
from alaya_tiers.devices.order import Order
from alaya_tiers.tiers.arena import Arena
from alaya_tiers.tiers.base import Slots

NO_SLOTS: Slots = np.empty(0, np.int32)

Sizes = npt.NDArray[np.int64]


class Lanes:
    """Between ``near``, slots of ``device``, and ``far``, slots in host memory. Used under the mover's lock."""

    def __init__(self, device: Device, near: Arena, far: Arena) -> None:
        self.device, self.near, self.far = device, near, far
        self._order = Order(near.capacity)
        self._events: list[deque[tuple[int, Event]]] = [deque() for _ in range(STREAMS)]

    # ------------------------------------------------------------------ copies
    def down(self, src: Slots, dst: Slots, nbytes: Sizes) -> Event | None:
        """Copy the first ``nbytes[i]`` of device slot src[i] to host slot dst[i]. None: complete; else see above."""
        if self.device.on_cpu:
            copy_now(self.near, src, self.far, dst, nbytes)
            return None
        with self._told(DOWN, src, NO_SLOTS):
            self.device.copy(DOWN, *paired(self.near, src, self.far, dst, nbytes))
        return self._events[DOWN][-1][1]

    def read(self, slots: Slots, nbytes: int) -> tuple[Tensor, Event]:
        """The first bytes of device slots, uint8 [n, nbytes] in memory of the CPU: there once the event is done."""
        rows = self.device.scratch(slots.size * nbytes).view(slots.size, nbytes)
        with self._told(DOWN, slots, NO_SLOTS):
            self.device.copy(DOWN, [self.near.tensor(slot)[:nbytes] for slot in slots.tolist()], list(rows))
        return rows, self._events[DOWN][-1][1]

    def up(self, src: Slots, dst: Slots, nbytes: Sizes) -> Event | None:
        """The same from host slots to device slots."""
        if self.device.on_cpu:
            copy_now(self.far, src, self.near, dst, nbytes)
            return None
        with self._told(UP, NO_SLOTS, dst):
            self.device.copy(UP, *paired(self.far, src, self.near, dst, nbytes))
        return self._events[UP][-1][1]

    def put(self, rows: Sequence[Tensor], slots: Slots, targets: Sequence[Tensor]) -> Event:
        """Copy memory of the CPU, the device's ``scratch``, to pieces of these device slots: to be kept until then."""
        with self._told(UP, NO_SLOTS, slots):
            self.device.copy(UP, rows, targets)
        return self._events[UP][-1][1]

    def across(self, src: Slots, dst: Slots, nbytes: Sizes) -> None:
        """The same from device slots to others."""
        if self.device.on_cpu:
            copy_now(self.near, src, self.near, dst, nbytes)
        elif src.size:
            with self._told(COMPUTE, src, dst):
                self.device.copy(COMPUTE, *paired(self.near, src, self.near, dst, nbytes))

    # ------------------------------------------------------------------ kernels
    def write(self, k: Tensor, v: Tensor, slots: Slots, offset: int) -> None:
        """Write rows, one head's to each slot, from byte ``offset`` on. k, v: [heads, n, dim] where the device is."""
        with self._told(COMPUTE, NO_SLOTS, slots):
            self.device.write_rows(k, v, self.near.addresses(slots) + offset)

    def blank(self, slots: Slots, start: int, end: int) -> None:
        """Zeros into bytes ``start`` to ``end`` of slots."""
        with self._told(COMPUTE, NO_SLOTS, slots):
            self.device.fill([self.near.tensor(slot)[start:end] for slot in slots.tolist()])

    def attend(
        self,
        q: Tensor,
        slots: Slots,
        blocks: BlockList,
        scale: float,
        lo: npt.NDArray[np.int32],
        hi: npt.NDArray[np.int32],
        softcap: float | None,
        top: Tensor | None = None,
    ) -> Partial:
        """attention.attend_blocks over device slots. blocks: with addresses in these slots."""
        with self._told(COMPUTE, slots.ravel(), NO_SLOTS):
            return self.device.attend(q, blocks, scale, lo, hi, softcap, top)

    def attend_lists(
        self,
        q: Tensor,
        slots: Slots,
        addresses: npt.NDArray[np.int64],
        first: npt.NDArray[np.int64],
        dims: tuple[int, int],
        dtype: torch.dtype,
        scale: float,
        softcap: float | None,
    ) -> Partial:
        """attention.attend_lists over tokens in these device slots."""
        with self._told(COMPUTE, slots, NO_SLOTS):
            return self.device.attend_lists(q, addresses, first, dims, dtype, scale, softcap)

    def scan(self, slots: Slots, ask: Ask) -> Scanning | None:
        """Begin a scan of codes in these device slots."""
        with self.reading(slots):
            return self.device.scan(ask)

    @contextmanager
    def reading(self, slots: Slots) -> Iterator[None]:
        """Around a kernel that reads device slots."""
        with self._told(COMPUTE, slots.ravel(), NO_SLOTS):
            yield

    def gather(self, slots: Slots, blocks: BlockList, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """attention.gather over device slots."""
        with self._told(COMPUTE, slots.ravel(), NO_SLOTS):
            return self.device.gather(blocks, lo, hi)

    # ------------------------------------------------------------------ inside
    @contextmanager
    def _told(self, stream: int, reads: Slots, writes: Slots) -> Iterator[None]:
        """Around what a stream is told: it waits for whoever it must, and others can wait for it."""
        for other, tick in self._order.before(stream, reads, writes):
            self._wait(stream, other, tick)
        yield
        tick = self._order.after(stream, reads, writes)
        events = self._events[stream]
        while events and events[0][1].done():
            events.popleft()
        events.append((tick, self.device.record(stream)))

    def _wait(self, stream: int, other: int, tick: int) -> None:
        for when, event in self._events[other]:
            if when >= tick:
                self.device.wait(stream, event)
                return


def copy_now(source: Arena, src: Slots, target: Arena, dst: Slots, nbytes: Sizes) -> None:
    """Copy between slots the CPU reads; complete on return."""
    kernel.copy(source.addresses(src), target.addresses(dst), nbytes, None)


def paired(source: Arena, src: Slots, target: Arena, dst: Slots, nbytes: Sizes) -> tuple[list[Tensor], list[Tensor]]:
    """The memory of both ends, whole slots that lie side by side at both in one piece: a copy's start costs as much as
    some 100 KB of it."""
    order = np.argsort(src, kind="stable")
    src, dst, nbytes = src[order], dst[order], nbytes[order]
    size = source.slot_bytes
    joined = (np.diff(src) == 1) & (np.diff(dst) == 1) & (nbytes[:-1] == size)
    joined &= source.same_slab(src[:-1], src[1:]) & target.same_slab(dst[:-1], dst[1:])
    bounds = np.concatenate([[0], np.flatnonzero(~joined) + 1, [src.size]]).tolist() if src.size else []
    sources, targets = [], []
    for a, b in pairwise(bounds):
        length = (b - a - 1) * size + int(nbytes[b - 1])
        sources.append(source.span(int(src[a]), length))
        targets.append(target.span(int(dst[a]), length))
    return sources, targets
