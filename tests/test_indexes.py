"""bench index runs tiny here: that everybody answers the same question and is judged right, never how fast."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from alaya_tiers.errors import ConfigError
from alaya_tiers.index import Flat
from alaya_tiers.testing_index import BETA, HEAD, head_keys
from alaya_tiers.tools import cli, contenders, indexes, synthetic
from alaya_tiers.tools.contenders import CONTENDERS, Contender
from alaya_tiers.tools.indexes import Plan, Step, run, tables
from alaya_tiers.tools.synthetic import CHUNK, KINDS, SINKS, Head

EXACT = ("flat", "codes8", "codes4", "faiss-flat")
ABSENT = {c.name: c.needs for c in CONTENDERS if c.needs and importlib.util.find_spec(c.needs) is None}


def small(**changes: object) -> Plan:
    plan = {"contexts": (1500,), "dim": 64, "steps": 2, "visible": 0, "cold_bytes": 0} | changes
    return Plan(**plan)  # type: ignore[arg-type]


class TestHeads:
    def test_keys_are_the_same_however_many_are_asked_for(self) -> None:
        keys = Head(dim=16).keys(CHUNK + 100)
        assert torch.equal(Head(dim=16).keys(50), keys[:50])
        assert torch.equal(Head(dim=16).chunk(1)[:100], keys[CHUNK:])
        assert not torch.equal(Head(dim=16, seed=1).keys(50), keys[:50])

    def test_a_head_is_as_concentrated_as_it_says(self) -> None:
        keys, last = head_keys(4096), math.inf
        for kind in KINDS.values():
            scores = torch.cat([HEAD.queries(kind, i, 4096) for i in range(0, 64, 4)]) @ keys.T / 8.0
            assert float(scores[:, SINKS:].std(1).mean()) == pytest.approx(kind.spread, rel=0.25)
            sinks = (scores[:, :SINKS].mean(1) - scores.mean(1)) / scores.std(1)
            assert float(sinks.mean()) == pytest.approx(kind.sink, abs=1.0)
            mass = float(torch.softmax(scores[:, SINKS:], 1).topk(20).values.sum(1).mean())
            assert mass < last, "kinds go from concentrated to spread out"
            last = mass

    def test_keys_have_outlier_channels_and_queries_lie_elsewhere(self) -> None:
        keys = head_keys(4096)[SINKS:]
        mean = keys.mean(0).abs()
        assert float(mean.max()) > 8 * float(mean.median())
        whiten = torch.linalg.inv(torch.linalg.cholesky(keys.T.cov() + 1e-3 * torch.eye(64)))
        queries = torch.cat([HEAD.queries(KINDS["sharp"], i, 4096) for i in range(0, 64, 4)])
        far, near = ((x - keys.mean(0)) @ whiten.T for x in (queries, keys))
        assert float(far.norm(dim=1).median()) > 3 * float(near.norm(dim=1).median())  # Mahalanobis

    def test_tokens_follow_zipfs_law(self) -> None:
        """The rank of a token is its number: the first 32 make up log 33 of log 32,768."""
        counts = torch.bincount(synthetic._zipf(torch.rand(200_000))).double()
        assert float(counts[:32].sum() / counts.sum()) == pytest.approx(math.log(33) / math.log(32_768), rel=0.05)
        assert float(counts[:320].sum() / counts.sum()) == pytest.approx(math.log(321) / math.log(32_768), rel=0.05)

    def test_odd_shapes_are_refused(self) -> None:
        for wrong in ({"dim": 7}, {"dim": 4}, {"group": 0}):
            with pytest.raises(ConfigError):
                Head(**wrong)


class TestContenders:
    @pytest.mark.parametrize("contender", CONTENDERS, ids=lambda c: c.name)
    def test_answers_are_positions_of_keys_in_reach(self, contender: Contender) -> None:
        if contender.name in ABSENT:
            pytest.skip(contender.hint)
        keys, queries = head_keys(1500), HEAD.queries(KINDS["topical"], 0, 1500)
        want = set(Flat(keys).in_range(queries, BETA).tokens.tolist())
        built = contender.build(keys, 1)
        assert built.nbytes >= 0
        for name, make in built.searches.items():
            got = make()(queries, BETA).tolist()
            assert len(set(got)) == len(got)
            if contender.name in EXACT:
                assert set(got) == want, name
            elif contender.name != "faiss-ivf":  # with a list or two it is not even near
                assert len(want & set(got)) > 0.2 * len(want), name
                assert len(want & set(got)) > 0.5 * len(got), name

    @pytest.mark.parametrize("contender", [c for c in CONTENDERS if c.prefix], ids=lambda c: c.name)
    def test_a_prefix_is_all_they_see(self, contender: Contender) -> None:
        if contender.name in ABSENT:
            pytest.skip(contender.hint)
        assert contender.prefix is not None
        keys, queries = head_keys(1500), HEAD.queries(KINDS["topical"], 0, 1500)
        want = set(Flat(keys[:512]).in_range(queries, BETA).tokens.tolist())
        for name, make in contender.prefix(keys, 512, 1).searches.items():
            got = set(make()(queries, BETA).tolist())
            assert max(got) < 512
            assert len(got & want) >= (0.5 if contender.name == "graph" else 1) * len(want), name

    def test_hnswlibs_search_goes_on_until_nothing_more_is_in_reach(self) -> None:
        keys = torch.randn(1000, 8)
        built = contenders._hnswlib(keys, 1)
        queries = torch.randn(3, 8)
        for beta in (0.0, 2.0, 4.0):
            want = set(Flat(keys).in_range(queries, beta).tokens.tolist())
            got = set(built.searches["hnswlib, ef 1024"]()(queries, beta).tolist())
            assert len(want & got) >= 0.98 * len(want)


class TestRun:
    def test_everybody_is_judged_by_the_same_truth(self) -> None:
        found = run(small(contexts=(1500, 600), kinds=("sharp", "diffuse"), contenders=("flat", "codes8", "graph")))
        assert list(found.rows) == [1500, 600]
        for rows in found.rows.values():
            assert {row.contender for row in rows} == {"flat", "codes8", "graph"}
            for row in rows:
                assert [a.kind for a in row.answers] == ["sharp", "diffuse"]
                for answer in row.answers:
                    assert answer.wanted == rows[0].of(answer.kind).wanted
                    assert 0 < answer.recall <= 1
                    assert 0 < answer.mass <= 1
                    assert answer.seconds > 0
            assert all(a.recall == 1 and a.mass == pytest.approx(a.of_set) for a in rows[0].answers)
        assert found.skipped == {}
        json.dumps(found.as_dict())

    def test_one_that_misses_half_is_seen_and_never_the_fastest(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def half(keys: Tensor, threads: int) -> contenders.Built:
            return contenders.Built(0, {"half": lambda: lambda q, beta: Flat(keys).in_range(q, beta).tokens[::2]})

        monkeypatch.setattr(indexes, "CONTENDERS", (Contender("flat", contenders._flat), Contender("graph", half)))
        found = run(small(kinds=("topical",), contenders=("flat", "graph")))
        half_row = found.rows[1500][1]
        assert half_row.of("topical").recall == pytest.approx(0.5, abs=0.05)
        assert half_row.of("topical").mass < half_row.of("topical").of_set
        half_row.answers[0].seconds = 0.0
        best = found.fastest(1500, "topical")
        assert best is not None
        assert best.name == "flat, torch"
        found.rows[1500] = [half_row]
        assert found.fastest(1500, "topical") is None
        assert "topical: none" in str(tables(found)[0].caption)

    def test_threads_are_put_back(self) -> None:
        before = torch.get_num_threads()
        run(small(kinds=("sharp",), contenders=("flat",), threads=before + 1))
        assert torch.get_num_threads() == before

    def test_mass_is_the_weight_of_what_was_found(self) -> None:
        keys, queries = torch.eye(4), torch.tensor([[2.0 * math.log(3), 0, 0, 0]])
        step = Step.of(keys, queries, 1.0)
        assert step.wanted == {0}
        assert step.mass([0]) == pytest.approx(0.5)
        assert step.mass([0, 1]) == pytest.approx(2 / 3)
        assert step.mass([]) == 0

    def test_nonsense_is_refused(self) -> None:
        for wrong in ({"steps": 0}, {"alpha": 0.0}, {"contenders": ("best",)}, {"kinds": ("dull",)}, {"visible": -1}):
            with pytest.raises(ConfigError):
                small(**wrong)


class TestCommand:
    def test_tables_json_and_filter(self, tmp_path: Path) -> None:
        out = tmp_path / "index.json"
        command = ["bench", "index", "--quick", "--contexts", "1K", "--dim", "64", "--json", str(out)]
        result = CliRunner().invoke(cli.app, command)
        assert result.exit_code == 0, result.output
        assert "Fastest at a recall of 0.95" in result.output
        data = json.loads(out.read_text())
        (rows,) = data["rows"].values()
        assert {row["contender"] for row in rows} == {c.name for c in CONTENDERS} - set(ABSENT)
        assert set(data["skipped"]) == set(ABSENT)
        shares = [each["share"] for each in data["filtered"] if each["name"] == "flat, torch"]
        assert shares == list(indexes.SHARES)
        assert all(each["recall"] == 1 for each in data["filtered"] if each["name"] in ("flat, torch", "faiss Flat"))

    def test_what_is_not_installed_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        command = [
            "bench",
            "index",
            "--quick",
            "--contexts",
            "600",
            "--dim",
            "64",
            "--visible",
            "0",
            "--kinds",
            "sharp",
        ]
        result = CliRunner().invoke(cli.app, [*command, "--only", "flat,faiss-ivf"])
        assert result.exit_code == 0, result.output
        assert "faiss-ivf skipped: pip install 'alaya-tiers[faiss]'" in " ".join(result.output.split())
        for wrong in (["--only", "faiss-flat"], ["--plot", "a.png"]):
            result = CliRunner().invoke(cli.app, [*command, *wrong])
            assert result.exit_code == 2
            assert "pip install 'alaya-tiers[" in result.output

    @pytest.mark.parametrize("wrong", [["--only", "best"], ["--kinds", ""], ["--steps", "0"], ["--contexts", "x"]])
    def test_wrong_options_are_one_line_and_exit_code_2(self, wrong: list[str]) -> None:
        result = CliRunner().invoke(cli.app, ["bench", "index", *wrong])
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1

    @pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
    @pytest.mark.leaks("matplotlib keeps the files of its fonts open")
    def test_a_picture(self, tmp_path: Path) -> None:
        found = run(small(contexts=(600, 900), contenders=("flat", "graph")))
        indexes.plot(found, tmp_path / "index.png")
        assert (tmp_path / "index.png").read_bytes().startswith(b"\x89PNG")
