"""How many reads a thread keeps under way: as few as give nearly all that the disk gives.

Too few leave the disk idle, too many only wait in a longer line. Where that turns differs by disk and by
who else reads; so the depth follows the rates that batches had. Pure: told of batches, asked for a depth.
"""

import statistics
from dataclasses import dataclass, replace

DEPTHS = (8, 16, 32, 64, 128, 256)
"""What is tried. io.c has room for the last."""

USUAL = 64
"""Where it begins: measured best on one disk."""

ENOUGH = 0.95
"""Share of the best rate that is as good: of such depths the smallest is used, whose reads wait least."""

ROUNDS = 2
"""A batch tells something about a depth if it was kept full for so many rounds."""

KEPT = 5
"""Rates of a depth that are kept: their median counts, which one bad batch does not move."""

SURE = 3
"""Rates of a depth from which it is believed."""

PROBE = 16
"""One batch in so many is for a neighbour of the depth in use; while that is little known, every second one is."""


@dataclass(frozen=True, slots=True)
class Depth:
    """What batches of reads have told. A depth that once was the best of a disk that has changed is found out in use.

    depth: to be used. rates: reads a second of the last batches with each of DEPTHS. seen: batches.
    """

    depth: int = USUAL
    rates: tuple[tuple[float, ...], ...] = ((),) * len(DEPTHS)
    seen: int = 0

    def choose(self, n: int) -> int:
        """The depth for the next batch, in which each thread reads ``n`` times: that in use, or one to be tried."""
        here = DEPTHS.index(self.depth)
        around = [i for i in (here - 1, here + 1) if 0 <= i < len(DEPTHS) and n >= ROUNDS * DEPTHS[i]]
        if len(self.rates[here]) < SURE or not around:
            return self.depth
        unknown = [i for i in around if len(self.rates[i]) < SURE]
        turn, odd = divmod(self.seen, 2 if unknown else PROBE)
        if odd:
            return self.depth
        choice = unknown or around
        return DEPTHS[choice[turn % len(choice)]]

    def observe(self, depth: int, n: int, reads: int, seconds: float) -> "Depth":
        """What is known after a batch of ``reads``, up to ``n`` by each thread, took so long with this depth."""
        if n < ROUNDS * depth or seconds <= 0 or depth not in DEPTHS:
            return self
        rates, at = list(self.rates), DEPTHS.index(depth)
        rates[at] = (*rates[at], reads / seconds)[-KEPT:]
        known = {d: statistics.median(some) for d, some in zip(DEPTHS, rates, strict=True) if len(some) >= SURE}
        good = [d for d, rate in known.items() if rate >= ENOUGH * max(known.values())]
        return replace(self, depth=min(good, default=self.depth), rates=tuple(rates), seen=self.seen + 1)
