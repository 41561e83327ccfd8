"""What is stored, read without changing it: by the writer itself, or by others beside it.

Shelf       a directory, its model and one generation of its contexts
Snapshot    a shelf that holds a lease on that generation: the writer removes nothing it names
"""

import contextlib
import errno
import json
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from alaya_tiers.commit import (
    GENERATIONS,
    SEGMENTS,
    is_plain,
    lease,
    load_generation,
    load_segment,
    newest,
    record_path,
)
from alaya_tiers.damage import Place, needing, usable
from alaya_tiers.errors import StoreCorrupt, StoreFormat, StoreLocked, StoreMismatch
from alaya_tiers.leftovers import LEFT, is_session
from alaya_tiers.manifest import MOST_BYTES, Manifest, Segment
from alaya_tiers.seams import Disk
from alaya_tiers.tiers.files import translate
from alaya_tiers.tiers.zarr_format import FORMAT, attributes_of
from alaya_tiers.verify import Damage, verify

Model = dict[str, Any]
"""What a store says of the model it was written for; JSON values only."""

EXPECTED = 256 << 10
"""Bytes of a record, or of an index with its header first, that are asked for ahead: most records are smaller."""

_ATTEMPTS = 1000
"""So many generations in a row may be replaced while one is being opened."""


class Shelf:
    """Contexts in a directory, as one generation says. model: what the caller expects, compared with the store's."""

    writable = False

    def __init__(self, path: str, model: Model | None, disk: Disk) -> None:
        self.path, self.model, self._disk = path, model, disk
        self.manifest = Manifest()

    @property
    def disk(self) -> Disk:
        """Where the store is."""
        return self._disk

    def require(self, model: Model | None) -> None:
        """Refuse another model than the store's; an empty store becomes this one's. Raises StoreMismatch."""
        if model is None:
            return
        if self.model is None:
            self.model = model
        elif model != self.model:
            raise StoreMismatch(
                errno.EINVAL, f"the store was made for another model: {_difference(self.model, model)}", self.path
            )

    def record(self, name: str) -> Segment:
        """The record of a stored segment. Raises StoreCorrupt."""
        return load_segment(self._disk, self.path, self.manifest, name)

    def expect(self, names: Sequence[str], *, index: bool = False) -> None:
        """The records of these segments, or the headers of their indexes, will be wanted next, one after the other."""
        for name in names:
            self._disk.expect(self.index_path(name) if index else record_path(self.path, name), 0, EXPECTED)

    def index_path(self, name: str) -> str:
        """Where the index of a stored segment is, if it has one."""
        return os.path.join(self.path, SEGMENTS, name, "index")

    def folder(self, path: str) -> str:
        """That of the array, inside the store, to which a shard belongs."""
        return os.path.relpath(path, self.path).removesuffix("/c/0/0/0")

    def blame(self, error: StoreCorrupt, advice: str) -> None:
        """Have an error about a block say whose it is and what to do, if what is damaged was stored."""
        if error.block is None or error.segment is not None:
            return
        folder = self.folder(error.filename)
        place = Place(folder, error.block)
        hurt = [n for n, entry in self.manifest.segments.items() if folder in entry.files and self._has(n, place)]
        if hurt:
            error.segment, error.contexts = hurt[0], needing(self.manifest, hurt)
            whose = ", ".join(context[:12] for context in error.contexts[:3])
            more = f" and {len(error.contexts) - 3} more" if len(error.contexts) > 3 else ""
            error.strerror = f"{error.strerror} (stored segment {hurt[0][:12]}, needed by {whose}{more}); {advice}"

    def _has(self, name: str, place: Place) -> bool:
        try:
            record = self.record(name)
        except StoreCorrupt:
            return True
        return usable(record, {place}) < record.tokens.size

    def verify(self, say: Callable[[int, int], None]) -> Iterator[Damage]:
        """See ``alaya_tiers.verify``. What is stored now stays readable until it is done, whatever is deleted."""
        manifest, held = self.manifest, None
        if manifest.generation:
            with contextlib.suppress(OSError):
                held = lease(self._disk, self.path, manifest.generation)
        try:
            yield from verify(self._disk, self.path, manifest, say)
        finally:
            if held is not None:
                self._disk.close(held)

    def locks(self) -> list[int]:
        """Handles of what is locked."""
        return []

    def check(self) -> None:
        """Raises StoreFormat, StoreMismatch, StoreCorrupt: what this is."""
        root, names = os.path.join(self.path, "zarr.json"), self._disk.names(self.path)
        for name in names:  # what is not ours in these folders is removed, and must not be somebody else's
            if not is_plain(self._disk, self.path, name):
                raise StoreCorrupt(
                    errno.ELOOP,
                    "a link leads out of the store and was not followed; nothing was touched",
                    os.path.join(self.path, name),
                )
        if "zarr.json" not in names:
            if foreign := [n for n in names if not is_session(n) and n not in (GENERATIONS, SEGMENTS, *LEFT)]:
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
        if version != FORMAT:
            advice = "upgrade alaya_tiers" if version > FORMAT else "make the store again: no release wrote that format"
            raise StoreFormat(
                errno.EPROTO, f"the store has format {version}, this version knows {FORMAT}; {advice}", self.path
            )
        if self.model is None:
            self.model = model
        elif model is not None:
            given, self.model = self.model, model
            self.require(given)


