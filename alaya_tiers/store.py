"""The directory of a cache: opened, locked, checked, and cleaned of what killed processes left."""

import contextlib
import errno
import fcntl
import json
import mmap
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alaya_tiers.blocks import PAGE
from alaya_tiers.commit import (
    GENERATIONS,
    SEGMENTS,
    Job,
    collect,
    finish,
    load_manifest,
    load_segment,
    prepare,
    put_in_place,
)
from alaya_tiers.config import IoMode
from alaya_tiers.errors import (
    IOFailed,
    StoreCorrupt,
    StoreError,
    StoreFormat,
    StoreLocked,
    StoreMismatch,
    StoreUnwritable,
)
from alaya_tiers.manifest import MOST_BYTES, Manifest, Segment
from alaya_tiers.seams import Disk
from alaya_tiers.tiers.base import Accountant
from alaya_tiers.tiers.ssd import SsdTier, translate
from alaya_tiers.tiers.zarr_format import FORMAT, array_json, attributes_of, group_json
from alaya_tiers.verify import Damage, verify

Model = dict[str, Any]
"""What a store says of the model it was written for; JSON values only."""

_PREFIX = "alaya-tiers-"
_LEFT = ("probe", "zarr.json.partial")
"""What a process that was killed may leave beside the rest."""


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
        self.torn = False
        """Whether a commit failed so late that only the next opening can tell whether it did."""
        self._pid = os.getpid()
        if self._lock < 0:
            self._lock = self._claim()
        try:
            self._check()
            self.manifest = load_manifest(disk, self.path)
            if not self.temporary:
                self.tidy()
        except BaseException as error:
            disk.close(self._lock)
            if isinstance(error, OSError):
                raise translate(error, self.path, "read") from error.__cause__
            raise

    @property
    def directory(self) -> str:
        """Where this session's segments go."""
        return os.path.join(self.path, self.session)

    def tier(self, io: IoMode, accountant: Accountant, segment_tokens: int, threads: int) -> SsdTier:
        """The ssd tier of this session."""
        direct = io == "direct" or (io == "auto" and self._can_direct())
        return SsdTier(self.directory, self._disk, accountant, segment_tokens, threads, direct=direct)

    def require(self, model: Model | None) -> None:
        """Refuse another model than the store's; an empty store becomes this one's. Raises StoreMismatch."""
        if model is None:
            return
        if self.model is None:
            self.model, self._saved_groups = model, False
        elif model != self.model:
            raise StoreMismatch(
                errno.EINVAL, f"the store was made for another model: {_difference(self.model, model)}", self.path
            )

    def record(self, name: str) -> Segment:
        """The record of a stored segment. Raises StoreCorrupt."""
        return load_segment(self._disk, self.path, self.manifest, name)

    @property
    def disk(self) -> Disk:
        """Where the store is."""
        return self._disk

    def index_path(self, name: str) -> str:
        """Where the index of a stored segment is, if it has one."""
        return os.path.join(self.path, SEGMENTS, name, "index")

    def verify(self, say: Callable[[int, int], None]) -> Iterator[Damage]:
        """See ``alaya_tiers.verify``."""
        return verify(self._disk, self.path, self.manifest, say)

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
    ) -> None:
        """Make files, new records and then the manifest durable; see ``commit.prepare``. Raises StoreError.

        The manifest before counts then; but if the very last steps failed, only the next opening can tell, and until
        then nothing is removed and nothing more is committed.
        """
        if self.torn:
            raise IOFailed(errno.EIO, "the last commit failed so late that only a new opening can tell how", self.path)
        prepare(self._disk, self.path, manifest, records, files, saved, run)
        self.torn = True
        try:
            put_in_place(self._disk, self.path, manifest)
        except StoreError:
            self.torn = False
            raise
        finish(self._disk, self.path, manifest)
        self.torn, self.manifest = False, manifest

    def collect(self) -> None:
        """Remove records and manifests that do not count any more."""
        collect(self._disk, self.path, self.manifest)

    def is_plain(self, folder: str) -> bool:
        """Whether a folder is where it seems to be, reached through no link."""
        path = os.path.join(self.path, folder, "c", "0", "0", "0")
        return self._disk.resolve(path) == os.path.join(self._disk.resolve(self.path), folder, "c", "0", "0", "0")

    def remove(self, path: str) -> None:
        """Remove what nobody needs; a failure leaves it for the next opening."""
        with contextlib.suppress(OSError):
            self._disk.remove(path)

    def tidy(self) -> None:
        """Remove what neither the manifest nor a flushed session names: leftovers of work that came to no end."""
        collect(self._disk, self.path, self.manifest)
        for name in set(self._disk.names(self.path)).intersection(_LEFT):
            self.remove(os.path.join(self.path, name))
        wanted: dict[str, set[str]] = {}
        for name in self.manifest.files:
            session, folder, _ = name.split("/")
            wanted.setdefault(session, set()).add(folder)
        for session in filter(_is_session, self._disk.names(self.path)):
            folders = wanted.get(session, set()) | self._flushed(session)
            if not folders:
                self.remove(os.path.join(self.path, session))
            for name in self._disk.names(os.path.join(self.path, session)):
                if name not in folders and name != "zarr.json":
                    self.remove(os.path.join(self.path, session, name))

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
        self._disk.close(self._lock)
        self._lock = -1

    def _claim(self) -> int:
        try:
            return self._disk.claim(self.path)
        except BlockingIOError as error:
            raise StoreLocked(
                errno.EAGAIN, "another cache has this store open; close it or choose another path", self.path
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

    def _check(self) -> None:
        root, names = os.path.join(self.path, "zarr.json"), self._disk.names(self.path)
        if "zarr.json" not in names:
            if foreign := [n for n in names if not _is_session(n) and n not in (GENERATIONS, SEGMENTS, *_LEFT)]:
                raise StoreFormat(
                    errno.ENOTEMPTY,
                    f"the directory holds other files ({foreign[0]}, ...); choose an empty one",
                    self.path,
                )
            return
        try:
            found = attributes_of(self._disk.fetch(root, MOST_BYTES))["alaya_tiers"]
            version, model = int(found["format"]), found["model"]
            if not isinstance(model, dict | None):
                raise TypeError("the model is not described by a mapping")
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise StoreCorrupt(errno.EIO, "the store's zarr.json cannot be read", root) from error
        if version > FORMAT:
            raise StoreFormat(
                errno.EPROTO,
                f"the store has format {version}, this version knows {FORMAT}; upgrade alaya_tiers",
                self.path,
            )
        if self.model is None:
            self.model = model
        elif model is not None:
            given, self.model = self.model, model
            self.require(given)

    def _flushed(self, session: str) -> set[str]:
        """Folders that ``flush`` wrote down for other Zarr readers; of a file that cannot be read, all there are."""
        names = self._disk.names(os.path.join(self.path, session))
        if "zarr.json" not in names:
            return set()
        try:
            data = attributes_of(self._disk.fetch(os.path.join(self.path, session, "zarr.json"), MOST_BYTES))
            contexts = data.get("alaya_tiers", {}).get("contexts", [])
            return {folder for c in contexts for folders in c["layers"].values() for folder in folders}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return set(names)

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


def _is_session(name: str) -> bool:
    return name.startswith("session-")


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
