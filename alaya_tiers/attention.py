"""Partial attention and its exact merge: pure tensors, no event loop, no model library.

Attention over a set of tokens can be computed in parts, wherever the parts are, if each part keeps the logarithm of the
mass it was normalised by. `merge` then gives the attention over the union, exactly.

    attend_blocks   few rows (decode) over blocks scattered in memory: the compiled kernel
    attend_lists    few rows over single tokens, other ones for each head: what an index found
    attend_dense    many rows (prefill) over one tensor: torch's flash attention where it applies
    attend_causal   the same where each query token sees one key more than the one before it, without a mask
    attend_naive    the same contract as attend_dense in five lines: what the others are measured against

A row is one query head of a group at one query token; all rows of a kv head share its keys and values. A block holds up
to T tokens of one kv head, token after token, each as [k | v] without a gap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers import kernel
from alaya_tiers.flash import can, flash

Ints = npt.NDArray[np.int64] | npt.NDArray[np.int32] | Tensor | Sequence[int]


class Partial(NamedTuple):
    """Attention over some of the tokens, with what is needed to merge it with the rest.

    out: float32 [kv_heads, rows, v_dim], normalised by its own softmax sum; 0 where a row sees nothing.
    lse: float32 [kv_heads, rows], natural logarithm of sum(exp(score)); -inf where a row sees nothing.
    """

    out: Tensor
    lse: Tensor


def parts_of_row(k_dim: int, v_dim: int, *, latent: bool) -> tuple[int, int, int]:
    """Numbers of what queries are compared with, of what is summed, and before the latter, in a row [k | v]."""
    return (k_dim + v_dim, k_dim, 0) if latent else (k_dim, v_dim, k_dim)


@dataclass(frozen=True, slots=True)
class BlockList:
    """Resident blocks of one layer and sequence, as the kernels see them. Owns nothing: keep the memory alive.

    addresses: int64 [kv_heads, blocks], address of the first row of each block.
    starts: int32 [blocks], position of each block's first token; no position twice, any order.
    counts: int32 [blocks], valid tokens of each block.
    latent: the key is the whole row [k | v], and k is the value (MLA: k is the latent, v the rotary key).
    """

    addresses: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]
    k_dim: int
    v_dim: int
    dtype: torch.dtype
    latent: bool = False

    def __post_init__(self) -> None:
        heads_blocks, blocks = self.addresses.shape, self.addresses.shape[-1:]
        if len(heads_blocks) != 2 or self.starts.shape != blocks or self.counts.shape != blocks:
            raise ValueError(f"need [heads, n], [n], [n]; got {heads_blocks}, {self.starts.shape}, {self.counts.shape}")
        if self.addresses.dtype != np.int64 or self.starts.dtype != np.int32 or self.counts.dtype != np.int32:
            raise ValueError("addresses must be int64, starts and counts int32")
        if any(a.shape[-1] > 1 and a.strides[-1] != a.itemsize for a in (self.addresses, self.starts, self.counts)):
            raise ValueError("addresses, starts and counts must be contiguous in their last dimension")
        if self.k_dim < 1 or self.v_dim < 1:
            raise ValueError(f"k_dim {self.k_dim} and v_dim {self.v_dim} must be at least 1")

    @property
    def parts(self) -> tuple[int, int, int]:
        """Numbers of a key, of a value, and before the value, in a row."""
        return parts_of_row(self.k_dim, self.v_dim, latent=self.latent)

    @property
    def row_bytes(self) -> int:
        """Bytes from one token to the next."""
        return (self.k_dim + self.v_dim) * self.dtype.itemsize


def attend_blocks(
    q: Tensor,
    blocks: BlockList,
    scale: float,
    lo: Ints,
    hi: Ints,
    softcap: float | None = None,
    top: Tensor | None = None,
) -> Partial:
    """Attention of a few rows over blocks in memory, reading each visible key and value once for all rows of a head.

    q: [kv_heads, rows, k_dim], any float dtype (computed in float32). lo, hi: int32 [rows]; row r sees the positions
    lo[r] <= p < hi[r] that the blocks hold. Blocks outside every row's range are not touched. Result on q's device.
    top: float32 [kv_heads, rows] on the CPU, filled with the largest score (scaled, capped) of each row, if given.
    Raises ValueError for shapes that do not fit.
    """
    heads, rows, k_dim = q.shape
    low, high = _int32(lo), _int32(hi)
    key, value, _ = blocks.parts
    if (heads, k_dim) != (blocks.addresses.shape[0], key) or low.shape != (rows,) or high.shape != (rows,):
        raise ValueError(f"q {tuple(q.shape)}, lo {low.shape}, hi {high.shape} do not fit {blocks.addresses.shape}")
    code = kernel.DTYPES.get(blocks.dtype)
    if code is None:
        return _attend_gathered(q, blocks, scale, low, high, softcap)
    query = q.detach().to("cpu", torch.float32).contiguous()
    out = torch.empty(heads, rows, value)
    lse = torch.empty(heads, rows)
    kernel.attend(
        query, blocks.addresses, blocks.starts, blocks.counts, (*blocks.parts, code), scale, softcap or 0.0,
        low, high, out, lse, top,
    )  # fmt: skip
    return Partial(out, lse) if q.is_cpu else Partial(out.to(q.device), lse.to(q.device))


def attend_lists(
    q: Tensor,
    addresses: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
    k_dim: int,
    v_dim: int,
    dtype: torch.dtype,
    scale: float,
    softcap: float | None = None,
    *,
    latent: bool = False,
) -> Partial:
    """Attention of a few rows over tokens of each head's own, each a row [k | v] in memory.

    q: [kv_heads, rows, k_dim], any float dtype. addresses: int64 [all tokens], head after head; first: int64
    [kv_heads + 1], where each head's begin and the last one's end. dtype: one of kernel.DTYPES. latent: see BlockList;
    q: [kv_heads, rows, k_dim + v_dim].
    """
    heads, rows, _ = q.shape
    query = q.detach().to("cpu", torch.float32).contiguous()
    parts = parts_of_row(k_dim, v_dim, latent=latent)
    out, lse = torch.empty(heads, rows, parts[1]), torch.empty(heads, rows)
    dims = (*parts, kernel.DTYPES[dtype])
    kernel.attend_lists(
        query, np.ascontiguousarray(addresses), np.ascontiguousarray(first), dims, scale, softcap or 0.0, out, lse
    )
    return Partial(out, lse) if q.is_cpu else Partial(out.to(q.device), lse.to(q.device))


def attend_dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, softcap: float | None = None
) -> Partial:
    """Attention of many rows over one tensor of keys and values, on any device.

    q: [kv_heads, rows, k_dim]. k, v: [kv_heads, n, k_dim or v_dim]; strided views do, the last dimension contiguous.
    mask: None, bool (True is visible) or a float added to the scores, broadcastable to [kv_heads, rows, n].
    """
    if softcap is not None or not can(q, k, v):
        return attend_naive(q, k, v, scale, mask, softcap)
    return Partial(*flash(q, k, v, scale, mask))


def attend_causal(
    q: Tensor, k: Tensor, v: Tensor, scale: float, first: int, queries: int, softcap: float | None = None
) -> Partial:
    """attend_dense with the mask ``first + j <= i`` for key j and query token i, of which nothing is computed in vain.

    q: [kv_heads, group * queries, k_dim], all query tokens of a head after those of another. k, v: [kv_heads, n, dim].
    first: the first query token that sees key 0; below 0, query 0 sees keys up to -first.
    """
    heads, rows, k_dim = q.shape
    grouped = q.reshape(heads, rows // queries, queries, k_dim)
    parts, seen = [], max(0, -first)
    if seen:
        parts.append(attend_dense(q, k[:, :seen], v[:, :seen], scale, None, softcap))
        first = 0
    size = min(k.shape[1] - seen, queries - first)  # of the square on the diagonal
    if size > 0:
        keys, values = k[:, seen : seen + size], v[:, seen : seen + size]
        out = torch.zeros(*grouped.shape[:3], v.shape[-1], device=q.device)
        lse = torch.full(grouped.shape[:3], -torch.inf, device=q.device)
        for head in range(grouped.shape[1]):
            square = grouped[:, head, first : first + size]
            out[:, head, first : first + size], lse[:, head, first : first + size] = _square(
                square, keys, values, scale, softcap
            )
        if (after := first + size) < queries:
            below = grouped[:, :, after:].reshape(heads, -1, k_dim)
            part = attend_dense(below, keys, values, scale, None, softcap)
            out[:, :, after:] = part.out.view(*grouped.shape[:2], -1, v.shape[-1])
            lse[:, :, after:] = part.lse.view(*grouped.shape[:2], -1)
        parts.append(Partial(out.view(heads, rows, -1), lse.view(heads, rows)))
    return merge(parts) if parts else nothing(q, v.shape[-1])


def _square(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Partial:
    """As many queries as keys, query i sees keys up to i."""
    if softcap is not None or not can(q, k, v):
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
        return attend_dense(q, k, v, scale, mask, softcap)
    return Partial(*flash(q, k, v, scale, causal=True))


def nothing(q: Tensor, v_dim: int) -> Partial:
    """Attention over no tokens. q: [kv_heads, rows, k_dim]."""
    return Partial(
        torch.zeros(*q.shape[:2], v_dim, device=q.device), torch.full(q.shape[:2], -torch.inf, device=q.device)
    )


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores (scaled) as a model with soft-capping takes them (Gemma 2, arXiv 2408.00118, 2); None: as they are."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def attend_naive(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, softcap: float | None = None
) -> Partial:
    """The same contract as attend_dense, obviously right: float32, or float64 if an input is float64."""
    dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    scores = (q.to(dtype) @ k.to(dtype).mT) * scale
    scores = capped(scores, softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(dtype)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - _finite(lse)[..., None])
    return Partial(weights @ v.to(dtype), lse)


def merge(parts: Sequence[Partial]) -> Partial:
    """Attention over the union of disjoint parts, exactly: every part weighs what its mass is of the total.

    Parts must have equal shapes. Rows that no part sees stay 0 and -inf. Raises ValueError when there is no part.
    """
    if not parts:
        raise ValueError("nothing to merge")
    return reduce(_merge_two, parts)


def _merge_two(a: Partial, b: Partial) -> Partial:
    lse = torch.logaddexp(a.lse, b.lse)
    weight = torch.exp(a.lse - _finite(lse))
    return Partial(torch.lerp(b.out, a.out, weight[..., None]), lse)


def with_sinks(part: Partial, sinks: Tensor) -> Partial:
    """Attention whose softmax also ran over one sink logit per row, which takes mass and adds no value.

    sinks: [kv_heads, rows], any float dtype, natural logarithm like the scores; apply once, after the last merge.
    """
    lse = torch.logaddexp(part.lse, sinks.to(part.lse.dtype))
    return Partial(part.out * torch.exp(part.lse - _finite(lse))[..., None], lse)


def write_rows(k: Tensor, v: Tensor, addresses: npt.NDArray[np.int64]) -> None:
    """Write n tokens per head as rows [k | v], from addresses[head] on.

    k: [kv_heads, n, k_dim], v: [kv_heads, n, v_dim], one dtype, on the CPU. addresses: int64 [kv_heads]. The caller
    vouches for n * (k_dim + v_dim) elements of writable memory at each address. Raises ValueError when shapes differ.
    """
    if k.shape[:2] != v.shape[:2] or k.dtype != v.dtype or addresses.shape != k.shape[:1]:
        raise ValueError(f"k {tuple(k.shape)} {k.dtype}, v {tuple(v.shape)} {v.dtype}, addresses {addresses.shape}")
    kernel.write(_rowwise(k), _rowwise(v), np.ascontiguousarray(addresses, np.int64))


def copy_blocks(
    src: npt.NDArray[np.int64],
    dst: npt.NDArray[np.int64],
    nbytes: npt.NDArray[np.int64] | int,
    threads: int | None = None,
) -> None:
    """Copy memory from src[i] to dst[i], nbytes (or nbytes[i]) each, in one call that releases the GIL.

    int64 addresses; source and destination may not overlap. threads: None lets the size decide, up to torch's number.
    """
    if src.shape != dst.shape or src.ndim != 1:
        raise ValueError(f"src {src.shape} and dst {dst.shape} must be equally long")
    sizes = np.ascontiguousarray(np.broadcast_to(np.asarray(nbytes, np.int64), src.shape))
    kernel.copy(np.ascontiguousarray(src, np.int64), np.ascontiguousarray(dst, np.int64), sizes, threads)


def gather(blocks: BlockList, lo: int, hi: int, room: Callable[[int], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Copy positions lo..hi-1 in order. Returns k [kv_heads, hi-lo, k_dim] and v, views of one contiguous tensor.

    room: makes the memory for it, uint8 [n]. Raises ValueError when the blocks do not hold each position once.
    """
    first = np.maximum(blocks.starts, lo).astype(np.int64)
    counts = np.minimum(blocks.starts.astype(np.int64) + blocks.counts, hi) - first
    if int(counts[counts > 0].sum()) != max(hi - lo, 0):
        raise ValueError(f"the blocks do not cover positions {lo}..{hi - 1}")
    shape = (blocks.addresses.shape[0], max(hi - lo, 0), blocks.k_dim + blocks.v_dim)
    nbytes = math.prod(shape) * blocks.dtype.itemsize
    scratch = (torch.empty(nbytes, dtype=torch.uint8) if room is None else room(nbytes)).view(blocks.dtype).view(shape)
    _copy_rows(blocks, np.flatnonzero(counts > 0), first, counts, first - lo, scratch)
    return scratch[..., : blocks.k_dim], scratch[..., blocks.k_dim :]


