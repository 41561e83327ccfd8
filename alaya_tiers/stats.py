"""What a cache did so far, as data."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from alaya_tiers.blocks import PAGE
from alaya_tiers.pace import Steps


@dataclass(frozen=True, slots=True)
class TierUse:
    """One tier's bytes. budget None = no limit. peak is the highest ``used`` ever; it cannot exceed the budget."""

    budget: int | None
    used: int
    peak: int


@dataclass(slots=True)
class Touched:
    """Bytes of KV that attention used, by where it found them: of whole blocks, or whole pages where it read these.

    ahead: on ssd, but read before attention asked. waited: on ssd, attention waited for the read.
    """

    device: int = 0
    host: int = 0
    ahead: int = 0
    waited: int = 0

    @property
    def total(self) -> int:
        """All bytes attention used."""
        return self.device + self.host + self.ahead + self.waited

    def since(self, before: "Touched") -> "Touched":
        """What was added after ``before`` was copied."""
        return Touched(**{name: getattr(self, name) - getattr(before, name) for name in self.__slots__})


@dataclass(frozen=True, slots=True)
class Queues:
    """What is under way at this moment, in bytes of whole blocks.

    reading: on their way from ssd. writing: on their way to it. dirty: in host memory, not on ssd, and waiting to be
    written. waiting: how many calls sleep until one of these gets smaller. pinned: being read by attention, copied or
    coded, and not to be moved meanwhile; what stays between steps was left by a mistake. depth: single pages that each
    thread reads at once, 0 where none are read.
    """

    reading: int = 0
    writing: int = 0
    dirty: int = 0
    waiting: int = 0
    pinned: int = 0
    depth: int = 0


@dataclass(slots=True)
class SparseUse:
    """What sparse attention used, over all its steps; a step is one query of one query head in one layer.

    attended, visible: tokens, of these in the window (always attended). scanned_bytes: of codes. recovered: sum over
    steps of the share of attention mass that was attended and not estimated, and least: the smallest. With
    ``measure_mass`` also measured: steps compared, and of those true_recovered, the sum of the true shares, true_least,
    and error, the sum of |out - exact| / |exact|, and worst_error. exact: steps in sparse mode that attended exactly.
    """

    steps: int = 0
    exact: int = 0
    attended: int = 0
    window: int = 0
    visible: int = 0
    scanned_bytes: int = 0
    recovered: float = 0.0
    least: float = 1.0
    measured: int = 0
    true_recovered: float = 0.0
    true_least: float = 1.0
    error: float = 0.0
    worst_error: float = 0.0

    def plus(self, other: "SparseUse") -> "SparseUse":
        """Both together."""
        names = {name: getattr(self, name) + getattr(other, name) for name in self.__slots__}
        names |= {name: min(getattr(self, name), getattr(other, name)) for name in ("least", "true_least")}
        return SparseUse(**names | {"worst_error": max(self.worst_error, other.worst_error)})

    def as_dict(self) -> dict[str, Any]:
        """Means, as JSON values."""
        n, m = max(1, self.steps), max(1, self.measured)
        return {
            "steps": self.steps,
            "exact_steps": self.exact,
            "attended_share": self.attended / max(1, self.visible),
            "attended_tokens": self.attended / n,
            "window_tokens": self.window / n,
            "visible_tokens": self.visible / n,
            "scanned_bytes": self.scanned_bytes,
            "recovered_mass": self.recovered / n,
            "least_recovered_mass": self.least,
            "measured_steps": self.measured,
            "true_recovered_mass": self.true_recovered / m,
            "true_least_recovered_mass": self.true_least,
            "output_error": self.error / m,
            "worst_output_error": self.worst_error,
        }


