"""What every index must do, as test classes: subclass with a way to make one, like the contracts in testing.py.

    CompleteIndexTests      the answer is the DIPR set, on any keys
    ApproximateIndexTests   the answer is right as far as it goes, and goes as far as its class says

The truth is brute force in float64. A key whose score lies within float32's rounding of the bar may be found or not.
"""

import contextlib
import functools
import math
import random

import torch
from torch import Tensor

from alaya_tiers.errors import InputError
from alaya_tiers.index import Found, Index
from alaya_tiers.tools.synthetic import KINDS, Head

KEYS = ("normal", "outlier channels", "sinks", "equal", "zero", "tiny", "large", "lines", "not finite")
"""Kinds of keys that are hard for some index."""

BETAS = (0.0, 0.5, 3.0, 1e30, math.inf)
SHAPES = ((0, 8), (1, 8), (2, 1), (17, 5), (300, 37), (700, 64))
"""Keys and their dimensions: none, one, and widths that no vector register has."""


def hard_keys(kind: str, n: int, dim: int) -> Tensor:
    """Keys of a kind, float32 [n, dim], by the random state of torch and Python."""
    k = torch.randn(n, dim)
    if kind == "outlier channels":
        k[:, :: max(1, dim // 2)] *= 200
    elif kind == "sinks":
        k[: n // 50 + 1] *= 1000
    elif kind == "equal":
        k[:] = k[:1]
    elif kind == "zero":
        k.zero_()
    elif kind == "tiny":
        k *= 1e-38
    elif kind == "large":
        k *= 1e12
    elif kind == "lines":
        k = torch.randn(n, 1) * torch.randn(1, dim) + 1e-3 * k
    elif kind == "not finite" and n:
        k[n // 2, dim // 2] = random.choice([math.inf, -math.inf, math.nan, 1e30])
    return k


def truth(keys: Tensor, queries: Tensor, beta: float) -> tuple[set[int], set[int]]:
    """Positions that must be found, and those that may be, by brute force."""
    if not len(keys):
        return set(), set()
    k, q = keys.double(), queries.double()
    below = (scores := q @ k.T).amax(1, keepdim=True) - scores
    slack = 2.0**-21 * k.shape[1] ** 0.5 * q.norm(dim=1, keepdim=True) * (k.norm(dim=1) + k.norm(dim=1).max())
    alone = (below == 0) & ((below <= slack).sum(1, keepdim=True) == 1)
    sets = [((below <= beta - slack) | alone).any(0), (below <= beta + slack).any(0)]
    must, may = (set(near.nonzero().flatten().tolist()) for near in sets)
    return must, may


HEAD = Head(dim=64)
BETA = -math.log(0.012) * 8.0
"""Keys with 1.2 % of the largest weight, of ``HEAD``."""


@functools.cache
def head_keys(tokens: int) -> Tensor:
    """Keys with real statistics."""
    return HEAD.keys(tokens)


class IndexTests:
    """What every index does. A subclass says how to make one of keys float [tokens, dim]."""

    tokens = 4096
    """Of the heads that recall is measured on."""

    def make(self, keys: Tensor) -> Index:
        raise NotImplementedError

    def check(self, keys: Tensor, queries: Tensor, beta: float, found: Found) -> None:
        """Whether an answer is good enough."""
        raise NotImplementedError

    def test_hard_keys(self) -> None:
        torch.manual_seed(0)
        for kind in KEYS[:-1]:
            for n, dim in SHAPES:
                keys = hard_keys(kind, n, dim)
                index = self.make(keys)
                for rows in (1, 5):
                    queries = torch.randn(rows, dim)
                    for beta in BETAS:
                        self._answer(index, keys, queries, beta)

    def test_queries_that_see_nothing_or_one_direction(self) -> None:
        torch.manual_seed(1)
        keys = torch.randn(200, 16)
        index = self.make(keys)
        assert len(self._answer(index, keys, torch.zeros(3, 16), 0.0).tokens) == 200
        self._answer(index, keys, 1e6 * torch.eye(16)[:4], 1e5)
        self._answer(index, keys, 1e-30 * torch.eye(16)[:4], 0.0)
        self._answer(index, keys, torch.randn(4, 16).bfloat16(), 1.0)
        self._answer(index, keys, torch.randn(16, 4).T, 1.0)

    def test_keys_in_half_precision(self) -> None:
        torch.manual_seed(2)
        for dtype in (torch.bfloat16, torch.float16):
            keys = torch.randn(300, 24).to(dtype)
            self._answer(self.make(keys), keys.float(), torch.randn(4, 24), 2.0)

    def test_an_answer_is_the_same_every_time(self) -> None:
        torch.manual_seed(3)
        keys, queries = torch.randn(1000, 32), torch.randn(4, 32)
        index, before = self.make(keys), keys.clone()
        one, other = index.in_range(queries, 4.0), index.in_range(queries, 4.0)
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(keys, before), "the keys were changed"

    def test_nonsense_is_refused(self) -> None:
        index = self.make(torch.randn(50, 8))
        wrong = [(torch.ones(1, 8), -1.0), (torch.ones(1, 8), math.nan), (torch.ones(1, 9), 1.0), (torch.ones(8), 1.0)]
        for queries, beta in wrong:
            try:
                index.in_range(queries, beta)
            except InputError:
                continue
            raise AssertionError(f"queries {list(queries.shape)} and beta {beta} were taken")
        for keys in (torch.ones(8), torch.ones(2, 3, 8), torch.ones(3, 0)):
            try:
                self.make(keys)
            except InputError:
                continue
            raise AssertionError(f"an index of keys {list(keys.shape)} was made")

    def test_what_is_not_finite_is_refused_or_harmless(self) -> None:
        """An index may refuse such keys and queries; else it finds what brute force does, and nothing for NaN."""
        random.seed(0)
        for _ in range(8):
            keys, queries = hard_keys("not finite", 100, 8), torch.randn(2, 8)
            try:
                found = self.make(keys).in_range(queries, 1.0)
            except InputError:
                continue
            scores = queries @ keys.T
            near = (scores >= scores.amax(1, keepdim=True) - 1.0).any(0)
            assert found.tokens.tolist() == near.nonzero().flatten().tolist()
        index = self.make(torch.randn(100, 8))
        with contextlib.suppress(InputError):
            assert not len(index.in_range(torch.full((1, 8), math.nan), 1.0).tokens)

    def test_heads_with_real_statistics(self) -> None:
        keys = head_keys(self.tokens)
        index = self.make(keys)
        for kind in KINDS.values():
            for step in range(0, 64, 16):
                self._answer(index, keys, HEAD.queries(kind, step, self.tokens), BETA)

    def _answer(self, index: Index, keys: Tensor, queries: Tensor, beta: float) -> Found:
        """What an index finds, after checking all of it."""
        found = index.in_range(queries, beta)
        tokens = found.tokens.tolist()
        assert found.tokens.dtype == torch.int64
        assert tokens == sorted(set(tokens)), "positions do not ascend"
        assert not tokens or 0 <= tokens[0] <= tokens[-1] < len(keys)
        assert found.scores.dtype == torch.float32
        assert found.scores.shape == (len(queries), len(tokens))
        k, q = keys[found.tokens].double(), queries.double()
        slack = 2.0**-21 * k.shape[1] ** 0.5 * q.norm(dim=1, keepdim=True) * k.norm(dim=1) + 1e-37
        assert bool(((found.scores - q @ k.T).abs() <= slack).all()), "wrong scores"
        self.check(keys, queries, beta, found)
        return found


class CompleteIndexTests(IndexTests):
    """An index that finds the whole DIPR set, whatever the keys."""

    def check(self, keys: Tensor, queries: Tensor, beta: float, found: Found) -> None:
        must, may = truth(keys, queries, beta)
        got = set(found.tokens.tolist())
        assert must <= got, f"{len(must - got)} of {len(must)} keys were not found"
        assert got <= may, f"{len(got - may)} keys were found that are not in reach"


class ApproximateIndexTests(IndexTests):
    """An index that may miss keys. A subclass says how many, of heads with real statistics."""

    recall = 1.0
    """Share of the DIPR set that is found, over all heads and queries, and share of what is found that is in it."""

    def check(self, keys: Tensor, queries: Tensor, beta: float, found: Found) -> None:
        if not len(keys):
            assert not len(found.tokens)
            return
        assert len(found.tokens), "nothing was found among some keys"
        best = found.scores.amax(1, keepdim=True)
        assert bool((found.scores >= best - beta).any(0).all()), "found although the answer has much better ones"
        _, may = truth(keys, queries, beta)
        if bool((best[:, 0] >= (queries.float() @ keys.float().T).amax(1)).all()):
            assert set(found.tokens.tolist()) <= may, "keys were found that are not in reach"

    def test_recall_is_what_it_says(self) -> None:
        wanted = found = right = 0
        keys = head_keys(self.tokens)
        index = self.make(keys)
        for kind in KINDS.values():
            for step in range(0, 128, 8):
                queries = HEAD.queries(kind, step, self.tokens)
                must, may = truth(keys, queries, BETA)
                got = set(index.in_range(queries, BETA).tokens.tolist())
                wanted, found, right = wanted + len(must), found + len(got), right + len(got & may)
        assert right >= self.recall * wanted, f"recall {right / wanted:.3f}"
        assert right >= self.recall * found, f"only {right / found:.3f} of what was found is in reach"
