"""Codes of stored segments, in a file beside each segment's record: what is derived, kept because making it takes time.

Nothing depends on the file (``coded.py`` has its layout): it is not part of any commit, and one that is missing, torn,
damaged, of another record or of other settings is not used. Each run of codes is compared with its digest when it is
read; one that differs is made again from its block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash
from torch import Tensor

from alaya_tiers.coded import LayerCodes, Part, encoded, header_of, runs_into
from alaya_tiers.index.codes import Layout
from alaya_tiers.partitions import Partitions, Source
from alaya_tiers.seams import Disk, write_new

Runs = npt.NDArray[np.int64]
"""The first block id of each run of blocks."""

MOST_RUNS = 1 << 20
"""Runs of a layer of one segment, above all there can be: numbers of runs in a source count files in this."""

SOURCE_BYTES = 4 << 20
"""Codes of one layer that are loaded together, at least, if there are as many in ``SOURCE_FILES``."""

SOURCE_FILES = 64
"""Files that one source has at most: they are opened together."""


class IndexFile(NamedTuple):
    """The index of one stored segment, of which the header was read."""

    path: str
    layers: Mapping[int, LayerCodes]


class Kept(NamedTuple):
    """An index, and of each layer of its segment the first ids of its runs and how many heads they have."""

    file: IndexFile
    blocks: Mapping[int, tuple[Runs, int]]


class IndexFiles(Source):
    """Indexes of some segments, which are read together: what they have of each layer, by number of the file."""

    def __init__(self, disk: Disk, paths: list[str], layers: Mapping[int, Mapping[int, LayerCodes]], *, direct: bool):
        self._disk, self._paths, self._layers, self._direct = disk, paths, layers, direct

    def fits(self, layer: int, heads: int, layout: Layout) -> bool:
        """See Source."""
        return all(codes.kv_heads == heads and codes.layout == layout for codes in self._layers[layer].values())

    def load(self, layer: int, runs: list[int], addresses: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """See Source."""
        files, numbers = np.divmod(np.array(runs, np.int64), MOST_RUNS)
        good = np.zeros(len(runs), bool)
        with contextlib.ExitStack() as stack:
            parts, found = list[Part](), np.zeros(len(runs), bool)
            for file in np.unique(files).tolist():
                with contextlib.suppress(OSError):
                    handle = self._disk.open(self._paths[file], create=False, direct=self._direct)
                    stack.callback(self._disk.close, handle)
                    parts.append(Part(handle, self._layers[layer][file], numbers[files == file].tolist()))
                    found |= files == file
            good[found] = runs_into(self._disk, parts, addresses[found])
        return good


def save(
    disk: Disk, path: str, record: str, blocks: Mapping[int, Runs], heads: Mapping[int, int], partitions: Partitions
) -> bool:
    """Write the codes of a segment, as far as there are any; whether there are. record: the digest of its record.

    blocks: first ids of the runs of each layer. A failure leaves no index, which is no loss.
    """
    layers, offset = dict[int, LayerCodes](), 0
    parts: list[tuple[int, Tensor]] = []
    for number, first in sorted(blocks.items()):
        digests, layout = [], partitions.layout_of(number)
        nbytes = heads[number] * layout.nbytes
        for run, block in enumerate(first.tolist()):
            coded = partitions.export(np.arange(block, block + heads[number]))
            digests.append(0 if coded is None else xxhash.xxh3_64_intdigest(coded.numpy().tobytes()))
            if coded is not None:
                parts.append((offset + run * nbytes, coded))
        layers[number] = LayerCodes(layout, heads[number], offset, tuple(digests))
        offset += len(digests) * nbytes
    if not parts:
        return False
    pieces, data_at = encoded(record, layers)
    pieces += [(data_at + at, coded.numpy().tobytes()) for at, coded in parts]
    try:
        write_new(disk, path, pieces)
    except OSError:
        with contextlib.suppress(OSError):
            disk.remove(path)
        return False
    return True


def open_index(disk: Disk, path: str, record: str, bits: int) -> IndexFile | None:
    """The index of a segment whose record has this digest; None where there is none that could be used."""
    try:
        handle = disk.open(path, create=False, direct=False)
    except OSError:
        return None
    try:
        header = header_of(disk, handle)
        usable = header.record == record and all(codes.layout.bits == bits for codes in header.layers.values())
        return IndexFile(path, header.layers) if usable else None
    except (OSError, ValueError):
        return None
    finally:
        disk.close(handle)


def promise(disk: Disk, kept: Sequence[Kept], partitions: Partitions, *, direct: bool) -> None:
    """Tell where the codes of these blocks are, should anybody want them: files that follow each other as one source.

    direct: whether they are read past the page cache.
    """
    for some in _together(kept):
        layers = dict[int, dict[int, LayerCodes]]()
        source = IndexFiles(disk, [one.file.path for one in some], layers, direct=direct)
        wanted = dict[int, list[tuple[Runs, Runs]]]()
        for n, (file, blocks) in enumerate(some):
            for number, (first, heads) in blocks.items():
                codes = file.layers.get(number)
                if codes is None or codes.layout != partitions.layout_of(number) or codes.kv_heads != heads:
                    continue
                if len(codes.digests) == first.size <= MOST_RUNS:
                    runs = np.flatnonzero(np.array(codes.digests, np.uint64))
                    layers.setdefault(number, {})[n] = codes
                    wanted.setdefault(number, []).append((first[runs], n * MOST_RUNS + runs))
        for number, pairs in sorted(wanted.items()):
            first, runs = (np.concatenate(part) for part in zip(*pairs, strict=True))
            partitions.promise(first, runs, source, number)


def _together(kept: Sequence[Kept]) -> Iterator[list[Kept]]:
    """Some at a time, of which a layer is worth a thread's while and does not keep others waiting long."""
    batch, size = list[Kept](), 0
    for one in kept:
        batch.append(one)
        size += max((codes.nbytes * len(codes.digests) for codes in one.file.layers.values()), default=0)
        if size >= SOURCE_BYTES or len(batch) == SOURCE_FILES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
