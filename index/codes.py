"""Codes: keys in 4 or 8 bits, scanned at memory bandwidth, with bounds on what each code can hide.

A block's keys are rotated (by one fixed random rotation, so that no channel stands out), their mean, rounded to 8 bits,
is taken off, and each is rounded to ``scale * (integer + 1/2)``, with one of 16 scales that the block has. A score is
then ``q.mean + scale * (q.code) + q.error``. The length of every error is known and ``|q.error| <= |q| |error|``: no
key outside that bound can matter, and with ``sure=None`` the answer to a DIPR query is complete, whatever the keys. In
a random direction an error of d dimensions contributes only ``|q| |error| / sqrt(d)`` (one standard deviation): with
``sure=2`` two of these are allowed for, which finds all but about one in a thousand and needs far fewer exact scores.
What the best key may score at least is known with the same uncertainty; whoever has the keys can look (``Verify``), and
halves it.

Sources: rotation and error in a random direction: RaBitQ (arXiv 2405.12497); DIPR: AlayaDB (arXiv 2504.10326), 6.1;
estimating what was not fetched: RetroInfer (arXiv 2505.02922).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers import kernel
from alaya_tiers.attention import Partial, merge
from alaya_tiers.devices.base import Ask, Hits, Scanning
from alaya_tiers.devices.cpu import CpuScan
from alaya_tiers.errors import InputError
from alaya_tiers.index.base import Found, check_keys, check_query

LANES, HEAD = 64, 8
"""As in scan.c: tokens coded together, floats in front of a block's codes."""

RATIO, SLACK, NORM, LOW, STEP, K_UNIT, V_UNIT = range(7)
"""What these floats are, see scan.c."""

LEVELS = 16
"""Scales of a block."""

MOST_ROWS = 128
"""Queries of one kv head that one scan takes."""

MOST_DIMS = {8: 512, 4: 1024}
"""Numbers of a key, by bits: beyond, the kernel's integers could overflow."""

ALONE, ALONE_VECTOR, ALONE_ROWS = 1 << 18, 9216, 32
"""Multiplications up to which OpenBLAS works on one thread (of a vector and a matrix), and rows taken at a time."""

