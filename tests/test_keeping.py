"""What becomes of contexts that wait, shares of the SSD, and decoding: by hand, and where one must beat the other."""

from dataclasses import replace

import numpy as np
import pytest

from alaya_tiers.errors import ConfigError
from alaya_tiers.policies import Heat, Lru, S3Fifo, Share, Shares
from alaya_tiers.tools import keeping
from alaya_tiers.tools.decoding import Decoding
from alaya_tiers.tools.hardware import Machine
from alaya_tiers.tools.limits import Future
from alaya_tiers.tools.prices import Prices
from alaya_tiers.tools.shapes import Shape
from alaya_tiers.tools.simulated import Run
from alaya_tiers.tools.simulator import Counts, Simulator
from alaya_tiers.tools.traces import Request
from tests.test_simulate import BLOCK, BLOCK_BYTES, MACHINE, TINY

FAST = replace(MACHINE, flops=1e9, pcie=1e9, ssd_read=1e3, ssd_write=1e3)


def ask(time: float, blocks: list[int], category: str = "", output: int = 0, pause: bool = False) -> Request:
    return Request(time, len(blocks) * BLOCK, output, np.array(blocks, np.int64), pause, category)


def run(
    requests: list[Request], machine: Machine, pause: str = "none", shares: Shares | None = None, policy: object = None
) -> Counts:
    pauses = keeping.pauses(pause, machine, lambda: Future(requests))
    made = Simulator(machine, TINY, BLOCK, policy or Lru(), pauses=pauses, shares=shares)  # type: ignore[arg-type]
    for one in requests:
        made.arrive(one)
    return made.close()


ONE_TIER = replace(FAST, device_memory=4 * BLOCK_BYTES, host_memory=0, ssd=0)


def with_visits(every: int) -> list[Request]:
    """A block every 10 s that nobody asks for again, and two that come back every so many seconds."""
    stream = [ask(i * 10, [100 + i]) for i in range(1, 60)]
    visits = [ask(at + 5, [1, 2], pause=True) for at in range(0, 590, every)]
    return sorted(stream + visits, key=lambda one: one.time)


def test_a_time_to_live_keeps_what_comes_back_within_it() -> None:
    requests = with_visits(60)
    none, short, long = (run(requests, ONE_TIER, pause).hit_tokens["device"] for pause in ("none", "ttl:9", "ttl:70"))
    assert none == short == 0, "six blocks came meanwhile, and there is room for four"
    assert long == 9 * 7, "all visits but the first, less the token that is always computed"


def test_what_has_expired_leaves_before_what_is_waited_for() -> None:
    """1 and 2 were used last, but only for 20 s; 3, before them, is waited for."""
    waits = [ask(0, [3], pause=True), ask(1, [1, 2], pause=True), ask(15, [3], pause=True)]
    requests = [*waits, ask(22, [4, 5]), ask(23, [6]), ask(24, [3])]
    assert run(requests, ONE_TIER, "ttl:20").hit_tokens["device"] == 2 * 3
    assert run([*requests[:3], ask(16, [1, 2]), *requests[3:]], ONE_TIER).hit_tokens["device"] == 3 + 7


def test_the_oracle_beats_every_fixed_time() -> None:
    """Some contexts come back soon and some never do: no single time fits both."""
    sooner = [ask(at + k * 20, [1000 * at + 1, 1000 * at + 2], pause=True) for at in range(0, 600, 50) for k in (0, 1)]
    never = [ask(at + 1, [1000 * at + 7, 1000 * at + 8], pause=True) for at in range(0, 600, 7)]
    requests = sorted(sooner + never, key=lambda one: one.time)
    hits = {
        p: run(requests, ONE_TIER, p).hit_tokens["device"] for p in ("none", "ttl:5", "ttl:20", "ttl:100", "oracle")
    }
    assert hits["oracle"] == max(hits.values()) > hits["none"]
    assert hits["oracle"] > max(hits["ttl:5"], hits["ttl:100"])


def test_patience_lets_go_of_what_stays_away_for_long() -> None:
    """Reading 16 bytes again takes 0.016 s; holding them for a minute costs others more when memory is full."""
    machine = replace(FAST, device_memory=3 * BLOCK_BYTES, host_memory=6 * BLOCK_BYTES, ssd=64 * BLOCK_BYTES)
    requests = with_visits(60)
    patient = run(requests, machine, "patience")
    assert patient.hit_tokens["ssd"] > run(requests, machine).hit_tokens["ssd"]
    assert sum(patient.hit_tokens.values()) == sum(run(requests, machine).hit_tokens.values())


def test_nonsense_for_a_pause_is_refused() -> None:
    for text in ("ttl", "ttl:", "ttl:-1", "ttl:soon", "patience:3", "forever"):
        with pytest.raises(ConfigError, match="cannot read the pause"):
            keeping.pauses(text, ONE_TIER, lambda: Future([]))


