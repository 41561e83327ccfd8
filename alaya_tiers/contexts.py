"""Contexts that outlive their session: stored, found again by their first tokens, and read where they lie.

A stored context is a chain of segments (see ``alaya_tiers.identity``). Opening one makes its blocks known to the ledger,
their only copy being on ssd: nothing is read until attention asks. Sessions share these blocks and copy the one they go
on in, as forks do. What was opened stays known, so that what is in memory is of use to the next session.
"""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers.blocks import BlockShape, Geometry
from alaya_tiers.cache import Session
from alaya_tiers.commit import Job, encoded
from alaya_tiers.engine import Engine
from alaya_tiers.errors import InputError, IOFailed, StoreCorrupt, StoreMismatch
from alaya_tiers.identity import Identity, Tokens, common, segment_name
from alaya_tiers.layer import Layer, Row
from alaya_tiers.ledger import Ids
from alaya_tiers.manifest import Context, Entry, LayerBlocks, Manifest, Segment

Chunk = Sequence[tuple[Tensor, Tensor]]
"""K [rows, kv_heads, n, k_dim] and V [rows, kv_heads, n, v_dim] of the same n tokens, layer by layer."""

Runs = npt.NDArray[np.int64]
"""The first block id of each run of blocks."""

Held = list[tuple[Runs, int]]
"""The blocks of a segment, layer by layer: its runs, and how many heads each has."""

Where = tuple[int, str, int, Tokens]
"""Row of the session, name of the segment before, first position, token ids: a segment that is not stored yet."""

New = dict[str, Where]

Say = Callable[[int, int], None]
"""Told how much is done, of how much."""


def silent(done: int, all_of_it: int) -> None:
    """Says nothing."""


