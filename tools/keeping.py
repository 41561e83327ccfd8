"""What becomes of a context while its user waits, thinks, or a tool runs: in a simulation, by the engine's policies.

none         the eviction policy alone decides
ttl:SECONDS  it stays so long, and is the first to leave afterwards
patience     the engine's own ``Patience``, told how long pauses took so far: what is not kept leaves memory at once
oracle       the best time to live there is: ``Patience``, told how long this very pause takes
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from alaya_tiers.errors import ConfigError
from alaya_tiers.policies import Patience, PauseView, Shares, StoredView
from alaya_tiers.tools.hardware import Machine
from alaya_tiers.tools.limits import NEVER, Future
from alaya_tiers.tools.shelves import DEVICE, HOST, SSD, Blocks, Ids

Times = npt.NDArray[np.float64]

FIRST_GUESS = 30.0
"""Seconds of a pause, while none was seen."""

LATELY = 64
"""Pauses over which their length is averaged."""

KINDS = ("none", "ttl:SECONDS", "patience", "oracle")


class Pauses(Protocol):
    """Decides when the pause of a request's blocks is over."""

    def came(self, seconds: float) -> None:
        """A context was wanted again so long after its last use."""
        ...

    def until(self, now: float, number: int, ids: Ids, full: float, block_bytes: int) -> Times | float:
        """For each block of request ``number``, until when it stays; not after now: it leaves at once; inf: as the
        eviction policy likes. full: share of the memory in use."""
        ...


@dataclass(slots=True)
class Ttl:
    """The same time for all."""

    seconds: float

    def came(self, seconds: float) -> None:
        """Nothing is learned."""

    def until(self, now: float, number: int, ids: Ids, full: float, block_bytes: int) -> Times | float:
        return now + self.seconds


@dataclass(slots=True)
class Patient:
    """The engine's policy and what it can know: how long pauses took of late."""

    machine: Machine
    patience: Patience
    expected: float = FIRST_GUESS

    def came(self, seconds: float) -> None:
        self.expected += (seconds - self.expected) / LATELY

    def until(self, now: float, number: int, ids: Ids, full: float, block_bytes: int) -> Times | float:
        memory = self.machine.device_memory + self.machine.host_memory
        view = PauseView(self.expected, ids.size * block_bytes, memory, full, self.machine.ssd_read)
        return float("inf") if self.patience.keep(view) else now


@dataclass(slots=True)
class Oracle:
    """Every block stays exactly until it is wanted again, and leaves at once if it never is."""

    future: Future

    def came(self, seconds: float) -> None:
        """Nothing is learned."""

    def until(self, now: float, number: int, ids: Ids, full: float, block_bytes: int) -> Times | float:
        following = self.future.after(number)[: ids.size]
        found = np.full(ids.size, now)
        for request in np.unique(following[following != NEVER]).tolist():
            found[following == request] = np.nextafter(max(now, self.future.times[request]), np.inf)
        return found


def pauses(text: str, machine: Machine, future: Callable[[], Future]) -> Pauses | None:
    """What a word of KINDS means. Raises ConfigError."""
    name, colon, seconds = text.partition(":")
    if name == "ttl" and colon:
        try:
            value = float(seconds.removesuffix("s"))
        except ValueError:
            value = -1.0
        if 0 <= value < float("inf"):
            return Ttl(value)
    if name == "patience" and not colon:
        return Patient(machine, Patience())
    if name == "oracle" and not colon:
        return Oracle(future())
    if text != "none":
        raise ConfigError(f"cannot read the pause {text!r}; write one of {', '.join(KINDS)}, e.g. ttl:60")
    return None


def stored(
    blocks: Blocks, tenants: list[str], asking: str, now: float, block_bytes: int
) -> tuple[list[Ids], StoredView]:
    """The contexts on the ssd as ``Shares`` sees them, and the blocks of each. A context is what one request brought;
    tenants: by ``Blocks.tenant``."""
    members = blocks.shelf[SSD].members
    ids = members[np.argsort(blocks.context[members], kind="stable")]
    contexts, begin = np.unique(blocks.context[ids], return_index=True)
    counts = np.diff(np.append(begin, ids.size))
    names = tuple(tenants[tenant] for tenant in blocks.tenant[ids[begin]].tolist())
    used: dict[str, int] = {}
    for name, count in zip(names, counts.tolist(), strict=True):
        used[name] = used.get(name, 0) + count * block_bytes
    unused = now - np.maximum.reduceat(blocks.time[ids], begin)
    view = StoredView(names, counts * block_bytes, unused, np.zeros(contexts.size, bool), used, asking)
    return np.split(ids, begin[1:]), view


def leaving(shares: Shares, found: list[Ids], view: StoredView, need: int) -> Ids:
    """Blocks that leave the ssd so that ``need`` bytes are free, as ``Shares`` says; none where it finds none."""
    chosen = shares.leave(view, need, 0)
    return np.concatenate([found[i] for i in chosen]) if chosen else np.zeros(0, np.int64)


def in_memory(blocks: Blocks, ids: Ids) -> dict[str, Ids]:
    """Of some blocks, those that a memory tier could let go of: they are on the ssd too."""
    safe = ids[blocks.shelf[SSD].has(ids)]
    return {tier: safe[blocks.shelf[tier].has(safe)] for tier in (DEVICE, HOST)}
