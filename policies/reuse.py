"""Whether a stored prefix is worth loading, or computed again: what it costs to read against what a prefill takes."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ReuseView:
    """A stored prefix that fits a prompt.

    tokens: of it, all rows together. cold_bytes: what must be read from ssd for the first new token. ssd_rate: bytes a
    second. prefill: seconds that a token of a prompt takes; None where nothing was measured.
    """

    tokens: int
    cold_bytes: int
    ssd_rate: float
    prefill: float | None

    @property
    def load_seconds(self) -> float:
        """What reading it takes."""
        return self.cold_bytes / self.ssd_rate

    @property
    def compute_seconds(self) -> float | None:
        """What computing it again takes, at least: attention makes later tokens dearer."""
        return None if self.prefill is None else self.tokens * self.prefill


@dataclass(frozen=True, slots=True)
class Reuse:
    """The decision, the two costs in seconds it weighs, and why in words."""

    reused: bool
    load_seconds: float
    compute_seconds: float | None
    why: str


class ReusePolicy(Protocol):
    """Chooses between loading and computing."""

    def decide(self, view: ReuseView) -> Reuse:
        """Whether to reuse the prefix."""
        ...


@dataclass(frozen=True, slots=True)
class Cheaper:
    """What is faster. advantage: how many times as long as computing it loading may take."""

    advantage: float = 1.0

    def decide(self, view: ReuseView) -> Reuse:
        load, compute = view.load_seconds, view.compute_seconds
        if not view.tokens:
            return Reuse(False, 0.0, 0.0, "nothing that is stored begins as the prompt does")
        if compute is None:
            return Reuse(True, load, None, f"reading takes {load:.3g} s; no prefill was measured to compare with")
        reused = load <= self.advantage * compute
        words = f"reading takes {load:.3g} s and computing {compute:.3g} s or more"
        return Reuse(reused, load, compute, f"{'reused' if reused else 'computed again'}: {words}")


@dataclass(frozen=True, slots=True)
class Always:
    """Reuse whatever fits."""

    def decide(self, view: ReuseView) -> Reuse:
        return Reuse(view.tokens > 0, view.load_seconds, view.compute_seconds, "asked for: always reuse")


@dataclass(frozen=True, slots=True)
class Never:
    """Compute everything."""

    def decide(self, view: ReuseView) -> Reuse:
        return Reuse(False, view.load_seconds, view.compute_seconds, "asked for: never reuse")
