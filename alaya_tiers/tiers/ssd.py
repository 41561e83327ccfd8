"""The ssd tier: byte ranges of Zarr shards, read and written straight from and to slots.

zarr-python is used for metadata only: its own read path costs 30-40 times more CPU per 64 KiB chunk than a preadv. Work
is handed out as jobs, each a batch of coalesced extents for one thread: a hop to a thread costs as much as a read.
"""

import contextlib
import errno
import itertools
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from alaya_tiers import digest
from alaya_tiers.blocks import PAGE, BlockShape, round_up
from alaya_tiers.digest import Digests
from alaya_tiers.errors import StoreCorrupt, StoreError
from alaya_tiers.seams import Disk, SystemClock, memory
from alaya_tiers.tiers.base import Accountant, Addresses
from alaya_tiers.tiers.files import (
    Asked,
    Handles,
    Run,
    SegmentFile,
    aligned,
    digests_behind,
    digests_bytes,
    translate,
)
from alaya_tiers.tiers.queue import Batch, Queue
from alaya_tiers.tiers.zarr_format import shard_index

MOST_EXTENTS = 256
"""Extents of one vectored read or write (the kernel's own limit is 1024)."""

LEAST_PAGES = 64
"""Single pages that one thread reads: fewer keep too few reads under way."""

SMALL_RUN = 1 << 20
"""Bytes of a mean run up to which those of a job are read by one call."""

SMALL_JOB = 256 << 10
"""Bytes below which splitting a request among threads costs more than it wins."""


class Writes(Protocol):
    """Who counts what is written, and may refuse it."""

    def admit(self, nbytes: int) -> None:
        """``nbytes`` are about to be written. Raises StoreError; nothing was admitted then."""
        ...

    def settle(self, nbytes: int, payload: int) -> None:
        """Admitted ``nbytes`` are on disk, ``payload`` of them keys and values; 0: none, or they were given up."""
        ...


def _clear_padding(run: Run) -> None:
    """Zeros behind blocks that do not fill their pages: what lay there before may be another tenant's."""
    used, nbytes = run.file.shape.nbytes, run.file.stride
    for address in run.addresses if used < nbytes else ():
        memory(address + used, nbytes - used)[:] = bytes(nbytes - used)


