"""A discrete-event simulation of the tiers: requests in, hits, times and bytes out. No threads, no clock, no chance.

What happens, in order of virtual time:

    arrives    a request waits for a server, first come, first served
    starts     its prefix blocks are looked up, up to the first that no tier has; what the host or the ssd has is
               loaded (ssd -> host -> device without a stop between, over one channel each); the rest is computed
    finishes   the first token is there; all its blocks are in the device tier now. Each tier goes back to its capacity:
               the policy's victims go one tier down, or are dropped after the last

As in ``alaya_tiers.ledger``, a block is in one memory tier at most, and on the ssd beside it once it was written; the
host drops only what is on the ssd. When nothing of that kind is left, the server waits for write-behind (a stall).
"""

import heapq
import itertools
from array import array
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from alaya_tiers.config import format_bytes
from alaya_tiers.errors import ConfigError
from alaya_tiers.policies import EvictionPolicy, EvictionView, Watermark, WritePolicy, WriteView
from alaya_tiers.tools.hardware import Channel, Machine
from alaya_tiers.tools.limits import Belady, Future
from alaya_tiers.tools.shapes import Shape
from alaya_tiers.tools.traces import Request

Ids = npt.NDArray[np.int64]

DEVICE, HOST, SSD = "device", "host", "ssd"
TIERS = (DEVICE, HOST, SSD)
MOST_WAITING = 100_000


@dataclass(slots=True)
class Counts:
    """What a simulation counted. Tokens, bytes, seconds."""

    requests: int = 0
    tokens: int = 0
    hit_tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))
    moved: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("host_to_device", "device_to_host", "ssd_to_host", "host_to_ssd", "dropped"), 0
        )
    )
    flops: int = 0
    flops_without: int = 0
    """What prefill would have taken without any hit."""
    queue_seconds: float = 0.0
    """Before a server was free."""
    load_seconds: float = 0.0
    stall_seconds: float = 0.0
    """A server waited for room: for victims on their way down, or for blocks that had to be written first."""
    compute_seconds: float = 0.0
    ttft: "array[float]" = field(default_factory=lambda: array("d"))
    ended: float = 0.0


