"""What a policy is: a frozen dataclass whose fields are its parameters, with one pure method from a view to a plan.

Policies never touch bytes, time or threads: the same objects run in the engine and in a simulator.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Order = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class EvictionView:
    """The blocks that may leave a tier, one element per block, and where the model is.

    ids: block ids. layer: of each block. start: position of each block's first token. used: tick of its last use.
    cursor: the layer whose attention runs or ran last. pass_tick: blocks with ``used >= pass_tick`` were used in that
    layer's present pass. layers: how many layers there are.
    """

    ids: Ids
    layer: npt.NDArray[np.int32]
    start: npt.NDArray[np.int64]
    used: npt.NDArray[np.int64]
    cursor: int
    pass_tick: int
    layers: int


class EvictionPolicy(Protocol):
    """Chooses which blocks leave a tier."""

    def victims(self, view: EvictionView, n: int) -> Ids:
        """At most ``n`` ids of the view, first to leave first."""
        ...


@dataclass(frozen=True, slots=True)
class PrefetchView:
    """The blocks attention will ask for next, in the order it will ask.

    upcoming: ids of blocks not in memory and not on their way, soonest first. room: how many may be read ahead now.
    """

    upcoming: Ids
    room: int


class PrefetchPolicy(Protocol):
    """Chooses what to read before it is asked for."""

    def plan(self, view: PrefetchView) -> Ids:
        """At most ``view.room`` ids to read, in this order."""
        ...


@dataclass(frozen=True, slots=True)
class WriteView:
    """The host tier as write-behind sees it. All counts are blocks.

    dirty: waiting to be written, oldest first. writing: being written. capacity: of the tier. wanted: somebody waits
    for room, or asked for everything to be written.
    """

    dirty: Ids
    writing: int
    capacity: int
    wanted: bool


class WritePolicy(Protocol):
    """Chooses what to write behind."""

    def plan(self, view: WriteView) -> Ids:
        """Ids of ``view.dirty`` to write now, in this order; none is a fine answer."""
        ...


def take(order: Order, ids: Ids, n: int) -> Ids:
    """The first ``n`` of ``ids`` in ``order``."""
    return ids[order[:n]]
