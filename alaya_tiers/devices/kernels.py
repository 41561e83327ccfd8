"""Kernels of the GPU, in Triton: what attend.c and scan.c are on the CPU. Addresses in tables are of device memory.

    write_rows     new rows of all heads, one launch
    gather         blocks copied together, for torch's flash attention of many rows
    attend_blocks  few rows over a block table: each split of a head's blocks by one program, all rows of it at once
    attend_lists   the same over single tokens, other ones for each head
    merge          the splits' (output, logsumexp) into one
    scan           is in scan_kernels.py

Inputs are multiplied in the dtype they are stored in, summed in float32; float32 itself without TF32. Weights are
rounded to the stored dtype before they meet the values, as flash attention does. Triton compiles each kernel once per
combination of constants, on its first use: nothing that grows with a context is one.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from alaya_tiers.attention import Partial, capped

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
MOST_ROWS = 64
"""Rows of a kv head that one program holds; more are attended as tiles (attend_dense)."""

TILE = 64
"""Tokens attended at a time."""

GATHERED = 16
"""Tokens that one program copies."""

PROGRAMS = 264
"""Programs that a launch aims at: two for each multiprocessor of a large GPU."""


class Table(NamedTuple):
    """Blocks of device memory, as tensors there. See attention.BlockList. most: the largest count."""

    addresses: Tensor
    starts: Tensor
    counts: Tensor
    k_dim: int
    v_dim: int
    dtype: torch.dtype
    most: int


def attend_blocks(
    q: Tensor, table: Table, scale: float, lo: Tensor, hi: Tensor, softcap: float | None, top: Tensor | None = None
) -> Partial:
    """attention.attend_blocks. lo, hi: int32 [rows] on the device; top: float32 [kv_heads, rows] there."""
    heads, rows, _ = q.shape
    blocks = table.addresses.shape[1]
    per = -(-blocks // max(1, min(blocks, PROGRAMS // heads)))
    splits = max(1, -(-blocks // max(per, 1)))
    parts = _Parts.of(q, heads, splits, rows, table.v_dim, seen=blocks > 0)
    if blocks:
        _attend_blocks[heads, splits](
            q.contiguous(), table.addresses, table.starts, table.counts, lo, hi, parts.out, parts.lse, parts.top,
            table.addresses.stride(0), blocks, per, scale, softcap or 0.0, rows, table.most,
            **_constants(q, table.k_dim, table.v_dim, table.dtype, rows),
        )  # fmt: skip
    if top is not None:
        top.copy_(parts.top.amax(1))
    return merge(parts.out, parts.lse)


def attend_lists(
    q: Tensor,
    addresses: Tensor,
    first: Tensor,
    longest: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    scale: float,
    softcap: float | None,
) -> Partial:
    """attention.attend_lists. addresses, first: int64, on the device; longest: of the lists."""
    heads, rows, _ = q.shape
    per = max(TILE, TILE * (-(-longest // TILE) // max(1, PROGRAMS // heads) + 1))
    splits = max(1, -(-longest // per))
    parts = _Parts.of(q, heads, splits, rows, dims[1], seen=longest > 0)
    if longest:
        _attend_lists[heads, splits](
            q.contiguous(), addresses, first, parts.out, parts.lse, per, scale, softcap or 0.0, rows,
            **_constants(q, *dims, dtype, rows),
        )  # fmt: skip
    return merge(parts.out, parts.lse)


def merge(out: Tensor, lse: Tensor) -> Partial:
    """Parts of attention made one, exactly. out: float32 [heads, splits, rows, v_dim]; lse: [heads, splits, rows]."""
    heads, splits, rows, v_dim = out.shape
    if splits == 1:
        return Partial(out[:, 0], lse[:, 0])
    whole = Partial(out.new_empty(heads, rows, v_dim), lse.new_empty(heads, rows))
    _merge[heads, rows](
        out, lse, whole.out, whole.lse, splits, rows, v_dim, SPLITS=power(splits, 16), V=power(v_dim, 16)
    )
    return whole


def gather(addresses: Tensor, starts: Tensor, counts: Tensor, most: int, lo: int, hi: int, rows: Tensor) -> None:
    """attention.gather into ``rows`` [heads, hi - lo, width]. most: the largest of counts."""
    heads, blocks = addresses.shape
    width = rows.shape[-1]
    if blocks and rows.numel():
        _gather[heads, blocks, -(-most // GATHERED)](
            addresses, starts, counts, rows, addresses.stride(0), rows.shape[1], lo, hi,
            DTYPE=DTYPES[rows.dtype], WIDTH=width, W=power(width, 16), TILE=GATHERED,
            ALIGNED=_aligned(width, rows.dtype),
        )  # fmt: skip


def write_rows(k: Tensor, v: Tensor, addresses: Tensor) -> None:
    """attention.write_rows. addresses: int64 [heads], on the device."""
    heads, n, k_dim = k.shape
    v_dim = v.shape[2]
    if n:
        _write_rows[heads, n](
            k, v, addresses, *k.stride(), *v.stride(),
            DTYPE=DTYPES[k.dtype], K_DIM=k_dim, V_DIM=v_dim, W=power(k_dim + v_dim, 16),
        )  # fmt: skip


def scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Scaled and capped scores, float32 [heads, rows, n]: in torch, for what the kernels do not take."""
    return capped((q.float() @ k.float().mT) * scale, softcap)


