"""Single pages of cold blocks for one attention, and what the next layer may want of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import numpy.typing as npt

from alaya_tiers.blocks import PAGE
from alaya_tiers.engine import Engine
from alaya_tiers.layer import Layer, Row
from alaya_tiers.ledger import Ids
from alaya_tiers.pages import Pages, Taken
from alaya_tiers.policies import SOURCES, GuessView

Columns = npt.NDArray[np.intp]


class Picks:
    """Pages of blocks, pinned from ``start`` to ``close``."""

    def __init__(self, engine: Engine, pages: Pages, taken: Taken, blocks: Ids) -> None:
        self._engine, self._pages, self._taken, self._blocks = engine, pages, taken, blocks

    @classmethod
    def start(cls, engine: Engine, names: Ids) -> Picks | None:
        """Have pages here or on their way; None when their blocks had better be read whole. Raises SessionClosed.

        names: int64 [n], ascending, all different, of pages of blocks that somebody holds.
        """
        pages, mover = engine.pages, engine.mover
        if pages is None or not names.size:
            return None
        blocks = np.unique(names // pages.per)
        with mover.lock:
            mover.hold()
            if not mover.pageable(blocks).all():
                return None
            mover.ledger.pin(blocks)
            taken = pages.take(names)
            if taken is None:
                mover.give_back(mover.ledger.unpin(blocks))
                return None
        late = taken.late * PAGE
        engine.touched.waited += late
        engine.touched.host += names.size * PAGE - late
        return cls(engine, pages, taken, blocks)

    def __iter__(self) -> Iterator[tuple[Columns, npt.NDArray[np.int64]]]:
        """What is here, then what was read: (which of the names, where they lie). Raises StoreError."""
        taken = self._taken
        if taken.here.any():
            columns = np.flatnonzero(taken.here)
            yield columns, self._pages.addresses(taken.slots[columns])
        if not taken.here.all():
            for future in taken.reading:
                self._engine.wait_for(future)
            columns = np.flatnonzero(~taken.here)
            yield columns, self._pages.addresses(taken.slots[columns])

    def close(self) -> None:
        """Let go of all; reads that are under way are waited for."""
        for future in self._taken.reading:
            future.exception()
        mover = self._engine.mover
        with mover.lock:
            self._pages.give(self._taken)
            mover.give_back(mover.ledger.unpin(self._blocks))
            wake = mover.waited_for
        if wake:
            self._engine.notify()


def _by_page(state: Layer) -> bool:
    """Whether blocks of the layer can be picked from: there is room for pages, and rows do not straddle them."""
    pages = state.engine.pages
    return pages is not None and pages.room > 0 and PAGE % state.shape.geometry.row_bytes == 0


def pageable(state: Layer, blocks: Ids) -> npt.NDArray[np.bool_]:
    """Which blocks can be picked from page by page: cold ones. bool [n]."""
    engine = state.engine
    if not _by_page(state):
        return np.zeros(blocks.size, bool)
    with engine.mover.lock:
        return engine.mover.pageable(blocks)


def missed_share(state: Layer) -> float | None:
    """Of the pages wanted lately, how many had to be read; None where no block of the layer is read by pages."""
    pages = state.engine.pages
    return pages.missed if pages is not None and _by_page(state) else None


def ahead(before: Row, state: Layer, row: Row, query: Callable[[], Ids]) -> None:
    """Tell what layer ``state`` may want next: it comes after the one that picked ``before.picked``.

    query: what that one's query finds, should the policy want to know; called on the loop, without the lock.
    """
    engine = state.engine
    pages = engine.pages
    if pages is None or not row.runs or before.picked is None or not (sources := pages.sources()):
        return
    here, last = before.picked, row.picked

    def suggest() -> None:
        found = query() if "query" in sources and not engine.closed else np.empty(0, np.int64)
        pages.suggest(partial(view_of, pages, engine, sources, state, row, here, last, found))

    engine.on_loop(suggest)


def view_of(
    pages: Pages,
    engine: Engine,
    sources: tuple[str, ...],
    state: Layer,
    row: Row,
    here: Ids,
    last: Ids | None,
    query: Ids,
) -> GuessView:
    """What suggests itself. here: what the layer before picked in this step; last: this layer, in its last; query: what
    the query of the layer before finds here.
    """
    none, per, book = np.empty(0, np.int64), pages.per, engine.mover.ledger
    found, known = dict.fromkeys(SOURCES, none), none if last is None else last
    last_page = state.shape.nbytes // PAGE - 1
    if "last" in sources:
        found["last"] = pages.absent(known)
    if "beside" in sources:
        around = np.concatenate([known[known % per < last_page] + 1, known[known % per > 0] - 1])
        found["beside"] = pages.absent(np.unique(around))
    if "across" in sources:
        blocks, page = np.divmod(here, per)
        run = book.start[blocks] // state.shape.tokens
        fits = (run < row.runs) & (page <= last_page) & (book.head[blocks] < state.shape.geometry.kv_heads)
        same = (row.first[run[fits]] + book.head[blocks[fits]]) * per + page[fits]
        found["across"] = pages.absent(np.unique(same))
    if "hot" in sources:
        found["hot"] = pages.absent(pages.of_blocks(np.unique(known // per)))
    if "query" in sources:
        found["query"] = pages.absent(query)
    return GuessView(**found, precision=pages.precision, room=pages.room_ahead)
