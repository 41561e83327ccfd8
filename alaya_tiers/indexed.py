"""Codes of stored segments, in a file beside each segment's record: what is derived, kept because making it takes time.

Nothing depends on the file (``coded.py`` has its layout): it is not part of any commit, and one that is missing, torn,
damaged, of another record or of other settings is not used. Each run of codes is compared with its digest when it is
read; one that differs is made again from its block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import xxhash
from torch import Tensor

from alaya_tiers.coded import LayerCodes, encoded, header_of, runs_into
from alaya_tiers.index.codes import Layout
from alaya_tiers.partitions import Partitions, Source
from alaya_tiers.seams import Disk, write_new

Runs = npt.NDArray[np.int64]
"""The first block id of each run of blocks."""


class IndexFile(Source):
    """The index of one stored segment, opened."""

    def __init__(self, disk: Disk, path: str, layers: Mapping[int, LayerCodes]) -> None:
        self._disk, self._path, self.layers = disk, path, layers

    def expect(self, layer: int) -> None:
        """See Source."""
        codes = self.layers[layer]
        self._disk.expect(self._path, codes.offset, len(codes.digests) * codes.nbytes)

    def fits(self, layer: int, heads: int, layout: Layout) -> bool:
        """See Source."""
        codes = self.layers[layer]
        return codes.kv_heads == heads and codes.layout == layout

    def load(self, layer: int, runs: list[int], addresses: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """See Source."""
        try:
            handle = self._disk.open(self._path, create=False, direct=False)
        except OSError:
            return np.zeros(len(runs), bool)
        try:
            return runs_into(self._disk, handle, self.layers[layer], runs, addresses)
        finally:
            self._disk.close(handle)


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
        return IndexFile(disk, path, header.layers) if usable else None
    except (OSError, ValueError):
        return None
    finally:
        disk.close(handle)


def promise(index: IndexFile, blocks: Mapping[int, Runs], heads: Mapping[int, int], partitions: Partitions) -> None:
    """Tell where the codes of these blocks are, should anybody want them."""
    for number, first in blocks.items():
        codes = index.layers.get(number)
        fits = codes is not None and codes.layout == partitions.layout_of(number) and codes.kv_heads == heads[number]
        if codes is not None and fits and len(codes.digests) == first.size:
            runs = np.flatnonzero(np.array(codes.digests, np.uint64))
            partitions.promise(first[runs], runs, index, number)
