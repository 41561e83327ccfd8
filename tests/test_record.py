"""Recorded runs: what is written is what happened, and what is read again is checked line by line."""

import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alaya_tiers import DB, AlayaCache, Settings
from alaya_tiers.cache import Session, Visible
from alaya_tiers.engine import Engine
from alaya_tiers.errors import ConfigError, TraceError
from alaya_tiers.tools import recorded
from alaya_tiers.tools.events import Asked, Built, Cut, Event, Fork, Mark, Own, Put, Read
from tests.test_cli import call
from tests.tiny import tiny

HEADS, GROUP, DIM, BLOCK = 2, 2, 16, 16


def session(**settings: Any) -> Session:
    base = {
        "device_budget": "1MiB",
        "host_budget": "1MiB",
        "block_tokens": BLOCK,
        "sink_tokens": 16,
        "recent_tokens": 16,
    }
    return Session(Engine(Settings.from_dict(base | settings)))


def keys(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    make = torch.Generator().manual_seed(3)
    k, v = torch.randn(2, 1, HEADS, tokens, DIM, generator=make)
    return k, v


def events(path: Path, kind: type[Event] | None = None) -> list[Any]:
    return [e for e in recorded.open_recording(path).events() if kind is None or isinstance(e, kind)]


def test_a_run_is_written_down_in_order(tmp_path: Path) -> None:
    path, model = tmp_path / "t.jsonl", tiny()
    with AlayaCache.for_model(model, device_budget="1MiB", host_budget="1MiB", block_tokens=16) as cache:
        model(input_ids=torch.arange(20)[None], past_key_values=cache)
        with cache.record(path) as recorder:
            recorder.mark("decode")
            model(input_ids=torch.tensor([[1]]), past_key_values=cache)
            fork = copy.deepcopy(cache)
            model(input_ids=torch.tensor([[2, 3]]), past_key_values=fork)
            cache.crop(-5)
            fork.reset()
            model(input_ids=torch.tensor([[4]]), past_key_values=cache)
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    model.set_attn_implementation("sdpa")
    layers = model.config.num_hidden_layers
    found = recorded.open_recording(path)
    assert found.settings.block_tokens == 16
    assert found.shape is not None
    assert (found.shape.layers, found.shape.kv_heads) == (layers, model.config.num_key_value_heads)
    assert [(e.name, e.time >= 0) for e in events(path, Mark)] == [("decode", True)]
    owns = events(path, Own)
    assert [(o.x, o.session, o.layer, o.tokens, o.stored) for o in owns[:layers]] == [
        (i, 0, i, 20, 0) for i in range(layers)
    ]
    assert sorted((e.x, e.y) for e in events(path, Fork)) == [(layers + i, i) for i in range(layers)]
    assert {o.session for o in owns[layers:]} == {1}
    assert [(e.x, e.tokens) for e in events(path, Put)] == [
        *((i, 1) for i in range(layers)), *((layers + i, 2) for i in range(layers)), *((i, 1) for i in range(layers))
    ]  # fmt: skip
    cuts = events(path, Cut)
    assert [(c.x, c.tokens) for c in cuts[:layers]] == [(i, 16) for i in range(layers)]
    assert {(c.x, c.tokens) for c in cuts[layers:]} == {(layers + i, 0) for i in range(layers)}
    reads = events(path, Read)
    assert [(r.x, r.queries, r.tokens) for r in reads] == [
        *((i, 1, 21) for i in range(layers)), *((layers + i, 2, 23) for i in range(layers)),
        *((i, 1, 17) for i in range(layers)),
    ]  # fmt: skip
    assert all(r.seconds > 0 and not r.found for r in reads)


def test_what_heads_found_is_written_exactly(tmp_path: Path) -> None:
    """With no error allowed for that is not there, every key within reach, and none that is far below."""
    one = session(mode="sparse", alpha=0.02, index_bits=8, index_sure=0.0, read_rate=1e6)  # reading all is dear
    tokens, alpha = 640, 0.02
    k, v = keys(tokens)
    one.update(0, k, v)
    one.build_index()
    q = 3 * torch.randn(1, HEADS * GROUP, 1, DIM, generator=torch.Generator().manual_seed(4))
    with one.record(tmp_path / "t.jsonl"):
        one.build_index()
        one.attention(0, q, [Visible.all(tokens, 1)], DIM**-0.5)
    one.engine.close()
    assert events(tmp_path / "t.jsonl", Built) == [], "the layer was not used yet"
    (read,) = events(tmp_path / "t.jsonl", Read)
    (step,) = read.found
    assert (step.window, step.tokens, step.queries) == (32, tokens, GROUP)
    assert sorted(step.heads + step.flat) == [0, 1]
    assert len(step.heads) > 0, "nothing was tested"
    assert 0 < step.mass <= 1
    for head, positions in zip(step.heads, step.positions, strict=True):
        scores = q[0].view(HEADS, GROUP, DIM)[head] @ k[0, head].T * DIM**-0.5
        reach = scores.max(1, keepdim=True).values + np.log(alpha)
        middle = torch.zeros(tokens, dtype=torch.bool)
        middle[16 : tokens - 16] = True
        within = ((scores >= reach).any(0) & middle).nonzero()[:, 0].numpy()
        assert np.isin(within, positions).all()
        assert (scores[:, torch.from_numpy(positions)] >= reach - 1.0).any(0).all()


def test_requests_keep_hashes_of_their_prefix_and_no_words(tmp_path: Path) -> None:
    one = session()
    with one.record(tmp_path / "t.jsonl") as recorder:
        ids = np.arange(200)
        recorder.request(ids, 64)
        recorder.request(np.concatenate([ids[:130], [7] * 70]), 128)
        one.update(0, *keys(4))
        one.attention(0, torch.ones(1, HEADS * GROUP, 1, DIM), [Visible.all(4, 1)], 1.0)
    one.engine.close()
    first, second = events(tmp_path / "t.jsonl", Asked)
    assert (first.tokens, first.reused, len(first.blocks), len(set(first.blocks))) == (200, 64, 3, 3)
    assert first.blocks[:2] == second.blocks[:2]
    assert first.blocks[2] != second.blocks[2]


def test_a_trace_is_refused_where_it_cannot_be_written_or_is_written_already(tmp_path: Path) -> None:
    one = session()
    with pytest.raises(ConfigError, match="cannot write a trace"), one.record(tmp_path / "no" / "t.jsonl"):
        pass
    with (
        one.record(tmp_path / "a.jsonl"),
        pytest.raises(ConfigError, match="recorded already"),
        one.record(tmp_path / "b.jsonl"),
    ):
        pass
    assert one.engine.recorder is None
    one.engine.close()


# ---------------------------------------------------------------------- reading
HEAD = json.dumps({"alaya_tiers_trace": 1, "version": "0", "settings": {}, "model": None})
SHAPE = '{"shape": 0, "kv_heads": 2, "k_dim": 8, "v_dim": 8, "dtype": "float32"}'
OWN = '{"own": [0, 0, 0, 0, 0]}'
PUT = '{"put": [0, 40, 1], "t": 1.0}'
FOUND = (
    '{"found": [0, 0, 2, 8, 40], "heads": [1], "flat": [0], "n": [2], "first": [9], "bytes": 2, "gaps": "AAADAA==", '
    '"mass": 0.9}'
)
READ = '{"read": [0, 1, 40, 4], "t": 1.5, "s": 0.01}'
WHOLE = [HEAD, SHAPE, OWN, PUT, FOUND, READ]


def test_a_trace_is_read_plain_and_packed(tmp_path: Path) -> None:
    text = "\n".join(WHOLE) + "\n"
    (tmp_path / "t.jsonl").write_text(text)
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    plain = events(tmp_path / "t.jsonl")
    assert [type(e).__name__ for e in plain] == ["Layer", "Own", "Put", "Read"]
    assert plain[-1].found[0].positions[0].tolist() == [9, 12]
    assert [str(e) for e in plain] == [str(e) for e in events(tmp_path / "t.jsonl.gz")]
    assert recorded.is_recording(tmp_path / "t.jsonl")


def test_every_scan_of_a_step_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    best = FOUND.replace('"n":', '"looked": [1, 0], "best": [[9], [3, 30]], "n":')
    look = '{"look": [0], "heads": [1], "best": [[9]], "n": [1], "first": [9], "bytes": 2, "gaps": "AAA="}'
    for lines, wanted in (
        ([FOUND], [((1,), [], [[9, 12]])]),
        ([best], [((1, 0), [[9], [3, 30]], [[9, 12], []])]),
        ([look, look, FOUND], [((1,), [[9]], [[9]])] * 2),
    ):
        path.write_text("\n".join([HEAD, SHAPE, OWN, PUT, *lines, READ]) + "\n")
        (step,) = events(path)[-1].found
        told = [(one.heads, [b.tolist() for b in one.best], [p.tolist() for p in one.positions]) for one in step.looks]
        assert told == wanted
    for bad, message in (
        (look.replace("[[9]]", "[]"), "best must be"), (look.replace("[[9]]", "[[-9]]"), "best must be"),
        (look.replace('"heads": [1]', '"heads": [7]'), "head 7"), (look.replace('"look": [0]', '"look": [5]'), "never"),
        (best.replace("[1, 0]", "[1, 2]"), "head 2"),
    ):  # fmt: skip
        path.write_text(f"{HEAD}\n{SHAPE}\n{OWN}\n{PUT}\n{bad}\n{READ}\n")
        with pytest.raises(TraceError, match=message):
            events(path)


def changed(line: int, old: str, new: str) -> Callable[[list[str]], list[str]]:
    def change(lines: list[str]) -> list[str]:
        assert old in lines[line - 1]
        return [*lines[: line - 1], lines[line - 1].replace(old, new), *lines[line:]]

    return change


@pytest.mark.parametrize(
    ("spoil", "line", "message"),
    [
        pytest.param(lambda t: [], 1, "empty", id="empty"),
        pytest.param(changed(1, "alaya_tiers_trace", "other"), 1, "first line", id="other file"),
        pytest.param(changed(1, '_trace": 1', '_trace": 7'), 1, "version 7", id="newer"),
        pytest.param(changed(1, '"settings": {}', '"settings": {"colour": 1}'), 1, "colour", id="settings"),
        pytest.param(lambda t: t[:1], 1, "no attention", id="nothing happened"),
        pytest.param(lambda t: [*t[:3], "{"], 4, "no JSON: Expecting", id="no JSON"),
        pytest.param(lambda t: [*t[:3], "[]"], 4, "JSON object", id="no object"),
        pytest.param(lambda t: [*t[:3], '{"gets": 1}'], 4, "unknown event 'gets'", id="unknown"),
        pytest.param(lambda t: [t[0], *t[2:]], 2, "shape of layer 0", id="no shape"),
        pytest.param(lambda t: [*t[:2], *t[3:]], 3, "never made", id="no owner"),
        pytest.param(changed(4, "40, 1", "-4, 1"), 4, "at least 0", id="negative"),
        pytest.param(changed(4, "40, 1", "40"), 4, "3 integers", id="too few"),
        pytest.param(changed(6, '"t": 1.5', '"t": NaN'), 6, "t must be a number", id="nan"),
        pytest.param(changed(4, '"t": 1.0', '"t": 9.0'), 6, "out of order", id="unordered"),
        pytest.param(changed(5, '"heads": [1]', '"heads": [2]'), 5, "2 kv heads", id="head"),
        pytest.param(changed(5, '"gaps": "AAADAA=="', '"gaps": "AAAD"'), 5, "buffer size", id="cut gaps"),
        pytest.param(changed(5, '"gaps": "AAADAA=="', '"gaps": "%%"'), 5, "base64", id="no base64"),
        pytest.param(changed(5, '"n": [2]', '"n": [1]'), 5, "1 were found", id="count"),
        pytest.param(changed(5, '"first": [9]', '"first": [39]'), 5, "beyond", id="beyond"),
        pytest.param(changed(5, "AAADAA==", "AAAAAA=="), 5, "out of order", id="same key twice"),
        pytest.param(changed(6, '"s": 0.01', '"z": 0.01'), 6, "'s' is missing", id="no seconds"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(
    tmp_path: Path, spoil: Callable[[list[str]], list[str]], line: int, message: str
) -> None:
    path = tmp_path / "t.jsonl"
    lines = spoil(WHOLE)
    path.write_text("".join(one + "\n" for one in lines))
    with pytest.raises(TraceError, match=message) as caught:
        events(path)
    assert caught.value.line == line
    assert str(path) in str(caught.value)


def test_a_run_that_was_stopped_leaves_a_line_that_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("\n".join(WHOLE)[:-3])
    with pytest.raises(TraceError, match="cut off") as caught:
        events(tmp_path / "t.jsonl")
    assert caught.value.line == 6
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress("\n".join(WHOLE).encode())[:-9])
    with pytest.raises(TraceError, match="to its end"):
        events(tmp_path / "t.jsonl.gz")


@pytest.mark.slow
def test_the_command_records_the_demo(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    words = ("record", "-o", str(path), "--tokens", "3000", "--questions", "2", "--answer-tokens", "3", "--json")
    result = call(*words, "--block-tokens", "32")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["tokens"], report["answered"], report["trace_bytes"]) == (3000, 6, path.stat().st_size)
    assert [e.name for e in events(path, Mark)] == ["prefill", "decode"]
    assert any(read.found for read in events(path, Read))
    assert len(events(path, Built)) == len(events(path, Fork)) // 2 == 2
    refused = call("record", "-o", str(path), "--mode", "other")
    assert (refused.exit_code, "unknown mode" in refused.stderr) == (2, True)


def test_a_database_records_prompts_and_what_came_from_disk(tmp_path: Path) -> None:
    model, ids = tiny(), torch.arange(150)[None] % 60
    model.set_attn_implementation("alaya")
    settings = Settings(device_budget=1 << 20, host_budget=1 << 20, block_tokens=16, segment_tokens=64)
    with DB(tmp_path / "db", settings, model=model) as db:
        cache, _ = db.create_session(ids)
        model(input_ids=ids, past_key_values=cache)
        db.store(cache)
    with DB(tmp_path / "db", settings, model=model) as db, db.record(tmp_path / "t.jsonl"):
        longer = torch.cat([ids, ids[:, :10]], 1)
        again, rest = db.create_session(longer)
        assert rest.shape[1] < 20
        model(input_ids=rest, past_key_values=again)
    (asked,) = events(tmp_path / "t.jsonl", Asked)
    assert (asked.tokens, asked.reused, len(asked.blocks)) == (160, 160 - rest.shape[1], 2)
    first, *others = events(tmp_path / "t.jsonl", Own)
    assert asked.reused <= first.stored < asked.reused + 16, "all of it came from disk"
    assert all(own.tokens == asked.reused for own in others), "these may have been read ahead"
