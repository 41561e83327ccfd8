"""The simulation of the tiers: by hand where it is small, against simpler programs where it is not."""

import json
import random
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from alaya_tiers.errors import ConfigError
from alaya_tiers.policies import Lru, Scan, Window
from alaya_tiers.tools import simulate, simulator
from alaya_tiers.tools.hardware import Channel, Machine
from alaya_tiers.tools.limits import Future
from alaya_tiers.tools.shapes import Shape
from alaya_tiers.tools.simulator import Counts, Simulator
from alaya_tiers.tools.traces import Request, Trace
from tests.test_cli import call
from tests.test_traces import TRACES, chat

TINY = Shape("tiny", 1, 1, 1, 1, 1, 1, 1, number_bytes=1)
"""2 bytes of KV a token; n tokens after c cost 14 (n - c) + 2 (n (n + 1) - c (c + 1)) + 2 operations."""
BLOCK = 4
BLOCK_BYTES = 8
MACHINE = Machine(
    device_memory=BLOCK_BYTES, host_memory=BLOCK_BYTES, ssd=8 * BLOCK_BYTES, pcie=8, ssd_read=4, ssd_write=2, flops=2
)
"""A block in the device, one in the host, eight on the ssd; a block takes 1 s up or down, 2 s to read, 4 s to write."""


def request(time: float, blocks: list[int], tokens: int | None = None) -> Request:
    return Request(time, tokens or len(blocks) * BLOCK, 0, np.array(blocks, np.int64))


def run(machine: Machine, requests: Iterable[Request], policy: Lru | Scan | Window | Future | None = None) -> Counts:
    made = Simulator(machine, TINY, BLOCK, policy or Lru())
    for one in requests:
        made.arrive(one)
    return made.close()


def trees(seed: int, count: int) -> list[Request]:
    """Requests that extend, share and branch prefixes, one at a time."""
    chance, known, fresh, made = random.Random(seed), [[0]], 1, []
    for at in range(count):
        prefix = chance.choice(known[-12:])
        prefix = prefix[: chance.randint(1, len(prefix))]
        new = chance.randint(0, 4)
        blocks = prefix + list(range(fresh, fresh + new))
        fresh += new
        known.append(blocks)
        made.append(request(at * 1e6, blocks))
    return made


# ---------------------------------------------------------------------- by hand
def test_one_tier_by_hand() -> None:
    machine = replace(MACHINE, device_memory=2 * BLOCK_BYTES, host_memory=0, ssd=0)
    counts = run(machine, [request(0, [1, 2]), request(200, [1, 2])])
    assert list(counts.ttft) == [(14 * 8 + 2 * 72 + 2) / 2, (14 * 1 + 2 * (72 - 56) + 2) / 2] == [129, 24]
    assert counts.hit_tokens == {"device": 7, "host": 0, "ssd": 0}, "the last token is always computed"
    assert (counts.flops, counts.flops_without) == (258 + 48, 258 * 2)
    assert not any(counts.moved.values())
    assert counts.ended == 224


def test_three_tiers_by_hand() -> None:
    """First token at 241. Blocks 3 and 2 go down (2 s); the host has room for one: 3 is written first (4 s, a stall).

    At 300 the second request finds 1 in the device, 2 in the host, 3 on the ssd: 2 s to read, 2 s up beside it. 2 and 3
    are demoted again (2 s, after the loads), and 3 leaves the host, which costs nothing: it is on the ssd.
    """
    counts = run(MACHINE, [request(0, [1, 2, 3]), request(300, [1, 2, 3])])
    assert list(counts.ttft) == [241, 2 + 2 + (14 * 1 + 2 * (156 - 132) + 2) / 2] == [241, 36]
    assert counts.hit_tokens == {"device": 4, "host": 4, "ssd": 3}
    assert counts.moved == {
        "host_to_device": 16, "device_to_host": 32, "ssd_to_host": 8, "host_to_ssd": 16, "dropped": 0,
    }  # fmt: skip
    assert (counts.load_seconds, counts.stall_seconds, counts.queue_seconds) == (2, 4 + 2, 0)
    assert (counts.compute_seconds, counts.ended) == (241 + 32, 336)


