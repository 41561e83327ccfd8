"""Contexts that outlive their session: stored, found again by their first tokens, and read where they lie.

A stored context is a chain of segments (see ``alaya_tiers.identity``). Opening one makes its blocks known to the
ledger, their only copy being on ssd: nothing is read until attention asks. Sessions share these blocks and copy the one
they go on in, as forks do. What was opened stays known, so that what is in memory is of use to the next session.
"""

import contextlib
import errno
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from alaya_tiers.adopted import Adopted, Held, Runs, ids_of
from alaya_tiers.blocks import PAGE, round_up
from alaya_tiers.cache import Session
from alaya_tiers.commit import Job, encoded, load_needs
from alaya_tiers.config import OnCorrupt
from alaya_tiers.damage import shortened
from alaya_tiers.engine import Engine
from alaya_tiers.errors import CorruptWarning, InputError, IOFailed, StoreCorrupt, StoreReadOnly
from alaya_tiers.identity import Identity, Tokens, segment_name
from alaya_tiers.indexed import open_index, promise, save
from alaya_tiers.layer import Layer, Row
from alaya_tiers.manifest import Context, Entry, LayerBlocks, Manifest, Segment
from alaya_tiers.needs import Needs, Samples
from alaya_tiers.prefixes import Prefixes
from alaya_tiers.sampling import count_needs, prime
from alaya_tiers.snapshot import Shelf, Snapshot
from alaya_tiers.store import Store
from alaya_tiers.verify import FATAL, Damage

Chunk = Sequence[tuple[Tensor, Tensor]]
"""K [rows, kv_heads, n, k_dim] and V [rows, kv_heads, n, v_dim] of the same n tokens, layer by layer."""

Say = Callable[[int, int], None]
"""Told how much is done, of how much."""


def silent(done: int, all_of_it: int) -> None:
    """Says nothing."""


class Part(NamedTuple):
    """Tokens of one row of a session that make up a segment. before: the name of the segment before them."""

    name: str
    row: int
    before: str
    start: int
    tokens: Tokens


