"""Every path to attention against attend_naive in float64, on fresh random inputs."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from torch import Tensor

from alaya_tiers import attention, kernel
from alaya_tiers.attention import BlockList, Partial

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
DIMS = (1, 3, 8, 17, 64, 80, 128, 256)


@dataclass
class Blocks:
    """A BlockList, the memory it points into, and the same keys and values as plain tensors."""

    listed: BlockList
    memory: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor


def scattered(k: Tensor, v: Tensor, block_tokens: int, rng: random.Random, gaps: bool = True) -> Blocks:
    """Ragged blocks at shuffled addresses that are only element-aligned, in memory full of NaN."""
    heads, n, k_dim = k.shape
    counts: list[int] = []
    while sum(counts) < n:
        counts.append(min(rng.randint(0, block_tokens), n - sum(counts)))
    skips = [rng.choice([0, 0, 3]) if gaps else 0 for _ in counts]
    starts = [sum(counts[:b]) + sum(skips[: b + 1]) for b in range(len(counts))]
    width = k_dim + v.shape[2]
    memory = torch.full((heads * len(counts) * block_tokens * width + 7,), torch.nan, dtype=k.dtype)
    slots = np.array(rng.sample(range(heads * len(counts)), heads * len(counts)), np.int64).reshape(heads, -1)
    addresses = memory.data_ptr() + (rng.randint(0, 7) + slots * block_tokens * width) * memory.element_size()
    done = 0
    for b, count in enumerate(counts):
        attention.write_rows(k[:, done : done + count], v[:, done : done + count], addresses[:, b])
        done += count
    positions = [start + i for start, count in zip(starts, counts, strict=True) for i in range(count)]
    listed = BlockList(addresses, np.array(starts, np.int32), np.array(counts, np.int32), k_dim, v.shape[2], k.dtype)
    return Blocks(listed, memory, k, v, torch.tensor(positions, dtype=torch.int64))


def random_kv(heads: int, n: int, k_dim: int, v_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(heads, n, k_dim).to(dtype), torch.randn(heads, n, v_dim).to(dtype)


def random_blocks(rng: random.Random, heads: int, k_dim: int, v_dim: int, dtype: torch.dtype, n: int = 300) -> Blocks:
    return scattered(*random_kv(heads, n, k_dim, v_dim, dtype), rng.choice([1, 16, 33, 100]), rng)


def truth(
    q: Tensor, blocks: Blocks, scale: float, lo: np.ndarray, hi: np.ndarray, softcap: float | None = None
) -> Partial:
    positions = blocks.positions.numpy()
    visible = torch.from_numpy((positions >= lo[:, None]) & (positions < hi[:, None]))
    return attention.attend_naive(q.double(), blocks.k, blocks.v, scale, visible, softcap)


def ranges(rng: random.Random, rows: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Random ranges; some are empty, some reversed, some reach beyond the tokens there are."""
    lo = np.array([rng.randint(-3, end) for _ in range(rows)], np.int32)
    hi = np.array([rng.randint(0, end + 3) for _ in range(rows)], np.int32)
    return lo, hi


