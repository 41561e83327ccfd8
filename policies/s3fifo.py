"""S3-FIFO: what was wanted once leaves soon, what was wanted again stays."""

from dataclasses import dataclass

import numpy as np

from alaya_tiers.policies.base import EvictionView, Ids, lowest


@dataclass(frozen=True, slots=True)
class S3Fifo:
    """Newcomers are on probation and leave first, oldest first, while they take more than ``small`` of what may leave.

    On probation is what was used at most once since it came and had not been here before: what is evicted and wanted
    again has proved itself. The others leave by last use, which is what the reinsertions of the paper's main queue
    amount to. A function of what the book counts, so there are no queues to keep.
    Source: Yang et al., FIFO Queues are All You Need for Cache Eviction (SOSP 2023).
    """

    small: float = 0.1

    def victims(self, view: EvictionView, n: int) -> Ids:
        if view.uses is None:
            return lowest((view.start, view.used), view.ids, n)
        probation = view.uses <= 1
        if view.returned is not None:
            probation &= ~view.returned
        excess = int(probation.sum()) - int(self.small * view.ids.size)
        young = lowest((view.used[probation],), view.ids[probation], max(0, min(n, excess)))
        if young.size == n:
            return young
        rest = ~np.isin(view.ids, young)
        return np.concatenate([young, lowest((~probation[rest], view.used[rest]), view.ids[rest], n - young.size)])
