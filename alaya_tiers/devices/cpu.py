"""A machine without a GPU: plain memory, every call complete when it returns."""

import contextlib
import mmap
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers import attention, kernel
from alaya_tiers.attention import BlockList, Partial
from alaya_tiers.devices.base import Addresses, Ask, Event, Hits, Scanning


def plain_slab(nbytes: int) -> Tensor:
    """Page-aligned memory of this process, uint8 [nbytes]."""
    return torch.frombuffer(huge(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)), dtype=torch.uint8)


def huge(memory: mmap.mmap) -> mmap.mmap:
    """The same memory, in huge pages where the kernel has them: fewer TLB misses."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Past:
    """An event of something that has happened."""

    def done(self) -> bool:
        return True


PAST = Past()


class CpuScan:
    """A scan by the compiled kernel: each half has happened when its call returns.

    room: memory for so many bytes, the scan's alone until it has found.
    """

    def __init__(self, ask: Ask, room: Callable[[int], npt.NDArray[np.uint8]]) -> None:
        self._ask, (heads, rows, _) = ask, ask.q.shape
        _, v_dim, tokens, *_ = ask.shape
        self._every = ask.blocks.shape[1] * tokens
        self._room = room(kernel.scan_room(ask.q, ask.blocks.shape[1], v_dim, tokens))
        self._best = np.empty((heads, rows), np.int32)
        self._out = torch.empty(heads, rows), torch.empty(heads, rows, v_dim), torch.empty(heads, rows)
        self._run(ask.start, None)

    def best(self) -> npt.NDArray[np.int32]:
        return self._best

    def finish(self, start: Tensor) -> None:
        self._found, self._n = self._run(start.contiguous(), self._out)

    def found(self) -> Hits:
        places = enumerate(self._n.tolist())
        return Hits([self._found[h * self._every : h * self._every + n].copy() for h, n in places], *self._out)

    def _run(
        self, start: Tensor, out: tuple[Tensor, Tensor, Tensor] | None
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        q, blocks, first, count, _, reach, shape, numbers, most = self._ask
        sizes = (*shape, self._every if most is None else most)
        return kernel.scan(q, blocks, first, count, sizes, numbers, reach, start, self._best, self._room, out)


class Cpu:
    """The CPU as a device."""

    place = torch.device("cpu")
    on_cpu = True

    def slab(self, nbytes: int) -> Tensor:
        return plain_slab(nbytes)

    def host_slab(self, nbytes: int) -> Tensor:
        return plain_slab(nbytes)

    def scratch(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, stream: int, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    def record(self, stream: int) -> Event:
        return PAST

    def wait(self, stream: int, event: Event) -> None:
        assert event.done()

    def write_rows(self, k: Tensor, v: Tensor, addresses: Addresses) -> None:
        attention.write_rows(k, v, addresses)

    def fill(self, targets: Sequence[Tensor]) -> None:
        for target in targets:
            target.zero_()

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
        return attention.attend_blocks(q, blocks, scale, lo, hi, softcap, top)

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
        return attention.attend_lists(q, addresses, first, *dims, dtype, scale, softcap)

    def gather(self, blocks: BlockList, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        return attention.gather(blocks, lo, hi)

    def scan(self, ask: Ask) -> Scanning | None:
        return CpuScan(ask, lambda nbytes: np.empty(nbytes, np.uint8))

    def settle(self) -> None:
        """Everything has happened."""


CPU = Cpu()
