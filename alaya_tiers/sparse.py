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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers import kernel
from alaya_tiers.attention import BlockList, Partial, merge, nothing
from alaya_tiers.blocks import Geometry
from alaya_tiers.config import Settings
from alaya_tiers.index.codes import MOST_DIMS, MOST_ROWS, Layout, Reach, boundable, scan
from alaya_tiers.index.plan import History, Limit, Rates, Step
from alaya_tiers.layer import Layer, Row
from alaya_tiers.ledger import Ids
from alaya_tiers.listed import Asked, certain, lists, nothing_more
from alaya_tiers.near import Near, attend_anywhere
from alaya_tiers.partitions import Partitions
from alaya_tiers.picks import missed_share
from alaya_tiers.recorder import Looks
from alaya_tiers.stats import SparseUse
from alaya_tiers.tiers.mirror import Mirrored
from alaya_tiers.view import Heads, Spans, Visible


class IndexFullWarning(UserWarning):
    """The index has used up its budget: what is not in it is attended exactly."""


LEAST = 4
"""Coded blocks that are worth a scan."""

NO_CODES = "no codes yet (build_index makes them), no room for them, or keys that have none"
"""Why a step without an index reads all: keys that are not finite, or have too many numbers, have no codes."""

NONE = np.empty(0, np.int32)

WAITED = 120e-6
"""Seconds that a step waits to be told what a device found, four times, for all heads together."""

TRIES = 3
"""How often a head is scanned in one step that finds too little of its attention, before it reads everything."""

DEEPER = 2.0
"""By how much its reach grows each time, in units of scores."""

SPARE = 0.05
"""Share of the attention that a head has above what it must have before its reach shrinks again."""

Exact = Callable[[Spans, Heads], Iterator[BlockList | Near]]
"""Blocks of some kv heads of a row, batch by batch."""


@dataclass(slots=True)
class Looked:
    """What kv heads that look for keys have found. tokens: of each, as a scan names them. dear: those that had better
    read everything, whose tokens were not attended. near, whole: attention to window and tokens; and with the rest.
    """

    tokens: list[npt.NDArray[np.int32]]
    dear: npt.NDArray[np.bool_]
    near: Partial
    whole: Partial

    @classmethod
    def nothing_yet(cls, window: Partial) -> Looked:
        """Room for as many heads as ``window`` has."""
        heads = len(window.out)
        near, whole = (Partial(window.out.clone(), window.lse.clone()) for _ in range(2))
        return cls([NONE] * heads, np.zeros(heads, bool), near, whole)

    def put(self, some: Heads, found: Looked) -> None:
        """What some of the heads have found."""
        for head, tokens in zip(some.tolist(), found.tokens, strict=True):
            self.tokens[head] = tokens
        self.dear[some] = found.dear
        for mine, theirs in ((self.near, found.near), (self.whole, found.whole)):
            mine.out[some], mine.lse[some] = theirs.out, theirs.lse

    @property
    def share(self) -> Tensor:
        """Of the attention, what was not estimated. [heads, rows]."""
        return torch.exp(self.near.lse - self.whole.lse)

    @property
    def found(self) -> npt.NDArray[np.int_]:
        """Keys of each head."""
        return np.array([tokens.size for tokens in self.tokens])


