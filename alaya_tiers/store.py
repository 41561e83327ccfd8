"""The directory of a cache: opened, locked, checked, and cleaned of what killed processes left."""

import errno
import fcntl
import json
import mmap
import os
import secrets
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

from alaya_tiers.blocks import PAGE
from alaya_tiers.config import IoMode
from alaya_tiers.errors import StoreCorrupt, StoreFormat, StoreLocked, StoreMismatch, StoreUnwritable
from alaya_tiers.seams import Disk
from alaya_tiers.tiers.base import Accountant
from alaya_tiers.tiers.ssd import SsdTier, translate
from alaya_tiers.tiers.zarr_format import FORMAT, array_json, attributes_of, group_json

Model = dict[str, Any]
"""What a store says of the model it was written for; JSON values only."""

_PREFIX = "alaya-tiers-"


class Store:
    """A directory of KV, held open by one process.

    path: kept after closing; None makes a directory under ``$ALAYA_TIERS_DIR`` or the system's temporary directory that
    is removed on closing. model: written into a new store, compared with an old one's.

    Raises StoreUnwritable, StoreLocked, StoreFormat (not a store, or of a newer version), StoreMismatch, StoreCorrupt.
    """

    def __init__(self, path: str | os.PathLike[str] | None, model: Model | None, disk: Disk) -> None:
        self.temporary = path is None
        self._lock = -1
        if path is None:
            self.path, self._lock = _temporary_directory()
        else:
            self.path = os.path.abspath(path)
        self.session = f"session-{secrets.token_hex(4)}"
        self.model = model
        self._disk = disk
        self._saved_groups = False
        self._pid = os.getpid()
        try:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
            if not os.access(self.path, os.W_OK | os.X_OK):
                raise StoreUnwritable(errno.EACCES, "the directory cannot be written; choose another", self.path)
            if self._lock < 0:
                self._lock = _opened(self.path)
        except StoreUnwritable:
            raise
        except OSError as error:
            kind = StoreUnwritable if error.errno in (errno.EEXIST, errno.ENOTDIR) else None
            if kind is not None:
                raise kind(error.errno, "the store's path is not a directory; choose another", self.path) from error
            raise translate(error, self.path, "write") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check()
        except BlockingIOError as error:
            os.close(self._lock)
            raise StoreLocked(
                errno.EAGAIN, "another cache has this store open; close it or choose another path", self.path
            ) from error
        except BaseException:
            os.close(self._lock)
            raise
        self._collect()

    @property
    def directory(self) -> str:
        """Where this session's segments go."""
        return os.path.join(self.path, self.session)

    def tier(self, io: IoMode, accountant: Accountant, segment_tokens: int, threads: int) -> SsdTier:
        """The ssd tier of this session."""
        direct = io == "direct" or (io == "auto" and self._can_direct())
        return SsdTier(self.directory, self._disk, accountant, segment_tokens, threads, direct=direct)

    async def publish(self, ssd: SsdTier, number: int, segment_tokens: int) -> None:
        """Write the metadata of a segment file, so that any Zarr reader finds what is in it."""
        file = ssd.files[number]
        last = int(np.flatnonzero((file.offsets >= 0).any(0)).max())
        attributes = {"alaya_tiers": {"layer": file.layer, "stream": file.stream, "segment": file.segment}}
        metadata = array_json(file.shape, (last + 1) * file.shape.tokens, segment_tokens, attributes)
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
        elif not _kept(Path(self.directory)):
            shutil.rmtree(self.directory, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1

    async def _save_groups(self) -> None:
        if not self._saved_groups:
            await self._disk.save(os.path.join(self.path, "zarr.json"), self._root())
            self._saved_groups = True

    def _root(self) -> bytes:
        return group_json({"alaya_tiers": {"format": FORMAT, "model": self.model}})

    def _check(self) -> None:
        root = Path(self.path, "zarr.json")
        if not root.exists():
            if foreign := [p.name for p in Path(self.path).iterdir() if not _ours(p)]:
                raise StoreFormat(
                    errno.ENOTEMPTY,
                    f"the directory holds other files ({foreign[0]}, ...); choose an empty one",
                    self.path,
                )
            return
        try:
            found = attributes_of(root.read_bytes())["alaya_tiers"]
            version, model = int(found["format"]), found["model"]
            if not isinstance(model, dict | None):
                raise TypeError("the model is not described by a mapping")
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise StoreCorrupt(errno.EIO, "the store's zarr.json cannot be read", str(root)) from error
        if version > FORMAT:
            raise StoreFormat(
                errno.EPROTO,
                f"the store has format {version}, this version knows {FORMAT}; upgrade alaya_tiers",
                self.path,
            )
        if self.model is None:
            self.model = model
        elif model is not None and model != self.model:
            raise StoreMismatch(
                errno.EINVAL, f"the store was made for another model: {_difference(model, self.model)}", self.path
            )

    def _collect(self) -> None:
        """Remove sessions that were never written down: their process was killed."""
        for session in Path(self.path).glob("session-*"):
            if not _kept(session):
                shutil.rmtree(session, ignore_errors=True)

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


def _kept(session: Path) -> bool:
    return (session / "zarr.json").exists()


def _ours(path: Path) -> bool:
    return path.name.startswith("session-")


def _difference(stored: Model, given: Model) -> str:
    names = [n for n in sorted({*stored, *given}) if stored.get(n) != given.get(n)]
    shown = (
        f"{n} is {json.dumps(stored.get(n))[:60]} there and {json.dumps(given.get(n))[:60]} here" for n in names[:3]
    )
    return "; ".join(shown) + ("" if len(names) <= 3 else f"; and {len(names) - 3} more")


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
