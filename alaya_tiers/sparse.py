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
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers import kernel
from alaya_tiers.attention import BlockList, Partial, merge, nothing
from alaya_tiers.blocks import Geometry
from alaya_tiers.config import Settings
from alaya_tiers.hand import Hand, at_hand
from alaya_tiers.index.codes import MOST_DIMS, MOST_ROWS, Layout, Reach, Verify, boundable
from alaya_tiers.index.plan import History, Limit, Rates, Step
from alaya_tiers.layer import Divided, Layer, Row
from alaya_tiers.ledger import Ids
from alaya_tiers.listed import Asked, certain, lists, nothing_more, part_of
from alaya_tiers.looking import NoCodes, Scans
from alaya_tiers.near import Near, attend_anywhere
from alaya_tiers.partitions import Known, Partitions
from alaya_tiers.picks import missed_share
from alaya_tiers.recorder import Looks
from alaya_tiers.stats import SparseUse
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

MOST_RECORDED = 0.5
"""Share of the tokens beyond which what a head found is not recorded: it reads everything, in any replay too."""

Exact = Callable[[Spans, Heads], Iterator[BlockList | Near]]
"""Blocks of some kv heads of a row, batch by batch."""


class Looked(NamedTuple):
    """What kv heads that look for keys have found. tokens: of each, as a scan names them. dear: those that had better
    read everything, whose tokens were not attended. near, whole: attention to window and tokens; and with the rest.
    """

    tokens: list[npt.NDArray[np.int32]]
    dear: npt.NDArray[np.bool_]
    near: Partial
    whole: Partial

    def but(self, some: Heads, found: Looked) -> Looked:
        """The same, but for what some of the heads have found since."""
        tokens, dear = self.tokens.copy(), self.dear.copy()
        for head, theirs in zip(some.tolist(), found.tokens, strict=True):
            tokens[head] = theirs
        dear[some] = found.dear
        at = torch.from_numpy(some)
        near, whole = (
            Partial(*(mine.index_copy(0, at, theirs) for mine, theirs in zip(*pair, strict=True)))
            for pair in ((self.near, found.near), (self.whole, found.whole))
        )
        return Looked(tokens, dear, near, whole)

    def share(self) -> npt.NDArray[np.float32]:
        """Of the attention, what was not estimated. [heads, rows]."""
        found: npt.NDArray[np.float32] = torch.exp(self.near.lse - self.whole.lse).numpy()
        return found

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
    state, s = asked.state, asked.state.engine.settings
    divided = _divided(asked, visible, partitions)
    if partitions.full:
        _warn_full(s)
    if isinstance(divided, str):
        history.exact(divided, int(visible.spans(state.length, state.shape.tokens).count.sum()))
        return None
    history.note_all(int(divided.outside.count.sum()) + int(divided.middle.count.sum()))
    limit, recorded = Limit.of(s, len(state.engine.mover.shapes)), state.engine.recorder is not None
    summaries = divided.summaries is not None and (divided.cold > 0 or s.index_parts > 0)
    if not history.plan(divided.step, divided.rates, limit, recorded=recorded, summaries=summaries).look.any():
        return None
    try:
        with at_hand(state, asked.row) as hand:
            return _attended(asked, history, visible, exact, use, partitions, divided, hand)
    except NoCodes:
        history.failed("codes on disk that could not be read, or have no room in index_budget")
        return None


