"""The GPU's scan of codes against float64 in torch and against the CPU's, in Triton's interpreter where no GPU is."""

import numpy as np
import pytest
import torch
from torch import Tensor

from alaya_tiers.index.codes import HEAD, LANES, Layout, Reach, Scan, encode, rotation, scan

pytest.importorskip("triton", reason="triton is not installed: pip install 'alaya-tiers[gpu]'")

from alaya_tiers.devices import scan_kernels

PLACE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Coded:
    """Blocks of keys that vary in length, coded; some tokens of each are asked for."""

    def __init__(self, heads: int, n: int, layout: Layout, dtype: torch.dtype, seed: int) -> None:
        chance = torch.Generator().manual_seed(seed)
        self.layout, self.heads, self.n = layout, heads, n
        keys = torch.randn(heads, n * layout.tokens, layout.k_dim, generator=chance)
        self.keys = (keys * torch.rand(heads, n * layout.tokens, 1, generator=chance) * 3).to(dtype)
        values = torch.randn(heads, n * layout.tokens, layout.v_dim, generator=chance).to(dtype)
        made = encode(self.keys.view(heads * n, layout.tokens, -1), values.view(heads * n, layout.tokens, -1), layout)
        assert made is not None
        slot = -(-layout.nbytes // 64) * 64
        self.codes = torch.zeros(heads * n + 1, slot, dtype=torch.uint8, device=PLACE)
        self.skip = -self.codes.data_ptr() % 64
        flat = self.codes.view(-1)[self.skip : self.skip + heads * n * slot].view(heads * n, slot)
        flat[:, : layout.nbytes] = made.to(PLACE)
        self.addresses = flat.data_ptr() + slot * torch.arange(heads * n).view(heads, n)
        self.first = torch.randint(0, layout.tokens // 2, (n,), generator=chance, dtype=torch.int32)
        self.count = torch.randint(1, layout.tokens // 2, (n,), generator=chance, dtype=torch.int32)
        self.first[0], self.count[0] = 0, layout.tokens
        offset = torch.arange(layout.tokens)
        within = (offset >= self.first[:, None]) & (offset < (self.first + self.count)[:, None])
        self.asked = (torch.arange(n)[:, None] * layout.rows + offset)[within]
        self.made = made

    def decoded(self) -> Tensor:
        """What the codes of the keys asked for stand for, and the lengths of their errors: float64."""
        lay, made, heads = self.layout, self.made, self.heads
        head = made[:, : 4 * HEAD].view(torch.float32).double()
        means = made[:, 4 * HEAD : 4 * HEAD + lay.dims].view(torch.int8).double() * head[:, 5:6]
        levels = made[:, lay.levels_at : lay.levels_at + lay.rows // 2].view(-1, lay.rows // LANES, LANES // 2)
        level = torch.cat([levels & 15, levels >> 4], -1).view(-1, lay.rows).double()
        scale = head[:, 3:4] + head[:, 4:5] * level
        codes = made[:, lay.codes_at :].view(len(made), lay.rows // LANES, -1, LANES, 4)
        if lay.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], 3).view(len(made), lay.rows // LANES, -1, LANES, 4)
        numbers = codes.transpose(2, 3).reshape(len(made), lay.rows, lay.dims).double() - ((1 << lay.bits) / 2 - 0.5)
        found = means[:, None] + scale[..., None] * numbers
        at = self.asked // lay.rows, self.asked % lay.rows
        return found.view(heads, self.n, lay.rows, lay.dims)[:, at[0], at[1]]

    def on_device(self, q: Tensor, reach: Reach, start: Tensor, scale: float, softcap: float) -> Scan:
        """The scan with the kernels; what ``start`` says is known only from the second half on."""
        lay, margin = self.layout, reach.margin(self.layout.k_dim)
        turned = torch.zeros(*q.shape[:2], lay.dims, device=PLACE)
        turned[..., : lay.k_dim] = q.float() @ rotation(lay.k_dim).to(PLACE)
        asked = scan_kernels.Asked(
            turned, scan_kernels.rounded(turned, margin), self.addresses.to(PLACE), self.first.to(PLACE),
            self.count.to(PLACE), torch.full(q.shape[:2], -torch.inf, device=PLACE),
            torch.full((self.heads,), reach.distance, device=PLACE),
        )  # fmt: skip
        shape = scan_kernels.Shape(lay.dims, lay.v_dim, lay.rows, lay.bits, lay.codes_at)
        self.began = scan_kernels.begin(asked, shape, scale, softcap, margin)
        done = scan_kernels.finish(self.began, start.to(PLACE))
        lists = [row[: int(n)].numpy() for row, n in zip(done.lists.cpu(), done.n.sum(1), strict=True)]
        return Scan(lists, done.top.cpu(), done.rest.cpu(), done.lse.cpu())

    def on_cpu(self, q: Tensor, reach: Reach, start: Tensor, scale: float, softcap: float) -> Scan:
        """The same with scan.c."""
        made = self.codes.cpu() if PLACE.type != "cpu" else self.codes
        addresses = self.addresses - self.codes.data_ptr() + made.data_ptr()
        return scan(
            q.cpu(), addresses.numpy(), self.first.numpy(), self.count.numpy(), self.layout, reach, scale,
            softcap or None, verify=lambda best: start,
        )  # fmt: skip


CASES = [
    (torch.float32, 4, 24, 1, None, 0.0, 0),
    (torch.bfloat16, 8, 40, 5, None, 5.0, 1),
    (torch.float16, 4, 64, 2, 2.0, 0.0, 2),
    (torch.float32, 8, 17, 3, 2.0, 0.0, 3),
    (torch.bfloat16, 4, 100, 4, 2.0, 8.0, 4),
]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bits", "dim", "rows", "sure", "softcap", "seed"), CASES)
def test_what_is_near_is_found_and_the_rest_weighed(
    dtype: torch.dtype, bits: int, dim: int, rows: int, sure: float | None, softcap: float, seed: int
) -> None:
    """Against the definition, in float64: which keys can be near, and what all others weigh."""
    layout = Layout(128, dim, 12, bits)
    coded = Coded(2, 5, layout, dtype, seed)
    q, scale, reach = torch.randn(2, rows, dim).to(PLACE, dtype), 0.4, Reach(2.0, None, sure)
    start = torch.full((2, rows), -torch.inf)
    got = coded.on_device(q, reach, start, scale, softcap)
    exact = q.cpu().double() @ coded.keys[:, _places(coded)].double().mT
    turned = torch.zeros(2, rows, layout.dims, dtype=torch.float64)
    turned[..., :dim] = q.cpu().double() @ rotation(dim).double()
    scores = turned @ coded.decoded().mT

    def capped(x: Tensor) -> Tensor:
        return softcap * torch.tanh(x * scale / softcap) if softcap else x * scale

    mine = [np.isin(coded.asked.numpy(), tokens) for tokens in got.tokens]
    for head in range(2):
        assert (np.diff(got.tokens[head]) > 0).all()
        assert mine[head].sum() == got.tokens[head].size, "nothing that was not asked for"
        best = capped(exact[head]).amax(-1, keepdim=True)
        wanted = (capped(exact[head]) >= best - reach.distance).any(0).numpy()
        assert sure is not None or not (wanted & ~mine[head]).any(), "every key within reach"
        assert 0 < mine[head].sum() < wanted.size, "the case tells"
        assert (got.top[head] <= best[:, 0].float() + (1e-5 if sure is None else 0.5)).all()
        left = torch.from_numpy(~mine[head])
        block = coded.asked // layout.rows
        head_of = coded.made.view(2, 5, -1)[head]
        means = head_of[:, 4 * HEAD + layout.dims : layout.levels_at].view(torch.int8).double()
        means = means * head_of[:, : 4 * HEAD].view(torch.float32).double()[:, 6:7]
        weights = torch.exp(capped(scores[head])) * left
        mass = weights.sum(-1)
        near = 2e-2 if sure else 1e-3  # queries are rounded to 8 bits where bounds need not be tight
        torch.testing.assert_close(got.rest_lse[head], mass.log().float(), rtol=near, atol=near)
        torch.testing.assert_close(
            got.rest[head], (weights @ means[block] / mass[:, None]).float(), rtol=near, atol=near
        )


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bits", "dim", "rows", "sure", "softcap", "seed"), CASES)
def test_the_cpu_finds_the_same(
    dtype: torch.dtype, bits: int, dim: int, rows: int, sure: float | None, softcap: float, seed: int
) -> None:
    coded = Coded(2, 6, Layout(64, dim, 9, bits), dtype, seed + 10)
    q, reach = torch.randn(2, rows, dim).to(PLACE, dtype), Reach(1.5, None, sure)
    start = torch.rand(2, rows) * 2
    got, want = (way(q, reach, start, 0.5, softcap) for way in (coded.on_device, coded.on_cpu))
    for mine, theirs in zip(got.tokens, want.tokens, strict=True):
        assert np.array_equal(mine, theirs)
    torch.testing.assert_close(got.top, want.top, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.rest_lse, want.rest_lse, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got.rest, want.rest, rtol=2e-3, atol=2e-3)


def test_lists_longer_than_their_room_are_known_to_be() -> None:
    coded = Coded(1, 3, Layout(64, 8, 4, 8), torch.float32, 0)
    q, start = torch.randn(1, 1, 8).to(PLACE), torch.full((1, 1), -torch.inf)
    everything = coded.on_device(q, Reach(1e9), start, 1.0, 0.0)
    assert np.array_equal(everything.tokens[0], coded.asked.numpy())
    assert everything.rest_lse.item() == -torch.inf
    assert not everything.rest.any()
    few = scan_kernels.packed(coded.began, coded.began.n_hits, 7)
    assert np.array_equal(few[0].cpu().numpy(), coded.asked.numpy()[:7])
    assert not coded.on_device(q, Reach(1.0), torch.full((1, 1), 1e9), 1.0, 0.0).tokens[0].size


def _places(coded: Coded) -> Tensor:
    return coded.asked // coded.layout.rows * coded.layout.tokens + coded.asked % coded.layout.rows