def test_requests_wait_for_a_server_and_for_each_other_s_transfers() -> None:
    small = replace(MACHINE, device_memory=2 * BLOCK_BYTES, host_memory=2 * BLOCK_BYTES)
    arrivals = [request(0, [1]), request(0, [2]), request(1, [3])]
    one = run(small, arrivals)
    seconds = (14 * 4 + 2 * 20 + 2) / 2
    assert list(one.ttft) == [seconds, 2 * seconds, 3 * seconds - 1]
    assert one.queue_seconds == seconds + 2 * seconds - 1
    many = run(replace(small, servers=3), arrivals)
    assert (list(many.ttft), many.queue_seconds) == ([seconds] * 3, 0)
    # 1 and 2 are in the host now; both are loaded at 500 over one channel, and each load demotes another block
    later = [*arrivals, request(500, [4]), request(600, [1]), request(600, [2])]
    assert run(replace(small, servers=3), later).ttft[-1] > run(replace(small, servers=3), later).ttft[-2]


def test_what_is_computed_is_found_by_those_who_begin_later_only() -> None:
    machine = replace(MACHINE, device_memory=64 * BLOCK_BYTES, servers=2)
    assert sum(run(machine, [request(0, [1, 2]), request(128, [1, 2])]).hit_tokens.values()) == 0
    assert sum(run(machine, [request(0, [1, 2]), request(129, [1, 2])]).hit_tokens.values()) == 7


def test_a_hit_needs_all_blocks_before_it() -> None:
    machine = replace(MACHINE, device_memory=8 * BLOCK_BYTES)
    counts = run(machine, [request(0, [1, 2, 3]), request(500, [9, 2, 3]), request(900, [1, 2, 8])])
    assert counts.hit_tokens["device"] == 8


def test_a_channel_serves_demand_first_and_writes_in_the_gaps() -> None:
    channel = Channel()
    assert channel.written(10) == []
    channel.write_behind([7, 8, 9], each=4)
    assert channel.written(12) == []  # 2 of 4 s
    assert channel.demand(12, 5) == 17
    assert channel.demand(13, 5) == 22, "first come, first served"
    assert channel.written(23) == []  # 3 of 4 s
    assert channel.written(24) == [7]
    assert channel.written(25) == []
    assert (channel.waiting, channel.force(25)) == (2, (8, 28)), "1 s of it was done"
    assert channel.written(31) == []
    assert channel.written(32) == [9]
    assert channel.written(99) == []


# ---------------------------------------------------------------------- against simpler programs
def naive_lru(requests: list[Request], capacity: int) -> int:
    """Hit tokens of one tier."""
    kept: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for one in requests:
        blocks = one.blocks.tolist()
        found = next((i for i, block in enumerate(blocks) if block not in kept), len(blocks))
        hits += min(found * BLOCK, one.tokens - 1)
        for block in reversed(blocks):
            kept[block] = None
            kept.move_to_end(block)
        while len(kept) > capacity:
            kept.popitem(last=False)
    return hits


@pytest.mark.parametrize("seed", range(8))
def test_one_tier_of_lru_is_an_ordered_dict(seed: int) -> None:
    requests = trees(seed, 150)
    for capacity in (1, 2, 5, 13, 40):
        machine = replace(MACHINE, device_memory=capacity * BLOCK_BYTES, host_memory=0, ssd=0)
        assert run(machine, requests).hit_tokens["device"] == naive_lru(requests, capacity)


@pytest.mark.parametrize("seed", range(8))
def test_nothing_beats_belady(seed: int) -> None:
    requests = trees(seed, 150)
    better = 0
    for capacity in (1, 2, 5, 13, 40):
        machine = replace(MACHINE, device_memory=capacity * BLOCK_BYTES, host_memory=0, ssd=0)
        best = run(machine, requests, Future(requests)).hit_tokens["device"]
        for policy in (Lru(), Scan(), Window()):
            got = run(machine, requests, policy).hit_tokens["device"]
            assert got <= best
            better += got < best
    assert better, "a limit that is never above anything proves nothing"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("policy", [Lru(), Scan(), "belady"], ids=str)
