"""What a replay keeps track of: phases between two marks, and the blocks of each layer of each session."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from alaya_tiers.index.plan import History
from alaya_tiers.ledger import Ids
from alaya_tiers.stats import Touched

FEW = 4
"""Stretches from which a confidence can be told."""


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
    skipped: int = 0
    """Steps that were not replayed, or only to warm up."""
    stretches: list[int] = field(default_factory=list)
    """How many ``steps`` there were before each stretch of them."""

    @property
    def hit_rate(self) -> float:
        """Share of the attended bytes that were in memory, or on their way, when attention asked."""
        return 1 - self.touched.waited / self.touched.total if self.touched.total else 1.0

    @property
    def tpot(self) -> float:
        """Median seconds of a step; 0 without steps."""
        return float(np.median(self.steps)) if self.steps else 0.0

    @property
    def share(self) -> float:
        """Of all steps, those that were replayed."""
        return len(self.steps) / (len(self.steps) + self.skipped) if self.steps else 1.0

    @property
    def confidence(self) -> float | None:
        """Seconds: the mean step of all is, 95 times of 100, so near that of the sampled ones. None where all were
        replayed, or too few stretches. By the means of stretches, which are nearly independent."""
        pieces = [piece for piece in np.split(np.array(self.steps), self.stretches[1:]) if piece.size]
        if not self.skipped or len(pieces) < FEW:
            return None
        means = np.array([piece.mean() for piece in pieces])
        return float(1.96 * means.std(ddof=1) / means.size**0.5)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        steps = [float(np.percentile(self.steps, p)) if self.steps else 0.0 for p in (50, 90, 99)]
        return {
            "phase": self.name,
            "tpot_seconds": dict(zip(("p50", "p90", "p99"), steps, strict=True)),
            "steps": len(self.steps) + self.skipped,
            "steps_replayed": len(self.steps),
            "tpot_confidence": self.confidence,
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
