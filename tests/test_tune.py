"""The search for settings: against every point of small spaces, on recorded runs and on requests."""

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from alaya_tiers import AlayaCache, Settings
from alaya_tiers.errors import ConfigError
from alaya_tiers.tools import load, loadsteps, search, tune, validate
from alaya_tiers.tools.attending import Attending
from alaya_tiers.tools.hardware import Machine
from alaya_tiers.tools.prices import Prices
from alaya_tiers.tools.recorded import open_recording
from alaya_tiers.tools.search import Outcome, Point, Space, Target
from alaya_tiers.tools.shapes import NAMED
from alaya_tiers.tools.traces import open_trace
from alaya_tiers.tools.tune import OfRequests, OfRun
from alaya_tiers.tools.validate import EXACT, Case
from tests.test_cli import call
from tests.test_profile import KNOWN, written
from tests.test_traces import TRACES, chat

S = TypeVar("S", bound=OfRun | OfRequests)

SPACE: Space = {
    "memory": (1, 2, 4, 8, 16, 32, 64),
    "block": (16, 32, 64, 128, 256),
    "policy": ("a", "b", "c"),
    "ahead": (0, 1, 2, 3),
}


def made_up(point: Point) -> Outcome:
    """A machine with a best block size, where one policy is better; too little memory does not work."""
    if point["memory"] < point["block"] / 64:
        return Outcome(0.0, 0.0, missing="too small")
    misses = 1 / (1 + point["memory"] * {"a": 0.5, "b": 1.0, "c": 0.7}[point["policy"]])
    return Outcome(
        point["memory"], misses * (1 + abs(math.log2(point["block"] / 64)) / 4) + 0.01 * abs(point["ahead"] - 2)
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("target", [Target(seconds=0.1), Target(price=16)], ids=["cheapest", "fastest"])
def test_a_search_comes_within_5_percent_of_every_point(target: Target, seed: int) -> None:
    everything = search.best(search.exhaustive(SPACE, target, made_up))
    tried = search.search(SPACE, target, made_up, 100, seed)
    assert len({tuple(t.point.items()) for t in tried}) == len(tried) == 100
    found = search.best(tried)
    assert target.met(found.outcome)
    assert found.score <= 1.05 * everything.score
    again = search.search(SPACE, target, made_up, 100, seed)
    assert [t.point for t in again] == [t.point for t in tried], "the same seed, the same search"


def test_a_small_space_is_searched_whole_and_the_first_points_come_first() -> None:
    space = {"memory": (1, 2), "block": (64,), "policy": ("a", "b"), "ahead": (2,)}
    first = {"memory": 2, "block": 64, "policy": "a", "ahead": 2}
    tried = search.search(space, Target(price=9), made_up, 100, first=[first])
    assert (tried[0].point, len(tried)) == (first, 4)


def test_what_misses_the_target_is_worse_than_anything_that_meets_it() -> None:
    target = Target(seconds=1.0, quality=0.9)
    assert target.score(Outcome(100, 0.9)) < target.score(Outcome(10, 1.01))
    assert target.score(Outcome(10, 1.5)) < target.score(Outcome(10, 2.0)) < math.inf
    assert target.score(Outcome(10, 0.5, 0.89)) > target.score(Outcome(10, 0.5, 0.91))
    assert target.score(Outcome(0, 0, missing="x")) == math.inf
    assert [target.met(o) for o in (Outcome(1, 1), Outcome(1, 1, 0.8), Outcome(1, 2))] == [True, False, False]
    for bad in ({"seconds": 0}, {"price": -1}, {"quality": 2}):
        with pytest.raises(ConfigError):
            Target(**bad)


def test_the_front_holds_what_nothing_beats() -> None:
    points = [(1, 9), (2, 5), (2, 7), (3, 5), (4, 1), (9, 0)]
    trials = [search.Trial({"n": i}, Outcome(p, s), 0) for i, (p, s) in enumerate(points)]
    trials[-1] = replace(trials[-1], outcome=Outcome(9, 0, missing="no"))
    assert [t.point["n"] for t in search.front(trials)] == [0, 1, 4]


def remembering(subject: S) -> S:
    """The same, which simulates no point twice."""
    known: dict[tuple[Any, ...], Outcome] = {}
    evaluate = subject.evaluate

    def once(point: Point) -> Outcome:
        key = tuple(sorted(point.items()))
        if key not in known:
            known[key] = evaluate(point)
        return known[key]

    subject.evaluate = once  # type: ignore[method-assign]
    return subject


# ---------------------------------------------------------------------- recorded runs
@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, small = tmp_path_factory.mktemp("traces") / "t.jsonl", EXACT.small(1024)
    validate.engine(small, Case(EXACT, 0.25, 128).settings(small), path)
    return path


class Small(OfRun):
    """Few enough points to try them all."""

    def space(self) -> Space:
        return dict(super().space()) | {
            "host": (0.125, 0.25, 0.5, 1.0), "block_tokens": (64, 128), "prefetch": ("none", "next"),
            "prefetch_share": (0.25,), "segment_tokens": (8192,), "dirty_limit": (0.5,), "batch_bytes": (8 << 20,),
            "eviction": ("lru", "scan"),
        }  # fmt: skip


@pytest.mark.slow
def test_on_a_recorded_run_it_comes_within_5_percent_too(trace: Path) -> None:
    subject = remembering(Small([open_recording(trace)], KNOWN, Prices()))
    usual = subject.evaluate(subject.default())
    target = Target(price=usual.price * 1.01)
    everything = search.exhaustive(subject.space(), target, subject.evaluate)
    found = search.best(tune.tuned(subject, target, 16, seed=1))
    assert found.score <= 1.05 * search.best(everything).score
    assert found.outcome.seconds <= usual.seconds


@pytest.mark.slow
def test_a_cache_loads_what_the_command_wrote(trace: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "s.toml", tmp_path / "f.png"
    words = ["tune", str(trace), "--profile", str(written(tmp_path / "p.toml")), "--trials", "6", "-o", str(out)]
    if importlib.util.find_spec("matplotlib") is not None:
        words += ["--plot", str(plot)]
    result = call(*words, "--tpot", "1s", columns=200)
    assert result.exit_code == 0, result.output
    assert "best" in result.stdout
    assert "defaults" in result.stdout
    assert plot.exists() == ("--plot" in words)
    settings = Settings.from_toml(out)
    with AlayaCache(settings=settings):
        pass
    report = json.loads(call(*words, "--tpot", "1s", "--json").stdout)
    assert report["best"]["met"] is True
    assert report["best"]["price"] <= report["default"]["price"]
    assert Settings.from_dict(report["best"]["settings"]) == settings
    missed = call(*words, "--tpot", "0.01ms")
    assert (missed.exit_code, "none meets the target" in missed.stdout) == (1, True)


test_a_cache_loads_what_the_command_wrote = pytest.mark.leaks("matplotlib keeps its fonts open")(
    test_a_cache_loads_what_the_command_wrote
)


def test_the_kv_of_a_run_is_counted_without_its_forks(trace: Path) -> None:
    tokens = EXACT.small(1024).tokens + validate.WARM + 8
    assert tune._kv_bytes(open_recording(trace)) == tokens * validate.SHAPE.token_bytes


STEPS = """
[steps]
context = 8192
steps = 12
layers = 2
found = { median = 40, sigma = 0.8 }
drift = 0.2
run = 3
"""


class Sparse(OfRun):
    """Few enough points to try them all; segments, pages and guesses are among what is chosen."""

    def space(self) -> Space:
        return dict(super().space()) | {
            "host": (0.125, 0.5), "block_tokens": (128, 256), "eviction": ("lru", "scan"),
            "segment_tokens": (2048, 8192),
            "prefetch_share": (0.25,), "page_share": (0.0, 0.75), "guess": ("none", "confident"),
            "dirty_limit": (0.5,), "batch_bytes": (8 << 20,),
        }  # fmt: skip


@pytest.mark.slow
def test_pages_and_guesses_are_searched_too(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(STEPS)
    settings = Settings(mode="sparse", index_budget=None, device_budget=4 << 20, host_budget=8 << 20)
    made = loadsteps.recording(load.read(tmp_path / "s.toml"), NAMED["llama-3.2-1b"], settings, 0)
    space = OfRun([made], KNOWN, Prices()).space()
    assert {"segment_tokens", "page_share", "guess", "prefetch_share"} <= set(space)
    assert "query" not in space["guess"]  # a trace has none
    subject = remembering(Sparse([made], KNOWN, Prices()))
    usual = subject.evaluate(subject.default())
    target = Target(price=usual.price * 1.01)
    everything = search.exhaustive(subject.space(), target, subject.evaluate)
    found = search.best(tune.tuned(subject, target, 24, seed=1))
    assert found.score <= 1.05 * search.best(everything).score
    assert found.outcome.seconds <= usual.seconds
    written = Settings.from_dict(subject.file(found.point))
    guess = found.point["guess"] if found.point["page_share"] else "none"
    assert (written.page_share, written.guess) == (found.point["page_share"], guess)


def test_guesses_by_a_query_cannot_be_replayed() -> None:
    nothing: Any = None
    with pytest.raises(ConfigError, match="no queries"):
        Attending(nothing, Settings(mode="sparse", guess="query"), nothing, nothing, None)


# ---------------------------------------------------------------------- requests
class Few(OfRequests):
    """Few enough points to try them all."""

    def space(self) -> Space:
        return dict(super().space()) | {"slack": (0.01,), "dirty_limit": (0.25, 0.5)}


def test_requests_are_tuned_for_their_first_tokens(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(chat(i * 3000, 2048, [i % 5 * 4 + j for j in range(4)]) + "\n" for i in range(80)))
    machine = Machine(device_memory=1 << 28, host_memory=1 << 29, ssd=1 << 33)
    subject = remembering(Few(open_trace([path]), NAMED["llama-3.1-8b"], machine, Prices(), None))
    fastest = search.best(search.exhaustive(subject.space(), Target(), subject.evaluate)).outcome.seconds
    target = Target(seconds=1.05 * fastest)
    everything = search.exhaustive(subject.space(), target, subject.evaluate)
    found = search.best(tune.tuned(subject, target, 40, seed=0))
    assert found.score <= 1.05 * search.best(everything).score
    assert found.score < target.score(subject.evaluate(subject.default()))
    assert Settings.from_dict(subject.file(found.point)).eviction == found.point["eviction"]


@pytest.mark.skipif(not TRACES.is_dir(), reason="no traces")
@pytest.mark.slow
def test_both_families_of_traces_gain(tmp_path: Path) -> None:
    """Clearly ahead of the defaults: at no higher price, first tokens come a quarter sooner at least."""
    for name, limit in (("mooncake_conversation.jsonl.xz", 500), ("coding_agents.tar.xz", 250)):
        machine = Machine(device_memory=2 << 30, host_memory=4 << 30, ssd=24 << 30, servers=2)
        subject = OfRequests(open_trace([TRACES / name]), NAMED["llama-3.2-1b"], machine, Prices(), limit)
        usual = subject.evaluate(subject.default())
        found = search.best(tune.tuned(subject, Target(price=usual.price), 12, seed=0))
        assert found.outcome.price <= usual.price
        assert found.outcome.seconds < 0.75 * usual.seconds, name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tpot", "fast"), "cannot read 'fast' as --tpot"),
        (("--ttft", "1s"), "recorded run has --tpot"),
        (("--prices", "host"), "cannot read the price"),
        (("--prices", "tape=1"), "nothing called 'tape'"),
        (("--prices", "host=-1"), "at least 0"),
        (("--quality", "3"), "a share from 0 to 1"),
        (("--plot", "nowhere/front.png"), "nowhere is not a directory"),
        (("-o", "nowhere/settings.toml"), "nowhere is not a directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_requests_say_what_is_wrong(trace: Path, words: tuple[str, ...], message: str) -> None:
    result = call("tune", str(trace), *words)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_without_optuna_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else real(name))
    with pytest.raises(ConfigError, match="alaya-tiers\\[tune\\]"):
        search.search(SPACE, Target(), made_up, 1)
