"""What a policy is: a frozen dataclass whose fields are its parameters, with one pure method from a view to a plan.

Policies never touch bytes, time or threads: the same objects run in the engine and in a simulator.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Order = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class EvictionView:
    """What may leave a tier, blocks or pages of blocks, one element each, and where the model is.

    ids: of blocks, or slots of pages. layer: of each. start: position of each's first token. used: tick of its last
    use. cursor: the layer whose attention runs or ran last. pass_tick: what has ``used >= pass_tick`` was used in
    that layer's present pass. layers: how many layers there are.

    What not every book counts is None there. uses: int64, since it came. heat: float, uses of late, older ones counting
    less and less, on a scale of its own; of pages, all uses, also before they left and came again. returned: bool,
    whether it was in this tier before. nbytes: int64, of each.
    """

    ids: Ids
    layer: npt.NDArray[np.int32]
    start: npt.NDArray[np.int64]
    used: npt.NDArray[np.int64]
    cursor: int
    pass_tick: int
    layers: int
    uses: npt.NDArray[np.int64] | None = None
    heat: npt.NDArray[np.float64] | None = None
    returned: npt.NDArray[np.bool_] | None = None
    nbytes: npt.NDArray[np.int64] | None = None


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
class GuessView:
    """Pages that a layer may want at its next step, by what suggests them; none is in memory or on its way.

    A page is named by block id x pages of a block + number. Of each source, likeliest first:
    last: wanted by this layer at its step before, and evicted since. beside: next to these in the text. across: at the
    positions that the layer before wants in this step. hot: wanted often of late, whatever the step. query: what the
    query of the layer before finds among this layer's keys; a replay knows no queries, and has none.
    precision: of each source, the share of its guesses that were wanted so far, 1 while nothing is known.
    room: how many may be read now.
    """

    last: Ids
    beside: Ids
    across: Ids
    hot: Ids
    query: Ids
    precision: Mapping[str, float]
    room: int


class Guess(NamedTuple):
    """Pages to read ahead because ``source``, a field of GuessView, suggests them."""

    source: str
    pages: Ids


class GuessPolicy(Protocol):
    """Chooses which pages to read before sparse attention asks for them."""

    def sources(self, precision: Mapping[str, float], turn: int) -> tuple[str, ...]:
        """Which sources of the view it wants to see now; others are left empty, and with none there is no view.

        precision: as in the view. turn: how many times it was asked before.
        """
        ...

    def plan(self, view: GuessView) -> list[Guess]:
        """At most ``view.room`` pages, what is read first first."""
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


def lowest(keys: tuple[npt.NDArray[np.generic], ...], ids: Ids, n: int) -> Ids:
    """The ``n`` of ``ids`` that sort first by the last of ``keys``, ties by the one before it, and so on.

    As ``np.lexsort`` would have it, without sorting all of them.
    """
    last = keys[-1]
    if 0 < n < ids.size // 4:
        worst = np.partition(last, n - 1)[n - 1]
        some = np.flatnonzero(last <= worst)
        keys, ids = tuple(key[some] for key in keys), ids[some]
    return take(np.lexsort(keys), ids, n)
