"""Files of the ssd tier: what is where in a shard, which are open, what their errors are called."""

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from alaya_tiers import digest
from alaya_tiers.blocks import PAGE, BlockShape, round_up
from alaya_tiers.digest import Digests
from alaya_tiers.errors import IOFailed, OutOfSpace, StoreCorrupt, StoreError, StoreUnwritable
from alaya_tiers.seams import Disk
from alaya_tiers.tiers.zarr_format import shard_index_bytes

METADATA = 2048
"""Bytes that the JSON of a shard and of the groups it is in take at most."""

OPEN_FILES = 128
"""Handles kept open."""


def translate(error: OSError, path: str, doing: str) -> StoreError:
    """The typed error for what the operating system said."""
    if isinstance(error, StoreError):
        return error
    kind: type[StoreError] = IOFailed
    hint = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        kind, hint = OutOfSpace, "; the file system is full: free some space, then repeat the step"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        kind, hint = StoreUnwritable, "; choose a directory this user can write"
    elif error.errno in (errno.ENOENT, errno.ELOOP) and doing == "read":
        kind, hint = StoreCorrupt, "; a file of the store is missing"
    result = kind(error.errno, f"cannot {doing}: {os.strerror(error.errno or 0)}{hint}", path)
    result.__cause__ = error
    return result


def digests_bytes(shape: tuple[int, ...]) -> int:
    """What a shard gives to the digests of pages of all its blocks. shape: (blocks, pages of each)."""
    return shape[0] * shape[1] * 8


def digests_behind(pages: Digests) -> bytes:
    """The digests of pages as they stand in a shard, behind its blocks. pages: uint64 [blocks, pages of each]."""
    return np.ascontiguousarray(pages, "<u8").tobytes()


def aligned(nbytes: int) -> npt.NDArray[np.uint8]:
    """Memory that a direct read can fill, uint8 [nbytes], not initialised."""
    room = np.empty(nbytes + PAGE, np.uint8)
    start = -room.ctypes.data % PAGE
    return room[start : start + nbytes]


@dataclass(slots=True)
class SegmentFile:
    """One shard: the blocks of one segment of one layer, head by head."""

    path: str
    layer: int
    stream: int
    segment: int
    shape: BlockShape
    blocks: int
    """Blocks per kv head."""
    offsets: npt.NDArray[np.int64]
    """[kv_heads, blocks] byte offset of each block placed, -1 elsewhere."""
    live: int = 0
    """Blocks placed and not forgotten."""
    written: int = 0
    """Blocks written so far."""
    published: bool = False
    """Whether its metadata says all it holds."""
    unfilled: int = 0
    """Tokens that are missing at the end of its last block."""
    kept: int = 0
    """Blocks charged because a stored context has them, alive in a session or not; such a file never changes again."""
    ours: bool = True
    """Whether we pay for it and remove it; what others stored is only read."""
    admitted: int = 0
    """Bytes that may be written beside its blocks, see Writes; 0 once they are."""
    doubtful: bool = False
    """Whether making it durable failed once: nobody can say what is on disk."""
    pages: Digests = field(default_factory=lambda: np.empty((0, 0), np.uint64))
    """[kv_heads * blocks, pages of a block] digests of the pages of each block, to be believed where ``known``."""
    known: npt.NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, bool))
    told: bool = True
    """Whether the digests of pages that the file itself has were read, or there can be none that are needed."""

    def __post_init__(self) -> None:
        self.pages = np.zeros((self.offsets.size, digest.pages_in(self.shape.nbytes)), np.uint64)
        self.known = np.zeros(self.offsets.size, bool)

    @property
    def stride(self) -> int:
        """Bytes from one block to the next."""
        return round_up(self.shape.nbytes, PAGE)

    @property
    def price(self) -> int:
        """What a block is charged."""
        return self.stride if self.ours else 0

    @property
    def data_bytes(self) -> int:
        """Where the digests of pages start."""
        return self.offsets.size * self.stride

    @property
    def beside(self) -> int:
        """Bytes at most that are written beside its blocks to publish it."""
        return digests_bytes(self.pages.shape) + shard_index_bytes(self.offsets.size) + METADATA

    @property
    def full(self) -> bool:
        """Whether every block is written."""
        return self.written == self.offsets.size


class Asked:
    """What some files say of their pages, and the memory it is read into, which nobody looks into before."""

    def __init__(self, files: list[SegmentFile]) -> None:
        self.files = files
        self.offsets = np.array([file.data_bytes for file in files], np.int64)
        self.ends = np.cumsum([0, *(-(-digests_bytes(file.pages.shape) // PAGE) for file in files)])
        """Pages of memory up to each of the files, int64 [n + 1]."""
        self._room = aligned(int(self.ends[-1]) * PAGE)
        self.addresses = self._room.ctypes.data + np.arange(self.ends[-1]) * PAGE

    def answers(self) -> Iterator[Digests]:
        """Of each file: digests as its ``pages`` has them, not to be believed."""
        for file, begin in zip(self.files, (self.ends[:-1] * PAGE).tolist(), strict=True):
            yield self._room[begin : begin + file.pages.nbytes].view("<u8").reshape(file.pages.shape)


@dataclass(slots=True)
class Run:
    """Consecutive extents of one file, and the memory they belong to."""

    file: SegmentFile
    offset: int
    addresses: list[int] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    """Which of the request's blocks they are."""

    @property
    def nbytes(self) -> int:
        return len(self.addresses) * self.file.stride

    @property
    def blocks(self) -> npt.NDArray[np.int64]:
        """Their numbers in the file."""
        return np.arange(len(self.addresses)) + self.offset // self.file.stride


class Handles:
    """The open files, least recently used ones closed. Thread-safe; a handle in use is never closed."""

    def __init__(self, disk: Disk, *, direct: bool) -> None:
        self._disk, self._direct = disk, direct
        self._open: OrderedDict[str, list[int]] = OrderedDict()  # path -> [handle, users]
        self._lock = threading.Lock()

    @contextmanager
    def use(self, path: str, *, create: bool) -> Iterator[int]:
        with self._lock:
            entry = self._open.get(path)
            if entry is None:
                entry = self._open[path] = [self._disk.open(path, create=create, direct=self._direct), 0]
            self._open.move_to_end(path)
            entry[1] += 1
            self._shrink(OPEN_FILES)
        try:
            yield entry[0]
        finally:
            with self._lock:
                entry[1] -= 1

    def close(self, path: str | None = None) -> None:
        """Close one file, or all. None may be in use."""
        with self._lock:
            for name in [path] if path is not None else list(self._open):
                if (entry := self._open.pop(name, None)) is not None:
                    self._disk.close(entry[0])

    def _shrink(self, limit: int) -> None:
        idle = [path for path, (_, users) in self._open.items() if not users]
        for path in idle[: max(0, len(self._open) - limit)]:
            self._disk.close(self._open.pop(path)[0])
