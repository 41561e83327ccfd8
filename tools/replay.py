"""A recorded run again, in virtual time, with other tiers: the engine's own mover, ledger and policies, without bytes.

What a session and its engine do in threads, a coroutine does here: append, demote, look up, load in batches, read
ahead. Blocks move whole: single pages of cold blocks (Settings.page_share) are not modelled.
Where blocks go is decided by the same code; how long it takes is reckoned from a machine's profile.
"""

import asyncio
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from alaya_tiers.blocks import PAGE, BlockShape, Geometry, round_up
from alaya_tiers.cache import FEW_ROWS
from alaya_tiers.config import Settings
from alaya_tiers.engine import LOADS_AHEAD
from alaya_tiers.errors import BudgetTooSmall, ConfigError
from alaya_tiers.ledger import Ids
from alaya_tiers.mover import Mover, Policies
from alaya_tiers.policies import EVICTION, PREFETCH, Watermark, Window, by_name
from alaya_tiers.stats import Touched
from alaya_tiers.tiers.base import Accountant
from alaya_tiers.tools import recorded, virtual
from alaya_tiers.tools.costs import CODE_SHARE
from alaya_tiers.tools.profile import Profile
from alaya_tiers.tools.recorded import Event, Found, Own, Put, Read, Recording
from alaya_tiers.tools.shapes import Shape
from alaya_tiers.tools.virtual import VirtualLoop

DTYPES = {"torch.float32": "float32", "torch.bfloat16": "bfloat16", "torch.float16": "bfloat16"}


