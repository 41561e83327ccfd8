"""The machine of a simulation: sizes, rates, and channels that move one thing at a time."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from alaya_tiers.config import format_bytes
from alaya_tiers.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is. Sizes in bytes (0 = no such tier), rates in bytes or operations a second.

    servers: requests in service at once, each with ``flops`` and ``device_read`` of its own; they share tiers and
    channels. device_read: of the device's memory, by decoding. step: seconds of a decode step that depend on no size.
    """

    device_memory: int = 24 << 30
    host_memory: int = 64 << 30
    ssd: int = 1 << 40
    ssd_read: float = 3e9
    ssd_write: float = 1.5e9
    pcie: float = 25e9
    flops: float = 150e12
    device_read: float = 1.6e12
    step: float = 1e-3
    servers: int = 1

    def __post_init__(self) -> None:
        for name in ("device_memory", "host_memory", "ssd"):
            if type(size := getattr(self, name)) is not int or size < 0:
                raise ConfigError(f"{name} is a number of bytes, at least 0, got {size!r}")
        for name in ("ssd_read", "ssd_write", "pcie", "flops", "device_read"):
            if not isinstance(rate := getattr(self, name), int | float) or not 0 < rate < float("inf"):
                raise ConfigError(f"{name} is a rate above 0, got {rate!r}")
        if not isinstance(step := getattr(self, "step"), int | float) or not 0 <= step < float("inf"):  # noqa: B009
            raise ConfigError(f"step is a number of seconds, at least 0, got {self.step!r}")
        if type(self.servers) is not int or self.servers < 1:
            raise ConfigError(f"servers must be at least 1, got {self.servers!r}")
        if 0 < self.ssd < self.host_memory:
            raise ConfigError(
                f"the ssd ({format_bytes(self.ssd)}) is smaller than the host tier ({format_bytes(self.host_memory)}), "
                "which drops nothing that is not on the ssd: give more ssd, or none"
            )


class Channel:
    """Moves one thing at a time: demand in the order it is asked for; in the gaps, what is written behind.

    Demand interrupts write-behind at once, which goes on where it was. Times never go back from call to call, and
    ``written(now)`` comes before anything else that happens at ``now``.
    """

    def __init__(self) -> None:
        self.free = 0.0
        """When all demand so far is served."""
        self._behind: deque[int] = deque()
        self._each = 0.0
        self._left = 0.0
        self._clock = 0.0

    @property
    def waiting(self) -> int:
        """Blocks that wait to be written, or are being."""
        return len(self._behind)

    def demand(self, now: float, seconds: float) -> float:
        """When a transfer that is asked for now, and takes ``seconds``, is over."""
        self.free = max(now, self.free) + seconds
        return self.free

    def write_behind(self, ids: Iterable[int], each: float) -> None:
        """To be written when nothing else is to do, ``each`` seconds a block."""
        if not self._behind:
            self._left = each
        self._each = each
        self._behind.extend(ids)

    def written(self, now: float) -> list[int]:
        """What was written in the gaps until now."""
        done, at = [], max(self._clock, min(self.free, now))
        while self._behind and at + self._left <= now:
            at += self._left
            done.append(self._behind.popleft())
            self._left = self._each
        if self._behind:
            self._left -= max(0.0, now - at)
        self._clock = now
        return done

    def force(self, now: float) -> tuple[int, float]:
        """The oldest block that waits is written as demand: which, and when it is done."""
        end = self.demand(now, self._left)
        self._left = self._each
        return self._behind.popleft(), end
