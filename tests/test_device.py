"""Streams, simulated: copies come late, in an order a seed decides, and whoever does not wait is found out."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from alaya_tiers import AlayaCache, engine
from alaya_tiers.attention import Partial, attend_naive
from alaya_tiers.cache import Session, Visible
from alaya_tiers.config import Settings
from alaya_tiers.devices.base import COMPUTE, DOWN, UP, Ask, Device, Scanning
from alaya_tiers.devices.order import Order, Wait
from alaya_tiers.devices.simulated import Race, Simulated
from alaya_tiers.engine import Engine
from alaya_tiers.seams import memory
from alaya_tiers.tiers.base import Accountant
from alaya_tiers.tiers.device import DeviceTier
from alaya_tiers.tiers.host import HostTier
from alaya_tiers.tiers.lanes import Lanes, paired
from tests.tiny import check_spilled, generate, padded, small_cache

LAYERS, HEADS, GROUP, DIM = 2, 2, 2, 16
SEEDS = range(3)


def slots(*numbers: int) -> Any:
    return np.array(numbers, np.int32)


def over_three_tiers(device: Simulated, chunk: int, device_runs: int, tokens: int = 80) -> Engine:
    """Attention of every chunk of a sequence, compared; a fork that goes on; all keys and values at the end."""
    eng = Engine(
        Settings(
            device_budget=(LAYERS + device_runs) * HEADS * 4096,
            host_budget=4 * HEADS * 4096,
            block_tokens=8,
            segment_tokens=32,
            io="buffered",
        ),
        device=device,
    )
    try:
        session = Session(eng)
        k = torch.randn(LAYERS, 1, HEADS, tokens, DIM)
        v = torch.randn(LAYERS, 1, HEADS, tokens, DIM)
        for past in range(0, tokens, chunk):
            n = min(chunk, tokens - past)
            for layer in range(LAYERS):
                new = slice(past, past + n)
                session.update(layer, k[layer][:, :, new], v[layer][:, :, new])
                q = torch.randn(1, HEADS * GROUP, n, DIM)
                got = session.attention(layer, q, [Visible.causal(past, n)], 0.25)
                mask = torch.ones(n, past + n, dtype=torch.bool).tril(past)[None].repeat(1, GROUP, 1)
                seen = k[layer][0, :, : past + n], v[layer][0, :, : past + n]
                want = attend_naive(q.reshape(HEADS, GROUP * n, DIM), *seen, 0.25, mask).out
                torch.testing.assert_close(got.reshape(want.shape), want, rtol=1e-4, atol=1e-5)
        session.select(1, [0, 0])
        more = torch.randn(2, HEADS, 9, DIM)
        session.update(1, more, more)
        got_k, _ = session.gather(1)
        assert torch.equal(got_k, torch.cat([k[1].repeat(2, 1, 1, 1), more], 2))
        assert not device.races
        assert device.copies or device_runs == 100
        return eng
    finally:
        eng.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("chunk", "device_runs", "tokens"), [(1, 1, 40), (5, 4, 80), (40, 2, 120), (7, 100, 40)])
def test_attention_over_three_tiers(seed: int, chunk: int, device_runs: int, tokens: int) -> None:
    over_three_tiers(Simulated(seed, eagerness=(0.5, 0.8, 0.95)[seed % 3]), chunk, device_runs, tokens)


class Scanner(Simulated):
    """Counts the blocks whose codes it was asked to scan, once for all heads, and lists of tokens it attended."""

    blocks = lists = 0

    def scan(self, ask: Ask) -> Scanning | None:
        self.blocks += ask.blocks.shape[1]
        return super().scan(ask)

    def attend_lists(self, *args: Any) -> Partial:
        self.lists += 1
        return super().attend_lists(*args)


class Deaf(Simulated):
    """Streams do not wait for one other: what a forgotten wait would do."""

    def __init__(self, seed: int, stream: int) -> None:
        super().__init__(seed, eagerness=0.2)
        self._stream = stream

    def deaf_to(self, stream: int) -> None:
        """From now on this stream does not wait; -1: all do."""
        self._stream = stream

    def wait(self, stream: int, event: Any) -> None:
        if stream != self._stream:
            super().wait(stream, event)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [COMPUTE, DOWN])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_wait_that_is_left_out_is_found(stream: int, seed: int) -> None:
    with pytest.raises(Race):
        over_three_tiers(Deaf(seed, stream), 5, 1)


def sparse_over_three_tiers(device: Device, device_runs: int, codes: int, *, blocks: int = 24, steps: int = 1) -> None:
    """Everything within reach is found and attended wherever it is: with alpha near 0 the output is the exact one.

    codes: bytes of them that the device may hold.
    """
    settings = Settings(
        mode="sparse", alpha=1e-9, index_sure=0, recent_tokens=16, sink_tokens=8, block_tokens=8, segment_tokens=32,
        device_budget=(1 + device_runs) * HEADS * 4096 + 4096, host_budget=8 * HEADS * 4096, io="buffered",
        pick_seconds=1e-12, page_seconds=1e-12, scan_rate=1e15, read_rate=1.0, device_rate=1.0,
        device_index_budget=codes,
    )  # fmt: skip
    eng, tokens = Engine(settings, device=device), 8 * blocks
    try:
        session = Session(eng)
        k, v = torch.randn(1, HEADS, tokens, DIM), torch.randn(1, HEADS, tokens, DIM)
        session.update(0, k, v)
        session.build_index()
        assert 0 <= eng.used_bytes("device_index") <= codes
        for _ in range(steps):
            q = 8 * torch.randn(1, HEADS * GROUP, 1, DIM)
            got = session.attention(0, q, [Visible.all(tokens, 1)], 0.25)
            want = attend_naive(q.reshape(HEADS, GROUP, DIM), k[0], v[0], 0.25).out
            torch.testing.assert_close(got.reshape(want.shape), want, rtol=1e-3, atol=1e-4)
        use = session.stats().sparse
        assert use is not None
        assert use.steps > use.exact
    finally:
        eng.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("device_runs", "codes"), [(2, 0), (12, 1 << 20), (40, 20 << 10)])
def test_sparse_attention_over_three_tiers(seed: int, device_runs: int, codes: int) -> None:
    """The device holds none of the codes, all, some."""
    device = Scanner(seed)
    sparse_over_three_tiers(device, device_runs, codes, steps=3)
    assert (device.blocks == 0) == (codes == 0)
    assert device.lists > 0 or device_runs < 40, "tokens are attended where they lie"
    assert (device.blocks == 3 * 21) == (codes == 1 << 20), "beside the window"
    assert not device.races


@pytest.mark.slow
@pytest.mark.parametrize(("device_rate", "looks"), [(1e12, False), (1.0, True)])
def test_reading_is_planned_at_the_speed_of_where_it_is(device_rate: float, looks: bool) -> None:
    """The CPU is slow; the device, where all blocks are, is or is not."""
    settings = Settings(
        mode="sparse", alpha=0.9, recent_tokens=16, sink_tokens=8, block_tokens=8, segment_tokens=32, io="buffered",
        device_budget=60 * HEADS * 4096, host_budget=8 * HEADS * 4096, read_rate=1.0, device_rate=device_rate,
        least_mass=0.0,
    )  # fmt: skip
    eng = Engine(settings, device=Simulated(0))
    try:
        session, kv = Session(eng), torch.randn(1, HEADS, 8 * 24, DIM)
        session.update(0, kv, kv)
        session.build_index()
        scanned = []
        for _ in range(2):  # every head looks at first
            session.attention(0, 4 * torch.randn(1, HEADS * GROUP, 1, DIM), [Visible.all(8 * 24, 1)], 0.25)
            use = session.stats().sparse
            assert use is not None
            scanned.append(use.scanned_bytes)
        assert (scanned[1] > scanned[0] > 0) == looks
    finally:
        eng.close()


@pytest.mark.slow
def test_codes_that_are_scanned_without_waiting_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are still on their way up, as far as the CPU knows."""
    device = Deaf(0, -1)
    settings = Settings(
        mode="sparse", recent_tokens=16, sink_tokens=8, block_tokens=8, segment_tokens=32, io="buffered",
        device_budget=60 * HEADS * 4096, host_budget=8 * HEADS * 4096, scan_rate=1e15, read_rate=1.0, device_rate=1.0,
    )  # fmt: skip
    eng = Engine(settings, device=device)
    try:
        session, kv = Session(eng), torch.randn(1, HEADS, 8 * 24, DIM)
        monkeypatch.setattr(device, "_asked", lambda mark: mark.stream != UP and Simulated._asked(device, mark))
        session.update(0, kv, kv)
        session.build_index()
        device.deaf_to(COMPUTE)
        with pytest.raises(Race, match="compute reads page"):
            session.attention(0, torch.randn(1, HEADS * GROUP, 1, DIM), [Visible.all(8 * 24, 1)], 0.25)
    finally:
        device.deaf_to(-1)
        eng.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("read_rate", "queries"), [(1.0, 1), (1e7, 1), (1.0, 20), (1e15, 1)])
