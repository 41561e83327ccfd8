"""A discrete-event simulation of the tiers: requests in, hits, times and bytes out. No threads, no clock, no chance.

What happens, in order of virtual time:

    arrives    a request waits for a server, first come, first served
    starts     its prefix blocks are looked up, up to the first that no tier has; what the host or the ssd has is
               loaded (ssd -> host -> device without a stop between, over one channel each); the rest is computed
    finishes   the first token is there; all its blocks are in the device tier now. Each tier goes back to its capacity:
               the policy's victims go one tier down, or are dropped after the last. The others of its tokens follow,
               at the pace of a step of all sequences that run (``decoding.py``)

As in ``alaya_tiers.ledger``, a block is in one memory tier at most, and on the ssd beside it once it was written; the
host drops only what is on the ssd. When nothing of that kind is left, the server waits for write-behind (a stall).
"""

import heapq
import itertools
from array import array
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from alaya_tiers.config import format_bytes
from alaya_tiers.errors import ConfigError
from alaya_tiers.policies import EvictionPolicy, EvictionView, Shares, Watermark, WritePolicy, WriteView
from alaya_tiers.tools import keeping
from alaya_tiers.tools.decoding import Decoding
from alaya_tiers.tools.hardware import Channel, Machine
from alaya_tiers.tools.keeping import Pauses
from alaya_tiers.tools.limits import Belady, Future
from alaya_tiers.tools.shapes import Shape
from alaya_tiers.tools.shelves import DEVICE, HALF_LIFE, HOST, SSD, TIERS, Blocks, Ids, Mask
from alaya_tiers.tools.traces import Request

__all__ = ["DEVICE", "HALF_LIFE", "HOST", "SSD", "TIERS", "Counts", "Simulator"]

MOST_WAITING = 100_000


@dataclass(slots=True)
class Counts:
    """What a simulation counted. Tokens, bytes, seconds. categories: tokens asked for, and found, by category."""

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
    tpot: "array[float]" = field(default_factory=lambda: array("d"))
    output: int = 0
    decoded: float = 0.0
    """When the last token of all was there; ``ended``: the last first token."""
    ended: float = 0.0
    categories: dict[str, list[int]] = field(default_factory=dict)


