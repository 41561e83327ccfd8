"""A machine without a GPU: plain memory, every call complete when it returns."""

import contextlib
import mmap
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers import attention
from alaya_tiers.attention import BlockList, Partial
from alaya_tiers.devices.base import Addresses, Event


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

    def settle(self) -> None:
        """Everything has happened."""


CPU = Cpu()