class _Parts(NamedTuple):
    """What splits leave."""

    out: Tensor
    lse: Tensor
    top: Tensor

    @classmethod
    def of(cls, q: Tensor, heads: int, splits: int, rows: int, v_dim: int, *, seen: bool) -> "_Parts":
        """Room for them, which every split fills; where there is nothing to be seen, as if they had seen it."""
        if seen:
            made, bars = q.new_empty, (2, heads, splits, rows)
            return cls(made(heads, splits, rows, v_dim, dtype=torch.float32), *made(bars, dtype=torch.float32))
        nothing = torch.full((2, heads, splits, rows), -torch.inf, device=q.device)
        return cls(torch.zeros(heads, splits, rows, v_dim, device=q.device), nothing[0], nothing[1])


def power(n: int, least: int) -> int:
    return max(least, int(triton.next_power_of_2(n)))


def _constants(q: Tensor, k_dim: int, v_dim: int, dtype: torch.dtype, rows: int) -> dict[str, Any]:
    exact = q.dtype != dtype or dtype == torch.float32
    exact |= dtype == torch.bfloat16 and bool(triton.knobs.runtime.interpret)  # numpy has no bfloat16 to multiply
    return {
        "DTYPE": DTYPES[dtype], "COMPUTE": tl.float32 if exact else DTYPES[dtype],
        "K_DIM": k_dim, "V_DIM": v_dim, "K": power(k_dim, 16), "V": power(v_dim, 16), "R": power(rows, 16),
        "TILE": _tile_of(k_dim + v_dim, 4 if exact else dtype.itemsize), "ALIGNED": _aligned(k_dim + v_dim, dtype),
    }  # fmt: skip


