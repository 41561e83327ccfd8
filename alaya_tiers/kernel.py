"""The compiled kernel (attend.c), through ctypes: one thin typed function per C function. ctypes releases the GIL."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers.errors import AlayaError

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Storage dtypes the kernel reads, with their number in attend.c."""

_COPY_PAYS = 1 << 20  # bytes from which a second thread makes a copy faster


class KernelMissing(AlayaError, ImportError):
    """The compiled kernel is not there: the package was not built, or built for another Python."""


@cache
def _library() -> ctypes.CDLL:
    here = Path(__file__).parent
    found = [path for suffix in EXTENSION_SUFFIXES if (path := here / f"_attend{suffix}").exists()]
    if not found:
        raise KernelMissing("alaya_tiers._attend is missing: install with pip, which needs a C compiler (gcc or clang)")
    try:
        return _typed(ctypes.CDLL(str(found[0])))
    except AttributeError as error:
        raise KernelMissing(f"{found[0]} was built from other sources: install again with pip") from error


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, its functions typed, torch's threads lent to it. Raises AttributeError when it lacks a function."""
    library.alaya_borrow.argtypes = [ctypes.c_void_p]
    library.alaya_borrow.restype = None
    library.alaya_borrow(_gomp_parallel())
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    attend_arguments: list[type[Any]] = [number] + [pointer] * 6 + [number] * 7
    library.alaya_attend_blocks.argtypes = attend_arguments + [ctypes.c_int32] + [ctypes.c_float] * 2 + [pointer] * 3
    library.alaya_attend_lists.argtypes = (
        [number] + [pointer] * 3 + [number] * 5 + [ctypes.c_int32] + [ctypes.c_float] * 2 + [pointer] * 2
    )
    library.alaya_scan.argtypes = [number] * 2 + [pointer] * 5 + [number] * 9 + [ctypes.c_float] * 3 + [pointer] * 7
    library.alaya_scan_room.argtypes = [number] * 6
    library.alaya_scan.restype = library.alaya_scan_room.restype = number
    library.alaya_near.argtypes = [number] + [pointer] * 4 + [number] * 5 + [ctypes.c_float] * 3 + [pointer] * 2
    library.alaya_best_parts.argtypes = [pointer] * 2 + [number] * 4 + [pointer]
    library.alaya_within.argtypes = [pointer] * 3 + [number] * 3 + [pointer]
    library.alaya_left.argtypes = [number] + [pointer] * 4 + [number] * 6 + [pointer] * 2
    for function in (library.alaya_near, library.alaya_best_parts, library.alaya_within, library.alaya_left):
        function.restype = None
    library.alaya_walk.argtypes = [pointer] * 6 + [number] * 8 + [ctypes.c_float] + [pointer] * 3
    library.alaya_walk.restype = number
    library.alaya_digest.argtypes = [pointer, number, pointer, number, number, pointer]
    library.alaya_digest.restype = None
    library.alaya_read.argtypes = [number, pointer, pointer, pointer, pointer, number, number, pointer]
    library.alaya_copy_blocks.argtypes = [number, pointer, pointer, pointer, number]
    library.alaya_copy_blocks.restype = None
    library.alaya_write_rows.argtypes = [number, pointer, pointer, pointer, *[number] * 8]
    library.alaya_write_rows.restype = None
    return library


