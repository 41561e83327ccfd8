"""Graph: DIPR by walking from key to key (DIPRS). Approximate: what no walk comes by is not found.

Keys are linked to near ones by hnswlib, in inner product space and *centred*: taking the mean off shifts all scores
of a query alike, so it changes no answer, but the graph of centred keys is walked with better recall. Only the bottom
layer is kept, as plain arrays that are checked before anything walks over them; no file of hnswlib's is ever read.

The walk has two phases. A beam of the best keys seen is expanded, best first, without pruning; then everything within
beta of the best is, until nothing near is left. Only the second knows the seed (the best score of keys that are
attended anyway, the window's): in the literal algorithm a large seed prunes the stepping stones on the way.

Sources: DIPRS, the seed, the filter: AlayaDB (arXiv 2504.10326), 6.1.3 and 7.1; two hops with a bound through keys that
are not asked for: ACORN (arXiv 2403.04871); HNSW: arXiv 1603.09320.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import hnswlib
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers import kernel
from alaya_tiers.errors import InputError
from alaya_tiers.index.base import Found, check_query
from alaya_tiers.index.codes import boundable

MOST_ROWS = 64
"""Queries of one kv head that can walk together."""

SPREAD = 16
"""Keys at even distances that every walk also starts from: somewhere in what is asked for."""

_HUGE = 1e15  # what is boundable
_AT_ONCE = 2048  # keys that are added before somebody may say stop


class Walk(NamedTuple):
    """What a walk found, and how many keys it compared with the queries on the way."""

    found: Found
    scored: int


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """Keys of one partition and their neighbours. Raises InputError for arrays no walk would survive.

    keys: float32 [n, dim]. neighbours: int32 [n, degree], of each key; short lists end in -1. entries: int32 [entries],
    keys that walks start from. beam: keys each query's beam holds (the paper's l0): more find more, and cost more.
    """

    keys: npt.NDArray[np.float32]
    neighbours: npt.NDArray[np.int32]
    entries: npt.NDArray[np.int32]
    beam: int = 64

    def __post_init__(self) -> None:
        for name, dtype, axes in (("keys", np.float32, 2), ("neighbours", np.int32, 2), ("entries", np.int32, 1)):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != axes:
                raise InputError(f"{name} of a graph are an array of {np.dtype(dtype)} with {axes} axes")
            object.__setattr__(self, name, np.ascontiguousarray(array))
        n, links = len(self.keys), self.neighbours
        if self.beam < 1:
            raise InputError(f"a beam holds at least one key, not {self.beam}")
        if n >= 1 << 31 or len(links) != n or not self.keys.shape[1]:
            raise InputError(f"{n} keys of {self.keys.shape[1]} numbers with {len(links)} lists of neighbours")
        if not (self.keys.max(initial=0) < _HUGE and self.keys.min(initial=0) > -_HUGE):  # NaN is neither
            raise InputError("keys of a graph must be finite and below 1e15: attend such keys exactly")
        none = links == -1
        if ((links < -1) | (links >= n)).any() or (none[:, :-1] & ~none[:, 1:]).any():
            raise InputError("the graph is damaged, build it again: neighbours that are no keys")
        if (links == np.arange(n, dtype=np.int32)[:, None]).any():
            raise InputError("the graph is damaged, build it again: a key that is its own neighbour")
        if (self.entries < 0).any() or (self.entries >= n).any() or (n and not self.entries.size):
            raise InputError("the graph is damaged, build it again: entries that are no keys, or none")

    @classmethod
    def build(
        cls,
        keys: Tensor,
        degree: int = 16,
        ef_construction: int = 200,
        threads: int = 1,
        beam: int = 64,
        say: Callable[[int, int], None] = lambda done, of: None,
    ) -> Graph:
        """A graph over float keys [n, dim], float32 ones used where they lie. ``say`` or a signal may stop it any time.

        degree: links a key gets when it is added; it ends up with twice as many at most. ef_construction: keys compared
        for them. threads: with more than one, a graph differs a little from the next one of the same keys. say: told
        (keys added, keys to add). Raises InputError.
        """
        if min(degree, ef_construction, threads) < 1 or degree < 2:
            raise InputError(f"degree {degree}, ef_construction {ef_construction}, threads {threads}: below 2, 1, 1")
        if keys.ndim != 2 or not keys.shape[1] or not boundable(keys):
            raise InputError("keys [n, dim] of a graph must be finite and below 1e15: attend such keys exactly")
        own = keys.detach().to("cpu", torch.float32).contiguous()
        n, dim = own.shape
        if not n:
            return cls(own.numpy(), np.empty((0, 2 * degree), np.int32), np.empty(0, np.int32), beam)
        centred = own - own.mean(0, dtype=torch.float64).float()
        lengths = centred.norm(dim=1)
        scale = float(lengths.mean())
        index = hnswlib.Index("ip", dim)
        index.init_index(n, M=degree, ef_construction=ef_construction, random_seed=100)
        for start in range(0, n, _AT_ONCE):
            chunk = centred[start : start + _AT_ONCE] / (scale or 1.0)
            index.add_items(chunk.numpy(), np.arange(start, start + len(chunk)), num_threads=threads)
            say(start + len(chunk), n)
        (state,) = index.__getstate__()
        medoid = int(lengths.argmin())
        return cls(own.numpy(), _bottom(state, n), np.array([medoid], np.int32), beam)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], beam: int = 64) -> Graph:
        """The graph ``arrays`` gave. Raises InputError when an array is missing or damaged."""
        missing = {"keys", "neighbours", "entries"} - set(arrays)
        if missing:
            raise InputError(f"a graph without its {', '.join(sorted(missing))}")
        return cls(arrays["keys"], arrays["neighbours"], arrays["entries"], beam)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All there is to a graph, by name."""
        return {"keys": self.keys, "neighbours": self.neighbours, "entries": self.entries}

    @property
    def nbytes(self) -> int:
        """Bytes beside the keys."""
        return self.neighbours.nbytes + self.entries.nbytes

    def in_range(self, queries: Tensor, beta: float) -> Found:
        return self.walk(queries, beta).found

    def walk(
        self,
        queries: Tensor,
        beta: float,
        seed: Tensor | None = None,
        entries: npt.NDArray[np.int64] | None = None,
        ranges: npt.NDArray[np.int64] | None = None,
    ) -> Walk:
        """``in_range``, with what the caller knows. queries: float [rows, dim]. Raises InputError.

        seed: float [rows], scores of keys that are attended anyway: only what comes within beta of these too is found.
        entries: positions to start from as well: the keys that mattered a step ago. ranges: int64 [r, 2], first and end
        of the positions asked for, ascending and apart; nothing else is found or compared with.
        """
        n, dim = self.keys.shape
        q = queries.detach().to("cpu", torch.float32).contiguous()
        check_query(q, beta, dim)
        if len(q) > MOST_ROWS or not boundable(q):
            raise InputError(f"at most {MOST_ROWS} queries can walk, all finite and below 1e15")
        bar = torch.full((len(q),), -torch.inf) if seed is None else seed.detach().to("cpu", torch.float32).contiguous()
        if bar.shape != (len(q),) or bool(bar.isnan().any()):
            raise InputError(f"a seed is a score for each of {len(q)} queries, not {list(bar.shape)}")
        wanted = np.array([[0, n]]) if ranges is None else np.ascontiguousarray(ranges, np.int64).reshape(-1, 2)
        edges = wanted.ravel()
        if (np.diff(edges) < 0).any() or (edges < 0).any() or (edges > n).any():
            raise InputError(f"ranges of positions ascend between 0 and {n}")
        starts = np.concatenate([self.entries, _spread(wanted), [] if entries is None else entries]).astype(np.int32)
        if (starts < 0).any() or (starts >= n).any():
            raise InputError(f"entries are positions below {n}")
        tokens, scores, scored = kernel.walk(
            self.keys, self.neighbours, q, wanted, starts, bar, self.beam, 2 * self.neighbours.shape[1], beta
        )
        order = np.argsort(tokens)
        found = Found(torch.from_numpy(tokens[order].astype(np.int64)), torch.from_numpy(scores[order].T.copy()))
        return Walk(found, scored)


