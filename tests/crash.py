"""A disk that loses power: after every operation, what could be left of it.

The rules are those of POSIX, read as strictly as a file system may: what is written to a file is safe once that file
was synced, and each 512-byte sector of it may or may not be there before; what happens to a directory (a file or
directory made, renamed or removed in it) is safe once that directory was synced, and before that the changes of one
directory arrive in their order, those of different ones in any. A rename is in one step. Nothing else is in one step.
"""

import asyncio
import errno
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from alaya_tiers.seams import Numbers, read_each

SECTOR = 512

Image = dict[str, bytes]
"""What is on a disk: contents by path."""


@dataclass(eq=False)
class File:
    """Bytes that are safe, those that programs see, and the writes in between."""

    safe: bytes = b""
    now: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes]] = field(default_factory=list)

    def write(self, offset: int, data: bytes) -> None:
        self.now.extend(bytes(max(0, offset + len(data) - len(self.now))))
        self.now[offset : offset + len(data)] = data
        self.pending.append((offset, data))

    def sync(self) -> None:
        self.safe, self.pending = bytes(self.now), []

    def after(self, rng: random.Random, share: float) -> bytes:
        """What may be left, each sector of each write with probability ``share``."""
        if not self.pending:
            return self.safe
        left = bytearray(self.safe)
        for offset, data in self.pending:
            for at in range(0, len(data), SECTOR):
                if rng.random() < share:
                    part = data[at : at + SECTOR]
                    left.extend(bytes(max(0, offset + at + len(part) - len(left))))
                    left[offset + at : offset + at + len(part)] = part
        return bytes(left)


@dataclass(eq=False)
class Folder:
    """Entries that are safe, those that programs see, and the changes in between: (name, what it is now)."""

    safe: dict[str, "File | Folder"] = field(default_factory=dict)
    now: dict[str, "File | Folder"] = field(default_factory=dict)
    pending: list[dict[str, "File | Folder | None"]] = field(default_factory=list)

    def change(self, changes: dict[str, "File | Folder | None"]) -> None:
        _apply(self.now, changes)
        self.pending.append(changes)

    def sync(self) -> None:
        self.safe, self.pending = dict(self.now), []

    def after(self, rng: random.Random, share: float) -> dict[str, "File | Folder"]:
        """What may be left: the first changes, how many of them is chance."""
        left = dict(self.safe)
        n = round(share * len(self.pending)) if share in (0, 1) else rng.randint(0, len(self.pending))
        for changes in self.pending[:n]:
            _apply(left, changes)
        return left


def _apply(entries: dict[str, "File | Folder"], changes: dict[str, "File | Folder | None"]) -> None:
    for name, what in changes.items():
        if what is None:
            entries.pop(name, None)
        else:
            entries[name] = what


