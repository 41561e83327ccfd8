"""The commit order: everything a manifest names is durable before the manifest counts.

    1  written   blocks, shard indexes and metadata (by mover and store); a record for each new segment with token ids,
                 places and digests of its blocks; what heads need, if that is known; the next manifest, with digests of
                 these, under another name
    2  fsync     all these files, and every directory on the way to them
    3  rename    the manifest gets its name: from here on it counts
    4  fsync     its directory

What is interrupted before 3 was never there: the next opening finds and removes it (leftovers.py). After 4 all of it is
there, whatever happens. Nothing that the newest manifest names is ever written again or removed, and nothing that a
manifest names which a reader holds: a reader has a shared lock on the manifest it reads, and the system lets go of it
when the reader is gone, however it went. The one exception is the record of a damaged segment that is stored anew: a
crash meanwhile leaves it damaged.
"""

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from alaya_tiers.errors import StoreCorrupt
from alaya_tiers.manifest import MOST_BYTES, Context, Manifest, Segment
from alaya_tiers.needs import MOST_BYTES as NEEDS_BYTES
from alaya_tiers.needs import Needs
from alaya_tiers.seams import Disk, write_new
from alaya_tiers.tiers.files import translate
from alaya_tiers.tiers.zarr_format import attributes_of, group_json

GENERATIONS, SEGMENTS = "generations", "segments"
KEPT = 2
"""Manifests that stay: the newest, and the one before for whoever repairs a disk by hand."""

Job = Callable[[], None]


def encoded(segment: Segment) -> tuple[bytes, str]:
    """A segment's record as a file, and its digest."""
    data = group_json({"alaya_tiers": segment.to_json()})
    return data, hashlib.sha256(data).hexdigest()


def prepare(
    disk: Disk,
    root: str,
    manifest: Manifest,
    records: Mapping[str, bytes],
    files: Iterable[str],
    saved: Iterable[str],
    run: Callable[[list[Job]], None],
    needs: Mapping[str, bytes],
) -> None:
    """Make everything that a manifest names durable, and itself. Raises StoreError; the one before counts.

    records: of the new segments, by name. needs: files of what heads need, by context. files: what else it names and
    was not made durable. saved: the same of files that ``Disk.save`` wrote: only the directories on the way to them are
    in doubt. run: runs jobs, all of them to their end, and raises the first error.
    """
    path = _generation(root, manifest.generation)
    groups = [os.path.join(root, folder, "zarr.json") for folder in (SEGMENTS, GENERATIONS)]
    written = {f"{path}.partial": group_json({"alaya_tiers": manifest.to_json()})}
    written |= {record_path(root, name): data for name, data in records.items()}
    written |= {needs_path(root, name): data for name, data in needs.items()}
    written |= {group: group_json({}) for group in groups if "zarr.json" not in disk.names(os.path.dirname(group))}
    for file, data in written.items():
        _write(disk, file, data)
    durable = {*files, *written, *groups}
    folders = {folder for file in durable.union(saved) for folder in _folders(root, file)} - {os.path.dirname(path)}
    run([_sync(disk, place) for place in sorted(durable) + sorted(folders)])


def put_in_place(disk: Disk, root: str, manifest: Manifest) -> None:
    """Make a prepared manifest the one that counts. Raises StoreError; the one before counts then."""
    path = _generation(root, manifest.generation)
    try:
        disk.rename(f"{path}.partial", path)
    except OSError as error:
        raise translate(error, path, "write") from error


def finish(disk: Disk, root: str, manifest: Manifest) -> None:
    """Make that durable. Raises StoreError; which manifest counts is known at the next opening then."""
    _sync(disk, os.path.dirname(_generation(root, manifest.generation)))()


def load_segment(disk: Disk, root: str, manifest: Manifest, name: str) -> Segment:
    """The record of a segment. Raises StoreCorrupt."""
    path, entry = record_path(root, name), manifest.segments[name]
    if not is_plain(disk, root, os.path.join(SEGMENTS, name, "zarr.json")):
        raise StoreCorrupt(errno.ELOOP, "a link leads to a segment's record and was not followed", path)
    data = _fetch(disk, path, "a segment's record cannot be read")
    if hashlib.sha256(data).hexdigest() != entry.digest:
        raise StoreCorrupt(errno.EIO, "a segment's record is damaged (wrong digest) and was not used", path)
    try:
        return Segment.from_json(_ours(data, path), name, entry)
    except (ValueError, OverflowError) as error:
        raise StoreCorrupt(errno.EIO, f"a segment's record is damaged: {error}", path) from error


