"""A store that is damaged: examined without changing it, repaired in its place, or saved into a new one.

Nothing here needs an engine, and nothing undamaged is ever removed. The caller holds the store (``Disk.claim``) for
``repair``; ``examine`` and ``salvage`` only read it.
"""

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from alaya_tiers.arrays import replaced, stride_of, write_array
from alaya_tiers.coded import problem_of
from alaya_tiers.commit import (
    GENERATIONS,
    KEPT,
    SEGMENTS,
    Job,
    finish,
    is_plain,
    load_generation,
    load_needs,
    load_segment,
    newest,
    numbers,
    prepare,
    put_in_place,
)
from alaya_tiers.damage import shortened
from alaya_tiers.errors import InputError, StoreCorrupt
from alaya_tiers.identity import model_digest
from alaya_tiers.leftovers import is_session, leftovers
from alaya_tiers.manifest import MOST_BYTES, Context, Entry, Manifest, Segment
from alaya_tiers.seams import Disk
from alaya_tiers.snapshot import Model, Shelf
from alaya_tiers.tiers.zarr_format import FORMAT, attributes_of, group_json
from alaya_tiers.verify import FATAL, Damage, is_group, verify

Say = Callable[[int, int], None]


class Examined(NamedTuple):
    """What a directory holds. manifest: what could be read of it; counts: whether that is what its newest file says."""

    manifest: Manifest
    counts: bool
    model: Model | None
    damage: list[Damage]

    @property
    def hurt(self) -> set[str]:
        """Segments that lack tokens."""
        return {d.segment for d in self.damage if d.kind in FATAL and d.segment is not None}

    @property
    def left(self) -> Manifest:
        """What there is without damage: contexts end where it begins."""
        return shortened(self.manifest, self.hurt)

    @property
    def lost(self) -> dict[str, int]:
        """The contexts that repair makes shorter, by id, and how many tokens of them are left."""
        left, found = self.left.contexts, dict[str, int]()
        for context in self.manifest.contexts.keys() - left.keys():
            whole = [n for n in self.manifest.chain(context) if n in self.left.segments]
            found[context] = sum(self.manifest.segments[n].tokens for n in whole)
        return found


def examine(disk: Disk, root: str, say: Say) -> Examined:
    """Everything that is wrong with a store. say: told how many segments are done, of how many.

    Raises StoreFormat: not a store, or of another version than this one reads; StoreCorrupt: a link leads out of it.
    """
    shelf, damage = Shelf(root, None, disk), list[Damage]()
    try:
        shelf.check()
        path = os.path.join(root, "zarr.json")
        if "zarr.json" in disk.names(root) and not is_group(disk.fetch(path, MOST_BYTES)):
            damage.append(Damage((), path, "the group's metadata is damaged", "metadata"))
    except StoreCorrupt as error:
        if error.errno == errno.ELOOP:
            raise  # beyond a link nothing is ours, to be read or mended
        damage.append(Damage((), str(error.filename), str(error.strerror), "format"))
    manifest, counts = Manifest(), True
    for number in sorted(numbers(disk, root), reverse=True)[: KEPT + 1]:
        if "zarr.json" not in disk.names(os.path.join(root, GENERATIONS, str(number))):
            continue
        try:
            found = load_generation(disk, root, number)
        except StoreCorrupt as error:
            newest_one = number == newest(disk, root)
            counts = counts and not newest_one
            problem = str(error.strerror) if newest_one else f"an older generation: {error.strerror}"
            damage.append(Damage((), str(error.filename), problem, "manifest" if newest_one else "leftover"))
            continue
        if not manifest.generation:
            manifest = found
    if not counts:
        manifest = _rebuilt(disk, root, manifest)
    shelf.manifest = manifest
    wrong = [one for one in manifest.identities.values() if one.model != model_digest(shelf.model)]
    if shelf.model is not None and wrong:
        path = os.path.join(root, "zarr.json")
        damage.append(Damage((), path, "the store says it is of another model than its contexts", "format"))
        shelf.model = None
    damage += verify(disk, root, manifest, say)
    return Examined(manifest, counts, shelf.model, damage)


def repair(disk: Disk, root: str, found: Examined) -> None:
    """Make a store whole: what is damaged is gone, and contexts that need it end before it; see ``Examined.lost``.

    Raises StoreError; the store is as it was then, or partly repaired.
    """
    kinds = {d.kind for d in found.damage}
    if "format" in kinds or any(d.path == os.path.join(root, "zarr.json") for d in found.damage):
        replaced(disk, os.path.join(root, "zarr.json"), _root(found.model))
    for one in found.damage:
        if one.kind == "metadata" and not one.segment and one.path != os.path.join(root, "zarr.json"):
            replaced(disk, one.path, _group(disk, one.path, found.manifest))
    manifest = found.manifest
    if found.lost or not found.counts:
        manifest = replace(found.left, generation=max(numbers(disk, root), default=0) + 1)
        _commit(disk, root, manifest, {}, [], {})
    segments = {name: load_segment(disk, root, manifest, name) for name in manifest.segments}
    arrays = {os.path.dirname(_array_file(d)) for d in found.damage if d.kind in ("shard", "metadata") and d.segment}
    for folder in sorted(os.path.relpath(path, root) for path in arrays):
        if folder in manifest.files:
            write_array(disk, root, root, folder, segments.values(), manifest)
    for one in found.damage:
        if one.kind == "index":
            disk.remove(one.path)
        elif one.kind in ("leftover", "manifest"):  # the folder, or the link that is there instead, with all in it
            disk.remove(os.path.dirname(one.path))
    for path in list(leftovers(disk, root, manifest, {})):
        with contextlib.suppress(OSError):
            disk.remove(path)