@dataclass(slots=True)
class Phase:
    """What happened between two marks. Bytes and seconds. steps: of single tokens; mass: summed over sparse reads."""

    name: str
    touched: Touched = field(default_factory=Touched)
    read_bytes: int = 0
    written_bytes: int = 0
    waited: float = 0.0
    seconds: float = 0.0
    steps: list[float] = field(default_factory=list)
    tokens: int = 0
    mass: float = 0.0
    sparse_reads: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the attended bytes that were in memory, or on their way, when attention asked."""
        return 1 - self.touched.waited / self.touched.total if self.touched.total else 1.0

    @property
    def tpot(self) -> float:
        """Median seconds of a step; 0 without steps."""
        return float(np.median(self.steps)) if self.steps else 0.0

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        steps = [float(np.percentile(self.steps, p)) if self.steps else 0.0 for p in (50, 90, 99)]
        return {
            "phase": self.name,
            "tpot_seconds": dict(zip(("p50", "p90", "p99"), steps, strict=True)),
            "steps": len(self.steps),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "hit_rate": self.hit_rate,
            "touched_bytes": {name: getattr(self.touched, name) for name in ("device", "host", "ahead", "waited")},
            "ssd_read_bytes": self.read_bytes,
            "ssd_written_bytes": self.written_bytes,
            "waited_seconds": self.waited,
            "recovered_mass": self.mass / self.sparse_reads if self.sparse_reads else 1.0,
        }


@dataclass(slots=True)
class Part:
    """One layer of one session: its blocks."""

    session: int
    layer: int
    stream: int
    first: list[int] = field(default_factory=list)
    tokens: int = 0


class Replay:
    """One recording on one machine with some settings. ``run`` once.

    probe: told (seconds, bytes by tier) after every step, for pictures.
    """

    def __init__(self, recording: Recording, settings: Settings, profile: Profile, probe: Any = None) -> None:
        if settings.mode == "sparse" and recording.settings.mode != "sparse":
            raise ConfigError("the trace was recorded in exact mode: it does not say what sparse attention would read")
        self.recording, self.settings, self.profile, self.probe = recording, settings, profile, probe
        self.loop = VirtualLoop()
        self.phases: list[Phase] = []
        self.parts: dict[int, Part] = {}
        self.geometries: dict[int, Geometry] = {}
        self._mover: Mover | None = None
        self._phase = Phase("start")
        self._streams = 0
        self._began = self._mark = 0.0
        self._forks: dict[int, tuple[list[int], int]] = {}

    def run(self) -> list[Phase]:
        """The phases that had something in them. Raises TraceError, BudgetTooSmall, ConfigError."""
        virtual.run(self.loop, self._play(self.recording.events()))
        return [phase for phase in self.phases if phase.touched.total or phase.written_bytes]

    @property
    def index_bytes(self) -> int:
        """What codes of all keys take, at the end; 0 in exact mode."""
        if self.settings.mode == "exact":
            return 0
        numbers = sum(
            p.tokens * self.geometries[p.layer].kv_heads * self.geometries[p.layer].k_dim for p in self.parts.values()
        )
        return int(numbers * CODE_SHARE * self.settings.index_bits / 8)

    # ------------------------------------------------------------------ events
    async def _play(self, events: Iterator[Event]) -> None:
        for event in events:
            match event:
                case recorded.Layer():
                    self.geometries[event.number] = event.geometry
                    self._fit(event.number, event.geometry)
                case Own():
                    await self._own(event)
                case recorded.Fork():
                    old = self.parts[event.y]
                    self._forks[event.x] = (list(old.first), old.tokens)
                    self.mover.ledger.retain(self._all(old.first, old.layer).ravel())
                    self.parts[event.x] = Part(-1, old.layer, self._stream(), list(old.first), old.tokens)
                case Put():
                    await self._put(self.parts[event.x], event)
                case recorded.Cut():
                    self._cut(self.parts[event.x], event.tokens)
                case recorded.Built():
                    await self._built(self.parts[event.x])
                case Read():
                    await self._read(self.parts[event.x], event)
                case recorded.Mark():
                    self._end_phase(event.name)
        self._end_phase("")
        await self.mover.close()

    @property
    def mover(self) -> Mover:
        """The engine's own; there is one from the first layer on."""
        assert self._mover is not None, "no layer yet"
        return self._mover

    def _end_phase(self, name: str) -> None:
        phase = self._phase
        phase.seconds = self.loop.now - self._mark
        if self._mover is not None:
            traffic = self._mover.traffic
            phase.read_bytes = traffic.read_bytes - sum(p.read_bytes for p in self.phases)
            phase.written_bytes = traffic.written_bytes - sum(p.written_bytes for p in self.phases)
        self.phases.append(phase)
        self._phase, self._mark = Phase(name), self.loop.now

    def _fit(self, layer: int, geometry: Geometry) -> None:
        """What Engine.fit does, without memory."""
        s = self.settings
        if self._mover is None:
            slot = round_up(s.block_tokens * geometry.row_bytes, PAGE)
            for tier, budget, slots in (("device", s.device_budget, 1), ("host", s.host_budget, 2)):
                if budget < (least := slots * geometry.kv_heads * slot):
                    raise BudgetTooSmall(tier, budget, least, f"a run of blocks takes {least:,} bytes")
            accountant = Accountant({"device": s.device_budget, "host": s.host_budget, "ssd": s.ssd_budget})
            policies = Policies(
                device=Window(s.sink_tokens),
                host=by_name(EVICTION, s.eviction_of_blocks),
                prefetch=by_name(PREFETCH, s.prefetch),
                write=Watermark(s.dirty_limit),
            )
            device: Any = virtual.Memory("device", s.device_budget, slot, accountant)
            host: Any = virtual.Memory("host", s.host_budget, slot, accountant)
            disk = virtual.TimedDisk(self.profile, s.io_threads)
            self._mover = Mover(s, policies, device, host, virtual.Ssd(s, accountant), disk, _published)
        self._mover.shapes[layer] = BlockShape.fit(geometry, self._mover.host.slot_bytes, s.block_tokens)

    async def _own(self, own: Own) -> None:
        part = self.parts.get(own.x)
        if part is not None:  # a fork, known already
            part.session = own.session
            return
        part = self.parts[own.x] = Part(own.session, own.layer, self._stream())
        size = self.mover.shapes[own.layer].tokens
        if own.tokens and own.stored >= own.tokens - size:
            self._adopt(part, own.tokens)
        elif own.tokens:
            await self._append(part, own.tokens)

    def _adopt(self, part: Part, tokens: int) -> None:
        """All of it on ssd, none in memory."""
        mover, shape = self.mover, self.mover.shapes[part.layer]
        runs, heads = -(-tokens // shape.tokens), shape.geometry.kv_heads
        stream = self._stream()
        starts = np.arange(runs, dtype=np.int64) * shape.tokens
        places = [mover.ssd.place(part.layer, shape, stream, int(s), h) for s in starts for h in range(heads)]
        offsets = np.array([o for _, o in places], np.int64).reshape(runs, heads).T
        files = np.array([n for n, _ in places[::heads]], np.int32)
        first = mover.ledger.adopted(part.layer, starts, files, offsets, np.zeros((heads, runs), np.uint64))
        part.first, part.tokens = first.tolist(), tokens

    # ------------------------------------------------------------------ writing
    async def _put(self, part: Part, put: Put) -> None:
        if put.rows != 1:
            raise ConfigError(f"{put.rows} sequences in a batch were recorded: only single ones can be replayed")
        if part.layer == min(p.layer for p in self.parts.values() if p.session == part.session):
            self._began = self.loop.now
            self._phase.tokens += put.tokens
        await self._append(part, put.tokens)
        nbytes = put.tokens * self.geometries[part.layer].token_bytes
        await asyncio.sleep(nbytes / self.profile.memory_copy)

    async def _append(self, part: Part, tokens: int) -> None:
        """What Layer.append does."""
        mover, size = self.mover, self.mover.shapes[part.layer].tokens
        done = 0
        while done < tokens:
            offset = part.tokens % size
            first = await self._open(part, offset)
            take = min(size - offset, tokens - done)
            done += take
            part.tokens += take
            if offset + take == size:
                mover.ledger.seal(self._all([first], part.layer).ravel())

    async def _open(self, part: Part, offset: int) -> int:
        mover, run = self.mover, part.tokens // self.mover.shapes[part.layer].tokens
        if run == len(part.first):
            part.first.append(await self._new(part))
            return part.first[run]
        old = self._all([part.first[run]], part.layer).ravel()
        if not mover.ledger.sealed[old[0]] and mover.ledger.refs[old[0]] == 1:
            return part.first[run]
        part.stream = self._stream()
        first = await self._new(part)
        await mover.load(old, asyncio.Lock())
        self._unpin(old, used=False)
        part.first[run] = first
        mover.give_back(mover.ledger.release(old))
        return first

    async def _new(self, part: Part) -> int:
        mover = self.mover
        shape = mover.shapes[part.layer]
        heads, start = shape.geometry.kv_heads, part.tokens // shape.tokens * shape.tokens
        slots = mover.try_device(heads)
        if slots is None:
            slots = await mover.device_room(heads)
        first = mover.ledger.opened(part.layer, part.stream, start, slots)
        if mover.wants_writer():
            mover.kick_writer()
        return first

    def _cut(self, part: Part, tokens: int) -> None:
        size = self.mover.shapes[part.layer].tokens
        keep = -(-tokens // size)
        if keep < len(part.first):
            ids = self._all(part.first[keep:], part.layer).ravel()
            del part.first[keep:]
            part.stream = self._stream()
            self.mover.give_back(self.mover.ledger.release(ids))
        part.tokens = min(part.tokens, tokens)

    async def _built(self, part: Part) -> None:
        """Codes of all full blocks are made: in idle time of those that were in memory, now of the others."""
        size = self.mover.shapes[part.layer].tokens
        book = self.mover.ledger
        for first in part.first[: part.tokens // size]:
            ids = self._all([first], part.layer)
            if not book.readable(ids).all():
                await self._reading(ids, None, lambda n: 0.0)

    # ------------------------------------------------------------------ reading
    async def _read(self, part: Part, read: Read) -> None:
        mover, geometry = self.mover, self.geometries[part.layer]
        mover.ledger.begin_pass(part.layer)
        await asyncio.sleep(self._model_seconds(read.queries))
        rows = read.heads // geometry.kv_heads * read.queries
        runs = np.arange(len(part.first))
        if self.settings.mode == "exact" or not read.found:
            upcoming = part if self.settings.mode == "exact" else None
            await self._reading(self._all(part.first, part.layer), upcoming, self._dense(geometry, rows, part.layer))
        else:
            for found in read.found:
                await self._sparse(part, found, geometry, rows, runs)
                self._phase.mass += found.mass
                self._phase.sparse_reads += 1
        if read.queries == 1 and part.layer == max(p.layer for p in self.parts.values() if p.session == part.session):
            self._phase.steps.append(self.loop.now - self._began + self.profile.step)
        if self.probe is not None:
            self.probe(self, part, read)

    async def _sparse(
        self, part: Part, found: Found, geometry: Geometry, rows: int, runs: npt.NDArray[np.int64]
    ) -> None:
        s, size = self.settings, self.mover.shapes[part.layer].tokens
        first, last = -(-s.sink_tokens // size), max(0, part.tokens - s.recent_tokens) // size
        middle = (runs >= first) & (runs < last)
        ids = self._all(part.first, part.layer)
        dense, heads = self._dense(geometry, rows, part.layer), np.array(found.heads, np.int64)
        if heads.size:
            await asyncio.sleep(self.profile.look)
            await self._reading(ids[np.ix_(heads, np.flatnonzero(~middle))], None, dense)
            numbers = float(middle.sum()) * size * geometry.k_dim * heads.size
            await asyncio.sleep(numbers / self.profile.scan * 8 / max(8, s.index_bits))
            picked = 0
            wanted = np.zeros(ids.shape, bool)
            for head, positions in zip(found.heads, found.positions, strict=True):
                places = positions[positions < part.tokens] // size
                picked += int(middle[places].sum())
                wanted[head, places[middle[places]]] = True
            await asyncio.sleep(picked * (self.profile.pick + geometry.row_bytes / self._attend(geometry)))
            blocks = ids[wanted]
            if blocks.size:
                await self._reading(blocks[None], None, lambda n: 0.0)
        if found.flat:
            await self._reading(ids[np.array(found.flat, np.int64)], None, dense)

    async def _reading(self, ids: Ids, upcoming: Part | None, seconds: Any) -> None:
        """What Engine.reading and its caller do. ids: [heads, columns]; seconds: attention takes for so many blocks."""
        if not ids.size:
            return
        mover = self.mover
        book = mover.ledger
        here = book.readable(ids).all(0)
        resident = ids[:, here].ravel()
        book.pin(resident)
        self._count(resident)
        cold = np.flatnonzero(~here)
        batches = _batches(ids, cold, self.settings, mover)
        running: deque[tuple[Ids, asyncio.Task[None]]] = deque()
        gate = asyncio.Lock()

        def start() -> None:
            while batches and len(running) < LOADS_AHEAD:
                batch = batches.popleft()
                sizes, ahead = mover.sizes(batch), book.ahead[batch]
                self._phase.touched.ahead += int(sizes[ahead].sum())
                self._phase.touched.waited += int(sizes[~ahead].sum())
                running.append((batch, self.loop.create_task(mover.load(batch, gate))))

        start()
        if resident.size:
            await asyncio.sleep(seconds(resident.size))
        self._unpin(resident, used=True)
        while running:
            batch, task = running[0]
            began = self.loop.now
            await task
            await asyncio.sleep(self.profile.load)
            self._phase.waited += self.loop.now - began
            running.popleft()
            start()
            if not batches and upcoming is not None:
                self._read_ahead(upcoming)
            await asyncio.sleep(seconds(batch.size))
            self._unpin(batch, used=True)
        if not cold.size and upcoming is not None:
            self._read_ahead(upcoming)

    def _count(self, ids: Ids) -> None:
        book = self.mover.ledger
        nbytes = self.mover.shapes[int(book.layer[ids[0]])].nbytes if ids.size else 0
        device, ahead = int(np.count_nonzero(book.device[ids] >= 0)), int(np.count_nonzero(book.ahead[ids]))
        touched = self._phase.touched
        touched.device += device * nbytes
        touched.ahead += ahead * nbytes
        touched.host += (ids.size - device - ahead) * nbytes

    def _unpin(self, ids: Ids, *, used: bool) -> None:
        mover = self.mover
        if used:
            mover.ledger.touch(ids)
        mover.give_back(mover.ledger.unpin(ids))
        if mover.waited_for:
            mover.changed()

    def _read_ahead(self, part: Part) -> None:
        """What Engine.read_ahead does: the layers after this one, in the order exact attention reads them."""
        mover = self.mover
        if not mover.may_read_ahead():
            return
        room, found = int(self.settings.prefetch_share * mover.host.capacity), []
        mine = sorted((p for p in self.parts.values() if p.session == part.session), key=lambda p: p.layer)
        after = mine.index(part) + 1
        for other in mine[after:] + mine[:after]:
            flat = self._all(other.first, other.layer).T.ravel()
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

    def _dense(self, geometry: Geometry, rows: int, layer: int) -> Any:
        """Seconds of exact attention of ``rows`` queries a kv head, by number of blocks."""
        tokens = self.mover.shapes[layer].tokens
        block = tokens * geometry.row_bytes / self._attend(geometry)
        if rows > FEW_ROWS:
            block = 2 * rows * tokens * geometry.width / self.profile.flops
        return lambda blocks: blocks * block

    def _model_seconds(self, queries: int) -> float:
        """One layer of a forward of so many tokens, without attention."""
        shape: Shape | None = self.recording.shape
        if shape is None:
            return self.profile.layer
        numbers = (shape.weights + shape.hidden * shape.vocab) / shape.layers
        weights = numbers * shape.number_bytes / self.profile.weights
        return self.profile.layer + max(weights, 2 * numbers * queries / self.profile.flops)

    # ------------------------------------------------------------------ names
    def _stream(self) -> int:
        self._streams += 1
        return self._streams

    def _all(self, first: list[int], layer: int) -> Ids:
        """Ids of runs, [kv_heads, runs]."""
        heads = self.geometries[layer].kv_heads
        return np.array(first, np.int64)[None] + np.arange(heads)[:, None]


def _batches(ids: Ids, columns: npt.NDArray[np.intp], settings: Settings, mover: Mover) -> deque[Ids]:
    """The cold columns in the batches that Engine loads."""
    column_bytes = ids.shape[0] * mover.host.slot_bytes
    most = max(1, min(settings.batch_bytes, mover.host.capacity * mover.host.slot_bytes // 4) // column_bytes)
    return deque(ids[:, columns[i : i + most]].ravel() for i in range(0, columns.size, most))


async def _published(number: int) -> None:
    """Metadata of a full file: too small to count."""


def replayed(recording: Recording, profile: Profile, **changes: Any) -> list[Phase]:
    """The phases of a recording with some settings changed. Raises TraceError, ConfigError."""
    settings = recording.settings.replace(**changes)
    return Replay(recording, replace(settings) if changes else settings, profile).run()
