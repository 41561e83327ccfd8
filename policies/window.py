"""What the device tier keeps: sinks and recent tokens."""

from dataclasses import dataclass

import numpy as np

from alaya_tiers.policies.base import EvictionView, Ids, take


@dataclass(frozen=True, slots=True)
class Window:
    """Blocks leave as the window slides: oldest position first, the first ``sink_tokens`` of the context last.

    Source: the window of initial and last tokens of AlayaDB (arXiv 2504.10326, 7.1).
    """

    sink_tokens: int = 256

    def victims(self, view: EvictionView, n: int) -> Ids:
        sink = view.start < self.sink_tokens
        return take(np.lexsort((view.start, sink)), view.ids, n)