# ---------------------------------------------------------------------- shares
def test_a_floor_protects_a_category_from_a_flood() -> None:
    machine = replace(FAST, device_memory=BLOCK_BYTES, host_memory=BLOCK_BYTES, ssd=12 * BLOCK_BYTES)
    visits = [ask(at * 100, [1, 2, 3], "quiet") for at in range(6)]
    flood = [ask(i * 5 + 1, [100 + 2 * i, 101 + 2 * i], "loud") for i in range(100)]
    requests = sorted(visits + flood, key=lambda one: one.time)
    plain, fair = run(requests, machine), run(requests, machine, shares=Shares({"quiet": Share(floor=4 * BLOCK_BYTES)}))
    asked, found = fair.categories["quiet"]
    assert plain.categories["quiet"] == [asked, 0]
    assert found == 5 * 11, "all visits but the first"
    capped = run(requests, machine, shares=Shares({"loud": Share(most=6 * BLOCK_BYTES)}))
    assert capped.categories["quiet"][1] == found


# ---------------------------------------------------------------------- policies that count
def test_policies_that_count_uses_differ_from_the_least_recently_used() -> None:
    """Three blocks that everybody wants, and a scan through others twice as long as the tier."""
    requests = [ask(i, [1 + i % 3] if i % 2 else [1000 + i]) for i in range(400)]
    scans = [ask(1000 + i, [5000 + i]) for i in range(8)] + [ask(1100 + i, [1 + i]) for i in range(3)]
    machine = replace(ONE_TIER, device_memory=6 * BLOCK_BYTES)
    hits = {
        type(p).__name__: run(requests + scans, machine, policy=p).hit_tokens["device"]
        for p in (Lru(), S3Fifo(), Heat())
    }
    assert hits["S3Fifo"] > hits["Lru"]
    assert hits["Heat"] > hits["Lru"]


# ---------------------------------------------------------------------- decoding
SHAPE = Shape("tiny", 1, 1, 1, 1, 1, 1, 1, number_bytes=1)


def decoded(machine: Machine, attend: float = 1.0) -> Decoding:
    made = Decoding(machine, SHAPE, attend)
    made.begin(0.0, 100, 11)
    made.begin(0.0, 100, 21)
    made.advance(float("inf"))
    return made


def test_sequences_share_steps_and_each_ends_in_its_time() -> None:
    """A step is 1 s. The first gets 10 more tokens and ends at 10 s, the second 20 and ends at 20 s."""
    machine = Machine(device_memory=1 << 20, device_read=1e18, step=1.0)
    made = decoded(machine)
    assert list(made.tpot) == pytest.approx([1.0, 1.0])
    assert (made.running, made.tokens) == (0, 32)


def test_a_step_reads_weights_and_kv_from_where_they_are() -> None:
    weights = SHAPE.weights + SHAPE.hidden * SHAPE.vocab
    machine = Machine(device_memory=100, host_memory=60, ssd=1 << 20, device_read=10, pcie=2, ssd_read=1, step=0.0)
    made = Decoding(machine, SHAPE, 1.0)
    made.begin(0.0, 99, 2)  # 200 bytes with what it is about to write
    assert made.step_seconds == max((weights + 100) / 10, 60 / 2, 40 / 1) == 40
    made.advance(float("inf"))
    half = Decoding(machine, SHAPE, 0.5)
    half.begin(0.0, 99, 2)
    assert half.step_seconds == 20
    inside = Decoding(replace(machine, device_memory=1 << 20), SHAPE, 1.0)
    inside.begin(0.0, 99, 2)
    assert inside.step_seconds == (weights + 200) / 10


def test_one_that_comes_later_slows_the_others_down_from_then_on() -> None:
    machine = Machine(device_memory=1 << 30, device_read=202.0, step=0.0)
    weights = SHAPE.weights + SHAPE.hidden * SHAPE.vocab
    made = Decoding(replace(machine, device_read=float(weights + 220)), SHAPE, 1.0)
    made.begin(0.0, 100, 21)  # (100 + 10.5) * 2 = 221 bytes
    first = made.step_seconds
    made.begin(5 * first, 100, 21)
    both = made.step_seconds
    made.advance(float("inf"))
    assert both > first
    assert made.tpot[0] == pytest.approx((5 * first + 15 * both) / 20)
    assert made.tpot[1] == pytest.approx((15 * both + 5 * first) / 20)


def test_the_price_of_a_token_is_that_of_the_machine_for_as_long_as_it_took() -> None:
    machine = replace(FAST, device_memory=1 << 30, host_memory=2 << 30, ssd=4 << 30, servers=2)
    counts = run([ask(0, [1, 2], output=1), ask(3600, [3, 4], output=1)], machine)
    row = Run("lru", machine, counts, Prices(device=1, host=2, ssd=3, server=10)).as_dict()
    assert row["price_an_hour"] == 1 + 4 + 12 + 20
    assert row["price_per_million_tokens"] == pytest.approx(37 / 18 * 1e6, rel=1e-3)
    assert row["tpot_seconds"]["p50"] is None
    assert row["output_tokens"] == 2
