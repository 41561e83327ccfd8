"""What attention does in a replay: look, find, read blocks and single pages, read ahead. In virtual time.

What is read, from where, and what leaves for it is decided by the engine's own mover, pool of pages, guesses and
optimizer; seconds are reckoned from a machine's profile.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from alaya_tiers.blocks import PAGE, BlockShape, Geometry
from alaya_tiers.cache import FEW_ROWS
from alaya_tiers.config import Settings
from alaya_tiers.engine import LOADS_AHEAD
from alaya_tiers.errors import ConfigError
from alaya_tiers.index.plan import Limit, Rates, Step
from alaya_tiers.ledger import Ids
from alaya_tiers.mover import Mover
from alaya_tiers.pages import Pages, Taken
from alaya_tiers.picks import view_of
from alaya_tiers.policies import EVICTION, GUESS, UNSEEN, by_name
from alaya_tiers.tools.events import Found, Positions, Read
from alaya_tiers.tools.phases import Part, Phase
from alaya_tiers.tools.profile import Profile
from alaya_tiers.tools.shapes import Shape
from alaya_tiers.tools.virtual import VirtualLoop

DTYPES = {"torch.float32": "float32", "torch.bfloat16": "bfloat16", "torch.float16": "bfloat16"}

Seconds = Callable[[int], float]
"""Of attending to so many blocks."""


def nothing(blocks: int) -> float:
    """What was reckoned elsewhere."""
    return 0.0


@dataclass(frozen=True, slots=True)
class Clock:
    """Of the simulation."""

    loop: VirtualLoop

    def monotonic(self) -> float:
        """Seconds."""
        return self.loop.now


def all_ids(first: list[int], heads: int) -> Ids:
    """Ids of runs, [kv_heads, runs]."""
    return np.array(first, np.int64)[None] + np.arange(heads)[:, None]


class Attending:
    """Attention over one mover's blocks. shape: of the model, None where it is not known; phase: what counts now."""

    def __init__(
        self, mover: Mover, settings: Settings, profile: Profile, loop: VirtualLoop, shape: Shape | None
    ) -> None:
        self.mover, self.settings, self.profile, self.loop, self._shape = mover, settings, profile, loop, shape
        self.phase = Phase("start")
        self.pages: Pages | None = None
        if settings.mode == "sparse" and settings.page_share:
            if settings.guess in UNSEEN:
                raise ConfigError(f"guess={settings.guess} cannot be replayed: a trace has no queries; choose another")
            submit: Any = loop.create_task
            eviction, guess = by_name(EVICTION, settings.eviction_of_pages), by_name(GUESS, settings.guess)
            share, ahead = settings.page_share, settings.prefetch_share
            self.pages = Pages(mover, eviction, guess, share, ahead, Clock(loop), submit)

    async def read(self, part: Part, read: Read, mine: list[Part]) -> None:
        """One attention of a layer. mine: all layers of the session, in order."""
        mover, shape = self.mover, self.mover.shapes[part.layer]
        mover.ledger.begin_pass(part.layer)
        await asyncio.sleep(self.model_seconds(read.queries))
        rows = read.heads // part.heads * read.queries
        if self.settings.mode == "exact" or not read.found:
            upcoming = (part, mine) if self.settings.mode == "exact" else None
            await self.reading(all_ids(part.first, part.heads), upcoming, self._dense(shape, rows))
            return
        for found in read.found:
            await self._sparse(part, found, shape, rows)
            self.phase.mass += found.mass
            self.phase.sparse_reads += 1
        if self.pages is not None:
            self._guess(self.pages, part, mine[(mine.index(part) + 1) % len(mine)])

    # ------------------------------------------------------------------ sparse
    async def _sparse(self, part: Part, found: Found, shape: BlockShape, rows: int) -> None:
        s, size = self.settings, shape.tokens
        first, last = -(-s.sink_tokens // size), max(0, part.tokens - s.recent_tokens) // size
        runs = np.arange(part.runs)
        middle = (runs >= first) & (runs < last)
        ids, dense = all_ids(part.first, part.heads), self._dense(shape, rows)
        looked, step = self._plan(part, shape, middle)
        dear = np.zeros(part.heads, bool)
        if looked.size:
            await self.reading(ids[np.ix_(looked, np.flatnonzero(~middle))], None, dense)
            dear[looked] = await self._look(part, found, looked, step, middle, shape)
        dear[np.setdiff1d(np.arange(part.heads), looked)] = True
        if dear.any():
            await self.reading(ids[dear], None, dense)

    def _plan(self, part: Part, shape: BlockShape, middle: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.intp], Step]:
        """Which heads look, as the engine's optimizer has it with these tiers, and what that would touch."""
        g, size = shape.geometry, shape.tokens
        inner = np.array(part.first, np.int64)[middle]
        window = float(part.tokens - inner.size * size) * g.row_bytes
        cold = 1 - float(self.mover.ledger.readable(inner).mean()) if inner.size else 0.0
        paged = self.pages is not None and PAGE % g.row_bytes == 0
        step = Step(
            part.tokens * float(g.row_bytes), window, float(inner.size * size * g.k_dim), g.row_bytes,
            shape.nbytes, inner.size, cold, self.pages.missed if paged and self.pages is not None else None,
        )  # fmt: skip
        limit = Limit.of(self.settings, len(self.mover.shapes))
        choice = part.history.plan(step, Rates.believed(self.settings, part.heads), limit)
        return np.flatnonzero(choice.look), step

    async def _look(
        self,
        part: Part,
        found: Found,
        looked: npt.NDArray[np.intp],
        step: Step,
        middle: npt.NDArray[np.bool_],
        shape: BlockShape,
    ) -> npt.NDArray[np.bool_]:
        """Every scan of these heads; which of them had better read everything. bool [looked].

        A head that read everything when the run was recorded does so here: what it would find is not known.
        """
        sizes, dear = np.full(part.heads, float(part.tokens)), np.zeros(part.heads, bool)
        going, unknown, rates = set(looked.tolist()), set(found.flat), Rates.believed(self.settings, part.heads)
        for number, look in enumerate(found.looks):
            here = going.intersection(look.heads)
            numbers = step.codes * (len(here) if number else looked.size)
            seconds = numbers / self.profile.scan * 8 / max(8, self.settings.index_bits)
            await asyncio.sleep(self.profile.look + seconds)
            await self._pick(part, look.heads, look.best, going, middle, shape)
            for head, some in zip(look.heads, look.positions, strict=True):
                sizes[head] = some.size if some.size or head not in unknown else part.tokens
            mine = np.array(sorted(here), np.intp)
            dear[mine] = step.dear(sizes[mine], rates) & (not part.history.choice.bound)
            going -= set(mine[dear[mine]].tolist())
            await self._pick(part, look.heads, look.positions, going, middle, shape, note=True)
        dear[list(unknown)] = True
        part.history.judge(sizes[looked], dear[looked], step, rates)
        return dear[looked]

    async def _pick(
        self,
        part: Part,
        heads: tuple[int, ...],
        positions: tuple[Positions, ...],
        among: set[int],
        middle: npt.NDArray[np.bool_],
        shape: BlockShape,
        *,
        note: bool = False,
    ) -> None:
        """What ``listed.located`` does with the keys of those heads that are ``among`` others: single pages of cold
        blocks where that can be, whole blocks where not."""
        geometry, cells, rows = shape.geometry, [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for head, some in zip(heads, positions, strict=False):  # no positions: what was compared is not known
            if head in among:
                run, offset = np.divmod(some[some < part.tokens], shape.tokens)
                inside = middle[run]
                cells.append(head * part.runs + run[inside])
                rows.append(offset[inside])
        cell, offsets = np.concatenate(cells), np.concatenate(rows) * geometry.row_bytes
        if not cell.size:
            return
        await asyncio.sleep(cell.size * (self.profile.pick + geometry.row_bytes / self._attend(geometry)))
        wanted, place = np.unique(cell, return_inverse=True)
        head_of, run_of = np.divmod(wanted, part.runs)
        blocks = np.array(part.first, np.int64)[run_of] + head_of
        whole, taken = blocks, None
        if self.pages is not None and PAGE % geometry.row_bytes == 0:
            names, singly = blocks[place] * self.pages.per + offsets // PAGE, self.mover.pageable(blocks)
            if note and self.pages.sources():
                part.picked = np.unique(names)
            taken = self._take(self.pages, np.unique(names[singly[place]]))
            whole = blocks if taken is None else blocks[~singly]
        await self.reading(whole[None], None, nothing)
        if taken is not None and self.pages is not None:
            began = self.loop.now
            if taken.reading:
                await asyncio.wait(taken.reading)  # type: ignore[type-var]  # the tasks that ``submit`` made
                self.phase.waited += self.loop.now - began
            self.pages.give(taken)
            self.unpin(np.unique(taken.pages // self.pages.per), used=False)

    def _take(self, pages: Pages, names: Ids) -> Taken | None:
        """What ``Picks.start`` does."""
        if not names.size:
            return None
        blocks = np.unique(names // pages.per)
        self.mover.ledger.pin(blocks)
        taken = pages.take(names)
        if taken is None:
            self.mover.give_back(self.mover.ledger.unpin(blocks))
            return None
        self.phase.touched.waited += taken.late * PAGE
        self.phase.touched.host += (names.size - taken.late) * PAGE
        return taken

    def _guess(self, pages: Pages, before: Part, after: Part) -> None:
        """What ``picks.ahead`` does: read what the next layer may want, by what this one and its last step wanted."""
        if not after.runs or before.picked is None or not (sources := pages.sources()):
            return
        engine: Any = SimpleNamespace(mover=self.mover)
        state: Any = SimpleNamespace(shape=self.mover.shapes[after.layer])
        row: Any = SimpleNamespace(runs=after.runs, first=np.array(after.first, np.int64))
        here, last = before.picked, after.picked
        pages.suggest(lambda: view_of(pages, engine, sources, state, row, here, last, np.empty(0, np.int64)))

    # ------------------------------------------------------------------ blocks
    async def reading(self, ids: Ids, upcoming: tuple[Part, list[Part]] | None, seconds: Seconds) -> None:
        """What Engine.reading and its caller do. ids: [heads, columns]; seconds: attention takes for so many blocks."""
        if not ids.size:
            return
        mover, book = self.mover, self.mover.ledger
        here = book.readable(ids).all(0)
        resident = ids[:, here].ravel()
        book.pin(resident)
        self._count(resident)
        cold = np.flatnonzero(~here)
        batches = self._batches(ids, cold)
        running: deque[tuple[Ids, asyncio.Task[None]]] = deque()
        gate = asyncio.Lock()

        def start() -> None:
            while batches and len(running) < LOADS_AHEAD:
                batch = batches.popleft()
                sizes, ahead = mover.sizes(batch), book.ahead[batch]
                self.phase.touched.ahead += int(sizes[ahead].sum())
                self.phase.touched.waited += int(sizes[~ahead].sum())
                running.append((batch, self.loop.create_task(mover.load(batch, gate))))

        start()
        if resident.size:
            await asyncio.sleep(seconds(resident.size))
        self.unpin(resident, used=True)
        while running:
            batch, task = running[0]
            began = self.loop.now
            await task
            self.phase.waited += self.loop.now - began
            running.popleft()
            start()
            if not batches and upcoming is not None:
                self._read_ahead(*upcoming)
            await asyncio.sleep(seconds(batch.size))
            self.unpin(batch, used=True)
        if not cold.size and upcoming is not None:
            self._read_ahead(*upcoming)

    def _batches(self, ids: Ids, columns: npt.NDArray[np.intp]) -> deque[Ids]:
        """The cold columns in the batches that Engine loads."""
        host = self.mover.host
        column_bytes = ids.shape[0] * host.slot_bytes
        most = max(1, min(self.settings.batch_bytes, host.capacity * host.slot_bytes // 4) // column_bytes)
        return deque(ids[:, columns[i : i + most]].ravel() for i in range(0, columns.size, most))

    def _count(self, ids: Ids) -> None:
        book = self.mover.ledger
        nbytes = self.mover.shapes[int(book.layer[ids[0]])].nbytes if ids.size else 0
        device, ahead = int(np.count_nonzero(book.device[ids] >= 0)), int(np.count_nonzero(book.ahead[ids]))
        touched = self.phase.touched
        touched.device += device * nbytes
        touched.ahead += ahead * nbytes
        touched.host += (ids.size - device - ahead) * nbytes

    def unpin(self, ids: Ids, *, used: bool) -> None:
        """They are read no longer."""
        mover = self.mover
        if used:
            mover.ledger.touch(ids)
        mover.give_back(mover.ledger.unpin(ids))
        if mover.waited_for:
            mover.changed()

    def _read_ahead(self, part: Part, mine: list[Part]) -> None:
        """What Engine.read_ahead does: the layers after this one, in the order exact attention reads them."""
        mover = self.mover
        if not mover.may_read_ahead():
            return
        room, found = int(self.settings.prefetch_share * mover.host.capacity), []
        after = mine.index(part) + 1
        for other in mine[after:] + mine[:after]:
            flat = all_ids(other.first, other.heads).T.ravel()
            flat = flat[~mover.ledger.readable(flat) & ~mover.ledger.coming(flat)]
            found.append(flat[:room])
            room -= found[-1].size
            if room <= 0:
                break
        if found and (cold := np.concatenate(found)).size:
            mover.kick_reader(cold)

    # ------------------------------------------------------------------ seconds
    def _attend(self, geometry: Geometry) -> float:
        return self.profile.attend_rate(DTYPES[str(geometry.dtype)], geometry.k_dim)

    def _dense(self, shape: BlockShape, rows: int) -> Seconds:
        """Seconds of exact attention of ``rows`` queries a kv head, by number of blocks."""
        tokens, geometry = shape.tokens, shape.geometry
        block = tokens * geometry.row_bytes / self._attend(geometry)
        if rows > FEW_ROWS:
            block = 2 * rows * tokens * geometry.width / self.profile.flops
        return lambda blocks: blocks * block

    def model_seconds(self, queries: int) -> float:
        """One layer of a forward of so many tokens, without attention."""
        shape = self._shape
        if shape is None:
            return self.profile.layer
        numbers = (shape.weights + shape.hidden * shape.vocab) / shape.layers
        weights = numbers * shape.number_bytes / self.profile.weights
        return self.profile.layer + max(weights, 2 * numbers * queries / self.profile.flops)
