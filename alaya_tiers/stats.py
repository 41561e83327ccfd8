"""What a cache did so far, as data."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class TierUse:
    """One tier's bytes. budget None = no limit. peak is the highest ``used`` ever; it cannot exceed the budget."""

    budget: int | None
    used: int
    peak: int


@dataclass(slots=True)
class Touched:
    """Bytes of KV that attention read, by where it found them.

    ahead: on ssd, but read before attention asked. waited: on ssd, attention waited for the read.
    """

    device: int = 0
    host: int = 0
    ahead: int = 0
    waited: int = 0

    @property
    def total(self) -> int:
        """All bytes attention read."""
        return self.device + self.host + self.ahead + self.waited


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot. Sizes in bytes, times in seconds, counts since the cache was made.

    tokens: length of the context. kv_bytes: what a dense cache would hold. tiers: by name. touched: what attention
    read. read_bytes, written_bytes: moved from and to ssd. waited_seconds: time attention and update spent waiting for
    storage. gathered: how often a full K and V were materialised because some code looked inside them, and the largest.
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

    @property
    def hit_rate(self) -> float:
        """Share of the attended bytes that were in memory when attention asked."""
        return 1 - self.touched.waited / self.touched.total if self.touched.total else 1.0

    @property
    def io_hidden(self) -> float:
        """Share of the bytes read from ssd that were read before attention asked."""
        read = self.touched.ahead + self.touched.waited
        return self.touched.ahead / read if read else 1.0

    def as_dict(self) -> dict[str, Any]:
        """The snapshot as JSON values."""
        return asdict(self) | {"hit_rate": self.hit_rate, "io_hidden": self.io_hidden}
