"""The exact scan: the truth every other index is measured against."""

from dataclasses import dataclass

from torch import Tensor

from alaya_tiers.index.base import Found, check_keys, check_query


@dataclass(frozen=True, slots=True, eq=False)
class Flat:
    """All keys, compared with every query. keys: float [tokens, dim]. Raises InputError."""

    keys: Tensor

    def __post_init__(self) -> None:
        check_keys(self.keys)

    def in_range(self, queries: Tensor, beta: float) -> Found:
        check_query(queries, beta, self.keys.shape[1])
        scores = queries.float() @ self.keys.float().T
        if not self.keys.shape[0]:
            return Found(scores.new_empty(0).long(), scores)
        near = (scores >= scores.amax(-1, keepdim=True) - beta).any(0)
        tokens = near.nonzero().flatten()
        return Found(tokens, scores[:, tokens])