def _gomp_parallel() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime torch was linked with; None where torch uses another."""
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:  # a look-up in a library also searches what it was linked with
        return ctypes.cast(ctypes.CDLL(str(torch_cpu)).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def attend(
    q: Tensor,
    addresses: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int32],
    counts: npt.NDArray[np.int32],
    dims: tuple[int, int, int, int],
    scale: float,
    softcap: float,
    lo: npt.NDArray[np.int32],
    hi: npt.NDArray[np.int32],
    out: Tensor,
    lse: Tensor,
    top: Tensor | None = None,
) -> None:
    """attention.attend_blocks on arguments contiguous in their last dimension.

    dims: k_dim, v_dim, where in a row the value begins, number of the storage dtype in DTYPES. Raises MemoryError.
    """
    library = _library()
    heads, rows, _ = q.shape
    failed = library.alaya_attend_blocks(
        torch.get_num_threads(), q.data_ptr(),
        _address(addresses), _address(starts), _address(counts), _address(lo), _address(hi),
        heads, rows, len(starts), addresses.strides[0] // 8, *dims, scale, softcap, out.data_ptr(), lse.data_ptr(),
        None if top is None else top.data_ptr(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the partial results of attention")


def attend_lists(
    q: Tensor,
    addresses: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
    dims: tuple[int, int, int, int],
    scale: float,
    softcap: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """attention.attend_lists on contiguous arguments. dims as for ``attend``. Raises MemoryError."""
    heads, rows, _ = q.shape
    failed = _library().alaya_attend_lists(
        torch.get_num_threads(), q.data_ptr(), _address(addresses), _address(first), heads, rows, *dims, scale, softcap,
        out.data_ptr(), lse.data_ptr(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the partial results of attention")


def scan_room(q: Tensor, blocks: int, v_dim: int, tokens: int) -> int:
    """Bytes of its own that a scan of so many blocks for each head of q [heads, rows, dims] needs."""
    heads, rows, dims = q.shape
    room: int = _library().alaya_scan_room(heads, rows, blocks, dims, v_dim, tokens)
    return room


def scan(
    q: Tensor,
    blocks: npt.NDArray[np.int64],
    first: npt.NDArray[np.int32],
    count: npt.NDArray[np.int32],
    dims: tuple[int, int, int, int, int, int],
    numbers: tuple[float, float, float],
    reach: npt.NDArray[np.float32],
    seed: Tensor,
    best: npt.NDArray[np.int32],
    room: npt.NDArray[np.uint8],
    out: Sequence[Tensor] | None,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """index.codes.scan on contiguous arguments: without ``out`` its first half, which leaves ``best``; then its second.

    dims: dims, v_dim, tokens of a coded block, bits, where codes begin, budget. numbers: scale, softcap, share of an
    error allowed. out: top, rest, lse. Returns what was found, in ``room``, and how much of it is each head's.
    """
    heads, rows, _ = q.shape
    n_found = np.zeros(heads, np.int64)
    results = (0, 0, 0) if out is None else tuple(tensor.data_ptr() for tensor in out)
    at = _library().alaya_scan(
        torch.get_num_threads(), out is not None, q.data_ptr(), _address(blocks), _address(first), _address(count),
        seed.data_ptr(), heads, rows, blocks.shape[1], *dims, *numbers, _address(reach), _address(best),
        _address(n_found), *results, _address(room),
    )  # fmt: skip
    return room[at : at + 4 * heads * blocks.shape[1] * dims[2]].view(np.int32), n_found


def near(
    q: Tensor,
    blocks: npt.NDArray[np.int64],
    parts: int,
    numbers: tuple[float, float, float],
    out: npt.NDArray[np.float32],
) -> None:
    """index.summary.near on contiguous arguments. out: float32 [2, heads, n, parts, rows], most and mean.

    numbers: scale, softcap, deviations allowed for (below 0: any there can be).
    """
    heads, rows, dims = q.shape
    squares, length = q**2, q.norm(dim=2)
    _library().alaya_near(
        torch.get_num_threads(), q.data_ptr(), squares.data_ptr(), length.data_ptr(), _address(blocks), heads, rows,
        blocks.shape[1], parts, dims, *numbers, _address(out[0]), _address(out[1]),
    )  # fmt: skip


def best_parts(
    mean: npt.NDArray[np.float32], many: npt.NDArray[np.float32], most: int, chosen: npt.NDArray[np.bool_]
) -> None:
    """Mark the ``most`` parts of the largest ``mean`` [heads, n, parts, rows], of each row, of which keys count.

    many: [n, parts], logarithm of how many do, -inf: none. chosen: bool [n, parts].
    """
    heads, n, parts, rows = mean.shape
    _library().alaya_best_parts(_address(mean), _address(many), heads, rows, n * parts, most, _address(chosen))


def within(
    most: npt.NDArray[np.float32], least: Tensor, many: npt.NDArray[np.float32], chosen: npt.NDArray[np.bool_]
) -> None:
    """Mark parts of which ``most`` [heads, n, parts, rows] is at least ``least`` [heads, rows] in some row."""
    heads, n, parts, rows = most.shape
    _library().alaya_within(_address(most), least.data_ptr(), _address(many), heads, rows, n * parts, _address(chosen))


def left(
    mean: npt.NDArray[np.float32],
    many: npt.NDArray[np.float32],
    usual: Tensor,
    blocks: npt.NDArray[np.int64],
    v_dim: int,
    value_at: int,
) -> tuple[Tensor, Tensor]:
    """Attention [heads, rows, v_dim] and lse [heads, rows] to the keys of parts, see index.summary.Near.

    many: as above. usual: [heads, rows], a score that ``mean`` is not far above; far below it nothing counts. blocks:
    int64 [heads, n], addresses of summaries, contiguous.
    """
    heads, n, parts, rows = mean.shape
    out, lse = torch.empty(heads, rows, v_dim), torch.empty(heads, rows)
    _library().alaya_left(
        torch.get_num_threads(), _address(mean), _address(many), usual.data_ptr(), _address(blocks), heads, rows, n,
        parts, v_dim, value_at, out.data_ptr(), lse.data_ptr(),
    )  # fmt: skip
    return out, lse


def walk(
    keys: npt.NDArray[np.float32],
    neighbours: npt.NDArray[np.int32],
    queries: Tensor,
    ranges: npt.NDArray[np.int64],
    entries: npt.NDArray[np.int32],
    seed: Tensor,
    beam: int,
    fan: int,
    beta: float,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], int]:
    """index.graph.Graph.walk on contiguous arguments: keys found, their scores [found, rows], keys scored.

    Raises MemoryError.
    """
    (n, dim), rows = keys.shape, queries.shape[0]
    found, scores = np.empty(n, np.int32), np.empty((n, rows), np.float32)  # touched as far as something is found
    scored = ctypes.c_int64()
    count: int = _library().alaya_walk(
        _address(keys), _address(neighbours), queries.data_ptr(), _address(ranges), _address(entries), seed.data_ptr(),
        n, dim, neighbours.shape[1], rows, len(ranges), len(entries), beam, fan, beta,
        _address(found), _address(scores), ctypes.byref(scored),
    )  # fmt: skip
    if count < 0:
        raise MemoryError("no memory for the keys a walk has seen")
    return found[:count], scores[:count], scored.value


def copy(
    src: npt.NDArray[np.int64], dst: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], threads: int | None
) -> None:
    """attention.copy_blocks on contiguous arguments."""
    library = _library()
    count = threads or _threads(int(sizes.sum()))
    library.alaya_copy_blocks(count, _address(src), _address(dst), _address(sizes), len(src))


def write(k: Tensor, v: Tensor, addresses: npt.NDArray[np.int64]) -> None:
    """attention.write_rows on tensors whose last dimension is contiguous."""
    library = _library()
    size = k.element_size()
    heads, n, k_dim = k.shape
    k_bytes, v_bytes = k_dim * size, v.shape[2] * size
    library.alaya_write_rows(
        _threads(heads * n * (k_bytes + v_bytes)), k.data_ptr(), v.data_ptr(), _address(addresses), heads, n,
        k.stride(0) * size, k.stride(1) * size, v.stride(0) * size, v.stride(1) * size, k_bytes, v_bytes,
    )  # fmt: skip


def digest(
    function: int, addresses: npt.NDArray[np.int64], nbytes: int, page: int, out: npt.NDArray[np.uint64]
) -> None:
    """digest.pages_at on contiguous arguments. function: address of a C function (bytes, length) -> uint64."""
    _library().alaya_digest(function, len(addresses), _address(addresses), nbytes, page, _address(out))


def read_pages(
    files: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
    addresses: npt.NDArray[np.int64],
    page: int,
    depth: int,
) -> npt.NDArray[np.int64]:
    """seams.Disk.read_pages on contiguous arguments. Raises MemoryError."""
    done = np.empty(len(files), np.int64)
    failed = _library().alaya_read(
        len(files),
        _address(files),
        _address(offsets),
        _address(first),
        _address(addresses),
        page,
        depth,
        _address(done),
    )
    if failed:
        raise MemoryError("no memory for a list of reads")
    return done


def _threads(nbytes: int) -> int:
    return torch.get_num_threads() if nbytes >= _COPY_PAYS else 1


def _address(array: npt.NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
