"""What an index is: it finds the keys that matter for a query, and never loads or moves a block."""

from typing import NamedTuple, Protocol

from torch import Tensor

from alaya_tiers.errors import InputError


class Found(NamedTuple):
    """The answer to a range query.

    tokens: int64 [found], ascending positions within the partition. scores: float32 [queries, found], q.k of each.
    """

    tokens: Tensor
    scores: Tensor


class Index(Protocol):
    """Finds keys of one partition: the keys of one (layer, kv head) of one segment."""

    def in_range(self, queries: Tensor, beta: float) -> Found:
        """DIPR(q, beta): every key with ``q.k >= max - beta`` for at least one query of the group.

        queries: float [queries, dim], the query heads that share the kv head. beta: score units (q.k, unscaled), >= 0.
        Source: AlayaDB (arXiv 2504.10326), definition 3.
        """
        ...


def check_keys(keys: Tensor) -> None:
    """Raises InputError for what no index can be made of."""
    if keys.ndim != 2 or not keys.shape[1]:
        raise InputError(f"keys of an index are [tokens, dim], not {list(keys.shape)}")


def check_query(queries: Tensor, beta: float, dim: int) -> None:
    """Raises InputError for what no index can answer."""
    if not beta >= 0:
        raise InputError(f"beta is a distance below the best score and cannot be negative: {beta}")
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise InputError(f"queries of keys with {dim} numbers are [queries, {dim}], not {list(queries.shape)}")
