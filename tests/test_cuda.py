"""The CUDA device's own code, run where there is no CUDA: streams and events that do nothing, kernels interpreted.

What it cannot show is whether CUDA does what is asked; that no call has a wrong argument, shape or dtype it can.
"""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alaya_tiers.attention import BlockList, attend_naive
from alaya_tiers.cache import Session, Visible
from alaya_tiers.config import Settings
from alaya_tiers.devices.base import Ask, Scanning
from alaya_tiers.engine import Engine
from alaya_tiers.index.codes import Layout, Reach, scan
from tests.test_device import sparse_over_three_tiers

pytest.importorskip("triton", reason="triton is not installed: pip install 'alaya-tiers[gpu]'")

from alaya_tiers.devices import cuda, kernels, scan_kernels
from tests.test_scan_kernels import Coded

HEADS, GROUP, DIM = 2, 2, 16


class Stream:
    """Does everything at once."""

    def __init__(self, place: Any = None) -> None:
        self.waited = 0

    def wait_event(self, event: "Event") -> None:
        assert event.recorded
        self.waited += 1

    def wait_stream(self, other: "Stream") -> None:
        self.waited += 1


class Event:
    """Has happened once it is recorded."""

    recorded = False

    def record(self, stream: Stream | None = None) -> None:
        self.recorded = True

    def query(self) -> bool:
        return self.recorded

    def synchronize(self) -> None:
        assert self.recorded


class Runtime:
    """What of CUDA's runtime registers memory."""

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> cuda.Cuda:
    """A Cuda device over plain memory."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: tests/test_device.py runs on it")
    here = Stream()
    for name, stand_in in {
        "Stream": Stream, "Event": Event, "cudart": Runtime, "current_stream": lambda place: here,
        "stream": lambda stream: nullcontext(), "device": lambda place: nullcontext(),
        "synchronize": lambda place: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    empty = torch.empty

    def unpinned(*shape: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", unpinned)
    return cuda.Cuda(torch.device("cpu"))


class Counting(cuda.Cuda):
    scans = 0

    def scan(self, ask: Ask) -> Scanning | None:
        begun = super().scan(ask)
        self.scans += begun is not None
        return begun


@pytest.mark.slow
@pytest.mark.parametrize("codes", [1 << 20, 20 << 10])
def test_sparse_attention_over_three_tiers(device: cuda.Cuda, codes: int) -> None:
    on = Counting(device.place)
    sparse_over_three_tiers(on, 12, codes, blocks=20)
    assert on.scans


@pytest.mark.slow
def test_exact_attention_of_a_prompt_and_a_step(device: cuda.Cuda) -> None:
    settings = Settings(
        device_budget=8 * HEADS * 4096, host_budget=8 * HEADS * 4096, block_tokens=8, segment_tokens=32, io="buffered"
    )
    eng, tokens = Engine(settings, device=device), 8 * 12 + 3
    try:
        session = Session(eng)
        k, v = torch.randn(1, HEADS, tokens, DIM), torch.randn(1, HEADS, tokens, DIM)
        session.update(0, k, v)
        for n in (1, 40):
            q = torch.randn(1, HEADS * GROUP, n, DIM)
            got = session.attention(0, q, [Visible.causal(tokens - n, n)], 0.25, softcap=20.0)
            mask = torch.ones(n, tokens, dtype=torch.bool).tril(tokens - n)[None].repeat(1, GROUP, 1)
            want = attend_naive(q.reshape(HEADS, GROUP * n, DIM), k[0], v[0], 0.25, mask, 20.0).out
            torch.testing.assert_close(got.reshape(want.shape), want, rtol=1e-4, atol=1e-5)
        session.select(0, [0, 0])
        more = torch.randn(2, HEADS, 9, DIM)
        session.update(0, more, more)
        assert torch.equal(session.gather(0)[0], torch.cat([k.repeat(2, 1, 1, 1), more], 2))
    finally:
        eng.close()


@pytest.mark.slow
def test_a_scan_is_that_of_the_cpu(device: cuda.Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where more keys are found than come down at first, and where some blocks are scanned by the CPU."""
    monkeypatch.setattr(scan_kernels.finish, "__defaults__", (9,))
    coded = Coded(2, 5, Layout(64, 24, 12, 4), torch.bfloat16, 3)
    q, start, asked = torch.randn(2, 3, 24), torch.rand(2, 3), []

    class Here:
        def __init__(self, there: list[int]) -> None:
            self.there = np.isin(np.arange(5), there)

        def scan(self, ask: Ask, columns: Any) -> Scanning | None:
            asked.append(columns.tolist())
            return device.scan(ask)

    def found(there: list[int], reach: Reach) -> Any:
        return scan(
            q, coded.addresses.numpy(), coded.first.numpy(), coded.count.numpy(), coded.layout, reach, 0.4,
            verify=lambda best: start, elsewhere=Here(there),
        )  # fmt: skip

    want = found([], Reach(2.0))
    assert max(map(len, want.tokens)) > 9
    for there in ([0, 1, 2, 3, 4], [1, 4]):
        got = found(there, Reach(2.0))
        for mine, theirs in zip(got.tokens, want.tokens, strict=True):
            assert set(theirs.tolist()) <= set(mine.tolist()), "two parts know less of each other's best"
            assert there == [1, 4] or np.array_equal(mine, theirs)
        torch.testing.assert_close(got.top, want.top, rtol=1e-5, atol=1e-5)
    assert asked == [[0, 1, 2, 3, 4], [1, 4]]
    found([1, 4], Reach(2.0, most=3))
    assert len(asked) == 2, "with a bound on the keys of a head all is the CPU's"


def test_tables_go_up_in_one_piece() -> None:
    tables: list[Any] = [
        np.arange(3, dtype=np.int32),
        np.zeros((2, 0), np.int64),
        np.ones((2, 2), bool),
        np.array([1.5], np.float32),
    ]
    whole, places = cuda.packed(tables)
    assert whole.dtype == torch.uint8
    for got, table in zip(cuda.unpacked(whole, tables, places), tables, strict=True):
        assert got.shape == table.shape
        assert np.array_equal(got.numpy(), table)
        assert got.data_ptr() % 16 == whole.data_ptr() % 16 or not table.size


def test_more_rows_than_a_program_holds_are_attended_plainly(device: cuda.Cuda) -> None:
    kv = torch.randn(HEADS, 20, 2 * DIM)
    addresses = kv.data_ptr() + 4 * 2 * DIM * (np.arange(HEADS)[:, None] * 20 + np.array([0, 12]))
    blocks = BlockList(addresses, np.array([0, 12], np.int32), np.array([12, 8], np.int32), DIM, DIM, torch.float32)
    rows = kernels.MOST_ROWS + 1
    q, lo, hi, top = torch.randn(HEADS, rows, DIM), np.zeros(rows, np.int32), np.full(rows, 20, np.int32), None
    hi[3] = 5
    got = device.attend(q, blocks, 0.3, lo, hi, None, top)
    mask = torch.arange(20) < torch.from_numpy(hi)[:, None]
    want = attend_naive(q, kv[..., :DIM], kv[..., DIM:], 0.3, mask)
    torch.testing.assert_close(got.out, want.out, rtol=1e-5, atol=1e-5)
