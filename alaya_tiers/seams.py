"""The four seams to the outside world: Clock, Disk, Executor, Rng.

Everything that depends on time, files, threads or chance goes through one of these, so that the whole pipeline also
runs in one thread, on a virtual clock, over a simulated disk, the same way every time for the same seed
(``alaya_tiers.testing``).
"""

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import os
import random
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import aiofiles
import numpy as np
import numpy.typing as npt

from alaya_tiers import kernel
from alaya_tiers.depth import USUAL

T = TypeVar("T")
Numbers = npt.NDArray[np.int64]
Rng = random.Random
"""Chance: always an instance made from a seed, never the module's global one."""


class Clock(Protocol):
    """Time."""

    def monotonic(self) -> float:
        """Seconds since some fixed moment."""
        ...


class Executor(Protocol):
    """Threads: runs blocking work away from the event loop."""

    async def run(self, work: Callable[[], T]) -> T:
        """The result of ``work()``. Cancelling the await does not stop work that has started."""
        ...

    def close(self) -> None:
        """Wait for all work in progress; take no more."""
        ...


class Disk(Protocol):
    """Files. ``open`` to ``close`` block and run on an Executor; ``load`` and ``save`` are for small files.

    Every method may raise OSError; nothing else.
    """

    def open(self, path: str, *, create: bool, direct: bool) -> int:
        """A handle for reading and writing; with ``direct`` all buffers, offsets and lengths are page-aligned."""
        ...

    def read(self, handle: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill buffers from ``offset``; the number of bytes read, which may be short."""
        ...

    def read_pages(
        self,
        handles: npt.NDArray[np.int32],
        offsets: Numbers,
        first: Numbers,
        addresses: Numbers,
        page: int,
        depth: int = USUAL,
    ) -> Numbers:
        """Many small reads, ``depth`` of them at once: bytes read, which may be short, or -errno, int64 [n].

        It has ended when it returns.

        Read i is of ``handles[i]`` from ``offsets[i]`` on into ``page`` bytes at each of
        ``addresses[first[i] : first[i + 1]]``. handles: int32 [n]; offsets: int64 [n]; first: int64 [n + 1].
        """
        ...

    def write(self, handle: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Write buffers at ``offset``; the number of bytes written, which may be short."""
        ...

    def close(self, handle: int) -> None:
        """Give the handle back."""
        ...

    async def load(self, path: str) -> bytes:
        """The whole of a small file."""
        ...

    async def save(self, path: str, data: bytes) -> None:
        """Replace a small file by ``data``, durably and in one step; parents are created."""
        ...

    def remove(self, path: str) -> None:
        """Delete a file, or a directory and all it holds; a missing one is fine."""
        ...

    def free_bytes(self, path: str) -> int:
        """What the file system under ``path`` has left."""
        ...

    def claim(self, path: str) -> int:
        """Hold a directory, made if need be, for this process alone: a handle. BlockingIOError if another has it."""
        ...

    def lease(self, path: str, *, shared: bool) -> int:
        """Hold a file, with others or alone, until the handle is closed or the process is gone.

        BlockingIOError if others hold it in a way that does not go with this one, FileNotFoundError if it was removed.
        """
        ...

    def names(self, path: str) -> list[str]:
        """What is in a directory, sorted; nothing where there is none."""
        ...

    def fetch(self, path: str, most: int) -> bytes:
        """The whole of a regular file of at most ``most`` bytes, at once; no link is followed."""
        ...

    def expect(self, path: str, offset: int, nbytes: int) -> None:
        """These bytes of a file will be wanted soon: have them come meanwhile. A hint; nothing fails."""
        ...

    def sync(self, path: str) -> None:
        """Make a file's bytes, or a directory's entries, survive a loss of power."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Put a file in another's place in one step."""
        ...

    def resolve(self, path: str) -> str:
        """The path with all links followed."""
        ...


def memory(address: int, nbytes: int) -> memoryview:
    """The ``nbytes`` at ``address``, writable. The caller owns that memory for as long as the view is used."""
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def read_up_to(disk: Disk, handle: int, offset: int, n: int) -> bytearray:
    """``n`` bytes; fewer at the end of the file, and no more memory than there are. Raises OSError."""
    found = bytearray()
    while len(found) < n:
        piece = bytearray(min(n - len(found), 1 << 20))
        got = disk.read(handle, [memoryview(piece)], offset + len(found))
        if got <= 0:
            break
        if got == n:
            return piece
        found += memoryview(piece)[:got]
    return found


def read_into(disk: Disk, handle: int, buffer: memoryview, offset: int) -> int:
    """Fill a buffer; how many bytes, fewer at the end of the file. Raises OSError."""
    done = 0
    while done < len(buffer) and (got := disk.read(handle, [buffer[done:]], offset + done)) > 0:
        done += got
    return done


def write_all(disk: Disk, handle: int, data: bytes | bytearray, offset: int) -> None:
    """All of it, however short single writes come. Raises OSError."""
    done = 0
    while done < len(data):
        done += disk.write(handle, [memoryview(data)[done:]], offset + done)


def write_new(disk: Disk, path: str, pieces: Iterable[tuple[int, bytes]]) -> None:
    """A file with these pieces (offset, bytes), in place of any there was. Not durable yet. Raises OSError."""
    disk.remove(path)
    handle = disk.open(path, create=True, direct=False)
    try:
        for offset, data in pieces:
            write_all(disk, handle, data, offset)
    finally:
        disk.close(handle)


def read_each(
    disk: Disk, handles: npt.NDArray[np.int32], offsets: Numbers, first: Numbers, addresses: Numbers, page: int
) -> Numbers:
    """``Disk.read_pages`` one after the other, by ``disk.read``: for disks that are not the operating system's."""
    done = np.empty(len(handles), np.int64)
    for i, (handle, offset) in enumerate(zip(handles.tolist(), offsets.tolist(), strict=True)):
        buffers = [memory(address, page) for address in addresses[first[i] : first[i + 1]].tolist()]
        try:
            done[i] = disk.read(handle, buffers, offset)
        except OSError as error:
            done[i] = -(error.errno or errno.EIO)
    return done


class SystemClock:
    """The real clock."""

    def monotonic(self) -> float:
        return time.monotonic()


class Threads:
    """A pool of ``n`` real threads."""

    def __init__(self, n: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(n, thread_name_prefix=name)

    async def run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _make_folders(path: str) -> None:
    """A directory and all above it that are missing, for us alone: makedirs gives its mode to the last one only."""
    if not os.path.isdir(path):
        above = os.path.dirname(path)
        if above and above != path:
            _make_folders(above)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            if not os.path.isdir(path):
                raise


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _plain(handle: int, path: str, most: int | None = None) -> int:
    """Bytes of a file. OSError, and it is closed, where it is a pipe, a folder or a device, or too long."""
    status = os.fstat(handle)
    if stat.S_ISREG(status.st_mode) and (most is None or status.st_size <= most):
        return status.st_size
    os.close(handle)
    raise OSError(errno.EFBIG, "not a regular file, or too large", path)


class SystemDisk:
    """The real file system."""

    def open(self, path: str, *, create: bool, direct: bool) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        if direct:
            flags |= getattr(os, "O_DIRECT", 0)
        if create:
            _make_folders(os.path.dirname(path))
            flags |= os.O_CREAT
        flags |= os.O_NONBLOCK  # a pipe that somebody put there must not make us wait
        try:
            handle = os.open(path, flags, 0o600)
        except OSError as error:
            if create or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            handle = os.open(path, flags & ~os.O_RDWR, 0o600)  # somebody else's store, to be read only
        _plain(handle, path)
        return handle

    def read(self, handle: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.preadv(handle, buffers, offset)

    def read_pages(
        self,
        handles: npt.NDArray[np.int32],
        offsets: Numbers,
        first: Numbers,
        addresses: Numbers,
        page: int,
        depth: int = USUAL,
    ) -> Numbers:
        return kernel.read_pages(handles, offsets, first, addresses, page, depth)

    def write(self, handle: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.pwritev(handle, buffers, offset)

    def close(self, handle: int) -> None:
        os.close(handle)

    async def load(self, path: str) -> bytes:
        async with aiofiles.open(path, "rb") as file:
            data: bytes = await file.read()
            return data

    async def save(self, path: str, data: bytes) -> None:
        _make_folders(os.path.dirname(path))
        partial = f"{path}.partial"
        try:
            async with aiofiles.open(partial, "wb", opener=_private) as file:
                await file.write(data)
                await file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise
        directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def remove(self, path: str) -> None:
        if Path(path).is_dir() and not Path(path).is_symlink():
            shutil.rmtree(path)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def free_bytes(self, path: str) -> int:
        return shutil.disk_usage(path).free

    def claim(self, path: str) -> int:
        _make_folders(path)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(handle)
            raise
        return handle

    def lease(self, path: str, *, shared: bool) -> int:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if not os.fstat(handle).st_nlink:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        except BaseException:
            os.close(handle)
            raise
        return handle

    def names(self, path: str) -> list[str]:
        try:
            return sorted(os.listdir(path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def fetch(self, path: str, most: int) -> bytes:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        size = _plain(handle, path, most)
        with open(handle, "rb") as file:
            return file.read(size)  # read(most) would take that much memory first

    def expect(self, path: str, offset: int, nbytes: int) -> None:
        if not hasattr(os, "posix_fadvise"):
            return
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                os.posix_fadvise(handle, offset, nbytes, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(handle)

    def sync(self, path: str) -> None:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, old: str, new: str) -> None:
        os.replace(old, new)

    def resolve(self, path: str) -> str:
        try:  # Linux tells at once; realpath asks of every folder on the way, and opening a store asks for many files
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except (AttributeError, OSError):
            return os.path.realpath(path)
        try:
            return os.readlink(f"/proc/self/fd/{handle}")
        except OSError:
            return os.path.realpath(path)
        finally:
            os.close(handle)
