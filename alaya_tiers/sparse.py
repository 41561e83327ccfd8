"""Sparse attention of a decode step: the window and the keys that matter exactly, all others estimated.

    runs of blocks    | sinks | ............ middle ............ | recent |
    how               | exact | coded: scan -> lists -> exact    | exact  |
                      |       | of the others: estimate          |        |
                      |       | not coded (yet): exact           |        |

Window and middle meet at the edges of blocks, so no token is counted twice. Nothing here decides what is right to leave
out: the reach of the query (``Settings.alpha``) does, and what is left out is estimated from its codes, never ignored.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers import kernel
from alaya_tiers.attention import BlockList, Partial, attend_blocks, attend_lists, merge
from alaya_tiers.index.codes import MOST_ROWS, Reach, boundable, scan
from alaya_tiers.layer import Layer, Row
from alaya_tiers.ledger import Ids
from alaya_tiers.stats import SparseUse
from alaya_tiers.view import Visible


class IndexFullWarning(UserWarning):
    """The index has used up its budget: what is not in it is attended exactly."""


LEAST = 4
"""Runs of coded blocks that are worth a scan."""

Runs = npt.NDArray[np.intp]
Exact = Callable[[Runs], Iterator[BlockList]]
"""Blocks of some runs of a row, batch by batch, in memory the CPU reads."""


def attend(
    state: Layer,
    row: Row,
    q: Tensor,
    visible: Visible,
    scale: float,
    softcap: float | None,
    exact: Exact,
    use: SparseUse,
) -> Partial | None:
    """Attention of a few queries over one row; None where exact attention is the plan, which the caller then does.

    q: [kv_heads, rows, k_dim]; visible without ``extra``. Raises StoreError.
    """
    partitions, s, g, size = state.engine.partitions, state.engine.settings, state.shape.geometry, state.shape.tokens
    assert partitions is not None
    low, high = int(visible.lo.max()), int(visible.hi.min())
    begin, end = int(visible.lo.min()) // size, -(-int(visible.hi.max()) // size)
    first, last = -(-(low + s.sink_tokens) // size), min(high - s.recent_tokens, state.length) // size
    if last - first < LEAST or g.dtype not in kernel.DTYPES or q.shape[1] > MOST_ROWS or not boundable(q):
        return None
    coded, codes, held = partitions.of(state.ids(row.first[first:last]))
    if partitions.full:
        _warn_full(s.index_budget)
    if int(coded.sum()) < LEAST or state.history.skips():
        return None
    middle = np.arange(first, last)
    runs, outside = middle[coded], np.concatenate([np.arange(begin, first), middle[~coded], np.arange(last, end)])
    group = q.shape[1] // visible.lo.size
    lo, hi = np.concatenate([visible.lo] * group), np.concatenate([visible.hi] * group)

    def dense(some: Runs, top: Tensor | None = None) -> Iterator[Partial]:
        for blocks in exact(some):
            here = torch.empty(q.shape[:2])
            yield attend_blocks(q, blocks, scale, lo, hi, softcap, here)
            if top is not None:
                torch.maximum(top, here, out=top)

    seed = torch.full(q.shape[:2], -torch.inf)
    parts = list(dense(outside, seed))
    layout = partitions.layout(state.shape)
    reach = Reach.of_share(s.alpha, s.most_selected, s.index_sure or None)
    zero, full = np.zeros(runs.size, np.int32), np.full(runs.size, size, np.int32)
    found = scan(q, codes, zero, full, layout, reach, scale, softcap, seed, partitions.scratch)
    del held
    n_found, n_coded = sum(tokens.size for tokens in found.tokens), runs.size * size * g.kv_heads
    if state.history.judge(n_found, n_coded):
        use.exact += seed.numel()
        return merge([*parts, *dense(runs)])
    near = merge([*parts, *_lists(state, row, q, runs, found.tokens, layout.rows, scale, softcap)])
    whole = merge((near, Partial(found.rest.to(q.device), found.rest_lse.to(q.device))))
    window = int((np.minimum(state.length, (outside + 1) * size) - outside * size).sum())
    _note(use, torch.exp(near.lse - whole.lse), window, n_found / g.kv_heads, high - low)
    use.scanned_bytes += codes.size * layout.nbytes
    if s.measure_mass:
        _compare(use, near, whole, merge(list(dense(np.arange(begin, end)))))
    return whole


def _warn_full(budget: int | None) -> None:
    warnings.warn(
        f"the index has used up index_budget={budget} bytes: tokens beyond are attended exactly. Raise it, or take "
        "index_bits=4",
        IndexFullWarning,
        stacklevel=2,
    )


def build(states: list[Layer], say: Callable[[int, int], None]) -> None:
    """Make all codes that are missing now, reading what is not in memory. say: told (blocks tried, blocks to try)."""
    todo = []
    for state in states:
        partitions = state.engine.partitions
        assert partitions is not None
        for row in state.rows:
            first = row.first[: state.length // state.shape.tokens]
            if first.size:
                coded, _, _ = partitions.of(state.ids(first))
                todo += [(state, partitions, state.ids(run[None])) for run in first[~coded]]
    for done, (state, partitions, ids) in enumerate(todo):
        for _ in state.engine.reading(ids, nothing_more):
            partitions.make(ids.ravel())
        say(done + 1, len(todo))


def _lists(
    state: Layer,
    row: Row,
    q: Tensor,
    runs: Runs,
    found: list[npt.NDArray[np.int32]],
    rows: int,
    scale: float,
    softcap: float | None,
) -> Iterator[Partial]:
    """Exact attention over single tokens of each head, batch by batch as their blocks arrive.

    found: for each head, place of the run in ``runs`` x ``rows`` + offset, ascending.
    """
    engine, g = state.engine, state.shape.geometry
    counts = np.array([tokens.size for tokens in found])
    if not counts.any():
        return
    tokens, first = np.concatenate(found), np.append(0, np.cumsum(counts))
    offsets = tokens % rows * g.row_bytes
    cell = tokens // rows + np.repeat(np.arange(g.kv_heads) * runs.size, counts)  # of a table [heads, runs]
    wanted = np.zeros(g.kv_heads * runs.size, bool)
    wanted[cell] = True
    cells, blocks = np.flatnonzero(wanted), state.ids(row.first[runs]).ravel()[wanted]
    for columns, batch in engine.reading(blocks[None], nothing_more):
        base = np.full(wanted.size, -1, np.int64)
        base[cells[columns]] = engine.addresses(batch)[0]
        start = base[cell]
        if columns.size == blocks.size:
            yield attend_lists(q, start + offsets, first, g.k_dim, g.v_dim, g.dtype, scale, softcap)
            continue
        here = start >= 0
        some = np.append(0, np.cumsum(here))[first]
        yield attend_lists(q, (start + offsets)[here], some, g.k_dim, g.v_dim, g.dtype, scale, softcap)


def nothing_more() -> Iterator[Ids]:
    """What to read ahead in sparse mode: the order in which exact attention reads says nothing of what is next."""
    return iter(())


def _note(use: SparseUse, share: Tensor, window: int, found: float, visible: int) -> None:
    steps = share.numel()
    use.steps += steps
    use.window += window * steps
    use.attended += round((window + found) * steps)
    use.visible += visible * steps
    use.recovered += float(share.sum())
    use.least = min(use.least, float(share.min()))


def _compare(use: SparseUse, near: Partial, whole: Partial, truth: Partial) -> None:
    share = torch.exp(near.lse - truth.lse).clamp(max=1.0)
    error = (whole.out - truth.out).norm(dim=-1) / truth.out.norm(dim=-1).clamp_min(1e-9)
    use.measured += share.numel()
    use.true_recovered += float(share.sum())
    use.true_least = min(use.true_least, float(share.min()))
    use.error += float(error.sum())
    use.worst_error = max(use.worst_error, float(error.max()))
