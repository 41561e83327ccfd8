"""The scan of codes on a GPU, in Triton: scan.c again, number for number. index/codes.py says what a code is.

    begin     every code once: what may be near goes to a list of its split, the rest into the split's estimate; each
              split's bar rises as it goes. Leaves the best key of each split, so that somebody can look what it scores.
    finish    the lists against the best of all splits: what is not near goes back into the estimate; lists made one

A program scans one split of a head's blocks, for all query rows of the head at once: a code is read once. Queries are
rounded to whole numbers of 8 bits (two parts of 8 where bounds must be tight) and multiplied with codes in integers, as
the CPU does, so both find the same keys but for the rounding of float32. Nothing here waits for the GPU.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from alaya_tiers.devices import kernels

LANES, HEAD = 64, 8
"""As in scan.c."""

MOST_ROWS = 32
"""Rows of a kv head that one program holds."""

SPLITS = 64
"""Splits of a head at most."""

CAP = 4096
"""Keys of a head that come down with the first copy."""


class Shape(NamedTuple):
    """Of coded blocks: numbers of a key (a multiple of 8) and of a value, tokens (of 64), bits, where codes begin."""

    dims: int
    v_dim: int
    tokens: int
    bits: int
    codes_at: int


class Rounded(NamedTuple):
    """Queries as whole numbers. parts: int8 [heads, 1 or 2, rows, dims]; sums: int32 [heads, rows], of those numbers;
    numbers: float32 [3, heads, rows]: unit, norm, what the rounding costs for each unit of a code's norm.
    """

    parts: Tensor
    sums: Tensor
    numbers: Tensor


class Asked(NamedTuple):
    """Tensors on the device. q: float32 [heads, rows, dims], rotated; blocks: int64 [heads, n], addresses; first,
    counts: int32 [n]; start: float32 [heads, rows], known scores; reach: float32 [heads].
    """

    q: Tensor
    rounded: Rounded
    blocks: Tensor
    first: Tensor
    counts: Tensor
    start: Tensor
    reach: Tensor


class Began(NamedTuple):
    """What the first half leaves on the device, for each split of a head.

    best, token: [heads, splits, rows], unscaled score and name of the best key near, -1: none. bar: what it certainly
    scores, scaled and capped.
    """

    asked: Asked
    shape: Shape
    scale: float
    softcap: float
    margin: float
    per: int
    best: Tensor
    token: Tensor
    bar: Tensor
    hits: Tensor
    n_hits: Tensor
    offsets: Tensor
    out: Tensor
    most: Tensor
    mass: Tensor


class Finished(NamedTuple):
    """On the device. lists: int32 [heads, cap], ascending; n: int32 [heads, splits], whose sums are their lengths, more
    than cap if they are longer; top, lse: float32 [heads, rows]; rest: [heads, rows, v_dim].
    """

    lists: Tensor
    n: Tensor
    top: Tensor
    rest: Tensor
    lse: Tensor


def rounded(q: Tensor, margin: float) -> Rounded:
    """q: float32 [heads, rows, dims], on any device. margin: share of an error's length that is allowed for."""
    tight = margin >= 1
    whole = q.abs().amax(-1)
    unit = torch.where(whole > 1e-33, whole / (16191 if tight else 127), 0.0)
    x = torch.where(unit[..., None] > 0, q / unit.clamp_min(1e-38)[..., None], 0.0).round()
    share = whole.clamp_min(1e-38)[..., None]
    lost = ((q - unit[..., None] * x) / share).norm(dim=-1)
    x = x.int()
    high = (x + 64) >> 7
    parts = torch.stack([high, x - 128 * high], 1) if tight else x[:, None]
    numbers = [unit, whole * (q / share).norm(dim=-1) * 1.00001, whole * lost * margin * 1.00001]
    return Rounded(parts.to(torch.int8), x.sum(-1, dtype=torch.int32), torch.stack(numbers))