def _tile_of(width: int, itemsize: int) -> int:
    """Tokens attended at a time: what is on its way at once must fit the shared memory of any GPU since 2020."""
    return max(16, min(TILE, 32768 // (power(width, 16) * itemsize)))


def _aligned(width: int, dtype: torch.dtype) -> bool:
    """Whether every row begins at a multiple of 16 bytes, as slots do: it is read in pieces of 16 bytes then."""
    return width * dtype.itemsize % 16 == 0


# ---------------------------------------------------------------------- on the device
@triton.jit
def _softcapped(x, softcap):
    a = tl.abs(x / softcap)
    e = tl.exp(-2.0 * a)
    y = (1.0 - e) / (1.0 + e) * softcap
    return tl.where(x < 0, -y, y)


@triton.jit
def _queries(q_at, head, rows, K_DIM: tl.constexpr, K: tl.constexpr, R: tl.constexpr, COMPUTE: tl.constexpr):
    r, d = tl.arange(0, R), tl.arange(0, K)
    at = q_at + (head * rows + r[:, None]) * K_DIM + d[None, :]
    return tl.load(at, mask=(r[:, None] < rows) & (d[None, :] < K_DIM), other=0.0).to(COMPUTE)


@triton.jit
def _tile(at, here, FIRST: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, COMPUTE: tl.constexpr):
    """Numbers FIRST to FIRST + DIM of the rows at ``at`` [tile], [tile, D]."""
    d = tl.arange(0, D)
    return tl.load(at[:, None] + FIRST + d[None, :], mask=here[:, None] & (d[None, :] < DIM), other=0.0).to(COMPUTE)


@triton.jit
def _more(
    q,
    at,
    here,
    seen,
    scale,
    softcap,
    most,
    mass,
    out,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One tile of tokens more. here: [tile], is a token; seen: [R, tile], is visible; most: the best score so far."""
    k = _tile(at, here, 0, K_DIM, K, COMPUTE)
    v = _tile(at, here, K_DIM, V_DIM, V, COMPUTE)
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if softcap > 0:
        score = _softcapped(score, softcap)
    score = tl.where(seen, score, float("-inf"))
    higher = tl.maximum(most, tl.max(score, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    weight = tl.exp(score - safe[:, None])
    shrink = tl.exp(most - safe)
    mass = mass * shrink + tl.sum(weight, 1)
    out = out * shrink[:, None] + tl.dot(weight.to(COMPUTE), v, input_precision="ieee")
    return higher, mass, out


@triton.jit
def _leave(out_at, lse_at, part, rows, most, mass, out, V_DIM: tl.constexpr, V: tl.constexpr, R: tl.constexpr):
    r, d = tl.arange(0, R), tl.arange(0, V)
    some = mass > 0
    out = tl.where(some[:, None], out / tl.where(some, mass, 1.0)[:, None], 0.0)
    lse = tl.where(some, most + tl.log(tl.where(some, mass, 1.0)), float("-inf"))
    tl.store(lse_at + part * rows + r, lse, mask=r < rows)
    at = out_at + (part * rows + r[:, None]) * V_DIM + d[None, :]
    tl.store(at, out, mask=(r[:, None] < rows) & (d[None, :] < V_DIM))


@triton.jit(do_not_specialize=["stride", "blocks", "per", "rows", "longest"])
def _attend_blocks(
    q_at,
    addresses,
    starts,
    counts,
    lo_at,
    hi_at,
    out_at,
    lse_at,
    top_at,
    stride,
    blocks,
    per,
    scale,
    softcap,
    rows,
    longest,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    head, split = tl.program_id(0), tl.program_id(1)
    r, t = tl.arange(0, R), tl.arange(0, TILE)
    q = _queries(q_at, head, rows, K_DIM, K, R, COMPUTE)
    lo, hi = tl.load(lo_at + r, mask=r < rows, other=0), tl.load(hi_at + r, mask=r < rows, other=0)
    most, mass = tl.full((R,), float("-inf"), tl.float32), tl.zeros((R,), tl.float32)
    out = tl.zeros((R, V), tl.float32)
    for b in range(split * per, tl.minimum(split * per + per, blocks)):
        rows_at = tl.load(addresses + head * stride + b).to(tl.pointer_type(DTYPE))
        if ALIGNED:
            rows_at = tl.multiple_of(rows_at, 16)
        start, count = tl.load(starts + b), tl.load(counts + b)
        for tile in range(0, count, TILE):
            token = tile + t
            position = start + token
            here = token < count
            seen = here[None, :] & (position[None, :] >= lo[:, None]) & (position[None, :] < hi[:, None])
            at = rows_at + token * (K_DIM + V_DIM)
            most, mass, out = _more(q, at, here, seen, scale, softcap, most, mass, out, K_DIM, V_DIM, K, V, COMPUTE)
    part = head * tl.num_programs(1) + split
    tl.store(top_at + part * rows + r, most, mask=r < rows)
    _leave(out_at, lse_at, part, rows, most, mass, out, V_DIM, V, R)


@triton.jit(do_not_specialize=["per", "rows"])
def _attend_lists(
    q_at,
    addresses,
    first,
    out_at,
    lse_at,
    per,
    scale,
    softcap,
    rows,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    head, split = tl.program_id(0), tl.program_id(1)
    r, t = tl.arange(0, R), tl.arange(0, TILE)
    q = _queries(q_at, head, rows, K_DIM, K, R, COMPUTE)
    begin, end = tl.load(first + head) + split * per, tl.load(first + head + 1)
    end = tl.minimum(end, begin + per)
    most, mass = tl.full((R,), float("-inf"), tl.float32), tl.zeros((R,), tl.float32)
    out = tl.zeros((R, V), tl.float32)
    for tile in range(0, per, TILE):
        token = begin + tile + t
        here = token < end
        at = tl.load(addresses + token, mask=here, other=0).to(tl.pointer_type(DTYPE))
        if ALIGNED:
            at = tl.multiple_of(at, 16)
        seen = here[None, :] & (r[:, None] < rows)
        most, mass, out = _more(q, at, here, seen, scale, softcap, most, mass, out, K_DIM, V_DIM, K, V, COMPUTE)
    _leave(out_at, lse_at, head * tl.num_programs(1) + split, rows, most, mass, out, V_DIM, V, R)


@triton.jit(do_not_specialize=["splits", "rows"])
def _merge(out_at, lse_at, whole_at, whole_lse, splits, rows, v_dim, SPLITS: tl.constexpr, V: tl.constexpr):
    head, row = tl.program_id(0), tl.program_id(1)
    s, d = tl.arange(0, SPLITS), tl.arange(0, V)
    part = (head * splits + s) * rows + row
    lse = tl.load(lse_at + part, mask=s < splits, other=float("-inf"))
    most = tl.max(lse, 0)
    weight = tl.exp(lse - tl.where(most == float("-inf"), 0.0, most))
    mass = tl.sum(weight, 0)
    inside = (s[:, None] < splits) & (d[None, :] < v_dim)
    out = tl.load(out_at + part[:, None] * v_dim + d[None, :], mask=inside, other=0.0)
    some = mass > 0
    safe = tl.where(some, mass, 1.0)
    tl.store(whole_at + (head * rows + row) * v_dim + d, tl.sum(out * weight[:, None], 0) / safe, mask=d < v_dim)
    tl.store(whole_lse + head * rows + row, tl.where(some, most + tl.log(safe), float("-inf")))


@triton.jit(do_not_specialize=["stride", "tokens", "lo", "hi"])
def _gather(
    addresses,
    starts,
    counts,
    rows_at,
    stride,
    tokens,
    lo,
    hi,
    DTYPE: tl.constexpr,
    WIDTH: tl.constexpr,
    W: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    head, b = tl.program_id(0), tl.program_id(1)
    token, d = tl.program_id(2) * TILE + tl.arange(0, TILE), tl.arange(0, W)
    position = tl.load(starts + b) + token
    here = (token < tl.load(counts + b)) & (position >= lo) & (position < hi)
    inside = here[:, None] & (d[None, :] < WIDTH)
    block = tl.load(addresses + head * stride + b).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        block = tl.multiple_of(block, 16)
    found = tl.load(block + token[:, None] * WIDTH + d[None, :], mask=inside, other=0.0)
    target = rows_at + head.to(tl.int64) * tokens * WIDTH + (position - lo).to(tl.int64)[:, None] * WIDTH + d[None, :]
    tl.store(target, found, mask=inside)


@triton.jit
def _write_rows(
    k_at,
    v_at,
    addresses,
    k_head,
    k_row,
    k_step,
    v_head,
    v_row,
    v_step,
    DTYPE: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    W: tl.constexpr,
):
    head, n, d = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.arange(0, W)
    k = tl.load(k_at + head * k_head + n * k_row + d * k_step, mask=d < K_DIM, other=0.0)
    in_v = (d >= K_DIM) & (d < K_DIM + V_DIM)
    v = tl.load(v_at + head * v_head + n * v_row + (d - K_DIM) * v_step, mask=in_v, other=0.0)
    row = tl.load(addresses + head).to(tl.pointer_type(DTYPE)) + n * (K_DIM + V_DIM)
    tl.store(row + d, tl.where(d < K_DIM, k, v), mask=d < K_DIM + V_DIM)
