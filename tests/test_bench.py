"""The benchmark runs tiny here: that it compares equals and counts right, never how fast anything is."""

import errno
import importlib.util
import json
import math
import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from typer.testing import CliRunner

from alaya_tiers.errors import ConfigError
from alaya_tiers.tools import bench, choice, cli, heads, machine, offload, opening, overhead, rawdisk, subjects, ttft
from alaya_tiers.tools.baselines import (
    COMPETITORS,
    RAM,
    REFERENCE,
    SSD,
    Case,
    Competitor,
    Context,
    Measured,
    Pace,
    Shape,
    build_model,
    contexts_of,
    in_place,
    parse_contexts,
)
from alaya_tiers.tools.bench import Bench, Report, run
from alaya_tiers.tools.spans import Split

TINY = Shape(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16)
SIZES = ("--layers", "2", "--hidden", "64", "--heads", "4", "--kv-heads", "2", "--head-dim", "16")
TOKENS = 4096 + 128
MIB = 1 << 20


def tiny(directory: Path, dtype: str = "fp32", contexts: tuple[int, ...] = (TOKENS,)) -> Bench:
    shape = Shape(TINY.layers, TINY.hidden, TINY.heads, TINY.kv_heads, TINY.head_dim, dtype)
    pace = Pace(steps=3, least=3, seconds=0)
    return Bench(
        shape=shape, contexts=contexts, pace=pace, directory=str(directory), memory_bytes=MIB, disk_bytes=8 * MIB
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return run(tiny(tmp_path_factory.mktemp("bench"), contexts=(300, TOKENS)))


def test_every_cache_gives_the_same_logits(report: Report) -> None:
    for row in report.rows:
        assert [m.name for m in row.measured] == [c.name for c in COMPETITORS]
        for m in row.measured:
            assert m.logits.shape == (4, 512)
            assert m.differs is not None
            assert m.differs < 1e-4, f"{m.name} at {row.tokens} tokens"


def test_bf16_agrees_to_its_precision(tmp_path: Path) -> None:
    for m in run(tiny(tmp_path, "bf16", (1100,))).rows[0].measured:
        assert m.differs is not None
        assert m.differs < 0.05, m.name


class Forgetful(DynamicCache):
    """Loses some tokens in the middle of layer 1."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any) -> tuple[Tensor, Tensor]:
        if layer_idx == 1 and key_states.shape[2] > 1000:
            value_states = value_states.clone()
            value_states[:, :, 500:756] = 0
        return super().update(key_states, value_states, layer_idx)


def test_a_cache_that_loses_one_block_is_noticed(tmp_path: Path) -> None:
    broken = Competitor("forgetful", "sdpa", lambda c: Forgetful(config=c.config), lambda c: 0, whole=True)
    found = run(tiny(tmp_path), competitors=(COMPETITORS[0], broken)).rows[0]
    assert (found.measured[1].differs or 0) > 1e-3


def test_bytes_are_those_of_the_context(report: Report) -> None:
    row = report.rows[1]
    assert report.bench.shape.token_bytes == 2 * 2 * 2 * 16 * 4
    assert row.kv_bytes == TOKENS * 512
    assert report.limit(row) == pytest.approx(row.kv_bytes / report.memory.best)
    ours = row.of(SSD)
    assert ours is not None
    assert ours.ssd is not None
    ssd = ours.ssd
    assert ssd["host_budget"] == row.kv_bytes // 4
    case = Case(TINY, TINY.config(TOKENS), TOKENS, TOKENS + 4, Path())
    assert case.run_bytes == 256 * 512
    assert sum(ssd["touched_bytes"].values()) == 17 * case.run_bytes  # every block once a step, the open one too
    assert ssd["touched_bytes"]["ahead"] + ssd["touched_bytes"]["waited"] >= ssd["least_read_bytes"] > 0
    assert ssd["read_bytes"] > 0
    assert 0 <= ssd["io_hidden"] <= 1
    assert 0 < ssd["hit_rate"] < 1


def test_nothing_is_read_from_disk_when_all_fits(report: Report) -> None:
    ours = report.rows[1].of(RAM)
    assert ours is not None
    assert ours.ssd is None
    assert len(ours.attention) == 3


def test_the_report_is_json_with_every_step(report: Report) -> None:
    data = json.loads(json.dumps(report.as_dict()))
    assert {"cpu", "cores", "threads", "ram_bytes", "torch", "transformers"} <= set(data["machine"])
    assert data["settings"]["shape"]["layers"] == 2
    assert [row["tokens"] for row in data["rows"]] == [300, TOKENS]
    for competitor in data["rows"][1]["competitors"]:
        assert len(competitor["steps"]) == 3
        assert competitor["best"] == min(competitor["steps"]) > 0
        assert competitor["best"] <= competitor["median"] <= competitor["p90"]
        assert competitor["speed_up"] > 0
    assert data["rows"][1]["competitors"][0]["speed_up"] == 1
    floors = data["rows"][1]["floors"]
    assert floors["speed_up"]["passed"] is None  # asked for from 32K tokens on
    assert floors["attention_share"]["passed"] in (True, False)


def test_what_does_not_fit_is_skipped_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_ram", lambda: 0)
    report = run(tiny(tmp_path, contexts=(300,)))
    assert all("of RAM, 0 B are free" in (m.skipped or "") for m in report.rows[0].measured)
    assert report.rows[0].of(REFERENCE) is None
    data = report.as_dict()["rows"][0]
    assert "skipped" in data["competitors"][0]
    assert data["floors"]["speed_up"] == {"value": None, "floor": 5.0, "passed": None}
    assert len(bench.tables(report)) == 3


def test_a_busy_machine_is_said_beside_the_verdicts(report: Report) -> None:
    report.cpu_of_others = 0.5
    assert "Others took 50%" in str(bench.tables(report)[-1].caption)
    report.cpu_of_others = 0.01
    assert bench.tables(report)[-1].caption is None


def test_the_context_is_the_same_however_it_is_asked_for() -> None:
    context, (k, v), tail = Context(TINY), (whole := torch.empty(2, 1, 2, 9000, 16)), torch.empty(2, 1, 2, 4904, 16)
    context.write(whole, 1, 0)
    context.write(tail, 1, 4096)
    assert torch.equal(whole[:, :, :, 4096:], tail)
    assert not torch.equal(k, v)
    assert k.std() == pytest.approx(1, abs=0.05)
    rows = torch.cat([k[0].flatten(0, 1), v[0].flatten(0, 1)])
    assert len({row.tobytes() for row in rows.numpy()}) == len(rows)  # no token twice


def test_the_dense_cache_in_place_is_dynamic_cache_without_copies() -> None:
    ours, theirs = in_place(1, 20), DynamicCache()
    addresses = set()
    for n in (7, 1, 1):
        k, v = torch.randn(2, 1, 2, n, 4)
        for mine, other in zip(ours.update(k, v, 0), theirs.update(k, v, 0), strict=True):
            assert torch.equal(mine, other)
        addresses.add(ours.layers[0].keys.data_ptr())  # type: ignore[union-attr]
    assert len(addresses) == 1
    assert ours.get_seq_length() == 9


def test_the_model_is_the_same_every_time_and_leaves_chance_alone() -> None:
    state = torch.get_rng_state()
    one, other = build_model(TINY, 100), build_model(TINY, 100)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_stops_by_steps_or_by_time() -> None:
    assert not Pace(3, 1, 10.0).enough([])
    assert not Pace(3, 1, 10.0).enough([99.0, 1.0, 1.0])  # the warm-up counts for nothing
    assert Pace(3, 1, 10.0).enough([0.0, 1.0, 1.0, 1.0])
    assert Pace(9, 2, 1.0).enough([0.0, 1.0, 1.0])
    assert not Pace(9, 3, 1.0).enough([0.0, 1.0, 1.0])


def test_percentiles() -> None:
    m = Measured("x", steps=[float(i) for i in range(1, 11)])
    assert (m.best, m.median, m.p90) == (1.0, 5.5, 9.0)


@pytest.mark.parametrize(("text", "tokens"), [("8K", (8192,)), ("300, 1k,2M", (300, 1024, 2 << 20))])
def test_context_lengths_are_read(text: str, tokens: tuple[int, ...]) -> None:
    assert parse_contexts(text) == tokens


def test_quick_is_quick_unless_lengths_are_given() -> None:
    assert contexts_of(None, "8K,1M", quick=True) == (2048,)
    assert contexts_of(None, "8K,1M", quick=False) == (8192, 1 << 20)
    assert contexts_of("4K", "8K,1M", quick=True) == (4096,)


def test_nonsense_is_refused() -> None:
    for text in ("", "8X", "K", "1.5K"):
        with pytest.raises(ConfigError, match="context lengths"):
            parse_contexts(text)
    with pytest.raises(ConfigError, match="multiple"):
        Shape(heads=3, kv_heads=2)
    with pytest.raises(ConfigError, match="fp32, bf16"):
        Shape(dtype="int8")
    with pytest.raises(ConfigError, match="positive"):
        Bench(contexts=(0,))


class TestMachine:
    def test_memory_is_read_in_every_way(self) -> None:
        found = machine.memory_bandwidth(machine.memory_buffer(MIB), rounds=2)
        assert len(found.methods) == 4
        assert found.best == found.methods[found.method] > 0

    def test_the_better_measurement_counts(self) -> None:
        both = machine.Bandwidth({"a": 1.0, "b": 3.0}).merged(machine.Bandwidth({"a": 2.0, "c": 1.0}))
        assert both.methods == {"a": 2.0, "b": 3.0, "c": 1.0}
        assert (both.method, both.best) == ("b", 3.0)

    def test_the_disk_is_read_past_the_page_cache_where_it_can(self, tmp_path: Path) -> None:
        with rawdisk.disk_file(tmp_path, 8 * MIB) as file:
            assert file.path.stat().st_size == 8 * MIB
            assert rawdisk.disk_bandwidth(file, 8 * MIB).best > 0
        assert list(tmp_path.iterdir()) == []

    def test_a_file_system_without_direct_io_is_read_buffered(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = os.open

        def refuses(path: Any, flags: int, mode: int = 0o777, **kwargs: Any) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "no O_DIRECT here")
            return real(path, flags, mode, **kwargs)

        monkeypatch.setattr(os, "open", refuses)
        with rawdisk.disk_file(tmp_path, 4 * MIB) as file:
            assert not file.direct
            assert rawdisk.disk_bandwidth(file, 4 * MIB).best > 0

    def test_fio_is_asked_where_it_is_installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fio = tmp_path / "bin" / "fio"
        fio.parent.mkdir()
        fio.write_text('#!/bin/sh\necho \'{"jobs": [{"read": {"bw_bytes": 1e15}}]}\'\n')
        fio.chmod(0o700)
        monkeypatch.setenv("PATH", str(fio.parent), prepend=os.pathsep)
        with rawdisk.disk_file(tmp_path, 4 * MIB) as file:
            found = rawdisk.disk_bandwidth(file, 4 * MIB)
        assert (found.best, found.method) == (1e15, "fio 256 KiB x 4")

    def test_facts_about_this_process(self) -> None:
        before = machine.CpuUse.now()
        assert machine.available_ram() > 0
        assert machine.peak_rss() > 10 * MIB
        assert 0 <= machine.CpuUse.now().others_since(before) <= 1


class TestCommand:
    def test_json_goes_to_stdout_and_the_tables_elsewhere(self, tmp_path: Path) -> None:
        command = ["decode", "--quick", "--contexts", "300", *SIZES, "--dir", str(tmp_path), "--json", "-"]
        result = CliRunner().invoke(bench.app, command)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["rows"][0]["tokens"] == 300
        assert list(tmp_path.iterdir()) == []
        assert "exact decode" in result.stderr

    def test_json_goes_to_a_file_and_the_tables_to_stdout(self, tmp_path: Path) -> None:
        file = tmp_path / "found.json"
        command = ["decode", "--quick", "--contexts", "1K", *SIZES, "--dir", str(tmp_path), "--json", str(file)]
        result = CliRunner().invoke(bench.app, command)
        assert result.exit_code == 0, result.output
        assert json.loads(file.read_text())["rows"][0]["kv_bytes"] == 1024 * 512
        assert "floors" in result.stdout

    @pytest.mark.parametrize(
        "wrong",
        [
            ["--contexts", "many"],
            ["--heads", "3"],
            ["--steps", "0"],
            ["--dtype", "int8"],
            pytest.param(
                ["--plot", "a.png"],
                marks=pytest.mark.skipif(bool(importlib.util.find_spec("matplotlib")), reason="matplotlib is there"),
            ),
        ],
    )
    def test_wrong_options_are_one_line_and_exit_code_2(self, wrong: list[str]) -> None:
        result = CliRunner().invoke(bench.app, ["decode", "--quick", *SIZES, *wrong])
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1

    def test_a_directory_that_is_not_there_is_an_error(self, tmp_path: Path) -> None:
        result = CliRunner().invoke(bench.app, ["decode", "--quick", *SIZES, "--dir", str(tmp_path / "missing")])
        assert result.exit_code == 1
        assert "missing" in result.stderr


def test_sparse_attention_is_measured_beside_exact(tmp_path: Path) -> None:
    out = tmp_path / "attention.json"
    command = [
        "attention",
        "--contexts",
        "4K",
        "--layers",
        "1",
        "--kv-heads",
        "2",
        "--quick",
        "--json",
        str(out),
        "--look-seconds",
        "1e-9",
    ]
    result = CliRunner().invoke(cli.app, ["bench", *command])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["tokens"], row["kv_bytes"]) == (4096, 4096 * 2 * 2 * 64 * 4)
    assert row["index_bytes"] > 0
    assert row["build_seconds"] > 0
    assert [kind["name"] for kind in row["kinds"]] == ["sharp", "medium", "diffuse"]
    sharp = row["kinds"][0]["use"]
    assert sharp["measured_steps"] in (4, 8), "a head may have needed everything"
    assert 0.5 < sharp["true_recovered_mass"] <= 1
    assert sharp["output_error"] < 0.1
    wrong = CliRunner().invoke(cli.app, ["bench", "attention", "--bits", "5"])
    assert wrong.exit_code == 2
    assert "index_bits is 4 or 8" in wrong.output


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
@pytest.mark.leaks("matplotlib keeps the files of its fonts open")
def test_sparse_attention_is_drawn(tmp_path: Path) -> None:
    kinds = [heads.Kind(name, [0.2], [0.3], [0.1], {}, [0.1]) for name in heads.HEADS]
    rows = [heads.Row(n, 512 * n, 64 * n, 1.0, kinds) for n in (2048, 4096)]
    found = heads.Found(heads.Plan(), {}, machine.Bandwidth({"sum": 1e9}), rows=rows)
    heads.plot(found, tmp_path / "attention.png")
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
@pytest.mark.leaks("matplotlib keeps the files of its fonts open")
def test_steps_from_ssd_and_first_tokens_are_drawn(tmp_path: Path) -> None:
    split = Split(0.025, 0.01, 0.0, 0.0, 0.01, 0.005, 0.01, 0.002)
    way = partial(
        offload.Way, read_bytes=1e6, selected=0.1, mass=0.9, pages={}, rss=1, first=0.1, first_bytes=1e6, split=split
    )
    disk = machine.Bandwidth({"sum": 1e9})
    steps = offload.Found(offload.Plan(), {}, disk, 1e5, 1 << 20, ways=[way("lru, none", [0.02, 0.03], 0.01)])
    steps.in_memory = way("in memory", [0.01], 0.0)
    offload.plot(steps, tmp_path / "offload.png")
    rows = [
        ttft.Row(n, n << 10, n, n / 1e6, n / 1e3, [opening.Way(name, [n / 1e5], [split]) for name in opening.WAYS])
        for n in (2, 8)
    ]
    ttft.plot(ttft.Found("drawn", {}, {}, disk, rows=rows), tmp_path / "ttft.png")
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("offload", "ttft"))


def test_dipr_and_top_k_choose_from_the_same_weights(tmp_path: Path) -> None:
    out = tmp_path / "choice.json"
    result = CliRunner().invoke(cli.app, ["bench", "choice", "--tokens", "2000", "--queries", "2", "--json", str(out)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())["found"]
    assert len(found) == len(choice.ALPHAS)
    for each in found:
        assert abs(each["same_tokens"]["tokens"] - each["dipr"]["tokens"]) <= 0.5
        assert each["same_mass"]["mass"] >= each["dipr"]["mass"]
    one = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04], [0.6, 0.2, 0.1, 0.06, 0.04]], dtype=torch.float64)
    compared = choice.compare({"one": one}, 0.19)
    assert compared.dipr.by_head["one"] == pytest.approx((2.5, 0.85))
    assert (compared.same_tokens.name, compared.same_mass.name) == ("top-2", "top-3")
    assert CliRunner().invoke(cli.app, ["bench", "choice", "--tokens", "0"]).exit_code == 2


def test_overhead_compares_the_same_work(tmp_path: Path) -> None:
    out = tmp_path / "overhead.json"
    command = ["overhead", "--prompt", "40", "--new", "3", "--rounds", "2", *SIZES, "--json", str(out)]
    result = CliRunner().invoke(cli.app, ["bench", *command])
    assert result.exit_code == 0, result.output
    assert "identical" in result.output
    found = json.loads(out.read_text())
    assert found["same_tokens"]
    for way in overhead.WAYS:
        assert len(found[way]["total"]["seconds"]) == 2
        assert found[way]["total"]["ratio"] > 0
    wrong = CliRunner().invoke(cli.app, ["bench", "overhead", "--new", "1"])
    assert wrong.exit_code == 2
    assert "--new at least 2" in wrong.output


@pytest.mark.parametrize("workload", [SIZES, ("--quotation",)], ids=["independent", "quotation"])
def test_the_first_token_of_a_stored_context(tmp_path: Path, workload: tuple[str, ...]) -> None:
    """Every way decodes the same token from the same store; loading whole reads all of it."""
    out = tmp_path / "ttft.json"
    command = ["ttft", "--quick", "--contexts", "2048,3000", *workload, "--dir", str(tmp_path), "--json", str(out)]
    result = CliRunner().invoke(cli.app, ["bench", *command])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert [row["tokens"] for row in found["rows"]] == [2048, 3000]
    for row in found["rows"]:
        ways = dict(zip(opening.WAYS, row["ways"], strict=True))
        assert [way["name"] for way in row["ways"]] == list(opening.WAYS)
        assert ways[opening.WHOLE]["read_bytes"] == row["kv_bytes"]
        assert all(0 < way["read_bytes"] <= 1.5 * row["kv_bytes"] for way in row["ways"]), "from disk, each of them"
        for way in row["ways"]:
            assert way["seconds"] == [way["splits"][0]["total"]]
            adds_up(way["splits"][0])
            assert way["splits"][0]["waited"] > 0
            assert (way["splits"][0]["session"] > 0) == (way["name"] != opening.WHOLE)
            assert way["right"] == (1 if "--quotation" in workload else None)
        assert row["index_bytes"] > 0
    assert set(found["growth"]) == set(opening.WAYS)
    assert not list(tmp_path.glob("bench-*"))


@pytest.mark.parametrize("wrong", [("--rounds", "0"), ("--text", "x")])
def test_what_cannot_be_asked_for_a_first_token_is_said(wrong: tuple[str, str]) -> None:
    assert CliRunner().invoke(cli.app, ["bench", "ttft", *wrong]).exit_code == 2


def test_a_wrong_first_token_is_not_counted_and_an_open_store_reads_what_it_wants(tmp_path: Path) -> None:
    """Codes are in memory, keys and values are not, and nothing but the answer says what is right."""
    subject = subjects.quotation(4096, 2, None)
    subject = replace(subject, settings={**subject.settings, "ssd_rate": 1e6, "page_seconds": 1e-9})  # page by page
    question, before = subject.questions
    stored = opening.Stored(subject, tmp_path / "store")
    subject.model.set_attn_implementation("alaya")
    stored.write(lambda done, of: None)
    for name in opening.WAYS:
        way = opening.Way(name)
        opening.ask(way, stored, question, before)
        assert way.right == 1
        opening.ask(way, stored, replace(question, answer=question.tokens[0]), before)
        assert way.right == 1
    with stored.database(opening.OPEN) as db:
        session, rest = db.create_session(subject.prompt(before))
        subject.model(input_ids=rest, past_key_values=session)
        stats = db.stats()
        assert stats.pages is not None
        assert stats.pages.missed > 0
        assert stats.tiers["host"].used > 0
        opening.let_go(session.session)
        assert db.stats().tiers["host"].used == 0


def adds_up(split: dict[str, float]) -> None:
    """A step is computing, scanning and waiting, and nothing else."""
    assert split["total"] == pytest.approx(split["compute"] + split["index"] + split["waited"])
    assert split["compute"] == pytest.approx(split["session"] + split["model"] + split["attention"])
    assert min(split.values()) >= 0


@pytest.mark.slow
def test_what_is_on_ssd_is_measured_policy_by_policy(tmp_path: Path) -> None:
    out = tmp_path / "offload.json"
    command = [
        "offload",
        "--quick",
        "--layers",
        "2",
        "--alpha",
        "0.05",
        "--guess",
        "none,beside",
        "--path",
        str(tmp_path),
    ]
    done = CliRunner().invoke(cli.app, ["bench", *command, "--json", str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert [way["name"] for way in found["ways"]] == ["lru, none", "lru, beside"]
    assert found["page_rate"] > 0
    for way in (found["in_memory"], *found["ways"]):
        assert len(way["times"]) == 2
        assert min(way["times"]) > 0
        adds_up(way["split"])
        assert way["split"]["total"] >= sum(way["times"]) / 2, "the steps that were timed"
        assert way["split"]["attention"] > 0
    wrong = CliRunner().invoke(cli.app, ["bench", "offload", "--kind", "flat"])
    assert wrong.exit_code == 2
    assert "sharp, medium, diffuse" in wrong.output


@pytest.mark.slow
def test_a_step_that_waits_for_the_disk_says_for_how_long(tmp_path: Path) -> None:
    plan = offload.Plan(
        tokens=8192, ways=(("lru", "none"),), heads=heads.Plan(layers=2, dtype="fp32"), steps=2, warm=1,
        in_memory=False, path=tmp_path,
    )  # fmt: skip
    way = offload.run(plan).ways[0]
    adds_up(asdict(way.split))
    assert way.split.waited >= way.waited > 0, "what the engine counts is inside of what was noted"
    assert way.split.waited < way.waited + 0.5 * way.split.total


@pytest.mark.slow
def test_what_is_larger_than_memory_is_imported_once(tmp_path: Path) -> None:
    out, store = tmp_path / "larger.json", tmp_path / "store"
    command = ["larger", "--quick", "--layers", "2", "--alpha", "0.05", "--path", str(store), "--json", str(out)]
    times = list[float | None]()
    for _ in range(2):
        done = CliRunner().invoke(cli.app, ["bench", *command])
        assert done.exit_code == 0, done.output
        found = json.loads(out.read_text())
        times.append(found["imported"])
        assert len(found["way"]["times"]) == 2
        assert found["way"]["first_bytes"] > 0
        adds_up(found["way"]["split"])
        assert found["index_bytes"] > 0
    assert times[0] is not None
    assert times[1] is None, "the context was there"
    wrong = CliRunner().invoke(cli.app, ["bench", "larger", "--path", str(store), "--context", "1K"])
    assert (wrong.exit_code, "at least 4096" in wrong.output) == (2, True)


@pytest.mark.slow
def test_a_store_of_many_contexts(tmp_path: Path) -> None:
    """It is opened after a process that stored was killed, and every prompt finds what it has in common."""
    out = tmp_path / "many.json"
    command = ["contexts", "--counts", "5,30", "--rounds", "1", "--dir", str(tmp_path), "--json", str(out)]
    result = CliRunner().invoke(cli.app, ["bench", *command])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert [row["contexts"] for row in rows] == [5, 30]
    assert rows[1]["manifest_bytes"] > rows[0]["manifest_bytes"] > 0
    assert all(len(row["opening"]) == 1 and len(row["lookups"]) == 199 and len(row["commits"]) == 5 for row in rows)
    assert not list(tmp_path.glob("bench-*"))
    assert CliRunner().invoke(cli.app, ["bench", "contexts", "--counts", "x"]).exit_code == 2


def test_queries_for_a_passage_find_its_keys_and_no_others() -> None:
    plan = heads.Plan(contexts=(1,), layers=2, passages=True, dtype="fp32")
    made, tokens = heads.Heads(plan), 2 * heads.CHUNK
    passages = np.random.default_rng(0).integers(tokens // heads.PASSAGE, size=(2, plan.kv_heads * plan.group))
    q = made.looking(passages, 3.0)
    for layer in range(plan.layers):
        k = torch.cat([made.chunk(layer, start, heads.CHUNK)[0] for start in range(0, tokens, heads.CHUNK)], 2)[0]
        grouped = q[layer, 0, :, 0].view(plan.kv_heads, plan.group, plan.head_dim)
        scores = (grouped @ k.transpose(1, 2) * plan.head_dim**-0.5).flatten(0, 1)
        near = scores >= scores.amax(1, keepdim=True) + math.log(0.012)
        for head, passage in enumerate(passages[layer]):
            there = near[head].nonzero().ravel() // heads.PASSAGE
            assert set(there.tolist()) == {int(passage)}
            assert there.numel() > heads.PASSAGE // 4
    half = made.chunk(1, heads.CHUNK + 8192, 8192)[0]  # in halves, as an import asks
    assert half.shape == (1, plan.kv_heads, 8192, plan.head_dim)