def begin(asked: Asked, shape: Shape, scale: float, softcap: float, margin: float) -> Began:
    """The first half."""
    heads, rows, _ = asked.q.shape
    n = asked.blocks.shape[1]
    per = -(-n // max(1, min(n, SPLITS, 2 * kernels.PROGRAMS // heads)))
    splits = -(-n // per)
    new, place = torch.empty, asked.q.device
    began = Began(
        asked, shape, scale, softcap, margin, per,
        new(heads, splits, rows, device=place), new(heads, splits, rows, dtype=torch.int32, device=place),
        new(heads, splits, rows, device=place), new(heads, n * shape.tokens, dtype=torch.int32, device=place),
        new(heads, splits, dtype=torch.int32, device=place), new(heads, n, rows, device=place),
        new(heads, splits, rows, shape.v_dim, device=place), new(heads, splits, rows, device=place),
        new(heads, splits, rows, device=place),
    )  # fmt: skip
    _begin[heads, splits](
        asked.q, asked.rounded.parts, asked.rounded.sums, asked.rounded.numbers, asked.blocks, asked.first,
        asked.counts, asked.start, asked.reach, *began[6:], n, per, scale, softcap, margin, rows, heads * rows,
        **_constants(shape, rows), PARTS=asked.rounded.parts.shape[1], num_stages=4,
    )  # fmt: skip
    return began


def finish(began: Began, start: Tensor, cap: int = CAP) -> Finished:
    """The second half, once. start: float32 [heads, rows] on the device, known scores."""
    asked, shape = began.asked, began.shape
    heads, splits, rows = began.best.shape
    top, lse, n_kept = torch.empty_like(start), torch.empty_like(began.most), torch.empty_like(began.n_hits)
    _finish[heads, splits](
        asked.rounded.parts, asked.rounded.sums, asked.rounded.numbers, asked.blocks, start, asked.reach, began.bar,
        began.hits, began.n_hits, began.offsets, began.out, began.most, began.mass, lse, top, n_kept,
        asked.blocks.shape[1], began.per, began.scale, began.softcap, began.margin, rows, heads * rows, splits,
        **_constants(shape, rows), PARTS=asked.rounded.parts.shape[1], SPLITS=SPLITS,
    )  # fmt: skip
    rest = kernels.merge(began.out, lse)
    return Finished(packed(began, n_kept, cap), n_kept, top, rest.out, rest.lse)


def packed(began: Began, n_kept: Tensor, cap: int) -> Tensor:
    """The lists of all splits after each other, as far as ``cap`` goes: int32 [heads, cap]; undefined behind them."""
    heads, splits = n_kept.shape
    lists = torch.empty(heads, cap, dtype=torch.int32, device=n_kept.device)
    _pack[heads, splits](
        began.hits, n_kept, lists, began.hits.shape[1], began.per * began.shape.tokens, cap, splits,
        SPLITS=SPLITS, TILE=256,
    )  # fmt: skip
    return lists


def _constants(shape: Shape, rows: int) -> dict[str, int]:
    words = shape.dims * shape.bits // 32
    return {
        "DIMS": shape.dims, "V_DIM": shape.v_dim, "TOKENS": shape.tokens, "BITS": shape.bits,
        "CODES_AT": shape.codes_at, "WORDS": words, "G": kernels.power(words, shape.bits),  # 32 numbers: a dot's least
        "V": kernels.power(shape.v_dim, 16), "R": kernels.power(rows, 8), "LANES": LANES, "HEAD": HEAD,
    }  # fmt: skip


# ---------------------------------------------------------------------- on the device
@triton.jit
def _capped(x, softcap):
    if softcap > 0:
        a = tl.abs(x / softcap)
        e = tl.exp(-2.0 * a)
        y = (1.0 - e) / (1.0 + e) * softcap
        x = tl.where(x == float("-inf"), x, tl.where(x < 0, -y, y))
    return x


@triton.jit
def _pieces(words, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """One code of each word, as a number of 8 bits."""
    if BITS == 8:
        return (((words >> SHIFT) & 255) - 128).to(tl.int8)
    else:
        return ((words >> SHIFT) & 15).to(tl.int8)


@triton.jit
def _codes(at, WORDS: tl.constexpr, G: tl.constexpr, LANES: tl.constexpr, BITS: tl.constexpr):
    """Codes of LANES tokens, int8 [LANES, numbers]: 4 bits as they are, 8 bits less 128. at: each token's first word.

    Words beyond the last are the last again: queries have zeros there.
    """
    g = tl.arange(0, G)
    words = tl.load(at[:, None] + tl.minimum(g, WORDS - 1)[None, :] * LANES)
    if BITS == 8:
        even = tl.join(_pieces(words, 0, 8), _pieces(words, 16, 8))
        odd = tl.join(_pieces(words, 8, 8), _pieces(words, 24, 8))
        return tl.reshape(tl.join(even, odd), (LANES, G * 4))
    else:
        even = tl.join(
            tl.join(_pieces(words, 0, 4), _pieces(words, 4, 4)), tl.join(_pieces(words, 16, 4), _pieces(words, 20, 4))
        )
        odd = tl.join(
            tl.join(_pieces(words, 8, 4), _pieces(words, 12, 4)), tl.join(_pieces(words, 24, 4), _pieces(words, 28, 4))
        )
        return tl.reshape(tl.join(even, odd), (LANES, G * 8))


@triton.jit
def _whole(q8, head, part, rows, PARTS: tl.constexpr, DIMS: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """One part of a head's queries, int8 [D, R]."""
    d, r = tl.arange(0, D), tl.arange(0, R)
    at = q8 + ((head * PARTS + part) * rows + r[None, :]) * DIMS + d[:, None]
    return tl.load(at, mask=(d[:, None] < DIMS) & (r[None, :] < rows), other=0)


@triton.jit
def _queries(
    q8, sums_at, numbers, head, margin, rows, plane,
    PARTS: tl.constexpr, DIMS: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A head's queries: both parts, their sums, unit, norm times the margin, and what their rounding costs."""
    r = tl.arange(0, R)
    row, real = head * rows + r, r < rows
    high = _whole(q8, head, 0, rows, PARTS, DIMS, D, R)
    low = high
    if PARTS == 2:
        low = _whole(q8, head, 1, rows, PARTS, DIMS, D, R)
    sums = tl.load(sums_at + row, mask=real, other=0)
    unit = tl.load(numbers + row, mask=real, other=0.0)
    norm = tl.load(numbers + plane + row, mask=real, other=0.0) * margin
    return high, low, sums, unit, norm, tl.load(numbers + 2 * plane + row, mask=real, other=0.0)


@triton.jit
def _header(block):
    """Of coded blocks: ratio, slack, norm of the codes; least scale, its step; units of the mean key and value."""
    at = block.to(tl.pointer_type(tl.float32))
    ratio, slack, code_norm = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    return ratio, slack, code_norm, tl.load(at + 3), tl.load(at + 4), tl.load(at + 5), tl.load(at + 6)


@triton.jit
def _scores(codes, high, low, sums, unit, scales, offset, PARTS: tl.constexpr, BITS: tl.constexpr):
    """Unscaled scores [LANES, R]. scales: [LANES]; offset: [R] or [LANES, R], what the mean key scores."""
    dots = tl.dot(codes, high)
    if PARTS == 2:
        dots = dots * 128 + tl.dot(codes, low)
    dots += sums[None, :] * (1 if BITS == 8 else -7)
    return (dots.to(tl.float32) - 0.5 * sums[None, :].to(tl.float32)) * unit[None, :] * scales[:, None] + offset


@triton.jit(do_not_specialize=["n", "per", "rows", "plane"])
def _begin(
    q_at, q8, sums_at, numbers, blocks, first, count, start_at, reach_at,
    best_at, token_at, bar_at, hits_at, n_hits_at, offsets_at, out_at, most_at, mass_at,
    n, per, scale, softcap, margin, rows, plane,
    DIMS: tl.constexpr, V_DIM: tl.constexpr, TOKENS: tl.constexpr, BITS: tl.constexpr, CODES_AT: tl.constexpr,
    WORDS: tl.constexpr, G: tl.constexpr, V: tl.constexpr, R: tl.constexpr, LANES: tl.constexpr, HEAD: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    head, split = tl.program_id(0), tl.program_id(1)
    D: tl.constexpr = G * (32 // BITS)
    r, d, dv, lane = tl.arange(0, R), tl.arange(0, D), tl.arange(0, V), tl.arange(0, LANES)
    row = head * rows + r
    real = r < rows
    q = tl.load(q_at + row[:, None] * DIMS + d[None, :], mask=real[:, None] & (d[None, :] < DIMS), other=0.0)
    high, low, sums, unit, norm, lost = _queries(q8, sums_at, numbers, head, margin, rows, plane, PARTS, DIMS, D, R)
    bar = tl.load(start_at + row, mask=real, other=float("-inf"))
    reach = tl.load(reach_at + head)
    best, token = tl.full((R,), float("-inf"), tl.float32), tl.full((R,), -1, tl.int32)
    most, mass = tl.full((R,), float("-inf"), tl.float32), tl.zeros((R,), tl.float32)
    out = tl.zeros((R, V), tl.float32)
    hits = hits_at + (head.to(tl.int64) * n + split * per) * TOKENS
    found = 0
    for b in range(split * per, tl.minimum(split * per + per, n)):
        block = tl.load(blocks + head * n + b)
        bytes8 = block.to(tl.pointer_type(tl.int8))
        ratio, slack, code_norm, least, step, k_unit, v_unit = _header(block)
        mean_k = tl.load(bytes8 + 4 * HEAD + d, mask=d < DIMS, other=0).to(tl.float32)
        offset = tl.sum(q * mean_k[None, :], 1) * k_unit
        tl.store(offsets_at + (head * n + b) * rows + r, offset, mask=real)
        wide, slack = norm * ratio + lost * code_norm, norm * slack
        begins = tl.load(first + b)
        ends = begins + tl.load(count + b)
        before, weight = most, tl.zeros((R,), tl.float32)
        words = tl.multiple_of((block + CODES_AT).to(tl.pointer_type(tl.int32)), 64)
        levels = (block + 4 * HEAD + DIMS + V_DIM).to(tl.pointer_type(tl.uint8))
        for t in range(begins // LANES * LANES, ends, LANES):
            here = (t + lane >= begins) & (t + lane < ends)
            codes = _codes(words + t * WORDS + lane, WORDS, G, LANES, BITS)
            level = (tl.load(levels + t // 2 + lane % 32).to(tl.int32) >> (lane // 32 * 4)) & 15
            scales = least + step * level.to(tl.float32)
            x = _scores(codes, high, low, sums, unit, scales, offset[None, :], PARTS, BITS)
            bound = wide[None, :] * scales[:, None] + slack[None, :]
            shown = here[:, None] & real[None, :]
            sure = tl.max(tl.where(shown, x - bound, float("-inf")), 0)
            bar = tl.maximum(bar, _capped(sure * scale, softcap))
            can = shown & (_capped((x + bound) * scale, softcap) >= (bar - reach)[None, :])
            near = tl.max(can.to(tl.int32), 1)
            tl.store(hits + found + tl.cumsum(near, 0) - 1, b * TOKENS + t + lane, mask=near > 0)
            found += tl.sum(near, 0)
            kept = tl.where(shown & (near[:, None] > 0), x, float("-inf"))
            higher = tl.max(kept, 0)
            which = tl.argmax(kept, 0)
            token = tl.where(higher > best, b * TOKENS + t + which, token)
            best = tl.maximum(best, higher)
            y = tl.where(shown & (near[:, None] == 0), _capped(x * scale, softcap), float("-inf"))
            higher = tl.maximum(most, tl.max(y, 0))
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            weight = weight * tl.exp(most - safe) + tl.sum(tl.exp(y - safe[None, :]), 0)
            most = higher
        shrink = tl.exp(before - tl.where(most == float("-inf"), 0.0, most))
        mean_v = tl.load(bytes8 + 4 * HEAD + DIMS + dv, mask=dv < V_DIM, other=0).to(tl.float32) * v_unit
        out = out * shrink[:, None] + weight[:, None] * mean_v[None, :]
        mass = mass * shrink + weight
    part = head * tl.num_programs(1) + split
    tl.store(n_hits_at + part, found)
    tl.store(best_at + part * rows + r, best, mask=real)
    tl.store(token_at + part * rows + r, token, mask=real)
    tl.store(bar_at + part * rows + r, bar, mask=real)
    tl.store(most_at + part * rows + r, most, mask=real)
    tl.store(mass_at + part * rows + r, mass, mask=real)
    tl.store(out_at + (part * rows + r[:, None]) * V_DIM + dv[None, :], out, mask=real[:, None] & (dv[None, :] < V_DIM))


@triton.jit(do_not_specialize=["n", "per", "rows", "plane", "splits"])
def _finish(
    q8, sums_at, numbers, blocks, start_at, reach_at, bar_at, hits_at, n_hits_at, offsets_at, out_at, most_at, mass_at,
    lse_at, top_at, n_kept_at, n, per, scale, softcap, margin, rows, plane, splits,
    DIMS: tl.constexpr, V_DIM: tl.constexpr, TOKENS: tl.constexpr, BITS: tl.constexpr, CODES_AT: tl.constexpr,
    WORDS: tl.constexpr, G: tl.constexpr, V: tl.constexpr, R: tl.constexpr, LANES: tl.constexpr, HEAD: tl.constexpr,
    PARTS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    head, split = tl.program_id(0), tl.program_id(1)
    D: tl.constexpr = G * (32 // BITS)
    r, dv, lane, s = tl.arange(0, R), tl.arange(0, V), tl.arange(0, LANES), tl.arange(0, SPLITS)
    row, part = head * rows + r, head * tl.num_programs(1) + split
    real = r < rows
    high, low, sums, unit, norm, lost = _queries(q8, sums_at, numbers, head, margin, rows, plane, PARTS, DIMS, D, R)
    bars = bar_at + (head * splits + s[:, None]) * rows + r[None, :]
    top = tl.max(tl.load(bars, mask=(s[:, None] < splits) & real[None, :], other=float("-inf")), 0)
    top = tl.maximum(top, tl.load(start_at + row, mask=real, other=float("-inf")))
    tl.store(top_at + row, top, mask=real & (split == 0))
    limit = top - tl.load(reach_at + head)
    most = tl.load(most_at + part * rows + r, mask=real, other=float("-inf"))
    mass = tl.load(mass_at + part * rows + r, mask=real, other=0.0)
    inside = real[:, None] & (dv[None, :] < V_DIM)
    out = tl.load(out_at + (part * rows + r[:, None]) * V_DIM + dv[None, :], mask=inside, other=0.0)
    hits = hits_at + (head.to(tl.int64) * n + split * per) * TOKENS
    kept = 0
    n_hits = tl.load(n_hits_at + part)
    for i in range(0, n_hits, LANES):
        here = i + lane < n_hits
        name = tl.load(hits + i + lane, mask=here, other=split * per * TOKENS)
        b, t = name // TOKENS, name % TOKENS
        block = tl.load(blocks + head * n + b)
        bytes8 = block.to(tl.pointer_type(tl.int8))
        ratio, slack, code_norm, least, step, _, v_unit = _header(block)
        levels = (block + 4 * HEAD + DIMS + V_DIM + t // LANES * 32 + t % 32).to(tl.pointer_type(tl.uint8))
        level = (tl.load(levels).to(tl.int32) >> (t % LANES // 32 * 4)) & 15
        scales = least + step * level.to(tl.float32)
        words = (block + CODES_AT).to(tl.pointer_type(tl.int32)) + t // LANES * LANES * WORDS + t % LANES
        codes = _codes(words, WORDS, G, LANES, BITS)
        offset = tl.load(offsets_at + (head * n + b[:, None]) * rows + r[None, :], mask=real[None, :], other=0.0)
        x = _scores(codes, high, low, sums, unit, scales, offset, PARTS, BITS)
        width = (ratio * scales + slack)[:, None] * norm[None, :] + (code_norm * scales)[:, None] * lost[None, :]
        shown = here[:, None] & real[None, :]
        can = shown & (_capped((x + width) * scale, softcap) >= limit[None, :])
        near = tl.max(can.to(tl.int32), 1)
        tl.store(hits + kept + tl.cumsum(near, 0) - 1, name, mask=near > 0)
        kept += tl.sum(near, 0)
        y = tl.where(shown & (near[:, None] == 0), _capped(x * scale, softcap), float("-inf"))
        higher = tl.maximum(most, tl.max(y, 0))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, weight = tl.exp(most - safe), tl.exp(y - safe[None, :])
        back = here & (near == 0)
        mean_v = tl.load(
            bytes8[:, None] + 4 * HEAD + DIMS + dv[None, :], mask=back[:, None] & (dv[None, :] < V_DIM), other=0
        ).to(tl.float32)
        mean_v = mean_v * v_unit[:, None]
        out = out * shrink[:, None] + tl.dot(tl.trans(weight), mean_v, input_precision="ieee")
        mass = mass * shrink + tl.sum(weight, 0)
        most = higher
    tl.store(n_kept_at + part, kept)
    some = mass > 0
    safe = tl.where(some, mass, 1.0)
    tl.store(lse_at + part * rows + r, tl.where(some, most + tl.log(safe), float("-inf")), mask=real)
    tl.store(out_at + (part * rows + r[:, None]) * V_DIM + dv[None, :], out / safe[:, None], mask=inside)


@triton.jit(do_not_specialize=["stride", "per", "cap", "splits"])
def _pack(hits_at, n_kept_at, lists, stride, per, cap, splits, SPLITS: tl.constexpr, TILE: tl.constexpr):
    head, split, s, i = tl.program_id(0), tl.program_id(1), tl.arange(0, SPLITS), tl.arange(0, TILE)
    before = tl.load(n_kept_at + head * splits + s, mask=s < split, other=0)
    begin, n = tl.sum(before, 0), tl.load(n_kept_at + head * splits + split)
    hits = hits_at + head.to(tl.int64) * stride + split * per
    for t in range(0, n, TILE):
        here = (t + i < n) & (begin + t + i < cap)
        tl.store(lists + head * cap + begin + t + i, tl.load(hits + t + i, mask=here, other=0), mask=here)