def test_every_block_is_where_the_books_say(seed: int, policy: Lru | Scan | str) -> None:
    requests = [one._replace(time=one.time * 1e-4) for one in trees(seed, 200)]
    machine = replace(
        MACHINE, device_memory=4 * BLOCK_BYTES, host_memory=6 * BLOCK_BYTES, ssd=20 * BLOCK_BYTES, servers=3
    )
    made = Simulator(machine, TINY, BLOCK, Future(requests) if isinstance(policy, str) else policy, slack=0.2)
    for one in requests:
        made.arrive(one)
        blocks, shelf = made.blocks, made.shelf
        everything = np.arange(blocks.rows)
        device, host, ssd = (shelf[tier].has(everything) for tier in simulator.TIERS)
        assert not (device & host).any(), "in two memory tiers"
        for tier, mask in zip(simulator.TIERS, (device, host, ssd), strict=True):
            assert sorted(shelf[tier].members.tolist()) == np.flatnonzero(mask).tolist()
            assert shelf[tier].size <= made.capacity[tier]
        held = np.flatnonzero(device | host | ssd)
        assert (blocks.names.find(blocks.key[held]) == held).all()
        assert int(blocks.writing.sum()) == made.disk.waiting
        assert not (blocks.writing & ~(device | host)).any(), "a block that is nowhere is being written"
    counts = made.close()
    assert counts.requests == len(counts.ttft) == 200
    assert all(first > 0 for first in counts.ttft)


def test_a_long_trace_takes_no_more_memory_than_the_tiers_hold() -> None:
    machine = replace(MACHINE, device_memory=4 * BLOCK_BYTES, host_memory=8 * BLOCK_BYTES, ssd=64 * BLOCK_BYTES)
    made = Simulator(machine, TINY, BLOCK, Lru())
    for at in range(20_000):
        made.arrive(request(at * 1e4, [3 * at, 3 * at + 1, 3 * at + 2]))
        assert len(made.blocks.names) <= 2 * (4 + 8 + 64) + 3, "what the tiers hold, and as many that left"
    assert made.blocks.rows == 1024, "numbers of dead blocks are given out again"
    assert made.close().requests == 20_000


# ---------------------------------------------------------------------- bad settings
def test_impossible_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for values in (
        {"pcie": 0},
        {"flops": float("nan")},
        {"host_memory": -1},
        {"servers": 0},
        {"ssd": 7, "device_memory": 1},
    ):
        with pytest.raises(ConfigError):
            Machine(**values)
    with pytest.raises(ConfigError, match="cannot hold a block"):
        run(replace(MACHINE, device_memory=BLOCK_BYTES - 1), [])
    with pytest.raises(ConfigError, match="slack"):
        Simulator(MACHINE, TINY, BLOCK, Lru(), slack=1)
    monkeypatch.setattr(simulator, "MOST_WAITING", 10)
    with pytest.raises(ConfigError, match="cannot serve the trace"):
        run(MACHINE, [request(0, [i]) for i in range(20)])


# ---------------------------------------------------------------------- the command
@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl"
    lines = [
        chat(i * 1000, 1024 + 512 * (i % 3), [0, *range(2 * (i % 5) + 1, 2 * (i % 5) + 2 + i % 3)]) for i in range(60)
    ]
    path.write_text("\n".join(lines))
    return path


SMALL = ("--device-memory", "256MiB", "--host-memory", "256MiB", "--ssd", "1GiB", "--slack", "0")


def test_the_command_compares_policies_and_sizes(trace: Path) -> None:
    words = (
        "simulate",
        str(trace),
        *SMALL,
        "--sweep",
        "host-memory=128MiB,512MiB",
        "--policy",
        "lru, belady",
        "--json",
    )
    report = json.loads(call(*words).stdout)
    runs = report["runs"]
    assert [(r["machine"]["host_memory"] >> 20, r["policy"]) for r in runs] == [
        (128, "lru"), (128, "belady"), (512, "lru"), (512, "belady"),
    ]  # fmt: skip
    assert all(0 < r["hit_rate"]["all"] < 1 for r in runs)
    assert all(r["hit_rate"]["all"] == pytest.approx(sum(r["hit_tokens"].values()) / r["tokens"]) for r in runs)
    again = json.loads(call(*words).stdout)
    assert again["runs"] == runs, "the same twice"
    assert report["speed"]["times_real_time"] > 0
    shown = call("simulate", str(trace), *SMALL, "--sweep", "host-memory=128MiB,512MiB")
    assert shown.exit_code == 0
    assert all(
        word in " ".join(shown.stdout.split()) for word in ("belady", "host-memory", "128.0 MiB", "TTFT", "real time")
    )
    assert "…" not in shown.stdout


