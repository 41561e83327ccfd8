"""A CUDA GPU: two side streams beside the caller's, host memory registered slab by slab, kernels in Triton.

The compute stream is whichever is current where the forward runs; if that changes, the new one first waits for the old.
Tables for kernels go up from pinned memory of torch's own pool, which keeps it until the copy is done. Nothing here
waits for the GPU but ``settle``. Imported only for a model that is on a GPU.
"""

import ctypes
import mmap
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers.attention import BlockList, Partial, attend_naive
from alaya_tiers.devices import kernels
from alaya_tiers.devices.base import COMPUTE, DOWN, UP, Addresses, Event
from alaya_tiers.devices.cpu import huge
from alaya_tiers.errors import DeviceError


class Cuda:
    """One GPU."""

    on_cpu = False

    def __init__(self, place: torch.device) -> None:
        self.place = torch.empty(0, device=place).device  # "cuda" alone means the current one
        self._side = {DOWN: torch.cuda.Stream(self.place), UP: torch.cuda.Stream(self.place)}
        self._last: Any = None
        self._fresh: Any = None

    # ------------------------------------------------------------------ memory
    def slab(self, nbytes: int) -> Tensor:
        made = torch.empty(nbytes, dtype=torch.uint8, device=self.place)
        self._fresh = torch.cuda.Event()  # torch may hand out memory that kernels of this stream still use
        self._fresh.record(torch.cuda.current_stream(self.place))
        for stream in self._side.values():
            stream.wait_event(self._fresh)
        return made

    def host_slab(self, nbytes: int) -> Tensor:
        return torch.frombuffer(_Registered(nbytes, self.place), dtype=torch.uint8)

    def scratch(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    # ------------------------------------------------------------------ streams
    def copy(self, stream: int, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        with torch.cuda.stream(self._stream(stream)):
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)

    def record(self, stream: int) -> Event:
        event = torch.cuda.Event()
        event.record(self._stream(stream))
        return _Recorded(event)

    def wait(self, stream: int, event: Event) -> None:
        assert isinstance(event, _Recorded)
        self._stream(stream).wait_event(event.event)

    def settle(self) -> None:
        torch.cuda.synchronize(self.place)

    def _stream(self, stream: int) -> torch.cuda.Stream:
        if stream != COMPUTE:
            return self._side[stream]
        current = torch.cuda.current_stream(self.place)
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        if self._fresh is not None:
            current.wait_event(self._fresh)
        self._last, self._fresh = current, None
        return current

    # ------------------------------------------------------------------ kernels
    def write_rows(self, k: Tensor, v: Tensor, addresses: Addresses) -> None:
        self._stream(COMPUTE)
        kernels.write_rows(k, v, self._up(addresses))

    def fill(self, targets: Sequence[Tensor]) -> None:
        self._stream(COMPUTE)
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
        self._stream(COMPUTE)
        if blocks.latent or blocks.dtype not in kernels.DTYPES or q.shape[1] > kernels.MOST_ROWS:
            return self._attend_plainly(q, blocks, scale, lo, hi, softcap, top)
        seen = (blocks.starts + blocks.counts > lo.min()) & (blocks.starts < hi.max())
        table = kernels.Table(
            self._up(blocks.addresses[:, seen]), self._up(blocks.starts[seen]), self._up(blocks.counts[seen]),
            blocks.k_dim, blocks.v_dim, blocks.dtype, int(blocks.counts.max(initial=1)),
        )  # fmt: skip
        return kernels.attend_blocks(q, table, scale, self._up(lo), self._up(hi), softcap, top)

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
        self._stream(COMPUTE)
        longest = int(np.diff(first).max(initial=0))
        return kernels.attend_lists(q, self._up(addresses), self._up(first), longest, dims, dtype, scale, softcap)

    def gather(self, blocks: BlockList, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        self._stream(COMPUTE)
        rows = torch.empty(
            blocks.addresses.shape[0], hi - lo, blocks.k_dim + blocks.v_dim, dtype=blocks.dtype, device=self.place
        )
        kernels.gather(
            self._up(blocks.addresses), self._up(blocks.starts), self._up(blocks.counts),
            int(blocks.counts.max(initial=1)), lo, hi, rows,
        )  # fmt: skip
        return rows[..., : blocks.k_dim], rows[..., blocks.k_dim :]

    def _attend_plainly(
        self,
        q: Tensor,
        blocks: BlockList,
        scale: float,
        lo: npt.NDArray[np.int32],
        hi: npt.NDArray[np.int32],
        softcap: float | None,
        top: Tensor | None,
    ) -> Partial:
        """For dtypes and numbers of rows the kernels do not take: copied together, then in torch."""
        ends = np.cumsum(blocks.counts, dtype=np.int32)
        packed = BlockList(
            blocks.addresses, ends - blocks.counts, blocks.counts, blocks.k_dim, blocks.v_dim, blocks.dtype
        )
        k, v = self.gather(packed, 0, int(ends[-1]) if ends.size else 0)
        if blocks.latent:
            k, v = torch.cat([k, v], -1), k
        positions = np.repeat(blocks.starts - packed.starts, blocks.counts) + np.arange(k.shape[1])
        visible = self._up((positions >= lo[:, None]) & (positions < hi[:, None]))
        if top is not None:
            top.copy_(kernels.scores(q, k, scale, softcap).masked_fill(~visible, -torch.inf).amax(-1))
        part = attend_naive(q, k, v, scale, visible, softcap)
        return Partial(part.out.float(), part.lse.float())

    def _up(self, table: npt.NDArray[Any]) -> Tensor:
        """A small table of the CPU's, on its way to the GPU in the compute stream."""
        return torch.from_numpy(np.ascontiguousarray(table)).pin_memory().to(self.place, non_blocking=True)


class _Recorded:
    """A CUDA event."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def done(self) -> bool:
        return bool(self.event.query())


class _Registered(mmap.mmap):
    """Memory of this process that the GPU reads and writes by itself, for as long as it is mapped."""

    def __new__(cls, nbytes: int, place: torch.device) -> Self:
        made = super().__new__(cls, -1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        huge(made)
        made.address = ctypes.addressof(ctypes.c_char.from_buffer(made))
        with torch.cuda.device(place):
            failed = int(torch.cuda.cudart().cudaHostRegister(made.address, nbytes, 0))
        if failed:
            made.address = 0
            raise DeviceError(
                f"CUDA would not register {nbytes} bytes of host memory (error {failed}): raise the limit of locked "
                "memory (ulimit -l), or take a smaller host_budget"
            )
        return made

    address = 0

    def __del__(self) -> None:
        if self.address:
            torch.cuda.cudart().cudaHostUnregister(self.address)
