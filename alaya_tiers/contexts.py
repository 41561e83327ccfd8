"""Contexts that outlive their session: stored, found again by their first tokens, and read where they lie.

A stored context is a chain of segments (see ``alaya_tiers.identity``). Opening one makes its blocks known to the
ledger, their only copy being on ssd: nothing is read until attention asks. Sessions share these blocks and copy the one
they go on in, as forks do. What was opened stays known, so that what is in memory is of use to the next session.
"""

import errno
import math
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from alaya_tiers.adopted import Adopted, Held, Runs
from alaya_tiers.cache import Session
from alaya_tiers.config import OnCorrupt
from alaya_tiers.damage import shortened
from alaya_tiers.engine import Engine
from alaya_tiers.errors import CorruptWarning, InputError, StoreCorrupt, StoreReadOnly
from alaya_tiers.identity import Identity, Tokens
from alaya_tiers.indexed import IndexFile, open_index, promise
from alaya_tiers.keeper import Keeper
from alaya_tiers.layer import Layer, Row
from alaya_tiers.ledger import Ids
from alaya_tiers.manifest import Context, Manifest
from alaya_tiers.needs import Samples
from alaya_tiers.parts import Chunk, Part, Say, cut, length_of, silent, stored_bytes
from alaya_tiers.prefixes import Prefixes
from alaya_tiers.sampling import count_needs, prime
from alaya_tiers.snapshot import Shelf, Snapshot
from alaya_tiers.verify import FATAL, Damage


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
        engine.shelf = self.shelf
        self._prefixes = Prefixes(engine, self.shelf)
        self._adopted = Adopted(engine, self.shelf)
        self.keeper = Keeper(engine, self.shelf, self._prefixes, self._adopted, self.lock)

    @property
    def manifest(self) -> Manifest:
        """What is stored."""
        return self.shelf.manifest

    def writing(self) -> Keeper:
        """Who stores. Raises StoreReadOnly."""
        if self.snapshot is not None:
            raise StoreReadOnly(
                errno.EROFS,
                "the database was opened with read_only=True; sessions go on, but only the process that opened it for "
                "writing can store, import, index, pin and delete",
                self.shelf.path,
            )
        return self.keeper

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
                    self.keeper.forget(shortened(self.manifest, damaged))
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
            indexes = self._indexes([name for name in wanted if not self._adopted.holds(name)])
            try:
                held = {name: self._hold(name, device, indexes) for name in wanted}
            finally:
                if self.engine.partitions is not None:
                    self.engine.partitions.announce(())
            self.last_used |= dict.fromkeys(wanted, self.engine.clock.monotonic())
            for place, number in enumerate(sorted(self._prefixes.record(rows[0][0]).layers)):
                first = [np.concatenate([held[name][place][0] for name in names]) for names in rows]
                session.layers[number] = self._layer(number, first, length)
            needs = self._prefixes.needs(rows[0])
        self._expect_windows(session, length)
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
        keeper = self.writing()
        lengths = {state.length for state in session.layers.values()}
        if lengths != {tokens.shape[1]} or not tokens.size:
            raise InputError(
                f"the session holds {sorted(lengths)} tokens in its layers and {tokens.shape[1]} token ids are known"
            )
        for state in session.layers.values():
            if len(state.rows) != tokens.shape[0]:
                raise InputError(f"{len(state.rows)} sequences, but token ids of {tokens.shape[0]}")
            state.seal()
        return keeper.store(session, tokens, identity.root(tenant), identity, say)

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
        keeper = self.writing()
        every, kept = -(-keep_every // identity.segment_tokens) * identity.segment_tokens, set[str]()
        names, known = self.match(identity.root(tenant), tokens)
        session, done = self.open([names], known, None, torch.device("cpu")), 0
        try:
            for chunk in cut(chunks, every) if every else chunks:
                size = length_of(chunk)
                skip = min(size, max(0, known - done))
                if not done:
                    nbytes = stored_bytes(chunk, tokens.size - known, self.engine.settings.block_tokens)
                    keeper.make_room(identity.root(tenant), nbytes, nbytes)
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
                keeper.forget(self.manifest.without(*there))
        return name

    def index(self, context: str, say: Say = silent) -> None:
        """Make the index of a stored context and keep it, as far as there is none. Raises InputError, StoreError.

        say: told how many runs of blocks are done. It may be interrupted or killed: whole segments are kept.
        """
        keeper = self.writing()
        with self._lock:
            self._known(context)
            names = self.manifest.chain(context)
            session = self.open([names], self.manifest.contexts[context].tokens, None, torch.device("cpu"))
            records = [(name, self._prefixes.record(name)) for name in names]
        try:
            keeper.index(session, [Part(n, 0, one.before, one.start, one.tokens) for n, one in records], say)
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
            self.writing().forget(self.manifest.without(context))

    def collect(self) -> int:
        """Remove what no context and no reader needs any more; how many bytes still wait for readers."""
        self.engine.check_open()
        with self._lock:
            self.writing().collect()
            return sum(self.keeper.late.values())

    def refresh(self) -> bool:
        """For a reader: move to the newest generation; whether there was one. Sessions keep what they have."""
        self.engine.check_open()
        if self.snapshot is None:
            return False
        with self._lock:
            old = self.manifest
            moved = self.snapshot.refresh()
            if moved:
                self.keeper.release(old, self.manifest)
                self._prefixes.reopened()
                for name in old.files.keys() - self.manifest.files.keys():
                    self._adopted.forget(name, old.files[name])
            self.snapshot.let_go(
                lambda m: not any(self._adopted.reads(f) for f in m.files.keys() - self.manifest.files.keys())
            )
            return moved

    def in_use(self, names: Iterable[str]) -> bool:
        """Whether a session has blocks of one of these segments."""
        with self._lock:
            return any(self._adopted.in_use(name) for name in names)

    def forget(self, manifest: Manifest) -> None:
        """Make a manifest that has less the one that counts. The caller holds the lock. Raises StoreError."""
        self.engine.check_open()
        self.writing().forget(manifest)

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

    # ------------------------------------------------------------------ inside: opening
    def _indexes(self, names: list[str]) -> dict[str, IndexFile]:
        """The indexes of segments, of those that have one. Their headers are read before any codes are: these, once
        promised, are loaded meanwhile, and a header would wait behind them.
        """
        if self.engine.settings.mode != "sparse":
            return {}
        self.shelf.expect(names, index=True)
        disk, bits, segments = self.shelf.disk, self.engine.settings.index_bits, self.manifest.segments
        found = {name: open_index(disk, self.shelf.index_path(name), segments[name].digest, bits) for name in names}
        return {name: index for name, index in found.items() if index is not None}

    def _hold(self, name: str, device: torch.device, indexes: dict[str, IndexFile]) -> Held:
        """A segment's blocks, in the ledger, and what is known of their index. indexes: of all about to be held."""
        segment = self._prefixes.record(name)
        try:
            held = self._adopted.hold(name, segment, device)
        except StoreCorrupt as error:
            self._prefixes.lost(name, error)
            raise self._prefixes.corrupt(name) from error
        index, partitions = indexes.get(name), self.engine.partitions
        if index is not None and partitions is not None:
            if not partitions.announced:
                partitions.announce(layer for one in indexes.values() for layer in one.layers.values())
            numbers = sorted(segment.layers)
            blocks = {n: first for n, (first, _) in zip(numbers, held, strict=True)}
            heads = {n: heads for n, (_, heads) in zip(numbers, held, strict=True)}
            promise(index, blocks, heads, partitions)
        return held

    def _expect_windows(self, session: Session, length: int) -> None:
        """First and last tokens, which sparse attention of each layer begins with, are read while the model starts."""
        s = self.engine.settings
        if s.mode != "sparse":
            return

        def windows() -> Iterator[Ids]:
            for _, state in sorted(session.layers.items()):
                first, last = -(-s.sink_tokens // state.shape.tokens), (length - s.recent_tokens) // state.shape.tokens
                for row in state.rows:
                    yield state.ids(row.first[: row.runs][np.r_[:first, max(first, last) : row.runs]])

        self.engine.read_ahead(windows)

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

    def _known(self, context: str) -> Context:
        found = self.manifest.contexts.get(context)
        if found is None:
            raise InputError(f"there is no context {context!r} in this store; contexts() lists them")
        return found


def _warn(error: StoreCorrupt, length: int, *, drop: bool) -> None:
    then = f"the first {length} tokens are reused; storing the session mends the rest"
    if drop:
        then = f"contexts that need it end before it from now on: {', '.join(c[:12] for c in error.contexts)}"
    warnings.warn(f"{error}: {then}", CorruptWarning, stacklevel=6)
