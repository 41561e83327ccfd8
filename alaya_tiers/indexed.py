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
import torch
import xxhash
from torch import Tensor

from alaya_tiers.coded import LayerCodes, Pieces, encoded, header_of, runs_into
from alaya_tiers.index.codes import Layout
from alaya_tiers.index.summary import summarise
from alaya_tiers.partitions import SUMMARISED, Partitions, Source
from alaya_tiers.seams import Disk, write_new

Runs = npt.NDArray[np.int64]
"""The first block id of each run of blocks."""


class IndexFile(Source):
    """The index of one stored segment, opened."""

    def __init__(self, disk: Disk, path: str, layers: Mapping[int, LayerCodes]) -> None:
        self._disk, self._path, self.layers = disk, path, layers

    def expect(self, layer: int) -> None:
        """See Source."""
        codes = self.layers[layer].of_codes
        self._disk.expect(self._path, codes.offset, codes.end - codes.offset)

    def fits(self, layer: int, heads: int, layout: Layout) -> bool:
        """See Source."""
        codes = self.layers[layer]
        return codes.kv_heads == heads and codes.layout == layout

    def load(self, layer: int, runs: list[int], addresses: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """See Source."""
        return self._read(self.layers[layer].of_codes, runs, addresses)

    def load_summaries(self, layer: int, runs: list[int], addresses: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """See Source."""
        return self._read(self.layers[layer].of_summaries, runs, addresses)

    def _read(self, pieces: Pieces, runs: list[int], addresses: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        try:
            handle = self._disk.open(self._path, create=False, direct=False)
        except OSError:
            return np.zeros(len(runs), bool)
        try:
            return runs_into(self._disk, handle, pieces, runs, addresses)
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
        layout = partitions.layout_of(number)
        runs = [partitions.export(np.arange(block, block + heads[number])) for block in first.tolist()]
        short = _summaries(runs, layout)
        layers[number] = LayerCodes(layout, heads[number], offset, _digests(runs), _digests(short))
        for some, at in ((runs, layers[number].of_codes), (short, layers[number].of_summaries)):
            parts += [(at.offset + run * at.nbytes, one) for run, one in enumerate(some) if one is not None]
        offset = layers[number].of_summaries.end
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


def _summaries(runs: list[Tensor | None], layout: Layout) -> list[Tensor | None]:
    """Of the codes of each run, where it has some: many together, which is faster."""
    found: list[Tensor | None] = [None] * len(runs)
    coded = [number for number, run in enumerate(runs) if run is not None]
    for start in range(0, len(coded), SUMMARISED):
        some = coded[start : start + SUMMARISED]
        made = summarise(torch.cat([run for number in some if (run := runs[number]) is not None]), layout)
        for number, one in zip(some, made.view(len(some), -1, made.shape[1]), strict=True):
            found[number] = one
    return found


def _digests(runs: list[Tensor | None]) -> tuple[int, ...]:
    return tuple(0 if run is None else xxhash.xxh3_64_intdigest(run.numpy().tobytes()) for run in runs)


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