class Contexts:
    """The contexts of one store, and the sessions on them. Thread-safe; a session belongs to one thread at a time.

    snapshot: what is read, where the engine's own store is a private one for what sessions add; None for the writer,
    who reads and writes the engine's.
    """

    def __init__(self, engine: Engine, snapshot: Snapshot | None = None) -> None:
        self.engine, self.snapshot = engine, snapshot
        self.shelf: Shelf = engine.store if snapshot is None else snapshot
        self._lock = self.lock = threading.RLock()
        self.last_used: dict[str, float] = {}
        """When a session was made on a segment, by the engine's clock."""
        self.make_room: Callable[[str, int, int], None] = lambda root, nbytes, unwritten: None
        """Called before so many bytes are stored under a root, so many of which have no place yet. May raise."""
        engine.shelf = self.shelf
        self._prefixes = Prefixes(engine, self.shelf)
        self._adopted = Adopted(engine, self.shelf)
        self._late = {} if snapshot is not None else engine.store.lent_files
        """Bytes of files that no context has any more and some reader has: removed when it is gone."""
        if snapshot is None:
            engine.accountant.charge("ssd", sum(self.manifest.files.values()) + sum(self._late.values()))

    @property
    def manifest(self) -> Manifest:
        """What is stored."""
        return self.shelf.manifest

    @property
    def store_here(self) -> Store:
        """The store, to be written. Raises StoreReadOnly."""
        if self.snapshot is not None:
            raise StoreReadOnly(
                errno.EROFS,
                "the database was opened with read_only=True; sessions go on, but only the process that opened it for "
                "writing can store, import, index, pin and delete",
                self.shelf.path,
            )
        return self.engine.store

    # ------------------------------------------------------------------ find
    def match(self, root: str, tokens: Tokens) -> tuple[list[str], int]:
        """The segments that hold most of the first tokens, around damage, and how many tokens that are."""
        with self._lock:
            return self._prefixes.match(root, tokens)[:2]

    def find(self, root: str, tokens: Tokens, on_corrupt: OnCorrupt) -> tuple[list[str], int]:
        """The same; damage on the way is dealt with as ``on_corrupt`` says, see Settings. Raises StoreError."""
        while True:
            with self._lock:
                names, length, damaged = self._prefixes.match(root, tokens)
                drop = on_corrupt == "drop" and self.snapshot is None
                if damaged and on_corrupt == "raise":
                    raise self._prefixes.corrupt(damaged[0])
                for name in damaged:
                    _warn(self._prefixes.corrupt(name), length, drop=drop)
                if damaged and drop:
                    self._prefixes.dropped.update(damaged)
                    self._forget(shortened(self.manifest, damaged))
                    continue
            if not self.engine.settings.check_on_open or not self._prefixes.check(names):
                return names, length

    def open(self, rows: Sequence[list[str]], length: int, most_tokens: int | None, device: torch.device) -> Session:
        """A session that holds the first ``length`` tokens of these chains of segments, one chain a row.

        Nothing is read from their blocks. Raises StoreError, ConfigError; nothing was opened then.
        """
        self.engine.check_open()
        session = Session(self.engine, most_tokens)
        if not length:
            return session
        with self._lock:
            wanted = dict.fromkeys(name for names in rows for name in names)
            held = {name: self._hold(name, device) for name in wanted}
            self.last_used |= dict.fromkeys(wanted, self.engine.clock.monotonic())
            for place, number in enumerate(sorted(self._prefixes.record(rows[0][0]).layers)):
                first = [np.concatenate([held[name][place][0] for name in names]) for names in rows]
                session.layers[number] = self._layer(number, first, length)
            needs = self._needs(rows[0])
        if needs is not None and self.engine.sparse is not None:
            prime(session, needs, -math.log(self.engine.settings.alpha))
        return session

    # ------------------------------------------------------------------ store
    def store(
        self, session: Session, tokens: Tokens, identity: Identity, tenant: str = "", say: Say = silent
    ) -> list[str]:
        """Make all tokens of a session durable; the id of each row's context. tokens: int64 [rows, length].

        The session may go on afterwards. say: told how many blocks are written. Raises InputError, StoreError; nothing
        was stored then, and what was is unharmed.
        """
        self.engine.check_open()
        self.store_here  # noqa: B018 - raises
        lengths = {state.length for state in session.layers.values()}
        if lengths != {tokens.shape[1]} or not tokens.size:
            raise InputError(
                f"the session holds {sorted(lengths)} tokens in its layers and {tokens.shape[1]} token ids are known"
            )
        for state in session.layers.values():
            if len(state.rows) != tokens.shape[0]:
                raise InputError(f"{len(state.rows)} sequences, but token ids of {tokens.shape[0]}")
            state.seal()
        root = identity.root(tenant)
        chains = [_parts(row, root, of_row, identity.segment_tokens) for row, of_row in enumerate(tokens)]
        parts = {part.name: part for chain in reversed(chains) for part in chain}
        ids = [chain[-1].name for chain in chains]
        self._room(session, root, self._missing(parts))
        self._write_out(session, self._missing(parts), say)  # what takes time, before others have to wait for us
        with self._lock:
            new = self._missing(parts)
            self._check_whole(session, new)
            needed = [i for i in ids if session.needs is not None and self._needs([i]) is None]
            if new or needed or any(i not in self.manifest.contexts for i in ids):
                self._write_out(session, new, silent)
                self._commit(session, root, identity, new, self._again(parts), parts, ids, needed)
        if self.engine.sparse is not None:
            self._index(session, list(parts.values()))
        return ids

    def load(
        self,
        tokens: Tokens,
        chunks: Iterable[Chunk],
        identity: Identity,
        tenant: str = "",
        say: Say = silent,
        keep_every: int = 0,
        samples: Samples | None = None,
    ) -> str:
        """Store a context computed elsewhere, chunk by chunk, so that it never has to be in memory; its id.

        tokens: int64 [length]; chunks: of all of them, in order, one row each. What is stored already is not written
        again. say: told how many tokens were taken. keep_every, samples: see ``DB.import_context``. Raises InputError,
        StoreError; nothing was stored then but what ``keep_every`` says.
        """
        self.store_here  # noqa: B018 - raises
        every, kept = -(-keep_every // identity.segment_tokens) * identity.segment_tokens, set[str]()
        names, known = self.match(identity.root(tenant), tokens)
        session, done = self.open([names], known, None, torch.device("cpu")), 0
        try:
            for chunk in _cut(chunks, every) if every else chunks:
                size = _length(chunk)
                skip = min(size, max(0, known - done))
                if not done:
                    nbytes = _stored_bytes(chunk, tokens.size - known, self.engine.settings.block_tokens)
                    self.make_room(identity.root(tenant), nbytes, nbytes)
                for layer, (k, v) in enumerate(chunk if skip < size else ()):
                    session.update(layer, k[:, :, skip:], v[:, :, skip:])
                done += size
                if every and known < done < tokens.size and not done % every:
                    before = self.manifest.contexts.keys()
                    kept |= {*self.store(session, tokens[None, :done], identity, tenant)} - before
                say(done, tokens.size)
            if done != tokens.size:
                raise InputError(f"keys and values of {done} tokens for {tokens.size} token ids")
            if samples is not None:
                session.needs = count_needs(session, samples)
            name = self.store(session, tokens[None], identity, tenant)[0]
        finally:
            session.clear()
        with self.lock:
            if there := kept & self.manifest.contexts.keys():
                self._forget(self.manifest.without(*there))
        return name

    def index(self, context: str, say: Say = silent) -> None:
        """Make the index of a stored context and keep it, as far as there is none. Raises InputError, StoreError.

        say: told how many runs of blocks are done. It may be interrupted; what it did so far is lost then.
        """
        self.store_here  # noqa: B018 - raises
        with self._lock:
            self._known(context)
            names = self.manifest.chain(context)
            session = self.open([names], self.manifest.contexts[context].tokens, None, torch.device("cpu"))
            records = [(name, self._prefixes.record(name)) for name in names]
        try:
            self._index(session, [Part(n, 0, one.before, one.start, one.tokens) for n, one in records], say)
        finally:
            session.clear()

    def tokens(self, context: str) -> Tokens:
        """All token ids of a context, int64. Raises InputError, StoreCorrupt."""
        with self._lock:
            self._known(context)
            return np.concatenate([self._prefixes.record(name).tokens for name in self.manifest.chain(context)])

    def read(self, context: str) -> Iterator[tuple[Tokens, Chunk]]:
        """Token ids, keys and values of a context, segment by segment. Raises InputError, StoreError."""
        with self._lock:
            self._known(context)
            names = self.manifest.chain(context)
            session = self.open([names], self.manifest.contexts[context].tokens, None, torch.device("cpu"))
            parts = [self._prefixes.record(name) for name in names]
        try:
            for part in parts:
                end = part.start + part.tokens.size
                yield part.tokens, [session.read(n, part.start, end) for n in sorted(session.layers)]
        finally:
            session.clear()

    def delete(self, context: str) -> None:
        """Forget a context and what only it needed; sessions on it may go on. Raises InputError, StoreError."""
        self.engine.check_open()
        with self._lock:
            self._known(context)
            self._forget(self.manifest.without(context))

    def collect(self) -> int:
        """Remove what no context and no reader needs any more; how many bytes still wait for readers."""
        self.engine.check_open()
        with self._lock:
            self.store_here  # noqa: B018 - raises
            self._collect()
            return sum(self._late.values())

    def refresh(self) -> bool:
        """For a reader: move to the newest generation; whether there was one. Sessions keep what they have."""
        self.engine.check_open()
        if self.snapshot is None:
            return False
        with self._lock:
            old = self.manifest
            moved = self.snapshot.refresh()
            if moved:
                self._release(old, self.manifest)
                self._prefixes.reopened()
                for name in old.files.keys() - self.manifest.files.keys():
                    self._adopted.forget(name, old.files[name])
            self.snapshot.let_go(
                lambda m: not any(self._adopted.reads(f) for f in m.files.keys() - self.manifest.files.keys())
            )
            return moved

    def close(self) -> None:
        """Let go of what is read. The engine is closed already."""
        if self.snapshot is not None:
            self.snapshot.close()

    def verify(self, say: Say = silent) -> list[Damage]:
        """Read everything that is stored; what is damaged. say: told how many segments are done, of how many."""
        self.engine.check_open()
        with self._lock:
            found = list(self.shelf.verify(say))
            for one in found:
                if one.kind in FATAL and one.segment is not None:
                    self._prefixes.note(one.segment, one.path, one.run)
            return found

    # ------------------------------------------------------------------ inside: storing
    def _missing(self, parts: dict[str, Part]) -> list[Part]:
        """Those that are not stored, or not whole."""
        again, known = self._again(parts), self.manifest.segments
        whole = {n for n, part in parts.items() if n in known and self._prefixes.usable(n) == part.tokens.size}
        return [part for name, part in parts.items() if name not in whole and name not in again]

    def _again(self, parts: dict[str, Part]) -> dict[str, Entry]:
        """Those that were deleted and that a reader has still: they only have to count again."""
        lent = {} if self.snapshot is not None else {name: self.store_here.lent_entry(name) for name in parts}
        gone = self.manifest.segments.keys() | self._prefixes.dropped
        return {n: entry for n, entry in lent.items() if entry is not None and n not in gone}

    def _check_whole(self, session: Session, parts: list[Part]) -> None:
        """Raises StoreCorrupt where a session reads blocks that are known to be damaged: it cannot mend them."""
        ssd, book = self.engine.mover.ssd, self.engine.mover.ledger
        for part in parts:
            for first, _ in _held(session, part) if part.name in self.manifest.segments else ():
                for run, file in enumerate(book.file[first].tolist()):
                    if file >= 0 and self._prefixes.is_damaged(ssd.files[file].path, run):
                        raise self._prefixes.corrupt(part.name)

    def _room(self, session: Session, root: str, parts: list[Part]) -> None:
        """See that these have room on disk."""
        blocks = [ids_of(first, heads) for part in parts for first, heads in _held(session, part)]
        if blocks:
            mover, flat = self.engine.mover, np.unique(np.concatenate(blocks))
            with mover.lock:
                there, slot = mover.ledger.file[flat] >= 0, mover.host.slot_bytes
            self.make_room(root, flat.size * slot, int(np.count_nonzero(~there)) * slot)

    def in_use(self, names: Iterable[str]) -> bool:
        """Whether a session has blocks of one of these segments."""
        with self._lock:
            return any(self._adopted.in_use(name) for name in names)

    def forget(self, manifest: Manifest) -> None:
        """Make a manifest that has less the one that counts. The caller holds the lock. Raises StoreError."""
        self.engine.check_open()
        self._forget(manifest)

    def _write_out(self, session: Session, parts: list[Part], say: Say) -> None:
        blocks = [ids_of(first, heads) for part in parts for first, heads in _held(session, part)]
        if blocks:
            flat = np.unique(np.concatenate(blocks))
            self.engine.write_out(flat, lambda left: say(flat.size - left, flat.size))

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
        engine, old, store = self.engine, self.manifest, self.store_here
        held = {part.name: _held(session, part) for part in new}
        segments = {part.name: self._segment(session, part, held[part.name]) for part in new}
        numbers, saved = self._publish(segments.values(), held.values())
        records, entries = dict[str, bytes](), {**old.segments, **again}
        for name, segment in segments.items():
            records[name], digest = encoded(segment)
            entries[name] = Entry(segment.before, segment.start, segment.tokens.size, digest, segment.files)
        arranged = {**segments, **again}
        after = self._prefixes.arranged({n: parts[n].tokens for n in arranged}, {n: entries[n] for n in arranged})
        used = {folder for entry in entries.values() for folder in entry.files}
        added = {i: Context(i, entries[i].start + entries[i].tokens, time.time()) for i in ids} | dict(old.contexts)
        needs = dict[str, bytes]()
        if session.needs is not None:
            data, digest = session.needs.encoded()
            needs = dict.fromkeys(needed, data)
            added |= {i: replace(added[i], needs=digest) for i in needed}
        files = {name: engine.mover.ssd.live_bytes(number) for name, number in numbers.items()}
        files |= {
            name: store.lent_files[name] for entry in again.values() for name in entry.files if name in self._late
        }
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
        self._late = {name: nbytes for name, nbytes in self._late.items() if name not in manifest.files}
        self._prefixes.stored(segments, after)
        for name, segment in segments.items():
            self._adopted.keep(name, segment, held[name], numbers)
        if mended := old.files.keys() - manifest.files.keys():
            self._late |= {name: old.files[name] for name in mended}
            self._collect()

    def _forget(self, manifest: Manifest) -> None:
        """Commit a manifest that has less, and let go of what it does not need any more. Raises StoreError."""
        old = self.manifest
        self.store_here.commit(manifest, {}, [], [], self._run)
        self._release(old, manifest)
        self._late |= {name: old.files[name] for name in old.files.keys() - manifest.files.keys()}
        self._collect()

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
                    tuple(self._adopted.folder(n) for n in numbers.tolist()),
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
                numbers |= {self._adopted.folder(n): n for n in of_run.tolist() if not mover.ssd.files[n].kept}
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

    def _release(self, old: Manifest, new: Manifest) -> None:
        """Let go of segments that are not stored any more, or elsewhere."""
        for name, entry in old.segments.items():
            if new.segments.get(name) != entry:
                self._prefixes.forget(name, entry.before)
                self._adopted.release(name)

    def _collect(self) -> None:
        """Remove what neither the manifest nor a reader names."""
        store = self.engine.store
        store.collect()
        used = {os.path.dirname(name) for name in {*self.manifest.files, *store.lent_files}}
        for name in self._late.keys() - store.lent_files.keys():
            if self._adopted.forget(name, self._late.pop(name)):  # else it goes when the session that reads it ends
                parent = os.path.dirname(name)
                store.remove(os.path.join(store.path, name if parent in used else parent))

    def _index(self, session: Session, parts: Sequence[Part], say: Say = silent) -> None:
        """Keep the index of segments beside them, where it is not there yet; a failure loses nothing."""
        store, partitions, bits = self.shelf, self.engine.partitions, self.engine.settings.index_bits
        session.build_index(say)
        for part in parts:
            held = dict(zip(sorted(session.layers), _held(session, part), strict=True))
            blocks, heads = {n: first for n, (first, _) in held.items()}, {n: count for n, (_, count) in held.items()}
            entry = self.manifest.segments.get(part.name)
            path = store.index_path(part.name)
            if entry is None or partitions is None or open_index(store.disk, path, entry.digest, bits) is not None:
                continue
            save(store.disk, path, entry.digest, blocks, heads, partitions)

    # ------------------------------------------------------------------ inside: opening
    def _hold(self, name: str, device: torch.device) -> Held:
        """A segment's blocks, in the ledger, and what is known of their index."""
        segment, known = self._prefixes.record(name), self._adopted.holds(name)
        try:
            held = self._adopted.hold(name, segment, device)
        except StoreCorrupt as error:
            self._prefixes.lost(name, error)
            raise self._prefixes.corrupt(name) from error
        store, partitions = self.shelf, self.engine.partitions
        if partitions is not None and not known:
            digest = self.manifest.segments[name].digest
            index = open_index(store.disk, store.index_path(name), digest, self.engine.settings.index_bits)
            if index is not None:
                numbers = sorted(segment.layers)
                blocks = {n: first for n, (first, _) in zip(numbers, held, strict=True)}
                promise(index, blocks, {n: heads for n, (_, heads) in zip(numbers, held, strict=True)}, partitions)
        return held

    def _layer(self, number: int, first: list[Runs], length: int) -> Layer:
        """A layer of rows that hold these blocks."""
        made = Layer(self.engine, number, self.engine.mover.shapes[number], 0)
        made.length = length
        for of_row in first:
            needed = of_row[: -(-length // made.shape.tokens)]
            with self.engine.mover.lock:
                self.engine.mover.ledger.retain(made.ids(needed).ravel())
            made.rows.append(Row(self.engine.new_stream(), needed))
        return made

    def _needs(self, names: Sequence[str]) -> Needs | None:
        """What the heads of the longest context among these need, if that was stored."""
        store, contexts = self.shelf, self.manifest.contexts
        known = (n for n in reversed(names) if n in contexts and contexts[n].needs)
        with contextlib.suppress(OSError, ValueError):  # nothing but plans depends on it
            return next((load_needs(store.disk, store.path, contexts[n]) for n in known), None)
        return None

    def _known(self, context: str) -> Context:
        found = self.manifest.contexts.get(context)
        if found is None:
            raise InputError(f"there is no context {context!r} in this store; contexts() lists them")
        return found


def _parts(row: int, root: str, tokens: Tokens, segment_tokens: int) -> list[Part]:
    """All tokens of a row, cut into segments."""
    found, before = list[Part](), root
    for start in range(0, tokens.size, segment_tokens):
        some = tokens[start : start + segment_tokens]
        found.append(Part(segment_name(before, some), row, before, start, some))
        before = found[-1].name
    return found


def _held(session: Session, part: Part) -> Held:
    """The blocks of a segment, layer by layer."""
    found = []
    for _, state in sorted(session.layers.items()):
        size, end = state.shape.tokens, part.start + part.tokens.size
        first = state.rows[part.row].first[part.start // size : -(-end // size)]
        found.append((first.copy(), state.shape.geometry.kv_heads))
    return found


def _warn(error: StoreCorrupt, length: int, *, drop: bool) -> None:
    then = f"the first {length} tokens are reused; storing the session mends the rest"
    if drop:
        then = f"contexts that need it end before it from now on: {', '.join(c[:12] for c in error.contexts)}"
    warnings.warn(f"{error}: {then}", CorruptWarning, stacklevel=6)


def _cut(chunks: Iterable[Chunk], every: int) -> Iterator[Chunk]:
    """The same tokens in chunks none of which goes across a multiple of ``every``."""
    done = 0
    for chunk in chunks:
        size, at = _length(chunk), 0
        while at < size:
            end = min(size, at + every - done % every)
            yield [(k[:, :, at:end], v[:, :, at:end]) for k, v in chunk]
            done, at = done + end - at, end


def _stored_bytes(chunk: Chunk, tokens: int, block_tokens: int) -> int:
    """What so many tokens like these take on disk."""
    rows = [(k.shape[1], (k.shape[3] + v.shape[3]) * k.element_size()) for k, v in chunk]
    return sum(heads * -(-tokens // block_tokens) * round_up(block_tokens * row, PAGE) for heads, row in rows)


def _length(chunk: Chunk) -> int:
    """How many tokens a chunk has, in every layer."""
    sizes = {x.shape[2] for pair in chunk for x in pair if x.ndim == 4}
    if len(sizes) != 1 or any(x.ndim != 4 or x.shape[0] != 1 for pair in chunk for x in pair):
        raise InputError("a chunk is, for each layer, keys and values [1, kv_heads, n, dim] of the same n tokens")
    return int(sizes.pop())
