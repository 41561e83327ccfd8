"""The directory of a cache: opened, locked, checked, and cleaned of what killed processes left."""

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from alaya_tiers.blocks import PAGE
from alaya_tiers.commit import (
    Job,
    finish,
    lent,
    load_generation,
    load_manifest,
    prepare,
    put_in_place,
)
from alaya_tiers.config import Settings
from alaya_tiers.errors import (
    IOFailed,
    StoreCorrupt,
    StoreError,
    StoreLocked,
    StoreUnwritable,
)
from alaya_tiers.leftovers import leftovers, uncounted
from alaya_tiers.manifest import Entry, Manifest
from alaya_tiers.seams import Clock, Disk
from alaya_tiers.snapshot import Model, Shelf, open_here
from alaya_tiers.tiers.base import Accountant
from alaya_tiers.tiers.files import translate
from alaya_tiers.tiers.queue import Queue
from alaya_tiers.tiers.ssd import SsdTier
from alaya_tiers.tiers.zarr_format import FORMAT, array_json, group_json

_PREFIX = "alaya-tiers-"


class Store(Shelf):
    """A directory of KV, held open by one process.

    path: kept after closing; None makes a directory under ``$ALAYA_TIERS_DIR`` or the system's temporary directory that
    is removed on closing. model: written into a new store, compared with an old one's.

    Raises StoreUnwritable, StoreLocked, StoreFormat (not a store, or of a newer version), StoreMismatch, StoreCorrupt.
    """

    writable = True

    def __init__(self, path: str | os.PathLike[str] | None, model: Model | None, disk: Disk) -> None:
        self.temporary = path is None
        where, self._lock = _temporary_directory() if path is None else (os.path.abspath(path), -1)
        super().__init__(where, model, disk)
        self.session = f"session-{secrets.token_hex(4)}"
        self.lent: dict[int, Manifest] = {}
        """Older generations that somebody read when we last looked: what they name was not removed."""
        self._saved_groups = False
        self.closing: Callable[[], None] = lambda: None
        """Writes down what must outlive this process, while the directory is still locked."""
        self.torn = False
        """Whether a commit failed so late that only the next opening can tell whether it did."""
        self._pid = os.getpid()
        if self._lock < 0:
            self._lock = self._claim()
        open_here.add(self)
        try:
            self.check()
            self.manifest = load_manifest(disk, self.path)
            if not self.temporary:
                self.tidy()
        except BaseException as error:
            disk.close(self._lock)
            self._lock = -1
            if isinstance(error, OSError):
                raise translate(error, self.path, "read") from error.__cause__
            raise

    @property
    def directory(self) -> str:
        """Where this session's segments go."""
        return os.path.join(self.path, self.session)

    def tier(self, settings: Settings, accountant: Accountant, clock: Clock) -> SsdTier:
        """The ssd tier of this session."""
        s = settings
        direct = s.io == "direct" or (s.io == "auto" and self._can_direct())
        queue = Queue(clock, s.queue_depth)
        return SsdTier(
            self.directory, self._disk, accountant, s.segment_tokens, s.io_threads, direct=direct, queue=queue
        )

    async def save_groups(self) -> list[str]:
        """Metadata of the groups that this session's segments are in; the files. Raises StoreError."""
        try:
            await self._save_groups()
            own = os.path.join(self.directory, "zarr.json")
            if "zarr.json" not in self._disk.names(self.directory):
                await self._disk.save(own, group_json({}))
        except OSError as error:
            raise translate(error, self.path, "write") from error
        return [os.path.join(self.path, "zarr.json"), own]

    def commit(
        self,
        manifest: Manifest,
        records: Mapping[str, bytes],
        files: Iterable[str],
        saved: Iterable[str],
        run: Callable[[list[Job]], None],
        needs: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        """Make files, new records and then the manifest durable; see ``commit.prepare``. Raises StoreError.

        The manifest before counts then; but if the very last steps failed, only the next opening can tell, and until
        then nothing is removed and nothing more is committed.
        """
        if self.torn:
            raise IOFailed(errno.EIO, "the last commit failed so late that only a new opening can tell how", self.path)
        prepare(self._disk, self.path, manifest, records, files, saved, run, needs)
        self.torn = True
        try:
            put_in_place(self._disk, self.path, manifest)
        except StoreError:
            self.torn = False
            raise
        finish(self._disk, self.path, manifest)
        self.torn, self.manifest = False, manifest

    def require(self, model: Model | None) -> None:
        """Refuse another model than the store's; an empty store becomes this one's. Raises StoreMismatch."""
        if self.model is None and model is not None:
            self._saved_groups = False
        super().require(model)

    def collect(self) -> None:
        """Remove records and manifests that do not count any more and that nobody reads."""
        known, self.lent = self.lent, {}
        for number in lent(self._disk, self.path, self.manifest.generation):
            with contextlib.suppress(StoreCorrupt):
                self.lent[number] = known.get(number) or load_generation(self._disk, self.path, number)
        for path in uncounted(self._disk, self.path, self.manifest, self.lent):
            self.remove(path)

    @property
    def lent_files(self) -> dict[str, int]:
        """Bytes of files that only readers of older generations need."""
        files = {name: nbytes for old in self.lent.values() for name, nbytes in old.files.items()}
        return {name: nbytes for name, nbytes in files.items() if name not in self.manifest.files}

    def lent_entry(self, name: str) -> Entry | None:
        """What an older generation, held by a reader, says of a segment: it and its files are still there."""
        return next((old.segments[name] for old in self.lent.values() if name in old.segments), None)

    def remove(self, path: str) -> None:
        """Remove what nobody needs; a failure leaves it for the next opening."""
        with contextlib.suppress(OSError):
            self._disk.remove(path)

    def tidy(self) -> None:
        """Remove what neither the manifest nor a flushed session names: leftovers of work that came to no end."""
        self.collect()
        for path in leftovers(self._disk, self.path, self.manifest, self.lent):
            self.remove(path)

    async def publish(self, ssd: SsdTier, number: int, segment_tokens: int) -> None:
        """Write the metadata of a segment file, so that any Zarr reader finds what is in it."""
        file = ssd.files[number]
        last = int(np.flatnonzero((file.offsets >= 0).any(0)).max())
        attributes = {"alaya_tiers": {"layer": file.layer, "stream": file.stream, "segment": file.segment}}
        metadata = array_json(file.shape, (last + 1) * file.shape.tokens - file.unfilled, segment_tokens, attributes)
        array = Path(file.path).parents[3]
        try:
            await self._save_groups()
            await self._disk.save(str(array.parent / "zarr.json"), group_json({}))
            await self._disk.save(str(array / "zarr.json"), metadata)
        except OSError as error:
            raise translate(error, str(array), "write") from error

    async def save_manifest(self, contexts: dict[str, Any]) -> None:
        """Write down which segments make up which context: from here on closing keeps this session's files."""
        try:
            await self._save_groups()
            await self._disk.save(os.path.join(self.directory, "zarr.json"), group_json({"alaya_tiers": contexts}))
        except OSError as error:
            raise translate(error, self.directory, "write") from error

    def close(self) -> None:
        """Unlock; remove what nobody can read later. No job may be running."""
        if self._lock < 0 or os.getpid() != self._pid:
            return
        if self.temporary:
            shutil.rmtree(self.path, ignore_errors=True)
        elif not self.torn:
            self.tidy()
        self.closing()
        if self.temporary:
            os.close(self._lock)  # a real one, whatever disk this is
        else:
            self._disk.close(self._lock)
        self._lock = -1

    def locks(self) -> list[int]:
        return [self._lock] if self._lock >= 0 else []

    def _claim(self) -> int:
        try:
            return self._disk.claim(self.path)
        except BlockingIOError as error:
            raise StoreLocked(
                errno.EAGAIN,
                f"{_holder(self.path)} has this store open for writing; close it there, choose another path, or open "
                "this one with read_only=True, beside it",
                self.path,
            ) from error
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTDIR):
                raise StoreUnwritable(
                    error.errno, "the store's path is not a directory; choose another", self.path
                ) from error
            raise translate(error, self.path, "write") from error

    async def _save_groups(self) -> None:
        if not self._saved_groups:
            await self._disk.save(os.path.join(self.path, "zarr.json"), self._root())
            self._saved_groups = True

    def _root(self) -> bytes:
        return group_json({"alaya_tiers": {"format": FORMAT, "model": self.model}})

    def _can_direct(self) -> bool:
        """Whether the file system takes O_DIRECT."""
        path = os.path.join(self.path, "probe")
        try:
            handle = self._disk.open(path, create=True, direct=True)
            try:
                page = mmap.mmap(-1, PAGE)
                self._disk.write(handle, [memoryview(page)], 0)
            finally:
                self._disk.close(handle)
                self._disk.remove(path)
        except OSError:
            return False
        return True


