"""The file of codes beside a segment's record, as bytes that are not believed.

segments/NAME/index    one line: magic, sha256 and length of the header
                       the header: JSON, which record it belongs to, and of each layer its layout and digests
                       layer by layer: the codes, run by run, head by head; then their summaries, the same
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from alaya_tiers import kernel
from alaya_tiers.digest import of_rows
from alaya_tiers.index.codes import Layout
from alaya_tiers.index.summary import Shape
from alaya_tiers.seams import Disk, read_into, read_up_to

MAGIC, FAMILY = b"alaya-index-3", b"alaya-index-"
MOST_HEADER = 64 << 20
TOGETHER = 2 << 20
"""Bytes of codes read at a time: as a processor's cache holds."""

_FIRST_LINE = 128
_MOST_RUN = 1 << 30
"""Bytes of the codes of one run; a header that speaks of more is not believed."""


Addresses = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Pieces(NamedTuple):
    """Pieces of one size, one a kv head, run by run. each: bytes of a piece. digests: of a run, all heads, 0 = none."""

    offset: int
    heads: int
    each: int
    digests: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one run."""
        return self.heads * self.each

    @property
    def end(self) -> int:
        """Where what comes after all runs begins."""
        return self.offset + len(self.digests) * self.nbytes


@dataclass(frozen=True, slots=True)
class LayerCodes:
    """Where the codes of one layer are. offset: of the first run, in bytes. digests: xxh3-64 of each run, 0 = none.

    summaries: digests of their summaries, which come after the codes of all runs.
    """

    layout: Layout
    kv_heads: int
    offset: int
    digests: tuple[int, ...]
    summaries: tuple[int, ...]

    @property
    def of_codes(self) -> Pieces:
        """What the codes are, run by run."""
        return Pieces(self.offset, self.kv_heads, self.layout.nbytes, self.digests)

    @property
    def of_summaries(self) -> Pieces:
        """What their summaries are."""
        return Pieces(self.of_codes.end, self.kv_heads, Shape.of(self.layout).nbytes, self.summaries)


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


def run_of(disk: Disk, handle: int, codes: Pieces, run: int) -> bytearray | None:
    """The pieces of one run; None if there are none, or others than were written. Raises OSError."""
    buffer = read_up_to(disk, handle, codes.offset + run * codes.nbytes, codes.nbytes)
    return buffer if xxhash.xxh3_64_intdigest(buffer) == codes.digests[run] else None


def runs_into(disk: Disk, handle: int, codes: Pieces, runs: list[int], addresses: Addresses) -> Mask:
    """Bring the pieces of runs, ascending, to where each head's shall lie; which are what was written, bool [n].

    addresses: int64 [n, kv_heads]. Neighbours are read together, checked while they are in the processor's cache, then
    copied: memory of the index is touched for what is good alone. What cannot be read is not what was written.
    """
    good, nbytes, at = np.zeros(len(runs), bool), codes.each, 0
    for group in _neighbours(runs, max(1, TOGETHER // codes.nbytes)):
        rows = np.empty((len(group), codes.nbytes), np.uint8)
        try:
            got = read_into(disk, handle, rows.reshape(-1).data, codes.offset + group[0] * codes.nbytes)
        except OSError:
            got = 0
        whole = got // codes.nbytes
        here = slice(at, at + whole)
        good[here] = of_rows(rows[:whole]) == np.array([codes.digests[run] for run in group[:whole]], np.uint64)
        heads = rows.ctypes.data + np.arange(rows.size // nbytes).reshape(len(group), -1) * nbytes
        to = addresses[here][good[here]].ravel()
        kernel.copy(heads[:whole][good[here]].ravel(), to, np.full(to.size, nbytes), 1)
        at += len(group)
    return good


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
            for what, pieces in (("codes", codes.of_codes), ("summaries", codes.of_summaries)):
                for run, digest in enumerate(pieces.digests):
                    if digest and run_of(disk, handle, pieces, run) is None:
                        return f"the {what} of run {run} of layer {number} are damaged"
        return None
    except OtherCodes:
        return None
    except (OSError, ValueError) as error:
        return f"the codes cannot be used: {error}"
    finally:
        disk.close(handle)


def _neighbours(runs: list[int], most: int) -> Iterator[list[int]]:
    """Numbers that follow each other, at most so many together."""
    group: list[int] = []
    for run in runs:
        if group and (run != group[-1] + 1 or len(group) == most):
            yield group
            group = []
        group.append(run)
    if group:
        yield group


def _data_at(header: int) -> int:
    return -(-(_FIRST_LINE + header) // 4096) * 4096


def _layer(data: Any, data_at: int) -> LayerCodes:
    layout = Layout(**{name: int(value) for name, value in data["layout"].items()})
    digests, summaries = (tuple(int(digest) for digest in data[name]) for name in ("digests", "summaries"))
    if len(digests) != len(summaries) or any(not 0 <= digest < 1 << 64 for digest in (*digests, *summaries)):
        raise ValueError("digests that cannot be")
    numbers = (*asdict(layout).values(), int(data["kv_heads"]))
    if min(numbers) < 1 or max(numbers) > 1 << 24 or not 0 <= int(data["offset"]) < 1 << 60:
        raise ValueError("sizes that cannot be")
    codes = LayerCodes(layout, int(data["kv_heads"]), data_at + int(data["offset"]), digests, summaries)
    if codes.of_codes.nbytes > _MOST_RUN:
        raise ValueError("sizes that cannot be")
    return codes
