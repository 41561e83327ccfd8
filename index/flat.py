"""The exact scan: the truth every other index is measured against."""

from dataclasses import dataclass

from torch import Tensor

from alaya_tiers.errors import InputError
from alaya_tiers.index.base import Found


@dataclass(frozen=True, slots=True, eq=False)
class Flat:
    """All keys, compared with every query. keys: float [tokens, dim]."""

    keys: Tensor

    def in_range(self, queries: Tensor, beta: float) -> Found:
        if beta < 0:
            raise InputError(f"beta is a distance below the best score and cannot be negative: {beta}")
        scores = queries.float() @ self.keys.float().T
        if not self.keys.shape[0]:
            return Found(scores.new_empty(0).long(), scores)
        near = (scores >= scores.amax(-1, keepdim=True) - beta).any(0)
        tokens = near.nonzero().flatten()
        return Found(tokens, scores[:, tokens])
