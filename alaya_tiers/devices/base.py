"""What a device is: memory of its own, streams that work behind the program's back, attention where its memory lies.

    COMPUTE   the forward's own stream: writes new rows, attends
    DOWN      copies of blocks to host memory
    UP        copies of blocks from host memory

A stream does what it was told in that order; nothing orders two streams but an event that one records and another waits
for. Nothing here ever blocks the caller, but ``settle``. Which waits are needed is decided by ``order.py``.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers.attention import BlockList, Partial

COMPUTE, DOWN, UP = range(3)
STREAMS = 3

Addresses = npt.NDArray[np.int64]


class Event(Protocol):
    """A point in a stream."""

    def done(self) -> bool:
        """Whether the stream has got there. Never blocks."""
        ...


class Device(Protocol):
    """One device. The caller serialises calls (the mover's lock), and vouches for memory until its events are done.

    Addresses are of rows of [k | v] in slabs of this device, or in its ``host_slab``s, int64.
    """

    place: torch.device
    """Where results are, and slabs as tensors."""
    on_cpu: bool
    """Whether the CPU reads its memory at addresses, and everything has happened when a call returns."""

    def slab(self, nbytes: int) -> Tensor:
        """Memory of the device, uint8 [nbytes], page-aligned."""
        ...

    def host_slab(self, nbytes: int) -> Tensor:
        """Memory of the host that copies run from and to without a detour, uint8 [nbytes], page-aligned."""
        ...

    def scratch(self, nbytes: int) -> Tensor:
        """Memory of the host for one copy, uint8 [nbytes]."""
        ...

    def copy(self, stream: int, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Copy uint8 tensors of equal sizes, one of each pair on the device."""
        ...

    def record(self, stream: int) -> Event:
        """The point after all that the stream was told so far."""
        ...

    def wait(self, stream: int, event: Event) -> None:
        """What the stream is told from now on happens after the event."""
        ...

    def write_rows(self, k: Tensor, v: Tensor, addresses: Addresses) -> None:
        """attention.write_rows, on COMPUTE."""
        ...

    def fill(self, targets: Sequence[Tensor]) -> None:
        """Zeros into uint8 tensors of the device, on COMPUTE."""
        ...

    def attend(
        self,
        q: Tensor,
        blocks: BlockList,
        scale: float,
        lo: npt.NDArray[np.int32],
        hi: npt.NDArray[np.int32],
        softcap: float | None,
        top: Tensor | None = None,
    ) -> Partial:
        """attention.attend_blocks, on COMPUTE. top: where q is."""
        ...

    def attend_lists(
        self,
        q: Tensor,
        addresses: Addresses,
        first: npt.NDArray[np.int64],
        dims: tuple[int, int],
        dtype: torch.dtype,
        scale: float,
        softcap: float | None,
    ) -> Partial:
        """attention.attend_lists, on COMPUTE. dims: k_dim, v_dim."""
        ...

    def gather(self, blocks: BlockList, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """attention.gather, on COMPUTE."""
        ...

    def settle(self) -> None:
        """Block until every stream has done what it was told: before memory is given up, never on the hot path."""
        ...