def _divided(asked: Asked, visible: Visible, partitions: Partitions) -> Divided | str:
    """What the queries see, divided, as in the last step if nothing changed; or why all of it must be read."""
    state, row, s, book = asked.state, asked.row, asked.state.engine.settings, asked.state.engine.mover.ledger
    g, size, lo, hi = state.shape.geometry, state.shape.tokens, visible.lo.tolist(), visible.hi.tolist()
    first, last = -(-(max(lo) + s.sink_tokens) // size), min(min(hi) - s.recent_tokens, state.length) // size
    if why := _exact_because(last - first, g, asked.q):
        return why
    end = min(-(-max(hi) // size) * size, state.length)
    key = (book.moves, first, last, min(lo) // size, -(-end // size))
    if visible.ranges is None and (known := row.divided) is not None and known.key == key:
        held = partitions.hold(known.codings)
        if held is not None:
            return known._replace(outside=_until(known.outside, end, size), held=held)
    row.divided = None
    every = visible.spans(state.length, size)
    inner = (every.run >= first) & (every.run < last)
    middle = every.where(inner)
    codes = partitions.of(state.ids(row.first[middle.run]))
    if int(codes.coded.sum()) < LEAST:
        return NO_CODES
    inner[inner] = codes.coded
    outside, middle, layout = every.where(~inner), middle.where(codes.coded), partitions.layout_of(state.number)
    step, rates = _step(state, row, outside, middle, layout, codes), _rates(state, row, middle)
    found = Divided(
        key, outside, middle, codes.codes, codes.summaries, codes.mirrored, codes.codings, codes.held, layout, step,
        rates, codes.cold,
    )  # fmt: skip
    if visible.ranges is None and not step.cold and not codes.cold and state.engine.mover.lanes.device.on_cpu:
        row.divided = found._replace(held=None)
    return found


def _until(spans: Spans, end: int, size: int) -> Spans:
    """The same of a sequence that ends within the last of them now."""
    count = spans.count.copy()
    count[-1:] = np.minimum(end - spans.run[-1:] * size, size) - spans.first[-1:]
    return Spans(spans.run, spans.first, count)


def _attended(
    asked: Asked,
    history: History,
    visible: Visible,
    exact: Exact,
    use: SparseUse,
    partitions: Partitions,
    divided: Divided,
    hand: Hand | None,
) -> Partial:
    """See attend: some heads look. hand: the row's blocks, where all are in memory."""
    state, q, s, rows = asked.state, asked.q, asked.state.engine.settings, asked.q.shape[1]
    outside, middle, layout, recorder = divided.outside, divided.middle, divided.layout, state.engine.recorder
    (look, most, coarse, bound), group = history.choice, rows // visible.lo.size
    lo, hi = np.tile(visible.lo, group), np.tile(visible.hi, group)

    def dense(some: Spans, heads: Heads, top: Tensor | None = None) -> Iterator[Partial]:
        for blocks in exact(some, heads) if hand is None or not some.run.size else [hand.blocks(some, heads)]:
            here = torch.empty(heads.size, rows)
            yield attend_anywhere(
                part_of(q, heads), blocks, asked.scale, lo, hi, asked.softcap, here, latent=asked.latent
            )
            if top is not None:
                torch.maximum(top, here, out=top)

    heads, window = np.flatnonzero(look), int(outside.count.sum())
    looks = Looks(middle.run, layout.rows, state.shape.tokens, recording=recorder is not None)
    seed = torch.full((heads.size, rows), -torch.inf)
    parts = [*dense(outside, heads, seed)] or [nothing(part_of(q, heads), asked.v_dim)]
    reach = Reach.of_share(s.alpha, most, s.index_sure or None)

    def verify(here: Heads) -> Verify:
        return lambda best: certain(asked, hand, here, middle, best, layout.rows, looks)

    scans = Scans(asked, divided, coarse, reach, verify, partitions)

    def within(some: Heads, far: npt.NDArray[np.float64], near: Partial) -> Looked:
        here = heads[some]
        found = scans.of(here, part_of(seed, some), far)
        sizes = np.array([tokens.size for tokens in found.tokens], np.float64)
        dear = divided.step.dear(sizes, divided.rates) & (not bound)
        if recorder is not None:
            dear |= sizes > MOST_RECORDED * history.tokens
        tokens = [NONE if everything else some for some, everything in zip(found.tokens, dear, strict=True)]
        looks.attended(tokens)
        near = merge([near, *lists(asked, hand, here, middle, tokens, layout.rows)])
        rest = Partial(found.rest.to(q.device), found.rest_lse.to(q.device))
        return Looked(found.tokens, dear, near, merge((near, rest)))

    looked = _look(history, heads, merge(parts), s.mass_floor if most is None else 0.0, reach.distance, within)
    use.scanned_bytes += scans.nbytes
    history.note_parts(heads, scans.parts[heads], divided.step, divided.rates)
    history.judge(looked.found.astype(np.float64), looked.dear, divided.step, divided.rates)
    if s.index_parts and divided.summaries is None and history.lies_together(divided.step, divided.rates).any():
        partitions.want_summaries(state.ids(asked.row.first[middle.run]))
    share = looked.share()
    history.note(share.min(1), window + looked.found, looked.dear)
    sparse = np.flatnonzero(~looked.dear)
    near, whole = (Partial(*(part_of(x, sparse) for x in part)) for part in (looked.near, looked.whole))
    share = part_of(share, sparse)
    _note(use, share, window, looked.found[sparse], history.tokens)
    rest = np.concatenate([heads[looked.dear], np.flatnonzero(~look)])
    if recorder is not None:
        places = looks.places([looked.tokens[i] for i in sparse])
        mass = float(share.mean()) if places else 1.0
        recorder.found(state, rows, (window, history.tokens), heads[sparse], rest, places, mass, looks.every)
    if s.measure_mass and sparse.size:
        everything = dense(visible.spans(state.length, state.shape.tokens), heads[sparse])
        _compare(use, near, whole, merge(list(everything)))
    if not rest.size:
        return whole
    use.exact += rest.size * rows
    everything = dense(visible.spans(state.length, state.shape.tokens), rest)
    return _together(heads[sparse], whole, rest, merge(list(everything)))


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
    after ``TRIES`` more reads everything. How deep a head had to look is where it begins in its next step.
    """
    far = np.maximum(history.far[heads], distance)
    looked = within(np.arange(heads.size), far, window)
    for left in range(TRIES, -1, -1):
        share = looked.share().min(1)
        some = np.flatnonzero((share < least) & ~looked.dear)
        if not some.size:
            break
        if not left:
            looked.dear[some] = True
            break
        far[some] += DEEPER
        looked = looked.but(some, within(some, far[some], Partial(window.out[some], window.lse[some])))
    history.deepen(heads, far, share > least + SPARE, distance)
    return looked


def _together(some: Heads, of_some: Partial, rest: Heads, of_rest: Partial) -> Partial:
    """Results of different kv heads as one."""
    order = torch.from_numpy(np.argsort(np.concatenate([some, rest])))
    return Partial(*(torch.cat(pair)[order] for pair in zip(of_some, of_rest, strict=True)))


def _step(state: Layer, row: Row, outside: Spans, middle: Spans, layout: Layout, codes: Known) -> Step:
    """What a step of one kv head costs in bytes; codes in numbers that the CPU scans in the same time."""
    s, numbers, mirrored = state.engine.settings, float(middle.count.sum() * layout.dims), codes.mirrored
    if mirrored is not None and (near := float(mirrored.there.mean())):
        cpu = (1 - near) * numbers / s.scan_rate
        there = near * numbers * layout.bits / 8 / s.device_rate + WAITED / state.shape.geometry.kv_heads
        numbers = max(cpu, there) * s.scan_rate
    g, book = state.shape.geometry, state.engine.mover.ledger
    window = float(outside.count.sum() * g.row_bytes)
    cold = 1 - float(book.readable(row.first[middle.run]).mean())
    return Step(
        window + float(middle.count.sum() * g.row_bytes), window, numbers, g.row_bytes,
        state.shape.nbytes, middle.run.size, cold, missed_share(state), codes.cold * layout.nbytes / g.kv_heads,
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


def _note(
    use: SparseUse, share: npt.NDArray[np.float32], window: int, found: npt.NDArray[np.int_], visible: int
) -> None:
    """share: [heads, rows]; found: keys of each head, picked singly."""
    steps, rows = share.size, share.shape[1]
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
