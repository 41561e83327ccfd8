"""Reading ahead in sparse mode: which pages of cold blocks a layer's next step will want."""

from collections.abc import Mapping
from dataclasses import dataclass

from alaya_tiers.policies.base import Guess, GuessView

SOURCES = ("last", "beside", "across", "hot", "query")
UNSEEN = ("query",)
"""Sources that a replay of a trace cannot have."""


@dataclass(frozen=True, slots=True)
class NoGuess:
    """Read only what attention asks for: the baseline."""

    def sources(self, precision: Mapping[str, float], turn: int) -> tuple[str, ...]:
        return ()

    def plan(self, view: GuessView) -> list[Guess]:
        return []


@dataclass(frozen=True, slots=True)
class From:
    """Everything that one source suggests, likeliest first."""

    source: str = "last"

    def sources(self, precision: Mapping[str, float], turn: int) -> tuple[str, ...]:
        return (self.source,)

    def plan(self, view: GuessView) -> list[Guess]:
        return [Guess(self.source, getattr(view, self.source)[: view.room])]


@dataclass(frozen=True, slots=True)
class Confident:
    """Every source that has earned trust, the most precise first; looking costs time, so the others wait.

    A source is trusted while at least ``least`` of its guesses come true. One that is not is tried again every
    ``pause`` turns with ``trial`` pages, so that it can earn trust when the text changes.
    """

    least: float = 0.3
    trial: int = 16
    pause: int = 97

    def sources(self, precision: Mapping[str, float], turn: int) -> tuple[str, ...]:
        return tuple(name for name in SOURCES if turn % self.pause == 0 or precision.get(name, 1.0) >= self.least)

    def plan(self, view: GuessView) -> list[Guess]:
        room, found = view.room, []
        for source in sorted(SOURCES, key=lambda name: -view.precision.get(name, 1.0)):
            most = room if view.precision.get(source, 1.0) >= self.least else min(room, self.trial)
            found.append(Guess(source, getattr(view, source)[:most]))
            room -= found[-1].pages.size
        return found
