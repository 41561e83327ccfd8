"""Summaries: what 64 neighbouring keys have in common, so that codes of those that cannot matter are not even read.

A block of coded keys is cut into parts of 64 tokens. Of each the mean key is kept (8 bits a number), and how far from
it a key lies at most (radius); of the block, by how much keys deviate from the mean of their part, channel by channel
(spread, 8 bits), and the mean value. No key of a part scores above ``q.mean + |q| radius``: a part that is left out by
that bound holds nothing within reach, whatever the keys, and that bound alone holds by default. Keys of a part score
with a variance of ``q^2.spread^2`` around its mean: by some deviations of that (``deviations``) far more is left out
where neighbours resemble each other, one part in a hundred left to be scanned; but a key that is like none of its
neighbours is overlooked (docs/decisions/013-parts-before-codes.md).

Sources: blocks by bounds on their keys: Quest (arXiv 2406.10774); an estimate of what is left out by what a cluster has
in common: RetroInfer (arXiv 2505.02922); posting lists on disk, their heads in memory: SPANN (arXiv 2111.08566).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers import kernel
from alaya_tiers.attention import Partial, merge
from alaya_tiers.index.codes import (
    HEAD,
    K_UNIT,
    LANES,
    LOW,
    RATIO,
    SLACK,
    STEP,
    V_UNIT,
    Blocks,
    Codes,
    Layout,
    Reach,
    Scan,
    Scratch,
    Verify,
    rotation,
    scan,
)

PART = LANES
"""Tokens that are left out together."""

SCOUTS = 4
"""Parts whose keys weigh most in the mean that are scanned first, for each query: a bar for all others."""

_WIDE, _HEAD = 64, 2  # as in summary.c: channels are a multiple of the one; floats in front
_EACH = 4  # of so many tokens one tells of the spread


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of a block's summary."""

    parts: int
    k_dim: int
    v_dim: int

    @classmethod
    def of(cls, layout: Layout) -> Shape:
        """Of blocks that are coded so."""
        return cls(-(-layout.tokens // PART), layout.k_dim, layout.v_dim)

    @property
    def dims(self) -> int:
        """k_dim, rounded up to what the kernel reads."""
        return -(-self.k_dim // _WIDE) * _WIDE

    @property
    def spread_at(self) -> int:
        """Bytes before the spread."""
        return 4 * (_HEAD + 2 * self.parts)

    @property
    def value_at(self) -> int:
        """Bytes before the mean value."""
        return self.spread_at + self.dims * (1 + self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes of one summary, in whole cache lines."""
        return -(-(self.value_at + self.v_dim) // 64) * 64


def decode(coded: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Rotated keys as coded blocks have them, less the block's mean, float32 [n, tokens, k_dim], and each key's scale.

    coded: uint8 [n, layout.nbytes].
    """
    n, half = len(coded), (1 << layout.bits) / 2 - 0.5
    head = coded[:, : 4 * HEAD].contiguous().view(torch.float32)
    nibbles = coded[:, layout.levels_at : layout.levels_at + layout.rows // 2].view(n, -1, LANES // 2)
    level = torch.cat([nibbles & 15, nibbles >> 4], 2).view(n, -1)[:, : layout.tokens]
    scale = head[:, LOW, None] + head[:, STEP, None] * level.float()
    packed = coded[:, layout.codes_at :]
    if layout.bits == 4:
        pairs = packed.view(n, layout.rows // LANES, layout.dims // 8, 1, LANES, 4)
        packed = torch.cat([pairs & 15, pairs >> 4], 3)
    lanes = packed.reshape(n, layout.rows // LANES, layout.dims // 4, LANES, 4).transpose(2, 3)
    code = lanes.reshape(n, layout.rows, layout.dims)[:, : layout.tokens, : layout.k_dim]
    return (code.float() - half) * scale[..., None], scale


def summarise(coded: Tensor, layout: Layout) -> Tensor:
    """Summaries of coded blocks, uint8 [n, Shape.nbytes], on the CPU. coded: uint8 [n, layout.nbytes]."""
    coded = coded.cpu()
    shape, n, turn = Shape.of(layout), len(coded), rotation(layout.k_dim)
    rest, scale = decode(coded, layout)
    head = coded[:, : 4 * HEAD].contiguous().view(torch.float32)
    means = coded[:, 4 * HEAD : 4 * HEAD + layout.k_dim].view(torch.int8).float() * head[:, K_UNIT, None]
    error = head[:, RATIO, None] * scale + head[:, SLACK, None]
    room = torch.nn.functional.pad
    cut = room(rest, (0, 0, 0, shape.parts * PART - layout.tokens)).view(n, shape.parts, PART, -1)
    count = torch.full((shape.parts,), PART).clamp_max(layout.tokens - torch.arange(shape.parts) * PART)
    mean = (cut.sum(2) / count[:, None] + means[:, None]) @ turn.T
    unit = (mean.abs().amax(2) / 127).clamp_min(1e-30)
    whole = (mean / unit[..., None]).round_().clamp_(-127, 127)
    kept = (whole * unit[..., None]) @ turn - means[:, None]  # as it will be read, rotated
    of_token = torch.arange(layout.tokens) // PART
    away = rest - kept[:, of_token]
    far = away.norm(dim=2) + error
    radius = room(far, (0, shape.parts * PART - layout.tokens)).view(n, shape.parts, PART).amax(2) * 1.0001
    variance = (away[:, ::_EACH] @ turn.T).pow_(2).mean(1) + (error**2).mean(1, keepdim=True) / layout.k_dim
    spread = variance.sqrt_()
    step = (spread.amax(1) / 127).clamp_min(1e-30)
    out = torch.zeros(n, shape.nbytes, dtype=torch.uint8)
    floats = out[:, : shape.spread_at].view(torch.float32)
    floats[:, 0], floats[:, 1] = step, head[:, V_UNIT]
    floats[:, _HEAD : _HEAD + shape.parts], floats[:, _HEAD + shape.parts :] = unit, radius
    numbers = out[:, shape.spread_at : shape.value_at].view(torch.int8).view(n, 1 + shape.parts, shape.dims)
    numbers[:, 0, : shape.k_dim] = (spread / step[:, None]).round_().clamp_(1, 127).to(torch.int8)
    numbers[:, 1:, : shape.k_dim] = whole.to(torch.int8)
    value = 4 * HEAD + layout.dims
    out[:, shape.value_at : shape.value_at + shape.v_dim] = coded[:, value : value + layout.v_dim]
    return out


class Near(NamedTuple):
    """How near parts of blocks may come to queries. Both float32 [heads, n, parts, rows].

    most: no key scores more (scaled, capped), as sure as asked for. mean: logarithm of a key's mean weight, as if
    scores were normal, none above ``most``.
    """

    most: npt.NDArray[np.float32]
    mean: npt.NDArray[np.float32]


def near(
    q: Tensor,
    blocks: npt.NDArray[np.int64],
    shape: Shape,
    deviations: float | None,
    scale: float,
    softcap: float | None,
    scratch: Scratch,
) -> Near:
    """q: [heads, rows, k_dim], boundable. blocks: int64 [heads, n], addresses of summaries. deviations: see scan_parts.

    What is returned lies in ``scratch`` until the next call.
    """
    heads, rows, k_dim = q.shape
    wide = torch.zeros(heads, rows, shape.dims)
    wide[..., :k_dim] = q.detach().cpu()
    sizes = (2, heads, blocks.shape[1], shape.parts, rows)
    out = scratch.room(4 * math.prod(sizes), "near")[: 4 * math.prod(sizes)].view(np.float32).reshape(sizes)
    numbers = scale, softcap or 0.0, -1.0 if deviations is None else deviations
    kernel.near(wide, np.ascontiguousarray(blocks), shape.parts, numbers, out)
    return Near(*out)


class Parts(NamedTuple):
    """What a scan by parts found, see Scan, and how many tokens' codes it looked at for each head."""

    found: Scan
    looked: int


def scan_parts(
    q: Tensor,
    blocks: npt.NDArray[np.int64],
    codes: Callable[[npt.NDArray[np.intp]], npt.NDArray[np.int64]],
    first: npt.NDArray[np.int32],
    count: npt.NDArray[np.int32],
    layout: Layout,
    reach: Reach,
    scale: float,
    softcap: float | None = None,
    seed: Tensor | None = None,
    scratch: Scratch | None = None,
    *,
    deviations: float | None = None,
    distances: npt.NDArray[np.float64] | None = None,
    verify: Verify | None = None,
) -> Parts:
    """index.codes.scan of the parts alone that may hold something within reach; what others hold is estimated.

    blocks: int64 [heads, n], address of each block's summary. codes: given columns, ascending, the addresses of their
    codes, [heads, columns]. deviations: that a key's score may lie above its part's mean; None: any it can, so that
    what is left out holds nothing within reach. The rest as for ``scan``.
    """
    shape, (heads, rows, _) = Shape.of(layout), q.shape
    far = np.full(heads, reach.distance) if distances is None else distances
    bar = torch.full((heads, rows), -torch.inf) if seed is None else seed.float()
    begin = np.maximum(first[:, None], np.arange(shape.parts) * PART)
    size = np.minimum((first + count)[:, None], np.arange(1, shape.parts + 1) * PART) - begin
    with np.errstate(divide="ignore"):
        many = np.log(np.maximum(size, 0), dtype=np.float32)
    blocks = np.ascontiguousarray(blocks)
    scratch = Scratch() if scratch is None else scratch
    some = near(q, blocks, shape, deviations, scale, softcap, scratch)
    chosen = np.zeros(size.shape, bool)

    def looked_at(start: Tensor, look: Verify | None) -> Scan:
        column, part = np.nonzero(chosen)
        every, place = np.unique(column, return_inverse=True)
        found = scan(
            q, codes(every)[:, place], begin[column, part].astype(np.int32), size[column, part].astype(np.int32),
            layout, reach, scale, softcap, start, scratch, distances=far,
            verify=None if look is None else lambda best: look(_named(best, column, layout.rows)),
        )  # fmt: skip
        return found._replace(tokens=[_named(tokens, column, layout.rows) for tokens in found.tokens])

    kernel.best_parts(some.mean, many, SCOUTS, chosen)
    top = looked_at(bar, None).top
    least = top - torch.from_numpy(far).float()[:, None]
    kernel.within(some.most, least, many, chosen)
    found = looked_at(top, verify)
    many[chosen] = -np.inf
    rest = kernel.left(some.mean, many, least, blocks, shape.v_dim, shape.value_at)
    both = merge([Partial(found.rest, found.rest_lse), Partial(*rest)])
    return Parts(Scan(found.tokens, found.top, both.out, both.lse), int(size[chosen].sum()))


class Parted(Codes):
    """Codes of which a query reads those parts that may matter. deviations: see scan_parts. The rest: see Codes."""

    def __init__(
        self,
        keys: Tensor,
        bits: int = 4,
        block_tokens: int = 256,
        sure: float | None = None,
        deviations: float | None = None,
    ) -> None:
        super().__init__(keys, bits, block_tokens, sure)
        self.deviations = deviations

    def _scanned(self, asked: Blocks, coded: Tensor) -> Scan:
        summaries = summarise(coded[0], self.layout)
        addresses = summaries.data_ptr() + np.arange(len(summaries))[None] * summaries.shape[1]

        def codes(columns: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
            return asked.blocks[:, columns]

        return scan_parts(
            asked.q, addresses, codes, asked.first, asked.counts, self.layout, asked.reach, 1.0,
            deviations=self.deviations, verify=asked.verify,
        ).found  # fmt: skip


def _named(tokens: npt.NDArray[np.int32], columns: npt.NDArray[np.intp], rows: int) -> npt.NDArray[np.int32]:
    """Tokens of a scan of parts, as one of blocks would name them; -1 stays."""
    if not columns.size:
        return tokens
    return np.where(tokens < 0, -1, columns[tokens // rows] * rows + tokens % rows).astype(np.int32)
