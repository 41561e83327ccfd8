"""What a store's disk has had to take: bytes by day, kept with the store, and how many a day it may be.

Everything written goes through ``CountedDisk``: blocks, their padding, indexes, metadata, manifests, codes. The numbers
are saved when a context is stored, on closing, and every SAVED_EVERY bytes: a crash forgets what was written since.
"""

import contextlib
import datetime
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from alaya_tiers.config import format_bytes
from alaya_tiers.errors import WriteBudgetSpent
from alaya_tiers.leftovers import USAGE
from alaya_tiers.manifest import Manifest
from alaya_tiers.seams import Disk, write_new
from alaya_tiers.tiers.zarr_format import attributes_of, group_json

SAVED_EVERY = 1 << 30
MOST_DAYS = 400
"""Days that are remembered."""

_MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Day:
    """Bytes of one day. disk: all that was written. blocks: what was asked for of these, keys and values."""

    disk: int = 0
    blocks: int = 0

    @property
    def amplification(self) -> float:
        """Bytes written for each byte of keys and values; 1 before there is any."""
        return self.disk / self.blocks if self.blocks else 1.0


@dataclass(frozen=True, slots=True)
class Usage:
    """A store's wear. days: by date (UTC). contexts: bytes of files by context, each file counted for the oldest.

    budget: bytes a day that may be written, None = any. today: the date.
    """

    days: dict[str, Day]
    contexts: dict[str, int]
    budget: int | None
    today: str

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        days = {date: asdict(day) | {"amplification": day.amplification} for date, day in self.days.items()}
        return asdict(self) | {"days": days}


def utc_date() -> str:
    """Today, as the numbers are kept."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


@dataclass(slots=True)
class Wear:
    """Counts, and refuses what goes over the budget. Thread-safe. prefill: seconds a token of a prompt, by weights."""

    budget: int | None = None
    today: Callable[[], str] = utc_date
    days: dict[str, Day] = field(default_factory=dict)
    prefill: dict[str, float] = field(default_factory=dict)
    disk_bytes: int = 0
    """Written since this was made; block_bytes: keys and values of these."""
    block_bytes: int = 0
    _admitted: int = 0
    _unsaved: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def admit(self, nbytes: int) -> None:
        """``nbytes`` are about to be written. Raises WriteBudgetSpent; nothing was admitted then."""
        with self._lock:
            date = self.today()
            spent = self.days.get(date, Day()).disk + self._admitted
            if self.budget is not None and spent + nbytes > self.budget:
                raise WriteBudgetSpent(
                    f"the write budget of {format_bytes(self.budget)} a day is used up: {format_bytes(spent)} were "
                    f"written on {date} (UTC). What fits in memory stays there; for more raise write_budget or "
                    "host_budget, or go on tomorrow."
                )
            self._admitted += nbytes

    def settle(self, nbytes: int, payload: int) -> None:
        """What was admitted is on disk, ``payload`` of it keys and values, or was given up."""
        with self._lock:
            self._admitted -= nbytes
            self._count(0, payload)

    def wrote(self, nbytes: int) -> None:
        """So many bytes were written."""
        with self._lock:
            self._count(nbytes, 0)

    def _count(self, disk: int, blocks: int) -> None:
        date = self.today()
        day = self.days.get(date, Day())
        self.days[date] = Day(day.disk + disk, day.blocks + blocks)
        self.disk_bytes += disk
        self.block_bytes += blocks
        self._unsaved += disk

    @property
    def due(self) -> bool:
        """Whether enough was written to save the numbers."""
        return self._unsaved >= SAVED_EVERY

    def usage(self, manifest: Manifest) -> Usage:
        """As it is now."""
        with self._lock:
            return Usage(dict(self.days), written_for(manifest), self.budget, self.today())

    def load(self, disk: Disk, root: str) -> None:
        """Take over what was saved; what cannot be read never was."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            data = disk.fetch(os.path.join(root, USAGE, "zarr.json"), _MOST_BYTES)
            found = attributes_of(data)["alaya_tiers"]
            days = {str(d): Day(_size(v["disk"]), _size(v["blocks"])) for d, v in found["days"].items()}
            self.prefill = {str(k): float(v) for k, v in found["prefill"].items() if 0 < float(v) < 1e6}
            self.days = days

    def save(self, disk: Disk, root: str) -> None:
        """Keep the numbers beside the store. A failure loses them, nothing else."""
        path = os.path.join(root, USAGE, "zarr.json")
        if "zarr.json" not in disk.names(root):  # nothing is stored here
            return
        with self._lock:
            newest = dict(sorted(self.days.items())[-MOST_DAYS:])
            found = {"days": {date: asdict(day) for date, day in newest.items()}, "prefill": dict(self.prefill)}
            self._unsaved = 0
        data = group_json({"alaya_tiers": found})
        with contextlib.suppress(OSError):
            write_new(disk, f"{path}.partial", [(0, data)])
            disk.sync(f"{path}.partial")
            disk.rename(f"{path}.partial", path)


class CountedDisk:
    """A seams.Disk that counts what is written to another; all else is the other's."""

    def __init__(self, disk: Disk, wear: Wear) -> None:
        self._disk, self.wear = disk, wear

    def __getattr__(self, name: str) -> Any:
        return getattr(self._disk, name)

    def write(self, handle: int, buffers: Sequence[memoryview], offset: int) -> int:
        """See seams.Disk."""
        done = self._disk.write(handle, buffers, offset)
        self.wear.wrote(max(0, done))
        return done

    async def save(self, path: str, data: bytes) -> None:
        """See seams.Disk."""
        await self._disk.save(path, data)
        self.wear.wrote(len(data))


def counted(disk: Disk, wear: Wear) -> Disk:
    """The same disk, counted."""
    return cast(Disk, CountedDisk(disk, wear))


def written_for(manifest: Manifest) -> dict[str, int]:
    """Bytes of files by context, oldest first: each file is counted once, for the oldest context that names it."""
    found, known = dict[str, int](), set[str]()
    for context in sorted(manifest.contexts.values(), key=lambda c: (c.created, c.tokens)):
        files = manifest.files_of(context.id) - known
        found[context.id] = sum(manifest.files.get(file, 0) for file in files)
        known |= files
    return found


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError("not a count of bytes")
    return value
