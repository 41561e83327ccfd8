"""A CUDA GPU: two side streams beside the caller's, host memory registered slab by slab, kernels in Triton.

The compute stream is whichever is current where the forward runs; if that changes, the new one first waits for the old.
Tables for kernels go up in one piece from pinned memory of torch's own pool, which keeps it until the copy is done.
Nothing here waits for the GPU but ``settle``, and whoever asks a scan what it found: for that copy alone. Imported only
for a model that is on a GPU.
"""

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers.attention import BlockList, Partial, attend_naive
from alaya_tiers.devices import kernels, scan_kernels
from alaya_tiers.devices.base import COMPUTE, DOWN, UP, Addresses, Ask, Event, Hits, Scanning
from alaya_tiers.devices.cpu import huge
from alaya_tiers.errors import DeviceError

MOST_SCANNED = 256
"""Numbers of a key or value that a scan's kernels hold."""


class Cuda:
    """One GPU."""

    on_cpu = False

    def __init__(self, place: torch.device) -> None:
        self.place = torch.empty(0, device=place).device  # "cuda" alone means the current one
        self._side = {DOWN: torch.cuda.Stream(self.place), UP: torch.cuda.Stream(self.place)}
        self._last: Any = None
        self._fresh: list[Any] = []

    # ------------------------------------------------------------------ memory
    def slab(self, nbytes: int) -> Tensor:
        made = torch.empty(nbytes, dtype=torch.uint8, device=self.place)
        fresh = torch.cuda.Event()  # torch may hand out memory that kernels of this stream still use
        fresh.record(torch.cuda.current_stream(self.place))
        for stream in self._side.values():
            stream.wait_event(fresh)
        self._fresh.append(fresh)
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
        for event in self._fresh:
            current.wait_event(event)
        self._last, self._fresh = current, []
        return current

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around kernels: Triton launches where torch's current device is, which need not be ours."""
        with torch.cuda.device(self.place):
            self._stream(COMPUTE)
            yield

    # ------------------------------------------------------------------ kernels
    def write_rows(self, k: Tensor, v: Tensor, addresses: Addresses) -> None:
        with self.computing():
            kernels.write_rows(k.to(self.place), v.to(self.place), *self.up(addresses))  # of a layer on another GPU

    def fill(self, targets: Sequence[Tensor]) -> None:
        with self.computing():
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
        q = q.to(self.place)
        with self.computing():
            if blocks.latent or blocks.dtype not in kernels.DTYPES or q.shape[1] > kernels.MOST_ROWS:
                return self._attend_plainly(q, blocks, scale, lo, hi, softcap, top)
            seen = (blocks.starts + blocks.counts > lo.min()) & (blocks.starts < hi.max())
            addresses, starts, counts, low, high = self.up(
                blocks.addresses[:, seen], blocks.starts[seen], blocks.counts[seen], lo, hi
            )
            most = int(blocks.counts.max(initial=1))
            table = kernels.Table(addresses, starts, counts, blocks.k_dim, blocks.v_dim, blocks.dtype, most)
            return kernels.attend_blocks(q, table, scale, low, high, softcap, top)

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
        longest = int(np.diff(first).max(initial=0))
        with self.computing():
            at, begins = self.up(addresses, first)
            return kernels.attend_lists(q, at, begins, longest, dims, dtype, scale, softcap)

    def gather(self, blocks: BlockList, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        width, most = blocks.k_dim + blocks.v_dim, int(blocks.counts.max(initial=1))
        with self.computing():
            rows = torch.empty(blocks.addresses.shape[0], hi - lo, width, dtype=blocks.dtype, device=self.place)
            addresses, starts, counts = self.up(blocks.addresses, blocks.starts, blocks.counts)
            kernels.gather(addresses, starts, counts, most, lo, hi, rows)
        return rows[..., : blocks.k_dim], rows[..., blocks.k_dim :]

    def scan(self, ask: Ask) -> Scanning | None:
        dims, v_dim, *_ = ask.shape
        if ask.most is not None or ask.q.shape[1] > scan_kernels.MOST_ROWS or max(dims, v_dim) > MOST_SCANNED:
            return None
        with self.computing():
            return _Scan(self, ask)

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
        (visible,) = self.up((positions >= lo[:, None]) & (positions < hi[:, None]))
        if top is not None:
            top.copy_(kernels.scores(q, k, scale, softcap).masked_fill(~visible, -torch.inf).amax(-1))
        part = attend_naive(q, k, v, scale, visible, softcap)
        return Partial(part.out.float(), part.lse.float())

    def up(self, *tables: npt.NDArray[Any]) -> list[Tensor]:
        """Small tables of the CPU's, on their way to the GPU in the compute stream: one copy for all."""
        whole, places = packed(tables)
        above = whole.pin_memory().to(self.place, non_blocking=True)
        return unpacked(above, tables, places)


def packed(tables: Sequence[npt.NDArray[Any]]) -> tuple[Tensor, list[int]]:
    """All tables in one piece of memory, uint8, and where each begins: at a multiple of 16 bytes, for wide reads."""
    sizes = [-(-table.nbytes // 16) * 16 for table in tables]
    places = [0, *np.cumsum(sizes).tolist()]
    whole = np.empty(max(places[-1], 16), np.uint8)
    for table, place in zip(tables, places, strict=False):
        whole[place : place + table.nbytes] = np.ascontiguousarray(table).reshape(-1).view(np.uint8)
    return torch.from_numpy(whole), places


def unpacked(whole: Tensor, tables: Sequence[npt.NDArray[Any]], places: Sequence[int]) -> list[Tensor]:
    """The tables again, as tensors where ``whole`` is."""
    found = []
    for table, place in zip(tables, places, strict=False):
        dtype = torch.from_numpy(np.empty(0, table.dtype)).dtype
        found.append(whole[place : place + table.nbytes].view(dtype).view(table.shape))
    return found


class _Scan:
    """A scan under way: what it found comes down behind it, and is waited for when it is asked for."""

    def __init__(self, device: Cuda, ask: Ask) -> None:
        self._device = device
        dims, v_dim, tokens, bits, codes_at = ask.shape
        scale, softcap, margin = ask.numbers
        whole = scan_kernels.rounded(ask.q, margin)
        tables = (ask.q, *whole, ask.start, ask.blocks, ask.first, ask.counts, ask.reach)
        q, parts, sums, numbers, start, blocks, first, counts, reach = device.up(*map(_array, tables))
        asked = scan_kernels.Asked(q, scan_kernels.Rounded(parts, sums, numbers), blocks, first, counts, start, reach)
        shape = scan_kernels.Shape(dims, v_dim, tokens, bits, codes_at)
        self._began = scan_kernels.begin(asked, shape, scale, softcap, margin)
        self._best = _Coming(self._began.best, self._began.token)

    def best(self) -> npt.NDArray[np.int32]:
        best, token = self._best.wait()
        split = best.argmax(1, keepdims=True)
        found: npt.NDArray[np.int32] = np.take_along_axis(token, split, 1)[:, 0]
        return found

    def finish(self, start: Tensor) -> None:
        with self._device.computing():
            (above,) = self._device.up(start.numpy())
            done = scan_kernels.finish(self._began, above)
            self._n, self._done = done.n, _Coming(*done)

    def found(self) -> Hits:
        lists, n, top, rest, lse = self._done.wait()
        lengths = n.sum(1)
        if (longest := int(lengths.max(initial=0))) > lists.shape[1]:
            with torch.cuda.device(self._device.place):
                (lists,) = _Coming(scan_kernels.packed(self._began, self._n, longest)).wait()
        tokens = [row[:length].copy() for row, length in zip(lists, lengths.tolist(), strict=True)]
        return Hits(tokens, *(torch.from_numpy(x) for x in (top, rest, lse)))


class _Coming:
    """Tensors of the GPU on their way down in the current stream, to pinned memory of torch's pool."""

    def __init__(self, *tensors: Tensor) -> None:
        self._below = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> list[npt.NDArray[Any]]:
        """What they hold, once they are down."""
        self._event.synchronize()
        return [tensor.numpy() for tensor in self._below]


def _array(x: Any) -> npt.NDArray[Any]:
    return x.numpy() if isinstance(x, Tensor) else np.asarray(x)


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
