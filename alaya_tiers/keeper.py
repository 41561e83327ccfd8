"""What is stored, added to and taken from, by the one process that writes."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from alaya_tiers.adopted import Adopted, Held, ids_of
from alaya_tiers.cache import Session
from alaya_tiers.commit import Job, encoded
from alaya_tiers.engine import Engine
from alaya_tiers.errors import IOFailed
from alaya_tiers.identity import Identity, Tokens
from alaya_tiers.indexed import open_index, save
from alaya_tiers.ledger import Ids
from alaya_tiers.manifest import Context, Entry, LayerBlocks, Manifest, Segment
from alaya_tiers.parts import Part, Say, held_by, parts_of, silent
from alaya_tiers.prefixes import Prefixes
from alaya_tiers.snapshot import Shelf


class Keeper:
    """Stores sessions and forgets contexts. lock: held by whoever changes what is stored."""

    def __init__(
        self, engine: Engine, shelf: Shelf, prefixes: Prefixes, adopted: Adopted, lock: "threading.RLock"
    ) -> None:
        self.engine, self.shelf, self.prefixes, self.adopted, self.lock = engine, shelf, prefixes, adopted, lock
        self.make_room: Callable[[str, int, int], None] = lambda root, nbytes, unwritten: None
        """Called before so many bytes are stored under a root, so many of which have no place yet. May raise."""
        self.late = engine.store.lent_files if shelf.writable else {}
        """Bytes of files that no context has any more and some reader has: removed when it is gone."""
        if shelf.writable:
            engine.accountant.charge("ssd", sum(self.manifest.files.values()) + sum(self.late.values()))

    @property
    def manifest(self) -> Manifest:
        """What is stored."""
        return self.shelf.manifest

    def store(self, session: Session, tokens: Tokens, root: str, identity: Identity, say: Say) -> list[str]:
        """Make all tokens of a sealed session durable; the id of each row's context. See ``Contexts.store``."""
        chains = [parts_of(row, root, of_row, identity.segment_tokens) for row, of_row in enumerate(tokens)]
        parts = {part.name: part for chain in reversed(chains) for part in chain}
        ids = [chain[-1].name for chain in chains]
        self._room(session, root, self._missing(parts))
        self._write_out(session, self._missing(parts), say)  # what takes time, before others have to wait for us
        with self.lock:
            new = self._missing(parts)
            self._check_whole(session, new)
            needed = [i for i in ids if session.needs is not None and self.prefixes.needs([i]) is None]
            if new or needed or any(i not in self.manifest.contexts for i in ids):
                self._write_out(session, new, silent)
                self._commit(session, root, identity, new, self._again(parts), parts, ids, needed)
        if self.engine.sparse is not None:
            self.index(session, list(parts.values()))
        return ids

    def forget(self, manifest: Manifest) -> None:
        """Commit a manifest that has less, and let go of what it does not need any more. Raises StoreError."""
        old = self.manifest
        self.engine.store.commit(manifest, {}, [], [], self._run)
        self.release(old, manifest)
        self.late |= {name: old.files[name] for name in old.files.keys() - manifest.files.keys()}
        self.collect()

    def release(self, old: Manifest, new: Manifest) -> None:
        """Let go of segments that are not stored any more, or elsewhere."""
        for name, entry in old.segments.items():
            if new.segments.get(name) != entry:
                self.prefixes.forget(name, entry.before)
                self.adopted.release(name)

    def collect(self) -> None:
        """Remove what neither the manifest nor a reader names."""
        store = self.engine.store
        store.collect()
        used = {os.path.dirname(name) for name in {*self.manifest.files, *store.lent_files}}
        for name in self.late.keys() - store.lent_files.keys():
            if self.adopted.forget(name, self.late.pop(name)):  # else it goes when the session that reads it ends
                parent = os.path.dirname(name)
                store.remove(os.path.join(store.path, name if parent in used else parent))

    def index(self, session: Session, parts: Sequence[Part], say: Say = silent) -> None:
        """Keep the index of segments beside them, where it is not there yet; a failure loses nothing.

        Each is kept as soon as it is made: what is stopped, at any point, goes on with the first that is not there.
        """
        by_end = dict[int, list[Part]]()
        for part in sorted(parts, key=lambda part: part.start):
            by_end.setdefault(part.start + part.tokens.size, []).append(part)
        ends = sorted(by_end)

        def keep(number: int) -> None:
            for part in by_end[ends[number]] if number < len(ends) else ():
                self._keep(session, part)

        session.build_index(say, ends=ends, made=keep)

    # ------------------------------------------------------------------ inside
    def _keep(self, session: Session, part: Part) -> None:
        """Keep the index of one segment, if it is stored and has none of these settings."""
        store, partitions, bits = self.shelf, self.engine.partitions, self.engine.settings.index_bits
        entry, path = self.manifest.segments.get(part.name), store.index_path(part.name)
        if entry is None or partitions is None or open_index(store.disk, path, entry.digest, bits) is not None:
            return
        held = dict(zip(sorted(session.layers), held_by(session, part), strict=True))
        blocks, heads = {n: first for n, (first, _) in held.items()}, {n: count for n, (_, count) in held.items()}
        save(store.disk, path, entry.digest, blocks, heads, partitions)

    def _missing(self, parts: dict[str, Part]) -> list[Part]:
        """Those that are not stored, or not whole."""
        again, known = self._again(parts), self.manifest.segments
        whole = {n for n, part in parts.items() if n in known and self.prefixes.usable(n) == part.tokens.size}
        return [part for name, part in parts.items() if name not in whole and name not in again]

    def _again(self, parts: dict[str, Part]) -> dict[str, Entry]:
        """Those that were deleted and that a reader has still: they only have to count again."""
        lent = {} if not self.shelf.writable else {name: self.engine.store.lent_entry(name) for name in parts}
        gone = self.manifest.segments.keys() | self.prefixes.dropped
        return {n: entry for n, entry in lent.items() if entry is not None and n not in gone}

    def _check_whole(self, session: Session, parts: list[Part]) -> None:
        """Raises StoreCorrupt where a session reads blocks that are known to be damaged: it cannot mend them."""
        ssd, book = self.engine.mover.ssd, self.engine.mover.ledger
        for part in parts:
            for first, _ in held_by(session, part) if part.name in self.manifest.segments else ():
                for run, file in enumerate(book.file[first].tolist()):
                    if file >= 0 and self.prefixes.is_damaged(ssd.files[file].path, run):
                        raise self.prefixes.corrupt(part.name)

    def _room(self, session: Session, root: str, parts: list[Part]) -> None:
        """See that these have room on disk."""
        mover, blocks = self.engine.mover, _blocks(session, parts)
        with mover.lock:
            there, slot = mover.ledger.file[blocks] >= 0, mover.host.slot_bytes
        self.make_room(root, blocks.size * slot, int(np.count_nonzero(~there)) * slot)

    def _write_out(self, session: Session, parts: list[Part], say: Say) -> None:
        if (blocks := _blocks(session, parts)).size:
            self.engine.write_out(blocks, lambda left: say(blocks.size - left, blocks.size))

    def _commit(
        self,
        session: Session,
        root: str,
        identity: Identity,
        new: list[Part],
        again: dict[str, Entry],
        parts: dict[str, Part],
        ids: list[str],
        needed: list[str],
    ) -> None:
        """Store segments whose blocks are on disk, and the contexts ``ids``; they count when this returns.

        new: parts that are stored now; again: what counts again, of ``parts``. needed: of the contexts, whose needs are
        stored too.
        """
        engine, old, store = self.engine, self.manifest, self.engine.store
        held = {part.name: held_by(session, part) for part in new}
        segments = {part.name: self._segment(session, part, held[part.name]) for part in new}
        numbers, saved = self._publish(segments.values(), held.values())
        records, entries = dict[str, bytes](), {**old.segments, **again}
        for name, segment in segments.items():
            records[name], digest = encoded(segment)
            entries[name] = Entry(segment.before, segment.start, segment.tokens.size, digest, segment.files)
        arranged = {**segments, **again}
        after = self.prefixes.arranged({n: parts[n].tokens for n in arranged}, {n: entries[n] for n in arranged})
        used = {folder for entry in entries.values() for folder in entry.files}
        added = {i: Context(i, entries[i].start + entries[i].tokens, time.time()) for i in ids} | dict(old.contexts)
        needs = dict[str, bytes]()
        if session.needs is not None:
            data, digest = session.needs.encoded()
            needs = dict.fromkeys(needed, data)
            added |= {i: replace(added[i], needs=digest) for i in needed}
        files = {name: engine.mover.ssd.live_bytes(number) for name, number in numbers.items()}
        files |= {name: store.lent_files[name] for entry in again.values() for name in entry.files if name in self.late}
        manifest = Manifest(
            old.generation + 1,
            {**old.identities, root: identity},
            {name: entries[name] for siblings in after.values() for name in siblings},
            added,
            {**{n: b for n, b in old.files.items() if n in used}, **files},
            ordered=True,
        )
        shards = [engine.mover.ssd.files[number].path for number in numbers.values()]
        with engine.mover.lock:
            for number in numbers.values():
                engine.mover.ssd.keep(number)
        try:
            run = partial(self._run, numbers=list(numbers.values()))
            store.commit(manifest, records, shards, saved, run, needs)
        except BaseException:
            if not store.torn:  # else the next opening may find that the commit succeeded, and need them
                with engine.mover.lock:
                    for number in numbers.values():
                        engine.mover.garbage += engine.mover.ssd.unkeep(number)
            raise
        self.late = {name: nbytes for name, nbytes in self.late.items() if name not in manifest.files}
        self.prefixes.stored(segments, after)
        for name, segment in segments.items():
            self.adopted.keep(name, segment, held[name], numbers)
        if mended := old.files.keys() - manifest.files.keys():
            self.late |= {name: old.files[name] for name in mended}
            self.collect()

    def _segment(self, session: Session, part: Part, held: Held) -> Segment:
        """The record of a segment whose blocks are all written."""
        mover, layers = self.engine.mover, dict[int, LayerBlocks]()
        with mover.lock:
            for (number, state), (first, heads) in zip(sorted(session.layers.items()), held, strict=True):
                numbers, inverse = np.unique(mover.ledger.file[first], return_inverse=True)
                g = state.shape.geometry
                layers[number] = LayerBlocks(
                    heads,
                    g.k_dim,
                    g.v_dim,
                    str(g.dtype).removeprefix("torch."),
                    state.shape.tokens,
                    tuple(self.adopted.folder(n) for n in numbers.tolist()),
                    inverse.astype(np.int64),
                    mover.ledger.digest[ids_of(first, heads).reshape(-1, heads).T],
                )
        return Segment(part.before, part.start, part.tokens, layers)

    def _publish(self, segments: Iterable[Segment], held: Iterable[Held]) -> tuple[dict[str, int], list[str]]:
        """Metadata of all files no stored context has yet: their numbers by folder, and the metadata's files."""
        mover, numbers = self.engine.mover, dict[str, int]()
        for segment, runs in zip(segments, held, strict=True):
            for layer, (first, _) in zip(segment.layers.values(), runs, strict=True):
                of_run = mover.ledger.file[first]
                numbers |= {self.adopted.folder(n): n for n in of_run.tolist() if not mover.ssd.files[n].kept}
                tail = mover.ssd.files[of_run[-1]]
                if not tail.kept and (unfilled := -segment.tokens.size % layer.block_tokens):
                    tail.unfilled, tail.published = unfilled, False
        for number in numbers.values():
            if mover.ssd.files[number].doubtful:
                raise IOFailed(
                    errno.EIO,
                    "an earlier attempt to make this file durable failed, and what the disk holds of it is not known; "
                    "process this context again",
                    mover.ssd.files[number].path,
                )
        self.engine.publish(list(numbers.values()))
        arrays = [os.path.join(self.shelf.path, name, "zarr.json") for name in numbers]
        return numbers, arrays + self.engine.save_groups()

    def _run(self, jobs: list[Job], numbers: Sequence[int] = ()) -> None:
        """Run jobs that make things durable, of files ``numbers`` among others."""
        try:
            if self.engine.started:
                self.engine.run_all(jobs)
            else:
                for job in jobs:
                    job()
        except BaseException:
            for number in numbers:
                self.engine.mover.ssd.files[number].doubtful = True
            raise


def _blocks(session: Session, parts: list[Part]) -> Ids:
    """All blocks of some parts of a session, each once."""
    of_all = [ids_of(first, heads) for part in parts for first, heads in held_by(session, part)]
    return np.unique(np.concatenate([np.empty(0, np.int64), *of_all]))
