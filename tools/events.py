"""What happened in a run, as values: what a recorded trace says line by line, and a described one makes up."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from alaya_tiers.blocks import Geometry

Positions = npt.NDArray[np.int64]


class Layer(NamedTuple):
    """A layer's shape becomes known."""

    number: int
    geometry: Geometry


class Own(NamedTuple):
    """From here on ``x`` is a layer of a session. tokens: it has; stored: of these on ssd only."""

    x: int
    session: int
    layer: int
    tokens: int
    stored: int


class Fork(NamedTuple):
    """``x`` shares all blocks of ``y``."""

    x: int
    y: int


class Put(NamedTuple):
    """New tokens in every row."""

    x: int
    tokens: int
    rows: int
    time: float


class Cut(NamedTuple):
    """Only ``tokens`` are left; after the last use, none."""

    x: int
    tokens: int


class Built(NamedTuple):
    """The layer's index was completed."""

    x: int


@dataclass(frozen=True, slots=True)
class Look:
    """One scan of some kv heads: positions of the keys that each compared first, and of those it attended to then."""

    heads: tuple[int, ...]
    best: tuple[Positions, ...]
    positions: tuple[Positions, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """One sparse step of a row. window, tokens: attended in any case, and all it saw. positions: of the keys that each
    of ``heads`` found; ``flat``: heads that read everything. mass: share of attention that was not estimated. looks:
    the scans that led to it; one, of ``heads``, where they were not recorded."""

    x: int
    queries: int
    window: int
    tokens: int
    heads: tuple[int, ...]
    flat: tuple[int, ...]
    positions: tuple[Positions, ...]
    mass: float
    looks: tuple[Look, ...]


@dataclass(frozen=True, slots=True)
class Read:
    """Attention of one layer. tokens: it saw; heads: query heads; seconds: it took; found: its sparse steps."""

    x: int
    queries: int
    tokens: int
    heads: int
    time: float
    seconds: float
    found: tuple[Found, ...]


class Mark(NamedTuple):
    """A phase begins."""

    name: str
    time: float


class Asked(NamedTuple):
    """A prompt of ``tokens`` of which ``reused`` were stored; keys of its prefix blocks."""

    tokens: int
    reused: int
    blocks: tuple[int, ...]
    time: float


class Skipped(NamedTuple):
    """Steps that were asked not to be told. puts: (x, tokens) that they added."""

    steps: int
    puts: tuple[tuple[int, int], ...]


@dataclass(slots=True)
class Skip:
    """How many steps of single tokens are to be passed over next, set by whoever reads the events."""

    steps: int = 0


Event = Skipped | Layer | Own | Fork | Put | Cut | Built | Read | Mark | Asked
