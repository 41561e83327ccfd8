"""Loads that are described: what they make, that a seed decides it, and what is wrong with bad ones."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from alaya_tiers.config import Settings
from alaya_tiers.errors import ConfigError, TraceError
from alaya_tiers.tools import load, loadsteps
from alaya_tiers.tools.events import Read, Skip, Skipped
from alaya_tiers.tools.profile import TYPICAL
from alaya_tiers.tools.recorded import open_recording
from alaya_tiers.tools.repeat import repeated
from alaya_tiers.tools.replay import Replay
from alaya_tiers.tools.shapes import NAMED, Shape
from alaya_tiers.tools.traces import Request
from tests.test_cli import call
from tests.test_record import HEAD, OWN, READ, SHAPE

SMALL = Shape("small", 2, 64, 4, 2, 32, 128, 100)

TEXT = """
requests = 400
block_tokens = 64
[arrivals]
process = "gamma"
rate = 2.0
cv = 3.0
[[category]]
name = "chat"
weight = 3
prompt = { median = 900, sigma = 0.7, most = 5000 }
output = { mean = 100 }
turns = { least = 2, most = 5 }
grow = 30
pause = { mean = 20 }
shared = { tokens = 256, prefixes = 2 }
[[category]]
name = "agent"
prompt = { least = 2000, most = 4000 }
turns = 8
pause = 5
tool = 1.0
"""


def made(path: Path, text: str = TEXT, seed: int = 0) -> list[Request]:
    path.write_text(text)
    return list(load.read(path).trace(seed).requests())


def plain(requests: list[Request]) -> list[tuple[float, int, int, list[int], bool, str]]:
    return [(r.time, r.tokens, r.output, r.blocks.tolist(), r.pause, r.category) for r in requests]


def test_a_described_load_is_what_the_file_says(tmp_path: Path) -> None:
    requests = made(tmp_path / "l.toml")
    assert len(requests) == 400
    assert [r.time for r in requests] == sorted(r.time for r in requests)
    chat = [r for r in requests if r.category == "chat"]
    agents = [r for r in requests if r.category == "agent"]
    assert 0.3 < len(chat) / 400 < 0.8, "three quarters of the conversations, but shorter ones"
    assert {int(r.blocks[0]) for r in chat} == {0, 1 << 32}, "two prefixes that conversations share"
    assert all((r.blocks[:4] == chat[0].blocks[:4]).all() for r in chat if r.blocks[0] == chat[0].blocks[0])
    assert all(r.blocks.size == r.tokens // 64 and np.unique(r.blocks).size == r.blocks.size for r in requests)
    conversations: dict[int, list[Request]] = {}
    for r in agents:
        conversations.setdefault(int(r.blocks[0]) >> 32, []).append(r)
    for turns in conversations.values():
        assert np.allclose(np.diff([r.time for r in turns]), 5)
        assert all(
            b.tokens > a.tokens and (b.blocks[: a.blocks.size] == a.blocks).all() for a, b in itertools.pairwise(turns)
        )
        assert [r.pause for r in turns[:7]] == [True] * len(turns[:7])
    assert max(map(len, conversations.values())) == 8


def test_the_seed_decides(tmp_path: Path) -> None:
    one = made(tmp_path / "l.toml", seed=1)
    assert plain(made(tmp_path / "l.toml", seed=1)) == plain(one)
    assert plain(made(tmp_path / "l.toml", seed=2)) != plain(one)


def test_a_load_may_last_so_long_instead(tmp_path: Path) -> None:
    requests = made(tmp_path / "l.toml", TEXT.replace("requests = 400", "seconds = 60"))
    assert requests
    assert requests[-1].time <= 60


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("requests = 400", "requests = 400\nseconds = 5", "either requests or seconds"),
        ("requests = 400", "", "either requests or seconds"),
        ("requests = 400", "requests = 0", "l.toml: requests must be an integer of at least 1, got 0"),
        ("requests = 400", "requests = ", "line 2"),
        ('"gamma"', '"often"', "arrivals: process must be poisson or gamma or even, got 'often'"),
        ("rate = 2.0", "rate = 0", "arrivals: rate must be"),
        ("rate = 2.0", "speed = 2.0", "nothing is called 'speed'"),
        ("cv = 3.0", "cv = nan", "cv must be"),
        ("prompt = { median = 900, sigma = 0.7, most = 5000 }", "", "category 1: prompt is missing"),
        ("median = 900,", "", "category 1: prompt: give a number, median and sigma"),
        ("least = 2, most = 5", "least = 6, most = 5", "category 1: turns: least 6 is above most 5"),
        ("grow = 30", "grow = -1", "category 1: grow must be a number of at least 0, got -1"),
        ("tool = 1.0", "tool = 2", "category 2: tool must be a number from 0 to 1, got 2"),
        ('name = "agent"', 'name = "chat"', "same name"),
        ("[[category]]\nname = \"agent\"", "[other]\na = 1", "nothing is called 'other'"),
        ("pause = 5", "pauses = 5", "nothing is called 'pauses'"),
        ("shared = { tokens = 256, prefixes = 2 }", "shared = 256", "shared must be a table"),
    ],
)  # fmt: skip
def test_bad_loads_are_refused_with_their_place(tmp_path: Path, old: str, new: str, problem: str) -> None:
    assert old in TEXT
    with pytest.raises(ConfigError, match=re.escape(problem)):
        made(tmp_path / "l.toml", TEXT.replace(old, new))


def test_a_file_must_describe_something(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="describes no load"):
        made(tmp_path / "l.toml", "requests = 3")
    with pytest.raises(ConfigError, match="cannot read a load"):
        load.read(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match=r"it has no \[\[category\]\]"):
        made(tmp_path / "l.toml", "[steps]\ncontext = 100\nfound = 3")


# ---------------------------------------------------------------------- steps
STEPS = """
[steps]
context = 4096
steps = 12
found = { least = 30, most = 60 }
drift = 0.25
run = 4
"""


def found(path: Path, text: str, seed: int = 0) -> list[Read]:
    path.write_text(text)
    settings = Settings(mode="sparse")
    events = loadsteps.recording(load.read(path), SMALL, settings, seed).events()
    return [event for event in events if isinstance(event, Read)]


def test_described_steps_drift_as_they_should(tmp_path: Path) -> None:
    reads = found(tmp_path / "s.toml", STEPS)
    assert len(reads) == 12 * SMALL.layers
    sets = [set(read.found[0].positions[0].tolist()) for read in reads if read.x == 0]
    assert all(0 < len(one) <= 60 for one in sets)
    kept = np.mean([len(a & b) / len(b) for a, b in itertools.pairwise(sets)])
    assert 0.6 < kept < 0.9, "a quarter is new"
    still = found(tmp_path / "s.toml", STEPS.replace("0.25", "0.0"))
    assert len({tuple(read.found[0].positions[0].tolist()) for read in still if read.x == 0}) == 1
    gaps = np.diff(sorted(sets[0]))
    assert np.count_nonzero(gaps == 1) > len(sets[0]) / 2, "keys lie in runs"


def test_described_steps_are_replayed(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(STEPS)
    words = ("simulate", str(tmp_path / "s.toml"), "--model", "llama-3.2-1b", "--host-memory", "64MiB", "--json")
    report = json.loads(call(*words, "--sweep", "device-budget=32MiB").stdout)
    decode = report["runs"][0]["phases"][-1]
    assert (decode["phase"], decode["steps"]) == ("decode", 12)
    assert 0 < decode["hit_rate"] <= 1
    assert json.loads(call(*words, "--sweep", "device-budget=32MiB").stdout)["runs"] == report["runs"]


def test_a_sample_of_the_steps_says_what_all_of_them_take(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(STEPS.replace("steps = 12", "steps = 300"))
    settings = Settings(mode="sparse", index_budget=None, device_budget=1 << 20, host_budget=1 << 20, block_tokens=64)
    made = loadsteps.recording(load.read(tmp_path / "s.toml"), SMALL, settings, 0)
    whole = Replay(made, settings, TYPICAL).run()[-1]
    some = Replay(made, settings, TYPICAL, sample=0.2).run()[-1]
    assert whole.confidence is None
    assert len(whole.steps) == some.as_dict()["steps"] == some.tokens == 300
    assert len(some.steps) < 100
    assert some.confidence is not None
    assert abs(np.mean(some.steps) - np.mean(whole.steps)) < 3 * some.confidence
    assert some.seconds == pytest.approx(whole.seconds, rel=0.1)
    assert some.hit_rate == pytest.approx(whole.hit_rate, abs=0.05)
    assert some.read_bytes == pytest.approx(whole.read_bytes, rel=0.25)
    assert 0 < whole.hit_rate < 1
    with pytest.raises(ConfigError, match="share of the steps"):
        Replay(made, settings, TYPICAL, sample=0)


def test_steps_of_a_file_are_passed_over_without_being_read(tmp_path: Path) -> None:
    lines = [HEAD, SHAPE, OWN, '{"put": [0, 9, 1], "t": 1.5}', READ]
    for step in range(6):
        lines += ['{"put": [0, 1, 1], "t": 1.5}', '{"read": [oh' if step in (2, 3) else READ]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    skip, got = Skip(), list[object]()
    for event in open_recording(path).events(skip):
        got.append(event)
        if isinstance(event, Read) and sum(isinstance(e, Read) for e in got) == 3:
            skip.steps = 2
    assert [e for e in got if isinstance(e, Skipped)] == [Skipped(2, ((0, 2),))]
    assert len([e for e in got if isinstance(e, Read)]) == 5
    with pytest.raises(TraceError, match="line 11"):
        list(open_recording(path).events())


# ---------------------------------------------------------------------- longer traces
def test_a_repeated_trace_has_new_blocks_and_other_times(tmp_path: Path) -> None:
    (tmp_path / "l.toml").write_text(TEXT.replace("requests = 400", "requests = 50"))
    trace = load.read(tmp_path / "l.toml").trace(0)
    once, thrice = list(trace.requests()), list(repeated(trace, 3, seed=5).requests())
    assert len(thrice) == 150
    assert [r.time for r in thrice] == sorted(r.time for r in thrice)
    assert 0.5 * 3 * once[-1].time < thrice[-1].time < 1.5 * 3 * once[-1].time
    assert [r.tokens for r in thrice] == 3 * [r.tokens for r in once]
    keys = [{k for r in thrice[i : i + 50] for k in r.blocks.tolist()} for i in (0, 50, 100)]
    assert not keys[0] & keys[1] | keys[1] & keys[2] | keys[0] & keys[2]
    assert plain(list(repeated(trace, 3, seed=5).requests())) == plain(thrice)
    with pytest.raises(ConfigError, match="repeated"):
        repeated(trace, 1 << 20)


def test_the_example_of_the_documentation_runs(root: Path, tmp_path: Path) -> None:
    text = (root / "docs" / "simulating.md").read_text()
    examples = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 3
    (tmp_path / "load.toml").write_text(examples[0].replace("requests = 20_000", "requests = 60"))
    (tmp_path / "shares.toml").write_text(examples[1])
    (tmp_path / "steps.toml").write_text(examples[2].replace("context = 131072", "context = 8192"))
    words = ("--model", "llama-3.2-1b", "--ssd", "256GiB", "--shares", str(tmp_path / "shares.toml"))
    result = call(
        "simulate", str(tmp_path / "load.toml"), *words, "--pause", "ttl:60,oracle", "--policy", "lru", columns=220
    )
    assert result.exit_code == 0, result.output
    assert all(word in result.stdout for word in ("of chat", "of agent", "ttl:60", "oracle", "price of 1M tokens"))
    assert NAMED["llama-3.2-1b"].layers == 16
    assert load.read(tmp_path / "steps.toml").steps is not None