class SsdTier:
    """Extents of one session's files under ``directory``. queue: of single pages.

    ``place`` and ``forget`` are pure bookkeeping, calls to which the caller serialises; jobs are run by an executor.
    """

    def __init__(
        self,
        directory: str,
        disk: Disk,
        accountant: Accountant,
        segment_tokens: int,
        threads: int,
        *,
        direct: bool,
        queue: Queue | None = None,
    ) -> None:
        self.directory, self.direct = directory, direct
        self.queue = queue or Queue(SystemClock())
        self.files: list[SegmentFile] = []
        self.writes: Writes | None = None
        self._disk, self._accountant = disk, accountant
        self._segment_tokens, self._threads = segment_tokens, threads
        self._by_name: dict[tuple[int, int, int], int] = {}
        self._paths: Counter[tuple[int, int, int]] = Counter()
        self._handles = Handles(disk, direct=direct)
        self._learning = threading.Lock()
        self._learned = 0
        self.damaged: set[tuple[str, int]] = set()
        """Runs that could not be read as they were written: path of the file, number in the file."""

    def place(self, layer: int, shape: BlockShape, stream: int, start: int, head: int) -> tuple[int, int]:
        """Where the block of ``head`` that starts at position ``start`` goes: (file, byte offset).

        Charges its bytes; OutOfSpace when the ssd budget has no room. A place is given out once.
        """
        segment, within = divmod(start, self._segment_tokens)
        blocks = self._segment_tokens // shape.tokens
        name = (stream, segment, layer)
        if name not in self._by_name:
            again = self._paths[name]  # a file whose blocks all died may still be there: never write where it is
            self._paths[name] += 1
            folder = f"s{stream:04d}-{segment:05d}" + (f"-{again}" if again else "")
            path = os.path.join(self.directory, folder, f"layer_{layer:03d}", "c", "0", "0", "0")
            offsets = np.full((shape.geometry.kv_heads, blocks), -1, np.int64)
            self.files.append(SegmentFile(path, layer, stream, segment, shape, blocks, offsets))
            self._by_name[name] = len(self.files) - 1
        number = self._by_name[name]
        file = self.files[number]
        index = within // shape.tokens
        assert file.offsets[head, index] < 0, f"{file.path}: block {head},{index} placed twice"
        self._accountant.charge("ssd", file.stride)
        if self.writes is not None:
            beside = 0 if file.admitted else file.beside  # its first block, or what it says of itself is written anew
            try:
                self.writes.admit(file.stride + beside)
            except BaseException:
                self._accountant.release("ssd", file.stride)
                raise
            file.admitted += beside
        offset = (head * blocks + index) * file.stride
        file.offsets[head, index] = offset
        file.live += 1
        file.published = False
        return number, offset

    def adopt(
        self, folder: str, layer: int, segment: int, shape: BlockShape, kept_bytes: int, *, ours: bool = True
    ) -> int:
        """A file of stored contexts, charged already; its number. folder: that of its array. ours: see SegmentFile."""
        offsets = np.full((shape.geometry.kv_heads, self._segment_tokens // shape.tokens), -1, np.int64)
        path = os.path.join(folder, "c", "0", "0", "0")
        file = SegmentFile(
            path, layer, -1, segment, shape, offsets.shape[1], offsets, published=True, ours=ours, told=False
        )
        file.kept = kept_bytes // file.stride
        self.files.append(file)
        return len(self.files) - 1

    def live_bytes(self, number: int) -> int:
        """What the living blocks of a file take."""
        return self.files[number].live * self.files[number].stride

    def keep(self, number: int) -> None:
        """A stored context has this file from here on: it stays, and stays charged, whoever lets go of its blocks."""
        self.files[number].kept = self.files[number].live

    def unkeep(self, number: int) -> list[str]:
        """No stored context has this file any more; the file, to be removed, if no session uses it either."""
        file = self.files[number]
        self._accountant.release("ssd", (file.kept - file.live) * file.price)
        file.kept = 0
        return [] if file.live or not file.ours else [file.path]

    def unplace(self, number: int, offset: int) -> list[str]:
        """Take back a place that was not written; the file, to be removed, if nothing lives in it."""
        file = self.files[number]
        file.offsets.ravel()[offset // file.stride] = -1
        if self.writes is not None:
            self.writes.settle(file.stride, 0)
        path = self._drop(number)
        return [] if path is None else [path]

    def confirm(self, numbers: npt.NDArray[np.int32]) -> set[int]:
        """Blocks of these files (one element a block) were written; the files that are full now."""
        full = set()
        for number in numbers.tolist():
            file = self.files[number]
            file.written += 1
            if self.writes is not None:
                self.writes.settle(file.stride, file.shape.nbytes)
            if file.full:
                full.add(number)
        return full

    def published(self, file: SegmentFile) -> None:
        """What stands beside the blocks of a file is written, or will never be."""
        if self.writes is not None:
            self.writes.settle(file.admitted, 0)
        file.admitted = 0

    def forget(self, numbers: npt.NDArray[np.int32]) -> list[str]:
        """Written blocks (one element a block) are dead; the files nothing lives in any more, to be removed."""
        return [path for number in numbers.tolist() if (path := self._drop(number)) is not None]

    def write_jobs(
        self, numbers: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], addresses: Addresses
    ) -> list[Callable[[], tuple[list[int], Digests]]]:
        """Jobs that write full blocks; each returns (which blocks, their digests). They raise StoreError."""
        return [partial(self._write, runs) for runs in self._split(numbers, offsets, addresses)]

    def read_jobs(
        self, numbers: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], addresses: Addresses, digests: Digests
    ) -> list[Callable[[], None]]:
        """Jobs that read blocks into ``addresses`` and check their digests. They raise StoreError."""
        return [partial(self._read, runs, digests) for runs in self._split(numbers, offsets, addresses)]

    def write_index(self, number: int) -> None:
        """Put digests of pages and the index behind the data: any Zarr reader can read what is placed. Blocks."""
        file = self.files[number]
        behind = digests_behind(file.pages) + shard_index(file.offsets, file.shape.nbytes)
        try:
            handle = self._disk.open(file.path, create=False, direct=False)
            try:
                self._all(self._disk.write, handle, [memoryview(behind)], file.data_bytes, file.path)
            finally:
                self._disk.close(handle)
        except OSError as error:
            raise translate(error, file.path, "write") from error

    def close(self) -> None:
        """Close all handles and give the budget back. No job may be running."""
        self._handles.close()
        for file in self.files:
            self.published(file)
        self._accountant.release("ssd", sum(max(f.live, f.kept) * f.price for f in self.files))
        self.files, self._by_name = [], {}

    def remove(self, path: str) -> None:
        """Remove a forgotten file. Blocks; a failure leaves the file, which the next opening of the store collects."""
        with contextlib.suppress(OSError):
            self._handles.close(path)
            self._disk.remove(path)

    def _drop(self, number: int) -> str | None:
        file = self.files[number]
        file.live -= 1
        assert file.live >= 0, f"{file.path}: more blocks dropped than placed"
        if file.kept:
            return None
        self._accountant.release("ssd", file.price)
        if file.live or not file.ours:
            return None
        self._by_name.pop((file.stream, file.segment, file.layer), None)
        self.published(file)
        return file.path

    def _split(
        self, numbers: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], addresses: Addresses
    ) -> list[list[Run]]:
        """Neighbours joined into runs, runs dealt out to at most ``threads`` jobs of about equal bytes."""
        if not len(numbers):
            return []
        share = max(-(-len(numbers) // self._threads), SMALL_JOB // self.files[numbers[0]].stride)
        jobs: list[list[Run]] = []
        filled = share
        for i in np.lexsort((offsets, numbers)).tolist():
            file, offset = self.files[numbers[i]], int(offsets[i])
            if filled >= share:
                jobs.append([])
                filled = 0
            run = jobs[-1][-1] if jobs[-1] else None
            if (
                run is None
                or run.file is not file
                or offset != run.offset + run.nbytes
                or len(run.addresses) == MOST_EXTENTS
            ):
                run = Run(file, offset)
                jobs[-1].append(run)
            run.addresses.append(int(addresses[i]))
            run.members.append(i)
            filled += 1
        return jobs

    def _write(self, runs: list[Run]) -> tuple[list[int], Digests]:
        members: list[int] = []
        digests: list[Digests] = []
        for run in runs:
            pages = digest.pages_at(np.array(run.addresses), run.file.shape.nbytes)
            digests.append(digest.of_pages(pages))
            members += run.members
            _clear_padding(run)
            self._move(self._disk.write, run, "write")
            run.file.pages[run.blocks], run.file.known[run.blocks] = pages, True
        return members, np.concatenate(digests)

    def _read(self, runs: list[Run], digests: Digests) -> None:
        small = len(runs) > 1 and sum(run.nbytes for run in runs) <= SMALL_RUN * len(runs)
        if small and len({run.file.stride for run in runs}) == 1:
            self._read_small(runs)
            for _, of_file in itertools.groupby(runs, lambda run: id(run.file)):
                self._check(list(of_file), digests)
            return
        for run in runs:
            self._move(self._disk.read, run, "read")
            self._check([run], digests)  # now, while the processor has it at hand

    def _read_small(self, runs: list[Run]) -> None:
        """Runs of blocks of one size, handed to the system all at once: one at a time, Python is what takes time."""
        ends = np.cumsum([0, *(len(run.addresses) for run in runs)])
        addresses = np.array([address for run in runs for address in run.addresses])
        offsets = np.array([run.offset for run in runs])
        with self._opened([run.file for run in runs], offsets) as handles:
            done = self._disk.read_pages(handles, offsets, ends, addresses, runs[0].file.stride, self.queue.usual)
        for run, got in zip(runs, done.tolist(), strict=True):
            if got < 0:
                raise self._failed(OSError(-got, os.strerror(-got)), run.file, run.blocks, "read")
            if got < run.nbytes:
                self._move(self._disk.read, run, "read")

    @contextlib.contextmanager
    def _opened(self, files: Sequence[SegmentFile], offsets: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int32]]:
        """Handles, int32 [n], of files that are to be read at ``offsets``. Raises StoreError."""
        found: dict[str, int] = {}
        with contextlib.ExitStack() as stack:
            for file, offset in zip(files, offsets.tolist(), strict=True):
                if file.path not in found:
                    try:
                        found[file.path] = stack.enter_context(self._handles.use(file.path, create=False))
                    except OSError as error:
                        blocks = np.array([min(offset // file.stride, file.offsets.size - 1)])
                        raise self._failed(error, file, blocks, "read") from error
            yield np.array([found[file.path] for file in files], np.int32)

    def _check(self, runs: list[Run], digests: Digests) -> None:
        """Compare blocks of one file with their digests. Raises StoreCorrupt."""
        file = runs[0].file
        blocks = np.concatenate([run.blocks for run in runs])
        pages = digest.pages_at(np.array([a for run in runs for a in run.addresses]), file.shape.nbytes)
        wanted = digests[[member for run in runs for member in run.members]]
        if (wrong := digest.of_pages(pages) != wanted).any():
            raise self._corrupt(file, blocks[wrong], "are damaged (wrong digest)")
        with self._learning:
            file.pages[blocks], file.known[blocks] = pages, True

    def _move(self, move: "Callable[[int, list[memoryview], int], int]", run: Run, doing: str) -> None:
        """Read or write all of a run."""
        buffers = [memory(address, run.file.stride) for address in run.addresses]
        try:
            with self._handles.use(run.file.path, create=doing == "write") as handle:
                self._all(move, handle, buffers, run.offset, run.file.path)
        except OSError as error:
            raise self._failed(error, run.file, run.blocks, doing) from error

    def page_jobs(
        self, numbers: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], addresses: Addresses, digests: Digests
    ) -> list[Callable[[], None]]:
        """Jobs that read pages of blocks into ``addresses`` and check them. They raise StoreError.

        offsets: int64 [n], of the pages in their files, multiples of PAGE. digests: of the blocks they are of.
        """
        order = np.lexsort((offsets, numbers))
        share = max(LEAST_PAGES, -(-len(order) // self._threads))
        pieces = [order[i : i + share] for i in range(0, len(order), share)]
        batch = self.queue.batch(len(pieces), share)
        return [
            partial(self._read_pages, batch, numbers[some], offsets[some], addresses[some], digests[some])
            for some in pieces
        ]

    def _read_pages(
        self,
        batch: Batch,
        numbers: npt.NDArray[np.int32],
        offsets: npt.NDArray[np.int64],
        addresses: Addresses,
        digests: Digests,
    ) -> None:
        """Neighbours are one read. What comes short or fails is read again as blocks are, which says why.

        What the files say of their pages, where nobody asked before, comes along.
        """
        joined = (numbers[1:] == numbers[:-1]) & (offsets[1:] == offsets[:-1] + PAGE)
        joined[MOST_EXTENTS - 1 :: MOST_EXTENTS] = False
        first = np.flatnonzero(np.append(True, ~joined))
        ends = np.append(first, len(numbers))
        files = [self.files[number] for number in numbers[first].tolist()]
        asked = Asked([file for n in np.unique(numbers).tolist() if not (file := self.files[n]).told])
        with self._opened([*files, *asked.files], np.append(offsets[first], asked.offsets)) as handles:
            with batch.reading() as reads:
                done = self._disk.read_pages(
                    handles,
                    np.append(offsets[first], asked.offsets),
                    np.append(ends, ends[-1] + asked.ends[1:]),
                    np.append(addresses, asked.addresses),
                    PAGE,
                    batch.depth,
                )[: len(first)]
                reads.n, reads.whole = len(first), bool((done == np.diff(ends) * PAGE).all())
            for i in np.flatnonzero(done != np.diff(ends) * PAGE).tolist():
                file = files[i]
                buffers = [memory(address, PAGE) for address in addresses[ends[i] : ends[i + 1]].tolist()]
                try:
                    self._all(self._disk.read, int(handles[i]), buffers, int(offsets[first[i]]), file.path)
                except OSError as error:
                    blocks = offsets[ends[i] : ends[i + 1]] // file.stride
                    raise self._failed(error, file, blocks, "read") from error
        self._hear(asked)
        self._learn(numbers, offsets, digests)
        self._check_pages(numbers, offsets, addresses)

    def _learn(self, numbers: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], digests: Digests) -> None:
        """Have digests of the pages of the blocks at ``offsets``: what their files said of them, if it hashes to the
        blocks' own ``digests``; else read these blocks whole. Raises StoreError.
        """
        for number in np.unique(numbers).tolist():
            file, mine = self.files[number], numbers == number
            at = offsets[mine] // file.stride
            new = ~file.known[at]
            if not new.any():
                continue
            blocks, where = np.unique(at[new], return_index=True)
            wanted = digests[mine][new][where]
            fine = digest.of_pages(file.pages[blocks]) == wanted
            file.known[blocks[fine]] = True
            for block, one in zip(blocks[~fine].tolist(), wanted[~fine], strict=True):
                room = aligned(file.stride)
                run = Run(file, block * file.stride, [room.ctypes.data], [0])
                self._move(self._disk.read, run, "read")
                self._check([run], np.array([one], np.uint64))
                with self._learning:
                    self._learned += file.stride

    def learned(self) -> int:
        """Bytes read since the last call to know digests of pages, beside the pages."""
        with self._learning:
            learned, self._learned = self._learned, 0
        return learned

    def _hear(self, asked: Asked) -> None:
        """Note what files say of their pages. What could not be read says nothing: blocks are read whole then."""
        for file, told in zip(asked.files, asked.answers(), strict=True):
            with self._learning:
                self._learned += round_up(digests_bytes(file.pages.shape), PAGE)
                if not file.told:
                    file.pages[~file.known] = told[~file.known]
                    file.told = True

    def _check_pages(
        self, numbers: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], addresses: Addresses
    ) -> None:
        for number in np.unique(numbers).tolist():
            file, mine = self.files[number], numbers == number
            block, page = np.divmod(offsets[mine], file.stride)
            page //= PAGE
            whole = (page + 1) * PAGE <= file.shape.nbytes
            want, at = file.pages[block, page], addresses[mine]
            fine = np.empty(len(page), bool)
            fine[whole] = digest.pages_at(at[whole], PAGE)[:, 0] == want[whole]
            if not whole.all():
                last = file.shape.nbytes % PAGE
                fine[~whole] = digest.pages_at(at[~whole], last)[:, 0] == want[~whole]
            if not fine.all():
                raise self._corrupt(file, block[~fine], "are damaged (wrong digest)")

    def _failed(self, error: OSError, file: SegmentFile, blocks: npt.NDArray[np.int64], doing: str) -> StoreError:
        """The error for blocks of a file that could not be read or written."""
        reason = translate(error, file.path, doing)
        if doing == "read" and isinstance(reason, StoreCorrupt):
            return self._corrupt(file, blocks, f"are not there ({reason.strerror})")
        return reason

    def _corrupt(self, file: SegmentFile, blocks: npt.NDArray[np.int64], what: str) -> StoreCorrupt:
        """The error for blocks of a file, which are noted as damaged."""
        heads, runs = (numbers.tolist() for numbers in np.divmod(np.unique(blocks), file.blocks))
        self.damaged.update((file.path, run) for run in runs)
        error = StoreCorrupt(
            errno.EIO,
            f"blocks of layer {file.layer} {what} and were not used: block {runs[0]} of head {heads[0]}"
            + (f" and {len(runs) - 1} more" if len(runs) > 1 else ""),
            file.path,
        )
        error.layer, error.head, error.block = file.layer, heads[0], runs[0]
        return error

    def _all(
        self,
        operation: Callable[[int, list[memoryview], int], int],
        handle: int,
        buffers: list[memoryview],
        offset: int,
        path: str,
    ) -> None:
        """Repeat a vectored read or write until all is done: both may be short."""
        left = list(buffers)
        while left:
            done = operation(handle, left, offset)
            if done <= 0:
                raise StoreCorrupt(errno.EIO, "the file ends before the block does and was not used", path)
            offset += done
            while left and done >= len(left[0]):
                done -= len(left.pop(0))
            if done:
                left[0] = left[0][done:]
