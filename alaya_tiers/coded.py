"""The file of codes beside a segment's record, as bytes that are not believed.

segments/NAME/index    one line: magic, sha256 and length of the header
                       the header: JSON, which record it belongs to, and of each layer its layout and digests
                       the codes, layer by layer, run by run, head by head
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from alaya_tiers import kernel
from alaya_tiers.blocks import PAGE, round_up
from alaya_tiers.digest import of_rows
from alaya_tiers.index.codes import Layout
from alaya_tiers.seams import Disk, read_up_to
from alaya_tiers.tiers.files import aligned

MAGIC, FAMILY = b"alaya-index-2", b"alaya-index-"
MOST_HEADER = 64 << 20
TOGETHER = 4 << 20
"""Bytes of codes read at a time."""

PIECE = 128 << 10
"""Bytes of one read, of the many that are under way then."""

_FIRST_LINE = 128
_MOST_RUN = 1 << 30
"""Bytes of the codes of one run; a header that speaks of more is not believed."""


Addresses = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


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


class Part(NamedTuple):
    """Runs of a layer, ascending, in an open file."""

    handle: int
    codes: LayerCodes
    runs: list[int]

    @property
    def start(self) -> int:
        """Where a direct read begins that has the first of them."""
        return (self.codes.offset + self.runs[0] * self.codes.nbytes) // PAGE * PAGE

    @property
    def room(self) -> int:
        """Bytes that reads from there on fill, for runs that follow each other."""
        return round_up(self.codes.offset + (self.runs[-1] + 1) * self.codes.nbytes - self.start, PIECE)

    def neighbours(self) -> Iterator[Part]:
        """Runs that follow each other, at most so many together as are read at a time."""
        numbers, most = np.array(self.runs), max(1, (TOGETHER - PAGE) // self.codes.nbytes)
        for some in np.split(numbers, 1 + np.flatnonzero(np.diff(numbers) != 1)) if self.runs else ():
            for at in range(0, some.size, most):
                yield self._replace(runs=some[at : at + most].tolist())


class OtherCodes(ValueError):
    """Codes of another version: not damaged, but to be made anew."""


class Header(NamedTuple):
    """record: digest of the record the codes belong to."""

    record: str
    layers: Mapping[int, LayerCodes]


def encoded(record: str, layers: Mapping[int, LayerCodes]) -> tuple[list[tuple[int, bytes]], int]:
    """What stands before the codes, as pieces and their offsets; where the codes begin: offsets count from there."""
    described = {str(n): asdict(codes) for n, codes in layers.items()}
    header = json.dumps({"record": record, "layers": described}).encode()
    line = b"%s %s %d\n" % (MAGIC, hashlib.sha256(header).hexdigest().encode(), len(header))
    return [(0, line), (_FIRST_LINE, header)], _data_at(len(header))


def header_of(disk: Disk, handle: int) -> Header:
    """The header of an open file; offsets in it count from the file's begin. ValueError, OSError if it is not whole."""
    try:
        magic, digest, length = read_up_to(disk, handle, 0, _FIRST_LINE).split(b"\n")[0].split(b" ")
        if magic != MAGIC and magic.startswith(FAMILY) and magic[len(FAMILY) :].isdigit():
            raise OtherCodes(f"codes of version {magic[len(FAMILY) :].decode()}")
        if magic != MAGIC or not length.isdigit() or len(length) > 9 or int(length) > MOST_HEADER:
            raise ValueError("not a file of codes")
        header = read_up_to(disk, handle, _FIRST_LINE, int(length))
        if hashlib.sha256(header).hexdigest().encode() != digest:
            raise ValueError("its header has another digest")
        data = json.loads(header)
        layers = {int(n): _layer(one, _data_at(len(header))) for n, one in data["layers"].items()}
        if not isinstance(data["record"], str):
            raise ValueError("it belongs to nothing")
        return Header(data["record"], layers)
    except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError("its header makes no sense") from error


def run_of(disk: Disk, handle: int, codes: LayerCodes, run: int) -> bytearray | None:
    """The codes of one run; None if there are none, or others than were written. Raises OSError."""
    buffer = read_up_to(disk, handle, codes.offset + run * codes.nbytes, codes.nbytes)
    return buffer if xxhash.xxh3_64_intdigest(buffer) == codes.digests[run] else None


