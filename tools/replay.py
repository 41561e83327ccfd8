"""A recorded run again, in virtual time, with other tiers: the engine's own mover, ledger and policies, without bytes.

What a session and its engine do in threads, a coroutine does here: append, demote, and what attention does
(``attending.py``). Where blocks and pages go is decided by the same code; how long it takes is reckoned from a
machine's profile.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from alaya_tiers.blocks import PAGE, BlockShape, Geometry, round_up
from alaya_tiers.config import Settings
from alaya_tiers.errors import BudgetTooSmall, ConfigError
from alaya_tiers.mover import Mover, Policies
from alaya_tiers.policies import EVICTION, PREFETCH, Watermark, Window, by_name
from alaya_tiers.tiers.base import Accountant
from alaya_tiers.tools import virtual
from alaya_tiers.tools.attending import Attending, all_ids, nothing
from alaya_tiers.tools.costs import CODE_SHARE
from alaya_tiers.tools.events import Built, Cut, Event, Fork, Layer, Mark, Own, Put, Read, Skip, Skipped
from alaya_tiers.tools.phases import Part, Phase
from alaya_tiers.tools.profile import Profile
from alaya_tiers.tools.recorded import Recording
from alaya_tiers.tools.virtual import VirtualLoop

STRETCH = 8
"""Steps in a row that are replayed, of a sample."""

WARM = 3
"""Steps before these that are replayed and not counted."""


class Replay:
    """One recording on one machine with some settings. ``run`` once.

    sample: replay only this share of the steps of single tokens, in stretches; times and bytes of a phase are reckoned
    from these. probe: told (seconds, bytes by tier) after every step, for pictures.
    """

    def __init__(
        self, recording: Recording, settings: Settings, profile: Profile, probe: Any = None, sample: float = 1.0
    ) -> None:
        if settings.mode == "sparse" and recording.settings.mode != "sparse":
            raise ConfigError("the trace was recorded in exact mode: it does not say what sparse attention would read")
        if not 0 < sample <= 1:
            raise ConfigError(f"the share of the steps that are replayed is above 0 and at most 1, got {sample!r}")
        self._period = round(STRETCH / sample) - STRETCH if sample < 1 else 0
        self._skip, self._stretch, self._warm = Skip(), 0, 0
        self._aside, self._scaled = Phase("warm"), 0
        self._aside_bytes = self._aside_from = 0
        self.recording, self.settings, self.profile, self.probe = recording, settings, profile, probe
        self.loop = VirtualLoop()
        self.phases: list[Phase] = []
        self.parts: dict[int, Part] = {}
        self.geometries: dict[int, Geometry] = {}
        self._attending: Attending | None = None
        self._phase = Phase("start")
        self._streams = 0
        self._began = self._mark = 0.0
        self._forks: dict[int, tuple[list[int], int]] = {}

    def run(self) -> list[Phase]:
        """The phases that had something in them. Raises TraceError, BudgetTooSmall, ConfigError."""
        virtual.run(self.loop, self._play(self.recording.events(self._skip)))
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
                case Layer():
                    self.geometries[event.number] = event.geometry
                    self._fit(event.number, event.geometry)
                case Own():
                    await self._own(event)
                case Fork():
                    old = self.parts[event.y]
                    self._forks[event.x] = (list(old.first), old.tokens)
                    self.mover.ledger.retain(all_ids(old.first, old.heads).ravel())
                    self.parts[event.x] = Part(-1, old.layer, self._stream(), old.heads, list(old.first), old.tokens)
                case Put():
                    await self._put(self.parts[event.x], event)
                case Cut():
                    self._cut(self.parts[event.x], event.tokens)
                case Built():
                    await self._built(self.parts[event.x])
                case Read():
                    await self._read(self.parts[event.x], event)
                case Skipped():
                    await self._pass_over(event)
                case Mark():
                    self._end_phase(event.name)
        self._end_phase("")
        await self.mover.close()

    @property
    def mover(self) -> Mover:
        """The engine's own; there is one from the first layer on."""
        return self.attending.mover

    @property
    def attending(self) -> Attending:
        """What attention does, from the first layer on."""
        assert self._attending is not None, "no layer yet"
        return self._attending

    def _end_phase(self, name: str) -> None:
        phase = self._phase
        if self._warm:
            self._warmed()
        phase.seconds = self.loop.now - self._mark
        self._stretch = 0
        if self._attending is not None:
            traffic = self.mover.traffic
            phase.read_bytes = traffic.read_bytes + self._scaled - sum(p.read_bytes for p in self.phases)
            phase.written_bytes = traffic.written_bytes - sum(p.written_bytes for p in self.phases)
            if phase.skipped and phase.steps:  # of all steps, as of those that were replayed
                replayed, seconds = max(0, phase.read_bytes - self._aside_bytes), sum(phase.steps)
                self._scaled += (extra := int(replayed / phase.share) - phase.read_bytes)
                phase.read_bytes += extra
                phase.seconds += seconds / phase.share - seconds - sum(self._aside.steps)
            self._aside_bytes = 0
            self._aside.steps.clear()
        self.phases.append(phase)
        self._phase, self._mark = Phase(name), self.loop.now
        if self._attending is not None:
            self._attending.phase = self._phase

    def _fit(self, layer: int, geometry: Geometry) -> None:
        """What Engine.fit does, without memory."""
        s = self.settings
        if self._attending is None:
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
            mover = Mover(s, policies, device, host, virtual.Ssd(s, accountant), disk, _published)
            self._attending = Attending(mover, s, self.profile, self.loop, self.recording.shape)
            self._attending.phase = self._phase
        self.mover.shapes[layer] = BlockShape.fit(geometry, self.mover.host.slot_bytes, s.block_tokens)

    async def _own(self, own: Own) -> None:
        part = self.parts.get(own.x)
        if part is not None:  # a fork, known already
            part.session = own.session
            return
        part = self.parts[own.x] = Part(own.session, own.layer, self._stream(), self.geometries[own.layer].kv_heads)
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
                mover.ledger.seal(all_ids([first], part.heads).ravel())

    async def _open(self, part: Part, offset: int) -> int:
        mover, run = self.mover, part.tokens // self.mover.shapes[part.layer].tokens
        if run == len(part.first):
            part.first.append(await self._new(part))
            return part.first[run]
        old = all_ids([part.first[run]], part.heads).ravel()
        if not mover.ledger.sealed[old[0]] and mover.ledger.refs[old[0]] == 1:
            return part.first[run]
        part.stream = self._stream()
        first = await self._new(part)
        await mover.load(old, asyncio.Lock())
        self.attending.unpin(old, used=False)
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
            ids = all_ids(part.first[keep:], part.heads).ravel()
            del part.first[keep:]
            part.stream = self._stream()
            self.mover.give_back(self.mover.ledger.release(ids))
        part.tokens = min(part.tokens, tokens)

    async def _built(self, part: Part) -> None:
        """Codes of all full blocks are made: in idle time of those that were in memory, now of the others."""
        size = self.mover.shapes[part.layer].tokens
        book = self.mover.ledger
        for first in part.first[: part.tokens // size]:
            ids = all_ids([first], part.heads)
            if not book.readable(ids).all():
                await self.attending.reading(ids, None, nothing)

    # ------------------------------------------------------------------ sampling
    def _step_ended(self, seconds: float) -> None:
        (self._aside if self._warm else self._phase).steps.append(seconds)
        if not self._period:
            return
        if self._warm:
            self._warm -= 1
            if not self._warm:
                self._warmed()
            return
        if not self._stretch:
            self._phase.stretches.append(len(self._phase.steps) - 1)
        self._stretch += 1
        if self._stretch == STRETCH:
            self._stretch, self._skip.steps = 0, self._period

    async def _pass_over(self, skipped: Skipped) -> None:
        """The tokens of steps that are not replayed; the first of those after them only bring the tiers up to date."""
        for x, tokens in skipped.puts:
            await self._append(self.parts[x], tokens)
        self._phase.skipped += skipped.steps
        self._phase.tokens += skipped.steps
        if not self._warm:
            self._aside_from = self.mover.traffic.read_bytes
        self._warm = WARM
        self.attending.phase = self._aside

    def _warmed(self) -> None:
        self._aside_bytes += self.mover.traffic.read_bytes - self._aside_from
        self._phase.skipped += WARM - self._warm
        self._warm = 0
        self.attending.phase = self._phase

    # ------------------------------------------------------------------ reading
    async def _read(self, part: Part, read: Read) -> None:
        mine = sorted((p for p in self.parts.values() if p.session == part.session), key=lambda p: p.layer)
        await self.attending.read(part, read, mine)
        if read.queries == 1 and part is mine[-1]:
            await asyncio.sleep(self.profile.step)
            self._step_ended(self.loop.now - self._began)
        if self.probe is not None:
            self.probe(self, part, read)

    # ------------------------------------------------------------------ names
    def _stream(self) -> int:
        self._streams += 1
        return self._streams


async def _published(number: int) -> None:
    """Metadata of a full file: too small to count."""


def replayed(recording: Recording, profile: Profile, **changes: Any) -> list[Phase]:
    """The phases of a recording with some settings changed. Raises TraceError, ConfigError."""
    settings = recording.settings.replace(**changes)
    return Replay(recording, replace(settings) if changes else settings, profile).run()