def test_cold_blocks_are_brought_where_that_is_faster(seed: int, read_rate: float, queries: int) -> None:
    device, tokens = Simulated(seed), 8 * 90
    settings = Settings(
        device_budget=84 * 4096, host_budget=80 * 4096, block_tokens=8, segment_tokens=32, io="buffered",
        read_rate=read_rate,
    )  # fmt: skip
    eng = Engine(settings, device=device)
    try:
        session = Session(eng)
        k, v = torch.randn(1, HEADS, tokens, DIM), torch.randn(1, HEADS, tokens, DIM)
        session.update(0, k, v)
        for _ in range(3):
            q = torch.randn(1, HEADS * GROUP, queries, DIM)
            got = session.attention(0, q, [Visible.all(tokens, queries)], 0.25)
            want = attend_naive(q.reshape(HEADS, GROUP * queries, DIM), k[0], v[0], 0.25).out
            torch.testing.assert_close(got.reshape(want.shape), want, rtol=1e-4, atol=1e-5)
        brought = eng.traffic.brought_bytes
        assert (brought == 0) == (read_rate == 1e15), "the CPU is faster only then"
        more = torch.randn(1, HEADS, 8 * 4, DIM)
        session.select(0, [0] * 22)
        session.update(0, more.repeat(22, 1, 1, 1), more.repeat(22, 1, 1, 1))  # needs every slot: none is kept for that
        assert eng.traffic.brought_bytes == brought
    finally:
        eng.close()
    assert not device.races


