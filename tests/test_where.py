"""Where cold blocks are attended: the split is the best there is, whatever the rates."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alaya_tiers.index.where import Ways

rates = st.floats(1e6, 1e13)


@given(rates, rates, rates, st.floats(0, 1e-2), st.integers(1, 60), st.floats(1e3, 1e7), st.integers(0, 70))
def test_no_split_is_faster(
    bus: float, device: float, host: float, start: float, blocks: int, nbytes: float, room: int
) -> None:
    ways = Ways(bus, device, host, start)
    bring = ways.bring(blocks, nbytes, room)
    assert 0 <= bring <= min(blocks, room)
    best = min(ways.seconds(n, blocks, nbytes) for n in range(min(blocks, room) + 1))
    assert ways.seconds(bring, blocks, nbytes) <= best * (1 + 1e-9)


def test_what_decides() -> None:
    block = 128 << 10
    assert Ways(bus=50e9, device=3e12, host=1e9).bring(100, block, 1000) == 98, "a slow CPU: nearly all is brought"
    assert Ways(bus=1e9, device=3e12, host=200e9).bring(100, block, 1000) == 0, "a slow bus: all stays"
    even = Ways(bus=50e9, device=3e12, host=50e9, start=0)
    assert even.bring(100, block, 1000) == 50
    assert even.bring(100, block, 8) == 8
    assert even.seconds(50, 100, block) == pytest.approx(50 * block / 50e9)
    assert Ways(bus=50e9, device=3e12, host=50e9, start=1.0).bring(100, block, 1000) == 0, "not worth the start"
