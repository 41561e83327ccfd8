"""Readers of request traces and shapes of models."""

import gc
import io
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from alaya_tiers.errors import ConfigError, TraceError, UnsupportedModel
from alaya_tiers.tools.shapes import NAMED, shape_of
from alaya_tiers.tools.traces import Request, open_trace

TRACES = Path(__file__).parents[2] / "shared" / "data" / "traces"


def chat(time: float, tokens: int, ids: Any, output: int = 5) -> str:
    return json.dumps({"timestamp": time, "input_length": tokens, "output_length": output, "hash_ids": ids})


def session(*requests: Any, block: int = 64) -> str:
    return json.dumps({"block_size": block, "requests": requests}, indent=1)


def ask(time: float, tokens: int, ids: Any, stop: str = "") -> dict[str, Any]:
    return {"t": time, "in": tokens, "out": 7, "hash_ids": ids, "stop": stop}


def archive(path: Path, *sessions: str) -> Path:
    with tarfile.open(path, "w:xz") as tar:
        for i, text in enumerate(sessions):
            member = tarfile.TarInfo(f"traces/{i}.json")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


def listed(*paths: Path, **options: Any) -> list[tuple[float, int, int, list[int], bool]]:
    return [(*r[:3], r.blocks.tolist(), r.pause) for r in open_trace(list(paths), **options).requests()]


def test_chat_requests_are_read_plain_and_packed(tmp_path: Path) -> None:
    lines = "\n".join([chat(0, 600, [0, 1]), chat(1500, 1024, [0, 2]), chat(1500, 3, [4])]) + "\n"
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.xz"
    plain.write_text(lines)
    packed.write_bytes(lzma.compress(lines.encode()))
    expected = [(0.0, 600, 5, [0, 1], False), (1.5, 1024, 5, [0, 2], False), (1.5, 3, 5, [4], False)]
    assert listed(plain) == listed(packed) == expected
    assert open_trace([plain]).block_tokens == 512
    both = listed(plain, packed)
    assert [r[0] for r in both] == [0, 0, 1.5, 1.5, 1.5, 1.5]
    assert both[1][3] == [1 << 32, (1 << 32) + 1], "ids of another file mean something else"


def test_sessions_of_agents_overlap_and_keep_their_ids_apart(tmp_path: Path) -> None:
    inner = {"type": "subagent", "t": 1.0, "requests": [ask(0.5, 64, [9]), ask(3.0, 64, [9])]}
    first = session(ask(0, 130, [1, 2], "tool_use"), inner, ask(2.0, 130, [1, 2]), ask(5000, 0, []))
    path = archive(tmp_path / "a.tar.xz", first, session(ask(0, 64, [1]), ask(1e6, 64, [1])))
    found = listed(path, session_gap=1e-3, seed=1)
    assert open_trace([path]).block_tokens == 64
    assert [r[3] for r in found] == [[1, 2], [(1 << 32) + 1], [9], [1, 2], [9], [(1 << 32) + 1]]
    assert [r[0] for r in found if r[3][0] < 1 << 32] == [0, 1.5, 2, 4]
    assert [r[4] for r in found] == [True, False, False, False, False, False]
    assert listed(path, seed=3) == listed(path, seed=3) != listed(path, seed=4)
    single = tmp_path / "one.json"
    single.write_text(first)
    assert [r[0] for r in listed(single)] == [0, 1.5, 2, 4]