class Snapshot(Shelf):
    """The newest generation of a store, held open for reading beside whoever writes. It stays what it was.

    Raises StoreFormat (not a store, or of a newer version), StoreMismatch, StoreCorrupt, StoreLocked.
    """

    def __init__(self, path: str | os.PathLike[str], model: Model | None, disk: Disk) -> None:
        super().__init__(os.path.abspath(path), model, disk)
        self._leases = list[tuple[int, Manifest]]()
        self._finalizer = weakref.finalize(self, _give_back, self._leases, disk, os.getpid())
        open_here.add(self)
        self.refresh()

    def refresh(self) -> bool:
        """Move to the newest generation; whether there was one. What was held stays held until ``let_go``."""
        try:
            self.check()
            if newest(self._disk, self.path) in (None, self.manifest.generation):
                return False
            self._leases.append(self._newest())
        except OSError as error:
            raise translate(error, self.path, "read") from error.__cause__
        self.manifest = self._leases[-1][1]
        return True

    def let_go(self, unused: Callable[[Manifest], bool]) -> None:
        """Give back older generations nobody here reads any more."""
        for one in [old for old in self._leases[:-1] if unused(old[1])]:
            self._leases.remove(one)
            self._disk.close(one[0])

    def close(self) -> None:
        """Give back all leases. Twice is fine."""
        self._finalizer()

    def locks(self) -> list[int]:
        return [held for held, _ in self._leases]

    def _newest(self) -> tuple[int, Manifest]:
        for _ in range(_ATTEMPTS):
            number = newest(self._disk, self.path)
            held = None if number is None else lease(self._disk, self.path, number)
            if held is not None and number is not None:
                try:
                    return held, load_generation(self._disk, self.path, number)
                except BaseException:
                    self._disk.close(held)
                    raise
        raise StoreLocked(errno.EAGAIN, "the store changes faster than it can be opened; try again", self.path)


def _give_back(leases: list[tuple[int, Manifest]], disk: Disk, pid: int) -> None:
    while os.getpid() == pid and leases:
        disk.close(leases.pop()[0])


open_here: "weakref.WeakSet[Shelf]" = weakref.WeakSet()
"""What this process has locked."""


def _forked() -> None:
    """In a child: the locks are the parent's alone. A lock lives as long as any process has its descriptor."""
    for shelf in list(open_here):
        for handle in shelf.locks():
            with contextlib.suppress(OSError):
                shelf.disk.close(handle)


os.register_at_fork(after_in_child=_forked)


def _difference(stored: Model, given: Model) -> str:
    names = [n for n in sorted({*stored, *given}) if stored.get(n) != given.get(n)]
    shown = (
        f"{n} is {json.dumps(stored.get(n))[:60]} there and {json.dumps(given.get(n))[:60]} here" for n in names[:3]
    )
    return "; ".join(shown) + ("" if len(names) <= 3 else f"; and {len(names) - 3} more")
