"""Least recently used: the naive eviction policy the others are measured against."""

from dataclasses import dataclass

from alaya_tiers.policies.base import EvictionView, Ids, lowest


@dataclass(frozen=True, slots=True)
class Lru:
    """What was not used for the longest time leaves first; the layer that comes last breaks ties."""

    def victims(self, view: EvictionView, n: int) -> Ids:
        return lowest((view.start, -view.layer, view.used), view.ids, n)