class Contexts:
    """The contexts of one store, and the sessions on them. Thread-safe; a session belongs to one thread at a time."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._lock = threading.RLock()
        self._records: dict[str, Segment] = {}
        self._held: dict[str, Held] = {}  # of segments whose blocks are in the ledger
        self._numbers: dict[str, int] = {}  # folder of an array -> number of its file in the ssd tier
        self._blocks: dict[str, Runs] = {}  # the same -> first block id of each run in the file, or -1
        engine.accountant.charge("ssd", sum(self.manifest.files.values()))

    @property
    def manifest(self) -> Manifest:
        """What is stored."""
        return self.engine.store.manifest

    # ------------------------------------------------------------------ find
    def match(self, root: str, tokens: Tokens) -> tuple[list[str], int]:
        """The segments that hold most of the first tokens, and how many tokens that are."""
        with self._lock:
            names, at, before = list[str](), 0, root
            children: dict[str, list[str]] = {}
            for name, entry in self.manifest.segments.items():
                children.setdefault(entry.before, []).append(name)
            while at < tokens.size and before in children:
                size = self._whole(root)
                name = segment_name(before, tokens[at : at + size])
                if name in children[before] and at + size <= tokens.size:
                    found, length = name, size
                else:
                    lengths = {name: self._common(name, tokens[at:]) for name in children[before]}
                    found = max(lengths, key=lambda n: lengths[n])
                    length = lengths[found]
                if length:
                    names.append(found)
                    at += length
                if length < size:
                    break
                before = found
            return names, at

    def open(self, rows: Sequence[list[str]], length: int, most_tokens: int | None, device: torch.device) -> Session:
        """A session that holds the first ``length`` tokens of these chains of segments, one chain a row.

        Nothing is read from their blocks. Raises StoreError, ConfigError; nothing was opened then.
        """
        self.engine.check_open()
        session = Session(self.engine, most_tokens)
        if not length:
            return session
        with self._lock:
            for name in dict.fromkeys(name for names in rows for name in names):
                self._hold(name, device)
            for place, number in enumerate(sorted(self._record(rows[0][0]).layers)):
                first = [np.concatenate([self._held[name][place][0] for name in names]) for names in rows]
                session.layers[number] = self._layer(number, first, length)
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
        lengths = {state.length for state in session.layers.values()}
        if lengths != {tokens.shape[1]} or not tokens.size:
            raise InputError(
                f"the session holds {sorted(lengths)} tokens in its layers and {tokens.shape[1]} token ids are known"
            )
        with self._lock:
            for state in session.layers.values():
                if len(state.rows) != tokens.shape[0]:
                    raise InputError(f"{len(state.rows)} sequences, but token ids of {tokens.shape[0]}")
                state.seal()
            root = identity.root(tenant)
            new, ids = dict[str, Where](), list[str]()
            for row, of_row in enumerate(tokens):
                before = root
                for start in range(0, of_row.size, identity.segment_tokens):
                    part = of_row[start : start + identity.segment_tokens]
                    name = segment_name(before, part)
                    if name not in self.manifest.segments:
                        new.setdefault(name, (row, before, start, part))
                    before = name
                ids.append(before)
            if new or any(i not in self.manifest.contexts for i in ids):
                self._commit(session, root, identity, new, ids, say)
        return ids

    def load(
        self, tokens: Tokens, chunks: Iterable[Chunk], identity: Identity, tenant: str = "", say: Say = silent
    ) -> str:
        """Store a context computed elsewhere, chunk by chunk, so that it never has to be in memory; its id.

        tokens: int64 [length]; chunks: of all of them, in order, one row each. What is stored already is not written
        again. say: told how many tokens were taken. Raises InputError, StoreError; nothing was stored then.
        """
        names, known = self.match(identity.root(tenant), tokens)
        session, done = self.open([names], known, None, torch.device("cpu")), 0
        try:
            for chunk in chunks:
                size = _length(chunk)
                skip = min(size, max(0, known - done))
                for layer, (k, v) in enumerate(chunk if skip < size else ()):
                    session.update(layer, k[:, :, skip:], v[:, :, skip:])
                done += size
                say(done, tokens.size)
            if done != tokens.size:
                raise InputError(f"keys and values of {done} tokens for {tokens.size} token ids")
            return self.store(session, tokens[None], identity, tenant)[0]
        finally:
            session.clear()

    def tokens(self, context: str) -> Tokens:
        """All token ids of a context, int64. Raises InputError, StoreCorrupt."""
        with self._lock:
            self._known(context)
            return np.concatenate([self._record(name).tokens for name in self.manifest.chain(context)])

    def read(self, context: str) -> Iterator[tuple[Tokens, Chunk]]:
        """Token ids, keys and values of a context, segment by segment. Raises InputError, StoreError."""
        with self._lock:
            self._known(context)
            names = self.manifest.chain(context)
            session = self.open([names], self.manifest.contexts[context].tokens, None, torch.device("cpu"))
            parts = [self._record(name) for name in names]
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
            old, manifest = self.manifest, self.manifest.without(context)
            self.engine.store.commit(manifest, {}, [], self._run)
            for name in old.segments.keys() - manifest.segments.keys():
                self._records.pop(name, None)
                for first, heads in self._held.pop(name, []):
                    self.engine.release(_ids(first, heads))
            for name in old.files.keys() - manifest.files.keys():
                self._forget(name, old.files[name])
            self.engine.store.collect()

    # ------------------------------------------------------------------ inside: storing
    def _commit(self, session: Session, root: str, identity: Identity, new: New, ids: list[str], say: Say) -> None:
        """Write the segments of ``new`` and the contexts ``ids``; they count when this returns."""
        engine, old = self.engine, self.manifest
        held = {name: self._runs(session, *where) for name, where in new.items()}
        blocks = [_ids(first, heads) for runs in held.values() for first, heads in runs]
        flat = np.unique(np.concatenate(blocks)) if blocks else np.empty(0, np.int64)
        if flat.size:
            engine.write_out(flat, lambda left: say(flat.size - left, flat.size))
        segments = {name: self._segment(session, where, held[name]) for name, where in new.items()}
        numbers, durable = self._publish(session, segments.values(), held.values())
        records, entries = dict[str, bytes](), dict(old.segments)
        for name, segment in segments.items():
            records[name], digest = encoded(segment)
            entries[name] = Entry(segment.before, segment.start, segment.tokens.size, digest, segment.files)
        added = {i: Context(i, entries[i].start + entries[i].tokens, time.time()) for i in ids}
        files = {name: engine.mover.ssd.live_bytes(number) for name, number in numbers.items()}
        manifest = Manifest(
            old.generation + 1,
            {**old.identities, root: identity},
            entries,
            {**added, **old.contexts},
            {**old.files, **files},
        )
        engine.store.commit(manifest, records, durable, partial(self._run, numbers=list(numbers.values())))
        with engine.mover.lock:
            for name, number in numbers.items():
                engine.mover.ssd.keep(number)
                self._numbers[name] = number
            for ids_of in blocks:
                engine.mover.ledger.retain(ids_of)
        self._held |= held
        self._records |= segments
        for name, segment in segments.items():
            for layer, (first, _) in zip(segment.layers.values(), held[name], strict=True):
                self._note(segment, layer, first)

    def _runs(self, session: Session, row: int, before: str, start: int, part: Tokens) -> Held:
        """The blocks of a segment, layer by layer: first id of each run, and how many heads."""
        found = []
        for _, state in sorted(session.layers.items()):
            size = state.shape.tokens
            first = state.rows[row].first[start // size : -(-(start + part.size) // size)]
            found.append((first.copy(), state.shape.geometry.kv_heads))
        return found

    def _segment(self, session: Session, where: Where, held: Held) -> Segment:
        """The record of a segment whose blocks are all written."""
        _, before, start, part = where
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
                    tuple(self._folder(n) for n in numbers.tolist()),
                    inverse.astype(np.int64),
                    mover.ledger.digest[_ids(first, heads).reshape(-1, heads).T],
                )
        return Segment(before, start, part, layers)

    def _publish(
        self, session: Session, segments: Iterable[Segment], held: Iterable[Held]
    ) -> tuple[dict[str, int], list[str]]:
        """Metadata of all files no stored context has yet: their numbers by folder, and all that must be durable."""
        mover, numbers = self.engine.mover, dict[str, int]()
        for segment, runs in zip(segments, held, strict=True):
            for layer, (first, _) in zip(segment.layers.values(), runs, strict=True):
                of_run = mover.ledger.file[first]
                numbers |= {self._folder(n): n for n in of_run.tolist() if not mover.ssd.files[n].kept}
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
        durable = [self.engine.mover.ssd.files[n].path for n in numbers.values()]
        for name in numbers:
            array = os.path.join(self.engine.store.path, name)
            durable += [os.path.join(folder, "zarr.json") for folder in (array, os.path.dirname(array))]
        return numbers, durable + (self.engine.save_groups() if numbers else [])

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

    def _forget(self, folder: str, nbytes: int) -> None:
        """No context has this array any more."""
        engine, number = self.engine, self._numbers.pop(folder, None)
        self._blocks.pop(folder, None)
        if number is None:
            engine.accountant.release("ssd", nbytes)
        else:
            with engine.mover.lock:
                unused = engine.mover.ssd.unkeep(number)
            for path in unused:
                engine.mover.ssd.remove(path)
            if not unused:
                return  # a session still reads it; it goes when that ends
        engine.store.remove(os.path.join(engine.store.path, os.path.dirname(folder)))

    # ------------------------------------------------------------------ inside: opening
    def _hold(self, name: str, device: torch.device) -> None:
        """Make a segment's blocks blocks of the ledger, held until the segment is deleted."""
        if name in self._held:
            return
        segment, engine = self._record(name), self.engine
        for folder in segment.files:
            if not engine.store.is_plain(folder):
                raise StoreCorrupt(errno.ELOOP, "a link leads out of the store and was not followed", folder)
        shapes = {}
        for number, layer in sorted(segment.layers.items()):
            dtype = getattr(torch, layer.dtype, None)
            if not isinstance(dtype, torch.dtype):
                raise StoreCorrupt(errno.EIO, f"there is no dtype {layer.dtype!r}", engine.store.path)
            shapes[number] = engine.fit(number, Geometry(layer.kv_heads, layer.k_dim, layer.v_dim, dtype), device)
            if shapes[number].tokens != layer.block_tokens:
                raise StoreMismatch(
                    errno.EINVAL,
                    f"blocks of layer {number} have {layer.block_tokens} tokens there and {shapes[number].tokens} here",
                    engine.store.path,
                )
        with engine.mover.lock:
            self._held[name] = [
                (self._adopt(segment, number, layer, shapes[number]), layer.kv_heads)
                for number, layer in sorted(segment.layers.items())
            ]

    def _adopt(self, segment: Segment, number: int, layer: LayerBlocks, shape: BlockShape) -> Runs:
        """First ids of the runs of one layer of a segment: of blocks some other segment shares, and new ones."""
        mover = self.engine.mover
        book, ssd, runs = mover.ledger, mover.ssd, np.arange(layer.where.size)
        for folder in layer.files:
            if folder not in self._numbers:
                index = segment.start // self.engine.settings.segment_tokens
                self._numbers[folder] = ssd.adopt(folder, number, index, shape, self.manifest.files[folder])
            self._blocks.setdefault(folder, np.full(ssd.files[self._numbers[folder]].blocks, -1, np.int64))
        files = np.array([self._numbers[folder] for folder in layer.files], np.int32)[layer.where]
        first = np.array([self._blocks[layer.files[w]][r] for w, r in zip(layer.where, runs, strict=True)])
        blocks = self.engine.settings.segment_tokens // shape.tokens
        offsets = (np.arange(layer.kv_heads)[:, None] * blocks + runs) * ssd.files[files[0]].stride
        known = first >= 0
        old = first[known]  # its id may be another block's by now
        same = (book.refs[old] > 0) & (book.file[old] == files[known]) & (book.offset[old] == offsets[0, known])
        known[known] = same
        if known.any():
            book.retain(_ids(first[known], layer.kv_heads))
        if not known.all():
            new = ~known
            starts = segment.start + runs[new] * shape.tokens
            first[new] = book.adopted(number, starts, files[new], offsets[:, new], layer.digests[:, new])
            for file, count in zip(*np.unique(files[new], return_counts=True), strict=True):
                ssd.files[file].live += int(count) * layer.kv_heads
            self._note(segment, layer, first)
        return first

    def _note(self, segment: Segment, layer: LayerBlocks, first: Runs) -> None:
        """Remember which blocks are in which files."""
        for run, (where, block) in enumerate(zip(layer.where.tolist(), first.tolist(), strict=True)):
            folder = layer.files[where]
            if folder not in self._blocks:
                size = self.engine.mover.ssd.files[self._numbers[folder]].blocks
                self._blocks[folder] = np.full(size, -1, np.int64)
            self._blocks[folder][run] = block

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

    # ------------------------------------------------------------------ inside
    def _whole(self, root: str) -> int:
        return self.manifest.identities[root].segment_tokens

    def _record(self, name: str) -> Segment:
        if name not in self._records:
            self._records[name] = self.engine.store.record(name)
        return self._records[name]

    def _common(self, name: str, tokens: Tokens) -> int:
        """How many tokens a segment has in common with these; none if its record cannot be read: verify says why."""
        try:
            return common(self._record(name).tokens, tokens)
        except StoreCorrupt:
            return 0

    def _known(self, context: str) -> Context:
        found = self.manifest.contexts.get(context)
        if found is None:
            raise InputError(f"there is no context {context!r} in this store; contexts() lists them")
        return found

    def _folder(self, number: int) -> str:
        """The folder of the array a file belongs to, inside the store."""
        array = Path(self.engine.mover.ssd.files[number].path).parents[3]
        return array.relative_to(self.engine.store.path).as_posix()


def _ids(first: Runs, heads: int) -> Ids:
    """All blocks of some runs, run by run."""
    return (first[:, None] + np.arange(heads)).ravel()


def _length(chunk: Chunk) -> int:
    """How many tokens a chunk has, in every layer."""
    sizes = {x.shape[2] for pair in chunk for x in pair if x.ndim == 4}
    if len(sizes) != 1 or any(x.ndim != 4 or x.shape[0] != 1 for pair in chunk for x in pair):
        raise InputError("a chunk is, for each layer, keys and values [1, kv_heads, n, dim] of the same n tokens")
    return int(sizes.pop())
