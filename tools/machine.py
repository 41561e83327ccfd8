"""What the machine can do at best: reading memory, reading the disk. The limits a benchmark is measured against."""

import contextlib
import ctypes
import itertools
import json
import mmap
import os
import platform
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch

PAGE = 4096
MIB = 1 << 20

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes per second by method, the best of several tries each."""

    methods: dict[str, float]

    @property
    def method(self) -> str:
        """The fastest."""
        return max(self.methods, key=self.methods.__getitem__)

    @property
    def best(self) -> float:
        """Bytes per second of the fastest."""
        return self.methods[self.method]

    def merged(self, other: "Bandwidth") -> "Bandwidth":
        """The better of two measurements, method by method."""
        names = self.methods | other.methods
        return Bandwidth({n: max(self.methods.get(n, 0.0), other.methods.get(n, 0.0)) for n in names})

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"bytes_per_second": self.best, "method": self.method, "methods": self.methods}


def describe() -> dict[str, Any]:
    """The machine, as JSON values."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": list(os.getloadavg()),
    } | {name.replace("-", "_"): version(name) for name in ("alaya-tiers", "torch", "transformers", "numpy")}


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True, slots=True)
class CpuUse:
    """CPU seconds since the system started: of this process, and of all cores together whether used or not."""

    own: float
    idle: float
    total: float

    @classmethod
    def now(cls) -> "CpuUse":
        """Until now."""
        all_cores = psutil.cpu_times()
        idle = all_cores.idle + getattr(all_cores, "iowait", 0.0)
        seconds = [s for name, s in all_cores._asdict().items() if not name.startswith("guest")]  # user holds these
        return cls(time.process_time(), idle, sum(seconds))

    def others_since(self, before: "CpuUse") -> float:
        """Share of all cores that other programs, and other guests of the machine, took since ``before``."""
        taken = (self.total - before.total) - (self.idle - before.idle) - (self.own - before.own)
        return min(1.0, max(0.0, taken / max(1e-9, self.total - before.total)))


def available_ram() -> int:
    """Bytes this process can take: what the system has left, or less where a control group says so."""
    left = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        left = min(left, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return left


def reset_peak_rss() -> bool:
    """Forget the highest resident size so far; False where the kernel does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss() -> int:
    """The highest resident size since the last reset, bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


# ---------------------------------------------------------------------- memory
def memory_buffer(nbytes: int) -> Bytes:
    """Memory to be read: huge pages where the system has them, every page really there."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = np.frombuffer(memory, np.uint8)
    buffer.fill(1)
    return buffer


def memory_bandwidth(buffer: Bytes, rounds: int = 5) -> Bandwidth:
    """Reading ``buffer`` once, from its first byte to its last, with as many threads as torch has.

    Several ways, turn by turn, because none is the fastest everywhere: a sum and a maximum by torch, a maximum by numpy
    and the C library's memchr on a pool of threads.
    """
    threads = torch.get_num_threads()
    floats, pieces = torch.from_numpy(buffer.view(np.float32)), np.array_split(buffer.view(np.int64), 8 * threads)
    memchr = ctypes.CDLL(None).memchr
    memchr.argtypes, memchr.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p

    def search(piece: npt.NDArray[np.int64]) -> None:
        assert memchr(piece.ctypes.data, 2, piece.nbytes) is None, "the buffer holds only ones"

    with ThreadPoolExecutor(threads) as pool:
        ways: dict[str, Callable[[], object]] = {
            "torch.sum": floats.sum,
            "torch.max": floats.max,
            "numpy.maximum, threads": lambda: list(pool.map(np.maximum.reduce, pieces)),
            "memchr, threads": lambda: list(pool.map(search, pieces)),
        }
        best = dict.fromkeys(ways, float("inf"))
        for _, (name, read) in itertools.product(range(rounds), ways.items()):
            best[name] = min(best[name], _seconds(read))
    return Bandwidth({name: buffer.nbytes / seconds for name, seconds in best.items()})


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# ---------------------------------------------------------------------- disk
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
        f"preadv {size >> 10} KiB x {threads}": share / _read(file, i * share % file.nbytes, share, size, threads)
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


def _read(file: DiskFile, start: int, nbytes: int, size: int, threads: int) -> float:
    """Seconds to read ``nbytes`` from ``start`` in requests of ``size``, ``threads`` at a time."""
    claims, lock = iter(range(start, start + nbytes, size)), threading.Lock()
    handle = file.open(os.O_RDONLY)

    def work(_: int) -> None:
        with mmap.mmap(-1, size) as buffer:
            while True:
                with lock:
                    offset = next(claims, None)
                if offset is None:
                    return
                if os.preadv(handle, [buffer], offset) != size:
                    raise OSError(f"{file.path}: a read was cut short")

    try:
        if not file.direct:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        with ThreadPoolExecutor(threads) as pool:
            return _seconds(lambda: list(pool.map(work, range(threads))))
    finally:
        os.close(handle)


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
