"""What a device is: memory of its own, streams that work behind the program's back, attention where its memory lies.

    COMPUTE   the forward's own stream: writes new rows, attends
    DOWN      copies of blocks to host memory
    UP        copies of blocks from host memory

A stream does what it was told in that order; nothing orders two streams but an event that one records and another waits
for. Nothing here ever blocks the caller, but ``settle``. Which waits are needed is decided by ``order.py``.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

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


class Ask(NamedTuple):
    """What a scan of coded blocks is asked; all of it in memory of the CPU. See index.codes.scan.

    q: float32 [heads, rows, dims], rotated. blocks: int64 [heads, n], where codes lie on the device that scans. first,
    counts: int32 [n]. start: float32 [heads, rows], scores known before. reach: float32 [heads].
    """

    q: Tensor
    blocks: Addresses
    first: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]
    start: Tensor
    reach: npt.NDArray[np.float32]
    shape: tuple[int, int, int, int, int]
    """dims, v_dim, tokens of a coded block, bits, where codes begin."""
    numbers: tuple[float, float, float]
    """scale, softcap or 0, share of an error's length that is allowed for."""
    most: int | None
    """Keys of a head to be found at most."""

    @property
    def nbytes(self) -> int:
        """Bytes of a coded block."""
        dims, _, tokens, bits, codes_at = self.shape
        return codes_at + tokens * dims * bits // 8


class Hits(NamedTuple):
    """What a scan found, in memory of the CPU: see index.codes.Scan."""

    tokens: list[npt.NDArray[np.int32]]
    top: Tensor
    rest: Tensor
    rest_lse: Tensor


class Scanning(Protocol):
    """A scan under way: its first half was told to the device."""

    def best(self) -> npt.NDArray[np.int32]:
        """The key with the best score of each row, [heads, rows], -1: none. Waits for the first half."""
        ...

    def finish(self, start: Tensor) -> None:
        """Tell the device the second half, on COMPUTE. start: float32 [heads, rows], scores known by now."""
        ...

    def found(self) -> Hits:
        """Waits for the second half."""
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

    def scan(self, ask: Ask) -> Scanning | None:
        """Begin a scan of codes in this device's memory, on COMPUTE; None where it does not take so much or so many."""
        ...

    def settle(self) -> None:
        """Block until every stream has done what it was told: before memory is given up, never on the hot path."""
        ...
