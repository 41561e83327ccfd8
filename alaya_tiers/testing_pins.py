"""Who pins which blocks, why, and since when: for a test or a person who looks for a pin that was left.

``Queues.pinned`` says at no cost that there are some. Who holds them is asked of the stack here, which costs
microseconds a pin: a ledger is watched only while one of these is open.
"""

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from alaya_tiers.ledger import Freed, Ids, Ledger
from alaya_tiers.mover import Mover
from alaya_tiers.seams import Clock

DEPTH = 4
"""Callers that say why."""


@dataclass(frozen=True, slots=True)
class Held:
    """Pins that one call took. why: who called whom, the nearest first. since: by the clock. blocks: still pinned."""

    why: str
    thread: str
    since: float
    blocks: tuple[int, ...]


class Pins:
    """Of one ledger, what was pinned since it is watched. A block's pins are let go of last in, first out."""

    def __init__(self, ledger: Ledger, clock: Clock) -> None:
        self._ledger, self._clock = ledger, clock
        self._held: list[tuple[str, str, float, Counter[int]]] = []

    def pin(self, ids: Ids) -> None:
        """See Ledger."""
        Ledger.pin(self._ledger, ids)
        if ids.size:
            name, now = threading.current_thread().name, self._clock.monotonic()
            self._held.append((_callers(), name, now, Counter(ids.tolist())))

    def unpin(self, ids: Ids) -> Freed:
        """See Ledger."""
        freed, left = Ledger.unpin(self._ledger, ids), Counter[int](ids.tolist())
        for *_, blocks in reversed(self._held):
            here = blocks & left
            blocks -= here
            left -= here
        self._held = [held for held in self._held if held[3]]
        return freed

    def held(self) -> list[Held]:
        """What is pinned now, the oldest first."""
        return [Held(why, thread, since, tuple(sorted(blocks))) for why, thread, since, blocks in self._held]


@contextmanager
def watching_pins(mover: Mover, clock: Clock) -> Iterator[Pins]:
    """Inside, every pin of the mover's ledger is written down."""
    book = mover.ledger
    pins = Pins(book, clock)
    with mover.lock:
        vars(book).update(pin=pins.pin, unpin=pins.unpin)
    try:
        yield pins
    finally:
        with mover.lock:
            del vars(book)["pin"], vars(book)["unpin"]


def _callers() -> str:
    frame: FrameType | None = sys._getframe(2)
    found = list[str]()
    while frame is not None and len(found) < DEPTH:
        found.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_qualname}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found)