def _holder(path: str) -> str:
    """Who has a directory locked, as far as the system says."""
    try:
        status = os.stat(path)
        place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        pid = next(int(lock[4]) for lock in locks if lock[1] == "FLOCK" and lock[5] == place)
    except (OSError, StopIteration, ValueError, IndexError):
        return "another cache"
    return "another cache of this process" if pid == os.getpid() else f"process {pid}"


def _opened(directory: str | Path) -> int:
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _temporary_directory() -> tuple[str, int]:
    """A new directory and the descriptor that locks it; those of dead processes are removed.

    The parent is locked while the dead are looked for: nobody may take a directory for dead that is not locked yet.
    Removing them can take long, and is done after that, by a thread.
    """
    parent = os.environ.get("ALAYA_TIERS_DIR") or tempfile.gettempdir()
    try:
        guard = _opened(parent)
        try:
            fcntl.flock(guard, fcntl.LOCK_EX)
            dead = [(old, lock) for old in Path(parent).glob(f"{_PREFIX}*") if (lock := _locked(old)) is not None]
            path = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
            lock = _opened(path)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(guard)
    except OSError as error:
        raise translate(error, parent, "write") from error
    if dead:
        threading.Thread(target=_remove, args=(dead,), name="alaya-remove", daemon=True).start()
    return path, lock


def _locked(directory: Path) -> int | None:
    """The descriptor that locks a store whose process is gone; None where it lives: its lock is held."""
    try:
        lock = _opened(directory)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _remove(dead: list[tuple[Path, int]]) -> None:
    for directory, lock in dead:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)