class Simulator:
    """One machine with one policy, or with the best there could be if the future is given instead.

    ``arrive`` in order of time, then ``close``.
    slack: share of a tier that is freed at once when it is over its capacity; 0 = what is needed, no more.
    """

    def __init__(
        self,
        machine: Machine,
        shape: Shape,
        block_tokens: int,
        policy: EvictionPolicy | Future,
        *,
        write: WritePolicy | None = None,
        slack: float = 0.0,
    ) -> None:
        self.machine, self.shape, self.block_tokens, self.slack = machine, shape, block_tokens, slack
        self.future = policy if isinstance(policy, Future) else None
        self.policy = Belady(lambda ids: self._next[ids]) if isinstance(policy, Future) else policy
        self.write = write or Watermark()
        self.block_bytes = block_tokens * shape.token_bytes
        sizes = (machine.device_memory, machine.host_memory, machine.ssd)
        self.capacity = {tier: size // self.block_bytes for tier, size in zip(TIERS, sizes, strict=True)}
        if not self.capacity[DEVICE]:
            raise ConfigError(
                f"the device tier of {format_bytes(machine.device_memory)} cannot hold a block: {block_tokens} tokens "
                f"of {shape.name} are {format_bytes(self.block_bytes)}"
            )
        if not 0 <= slack < 1:
            raise ConfigError(f"slack is a share from 0 to below 1, got {slack!r}")
        self.counts = Counts()
        self.pcie, self.disk = Channel(), Channel()
        self.index: dict[int, int] = {}
        """Key -> id of each block that is somewhere."""
        self._spare: list[int] = []
        self._busy: list[tuple[float, int, int, Request | None]] = []  # until when, tie break, number of the request
        self._waiting: deque[Request] = deque()
        self._numbers = itertools.count()
        self._tick = self._pass_tick = 0
        self._dirty_changed = False
        self.size = dict.fromkeys(TIERS, 0)
        self._key = self._start = self._used = self._next = np.zeros(0, np.int64)
        self._writing = np.zeros(0, np.bool_)
        self._in = {tier: np.zeros(0, np.bool_) for tier in TIERS}

    # ------------------------------------------------------------------ time
    def arrive(self, request: Request) -> None:
        """A request comes; everything that was to happen before happens now."""
        self._run(request.time)
        if len(self._waiting) >= MOST_WAITING:
            raise ConfigError(
                f"{MOST_WAITING:,} requests wait at {request.time:,.0f} s: this machine cannot serve the trace; "
                "give more servers, more flops, or a slower trace"
            )
        self._waiting.append(request)
        self._serve(request.time)

    def close(self) -> Counts:
        """Everything in the queue is served; the counts."""
        self._run(float("inf"))
        return self.counts

    def _run(self, until: float) -> None:
        while self._busy and self._busy[0][0] <= until:
            now, _, number, request = heapq.heappop(self._busy)
            self.counts.ended = max(self.counts.ended, now)
            if request is not None and (room := self._finish(now, number, request)) > now:
                self.counts.stall_seconds += room - now
                heapq.heappush(self._busy, (room, next(self._numbers), number, None))
            self._serve(now)

    def _serve(self, now: float) -> None:
        while self._waiting and len(self._busy) < self.machine.servers:
            request = self._waiting.popleft()
            self.counts.queue_seconds += now - request.time
            first = self._begin(now, request)
            self.counts.ttft.append(first - request.time)
            heapq.heappush(self._busy, (first, next(self._numbers), self.counts.requests - 1, request))

    def _begin(self, now: float, request: Request) -> float:
        """Lookup, load, compute; when the first token is there."""
        self._written(now)
        counts, machine = self.counts, self.machine
        ids = self._prefix(request)
        device, host = self._in[DEVICE][ids], self._in[HOST][ids]
        cached = min(ids.size * self.block_tokens, request.tokens - 1)
        tokens = np.clip(cached - np.arange(ids.size) * self.block_tokens, 0, self.block_tokens)
        for tier, mask in ((DEVICE, device), (HOST, host), (SSD, ~device & ~host)):
            counts.hit_tokens[tier] += int(tokens[mask].sum())
        from_ssd = int(np.count_nonzero(~device & ~host)) * self.block_bytes
        up = int(np.count_nonzero(~device)) * self.block_bytes
        counts.moved["ssd_to_host"] += from_ssd
        counts.moved["host_to_device"] += up
        loaded = now
        if from_ssd:
            loaded = max(loaded, self.disk.demand(now, from_ssd / machine.ssd_read))
        if up:
            loaded = max(loaded, self.pcie.demand(now, up / machine.pcie))
        self._touch(ids, counts.requests)
        self._place(HOST, ids[host], present=False)
        self._place(DEVICE, ids[~device], present=True)
        ready = max(loaded, self._shrink(now))
        flops = self.shape.prefill_flops(cached, request.tokens)
        counts.requests += 1
        counts.tokens += request.tokens
        counts.flops += flops
        counts.flops_without += self.shape.prefill_flops(0, request.tokens)
        counts.load_seconds += loaded - now
        counts.stall_seconds += ready - loaded
        counts.compute_seconds += flops / machine.flops
        return ready + flops / machine.flops

    def _finish(self, now: float, number: int, request: Request) -> float:
        """All blocks of the request are in the device tier, until the policy decides; when there is room for them."""
        self._written(now)
        ids = self._known(request)
        self._touch(ids, number)
        somewhere = self._in[DEVICE][ids] | self._in[HOST][ids] | self._in[SSD][ids]
        self._place(DEVICE, ids[~somewhere], present=True)
        return self._shrink(now)

    # ------------------------------------------------------------------ blocks
    def _prefix(self, request: Request) -> Ids:
        found = []
        for key in request.blocks.tolist():
            if (block := self.index.get(key)) is None:
                break
            found.append(block)
        return np.array(found, np.int64)

    def _known(self, request: Request) -> Ids:
        """Ids of all blocks of a request; new ones are nowhere yet."""
        keys = request.blocks.tolist()
        found = [self.index.get(key, -1) for key in keys]
        for position, (key, block) in enumerate(zip(keys, found, strict=True)):
            if block < 0:
                found[position] = self._new(key, position)
        return np.array(found, np.int64)

    def _new(self, key: int, position: int) -> int:
        if not self._spare:
            old = self._key.size
            grow = max(1024, old)
            for name in ("_key", "_start", "_used", "_next"):
                setattr(self, name, np.append(getattr(self, name), np.zeros(grow, np.int64)))
            self._writing = np.append(self._writing, np.zeros(grow, np.bool_))
            self._in = {tier: np.append(mask, np.zeros(grow, np.bool_)) for tier, mask in self._in.items()}
            self._spare = list(range(old + grow - 1, old - 1, -1))
        block = self._spare.pop()
        self.index[key] = block
        self._key[block], self._start[block], self._next[block] = key, position * self.block_tokens, 0
        return block

    def _touch(self, ids: Ids, number: int) -> None:
        """Used now by that request; the first block of the prefix last, so that what leaves first is its end."""
        if self.future is not None:  # requests overlap: one that began later knows better
            self._next[ids] = np.maximum(self._next[ids], self.future.after(number)[: ids.size])
        self._pass_tick = self._tick + 1
        self._used[ids] = np.arange(self._tick + ids.size, self._tick, -1)
        self._tick += ids.size

    def _place(self, tier: str, ids: Ids, *, present: bool) -> None:
        assert (self._in[tier][ids] != present).all(), f"a block came to or left the {tier} tier twice"
        self._in[tier][ids] = present
        self.size[tier] += ids.size if present else -ids.size
        self._dirty_changed |= bool(ids.size)

    def _forget(self, ids: Ids) -> None:
        """Blocks that no tier has any more."""
        gone = ids[~(self._in[DEVICE][ids] | self._in[HOST][ids] | self._in[SSD][ids])]
        self.counts.moved["dropped"] += gone.size * self.block_bytes
        for block, key in zip(gone.tolist(), self._key[gone].tolist(), strict=True):
            del self.index[key]
            self._spare.append(block)

    # ------------------------------------------------------------------ room
    def _victims(self, candidates: Ids, n: int) -> Ids:
        view = EvictionView(
            candidates,
            np.zeros(candidates.size, np.int32),  # a block is all layers of its tokens
            self._start[candidates],
            self._used[candidates],
            0,
            self._pass_tick,
            1,
        )
        return self.policy.victims(view, n)

    def _excess(self, tier: str) -> int:
        over = self.size[tier] - self.capacity[tier]
        return min(self.size[tier], max(over, int(self.slack * self.capacity[tier]))) if over > 0 else 0

    def _shrink(self, now: float) -> float:
        """Every tier back to its capacity; when there is room."""
        room = now
        if n := self._excess(DEVICE):
            out = self._victims(np.flatnonzero(self._in[DEVICE]), n)
            self._place(DEVICE, out, present=False)
            if self.capacity[HOST]:
                self._place(HOST, out, present=True)
                self.counts.moved["device_to_host"] += out.size * self.block_bytes
                room = max(room, self.pcie.demand(now, out.size * self.block_bytes / self.machine.pcie))
            elif self.capacity[SSD] and (new := out[~self._in[SSD][out]]).size:
                self.counts.moved["host_to_ssd"] += new.size * self.block_bytes
                room = max(room, self.disk.demand(now, new.size * self.block_bytes / self.machine.ssd_write))
                self._place(SSD, new, present=True)
            self._forget(out)
        if n := self._excess(HOST):
            room = max(room, self._clean(now, n))
            candidates = np.flatnonzero(self._in[HOST] & self._in[SSD] if self.capacity[SSD] else self._in[HOST])
            out = self._victims(candidates, n)
            self._place(HOST, out, present=False)
            self._forget(out)
        self._ssd_room()
        self._write_behind()
        return room

    def _ssd_room(self) -> None:
        if n := self._excess(SSD):
            out = self._victims(np.flatnonzero(self._in[SSD]), n)
            self._place(SSD, out, present=False)
            self._forget(out)

    # ------------------------------------------------------------------ writing behind
    def _dirty(self) -> Ids:
        ids = np.flatnonzero(self._in[HOST] & ~self._in[SSD] & ~self._writing)
        return ids[np.argsort(self._used[ids], kind="stable")]

    def _write_behind(self, wanted: bool = False) -> None:
        if not self.capacity[SSD] or not self.capacity[HOST] or not (self._dirty_changed or wanted):
            return
        self._dirty_changed = False
        plan = self.write.plan(WriteView(self._dirty(), self.disk.waiting, self.capacity[HOST], wanted))
        self._writing[plan] = True
        self.disk.write_behind(plan.tolist(), self.block_bytes / self.machine.ssd_write)

    def _written(self, now: float) -> None:
        """What was written behind until now is on the ssd."""
        if done := self.disk.written(now):
            self._on_ssd(np.array(done, np.int64))
            self._ssd_room()

    def _on_ssd(self, ids: Ids) -> None:
        self._writing[ids] = False
        self._place(SSD, ids, present=True)
        self.counts.moved["host_to_ssd"] += ids.size * self.block_bytes

    def _clean(self, now: float, n: int) -> float:
        """At least ``n`` blocks of the host tier are on the ssd too; when."""
        if not self.capacity[SSD]:
            return now
        end, missing = now, n - int(np.count_nonzero(self._in[HOST] & self._in[SSD]))
        while missing > 0:
            if not self.disk.waiting:
                self._write_behind(wanted=True)
            block, end = self.disk.force(now)
            self._on_ssd(np.array([block], np.int64))
            missing -= bool(self._in[HOST][block])
        return end
