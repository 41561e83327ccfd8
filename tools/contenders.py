"""What ``bench index`` compares: our indexes, and how others would answer a DIPR query.

To add one, write how it is built from keys and add a line to ``CONTENDERS``; an ``Index`` needs no more than ``ours``.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import hnswlib
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alaya_tiers.index import Coarse, Codes, Flat, Graph, Index

Search = Callable[[Tensor, float], Tensor]
"""Queries [group, dim] and beta to positions of keys, int64 [found]."""


class Built(NamedTuple):
    """An index: its bytes beside the keys, and its searches by name, each made anew for a run of steps."""

    nbytes: int
    searches: dict[str, Callable[[], Search]]


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to index keys [n, dim] with so many threads.

    prefix: the same for queries that see the first keys only. needs, hint: a module that must be there, how to get it.
    """

    name: str
    build: Callable[[Tensor, int], Built]
    prefix: Callable[[Tensor, int, int], Built] | None = None
    needs: str | None = None
    hint: str = ""


def ours(index: Index) -> Callable[[], Search]:
    """An index of ours as a search."""
    return lambda: lambda queries, beta: index.in_range(queries, beta).tokens


def _flat(keys: Tensor, threads: int) -> Built:
    return Built(0, {"flat, torch": ours(Flat(keys))})


def _codes(bits: int, keys: Tensor, threads: int) -> Built:
    likely = Codes(keys, bits, sure=3.0)
    complete = copy.copy(likely)
    complete.sure = None
    return Built(
        likely.nbytes, {f"codes {bits} bit, sure 3": ours(likely), f"codes {bits} bit, complete": ours(complete)}
    )


def _coarse(keys: Tensor, threads: int) -> Built:
    """Deviations as many as it takes: the keys that matter are the extremes of their clusters."""
    made = Coarse(keys, sure=None)
    searches = {"coarse, complete": ours(made)}
    for sure in (3.0, 4.0, 5.0):
        likely = copy.copy(made)
        likely.sure = sure
        searches[f"coarse, sure {sure:g}"] = ours(likely)
    return Built(made.nbytes, searches)


def _prefix(build: Callable[[Tensor, int], Built], keys: Tensor, visible: int, threads: int) -> Built:
    """What is laid out by position needs no filter: it looks at the first blocks only."""
    return build(keys[:visible], threads)


BEAMS = (64, 256, 1024, 4096)


class _LastStep:
    """Walks from the keys that mattered a step ago."""

    def __init__(self, graph: Graph) -> None:
        self._graph, self._last = graph, np.empty(0, np.int64)

    def __call__(self, queries: Tensor, beta: float) -> Tensor:
        tokens = self._graph.walk(queries, beta, entries=self._last).found.tokens
        self._last = tokens.numpy()
        return tokens


def _graph(keys: Tensor, threads: int) -> Built:
    graph = Graph.build(keys, threads=threads)
    beams = {beam: Graph.from_arrays(graph.arrays(), beam) for beam in BEAMS}
    searches = {f"graph, l0 {beam}": ours(each) for beam, each in beams.items()}
    searches |= {f"graph, l0 {beam}, last step's keys": partial(_LastStep, beams[beam]) for beam in BEAMS[:2]}
    return Built(graph.nbytes, searches)


def _graph_prefix(keys: Tensor, visible: int, threads: int) -> Built:
    graph = Graph.build(keys, threads=threads)
    seen = np.array([[0, visible]])

    def search(beam: int) -> Search:
        walker = Graph.from_arrays(graph.arrays(), beam)
        return lambda queries, beta: walker.walk(queries, beta, ranges=seen).found.tokens

    return Built(graph.nbytes, {f"graph, l0 {beam}": partial(search, beam) for beam in BEAMS[:3]})