def test_a_machine_that_cannot_keep_up_is_told_of(tmp_path: Path) -> None:
    """Answers of 2,000 tokens, ten a second, whose KV is read from the ssd in every step."""
    path = tmp_path / "busy.jsonl"
    path.write_text("\n".join(chat(i * 100, 4096, [*range(8 * i, 8 * i + 8)], output=2000) for i in range(60)))
    words = ("simulate", str(path), *SMALL, "--policy", "lru")
    assert "Overloaded, 1 of 1 runs" in call(*words).stdout
    assert "Overloaded" not in call(*words, "--device-memory", "1TiB", "--attend", "0.01").stdout
    run = json.loads(call(*words, "--json").stdout)["runs"][0]
    assert run["decoded_seconds"] > run["simulated_seconds"] + 600


def test_a_machine_can_come_from_a_file(trace: Path, tmp_path: Path) -> None:
    file = tmp_path / "box.toml"
    file.write_text(
        '[machine]\nhost-memory = "1GiB"\nflops = "2.5TFLOPS"\npcie = "12GB/s"\nservers = 3\nssd-read = 1e9\n'
    )
    words = (
        "simulate",
        str(trace),
        "--machine",
        str(file),
        "--pcie",
        "50GB/s",
        "--policy",
        "scan",
        "--quick",
        "--json",
    )
    machine = json.loads(call(*words).stdout)["runs"][0]["machine"]
    assert (machine["host_memory"], machine["flops"], machine["servers"]) == (1 << 30, 2.5e12, 3)
    assert (machine["pcie"], machine["ssd_read"]) == (50e9, 1e9)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--policy", "fifo"), "unknown policy 'fifo'"),
        (("--sweep", "host-memory"), "cannot read the sweep"),
        (("--sweep", "colour=1"), "cannot read the sweep"),
        (("--sweep", "ssd=1TiB,"), "cannot read the sweep"),
        (("--host-memory", "much"), "as a size"),
        (("--flops", "fast"), "cannot read 'fast' as flops"),
        (("--ssd-read", "0"), "ssd_read is a rate above 0"),
        (("--device-memory", "1MiB"), "cannot hold a block"),
        (("--model", "gpt-9"), "no model 'gpt-9'"),
        (("--machine", "/nowhere.toml"), "cannot read a machine"),
        (("--format", "agents"), "line 2"),
    ],
)
def test_nonsense_is_one_line(trace: Path, words: tuple[str, ...], problem: str) -> None:
    result = call("simulate", str(trace), *words)
    assert result.exit_code == 2
    assert problem in " ".join(result.stderr.split())


@pytest.mark.slow
@pytest.mark.skipif(not TRACES.exists(), reason="needs the traces")
def test_real_traces_come_out_sane() -> None:
    for name, limit in (("mooncake_conversation.jsonl.xz", "1500"), ("coding_agents.tar.xz", "300")):
        report = json.loads(call("simulate", str(TRACES / name), "--servers", "4", "--limit", limit, "--json").stdout)
        runs = {r["policy"]: r for r in report["runs"]}
        assert {r["requests"] for r in runs.values()} == {int(limit)}
        assert all(0 < r["hit_rate"]["all"] < 1 and r["ttft_seconds"]["p50"] > 0 for r in runs.values())
        assert runs["belady"]["hit_rate"]["all"] >= runs["lru"]["hit_rate"]["all"]


def test_policies_are_compared_on_the_same_requests() -> None:
    requests = trees(1, 60)
    trace = Trace(BLOCK, lambda: iter(requests))
    machine = replace(MACHINE, device_memory=5 * BLOCK_BYTES, host_memory=0, ssd=0)
    together = simulate.simulate(trace, TINY, [machine], ["lru", "belady"], 0.0)
    assert [r.as_dict()["hit_tokens"] for r in together] == [
        run(machine, requests).hit_tokens,
        run(machine, requests, Future(requests)).hit_tokens,
    ]