def runs_into(disk: Disk, parts: Iterable[Part], addresses: Addresses) -> Mask:
    """Bring runs to where the codes of each head shall lie; which of them are what was written, bool [n].

    addresses: int64 [n, kv_heads], of all parts' runs in a row. Neighbours are read together, and files at a time, into
    memory that is used again and again; from there what is good is copied. What cannot be read is not what was written.
    """
    good, at, room = np.zeros(len(addresses), bool), 0, aligned(TOGETHER)
    for some in _batches(parts):
        room = room if (need := sum(part.room for part in some)) <= room.size else aligned(need)
        for part, rows in zip(some, _read(disk, some, room), strict=True):
            here, nbytes = slice(at, at + len(rows)), part.codes.layout.nbytes
            good[here] = of_rows(rows) == np.array(
                [part.codes.digests[run] for run in part.runs[: len(rows)]], np.uint64
            )
            heads = rows.ctypes.data + np.arange(rows.size // nbytes).reshape(-1, part.codes.kv_heads) * nbytes
            to = addresses[here][good[here]].ravel()
            kernel.copy(heads[good[here]].ravel(), to, np.full(to.size, nbytes), 1)
            at += len(part.runs)
    return good


def _read(disk: Disk, parts: list[Part], room: npt.NDArray[np.uint8]) -> Iterator[npt.NDArray[np.uint8]]:
    """Runs that follow each other in each part, read all at once into ``room``; of each as many as came, in rows."""
    begins = np.cumsum([0, *(part.room for part in parts)])
    reads = np.concatenate([part.start + np.arange(0, part.room, PIECE) for part in parts])
    handles = np.concatenate([np.full(part.room // PIECE, part.handle, np.int32) for part in parts])
    addresses = room.ctypes.data + np.arange(len(reads)) * PIECE
    done = disk.read_pages(handles, reads, np.arange(len(reads) + 1), addresses, PIECE)
    for part, begin in zip(parts, begins[:-1].tolist(), strict=True):
        got = done[begin // PIECE : (begin + part.room) // PIECE]
        short = np.flatnonzero(got < PIECE)
        there = part.room if not short.size else int(short[0]) * PIECE + max(0, int(got[short[0]]))
        first = part.codes.offset + part.runs[0] * part.codes.nbytes - part.start
        whole = min(len(part.runs), max(0, there - first) // part.codes.nbytes)
        yield room[begin + first : begin + first + whole * part.codes.nbytes].reshape(whole, part.codes.nbytes)


def problem_of(disk: Disk, path: str, record: str) -> str | None:
    """What is wrong with the codes of the segment whose record has this digest; None if nothing, or there are none, or
    those of another version, which nobody reads."""
    try:
        handle = disk.open(path, create=False, direct=False)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"the codes cannot be read: {error.strerror}"
    try:
        header = header_of(disk, handle)
        if header.record != record:
            return "the codes are those of another record"
        for number, codes in header.layers.items():
            for run, digest in enumerate(codes.digests):
                if digest and run_of(disk, handle, codes, run) is None:
                    return f"the codes of run {run} of layer {number} are damaged"
        return None
    except OtherCodes:
        return None
    except (OSError, ValueError) as error:
        return f"the codes cannot be used: {error}"
    finally:
        disk.close(handle)


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Parts of runs that follow each other, as many at a time as fit together."""
    batch: list[Part] = []
    for part in (one for whole in parts for one in whole.neighbours()):
        if batch and sum(one.room for one in batch) + part.room > TOGETHER:
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch


def _data_at(header: int) -> int:
    return -(-(_FIRST_LINE + header) // 4096) * 4096


def _layer(data: Any, data_at: int) -> LayerCodes:
    layout = Layout(**{name: int(value) for name, value in data["layout"].items()})
    digests = tuple(int(digest) for digest in data["digests"])
    if digests and not 0 <= min(digests) <= max(digests) < 1 << 64:
        raise ValueError("digests that cannot be")
    numbers = (*asdict(layout).values(), int(data["kv_heads"]))
    if min(numbers) < 1 or max(numbers) > 1 << 24 or not 0 <= int(data["offset"]) < 1 << 60:
        raise ValueError("sizes that cannot be")
    codes = LayerCodes(layout, int(data["kv_heads"]), data_at + int(data["offset"]), digests)
    if codes.nbytes > _MOST_RUN:
        raise ValueError("sizes that cannot be")
    return codes