class _AdaptiveK:
    """hnswlib's own search for more and more neighbours, until the last is out of reach."""

    def __init__(self, index: Any, ef: int, least: int = 64) -> None:
        self._index, self._ef, self._least = index, ef, least

    def __call__(self, queries: Tensor, beta: float) -> Tensor:
        found = [self._near(query, beta) for query in queries.numpy()]
        return torch.from_numpy(np.unique(np.concatenate(found)).astype(np.int64))

    def _near(self, query: npt.NDArray[np.float32], beta: float) -> npt.NDArray[np.uint64]:
        k, n = self._least, self._index.get_current_count()
        near: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
        while True:
            k = min(k, n)
            self._index.set_ef(max(self._ef, k))
            try:
                labels, distances = self._index.knn_query(query, k=k, num_threads=1)  # 1 - q.k, ascending
            except RuntimeError:  # it cannot reach as many as k
                return near
            near = labels[0, distances[0] <= distances[0, 0] + beta]
            if k == n or near.size < k:
                return near
            k *= 2


def _hnswlib(keys: Tensor, threads: int) -> Built:
    n, dim = keys.shape
    index: Any = hnswlib.Index("ip", dim)
    index.init_index(n, M=16, ef_construction=200)
    index.add_items((keys - keys.mean(0)).numpy(), num_threads=threads)
    return Built(index.index_file_size(), {f"hnswlib, ef {ef}": partial(_AdaptiveK, index, ef) for ef in BEAMS[:3]})


class _Faiss:
    """The best score first, then all within reach of it, for each query: faiss wants one bar for all."""

    def __init__(self, index: Any, parameters: Any = None) -> None:
        self._index, self._parameters = index, parameters

    def __call__(self, queries: Tensor, beta: float) -> Tensor:
        q = queries.numpy()
        best, _ = self._index.search(q, 1, params=self._parameters)
        found = [
            self._index.range_search(
                q[i : i + 1], float(np.nextafter(best[i, 0] - beta, -np.inf)), params=self._parameters
            )[2]
            for i in range(len(q))
        ]
        return torch.from_numpy(np.unique(np.concatenate(found)))


def _faiss_flat(keys: Tensor, threads: int) -> Built:
    faiss: Any = importlib.import_module("faiss")
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(keys.shape[1])
    index.add(keys.numpy())
    return Built(keys.nbytes, {"faiss Flat": partial(_Faiss, index)})


def _faiss_ivf(keys: Tensor, threads: int) -> Built:
    faiss: Any = importlib.import_module("faiss")
    faiss.omp_set_num_threads(threads)
    n, dim = keys.shape
    lists = max(1, min(n // 40, round(4 * n**0.5)))
    coarse = faiss.IndexFlatIP(dim)
    index = faiss.IndexIVFFlat(coarse, dim, lists, faiss.METRIC_INNER_PRODUCT)
    centred = (keys - keys.mean(0)).numpy()
    index.train(centred[:: max(1, n // (64 * lists))])
    index.add(centred)
    searches: dict[str, Callable[[], Search]] = {}
    for share in (0.02, 0.1, 0.25, 0.5):
        probes = max(1, round(share * lists))
        parameters = faiss.SearchParametersIVF(nprobe=probes)
        searches[f"faiss IVF, {share:.0%} of lists"] = partial(_Faiss, index, parameters)
    return Built(keys.nbytes + 8 * n + 4 * lists * dim, searches)


_FAISS = "pip install 'alaya-tiers[faiss]'"

CONTENDERS: tuple[Contender, ...] = (
    Contender("flat", _flat, partial(_prefix, _flat)),
    Contender("codes8", partial(_codes, 8), partial(_prefix, partial(_codes, 8))),
    Contender("codes4", partial(_codes, 4), partial(_prefix, partial(_codes, 4))),
    Contender("coarse", _coarse, partial(_prefix, _coarse)),
    Contender("graph", _graph, _graph_prefix),
    Contender("hnswlib", _hnswlib),
    Contender("faiss-flat", _faiss_flat, partial(_prefix, _faiss_flat), "faiss", _FAISS),
    Contender("faiss-ivf", _faiss_ivf, None, "faiss", _FAISS),
)

NAMES = tuple(contender.name for contender in CONTENDERS)