def _copy_rows(
    blocks: BlockList,
    chosen: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    place: npt.NDArray[np.int64],
    scratch: Tensor,
) -> None:
    """Copy counts[b] rows from position first[b] of each chosen block b to row place[b] of scratch, for all heads."""
    heads = np.arange(scratch.shape[0])[:, None] * scratch.stride(0) * scratch.element_size()
    src = blocks.addresses[:, chosen] + (first[chosen] - blocks.starts[chosen]) * blocks.row_bytes
    dst = scratch.data_ptr() + heads + place[chosen] * blocks.row_bytes
    sizes = np.broadcast_to(counts[chosen] * blocks.row_bytes, src.shape)
    copy_blocks(src.reshape(-1), dst.reshape(-1), sizes.reshape(-1))


def _attend_gathered(
    q: Tensor,
    blocks: BlockList,
    scale: float,
    lo: npt.NDArray[np.int32],
    hi: npt.NDArray[np.int32],
    softcap: float | None,
) -> Partial:
    """attend_blocks for dtypes the compiled kernel does not know: copy what is visible, then the naive path."""
    counts = blocks.counts.astype(np.int64)
    place = np.cumsum(counts) - counts
    n, width = int(counts.sum()), blocks.k_dim + blocks.v_dim
    scratch = torch.empty(blocks.addresses.shape[0], n, width, dtype=blocks.dtype)
    _copy_rows(blocks, np.flatnonzero(counts), blocks.starts.astype(np.int64), counts, place, scratch)
    positions = np.repeat(blocks.starts - place, counts) + np.arange(n)
    visible = torch.from_numpy((positions >= lo[:, None]) & (positions < hi[:, None]))
    key, value, at = blocks.parts
    k, v = scratch[..., :key], scratch[..., at : at + value]
    out, lse = attend_naive(q.detach().cpu(), k, v, scale, visible, softcap)
    return Partial(out.to(q.device, torch.float32), lse.to(q.device, torch.float32))


def _finite(lse: Tensor) -> Tensor:
    """lse with 0 for -inf, so that -inf - lse is -inf and not NaN."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _int32(x: Ints) -> npt.NDArray[np.int32]:
    return np.ascontiguousarray(x.cpu() if isinstance(x, Tensor) else x, np.int32)


def _rowwise(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.stride(-1) == 1 else x.contiguous()
