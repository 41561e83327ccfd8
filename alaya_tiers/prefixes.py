"""The longest stored prefix of a prompt, around what is known to be damaged.

Damage is known from a record that cannot be read, from a block that was read in vain, and from ``check``.
"""

import errno
import os
from collections.abc import Iterable

from alaya_tiers.damage import Place, needing, usable
from alaya_tiers.engine import Engine
from alaya_tiers.errors import StoreCorrupt
from alaya_tiers.identity import Tokens, common, segment_name
from alaya_tiers.manifest import Manifest, Segment
from alaya_tiers.snapshot import Shelf
from alaya_tiers.verify import flaws


class Prefixes:
    """The records of one store, and what is known to be damaged. The caller serialises calls."""

    def __init__(self, engine: Engine, shelf: Shelf) -> None:
        self.engine, self.shelf = engine, shelf
        self._records: dict[str, Segment] = {}
        self._lost: dict[str, StoreCorrupt] = {}  # segments of which nothing can be used
        self._damaged: set[Place] = set()
        self._checked: set[str] = set()
        self.dropped: set[str] = set()
        """Segments that are not stored any more because they were damaged, though a reader may have them still."""
        self._tree = _children(self.manifest)

    @property
    def manifest(self) -> Manifest:
        """What is stored."""
        return self.shelf.manifest

    # ------------------------------------------------------------------ records
    def record(self, name: str) -> Segment:
        """The record of a segment. Raises StoreCorrupt."""
        if name not in self._records:
            self._records[name] = self.shelf.record(name)
        return self._records[name]

    def stored(self, segments: dict[str, Segment]) -> None:
        """These were stored just now, in place of what may have been damaged."""
        self._records |= segments
        for name in segments:
            self._lost.pop(name, None)
            self._checked.discard(name)
            self.dropped.discard(name)

    def forget(self, name: str) -> None:
        """A segment is not stored any more, or elsewhere."""
        self._records.pop(name, None)
        self._lost.pop(name, None)
        self._checked.discard(name)

    # ------------------------------------------------------------------ the longest prefix
    def match(self, root: str, tokens: Tokens) -> tuple[list[str], int, list[str]]:
        """The segments that hold most of the first tokens, how many tokens that are, and what damage is in the way.

        The last are names of segments that would have given more were they whole.
        """
        self._read_in_vain()
        if self._tree[0] is not self.manifest:
            self._tree = _children(self.manifest)
        names, at, before, children = list[str](), 0, root, self._tree[1]
        while at < tokens.size and before in children:
            size = self.manifest.identities[root].segment_tokens
            whole = segment_name(before, tokens[at : at + size])
            sure = whole in children[before] and at + size <= tokens.size and self.usable(whole) == size
            wanted = {n: self._common(n, before, tokens[at:]) for n in ([whole] if sure else children[before])}
            left = {n: min(length, self.usable(n)) if length else 0 for n, length in wanted.items()}
            found, best = max(left, key=lambda n: left[n]), max(wanted, key=lambda n: wanted[n])
            if left[found]:
                names.append(found)
                at += left[found]
            if left[found] < wanted[best]:
                return names, at, [n for n, length in wanted.items() if length > left[found]]
            if left[found] < size:
                break
            before = found
        return names, at, []

    def usable(self, name: str) -> int:
        """How many first tokens of a segment are not known to be damaged."""
        if name in self._lost:
            return 0
        try:
            return usable(self.record(name), self._damaged)
        except StoreCorrupt:
            return 0

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
            self._damaged.add(Place(self._folder(path), run))

    def lost(self, name: str, error: StoreCorrupt) -> None:
        """Nothing of a segment can be used, because of ``error``."""
        self._lost[name] = error

    def is_damaged(self, path: str, run: int) -> bool:
        """Whether that run of a file is known to be damaged."""
        self._read_in_vain()
        return Place(self._folder(path), run) in self._damaged

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
    def _common(self, name: str, before: str, tokens: Tokens) -> int:
        """How many tokens a segment has in common with these; of one that cannot be read, what its name gives away."""
        try:
            return common(self.record(name).tokens, tokens)
        except StoreCorrupt:
            size = self.manifest.segments[name].tokens
            same = size <= tokens.size and segment_name(before, tokens[:size]) == name
            return size if same else 0

    def _folder(self, path: str) -> str:
        """That of the array, inside the store, to which a shard belongs."""
        return os.path.relpath(path, self.shelf.path).removesuffix("/c/0/0/0")

    def _read_in_vain(self) -> None:
        if self.engine.started:
            with self.engine.mover.lock:
                places = list(self.engine.mover.ssd.damaged)
            self._damaged |= {Place(self._folder(path), run) for path, run in places}


def _children(manifest: Manifest) -> tuple[Manifest, dict[str, list[str]]]:
    """The names of the segments that follow each."""
    found: dict[str, list[str]] = {}
    for name, entry in manifest.segments.items():
        found.setdefault(entry.before, []).append(name)
    return manifest, found
