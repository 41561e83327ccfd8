"""The demo, tiny, as data."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alaya_tiers.blocks import Geometry
from alaya_tiers.errors import BudgetTooSmall, ConfigError, ContextTooLong, StoreUnwritable
from alaya_tiers.tools import cli, demo
from alaya_tiers.tools.corpus import CorpusError, stdlib_text
from alaya_tiers.tools.demo import Options, Report

TOKENS = 2000
POSITIONS = 256
PAIR = Geometry(1, 256, 256, torch.float32)


class Notes(demo.Watcher):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.done: list[int] = []
        self.over_budget = False

    def stage(self, name: str, total: int) -> None:
        self.stages.append((name, total))

    def advance(self, done: int, stats: Any) -> None:
        self.done.append(done)
        for tier in stats.tiers.values() if stats else ():
            self.over_budget |= tier.budget is not None and tier.used > tier.budget


@pytest.fixture(scope="module")
def notes() -> Notes:
    return Notes()


@pytest.fixture(scope="module")
def report(notes: Notes) -> Report:
    return demo.run(Options(tokens=TOKENS, questions=4), notes)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model and a tokenizer that knows characters."""
    folder = tmp_path_factory.mktemp("model")
    letters = ["<unk>", *sorted(set(stdlib_text(limit_bytes=20_000)))]
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast: Any = PreTrainedTokenizerFast  # its constructor is untyped
    fast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_every_continuation_is_exact_and_that_of_dynamic_cache(report: Report) -> None:
    assert len(report.answers) == report.exact == report.identical == 4
    assert not report.differs
    assert all(answer.continuation == answer.truth for answer in report.answers)
    assert report.new_tokens == 48
    starts = [answer.start for answer in report.answers]
    assert starts[0] < TOKENS / 4
    assert starts[-1] > TOKENS * 3 / 4


def test_the_kv_is_eight_times_the_host_budget_and_no_budget_is_passed(report: Report, notes: Notes) -> None:
    assert report.tokens == TOKENS
    assert report.plan.kv_bytes == TOKENS * 4096 == report.reading.kv_bytes
    assert report.plan.kv_bytes >= 8 * report.plan.host_budget
    for name in ("device", "host"):
        tier = report.asking.tiers[name]
        assert tier.budget == getattr(report.plan, f"{name}_budget")
        assert 0 < tier.peak <= (tier.budget or 0)
    assert not notes.over_budget
    assert report.memory_bytes < report.plan.kv_bytes / 4


def test_what_is_not_in_memory_was_written_and_read(report: Report) -> None:
    assert report.reading.written_bytes > report.plan.kv_bytes - report.memory_bytes
    assert report.asking.read_bytes > report.reading.read_bytes
    assert report.ssd_bytes_per_token * 48 == report.asking.read_bytes - report.reading.read_bytes
    assert 0 < report.hit_rate < 1
    assert report.rss_peak_bytes >= report.rss_bytes > 0


def test_progress_reaches_the_end_of_every_stage(notes: Notes, report: Report) -> None:
    names = ["preparing", "reading", "answering", "reading (DynamicCache)", "answering (DynamicCache)"]
    assert [name for name, _ in notes.stages] == names
    for _, total in notes.stages[1:]:
        assert total in notes.done


def test_the_report_is_json(report: Report) -> None:
    found = json.loads(json.dumps(cli.as_dict(report)))
    assert found["summary"]["exact"] == found["summary"]["identical"] == found["summary"]["questions"] == 4
    assert found["asking"]["tiers"]["host"]["budget"] == found["plan"]["host_budget"]
    assert found["speed"]["prefill_rate"] > 0
    assert found["answers"][0]["exact"] is True


def test_one_differing_token_is_told(report: Report) -> None:
    wrong = replace(report.answers[1], identical=False, exact=False)
    bad = replace(report, answers=(report.answers[0], wrong, *report.answers[2:]))
    assert bad.differs
    assert bad.exact == bad.identical == 3
    assert "NOT identical to DynamicCache: 3 of 4" in cli.verdict(bad)


def test_without_the_comparison_nothing_is_claimed() -> None:
    found = demo.run(Options(tokens=300, questions=1, answer_tokens=1, compare=False))
    assert found.dynamic is None
    assert found.identical is None
    assert not found.differs
    assert found.speed.decode_rate is None
    assert "not compared with DynamicCache (--no-compare)" in cli.verdict(found)


@pytest.mark.parametrize(
    ("compare", "tokens", "asked"),
    [(None, 32_768, True), (None, 32_769, False), (True, 99_999, True), (False, 9, False)],
)
def test_long_texts_are_compared_only_on_request(compare: bool | None, tokens: int, asked: bool) -> None:
    assert (demo.not_compared(Options(compare=compare), tokens) is None) == asked