_NO_SCALE, _HUGE = 1e-30, 1e15

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Layout:
    """Shape of one coded block: ``tokens`` keys of ``k_dim`` numbers at ``bits`` each, and the mean of its values."""

    tokens: int
    k_dim: int
    v_dim: int
    bits: int

    @property
    def dims(self) -> int:
        """k_dim, rounded up to what the kernel reads."""
        return -(-self.k_dim // 8) * 8

    @property
    def rows(self) -> int:
        """tokens, rounded up to what the kernel reads."""
        return -(-self.tokens // LANES) * LANES

    @property
    def levels_at(self) -> int:
        """Bytes before the levels."""
        return 4 * HEAD + self.dims + self.v_dim

    @property
    def codes_at(self) -> int:
        """Bytes before the codes."""
        return -(-(self.levels_at + self.rows // 2) // 64) * 64

    @property
    def nbytes(self) -> int:
        """Bytes of one coded block."""
        return self.codes_at + self.rows * self.dims * self.bits // 8


@cache
def rotation(dim: int) -> Tensor:
    """The rotation of all keys and queries with ``dim`` numbers, float32 [dim, dim]."""
    noise = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(dim))
    found: Tensor = torch.linalg.qr(noise)[0].float()
    return found


@cache
def rotation_on(dim: int, device: torch.device) -> Tensor:
    """The same on a device."""
    return rotation(dim).to(device)


def boundable(x: Tensor) -> bool:
    """Whether bounds on scores with these numbers make sense: all finite, and their squares too."""
    return bool(x.abs().max() < _HUGE) if x.numel() else True


def encode(k: Tensor, v: Tensor, layout: Layout) -> Tensor | None:
    """Coded blocks, where k is: uint8 [heads, layout.nbytes]. k: [heads, tokens, k_dim], v: [heads, tokens, v_dim].

    None when they are not ``boundable``: such blocks must be attended exactly.
    """
    heads, tokens, k_dim = k.shape
    keys, values = k.float(), v.float()
    if not (boundable(keys) and boundable(values)):
        return None
    rotated = keys @ rotation_on(k_dim, k.device)
    mean_k, unit_k = _bytes(rotated.mean(1))
    mean_v, unit_v = _bytes(values.mean(1))
    rest = rotated - (mean_k * unit_k)[:, None]
    half = (1 << layout.bits) / 2 - 0.5
    low, step, level = _levels(rest.abs().amax(2) / half)
    scale = (low + step * level)[..., None]
    code = (rest / scale + half).round_().clamp_(0, 2 * half)
    error = (rest - scale * (code - half)).norm(dim=2)
    out = torch.zeros(heads, layout.nbytes, dtype=torch.uint8, device=k.device)
    head = out[:, : 4 * HEAD].view(torch.float32)
    head[:, RATIO] = (error / scale[..., 0]).amax(1) * 1.0001
    head[:, SLACK] = keys.norm(dim=2).amax(1) * (k_dim * 2.0**-22) + _NO_SCALE  # what rounding in sums can cost
    head[:, NORM] = (code - half).norm(dim=2).amax(1) * 1.0001
    for place, number in ((LOW, low), (STEP, step), (K_UNIT, unit_k), (V_UNIT, unit_v)):
        head[:, place] = number[:, 0]
    means = out[:, 4 * HEAD : layout.levels_at].view(torch.int8)
    means[:, :k_dim], means[:, layout.dims :] = mean_k.to(torch.int8), mean_v.to(torch.int8)
    levels = torch.zeros(heads, layout.rows, dtype=torch.uint8, device=k.device)
    levels[:, :tokens] = level.to(torch.uint8)
    lows, highs = levels.view(heads, -1, 2, LANES // 2).unbind(2)
    out[:, layout.levels_at : layout.levels_at + layout.rows // 2] = (lows | highs << 4).view(heads, -1)
    packed = torch.zeros(heads, layout.rows, layout.dims, dtype=torch.uint8, device=k.device)
    packed[:, :tokens, :k_dim] = code.to(torch.uint8)
    lanes = packed.view(heads, layout.rows // LANES, LANES, layout.dims // 4, 4).transpose(2, 3)
    if layout.bits == 4:
        pairs = lanes.reshape(heads, layout.rows // LANES, layout.dims // 8, 2, LANES, 4)
        lanes = pairs[:, :, :, 0] | pairs[:, :, :, 1] << 4
    out[:, layout.codes_at :] = lanes.reshape(heads, -1)
    return out


def _bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers [heads, n] as whole ones between -127 and 127, and the unit [heads, 1] of each head."""
    unit = (x.abs().amax(1, keepdim=True) / 127).clamp_min(_NO_SCALE)
    return (x / unit).round_().clamp_(-127, 127), unit


def _levels(needed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Low [heads, 1], step [heads, 1] and level [heads, tokens], so that low + step x level >= ``needed``."""
    high = needed.amax(1, keepdim=True).clamp_min(_NO_SCALE)
    low = torch.maximum(needed.amin(1, keepdim=True), high / LEVELS)
    step = (high - low) / (LEVELS - 1) + high * 1e-6
    return low, step, ((needed - low) / step).ceil_().clamp_(0, LEVELS - 1)


def _rotated(q: Tensor, layout: Layout) -> Tensor:
    """Queries as codes are, float32 [heads, rows, layout.dims]. By numpy: torch would wake its threads for it."""
    heads, rows, k_dim = q.shape
    flat, found = q.detach().to("cpu", torch.float32).reshape(-1, k_dim), torch.zeros(heads, rows, layout.dims)
    found[..., :k_dim] = torch.from_numpy(_product(flat.numpy(), rotation(k_dim).numpy())).view(q.shape)
    return found


def _product(a: Floats, b: Floats) -> Floats:
    """a @ b, in pieces: larger ones wake the thread of OpenBLAS, which spins for 50 ms on a core of ours."""
    out = np.empty((a.shape[0], b.shape[1]), np.float32)
    for top in range(0, a.shape[0], ALONE_ROWS):
        some = a[top : top + ALONE_ROWS]
        step = max(1, (ALONE if some.shape[0] > 1 else ALONE_VECTOR) // some.size)
        for left in range(0, b.shape[1], step):
            np.matmul(some, b[:, left : left + step], out=out[top : top + ALONE_ROWS, left : left + step])
    return out


def mean_scores(q: Tensor, blocks: npt.NDArray[np.int64], layout: Layout) -> Tensor:
    """The most that a query scores with each block's mean key, unscaled. q: [heads, rows, k_dim]; blocks: int64
    [heads, n], address of each coded block. float32 [heads, n].
    """
    heads = np.empty((blocks.size, 4 * HEAD + layout.dims), np.uint8)
    to = heads.ctypes.data + np.arange(blocks.size) * heads.shape[1]
    kernel.copy(np.ascontiguousarray(blocks).ravel(), to, np.full(blocks.size, heads.shape[1]), 1)
    unit = heads[:, 4 * K_UNIT : 4 * K_UNIT + 4].copy().view(np.float32)
    means = torch.from_numpy(heads[:, 4 * HEAD :].view(np.int8) * unit).view(*blocks.shape, -1)
    return torch.amax(_rotated(q, layout) @ means.mT, 1)


class Scan(NamedTuple):
    """What a scan found, for each kv head.

    tokens: a list of int32 [found]: block number x layout.rows + offset, ascending. top: float32 [heads, rows], a score
    (scaled, capped) that the best certainly reaches. rest: float32 [heads, rows, v_dim] and rest_lse [heads, rows]:
    the attention of all other tokens asked for, estimated from their codes and the mean values of their blocks.
    """

    tokens: list[npt.NDArray[np.int32]]
    top: Tensor
    rest: Tensor
    rest_lse: Tensor


Verify = Callable[[npt.NDArray[np.int32]], Tensor]
"""Tokens [heads, rows], as a scan names them or -1, to what the row's query certainly scores with each (scaled and
capped), float32 [heads, rows]; -inf where nobody can tell."""


@dataclass(frozen=True, slots=True)
class Reach:
    """What a query asks for.

    distance: every key whose score (scaled, capped) is at most this much below the best (DIPR). most: at most this many
    keys for each kv head, the ones nearest to some query's best; None = no limit. sure: standard deviations of a code's
    error that are allowed for; None = any error there can be, for a provably complete answer.
    """

    distance: float
    most: int | None = None
    sure: float | None = 2.0

    def __post_init__(self) -> None:
        if not self.distance >= 0:
            raise InputError(f"a distance below the best score cannot be negative: {self.distance}")
        if self.most is not None and self.most < 0:
            raise InputError(f"at most {self.most} keys cannot be asked for")
        if self.sure is not None and not self.sure > 0:
            raise InputError(f"sure is a number of standard deviations above 0, not {self.sure}")

    @classmethod
    def of_share(cls, alpha: float, most: int | None = None, sure: float | None = 2.0) -> Reach:
        """Every key with at least the share ``alpha`` of the largest weight, 0 < alpha <= 1 (AlayaDB, definition 1)."""
        if not 0 < alpha <= 1:
            raise InputError(f"alpha is a share of the largest weight, above 0 and at most 1, not {alpha}")
        return cls(-math.log(alpha), most, sure)

    def margin(self, dim: int) -> float:
        """The share of an error's length that is allowed for."""
        return 1.0 if self.sure is None else min(1.0, self.sure / math.sqrt(dim))


class Elsewhere(Protocol):
    """Codes that also lie in the memory of a device, which scans them there. heads: the caller's, of ``q``."""

    there: npt.NDArray[np.bool_]
    """[n]: which blocks do."""

    def scan(self, ask: Ask, columns: npt.NDArray[np.intp]) -> Scanning | None:
        """Begin a scan of these blocks; None where the device does not take it. ask: without addresses."""
        ...


class Scratch:
    """Memory that scans use again: taken anew for every one, it would cost as much as the scan."""

    def __init__(self) -> None:
        self._bytes: dict[str, npt.NDArray[np.uint8]] = {}

    def room(self, nbytes: int, name: str = "scan") -> npt.NDArray[np.uint8]:
        """At least so many bytes, contents undefined, until the next call with this name."""
        if name not in self._bytes or self._bytes[name].size < nbytes:
            self._bytes[name] = np.empty(nbytes + nbytes // 4, np.uint8)
        return self._bytes[name]


def scan(
    q: Tensor,
    blocks: npt.NDArray[np.int64],
    first: npt.NDArray[np.int32],
    count: npt.NDArray[np.int32],
    layout: Layout,
    reach: Reach,
    scale: float,
    softcap: float | None = None,
    seed: Tensor | None = None,
    scratch: Scratch | None = None,
    *,
    distances: npt.NDArray[np.float64] | None = None,
    verify: Verify | None = None,
    elsewhere: Elsewhere | None = None,
) -> Scan:
    """Every token of coded blocks that may be within reach of the best score, and an estimate of the others.

    q: [heads, rows, k_dim], boundable. blocks: int64 [heads, n], address of each coded block. first, count: int32 [n]:
    which tokens of a block are asked for (the filter). seed: float32 [heads, rows], scores (scaled, capped) of some key
    that is attended anyway: what does not come near it is not looked at closer. Sound for a scan: its bar only rises.
    distances: of each head, instead of the reach's. verify: asked for the best keys, before the others are compared
    with them. elsewhere: what a device scans meanwhile, unless ``reach.most`` bounds the keys of a head.
    """
    heads, rows, k_dim = q.shape
    most_dims = MOST_DIMS[layout.bits]
    if rows > MOST_ROWS or layout.dims > most_dims:
        raise InputError(f"a scan takes {MOST_ROWS} queries of {most_dims} numbers at most, got {rows} of {k_dim}")
    start = torch.full((heads, rows), -torch.inf) if seed is None else seed.float().contiguous()
    far = np.full(heads, reach.distance) if distances is None else distances
    ask = Ask(
        _rotated(q, layout), np.ascontiguousarray(blocks), first, count, start, far.astype(np.float32),
        (layout.dims, layout.v_dim, layout.rows, layout.bits, layout.codes_at),
        (scale, softcap or 0.0, reach.margin(k_dim)), reach.most,
    )  # fmt: skip
    parts: list[tuple[npt.NDArray[np.intp], Scanning]] = []
    rest = np.arange(blocks.shape[1])
    if elsewhere is not None and reach.most is None and elsewhere.there.any():
        near = np.flatnonzero(elsewhere.there)
        if (begun := elsewhere.scan(_some(ask, near), near)) is not None:  # goes on while the CPU scans
            parts, rest = [(near, begun)], np.flatnonzero(~elsewhere.there)
    if rest.size or not parts:
        parts.append((rest, CpuScan(_some(ask, rest), (scratch or Scratch()).room)))
    if verify is not None:
        start = start.clone()
        for columns, part in parts:
            torch.maximum(start, verify(_named(part.best(), columns, layout.rows)), out=start)
    for _, part in parts:
        part.finish(start)
    return _one([(columns, part.found()) for columns, part in parts], layout.rows)


def _some(ask: Ask, columns: npt.NDArray[np.intp]) -> Ask:
    """The same of some blocks."""
    if columns.size == ask.first.size:
        return ask
    blocks = np.ascontiguousarray(ask.blocks[:, columns])
    return ask._replace(blocks=blocks, first=ask.first[columns], counts=ask.counts[columns])


def _named(tokens: npt.NDArray[np.int32], columns: npt.NDArray[np.intp], rows: int) -> npt.NDArray[np.int32]:
    """Tokens of a scan of some blocks, as a scan of all would name them; -1 stays."""
    if not columns.size or columns[-1] == columns.size - 1:  # all of them
        return tokens
    return np.where(tokens < 0, -1, columns[tokens // rows] * rows + tokens % rows).astype(np.int32)


def _one(parts: list[tuple[npt.NDArray[np.intp], Hits]], rows: int) -> Scan:
    """Scans of different blocks as one."""
    if len(parts) == 1:
        columns, hits = parts[0]
        tokens = [_named(some, columns, rows) for some in hits.tokens]
        return Scan(tokens, *hits[1:])
    lists = zip(*([_named(tokens, columns, rows) for tokens in hits.tokens] for columns, hits in parts), strict=True)
    rest = merge([Partial(hits.rest, hits.rest_lse) for _, hits in parts])
    top = torch.stack([hits.top for _, hits in parts]).amax(0)
    return Scan([np.sort(np.concatenate(some)) for some in lists], top, *rest)


class Blocks(NamedTuple):
    """What ``Codes`` asks a scan for. See scan."""

    q: Tensor
    blocks: npt.NDArray[np.int64]
    first: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]
    reach: Reach
    verify: Verify


class Codes:
    """Keys of one partition as codes, with the exact keys to verify what the scan finds. keys: float [tokens, dim].

    bits: 4 or 8; sure: see Reach. Raises InputError.
    """

    def __init__(self, keys: Tensor, bits: int = 4, block_tokens: int = 256, sure: float | None = None) -> None:
        check_keys(keys)
        if bits not in MOST_DIMS or block_tokens < 1:
            raise InputError(f"codes of {bits} bits in blocks of {block_tokens} tokens: 4 or 8 bits, 1 token or more")
        self.keys, self.sure = keys, sure
        self.layout = Layout(block_tokens, keys.shape[1], 1, bits)
        self._coded: list[Tensor | None] = []
        for start in range(0, keys.shape[0], block_tokens):
            chunk = keys[start : start + block_tokens]
            padded = torch.nn.functional.pad(chunk, (0, 0, 0, block_tokens - chunk.shape[0]))
            self._coded.append(encode(padded[None], torch.zeros(1, block_tokens, 1), self.layout))

    @property
    def nbytes(self) -> int:
        """Bytes of all codes."""
        return sum(self.layout.nbytes for coded in self._coded if coded is not None)

    def in_range(self, queries: Tensor, beta: float) -> Found:
        check_query(queries, beta, self.keys.shape[1])
        exact = [i for i, coded in enumerate(self._coded) if coded is None]
        size, tokens = self.layout.tokens, self.keys.shape[0]
        wanted: list[npt.NDArray[np.int64]] = [np.arange(i * size, min(tokens, (i + 1) * size)) for i in exact]
        coded = [(i, block) for i, block in enumerate(self._coded) if block is not None]
        if coded and not boundable(queries):
            wanted = [np.arange(tokens)]
        elif coded:
            starts = np.array([i * size for i, _ in coded], np.int64)
            counts = np.minimum(size, tokens - starts).astype(np.int32)
            addresses = np.array([[block.data_ptr() for _, block in coded]], np.int64)
            rows = self.layout.rows

            def verify(best: npt.NDArray[np.int32]) -> Tensor:
                at = torch.from_numpy(starts[best // rows] + best % rows)[0]
                scores = (queries.double() * self.keys[at].double()).sum(1).float()
                return torch.where(torch.from_numpy(best >= 0), scores - 1e-6 * scores.abs(), -torch.inf)

            some = Blocks(
                queries[None], addresses, np.zeros(len(coded), np.int32), counts, Reach(beta, None, self.sure), verify
            )
            hits = self._scanned(some, torch.stack([block for _, block in coded], 1)).tokens[0]
            wanted.append(starts[hits // rows] + hits % rows)
        candidates = torch.from_numpy(np.sort(np.concatenate(wanted))) if wanted else torch.empty(0, dtype=torch.long)
        scores = queries.float() @ self.keys[candidates].float().T
        if not candidates.numel():
            return Found(candidates, scores)
        near = (scores >= scores.amax(-1, keepdim=True) - beta).any(0)
        return Found(candidates[near], scores[:, near])

    def _scanned(self, asked: Blocks, coded: Tensor) -> Scan:
        """What a scan names. coded: the blocks themselves, uint8 [1, n, bytes]."""
        return scan(*asked[:4], self.layout, asked.reach, 1.0, verify=asked.verify)
