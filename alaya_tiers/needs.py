"""What the heads of a context need, counted once on samples of its queries: so that a session's first step is planned
as if it had made many.

For each layer and kv head: how many keys are within reach of a query, for several reaches, the mean over the samples.
It is kept in a file beside the record of the context's last segment, and the manifest has its digest. Nothing but plans
depends on it: one that is missing or damaged is not used.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers.attention import capped
from alaya_tiers.errors import InputError

Counts = npt.NDArray[np.float32]

STEP, REACHES = 0.5, 40
"""Counts are kept for distances below the best score of STEP, 2 STEP, ... in units of the exponent of a softmax."""

MOST_BYTES = 64 << 20
"""A file of needs larger than this is not read."""

_MOST_NUMBERS = 1 << 16
"""Of layers, and of kv heads."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Counts. tokens: of the context. samples: queries that were counted. counts: by layer, [kv_heads, REACHES]."""

    tokens: int
    samples: int
    counts: Mapping[int, Counts]

    def found(self, layer: int, distance: float) -> npt.NDArray[np.float64] | None:
        """How many keys each kv head of a layer has within this distance of its best; None where nothing is known."""
        if layer not in self.counts:
            return None
        at, counts = np.arange(REACHES + 1) * STEP, self.counts[layer]
        return np.array([np.interp(distance, at, [0.0, *of_head]) for of_head in counts.tolist()])

    def encoded(self) -> tuple[bytes, str]:
        """As a file, and its digest."""
        layers = {
            str(n): {"kv_heads": len(c), "counts": base64.b64encode(c.astype("<f4").tobytes()).decode()}
            for n, c in self.counts.items()
        }
        data = json.dumps({"tokens": self.tokens, "samples": self.samples, "step": STEP, "layers": layers}).encode()
        return data, hashlib.sha256(data).hexdigest()

    @classmethod
    def decoded(cls, data: bytes, digest: str) -> "Needs":
        """Of a file; ValueError if it is not the one with this digest, or makes no sense."""
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError("the needs are damaged (wrong digest)")
        try:
            found = json.loads(data)
            layers = {int(n): _counts(one) for n, one in found["layers"].items()}
            tokens, samples = int(found["tokens"]), int(found["samples"])
            if float(found["step"]) != STEP or min(tokens, samples) < 1 or len(layers) > _MOST_NUMBERS:
                raise ValueError("the needs have numbers that cannot be")
        except (KeyError, TypeError, AttributeError, RecursionError, OverflowError, binascii.Error) as error:
            raise ValueError("the needs make no sense") from error
        return cls(tokens, samples, layers)


def _counts(data: Any) -> Counts:
    heads, raw = int(data["kv_heads"]), base64.b64decode(data["counts"], validate=True)
    if not 0 < heads < _MOST_NUMBERS or len(raw) != 4 * heads * REACHES:
        raise ValueError("the needs have counts of another length than they say")
    made = np.frombuffer(raw, "<f4").reshape(heads, REACHES).astype(np.float32)
    if not np.isfinite(made).all() or (made < 0).any():
        raise ValueError("the needs have counts that cannot be")
    return made


@dataclass(frozen=True, slots=True)
class Samples:
    """Queries of a context's layers, as attention gets them: rotated, not scaled.

    queries: for each layer [query_heads, n, k_dim], floating point, of the same n. scale: what attention multiplies
    scores with, layer by layer; softcap: what it caps them with.
    """

    queries: tuple[Tensor, ...]
    scale: tuple[float, ...]
    softcap: float | None = None

    @classmethod
    def of(cls, queries: Any, scale: Callable[[int, int], float], softcap: float | None = None) -> "Samples":
        """Checked. queries: for each layer [query_heads, n, k_dim], or [1, ...] of it. scale: of a layer with so many
        dimensions. Raises InputError."""
        made = list[Tensor]()
        for number, q in enumerate(queries):
            if not isinstance(q, Tensor) or not q.dtype.is_floating_point:
                raise InputError(f"queries of layer {number} are not a floating-point tensor")
            q = q[0] if q.ndim == 4 and len(q) == 1 else q
            if q.ndim != 3 or not q.numel() or q.shape[1] != (made[0] if made else q).shape[1]:
                raise InputError(
                    f"queries of layer {number} are {tuple(q.shape)}; they are [query_heads, n, head_dim], of the same "
                    "n in every layer, at least one"
                )
            if not torch.isfinite(q).all():
                raise InputError(f"queries of layer {number} have numbers that are not finite")
            made.append(q.detach().cpu().float())
        if not made:
            raise InputError("there are no queries; leave queries= out, or give those of every layer")
        return cls(tuple(made), tuple(scale(n, q.shape[-1]) for n, q in enumerate(made)), softcap)

    def fit(self, shapes: Mapping[int, tuple[int, int]]) -> None:
        """Raises InputError where they are not those of layers with so many kv heads and dimensions of keys."""
        if len(shapes) != len(self.queries):
            raise InputError(f"queries of {len(self.queries)} layers for keys and values of {len(shapes)}")
        for (number, (heads, dim)), q in zip(sorted(shapes.items()), self.queries, strict=True):
            if q.shape[0] % heads or q.shape[2] != dim:
                raise InputError(
                    f"queries of layer {number} are {tuple(q.shape)}; its keys have {heads} kv heads of {dim} numbers, "
                    f"so they are [a multiple of {heads}, n, {dim}]"
                )


def counted(
    q: Tensor, keys: Callable[[], Iterator[tuple[int, Tensor]]], scale: float, softcap: float | None, inner: range
) -> Counts:
    """What one layer needs. q: [query_heads, n, k_dim]. keys: gives the position of its first and the keys
    [kv_heads, tokens, k_dim] of one piece after the other, as often as asked. inner: positions that are counted; others
    are attended in any case.

    A key counts once for all query heads of its kv head, as they share it.
    """
    best: Tensor | None = None
    for _, k in keys():
        top = _scores(q, k, scale, softcap).amax(-1)
        best = top if best is None else torch.maximum(best, top)
    assert best is not None, "a layer has keys"
    found = np.zeros((best.shape[0], REACHES))
    for start, k in keys():
        lo, hi = max(inner.start - start, 0), min(inner.stop - start, k.shape[1])
        if lo < hi:
            below = (best[..., None] - _scores(q, k[:, lo:hi], scale, softcap)).amin(1)  # [kv_heads, n, tokens]
            place = torch.ceil(below / STEP).clamp(1, REACHES + 1).long() - 1
            for head, of_head in enumerate(place):
                found[head] += torch.bincount(of_head.ravel(), minlength=REACHES + 1)[:REACHES].numpy()
    return (found.cumsum(1) / q.shape[1]).astype(np.float32)


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """[kv_heads, query heads of each, n, tokens]."""
    grouped = q.view(k.shape[0], -1, *q.shape[1:])
    scores = torch.einsum("hgnd,htd->hgnt", grouped, k.float()) * scale
    return capped(scores, softcap)