@dataclass(slots=True)
class PageUse:
    """Single pages of cold blocks that sparse attention wanted, counts of pages since the start.

    wanted: by attention, of these missed: read when it asked. evicted: left to make room. guessed, used: read ahead,
    and of these wanted later, by what suggested them. wasted: read ahead and evicted unused. in_time: of the used,
    those that were there when they were wanted, lead_seconds long in sum. rows: bytes of keys and values picked.
    """

    wanted: int = 0
    missed: int = 0
    evicted: int = 0
    wasted: int = 0
    in_time: int = 0
    lead_seconds: float = 0.0
    rows: int = 0
    guessed: dict[str, int] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)

    @property
    def precision(self) -> dict[str, float]:
        """Share of what was read ahead that was wanted, by what suggested it."""
        return {name: self.used.get(name, 0) / n for name, n in self.guessed.items() if n}

    @property
    def recall(self) -> float:
        """Share of the pages attention wanted and had not had, that were read ahead."""
        used = sum(self.used.values())
        return used / (used + self.missed) if used + self.missed else 0.0

    def copy(self) -> "PageUse":
        """As it is now."""
        return replace(self, guessed=dict(self.guessed), used=dict(self.used))

    def since(self, before: "PageUse") -> "PageUse":
        """What happened after ``before`` was copied."""

        def less(now: dict[str, int], then: dict[str, int]) -> dict[str, int]:
            return {name: n - then.get(name, 0) for name, n in now.items()}

        counts = {
            name: getattr(self, name) - getattr(before, name)
            for name in ("wanted", "missed", "evicted", "wasted", "in_time", "lead_seconds", "rows")
        }
        return PageUse(**counts, guessed=less(self.guessed, before.guessed), used=less(self.used, before.used))

    def as_dict(self) -> dict[str, Any]:
        """Also the shares, as JSON values."""
        return asdict(self) | {
            "hit_rate": 1 - self.missed / self.wanted if self.wanted else 1.0,
            "precision": self.precision,
            "recall": self.recall,
            "mean_lead_seconds": self.lead_seconds / self.in_time if self.in_time else 0.0,
            "read_amplification": self.wanted * PAGE / self.rows if self.rows else 1.0,
        }


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot. Sizes in bytes, times in seconds, counts since the cache was made.

    tokens: length of the context. kv_bytes: what a dense cache would hold. tiers: by name. touched: what attention
    read. read_bytes, written_bytes: moved from and to ssd. waited_seconds: time attention and update spent waiting for
    storage; of this, stalled_seconds: how long new tokens waited for the disk to take older ones, stalls times
    (backpressure). queues: what is under way now. steps: how long tokens took. gathered: how often a full K and V were
    materialised because some code looked inside them, and the largest. sparse: what sparse mode used, None in exact
    mode. disk_written_bytes: all that was written, metadata and padding too; write_amplification: for each byte of
    blocks. reuse: why a session of a database reuses what it found there, or not.
    """

    tokens: int
    kv_bytes: int
    tiers: dict[str, TierUse]
    touched: Touched
    read_bytes: int
    read_ahead_bytes: int
    written_bytes: int
    waited_seconds: float
    gathered: int
    gathered_bytes: int
    direct_io: bool
    path: str | None = field(default=None)
    sparse: SparseUse | None = None
    pages: PageUse | None = None
    stalls: int = 0
    stalled_seconds: float = 0.0
    queues: Queues = field(default_factory=Queues)
    steps: Steps = field(default_factory=Steps)
    disk_written_bytes: int = 0
    write_amplification: float = 1.0
    reuse: str | None = None

    @property
    def hit_rate(self) -> float:
        """Share of the attended bytes that were in memory when attention asked."""
        return 1 - self.touched.waited / self.touched.total if self.touched.total else 1.0

    @property
    def io_hidden(self) -> float:
        """Share of the bytes read from ssd that were read before attention asked."""
        read = self.touched.ahead + self.touched.waited
        return self.touched.ahead / read if read else 1.0

    @property
    def prefetch_precision(self) -> float:
        """Share of the bytes read ahead that attention asked for so far; what still waits to be used counts as not."""
        return min(1.0, self.touched.ahead / self.read_ahead_bytes) if self.read_ahead_bytes else 1.0

    def as_dict(self) -> dict[str, Any]:
        """The snapshot as JSON values."""
        ratios = {name: getattr(self, name) for name in ("hit_rate", "io_hidden", "prefetch_precision")}
        steps = {"tpot": self.steps.decoding.as_dict(), "prefill_seconds_per_token": self.steps.prefill_rate}
        sparse = None if self.sparse is None else self.sparse.as_dict()
        pages = None if self.pages is None else self.pages.as_dict()
        return asdict(self) | ratios | {"steps": steps, "sparse": sparse, "pages": pages}


class Source(Protocol):
    """What can be asked at any moment, from any thread: an AlayaCache, a Session, a DB."""

    def stats(self) -> Stats:
        """What it did so far."""
        ...