def salvage(disk: Disk, root: str, found: Examined, target: str, say: Say) -> Manifest:
    """Copy all that is undamaged into a new store: whole contexts, and of others the whole segments before the damage.

    target: a directory that is empty, or not there. say: told how many files are copied, of how many.
    Raises StoreError, InputError; the old store is not changed.
    """
    if disk.names(target):
        raise InputError(f"{target} is not empty: a store is salvaged into a new directory")
    lock = disk.claim(target)
    try:
        manifest = replace(found.left, generation=1)
        segments = {name: load_segment(disk, root, found.manifest, name) for name in manifest.segments}
        files = [replaced(disk, os.path.join(target, "zarr.json"), _root(found.model))]
        for session in sorted({folder.split("/")[0] for folder in manifest.files}):
            files.append(replaced(disk, os.path.join(target, session, "zarr.json"), group_json({})))
        for done, folder in enumerate(manifest.files):
            files += write_array(disk, root, target, folder, segments.values(), manifest)
            say(done + 1, len(manifest.files))
        records = {n: disk.fetch(os.path.join(root, SEGMENTS, n, "zarr.json"), MOST_BYTES) for n in manifest.segments}
        _commit(disk, target, manifest, records, files, _needs(disk, root, manifest))
        for name, entry in manifest.segments.items():
            path = os.path.join(root, SEGMENTS, name, "index")
            if "index" in disk.names(os.path.dirname(path)) and problem_of(disk, path, entry.digest) is None:
                replaced(disk, os.path.join(target, SEGMENTS, name, "index"), disk.fetch(path, 1 << 40))
        for one in verify(disk, target, manifest, lambda done, of: None):
            raise StoreCorrupt(errno.EIO, f"the copy is damaged: {one.problem}", one.path)
        return manifest
    finally:
        disk.close(lock)


def _needs(disk: Disk, root: str, manifest: Manifest) -> dict[str, bytes]:
    """What is known of what heads need, and whole."""
    found = dict[str, bytes]()
    for context in manifest.contexts.values():
        with contextlib.suppress(OSError, ValueError):
            needs = load_needs(disk, root, context)
            found |= {} if needs is None else {context.id: needs.encoded()[0]}
    return found


def _commit(
    disk: Disk, root: str, manifest: Manifest, records: dict[str, bytes], files: list[str], needs: Mapping[str, bytes]
) -> None:
    prepare(disk, root, manifest, records, files, [], _run, needs)
    put_in_place(disk, root, manifest)
    finish(disk, root, manifest)


def _run(jobs: list[Job]) -> None:
    for job in jobs:
        job()


def _root(model: Model | None) -> bytes:
    return group_json({"alaya_tiers": {"format": FORMAT, "model": model}})


def _group(disk: Disk, path: str, manifest: Manifest) -> bytes:
    """What the metadata of a group should say."""
    generation = os.path.join(GENERATIONS, str(manifest.generation), "zarr.json")
    return group_json({"alaya_tiers": manifest.to_json()} if path.endswith(generation) else _kept(disk, path))


def _kept(disk: Disk, path: str) -> dict[str, object]:
    """What a flushed session says of itself, if that can still be read."""
    try:
        return attributes_of(disk.fetch(path, MOST_BYTES)) if is_session(path.split("/")[-2]) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _array_file(damage: Damage) -> str:
    """The metadata of the array that damage is about."""
    return f"{damage.path.removesuffix('/c/0/0/0')}/zarr.json" if damage.kind == "shard" else damage.path


# ---------------------------------------------------------------------- without a manifest


def _rebuilt(disk: Disk, root: str, base: Manifest) -> Manifest:
    """A manifest of what its own records say: those of an older generation, and what was stored after it.

    A record proves its tokens and all before them by its name; whose it is, only a root of the older one can tell.
    """
    entries = dict(base.segments)
    found = {n: one for n in disk.names(os.path.join(root, SEGMENTS)) if (one := _entry(disk, root, n)) is not None}
    segments = {name: segment for name, (_, segment) in found.items()}
    grown = True
    while grown:
        new = {
            name: entry
            for name, (entry, segment) in found.items()
            if name not in entries and _follows(segment, base, entries)
        }
        entries |= new
        grown = bool(new)
    inner = {entry.before for entry in entries.values()}
    ends = {n: Context(n, e.start + e.tokens, time.time()) for n, e in entries.items() if n not in inner}
    files = dict(base.files)
    for folder in {folder for entry in entries.values() for folder in entry.files} - files.keys():
        files[folder] = sum(_bytes_in(one, folder) for one in segments.values())
    contexts = {**ends, **base.contexts}
    return Manifest(base.generation, base.identities, entries, contexts, files)


def _follows(segment: Segment, base: Manifest, entries: dict[str, Entry]) -> bool:
    before = entries.get(segment.before)
    if before is None:
        return segment.before in base.identities and segment.start == 0
    return segment.start == before.start + before.tokens


def _entry(disk: Disk, root: str, name: str) -> tuple[Entry, Segment] | None:
    """What a record says of itself, if it is the one of its name."""
    if not is_plain(disk, root, os.path.join(SEGMENTS, name, "zarr.json")):
        return None
    try:
        data = disk.fetch(os.path.join(root, SEGMENTS, name, "zarr.json"), MOST_BYTES)
        entry, segment = Segment.unlisted(attributes_of(data)["alaya_tiers"], name)
        return replace(entry, digest=hashlib.sha256(data).hexdigest()), segment
    except (OSError, ValueError, KeyError, OverflowError, RecursionError):
        return None


def _bytes_in(segment: Segment, folder: str) -> int:
    return sum(
        int((layer.where == place).sum()) * layer.kv_heads * stride_of(layer)
        for layer in segment.layers.values()
        for place, name in enumerate(layer.files)
        if name == folder
    )