@pytest.mark.parametrize(
    ("third", "problem"),
    [
        ('{"timestamp": 1', "no JSON: Expecting"),
        ("[]", "JSON object"),
        ('{"timestamp": 1}', "input_length, output_length, hash_ids is missing"),
        (chat(1999, 600, [0]), "0.001 s before"),
        (chat(-1, 600, [0]), "timestamp must be"),
        (chat(float("nan"), 600, [0]), "timestamp must be"),
        (chat(3000, 0, []), "input_length must be"),
        (chat(3000, 600, [0], output=-1), "output_length must be"),
        (chat(3000, 600, [0, "x"]), "hash_ids must be"),
        (chat(3000, 600, [0, -4]), "hash_ids must be"),
        (chat(3000, 600, [0, 1 << 40]), "hash_ids must be"),
        (chat(3000, 600, 5), "hash_ids must be"),
        (chat(3000, 512, [0, 1]), "more than the prompt"),
        ("", "Expecting"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, third: str, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([chat(0, 600, [0, 1]), chat(2000, 600, [0]), third, chat(4000, 9, [0])]))
    with pytest.raises(TraceError, match=problem) as caught:
        listed(path)
    assert (caught.value.path, caught.value.line) == (str(path), 3)
    assert f"{path}, line 3: " in str(caught.value)


def test_bad_sessions_are_named(tmp_path: Path) -> None:
    good = session(ask(0, 64, [1]))
    for bad, problem, line in (
        ('{\n "requests": [\n  nonsense]}', "line 3", 3),
        ('{"requests": []}', "block_size is missing", None),
        (session(ask(0, 64, [1]), ask(5, 64, [1]), ask(4, 64, [1])), "request 3: it comes 1 s before", None),
        (session(ask(0, 64, [1]), {"t": 1, "in": 5}), "request 2: out, hash_ids is missing", None),
        (session(7), "request 1: expected a JSON object", None),
        (session({"type": "subagent", "t": 0, "requests": [3]}), "request 1: expected", None),
        (session({"type": "subagent", "t": 0, "requests": 3}), "request 1: requests must be a list", None),
    ):
        with pytest.raises(TraceError, match=problem) as caught:
            listed(archive(tmp_path / "a.tar.xz", good, bad))
        assert caught.value.path.endswith("a.tar.xz:traces/1.json")
        assert caught.value.line == line
    with pytest.raises(ConfigError, match="blocks of 32"):
        listed(archive(tmp_path / "b.tar.xz", good, session(ask(0, 64, [1]), block=32)))


def test_files_that_are_empty_cut_short_or_of_no_known_kind(tmp_path: Path) -> None:
    text = "".join(
        chat(i, 600, list(np.random.default_rng(i).integers(1 << 30, size=2).tolist())) + "\n" for i in range(999)
    )
    cut = tmp_path / "cut.jsonl.xz"
    cut.write_bytes(lzma.compress(text.encode())[:-2000])
    with pytest.raises(TraceError, match="cannot be read to its end"):
        listed(cut)
    whole = archive(tmp_path / "cut.tar.xz", session(*(ask(i, 64, [i]) for i in range(999)))).read_bytes()
    (tmp_path / "cut.tar.xz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TraceError, match="cannot be read to its end"):
        listed(tmp_path / "cut.tar.xz")
    (tmp_path / "none.jsonl").write_text("")
    for empty in (tmp_path / "none.jsonl", archive(tmp_path / "none.tar.xz"), tmp_path / "missing.jsonl"):
        with pytest.raises(TraceError, match=r"no request|cannot be read"):
            listed(empty)
    for paths, options, problem in (
        (["a.csv"], {}, "cannot tell the format"),
        (["a.jsonl", "a.json"], {}, "one format"),
        (["a.jsonl"], {"form": "csv"}, "unknown format"),
        (["a.json"], {"session_gap": 0.0}, "gap"),
    ):
        with pytest.raises(ConfigError, match=problem):
            listed(*map(Path, paths), **options)


def test_a_long_trace_is_never_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join(chat(i, 600, [i, i + 1]) + "\n" for i in range(5000)))
    most = 0
    for i, _ in enumerate(open_trace([path]).requests()):
        if i % 1000 == 999:  # what a list of all would show
            most = max(most, sum(type(one) is Request for one in gc.get_objects()))
    assert 0 < most < 10


@pytest.mark.skipif(not TRACES.exists(), reason="needs the traces")
def test_the_real_traces_are_read_whole() -> None:
    found = listed(TRACES / "mooncake_conversation.jsonl.xz")
    assert (len(found), found[-1][0]) == (12031, 3536.999)
    first = next(open_trace([TRACES / "coding_agents.tar.xz"]).requests())
    assert (first.time, first.tokens, first.blocks.size, first.pause) == (0, 71175, 1112, True)


# ---------------------------------------------------------------------- shapes
def test_a_shape_counts_what_the_model_has(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    matrices = sum(p.numel() for name, p in model.model.layers.named_parameters() if p.ndim == 2)
    assert shape.weights == matrices
    assert shape.token_bytes == 2 * 3 * 2 * 4 * 4
    seen = sum(position + 1 for position in range(5, 9))
    assert shape.prefill_flops(5, 9) == 2 * matrices * 4 + 4 * 3 * 6 * 4 * seen + 2 * 24 * 50


def test_named_shapes_are_of_the_known_size() -> None:
    assert {name: shape.token_bytes >> 10 for name, shape in NAMED.items()} == {
        "llama-3.2-1b": 32,
        "llama-3.1-8b": 128,
        "llama-3.1-70b": 320,
        "qwen3-8b": 144,
    }
    billions = {name: (s.weights + 2 * s.vocab * s.hidden) / 1e9 for name, s in NAMED.items()}
    assert billions["llama-3.1-8b"] == pytest.approx(8.03, abs=0.01)
    assert billions["llama-3.1-70b"] == pytest.approx(70.55, abs=0.01)
    assert billions["qwen3-8b"] == pytest.approx(8.19, abs=0.01)


def test_other_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text, error in (
        ("[]", ConfigError),
        ("{", ConfigError),
        ('{"model_type": "llama"}', ConfigError),
        ('{"model_type": "deepseek_v3"}', UnsupportedModel),
        ('{"model_type": "mistral", "sliding_window": 4096}', UnsupportedModel),
    ):
        path.write_text(text)
        with pytest.raises(error):
            shape_of(str(path))
    with pytest.raises(ConfigError, match=r"llama-3\.1-8b"):
        shape_of("gpt-9")
