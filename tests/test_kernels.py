"""The GPU's kernels against float32 attention in torch: on the GPU where there is one, else in Triton's interpreter."""

import numpy as np
import pytest
import torch
from torch import Tensor

from alaya_tiers.attention import BlockList, Partial, attend_naive

PLACE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pytest.importorskip("triton", reason="triton is not installed: pip install 'alaya-tiers[gpu]'")

from alaya_tiers.devices import kernels  # noqa: E402

CLOSE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Scattered:
    """Blocks anywhere in one slab, with counts and starts of their own."""

    def __init__(self, heads: int, counts: list[int], dims: tuple[int, int], dtype: torch.dtype, seed: int) -> None:
        chance = torch.Generator().manual_seed(seed)
        self.heads, self.dims, self.dtype, width = heads, dims, dtype, sum(dims)
        size, n = max([*counts, 1]), len(counts)
        slab = torch.randn(heads * n * 2, size, width, generator=chance).to(PLACE, dtype)
        place = torch.randperm(heads * n * 2, generator=chance)[: heads * n].view(heads, n)
        self.slab, self.counts = slab, torch.tensor(counts, dtype=torch.int32)
        self.starts = torch.cumsum(self.counts, 0, dtype=torch.int32) - self.counts + 5
        self.addresses = slab.data_ptr() + place * size * width * dtype.itemsize
        every = [torch.cat([slab[i, :c] for i, c in zip(row.tolist(), counts, strict=True)]) for row in place]
        rows = torch.stack(every) if counts else torch.empty(heads, 0, width, dtype=dtype, device=PLACE)
        self.k, self.v = rows[..., : dims[0]], rows[..., dims[0] :]
        self.positions = torch.cat([torch.arange(s, s + c) for s, c in zip(self.starts, counts, strict=True)])

    def table(self) -> kernels.Table:
        addresses, starts, counts = (x.to(PLACE) for x in (self.addresses, self.starts, self.counts))
        return kernels.Table(addresses, starts, counts, *self.dims, self.dtype, max(int(self.counts.max()), 1))


def close(got: Partial, want: Partial, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.out.float(), want.out.float(), rtol=CLOSE[dtype], atol=CLOSE[dtype])
    torch.testing.assert_close(got.lse, want.lse.float(), rtol=CLOSE[dtype], atol=CLOSE[dtype])


def queries(heads: int, rows: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(heads, rows, dim).to(PLACE, dtype)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(
    ("dims", "rows", "counts", "softcap"),
    [((16, 16), 1, [8, 8, 3], None), ((24, 10), 5, [70, 1, 64, 33], None), ((40, 40), 17, [20], 3.0)],
)
def test_attention_over_a_block_table(
    dtype: torch.dtype, dims: tuple[int, int], rows: int, counts: list[int], softcap: float | None
) -> None:
    have = Scattered(2, counts, dims, dtype, rows)
    q = queries(2, rows, dims[0], dtype)
    end = int(have.positions[-1]) + 1
    lo, hi = torch.randint(0, end, (2, rows), dtype=torch.int32).sort(0).values
    lo[0], hi[0] = 0, end
    top = torch.zeros(2, rows, device=PLACE)
    got = kernels.attend_blocks(q, have.table(), 0.3, lo.to(PLACE), hi.to(PLACE), softcap, top)
    mask = ((have.positions >= lo[:, None]) & (have.positions < hi[:, None])).to(PLACE)
    close(got, attend_naive(q, have.k, have.v, 0.3, mask, softcap), dtype)
    best = kernels.scores(q, have.k, 0.3, softcap).masked_fill(~mask, -torch.inf).amax(-1)
    torch.testing.assert_close(top, best, rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.parametrize("dtype", CLOSE)
def test_attention_over_token_lists(dtype: torch.dtype) -> None:
    dims, rows = (20, 28), 3
    have = Scattered(3, [90, 90], dims, dtype, 1)
    lists = [[0, 5, 91, 179], [], sorted(np.random.default_rng(0).choice(180, 130, replace=False).tolist())]
    q, row = queries(3, rows, dims[0], dtype), sum(dims) * dtype.itemsize
    where = [int(have.addresses[h, t // 90]) + t % 90 * row for h, some in enumerate(lists) for t in some]
    first = torch.tensor([0, 4, 4, 134])
    got = kernels.attend_lists(q, torch.tensor(where).to(PLACE), first.to(PLACE), 130, dims, dtype, 0.2, None)
    for h, some in enumerate(lists):
        want = attend_naive(q[h : h + 1], have.k[h : h + 1, some], have.v[h : h + 1, some], 0.2)
        close(Partial(got.out[h : h + 1], got.lse[h : h + 1]), want, dtype)


def test_parts_are_merged_exactly() -> None:
    q, k, v = (torch.randn(2, n, 12, device=PLACE) for n in (3, 50, 50))
    cuts = [(0, 1), (1, 30), (30, 50), (50, 50)]
    parts = [attend_naive(q, k[:, a:b], v[:, a:b], 1.0) for a, b in cuts]
    got = kernels.merge(torch.stack([p.out for p in parts], 1), torch.stack([p.lse for p in parts], 1))
    close(got, attend_naive(q, k, v, 1.0), torch.float32)
    blind = kernels.merge(torch.zeros(1, 2, 1, 4, device=PLACE), torch.full((1, 2, 1), -torch.inf, device=PLACE))
    assert blind.lse.item() == -torch.inf
    assert not blind.out.any()


@pytest.mark.parametrize("dtype", CLOSE)
def test_rows_are_written_and_gathered(dtype: torch.dtype) -> None:
    k, v = torch.randn(2, 9, 3, 20).to(PLACE, dtype)[:, :, 1, :], torch.randn(2, 9, 7).to(PLACE, dtype)
    slab = torch.zeros(4, 16, 27, dtype=dtype, device=PLACE)
    row = 27 * dtype.itemsize
    at = torch.tensor([slab[3].data_ptr(), slab[1].data_ptr()])
    kernels.write_rows(k, v, (at + 4 * row).to(PLACE))
    assert torch.equal(slab[[3, 1], 4:13], torch.cat([k, v], 2))
    assert not slab[[0, 2]].any()
    out = torch.zeros(2, 6, 27, dtype=dtype, device=PLACE)
    table = (at[:, None] + torch.tensor([8, 4]) * row).to(PLACE)
    starts, counts = torch.tensor([104, 100], dtype=torch.int32), torch.tensor([5, 4], dtype=torch.int32)
    kernels.gather(table, starts.to(PLACE), counts.to(PLACE), 5, 102, 108, out)
    assert torch.equal(out, slab[[3, 1], 6:12])


def test_the_block_list_of_the_cpu_says_the_same() -> None:
    from alaya_tiers.attention import attend_blocks

    have = Scattered(2, [40, 11], (16, 16), torch.float32, 3)
    if PLACE.type != "cpu":
        pytest.skip("the CPU cannot read these blocks")
    listed = BlockList(have.addresses.numpy(), have.starts.numpy(), have.counts.numpy(), 16, 16, torch.float32)
    q, lo, hi = queries(2, 4, 16, torch.float32), torch.tensor([0, 5, 20, 60]), torch.tensor([60, 30, 21, 60])
    want = attend_blocks(q, listed, 0.25, lo, hi)
    close(kernels.attend_blocks(q, have.table(), 0.25, lo.int(), hi.int(), None), want, torch.float32)
