"""Codes of stored segments, in a file beside each segment's record: what is derived, kept because making it takes time.

    segments/NAME/index    one line: magic, sha256 and length of the header
                           the header: JSON, which record it belongs to, and of each layer its layout and digests
                           the codes, layer by layer, run by run, head by head

Nothing depends on the file: it is not part of any commit, and one that is missing, torn, damaged, of another record or
of other settings is not used. Each run of codes is compared with its digest when it is read; one that differs is made
again from its block.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from alaya_tiers.index.codes import Layout
from alaya_tiers.partitions import Partitions, Source
from alaya_tiers.seams import Disk

MAGIC = b"alaya-index-1"
MOST_HEADER = 64 << 20
_FIRST_LINE = 128

Runs = npt.NDArray[np.int64]
"""The first block id of each run of blocks."""


@dataclass(frozen=True, slots=True)
class LayerCodes:
    """Where the codes of one layer are. offset: of the first run, in bytes. digests: xxh3-64 of each run, 0 = none."""

    layout: Layout
    kv_heads: int
    offset: int
    digests: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one run."""
        return self.kv_heads * self.layout.nbytes


class IndexFile(Source):
    """The index of one stored segment, opened."""

    def __init__(self, disk: Disk, path: str, layers: Mapping[int, LayerCodes]) -> None:
        self._disk, self._path, self.layers = disk, path, layers

    def load(self, layer: int, runs: list[int]) -> Iterator[tuple[int, Tensor | None]]:
        """See Source."""
        codes = self.layers[layer]
        try:
            handle = self._disk.open(self._path, create=False, direct=False)
        except OSError:
            yield from ((run, None) for run in runs)
            return
        try:
            for run in runs:
                yield run, self._read(handle, codes, run)
        finally:
            self._disk.close(handle)

    def _read(self, handle: int, codes: LayerCodes, run: int) -> Tensor | None:
        buffer, done = bytearray(codes.nbytes), 0
        with contextlib.suppress(OSError):
            while done < codes.nbytes:
                n = self._disk.read(handle, [memoryview(buffer)[done:]], codes.offset + run * codes.nbytes + done)
                if not n:
                    break
                done += n
        if done < codes.nbytes or xxhash.xxh3_64_intdigest(buffer) != codes.digests[run]:
            return None
        return torch.frombuffer(buffer, dtype=torch.uint8).view(codes.kv_heads, -1)


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
    described = {str(n): asdict(codes) for n, codes in layers.items()}
    header = json.dumps({"record": record, "layers": described}).encode()
    line = b"%s %s %d\n" % (MAGIC, hashlib.sha256(header).hexdigest().encode(), len(header))
    data_at = _data_at(len(header))
    pieces = [(0, line), (_FIRST_LINE, header)]
    pieces += [(data_at + at, coded.numpy().tobytes()) for at, coded in parts]
    try:
        disk.remove(path)
        handle = disk.open(path, create=True, direct=False)
        try:
            for at, data in pieces:
                done = 0
                while done < len(data):
                    done += disk.write(handle, [memoryview(data)[done:]], at + done)
        finally:
            disk.close(handle)
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
        magic, digest, length = _take(disk, handle, 0, _FIRST_LINE).split(b"\n")[0].split(b" ")
        if magic != MAGIC or not length.isdigit() or len(length) > 9 or int(length) > MOST_HEADER:
            return None
        header = _take(disk, handle, _FIRST_LINE, int(length))
        if hashlib.sha256(header).hexdigest().encode() != digest:
            return None
        data = json.loads(header)
        layers = {int(n): _layer(one, _data_at(len(header))) for n, one in data["layers"].items()}
        usable = data["record"] == record and all(codes.layout.bits == bits for codes in layers.values())
        return IndexFile(disk, path, layers) if usable else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return None
    finally:
        disk.close(handle)


def promise(index: IndexFile, blocks: Mapping[int, Runs], heads: Mapping[int, int], partitions: Partitions) -> None:
    """Tell where the codes of these blocks are, should anybody want them."""
    for number, first in blocks.items():
        codes = index.layers.get(number)
        fits = codes is not None and codes.layout == partitions.layout_of(number) and codes.kv_heads == heads[number]
        if codes is not None and fits and len(codes.digests) == first.size:
            known = [(int(block), run) for run, block in enumerate(first) if codes.digests[run]]
            partitions.promise(known, index, number)


def _data_at(header: int) -> int:
    return -(-(_FIRST_LINE + header) // 4096) * 4096


def _layer(data: Any, data_at: int) -> LayerCodes:
    layout = Layout(**{name: int(value) for name, value in data["layout"].items()})
    digests = tuple(int(digest) for digest in data["digests"])
    numbers = (*asdict(layout).values(), int(data["kv_heads"]))
    if min(numbers) < 1 or max(numbers) > 1 << 24 or int(data["offset"]) < 0:
        raise ValueError("sizes that cannot be")
    return LayerCodes(layout, int(data["kv_heads"]), data_at + int(data["offset"]), digests)


def _take(disk: Disk, handle: int, offset: int, n: int) -> bytes:
    buffer, done = bytearray(n), 0
    while done < n and (got := disk.read(handle, [memoryview(buffer)[done:]], offset + done)):
        done += got
    return bytes(buffer[:done])
