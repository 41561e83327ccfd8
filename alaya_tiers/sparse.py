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
from alaya_tiers.blocks import PAGE
from alaya_tiers.index.codes import MOST_ROWS, Layout, Reach, boundable, scan
from alaya_tiers.index.plan import History, Rates, Step
from alaya_tiers.layer import Layer, Row
from alaya_tiers.ledger import Ids
from alaya_tiers.picks import Picks, missed_share, pageable
from alaya_tiers.stats import SparseUse
from alaya_tiers.view import Heads, Spans, Visible


class IndexFullWarning(UserWarning):
    """The index has used up its budget: what is not in it is attended exactly."""


LEAST = 4
"""Coded blocks that are worth a scan."""

NONE = np.empty(0, np.int32)

Exact = Callable[[Spans, Heads], Iterator[BlockList]]
"""Blocks of some kv heads of a row, batch by batch, in memory the CPU reads."""


def attend(
    state: Layer,
    row: Row,
    history: History,
    q: Tensor,
    visible: Visible,
    scale: float,
    softcap: float | None,
    exact: Exact,
    use: SparseUse,
) -> Partial | None:
    """Attention of a few queries over one row; None where exact attention of all heads is the plan: the caller's work.

    q: [kv_heads, rows, k_dim]; visible without ``extra``. Raises StoreError.
    """
    partitions, s, g, size = state.engine.partitions, state.engine.settings, state.shape.geometry, state.shape.tokens
    assert partitions is not None
    low, high = int(visible.lo.max()), int(visible.hi.min())
    first, last = -(-(low + s.sink_tokens) // size), min(high - s.recent_tokens, state.length) // size
    if last - first < LEAST or g.dtype not in kernel.DTYPES or q.shape[1] > MOST_ROWS or not boundable(q):
        return None
    every = visible.spans(state.length, size)
    inner = (every.run >= first) & (every.run < last)
    middle = every.where(inner)
    coded, codes, held = partitions.of(state.ids(row.first[middle.run]))
    if partitions.full:
        _warn_full(s.index_budget)
    if int(coded.sum()) < LEAST:
        return None
    inner[inner] = coded
    outside, middle, layout = every.where(~inner), middle.where(coded), partitions.layout(state.shape)
    step = _step(state, row, outside, middle, layout)
    rates = Rates(s.read_rate, s.scan_rate, s.pick_seconds, s.ssd_rate, s.page_seconds)
    target = None if s.attention_target is None else s.attention_target / len(state.engine.mover.shapes)
    look, most = history.plan(step, rates, target, s.most_selected)
    history.tokens = int(every.count.sum())
    if not look.any():
        return None
    group = q.shape[1] // visible.lo.size
    lo, hi = np.concatenate([visible.lo] * group), np.concatenate([visible.hi] * group)

    def dense(some: Spans, heads: Heads, top: Tensor | None = None) -> Iterator[Partial]:
        for blocks in exact(some, heads):
            here = torch.empty(heads.size, q.shape[1])
            yield attend_blocks(q[heads], blocks, scale, lo, hi, softcap, here)
            if top is not None:
                torch.maximum(top, here, out=top)

    heads = np.flatnonzero(look)
    seed = torch.full((heads.size, q.shape[1]), -torch.inf)
    parts = list(dense(outside, heads, seed))
    reach = Reach.of_share(s.alpha, most, s.index_sure or None)
    found = scan(
        q[heads], codes[heads], middle.first, middle.count, layout, reach, scale, softcap, seed, partitions.scratch
    )
    del held
    n_found = np.array([tokens.size for tokens in found.tokens])
    dear = history.judge(n_found.astype(np.float64), step, rates)
    tokens = [NONE if everything else some for some, everything in zip(found.tokens, dear, strict=True)]
    near = merge([*parts, *_lists(state, row, q, heads, middle, tokens, layout.rows, scale, softcap)])
    whole = merge((near, Partial(found.rest.to(q.device), found.rest_lse.to(q.device))))
    sparse, window = ~dear, int(outside.count.sum())
    _note(use, torch.exp(near.lse - whole.lse)[sparse], window, n_found[sparse], history.tokens)
    if (recorder := state.engine.recorder) is not None:
        places = [middle.run[tokens[i] // layout.rows] * size + tokens[i] % layout.rows for i in np.flatnonzero(sparse)]
        mass = float(torch.exp(near.lse - whole.lse)[sparse].mean()) if places else 1.0
        flat = np.concatenate([heads[dear], np.flatnonzero(~look)])
        recorder.found(state, q.shape[1], (window, history.tokens), heads[sparse], flat, places, mass)
    use.scanned_bytes += codes[heads].size * layout.nbytes
    if s.measure_mass and sparse.any():
        truth = merge(list(dense(every, heads[sparse])))
        _compare(use, Partial(*(x[sparse] for x in near)), Partial(*(x[sparse] for x in whole)), truth)
    if sparse.all() and look.all():
        return whole
    rest = np.concatenate([heads[dear], np.flatnonzero(~look)])
    use.exact += rest.size * q.shape[1]
    return _together(heads[sparse], Partial(*(x[sparse] for x in whole)), rest, merge(list(dense(every, rest))))


def _together(some: Heads, of_some: Partial, rest: Heads, of_rest: Partial) -> Partial:
    """Results of different kv heads as one."""
    order = torch.from_numpy(np.argsort(np.concatenate([some, rest])))
    return Partial(*(torch.cat(pair)[order] for pair in zip(of_some, of_rest, strict=True)))


def _step(state: Layer, row: Row, outside: Spans, middle: Spans, layout: Layout) -> Step:
    """What a step of one kv head costs in bytes."""
    g, book = state.shape.geometry, state.engine.mover.ledger
    window = float(outside.count.sum() * g.row_bytes)
    cold = 1 - float(book.readable(row.first[middle.run]).mean())
    return Step(
        window + float(middle.count.sum() * g.row_bytes), window, float(middle.count.sum() * layout.dims), g.row_bytes,
        state.shape.nbytes, middle.run.size, cold, missed_share(state),
    )  # fmt: skip


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
    heads: Heads,
    spans: Spans,
    found: list[npt.NDArray[np.int32]],
    rows: int,
    scale: float,
    softcap: float | None,
) -> Iterator[Partial]:
    """Exact attention over single tokens of some kv heads, batch by batch as their blocks arrive.

    found: for each of ``heads``, place of the block in ``spans`` x ``rows`` + offset, ascending.
    """
    engine, g = state.engine, state.shape.geometry
    counts = np.array([tokens.size for tokens in found])
    if not counts.any():
        return
    tokens, first = np.concatenate(found), np.append(0, np.cumsum(counts))
    runs, place = np.unique(spans.run, return_inverse=True)
    offsets = tokens % rows * g.row_bytes
    cell = place[tokens // rows] + np.repeat(np.arange(heads.size) * runs.size, counts)  # of a table [heads, runs]
    wanted = np.zeros(heads.size * runs.size, bool)
    wanted[cell] = True
    cells, blocks = np.flatnonzero(wanted), state.ids(row.first[runs])[heads].ravel()[wanted]
    per, block_of = engine.mover.host.slot_bytes // PAGE, (np.cumsum(wanted) - 1)[cell]
    names = blocks[block_of] * per + offsets // PAGE
    singly = pageable(state, blocks)
    by_page = singly[block_of]
    row.picked = np.unique(names)
    few, column = np.unique(names[by_page], return_inverse=True)
    picks = Picks.start(engine, few)
    if picks is None:
        singly[:] = by_page[:] = False

    def attend_to(some: npt.NDArray[np.bool_] | None, where: npt.NDArray[np.int64]) -> Partial:
        """Tokens at addresses ``where``; of ``some`` only, if given."""
        if some is None:
            return attend_lists(q[heads], where, first, g.k_dim, g.v_dim, g.dtype, scale, softcap)
        bounds = np.append(0, np.cumsum(some))[first]
        return attend_lists(q[heads], where[some], bounds, g.k_dim, g.v_dim, g.dtype, scale, softcap)

    try:
        whole = np.flatnonzero(~singly)
        base = np.empty(wanted.size, np.int64)
        for columns, batch in engine.reading(blocks[None, whole], nothing_more) if whole.size else ():
            base[:] = -1
            base[cells[whole[columns]]] = engine.addresses(batch)[0]
            start = base[cell]
            yield attend_to(None if columns.size == blocks.size else start >= 0, start + offsets)
        if picks is not None:
            engine.note_rows(int(by_page.sum()) * g.row_bytes)
            page_at, where = np.empty(few.size, np.int64), np.empty(tokens.size, np.int64)
            for columns, addresses in picks:
                page_at[:] = -1
                page_at[columns] = addresses
                where[:] = -1
                where[by_page] = page_at[column]
                here = where >= 0
                yield attend_to(None if here.all() else here, where + offsets % PAGE)
    finally:
        if picks is not None:
            picks.close()


def nothing_more() -> Iterator[Ids]:
    """What to read ahead in sparse mode: the order in which exact attention reads says nothing of what is next."""
    return iter(())


def _note(use: SparseUse, share: Tensor, window: int, found: npt.NDArray[np.int_], visible: int) -> None:
    """share: [heads, rows]; found: keys of each head, picked singly."""
    steps, rows = share.numel(), share.shape[1]
    if not steps:
        return
    use.steps += steps
    use.window += window * steps
    use.attended += window * steps + int(found.sum()) * rows
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
