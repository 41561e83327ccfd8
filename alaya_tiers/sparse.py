"""Sparse attention of a decode step: the window and the keys that matter exactly, all others estimated.

    runs of blocks    | sinks | ............ middle ............ | recent |
    how               | exact | coded: scan -> lists -> exact    | exact  |
                      |       | of the others: estimate          |        |
                      |       | not coded (yet): exact           |        |

Window and middle meet at the edges of blocks, so no token is counted twice. Nothing here decides what is right to leave
out: the reach of the query (``Settings.alpha``) does, and what is left out is estimated from its codes, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers import kernel
from alaya_tiers.attention import BlockList, Partial, attend_blocks, attend_lists, merge
from alaya_tiers.engine import Engine
from alaya_tiers.index.codes import MOST_ROWS, Reach, boundable, scan
from alaya_tiers.layer import Layer, Row
from alaya_tiers.ledger import Ids
from alaya_tiers.stats import SparseUse
from alaya_tiers.view import Visible

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
    """Attention of a few queries over one row; None where only exact attention would do, which the caller then does.

    q: [kv_heads, rows, k_dim]; visible without ``extra``. Raises StoreError.
    """
    engine, partitions = state.engine, state.engine.partitions
    s, g, size = engine.settings, state.shape.geometry, state.shape.tokens
    assert partitions is not None
    low, high = int(visible.lo.max()), int(visible.hi.min())
    first, last = -(-(low + s.sink_tokens) // size), min(high - s.recent_tokens, state.length) // size
    if last - first < LEAST or g.dtype not in kernel.DTYPES or q.shape[1] > MOST_ROWS or not boundable(q):
        return None
    middle = np.arange(first, last)
    coded, codes, held = partitions.of(state.ids(row.first[first:last]))
    if int(coded.sum()) < LEAST:
        return None
    group = q.shape[1] // visible.lo.size
    lo, hi = np.concatenate([visible.lo] * group), np.concatenate([visible.hi] * group)
    outside = np.concatenate(
        [
            np.arange(int(visible.lo.min()) // size, first),
            middle[~coded],
            np.arange(last, -(-int(visible.hi.max()) // size)),
        ]
    )
    parts, seed = [], torch.full(q.shape[:2], -torch.inf)
    for blocks in exact(outside):
        top = torch.empty(q.shape[:2])
        parts.append(attend_blocks(q, blocks, scale, lo, hi, softcap, top))
        seed = torch.maximum(seed, top)
    runs, layout = middle[coded], partitions.layout(state.shape)
    reach = Reach.of_share(s.alpha, s.most_selected, s.index_sure or None)
    begin, count = np.zeros(runs.size, np.int32), np.full(runs.size, size, np.int32)
    found = scan(q, codes, begin, count, layout, reach, scale, softcap, seed, partitions.scratch)
    del held
    parts += _lists(
        engine, state, row, q, [(runs[t // layout.rows], t % layout.rows) for t in found.tokens], scale, softcap
    )
    near, rest = merge(parts), Partial(found.rest.to(q.device), found.rest_lse.to(q.device))
    whole = merge((near, rest))
    window = sum(min(state.length, int(run) * size + size) - int(run) * size for run in outside.tolist())
    _note(
        use,
        near,
        whole,
        q,
        window,
        sum(t.size for t in found.tokens) / g.kv_heads,
        high - low,
        codes.size * layout.nbytes,
    )
    if s.measure_mass:
        everything = np.arange(int(visible.lo.min()) // size, -(-int(visible.hi.max()) // size))
        _compare(use, near, whole, merge([attend_blocks(q, b, scale, lo, hi, softcap) for b in exact(everything)]))
    return whole


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
        for _ in state.engine.reading(ids, _nothing_more):
            partitions.make(ids.ravel())
        say(done + 1, len(todo))


def _lists(
    engine: Engine,
    state: Layer,
    row: Row,
    q: Tensor,
    found: list[tuple[Runs, npt.NDArray[np.int32]]],
    scale: float,
    softcap: float | None,
) -> Iterator[Partial]:
    """Exact attention over single tokens of each head, given as (run, offset), batch by batch as blocks arrive."""
    g = state.shape.geometry
    counts = [offsets.size for _, offsets in found]
    if not sum(counts):
        return
    heads = np.repeat(np.arange(g.kv_heads), counts)
    runs, offsets = (np.concatenate(parts) for parts in zip(*found, strict=True))
    blocks, block_of = np.unique(row.first[runs] + heads, return_inverse=True)
    for columns, batch in engine.reading(blocks[None], _nothing_more):
        base = np.full(blocks.size, -1, np.int64)
        base[columns] = engine.addresses(batch)[0]
        here = base[block_of] >= 0
        addresses = base[block_of[here]] + offsets[here] * g.row_bytes
        first = np.searchsorted(heads[here], np.arange(g.kv_heads + 1))
        yield attend_lists(q, addresses, first.astype(np.int64), g.k_dim, g.v_dim, g.dtype, scale, softcap)


def _nothing_more() -> Iterator[Ids]:
    """What to read ahead: for sparse attention nothing is known yet."""
    return iter(())


def _note(
    use: SparseUse, near: Partial, whole: Partial, q: Tensor, window: int, found: float, visible: int, scanned: int
) -> None:
    share = torch.exp(near.lse - whole.lse)
    steps = share.numel()
    use.steps += steps
    use.window += window * steps
    use.attended += round((window + found) * steps)
    use.visible += visible * steps
    use.scanned_bytes += scanned
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
