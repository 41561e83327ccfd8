"""The longest stored prefix of a prompt, around what is known to be damaged.

Damage is known from a record that cannot be read, from a block that was read in vain, and from ``check``.
"""

import contextlib
import errno
import itertools
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from alaya_tiers.commit import load_needs
from alaya_tiers.damage import Place, needing, usable
from alaya_tiers.engine import Engine
from alaya_tiers.errors import StoreCorrupt
from alaya_tiers.identity import Tokens, segment_name
from alaya_tiers.manifest import Entry, Manifest, Segment
from alaya_tiers.needs import Needs
from alaya_tiers.siblings import Siblings
from alaya_tiers.snapshot import Shelf
from alaya_tiers.verify import flaws

MOST_RECORDS = 32 << 20
"""Bytes of records that are remembered; a record that was let go of is read again."""


class Prefixes:
    """The records of one store, and what is known to be damaged. The caller serialises calls.

    Whoever changes the manifest says so: ``stored``, ``forget``, or ``reopened`` when it is another one altogether.
    """

    def __init__(self, engine: Engine, shelf: Shelf) -> None:
        self.engine, self.shelf = engine, shelf
        self._records = OrderedDict[str, Segment]()
        self._record_bytes = 0
        self._new: Mapping[str, Tokens] = {}  # what is about to be stored
        self._lost: dict[str, StoreCorrupt] = {}  # segments of which nothing can be used
        self._damaged: set[Place] = set()
        self._checked: set[str] = set()
        self.dropped: set[str] = set()
        """Segments that are not stored any more because they were damaged, though a reader may have them still."""
        self._after = dict[str, Siblings]()
        self.reopened()

    @property
    def manifest(self) -> Manifest:
        """What is stored."""
        return self.shelf.manifest

    # ------------------------------------------------------------------ records
    def record(self, name: str) -> Segment:
        """The record of a segment. Raises StoreCorrupt."""
        if name not in self._records:
            self._remember(name, self.shelf.record(name))
        self._records.move_to_end(name)
        return self._records[name]

    def arranged(self, tokens: Mapping[str, Tokens], entries: Mapping[str, Entry]) -> dict[str, Siblings]:
        """What will follow each segment when others with these tokens are stored, or count again."""
        found, self._new = dict[str, Siblings](), tokens
        for name, entry in entries.items():
            if entry.before not in found:
                found[entry.before] = self._following(entry.before).copy()
            found[entry.before].add(name)
        self._new = {}
        return self._after | found

    def stored(self, segments: Mapping[str, Segment], after: dict[str, Siblings]) -> None:
        """These were stored just now, in place of what may have been damaged. after: what ``arranged`` said."""
        for name, segment in segments.items():
            self._remember(name, segment)
            self._lost.pop(name, None)
            self._checked.discard(name)
            self.dropped.discard(name)
        self._after = after

    def forget(self, name: str, before: str) -> None:
        """A segment that followed ``before`` is not stored any more, or elsewhere."""
        self._drop(name)
        self._lost.pop(name, None)
        self._checked.discard(name)
        if name not in self.manifest.segments and before in self._after:
            self._after[before].remove(name)
            if not len(self._after[before]):
                del self._after[before]

    def reopened(self) -> None:
        """The manifest is another one, of which nothing was said."""
        ordered = self.manifest.ordered
        self._after = {
            before: Siblings(names, self._tokens, ordered=ordered)
            for before, names in self.manifest.following().items()
        }

    # ------------------------------------------------------------------ the longest prefix
    def match(self, root: str, tokens: Tokens) -> tuple[list[str], int, list[str]]:
        """The segments that hold most of the first tokens, how many tokens that are, and what damage is in the way.

        The last are names of segments that would have given more were they whole.
        """
        self._read_in_vain()
        if root not in self._after:
            return [], 0, []
        size, whole = self.manifest.identities[root].segment_tokens, self._whole(root, tokens)
        self.shelf.expect([name for name in whole if name not in self._records])
        names = list(itertools.takewhile(lambda name: self.usable(name) == size, whole))
        at, before = len(names) * size, names[-1] if names else root
        if at >= tokens.size or before not in self._after:
            return names, at, []
        found, left, damaged = self._nearest(before, tokens[at:])
        return names + [found] * (left > 0), at + left, damaged

    def _whole(self, root: str, tokens: Tokens) -> list[str]:
        """The segments that hold exactly the first tokens, as far as whole ones do, damaged or not."""
        size, names, before = self.manifest.identities[root].segment_tokens, list[str](), root
        for at in range(0, tokens.size - size + 1, size):
            name = segment_name(before, tokens[at : at + size])
            entry = self.manifest.segments.get(name)
            if entry is None or entry.before != before:
                break
            names.append(name)
            before = name
        return names

    def _nearest(self, before: str, tokens: Tokens) -> tuple[str, int, list[str]]:
        """What follows a segment and has most of these tokens, how many, and what would have more were it whole."""
        found, left, hurt = "", 0, list[tuple[str, int]]()
        siblings = self._following(before)
        for name, same in siblings.nearest(tokens):
            if same <= left:
                break
            usable = min(same, self.usable(name))
            hurt += [(name, same)] if usable < same else []
            found, left = (name, usable) if usable > left else (found, left)
        hurt += [(name, self._by_name(name, before, tokens)) for name in siblings.unread]
        return found, left, [name for name, same in hurt if same > left]

    def usable(self, name: str) -> int:
        """How many first tokens of a segment are not known to be damaged."""
        if name in self._lost:
            return 0
        try:
            return usable(self.record(name), self._damaged)
        except StoreCorrupt:
            return 0

    def needs(self, names: Sequence[str]) -> Needs | None:
        """What the heads of the longest context among these need, if that was stored."""
        store, contexts = self.shelf, self.manifest.contexts
        known = (n for n in reversed(names) if n in contexts and contexts[n].needs)
        with contextlib.suppress(OSError, ValueError):  # nothing but plans depends on it
            return next((load_needs(store.disk, store.path, contexts[n]) for n in known), None)
        return None

    # ------------------------------------------------------------------ what is damaged
    def check(self, names: Iterable[str]) -> bool:
        """Read all blocks of these segments that were not read so yet; whether some are damaged. Raises StoreError."""
        found, store = False, self.shelf
        for name in names:
            if name not in self._checked:
                tokens = self.manifest.identities[self.manifest.root(name)].segment_tokens
                for flaw in flaws(store.disk, store.path, self.record(name), tokens, blocks_only=True):
                    found = True
                    self.note(name, flaw.path, flaw.run)
                self._checked.add(name)
        return found

    def note(self, name: str, path: str, run: int | None) -> None:
        """A run of blocks of a segment, in the file ``path``, is damaged; None: nothing of the segment can be used."""
        if run is None:
            self.lost(name, StoreCorrupt(errno.EIO, "a stored segment is damaged and was not used", path))
        else:
            self._damaged.add(Place(self.shelf.folder(path), run))

    def lost(self, name: str, error: StoreCorrupt) -> None:
        """Nothing of a segment can be used, because of ``error``."""
        self._lost[name] = error

    def is_damaged(self, path: str, run: int) -> bool:
        """Whether that run of a file is known to be damaged."""
        self._read_in_vain()
        return Place(self.shelf.folder(path), run) in self._damaged

    def corrupt(self, name: str) -> StoreCorrupt:
        """The error that says what is wrong with a segment, and whose it is."""
        error = self._lost.get(name)
        try:
            folders = self.record(name).files
            bad = sorted(p for p in self._damaged if p.folder in folders)
        except StoreCorrupt as unreadable:
            error, bad = unreadable, []
        if error is None:
            place = os.path.join(self.shelf.path, bad[0].folder) if bad else self.shelf.path
            error = StoreCorrupt(errno.EIO, "blocks of a stored segment are damaged and were not used", place)
        made = StoreCorrupt(error.errno, str(error.strerror), error.filename)
        made.segment, made.contexts = name, needing(self.manifest, [name])
        return made

    # ------------------------------------------------------------------ inside
    def _remember(self, name: str, segment: Segment) -> None:
        self._drop(name)
        self._records[name] = segment
        self._record_bytes += segment.nbytes
        while self._record_bytes > MOST_RECORDS and len(self._records) > 1:
            self._record_bytes -= self._records.popitem(last=False)[1].nbytes

    def _drop(self, name: str) -> None:
        if name in self._records:
            self._record_bytes -= self._records.pop(name).nbytes

    def _following(self, before: str) -> Siblings:
        return self._after.get(before) or Siblings([], self._tokens)

    def _tokens(self, name: str) -> Tokens:
        return self._new[name] if name in self._new else self.record(name).tokens

    def _by_name(self, name: str, before: str, tokens: Tokens) -> int:
        """How many tokens a segment that cannot be read has in common with these, as far as its name gives it away."""
        size = self.manifest.segments[name].tokens
        return size if size <= tokens.size and segment_name(before, tokens[:size]) == name else 0

    def _read_in_vain(self) -> None:
        if self.engine.started:
            with self.engine.mover.lock:
                places = list(self.engine.mover.ssd.damaged)
            self._damaged |= {Place(self.shelf.folder(path), run) for path, run in places}
