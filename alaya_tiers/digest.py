"""Digests of blocks: a tree of two levels, so that single pages of a block can be checked as well as the whole.

    block   | page 0 | page 1 | ... | last, perhaps shorter |      PAGE bytes each
    pages   | xxh3   | xxh3   | ... | xxh3                  |      uint64 each
    digest  | xxh3 of these, little-endian                  |

Who knows a block's digest can believe digests of its pages that hash to it, wherever they come from.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import numpy as np
import numpy.typing as npt
import xxhash

from alaya_tiers import kernel
from alaya_tiers.blocks import PAGE

Digests = npt.NDArray[np.uint64]


def pages_in(nbytes: int) -> int:
    """Pages of a block of so many bytes."""
    return -(-nbytes // PAGE)


def pages_at(addresses: npt.NDArray[np.int64], nbytes: int) -> Digests:
    """Digests of the pages of blocks in memory, uint64 [n, pages]. addresses: int64 [n]; nbytes: of each."""
    return _pieces_at(addresses, nbytes, PAGE)


def pages_of(data: bytes | bytearray | memoryview) -> Digests:
    """The same of one block, or of a part of one that starts at a page, uint64 [pages]."""
    view = memoryview(data)
    return np.array([xxhash.xxh3_64_intdigest(view[at : at + PAGE]) for at in range(0, len(view), PAGE)], np.uint64)


def of_rows(rows: npt.NDArray[np.uint8]) -> Digests:
    """xxh3-64 of each row, uint64 [n]. rows: [n, bytes], contiguous."""
    n, nbytes = rows.shape
    return _pieces_at(rows.ctypes.data + np.arange(n) * nbytes, nbytes, nbytes)[:, 0]


def of_pages(pages: Digests) -> Digests:
    """Digests of blocks, uint64 [n]. pages: uint64 [n, pages of each]."""
    return of_rows(np.ascontiguousarray(pages, "<u8").view(np.uint8))


def _pieces_at(addresses: npt.NDArray[np.int64], nbytes: int, piece: int) -> Digests:
    """Digests of every ``piece`` bytes of what lies in memory, uint64 [n, pieces]; nbytes: of each, not 0."""
    out = np.empty((len(addresses), -(-nbytes // piece)), np.uint64)
    if (hash_function := _xxh3()) is not None:
        kernel.digest(hash_function, np.ascontiguousarray(addresses), nbytes, piece, out)
        return out
    for row, address in zip(out, addresses.tolist(), strict=True):
        for i, at in enumerate(range(0, nbytes, piece)):
            part = (ctypes.c_char * min(piece, nbytes - at)).from_address(address + at)
            row[i] = xxhash.xxh3_64_intdigest(part)
    return out


@cache
def _xxh3() -> int | None:
    """The address of xxhash's own function, so that many pages cost one call; None where it is not to be had."""
    try:
        library = ctypes.CDLL(sys.modules[xxhash.xxh3_64_intdigest.__module__].__file__)
        return ctypes.cast(library.XXH3_64bits, ctypes.c_void_p).value
    except (OSError, AttributeError, KeyError, TypeError):
        return None