@pytest.mark.parametrize("tokens", [2000, 8192, 12_288, demo.TOKENS, 100_000, 1 << 20])
def test_the_planned_budgets_are_round_and_small(tokens: int) -> None:
    found = demo.plan([PAIR, PAIR], tokens, Options())
    assert found.kv_bytes >= 8 * found.host_budget
    assert found.kv_bytes >= 8 * found.device_budget
    assert found.host_budget >= 4 * found.block_tokens * PAIR.row_bytes
    if tokens >= 8192:
        assert found.host_budget % (1 << 20) == found.device_budget % (1 << 20) == 0


def test_given_budgets_are_kept() -> None:
    found = demo.plan([PAIR, PAIR], 8192, Options(host_budget="3MiB", device_budget="1MiB"))
    assert (found.host_budget, found.device_budget) == (3 << 20, 1 << 20)
    assert found.block_tokens < 256


def test_blocks_of_tiny_heads_fill_a_page() -> None:
    assert demo.plan([Geometry(4, 8, 8, torch.float32)] * 5, 200, Options()).block_tokens == 64


@pytest.mark.slow
def test_a_book_and_a_prompt_of_ones_own(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text(" ".join(f"word{i}" for i in range(400)))
    found = demo.run(Options(text=book, prompt=" ".join(f"word{i}" for i in range(100, 120)), compare=False))
    assert found.source == "book.txt"
    assert found.tokens == 400
    assert found.exact is None
    assert found.answers[0].continuation.split() == [f"word{i}" for i in range(120, 132)]


@pytest.mark.slow
def test_a_folder_that_is_given_is_kept(tmp_path: Path) -> None:
    found = demo.run(Options(tokens=300, questions=1, compare=False, path=tmp_path / "store"))
    assert found.asking.path == str(tmp_path / "store")
    assert (tmp_path / "store" / "zarr.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [None, "import os"])
def test_a_real_model_answers_as_with_dynamic_cache(model_folder: Path, prompt: str | None) -> None:
    found = demo.run(Options(model=str(model_folder), prompt=prompt, chunk=64))
    assert found.tokens == POSITIONS - 12 - len(prompt or "x" * demo.HELD_BACK_TOKENS)
    assert found.identical == 1
    assert found.exact is None
    assert len(found.answers[0].continuation) >= 12
    if prompt is not None:
        assert found.answers[0].prompt.replace(" ", "") == prompt.replace(" ", "")


def test_a_model_with_too_few_positions_says_how_many(model_folder: Path) -> None:
    with pytest.raises(ContextTooLong, match=f"has {POSITIONS} positions.*--tokens 228 or less"):
        demo.run(Options(model=str(model_folder), tokens=1000))
    with pytest.raises(ContextTooLong, match="too few"):
        demo.run(Options(model=str(model_folder), answer_tokens=300))


@pytest.mark.parametrize("name", ["./nope", "/no/such/folder", "~/nope", "a/b/c"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        demo.load(name)


def test_a_folder_without_a_model_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot load the model"):
        demo.load(str(tmp_path))


def test_an_unreachable_hub_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, **kwargs: Any) -> None:
        raise OSError("We couldn't connect to the hub. Check your connection")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", offline)
    with pytest.raises(ConfigError, match=r"'someone/model': We couldn't connect to the hub\. Give a folder"):
        demo.load("someone/model")


def test_what_is_in_the_way_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    few = Options(tokens=300, questions=1)
    with pytest.raises(CorpusError, match="cannot read"):
        demo.run(replace(few, text=tmp_path / "missing.txt"))
    with pytest.raises(CorpusError, match="shorter than a passage"):
        demo.run(Options(tokens=20))
    with pytest.raises(BudgetTooSmall, match="host"):
        demo.run(replace(few, host_budget="4KiB"))
    with pytest.raises(StoreUnwritable, match="not a directory"):
        demo.run(replace(few, path=tmp_path / "file"))
    with pytest.raises(ConfigError, match="prompt is empty"):
        demo.run(replace(few, prompt=""))


def test_sparse_answers_are_exact_too() -> None:
    """Nothing but the window and the keys that matter is attended, and every quotation is still word for word."""
    found = demo.run(Options(tokens=4096, questions=4, alpha=0.012, compare=False))
    sparse = found.asking.sparse
    assert sparse is not None
    assert sparse.steps > 0
    assert sparse.attended < 0.5 * sparse.visible
    assert found.exact == 4
    assert "sparse attention to" in cli.verdict(found)
