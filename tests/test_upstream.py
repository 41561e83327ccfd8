"""The plugin that puts our cache in place of DynamicCache, and the comparison of two runs."""

import contextlib
import io
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alaya_tiers.tools import upstream

pytestmark = pytest.mark.slow

SMALL = ("--device-budget", "64KiB", "--host-budget", "64KiB")

PASSES = """
import sys

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers import cache_utils
from transformers.generation import utils

stock = next(c for c in DynamicCache.__mro__ if c.__name__ == "DynamicCache")
tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
tiny.eos_token_id = None


def test_generates():
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny).eval()
    out = model.generate(torch.ones(2, 9, dtype=int), max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    assert out.sequences.shape == (2, 29)
    assert isinstance(out.past_key_values, DynamicCache)
    with open("attention.txt", "a") as file:
        print(type(out.past_key_values).__name__, model.config._attn_implementation, file=file)


def test_one_cache_class_everywhere():
    assert transformers.DynamicCache is cache_utils.DynamicCache is utils.DynamicCache is DynamicCache
    assert sys.modules["transformers.models.llama.modeling_llama"].DynamicCache is DynamicCache


def test_isinstance_of_a_cache():
    for cache in (DynamicCache(), stock(), DynamicCache(offloading=True)):
        assert isinstance(cache, DynamicCache)
        assert isinstance(cache, stock)
    assert not isinstance(cache_utils.StaticCache(tiny, max_cache_len=4), DynamicCache)
    assert issubclass(cache_utils.MtpCache, DynamicCache)
    assert not isinstance(DynamicCache(), cache_utils.MtpCache)


def test_about_nothing():
    raise AssertionError("not selected")
"""

FAILS = """
import unittest

import pytest
from transformers import DynamicCache


def test_cache_is_stock():
    assert type(DynamicCache()).__name__ == "DynamicCache"


def test_cache_or_skip():
    if type(DynamicCache()).__name__ != "DynamicCache":
        pytest.skip("not with this cache")


def test_cache_that_nobody_passes():
    DynamicCache()
    raise AssertionError


class Parts(unittest.TestCase):
    def test_cache_in_parts(self):
        for number in range(2):
            with self.subTest(number):
                assert number == 0 or type(DynamicCache()).__name__ == "DynamicCache"
"""


@dataclass(frozen=True)
class Compared:
    """What the runner said of the small tests in mode stock, and where they are."""

    checkout: Path
    kept: Path
    code: int
    out: str


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """A tree like that of transformers, with three models' tests, two of them run in mode stock."""
    root = tmp_path_factory.mktemp("upstream")
    for model, text in (("passes", PASSES), ("fails", FAILS), ("useless", "def test_cache(): pass\n")):
        folder = root / "tests" / "models" / model
        folder.mkdir(parents=True)
        (folder / f"test_modeling_{model}.py").write_text(text)
    (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = upstream.main([str(root), "--models", "passes", "fails", "--keep", str(root / "kept"), *SMALL])
    return Compared(root, root / "kept", code, out.getvalue())


def in_place(compared: Compared, mode: str, attention: str) -> None:
    """Asserts what a run in a mode must have left."""
    seen = (compared.checkout / "attention.txt").read_text().splitlines()
    assert seen[0] == "DynamicCache sdpa"
    assert f"Substitute {attention}" in seen
    ours = upstream.Run.read(compared.kept / f"{mode}.jsonl")
    assert len([test for test in ours.passed if "passes" in test]) == 3
    assert ours.counts["caches"] >= 3
    assert ours.counts["offloaded"] == 1
    assert ours.counts["demoted"] > 0
    assert f"{ours.counts['demoted']} blocks spilled" in (compared.kept / f"{mode}.log").read_text()


def test_our_cache_is_in_place(compared: Compared) -> None:
    in_place(compared, "stock", "sdpa")


def test_mode_alaya_makes_alaya_the_default_attention(compared: Compared, capsys: pytest.CaptureFixture[str]) -> None:
    kept = ["--keep", str(compared.kept), "--baseline", str(compared.kept / "off.jsonl")]
    code = upstream.main([str(compared.checkout), "--models", "passes", "--mode", "alaya", *kept, *SMALL])
    assert code == 0, capsys.readouterr().out
    in_place(compared, "alaya", "alaya")


def test_a_test_that_only_stock_passes_is_reported(compared: Compared) -> None:
    assert compared.code == upstream.ONLY_STOCK_PASSES
    assert "::test_cache_is_stock\n    failed: AssertionError" in compared.out
    assert "::test_cache_or_skip\n    skipped" in compared.out
    assert "::test_cache_in_parts\n    failed" in compared.out
    assert "nobody_passes" not in compared.out


def test_a_run_without_our_cache_is_noticed(
    compared: Compared, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = upstream.Run({"tests/models/useless/test_modeling_useless.py::test_cache": "passed"}, complete=True)
    monkeypatch.setattr(upstream, "run", lambda *args: run)
    assert upstream.main([str(compared.checkout), "--models", "useless"]) == upstream.CANNOT_SAY
    assert "no cache of ours was made" in capsys.readouterr().err

    session: Any = SimpleNamespace(exitstatus=0, config=SimpleNamespace(getoption=lambda name: "stock"))
    monkeypatch.setattr(upstream, "COUNTS", Counter())
    upstream.pytest_sessionfinish(session, 0)
    assert session.exitstatus == pytest.ExitCode.TESTS_FAILED


def test_what_cannot_be_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert upstream.main([str(tmp_path / "nowhere")]) == upstream.CANNOT_SAY
    assert upstream.main([str(tmp_path), "--models", "llama"]) == upstream.CANNOT_SAY
    assert "test_modeling_llama.py" in capsys.readouterr().err


def test_outcomes_of_parts_add_up(tmp_path: Path) -> None:
    file = tmp_path / "report.jsonl"
    file.write_text(
        '{"test": "t.py::a", "when": "setup", "outcome": "passed"}\n'
        '{"test": "t.py::a", "when": "call", "outcome": "passed"}\n'
        '{"test": "t.py::a", "when": "teardown", "outcome": "failed", "message": "left open"}\n'
        '{"test": "t.py::b", "when": "call", "outcome": "skipped"}\n'
        '{"test": "t.py::b", "when": "call", "outcome": "passed"}\n'
        '{"test": "u.py::c", "when": "setup", "outcome": "passed"}\n'
    )
    run = upstream.Run.read(file)
    assert run.tests == {"t.py::a": "failed", "t.py::b": "passed"}
    assert run.why("t.py::a") == "failed: left open"
    assert not run.complete
    assert upstream.only_stock_passes(upstream.Run({"u.py::c": "passed", "t.py::b": "passed"}), run) == ["u.py::c"]
    assert not run.of({"u.py"}).tests
    assert upstream.used(Counter()).startswith("no cache of ours")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", ["stock", "alaya"])
def test_transformers_own_generation_tests(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = os.environ.get("ALAYA_UPSTREAM_TESTS")
    if not found:
        pytest.skip("ALAYA_UPSTREAM_TESTS names no source tree of transformers")
    code = upstream.main([found, "--models", "llama", "--mode", mode, "--select", "not compil"])
    assert code == 0, capsys.readouterr().out
