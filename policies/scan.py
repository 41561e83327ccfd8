"""Eviction for exact attention, which reads every block of every layer at every step, in the same order."""

from dataclasses import dataclass

import numpy as np

from alaya_tiers.policies.base import EvictionView, Ids, take


@dataclass(frozen=True, slots=True)
class Scan:
    """What will be needed last leaves first: Belady's optimum, because the order of a cyclic scan is known.

    Under such a scan LRU always evicts what is needed next and never hits; this keeps a fixed part of the context
    resident and streams the rest through the slots of what was just used. A block's distance is the number of layers
    until its turn, a whole round when its turn in the present pass is over.
    """

    def victims(self, view: EvictionView, n: int) -> Ids:
        rounds = max(view.layers, 1)
        distance = (view.layer - view.cursor) % rounds
        distance = np.where((distance == 0) & (view.used >= view.pass_tick), rounds, distance)
        return take(np.lexsort((-view.start, -distance)), view.ids, n)
