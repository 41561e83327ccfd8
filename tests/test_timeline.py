"""bench timeline: what a step is split into, by hand and from a cache."""

import json
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alaya_tiers import looking
from alaya_tiers.tools import cli, timeline
from alaya_tiers.tools.baselines import Shape
from alaya_tiers.tools.spans import (
    ATTENTION,
    FORWARD,
    INDEX,
    READ,
    SESSION,
    STEP,
    WAIT,
    Span,
    Split,
    Timeline,
    length,
    union,
)

TINY = Shape(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16)


def test_stretches_that_overlap_count_once() -> None:
    assert union([(3, 4), (0, 2), (1, 2.5)]) == [(0, 2.5), (3, 4)]
    assert length(union([(0, 2), (1, 3), (5, 6)])) == 4


def test_a_step_is_model_attention_index_and_waiting() -> None:
    seen = Timeline()
    seen.spans += [
        Span(ATTENTION, FORWARD, 1, 6),
        Span(INDEX, FORWARD, 2, 3),
        Span(WAIT, FORWARD, 4, 5),
        Span(READ, "alaya-io_0", 3.5, 5),
        Span(READ, "alaya-io_1", 0, 1),
        Span(READ, "alaya-io_1", 9, 12),  # goes on after the step
        Span(WAIT, FORWARD, 20, 30),
    ]
    split = seen.split(Span(STEP, FORWARD, 0.5, 10))
    assert split.total == 9.5
    assert (split.waited, split.index, split.attention) == (1, 1, 3)
    assert (split.model, split.compute) == (4.5, 7.5)
    assert split.total == split.compute + split.index + split.waited
    assert split.hidden == 0.5 + 0.5 + 1, "of reading, what is outside of the wait and inside of the step"


def test_what_waits_inside_of_a_scan_is_waiting_and_other_threads_hold_nobody_up() -> None:
    seen = Timeline()
    seen.spans += [
        Span(INDEX, FORWARD, 0, 4),
        Span(WAIT, FORWARD, 1, 2),
        Span(INDEX, "alaya-loop", 5, 6),
        Span(READ, "alaya-codes", 3, 5),
        Span(SESSION, FORWARD, 3.5, 5),
    ]
    split = seen.split(Span(STEP, FORWARD, 0, 8))
    assert (split.index, split.waited, split.attention, split.hidden, split.model) == (3, 1, 0, 2, 3)
    assert (split.session, split.compute) == (1, 4)
    assert Split.mean([split, Split(0, 0, 0, 0, 0, 1, 0, 0)]).index == 2


def test_what_the_forward_reads_itself_it_waits_for() -> None:
    seen = Timeline()
    seen.note(READ, lambda: None)
    thread = threading.Thread(target=seen.note, args=(READ, lambda: None), name="alaya-codes")
    thread.start()
    thread.join()
    assert [(s.what, s.lane) for s in seen.spans] == [(WAIT, FORWARD), (READ, "alaya-codes")]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "sparse"])
def test_everything_is_seen_and_put_back(tmp_path: Path, mode: str) -> None:
    scan = vars(looking)["scan"]
    found = timeline.run(TINY, 16_384, 8.0, 4, mode, 3.0, str(tmp_path), None)
    assert vars(looking)["scan"] is scan
    whats = {s.what for s in found.spans}
    assert {STEP, ATTENTION, WAIT, READ} <= whats
    assert (INDEX in whats) == (mode == "sparse")
    assert {s.lane for s in found.spans if s.what == READ} <= {f"alaya-io_{i}" for i in range(4)}
    assert sum(s.what == ATTENTION for s in found.spans) == 2 * 4
    for split in found.steps:
        assert split.total == pytest.approx(split.model + split.attention + split.index + split.waited)
        assert min(split.model, split.attention, split.index, split.waited, split.hidden) >= 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.leaks("matplotlib keeps the files of its fonts open")
def test_the_command_draws_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sizes = ["--layers", "2", "--hidden", "64", "--heads", "4", "--kv-heads", "2", "--head-dim", "16"]
    files = ["--json", str(tmp_path / "t.json"), "--plot", str(tmp_path / "t.png")]
    done = CliRunner().invoke(
        cli.app, ["bench", "timeline", "--context", "2K", "--steps", "2", *sizes, *files, "--dir", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    assert "was hidden" in done.output
    assert len(json.loads((tmp_path / "t.json").read_text())["steps"]) == 2
    assert (tmp_path / "t.png").stat().st_size > 1000
    assert CliRunner().invoke(cli.app, ["bench", "timeline", "--times", "0"]).exit_code == 2
