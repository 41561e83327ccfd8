"""What the machine can do at best: reading memory, reading the disk. The limits a benchmark is measured against."""

import contextlib
import ctypes
import itertools
import mmap
import os
import platform
import resource
import time
from collections.abc import Callable
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

M_MMAP_THRESHOLD = -3

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


def give_memory_back() -> None:
    """Have glibc give back what is not used any more of more than a megabyte: what made keys would count as ours."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


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
