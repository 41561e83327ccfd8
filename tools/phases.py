"""What a replay keeps track of: phases between two marks, and the blocks of each layer of each session."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from alaya_tiers.index.plan import History
from alaya_tiers.ledger import Ids
from alaya_tiers.stats import Touched


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
    """One layer of one session: its blocks. history: what its kv heads needed, for the optimizer of sparse mode.
    picked: names of the pages it wanted last."""

    session: int
    layer: int
    stream: int
    heads: int
    first: list[int] = field(default_factory=list)
    tokens: int = 0
    history: History = field(init=False)
    picked: Ids | None = None

    def __post_init__(self) -> None:
        self.history = History(self.heads)

    @property
    def runs(self) -> int:
        """Runs of blocks."""
        return len(self.first)