def load_needs(disk: Disk, root: str, context: Context) -> Needs | None:
    """What the heads of a context need, where that was stored and is there. ValueError, OSError where it is damaged."""
    path = needs_path(root, context.id)
    if not context.needs or os.path.basename(path) not in disk.names(os.path.dirname(path)):
        return None
    if not is_plain(disk, root, os.path.relpath(path, root)):
        raise ValueError("a link leads to what heads need and was not followed")
    return Needs.decoded(disk.fetch(path, NEEDS_BYTES), context.needs)


def needs_path(root: str, context: str) -> str:
    """Where the needs of a context are, if there are any."""
    return os.path.join(root, SEGMENTS, context, "needs")


def is_plain(disk: Disk, root: str, place: str) -> bool:
    """Whether a file or folder is where it seems to be, ``place`` inside ``root``, reached through no link."""
    return disk.resolve(os.path.join(root, place)) == os.path.join(disk.resolve(root), place)


def load_manifest(disk: Disk, root: str) -> Manifest:
    """The manifest that counts; an empty one where none was ever saved. Raises StoreCorrupt."""
    number = newest(disk, root)
    return Manifest() if number is None else load_generation(disk, root, number)


def newest(disk: Disk, root: str) -> int | None:
    """The generation that counts; None where none was ever saved."""
    for number in sorted(numbers(disk, root), reverse=True):
        if "zarr.json" in disk.names(os.path.dirname(_generation(root, number))):
            return number
    return None


def load_generation(disk: Disk, root: str, number: int) -> Manifest:
    """The manifest of a generation. Raises StoreCorrupt."""
    path = _generation(root, number)
    if not is_plain(disk, root, os.path.join(GENERATIONS, str(number), "zarr.json")):
        raise StoreCorrupt(errno.ELOOP, "a link leads to the manifest and was not followed", path)
    try:
        manifest = Manifest.from_json(_ours(_fetch(disk, path, "the manifest cannot be read"), path))
    except (ValueError, RecursionError, OverflowError) as error:
        raise StoreCorrupt(errno.EIO, f"the manifest is damaged: {error}", path) from error
    if manifest.generation != number:
        raise StoreCorrupt(errno.EIO, "the manifest is that of another generation", path)
    return manifest


def lease(disk: Disk, root: str, number: int) -> int | None:
    """Hold a generation for reading: a handle; None if it does not count any more, or not for long.

    The writer looks for leases after it has committed. Whoever holds one and then sees that its generation is still the
    newest has come before that.
    """
    try:
        handle = disk.lease(_generation(root, number), shared=True)
    except (BlockingIOError, FileNotFoundError):
        return None
    if newest(disk, root) == number:
        return handle
    disk.close(handle)
    return None


def lent(disk: Disk, root: str, generation: int) -> list[int]:
    """Generations older than this one that somebody reads."""
    found = []
    for number in sorted(n for n in numbers(disk, root) if n < generation):
        try:
            disk.close(disk.lease(_generation(root, number), shared=False))
        except BlockingIOError:
            found.append(number)
        except OSError:
            continue
    return found


def numbers(disk: Disk, root: str) -> list[int]:
    """The generations there are folders of."""
    names = disk.names(os.path.join(root, GENERATIONS))
    return [int(n) for n in names if n.isdecimal() and n.isascii() and len(n) < 18]


def record_path(root: str, name: str) -> str:
    """Where the record of a segment is."""
    return os.path.join(root, SEGMENTS, name, "zarr.json")


def _generation(root: str, number: int) -> str:
    return os.path.join(root, GENERATIONS, str(number), "zarr.json")


def _write(disk: Disk, path: str, data: bytes) -> None:
    """A new file in place of any there was. Not durable yet."""
    try:
        write_new(disk, path, [(0, data)])
    except OSError as error:
        raise translate(error, path, "write") from error


def _sync(disk: Disk, path: str) -> Job:
    def sync() -> None:
        try:
            disk.sync(path)
        except OSError as error:
            raise translate(error, path, "write") from error

    return sync


def _folders(root: str, file: str) -> Iterator[str]:
    """All directories from that of ``file`` up to ``root``."""
    while file != root:
        file = os.path.dirname(file)
        yield file


def _fetch(disk: Disk, path: str, problem: str) -> bytes:
    try:
        return disk.fetch(path, MOST_BYTES)
    except OSError as error:
        raise StoreCorrupt(error.errno or errno.EIO, f"{problem}: {error.strerror}", path) from error


def _ours(data: bytes, path: str) -> Any:
    try:
        return attributes_of(data)["alaya_tiers"]
    except (ValueError, KeyError, RecursionError) as error:
        raise StoreCorrupt(errno.EIO, "this is not metadata of ours", path) from error
