"""Single tokens that a scan found: where they lie, attended there or as they arrive, looked up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers import kernel
from alaya_tiers.attention import Partial, attend_lists, capped, parts_of_row
from alaya_tiers.blocks import PAGE, Geometry
from alaya_tiers.engine import Engine
from alaya_tiers.hand import Hand
from alaya_tiers.layer import Layer, Row
from alaya_tiers.ledger import Ids, Slots
from alaya_tiers.near import Tokens, copied_rows, on_cpu
from alaya_tiers.picks import Picks, pageable
from alaya_tiers.recorder import Looks
from alaya_tiers.view import Heads, Spans


@dataclass(frozen=True, slots=True)
class Asked:
    """Queries of one row. q: [kv_heads, rows, k_dim]; latent: [.., k_dim + v_dim], see BlockList."""

    state: Layer
    row: Row
    q: Tensor
    scale: float
    softcap: float | None
    latent: bool

    @property
    def v_dim(self) -> int:
        """Numbers of what is summed."""
        g = self.state.shape.geometry
        return parts_of_row(g.k_dim, g.v_dim, latent=self.latent)[1]


Numbers = TypeVar("Numbers", Tensor, npt.NDArray[np.int64], npt.NDArray[np.float32])


def part_of(every: Numbers, heads: Heads) -> Numbers:
    """What belongs to some kv heads, ascending; all of them need no copy."""
    return every if len(heads) == len(every) else every[heads]


def certain(
    asked: Asked,
    hand: Hand | None,
    heads: Heads,
    spans: Spans,
    best: npt.NDArray[np.int32],
    rows: int,
    looks: Looks,
) -> Tensor:
    """What the best keys of a scan score exactly. See index.codes.Verify."""
    g, wanted = asked.state.shape.geometry, best >= 0
    tokens = [some[known] for some, known in zip(best, wanted, strict=True)]
    looks.compared(heads, tokens)
    scores = np.full(best.shape, -np.inf, np.float32)
    held = torch.zeros(sum(some.size for some in tokens), g.width, dtype=g.dtype)
    to = held.data_ptr() + np.arange(len(held)) * g.row_bytes
    for some, where, _ in located(asked, hand, heads, spans, tokens, rows):
        place = np.arange(len(held)) if some is None else np.flatnonzero(some)
        kernel.copy(where[place], to[place], np.full(place.size, g.row_bytes), None)
    queries = part_of(asked.q, heads).detach().cpu().float().numpy()[wanted].astype(np.float64)
    keys = held[:, : asked.q.shape[2]].float().numpy()
    found = capped(torch.from_numpy(np.einsum("ij,ij->i", queries, keys) * asked.scale), asked.softcap).numpy()
    scores[wanted] = found - 1e-6 * np.abs(found)  # as a float it is smaller still than what the key scores
    return torch.from_numpy(scores)


def lists(
    asked: Asked, hand: Hand | None, heads: Heads, spans: Spans, found: list[npt.NDArray[np.int32]], rows: int
) -> Iterator[Partial]:
    """Exact attention over single tokens of some kv heads, batch by batch as their blocks arrive. See located.

    Those in blocks of a device are attended there, while the CPU attends the others; their result comes last.
    """
    g, first = asked.state.shape.geometry, np.cumsum([0, *(tokens.size for tokens in found)])
    apart = list[Partial]()
    for some, where, slots in located(asked, hand, heads, spans, found, rows, note=True, apart=not asked.latent):
        bounds = first if some is None else np.append(0, np.cumsum(some))[first]
        at = where if some is None else where[some]
        if slots is None:
            yield attend_lists(
                part_of(asked.q, heads), at, bounds, g.k_dim, g.v_dim, g.dtype, asked.scale, asked.softcap,
                latent=asked.latent,
            )  # fmt: skip
        else:
            tokens = Tokens(slots, at, bounds)
            apart.append(tokens.attend(asked.state.engine, asked.q[heads], g, asked.scale, asked.softcap))
    for part in apart:
        yield Partial(*on_cpu(*part))


def located(
    asked: Asked,
    hand: Hand | None,
    heads: Heads,
    spans: Spans,
    found: list[npt.NDArray[np.int32]],
    rows: int,
    *,
    note: bool = False,
    apart: bool = False,
) -> Iterator[tuple[npt.NDArray[np.bool_] | None, npt.NDArray[np.int64], Slots | None]]:
    """Where single tokens of some kv heads lie, batch by batch as their blocks or pages arrive, readable meanwhile.

    found: for each of ``heads``, place of the block in ``spans`` x ``rows`` + offset, in any order. hand: all blocks
    of the row, where they are in memory. Yields which of all tokens in a row are meant, None: all; their addresses; and
    None, where the CPU reads them. note: these are what the next step may want too. apart: tokens on a device come by
    themselves, with its slots that they lie in; else they are copied to the CPU.
    """
    state, row, engine, g = asked.state, asked.row, asked.state.engine, asked.state.shape.geometry
    counts = np.array([tokens.size for tokens in found])
    if not counts.any():
        return
    tokens = np.concatenate(found)
    column, low = tokens // rows, int(spans.run[0])
    if hand is not None:
        yield None, hand.rows(heads, counts, spans.run[column], tokens - column * rows), None
        return
    offsets = (tokens - column * rows) * g.row_bytes
    runs = np.arange(low, int(spans.run[-1]) + 1)
    cell = spans.run[column] + np.repeat(np.arange(heads.size) * runs.size - low, counts)  # of a table [heads, runs]
    wanted = np.zeros(heads.size * runs.size, bool)
    wanted[cell] = True
    cells, blocks = np.flatnonzero(wanted), state.ids(row.first[runs])[heads].ravel()[wanted]
    singly, picks, pages = pageable(state, blocks), None, engine.pages
    guessed = note and pages is not None and bool(pages.sources())  # nobody else wants to know
    if guessed or singly.any():
        block_of = (np.cumsum(wanted) - 1)[cell]
        names, by_page = blocks[block_of] * (engine.mover.host.slot_bytes // PAGE) + offsets // PAGE, singly[block_of]
        if guessed:
            row.picked = np.unique(names)
        few, page = np.unique(names[by_page], return_inverse=True)
        picks = Picks.start(engine, few)
    if picks is None:
        singly[:] = False
    try:
        whole = np.flatnonzero(~singly)
        base = np.empty(wanted.size, np.int64)
        for columns, batch in engine.reading(blocks[None, whole], nothing_more) if whole.size else ():
            base[:] = -1
            base[cells[whole[columns]]] = engine.addresses(batch)[0]
            start = base[cell]
            where = start + offsets
            if apart and (near := ~engine.on_cpu(batch[0])).any():
                there = np.isin(cell, cells[whole[columns[near]]])
                yield there, where, engine.mover.ledger.device[batch[0, near]]
                if (here := (start >= 0) & ~there).any():
                    yield here, where, None
                continue
            rows_here = brought(engine, batch[0], cells[whole[columns]], cell, where, g)  # kept until the next batch
            yield None if columns.size == blocks.size else start >= 0, where, None
            del rows_here
        if picks is not None:
            engine.note_rows(int(by_page.sum()) * g.row_bytes)
            page_at, where = np.empty(few.size, np.int64), np.empty(tokens.size, np.int64)
            for columns, addresses in picks:
                page_at[:] = -1
                page_at[columns] = addresses
                where[:] = -1
                where[by_page] = page_at[page]
                here = where >= 0
                yield None if here.all() else here, where + offsets % PAGE, None
    finally:
        if picks is not None:
            picks.close()


def brought(
    engine: Engine,
    blocks: Ids,
    cells: npt.NDArray[np.intp],
    cell: npt.NDArray[np.intp],
    where: npt.NDArray[np.int64],
    g: Geometry,
) -> Tensor | None:
    """Tokens of blocks in a device's memory, copied to the CPU; ``where`` says so then. cells: of ``blocks``."""
    near = ~engine.on_cpu(blocks)
    if not near.any():
        return None
    some = np.isin(cell, cells[near])
    rows = copied_rows(engine, blocks[near], where[some], g)
    where[some] = rows.data_ptr() + np.arange(len(rows)) * g.row_bytes
    return rows


def nothing_more() -> Iterator[Ids]:
    """What to read ahead in sparse mode: the order in which exact attention reads says nothing of what is next."""
    return iter(())
