"""How long tokens take: a meter for each session, and what all of them measured."""

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

from alaya_tiers.seams import Clock

BOUNDS = tuple(float(f"{digit}e{power}") for power in range(-3, 2) for digit in (1, 2, 5))
"""Upper ends of a histogram's buckets in seconds, 1 ms to 50 s; a last bucket has the rest."""

PREFILL = 16
"""Tokens in one forward from which on it counts as a prefill."""


@dataclass(slots=True)
class Histogram:
    """Durations by size: ``counts[i]`` of at most ``BOUNDS[i]`` seconds and more than the bound before."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    seconds: float = 0.0
    """All of them together."""

    def note(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds

    @property
    def count(self) -> int:
        """How many."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Seconds; 0 when there is none."""
        return self.seconds / self.count if self.count else 0.0

    def quantile(self, share: float) -> float:
        """Seconds that this share of them does not exceed, by straight lines within a bucket; 0 when there is none."""
        wanted, before = share * self.count, 0
        for number, count in enumerate(self.counts):
            if count and before + count >= wanted:
                low = BOUNDS[number - 1] if number else 0.0
                high = BOUNDS[min(number, len(BOUNDS) - 1)]  # of the last bucket nothing better is known
                return low + (high - low) * max(0.0, wanted - before) / count if high > low else low
            before += count
        return 0.0

    def copy(self) -> "Histogram":
        """As it is now."""
        return Histogram(list(self.counts), self.seconds)

    def as_dict(self) -> dict[str, Any]:
        """JSON values; bounds are the upper ends of all buckets but the last."""
        found = {"count": self.count, "mean": self.mean, "median": self.quantile(0.5), "p90": self.quantile(0.9)}
        return found | {"bounds": list(BOUNDS), "counts": self.counts}


@dataclass(slots=True)
class Steps:
    """What the sessions of one engine measured. decoding: from the first layer of a step to that of the next.

    prefill_tokens, prefill_seconds: of forwards of at least PREFILL tokens, from the first layer to the last attention.
    """

    decoding: Histogram = field(default_factory=Histogram)
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0

    @property
    def prefill_rate(self) -> float | None:
        """Seconds a token of a prompt takes; None until one was measured."""
        return self.prefill_seconds / self.prefill_tokens if self.prefill_tokens else None


class Meter:
    """Measures the steps of one session. A pause between prompt and answer is no part of either."""

    def __init__(self, steps: Steps, clock: Clock) -> None:
        self._steps, self._clock = steps, clock
        self._first: int | None = None
        self._tokens, self._uncounted = 0, 0
        self._began = self._mark = 0.0

    def begins(self, layer: int, tokens: int) -> None:
        """A layer is about to get ``tokens`` new tokens."""
        if self._first is None:
            self._first = layer
        if layer != self._first:
            return
        now = self._clock.monotonic()
        if self._tokens == tokens == 1:
            self._steps.decoding.note(now - self._began)
        self._tokens, self._began, self._mark = tokens, now, now
        self._uncounted = tokens if tokens >= PREFILL else 0

    def attended(self) -> None:
        """Attention of a layer is done."""
        if self._tokens < PREFILL:
            return
        now = self._clock.monotonic()
        self._steps.prefill_seconds += now - self._mark
        self._steps.prefill_tokens += self._uncounted
        self._mark, self._uncounted = now, 0