class Simulator:
    """One machine with one policy, or with the best there could be if the future is given instead.

    ``arrive`` in order of time, then ``close``.
    slack: share of a tier that is freed at once when it is over its capacity; 0 = what is needed, no more. pauses: what
    becomes of a context while a tool runs, or, with any_pause, after every answer. shares: who leaves the ssd, instead
    of the policy. attend: share of the KV that a step of decoding reads.
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
        pauses: Pauses | None = None,
        any_pause: bool = False,
        shares: Shares | None = None,
        attend: float = 1.0,
    ) -> None:
        self.machine, self.shape, self.block_tokens, self.slack = machine, shape, block_tokens, slack
        self.future = policy if isinstance(policy, Future) else None
        self.policy = Belady(lambda ids: self.blocks.next[ids]) if isinstance(policy, Future) else policy
        self.write, self.pauses, self.any_pause, self.shares = write or Watermark(), pauses, any_pause, shares
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
        if not 0 < attend <= 1:
            raise ConfigError(f"the share of KV that a step attends is above 0 and at most 1, got {attend!r}")
        self.counts = Counts()
        self.decoding = Decoding(machine, shape, attend, self.counts.tpot)
        self.pcie, self.disk = Channel(), Channel()
        self.blocks = Blocks(ghosts=sum(self.capacity.values()))
        self.shelf = self.blocks.shelf
        self._busy: list[tuple[float, int, int, Request | None]] = []  # until when, tie break, number of the request
        self._waiting: deque[Request] = deque()
        self._ties = itertools.count()
        self._unplanned = 0
        self._paused = False
        self._asking = ""
        self._categories: dict[str, int] = {}

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
        self.counts.decoded = max(self.counts.ended, self.decoding.advance(float("inf")))
        self.counts.output = self.decoding.tokens
        return self.counts

    def _run(self, until: float) -> None:
        while self._busy and self._busy[0][0] <= until:
            now, _, number, request = heapq.heappop(self._busy)
            self.counts.ended = max(self.counts.ended, now)
            if request is not None and (room := self._finish(now, number, request)) > now:
                self.counts.stall_seconds += room - now
                heapq.heappush(self._busy, (room, next(self._ties), number, None))
            self._serve(now)

    def _serve(self, now: float) -> None:
        while self._waiting and len(self._busy) < self.machine.servers:
            request = self._waiting.popleft()
            self.counts.queue_seconds += now - request.time
            first = self._begin(now, request)
            self.counts.ttft.append(first - request.time)
            heapq.heappush(self._busy, (first, next(self._ties), self.counts.requests - 1, request))

    def _begin(self, now: float, request: Request) -> float:
        """Lookup, load, compute; when the first token is there."""
        self._written(now)
        counts, machine = self.counts, self.machine
        self._asking = request.category
        ids = self.blocks.prefix(request.blocks)
        device, host = self.shelf[DEVICE].has(ids), self.shelf[HOST].has(ids)
        cached = self._count_hits(request, ids, device, host)
        up = int(np.count_nonzero(~device)) * self.block_bytes
        from_ssd = up - int(np.count_nonzero(host)) * self.block_bytes
        counts.moved["ssd_to_host"] += from_ssd
        counts.moved["host_to_device"] += up
        loaded = now
        if from_ssd:
            loaded = max(loaded, self.disk.demand(now, from_ssd / machine.ssd_read))
        if up:
            loaded = max(loaded, self.pcie.demand(now, up / machine.pcie))
        if self.pauses is not None and ids.size:
            self.pauses.came(now - float(self.blocks.time[ids[-1]]))
        self._touch(ids, counts.requests, now, ids)
        if up:
            self.blocks.leave(HOST, ids[host])
            self.blocks.come(DEVICE, ids[~device], uses=1)
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

    def _count_hits(self, request: Request, ids: Ids, device: Mask, host: Mask) -> int:
        """Tokens that are found, of which the last is computed in any case."""
        cached = min(ids.size * self.block_tokens, request.tokens - 1)
        over = ids.size * self.block_tokens - cached  # of the last block
        where = TIERS.index(SSD) if not ids.size else 0 if device[-1] else 1 if host[-1] else 2
        found = [int(np.count_nonzero(device)), int(np.count_nonzero(host))]
        found.append(ids.size - sum(found))
        for i, tier in enumerate(TIERS):
            self.counts.hit_tokens[tier] += found[i] * self.block_tokens - (over if i == where else 0)
        asked = self.counts.categories.setdefault(request.category, [0, 0])
        asked[0] += request.tokens
        asked[1] += cached
        return cached

    def _finish(self, now: float, number: int, request: Request) -> float:
        """All blocks of the request are in the device tier, until the policy decides; when there is room for them."""
        self._written(now)
        self._asking = request.category
        ids = self.blocks.known(request.blocks, number, self.block_tokens)
        new = ids[~self.blocks.anywhere(ids)]
        self._touch(ids, number, now, new)
        self.blocks.come(DEVICE, new, uses=1)
        self.blocks.tenant[new] = self._number_of(request.category)
        if self.pauses is not None and (request.pause or self.any_pause):
            self._pause(self.pauses, now, number, ids)
        self.decoding.begin(now, request.tokens, request.output)
        return self._shrink(now)

    def _touch(self, ids: Ids, number: int, now: float, counted: Ids) -> None:
        if self.future is not None:  # requests overlap: one that began later knows better
            self.blocks.next[ids] = np.maximum(self.blocks.next[ids], self.future.after(number)[: ids.size])
        self.blocks.touch(ids, number, now, counted)

    def _pause(self, pauses: Pauses, now: float, number: int, ids: Ids) -> None:
        memory = self.capacity[DEVICE] + self.capacity[HOST]
        full = (self.shelf[DEVICE].size + self.shelf[HOST].size) / memory
        until = np.broadcast_to(pauses.until(now, number, ids, full, self.block_bytes), ids.shape)
        self.blocks.until[ids] = until
        self._paused = True
        for tier, some in keeping.in_memory(self.blocks, ids[until <= now]).items():
            self.blocks.leave(tier, some)

    # ------------------------------------------------------------------ room
    def _victims(self, tier: str, candidates: Ids, n: int, now: float) -> Ids:
        """The first to leave: those whose pause is over, then as the policy likes, then those that are waited for."""
        if not self._paused or n >= candidates.size:
            return self._ranked(tier, candidates, n)
        until, found, left = self.blocks.until[candidates], [], n
        for some in (until <= now, until == np.inf, (until > now) & (until < np.inf)):
            if left > 0 and some.any():
                found.append(self._ranked(tier, candidates[some], left))
                left -= found[-1].size
        return np.concatenate(found)

    def _ranked(self, tier: str, candidates: Ids, n: int) -> Ids:
        blocks = self.blocks
        view = EvictionView(
            candidates, np.zeros(candidates.size, np.int32),  # a block is all layers of its tokens
            blocks.start[candidates], blocks.used[candidates], 0, blocks.pass_tick, 1,
            blocks.uses(tier, candidates), blocks.heat[candidates], blocks.returned(tier, candidates),
            np.full(candidates.size, self.block_bytes),
        )  # fmt: skip
        return self.policy.victims(view, n)

    def _excess(self, tier: str) -> int:
        over = self.shelf[tier].size - self.capacity[tier]
        return min(self.shelf[tier].size, max(over, int(self.slack * self.capacity[tier]))) if over > 0 else 0

    def _shrink(self, now: float) -> float:
        """Every tier back to its capacity; when there is room."""
        room = now
        if n := self._excess(DEVICE):
            room = self._demote(self._victims(DEVICE, self.shelf[DEVICE].members, n, now), now)
        if n := self._excess(HOST):
            room = max(room, self._clean(now, n))
            candidates = self.shelf[HOST].members
            if self.capacity[SSD]:
                candidates = candidates[self.shelf[SSD].has(candidates)]
            out = self._victims(HOST, candidates, n, now)
            self.blocks.leave(HOST, out)
            self._forget(out)
        self._ssd_room(now)
        if self._unplanned > int(self.slack * self.capacity[HOST]):
            self._write_behind()
        return room

    def _demote(self, out: Ids, now: float) -> float:
        """Out of the device, one tier down; when that is done."""
        room, nbytes = now, out.size * self.block_bytes
        self.blocks.leave(DEVICE, out)
        if self.capacity[HOST]:
            self.blocks.come(HOST, out)
            self._unplanned += out.size
            self.counts.moved["device_to_host"] += nbytes
            room = self.pcie.demand(now, nbytes / self.machine.pcie)
        elif self.capacity[SSD] and (new := out[~self.shelf[SSD].has(out)]).size:
            self.counts.moved["host_to_ssd"] += new.size * self.block_bytes
            room = self.disk.demand(now, new.size * self.block_bytes / self.machine.ssd_write)
            self.blocks.come(SSD, new)
        self._forget(out)
        return max(now, room)

    def _ssd_room(self, now: float) -> None:
        if self.shares is not None and self.shelf[SSD].size:
            held = np.bincount(self.blocks.tenant[self.shelf[SSD].members], minlength=len(self._categories))
            for tenant, number in self._categories.items():
                most = self.shares.share(tenant).most
                if most is not None and held[number] * self.block_bytes > most:
                    self._drop(self._leaving(tenant, 0, now))
        if not (n := self._excess(SSD)):
            return
        out = self._leaving(self._asking, n, now)
        self._drop(out if out.size else self._victims(SSD, self.shelf[SSD].members, n, now))

    def _leaving(self, tenant: str, n: int, now: float) -> Ids:
        """What ``shares`` takes from the ssd so that ``n`` blocks are free and the tenant has no more than it may."""
        if self.shares is None:
            return np.zeros(0, np.int64)
        found, view = keeping.stored(self.blocks, list(self._categories), tenant, now, self.block_bytes)
        return keeping.leaving(self.shares, found, view, n * self.block_bytes)

    def _drop(self, out: Ids) -> None:
        self.blocks.leave(SSD, out)
        self._unplanned += out.size
        self._forget(out)

    def _number_of(self, category: str) -> int:
        return self._categories.setdefault(category, len(self._categories))

    def _forget(self, ids: Ids) -> None:
        self.counts.moved["dropped"] += self.blocks.forget(ids) * self.block_bytes

    # ------------------------------------------------------------------ writing behind
    def _dirty(self) -> Ids:
        ids = self.shelf[HOST].members
        ids = ids[~(self.shelf[SSD].has(ids) | self.blocks.writing[ids])]
        return ids[np.argsort(self.blocks.used[ids], kind="stable")]

    def _write_behind(self, wanted: bool = False) -> None:
        self._unplanned = 0
        if not self.capacity[SSD] or not self.capacity[HOST]:
            return
        plan = self.write.plan(WriteView(self._dirty(), self.disk.waiting, self.capacity[HOST], wanted))
        self.blocks.writing[plan] = True
        self.disk.write_behind(plan.tolist(), self.block_bytes / self.machine.ssd_write)

    def _written(self, now: float) -> None:
        """What was written behind until now is on the ssd."""
        if done := self.disk.written(now):
            self._on_ssd(np.array(done, np.int64))
            self._ssd_room(now)

    def _on_ssd(self, ids: Ids) -> None:
        self.blocks.writing[ids] = False
        self.blocks.come(SSD, ids)
        self.counts.moved["host_to_ssd"] += ids.size * self.block_bytes

    def _clean(self, now: float, n: int) -> float:
        """At least ``n`` blocks of the host tier are on the ssd too; when."""
        if not self.capacity[SSD]:
            return now
        host = self.shelf[HOST]
        end, missing = now, n - int(np.count_nonzero(self.shelf[SSD].has(host.members)))
        while missing > 0:
            if not self.disk.waiting:
                self._write_behind(wanted=True)
            block, end = self.disk.force(now)
            some = np.array([block], np.int64)
            self._on_ssd(some)
            missing -= int(host.has(some)[0])
        return end