def everything(rows: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(rows, np.int32), np.full(rows, 2**31 - 1, np.int32)


def assert_close(got: Partial, want: Partial, tolerance: float = 2e-5) -> None:
    assert got.out.dtype == got.lse.dtype == torch.float32
    torch.testing.assert_close(got.out.double(), want.out.double(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.lse.double(), want.lse.double(), rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(crc32(request.node.name.encode()))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.node.name)


class TestAttendBlocks:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("seed", range(30))
    def test_equals_naive(self, seed: int, dtype: torch.dtype, rng: random.Random) -> None:
        heads, rows, k_dim, v_dim = rng.choice([1, 2, 5]), rng.randint(1, 40), rng.choice(DIMS), rng.choice(DIMS)
        blocks = random_blocks(rng, heads, k_dim, v_dim, dtype, n=rng.choice([1, 5, 64, 300]))
        q = torch.randn(heads, rows, k_dim)
        lo, hi = ranges(rng, rows, int(blocks.positions[-1]) + 1)
        softcap = rng.choice([None, 5.0])
        got = attention.attend_blocks(q, blocks.listed, k_dim**-0.5, lo, hi, softcap)
        assert_close(got, truth(q, blocks, k_dim**-0.5, lo, hi, softcap))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rows", [1, 4, 7, 16])
    def test_latent_dimensions(self, rows: int, dtype: torch.dtype, rng: random.Random) -> None:
        blocks = random_blocks(rng, 1, 576, 512, dtype)
        q = torch.randn(1, rows, 576)
        assert_close(
            attention.attend_blocks(q, blocks.listed, 0.05, *everything(rows)),
            truth(q, blocks, 0.05, *everything(rows)),
        )

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_many_pieces(self, dtype: torch.dtype, rng: random.Random) -> None:
        blocks = scattered(*random_kv(3, 9000, 64, 64, dtype), 256, rng)
        q = torch.randn(3, 6, 64)
        lo, hi = ranges(rng, 6, 9000)
        assert_close(attention.attend_blocks(q, blocks.listed, 0.3, lo, hi), truth(q, blocks, 0.3, lo, hi))

    def test_query_dtypes_and_strides(self, rng: random.Random) -> None:
        blocks = random_blocks(rng, 2, 64, 64, torch.float32)
        q = torch.randn(4, 2, 64, dtype=torch.float64).transpose(0, 1)
        lo, hi = everything(4)
        want = truth(q.float(), blocks, 0.1, lo, hi)
        assert_close(attention.attend_blocks(q, blocks.listed, 0.1, torch.from_numpy(lo), torch.from_numpy(hi)), want)
        half = q.bfloat16()
        assert_close(attention.attend_blocks(half, blocks.listed, 0.1, lo, hi), truth(half, blocks, 0.1, lo, hi))

    def test_other_storage_dtypes_take_the_slow_path(self, rng: random.Random) -> None:
        blocks = random_blocks(rng, 2, 17, 8, torch.float64)
        q = torch.randn(2, 5, 17)
        lo, hi = ranges(rng, 5, 300)
        assert_close(attention.attend_blocks(q, blocks.listed, 0.3, lo, hi, 4.0), truth(q, blocks, 0.3, lo, hi, 4.0))

    def test_addresses_may_be_a_slice_of_a_longer_table(self, rng: random.Random) -> None:
        blocks = scattered(*random_kv(3, 200, 8, 8, torch.float32), 16, rng)
        table = np.zeros((3, blocks.listed.addresses.shape[1] + 9), np.int64)
        table[:, :-9] = blocks.listed.addresses
        q = torch.randn(3, 2, 8)
        got = attention.attend_blocks(q, replace(blocks.listed, addresses=table[:, :-9]), 0.3, *everything(2))
        assert_close(got, truth(q, blocks, 0.3, *everything(2)))

    @pytest.mark.parametrize("n", [0, 7])
    def test_nothing_visible(self, n: int) -> None:
        addresses = np.zeros((2, n), np.int64)  # reading any of these would be a crash
        starts = np.arange(n, dtype=np.int32) * 10
        blocks = BlockList(addresses, starts, np.full(n, 10, np.int32), 8, 3, torch.float32)
        out, lse = attention.attend_blocks(torch.randn(2, 3, 8), blocks, 1.0, [0, 5, 70], [0, 5, 80])
        assert bool((out == 0).all())
        assert bool((lse == -torch.inf).all())

    def test_hidden_blocks_are_not_touched(self, rng: random.Random) -> None:
        blocks = scattered(*random_kv(2, 320, 8, 8, torch.float32), 16, rng, gaps=False)
        ends = blocks.listed.starts + blocks.listed.counts
        hidden = (ends <= 100) | ((blocks.listed.starts >= 150) & (ends <= 200))
        listed = replace(blocks.listed, addresses=np.where(hidden, 0, blocks.listed.addresses))
        q = torch.randn(2, 2, 8)
        lo, hi = np.array([100, 200], np.int32), np.array([150, 320], np.int32)
        assert_close(attention.attend_blocks(q, listed, 0.3, lo, hi), truth(q, blocks, 0.3, lo, hi))

    def test_wrong_shapes_are_refused(self, rng: random.Random) -> None:
        kept = random_blocks(rng, 2, 8, 8, torch.float32)
        blocks = kept.listed
        with pytest.raises(ValueError, match="do not fit"):
            attention.attend_blocks(torch.randn(2, 3, 9), blocks, 1.0, [0] * 3, [1] * 3)
        with pytest.raises(ValueError, match="do not fit"):
            attention.attend_blocks(torch.randn(2, 3, 8), blocks, 1.0, [0] * 2, [1] * 3)
        with pytest.raises(ValueError, match="int32"):
            replace(blocks, starts=blocks.starts.astype(np.int64))
        with pytest.raises(ValueError, match="need"):
            replace(blocks, counts=blocks.counts[:-1])


class TestExtremes:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_large_scores(self, dtype: torch.dtype, rng: random.Random) -> None:
        k, v = random_kv(2, 300, 64, 64, dtype)
        blocks = scattered(k, v, 33, rng)
        q = torch.randn(2, 5, 64) * 1e4 / 8
        lo, hi = everything(5)
        # float32 scores of 1e4 carry an absolute error of some 1e-3
        assert_close(attention.attend_blocks(q, blocks.listed, 1.0, lo, hi), truth(q, blocks, 1.0, lo, hi), 2e-2)

    def test_equal_keys_average_the_values(self, rng: random.Random) -> None:
        k, v = random_kv(2, 200, 17, 8, torch.float32)
        blocks = scattered(k[:, :1].expand_as(k), v, 33, rng)
        got = attention.attend_blocks(torch.randn(2, 3, 17), blocks.listed, 1.0, *everything(3))
        torch.testing.assert_close(got.out, v.mean(1, keepdim=True).expand(2, 3, 8), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("zero", [0.0, -0.0])
    def test_zero_keys(self, zero: float, rng: random.Random) -> None:
        k, v = random_kv(1, 50, 8, 8, torch.float32)
        blocks = scattered(torch.full_like(k, zero), v, 16, rng)
        got = attention.attend_blocks(torch.randn(1, 2, 8), blocks.listed, 1.0, *everything(2))
        torch.testing.assert_close(got.lse, torch.full((1, 2), 50.0).log())

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
    def test_infinite_and_nan_keys_do_not_crash(self, bad: float, dtype: torch.dtype, rng: random.Random) -> None:
        k, v = random_kv(2, 300, 64, 64, dtype)
        k[0, 150, 3] = bad
        blocks = scattered(k, v, 33, rng)
        q, (lo, hi) = torch.rand(2, 3, 64), everything(3)
        got, want = attention.attend_blocks(q, blocks.listed, 0.1, lo, hi), truth(q, blocks, 0.1, lo, hi)
        assert_close(Partial(got.out[1:], got.lse[1:]), Partial(want.out[1:], want.lse[1:]))
        if bad == -torch.inf:
            assert_close(got, want)
        else:
            assert bool(got.out[0].isnan().all())

    @pytest.mark.parametrize("dtype", HALF)
    def test_every_half_number_is_read_exactly(self, dtype: torch.dtype) -> None:
        """One token seen at a time comes out as its own value, so the output is the conversion itself."""
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        values = values[values.isfinite()]
        values = torch.cat([values, values.new_zeros(-len(values) % 80)]).reshape(1, -1, 80).contiguous()
        memory = torch.empty(1, values.shape[1], 81, dtype=dtype)
        address = np.array([memory.data_ptr()], np.int64)
        attention.write_rows(torch.zeros(1, values.shape[1], 1, dtype=dtype), values, address)
        n = values.shape[1]
        blocks = BlockList(address[:, None], np.zeros(1, np.int32), np.array([n], np.int32), 1, 80, dtype)
        got = attention.attend_blocks(torch.zeros(1, n, 1), blocks, 1.0, np.arange(n), np.arange(1, n + 1))
        assert torch.equal(got.out, values.float())


class TestThreads:
    def test_many_python_threads_at_once(self, rng: random.Random) -> None:
        cases = []
        for _ in range(4):
            blocks = scattered(*random_kv(2, 3000, 64, 64, torch.float32), 100, rng)
            q = torch.randn(2, 4, 64)
            cases.append((q, blocks, truth(q, blocks, 0.2, *everything(4))))

        def ask(i: int) -> None:
            q, blocks, want = cases[i % 4]
            assert_close(attention.attend_blocks(q, blocks.listed, 0.2, *everything(4)), want)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(ask, range(80)))

    @pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
    def test_after_fork(self, rng: random.Random) -> None:
        blocks = scattered(*random_kv(2, 3000, 64, 64, torch.float32), 100, rng)
        q = torch.randn(2, 4, 64)
        want = attention.attend_blocks(q, blocks.listed, 0.2, *everything(4))  # the parent's threads exist now

        def child() -> None:
            got = attention.attend_blocks(q, blocks.listed, 0.2, *everything(4))
            same = np.allclose(got.out.numpy(), want.out.numpy(), atol=1e-5)
            sys.exit(0 if same else 1)

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(20)
        process.kill()
        assert process.exitcode == 0

    @pytest.mark.parametrize("borrow", [True, False])
    @pytest.mark.parametrize("threads", [1, 2, 5])
    def test_any_number_of_threads_torchs_or_our_own(
        self, threads: int, borrow: bool, rng: random.Random, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        library = kernel._library()
        blocks = scattered(*random_kv(2, 3000, 64, 64, torch.float32), 100, rng)
        q = torch.randn(2, 4, 64)
        library.alaya_borrow(kernel._gomp_parallel() if borrow else None)
        try:
            for _ in range(20):
                got = attention.attend_blocks(q, blocks.listed, 0.2, *everything(4))
        finally:
            library.alaya_borrow(kernel._gomp_parallel())
        assert_close(got, truth(q, blocks, 0.2, *everything(4)))

    def test_a_library_of_other_sources_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ctypes.CDLL", lambda path: object())
        with pytest.raises(kernel.KernelMissing, match="other sources"):
            kernel._library.__wrapped__()

    def test_a_missing_library_says_what_to_do(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernel, "__file__", str(tmp_path / "kernel.py"))
        with pytest.raises(kernel.KernelMissing, match=r"pip.*C compiler"):
            kernel._library.__wrapped__()


class TestAttendDense:
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
    @pytest.mark.parametrize("seed", range(5))
    def test_equals_naive(self, seed: int, dtype: torch.dtype, rng: random.Random) -> None:
        heads, rows, n = rng.choice([1, 3]), rng.randint(1, 70), rng.randint(1, 90)
        k_dim, v_dim = rng.choice([(64, 64), (17, 17), (24, 16), (16, 24)])
        kv = torch.randn(heads, n, k_dim + v_dim).to(dtype)
        k, v = kv[..., :k_dim], kv[..., k_dim:]
        q = torch.randn(heads, rows, k_dim).to(dtype)
        mask = torch.rand(rng.choice([(rows, n), (1, rows, n), (heads, rows, n), (heads, 1, n), (n,)])) < 0.5
        bias = torch.randn(mask.shape).masked_fill(~mask, -torch.inf)
        tolerance = 2e-5 if dtype in (torch.float32, torch.float64) else 2e-2
        for m, softcap in ((None, None), (mask, None), (bias, None), (rng.choice([None, mask, bias.double()]), 5.0)):
            got = attention.attend_dense(q, k, v, 0.2, m, softcap)
            want = attention.attend_naive(q.double(), k, v, 0.2, m, softcap)
            assert_close(Partial(got.out.float(), got.lse.float()), want, tolerance)

    @pytest.mark.parametrize("additive", [False, True])
    def test_rows_that_see_nothing(self, additive: bool) -> None:
        q, k, v = torch.randn(2, 3, 16), *random_kv(2, 9, 16, 16, torch.float32)
        mask = torch.ones(3, 9, dtype=torch.bool)
        mask[1] = False
        bias = torch.zeros(3, 9).masked_fill(~mask, -torch.inf)
        out, lse = attention.attend_dense(q, k, v, 0.3, bias if additive else mask)
        assert bool((out[:, 1] == 0).all())
        assert bool((lse[:, 1] == -torch.inf).all())
        assert_close(Partial(out, lse), attention.attend_naive(q.double(), k, v, 0.3, mask))

    @pytest.mark.parametrize("softcap", [None, 5.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        ("queries", "keys", "first"),
        [(9, 9, 0), (9, 20, -11), (9, 4, 0), (9, 4, 3), (9, 4, 7), (9, 4, 9), (9, 4, -4), (9, 4, -20), (1, 5, -4)],
    )
    def test_causal_equals_its_mask(
        self, queries: int, keys: int, first: int, dtype: torch.dtype, softcap: float | None
    ) -> None:
        group = 3
        q, (k, v) = torch.randn(2, group * queries, 16).to(dtype), random_kv(2, keys, 16, 24, dtype)
        mask = first + torch.arange(keys) <= torch.arange(queries)[:, None]
        got = attention.attend_causal(q, k, v, 0.3, first, queries, softcap)
        want = attention.attend_naive(q.double(), k, v, 0.3, mask.repeat(group, 1), softcap)
        assert_close(got, want, 2e-5 if dtype == torch.float32 else 2e-2)

    @pytest.mark.parametrize(("rows", "n"), [(0, 5), (3, 0), (0, 0)])
    def test_empty(self, rows: int, n: int) -> None:
        out, lse = attention.attend_dense(torch.randn(2, rows, 8), *random_kv(2, n, 8, 8, torch.float32), 0.3)
        assert out.shape == (2, rows, 8)
        assert bool((out == 0).all())
        assert bool((lse == -torch.inf).all())

    def test_mixed_dtypes(self) -> None:
        q, (k, v) = torch.randn(2, 4, 16), random_kv(2, 9, 16, 16, torch.bfloat16)
        assert_close(attention.attend_dense(q, k, v, 0.3), attention.attend_naive(q.double(), k, v, 0.3))


class TestMerge:
    @pytest.mark.parametrize("seed", range(8))
    def test_random_splits_equal_the_whole(self, seed: int, rng: random.Random) -> None:
        blocks = random_blocks(rng, 2, 64, 64, torch.float32)
        q = torch.randn(2, 5, 64)
        end = int(blocks.positions[-1]) + 1
        low, high = ranges(rng, 5, end)
        cuts = [-5, *sorted(rng.randint(0, end) for _ in range(rng.randint(0, 6))), end + 5]
        parts = [
            attention.attend_blocks(q, blocks.listed, 0.3, np.maximum(low, a), np.minimum(high, b))
            for a, b in itertools.pairwise(cuts)
        ]
        assert_close(attention.merge(parts), truth(q, blocks, 0.3, low, high))

    def test_blocks_and_dense_parts(self, rng: random.Random) -> None:
        blocks = scattered(*random_kv(2, 300, 64, 64, torch.float32), 33, rng, gaps=False)
        q = torch.randn(2, 5, 64)
        lo, hi = everything(5)
        first = attention.attend_blocks(q, blocks.listed, 0.3, lo, np.full(5, 100, np.int32))
        rest = attention.attend_dense(q, *attention.gather(blocks.listed, 100, 300), 0.3)
        assert_close(attention.merge([first, rest]), truth(q, blocks, 0.3, lo, hi))

    def test_nothing_stays_nothing(self) -> None:
        nothing = Partial(torch.zeros(2, 3, 4), torch.full((2, 3), -torch.inf))
        out, lse = attention.merge([nothing, nothing])
        assert bool((out == 0).all())
        assert bool((lse == -torch.inf).all())
        with pytest.raises(ValueError, match="nothing to merge"):
            attention.merge([])

    def test_leaves_its_parts_alone(self) -> None:
        parts = [Partial(torch.randn(2, 3, 4), torch.randn(2, 3)) for _ in range(3)]
        before = [part.out.clone() for part in parts]
        attention.merge(parts)
        assert all(torch.equal(a, part.out) for a, part in zip(before, parts, strict=True))


class TestSinks:
    @pytest.mark.parametrize("seed", range(4))
    def test_equals_a_softmax_with_one_more_column(self, seed: int) -> None:
        q, (k, v), sinks = torch.randn(2, 4, 16), random_kv(2, 9, 16, 16, torch.float32), torch.randn(2, 4) * 3
        scores = torch.cat([q @ k.mT * 0.3, sinks[..., None]], -1)
        want = Partial(torch.softmax(scores, -1)[..., :-1] @ v, torch.logsumexp(scores, -1))
        assert_close(attention.with_sinks(attention.attend_naive(q, k, v, 0.3), sinks), want)

    def test_sinks_alone_and_no_sinks(self) -> None:
        nothing = Partial(torch.zeros(1, 2, 4), torch.full((1, 2), -torch.inf))
        out, lse = attention.with_sinks(nothing, torch.tensor([[1.0, -torch.inf]]))
        assert bool((out == 0).all())
        assert lse.tolist() == [[1.0, -torch.inf]]


class TestCopies:
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
    @pytest.mark.parametrize(("k_dim", "v_dim"), [(1, 1), (17, 3), (64, 64), (576, 512)])
    def test_write_then_gather_is_bit_exact(
        self, k_dim: int, v_dim: int, dtype: torch.dtype, rng: random.Random
    ) -> None:
        k, v = random_kv(3, 400, k_dim, v_dim, dtype)
        blocks = scattered(k, v, 50, rng, gaps=False)
        for lo, hi in ((0, 400), (0, 0), (399, 400), (37, 251)):
            got_k, got_v = attention.gather(blocks.listed, lo, hi)
            assert torch.equal(got_k, k[:, lo:hi])
            assert torch.equal(got_v, v[:, lo:hi])
            assert got_k.untyped_storage().data_ptr() == got_v.untyped_storage().data_ptr()

    def test_gather_refuses_what_is_not_covered(self, rng: random.Random) -> None:
        blocks = scattered(*random_kv(1, 40, 4, 4, torch.float32), 10, rng, gaps=False)
        with pytest.raises(ValueError, match="do not cover"):
            attention.gather(blocks.listed, 30, 41)

    def test_write_takes_strided_tensors(self) -> None:
        k = torch.randn(5, 3, 4, 2)[..., 0].permute(1, 0, 2)  # last dimension strided, heads inside tokens
        v = torch.randn(5, 3, 6).transpose(0, 1)
        memory = torch.zeros(3, 5, 10)
        addresses = np.array([memory[h].data_ptr() for h in range(3)], np.int64)
        attention.write_rows(k, v, addresses)
        assert torch.equal(memory, torch.cat([k, v], -1))
        with pytest.raises(ValueError, match="addresses"):
            attention.write_rows(k, v, addresses[:2])

    @pytest.mark.parametrize("threads", [None, 1, 2])
    @pytest.mark.parametrize("n", [0, 1, 300])
    def test_copy_blocks(self, n: int, threads: int | None, rng: random.Random) -> None:
        src, dst = torch.randint(0, 255, (n, 5000), dtype=torch.uint8), torch.zeros(n, 5000, dtype=torch.uint8)
        sizes = np.array([rng.randint(0, 5000) for _ in range(n)], np.int64)
        order = np.array(rng.sample(range(n), n), np.int64)
        attention.copy_blocks(
            src.data_ptr() + order * 5000, dst.data_ptr() + np.arange(n, dtype=np.int64) * 5000, sizes, threads
        )
        copied = torch.arange(5000) < torch.from_numpy(sizes)[:, None]
        assert torch.equal(dst, src[torch.from_numpy(order)] * copied)
        attention.copy_blocks(np.array([src.data_ptr()]), np.array([dst.data_ptr()]), n * 5000)
        assert torch.equal(src, dst)
