"""Recorded runs replayed: against the engine itself, byte for byte where nothing depends on who is faster."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alaya_tiers.errors import BudgetTooSmall, ConfigError
from alaya_tiers.policies import EVICTION
from alaya_tiers.tools import validate, virtual
from alaya_tiers.tools.phases import Phase
from alaya_tiers.tools.profile import Transfer
from alaya_tiers.tools.recorded import Recording, open_recording
from alaya_tiers.tools.replay import Replay, replayed
from alaya_tiers.tools.validate import EXACT, FLOOR, PROMPT, SPARSE, Case, Numbers, Workload
from tests.test_cli import call
from tests.test_profile import KNOWN, written
from tests.test_record import HEAD, OWN, PUT, READ, SHAPE


def tokens_of(workload: Workload) -> int:
    """Few enough for a test."""
    return 1024 if workload.chunk else 4096 if workload.mode == "sparse" else 2048


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[Workload, Recording]:
    """Each workload once, with everything in memory."""
    made = {}
    for workload in (EXACT, SPARSE, PROMPT):
        path = tmp_path_factory.mktemp("traces") / "t.jsonl"
        small = workload.small(tokens_of(workload))
        validate.engine(small, Case(workload, 1.0).settings(small), path)
        made[workload] = open_recording(path)
    return made


def both(case: Case, traces: dict[Workload, Recording], **more: Any) -> tuple[Numbers, Numbers, int]:
    """Predicted from the trace, measured on the engine, and the bytes of the KV."""
    small = case.workload.small(tokens_of(case.workload))
    settings = case.settings(small) | more
    predicted = Numbers.of(replayed(traces[case.workload], KNOWN, **settings))
    return predicted, validate.engine(small, settings), small.kv_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(EXACT, 1.0, 64),
        Case(EXACT, 0.5, 64, "lru", "none"),
        Case(EXACT, 0.25, 128, "lru", "none"),
        Case(PROMPT, 0.5, 32, "lru", "none"),
        Case(SPARSE, 1.0, 64),
    ],
    ids=lambda case: f"{case.workload.name}, {case.name}",
)
def test_where_order_is_certain_hits_and_bytes_are_exact(case: Case, traces: dict[Workload, Recording]) -> None:
    """With everything written in the end: how much stays unwritten, and so in memory, is up to who is faster."""
    predicted, measured, _ = both(case, traces, dirty_limit=0.0)
    assert predicted.hit_rate == pytest.approx(measured.hit_rate, abs=0.005)
    assert predicted.ssd_bytes == pytest.approx(measured.ssd_bytes, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [Case(EXACT, 0.5, 64), Case(EXACT, 0.25, 128, "scan", "none"), Case(SPARSE, 0.5, 64, "lru")],
    ids=lambda case: f"{case.workload.name}, {case.name}",
)
def test_where_threads_race_they_are_within_the_floor(case: Case, traces: dict[Workload, Recording]) -> None:
    predicted, measured, kv_bytes = both(case, traces)
    assert predicted.hit_rate == pytest.approx(measured.hit_rate, abs=FLOOR)
    assert predicted.ssd_bytes == pytest.approx(measured.ssd_bytes, rel=FLOOR, abs=0.01 * kv_bytes)


def phases_of(traces: dict[Workload, Recording], **changes: Any) -> Phase:
    small = EXACT.small(tokens_of(EXACT))
    base = Case(EXACT, 0.5, 64, "lru", "none").settings(small)
    return replayed(traces[EXACT], KNOWN, **(base | changes))[-1]


@pytest.mark.slow
def test_time_is_what_the_profile_says(traces: dict[Workload, Recording]) -> None:
    small = EXACT.small(tokens_of(EXACT))
    base = Case(EXACT, 1.0, 64).settings(small)
    fast = replayed(traces[EXACT], KNOWN, **base)[-1]
    free = replace(KNOWN, step=0.0, layer=0.0, weights=1e18, flops=1e18, memory_copy=1e18)
    (first, *_) = steps = replayed(traces[EXACT], free, **base)[-1].steps
    tokens = small.tokens + validate.WARM + 1
    blocks = -(-tokens // 64) * 64
    assert first == pytest.approx(blocks * validate.SHAPE.token_bytes / 2.5e10, rel=1e-6)
    assert len(steps) == small.steps
    assert fast.tpot > first
    assert fast.waited == 0


@pytest.mark.slow
def test_more_memory_reads_less_and_a_slower_disk_takes_longer(traces: dict[Workload, Recording]) -> None:
    one = phases_of(traces)
    assert phases_of(traces, host_budget="16MiB").read_bytes < one.read_bytes
    assert phases_of(traces).as_dict() == one.as_dict(), "the same again is the same to the last digit"
    small = EXACT.small(tokens_of(EXACT))
    settings = Case(EXACT, 0.5, 64, "lru", "none").settings(small)
    slow = replace(KNOWN, ssd=tuple(replace(t, read=t.read / 10) for t in KNOWN.ssd))
    assert replayed(traces[EXACT], slow, **settings)[-1].tpot > 2 * one.tpot


def test_transfers_share_the_disk_and_a_batch_costs_once() -> None:
    """One alone is as fast as one may be; many share what many reach, and begin and end whenever they like."""
    rates = (Transfer(1 << 20, 1, 1e6, 1e6, 0.0), Transfer(1 << 20, 4, 2e6, 2e6, 0.0))
    known = replace(KNOWN, ssd=rates, load=0.5, digest=1e18)
    ended: dict[str, float] = {}

    def when(*jobs: tuple[str, float, int, bool]) -> dict[str, float]:
        loop, disk = virtual.VirtualLoop(), virtual.TimedDisk(known, 4)

        async def one(name: str, at: float, size: int, begins: bool) -> None:
            await asyncio.sleep(at)
            await disk.run(virtual.Transfer([size], None, write=False, begins=begins))
            ended[name] = loop.now

        async def work() -> None:
            await asyncio.gather(*(one(*job) for job in jobs))

        ended.clear()
        virtual.run(loop, work())
        return ended.copy()

    assert when(("a", 0.0, 1_000_000, False)) == pytest.approx({"a": 1.0})
    assert when(("a", 0.0, 1_000_000, True)) == pytest.approx({"a": 1.5})
    assert when(("a", 0.0, 1_000_000, False), ("b", 0.0, 1_000_000, False)) == pytest.approx({"a": 1.0, "b": 1.0})
    both = when(("a", 0.0, 2_000_000, False), ("b", 1.0, 500_000, False))
    assert both == pytest.approx({"a": 2.0, "b": 1.5}), "b shares for half a second, then a is alone again"
    assert len(when(*((f"{i}", 0.0, 1_000_000, False) for i in range(8)))) == 8


def test_what_cannot_be_replayed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"

    def trace(*lines: str) -> Recording:
        path.write_text("".join(line + "\n" for line in lines))
        return open_recording(path)

    exact = trace(HEAD, SHAPE, OWN, PUT, READ)
    with pytest.raises(ConfigError, match="recorded in exact mode"):
        replayed(exact, KNOWN, mode="sparse")
    with pytest.raises(BudgetTooSmall):
        replayed(exact, KNOWN, host_budget=1)
    many = trace(HEAD, SHAPE, OWN, PUT.replace("40, 1]", "40, 2]"), READ)
    with pytest.raises(ConfigError, match="2 sequences in a batch"):
        replayed(many, KNOWN)


def test_a_context_that_was_stored_is_read_from_disk(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    lines = [
        HEAD,
        SHAPE,
        OWN.replace("0, 0, 0]", "0, 1000, 1000]"),
        PUT.replace("40, 1]", "1, 1]"),
        READ.replace("40, 4", "1001, 4"),
    ]
    path.write_text("".join(line + "\n" for line in lines))
    (phase,) = replayed(open_recording(path), KNOWN)
    block = 256 * 16 * 4
    assert (phase.read_bytes, phase.touched.waited) == (4 * 2 * block, 3 * 2 * block)
    assert phase.touched.device == 2 * block, "the open block is a copy of the last one"


def test_simulate_takes_a_recorded_trace(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(line + "\n" for line in (HEAD, SHAPE, OWN, PUT, READ)))
    words = ("simulate", str(path), "--profile", str(written(tmp_path / "p.toml")))
    report = json.loads(call(*words, "--policy", "lru,scan", "--sweep", "block-tokens=16,32", "--json").stdout)
    assert [run["changes"] for run in report["runs"]] == [
        {"eviction": e, "block_tokens": b} for e in ("lru", "scan") for b in (16, 32)
    ]
    assert all(len(run["phases"]) == 1 and run["phases"][0]["hit_rate"] == 1 for run in report["runs"])
    assert "TPOT" in call(*words).stdout
    everything = json.loads(call(*words, "--policy", "all", "--json").stdout)["runs"]
    assert [run["changes"]["eviction"] for run in everything] == list(EVICTION)
    few = call(*words, "--sweep", "host-budget=1,1MiB").stdout
    assert ("too small" in few, "start" in few) == (True, True)
    assert "host budget of 1 bytes is too small" in " ".join(call(*words, "--host-memory", "1").stderr.split())
    for extra, message in (
        (("--sweep", "colour=red"), "no setting 'colour'"),
        (("--sweep", "block-tokens"), "cannot read the sweep"),
        (("--sweep", "block-tokens=x"), "cannot read 'x' as block_tokens"),
        (("--sweep", "prefetch=x"), "unknown prefetch 'x'"),
        (("--policy", "belady"), "unknown eviction 'belady'"),
    ):
        result = call(*words, *extra)
        assert (result.exit_code, message in " ".join(result.stderr.split())) == (2, True), result.stderr
    path.write_text(path.read_text()[:-4])
    assert "line 5" in " ".join(call(*words).stderr.split())


def test_probe_sees_every_step(tmp_path: Path) -> None:
    path, seen = tmp_path / "t.jsonl", []
    path.write_text("".join(line + "\n" for line in (HEAD, SHAPE, OWN, PUT, READ)))
    recording = open_recording(path)
    Replay(recording, recording.settings, KNOWN, lambda replay, part, read: seen.append(read.tokens)).run()
    assert seen == [40]


@pytest.mark.slow
def test_the_command_validates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(not case.fitted for case in validate.CASES) >= 10
    monkeypatch.setattr(validate, "CASES", (validate.CASES[0], validate.CASES[-1]))
    words = (
        "validate",
        "--profile",
        str(written(tmp_path / "p.toml")),
        "--tokens",
        "1024",
        "--only",
        "prompt",
        "--json",
    )
    report = json.loads(call(*words).stdout)
    assert [row["held_out"] for row in report["rows"]] == [True]
    assert {"tpot", "hit_rate", "ssd_bytes", "ttft"} == set(report["rows"][0]["errors"])
    assert "no workload" in call(*words[:-3], "--only", "nothing").stderr
