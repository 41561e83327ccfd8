"""What the disk itself does: the one measurer that benchmarks, profiles and limits share."""

import contextlib
import json
import mmap
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from alaya_tiers.blocks import PAGE
from alaya_tiers.seams import SystemDisk
from alaya_tiers.tiers.files import aligned
from alaya_tiers.tools import machine
from alaya_tiers.tools.machine import Bandwidth

MIB = 1 << 20
HUGE = 2 << 20
"""Bytes of a huge page."""

Places = npt.NDArray[np.int64]


class Moved(NamedTuple):
    """rate: bytes a second of all threads. latencies: seconds of each request."""

    rate: float
    latencies: list[float]


@dataclass(frozen=True, slots=True)
class DiskFile:
    """A file of random bytes to read the disk's speed from. direct: past the page cache (O_DIRECT)."""

    path: Path
    nbytes: int
    direct: bool

    def open(self, flags: int) -> int:
        """A file descriptor."""
        return os.open(self.path, flags | os.O_CLOEXEC | (os.O_DIRECT if self.direct else 0), 0o600)


@contextlib.contextmanager
def disk_file(directory: Path, nbytes: int) -> Iterator[DiskFile]:
    """A DiskFile in ``directory``, removed afterwards. Raises OSError."""
    file = DiskFile(directory / f"bandwidth-{os.getpid()}", nbytes // MIB * MIB, True)
    try:
        try:
            _fill(file)
        except OSError:  # e.g. some network and memory file systems
            file = DiskFile(file.path, file.nbytes, False)
            _fill(file)
        yield file
    finally:
        file.path.unlink(missing_ok=True)


def disk_bandwidth(file: DiskFile, nbytes: int) -> Bandwidth:
    """Reading ``nbytes`` of the file with preadv on threads, no byte twice: several request sizes and depths."""
    ways = ((256 << 10, 4), (256 << 10, 16), (MIB, 4), (MIB, 8))
    share = min(nbytes, file.nbytes) // len(ways) // MIB * MIB or MIB
    found = {
        f"preadv {size >> 10} KiB x {threads}": _bandwidth(file, i * share % file.nbytes, share, size, threads)
        for i, (size, threads) in enumerate(ways)
    }
    return Bandwidth(found | _fio(file, min(nbytes, file.nbytes)))


def _fill(file: DiskFile) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 8 * MIB, np.uint8)
    with mmap.mmap(-1, MIB) as buffer:
        handle = file.open(os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            for i in range(file.nbytes // MIB):
                start = i % 7 * MIB + i % 251  # no two pieces alike for a long while
                buffer[:] = noise[start : start + MIB].tobytes()
                if os.pwrite(handle, buffer, i * MIB) != MIB:
                    raise OSError(f"{file.path}: a write was cut short; is the disk full?")
            os.fsync(handle)
        finally:
            os.close(handle)


def transfer(
    path: Path, places: Places, size: int, depth: int, *, direct: bool, write: bool = False, lasting: bool = False
) -> Moved:
    """Nothing but preadv or pwritev of ``size`` bytes at ``places``, on ``depth`` threads. Raises OSError.

    lasting: until the disk has what was written. Memory is in huge pages, as that of the tiers; what is read is not in
    the page cache, whether direct or not.
    """
    flags = (os.O_RDWR | os.O_CREAT if write else os.O_RDONLY) | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    handle, move = os.open(path, flags, 0o600), os.pwritev if write else os.preadv
    latencies: list[float] = []

    def work(mine: list[int]) -> None:
        memory = machine.memory_buffer(HUGE + size)
        at = -memory.ctypes.data % HUGE
        buffer = memory[at : at + size].data
        for place in mine:
            began = time.perf_counter()
            done = move(handle, [buffer], place)
            latencies.append(time.perf_counter() - began)
            if done != size:
                raise OSError(f"{path}: a transfer was cut short; is the disk full?")

    try:
        if not direct and not write:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        with ThreadPoolExecutor(depth) as pool:
            began = time.perf_counter()
            list(pool.map(work, [places[i::depth].tolist() for i in range(depth)]))
            if lasting:
                os.fdatasync(handle)
            return Moved(places.size * size / (time.perf_counter() - began), latencies)
    finally:
        os.close(handle)


def _bandwidth(file: DiskFile, start: int, nbytes: int, size: int, threads: int) -> float:
    places = np.arange(start, start + nbytes, size)
    return transfer(file.path, places, size, threads, direct=file.direct).rate


def _fio(file: DiskFile, nbytes: int) -> dict[str, float]:
    """fio's own figure, where fio is installed."""
    if shutil.which("fio") is None:
        return {}
    command = [
        "fio", "--name=read", f"--filename={file.path}", "--rw=read", "--bs=256k", "--ioengine=psync", "--thread",
        "--numjobs=4", f"--direct={int(file.direct)}", f"--size={nbytes // 4}", f"--offset_increment={nbytes // 4}",
        "--group_reporting", "--output-format=json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return {"fio 256 KiB x 4": float(json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"])}
    except (ValueError, LookupError, TypeError):
        return {}


def empty_cache(files: Iterable[Path]) -> None:
    """Have the system forget what it holds of these files; what is not a file, or is gone, is passed over."""
    for file in files:
        if file.is_file():
            with contextlib.suppress(OSError):
                handle = os.open(file, os.O_RDONLY)
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(handle)


def page_rate(file: DiskFile, n: int = 8192) -> float:
    """Pages a second, read at random, many under way at once."""
    handle, disk = file.open(os.O_RDONLY), SystemDisk()
    try:
        rng, best = np.random.default_rng(0), 0.0
        memory = aligned(n * PAGE)
        start = memory.ctypes.data
        for _ in range(3):
            at = np.sort(rng.choice(file.nbytes // PAGE, min(n, file.nbytes // PAGE), replace=False)) * PAGE
            k = at.size
            began = time.perf_counter()
            disk.read_pages(np.full(k, handle, np.int32), at, np.arange(k + 1), start + np.arange(k) * PAGE, PAGE)
            best = max(best, k / (time.perf_counter() - began))
        return best
    finally:
        os.close(handle)
