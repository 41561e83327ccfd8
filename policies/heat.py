"""Eviction by attention: what queries looked at least of late leaves first."""

from dataclasses import dataclass

from alaya_tiers.policies.base import EvictionView, Ids, lowest


@dataclass(frozen=True, slots=True)
class Heat:
    """The coldest leave first, by uses that count less the older they are; the least recently used breaks ties.

    Attention has tokens it comes back to after many steps: a page that DIPR wanted often outlives one it wanted last.
    """

    def victims(self, view: EvictionView, n: int) -> Ids:
        if view.heat is None:
            return lowest((view.start, view.used), view.ids, n)
        return lowest((view.start, view.used, view.heat), view.ids, n)


@dataclass(frozen=True, slots=True)
class Cost:
    """What is cheap to have again for the bytes it frees, and cold, leaves first.

    Worth of a byte: heat x seconds to fetch / bytes, and a fetch takes ``latency`` seconds and its bytes over ``rate``
    bytes a second: small things are dear to fetch singly, so they stay longer than large ones of the same heat.
    Source: Cao and Irani, Cost-Aware WWW Proxy Caching Algorithms (USITS 1997), with heat for its clock.
    """

    latency: float = 100e-6
    rate: float = 1e9

    def victims(self, view: EvictionView, n: int) -> Ids:
        if view.heat is None or view.nbytes is None:
            return lowest((view.start, view.used), view.ids, n)
        worth = view.heat * (self.latency + view.nbytes / self.rate) / view.nbytes
        return lowest((view.start, view.used, worth), view.ids, n)
