"""Blocks of stored segments, known to the ledger: their only copy is on ssd until somebody reads them."""

import errno
import os

import numpy as np
import numpy.typing as npt
import torch

from alaya_tiers.blocks import PAGE, BlockShape, round_up
from alaya_tiers.commit import is_plain
from alaya_tiers.engine import Engine
from alaya_tiers.errors import StoreCorrupt, StoreMismatch
from alaya_tiers.ledger import Ids
from alaya_tiers.manifest import LayerBlocks, Segment
from alaya_tiers.snapshot import Shelf

Runs = npt.NDArray[np.int64]
"""The first block id of each run of blocks."""

Held = list[tuple[Runs, int]]
"""The blocks of a segment, layer by layer: its runs, and how many heads each has."""


class Adopted:
    """Segments whose blocks are in the ledger, each held once for the store. The caller serialises calls."""

    def __init__(self, engine: Engine, shelf: Shelf) -> None:
        self.engine, self.shelf = engine, shelf
        self._held: dict[str, Held] = {}
        self._numbers: dict[str, int] = {}  # folder of an array -> number of its file in the ssd tier
        self._blocks: dict[str, Runs] = {}  # the same -> first block id of each run in the file, or -1

    def holds(self, name: str) -> bool:
        """Whether a segment's blocks are in the ledger already."""
        return name in self._held

    def in_use(self, name: str) -> bool:
        """Whether somebody beside the store has blocks of a segment."""
        refs = self.engine.mover.ledger.refs if name in self._held else None
        return refs is not None and any(bool((refs[first] > 1).any()) for first, _ in self._held[name])

    def hold(self, name: str, segment: Segment, device: torch.device) -> Held:
        """A segment's blocks, in the ledger until ``release``. Raises StoreError, ConfigError, InputError."""
        if name in self._held:
            return self._held[name]
        engine = self.engine
        for folder in segment.files:
            if not is_plain(self.shelf.disk, self.shelf.path, os.path.join(folder, "c", "0", "0", "0")):
                raise StoreCorrupt(errno.ELOOP, "a link leads out of the store and was not followed", folder)
        shapes = {}
        for number, layer in sorted(segment.layers.items()):
            try:
                stored = layer.shape
            except ValueError as error:
                raise StoreCorrupt(errno.EIO, str(error), self.shelf.path) from error
            shapes[number] = engine.fit(number, stored.geometry, device)
            if shapes[number].tokens != layer.block_tokens:
                raise StoreMismatch(
                    errno.EINVAL,
                    f"blocks of layer {number} have {layer.block_tokens} tokens there and {shapes[number].tokens} here",
                    self.shelf.path,
                )
            for place, folder in enumerate(layer.files):
                stride = round_up(shapes[number].nbytes, PAGE)
                blocks = int(np.count_nonzero(layer.where == place)) * layer.kv_heads
                if self.shelf.manifest.files[folder] < max(1, blocks) * stride:
                    raise StoreCorrupt(errno.EIO, "the manifest says that a file is smaller than its blocks", folder)
        with engine.mover.lock:
            self._held[name] = [
                (self._adopt(segment, number, layer, shapes[number]), layer.kv_heads)
                for number, layer in sorted(segment.layers.items())
            ]
        return self._held[name]

    def _adopt(self, segment: Segment, number: int, layer: LayerBlocks, shape: BlockShape) -> Runs:
        """First ids of the runs of one layer of a segment: of blocks some other segment shares, and new ones."""
        mover = self.engine.mover
        book, ssd, runs = mover.ledger, mover.ssd, np.arange(layer.where.size)
        for folder in layer.files:
            if folder not in self._numbers:
                index = segment.start // self.engine.settings.segment_tokens
                self._numbers[folder] = ssd.adopt(
                    os.path.join(self.shelf.path, folder),
                    number,
                    index,
                    shape,
                    self.shelf.manifest.files[folder],
                    ours=self.shelf.writable,
                )
            self._blocks.setdefault(folder, np.full(ssd.files[self._numbers[folder]].blocks, -1, np.int64))
        files = np.array([self._numbers[folder] for folder in layer.files], np.int32)[layer.where]
        first = np.stack([self._blocks[folder][: runs.size] for folder in layer.files])[layer.where, runs]
        blocks = self.engine.settings.segment_tokens // shape.tokens
        offsets = (np.arange(layer.kv_heads)[:, None] * blocks + runs) * ssd.files[files[0]].stride
        known = first >= 0
        old = first[known]  # its id may be another block's by now
        same = (book.refs[old] > 0) & (book.file[old] == files[known]) & (book.offset[old] == offsets[0, known])
        known[known] = same
        if known.any():
            book.retain(ids_of(first[known], layer.kv_heads))
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
        for where, folder in enumerate(layer.files):
            if folder not in self._blocks:
                size = self.engine.mover.ssd.files[self._numbers[folder]].blocks
                self._blocks[folder] = np.full(size, -1, np.int64)
            runs = np.flatnonzero(layer.where == where)
            self._blocks[folder][runs] = first[runs]

    def keep(self, name: str, segment: Segment, held: Held, numbers: dict[str, int]) -> None:
        """The same for a segment that was just stored, in place of what was held under this name.

        Its blocks are in the ledger already, in files ``numbers``.
        """
        self._numbers |= numbers
        before = self._held.get(name, [])
        with self.engine.mover.lock:
            for (first, heads), layer in zip(held, segment.layers.values(), strict=True):
                self.engine.mover.ledger.retain(ids_of(first, heads))
                self._note(segment, layer, first)
        self._held[name] = held
        for (first, heads), (now, _) in zip(before, held, strict=False):
            if self.engine.partitions is not None:
                self.engine.partitions.forget(np.setdiff1d(first, now))
            self.engine.release(ids_of(first, heads))

    def release(self, name: str) -> None:
        """A segment is not stored any more."""
        for first, heads in self._held.pop(name, []):
            if self.engine.partitions is not None:
                self.engine.partitions.forget(first)
            self.engine.release(ids_of(first, heads))

    def forget(self, folder: str, nbytes: int) -> bool:
        """No context has this array of ``nbytes`` any more; whether no session reads it either."""
        engine, number = self.engine, self._numbers.pop(folder, None)
        self._blocks.pop(folder, None)
        if number is None:
            if self.shelf.writable:
                engine.accountant.release("ssd", nbytes)
            return True
        with engine.mover.lock:
            garbage = engine.mover.ssd.unkeep(number)
        for path in garbage:
            engine.mover.ssd.remove(path)
        return not engine.mover.ssd.files[number].live

    def reads(self, folder: str) -> bool:
        """Whether some session has blocks of this array."""
        ssd = self.engine.mover.ssd if self.engine.started else None
        array = os.path.join(self.shelf.path, folder, "")
        return ssd is not None and any(file.live and file.path.startswith(array) for file in ssd.files)

    def folder(self, number: int) -> str:
        """The folder of the array a file belongs to, inside the store."""
        return self.shelf.folder(self.engine.mover.ssd.files[number].path)


def ids_of(first: Runs, heads: int) -> Ids:
    """All blocks of some runs, run by run."""
    return (first[:, None] + np.arange(heads)).ravel()
