"""The device tier that the CPU cannot read: the code that runs with CUDA, over plain memory declared unreadable."""

from functools import partial

import pytest
import torch

from alaya_tiers import AlayaCache, engine
from alaya_tiers.attention import attend_naive
from alaya_tiers.cache import Session, Visible
from alaya_tiers.config import Settings
from alaya_tiers.engine import Engine
from alaya_tiers.tiers.arena import Arena
from alaya_tiers.tiers.base import Accountant

LAYERS, HEADS, GROUP, DIM = 2, 2, 2, 16


class FarTier(Arena):
    """As DeviceTier is with CUDA: no address of it may reach a CPU kernel."""

    def __init__(self, budget: int, slot_bytes: int, accountant: Accountant, device: torch.device) -> None:
        self.on_cpu = False
        super().__init__(
            "device", budget, slot_bytes, accountant, partial(torch.empty, dtype=torch.uint8, device=device)
        )
        self._addresses[:] = 1  # a segmentation fault for whoever uses it

    def _grow(self) -> None:
        super()._grow()
        self._addresses[:] = 1


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "DeviceTier", FarTier)


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("chunk", [1, 5, 40])
@pytest.mark.parametrize("device_runs", [1, 4, 100])
def test_attention_over_three_tiers(chunk: int, device_runs: int) -> None:
    slots = (LAYERS + device_runs) * HEADS
    eng = Engine(
        Settings(
            device_budget=slots * 4096, host_budget=4 * HEADS * 4096, block_tokens=8, segment_tokens=32, io="buffered"
        )
    )
    session = Session(eng)
    k = torch.randn(LAYERS, 1, HEADS, 120, DIM)
    v = torch.randn(LAYERS, 1, HEADS, 120, DIM)
    for past in range(0, 120, chunk):
        n = min(chunk, 120 - past)
        for layer in range(LAYERS):
            new = slice(past, past + n)
            session.update(layer, k[layer][:, :, new], v[layer][:, :, new])
            q = torch.randn(1, HEADS * GROUP, n, DIM)
            got = session.attention(layer, q, [Visible.causal(past, n)], 0.25)
            mask = torch.ones(n, past + n, dtype=torch.bool).tril(past)[None].repeat(1, GROUP, 1)
            seen = k[layer][0, :, : past + n], v[layer][0, :, : past + n]
            want = attend_naive(q.reshape(HEADS, GROUP * n, DIM), *seen, 0.25, mask).out
            torch.testing.assert_close(got.reshape(want.shape), want, rtol=1e-4, atol=1e-5)
    got_k, got_v = session.gather(1)
    assert torch.equal(got_k, k[1])
    assert torch.equal(got_v, v[1])
    assert (session.stats().read_bytes > 0) == (device_runs < 100)
    eng.close()


@pytest.mark.usefixtures("far")
def test_forks_copy_what_they_share() -> None:
    eng = Engine(
        Settings(device_budget=12 * 4096, host_budget=8 * 4096, block_tokens=8, segment_tokens=32, io="buffered")
    )
    session = Session(eng)
    k = torch.randn(1, HEADS, 61, DIM)
    session.update(0, k, k)
    session.select(0, [0, 0])
    more = torch.randn(2, HEADS, 9, DIM)
    session.update(0, more, more)
    session.crop(66, 0)
    session.update(0, more[:, :, :2], more[:, :, :2])
    got, _ = session.gather(0)
    assert torch.equal(got, torch.cat([k.repeat(2, 1, 1, 1), more[:, :, :5], more[:, :, :2]], 2))
    eng.close()


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    k = torch.randn(1, HEADS, 100, DIM, device="cuda")
    with AlayaCache(device_budget=8 * 4096, host_budget=8 * 4096, block_tokens=8) as cache:
        cache.update(k, k, 0)
        assert cache.layers[0].keys.device.type == "cuda"  # type: ignore[union-attr]
        q = torch.randn(1, HEADS, 1, DIM, device="cuda")
        got = cache.session.attention(0, q, [Visible.causal(99, 1)], 0.25)
        want = attend_naive(q[0], k[0], k[0], 0.25).out
        torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-4)