class CrashDisk:
    """A seams.Disk in memory that can be asked what a loss of power would leave. Thread-safe.

    after_each: called with this disk after every operation that changes or secures something. skip: the number of a
    sync or rename, from 0, that is left out: a sync does nothing, a rename is a plain write of the new file. barriers:
    all of these; "" for a sync of what is safe already, or of a directory from which something was only removed.
    """

    fail_at, always, error = -1, False, errno.EIO
    """The number of an operation, from 0, that fails; whether all after it do too; how."""

    operations = 0

    def __init__(self, image: Image | None = None, skip: int | None = None) -> None:
        self.root = Folder()
        self.after_each: Callable[[CrashDisk], None] = lambda disk: None
        self.skip, self.barriers, self.failed = skip, list[str](), list[str]()
        self._handles: dict[int, File] = {}
        self._claimed: dict[int, str] = {}
        self._leased: dict[int, tuple[str, bool]] = {}
        self._next = 3
        self._lock = threading.RLock()
        folders = dict[str, Folder]()
        for path, data in (image or {}).items():
            above, _, name = path.rpartition("/")
            if above not in folders:
                folders[above] = self._folder(above)
            folders[above].now[name] = File(data, bytearray(data))
        for folder in self._folders(self.root):
            folder.sync()

    # ------------------------------------------------------------------ what a crash leaves
    def image(self, rng: random.Random, share: float) -> Image:
        """One possibility. share: of what is not safe, how much is there; 0 = nothing, 1 = all of it."""
        left: Image = {}

        def walk(folder: Folder, path: str) -> None:
            for name, what in folder.after(rng, share).items():
                if isinstance(what, File):
                    left[f"{path}/{name}"] = what.after(rng, share)
                else:
                    walk(what, f"{path}/{name}")

        walk(self.root, "")
        return left

    def contents(self, path: str) -> bytes | None:
        """A file; None if there is none. The same object as long as it is safe and nobody writes."""
        found = self._find(path)
        return None if not isinstance(found, File) else bytes(found.now) if found.pending else found.safe

    # ------------------------------------------------------------------ the disk
    def open(self, path: str, *, create: bool, direct: bool) -> int:
        with self._lock:
            self._operation()
            found = self._find(path)
            if not isinstance(found, File):
                if not create:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
                found = self._create(path)
                self.after_each(self)
            self._next += 1
            self._handles[self._next] = found
            return self._next

    def read(self, handle: int, buffers: Sequence[memoryview], offset: int) -> int:
        with self._lock:
            self._operation()
            done = 0
            for buffer in buffers:
                part = self._handles[handle].now[offset + done : offset + done + len(buffer)]
                buffer[: len(part)] = part
                done += len(part)
            return done

    def read_pages(
        self,
        handles: npt.NDArray[np.int32],
        offsets: Numbers,
        first: Numbers,
        addresses: Numbers,
        page: int,
        depth: int = 0,
    ) -> Numbers:
        return read_each(self, handles, offsets, first, addresses, page)

    def write(self, handle: int, buffers: Sequence[memoryview], offset: int) -> int:
        with self._lock:
            self._operation()
            data = b"".join(buffers)
            self._handles[handle].write(offset, data)
            self.after_each(self)
            return len(data)

    def close(self, handle: int) -> None:
        with self._lock:
            self._handles.pop(handle, None)
            self._claimed.pop(handle, None)
            self._leased.pop(handle, None)

    async def load(self, path: str) -> bytes:
        return self.fetch(path, 1 << 30)

    async def save(self, path: str, data: bytes) -> None:
        """In one step, whole or not at all; not durable: no caller of ours relies on that."""
        await asyncio.sleep(0)
        with self._lock:
            self._operation()
            made = self._create(f"{path}.partial")
            made.write(0, data)
            self.after_each(self)
            made.sync()
            self.after_each(self)
            self._rename(f"{path}.partial", path)
            self.after_each(self)

    def remove(self, path: str) -> None:
        with self._lock:
            self._operation()
            found = self._find(path)
            if isinstance(found, Folder):
                for name in list(found.now):
                    self.remove(f"{path}/{name}")
            if found is not None:
                self._folder(os.path.dirname(path)).change({os.path.basename(path): None})
                self.after_each(self)

    def free_bytes(self, path: str) -> int:
        return 1 << 40

    def claim(self, path: str) -> int:
        with self._lock:
            if path in self._claimed.values():
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)
            self._folder(path)
            self._next += 1
            self._claimed[self._next] = path
            return self._next

    def lease(self, path: str, *, shared: bool) -> int:
        with self._lock:
            if not isinstance(self._find(path), File):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            if any(name == path and not (shared and theirs) for name, theirs in self._leased.values()):
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)
            self._next += 1
            self._leased[self._next] = path, shared
            return self._next

    def names(self, path: str) -> list[str]:
        with self._lock:
            found = self._find(path)
            return sorted(found.now) if isinstance(found, Folder) else []

    def fetch(self, path: str, most: int) -> bytes:
        with self._lock:
            self._operation()
            found = self._find(path)
            if not isinstance(found, File):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            return bytes(found.now)

    def expect(self, path: str, offset: int, nbytes: int) -> None:
        """It has no cache."""

    def sync(self, path: str) -> None:
        with self._lock:
            self._operation()
            found = self._find(path)
            if found is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            needed = any(not isinstance(c, dict) or any(c.values()) for c in found.pending)
            if not self._left_out(f"sync {path}" if needed else ""):
                found.sync()
            self.after_each(self)

    def rename(self, old: str, new: str) -> None:
        with self._lock:
            self._operation()
            if self._left_out(f"rename {new}"):
                found = self._find(old)
                assert isinstance(found, File)
                self._create(new).write(0, bytes(found.now))
            else:
                self._rename(old, new)
            self.after_each(self)

    def resolve(self, path: str) -> str:
        return path

    # ------------------------------------------------------------------ inside
    def _operation(self) -> None:
        self.operations += 1
        number = self.operations - 1
        if number == self.fail_at or (self.always and 0 <= self.fail_at < number):
            self.failed.append(sys._getframe(1).f_code.co_name)
            raise OSError(self.error, os.strerror(self.error))

    def _left_out(self, what: str) -> bool:
        self.barriers.append(what)
        return len(self.barriers) - 1 == self.skip

    def _rename(self, old: str, new: str) -> None:
        folder, found = self._folder(os.path.dirname(new)), self._find(old)
        assert found is not None
        folder.change({os.path.basename(old): None, os.path.basename(new): found})

    def _create(self, path: str) -> File:
        made = File()
        self._folder(os.path.dirname(path)).change({os.path.basename(path): made})
        return made

    def _folder(self, path: str) -> Folder:
        """A directory, made with all above it if need be."""
        here = self.root
        for name in path.strip("/").split("/"):
            if name not in here.now:
                here.change({name: Folder()})
            found = here.now[name]
            assert isinstance(found, Folder), path
            here = found
        return here

    def _find(self, path: str) -> "File | Folder | None":
        here: File | Folder | None = self.root
        for name in path.strip("/").split("/"):
            here = here.now.get(name) if isinstance(here, Folder) else None
        return here

    def _folders(self, folder: Folder) -> Iterator[Folder]:
        """It, and all below."""
        yield folder
        for what in folder.now.values():
            if isinstance(what, Folder):
                yield from self._folders(what)