def _spread(ranges: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Positions at even distances in what is asked for."""
    sizes = ranges[:, 1] - ranges[:, 0]
    ends = np.cumsum(sizes)
    if not sizes.sum():
        return np.empty(0, np.int64)
    places = np.unique(np.arange(SPREAD) * ends[-1] // SPREAD)
    of = np.searchsorted(ends, places, "right")
    inside: npt.NDArray[np.int64] = ranges[of, 0] + places - (ends - sizes)[of]
    return inside


def _bottom(state: Mapping[str, Any], n: int) -> npt.NDArray[np.int32]:
    """Neighbours int32 [n, degree] by position, from what hnswlib calls its state.

    A record of the bottom layer is: number of links (uint16), 2 bytes of flags, links (uint32 each), vector, label.
    """
    width, degree = state["size_data_per_element"], state["max_M0"]
    records = np.asarray(state["data_level0"]).view(np.uint8)
    if state["ser_version"] != 1 or state["offset_level0"] != 0 or records.size < n * width:
        raise InputError("this hnswlib keeps its graph in a form that is not known here: install hnswlib 0.8")
    records = records[: n * width].reshape(n, width)
    count = records[:, :2].copy().view(np.uint16)[:, 0]
    links = records[:, 4 : 4 + 4 * degree].copy().view(np.int32)
    label = records[:, state["label_offset"] :][:, :8].copy().view(np.int64)[:, 0]
    used = np.arange(degree) < count[:, None]
    named = np.where(used, label[np.where(used, links, 0)], -1)
    found = np.full((n, degree), -1, np.int32)
    found[label] = named
    return found