@pytest.mark.slow
@pytest.mark.parametrize("stream", [COMPUTE, UP])
def test_a_block_that_is_brought_without_waiting_is_found(stream: int) -> None:
    """Read before it has come, or laid over one that is still read."""
    settings = Settings(
        device_budget=84 * 4096, host_budget=80 * 4096, block_tokens=8, segment_tokens=32, io="buffered", read_rate=1.0
    )
    device = Deaf(0, -1)
    eng = Engine(settings, device=device)
    try:
        session, kv = Session(eng), torch.randn(1, HEADS, 8 * 60, DIM)
        session.update(0, kv, kv)
        device.deaf_to(stream)
        q, seen = torch.randn(1, HEADS * GROUP, 1, DIM), [Visible.all(8 * 60, 1)]
        with pytest.raises(Race):
            _ = [session.attention(0, q, seen, 0.25) for _ in range(4)]
    finally:
        device.deaf_to(-1)
        eng.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_host_slot_that_is_read_too_early_is_found(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the ledger's LANDING attention would read poison."""
    monkeypatch.setattr("alaya_tiers.ledger.Ledger.coming", lambda self, ids: self.busy[ids] == 1)
    monkeypatch.setattr(
        "alaya_tiers.ledger.Ledger.readable", lambda self, ids: (self.device[ids] >= 0) | (self.host[ids] >= 0)
    )
    with pytest.raises(AssertionError):
        over_three_tiers(Simulated(seed, eagerness=0.1), 5, 1)


@pytest.mark.slow
def test_tokens_are_those_of_a_dynamic_cache(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Simulated(5, eagerness=0.9)
    monkeypatch.setattr(engine, "device_at", lambda place: device)
    model.set_attn_implementation("alaya")
    try:
        for inputs, rows in ((padded(2), 2),):
            want = generate(model, DynamicCache(config=model.config), inputs)
            with small_cache(model, rows) as cache:
                assert torch.equal(generate(model, cache, inputs), want)
                check_spilled(cache)
            with small_cache(model, 3 * rows) as cache:
                beams = generate(model, cache, inputs, num_beams=3, do_sample=False)
            assert torch.equal(
                beams, generate(model, DynamicCache(config=model.config), inputs, num_beams=3, do_sample=False)
            )
    finally:
        model.set_attn_implementation("sdpa")
    assert device.waits
    assert not device.races


# ---------------------------------------------------------------------- the order of accesses
def test_who_waits_for_whom() -> None:
    order, none = Order(4), slots()
    assert order.before(COMPUTE, none, slots(0, 1)) == []
    wrote = order.after(COMPUTE, none, slots(0, 1))
    assert order.before(DOWN, slots(0), none) == [Wait(COMPUTE, wrote)], "a copy reads what a kernel wrote"
    copied = order.after(DOWN, slots(0), none)
    assert order.before(DOWN, slots(1), none) == [], "it has waited for that already"
    order.after(DOWN, slots(1), none)
    assert order.before(COMPUTE, slots(0), none) == [], "two may read"
    read = order.after(COMPUTE, slots(0), none)
    assert order.before(UP, none, slots(0)) == [Wait(COMPUTE, read), Wait(DOWN, copied)], "a write follows all reads"
    up = order.after(UP, none, slots(0))
    assert order.before(COMPUTE, slots(0), none) == [Wait(UP, up)]
    assert order.before(COMPUTE, slots(3), none) == []


def test_a_simulated_copy_is_late_and_then_whole() -> None:
    device = Simulated(0, eagerness=0.0)
    source, target = torch.arange(4096, dtype=torch.int32).view(torch.uint8), torch.zeros(16384, dtype=torch.uint8)
    device.copy(UP, [source], [target])
    assert target.view(torch.float32).isnan().all()
    event = device.record(UP)
    assert not event.done()
    device.settle()
    assert event.done()
    assert torch.equal(source, target)
    device.copy(UP, [source], [target])
    source[0] = 1
    with pytest.raises(Race, match="changed"):
        device.settle()


def test_slots_side_by_side_are_copied_in_one_piece() -> None:
    books = Accountant({"device": None, "host": None})
    near, far = DeviceTier(12 << 20, 1 << 20, books), HostTier(40 << 20, 1 << 20, books)
    assert near.take(12) is not None
    assert far.take(40) is not None
    sizes = np.full(6, 1 << 20, np.int64)
    sources, targets = paired(near, slots(3, 2, 1, 7, 8, 9), far, slots(13, 12, 11, 14, 15, 16), sizes)
    assert [s.numel() >> 20 for s in sources] == [3, 2, 1], "host slots 15 and 16 are in two slabs"
    assert [t.data_ptr() for t in targets] == far.addresses(slots(11, 14, 16)).tolist()
    sizes[0] = 5
    sources, _ = paired(near, slots(3, 4), far, slots(3, 4), sizes[:2])
    assert [s.numel() for s in sources] == [5, 1 << 20], "a part of a slot ends a piece"
    lanes = Lanes(Simulated(1), near, far)
    assert lanes.down(slots(1), slots(2), sizes[1:2]) is not None


class Driver:
    """What of CUDA's runtime registers memory."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.error = 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.registered[address] = nbytes
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        memory(address, self.registered.pop(address))[0] = 1  # still mapped
        return 0


def test_host_memory_is_registered_as_long_as_it_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from alaya_tiers.devices.cuda import _Registered
    from alaya_tiers.errors import DeviceError

    driver, place = Driver(), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device", lambda place: nullcontext())
    slab = torch.frombuffer(_Registered(3 * 4096, place), dtype=torch.uint8)
    assert driver.registered == {slab.data_ptr(): 3 * 4096}
    slab[-1] = 7
    part = slab[4096:]
    del slab
    assert driver.registered, "a part of it is still in use"
    del part
    assert not driver.registered
    driver.error = 2
    with pytest.raises(DeviceError, match="ulimit -l"):
        _Registered(4096, place)


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
