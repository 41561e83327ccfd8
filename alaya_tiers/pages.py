"""Pages of cold blocks in host memory: what sparse attention picks out of them, a page at a time.

    block on ssd    | page | page | page | ... | page |       PAGE bytes each, some tokens of one kv head
    frame           a slot of the host tier, cut into pages: any page of any block lies in any of them

A token wanted from a cold block costs one page, not its block. Pages stay while the eviction policy keeps them, and go
when the host tier needs its slots for whole blocks. What a layer is likely to want next is read ahead, when nobody
waits for a read. The caller of a method that says so holds the mover's lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from alaya_tiers.blocks import PAGE
from alaya_tiers.errors import AlayaError, SessionClosed
from alaya_tiers.fading import HALF_LIFE, Fading
from alaya_tiers.ledger import Ids
from alaya_tiers.mover import Mover
from alaya_tiers.policies import SOURCES, EvictionPolicy, EvictionView, Guess, GuessPolicy, GuessView
from alaya_tiers.seams import Clock
from alaya_tiers.stats import PageUse

Slots = npt.NDArray[np.int64]
"""Places of pages, in frames."""

Submit = Callable[[Coroutine[Any, Any, None]], "Future[None]"]
"""Starts a coroutine on the loop, from any thread."""

NOWHERE = -1

SPARE = 16
"""One page in so many is evicted at a time: the order is worth finding only for many."""

GUESS_PAGES = 256
"""Pages read ahead at a time: what a read that somebody waits for may have to wait for."""

LATELY = 64
"""Attentions over which the share of missing pages is averaged."""

KNOWN = 64
"""Guesses of a source after which its precision is believed."""


@dataclass(slots=True)
class Taken:
    """Pages that stay until they are given back. slots: of each. here: bool, which can be read now; the others when all
    of ``reading`` have ended, which may raise StoreError. late: how many nobody had asked for before.
    """

    pages: Ids
    slots: Slots
    here: npt.NDArray[np.bool_]
    reading: list[Future[None]]
    late: int


class Pages:
    """The pool. share: of the host tier's slots that pages may take; ahead: of these, what reading ahead may fill."""

    def __init__(
        self,
        mover: Mover,
        eviction: EvictionPolicy,
        guess: GuessPolicy,
        share: float,
        ahead: float,
        clock: Clock,
        submit: Submit,
    ) -> None:
        self._mover, self._eviction, self.guess, self._clock, self._submit = mover, eviction, guess, clock, submit
        self.per = mover.host.slot_bytes // PAGE
        """Pages of a frame, and names of a block's pages."""
        frames = int(share * mover.host.capacity)
        n = frames * self.per
        self._ahead_room = int(ahead * n)
        self._frames = np.full(frames, NOWHERE, np.int32)  # host slot of each
        self._base = np.zeros(frames, np.int64)  # where it lies
        self._free, self._n_free = np.zeros(n, np.int64), 0  # a stack of slots
        self._coming, self._pins = np.zeros(n, bool), np.zeros(n, np.int32)
        self._page = np.full(n, NOWHERE, np.int64)  # block id x per + number
        self._used, self._uses = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self._came = np.zeros(n)
        self._source = np.zeros(n, np.int8)  # of a guess nobody has wanted yet: 1 + its place in SOURCES
        self._unproved = 0  # how many of these
        self._returned = np.zeros(n, bool)
        self._slot = np.empty(0, np.int32)  # of each page of each block, by name
        self._heat = np.empty(0, np.float32)  # the same: uses, fading
        self._fading = Fading()
        self._batches: dict[int, Future[None]] = {}
        self._batch = np.zeros(n, np.int64)
        self._next_batch = self._turn = 0
        self._waiting = 0
        self._guesses: list[Guess] = []
        self._guessing: asyncio.Task[None] | None = None
        self.missed = 1.0
        """Share of the pages wanted lately that were not here."""
        self.use = PageUse()
        mover.pages = self

    # ------------------------------------------------------------------ what attention wants
    def take(self, pages: Ids) -> Taken | None:
        """Have pages of pinned blocks here or on their way; None when there is no room. The lock is held.

        pages: int64 [n], all different.
        """
        self._reach(pages)
        slots = self._slot[pages].astype(np.int64)
        known = slots >= 0
        self._pins[slots[known]] += 1
        missing = pages[~known]
        found = self._room(missing.size)
        if found is None:
            self._let_go(slots[known])
            return None
        slots[~known] = found
        self._settle(found, missing)
        self._pins[found] += 1
        here = ~self._coming[slots]
        self._count(slots, missing.size, here)
        if missing.size:
            self._start(missing, found)
        reading = [self._batches[b] for b in np.unique(self._batch[slots[~here]]).tolist()]
        return Taken(pages, slots, here, reading, missing.size)

    def addresses(self, slots: Slots) -> npt.NDArray[np.int64]:
        """Where pages lie, int64 [n]."""
        frame, page = np.divmod(slots, self.per)
        return np.asarray(self._base[frame] + page * PAGE)

    def give(self, taken: Taken) -> None:
        """The pages are read no longer. The lock is held."""
        self._uses[taken.slots] += 1
        self._used[taken.slots] = self._mover.ledger.tick
        layers = max(1, len(self._mover.shapes))
        self._heat[taken.pages] += self._fading.worth(self._heat, self._mover.ledger.tick, HALF_LIFE * layers)
        self._let_go(taken.slots)

    # ------------------------------------------------------------------ what others want
    def forget(self, blocks: Ids) -> None:
        """Blocks are dead, and their pages with them. The lock is held."""
        names = (blocks[:, None] * self.per + np.arange(self.per)).ravel()
        names = names[names < self._slot.size]
        slots = self._slot[names].astype(np.int64)
        self._drop(slots[slots >= 0])
        self._heat[names] = 0

    def shrink(self, n: int) -> None:
        """Give up to ``n`` host slots back, those whose pages were wanted least lately. The lock is held."""
        held = np.flatnonzero(self._frames >= 0)
        busy = (self._pins > 0) | self._coming
        held = held[~busy.reshape(-1, self.per)[held].any(1)]
        last = np.where(self._page >= 0, self._used, -1).reshape(-1, self.per)[held].max(1, initial=-1)
        gone = held[np.argsort(last, kind="stable")][:n]
        if not gone.size:
            return
        slots = (gone[:, None] * self.per + np.arange(self.per)).ravel()
        self._drop(slots[self._page[slots] >= 0])
        free = self._free[: self._n_free]
        free = free[~np.isin(free // self.per, gone)]
        self._n_free = free.size
        self._free[: free.size] = free
        self._mover.host.give(self._frames[gone])
        self._frames[gone] = NOWHERE

    # ------------------------------------------------------------------ ahead
    def sources(self) -> tuple[str, ...]:
        """What the policy wants to know now, to decide what to read ahead; nothing where it wants to read nothing."""
        self._turn += 1
        return self.guess.sources(self.precision, self._turn - 1) if self.room_ahead else ()

    @property
    def precision(self) -> dict[str, float]:
        """Share of the guesses of each source that came true, of those that made some."""
        return {name: share for name, share in self.use.precision.items() if self.use.guessed[name] >= KNOWN}

    def suggest(self, view: Callable[[], GuessView]) -> None:
        """Read ahead what the policy makes of what a layer may want next. On the loop only."""
        if self._mover.closing:
            return
        with self._mover.lock:
            self._guesses = [guess for guess in self.guess.plan(view()) if guess.pages.size]
        if self._guessing is None and self._guesses:
            self._guessing = asyncio.get_running_loop().create_task(self._read_guesses())

    async def idle(self) -> None:
        """Until nothing is read ahead."""
        while (task := self._guessing) is not None:
            await asyncio.wait([task])

    def absent(self, pages: Ids) -> Ids:
        """Those that would have to be read from ssd, the hottest first. The lock is held."""
        self._reach(pages)
        pages = pages[self._slot[pages] < 0]
        pages = pages[self._mover.pageable(pages // self.per) & (self._mover.ledger.refs[pages // self.per] > 0)]
        return pages[np.argsort(-self._heat[pages], kind="stable")]

    def of_blocks(self, blocks: Ids) -> Ids:
        """All pages of some blocks that were wanted of late. The lock is held."""
        names = (blocks[:, None] * self.per + np.arange(self.per)).ravel()
        self._reach(names)
        return np.asarray(names[self._heat[names] > 0])

    @property
    def room(self) -> int:
        """How many pages it may hold."""
        return self._page.size

    @property
    def room_ahead(self) -> int:
        """How many pages may be read ahead now."""
        return max(0, self._ahead_room - self._unproved)

    # ------------------------------------------------------------------ inside
    def _start(self, pages: Ids, slots: Slots) -> Future[None]:
        batch, self._next_batch = self._next_batch, self._next_batch + 1
        self._batch[slots] = batch
        self._batches[batch] = future = self._submit(self._read(pages, slots, batch))
        return future

    async def _read(self, pages: Ids, slots: Slots, batch: int) -> None:
        mover, book = self._mover, self._mover.ledger
        blocks, numbers = np.divmod(pages, self.per)
        errors: list[BaseException] = []
        with mover.working():
            try:
                with mover.lock:
                    at = book.offset[blocks] + numbers * PAGE
                    jobs = mover.ssd.page_jobs(book.file[blocks], at, self.addresses(slots), book.digest[blocks])
                errors = await mover.run_reads(jobs)
            except BaseException as error:
                errors.append(error)
                raise
            finally:
                with mover.lock:
                    self._batches.pop(batch, None)
                    self._coming[slots], self._came[slots] = False, self._clock.monotonic()
                    mover.traffic.read_bytes += mover.ssd.learned()
                    if errors:
                        self._orphan(slots)
                    else:
                        mover.traffic.read_bytes += pages.size * PAGE
                        mover.traffic.reads += len(jobs)
                mover.changed()
        if errors:
            raise errors[0]

    async def _read_guesses(self) -> None:
        """Batch by batch while nobody waits; a block stays as long as a page of it is under way."""
        mover = self._mover
        try:
            with mover.working():
                while self._guesses and not self._batches and not mover.closing:
                    guess = self._guesses.pop(0)
                    if guess.pages.size > GUESS_PAGES:
                        self._guesses.insert(0, Guess(guess.source, guess.pages[GUESS_PAGES:]))
                    with mover.lock:
                        some = self.absent(guess.pages[:GUESS_PAGES])[: self.room_ahead]
                        slots = self._room(some.size) if some.size else None
                        if slots is None:
                            continue
                        blocks = np.unique(some // self.per)
                        mover.ledger.pin(blocks)
                        self._settle(slots, some)
                        self._source[slots] = 1 + SOURCES.index(guess.source)
                        self._unproved += some.size
                        self.use.guessed[guess.source] = self.use.guessed.get(guess.source, 0) + some.size
                        mover.traffic.read_ahead_bytes += some.size * PAGE
                        try:
                            future = self._start(some, slots)
                        except SessionClosed:  # the loop takes no more work: the cache is about to close
                            mover.give_back(mover.ledger.unpin(blocks))
                            self._coming[slots] = False
                            self._orphan(slots)
                            return
                    try:
                        await asyncio.wrap_future(future)
                    except AlayaError:
                        return  # whoever really needs the page will meet the error
                    finally:
                        with mover.lock:
                            mover.give_back(mover.ledger.unpin(blocks))
        finally:
            self._guessing = None

    def _reach(self, pages: Ids) -> None:
        """Have entries for these names."""
        most = int(pages.max(initial=-1)) + 1
        if most > self._slot.size:
            grow = max(most, 2 * self._slot.size) - self._slot.size
            self._slot = np.append(self._slot, np.full(grow, NOWHERE, np.int32))
            self._heat = np.append(self._heat, np.zeros(grow, np.float32))

    def _settle(self, slots: Slots, pages: Ids) -> None:
        """Slots belong to pages from here on, which are coming."""
        self._slot[pages], self._page[slots] = slots, pages
        self._coming[slots], self._source[slots] = True, 0
        self._uses[slots], self._used[slots] = 0, self._mover.ledger.tick
        self._returned[slots] = self._heat[pages] > 0
        self._mover.ledger.paged[pages // self.per] = True

    def _count(self, slots: Slots, missing: int, here: npt.NDArray[np.bool_]) -> None:
        """Note what was wanted, and which guesses came true."""
        use, source = self.use, self._source[slots]
        use.wanted += slots.size
        use.missed += missing
        self.missed += (missing / max(1, slots.size) - self.missed) / LATELY
        for i, n in enumerate(np.bincount(source, minlength=1 + len(SOURCES))[1:].tolist()):
            if n:
                use.used[SOURCES[i]] = use.used.get(SOURCES[i], 0) + n
        ready = slots[(source > 0) & here]
        use.lead_seconds += float((self._clock.monotonic() - self._came[ready]).sum())
        use.in_time += ready.size
        self._unproved -= int(np.count_nonzero(source))
        self._source[slots] = 0

    def _room(self, n: int) -> Slots | None:
        """``n`` free slots: there already, of new frames, of evicted pages; None when there are not enough."""
        if self._n_free < n:
            self._grow(-(-(n - self._n_free) // self.per))
        if self._n_free < n:
            self._evict(max(n - self._n_free, self._page.size // SPARE))
        if self._n_free < n:
            return None
        self._n_free -= n
        return self._free[self._n_free : self._n_free + n].copy()

    def _grow(self, n: int) -> None:
        """Up to ``n`` more frames, of host slots that are free or hold clean blocks: a page is worth more than as much
        of a whole block, of which few tokens are wanted.
        """
        mover, new = self._mover, np.flatnonzero(self._frames < 0)[:n]
        n = min(new.size, mover.spare_host()) if new.size else 0
        slots = mover.try_host(n, lambda ids: ids) if n else None
        if slots is None:
            return
        new = new[:n]
        self._frames[new], self._base[new] = slots, mover.host.addresses(slots)
        self._push((new[:, None] * self.per + np.arange(self.per)).ravel())

    def _evict(self, n: int) -> None:
        slots = np.flatnonzero((self._page >= 0) & ~self._coming & (self._pins == 0))
        pages, book = self._page[slots], self._mover.ledger
        blocks, number = np.divmod(pages, self.per)
        view = EvictionView(
            slots, book.layer[blocks], book.start[blocks] + number, self._used[slots], book.cursor, book.pass_tick,
            len(self._mover.shapes), self._uses[slots], self._heat[pages].astype(np.float64), self._returned[slots],
            np.full(slots.size, PAGE),
        )  # fmt: skip
        victims = self._eviction.victims(view, n)
        self.use.evicted += victims.size
        self._drop(victims)

    def _drop(self, slots: Slots) -> None:
        """Pages that nobody reads leave."""
        assert not (self._coming[slots] | (self._pins[slots] > 0)).any(), "a page was dropped that is in use"
        self.use.wasted += int(np.count_nonzero(self._source[slots]))
        self._orphan(slots)

    def _orphan(self, slots: Slots) -> None:
        """These slots belong to no page any more; they are free as soon as nobody holds them."""
        self._slot[self._page[slots]] = NOWHERE
        self._page[slots] = NOWHERE
        self._unproved -= int(np.count_nonzero(self._source[slots]))
        self._source[slots] = 0
        self._push(slots[self._pins[slots] == 0])

    def _let_go(self, slots: Slots) -> None:
        self._pins[slots] -= 1
        assert (self._pins[slots] >= 0).all(), "a page was given back more often than taken"
        self._push(slots[(self._pins[slots] == 0) & (self._page[slots] < 0)])

    def _push(self, slots: Slots) -> None:
        self._free[self._n_free : self._n_free + slots.size] = slots
        self._n_free += slots.size
