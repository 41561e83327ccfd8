"""Coarse: clusters of keys with a centroid and bounds; whole clusters are left out before any key is looked at.

Keys are clustered within segments, so that a segment's clusters are made once and move with it. A key's score is
``q.centroid + q.rest`` and ``|q.rest| <= |q| |rest|``: with ``sure=None`` no cluster that could hold a key within
reach is left out, and the answer is complete. With ``sure`` standard deviations (of the
scores that the rests of a cluster have, by the spread of all rests of the segment) fewer clusters are looked at, and
some keys are missed.

Sources: clusters of about 16 keys within 8K segments: RetroInfer (arXiv 2505.02922); bounds: Quest (arXiv 2406.10774).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from alaya_tiers.errors import InputError
from alaya_tiers.index.base import Found, check_keys, check_query

ROUNDS = 6
"""Of k-means: more change little."""

FIRST = 8
"""Clusters a query looks at before it bounds the others."""


class Coarse:
    """Clusters of one partition, and the exact keys. keys: float [tokens, dim].

    size: keys of a cluster, on average. sure: standard deviations that are allowed for; None: any there can be.
    Raises InputError for keys that are not finite or whose squares are not.
    """

    def __init__(self, keys: Tensor, size: int = 16, segment: int = 8192, sure: float | None = None) -> None:
        if size < 1 or segment < 1 or (sure is not None and not sure > 0):
            raise InputError(
                f"clusters of {size} keys in segments of {segment}, {sure} deviations: all must be above 0"
            )
        check_keys(keys)
        self.keys, self.sure = keys.float(), sure
        if not bool(torch.isfinite(self.keys.norm(dim=1) ** 2).all()):
            raise InputError(
                "keys that are not finite, or whose squares are not, have no clusters; attend them exactly"
            )
        parts = [_clusters(self.keys[i : i + segment], size) for i in range(0, len(keys), segment)]
        dim = keys.shape[1]
        self.centroids = torch.cat([p[1] for p in parts]) if parts else torch.empty(0, dim)
        members, counts, radii = (
            [torch.empty(0, dtype=torch.long)],
            [torch.zeros(1, dtype=torch.long)],
            [torch.empty(0)],
        )
        self._spreads: list[tuple[Tensor, Tensor]] = []
        for i, (nearest, centroids) in enumerate(parts):
            rest = self.keys[i * segment : i * segment + nearest.numel()] - centroids[nearest]
            length, zero = rest.norm(dim=1), torch.zeros(len(centroids))
            members.append(torch.argsort(nearest, stable=True) + i * segment)
            counts.append(torch.bincount(nearest))
            radii.append(zero.scatter_reduce(0, nearest, length, "amax"))
            squares, variance = zero.index_add(0, nearest, length**2) / counts[-1], rest.pow(2).mean(0)
            self._spreads.append((squares, variance / variance.sum().clamp_min(1e-30)))
        self.members = torch.cat(members)
        """int64 [tokens]: keys, cluster by cluster."""
        self.first = torch.cat(counts).cumsum(0)
        """int64 [clusters + 1]: where each cluster's members begin."""
        self.radius = torch.cat(radii)
        """float32 [clusters]: the longest way from a centroid to a member."""
        self._longest = float(self.keys.norm(dim=1).max()) if len(keys) else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of centroids, bounds and lists of members; the keys are not the index's."""
        each = self.centroids.shape[1] * 4 + 4 + 4 + 8
        return len(self.centroids) * each + self.members.numel() * 4

    def in_range(self, queries: Tensor, beta: float) -> Found:
        """See Index. Complete with ``sure=None``."""
        check_query(queries, beta, self.keys.shape[1])
        q = queries.float()
        if not len(self.keys):
            return Found(torch.empty(0, dtype=torch.long), torch.empty(len(q), 0))
        if not bool(torch.isfinite(q).all()):
            raise InputError("queries that are not finite reach no keys")
        tokens = self._of(self._within(q, beta)).sort().values
        scores = q @ self.keys[tokens].T
        found = (scores >= scores.amax(1, keepdim=True) - beta).any(0)
        return Found(tokens[found], scores[:, found])

    def looked_at(self, queries: Tensor, beta: float) -> int:
        """How many keys a query's clusters hold: what is left to compare one by one."""
        clusters = self._within(queries.float(), beta)
        return int((self.first[clusters + 1] - self.first[clusters]).sum())

    def _within(self, q: Tensor, beta: float) -> Tensor:
        """Clusters that may hold a key within reach of some query."""
        near = q @ self.centroids.T
        top: Tensor = near.topk(min(FIRST, near.shape[1]), dim=1).indices
        looked = torch.from_numpy(np.unique(top.numpy()))
        best = (q @ self.keys[self._of(looked)].T).amax(1)
        bound = near + self._widths(q) + 1e-5 * q.norm(dim=1, keepdim=True) * self._longest
        within = (bound >= (best - beta)[:, None]).any(0)
        within[looked] = True
        clusters: Tensor = within.nonzero().flatten()
        return clusters

    def _widths(self, q: Tensor) -> Tensor:
        """How far above its centroid's score a key of each cluster can score. float32 [queries, clusters]."""
        widest: Tensor = q.norm(dim=1, keepdim=True) * self.radius
        if self.sure is None:
            return widest
        spread = torch.cat([(q**2 @ share)[:, None] * squares for squares, share in self._spreads], 1)
        return torch.minimum(widest, self.sure * spread.sqrt())

    def _of(self, clusters: Tensor) -> Tensor:
        """Keys of some clusters."""
        first, count = self.first[clusters].numpy(), (self.first[clusters + 1] - self.first[clusters]).numpy()
        ends = np.cumsum(count)
        return self.members[torch.from_numpy(np.arange(ends[-1]) + np.repeat(first - (ends - count), count))]


def _clusters(keys: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """K-means: nearest centroid of each key, int64 [n], and centroids, float32 [clusters, dim]; none is empty."""
    n = len(keys)
    centre = keys.mean(0)
    x = keys - centre
    k = -(-n // size)
    centroids = x[torch.linspace(0, n - 1, k).long()].clone()
    nearest = torch.zeros(n, dtype=torch.long)
    for _ in range(ROUNDS):
        nearest = (x @ centroids.T - centroids.pow(2).sum(1) / 2).argmax(1)
        count = torch.bincount(nearest, minlength=len(centroids))
        sums = torch.zeros_like(centroids).index_add_(0, nearest, x)
        centroids = torch.where(count[:, None] > 0, sums / count[:, None].clamp_min(1), centroids)
    kept, place = np.unique(nearest.numpy(), return_inverse=True)
    return torch.from_numpy(place), centroids[torch.from_numpy(kept)] + centre
