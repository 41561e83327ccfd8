"""Indexes: what brute force finds, on any keys; what a scan of codes leaves out is estimated."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alaya_tiers.attention import attend_lists, attend_naive
from alaya_tiers.errors import InputError
from alaya_tiers.index import Coarse, Codes, Flat, Index, Parted
from alaya_tiers.index.codes import Layout, Reach, Scan, Scratch, _product, encode, scan
from alaya_tiers.testing_index import KEYS, ApproximateIndexTests, CompleteIndexTests, hard_keys


class TestFlat(CompleteIndexTests):
    def make(self, keys: Tensor) -> Index:
        return Flat(keys)


class TestCodes8(CompleteIndexTests):
    def make(self, keys: Tensor) -> Index:
        return Codes(keys, 8)


class TestCodes4(CompleteIndexTests):
    def make(self, keys: Tensor) -> Index:
        return Codes(keys, 4, block_tokens=16)


class TestParted4(CompleteIndexTests):
    def make(self, keys: Tensor) -> Index:
        return Parted(keys, 4)


class TestParted8InSmallBlocks(CompleteIndexTests):
    def make(self, keys: Tensor) -> Index:
        return Parted(keys, 8, block_tokens=80)


class TestParted4Sure3(ApproximateIndexTests):
    recall = 0.995

    def make(self, keys: Tensor) -> Index:
        return Parted(keys, 4, sure=3.0, deviations=5.0)


class TestCoarse(CompleteIndexTests):
    def make(self, keys: Tensor) -> Coarse:
        return Coarse(keys, segment=256)


class TestCoarseSure5(ApproximateIndexTests):
    recall = 0.97

    def make(self, keys: Tensor) -> Coarse:
        return Coarse(keys, sure=5.0)


def test_clusters_leave_out_what_is_far_away() -> None:
    """Keys around a few directions: a sound bound looks at one of them; a deviation or two at less of it."""
    directions = 20 * torch.nn.functional.normalize(torch.randn(32, 64), dim=1)
    keys = (directions[:, None] + 0.05 * torch.randn(32, 64, 64)).reshape(-1, 64)
    index = Coarse(keys, size=64, segment=1024)
    q = directions[[3]]
    found = index.in_range(q, 10.0)
    assert set((found.tokens // 64).tolist()) == {3}
    assert index.looked_at(q, 10.0) < 0.5 * len(keys)
    assert Coarse(keys, size=64, segment=1024, sure=1.0).looked_at(q, 10.0) <= index.looked_at(q, 10.0)
    for wrong in ({"size": 0}, {"segment": 0}, {"sure": 0.0}):
        with pytest.raises(InputError, match="above 0"):
            Coarse(keys, **wrong)


class TestCodes8Sure3(ApproximateIndexTests):
    recall = 0.999

    def make(self, keys: Tensor) -> Index:
        return Codes(keys, 8, sure=3.0)


class TestCodes4Sure3(ApproximateIndexTests):
    recall = 0.995

    def make(self, keys: Tensor) -> Index:
        return Codes(keys, 4, sure=3.0)


@given(
    kind=st.sampled_from(KEYS),
    bits=st.sampled_from([4, 8]),
    n=st.integers(1, 600),
    dim=st.integers(1, 90),
    rows=st.integers(1, 9),
    sharp=st.sampled_from([0.0, 1e-3, 1.0, 50.0]),
    share=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_with_sound_bounds_the_answer_is_complete(
    kind: str, bits: int, n: int, dim: int, rows: int, sharp: float, share: float, seed: int
) -> None:
    """Whatever the keys: exactly the set that the flat scan finds. share: of the spread of scores that is asked for."""
    torch.manual_seed(seed)
    random.seed(seed)
    keys, queries = hard_keys(kind, n, dim), sharp * torch.randn(rows, dim)
    scores = (queries @ keys.T).nan_to_num(0.0, 0.0, 0.0)
    beta = share * float(scores.max() - scores.min())
    want, got = Flat(keys).in_range(queries, beta), Codes(keys, bits, block_tokens=64).in_range(queries, beta)
    assert got.tokens.tolist() == want.tokens.tolist()


class Coded:
    """Keys and values of some heads as coded blocks in memory, and the truth about them."""

    def __init__(self, heads: int, tokens: int, k_dim: int, v_dim: int, bits: int, block: int = 64) -> None:
        self.k, self.v = 2 * torch.randn(heads, tokens, k_dim), torch.randn(heads, tokens, v_dim)
        self.layout, self.n = Layout(block, k_dim, v_dim, bits), tokens // block
        coded = [
            encode(self.k[:, i * block :][:, :block], self.v[:, i * block :][:, :block], self.layout)
            for i in range(self.n)
        ]
        self.memory = torch.stack([one for one in coded if one is not None], 1)
        strides = np.array(self.memory.stride()[:2])
        self.addresses = self.memory.data_ptr() + np.add.outer(
            np.arange(heads) * strides[0], np.arange(self.n) * strides[1]
        )
        self.first, self.count = np.zeros(self.n, np.int32), np.full(self.n, block, np.int32)

    def scan(self, q: Tensor, reach: Reach, softcap: float | None = None, seed: Tensor | None = None) -> Scan:
        return scan(q, self.addresses, self.first, self.count, self.layout, reach, 0.2, softcap, seed)

    def positions(self, found: "np.ndarray[tuple[int], np.dtype[np.int32]]") -> list[int]:
        size = self.layout.rows
        positions: list[int] = (found // size * self.layout.tokens + found % size).tolist()
        return positions

    def scores(self, q: Tensor, softcap: float | None = None) -> Tensor:
        s = (q.double() @ self.k.double().mT) * 0.2
        return s if softcap is None else softcap * torch.tanh(s / softcap)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 4, 6])
def test_a_scan_finds_all_and_estimates_the_rest(
    instructions: int, bits: int, rows: int, softcap: float | None
) -> None:
    coded = Coded(3, 1024, 40, 24, bits)
    q = torch.randn(3, rows, 40)
    alpha = 0.05
    found = coded.scan(q, Reach.of_share(alpha, sure=None), softcap)
    scores = coded.scores(q, softcap)
    for head in range(3):
        top = scores[head].amax(-1, keepdim=True)
        wanted = set((scores[head] >= top + math.log(alpha)).any(0).nonzero().flatten().tolist())
        got = coded.positions(found.tokens[head])
        assert wanted <= set(got)
        assert got == sorted(set(got))
        assert bool((found.top[head] <= top[:, 0] + 1e-3).all())
        rest = torch.ones(1024, dtype=torch.bool)
        rest[got] = False
        part = attend_naive(q[head][None].double(), coded.k[head][None], coded.v[head][None], 0.2, rest, softcap)
        if rest.any():
            assert bool(((found.rest_lse[head] - part.lse[0]).abs() < (0.05 if bits == 8 else 0.5)).all())
        else:
            assert bool((found.rest_lse[head] == -torch.inf).all())


@pytest.mark.parametrize("softcap", [None, 9.0])
def test_a_scan_in_waves_finds_all_and_is_the_same_with_any_number_of_threads(
    instructions: int, softcap: float | None
) -> None:
    """Seven pieces, the last one in part: each wave is held against the best of all before."""
    coded = Coded(2, 50 * 1024, 8, 8, 4, block=1024)
    q = 4 * torch.randn(2, 5, 8)
    scores, threads, found = coded.scores(q, softcap), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(coded.scan(q, Reach.of_share(0.3, sure=None), softcap))
    finally:
        torch.set_num_threads(threads)
    for one in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(one.tokens, found[0].tokens, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(one[1:], found[0][1:], strict=True))
    for head in range(2):
        wanted = (scores[head] >= scores[head].amax(-1, keepdim=True) + math.log(0.3)).any(0)
        got = coded.positions(found[0].tokens[head])
        assert set(wanted.nonzero().flatten().tolist()) <= set(got)
        assert len(got) < 25 * 1024, "nothing was dropped"
        rest = torch.ones(50 * 1024, dtype=torch.bool)
        rest[got] = False
        want = attend_naive(q[head][None].double(), coded.k[head][None], coded.v[head][None], 0.2, rest, softcap)
        assert bool(((found[0].rest_lse[head] - want.lse[0]).abs() < 0.3).all())


def test_a_filter_is_pushed_down(instructions: int) -> None:
    """Only some tokens of some blocks are asked for: nothing else is found, compared with, or estimated."""
    coded = Coded(2, 512, 24, 16, 8)
    q = torch.randn(2, 3, 24)
    asked = torch.zeros(512, dtype=torch.bool)
    for i in range(coded.n):
        coded.first[i], coded.count[i] = (5 * i) % 40, [0, 1, 16, 20][i % 4]
        asked[64 * i + int(coded.first[i]) :][: int(coded.count[i])] = True
    coded.k[:, ~asked] *= 10  # louder than all that is asked for
    found = coded.scan(q, Reach.of_share(0.1, sure=None))
    for head in range(2):
        scores = coded.scores(q)[head].masked_fill(~asked, -torch.inf)
        wanted = (scores >= scores.amax(-1, keepdim=True) + math.log(0.1)).any(0).nonzero().flatten().tolist()
        got = coded.positions(found.tokens[head])
        assert set(wanted) <= set(got)
        assert bool(asked[got].all())
    everything = coded.scan(q, Reach(math.inf))
    assert [coded.positions(tokens) for tokens in everything.tokens] == [asked.nonzero().flatten().tolist()] * 2
    assert bool((everything.rest_lse == -torch.inf).all())


def test_a_budget_keeps_the_nearest_and_estimates_what_it_drops() -> None:
    coded = Coded(2, 1024, 32, 32, 8)
    q = torch.randn(2, 4, 32)
    for most in (0, 50):
        found = coded.scan(q, Reach(math.inf, most))
        scores = coded.scores(q)
        for head in range(2):
            near = (scores[head] - scores[head].amax(-1, keepdim=True)).amax(0)
            best = set(near.topk(most).indices.tolist())
            got = set(coded.positions(found.tokens[head]))
            assert len(got) == most
            assert len(got & best) >= 0.8 * most
            lse = torch.logsumexp(scores[head], -1)
            kept = torch.logsumexp(scores[head][:, sorted(got)], -1) if got else torch.full((4,), -torch.inf)
            total = torch.logaddexp(kept, found.rest_lse[head].double())
            assert bool(((total - lse).abs() < 0.02).all())


def test_a_seed_raises_the_bar() -> None:
    """What is nowhere near a score that is attended anyway is not found; the estimate holds it instead."""
    coded = Coded(2, 512, 32, 16, 8)
    q = torch.randn(2, 4, 32)
    scores = coded.scores(q)
    seed = scores.amax(-1) + 2.0
    found = coded.scan(q, Reach.of_share(0.012, sure=None), seed=seed)
    for head in range(2):
        wanted = (scores[head] >= seed[head][:, None] + math.log(0.012)).any(0).nonzero().flatten().tolist()
        assert set(wanted) <= set(coded.positions(found.tokens[head]))
        assert len(found.tokens[head]) < len(coded.scan(q, Reach.of_share(0.012, sure=None)).tokens[head])
    torch.testing.assert_close(found.top, seed.float())
    nothing = coded.scan(q, Reach.of_share(0.5), seed=seed + 1e6)
    assert [len(tokens) for tokens in nothing.tokens] == [0, 0]
    assert bool(((nothing.rest_lse - torch.logsumexp(scores, -1)).abs() < 0.03).all())


def test_three_deviations_find_nearly_all() -> None:
    found = wanted = candidates = sound = 0
    for _ in range(5):
        coded = Coded(4, 4096, 64, 8, 4)
        q = 2 * torch.randn(4, 4, 64)
        scores = coded.scores(q)
        near = (scores >= scores.amax(-1, keepdim=True) + math.log(0.012)).any(1)
        likely = coded.scan(q, Reach.of_share(0.012)).tokens
        certain = coded.scan(q, Reach.of_share(0.012, sure=None)).tokens
        for head in range(4):
            want = set(near[head].nonzero().flatten().tolist())
            wanted += len(want)
            found += len(want & set(coded.positions(likely[head])))
            assert want <= set(coded.positions(certain[head]))
        candidates += sum(map(len, likely))
        sound += sum(map(len, certain))
    assert found >= 0.995 * wanted
    assert candidates < sound / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_over_lists_of_tokens(instructions: int, dtype: torch.dtype) -> None:
    heads, rows, n, k_dim, v_dim = 3, 5, 700, 20, 12
    kv = torch.randn(heads, n, k_dim + v_dim).to(dtype)
    q = torch.randn(heads, rows, k_dim)
    chosen = [torch.randperm(n)[:size] for size in (0, 1, 600)]
    first = np.cumsum([0] + [len(tokens) for tokens in chosen])
    addresses = [
        kv[h].data_ptr() + tokens.numpy() * kv.stride(1) * kv.element_size() for h, tokens in enumerate(chosen)
    ]
    out, lse = attend_lists(q, np.concatenate(addresses), first, k_dim, v_dim, dtype, 0.3, 7.0)
    for h, tokens in enumerate(chosen):
        k, v = kv[h, tokens, :k_dim], kv[h, tokens, k_dim:]
        want = attend_naive(q[h][None].double(), k[None], v[None], 0.3, None, 7.0)
        torch.testing.assert_close(out[h].double(), want.out[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(lse[h].double(), want.lse[0], atol=1e-5, rtol=1e-4)


def test_scratch_is_used_again() -> None:
    coded, scratch = Coded(2, 256, 16, 16, 8), Scratch()
    q = torch.randn(2, 2, 16)
    tokens = [
        scan(q, coded.addresses, coded.first, coded.count, coded.layout, Reach.of_share(0.1), 0.2, scratch=scratch)
        for _ in range(3)
    ]
    assert all((a == b).all() for one in tokens[1:] for a, b in zip(tokens[0].tokens, one.tokens, strict=True))


def test_what_makes_no_sense_is_refused() -> None:
    for distance, most, sure in ((-1.0, None, 3.0), (math.nan, None, 3.0), (1.0, -1, 3.0), (1.0, None, 0.0)):
        with pytest.raises(InputError):
            Reach(distance, most, sure)
    for alpha in (0.0, 1.1, -1.0, math.nan):
        with pytest.raises(InputError):
            Reach.of_share(alpha)
    for bits, dims in ((8, 600), (4, 1032)):
        with pytest.raises(InputError, match="numbers at most"):
            Codes(torch.ones(1, dims), bits).in_range(torch.ones(1, dims), 1.0)
    with pytest.raises(InputError):
        Codes(torch.ones(2, 4)).in_range(torch.ones(1, 4), -1.0)
    for bits, block_tokens in ((3, 64), (4, 0)):
        with pytest.raises(InputError, match="4 or 8 bits"):
            Codes(torch.ones(2, 4), bits, block_tokens)
    coded = Coded(1, 64, 8, 8, 8)
    with pytest.raises(InputError, match="128 queries"):
        coded.scan(torch.ones(1, 129, 8), Reach(1.0))


@pytest.mark.parametrize("rows", [1, 3, 32, 33, 128])
@pytest.mark.parametrize("dim", [5, 64, 96, 256, 576])
def test_products_in_pieces_are_products(rows: int, dim: int) -> None:
    made = np.random.default_rng(rows * dim)
    a, b = made.standard_normal((rows, dim), np.float32), made.standard_normal((dim, dim), np.float32)
    assert np.allclose(_product(a, b), a.astype(np.float64) @ b, atol=1e-3)