def attend(
    asked: Asked, history: History, visible: Visible, exact: Exact, use: SparseUse, partitions: Partitions
) -> Partial | None:
    """Attention of a few queries over one row; None where exact attention of all heads is the plan: the caller's work.

    visible: without ``extra``. Raises StoreError.
    """
    state, row, q, s = asked.state, asked.row, asked.q, asked.state.engine.settings
    g, size, rows = state.shape.geometry, state.shape.tokens, asked.q.shape[1]
    low, high = int(visible.lo.max()), int(visible.hi.min())
    first, last = -(-(low + s.sink_tokens) // size), min(high - s.recent_tokens, state.length) // size
    every = visible.spans(state.length, size)
    history.note_all(int(every.count.sum()))
    if why := _exact_because(last - first, g, q):
        history.exact(why, history.tokens)
        return None
    inner = (every.run >= first) & (every.run < last)
    middle = every.where(inner)
    coded, codes, mirrored, held = partitions.of(state.ids(row.first[middle.run]))
    if partitions.full:
        _warn_full(s)
    if int(coded.sum()) < LEAST:
        history.exact(NO_CODES, history.tokens)
        return None
    inner[inner] = coded
    outside, middle, layout = every.where(~inner), middle.where(coded), partitions.layout_of(state.number)
    step = _step(state, row, outside, middle, layout, mirrored)
    rates = _rates(state, row, middle)
    look, most, bound = history.plan(step, rates, Limit.of(s, len(state.engine.mover.shapes)))
    if not look.any():
        return None
    group = rows // visible.lo.size
    lo, hi = np.concatenate([visible.lo] * group), np.concatenate([visible.hi] * group)

    def dense(some: Spans, heads: Heads, top: Tensor | None = None) -> Iterator[Partial]:
        for blocks in exact(some, heads):
            here = torch.empty(heads.size, rows)
            yield attend_anywhere(q[heads], blocks, asked.scale, lo, hi, asked.softcap, here, latent=asked.latent)
            if top is not None:
                torch.maximum(top, here, out=top)

    heads, window, recorder = np.flatnonzero(look), int(outside.count.sum()), state.engine.recorder
    looks = Looks(middle.run, layout.rows, size, recording=recorder is not None)
    seed = torch.full((heads.size, rows), -torch.inf)
    parts = [nothing(q[heads], asked.v_dim), *dense(outside, heads, seed)]
    reach = Reach.of_share(s.alpha, most, s.index_sure or None)

    def within(some: Heads, far: npt.NDArray[np.float64], near: Partial) -> Looked:
        here = heads[some]
        found = scan(
            q[here], codes[here], middle.first, middle.count, layout, reach, asked.scale, asked.softcap, seed[some],
            partitions.scratch, distances=far, elsewhere=None if mirrored is None else mirrored.of(here),
            verify=lambda best: certain(asked, here, middle, best, layout.rows, looks),
        )  # fmt: skip
        dear = step.dear(np.array([tokens.size for tokens in found.tokens], np.float64), rates) & (not bound)
        tokens = [NONE if everything else some for some, everything in zip(found.tokens, dear, strict=True)]
        looks.attended(tokens)
        near = merge([near, *lists(asked, here, middle, tokens, layout.rows)])
        use.scanned_bytes += here.size * int(coded.sum()) * layout.nbytes
        return Looked(
            found.tokens, dear, near, merge((near, Partial(found.rest.to(q.device), found.rest_lse.to(q.device))))
        )

    looked = _look(history, heads, merge(parts), s.mass_floor if most is None else 0.0, reach.distance, within)
    del held
    history.judge(looked.found.astype(np.float64), looked.dear, step, rates)
    history.note(looked.share.amin(1).numpy(), window + looked.found, looked.dear)
    sparse = ~looked.dear
    near, whole = (Partial(*(x[sparse] for x in part)) for part in (looked.near, looked.whole))
    _note(use, looked.share[sparse], window, looked.found[sparse], history.tokens)
    rest = np.concatenate([heads[looked.dear], np.flatnonzero(~look)])
    if recorder is not None:
        places = looks.places([looked.tokens[i] for i in np.flatnonzero(sparse)])
        mass = float(looked.share[sparse].mean()) if places else 1.0
        recorder.found(state, rows, (window, history.tokens), heads[sparse], rest, places, mass, looks.every)
    if s.measure_mass and sparse.any():
        _compare(use, near, whole, merge(list(dense(every, heads[sparse]))))
    if not rest.size:
        return whole
    use.exact += rest.size * rows
    return _together(heads[sparse], whole, rest, merge(list(dense(every, rest))))


def _exact_because(blocks: int, g: Geometry, q: Tensor) -> str:
    """Why sparse attention cannot work here, if so. blocks: between the sinks and the recent tokens."""
    if blocks < LEAST:
        return f"short: fewer than {LEAST} blocks between sink_tokens and recent_tokens"
    if g.dtype not in kernel.DTYPES:
        return f"keys are {g.dtype}"
    if q.shape[1] > MOST_ROWS:
        return f"{q.shape[1]} queries at a time for a kv head, a scan takes {MOST_ROWS}"
    return "" if boundable(q) else "queries that are not finite, or huge"


def _look(
    history: History,
    heads: Heads,
    window: Partial,
    least: float,
    distance: float,
    within: Callable[[Heads, npt.NDArray[np.float64], Partial], Looked],
) -> Looked:
    """What ``heads`` find, each as deep as it takes to attend to the share ``least`` of its attention.

    within: what some of them find within a distance of their best, beside the window. A head that still has too little
    after ``TRIES`` reads everything. How deep a head had to look is where it begins in its next step.
    """
    looked = Looked.nothing_yet(window)
    far = np.maximum(history.far[heads], distance)
    some = np.arange(heads.size)
    for left in range(TRIES, -1, -1):
        looked.put(some, within(some, far[some], Partial(window.out[some], window.lse[some])))
        share = looked.share.amin(1).numpy()
        short = (share < least) & ~looked.dear
        if left == 0:
            looked.dear |= short
        some = np.flatnonzero(short)
        if not some.size or not left:
            break
        far[some] += DEEPER
    history.deepen(heads, far, share > least + SPARE, distance)
    return looked


def _together(some: Heads, of_some: Partial, rest: Heads, of_rest: Partial) -> Partial:
    """Results of different kv heads as one."""
    order = torch.from_numpy(np.argsort(np.concatenate([some, rest])))
    return Partial(*(torch.cat(pair)[order] for pair in zip(of_some, of_rest, strict=True)))


def _step(state: Layer, row: Row, outside: Spans, middle: Spans, layout: Layout, mirrored: Mirrored | None) -> Step:
    """What a step of one kv head costs in bytes; codes in numbers that the CPU scans in the same time."""
    s, numbers = state.engine.settings, float(middle.count.sum() * layout.dims)
    if mirrored is not None and (near := float(mirrored.there.mean())):
        cpu = (1 - near) * numbers / s.scan_rate
        there = near * numbers * layout.bits / 8 / s.device_rate + WAITED / state.shape.geometry.kv_heads
        numbers = max(cpu, there) * s.scan_rate
    g, book = state.shape.geometry, state.engine.mover.ledger
    window = float(outside.count.sum() * g.row_bytes)
    cold = 1 - float(book.readable(row.first[middle.run]).mean())
    return Step(
        window + float(middle.count.sum() * g.row_bytes), window, numbers, g.row_bytes,
        state.shape.nbytes, middle.run.size, cold, missed_share(state),
    )  # fmt: skip


def _rates(state: Layer, row: Row, middle: Spans) -> Rates:
    """What reading costs: blocks in a device's memory are read and picked from at its speed."""
    s, mover = state.engine.settings, state.engine.mover
    rates = Rates.believed(s, state.shape.geometry.kv_heads)
    if mover.lanes.device.on_cpu:
        return rates
    near = float((mover.ledger.device[state.ids(row.first[middle.run])] >= 0).mean())
    return replace(rates, read=1 / ((1 - near) / s.read_rate + near / s.device_rate), pick=(1 - near) * s.pick_seconds)


def _warn_full(s: Settings) -> None:
    few = min(MOST_DIMS)
    advice = "" if s.index_bits == few else f", or take index_bits={few}"
    warnings.warn(
        f"the index has used up index_budget={s.index_budget} bytes: tokens beyond are attended exactly. "
        f"Raise it{advice}",
        IndexFullWarning,
        stacklevel=2,
    )


def build(
    states: list[Layer],
    say: Callable[[int, int], None],
    ends: Sequence[int] = (),
    made: Callable[[int], None] = lambda part: None,
) -> None:
    """Make all codes that are missing now, reading what is not in memory. say: told (blocks tried, blocks to try).

    ends: tokens, ascending, where parts of the context end: each is made in all layers before the next, and ``made``
    is told its number.
    """
    edges = [0, *ends, max((state.length for state in states), default=0)]
    parts = [list(_uncoded(states, *part)) for part in pairwise(edges)]
    done, every = 0, sum(ids.shape[1] for part in parts for *_, ids in part)
    for number, part in enumerate(parts):
        for state, partitions, ids in part:
            for _, here in state.engine.reading(ids, nothing_more):
                partitions.make_all(here)
            done += ids.shape[1]
            say(done, every)
        made(number)


def _uncoded(states: list[Layer], start: int, end: int) -> Iterator[tuple[Layer, Partitions, Ids]]:
    """Runs of full blocks of these tokens that have no codes, as many as are coded together."""
    for state in states:
        partitions, size = state.engine.partitions, state.shape.tokens
        assert partitions is not None
        for row in state.rows:
            first = row.first[start // size : min(end, state.length) // size]
            if first.size:
                missing, n = first[~partitions.of(state.ids(first)).coded], partitions.together
                for i in range(0, missing.size, n):
                    yield state, partitions, state.ids(missing[i : i + n])


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
