"""Sparse attention on a model with recall of its own, and on quotations from a long text: nothing known is lost."""

import copy
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner

from alaya_tiers import AlayaCache
from alaya_tiers.errors import ConfigError
from alaya_tiers.stats import SparseUse
from alaya_tiers.tools import cli, demo, quality, quoted, train
from alaya_tiers.tools.corpus import CorpusError, stdlib_text
from alaya_tiers.tools.quality import EXACT, FULL, Asked, Way
from alaya_tiers.tools.quotation import fill
from alaya_tiers.tools.recall import FACT, KEY, QUOTE, SPECIAL, TASKS, Tasks, fit_tokenizer

TOKENS = 1024
"""As long as it was trained for at ease. Who guesses one of the facts is right with 5 of 1,024."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def subject() -> tuple[Any, Tasks]:
    if not quality.MODEL.is_dir():
        pytest.skip("no tests/data/recall: an sdist does not carry it")
    return quality.subject(quality.MODEL, None)


@pytest.fixture(scope="module")
def asked(subject: tuple[Any, Tasks]) -> dict[str, list[Asked]]:
    """A context of every task with questions about it."""
    model, tasks = subject
    found = {}
    for task, count in (("text", 24), ("quote", 4), ("pairs", 12)):
        ids, questions = tasks.questions(task, TOKENS, count, np.random.default_rng(11))
        found[task] = [Asked(quality.prefilled(model, torch.from_numpy(ids)), questions)]
    return found


def test_the_model_recalls_far_above_chance(subject: tuple[Any, Tasks], asked: dict[str, list[Asked]]) -> None:
    model, _ = subject
    pairs = quality.score(model, asked["pairs"], FULL, "pairs", TOKENS)
    assert sum(pairs.right) >= 10  # of 12
    quotes = quality.score(model, asked["quote"], FULL, "quote", TOKENS)
    assert np.mean([x for answer in quotes.sure for x in answer]) > 0.8
    text = quality.score(model, asked["text"], FULL, "text", TOKENS)
    assert np.mean([x for answer in text.loss for x in answer]) < 0.8 * np.log(len(SPECIAL) + 510)


@pytest.mark.parametrize("task", quality.TASKS)
def test_exact_mode_is_dynamic_cache_and_sparse_mode_loses_no_answer(
    subject: tuple[Any, Tasks], asked: dict[str, list[Asked]], task: str
) -> None:
    model, _ = subject
    full = quality.score(model, asked[task], FULL, task, TOKENS)
    exact = quality.score(model, asked[task], EXACT, task, TOKENS)
    assert exact.sure == full.sure
    np.testing.assert_allclose(np.concatenate(exact.loss), np.concatenate(full.loss), atol=2e-3)
    sparse = quality.score(model, asked[task], Way.dipr(0.012), task, TOKENS)
    assert sparse.as_dict(full)["lost"] == 0
    assert sparse.use is not None
    assert sparse.use.steps > 0
    assert sparse.use.attended < 0.9 * sparse.use.visible
    assert abs(np.mean(np.concatenate(sparse.loss)) - np.mean(np.concatenate(full.loss))) < 0.05


def test_too_few_keys_lose_answers(subject: tuple[Any, Tasks], asked: dict[str, list[Asked]]) -> None:
    """What is measured can fail: without any key beyond the window nothing far away is recalled."""
    model, _ = subject
    full = quality.score(model, asked["pairs"], FULL, "pairs", TOKENS)
    none = Way("none", quality.SPARSE | {"alpha": 1.0, "most_selected": 0})
    assert quality.score(model, asked["pairs"], none, "pairs", TOKENS).as_dict(full)["lost"] >= 6


def test_generate_recalls_through_sparse_attention(subject: tuple[Any, Tasks], asked: dict[str, list[Asked]]) -> None:
    """The same by generate, token after token of its own."""
    model, _ = subject
    (context,) = asked["pairs"]
    length, found = context.cache.get_seq_length(), 0
    with quality.attending(model, context.cache, Way.dipr(0.012)) as cache:
        for question in context.questions:
            ids = torch.tensor([question.prompt])
            mask = torch.ones(1, length + ids.shape[1], dtype=torch.long)
            out = model.generate(
                ids, attention_mask=mask, past_key_values=copy.deepcopy(cache), max_new_tokens=2, do_sample=False
            )
            found += tuple(out[0, ids.shape[1] :].tolist()) == question.answer
        assert isinstance(cache, AlayaCache)
        use = cache.stats().sparse
    assert found >= 10
    assert use is not None
    assert use.steps > 200


@pytest.mark.leaks("matplotlib keeps its fonts open")
def test_plots(subject: tuple[Any, Tasks], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sizes = {"quality": ["--quick", "--quotation", "0"], "choice": ["--tokens", "256", "--queries", "2"]}
    for name, size in sizes.items():
        out = tmp_path / f"{name}.png"
        result = CliRunner().invoke(cli.app, ["bench", name, "--model", str(quality.MODEL), *size, "--plot", str(out)])
        assert result.exit_code == 0, result.output
        assert out.read_bytes().startswith(b"\x89PNG")
    result = CliRunner().invoke(cli.app, ["bench", "quality", "--contexts", "0", "--plot", "a.png"])
    assert result.exit_code == 2


# ---------------------------------------------------------------------- tasks
def test_what_is_known_stands_before() -> None:
    tasks = Tasks(np.arange(1000) % 97 + len(SPECIAL), 320)
    for task in TASKS:
        for n in (40, 64, 333):
            ids, known = tasks.row(task, n, np.random.default_rng(n))
            assert ids.shape == known.shape == (n,)
            assert ids.max() < 320
            assert known.any()
            assert not known[0]
            if task in ("copy", "pairs"):
                for place in np.flatnonzero(known):
                    before = itertools.pairwise(ids[:place])
                    assert (ids[place - 1], ids[place]) in set(before)


def test_questions_ask_for_what_the_context_says() -> None:
    tasks = Tasks(np.arange(1000) % 97 + len(SPECIAL), 320)
    facts, questions = tasks.questions("pairs", 200, 60, np.random.default_rng(0))
    rows = [tuple(row) for row in facts.reshape(-1, FACT).tolist()]
    assert len(rows) == 40
    assert {row[0] for row in rows} == {KEY}
    assert set(rows) == {q.prompt + q.answer for q in questions[:40]}
    context, questions = tasks.questions("quote", 200, 3, np.random.default_rng(0))
    text = context.tolist()
    for question in questions:
        phrase = [*question.prompt[1:], *question.answer]
        assert question.prompt[0] == QUOTE
        assert any(text[i : i + len(phrase)] == phrase for i in range(200))
    assert set(Tasks(context, 320, alphabet=7).questions("copy", 50, 1, np.random.default_rng(0))[0]) == {*range(2, 9)}
    with pytest.raises(ConfigError, match="give a longer one"):
        tasks.questions("text", 990, 20, np.random.default_rng(0))


# ---------------------------------------------------------------------- training
@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    (folder / "one.txt").write_text(stdlib_text(limit_bytes=120_000))
    return folder


def test_training_goes_on_from_a_checkpoint_as_if_nothing_had_happened(library: Path, tmp_path: Path) -> None:
    seen, unseen = train.read_books(library)
    preset, checkpoint = train.PRESETS["quick"], tmp_path / "checkpoint.pt"
    tokenizer = fit_tokenizer(seen, preset.vocabulary)
    tasks, others = train.tasks_of(tokenizer, seen), train.tasks_of(tokenizer, unseen)
    whole = train.Run.start(preset, 3, "cpu")
    train.train(whole, tasks, others, tmp_path / "whole.pt", lambda run, loss: None)

    def interrupted(run: train.Run, loss: float) -> None:
        if run.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(train.Run.start(preset, 3, "cpu"), tasks, others, checkpoint, interrupted)
    again = train.Run.start(preset, 3, "cpu")
    again.resume(checkpoint)
    assert again.step == 4
    train.train(again, tasks, others, checkpoint, lambda run, loss: None)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name
    assert [point["loss"] for point in whole.curve] == [point["loss"] for point in again.curve]
    with pytest.raises(ConfigError, match="another preset or seed"):
        train.Run.start(preset, 4, "cpu").resume(checkpoint)
    for damaged in (checkpoint.read_bytes()[:1000], b"", b"no checkpoint"):
        checkpoint.write_bytes(damaged)
        with pytest.raises(ConfigError, match="remove it"):
            whole.resume(checkpoint)


def test_training_stops_when_its_minutes_are_over_and_goes_on(library: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    command = ["train", str(library), str(model), "--preset", "quick", "--threads", "1"]
    result = CliRunner().invoke(cli.app, [*command, "--minutes", "0"])
    assert result.exit_code == 0, result.output
    assert "step 0 of 6" in " ".join(result.output.split())
    assert [path.name for path in model.iterdir()] == ["checkpoint.pt"]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    assert (model / "model.safetensors").exists()


@pytest.mark.slow
def test_the_large_preset_is_what_a_gpu_trains(library: Path, tmp_path: Path) -> None:
    """Its sizes, and two steps of it over short sequences."""
    preset = train.PRESETS["large"]
    assert preset.heads > preset.kv_heads
    assert preset.stages[-1].tokens == 16_384
    few = replace(preset, stages=tuple(replace(s, steps=1, rows=2, tokens=64) for s in preset.stages[2:4]))
    seen, unseen = train.read_books(library)
    tokenizer = fit_tokenizer(seen, preset.vocabulary)
    run = train.Run.start(few, 0, "cpu")
    assert 20e6 < sum(p.numel() for p in run.model.parameters()) < 100e6
    tasks = train.tasks_of(tokenizer, seen)
    assert train.train(
        run, tasks, train.tasks_of(tokenizer, unseen), tmp_path / "checkpoint.pt", lambda run, loss: None
    )
    assert all(math.isfinite(point["loss"]) for point in run.curve)


def test_the_command_trains_a_model_that_the_benchmarks_take(library: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "quality.json"
    command = ["train", str(library), str(model), "--preset", "quick", "--threads", "1"]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    assert not (model / "checkpoint.pt").exists()
    curve = json.loads((model / "curve.json").read_text())
    assert curve["curve"][-1]["step"] == train.PRESETS["quick"].steps
    command = ["bench", "quality", "--model", str(model), "--quick", "--threads", "1", "--json", str(out)]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert {row["task"] for row in found["trained"]} == set(quality.TASKS)
    (long,) = found["quoted"]
    assert long["full"] == long["asked"] == long["dense"] == long["ways"][0]["right"] == 2
    chosen = ["bench", "choice", "--model", str(model), "--tokens", "256", "--queries", "4", "--json", str(out)]
    result = CliRunner().invoke(cli.app, chosen)
    assert result.exit_code == 0, result.output
    first = json.loads(out.read_text())["found"][0]
    assert set(first["dipr"]["by_head"]) == {"layer 0 head 0", "layer 0 head 1"}
    for wrong, why in (
        (["train", str(tmp_path), str(model)], "no books"),
        (["train", str(library), str(model), "--preset", "huge"], "choose one of"),
        (["train", str(library), str(model), "--device", "tpu"], "take cpu"),
        (["bench", "quality", "--model", str(tmp_path / "none")], "alaya-tiers train"),
        (["bench", "quality", "--alphas", "2"], "at most 1"),
        (["bench", "choice", "--model", str(model), "--tokens", "10000000"], "give a longer"),
    ):
        result = CliRunner().invoke(cli.app, wrong)
        assert result.exit_code == 2, result.output
        assert why in " ".join(result.output.split())


# ---------------------------------------------------------------------- long quotations
@pytest.mark.parametrize("mode", ["exact", "sparse"])
def test_windows_give_the_attention_of_a_full_prefill(mode: str) -> None:
    """Keys and values computed in windows and put into the tiers, against those of one forward over everything."""
    subject = demo.quotation_subject(demo.Options(tokens=1500, questions=2))
    ids, plain = torch.tensor([subject.ids]), DynamicCache(config=subject.model.config)
    with torch.no_grad():
        subject.model.model(input_ids=ids, past_key_values=plain)
        with AlayaCache.for_model(subject.model, device_budget="4MiB", host_budget="1MiB", mode=mode) as cache:
            fill(subject.model, cache, subject.ids)
            cache.build_index()
            layers: list[Any] = plain.layers
            for number, layer in enumerate(layers):
                keys, values = cache.session.gather(number)
                torch.testing.assert_close(keys, layer.keys, atol=1e-3, rtol=1e-3)
                torch.testing.assert_close(values, layer.values, atol=1e-3, rtol=1e-3)
            assert cache.stats().read_bytes > 0
            replies = [demo.answer(subject, q, copy.deepcopy(cache), 12).tokens for q in subject.questions]
    assert replies == [question.answer for question in subject.questions]


def test_the_demo_reads_in_windows() -> None:
    report = demo.run(demo.Options(tokens=1000, questions=2, windowed=True, alpha=0.012))
    assert report.exact == report.identical == 2
    with pytest.raises(ConfigError, match="windowed"):
        demo.prepare(demo.Options(windowed=True, model="any"))


def test_only_what_full_attention_gets_right_counts(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(stdlib_text(limit_bytes=20_000))
    found = quoted.run(2500, [0.012], 2, text, lambda words: None)
    assert (found.full, found.dense, found.asked) == (2, 2, 2)
    assert [way.right for way in found.ways] == [2, 2]
    assert all(tier.budget is None or tier.peak <= tier.budget for tier in found.tiers.values())
    assert found.ways[0].use["exact_steps"] == 0
    assert found.ways[0].use["measured_steps"] == 2 * 2 * demo.SLOTS
    with pytest.raises(CorpusError, match="fewer than"):
        quoted.run(50_000, [0.012], 3, text, lambda words: None)


def test_uses_add_up() -> None:
    one, other = SparseUse(steps=2, least=0.5, error=1.0), SparseUse(steps=3, least=0.25, worst_error=2.0)
    assert one.plus(other) == SparseUse(steps=5, least=0.25, error=1.0, worst_error=2.0)
